"""Which tile a prompt belongs to, and prompts in coordinates of their tile."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from segment_anything import SamPredictor

from .core.errors import InvalidInputError, UnsupportedError
from .core.prompts import BatchedPrompts
from .core.tiling import Tile, TileSpec
from .embeddings.encode import ImageEmbeddings, set_precomputed
from .models.prompting import Prediction, predict_boxed


def embedding_tiling(
    image_embeddings: ImageEmbeddings, tile_shape: Sequence[int] | None = None, halo: Sequence[int] | None = None
) -> TileSpec:
    """Return the tiling of embeddings; raise `InvalidInputError` if there is none, or another one was asked for."""
    if image_embeddings["input_size"] is not None:
        raise InvalidInputError(
            "The embeddings are not tiled. Compute them with tile_shape and halo, or use the functions without tiles."
        )
    attrs = image_embeddings["features"].attrs
    tiling = TileSpec.create(attrs["shape"], attrs["tile_shape"], attrs["halo"])
    for name, asked in (("tile_shape", tile_shape), ("halo", halo)):
        found = getattr(tiling, name)
        if asked is not None and tuple(int(a) for a in asked) != found:
            raise InvalidInputError(
                f"The embeddings have {name}={found}, but {name}={tuple(asked)} was asked for. "
                f"Pass {name}={found} or leave it out, or compute the embeddings again."
            )
    return tiling


def check_no_masks(prompts: BatchedPrompts) -> None:
    """Raise `UnsupportedError` for mask prompts."""
    if prompts.logits is not None:
        raise UnsupportedError("Mask prompts are not supported with tiles. Use boxes or points.")


def tile_predictions(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    tiling: TileSpec,
    prompts: BatchedPrompts,
    i: int | None,
    **options,
) -> Iterator[tuple[Tile, list[Prediction]]]:
    """Yield `(tile, predictions)` for the tiles with prompts, ascending; masks are in coordinates of the tile.

    Raises:
        UnsupportedError: For mask prompts.
    """
    check_no_masks(prompts)
    tile_ids = _assign(tiling, prompts)
    for tile_id in np.unique(tile_ids):
        tile, index = tiling[int(tile_id)], np.flatnonzero(tile_ids == tile_id)
        set_precomputed(predictor, image_embeddings, i=i, tile_id=tile.id)
        predictions = []
        for subset, local in _to_tile(tile, prompts, index):
            for batch in predict_boxed(predictor, local, **options):
                predictions += [
                    Prediction(int(subset[p.prompt]), p.mask, p.iou, p.logits) for p in batch
                ]
        yield tile, sorted(predictions, key=lambda p: p.prompt)


def _assign(tiling: TileSpec, prompts: BatchedPrompts) -> np.ndarray:
    """The tile of each prompt."""
    tiles = np.zeros(len(prompts), dtype=int)
    for k in range(len(prompts)):
        point = None
        if prompts.points is not None:
            labels = prompts.labels[k]
            first = int(np.argmax(labels == 1)) if (labels == 1).any() else 0
            point = prompts.points[k, first]
        if prompts.boxes is None:
            tile = tiling.tile_at(point[1], point[0])
        else:
            x0, y0, x1, y1 = prompts.boxes[k]
            tile = tiling.tile_at((y0 + y1) / 2, (x0 + x1) / 2)
        if point is not None and not _in_block(point[None], tile)[0]:
            (y, x) = tile.outer
            raise InvalidInputError(
                f"The box and the first point of prompt {k} do not agree: the centre of the box is in tile {tile.id} "
                f"(y {y.start} to {y.stop}, x {x.start} to {x.stop} with halo), but the point (x, y) is "
                f"{point.tolist()}. Choose larger tiles or halos, or drop one of the two."
            ) if prompts.boxes is not None else InvalidInputError(
                f"The first point of prompt {k}, (x, y) = {point.tolist()}, lies outside of the image of shape "
                f"{tiling.shape}."
            )
        tiles[k] = tile.id
    return tiles


def _in_block(points_xy: np.ndarray, tile: Tile) -> np.ndarray:
    limits = np.array([[s.start, s.stop] for s in tile.outer])[::-1]
    return ((points_xy >= limits[:, 0]) & (points_xy <= limits[:, 1])).all(axis=-1)


def _to_tile(tile: Tile, prompts: BatchedPrompts, index: np.ndarray):
    """Yield `(index, prompts)` in coordinates of the tile, one group per number of points that are in the tile."""
    local = prompts.select(index)
    origin = np.array(tile.origin[::-1], dtype=float)
    boxes = None
    if local.boxes is not None:
        limits = np.tile(np.array(tile.outer_shape[::-1], dtype=float), 2)
        boxes = np.clip(local.boxes - np.tile(origin, 2), 0, limits)
    if local.points is None:
        yield index, BatchedPrompts(boxes, None, None, None)
        return
    inside = _in_block(local.points, tile)
    if not inside.all():
        k, p = np.argwhere(~inside)[0]
        warnings.warn(
            f"{int((~inside).sum())} points lie outside of tile {tile.id} with its halo and are left out, the first of "
            f"them being point {p} of prompt {index[k]}: (x, y) = {local.points[k, p].tolist()}.", stacklevel=4,
        )
    counts = inside.sum(axis=1)
    for count in np.unique(counts):
        group = np.flatnonzero(counts == count)
        keep = inside[group]
        points = (local.points[group][keep] - origin).reshape(len(group), count, 2)
        labels = local.labels[group][keep].reshape(len(group), count)
        yield index[group], BatchedPrompts(None if boxes is None else boxes[group], points, labels, None)
