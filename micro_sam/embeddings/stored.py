"""Features on disk as arrays and as the mapping of tiles; opened and read when they are used."""

from pathlib import Path

import numpy as np
import zarr

from ..core.errors import EmbeddingCacheError
from .features import FeatureArray, TiledFeatures, read_error


def open_node(group: zarr.Group, name: str, path: Path):
    """The array or group `name` of a group, or None; `path` is for messages."""
    try:
        return group[name]
    except KeyError:
        return None
    except Exception as error:
        raise read_error(error, f"{name} in the embedding cache {path}") from error


def stored_tiles(group: zarr.Group, path: Path) -> TiledFeatures:
    """The tiles in the group `features` of a cache."""
    attrs = dict(group.attrs)
    n_tiles = int(np.prod([-(-s // t) for s, t in zip(attrs["shape"], attrs["tile_shape"], strict=True)]))
    in_mask = attrs.get("tiles_in_mask")
    if isinstance(in_mask, dict):
        names = sorted({int(t) for tiles in in_mask.values() for t in tiles})
    else:
        names = range(n_tiles) if in_mask is None else sorted(int(t) for t in in_mask)
    planes = {}
    if isinstance(in_mask, dict):
        for z, tiles in in_mask.items():
            for tile in tiles:
                planes.setdefault(int(tile), []).append(int(z))
    return TiledFeatures(_LazyArrays(group, path, list(names), planes), attrs, n_tiles)


class _LazyArrays(dict):
    """Opens the array of a tile when it is first used."""

    def __init__(self, group: zarr.Group, path: Path, tiles: list[int], planes: dict[int, list[int]]):
        super().__init__()
        self._group, self._path, self._planes = group, path, planes
        self._names = [str(t) for t in tiles]
        self._known = frozenset(self._names)

    def __contains__(self, key) -> bool:
        return key in self._known

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __missing__(self, key: str) -> FeatureArray:
        name = f"{self._path}/features/{key}"
        array = open_node(self._group, key, self._path)
        if array is None:
            raise EmbeddingCacheError(f"{name} is missing. Compute the embeddings again with overwrite=True.")
        attrs = {k: tuple(array.attrs[k]) for k in ("original_size", "input_size")}
        self[key] = StoredArray(array, attrs, name, self._planes.get(int(key)))
        return self[key]


class StoredArray(FeatureArray):
    """Features on disk. A chunk that vanished would read as zeros, which no encoder gives: that is an error."""

    def __getitem__(self, index) -> np.ndarray:
        values = super().__getitem__(index)
        is_plane = values.size >= np.prod(self.shape[-3:])
        if is_plane and (self._computed is None or isinstance(index, int | np.integer)) and not values.any():
            raise EmbeddingCacheError(
                f"{self._name}[{index}] is missing on disk. Compute the embeddings again with overwrite=True, "
                "or delete the cache."
            )
        return values

    def read_all(self) -> np.ndarray:
        """Read everything into memory, and name the plane if one cannot be read."""
        try:
            values = np.asarray(self._array[...], dtype=np.float32)
            # Most often one look is enough: features are hardly ever exactly 0.
            if all(v.flat[0] != 0 or v.any() for v in values):
                return values
        except Exception as error:
            for i in range(len(self)):
                self[i]
            raise read_error(error, self._name) from error
        return np.stack(list(self))
