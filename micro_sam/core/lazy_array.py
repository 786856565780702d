"""Arrays that read from a file only what is indexed.

`LazyArray` turns a function that reads a block into a read-only array with basic indexing (integers, slices,
ellipsis); `view` selects indices of axes and reorders the others without reading.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import ImageReadError, MicroSamError

Key = tuple[int | slice, ...]


def _normalize(key: Any, shape: Sequence[int]) -> Key:
    """Return one non-negative integer or slice per axis."""
    key = key if isinstance(key, tuple) else (key,)
    if sum(k is Ellipsis for k in key) > 1 or len([k for k in key if k is not Ellipsis]) > len(shape):
        raise IndexError(f"Too many indices for an array of shape {tuple(shape)}: {key!r}.")
    position = next((n for n, k in enumerate(key) if k is Ellipsis), len(key))
    fill = len(shape) - len([k for k in key if k is not Ellipsis])
    key = (*key[:position], *[slice(None)] * fill, *key[position + 1:])
    normalized = []
    for k, size in zip(key, shape):
        if isinstance(k, slice):
            start, stop, step = k.indices(size)
            if step < 1:
                raise IndexError(f"Slices of images on disk must have a positive step, but got {k!r}.")
            normalized.append(slice(start, max(start, stop), step))
        else:
            try:
                index = k.__index__()
            except AttributeError:
                raise IndexError(f"Images on disk are indexed by integers and slices, not by {k!r}.") from None
            if not -size <= index < size:
                raise IndexError(f"Index {index} is out of range for an axis of length {size}.")
            normalized.append(index % size)
    return tuple(normalized)


class LazyArray:
    """A read-only array behind a function that reads blocks.

    Args:
        read: Called with one non-negative integer or slice per axis; returns the block, as numpy would.
        shape: Shape of the array.
        dtype: Its dtype.
        name: How errors call it.
        chunks: Shape of the pieces in which it is stored, if known.
        owner: Kept alive as long as the array; an open file is closed when the array is gone.
    """

    def __init__(
        self,
        read: Callable[[Key], np.ndarray],
        shape: Sequence[int],
        dtype: np.dtype,
        name: str,
        chunks: Sequence[int] | None = None,
        owner: Any = None,
    ):
        self._read, self._name, self._owner = read, name, owner
        self.shape, self.dtype = tuple(int(s) for s in shape), np.dtype(dtype)
        self.chunks = None if chunks is None else tuple(int(c) for c in chunks)
        if hasattr(owner, "close"):
            weakref.finalize(self, owner.close)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} {self.shape} {self.dtype}>"

    def __getitem__(self, key: Any) -> np.ndarray:
        key = _normalize(key, self.shape)
        try:
            return np.asarray(self._read(key))
        except (MicroSamError, MemoryError):
            raise
        except Exception as error:  # each format library has errors of its own for damaged files
            raise ImageReadError(
                f"Could not read image data of {self._name}: {str(error).strip() or type(error).__name__}. The file is "
                "damaged, incomplete or stored in a way that is not supported; open it elsewhere and save it again."
            ) from error

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype, copy=False)


def from_array(array: Any, name: str, owner: Any = None) -> LazyArray:
    """Wrap an array on disk (zarr, h5py) so that reading errors name it."""
    return LazyArray(lambda key: array[key], array.shape, array.dtype, name, getattr(array, "chunks", None), owner)


def view(array: Any, fixed: dict[int, int | slice], order: Sequence[int], name: str) -> Any:
    """Select indices of some axes of an array and reorder the others, without reading it.

    Args:
        array: A numpy, dask or lazy array.
        fixed: Axis -> index (the axis vanishes) or slice (it is cut).
        order: The axes of `array` that remain, in their new order.
        name: How errors call it.

    Returns:
        A view for numpy, a dask array for dask, else a `LazyArray`.
    """
    if not fixed and list(order) == list(range(len(array.shape))):
        return array
    index = tuple(fixed.get(axis, slice(None)) for axis in range(len(array.shape)))
    kept = [axis for axis in range(len(array.shape)) if isinstance(index[axis], slice)]
    permutation = [kept.index(axis) for axis in order]
    if isinstance(array, np.ndarray) or type(array).__module__.split(".")[0] == "dask":
        return array[index].transpose(permutation)

    # Cut axes start at `offset`; only contiguous cuts are needed here.
    starts = {axis: index[axis].indices(array.shape[axis])[:2] for axis in kept}
    shape = [starts[axis][1] - starts[axis][0] for axis in order]
    chunks = getattr(array, "chunks", None)
    chunks = None if chunks is None else [chunks[axis] for axis in order]

    def read(key: Key) -> np.ndarray:
        source = list(index)
        for axis, k in zip(order, key):
            offset = starts[axis][0]
            source[axis] = slice(k.start + offset, k.stop + offset, k.step) if isinstance(k, slice) else k + offset
        block = np.asarray(array[tuple(source)])
        remaining = [axis for axis in kept if isinstance(source[axis], slice)]
        return block.transpose([remaining.index(axis) for axis in order if axis in remaining])

    return LazyArray(read, shape, array.dtype, name, chunks, array)


def stack(paths: Sequence[str], open_plane: Callable[[str], Any], name: str) -> LazyArray:
    """One array (N, ...) of equally shaped files; each is opened when it is indexed.

    Args:
        paths: The files, at least one, in order.
        open_plane: Opens one of them as an array.
        name: How errors call the stack.
    """
    first = open_plane(paths[0])
    shape, dtype = tuple(first.shape), np.dtype(first.dtype)

    def read(key: Key) -> np.ndarray:
        planes = range(len(paths))[key[0]]
        blocks = []
        for n in planes if isinstance(key[0], slice) else (planes,):
            plane = open_plane(paths[n])
            if tuple(plane.shape) != shape:
                raise ImageReadError(
                    f"The images of a stack must have one shape, but {paths[n]} has {tuple(plane.shape)} and "
                    f"{paths[0]} has {shape}. Choose files of equal size, or process them one by one."
                )
            blocks.append(np.asarray(plane[key[1:]]).astype(dtype, copy=False))
        if not isinstance(key[0], slice):
            return blocks[0]
        return np.stack(blocks) if blocks else np.empty((0, *np.broadcast_to(0, shape)[key[1:]].shape), dtype)

    return LazyArray(read, (len(paths), *shape), dtype, name, (1, *shape))
