"""Which settings were best in a grid search."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..core.errors import InvalidInputError, MissingFileError, nearest_names
from .evaluation import write_csv
from .grid_search import GridError

# Mode -> name of folders and files.
MODE_NAMES = {"amg": "amg", "ais": "instance_segmentation_with_decoder", "apg": "apg"}
# Settings that only one mode has, to tell from a choice of settings of which mode it is.
_OWN_SETTINGS = {
    "pred_iou_thresh": "amg", "stability_score_thresh": "amg", "box_nms_thresh": "amg", "nms_threshold": "apg",
    "intersection_over_min": "apg", "multimasking": "apg", "mask_threshold": "apg", "refine_with_box_prompts": "apg",
    "distance_smoothing": "ais", "foreground_smoothing": "ais",
}


def evaluate_instance_segmentation_grid_search(
    result_dir: str | os.PathLike,
    grid_search_parameters: list[str],
    criterion: str = "mSA",
    *,
    image_names: Sequence[str] | None = None,
) -> tuple[dict[str, Any], float]:
    """Find the settings that are best on average over the images of a grid search.

    Args:
        result_dir: The folder with the results, one CSV per image.
        grid_search_parameters: The settings that were searched.
        criterion: The score to go by: `mSA`, `SA50`, `SA75`, `Precision`, `Recall` or `F1`.
        image_names: The images to take, by the names of their files without suffix; None takes all results.

    Returns:
        The best settings with the types that they had in the search (the first ones, if several are equally good),
        and their mean score.

    Raises:
        MissingFileError: If there are no results.
        GridError: If the images were searched with different grids.
        InvalidInputError: If there is no such score or setting.
    """
    paths = sorted(Path(result_dir).glob("*.csv"))
    if image_names is not None:
        paths = [Path(result_dir) / f"{name}.csv" for name in image_names]
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        what = missing[0] if missing else Path(result_dir) / "*.csv"
        raise MissingFileError(f"There is no file {what} with results. Run the grid search first.")
    # As text, so that integers, booleans and None come back as what they were.
    text = dict.fromkeys(grid_search_parameters, str)
    tables = {path: pd.read_csv(path, dtype=text, keep_default_na=False) for path in paths}
    for path, table in tables.items():
        for name in (criterion, *grid_search_parameters):
            if name not in table:
                raise InvalidInputError(f"{path} has no column {name!r}. {nearest_names(name, table.columns)}")
        if {*_settings_of(table, grid_search_parameters)} != {*_settings_of(tables[paths[0]], grid_search_parameters)}:
            raise GridError(
                f"{path} and {paths[0]} are results of different grids. Use one folder for each grid search."
            )
    table = pd.concat(tables.values(), ignore_index=True)
    means = table.astype({criterion: float}).groupby(list(grid_search_parameters), sort=False)[criterion].mean()
    best = means.index[int(np.argmax(means.to_numpy()))]
    best = best if isinstance(best, tuple) else (best,)
    return {name: _parse(value) for name, value in zip(grid_search_parameters, best)}, float(means.max())


def _settings_of(table: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return table[list(names)].itertuples(index=False, name=None)


def _parse(text: str) -> Any:
    """The value that a CSV holds as text."""
    constants = {"True": True, "False": False, "": None}
    if text in constants:
        return constants[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def save_grid_search_best_params(
    best_kwargs: dict[str, Any],
    best_msa: float,
    grid_search_result_dir: str | os.PathLike | None = None,
    *,
    mode: str | None = None,
) -> None:
    """Write the best settings to `<dir>/results/grid_search_params_<mode>.csv`.

    Args:
        best_kwargs: The settings.
        best_msa: Their score.
        grid_search_result_dir: The folder; None is the current one.
        mode: `amg`, `ais` or `apg`. None derives it from the settings; those that AIS and APG have in common count as
            AIS.

    Raises:
        InvalidInputError: If the mode is unknown, or the settings belong to different modes.
    """
    found = {_OWN_SETTINGS[name] for name in best_kwargs if name in _OWN_SETTINGS}
    if mode is None:
        if len(found) > 1:
            raise InvalidInputError(f"The settings {sorted(best_kwargs)} belong to different modes. Pass mode.")
        mode = next(iter(found), "ais")
    if mode not in MODE_NAMES:
        raise InvalidInputError(f"mode must be one of {', '.join(MODE_NAMES)}, but is {mode!r}.")
    path = Path(grid_search_result_dir or ".") / "results" / f"grid_search_params_{MODE_NAMES[mode]}.csv"
    write_csv(pd.DataFrame([{"best_msa": best_msa, **best_kwargs}]), path, index=False)
