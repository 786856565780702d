"""Which prompts an evaluation of interactive segmentation uses."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from ..core.errors import InvalidInputError

ExperimentSetting = dict[str, Any]
"""`use_points`, `use_boxes`, `n_positives` and `n_negatives`: the prompts for each object."""
ExperimentSettings = list[ExperimentSetting]

_KEYS = ("use_points", "use_boxes", "n_positives", "n_negatives")


def _points(n_positives: int, n_negatives: int) -> ExperimentSetting:
    return {"use_points": True, "use_boxes": False, "n_positives": int(n_positives), "n_negatives": int(n_negatives)}


def _box() -> ExperimentSetting:
    return {"use_points": False, "use_boxes": True, "n_positives": 0, "n_negatives": 0}


def full_experiment_settings(
    use_boxes: bool = False,
    positive_range: Sequence[int] | None = None,
    negative_range: Sequence[int] | None = None,
) -> ExperimentSettings:
    """Return all combinations of numbers of points.

    Args:
        use_boxes: Whether to add the box alone.
        positive_range: Numbers of positive points; None takes 1, 2, 4, 8, 16.
        negative_range: Numbers of negative points; None takes 0, 1, 2, 4, 8, 16.

    Example:
        >>> len(full_experiment_settings(use_boxes=True))
        31
    """
    positive_range = (1, 2, 4, 8, 16) if positive_range is None else positive_range
    negative_range = (0, 1, 2, 4, 8, 16) if negative_range is None else negative_range
    return [_points(*numbers) for numbers in product(positive_range, negative_range)] + ([_box()] if use_boxes else [])


def default_experiment_settings() -> ExperimentSettings:
    """Return a small choice: 1, 2 or 4 positive points with 0, 4 or 8 negative ones, and the box alone."""
    return [_points(1, 0), _points(2, 4), _points(4, 8), _box()]


def check_setting(setting: ExperimentSetting) -> ExperimentSetting:
    """Return a setting with all its keys.

    Raises:
        InvalidInputError: If it has unknown keys, no prompts, or points without a positive one.
    """
    unknown = [key for key in setting if key not in _KEYS]
    if unknown:
        raise InvalidInputError(f"A setting has the keys {', '.join(_KEYS)}, but {unknown[0]!r} was given.")
    full = {"use_points": False, "use_boxes": False, "n_positives": 0, "n_negatives": 0} | setting
    full = {key: (bool if key.startswith("use") else int)(full[key] or 0) for key in _KEYS}
    if not (full["use_points"] or full["use_boxes"]):
        raise InvalidInputError("There would be no prompts: set use_points or use_boxes.")
    if full["use_points"] and (full["n_positives"] < 1 or full["n_negatives"] < 0):
        raise InvalidInputError(
            f"Points need n_positives of at least 1 and n_negatives of at least 0, but got {full['n_positives']} and "
            f"{full['n_negatives']}."
        )
    return full if full["use_points"] else full | {"n_positives": 0, "n_negatives": 0}


def get_experiment_setting_name(setting: ExperimentSetting) -> str:
    """Return the name of a setting, which serves as folder: `points/p1-n0`, `box/p0-n0` or `points_and_box/p1-n0`.

    Raises:
        InvalidInputError: See `check_setting`.

    Example:
        >>> get_experiment_setting_name(dict(use_points=True, use_boxes=False, n_positives=2, n_negatives=4))
        'points/p2-n4'
    """
    setting = check_setting(setting)
    kinds = {(True, False): "points", (False, True): "box", (True, True): "points_and_box"}
    kind = kinds[setting["use_points"], setting["use_boxes"]]
    return f"{kind}/p{setting['n_positives']}-n{setting['n_negatives']}"
