"""Objects of single slices merged to objects in 3D: a multicut over their overlaps from slice to slice.

Nothing here holds more than a few slices: a lazy input is read slice by slice, twice, and the result can be written
to an array on disk.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from bioimage_cpp.graph import UndirectedGraph
from bioimage_cpp.graph.multicut import KernighanLinMulticut, MulticutDecomposer, MulticutObjective

from ..core.errors import InvalidInputError, InvalidTypeError
from ..core.progress import Step, Steps, drain

NECK_PENALTY = 10.0
_TEXT = "Merge segmentation of slices"


def merge_instance_segmentation_3d(
    slice_segmentation: np.ndarray,
    beta: float = 0.5,
    with_background: bool = True,
    gap_closing: int | None = None,
    min_z_extent: int | None = None,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    *,
    ids_per_slice: bool = False,
    output: Any = None,
    neck_penalty: float = NECK_PENALTY,
) -> np.ndarray:
    """Merge the objects of slices to objects in 3D.

    Two objects of neighbouring slices attract each other if the upper one covers more than 26.85 % of the lower one
    (for `beta` 0.5), else they repel each other; the multicut of this graph is the result. The multicut is found by
    local search (Kernighan-Lin) in each component of attracting objects, as in Alush and Goldberger, Break and
    conquer (2013), https://doi.org/10.1007/978-3-642-39140-8_9.

    Outlines alone do not tell an object from two that lie on top of each other. These meet at a neck: the overlaps of
    their slices grow again on either side of it. `neck_penalty * ln(r)` is taken from the attraction at a neck, where
    overlaps become at least r times larger on both sides. Objects that are not convex, such as mitochondria, have necks
    of their own: a penalty of 1 or 0 suits them better.

    Args:
        slice_segmentation: Labels (Z, Y, X), integers, may be lazy (zarr, dask, a memory map): it is read slice by
            slice. An id belongs to one slice only.
        beta: Between 0 and 1: above 0.5 objects are merged more readily, below less. ln((1 - beta) / beta) is added
            to the cost of merging.
        with_background: Whether the id 0 is background. If not, what is 0 in a slice is an object like all others.
        gap_closing: How many slices to close from either side: gaps of up to twice as many slices are bridged and
            filled where the same object lies below and above. None or 0 for none.
        min_z_extent: Objects that span fewer slices than this are removed. None or 0 keeps all.
        verbose: Whether to show progress.
        pbar_init: Callback `(total, description)` for progress.
        pbar_update: Callback `(n)` for progress.
        ids_per_slice: Whether the same id in two slices means nothing, so that each slice may count from 1.
        output: Array or zarr array (Z, Y, X) of integers to write to, which may be `slice_segmentation` itself; None
            for a new one. Chunks of one slice are the fastest.
        neck_penalty: How strongly necks separate objects; 0 looks at overlaps only, as version 1 did.

    Returns:
        Labels (Z, Y, X), uint64 or `output`, consecutive from 1 in the order in which objects start.

    Raises:
        InvalidInputError: If the labels are not three-dimensional or negative, an id occurs in two slices, `output`
            does not fit, or an option is out of range.
        InvalidTypeError: If the labels are no integers.

    Example:
        >>> slices = np.zeros((2, 4, 4), dtype="uint32")
        >>> slices[0, :, :2], slices[1, :, :2], slices[1, :, 3] = 1, 2, 3
        >>> merge_instance_segmentation_3d(slices, verbose=False)[:, 0]
        array([[1, 1, 0, 0],
               [1, 1, 0, 2]], dtype=uint64)
    """
    steps = merge_steps(
        slice_segmentation, beta, with_background, gap_closing, min_z_extent, ids_per_slice=ids_per_slice,
        output=output, neck_penalty=neck_penalty,
    )
    return drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)


def merge_steps(
    slice_segmentation: np.ndarray,
    beta: float = 0.5,
    with_background: bool = True,
    gap_closing: int | None = None,
    min_z_extent: int | None = None,
    *,
    ids_per_slice: bool = False,
    output: Any = None,
    neck_penalty: float = NECK_PENALTY,
) -> Steps[np.ndarray]:
    """Generator behind `merge_instance_segmentation_3d`. If it is closed, the content of `output` is undefined."""
    check_merge_options(beta, gap_closing, min_z_extent, neck_penalty)
    segmentation = slice_segmentation
    if not (hasattr(segmentation, "shape") and hasattr(segmentation, "dtype")):
        segmentation = np.asarray(segmentation)
    shape = tuple(int(s) for s in segmentation.shape)
    if len(shape) != 3:
        raise InvalidInputError(f"The labels must have the shape (Z, Y, X), but have {shape}.")
    if np.dtype(segmentation.dtype).kind not in "ui":
        raise InvalidTypeError(f"The labels must be integers, but have the dtype {segmentation.dtype}.")
    if output is not None:
        check_output(output, shape)

    depth, longest_gap = shape[0], 2 * (gap_closing or 0)
    graph = _OverlapGraph(with_background, longest_gap)
    yield Step(0, 2 * depth, _TEXT)
    for z in range(depth):
        graph.add(_read(segmentation, z))
        yield Step(z + 1, 2 * depth, _TEXT)
    if not ids_per_slice:
        graph.check_unique_ids()

    ids = graph.solve(beta, min_z_extent or 0, neck_penalty)
    if output is None:
        output = np.zeros(shape, dtype=np.uint64)
    check_output_holds(output, int(ids.max(initial=0)))
    planes = (graph.relabel(z, _read(segmentation, z), ids) for z in range(depth))
    for z, plane in enumerate(_close_gaps(planes, longest_gap)):
        output[z] = plane.reshape(shape[1:]).astype(output.dtype, copy=False)
        yield Step(depth + z + 1, 2 * depth, _TEXT)
    return output


def check_merge_options(
    beta: float, gap_closing: int | None, min_z_extent: int | None, neck_penalty: float = NECK_PENALTY
) -> None:
    """Raise `InvalidInputError` for options that are out of range."""
    if not 0 <= neck_penalty < np.inf:
        raise InvalidInputError(f"neck_penalty must be 0 or more, but is {neck_penalty!r}.")
    if not 0 < beta < 1:
        raise InvalidInputError(f"beta must lie between 0 and 1, without these, but is {beta!r}.")
    for name, value in (("gap_closing", gap_closing), ("min_z_extent", min_z_extent)):
        if value is not None and (not hasattr(value, "__index__") or value.__index__() < 0):
            raise InvalidInputError(f"{name} must be None or a number of slices, 0 or more, but is {value!r}.")


def check_output(output: Any, shape: tuple[int, ...]) -> None:
    """Raise `InvalidInputError` if labels of that shape cannot be written to the array."""
    if tuple(output.shape) != shape or np.dtype(output.dtype).kind not in "ui":
        raise InvalidInputError(
            f"The output must be an integer array of the shape {shape}, but is {output.dtype} {tuple(output.shape)}."
        )
    flags = getattr(output, "flags", None)
    if getattr(output, "read_only", False) or not getattr(flags, "writeable", True):
        raise InvalidInputError("The output cannot be written to: it is read-only.")


def check_output_holds(output: Any, max_id: int) -> None:
    """Raise `InvalidInputError` if an id is too large for the dtype of the array."""
    if max_id > np.iinfo(output.dtype).max:
        raise InvalidInputError(
            f"There are ids up to {max_id}, too large for the output of dtype {output.dtype}. Pass one of dtype uint32."
        )


def _read(segmentation: Any, z: int) -> np.ndarray:
    """One slice, flat."""
    plane = np.asarray(segmentation[z]).ravel()
    if plane.dtype.kind == "i" and plane.min(initial=0) < 0:
        raise InvalidInputError(f"Slice {z} has the negative id {plane.min()}. Ids must be 0 or more.")
    return plane


def _runs(*planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the runs along which all flat planes keep their value; far fewer than pixels."""
    size = planes[0].size
    if size == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    changes = planes[0][1:] != planes[0][:-1]
    for plane in planes[1:]:
        changes |= plane[1:] != plane[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return starts, np.diff(starts, append=size)


class _OverlapGraph:
    """Objects of slices as nodes, numbered from 1 in the order of slices and ids, and their overlaps as edges.

    Args:
        with_background: Whether the id 0 is no object.
        longest_gap: Objects overlap across up to this many slices, in pixels that are background there.
    """

    def __init__(self, with_background: bool, longest_gap: int):
        self._with_background, self._longest_gap = with_background, longest_gap
        self._first_node = [1]  # of each slice, and of the next one
        self._ids: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._edges: list[np.ndarray] = []  # node below, node above, overlap in pixels, whether they are neighbours
        self._last: np.ndarray | None = None  # the last node at each pixel

    def _nodes_of_ids(self, z: int) -> np.ndarray:
        """Nodes of all ids of a slice; 0 for background."""
        ids = self._ids[z]
        n_background = int(self._with_background and len(ids) > 0 and ids[0] == 0)
        nodes = np.arange(len(ids)) + self._first_node[z] - n_background
        nodes[:n_background] = 0
        return nodes

    def add(self, plane: np.ndarray) -> None:
        """Add the next slice (flat)."""
        z = len(self._ids)
        starts, lengths = _runs(plane)
        ids, index = np.unique(plane[starts], return_inverse=True)
        self._ids.append(ids)
        nodes_of_ids = self._nodes_of_ids(z)
        self._sizes.append(np.bincount(index, weights=lengths, minlength=len(ids))[nodes_of_ids > 0])
        self._first_node.append(self._first_node[z] + len(self._sizes[z]))
        nodes = np.repeat(nodes_of_ids[index], lengths)
        if self._last is not None:
            self._edges.append(self._overlaps(z, nodes))
        keep_last = self._last is not None and self._longest_gap > 0
        self._last = np.where(nodes > 0, nodes, self._last) if keep_last else nodes

    def _overlaps(self, z: int, nodes: np.ndarray) -> np.ndarray:
        starts, lengths = _runs(self._last, nodes)
        below, above = self._last[starts], nodes[starts]
        # Nodes are numbered by slice: this leaves out what lies too far below.
        is_edge = (below >= self._first_node[max(0, z - 1 - self._longest_gap)]) & (above > 0)
        first, n_above = self._first_node[z], max(1, len(self._sizes[z]))
        pairs, index = np.unique(below[is_edge] * n_above + above[is_edge] - first, return_inverse=True)
        overlaps = np.bincount(index, weights=lengths[is_edge], minlength=len(pairs)).astype(np.int64)
        below = pairs // n_above
        return np.stack([below, pairs % n_above + first, overlaps, below >= self._first_node[z - 1]], axis=1)

    def check_unique_ids(self) -> None:
        """Raise `InvalidInputError` if an id occurs in two slices."""
        ids = [ids[ids != 0] for ids in self._ids]
        values = np.concatenate(ids) if ids else np.zeros(0)
        order = np.argsort(values, kind="stable")
        repeated = np.flatnonzero(np.diff(values[order]) == 0)
        if len(repeated):
            k = repeated[0]
            slices = np.repeat(np.arange(len(ids)), [len(i) for i in ids])[order[[k, k + 1]]]
            raise InvalidInputError(
                f"The id {values[order[k]]} occurs in the slices {slices[0]} and {slices[1]}, but ids must be unique "
                "to one slice. Pass ids_per_slice=True if equal ids in different slices mean nothing."
            )

    def _necks(self, below: np.ndarray, above: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
        """How many times larger the overlap of each edge becomes on either side, on the side where it grows less.

        Objects are followed from slice to slice as long as each part is the best partner of the other by IoU, so that
        the tip of an object is not taken for a part of its larger neighbour, and up to the first overlap that is
        smaller than that of the edge, so that only the narrowest place of a neck counts.
        """
        sizes = np.concatenate(self._sizes)
        own = np.arange(len(sizes))
        by_iou = np.argsort(overlaps / (sizes[below] + sizes[above] - overlaps), kind="stable")
        best_above, best_below = own.copy(), own.copy()
        # For repeated indices the last value stays, that of the largest IoU.
        best_above[below[by_iou]], best_below[above[by_iou]] = above[by_iou], below[by_iou]
        is_mutual = (best_above[below] == above) & (best_below[above] == below)
        largest = []
        for start, here, there in ((below, above, below), (above, below, above)):
            partner, overlap = own.copy(), np.zeros(len(own), dtype=np.int64)
            partner[here[is_mutual]], overlap[here[is_mutual]] = there[is_mutual], overlaps[is_mutual]
            node, largest_so_far, going = start.copy(), overlaps.copy(), np.arange(len(overlaps))
            while len(going):
                going = going[overlap[node[going]] >= overlaps[going]]
                largest_so_far[going] = np.maximum(largest_so_far[going], overlap[node[going]])
                node[going] = partner[node[going]]
            largest.append(largest_so_far)
        return np.minimum(*largest) / overlaps

    def solve(self, beta: float, min_z_extent: int, neck_penalty: float) -> np.ndarray:
        """Return the final id of each node; 0 for node 0 and for objects that span too few slices."""
        n_nodes = self._first_node[-1] - 1
        clusters = np.arange(n_nodes)
        edges = np.concatenate([np.zeros((0, 4), dtype=np.int64), *self._edges])
        edges[:, :2] -= 1
        below, above, overlaps, are_neighbours = edges.T
        if len(overlaps):
            probability = 0.998 * overlaps / np.concatenate(self._sizes)[below] + 0.001
            weights = 1 - np.log((1 - probability) / probability) - np.log((1 - beta) / beta)
            weights -= neck_penalty * np.log(self._necks(below, above, overlaps))
            # Across a gap only attraction counts: there the rim of an object sees past its own next part.
            keep = (are_neighbours > 0) | (weights > 0)
            edges = np.stack([below[keep], above[keep]], axis=1).astype(np.uint64)
            objective = MulticutObjective(UndirectedGraph.from_edges(n_nodes, edges), weights[keep])
            clusters = MulticutDecomposer(KernighanLinMulticut()).optimize(objective)

        _, first_nodes, index = np.unique(clusters, return_index=True, return_inverse=True)
        slices = np.repeat(np.arange(len(self._ids)), np.diff(self._first_node))
        last_slices = np.zeros(len(first_nodes), dtype=int)
        np.maximum.at(last_slices, index, slices)
        is_kept = last_slices - slices[first_nodes] + 1 >= min_z_extent
        order = np.argsort(first_nodes)
        order = order[is_kept[order]]
        ids = np.zeros(len(first_nodes), dtype=np.uint64)
        ids[order] = np.arange(1, len(order) + 1)
        return np.concatenate([np.zeros(1, dtype=np.uint64), ids[index]])

    def relabel(self, z: int, plane: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Replace the ids of a slice (flat) by the final ids of their nodes."""
        starts, lengths = _runs(plane)
        index = np.searchsorted(self._ids[z], plane[starts])
        return np.repeat(ids[self._nodes_of_ids(z)][index], lengths)


def _close_gaps(planes: Iterable[np.ndarray], longest: int) -> Iterator[np.ndarray]:
    """Yield flat planes of final ids, with gaps of up to `longest` slices filled where one id lies on both sides."""
    if longest == 0:
        yield from planes
        return
    pending: deque[np.ndarray] = deque()
    last = seen_at = None  # the last id at each pixel, and its slice
    for z, plane in enumerate(planes):
        if last is None:
            last, seen_at = np.zeros_like(plane), np.zeros(plane.shape, dtype=np.int64)
        is_gap = (plane > 0) & (plane == last) & (seen_at < z - 1) & (seen_at >= z - 1 - longest)
        pixels = np.flatnonzero(is_gap)
        for distance, below in enumerate(reversed(pending), 1):
            inside = pixels[seen_at[pixels] < z - distance]
            below[inside] = plane[inside]
        last = np.where(plane > 0, plane, last)
        seen_at[plane > 0] = z
        if len(pending) == longest:
            yield pending.popleft()
        pending.append(plane)
    yield from pending
