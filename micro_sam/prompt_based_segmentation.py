"""Segment one object from points, a box, a mask, a polygon or scribbles.

All coordinates are (y, x) in pixels of the image, boxes are half-open [y0, x0, y1, x1]. Embeddings may be plain or
tiled, of an image or (with `i`) of a stack. With tiles, one tile with its halo is used, and the mask ends there.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything import SamPredictor

from ._tiled_prompting import embedding_tiling
from .core.errors import InvalidInputError, PromptTileError
from .core.prompts import (
    MASK_LOGIT,
    BatchedPrompts,
    binary_mask,
    box_from_mask,
    check_points,
    extend_box,
    logits_from_mask,
    mask_from_polygon,
    mask_scale,
    points_from_mask,
    points_from_scribbles,
)
from .core.tiling import Tile, TileSpec, box_yx_to_xyxy, yx_to_xy
from .embeddings.encode import ImageEmbeddings, set_precomputed
from .models.prompting import check_image_set, decode_prompts

Result = np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _View:
    """Where the model looks: the image, or one tile of it."""

    shape: tuple[int, int]
    tile: Tile | None

    @property
    def local_shape(self) -> tuple[int, int]:
        return self.shape if self.tile is None else self.tile.outer_shape

    @property
    def origin(self) -> np.ndarray:
        return np.zeros(2) if self.tile is None else np.array(self.tile.origin, dtype=float)

    def points(self, points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points in coordinates of the view; those outside of the tile are left out, with a warning."""
        local = points - self.origin
        if self.tile is None:
            return local, labels
        inside = ((local >= 0) & (local <= self.local_shape)).all(axis=1)
        if not (labels[inside] == 1).any() and (labels == 1).any():
            raise PromptTileError(
                f"No positive point lies in tile {self.tile.id} with its halo. Place the points of one object closer "
                "to each other, or compute the embeddings with larger tiles."
            )
        if not inside.all():
            warnings.warn(
                f"{int((~inside).sum())} of {len(points)} points lie outside of tile {self.tile.id} with its halo and "
                f"are left out: (y, x) = {points[~inside][:5].tolist()}.", stacklevel=4,
            )
        return local[inside], labels[inside]

    def box(self, box: np.ndarray) -> np.ndarray:
        """An integer box in coordinates of the view, clipped to it."""
        local = box - np.tile(self.origin, 2)
        return np.clip(local, 0, np.tile(self.local_shape, 2))

    def paste(self, masks: np.ndarray, fill: float | bool = False) -> np.ndarray:
        """Masks (C, h, w) of the view in the image (C, Y, X)."""
        if self.tile is None:
            return masks
        full = np.full((len(masks), *self.shape), fill, dtype=masks.dtype)
        full[(slice(None), *self.tile.outer)] = masks
        return full


def image_shape(predictor: SamPredictor, image_embeddings: ImageEmbeddings | None = None) -> tuple[int, int]:
    """Return the shape (Y, X) of the image of the embeddings, or of the image set in the predictor."""
    if image_embeddings is None:
        check_image_set(predictor)
        return tuple(predictor.original_size)
    if image_embeddings["input_size"] is None:
        return embedding_tiling(image_embeddings).shape
    return tuple(int(s) for s in image_embeddings["original_size"])


def _tiling(image_embeddings: ImageEmbeddings | None) -> TileSpec | None:
    if image_embeddings is None or image_embeddings["input_size"] is not None:
        return None
    return embedding_tiling(image_embeddings)


def _point_position(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return points[labels == 1].mean(axis=0) if (labels == 1).any() else points.mean(axis=0)


def _box_position(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


def _open(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings | None,
    i: int | None,
    positions: dict[str, np.ndarray],
) -> _View:
    """Set the embeddings and choose the tile; `positions` has the (y, x) that decides, for each kind of prompt."""
    tiling = _tiling(image_embeddings)
    if tiling is None:
        if image_embeddings is not None:
            set_precomputed(predictor, image_embeddings, i=i)
        elif i is not None:
            raise InvalidInputError(f"i={i} chooses a plane of image_embeddings, but none were given. Leave it out.")
        return _View(image_shape(predictor), None)
    tiles = {name: tiling.tile_at(*position) for name, position in positions.items()}
    if len({tile.id for tile in tiles.values()}) > 1:
        found = ", ".join(f"{name} in tile {tile.id}" for name, tile in tiles.items())
        raise PromptTileError(
            f"The prompts belong to different tiles: {found}. Place them closer to each other, or compute the "
            "embeddings with larger tiles."
        )
    tile = next(iter(tiles.values()))
    set_precomputed(predictor, image_embeddings, i=i, tile_id=tile.id)
    return _View(tiling.shape, tile)


def _segment(
    predictor: SamPredictor,
    view: _View,
    points: tuple[np.ndarray, np.ndarray] | None = None,
    box: np.ndarray | None = None,
    logits: np.ndarray | None = None,
    multimask_output: bool = False,
    best_of_three: bool = False,
    return_all: bool = False,
    return_logits: bool = False,
) -> Result:
    """Run the model on prompts (y, x) of the view; masks have image size."""
    prompts = BatchedPrompts(
        None if box is None else box_yx_to_xyxy(box)[None].astype(float),
        None if points is None else yx_to_xy(points[0])[None].astype(float),
        None if points is None else points[1][None],
        None if logits is None else logits[None],
    )
    low_res, scores = decode_prompts(predictor, prompts, multimask_output or best_of_three)
    if best_of_three and not multimask_output:
        best = int(scores[0].argmax())
        low_res, scores = low_res[:, best:best + 1], scores[:, best:best + 1]
    with torch.no_grad():
        model = predictor.model
        masks = model.postprocess_masks(low_res, predictor.input_size, predictor.original_size)[0]
        if not return_logits:
            masks = masks > model.mask_threshold
    fill = -MASK_LOGIT if return_logits else False
    masks = view.paste(masks.cpu().numpy(), fill)
    return (masks, scores[0].cpu().numpy(), low_res[0].cpu().numpy()) if return_all else masks


def segment_from_points(
    predictor: SamPredictor,
    points: np.ndarray,
    labels: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    multimask_output: bool = False,
    return_all: bool = False,
    use_best_multimask: bool | None = None,
) -> Result:
    """Segment an object from points.

    With tiles, the tile is that of the mean of the positive points; points outside of it are left out.

    Args:
        predictor: The predictor.
        points: Points (N, 2) in the order (y, x).
        labels: Labels (N,): 1 for the object, 0 for background.
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        multimask_output: Whether to return three masks.
        return_all: Whether to return scores and logits as well.
        use_best_multimask: Whether to predict three masks and return the best one. None does so for a single
            positive point, which is ambiguous. Without effect with `multimask_output`.

    Returns:
        Boolean masks (C, Y, X). With `return_all` also the predicted IoUs (C,) and low-resolution logits (C, h, w) of
        just these masks.

    Raises:
        InvalidInputError: If points and labels do not fit.
        PromptTileError: If no positive point lies in the tile.

    Example:
        >>> segment_from_points(predictor, np.array([[80, 100]]), np.array([1]), embeddings)  # doctest: +SKIP
    """
    points, labels = check_points(points, labels)
    view = _open(predictor, image_embeddings, i, {"points": _point_position(points, labels)})
    if use_best_multimask is None:
        use_best_multimask = len(points) == 1 and labels[0] == 1
    return _segment(
        predictor, view, view.points(points, labels), multimask_output=multimask_output,
        best_of_three=use_best_multimask, return_all=return_all,
    )


def segment_from_box(
    predictor: SamPredictor,
    box: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    multimask_output: bool = False,
    return_all: bool = False,
    box_extension: float = 0.0,
) -> Result:
    """Segment an object from a box.

    With tiles, the tile is that of the centre of the box, and the box is clipped to it.

    Args:
        predictor: The predictor.
        box: Box [y0, x0, y1, x1], half-open.
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        multimask_output: Whether to return three masks.
        return_all: Whether to return scores and logits as well.
        box_extension: How far to move each side outwards: below 1 a fraction of the side length, else pixels.

    Returns:
        See `segment_from_points`.

    Raises:
        InvalidInputError: If it is not a box in the image.
    """
    box = extend_box(box, image_shape(predictor, image_embeddings), box_extension)
    view = _open(predictor, image_embeddings, i, {"box": _box_position(box)})
    return _segment(
        predictor, view, box=view.box(box), multimask_output=multimask_output, return_all=return_all
    )


def segment_from_box_and_points(
    predictor: SamPredictor,
    box: np.ndarray,
    points: np.ndarray,
    labels: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    multimask_output: bool = False,
    return_all: bool = False,
) -> Result:
    """Segment an object from a box and points; see `segment_from_box` and `segment_from_points`.

    Raises:
        InvalidInputError: If the prompts are malformed.
        PromptTileError: If box and points belong to different tiles.
    """
    points, labels = check_points(points, labels)
    box = extend_box(box, image_shape(predictor, image_embeddings))
    positions = {"box": _box_position(box)}
    if (labels == 1).any():
        positions["points"] = _point_position(points, labels)
    view = _open(predictor, image_embeddings, i, positions)
    points = view.points(points, labels)
    return _segment(
        predictor, view, points if len(points[0]) else None, view.box(box),
        multimask_output=multimask_output, return_all=return_all,
    )


def segment_from_mask(
    predictor: SamPredictor,
    mask: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    use_box: bool = True,
    use_mask: bool = True,
    use_points: bool = False,
    original_size: tuple[int, ...] | None = None,
    multimask_output: bool = False,
    return_all: bool = False,
    return_logits: bool = False,
    box_extension: float = 0.0,
    box: np.ndarray | None = None,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    use_single_point: bool = False,
) -> Result:
    """Segment an object from a mask: from its bounding box, the mask itself and points derived from it.

    Args:
        predictor: The predictor.
        mask: Mask (Y, X); foreground is 1 (or the only other value). With `original_size` it may be smaller than the
            image, at the scale at which its longer side is that of the image.
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        use_box: Whether to use the bounding box of the mask.
        use_mask: Whether to use the mask as low-resolution mask prompt.
        use_points: Whether to use points inside and around the object.
        original_size: Shape of the image, if the mask has another one.
        multimask_output: Whether to return three masks.
        return_all: Whether to return scores and logits as well.
        return_logits: Whether to return logits instead of booleans as the mask.
        box_extension: How far to extend the derived box, see `segment_from_box`.
        box: Box [y0, x0, y1, x1] to use instead of the derived one.
        points: Points (N, 2) in the order (y, x) to use instead of derived ones; they need `labels`.
        labels: Labels (N,) of the points.
        use_single_point: Whether to derive only the innermost point of the object.

    Returns:
        See `segment_from_points`. Without any prompt (an empty mask and no explicit box or points) the result is
        empty, with scores 0.

    Raises:
        InvalidInputError: For malformed prompts, or a mask of another shape than the image.
        PromptTileError: If the prompts belong to different tiles.
    """
    mask = binary_mask(mask)
    if (points is None) != (labels is None):
        raise InvalidInputError("points and labels belong together: pass both or none.")
    shape = image_shape(predictor, image_embeddings)
    if original_size is None and mask.shape != shape:
        raise InvalidInputError(
            f"The mask has the shape {mask.shape}, but the image has {shape}. Pass original_size={shape} if the mask "
            "is at a lower resolution."
        )
    if original_size is not None and _tiling(image_embeddings) is not None and mask.shape != shape:
        raise InvalidInputError(f"With tiled embeddings the mask must have the shape {shape}, but has {mask.shape}.")
    scale = mask_scale(mask.shape, original_size)
    tight = box_from_mask(mask)
    if box is not None:
        box = extend_box(box, shape)
    elif use_box and tight is not None:
        box = extend_box(extend_box(tight, mask.shape, box_extension) * scale, shape)

    positions = {}
    if tight is not None:
        positions["mask"] = np.argwhere(mask).mean(axis=0) * scale
    elif box is not None:
        positions["box"] = _box_position(box)
    if points is not None:
        points, labels = check_points(points, labels)
        positions["points"] = _point_position(points, labels)
    if not positions:
        return _empty(predictor, shape, 3 if multimask_output else 1, return_all, return_logits)
    view = _open(predictor, image_embeddings, i, positions)

    crop = mask if view.tile is None else mask[view.tile.outer]
    if points is not None:
        point_prompt = view.points(points, labels)
    elif use_points or use_single_point:
        point_prompt = points_from_mask(crop, box_extension, use_single_point)
        point_prompt = None if point_prompt is None else (point_prompt[0] * scale, point_prompt[1])
    else:
        point_prompt = None
    logits = None
    if use_mask and tight is not None:
        logits = logits_from_mask(crop, predictor.model.prompt_encoder.mask_input_size[0])
    if point_prompt is None and box is None and logits is None:
        raise InvalidInputError("use_box, use_mask and use_points are all off and no prompts were given: choose one.")
    return _segment(
        predictor, view, point_prompt, None if box is None else view.box(box), logits,
        multimask_output=multimask_output, return_all=return_all, return_logits=return_logits,
    )


def _empty(predictor, shape, n_masks: int, return_all: bool, return_logits: bool) -> Result:
    masks = np.full((n_masks, *shape), -MASK_LOGIT, np.float32) if return_logits else np.zeros((n_masks, *shape), bool)
    low_res = np.full((n_masks, *predictor.model.prompt_encoder.mask_input_size), -MASK_LOGIT, dtype=np.float32)
    return (masks, np.zeros(n_masks, dtype=np.float32), low_res) if return_all else masks


def segment_from_polygon(
    predictor: SamPredictor,
    polygon: np.ndarray,
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    use_box: bool = True,
    use_mask: bool = True,
    use_points: bool = False,
    multimask_output: bool = False,
    return_all: bool = False,
    box_extension: float = 0.0,
) -> Result:
    """Segment an object from a roughly drawn outline: the filled polygon is used like a mask.

    Args:
        predictor: The predictor.
        polygon: Corners (N, 2) in the order (y, x), N >= 3.
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        use_box: Whether to use the bounding box of the polygon.
        use_mask: Whether to use the filled polygon as mask prompt.
        use_points: Whether to use points inside and around the polygon.
        multimask_output: Whether to return three masks.
        return_all: Whether to return scores and logits as well.
        box_extension: How far to extend the box, see `segment_from_box`.

    Returns:
        See `segment_from_points`.

    Raises:
        InvalidInputError: If it is not a polygon, or has no pixel in the image.
    """
    mask = mask_from_polygon(polygon, image_shape(predictor, image_embeddings))
    return segment_from_mask(
        predictor, mask, image_embeddings, i, use_box=use_box, use_mask=use_mask, use_points=use_points,
        multimask_output=multimask_output, return_all=return_all, box_extension=box_extension,
    )


def segment_from_scribble(
    predictor: SamPredictor,
    scribbles: Sequence[np.ndarray],
    labels: Sequence[int],
    image_embeddings: ImageEmbeddings | None = None,
    i: int | None = None,
    max_points: int = 8,
    multimask_output: bool = False,
    return_all: bool = False,
    use_best_multimask: bool | None = None,
) -> Result:
    """Segment an object from scribbles, which are sampled as points.

    Args:
        predictor: The predictor.
        scribbles: Polylines, each (N, 2) in the order (y, x).
        labels: For each scribble 1 (object) or 0 (background).
        image_embeddings: The embeddings; None uses the image that is set in the predictor.
        i: The plane, for embeddings of a stack.
        max_points: Largest number of points per scribble.
        multimask_output: Whether to return three masks.
        return_all: Whether to return scores and logits as well.
        use_best_multimask: See `segment_from_points`.

    Returns:
        See `segment_from_points`.

    Raises:
        InvalidInputError: For malformed scribbles.
    """
    points, point_labels = points_from_scribbles(scribbles, labels, max_points)
    return segment_from_points(
        predictor, points, point_labels, image_embeddings, i, multimask_output, return_all, use_best_multimask
    )
