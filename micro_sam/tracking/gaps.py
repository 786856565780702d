"""Frames in which an object is missing: the two ends of the gap are linked, and its shape is filled in between."""

from collections.abc import Iterable, Sequence

import numpy as np
from bioimage_cpp.distance import distance_transform
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from .lineage import Link, TrackForest
from .objects import FrameObjects, Node

# How much an object may change while it is not seen: it moves by less than its diameter per frame, and the smaller
# one has at least half the area of the larger one.
_MAX_MOVE, _MIN_AREA_RATIO = 1.0, 0.5


def gap_links(objects: Sequence[FrameObjects], links: Iterable[Link], max_gap: int) -> list[Link]:
    """Link objects without successor to similar ones without predecessor that appear a few frames later.

    Each object gets at most one such link; short gaps come first, then small changes of place and size.

    Args:
        objects: The objects of each frame.
        links: The links that there are already.
        max_gap: How many frames an object may be missing.

    Returns:
        The new links, pairs of (frame, label).
    """
    links = list(links)
    continued, begun = {source for source, _ in links}, {target for _, target in links}
    ends = [_select(frame, t, continued) for t, frame in enumerate(objects)]
    starts = [_select(frame, t, begun) for t, frame in enumerate(objects)]
    new: list[Link] = []
    used: set[tuple[str, Node]] = set()
    for gap in range(1, max_gap + 1):
        candidates = [
            candidate for t in range(len(objects) - gap - 1)
            for candidate in _candidates(objects, ends, starts, t, t + gap + 1)
        ]
        for _, source, target in sorted(candidates):
            if ("end", source) not in used and ("start", target) not in used:
                used |= {("end", source), ("start", target)}
                new.append((source, target))
    return new


def _select(frame: FrameObjects, t: int, taken: set[Node]) -> np.ndarray:
    """The positions of the objects of a frame that are not taken."""
    return np.array([n for n, label in enumerate(frame.labels.tolist()) if (t, label) not in taken], dtype=np.int64)


def _candidates(objects, ends, starts, t: int, later: int):
    """All pairs of an end in one frame and a start in another one that may be the same object, with their cost."""
    if not len(ends[t]) or not len(starts[later]):
        return
    first, second = objects[t], objects[later]
    tree = KDTree(second.centroids[starts[later]])
    reach = _MAX_MOVE * (later - t)
    for n in ends[t]:
        diameter = 2 * np.sqrt(first.areas[n] / np.pi)
        for k in tree.query_ball_point(first.centroids[n], reach * diameter):
            m = starts[later][k]
            ratio = min(first.areas[n], second.areas[m]) / max(first.areas[n], second.areas[m])
            if ratio >= _MIN_AREA_RATIO:
                move = np.linalg.norm(first.centroids[n] - second.centroids[m]) / (reach * diameter)
                yield move + 1 - ratio, (t, int(first.labels[n])), (later, int(second.labels[m]))


def fill_gaps(tracks: np.ndarray, forest: TrackForest, frames: dict[int, list[int]]) -> None:
    """Paint each track into the frames in which it is missing, onto background only.

    Args:
        tracks: Label images (T, Y, X) with the ids of the tracks; painted in place.
        forest: The tracks.
        frames: The frames in which each track has an object, in ascending order; the painted ones are added.
    """
    boxes: dict[int, list] = {}  # of the frames around gaps, found once per frame
    for track_id in forest:
        known = list(frames[track_id])
        for t, later in zip(known[:-1], known[1:]):
            if later == t + 1:
                continue
            ends = [_points(tracks, i, track_id, boxes) for i in (t, later)]
            for filled in range(t + 1, later):
                box, mask = _between(*ends, (filled - t) / (later - t), tracks.shape[1:])
                target = tracks[filled][box]
                mask &= target == 0
                if mask.any():
                    target[mask] = track_id
                    frames[track_id].append(filled)
        frames[track_id].sort()


def _points(tracks: np.ndarray, t: int, track_id: int, boxes: dict[int, list]) -> np.ndarray:
    """The pixels (y, x) of a track in a frame, (N, 2)."""
    if t not in boxes:
        boxes[t] = find_objects(tracks[t])
    box = boxes[t][track_id - 1]
    return np.argwhere(tracks[t][box] == track_id) + [s.start for s in box]


def _between(first: np.ndarray, second: np.ndarray, fraction: float, shape: tuple[int, ...]):
    """The shape on the way from one object to another: moved to a common centre, interpolated by distance transforms.

    Args:
        first: The pixels (y, x) of the earlier object, (N, 2).
        second: The pixels of the later object, (M, 2).
        fraction: Where between them, from 0 to 1.
        shape: The shape (Y, X) of the frame.

    Returns:
        The box of the shape in the frame as two slices, and the shape in that box, bool.
    """
    centers = [points.mean(axis=0) for points in (first, second)]
    center = np.round((1 - fraction) * centers[0] + fraction * centers[1]).astype(int)
    moved = [points - np.round(c).astype(int) + center for points, c in zip((first, second), centers)]
    both = np.concatenate(moved)
    low, high = both.min(axis=0), both.max(axis=0) + 1
    distances = []
    for points in moved:
        mask = np.zeros(tuple(high - low + 2), dtype=bool)  # one pixel of surroundings on each side
        mask[tuple((points - low + 1).T)] = True
        distances.append(distance_transform(mask) - distance_transform(~mask))
    inside = ((1 - fraction) * distances[0] + fraction * distances[1] > 0)[1:-1, 1:-1]
    start, stop = np.clip(low, 0, shape), np.clip(high, 0, shape)
    cut = tuple(slice(a, b) for a, b in zip(start - low, stop - low))
    return tuple(slice(a, b) for a, b in zip(start, stop)), inside[cut].copy()
