"""The values of settings that a grid search tries by default."""

from collections.abc import Sequence
from typing import Any

from ..core.errors import UnsupportedError

GridSearchValues = dict[str, list[Any]]


def _decimals(start: int, stop: int, step: int, unit: int) -> list[float]:
    """Decimal numbers without the rounding errors of adding steps; `stop` is included, all are multiples of 1/unit."""
    return [k / unit for k in range(start, stop + 1, step)]


def default_grid_search_values_amg(
    iou_thresh_values: list[float] | None = None, stability_score_values: list[float] | None = None
) -> GridSearchValues:
    """Return the default grid for AMG: 13 x 15 = 195 combinations.

    Args:
        iou_thresh_values: Values of `pred_iou_thresh`; None takes 0.6, 0.625, ..., 0.9.
        stability_score_values: Values of `stability_score_thresh`; None takes 0.6, 0.625, ..., 0.95.
    """
    return {
        "pred_iou_thresh": _or(iou_thresh_values, _decimals(600, 900, 25, 1000)),
        "stability_score_thresh": _or(stability_score_values, _decimals(600, 950, 25, 1000)),
    }


def default_grid_search_values_instance_segmentation_with_decoder(
    center_distance_threshold_values: list[float] | None = None,
    boundary_distance_threshold_values: list[float] | None = None,
    distance_smoothing_values: list[float] | None = None,
    min_size_values: list[float] | None = None,
) -> GridSearchValues:
    """Return the default grid for AIS: 5 x 5 x 6 x 3 = 450 combinations.

    Args:
        center_distance_threshold_values: None takes 0.3, 0.4, ..., 0.7.
        boundary_distance_threshold_values: None takes 0.3, 0.4, ..., 0.7.
        distance_smoothing_values: Sigmas in pixels; None takes 1.0, 1.2, ..., 2.0.
        min_size_values: Smallest object in pixels; None takes 50, 100 and 200.
    """
    return {
        "center_distance_threshold": _or(center_distance_threshold_values, _decimals(3, 7, 1, 10)),
        "boundary_distance_threshold": _or(boundary_distance_threshold_values, _decimals(3, 7, 1, 10)),
        "distance_smoothing": _or(distance_smoothing_values, _decimals(10, 20, 2, 10)),
        "min_size": _or(min_size_values, [50, 100, 200]),
    }


def default_grid_search_values_apg(
    min_distance_values: list[float] | None = None,
    threshold_abs_values: list[float] | None = None,
    multimasking_values: list[float] | None = None,
    prompt_selection_values: list[float] | None = None,
    min_size_values: list[float] | None = None,
    nms_threshold_values: list[float] | None = None,
    intersection_over_min_values: list[bool] | None = None,
    mask_threshold_values: list[float | str] | None = None,
    center_distance_threshold_values: list[float] | None = None,
    boundary_distance_threshold_values: list[float] | None = None,
) -> GridSearchValues:
    """Return the default grid for APG: 5 x 5 x 3 x 5 x 2 = 750 combinations.

    Args:
        min_distance_values: Not supported: prompts are derived by `point_prompts_from_maps`, which has no such option.
        threshold_abs_values: Not supported, likewise.
        multimasking_values: Whether to predict three masks per prompt; searched only if given.
        prompt_selection_values: Not supported, likewise.
        min_size_values: Smallest object in pixels; None takes 50, 100 and 200.
        nms_threshold_values: None takes 0.5, 0.6, ..., 0.9.
        intersection_over_min_values: None takes True and False.
        mask_threshold_values: Thresholds of logits, or `auto`; searched only if given.
        center_distance_threshold_values: None takes 0.3, 0.4, ..., 0.7.
        boundary_distance_threshold_values: None takes 0.3, 0.4, ..., 0.7.

    Raises:
        UnsupportedError: If values for a setting that is not supported are given.
    """
    unsupported = {
        "min_distance_values": min_distance_values, "threshold_abs_values": threshold_abs_values,
        "prompt_selection_values": prompt_selection_values,
    }
    for name, values in unsupported.items():
        if values is not None:
            raise UnsupportedError(
                f"{name} is for another way of placing prompts, which is not part of this version. Leave it out; for "
                "prompts of your own pass a function as `prompt_function` to `generate`."
            )
    optional = {"multimasking": multimasking_values, "mask_threshold": mask_threshold_values}
    return {
        "center_distance_threshold": _or(center_distance_threshold_values, _decimals(3, 7, 1, 10)),
        "boundary_distance_threshold": _or(boundary_distance_threshold_values, _decimals(3, 7, 1, 10)),
        **{name: list(values) for name, values in optional.items() if values is not None},
        "min_size": _or(min_size_values, [50, 100, 200]),
        "nms_threshold": _or(nms_threshold_values, _decimals(5, 9, 1, 10)),
        "intersection_over_min": _or(intersection_over_min_values, [True, False]),
    }


def _or(values: Sequence[Any] | None, default: list[Any]) -> list[Any]:
    return default if values is None else list(values)
