"""What has to be encoded: checks of the arguments, and the list of planes and tiles."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InvalidInputError
from ..core.tiling import TileSpec


class Item(NamedTuple):
    """One encoder input: plane `z` (None for a 2D image) and tile (None without tiling)."""

    z: int | None
    tile: int | None

    def __str__(self) -> str:
        parts = [f"plane {self.z}" if self.z is not None else "", f"tile {self.tile}" if self.tile is not None else ""]
        return ", ".join(p for p in parts if p) or "the image"


@dataclass(frozen=True)
class EmbeddingPlan:
    """Items to encode for an image (Y, X[, C]) or a stack (Z, Y, X[, C]).

    `shape` is the shape of the input, `plane_shape` (Y, X). `items` run z-major, then by ascending tile.
    `tiles_in_mask` is None without a mask, else a list of tile ids or a dictionary from str(z) to lists.
    """

    ndim: int
    shape: tuple[int, ...]
    tiling: TileSpec | None
    items: tuple[Item, ...]
    tiles_in_mask: list[int] | dict[str, list[int]] | None = None

    @property
    def plane_shape(self) -> tuple[int, int]:
        return self.shape[self.ndim - 2:self.ndim]

    @property
    def depth(self) -> int | None:
        return self.shape[0] if self.ndim == 3 else None

    @property
    def has_channels(self) -> bool:
        return len(self.shape) > self.ndim

    @property
    def tile_ids(self) -> list[int]:
        """The tiles that are computed in any plane, ascending."""
        return sorted({item.tile for item in self.items}) if self.tiling else []

    def original_size(self, tile: int | None) -> tuple[int, int]:
        """Shape (h, w) in pixels of what the encoder sees: the plane, or the outer block of a tile."""
        return self.plane_shape if tile is None else self.tiling[tile].outer_shape

    def read(self, input_, item: Item) -> np.ndarray:
        """Read the pixels of one item, (h, w[, C]); a lazy input is read nowhere else."""
        index = () if item.z is None else (item.z,)
        if item.tile is not None:
            index += self.tiling[item.tile].outer
        return np.asarray(input_[index] if index else input_[...])

    def computed_planes(self, tile: int) -> list[int] | None:
        """The planes in which a tile is computed; None for all."""
        if self.tiles_in_mask is None or self.ndim == 2:
            return None
        return [int(z) for z, tiles in self.tiles_in_mask.items() if tile in tiles]


def make_plan(
    input_,
    ndim: int | None = None,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    mask=None,
    encoder_size: int = 1024,
) -> EmbeddingPlan:
    """Check the arguments of `precompute_image_embeddings` and list what has to be encoded.

    Args:
        input_: Array (Y, X[, C]) or (Z, Y, X[, C]), may be lazy.
        ndim: 2 or 3, not counting channels; None derives it from the shape.
        tile_shape: Tile shape (y, x) in pixels; None for no tiling.
        halo: Halo (y, x) in pixels; None gives an eighth of the tile. Unused without `tile_shape`.
        mask: Array (Y, X) or (Z, Y, X); tiles are encoded where their outer block has a non-zero pixel.
        encoder_size: Side of the encoder's input in pixels.

    Raises:
        InvalidInputError: For arguments that do not fit the input or each other.
    """
    shape = tuple(int(s) for s in getattr(input_, "shape", np.shape(input_)))
    ndim = _check_ndim(shape, ndim)
    plane_shape = shape[ndim - 2:ndim]

    tiling = None if tile_shape is None else TileSpec.create(plane_shape, tile_shape, halo)
    blocks = [plane_shape] if tiling is None else {tile.outer_shape for tile in tiling}
    for block in blocks:
        if int(min(block) * encoder_size / max(block) + 0.5) < 1:
            raise InvalidInputError(
                f"{'The plane' if tiling is None else 'A tile with halo'} has the shape {block}: too narrow for the "
                f"encoder, which scales the longer side to {encoder_size} pixels. "
                "Pad the image, or choose tiles that are closer to a square."
            )

    planes = range(shape[0]) if ndim == 3 else (None,)
    if mask is None:
        tiles = (None,) if tiling is None else range(len(tiling))
        return EmbeddingPlan(ndim, shape, tiling, tuple(Item(z, t) for z in planes for t in tiles))

    if tiling is None:
        raise InvalidInputError(
            "A mask selects tiles, but no tile_shape was given. Pass tile_shape (and halo), or leave out the mask."
        )
    mask_shape = tuple(getattr(mask, "shape", np.shape(mask)))
    if mask_shape != shape[:ndim]:
        raise InvalidInputError(
            f"The mask must have the spatial shape of the image, {shape[:ndim]}, but it has {mask_shape}."
        )
    mask = mask if hasattr(mask, "shape") else np.asarray(mask)
    per_plane = {z: _tiles_in_mask(mask if z is None else mask[z], tiling) for z in planes}
    items = tuple(Item(z, t) for z, tiles in per_plane.items() for t in tiles)
    in_mask = per_plane[None] if ndim == 2 else {str(z): tiles for z, tiles in per_plane.items()}
    return EmbeddingPlan(ndim, shape, tiling, items, in_mask)


def _check_ndim(shape: tuple[int, ...], ndim: int | None) -> int:
    if ndim is None:
        # A last axis of 3 or 4 is far more often colour than a volume of that width.
        has_channels = len(shape) >= 3 and shape[-1] in (3, 4)
        ndim = len(shape) - has_channels
        if has_channels and ndim in (2, 3):
            warnings.warn(
                f"The last axis of the input of shape {shape} is taken as colour channels. "
                f"Pass ndim={ndim} to confirm this, or ndim={ndim + 1} if it is a spatial axis.",
                stacklevel=4,
            )
    if ndim not in (2, 3):
        raise InvalidInputError(
            f"Embeddings are computed for 2 or 3 dimensions (channels not counted), but ndim is {ndim!r} for an "
            f"input of shape {shape}. Pass ndim=2 or ndim=3, and an array (Y, X[, C]) or (Z, Y, X[, C])."
        )
    if len(shape) not in (ndim, ndim + 1):
        axes = "(Y, X[, C])" if ndim == 2 else "(Z, Y, X[, C])"
        raise InvalidInputError(f"With ndim={ndim} the input must have the axes {axes}, but its shape is {shape}.")
    if 0 in shape:
        raise InvalidInputError(f"The input of shape {shape} is empty.")
    return ndim


def _tiles_in_mask(mask, tiling: TileSpec) -> list[int]:
    return [tile.id for tile in tiling if np.any(np.asarray(mask[tile.outer]))]


def encoder_sizes(predictor, plan: EmbeddingPlan, tile: int | None) -> dict[str, Any]:
    """`original_size` and `input_size` (h, w) in pixels of an item."""
    height, width = plan.original_size(tile)
    target = predictor.transform.target_length
    input_size = predictor.transform.get_preprocess_shape(height, width, target)
    return {"original_size": (height, width), "input_size": tuple(input_size)}
