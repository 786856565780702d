"""Tables of scores for predictions that were computed before: one set of them, or one per iteration of prompting."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..core.errors import OutputExistsError
from ..core.output import is_same, temporary_path, write_json
from ..core.progress import Step, Steps, drain
from .errors import MissingInputError, UnfitInputsError
from .metrics import check_thresholds, segmentation_scores
from .pairing import LabelImage, find_files, image_name, natural_key, pair_files, read_label_image

_SCORES = ("mSA", "SA50", "SA75", "Precision", "Recall", "F1 Score")


def score_steps(
    gt_paths: Sequence[LabelImage], prediction_paths: Sequence[LabelImage], thresholds: Sequence[float] | None = None,
    **options: Any,
) -> Steps[pd.DataFrame]:
    """Pair and score predictions, see `run_evaluation` and `score_pairs_steps`. Yields `Step`, returns the table."""
    pairs = pair_files(list(gt_paths), list(prediction_paths), ("ground truths", "predictions"))
    return (yield from score_pairs_steps(pairs, thresholds, **options))


def score_pairs_steps(
    pairs: Sequence[tuple[LabelImage, LabelImage]],
    thresholds: Sequence[float] | None = None,
    *,
    label_components: bool = False,
    keys: tuple[str | None, str | None] = (None, None),
    text: str = "Evaluate predictions",
) -> Steps[pd.DataFrame]:
    """Score predictions. Yields `Step`, returns a table with `image` and the scores, one row per image.

    Args:
        pairs: Truth and prediction of each image: files or arrays.
        thresholds: See `run_evaluation`.
        label_components: See `run_evaluation`.
        keys: The names of truth and prediction inside of containers.
        text: What the steps say.
    """
    check_thresholds(thresholds)
    rows = []
    yield Step(0, len(pairs), text)
    for n, (truth_path, prediction_path) in enumerate(pairs):
        truth, prediction = read_label_image(truth_path, keys[0]), read_label_image(prediction_path, keys[1])
        name = image_name(truth_path, n)
        if truth.shape != prediction.shape:
            raise UnfitInputsError(
                f"The truth of {name} has the shape {truth.shape}, but its prediction has {prediction.shape}. Check "
                "that they belong to the same image."
            )
        if label_components:
            from skimage.measure import label
            truth = label(truth)
        rows.append({"image": name, **segmentation_scores(prediction, truth, thresholds)})
        yield Step(n + 1, len(pairs), text)
    return pd.DataFrame(rows)


def run_evaluation(
    gt_paths: list[LabelImage],
    prediction_paths: list[LabelImage],
    save_path: str | os.PathLike | None = None,
    verbose: bool = True,
    thresholds: list[float] | None = None,
    *,
    label_components: bool = False,
) -> pd.DataFrame:
    """Score label images against their ground truth, and average over the images.

    Truth and predictions are paired by their file names if these are the same, else by their order. The scores are
    those of `metrics.segmentation_scores`. They are always computed from the files as they are now.

    Args:
        gt_paths: The ground truth: files, or arrays (Y, X) or (Z, Y, X).
        prediction_paths: The predictions: files or arrays.
        save_path: Where to write the table (CSV, without index). A table of earlier scores is replaced; any other
            file is not.
        verbose: Whether to show a progress bar.
        thresholds: The IoU thresholds of `mSA`; None takes 0.5, 0.55, ..., 0.95.
        label_components: Whether to make each connected component (full connectivity) of the truth an object of its
            own, for truth that is a binary mask.

    Returns:
        One row with the means of `mSA`, `SA50`, `SA75` (not with other thresholds), `Precision`, `Recall` and
        `F1 Score`.

    Raises:
        UnfitInputsError: If numbers, names or shapes differ, or the lists are empty.
        MissingInputError: If a file does not exist.
        OutputExistsError: If there is another file at `save_path`.
        InvalidInputError, ImageReadError: If thresholds or files are wrong.

    Example:
        >>> truth = np.array([[1, 1, 0, 2, 2]])
        >>> run_evaluation([truth], [truth], verbose=False)["mSA"].item()
        1.0
    """
    check_replaceable(save_path)
    steps = score_steps(gt_paths, prediction_paths, thresholds, label_components=label_components)
    table = mean_scores(drain(steps, verbose=verbose))
    if save_path is not None:
        write_csv(table, save_path, index=False)
    return table


def mean_scores(per_image: pd.DataFrame) -> pd.DataFrame:
    """Average the scores over the rows of a table; returns a table with one row."""
    return per_image[[name for name in _SCORES if name in per_image]].mean().to_frame().T


def write_csv(table: pd.DataFrame, path: str | os.PathLike, *, index: bool) -> None:
    """Write a table as CSV completely or not at all."""
    with temporary_path(Path(path).expanduser(), is_folder=False) as new:
        table.to_csv(new, index=index)


def check_replaceable(path: str | os.PathLike | None) -> None:
    """Refuse to replace anything but a table of scores.

    Raises:
        OutputExistsError: If there is anything else at the path.
    """
    if path is None or not (path := Path(path).expanduser()).exists():
        return
    try:
        columns = set(pd.read_csv(path, nrows=0).columns)
    except (OSError, ValueError):  # a folder, or no CSV at all
        columns = set()
    if not {"mSA", "Precision"} <= columns:
        raise OutputExistsError(f"{path} exists and is no table of scores. Choose another save_path.")


def run_evaluation_for_iterative_prompting(
    gt_paths: list[str | os.PathLike],
    prediction_root: str | os.PathLike,
    experiment_folder: str | os.PathLike,
    start_with_box_prompt: bool = False,
    overwrite_results: bool = False,
    use_masks: bool = False,
) -> pd.DataFrame:
    """Score the results of iterative prompting: `iteration00`, `iteration01` and so on.

    The table is written to
    `<experiment>/results/iterative_prompting_{with|without}_mask/iterative_prompts_start_{box|point}.csv`, and the
    files that it was made from to a JSON file beside it. As long as these stay the same it is read from there.

    Args:
        gt_paths: The ground truth.
        prediction_root: The folder with one folder of label images per iteration.
        experiment_folder: Where to write the results.
        start_with_box_prompt: Whether the first prompt was a box; decides the name of the table only.
        overwrite_results: Whether to replace a table that was made from other files.
        use_masks: Whether masks were used as prompts; decides the name of the table only.

    Returns:
        One row per iteration with the columns of `run_evaluation`.

    Raises:
        OutputExistsError: If there is a table that was made from other files, and `overwrite_results` is not set.
        MissingInputError: If there are no iterations, or a file does not exist.
        UnfitInputsError: If the predictions of an iteration do not fit to the truth.
    """
    folders = sorted((p for p in Path(prediction_root).glob("iteration*") if p.is_dir()), key=natural_key)
    if not folders:
        raise MissingInputError(f"There is no folder iteration00 or the like in {prediction_root}. Check the path.")
    masks, start = ("with" if use_masks else "without"), ("box" if start_with_box_prompt else "point")
    path = Path(experiment_folder) / "results" / f"iterative_prompting_{masks}_mask"
    path = path / f"iterative_prompts_start_{start}.csv"
    record_path = path.with_suffix(".json")
    predictions = {folder.name: [file.path for file in find_files([folder])] for folder in folders}
    settings = {"truth": _fingerprint(gt_paths), **{name: _fingerprint(f) for name, f in predictions.items()}}
    if path.exists() and not overwrite_results:
        if is_same(record_path, settings):
            return pd.read_csv(path, index_col="iteration")
        raise OutputExistsError(
            f"{path} exists, and it is not known from which files it was made. Pass overwrite_results=True to replace "
            "it, or choose another experiment_folder."
        )
    table = pd.concat([
        mean_scores(drain(score_steps(gt_paths, files, text=f"Evaluate {name}")))
        for name, files in predictions.items()
    ], ignore_index=True)
    table.index.name = "iteration"
    write_csv(table, path, index=True)
    write_json(record_path, {"micro_sam": {"settings": settings}})
    return table


def _fingerprint(paths: Sequence[str | os.PathLike]) -> str:
    """Hash of label images by content, in their order."""
    import xxhash

    digest = xxhash.xxh3_128()
    for path in paths:
        labels = np.ascontiguousarray(read_label_image(path))
        digest.update(f"{labels.dtype}{labels.shape}".encode())
        digest.update(labels)
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.evaluate`."""
    from importlib import import_module

    return import_module("micro_sam.cli.evaluate").main(argv)
