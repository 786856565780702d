"""How sure one may be of objects, which of them to look at first, and what is measured of them."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from segment_anything import SamPredictor

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError
from ..core.labels import boxes_of_labels, check_labels
from ..core.masks import BoxedMask, crop_mask, intersection, read_record
from ..core.progress import Steps
from ..core.prompts import BatchedPrompts
from ..embeddings.encode import set_precomputed
from ..embeddings.features import ImageEmbeddings
from ..inference import prediction_steps, tiled_prediction_steps

if TYPE_CHECKING:
    import pandas as pd

_BATCH_SIZE = 32


class Score(NamedTuple):
    """How sure the model is of an object, both from 0 to about 1; None for what is not known.

    Attributes:
        predicted_iou: The IoU with the true object that the model predicts.
        stability: How little the mask changes with the threshold. For objects that were not prompted: the IoU of the
            object and the mask that the model gives for its box.
    """

    predicted_iou: float | None
    stability: float | None = None

    @property
    def confidence(self) -> float | None:
        """The smaller one of what is known, from 0 to 1; None if nothing is."""
        known = [float(v) for v in self if v is not None and not math.isnan(v)]
        return min(max(min(known), 0.0), 1.0) if known else None


def mean_score(scores: Iterable[Score]) -> Score | None:
    """The mean over the planes of an object, of each value where it is known; None if nothing is."""
    means = []
    for values in zip(*scores):
        known = [float(v) for v in values if v is not None and not math.isnan(v)]
        means.append(sum(known) / len(known) if known else None)
    return None if not means or means == [None, None] else Score(*means)


def rank(scores: Mapping[int, Score | Sequence[float | None] | None], ids: Iterable[int]) -> list[int]:
    """Order objects (or planes) for a review.

    Args:
        scores: Scores, or pairs of predicted IoU and stability, by id; ids that are missing are unknown.
        ids: The ids to order.

    Returns:
        The ids, the least confident first and unknown ones last; equal ones by ascending id.

    Example:
        >>> rank({1: Score(0.9, 0.8), 2: Score(0.5), 3: None}, [1, 2, 3, 4])
        [2, 1, 3, 4]
    """
    def key(object_id: int) -> tuple[float, int]:
        score = scores.get(object_id)
        confidence = None if score is None else Score(*score).confidence
        return (math.inf if confidence is None else confidence), object_id

    return sorted(ids, key=key)


def score_labels_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    labels: np.ndarray,
    i: int | None = None,
    *,
    ids: Iterable[int] | None = None,
) -> Steps[dict[int, Score]]:
    """Ask the model for its opinion on objects that it was not prompted for, by a box around each of them.

    Args:
        predictor: The predictor; what is set in it stays.
        image_embeddings: The embeddings, plain or tiled.
        labels: Labels (Y, X) of the image or of plane `i`.
        i: The plane, for embeddings of a stack.
        ids: Which objects; None for all.

    Returns:
        The score of each object that is there.

    Raises:
        InvalidInputError: If the labels do not fit the embeddings.
    """
    labels = check_labels(labels)
    is_tiled = image_embeddings["input_size"] is None
    tiling = embedding_tiling(image_embeddings) if is_tiled else None
    shape = tuple(tiling.shape if is_tiled else image_embeddings["original_size"])
    if labels.shape != shape:
        raise InvalidInputError(f"The labels must have the shape {shape} of the image, but have {labels.shape}.")
    masks = _objects(labels, ids)
    if not masks:
        return {}
    predictor = copy.copy(predictor)  # another task may use it between two steps
    boxes = np.array([[m.x0, m.y0, m.box[3], m.box[2]] for m in masks.values()], dtype=float)
    prompts = BatchedPrompts.create(boxes=boxes)
    if is_tiled:
        records = yield from tiled_prediction_steps(
            predictor, image_embeddings, tiling, prompts, i, batch_size=_BATCH_SIZE
        )
    else:
        set_precomputed(predictor, image_embeddings, i=i)
        records = yield from prediction_steps(predictor, prompts, _BATCH_SIZE)
    return {
        object_id: Score(float(record["predicted_iou"]), _iou(mask, read_record(record)[0]))
        for (object_id, mask), record in zip(masks.items(), records, strict=True)
    }


def _objects(labels: np.ndarray, ids: Iterable[int] | None) -> dict[int, BoxedMask]:
    wanted = None if ids is None else {int(i) for i in ids}
    found, consecutive, boxes = boxes_of_labels(labels)
    return {
        int(object_id): crop_mask(consecutive[box] == n, (box[0].start, box[1].start))
        for n, (object_id, box) in enumerate(zip(found, boxes), 1) if wanted is None or int(object_id) in wanted
    }


def _iou(a: BoxedMask, b: BoxedMask) -> float:
    common = intersection(a, b)
    return common / (a.area + b.area - common)


def measure_steps(
    labels: np.ndarray,
    image: np.ndarray | None = None,
    *,
    scale: Sequence[float] | None = None,
    unit: str | None = None,
    lineages: Sequence[Mapping[int, Sequence[int]]] | None = None,
    scores: Mapping[int, Score | Sequence[float | None] | None] | None = None,
) -> "Steps[pd.DataFrame]":
    """Measure all objects.

    Args:
        labels: Labels (Y, X), (Z, Y, X) or, with `lineages`, (T, Y, X); may be lazy.
        image: The image, with or without channels on the last axis.
        scale: Size of a voxel per axis.
        unit: Its unit; needs `scale`.
        lineages: For time series: the daughters of each track, as the tracking functions return them.
        scores: Scores by id, which become the columns `predicted_iou`, `stability` and `confidence`.

    Returns:
        One row per object with its id (`label`) as index, or per track and frame with both as index; the columns are
        those of `micro_sam.measurements`.
    """
    from ..measurements import object_measurement_steps, track_measurement_steps  # pandas takes a while to load

    if lineages is None:
        table = yield from object_measurement_steps(labels, image, scale=scale, unit=unit)
        table, ids = table.set_index("label"), table["label"]
    else:
        table = yield from track_measurement_steps(labels, image, lineages, scale=scale, unit=unit)
        table, ids = table.set_index(["track", "frame"]), table["track"]
    if scores is not None:
        for name, values in _score_columns(scores, ids.tolist()).items():
            table[name] = values
    return table


def _score_columns(scores: Mapping[int, Any], ids: Sequence[int]) -> dict[str, np.ndarray]:
    rows = []
    for object_id in ids:
        score = Score(None) if scores.get(object_id) is None else Score(*scores[object_id])
        rows.append([*score, score.confidence])
    columns = np.array(rows, dtype=float).reshape(-1, 3).T  # None becomes NaN
    return dict(zip(("predicted_iou", "stability", "confidence"), columns))
