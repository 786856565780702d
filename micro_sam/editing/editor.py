"""What all editors of label images share: reading objects, carrying out an edit, undo and redo."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from ..core.errors import InvalidInputError
from ..core.masks import BoxedMask, as_bool_array, crop_mask
from ..core.progress import Step, Steps, drain
from .history import Block, Delta, EditConflictError, History, LabelStore, ObjectIndex, Runs, difference, index_steps

Change = Callable[[np.ndarray, Block], np.ndarray]
Masks = np.ndarray | Mapping[int, np.ndarray | BoxedMask]
Stroke = tuple[tuple[np.ndarray, ...], Any, Any]

PRESERVE_MODES = ("pixels", "none")


class LabelEditor:
    """Edits a label image under stable ids.

    Each edit changes the labels, is remembered for `undo`, and returns a `Delta`: the changed pixels and nothing else.
    A new object gets an id that no object has or ever had here, also after undo. An edit that fails changes nothing.

    Args:
        labels: Label image (Y, X), (Z, Y, X) or (T, Y, X); 0 is background. It is copied as uint32 (uint64 if an id
            needs it), unless `in_place` is set.
        in_place: Whether to write the edits into `labels`, which keeps its dtype. Arrays on disk (zarr, HDF5) need it;
            of them only the surroundings of the edited object are read.
        index: What `index_steps` found in `labels`, which then belongs to the editor; None finds the objects now.
        max_undo: Largest number of edits that can be undone; None for all.

    Raises:
        InvalidInputError: For another shape, negative ids, or an array on disk without `in_place`.
        InvalidTypeError: If the dtype is no integer.
    """

    def __init__(
        self, labels: Any, *, in_place: bool = False, index: ObjectIndex | None = None, max_undo: int | None = None
    ):
        self._store = LabelStore(labels)
        if not in_place and not isinstance(labels, np.ndarray):
            raise InvalidInputError(
                f"A {type(labels).__name__} can only be edited in place: pass in_place=True to write into it, or read "
                "it into a numpy array first."
            )
        if in_place and self._store.dtype == bool:
            raise InvalidInputError("A bool mask has no ids to edit in place. Leave out in_place.")
        self._index = drain(index_steps(labels), verbose=False) if index is None else index
        self._next_id = max(self._index.ids(), default=0) + 1
        if not in_place:
            self._store = LabelStore(labels.astype(np.uint32 if self._next_id < 2**31 else np.uint64))
        self._reserved: set[int] = set()
        self._history = History(max_undo)

    @property
    def labels(self) -> Any:
        """The label image as it is now. Change it only through the editor."""
        return self._store.array

    @property
    def ids(self) -> list[int]:
        """The ids of all objects, ascending."""
        return self._index.ids()

    @property
    def next_id(self) -> int:
        """The id that the next new object gets."""
        return self._next_id

    def object_at(self, position: Sequence[float]) -> int:
        """Return the id at a position in the order of the axes of the labels, rounded to pixels; 0 is background."""
        shape = self._store.shape[3 - self._store.ndim:]
        coordinates = np.asarray(position, dtype=float)
        if coordinates.shape != (len(shape),) or not np.isfinite(coordinates).all():
            raise InvalidInputError(f"A position must have {len(shape)} coordinates, but got {position!r}.")
        index = np.rint(coordinates).astype(int).tolist()
        if not all(0 <= k < size for k, size in zip(index, shape)):
            raise InvalidInputError(f"The position {position!r} is outside of the labels of shape {shape}.")
        block = tuple(slice(k, k + 1) for k in [0] * (3 - len(index)) + index)
        return int(self._store.read(block)[0, 0, 0])

    def planes(self, object_id: int) -> list[int]:
        """Return the planes in which an object has pixels, ascending."""
        return self._index.planes(self._known(object_id)).tolist()

    def area(self, object_id: int) -> int:
        """Return the number of pixels of an object."""
        return self._index.pixels(self._known(object_id))

    def mask(self, object_id: int, plane: int | None = None) -> np.ndarray:
        """Return the bool mask (Y, X) of an object in a plane; it may be empty there."""
        object_id, plane = self._known(object_id), self._plane(plane)
        out = np.zeros(self._store.shape[1:], dtype=bool)
        for block in self._store.around(self._index.boxes([object_id], [plane])):
            out[block[1:]] = self._store.read(block)[0] == object_id
        return out

    def crop(self, object_id: int, plane: int | None = None) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Return the bool mask (P, h, w) of an object, in all planes or in one, and its first (plane, y, x)."""
        object_id = self._known(object_id)
        boxes = self._index.boxes([object_id], None if plane is None else [self._plane(plane)])
        if not len(boxes):
            raise InvalidInputError(f"Object {object_id} is not in plane {plane}: it is in {self.planes(object_id)}.")
        low, high = boxes.min(axis=0), boxes.max(axis=0)
        out = np.zeros((high[0] - low[0] + 1, high[2] - low[1], high[4] - low[3]), dtype=bool)
        for block in self._store.around(boxes):
            local = tuple(slice(s.start - o, s.stop - o) for s, o in zip(block, low[[0, 1, 3]]))
            out[local] = self._store.read(block) == object_id
        tight = ndimage.find_objects(out.view(np.uint8))[0]
        return out[tight], tuple(int(o + s.start) for o, s in zip(low[[0, 1, 3]], tight))

    def reserve_ids(self, n: int = 1) -> list[int]:
        """Return fresh ids for objects that will be added later with `object_id`."""
        ids = self._fresh_ids(n)
        self._reserved.update(ids)
        return ids

    def undo(self) -> Delta | None:
        """Take back the last edit, exactly; return what changed, or None if there is nothing to undo."""
        return self._move(self._history.done, self._history.undone, reverse=True)

    def redo(self) -> Delta | None:
        """Repeat the edit that was undone last; return what changed, or None if there is nothing to redo."""
        return self._move(self._history.undone, self._history.done, reverse=False)

    def apply(self, delta: Delta) -> None:
        """Repeat an edit from a journal; it can be undone like one made here.

        Raises:
            InvalidInputError: If it belongs to labels of another shape.
            EditConflictError: If the labels are not in the state that it starts from; nothing is changed then.
        """
        self._replay(delta)
        self._history.push(delta)

    def compare_steps(self, labels: np.ndarray, plane: int | None = None) -> Steps[Runs]:
        """Find what has to change for the labels to become like others; changes nothing. Yields `Step`.

        Args:
            labels: Labels (Y, X), or planes (N, Y, X) from `plane` on.
            plane: The (first) plane; None for an image, and for all planes.
        """
        labels = labels.reshape((1,) * (3 - labels.ndim) + labels.shape)
        first = self._first_plane(labels.shape, plane)
        blocks, pieces = list(self._store.blocks(first, first + len(labels))), []
        yield Step(0, len(blocks), "Compare labels")
        for done, block in enumerate(blocks, 1):
            new = labels[block[0].start - first:block[0].stop - first, block[1], block[2]]
            pieces.append(difference(self._store.read(block), new.astype(self._store.dtype), block, self._store.shape))
            yield Step(done, len(blocks), "Compare labels")
        return Runs.collect(self._store.shape, pieces)

    def take_over(self, name: str, runs: Runs, links: Mapping[int, int] | None = None) -> Delta:
        """Carry out what `compare_steps` found; `links` has the parents of tracks, 0 for none."""
        delta = self._record(name, runs, links=links)
        self._next_id = max(self._next_id, max(runs.ids(), default=0) + 1)
        return delta

    def adopt_strokes(self, strokes: Iterable[Stroke]) -> Delta:
        """Make an edit of pixels that a viewer has already painted into the labels.

        If that fails, the pixels have their old values again.

        Args:
            strokes: What was painted, in its order: index arrays, one for each axis; the values before; the new value.
        """
        labels, strokes = self._store.array, list(strokes)
        indices = [np.concatenate([np.atleast_1d(s[0][axis]) for s in strokes]) for axis in range(labels.ndim)]
        low, high = [int(i.min()) for i in indices], [int(i.max()) + 1 for i in indices]
        painted = labels[tuple(slice(a, b) for a, b in zip(low, high))].copy()
        for where, before, _ in reversed(strokes):
            labels[where] = before
        flat = [0] * (3 - labels.ndim)
        first = flat + low
        painted = painted.reshape((1,) * len(flat) + painted.shape)
        sides = first[1], first[1] + painted.shape[1], first[2], first[2] + painted.shape[2]
        boxes = np.array([(z, *sides) for z in range(first[0], first[0] + len(painted))])
        delta = self._edit(
            "paint", boxes,
            lambda _, block: painted[tuple(slice(s.start - o, s.stop - o) for s, o in zip(block, first))],
        )
        self._next_id = max(self._next_id, int(painted.max()) + 1)
        return delta

    def check(self) -> None:
        """Read all labels, block by block, and compare them with what the editor knows.

        Raises:
            EditConflictError: If something else wrote into the labels.
        """
        self._fresh_index()

    def _paint_edit(self, name, masks: Mapping[int, Mapping[int, BoxedMask]], preserve, links=None) -> Delta:
        check_preserve(preserve, PRESERVE_MODES)
        boxes, change = self._painting(masks, preserve)
        return self._edit(name, boxes, change, _painted(masks), links)

    def _painting(self, masks: Mapping[int, Mapping[int, BoxedMask]], preserve: str) -> tuple[np.ndarray, Change]:
        """Boxes and a change that gives objects the pixels of masks by id and plane."""
        boxes = [self._index.boxes([i], by_plane) for i, by_plane in masks.items()]
        boxes.append(np.array([
            (z, m.y0, m.y0 + m.mask.shape[0], m.x0, m.x0 + m.mask.shape[1])
            for by_plane in masks.values() for z, m in by_plane.items() if m.area
        ], dtype=np.int64).reshape(-1, 5))

        def change(values, block):
            out = values.copy()
            for object_id, by_plane in masks.items():
                for z in by_plane.keys() & range(block[0].start, block[0].stop):
                    plane, m = out[z - block[0].start], by_plane[z]
                    plane[plane == object_id] = 0
                    if m.area:
                        y, x = m.y0 - block[1].start, m.x0 - block[2].start
                        window = plane[y:y + m.mask.shape[0], x:x + m.mask.shape[1]]
                        window[m.mask & (window == 0) if preserve == "pixels" else m.mask] = object_id
            return out

        return np.concatenate(boxes), change

    def _compute(self, blocks: Iterable[Block], change: Change) -> Runs:
        def pieces():
            for block in blocks:
                values = self._store.read(block)
                yield difference(values, change(values, block), block, self._store.shape)

        return Runs.collect(self._store.shape, pieces())

    def _edit(self, name, boxes, change, painted=None, links=None) -> Delta:
        return self._record(name, self._compute(self._store.around(boxes), change), painted, links)

    def _record(
        self,
        name: str,
        runs: Runs,
        painted: Mapping[int, Iterable[int]] | None = None,
        links: Mapping[int, int] | None = None,
    ) -> Delta:
        """Check and carry out an edit: the one way in which labels, index, lineage and history change.

        `painted` has the planes in which objects must have pixels afterwards, `links` new parents by track.
        """
        touched = sorted(runs.ids())
        existed = {i for i in touched if i in self._index}
        self._index.update(runs)
        try:
            for i, planes in (painted or {}).items():
                if i not in self._index or not set(planes) <= set(self.planes(i)):
                    raise InvalidInputError(
                        f"All pixels of the mask of object {i} belong to other objects. Pass preserve='none' to "
                        "overwrite them."
                    )
            changes = self._link_changes(touched, links or {})
            self._store.apply(runs, check=False)
        except BaseException:
            self._index.update(runs.reversed())
            raise
        exist = {i for i in touched if i in self._index}
        delta = Delta(
            name, runs, tuple(sorted(exist - existed)), tuple(sorted(existed - exist)),
            tuple(sorted(exist & existed)), changes,
        )
        self._follow_links(changes)
        if not delta.is_empty:
            self._history.push(delta)
        return delta

    def _replay(self, delta: Delta) -> None:
        if delta.runs.shape != self._store.shape:
            raise InvalidInputError(
                f"The change belongs to labels of shape {delta.runs.shape}, but these have {self._store.shape}."
            )
        largest = max(delta.runs.ids(), default=0)
        self._check_capacity(largest)
        self._check_links(delta.links)
        self._store.apply(delta.runs)
        self._index.update(delta.runs)
        self._follow_links(delta.links)
        self._next_id = max(self._next_id, largest + 1)

    def _move(self, source, target, reverse: bool) -> Delta | None:
        if not source:
            return None
        delta = source[-1].reversed() if reverse else source[-1]
        self._replay(delta)
        target.append(source.pop())
        return delta

    def _link_changes(self, touched: Iterable[int], links: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
        """Changes of the lineage that belong to an edit: labels alone have none."""
        return ()

    def _check_links(self, changes: Sequence[tuple[int, int, int]]) -> None:
        if changes:
            raise InvalidInputError("The change is one of tracks: apply it with a TrackEditor.")

    def _follow_links(self, changes: Sequence[tuple[int, int, int]]) -> None:
        """Carry out changes of the lineage."""

    def _fresh_index(self) -> ObjectIndex:
        found = drain(index_steps(self._store.array), verbose=False)
        wrong = found.differing(self._index)
        if wrong:
            raise EditConflictError(
                f"The labels of {len(wrong)} objects were changed by something else, for example {wrong[:5]}. Make a "
                "new editor for them."
            )
        return found

    def _check_capacity(self, object_id: int) -> None:
        if object_id > np.iinfo(self._store.dtype).max:
            raise InvalidInputError(
                f"The new id {object_id} does not fit into labels of dtype {self._store.dtype}: convert them to uint32."
            )

    def _fresh_ids(self, n: int) -> list[int]:
        self._check_capacity(self._next_id + n - 1)
        ids = list(range(self._next_id, self._next_id + n))
        self._next_id += n
        return ids

    def _free_id(self, object_id: int | None) -> int:
        if object_id is None:
            return self._fresh_ids(1)[0]
        if object_id not in self._reserved or object_id in self._index:
            raise InvalidInputError(
                f"Id {object_id} cannot be given to a new object: it is in use or was not reserved with reserve_ids. "
                "Leave it out for a fresh one."
            )
        return int(object_id)

    def _known(self, object_id: int) -> int:
        if object_id not in self._index:
            ids = self._index.ids()
            some = f"ids are from {ids[0]} to {ids[-1]}" if ids else "there are no objects at all"
            raise InvalidInputError(f"There is no object {object_id!r}: {some}. Use object_at to find one.")
        return int(object_id)

    def _known_distinct(self, object_ids: Sequence[int]) -> list[int]:
        ids = [self._known(i) for i in object_ids]
        if len(ids) < 2 or len(set(ids)) < len(ids):
            raise InvalidInputError(f"At least two different objects are needed, but got {list(object_ids)}.")
        return ids

    def _plane(self, plane: int | None) -> int:
        n_planes = self._store.shape[0]
        if self._store.ndim == 2:
            if plane not in (None, 0):
                raise InvalidInputError(f"The labels are an image without planes, but plane={plane} was given.")
            return 0
        if not hasattr(plane, "__index__") or not 0 <= plane < n_planes:
            raise InvalidInputError(f"plane must be an integer from 0 to {n_planes - 1}, but is {plane!r}.")
        return int(plane)

    def _plane_list(self, planes: int | Iterable[int] | None) -> list[int] | None:
        if planes is None:
            return None
        return [self._plane(p) for p in (planes if isinstance(planes, Iterable) else [planes])]

    def _first_plane(self, shape: Sequence[int], plane: int | None) -> int:
        n_planes, *size = self._store.shape
        if tuple(shape[1:]) != tuple(size):
            raise InvalidInputError(f"Planes have the shape {tuple(size)}, but the mask has {tuple(shape[1:])}.")
        first = 0 if plane is None and shape[0] == n_planes else self._plane(plane)
        if first + shape[0] > n_planes:
            raise InvalidInputError(
                f"{shape[0]} planes from {first} on do not fit into the {n_planes} planes of the labels."
            )
        return first

    def _masks(self, mask: Masks, plane: int | None) -> dict[int, BoxedMask]:
        """Masks by plane, from the forms that users may give."""
        if isinstance(mask, Mapping):
            if plane is not None:
                raise InvalidInputError("plane must be left out when masks are given by plane.")
            masks = {self._plane(z): m for z, m in mask.items()}
        elif len(np.shape(mask)) == 3:
            first = self._first_plane(np.shape(mask), plane)
            masks = {first + k: mask[k] for k in range(len(mask))}
        else:
            masks = {self._plane(plane): mask}
        boxed, size = {}, self._store.shape[1:]
        for z, m in masks.items():
            if not isinstance(m, BoxedMask):
                m = as_bool_array(m)
                if m.shape != size:
                    raise InvalidInputError(f"Planes have the shape {size}, but the mask has {m.shape}.")
                m = crop_mask(m)
            if m.area and (min(m.box[:2]) < 0 or m.box[2] > size[0] or m.box[3] > size[1]):
                raise InvalidInputError(f"The mask with the box {m.box} does not fit into planes of shape {size}.")
            boxed[z] = m
        if not any(m.area for m in boxed.values()):
            raise InvalidInputError("The mask is empty. Use remove to take an object out of a plane.")
        return boxed


def _painted(masks: Mapping[int, Mapping[int, BoxedMask]]) -> dict[int, list[int]]:
    return {i: [z for z, m in by_plane.items() if m.area] for i, by_plane in masks.items()}


def check_preserve(preserve: str, modes: Sequence[str]) -> None:
    if preserve not in modes:
        raise InvalidInputError(f"preserve must be one of {', '.join(map(repr, modes))}, but is {preserve!r}.")
