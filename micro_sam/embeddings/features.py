"""What embeddings look like to their readers: arrays, and a mapping from tile ids to arrays.

The same two classes serve results in memory and on disk, so that code downstream cannot tell them apart.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from ..core.errors import EmbeddingCacheError, InvalidInputError, MissingTileError

ImageEmbeddings = dict[str, Any]


class FeatureArray:
    """Features of an image, of a stack or of one tile, read when indexed; always gives float32.

    Behaves like a read-only array: `shape`, `ndim`, `dtype`, `len`, indexing and `numpy.asarray`.

    Args:
        array: Features (1, C, h, w) or (Z, 1, C, h, w): a numpy or zarr array.
        attrs: `original_size` and `input_size` of a tile.
        name: How errors call the array.
        computed: For (Z, 1, C, h, w): the planes that were computed; None for all.
    """

    def __init__(
        self,
        array,
        attrs: Mapping[str, Any] | None = None,
        name: str = "features",
        computed: Collection[int] | None = None,
    ):
        self._array, self._name = array, name
        self._computed = None if computed is None else frozenset(computed)
        self.attrs = dict(attrs or {})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def ndim(self) -> int:
        return len(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        return (1,) + self.shape[1:]

    @property
    def store_dtype(self) -> np.dtype:
        """The dtype that is kept in memory or on disk."""
        return np.dtype(self._array.dtype)

    @property
    def computed(self) -> list[int] | None:
        """The computed planes, or None if all are."""
        return None if self._computed is None else sorted(self._computed)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index) -> np.ndarray:
        first = index[0] if isinstance(index, tuple) and index else index
        if self._computed is not None and isinstance(first, int | np.integer):
            plane = int(first) % len(self) if -len(self) <= first < len(self) else int(first)
            if 0 <= plane < len(self) and plane not in self._computed:
                raise MissingTileError(
                    f"Plane {plane} of {self._name} was not computed: the mask is empty there. "
                    "Compute the embeddings without a mask, or use only the tiles in `attrs['tiles_in_mask']`."
                )
        try:
            values = self._array[index]
        except (IndexError, TypeError):
            raise
        except Exception as error:  # codecs raise errors of many kinds for damaged chunks
            raise read_error(error, f"{self._name}[{index}]") from error
        return np.asarray(values, dtype=np.float32)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} {self.shape} {self.store_dtype}>"


def check_plane_index(shape: tuple[int, ...], i: int | None) -> None:
    """Raise `InvalidInputError` if `i` does not choose one plane of features of a shape."""
    if len(shape) not in (4, 5):
        raise InvalidInputError(f"Features must have the shape (1, C, h, w) or (Z, 1, C, h, w), but have {shape}.")
    if len(shape) == 5 and i is None:
        raise InvalidInputError(f"The embeddings are of a stack of {shape[0]} planes: pass i to choose the plane.")
    if len(shape) == 4 and i is not None:
        raise InvalidInputError(f"The embeddings are of a single plane, but i={i} was given. Leave it out.")
    if i is not None and not 0 <= i < shape[0]:
        raise InvalidInputError(f"There is no plane {i}: the embeddings have planes 0 to {shape[0] - 1}.")


class TiledFeatures(Mapping):
    """Features of the tiles of an image or stack: `features[str(tile_id)]` is a `FeatureArray`.

    `attrs` has `shape` (Y, X), `tile_shape`, `halo` and, with a mask, `tiles_in_mask`: a list of tile ids, or
    for stacks a dictionary from str(z) to such lists.
    """

    def __init__(self, arrays: Mapping[str, FeatureArray], attrs: Mapping[str, Any], n_tiles: int):
        self._arrays, self._n_tiles = arrays, n_tiles
        self.attrs = dict(attrs)

    def __getitem__(self, tile_id: str | int) -> FeatureArray:
        key = str(tile_id)
        if key in self._arrays:
            return self._arrays[key]
        if key.isdecimal() and int(key) < self._n_tiles:
            raise MissingTileError(
                f"Tile {key} was not computed: the mask is empty there. Compute the embeddings without a mask, "
                "or use only the tiles in `attrs['tiles_in_mask']`."
            )
        raise MissingTileError(f"There is no tile {key!r}: the ids are '0' to '{self._n_tiles - 1}'.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, tile_id) -> bool:
        return str(tile_id) in self._arrays

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} of {self._n_tiles} tiles {self.attrs}>"


def read_error(error: Exception, name: str) -> Exception:
    """The error that a user sees when reading a cache failed."""
    if isinstance(error, PermissionError):
        return EmbeddingCacheError(f"{name} cannot be read: {error}. Check the permissions of the cache.")
    return EmbeddingCacheError(
        f"{name} is damaged and cannot be read ({type(error).__name__}: {error}). "
        "Compute the embeddings again with overwrite=True, or delete the cache."
    )
