"""Tiles with halo, and the only place that converts between (y, x) and (x, y).

Tiles partition the plane from its origin; ids are row-major from 0. The *inner* block is the tile, the
*outer* block is the tile grown by the halo and clipped to the image; networks see outer blocks.
All coordinates are pixels, all intervals are half-open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InvalidInputError

Slices = tuple[slice, slice]


def yx_to_xy(coordinates: np.ndarray) -> np.ndarray:
    """Reverse the last axis, which holds (y, x) or (x, y). The function is its own inverse."""
    return np.asarray(coordinates)[..., ::-1]


def box_yx_to_xyxy(box: np.ndarray) -> np.ndarray:
    """Convert boxes (..., 4) from [y0, x0, y1, x1] to [x0, y0, x1, y1]. The function is its own inverse."""
    return np.asarray(box)[..., [1, 0, 3, 2]]


@dataclass(frozen=True)
class Tile:
    """One tile; all slices are (y, x). `inner_local` is the inner block in coordinates of the outer block."""

    id: int
    inner: Slices
    outer: Slices
    inner_local: Slices

    @property
    def origin(self) -> tuple[int, int]:
        """First pixel (y, x) of the outer block."""
        return self.outer[0].start, self.outer[1].start

    @property
    def outer_shape(self) -> tuple[int, int]:
        return tuple(s.stop - s.start for s in self.outer)


@dataclass(frozen=True)
class TileSpec:
    """A tiling of a plane: `shape`, `tile_shape` and `halo` are (y, x) in pixels."""

    shape: tuple[int, int]
    tile_shape: tuple[int, int]
    halo: tuple[int, int]

    @classmethod
    def create(cls, shape: Sequence[int], tile_shape: Sequence[int], halo: Sequence[int] | None = None) -> "TileSpec":
        """Check user values and build the spec.

        Args:
            shape: Shape (Y, X) of the plane.
            tile_shape: Two positive integers (y, x).
            halo: Two non-negative integers (y, x). None gives an eighth of the tile shape.

        Raises:
            InvalidInputError: For wrong lengths, signs or non-integers.
        """
        tile_shape = _pair("tile_shape", tile_shape, minimum=1)
        halo = tuple(t // 8 for t in tile_shape) if halo is None else _pair("halo", halo, minimum=0)
        return cls(_pair("shape", shape, minimum=1), tile_shape, halo)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of tiles per axis (y, x)."""
        return tuple(-(-s // t) for s, t in zip(self.shape, self.tile_shape))

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1]

    def __iter__(self) -> Iterator[Tile]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, tile_id: int) -> Tile:
        if not 0 <= tile_id < len(self):
            raise IndexError(f"There is no tile {tile_id}: ids are 0 to {len(self) - 1}.")
        inner, outer, local = [], [], []
        for index, size, tile, halo in zip(divmod(tile_id, self.grid[1]), self.shape, self.tile_shape, self.halo):
            begin, end = index * tile, min((index + 1) * tile, size)
            outer_begin, outer_end = max(begin - halo, 0), min(end + halo, size)
            inner.append(slice(begin, end))
            outer.append(slice(outer_begin, outer_end))
            local.append(slice(begin - outer_begin, end - outer_begin))
        return Tile(tile_id, tuple(inner), tuple(outer), tuple(local))

    def tile_at(self, y: float, x: float) -> Tile:
        """Return the tile whose inner block holds the rounded position, clamped to the image."""
        index = [
            min(max(int(round(float(c))), 0), size - 1) // tile
            for c, size, tile in zip((y, x), self.shape, self.tile_shape)
        ]
        return self[index[0] * self.grid[1] + index[1]]


def _pair(name: str, value: Sequence[int], minimum: int) -> tuple[int, int]:
    try:
        pair = tuple(int(v) for v in value)
        exact = all(int(v) == v for v in value)
    except (TypeError, ValueError):
        pair, exact = (), False
    if len(pair) != 2 or not exact or min(pair) < minimum:
        raise InvalidInputError(
            f"{name} must be two integers (y, x) of at least {minimum}, but got {value!r}."
        )
    return pair
