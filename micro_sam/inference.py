"""Masks for many prompts on one image, plain or tiled."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from ._tiled_prompting import check_no_masks, embedding_tiling, tile_predictions
from .core.errors import InvalidInputError, UnsupportedError
from .core.labels import apply_nms, mask_data_to_segmentation
from .core.progress import Step, Steps, drain
from .core.prompts import BatchedPrompts
from .core.tiling import Tile, TileSpec
from .embeddings.encode import ImageEmbeddings, precompute_image_embeddings, set_precomputed
from .models.prompting import Prediction, check_image_set, check_threshold, predict_boxed

# A new object that is covered to more than this by one existing object is the same object, seen from another tile.
_DUPLICATE_OVERLAP = 0.75

Record = dict[str, Any]


def full_record(prediction: Prediction, shape: Sequence[int], seg_id: int) -> Record:
    """A prediction as SAM-style record with a full-size mask."""
    device = prediction.logits.device
    return {
        "segmentation": torch.from_numpy(prediction.mask.paste(shape)).to(device),
        "area": torch.tensor(prediction.mask.area, device=device),
        "bbox": prediction.mask.bbox_xywh,
        "predicted_iou": prediction.iou,
        "stability_score": prediction.mask.stability,
        "seg_id": seg_id,
        "logits": prediction.logits,
    }


def cropped_record(prediction: Prediction, seg_id: int, offset: Sequence[int] = (0, 0)) -> Record:
    """A prediction as record with a mask cropped to its bounding box; `offset` (y, x) shifts it into the image."""
    mask = prediction.mask
    height, width = mask.mask.shape
    return {
        "segmentation": mask.mask,
        "area": mask.area,
        "bbox": [0, 0, width, height],
        "global_bbox": [mask.origin[1] + offset[1], mask.origin[0] + offset[0], width, height],
        "predicted_iou": prediction.iou,
        "stability_score": prediction.mask.stability,
        "seg_id": seg_id,
    }


def prediction_steps(
    predictor: SamPredictor, prompts: BatchedPrompts, batch_size: int, **options
) -> Steps[list[Record]]:
    """Predict cropped records on the image that is set; the options are those of `predict_boxed`."""
    records, total = [], len(prompts)
    yield Step(0, total, "Segment prompts")
    for batch in predict_boxed(predictor, prompts, batch_size, **options):
        records.extend(cropped_record(p, len(records) + k + 1) for k, p in enumerate(batch))
        yield Step(batch[-1].prompt + 1, total, "Segment prompts")
    return records


def batched_inference(
    predictor: SamPredictor,
    image: np.ndarray | None,
    batch_size: int,
    boxes: np.ndarray | None = None,
    points: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    multimasking: bool = False,
    embedding_path: str | os.PathLike | None = None,
    return_instance_segmentation: bool = True,
    segmentation_ids: list | None = None,
    reduce_multimasking: bool = True,
    logits_masks: torch.Tensor | None = None,
    verbose_embeddings: bool = True,
    mask_threshold: float | str | None = None,
    return_highres_logits: bool = False,
    i: int | None = None,
) -> list[Record] | np.ndarray:
    """Segment one object per prompt, in batches.

    Args:
        predictor: The predictor.
        image: Image (Y, X[, C]), or a stack with the plane on the first axis if `i` is given. None uses the image
            that is set in the predictor.
        batch_size: Number of prompts that go through the decoder together.
        boxes: Boxes (N, 4) in the order x0, y0, x1, y1, in pixels.
        points: Points (N, P, 2) in the order x, y, in pixels.
        point_labels: Labels (N, P): 1 for the object, 0 for background, -1 to ignore the point.
        multimasking: Whether to predict three masks per prompt.
        embedding_path: Where to cache the embeddings of the image.
        return_instance_segmentation: Whether to merge the masks into a label image.
        segmentation_ids: Label of each object (positive integers); by default they are numbered.
        reduce_multimasking: Whether to keep the best of the three masks only.
        logits_masks: Mask prompts (N, 1, h, w), low-resolution logits as returned by the model.
        verbose_embeddings: Whether to show progress when computing embeddings.
        mask_threshold: Logits above it are foreground. None takes the model's, `auto` one per mask by Otsu's method.
        return_highres_logits: Whether `logits` of the records have image size.
        i: The plane of the stack.

    Returns:
        A label image uint32 (Y, X) where larger objects are painted first and the first one keeps a pixel; or a list
        of records in the order of the prompts with `segmentation` (bool tensor (Y, X)), `area`, `bbox` (x, y, width,
        height), `predicted_iou`, `stability_score`, `seg_id` and `logits` ((1, h, w), or (Y, X)).
        Without prompts it is an image of zeros, or an empty list.

    Raises:
        InvalidInputError: For missing or unfitting prompts.
        NotInitializedError: If there is neither an image nor one set in the predictor.
        UnsupportedError: For `segmentation_ids` with three masks per prompt.

    Example:
        >>> batched_inference(predictor, image, 32, boxes=np.array([[10, 20, 60, 50]]))  # doctest: +SKIP
    """
    prompts = BatchedPrompts.create(boxes, points, point_labels, logits_masks)
    ids = _check_ids(segmentation_ids, len(prompts), multimasking and not reduce_multimasking)
    check_threshold(mask_threshold, 0.0)
    if image is not None:
        _set_image(predictor, image, embedding_path, verbose_embeddings, i)
    check_image_set(predictor)
    shape = predictor.original_size
    predictions = (
        p for batch in predict_boxed(
            predictor, prompts, batch_size, multimasking, reduce_multimasking, mask_threshold
        ) for p in batch
    )
    if return_instance_segmentation:
        records = [cropped_record(p, k + 1 if ids is None else ids[k]) for k, p in enumerate(predictions)]
        return mask_data_to_segmentation(records, shape=shape, min_object_size=0, keep_ids=ids is not None)

    records = [full_record(p, shape, k + 1 if ids is None else ids[k]) for k, p in enumerate(predictions)]
    if return_highres_logits:
        for record in records:
            logits = record["logits"][None]
            record["logits"] = predictor.model.postprocess_masks(logits, predictor.input_size, shape)[0, 0]
    return records


def _check_ids(segmentation_ids, n_prompts: int, keeps_all: bool) -> list[int] | None:
    if segmentation_ids is None:
        return None
    if keeps_all:
        raise UnsupportedError(
            "segmentation_ids name one mask per prompt: they cannot be combined with multimasking and "
            "reduce_multimasking=False."
        )
    ids = [int(id_) for id_ in segmentation_ids]
    if len(ids) != n_prompts or any(not 0 < id_ < 2**32 for id_ in ids):
        raise InvalidInputError(
            f"segmentation_ids must be one positive integer for each of the {n_prompts} prompts, "
            f"but got {len(ids)}: {ids[:5]}."
        )
    return ids


def _set_image(predictor, image, embedding_path, verbose: bool, i: int | None) -> None:
    if i is not None and embedding_path is None:
        image, i = image[i], None
    embeddings = precompute_image_embeddings(
        predictor, image, embedding_path, ndim=2 if i is None else 3, verbose=verbose
    )
    set_precomputed(predictor, embeddings, i=i)


def batched_tiled_inference(
    predictor: SamPredictor,
    image: np.ndarray | None,
    batch_size: int,
    image_embeddings: ImageEmbeddings | None = None,
    boxes: np.ndarray | None = None,
    points: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    multimasking: bool = False,
    embedding_path: str | os.PathLike | None = None,
    return_instance_segmentation: bool = True,
    reduce_multimasking: bool = True,
    logits_masks: torch.Tensor | None = None,
    verbose_embeddings: bool = True,
    mask_threshold: float | str | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    optimize_memory: bool = False,
    i: int | None = None,
    **nms_kwargs,
) -> list[Record] | np.ndarray:
    """Segment one object per prompt with tiled embeddings.

    Each prompt is run in the tile that holds the rounded centre of its box, or its first positive point. Masks end
    at the border of the tile with its halo. Points beyond that border are left out, with a warning.

    Args:
        predictor: The predictor.
        image: Image (Y, X[, C]); may be None if embeddings are given.
        batch_size: Number of prompts that go through the decoder together.
        image_embeddings: Tiled embeddings; computed from the image by default.
        boxes: See `batched_inference`, also for the following.
        points: .
        point_labels: .
        multimasking: .
        embedding_path: .
        return_instance_segmentation: .
        reduce_multimasking: .
        logits_masks: Not supported with tiles.
        verbose_embeddings: .
        mask_threshold: .
        tile_shape: Tile shape (y, x) in pixels; by default that of the embeddings.
        halo: Halo (y, x) in pixels; by default that of the embeddings.
        optimize_memory: Whether to merge tile by tile, by non-maximum suppression within each tile; where tiles
            overlap, the earlier tile wins. Only for label images.
        i: The plane, for a stack.
        nms_kwargs: Options of `apply_nms`, with `optimize_memory`.

    Returns:
        A label image uint32 (Y, X); or a list of records in the order of the prompts, with unique `seg_id`, the mask
        and `bbox` in the tile with its halo, and `global_bbox` (x, y, width, height) in the image.

    Raises:
        InvalidInputError: For missing or unfitting prompts (naming the first one), embeddings or options.
        UnsupportedError: For mask prompts.
    """
    if optimize_memory and not return_instance_segmentation:
        raise InvalidInputError("optimize_memory returns a label image: it needs return_instance_segmentation=True.")
    if nms_kwargs and not optimize_memory:
        raise InvalidInputError(
            f"The options {sorted(nms_kwargs)} are for the merging with optimize_memory=True, which was not asked for."
        )
    prompts = BatchedPrompts.create(boxes, points, point_labels, logits_masks)
    check_no_masks(prompts)
    check_threshold(mask_threshold, 0.0)
    if image_embeddings is None:
        if image is None or tile_shape is None or halo is None:
            raise InvalidInputError("Pass tiled image_embeddings, or the image with tile_shape and halo.")
        if i is not None and embedding_path is None:
            image, i = image[i], None
        image_embeddings = precompute_image_embeddings(
            predictor, image, embedding_path, ndim=2 if i is None else 3, tile_shape=tile_shape, halo=halo,
            verbose=verbose_embeddings,
        )
    tiling = embedding_tiling(image_embeddings, tile_shape, halo)
    options = {
        "batch_size": batch_size, "multimasking": multimasking, "reduce_multimasking": reduce_multimasking,
        "mask_threshold": mask_threshold,
    }
    if optimize_memory:
        return drain(
            merged_tile_steps(predictor, image_embeddings, tiling, prompts, i, nms_kwargs, **options), verbose=False
        )
    per_tile = tile_predictions(predictor, image_embeddings, tiling, prompts, i, **options)
    results: list[list[tuple[Tile, Prediction]]] = [[] for _ in range(len(prompts))]
    for tile, predictions in per_tile:
        for prediction in predictions:
            results[prediction.prompt].append((tile, prediction))
    flat = [item for group in results for item in group]
    if return_instance_segmentation:
        records = [cropped_record(p, k + 1, tile.origin) for k, (tile, p) in enumerate(flat)]
        return mask_data_to_segmentation(records, shape=tiling.shape, min_object_size=0)
    records = []
    for k, (tile, prediction) in enumerate(flat):
        record = full_record(prediction, tile.outer_shape, k + 1)
        x, y, width, height = record["bbox"]
        records.append({**record, "global_bbox": [x + tile.origin[1], y + tile.origin[0], width, height]})
    return records


def tiled_prediction_steps(
    predictor, image_embeddings, tiling: TileSpec, prompts: BatchedPrompts, i: int | None, **options
) -> Steps[list[Record]]:
    """Predict cropped records in image coordinates, in the order of the prompts."""
    results, done = [], 0
    yield Step(0, len(prompts), "Segment prompts in tiles")
    for tile, predictions in tile_predictions(predictor, image_embeddings, tiling, prompts, i, **options):
        results += [(p.prompt, cropped_record(p, 0, tile.origin)) for p in predictions]
        done += len({p.prompt for p in predictions})
        yield Step(done, len(prompts), "Segment prompts in tiles")
    ordered = [record for _, record in sorted(results, key=lambda item: item[0])]
    return [{**record, "seg_id": k + 1} for k, record in enumerate(ordered)]


def merged_tile_steps(
    predictor, image_embeddings, tiling: TileSpec, prompts: BatchedPrompts, i: int | None, nms_kwargs: dict, **options
) -> Steps[np.ndarray]:
    """Predict and merge tile by tile: only the masks of one tile are held, and the label image."""
    segmentation, done, n_ids = np.zeros(tiling.shape, dtype=np.uint32), 0, 0
    nms_kwargs = {"min_size": 0, **nms_kwargs}
    yield Step(0, len(prompts), "Segment prompts in tiles")
    for tile, predictions in tile_predictions(predictor, image_embeddings, tiling, prompts, i, **options):
        records = [cropped_record(p, k + 1) for k, p in enumerate(predictions)]
        labels = apply_nms(records, shape=tile.outer_shape, **nms_kwargs)
        n_ids = _stitch(segmentation[tile.outer], labels, n_ids)
        done += len({p.prompt for p in predictions})
        yield Step(done, len(prompts), "Segment prompts in tiles")
    return segmentation


def _stitch(window: np.ndarray, labels: np.ndarray, n_ids: int) -> int:
    """Write new objects where the window is empty, unless they are mostly one object that is there already."""
    n = int(labels.max()) + 1
    sizes, free = np.bincount(labels.ravel(), minlength=n), np.bincount(labels[window == 0], minlength=n)
    both = (labels > 0) & (window > 0)
    pairs, counts = np.unique(np.stack([labels[both], window[both]]), axis=1, return_counts=True)
    covered = np.zeros(n, dtype=int)
    np.maximum.at(covered, pairs[0], counts)
    keep = (free > 0) & (covered <= _DUPLICATE_OVERLAP * sizes)
    keep[0] = False
    new = np.where(keep, n_ids + np.cumsum(keep), 0).astype(window.dtype)[labels]
    empty = window == 0
    window[empty] = new[empty]
    return n_ids + int(keep.sum())
