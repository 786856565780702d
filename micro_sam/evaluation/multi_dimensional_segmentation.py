"""Interactive segmentation of volumes, evaluated: the ground truth prompts each object in one slice.

From that slice the object is followed through the volume as in the annotator, and the result is compared with the
ground truth. A grid search finds the best settings for following.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, OutputExistsError, nearest_names
from ..core.output import is_same, write_json
from ..core.progress import Step, Steps, drain, during
from ..models.loading import get_sam_model
from ..volume.propagate import PROJECTION_MODES
from .evaluation import write_csv
from .metrics import check_pair, dice_per_class, dice_score, segmentation_scores
from .prompted_volume import PromptedVolume, PropagationOptions, prompts_from_ground_truth

__all__ = [
    "METRICS", "PromptedVolume", "PropagationOptions", "default_grid_search_values_multi_dimensional_segmentation",
    "evaluation_scores", "prompts_from_ground_truth", "run_multi_dimensional_segmentation_grid_search",
    "segment_slices_from_ground_truth",
]

Metric = Literal["sa", "dice", "dice_per_class"]
METRICS = {"sa": "mSA", "dice": "Dice", "dice_per_class": "Dice"}
"""The metrics, and for each the score by which the grid search chooses."""

_ALL_RESULTS = "all_grid_search_results.csv"
_BEST_RESULT = "grid_search_params_multi_dimensional_segmentation.csv"


def evaluation_scores(
    segmentation: np.ndarray, ground_truth: np.ndarray, evaluation_metric: Metric = "sa"
) -> dict[str, float]:
    """Compare labels (Z, Y, X) with the ground truth.

    Returns:
        For `sa` the segmentation accuracies `mSA`, `SA50` and `SA75`; for `dice` the `Dice` coefficient of the
        foreground; for `dice_per_class` that of each id of the ground truth, `Dice <id>`, and their mean, `Dice`.

    Raises:
        InvalidInputError: For an unknown metric, or different shapes.
    """
    _check_metric(evaluation_metric)
    segmentation, truth = check_pair(segmentation, ground_truth)
    if evaluation_metric == "sa":
        scores = segmentation_scores(segmentation, truth)
        return {name: scores[name] for name in ("mSA", "SA50", "SA75")}
    if evaluation_metric == "dice":
        return {"Dice": dice_score(segmentation, truth)}
    scores = {f"Dice {id_}": value for id_, value in dice_per_class(segmentation, truth).items()}
    return {"Dice": float(np.mean([*scores.values()])) if scores else 1.0, **scores}


def _check_metric(name: str) -> None:
    if name not in METRICS:
        raise InvalidInputError(f"There is no metric {name!r}. {nearest_names(name, METRICS)}")


def segment_slices_from_ground_truth(
    volume: np.ndarray,
    ground_truth: np.ndarray,
    model_type: str,
    checkpoint_path: str | os.PathLike | None = None,
    embedding_path: str | os.PathLike | None = None,
    save_path: str | os.PathLike | None = None,
    iou_threshold: float = 0.8,
    projection: str | dict = "mask",
    box_extension: float | int = 0.025,
    device: str | torch.device | None = None,
    interactive_seg_mode: str = "box",
    verbose: bool = False,
    return_segmentation: bool = False,
    min_size: int = 0,
    evaluation_metric: Metric = "sa",
    *,
    prompt_slice: Literal["middle", "largest"] = "middle",
    max_area_change: float | None = None,
    max_drift: float | None = None,
    seed: int = 0,
    predictor: SamPredictor | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> dict[str, float] | tuple[dict[str, float], np.ndarray]:
    """Segment each object of a volume from a prompt in one slice, and compare with the ground truth.

    Where objects overlap, the one with the higher predicted IoU in that slice gets the pixel.

    Args:
        volume: Volume (Z, Y, X[, C]), may be lazy.
        ground_truth: Label volume (Z, Y, X).
        model_type: The model.
        checkpoint_path: A checkpoint instead of a published model.
        embedding_path: Where to keep the embeddings, a zarr folder; None keeps them in memory.
        save_path: Where to write the segmentation (`.tif` or `.zarr`). If it is there already and was made in the
            same way, it is only evaluated.
        iou_threshold: An object ends where the IoU of its masks in neighbouring slices is smaller.
        projection: How the mask of a slice prompts the next one, see `propagate_objects`.
        box_extension: How far projected boxes grow: below 1 a fraction of the side length, else pixels.
        device: The device; None chooses it.
        interactive_seg_mode: `box` or `points`, see `prompts_from_ground_truth`.
        verbose: Whether to show progress.
        return_segmentation: Whether to return the segmentation as well.
        min_size: Objects with fewer pixels in the slice of their prompt are neither segmented nor expected.
        evaluation_metric: `sa`, `dice` or `dice_per_class`, see `evaluation_scores`.
        prompt_slice: Where objects are prompted: `middle` or `largest`, see `prompts_from_ground_truth`.
        max_area_change: An object ends where its area changes by more than this factor; None for no limit.
        max_drift: An object ends where its centroid moves by more than this fraction of its diameter; None for no
            limit.
        seed: Seed of the random points.
        predictor: A model that is loaded already; `model_type`, `checkpoint_path` and `device` are not used then.
        batch_size: Slices per call of the encoder.
        overwrite: Whether to replace a segmentation at `save_path` that was made otherwise.

    Returns:
        The scores; and labels uint32 (Z, Y, X) with the ids of the ground truth if asked for.

    Raises:
        InvalidInputError: If arguments do not fit.
        NoObjectsError: If there are no objects, or all are too small.
        OutputExistsError: If there is something else at `save_path`.

    Example:
        >>> scores = segment_slices_from_ground_truth(volume, truth, "vit_t_lite")  # doctest: +SKIP
    """
    _check_metric(evaluation_metric)
    options = PropagationOptions(
        iou_threshold, projection, box_extension, interactive_seg_mode, min_size, prompt_slice, max_area_change,
        max_drift, seed,
    )
    prompts_from_ground_truth(ground_truth, interactive_seg_mode, min_size, prompt_slice=prompt_slice, seed=seed)
    predictor = predictor or get_sam_model(model_type, device=device, checkpoint_path=checkpoint_path)
    prompted = PromptedVolume(predictor, volume, ground_truth, embedding_path, batch_size)
    labels, truth = drain(prompted.saved_steps(options, save_path, overwrite), verbose=verbose)
    scores = evaluation_scores(labels, truth, evaluation_metric)
    return (scores, labels) if return_segmentation else scores


def default_grid_search_values_multi_dimensional_segmentation(
    iou_threshold_values: list[float] | None = None,
    projection_method_values: str | dict | list | None = None,
    box_extension_values: float | int | list | None = None,
) -> dict[str, list]:
    """Return the values of `run_multi_dimensional_segmentation_grid_search`.

    Args:
        iou_threshold_values: By default 0.5, 0.6, ..., 0.9.
        projection_method_values: By default all `PROJECTION_MODES`.
        box_extension_values: By default 0, 0.025, ..., 0.25.

    Returns:
        The values of `iou_threshold`, `projection` and `box_extension`; 275 combinations by default.
    """
    def values(given: Any, default: list) -> list:
        if given is None:
            return default
        return list(given) if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else [given]

    return {
        "iou_threshold": values(iou_threshold_values, [n / 10 for n in range(5, 10)]),
        "projection": values(projection_method_values, [*PROJECTION_MODES]),
        "box_extension": values(box_extension_values, [n / 40 for n in range(11)]),
    }


def run_multi_dimensional_segmentation_grid_search(
    volume: np.ndarray,
    ground_truth: np.ndarray,
    model_type: str,
    checkpoint_path: str | os.PathLike | None,
    embedding_path: str | os.PathLike | None,
    result_dir: str | os.PathLike,
    interactive_seg_mode: str = "box",
    verbose: bool = False,
    grid_search_values: dict[str, list] | None = None,
    min_size: int = 0,
    evaluation_metric: Metric = "sa",
    store_segmentation: bool = False,
    *,
    device: str | torch.device | None = None,
    predictor: SamPredictor | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> str:
    """Find the best settings for following objects through a volume, see `segment_slices_from_ground_truth`.

    The model is loaded and the volume is embedded once. Each combination is written when it is done; an interrupted
    search goes on there.

    Args:
        volume: See `segment_slices_from_ground_truth`, also for all arguments that are not listed.
        ground_truth: .
        model_type: .
        checkpoint_path: .
        embedding_path: .
        result_dir: A folder for the tables.
        interactive_seg_mode: .
        verbose: .
        grid_search_values: The values of `iou_threshold`, `projection` and `box_extension`; None for the default.
        min_size: .
        evaluation_metric: What decides: `mSA` for `sa`, else `Dice`.
        store_segmentation: Whether to keep the segmentations as `segmentations/<number>.tif`, numbered as the rows.
        device: .
        predictor: .
        batch_size: .
        overwrite: Whether to replace the results of another search in the folder.

    Returns:
        The path of a table with the best settings and their score; that of all is `all_grid_search_results.csv`.

    Raises:
        InvalidInputError: If other than these three parameters are searched, or a list is empty.
        OutputExistsError: If the folder has results of another search, and `overwrite` is not set.
    """
    _check_metric(evaluation_metric)
    values = grid_search_values or default_grid_search_values_multi_dimensional_segmentation()
    expected = default_grid_search_values_multi_dimensional_segmentation()
    if set(values) != set(expected) or not all(len(v) for v in values.values()):
        raise InvalidInputError(
            f"grid_search_values must have a list for each of {', '.join(expected)}, but has "
            f"{ {name: len(v) for name, v in values.items()} } (name: number of values)."
        )
    prompts_from_ground_truth(ground_truth, interactive_seg_mode, min_size)
    predictor = predictor or get_sam_model(model_type, device=device, checkpoint_path=checkpoint_path)
    search = _GridSearch(
        PromptedVolume(predictor, volume, ground_truth, embedding_path, batch_size), Path(result_dir),
        [dict(zip(expected, combination)) for combination in itertools.product(*(values[name] for name in expected))],
        PropagationOptions(interactive_seg_mode=interactive_seg_mode, min_size=min_size), evaluation_metric,
        store_segmentation,
    )
    return str(drain(search.steps(overwrite), verbose=verbose))


@dataclass(frozen=True)
class _GridSearch:
    """Checked arguments of `run_multi_dimensional_segmentation_grid_search`."""

    prompted: PromptedVolume
    folder: Path
    combinations: list[dict[str, Any]]
    options: PropagationOptions
    metric: str
    store: bool

    def steps(self, overwrite: bool) -> Steps[Path]:
        """Evaluate all combinations and write the tables; returns the path of the best one."""
        record, table_path = self.folder / "grid_search_settings.json", self.folder / _ALL_RESULTS
        settings = {
            **self.prompted.settings(self.options), "metric": self.metric, "combinations": self.combinations,
        }
        rows = []
        if not overwrite and is_same(record, settings):
            rows = pd.read_csv(table_path).to_dict("records") if table_path.exists() else []
        elif table_path.exists() and not overwrite:
            raise OutputExistsError(
                f"{table_path} exists, and it is not known how it was made. Choose another result_dir, or pass "
                "overwrite to replace it."
            )
        else:
            table_path.unlink(missing_ok=True)
            write_json(record, {"micro_sam": {"settings": settings}})
        total, text = len(self.combinations), "Grid search"
        yield Step(len(rows), total, text)
        for n, combination in enumerate(self.combinations[len(rows):], len(rows)):
            path = self.folder / "segmentations" / f"{n:03}.tif" if self.store else None
            options = PropagationOptions(**{**asdict(self.options), **combination})
            work = self.prompted.saved_steps(options, path, overwrite)
            labels, truth = yield from during(work, Step(n, total, text))
            rows.append({**self._described(combination), **evaluation_scores(labels, truth, self.metric)})
            write_csv(pd.DataFrame(rows), table_path, index=False)
            yield Step(n + 1, total, text)
        criterion = METRICS[self.metric]
        table = pd.DataFrame(rows)
        best = table.loc[[table[criterion].idxmax()], [criterion, *self.combinations[0]]]
        write_csv(best, self.folder / _BEST_RESULT, index=False)
        return self.folder / _BEST_RESULT

    @staticmethod
    def _described(combination: Mapping[str, Any]) -> dict[str, Any]:
        projection = combination["projection"]
        text = projection if isinstance(projection, str) else json.dumps(dict(projection))
        return {**combination, "projection": text}
