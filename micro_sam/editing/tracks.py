"""Correct tracks: a label movie (T, Y, X) in which the id is the track, and a lineage that always stays a forest.

A *frame* is the index on the first axis. Lineage and labels change together: a track exists as long as it has pixels,
its first and last frame are those of its pixels, and a parent ends before its daughters begin.
"""

import graphlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from ..core.masks import BoxedMask
from ..tracking.lineage import Track
from .editor import Change, Masks
from .history import Delta, EditConflictError, ObjectIndex, Runs
from .objects import Commit, ObjectEditor


class LineageError(InvalidInputError):
    """The lineage is not a forest of tracks, or an edit would make it so."""


def lineage_problems(extents: Mapping[int, tuple[int, int]], parents: Mapping[int, int]) -> list[str]:
    """Say what is wrong with a lineage.

    Args:
        extents: First and last frame by track.
        parents: Parent by track, for tracks that have one.

    Returns:
        One sentence for each problem: unknown tracks, parents that do not end before a daughter begins, cycles.
    """
    problems = []
    for track, parent in parents.items():
        unknown = [t for t in (track, parent) if t not in extents]
        if unknown:
            problems.append(f"The link from parent {parent} to track {track} names tracks without pixels: {unknown}.")
        elif extents[parent][1] >= extents[track][0]:
            problems.append(
                f"Parent {parent} must end before track {track} begins, but is in frames {extents[parent][0]} to "
                f"{extents[parent][1]}, and track {track} begins in frame {extents[track][0]}."
            )
    try:
        graphlib.TopologicalSorter({track: [parent] for track, parent in parents.items()}).prepare()
    except graphlib.CycleError as error:
        problems.append(f"The tracks {error.args[1]} are ancestors of themselves.")
    return problems


class TrackEditor(ObjectEditor):
    """Edits a label movie and its lineage; all edits of `ObjectEditor` keep the lineage up to date as well.

    A new object is a new track without parent; one that loses its last pixel is taken out of the lineage, and its
    daughters become roots. An edit that would break the lineage raises `LineageError` and changes nothing.

    Args:
        labels: Label movie (T, Y, X), see `LabelEditor`.
        parents: Parent by track; tracks that are left out, or have the parent 0, are roots.
        in_place: See `LabelEditor`.
        index: See `LabelEditor`.
        max_undo: See `LabelEditor`.

    Raises:
        LineageError: If the lineage does not fit the labels.
        InvalidInputError: See `LabelEditor`.
    """

    def __init__(
        self,
        labels: Any,
        parents: Mapping[int, int] | None = None,
        *,
        in_place: bool = False,
        index: ObjectIndex | None = None,
        max_undo: int | None = None,
    ):
        if len(labels.shape) != 3:
            raise InvalidInputError(f"A label movie must have the shape (T, Y, X), but got {tuple(labels.shape)}.")
        super().__init__(labels, in_place=in_place, index=index, max_undo=max_undo)
        self._parents = {int(t): int(p) for t, p in (parents or {}).items() if p}
        self._raise_problems(lineage_problems(self._extents(self.ids), self._parents))

    @property
    def tracks(self) -> dict[int, Track]:
        """All tracks by id, ascending."""
        return {
            t: Track(t, first, last, self._parents.get(t, 0)) for t, (first, last) in self._extents(self.ids).items()
        }

    @property
    def parents(self) -> dict[int, int]:
        """Parent by track, for tracks that have one."""
        return dict(self._parents)

    @property
    def divisions(self) -> dict[int, list[int]]:
        """The daughters of each track that has two or more."""
        daughters: dict[int, list[int]] = {}
        for track, parent in sorted(self._parents.items()):
            daughters.setdefault(parent, []).append(track)
        return {parent: tracks for parent, tracks in daughters.items() if len(tracks) > 1}

    def children(self, track_id: int) -> list[int]:
        """Return the daughters of a track, ascending."""
        self._known(track_id)
        return sorted(t for t, parent in self._parents.items() if parent == track_id)

    def frames(self, track_id: int) -> list[int]:
        """Return the frames in which a track has pixels, ascending."""
        return self.planes(track_id)

    def check(self) -> None:
        """Read the whole movie, frame by frame, and compare it with the lineage.

        Raises:
            EditConflictError: If something else wrote into the labels.
            LineageError: If the lineage does not fit.
        """
        found = self._fresh_index()
        extents = {i: (int(found.planes(i)[0]), int(found.planes(i)[-1])) for i in found.ids()}
        self._raise_problems(lineage_problems(extents, self._parents))

    def add(
        self,
        mask: Masks,
        plane: int | None = None,
        *,
        preserve: str = "pixels",
        object_id: int | None = None,
        parent: int = 0,
    ) -> Delta:
        """Add a track, as a root or as daughter of a parent; see `ObjectEditor.add`."""
        masks = self._masks(mask, plane)
        if parent:
            self._known(parent)
        track = self._free_id(object_id)
        return self._paint_edit("add", {track: masks}, preserve, {track: parent})

    def merge(self, object_ids: Sequence[int], *, overlap: bool = False) -> Delta:
        """Join two or more tracks to one; it has the first id, the parent of all and their daughters.

        Args:
            object_ids: The tracks.
            overlap: Whether tracks may share frames; there their pixels become one object.

        Raises:
            LineageError: If they have different parents, or a daughter begins before the joined track ends.
        """
        first, *others = self._known_distinct(object_ids)
        together = {first, *others}
        frames = np.concatenate([self._index.planes(t) for t in together])
        if not overlap and len(np.unique(frames)) < len(frames):
            raise LineageError(
                f"The tracks {sorted(together)} share frames. Pass overlap=True to make one object of them there."
            )
        parents = {self._parents.get(t, 0) for t in together} - together - {0}
        if len(parents) > 1:
            raise LineageError(f"The tracks {sorted(together)} have different parents: {sorted(parents)}. Unlink some.")
        links = {t: first for t, parent in self._parents.items() if parent in together and t not in together}
        links[first] = max(parents, default=0)
        return self._relabel("merge", [(t, 0, first) for t in others], links)

    def split(self, track_id: int, frame: int, *, linked: bool = False) -> Delta:
        """Cut a track in two: from a frame on it is a new track, `delta.created[0]`, which takes over the daughters.

        Args:
            track_id: The track.
            frame: First frame of the new track.
            linked: Whether the new track becomes a daughter of the old one; otherwise it is a root.

        Raises:
            InvalidInputError: If the track does not have frames on both sides.
        """
        self._check_inside(track_id, frame)
        new = self._fresh_ids(1)[0]
        links = dict.fromkeys(self.children(track_id), new) | {new: int(track_id) if linked else 0}
        return self._relabel("split", [(int(track_id), frame, new)], links)

    def swap(self, first: int, second: int, frame: int) -> Delta:
        """Exchange two tracks from a frame on, with their daughters.

        Raises:
            InvalidInputError: If a track would be left without pixels; `merge` joins tracks.
            LineageError: If the lineage does not allow it.
        """
        first, second = self._known_distinct([first, second])
        late = {t: [f for f in self.frames(t) if f >= frame] for t in (first, second)}
        if not any(late.values()):
            raise InvalidInputError(f"Neither track {first} nor track {second} has a frame from {frame} on.")
        for track, other in ((first, second), (second, first)):
            if len(late[track]) == len(self.frames(track)) and not late[other]:
                raise InvalidInputError(f"Track {track} would be left without frames. Use merge([{other}, {track}]).")
        exchange = {first: second, second: first}
        links = {t: exchange[parent] for t, parent in self._parents.items() if parent in exchange}
        return self._relabel("swap", [(first, frame, second), (second, frame, first)], links)

    def link(self, parent: int, track_id: int) -> Delta:
        """Make a track the daughter of a parent that ends before it begins.

        Raises:
            LineageError: If the track has a parent already, or the parent does not end in time.
        """
        self._check_root(self._known(track_id))
        return self._record("link", Runs(self._store.shape), links={int(track_id): self._known(parent)})

    def unlink(self, track_id: int) -> Delta:
        """Make a track a root.

        Raises:
            LineageError: If it is one.
        """
        if self._known(track_id) not in self._parents:
            raise LineageError(f"Track {track_id} has no parent.")
        return self._record("unlink", Runs(self._store.shape), links={int(track_id): 0})

    def divide(
        self,
        track_id: int,
        frame: int,
        daughters: Iterable[int] = (),
        masks: Iterable[np.ndarray | BoxedMask] = (),
        *,
        preserve: str = "pixels",
    ) -> Delta:
        """Let a track divide: its daughters begin in a frame, all in one edit.

        Daughters are what the track itself has from this frame on (if anything; it gets a new id and takes over the
        daughters that the track had), other tracks, and new masks; two or more together.

        Args:
            track_id: The mother.
            frame: The first frame of the daughters; the mother ends before it.
            daughters: Tracks that begin in this frame or later and have no parent.
            masks: Masks (Y, X) of new daughters in this frame.
            preserve: Which pixels the masks may take, see `replace`.

        Raises:
            InvalidInputError: If there are fewer than two daughters, or nothing of the mother before the frame.
            LineageError: If it has divided already, or a daughter has a parent or begins too early.
        """
        track_id, frames = self._known(track_id), self.frames(track_id)
        daughters = [self._known(t) for t in daughters]
        masks = [self._masks(mask, self._plane(frame)) for mask in masks]
        later, known = frames[-1] >= frame, self.children(track_id)
        if frames[0] >= frame:
            raise InvalidInputError(f"Track {track_id} begins in frame {frames[0]}: it cannot divide in {frame}.")
        if known and not later:
            raise LineageError(f"Track {track_id} has divided already, into {known}. Unlink these or link a third.")
        for track in daughters:
            self._check_root(track)
            if self.frames(track)[0] < frame:
                raise LineageError(f"Track {track} begins before frame {frame}. Split it there first.")
        if len(set(daughters)) + len(masks) + later < 2:
            raise InvalidInputError("A division needs two daughters: name tracks, or pass masks.")
        new = self._fresh_ids(later + len(masks))
        painted = dict(zip(new[later:], masks))
        moves = [(track_id, frame, new[0])] if later else []
        links = (dict.fromkeys(known, new[0]) if later else {}) | dict.fromkeys([*daughters, *new], track_id)
        boxes, paint = self._painting(painted, preserve)
        return self._relabel("divide", moves, links, boxes, paint, {t: list(m) for t, m in painted.items()})

    def commit(
        self,
        candidate: Any,
        plane: int | None = None,
        *,
        preserve: str = "objects",
        threshold: float = 0.75,
        parents: Mapping[int, int] | None = None,
    ) -> Commit:
        """Take over the tracks of another label movie and their lineage; see `ObjectEditor.commit`.

        Args:
            candidate: See `ObjectEditor.commit`.
            plane: See `ObjectEditor.commit`.
            preserve: See `ObjectEditor.commit`.
            threshold: See `ObjectEditor.commit`.
            parents: Parent by track, in ids of the candidate. Links of tracks that have no pixels, or are rejected,
                are left out.
        """
        return self._commit(candidate, plane, preserve, threshold, parents)

    def _relabel(
        self,
        name: str,
        moves: Sequence[tuple[int, int, int]],
        links: Mapping[int, int],
        boxes: np.ndarray | None = None,
        then: Change | None = None,
        painted: Mapping[int, Collection[int]] | None = None,
    ) -> Delta:
        """Give tracks other ids, as (track, first frame, new id), change links, and carry out another change."""
        n_frames = self._store.shape[0]
        moved = [self._index.boxes([old], range(first, n_frames)) for old, first, _ in moves]
        moved += [] if boxes is None else [boxes]

        def change(values, block):
            out = values.copy()
            for old, first, new in moves:
                late = slice(max(first - block[0].start, 0), None)
                out[late][values[late] == old] = new
            return out if then is None else then(out, block)

        return self._edit(name, np.concatenate(moved), change, painted, links)

    def _extents(self, track_ids: Iterable[int]) -> dict[int, tuple[int, int]]:
        planes = {t: self._index.planes(t) for t in track_ids if t in self._index}
        return {t: (int(p[0]), int(p[-1])) for t, p in planes.items()}

    def _link_changes(self, touched: Iterable[int], links: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
        concerned = {*touched, *links, *links.values()}
        affected = {t: p for t, p in self._parents.items() if t in concerned or p in concerned}
        # The end of a track ends its links, unless the edit hands them to another one.
        wanted = {t: p for t, p in ({**affected, **links}).items() if t in self._index and p in self._index}
        tracks = {*wanted, *wanted.values()}
        self._raise_problems(lineage_problems(self._extents(tracks), wanted))
        return tuple(
            (t, affected.get(t, 0), wanted.get(t, 0))
            for t in sorted({*affected, *links}) if affected.get(t, 0) != wanted.get(t, 0)
        )

    def _check_links(self, changes: Sequence[tuple[int, int, int]]) -> None:
        for track, before, _ in changes:
            if self._parents.get(track, 0) != before:
                raise EditConflictError(
                    f"Track {track} has the parent {self._parents.get(track, 0)}, but the change starts from {before}. "
                    "Apply changes in their order."
                )

    def _follow_links(self, changes: Sequence[tuple[int, int, int]]) -> None:
        for track, _, parent in changes:
            if parent:
                self._parents[track] = parent
            else:
                self._parents.pop(track, None)

    def _raise_problems(self, problems: Sequence[str]) -> None:
        if problems:
            more = f" There are {len(problems) - 5} more problems." if len(problems) > 5 else ""
            raise LineageError(" ".join(problems[:5]) + more)

    def _check_root(self, track_id: int) -> None:
        if track_id in self._parents:
            raise LineageError(f"Track {track_id} has the parent {self._parents[track_id]} already. Unlink it first.")

    def _check_inside(self, track_id: int, frame: int) -> None:
        frames = self.frames(track_id)
        if not frames[0] < frame <= frames[-1]:
            raise InvalidInputError(
                f"Track {track_id} is in frames {frames[0]} to {frames[-1]}: it cannot be split at frame {frame}."
            )
