"""Correct the mask of an object with prompts: the model starts from the mask."""

from collections.abc import Sequence

import numpy as np
from segment_anything import SamPredictor

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError, PromptTileError
from ..core.prompts import binary_mask, box_from_mask, check_points, extend_box, points_from_scribbles
from ..core.tiling import Tile, TileSpec
from ..embeddings.encode import ImageEmbeddings, set_precomputed
from ..prompt_based_segmentation import image_shape, segment_from_mask, segment_from_points


def refine_mask(
    predictor: SamPredictor,
    mask: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    *,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    scribbles: Sequence[np.ndarray] | None = None,
    scribble_labels: Sequence[int] | None = None,
    box: np.ndarray | None = None,
    box_extension: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Segment an object again, from its mask, its box and corrections.

    The box of the mask grows to hold the positive points. With tiles, the tile is used that sees most of the points
    and of the mask; outside of it the mask stays as it is.

    Args:
        predictor: The predictor.
        mask: Mask (Y, X) of the object as it is; it may be empty.
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        points: Points (N, 2) in the order (y, x).
        labels: Labels (N,) of the points: 1 for the object, 0 for background.
        scribbles: Polylines, each (N, 2) in the order (y, x); they are sampled as points.
        scribble_labels: For each scribble 1 or 0.
        box: Box [y0, x0, y1, x1] to use instead of that of the mask.
        box_extension: How far to extend the box of the mask, see `segment_from_box`.

    Returns:
        The new mask, bool (Y, X), and the IoU that the model predicts for it.

    Raises:
        InvalidInputError: For malformed prompts, or if there is neither a mask, nor a box, nor a positive point.
        PromptTileError: If no tile sees all points.
    """
    mask, shape = binary_mask(mask), image_shape(predictor, image_embeddings)
    if mask.shape != shape:
        raise InvalidInputError(f"The mask has the shape {mask.shape}, but the image has {shape}.")
    points, labels = _join_points(points, labels, scribbles, scribble_labels)
    tight = box_from_mask(mask)
    if box is not None:
        box = extend_box(box, shape)
    elif tight is not None:
        box = _hold(extend_box(tight, shape, box_extension), points[labels == 1], shape)
    elif not (labels == 1).any():
        raise InvalidInputError("There is nothing to start from: pass a mask, a box or a positive point.")
    window = (slice(None), slice(None))
    if image_embeddings is not None and image_embeddings["input_size"] is None:
        tile = _choose_tile(embedding_tiling(image_embeddings), mask, points, labels, box)
        set_precomputed(predictor, image_embeddings, i=i, tile_id=tile.id)
        window, image_embeddings, i = tile.outer, None, None
        points = points - tile.origin
        if box is not None:
            box = np.clip(box - np.tile(tile.origin, 2), 0, np.tile(tile.outer_shape, 2))
    prompts = (points, labels) if len(points) else (None, None)
    if box is None:
        masks, scores, _ = segment_from_points(predictor, *prompts, image_embeddings, i, return_all=True)
    else:
        masks, scores, _ = segment_from_mask(
            predictor, mask[window], image_embeddings, i, box=box, points=prompts[0], labels=prompts[1],
            return_all=True,
        )
    out = mask.copy()
    out[window] = masks[0]
    return out, float(scores[0])


def _join_points(points, labels, scribbles, scribble_labels) -> tuple[np.ndarray, np.ndarray]:
    """All points (N, 2) and labels (N,); N may be 0."""
    if (points is None) != (labels is None) or (scribbles is None) != (scribble_labels is None):
        raise InvalidInputError("Points and scribbles need labels, one each, and the reverse: pass both or none.")
    found = [(np.zeros((0, 2)), np.zeros(0, dtype=int))]
    if points is not None:
        found.append(check_points(points, labels))
    if scribbles is not None:
        found.append(points_from_scribbles(scribbles, scribble_labels))
    return np.concatenate([p for p, _ in found]), np.concatenate([k for _, k in found])


def _hold(box: np.ndarray, points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Grow a box [y0, x0, y1, x1] to hold points (N, 2)."""
    pixels = np.clip(np.floor(points), 0, np.array(shape) - 1).astype(int)
    low, high = np.concatenate([box[None, :2], pixels]), np.concatenate([box[None, 2:], pixels + 1])
    return np.concatenate([low.min(axis=0), high.max(axis=0)])


def _choose_tile(
    tiling: TileSpec, mask: np.ndarray, points: np.ndarray, labels: np.ndarray, box: np.ndarray | None
) -> Tile:
    """The tile that sees most positive points, then most points, then most of the mask."""
    places = list(points)
    if mask.any():
        places.append(np.argwhere(mask).mean(axis=0))
    elif box is not None:
        places.append((box[:2] + box[2:]) / 2)
    tiles = {tile.id: tile for tile in (tiling.tile_at(*place) for place in places)}

    def seen(tile: Tile) -> tuple[int, int, int]:
        local = points - tile.origin
        inside = ((local >= 0) & (local <= tile.outer_shape)).all(axis=1)
        return int(inside[labels == 1].sum()), int(inside.sum()), int(np.count_nonzero(mask[tile.outer]))

    best = max(tiles.values(), key=seen)
    if seen(best)[1] < len(points):
        raise PromptTileError(
            f"No tile sees all {len(points)} points. Correct the object step by step with points closer to each other, "
            "or compute the embeddings with larger tiles."
        )
    return best
