"""What the fields of panels start with: general values, and those that suit a model. No Qt, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..models.specs import MODEL_SETTINGS

# The options of `generate`, where rows of models have shorter names.
_AIS_NAMES = {
    "center_distance_thresh": "center_distance_threshold",
    "boundary_distance_thresh": "boundary_distance_threshold",
    "distance_smoothing": "distance_smoothing",
    "min_size": "min_size",
}
_AIS = {
    "center_distance_threshold": 0.5,
    "boundary_distance_threshold": 0.5,
    "foreground_threshold": 0.5,
    "distance_smoothing": 1.6,
    "min_size": 100,
}
_APG = {
    "center_distance_threshold": 0.5,
    "boundary_distance_threshold": 0.5,
    "foreground_threshold": 0.5,
    "nms_threshold": 0.9,
    "min_size": 25,
}
_AMG = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, "box_nms_thresh": 0.7, "min_object_size": 100}
_ND = {"projection": "single_point", "iou_threshold": 0.5, "box_extension": 0.05}

MOTION_SMOOTHING = 0.5
GAP_CLOSING = 2
MIN_EXTENT = 2


@dataclass(frozen=True)
class PanelDefaults:
    """Values by name of the option.

    `ais`, `apg` and `amg` are of automatic segmentation, `nd` of the propagation along z or time; `min_size` and
    `min_object_size` are in pixels, `distance_smoothing` in pixels, `box_extension` is a fraction of the box, all
    thresholds are 0…1.
    """

    ais: Mapping[str, Any]
    apg: Mapping[str, Any]
    amg: Mapping[str, Any]
    nd: Mapping[str, Any]

    def automatic(self, mode: str) -> Mapping[str, Any]:
        """The values for the mode `ais`, `apg` or `amg`."""
        return {"ais": self.ais, "apg": self.apg, "amg": self.amg}[mode]


def panel_defaults(model_name: str | None = None) -> PanelDefaults:
    """Return the values for a model. Panels, launch functions and commands start with the same ones.

    Args:
        model_name: Name of the model. None, own models and those without settings of their own get the general values.

    Example:
        >>> panel_defaults("vit_b_lm").ais["center_distance_threshold"], panel_defaults("vit_b_lm").nd["projection"]
        (0.4, 'box')
    """
    ais, amg, nd = dict(_AIS), dict(_AMG), dict(_ND)
    settings = MODEL_SETTINGS.get(model_name)
    if settings is not None:
        ais |= {_AIS_NAMES[name]: value for name, value in settings.ais.items()}
        amg |= settings.amg
        nd |= {"projection" if name == "projection_mode" else name: value for name, value in settings.nd.items()}
    return PanelDefaults(*(MappingProxyType(values) for values in (ais, _APG, amg, nd)))
