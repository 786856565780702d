"""Tracks and who descends from whom: one structure that is always a forest, and what others make of it.

A track is an object from the frame where it appears to the one where it vanishes or divides. The outside world knows
lineages as a list of dictionaries, napari as a graph from child to parents, the Cell Tracking Challenge as a table.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InvalidInputError
from .objects import FrameObjects, Node, find_objects, read_frame

Lineages = list[dict[int, list[int]]]
Link = tuple[Node, Node]


@dataclass(frozen=True, order=True)
class Track:
    """One track.

    Attributes:
        id: Its id, positive; the label of its object in all frames.
        first: The first frame with the object.
        last: The last frame with the object. It may be missing in frames between.
        parent: The id of the track from which it descends; 0 for none.
    """

    id: int
    first: int
    last: int
    parent: int = 0


class TrackForest(Mapping[int, Track]):
    """The tracks of a time series by their ids, in ascending order; unchangeable, and always a forest.

    Args:
        tracks: The tracks, in any order.

    Raises:
        InvalidInputError: If ids are not positive or not unique, frames are negative or in the wrong order, a parent
            does not exist, or a track begins before its parent has ended.
    """

    def __init__(self, tracks: Iterable[Track] = ()):
        ordered = sorted(tracks)
        self._tracks = {track.id: track for track in ordered}
        if len(self._tracks) != len(ordered):
            raise InvalidInputError("The ids of tracks must be unique, but some occur twice.")
        self._children: dict[int, list[int]] = {i: [] for i in self._tracks}
        for track in ordered:
            self._check(track)
            if track.parent:
                self._children[track.parent].append(track.id)

    def _check(self, track: Track) -> None:
        if track.id < 1:
            raise InvalidInputError(f"The ids of tracks must be positive, but there is {track.id}.")
        if not 0 <= track.first <= track.last:
            raise InvalidInputError(f"Track {track.id} goes from frame {track.first} to frame {track.last}.")
        if not track.parent:
            return
        parent = self._tracks.get(track.parent)
        if parent is None:
            raise InvalidInputError(f"Track {track.id} has the parent {track.parent}, but there is no such track.")
        # As parents end before their children begin, no track can be its own ancestor.
        if parent.last >= track.first:
            raise InvalidInputError(
                f"Track {track.id} begins in frame {track.first}, but its parent {parent.id} ends in frame "
                f"{parent.last}. A parent must end before its children begin."
            )

    def __getitem__(self, track_id: int) -> Track:
        return self._tracks[track_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def __eq__(self, other: object) -> bool:
        return self._tracks == other._tracks if isinstance(other, TrackForest) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._tracks.values()))

    def __repr__(self) -> str:
        return f"<TrackForest of {len(self)} tracks, {sum(len(c) > 1 for c in self._children.values())} divisions>"

    def children(self, track_id: int) -> list[int]:
        """Return the ids of the tracks that descend directly from a track, in ascending order."""
        return list(self._children[track_id])

    def table(self) -> np.ndarray:
        """Return the rows (id, first frame, last frame, parent or 0), (N, 4) int64."""
        rows = [(t.id, t.first, t.last, t.parent) for t in self.values()]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def lineages(self) -> Lineages:
        """Return one dictionary per tree: the id of each of its tracks with the ids of the children, roots first.

        Example:
            >>> TrackForest([Track(1, 0, 2), Track(2, 3, 5, 1), Track(3, 3, 4, 1), Track(4, 0, 0)]).lineages()
            [{1: [2, 3], 2: [], 3: []}, {4: []}]
        """
        trees: Lineages = []
        for root in (t.id for t in self.values() if not t.parent):
            tree: dict[int, list[int]] = {}
            found = [root]
            for i in found:
                tree[i] = self.children(i)
                found.extend(tree[i])
            trees.append(tree)
        return trees

    def without(self, track_ids: Iterable[int]) -> "TrackForest":
        """Return the forest without some tracks. Their children have no parent then."""
        gone = {0, *track_ids}
        return TrackForest(
            replace(t, parent=0) if t.parent in gone else t for t in self.values() if t.id not in gone
        )


def forest_from_lineages(lineages: Sequence[Mapping[int, Sequence[int]]], extents: Mapping[int, tuple]) -> TrackForest:
    """Turn lineages, as they are returned by the tracking functions, into a forest.

    Args:
        lineages: Dictionaries from the id of a track to those of its children.
        extents: The first and last frame of each track. Ids that are not here are left out; tracks that are only
            here have neither parent nor children.

    Raises:
        InvalidInputError: If it is no forest: a track has two parents, or begins before its parent has ended.
    """
    parents: dict[int, int] = {}
    for parent, children in ((int(p), c) for tree in lineages for p, c in tree.items()):
        for child in map(int, children):
            if parents.get(child, parent) != parent:
                raise InvalidInputError(f"Track {child} has two parents, {parents[child]} and {parent}.")
            parents[child] = parent
    return TrackForest(
        Track(i, first, last, parents[i] if parents.get(i) in extents else 0) for i, (first, last) in extents.items()
    )


def track_extents(objects: Iterable[FrameObjects]) -> dict[int, tuple[int, int]]:
    """Return the first and last frame of each label, from the objects of all frames."""
    extents: dict[int, tuple[int, int]] = {}
    for t, frame in enumerate(objects):
        for label in frame.labels.tolist():
            extents[label] = (extents.get(label, (t, t))[0], t)
    return extents


def as_forest(lineages: Lineages | TrackForest, tracks: np.ndarray) -> TrackForest:
    """Return lineages as a forest, with first and last frames from label images (T, Y, X) that may be lazy."""
    if isinstance(lineages, TrackForest):
        return lineages
    objects = (find_objects(read_frame(tracks, t)) for t in range(tracks.shape[0]))
    return forest_from_lineages(lineages, track_extents(objects))


def forest_from_links(
    objects: Sequence[FrameObjects], links: Iterable[Link]
) -> tuple[TrackForest, list[dict[int, int]]]:
    """Cut a directed graph of objects into tracks.

    A track is a longest chain of links without division. It begins at an object without predecessor, or after a
    division; then the divided track is its parent. Objects without links have tracks of their own.

    Args:
        objects: The objects of each frame.
        links: Pairs of (frame, label), from the earlier to the later object; they may skip frames.

    Returns:
        The forest, whose ids are 1, 2, ... in the order of first frame and label, and for each frame the track of
        each label.

    Raises:
        InvalidInputError: If a link goes to no object or not forward in time, or an object has two predecessors.
    """
    successors: dict[Node, list[Node]] = {
        (t, label): [] for t, frame in enumerate(objects) for label in frame.labels.tolist()
    }
    predecessor: dict[Node, Node] = {}
    for source, target in links:
        if source not in successors or target not in successors or source[0] >= target[0]:
            raise InvalidInputError(
                f"The link {source} to {target} (frame, label) must go from an object to one of a later frame."
            )
        if target in predecessor:
            raise InvalidInputError(
                f"The object {target} (frame, label) has two predecessors, {predecessor[target]} and {source}."
            )
        predecessor[target] = source
        successors[source].append(target)

    tracks: list[Track] = []
    lookup: list[dict[int, int]] = [{} for _ in objects]
    for node in successors:  # in the order of frames, so that predecessors have their track already
        before = predecessor.get(node)
        parent = 0 if before is None else lookup[before[0]][before[1]]
        if before is not None and len(successors[before]) == 1:
            continue
        track_id, end = len(tracks) + 1, node
        lookup[node[0]][node[1]] = track_id
        while len(successors[end]) == 1:
            end = successors[end][0]
            lookup[end[0]][end[1]] = track_id
        tracks.append(Track(track_id, node[0], end[0], parent))
    return TrackForest(tracks), lookup
