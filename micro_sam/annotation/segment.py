"""From prompts to masks: the objects of one plane, decoded together, as `prompt_based_segmentation` does one by one.

Masks are crops. With tiled embeddings each object is segmented in one tile, and its mask ends there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from scipy import ndimage
from segment_anything import SamPredictor

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError, PromptTileError, require_positive_int
from ..core.masks import BoxedMask, crop_mask
from ..core.progress import Step, Steps, drain
from ..core.tiling import TileSpec
from ..embeddings.encode import ImageEmbeddings
from ..embeddings.features import check_plane_index
from ..prompt_based_segmentation import image_shape
from ..volume.propagation_prompts import Request, SliceDecoder, SlicePrompts, read_prompts
from .prompts import PromptSet


@dataclass(frozen=True, eq=False)
class ObjectResult:
    """The mask of an object, the IoU that the model predicts for it, and its stability (0 for an empty mask)."""

    object_id: int
    mask: BoxedMask
    predicted_iou: float
    stability: float


class _PlaneOfStack:
    """Features (1, C, h, w) of an image, or of a tile of it, as those of a stack of one plane; read when indexed."""

    def __init__(self, features: Any):
        self._features, self.attrs = features, getattr(features, "attrs", None)
        self.shape = (1, *features.shape)

    def __getitem__(self, index: int) -> Any:
        return self._features[...]


class _TilesOfStack(Mapping):
    """Features of the tiles of an image as those of a stack of one plane."""

    def __init__(self, features: Mapping):
        self._features, self.attrs = features, features.attrs

    def __getitem__(self, tile_id: str) -> _PlaneOfStack:
        return _PlaneOfStack(self._features[tile_id])

    def __iter__(self):
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)


def without_specks(mask: BoxedMask, prompt_set: PromptSet) -> BoxedMask:
    """Keep of a mask the parts that prompts point at: those under positive points, and those that reach into the box.

    A point may miss its part by a pixel. If no part is pointed at, all are kept: nothing says which one is meant.
    """
    parts, n_parts = ndimage.label(mask.mask, np.ones((3, 3)))
    if n_parts < 2:
        return mask
    meant = set()
    for y, x in np.rint(prompt_set.points[prompt_set.labels == 1]).astype(int) - (mask.y0, mask.x0):
        meant |= set(parts[max(y - 1, 0):max(y + 2, 0), max(x - 1, 0):max(x + 2, 0)].flat)
    if prompt_set.box is not None:
        y0, x0, y1, x1 = np.maximum(np.asarray(prompt_set.box) - np.tile((mask.y0, mask.x0), 2), 0)
        meant |= set(parts[y0:y1, x0:x1].flat)
    meant.discard(0)
    return crop_mask(np.isin(parts, list(meant)), (mask.y0, mask.x0)) if meant else mask


def segment_prompt_set(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    i: int | None,
    prompt_set: PromptSet,
    shape: Sequence[int],
    *,
    drop_specks: bool = False,
) -> ObjectResult:
    """Segment one object; see `segment_plane_steps`."""
    steps = segment_plane_steps(predictor, image_embeddings, i, [prompt_set], shape, drop_specks=drop_specks)
    return drain(steps, verbose=False)[0]


def segment_plane_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    i: int | None,
    prompt_sets: Sequence[PromptSet],
    shape: Sequence[int],
    *,
    batch_size: int = 32,
    drop_specks: bool = False,
) -> Steps[list[ObjectResult]]:
    """Segment the objects of an image or of a plane, each from its own prompts.

    A single positive point uses the best of three masks. Masks of earlier runs are not used.

    Args:
        predictor: The predictor; embeddings stay set in it.
        image_embeddings: The embeddings, plain or tiled, in memory or lazy.
        i: The plane, for embeddings of a stack.
        prompt_sets: The prompts of the objects.
        shape: Shape (Y, X) of the plane.
        batch_size: Number of objects per call of the mask decoder.
        drop_specks: Whether to leave out parts of masks that no prompt points at, see `without_specks`.

    Returns:
        The objects, in the order of their prompts. A mask may be empty.

    Raises:
        InvalidInputError: If there is nothing positive to start from, or the embeddings or `i` do not fit.
        PromptTileError: If the prompts of an object do not fit into one tile.
    """
    require_positive_int("batch_size", batch_size)
    total = len(prompt_sets)
    yield Step(0, total, "Segment objects")
    if not prompt_sets:
        return []
    decoder, tiling = _open(predictor, image_embeddings, i, shape, batch_size)
    requests = [_request(decoder, tiling, prompt_set) for prompt_set in prompt_sets]
    # What can be decoded together comes together. Between the calls the work can be cancelled.
    order = sorted(range(total), key=lambda k: requests[k].kind)
    results: list[Any] = [None] * total
    for start in range(0, total, batch_size):
        batch = order[start:start + batch_size]
        for k, (mask, confidence) in zip(batch, decoder.decode(i or 0, [requests[k] for k in batch])):
            mask = without_specks(mask, prompt_sets[k]) if drop_specks else mask
            stability = 0.0 if isnan(confidence.stability) else float(confidence.stability)
            results[k] = ObjectResult(prompt_sets[k].object_id, mask, float(confidence.predicted_iou), stability)
        yield Step(start + len(batch), total, "Segment objects")
    return results


def _open(
    predictor: SamPredictor, image_embeddings: ImageEmbeddings, i: int | None, shape: Sequence[int], batch_size: int
) -> tuple[SliceDecoder, TileSpec | None]:
    """The decoder for embeddings of an image or of a stack, and the tiling."""
    found = image_shape(predictor, image_embeddings)
    if tuple(shape) != found:
        raise InvalidInputError(
            f"The plane has the shape {tuple(shape)}, but the embeddings are of one of shape {found}. Compute the "
            "embeddings of this image."
        )
    features = image_embeddings["features"]
    tiling = embedding_tiling(image_embeddings) if image_embeddings["input_size"] is None else None
    of_one = features if tiling is None else next(iter(features.values()), None)
    if of_one is not None:
        check_plane_index(tuple(of_one.shape), i)
        if i is None:
            as_stack = _PlaneOfStack(features) if tiling is None else _TilesOfStack(features)
            image_embeddings = {**image_embeddings, "features": as_stack}
    # The projection is for masks that a user drew: they prompt with their box and themselves.
    return SliceDecoder(predictor, image_embeddings, "mask", 0.0, batch_size), tiling


def _request(decoder: SliceDecoder, tiling: TileSpec | None, prompt_set: PromptSet) -> Request:
    """What the decoder is asked for one object."""
    where, shape = f"Object {prompt_set.object_id}", decoder.shape
    user = None
    if len(prompt_set.points) or prompt_set.box is not None:
        points = (prompt_set.points, prompt_set.labels) if len(prompt_set.points) else (None, None)
        user = read_prompts(SlicePrompts(None, *points, prompt_set.box), shape, where)
    mask = None if prompt_set.mask is None else read_prompts(prompt_set.mask, shape, where).mask
    if (mask is None or mask.area == 0) and (user is None or not user.is_positive):
        raise InvalidInputError(f"{where} has neither a positive point nor a box or mask. Add one.")
    if user is not None and tiling is not None:
        _check_tile(tiling, user, where)
    try:
        return decoder.prompted(user) if mask is None else decoder.projected(mask, user)
    except PromptTileError as error:
        raise PromptTileError(f"{where}: {error}") from error


def _check_tile(tiling: TileSpec, prompts: SlicePrompts, where: str) -> None:
    """Raise `PromptTileError` if a positive point would be left out, since it lies outside of its object's tile."""
    if prompts.points is None or not (prompts.labels == 1).any():
        return
    positive = prompts.points[prompts.labels == 1]
    tile = tiling.tile_at(*positive.mean(axis=0))
    local = positive - tile.origin
    beyond = ((local < 0) | (local > tile.outer_shape)).any(axis=1)
    if beyond.any():
        raise PromptTileError(
            f"{where}: the positive point at (y, x) = {positive[beyond][0].round(1).tolist()} lies outside of tile "
            f"{tile.id}, in which the object is segmented. Place its points closer to each other, or compute the "
            "embeddings with larger tiles."
        )
