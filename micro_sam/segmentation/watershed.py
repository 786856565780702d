"""From foreground, centre and boundary distances to instances: a seeded watershed, whole or in parallel blocks.

All maps are arrays (Y, X) or (Z, Y, X) of one shape. The block version visits the maps block by block and holds
no full-size intermediate except the markers. Smoothing, seeds and height levels are those of the serial version
to the bit; the flooding of a block sees the block grown by the halo, so labels agree (but for single pixels with
a tie) wherever objects and their neighbours fit into the halo. Nothing depends on the number of threads.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import bioimage_cpp as bic
import numpy as np
import zarr
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..core.errors import InvalidInputError
from ..core.progress import Step, Steps, drain

Region = tuple[slice, ...]


@dataclass(frozen=True)
class WatershedOptions:
    """Thresholds and smoothing of the watershed; the meaning is that of `watershed_from_center_and_boundary_distances`.

    A sigma of at most 0 skips the smoothing.
    """

    center_distance_threshold: float = 0.5
    boundary_distance_threshold: float = 0.5
    foreground_threshold: float = 0.5
    foreground_smoothing: float = 0.0
    distance_smoothing: float = 1.6
    min_size: int = 0

    @property
    def radius(self) -> int:
        """How far in pixels a smoothed value looks."""
        sigma = max(self.foreground_smoothing, self.distance_smoothing, 0)
        return math.ceil(3 * sigma)


def _smooth(array: np.ndarray, sigma: float) -> np.ndarray:
    array = np.asarray(array, dtype=np.float32)
    return bic.filters.gaussian_smoothing(array, sigma) if sigma > 0 else array


def _seeds(center: np.ndarray, boundary: np.ndarray, mask: np.ndarray, options: WatershedOptions) -> np.ndarray:
    seeds = center < options.center_distance_threshold
    seeds &= boundary < options.boundary_distance_threshold
    seeds &= mask
    return seeds


def _label(seeds: np.ndarray) -> np.ndarray:
    """Connected components with full (8- or 26-) connectivity, uint32, in raster order of their first pixels."""
    labels, _ = ndimage.label(seeds, structure=np.ones((3,) * seeds.ndim, dtype=bool))
    return labels.view(np.uint32) if labels.dtype == np.int32 else labels.astype(np.uint64)


def _size_lookup(sizes: np.ndarray, min_size: int) -> np.ndarray:
    """Table from label to label that removes labels with fewer than `min_size` pixels and renumbers the others."""
    keep = (sizes > 0) & (sizes >= min_size)
    keep[:1] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.uint64)


def _check_maps(center: np.ndarray, boundary: np.ndarray, foreground: np.ndarray) -> None:
    shapes = {"center_distances": center.shape, "boundary_distances": boundary.shape, "foreground": foreground.shape}
    if len(set(shapes.values())) != 1 or foreground.ndim not in (2, 3):
        raise InvalidInputError(f"The three maps must have the same shape (Y, X) or (Z, Y, X), but got {shapes}.")


def watershed_from_center_and_boundary_distances(
    center_distances: np.ndarray,
    boundary_distances: np.ndarray,
    foreground_map: np.ndarray,
    center_distance_threshold: float = 0.5,
    boundary_distance_threshold: float = 0.5,
    foreground_threshold: float = 0.5,
    distance_smoothing: float = 1.6,
    min_size: int = 0,
    debug: bool = False,
    *,
    foreground_smoothing: float = 0.0,
) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
    """Segment instances by a seeded watershed on the (inverted) distance to the object boundaries.

    Seeds are the 8-connected components of the foreground where both distances are below their thresholds. They
    are flooded over axis neighbours within the foreground. The inputs are not changed.

    Args:
        center_distances: Distance to the object centre in [0, 1], small at the centre.
        boundary_distances: Inverted distance to the object boundary in [0, 1], small deep inside objects.
        foreground_map: Foreground probability in [0, 1].
        center_distance_threshold: Seeds have a centre distance below this.
        boundary_distance_threshold: Seeds have a boundary distance below this.
        foreground_threshold: The foreground is where the probability is above this.
        distance_smoothing: Sigma in pixels for both distances; 0 for no smoothing.
        min_size: Remove objects with fewer pixels and number the others from 1; 0 keeps all.
        debug: Whether to return the intermediate results as well.
        foreground_smoothing: Sigma in pixels for the foreground; 0 for no smoothing.

    Returns:
        Labels, uint64, with 0 for background. With `debug` also a dictionary with `center_distances`,
        `boundary_distances` (both smoothed), `foreground_mask` and `markers`.

    Raises:
        InvalidInputError: If the shapes differ.
    """
    center, boundary, foreground = (np.asarray(m) for m in (center_distances, boundary_distances, foreground_map))
    _check_maps(center, boundary, foreground)
    options = WatershedOptions(
        center_distance_threshold, boundary_distance_threshold, foreground_threshold,
        foreground_smoothing, distance_smoothing, min_size,
    )
    mask = _smooth(foreground, foreground_smoothing) > foreground_threshold
    center, boundary = _smooth(center, distance_smoothing), _smooth(boundary, distance_smoothing)
    markers = _label(_seeds(center, boundary, mask, options))
    segmentation = bic.segmentation.watershed(boundary, markers, mask=mask)
    if min_size > 0:
        segmentation = _size_lookup(np.bincount(segmentation.ravel()), min_size)[segmentation]
    segmentation = segmentation.astype(np.uint64, copy=False)
    if debug:
        return segmentation, {
            "center_distances": center, "boundary_distances": boundary, "foreground_mask": mask, "markers": markers,
        }
    return segmentation


def _grow(region: Region, margin: Sequence[int], shape: Sequence[int]) -> Region:
    return tuple(slice(max(s.start - m, 0), min(s.stop + m, n)) for s, m, n in zip(region, margin, shape))


def _inside(region: Region, outer: Region) -> Region:
    """The region in coordinates of the outer region."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(region, outer))


class _Blocks:
    """A regular grid of blocks, in row-major order."""

    def __init__(self, shape: Sequence[int], block_shape: Sequence[int]):
        self.shape, self.block_shape = tuple(shape), tuple(block_shape)
        self.grid = tuple(-(-s // b) for s, b in zip(self.shape, self.block_shape))

    def __len__(self) -> int:
        return math.prod(self.grid)

    def __getitem__(self, index: int) -> Region:
        position = np.unravel_index(index, self.grid)
        return tuple(
            slice(int(p) * b, min((int(p) + 1) * b, s)) for p, b, s in zip(position, self.block_shape, self.shape)
        )

    def touching(self, region: Region) -> Iterator[tuple[int, Region]]:
        """The blocks that intersect a region, with the intersections."""
        ranges = [range(s.start // b, (s.stop - 1) // b + 1) for s, b in zip(region, self.block_shape)]
        for position in itertools.product(*ranges):
            index = int(np.ravel_multi_index(position, self.grid))
            yield index, tuple(
                slice(max(a.start, r.start), min(a.stop, r.stop)) for a, r in zip(self[index], region)
            )


class _Markers:
    """Seeds, labelled per block in a store and numbered globally by one table per block."""

    def __init__(self, store, blocks: _Blocks):
        self._store, self._blocks = store, blocks
        self._first: list[np.ndarray | None] = [None] * len(blocks)
        self._offsets, self._table = None, None

    def label_block(self, index: int, seeds: np.ndarray) -> None:
        region = self._blocks[index]
        labels = _label(seeds).astype(np.uint32, copy=False)
        self._store[region] = labels
        position = np.flatnonzero(labels)[::-1]
        first = np.zeros(int(labels.max()) + 1, dtype=np.int64)
        first[labels.ravel()[position]] = position  # of several positions the last one written stays: the first pixel
        where = np.unravel_index(first[1:], labels.shape)
        self._first[index] = np.ravel_multi_index(
            tuple(w + s.start for w, s in zip(where, region)), self._blocks.shape
        )

    def connect(self) -> None:
        """Join components that touch across blocks, also diagonally, and number all as in one piece."""
        counts = [len(first) for first in self._first]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        n = int(self._offsets[-1])
        self._table = np.arange(1, n + 1)
        pairs = [np.zeros((0, 2), dtype=np.int64), *self._pairs_across_blocks()]
        pairs = np.concatenate(pairs) - 1
        graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
        n_joined, joined = connected_components(graph, directed=False) if n else (0, np.zeros(0, dtype=int))
        first = np.full(n_joined, np.iinfo(np.int64).max)
        np.minimum.at(first, joined, np.concatenate(self._first).astype(np.int64))
        rank = np.empty(n_joined, dtype=np.int64)
        rank[np.argsort(first)] = np.arange(1, n_joined + 1)
        self._table = rank[joined]
        self.n_labels = n_joined

    def read(self, region: Region) -> np.ndarray:
        """Global ids of a region."""
        out = np.zeros([s.stop - s.start for s in region], dtype=np.int64)
        for index, part in self._blocks.touching(region):
            start, stop = self._offsets[index], self._offsets[index + 1]
            table = np.concatenate([[0], self._table[start:stop]])
            out[_inside(part, region)] = table[np.asarray(self._store[part])]
        return out

    def _pairs_across_blocks(self) -> Iterator[np.ndarray]:
        shape, ndim = self._blocks.shape, len(self._blocks.shape)
        for axis in range(ndim):
            for cut in range(self._blocks.block_shape[axis], shape[axis], self._blocks.block_shape[axis]):
                region = tuple(slice(cut - 1, cut + 1) if a == axis else slice(0, s) for a, s in enumerate(shape))
                below, above = np.moveaxis(self.read(region), axis, 0)
                for shift in itertools.product((-1, 0, 1), repeat=ndim - 1):
                    a = below[tuple(slice(max(d, 0), n + min(d, 0)) for d, n in zip(shift, below.shape))]
                    b = above[tuple(slice(max(-d, 0), n + min(-d, 0)) for d, n in zip(shift, below.shape))]
                    touch = (a > 0) & (b > 0)
                    yield np.unique(np.stack([a[touch], b[touch]], axis=1), axis=0)


class _BlockWatershed:
    """The three passes over the blocks."""

    def __init__(self, maps, options: WatershedOptions, blocks: _Blocks, halo, store, output):
        self._center, self._boundary, self._foreground = maps
        self._options, self._blocks, self._halo, self._output = options, blocks, halo, output
        self._markers = _Markers(store, blocks)
        self._limits = []

    def _smoothed(self, array: np.ndarray, region: Region, sigma: float) -> np.ndarray:
        # The margin covers the whole kernel, which makes this equal to smoothing everything at once.
        margin = math.ceil(3 * sigma) if sigma > 0 else 0
        outer = _grow(region, (margin,) * len(region), self._blocks.shape)
        return _smooth(array[outer], sigma)[_inside(region, outer)]

    def _mask(self, region: Region) -> np.ndarray:
        foreground = self._smoothed(self._foreground, region, self._options.foreground_smoothing)
        return foreground > self._options.foreground_threshold

    def seeds(self, index: int) -> tuple[float, float]:
        region, sigma = self._blocks[index], self._options.distance_smoothing
        boundary = self._smoothed(self._boundary, region, sigma)
        center = self._smoothed(self._center, region, sigma)
        self._markers.label_block(index, _seeds(center, boundary, self._mask(region), self._options))
        return float(boundary.min()), float(boundary.max())

    def connect(self, limits: list[tuple[float, float]]) -> None:
        self._markers.connect()
        check_output_holds(self._output, self._markers.n_labels)
        lows, highs = zip(*limits)
        self._limits = [min(lows), max(highs)]

    def flood(self, index: int) -> np.ndarray | None:
        inner = self._blocks[index]
        outer = _grow(inner, self._halo, self._blocks.shape)
        markers = self._markers.read(outer)
        if markers.any():
            heights = self._smoothed(self._boundary, outer, self._options.distance_smoothing)
            # Heights are quantised between their extremes: two masked lines give each block those of the image.
            lines = np.empty((2, *heights.shape[1:]), dtype=np.float32)
            lines[0], lines[1] = self._limits
            blank = np.zeros(lines.shape, dtype=bool)
            markers = bic.segmentation.watershed(
                np.concatenate([heights, lines]),
                np.concatenate([markers, blank.astype(markers.dtype)]),
                mask=np.concatenate([self._mask(outer), blank]),
            )[:-2]
        labels = markers[_inside(inner, outer)]
        self._output[inner] = labels.astype(self._output.dtype)
        if self._options.min_size > 0:
            sizes = np.bincount(labels.ravel())
            ids = np.flatnonzero(sizes)
            return np.stack([ids, sizes[ids]])
        return None

    def size_table(self, counts: list[np.ndarray]) -> np.ndarray:
        sizes = np.zeros(self._markers.n_labels + 1, dtype=np.int64)
        for ids, n in counts:
            sizes[ids] += n
        return _size_lookup(sizes, self._options.min_size)

    def relabel(self, index: int, table: np.ndarray) -> None:
        region = self._blocks[index]
        self._output[region] = table[np.asarray(self._output[region])].astype(self._output.dtype)


def _block_shape(shape: Sequence[int], tile_shape: Sequence[int], output) -> tuple[int, ...]:
    """Blocks write side by side, so they must not share a shard or chunk of the output."""
    shards, chunks = getattr(output, "shards", None), getattr(output, "chunks", None)
    if shards:
        return tuple(shards)
    if chunks:
        return tuple(-(-t // c) * c for t, c in zip(tile_shape, chunks))
    return tuple(tile_shape)


def _check_tiling(shape, tile_shape, halo, segmentation) -> None:
    if halo is None:
        raise InvalidInputError(
            f"tile_shape={tuple(tile_shape)} needs a halo: pass how far in pixels (y, x) blocks look beyond "
            "themselves, ideally the diameter of the objects."
        )
    for name, value, minimum in (("tile_shape", tile_shape, 1), ("halo", halo, 0)):
        if len(value) != len(shape) or any(int(v) != v or v < minimum for v in value):
            raise InvalidInputError(
                f"{name} must be {len(shape)} integers of at least {minimum} for maps of shape {shape}, "
                f"but got {value!r}."
            )
    if segmentation is not None:
        check_output(segmentation, shape)


def check_output(segmentation, shape: Sequence[int]) -> None:
    """Raise `InvalidInputError` if labels of that shape cannot be written to the array."""
    if tuple(segmentation.shape) != tuple(shape) or np.dtype(segmentation.dtype).kind not in "ui":
        raise InvalidInputError(
            f"The output `segmentation` must be an integer array of the shape {tuple(shape)}, but is "
            f"{segmentation.dtype} {tuple(segmentation.shape)}."
        )


def check_output_holds(segmentation, n_labels: int) -> None:
    """Raise `InvalidInputError` if the array's dtype cannot hold the labels."""
    if n_labels > np.iinfo(segmentation.dtype).max:
        raise InvalidInputError(
            f"There are {n_labels} labels, too many for the output `segmentation` of dtype {segmentation.dtype}. "
            "Pass one of dtype uint32."
        )


def block_watershed_steps(
    center_distances: np.ndarray,
    boundary_distances: np.ndarray,
    foreground_map: np.ndarray,
    options: WatershedOptions,
    tile_shape: Sequence[int],
    halo: Sequence[int],
    n_threads: int | None = None,
    optimize_memory: bool = False,
    segmentation=None,
) -> Steps[np.ndarray]:
    """Generator behind `block_watershed`: yields `Step`, returns the labels. Closing it stops after running blocks."""
    maps = (center_distances, boundary_distances, foreground_map)
    _check_maps(*maps)
    shape = tuple(foreground_map.shape)
    _check_tiling(shape, tile_shape, halo, segmentation)
    blocks = _Blocks(shape, _block_shape(shape, tile_shape, segmentation))
    output = np.zeros(shape, dtype=np.uint64) if segmentation is None else segmentation

    with ExitStack() as stack:
        if optimize_memory:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="micro_sam_markers_"))
            store = zarr.create_array(folder, shape=shape, chunks=blocks.block_shape, dtype="uint32", fill_value=0)
        else:
            store = np.zeros(shape, dtype=np.uint32)
        job = _BlockWatershed(maps, options, blocks, halo, store, output)
        pool = ThreadPoolExecutor(n_threads or os.cpu_count() or 1)
        stack.callback(pool.shutdown, cancel_futures=True)

        limits = yield from _run(pool, job.seeds, len(blocks), "Find seeds")
        job.connect(limits)
        counts = yield from _run(pool, job.flood, len(blocks), "Watershed")
        if options.min_size > 0:
            table = job.size_table(counts)
            yield from _run(pool, lambda index: job.relabel(index, table), len(blocks), "Remove small objects")
    return output


def _run(pool: ThreadPoolExecutor, function: Callable, n: int, text: str) -> Steps[list]:
    results = []
    yield Step(0, n, text)
    for result in pool.map(function, range(n)):
        results.append(result)
        yield Step(len(results), n, text)
    return results


def block_watershed(*args, **kwargs) -> np.ndarray:
    """Segment like `watershed_from_center_and_boundary_distances`, block by block and in parallel.

    Args:
        center_distances: See there; also the two following.
        boundary_distances: .
        foreground_map: .
        options: The thresholds.
        tile_shape: Block shape in pixels, one entry per axis. With an output in shards or chunks, blocks are
            shards, or are enlarged to whole chunks.
        halo: How far in pixels a block looks beyond itself, one entry per axis.
        n_threads: Number of threads; None for all cores. It does not change the result.
        optimize_memory: Whether to keep the markers in a temporary file.
        segmentation: Where to write: an integer array or zarr array of the same shape; None for a new array.

    Returns:
        The labels: a new uint64 array, or `segmentation`.

    Raises:
        InvalidInputError: If shapes do not fit, or the halo is missing.
    """
    return drain(block_watershed_steps(*args, **kwargs), verbose=False)
