"""Blocks of planes and stacks: work that can be done independently, and which blocks see the same pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InvalidInputError
from ..core.tiling import Tile, TileSpec


@dataclass(frozen=True)
class Block:
    """A tile of plane `z` (None for an image of a single plane); `id` is its place in the order of the grid."""

    id: int
    z: int | None
    tile: Tile


@dataclass(frozen=True)
class BlockGrid:
    """All blocks of an image (Y, X) or a stack (Z, Y, X), row-major, plane by plane.

    `depth` is None for an image. `tiling` is that of each plane.
    """

    depth: int | None
    tiling: TileSpec

    @classmethod
    def create(cls, shape: Sequence[int], block_shape: Sequence[int], halo: Sequence[int]) -> "BlockGrid":
        """Check user values and build the grid.

        Args:
            shape: Shape (Y, X) or (Z, Y, X), without channels.
            block_shape: Shape (y, x) of a block in pixels; clipped to the plane.
            halo: By how many pixels (y, x) blocks see more on each side. Objects are joined by what both blocks see, so
                it must not be 0 where there are several blocks.

        Raises:
            InvalidInputError: If a value does not fit.
        """
        plane = tuple(int(s) for s in shape[-2:])
        tiling = TileSpec.create(plane, block_shape, halo)
        tiling = TileSpec(plane, tuple(min(b, s) for b, s in zip(tiling.tile_shape, plane)), tiling.halo)
        for n, h, axis in zip(tiling.grid, tiling.halo, "yx"):
            if n > 1 and h == 0:
                raise InvalidInputError(
                    f"The halo of blocks must be at least 1 pixel along {axis}, where there are {n} blocks, but is 0: "
                    "objects at the border are joined by what both blocks see. Half of an object is a good value."
                )
        return cls(None if len(shape) == 2 else int(shape[0]), tiling)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the labels, (Y, X) or (Z, Y, X)."""
        return self.tiling.shape if self.depth is None else (self.depth, *self.tiling.shape)

    def __len__(self) -> int:
        return (1 if self.depth is None else self.depth) * len(self.tiling)

    def __getitem__(self, block_id: int) -> Block:
        if not 0 <= block_id < len(self):
            raise IndexError(f"There is no block {block_id}: ids are 0 to {len(self) - 1}.")
        z, tile = divmod(block_id, len(self.tiling))
        return Block(block_id, None if self.depth is None else z, self.tiling[tile])

    def __iter__(self) -> Iterator[Block]:
        return (self[k] for k in range(len(self)))

    def planes(self) -> Iterator[range]:
        """The ids of the blocks of each plane."""
        n = len(self.tiling)
        return (range(start, start + n) for start in range(0, len(self), n))

    def neighbours(self) -> list[tuple[int, int]]:
        """Pairs of tiles a < b of a plane whose outer blocks overlap; also diagonal ones, and beyond the next."""
        tiles, (_, n_x) = list(self.tiling), self.tiling.grid
        reach = [1 + 2 * h // t for h, t in zip(self.tiling.halo, self.tiling.tile_shape)]
        pairs = []
        for a in tiles:
            row, column = divmod(a.id, n_x)
            for dy in range(reach[0] + 1):
                for dx in range(-reach[1], reach[1] + 1):
                    if (dy, dx) <= (0, 0) or not (row + dy < self.tiling.grid[0] and 0 <= column + dx < n_x):
                        continue
                    b = tiles[(row + dy) * n_x + column + dx]
                    if shared_pixels(a, b) is not None:
                        pairs.append((a.id, b.id))
        return pairs


def shared_pixels(a: Tile, b: Tile) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """What two tiles both see, as slices of the outer block of each; None if there is nothing."""
    low = np.maximum([s.start for s in a.outer], [s.start for s in b.outer])
    high = np.minimum([s.stop for s in a.outer], [s.stop for s in b.outer])
    if (low >= high).any():
        return None
    return tuple(
        tuple(slice(int(start - s.start), int(stop - s.start)) for start, stop, s in zip(low, high, tile.outer))
        for tile in (a, b)
    )
