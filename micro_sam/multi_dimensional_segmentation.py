"""Segmentation of volumes and tracking, gathered under the path that scripts import them from.

Each name lives in `volume` or `tracking` and is loaded when first used.
"""

import importlib
from typing import Any

# Public name -> its module.
_HOMES = {
    "PROJECTION_MODES": "volume.propagate",
    "automatic_3d_segmentation": "volume.automatic",
    "automatic_tracking_implementation": "tracking.workflow",
    "get_napari_track_data": "tracking.workflow",
    "merge_instance_segmentation_3d": "volume.merge",
    "segment_mask_in_volume": "volume.propagate",
    "track_across_frames": "tracking.workflow",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
