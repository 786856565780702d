"""The plane that a segmenter works on, and the tiles of it that there is something to see in."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..core.errors import InvalidInputError
from ..core.tiling import Tile, TileSpec
from ..embeddings.features import ImageEmbeddings, check_plane_index


def is_blank(image: np.ndarray) -> bool:
    """Whether there is nothing to see: all values are equal, in each channel."""
    image = np.asarray(image)
    first = image[:1, :1]
    return bool((image == first).all())


def select_plane(image, i: int | None, plane_shape: Sequence[int] | None, ndim: int = 2):
    """Return the plane (Y, X[, C]) of an image that may be the plane itself or the stack of which `i` is a plane."""
    shape = tuple(image.shape)
    if i is None:
        return image
    is_plane = plane_shape is None or shape[:2] == tuple(plane_shape)
    is_stack = len(shape) >= 3 and (plane_shape is None or shape[1:3] == tuple(plane_shape))
    if is_plane and is_stack:  # decide by the number of axes; colour has three or four channels
        is_stack = ndim == 3 or len(shape) == 4 or shape[-1] not in (3, 4)
    return image[i] if is_stack else image


def check_plane(image, i: int | None, shape: tuple[int, int], ndim: int = 2):
    """The plane of the image, checked against the embeddings; None stays None."""
    if image is None:
        return None
    plane = select_plane(image, i, shape, ndim)
    if tuple(plane.shape[:2]) != shape:
        raise InvalidInputError(
            f"The image has the shape {tuple(image.shape)}, but its embeddings are of an image of shape {shape}. "
            "Pass the image for which the embeddings were computed."
        )
    return plane


def check_tiled_plane_index(image_embeddings: ImageEmbeddings, i: int | None) -> None:
    """Raise `InvalidInputError` if `i` does not choose one plane of tiled embeddings."""
    for tile_id in image_embeddings["features"]:
        check_plane_index(tuple(image_embeddings["features"][tile_id].shape), i)
        return  # all tiles have the same planes


def tiles_to_process(image_embeddings: ImageEmbeddings, tiling: TileSpec, i: int | None, mask) -> list[Tile]:
    """The tiles that embeddings have, and that (with their halo) touch a non-zero pixel of the mask (Y, X)."""
    in_mask = image_embeddings["features"].attrs.get("tiles_in_mask")
    if isinstance(in_mask, Mapping):
        in_mask = in_mask.get(str(i), [])
    tiles = [tiling[int(k)] for k in (range(len(tiling)) if in_mask is None else sorted(in_mask))]
    if mask is None:
        return tiles
    mask = select_plane(np.asarray(mask), i, tiling.shape)
    if mask.shape != tiling.shape:
        raise InvalidInputError(f"The mask must have the shape {tiling.shape} of the image, but has {mask.shape}.")
    return [tile for tile in tiles if mask[tile.outer].any()]
