"""Sparse changes of label images, the index of objects that they keep up to date, and undo.

A label image (Y, X), (Z, Y, X) or (T, Y, X), in memory or on disk, is seen here as planes (P, Y, X); an image has one.
A change is kept as runs: pixels next to each other in a row that had one id and got another. Runs come in pieces, one
for each block that was read, and stay compressed until they are used: neither an edit nor its undo ever holds a volume.
"""

import base64
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError, MicroSamError
from ..core.progress import Step, Steps

Block = tuple[slice, slice, slice]

_SCAN_SIDE = 1024  # blocks are read in multiples of chunks, up to about this side length
_FORMAT = 1


class EditConflictError(MicroSamError, RuntimeError):
    """The labels are not in the state that a change starts from: something else wrote into them."""


class Piece(NamedTuple):
    """Runs of pixels: flat index of the first, number, id before and id after; int64 arrays (N,)."""

    start: np.ndarray
    length: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def yx(self, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Plane, row and column of the first pixels, for labels (P, Y, X) of a shape."""
        z, rest = np.divmod(self.start, shape[1] * shape[2])
        return z, *np.divmod(rest, shape[2])


def row_runs(*blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cut the rows of equally shaped blocks (P, h, w) where any of them changes its value.

    Returns:
        Flat index of the first pixel of each run, its length, and the value (int64) in each of the blocks.
    """
    rows = [block.reshape(-1, block.shape[-1]) for block in blocks]
    cut = np.ones(rows[0].shape, dtype=bool)
    cut[:, 1:] = np.logical_or.reduce([row[:, 1:] != row[:, :-1] for row in rows])
    start = np.flatnonzero(cut)
    return start, np.diff(start, append=cut.size), *(row.reshape(-1)[start].astype(np.int64) for row in rows)


def difference(before: np.ndarray, after: np.ndarray, block: Block, shape: Sequence[int]) -> Piece:
    """Return the runs in which two states of a block of labels (P, Y, X) of a shape differ."""
    runs = row_runs(before, after)
    start, length, old, new = (values[runs[2] != runs[3]] for values in runs)
    z, y, x = (local + s.start for local, s in zip(np.unravel_index(start, before.shape), block))
    return Piece((z * shape[1] + y) * shape[2] + x, length, old, new)


class Runs:
    """Changed pixels of labels (P, Y, X), as compressed pieces.

    Args:
        shape: Shape of the labels.
        pieces: The encoded pieces.
    """

    def __init__(self, shape: Sequence[int], pieces: Iterable[bytes] = ()):
        self.shape, self._pieces = tuple(shape), tuple(pieces)

    @classmethod
    def collect(cls, shape: Sequence[int], pieces: Iterable[Piece]) -> "Runs":
        return cls(shape, [_encode(piece) for piece in pieces if len(piece.start)])

    def __iter__(self) -> Iterator[Piece]:
        return (_decode(data) for data in self._pieces)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def nbytes(self) -> int:
        return sum(len(data) for data in self._pieces)

    @property
    def box(self) -> tuple[tuple[int, int], ...] | None:
        """First and last + 1 of the changed pixels on each of the three axes; None without any."""
        corners = [
            (z.min(), y.min(), x.min(), z.max() + 1, y.max() + 1, (x + piece.length).max())
            for piece in self for z, y, x in [piece.yx(self.shape)]
        ]
        if not corners:
            return None
        low, high = np.min(corners, axis=0)[:3].tolist(), np.max(corners, axis=0)[3:].tolist()
        return tuple(zip(low, high))

    def ids(self) -> set[int]:
        """The ids that lost or got pixels."""
        found = set()
        for piece in self:
            found.update(np.unique(np.concatenate([piece.before, piece.after])).tolist())
        return found - {0}

    def reversed(self) -> "Runs":
        return Runs(self.shape, [_encode(Piece(p.start, p.length, p.after, p.before)) for p in self])

    def to_json(self) -> list[str]:
        return [base64.b64encode(data).decode("ascii") for data in self._pieces]


def _encode(piece: Piece) -> bytes:
    gaps = np.diff(piece.start, prepend=0)
    values = np.stack([gaps, piece.length, piece.before, piece.after]).astype("<i8")
    # The bytes of equal significance together: most of them are zero.
    return zlib.compress(np.ascontiguousarray(values.view(np.uint8).reshape(-1, 8).T).tobytes(), 1)


def _decode(data: bytes) -> Piece:
    shuffled = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(8, -1)
    values = np.ascontiguousarray(shuffled.T).reshape(-1).view("<i8").astype(np.int64).reshape(4, -1)
    return Piece(np.cumsum(values[0]), *values[1:])


@dataclass(frozen=True, eq=False)
class Delta:
    """What one edit changed.

    `created` and `removed` are ids that came into being or vanished, `changed` those that lost or got pixels; `links`
    are changes of the lineage as (track, parent before, parent after), 0 for none.
    """

    name: str
    runs: Runs
    created: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    links: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.runs and not self.links

    @property
    def box(self) -> tuple[tuple[int, int], ...] | None:
        """First and last + 1 of the changed pixels as (plane, y, x); None if there are none."""
        return self.runs.box

    def reversed(self) -> "Delta":
        """The delta that takes this one back."""
        links = tuple((track, after, before) for track, before, after in self.links)
        return Delta(self.name, self.runs.reversed(), self.removed, self.created, self.changed, links)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of strings, integers and lists, for `json.dumps`."""
        return {
            "format": _FORMAT, "name": self.name, "shape": list(self.runs.shape), "runs": self.runs.to_json(),
            "created": list(self.created), "removed": list(self.removed), "changed": list(self.changed),
            "links": [list(link) for link in self.links],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Delta":
        """Read what `to_json` returned.

        Raises:
            InvalidInputError: If it is something else, is damaged, or is of a newer format.
        """
        version = values.get("format") if isinstance(values, Mapping) else None
        if version != _FORMAT:
            raise InvalidInputError(
                f"This is no change of a label image of format {_FORMAT}: its format is {version!r}. If it was written "
                "by a newer version, update micro_sam."
            )
        try:
            runs = Runs(values["shape"], [base64.b64decode(text, validate=True) for text in values["runs"]])
            for piece in runs:
                if piece.start.min() < 0 or (piece.start + piece.length).max() > np.prod(runs.shape):
                    raise ValueError("pixels outside of the labels")
            ids = [tuple(int(i) for i in values[key]) for key in ("created", "removed", "changed")]
            links = tuple((int(t), int(before), int(after)) for t, before, after in values["links"])
            return cls(str(values["name"]), runs, *ids, links)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise InvalidInputError(
                f"The change of a label image is damaged: {type(error).__name__}: {error}. Restore the journal from a "
                "copy, or leave out this change and all later ones."
            ) from error


class History:
    """The changes that can be undone and redone.

    Args:
        limit: Largest number of changes to keep; None keeps all.
    """

    def __init__(self, limit: int | None = None):
        self.done: deque[Delta] = deque(maxlen=limit)
        self.undone: list[Delta] = []

    def push(self, delta: Delta) -> None:
        self.done.append(delta)
        self.undone.clear()


class LabelStore:
    """Block-wise access to labels (Y, X) or (P, Y, X), in memory or on disk, as planes (P, Y, X)."""

    def __init__(self, array: Any):
        dtype, ndim = np.dtype(array.dtype), len(array.shape)
        if dtype.kind not in "bui":
            raise InvalidTypeError(f"A label image must have an integer dtype, but got {dtype}.")
        if ndim not in (2, 3) or 0 in array.shape:
            raise InvalidInputError(
                f"A label image must have the shape (Y, X), (Z, Y, X) or (T, Y, X), but got {tuple(array.shape)}."
            )
        self.array, self.ndim, self.dtype = array, ndim, dtype
        self.shape = (1,) * (3 - ndim) + tuple(int(s) for s in array.shape)
        stored = getattr(array, "shards", None) or getattr(array, "chunks", None)
        if stored is None or not isinstance(stored[0], int):  # dask has a tuple of sizes per axis
            stored = (1, *self.shape[1:])[3 - ndim:]
        self._chunks = (1,) * (3 - ndim) + tuple(stored)

    def read(self, block: Block) -> np.ndarray:
        """Return a block (p, h, w); do not write into it."""
        values = np.asarray(self.array[block[3 - self.ndim:]])
        return values.reshape(tuple(s.stop - s.start for s in block))

    def write(self, block: Block, values: np.ndarray) -> None:
        self.array[block[3 - self.ndim:]] = values if self.ndim == 3 else values[0]

    def blocks(self, first: int = 0, stop: int | None = None) -> Iterator[Block]:
        """Blocks that cover the planes from `first` to before `stop`, aligned with the chunks."""
        depth, *sides = self._chunks
        sides = [side * max(_SCAN_SIDE // side, 1) for side in sides]
        stop = self.shape[0] if stop is None else stop
        for z in range(first - first % depth, stop, depth):
            planes = slice(max(z, first), min(z + depth, stop))
            for y in range(0, self.shape[1], sides[0]):
                for x in range(0, self.shape[2], sides[1]):
                    ends = (min(o + side, n) for o, side, n in zip((y, x), sides, self.shape[1:]))
                    yield planes, *(slice(o, end) for o, end in zip((y, x), ends))

    def around(self, boxes: np.ndarray) -> Iterator[Block]:
        """Blocks around boxes (N, 5) of plane, y0, y1, x0, x1; planes that share chunks come together."""
        slabs = boxes[:, 0] // self._chunks[0]
        for slab in np.unique(slabs):
            inside = boxes[slabs == slab]
            low, high = inside.min(axis=0).tolist(), inside.max(axis=0).tolist()
            yield slice(low[0], high[0] + 1), slice(low[1], high[2]), slice(low[3], high[4])

    def apply(self, runs: Runs, check: bool = True) -> None:
        """Write changed pixels.

        Args:
            runs: The changes.
            check: Whether to compare all pixels with what they should be before, and write nothing if one differs.

        Raises:
            EditConflictError: If a pixel differs.
        """
        for piece in runs if check else ():
            block, where = self._locate(piece)
            found = self.read(block).reshape(-1)[where]
            wrong = np.flatnonzero(found.astype(np.int64) != np.repeat(piece.before, piece.length))
            if len(wrong):
                position = np.unravel_index(where[wrong[0]], tuple(s.stop - s.start for s in block))
                position = tuple(int(p) + s.start for p, s in zip(position, block))[3 - self.ndim:]
                raise EditConflictError(
                    f"{len(wrong)} pixels do not have the id that the change starts from, for example {position}. The "
                    "labels were changed by something else; load them again, and apply changes in their order."
                )
        for piece in runs:
            block, where = self._locate(piece)
            values = np.array(self.read(block), order="C")
            values.reshape(-1)[where] = np.repeat(piece.after, piece.length)
            self.write(block, values)

    def _locate(self, piece: Piece) -> tuple[Block, np.ndarray]:
        """The block around a piece, and the flat indices of its pixels in there."""
        z, y, x = piece.yx(self.shape)
        low = [int(c.min()) for c in (z, y, x)]
        high = [int(z.max()) + 1, int(y.max()) + 1, int((x + piece.length).max())]
        local = ((z - low[0]) * (high[1] - low[1]) + y - low[1]) * (high[2] - low[2]) + x - low[2]
        ends = np.cumsum(piece.length)
        return (
            tuple(slice(a, b) for a, b in zip(low, high)),
            np.repeat(local - ends + piece.length, piece.length) + np.arange(ends[-1]),
        )


class ObjectIndex:
    """Where the objects are: per id rows (N, 6) of plane, number of pixels, y0, y1, x0, x1, ascending in planes.

    Numbers of pixels are exact. Boxes are half-open and hold the object; they do not shrink when it loses pixels.
    """

    def __init__(self):
        self._rows: dict[int, np.ndarray] = {}

    def __contains__(self, object_id: int) -> bool:
        return object_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> list[int]:
        return sorted(self._rows)

    def planes(self, object_id: int) -> np.ndarray:
        return self._rows[object_id][:, 0]

    def pixels(self, object_id: int) -> int:
        return int(self._rows[object_id][:, 1].sum())

    def boxes(self, object_ids: Iterable[int], planes: Iterable[int] | None = None) -> np.ndarray:
        """Boxes (N, 5) of plane, y0, y1, x0, x1 of some objects, in some planes or (None) in all."""
        rows = [self._rows[i] for i in object_ids if i in self._rows]
        boxes = np.concatenate([np.zeros((0, 6), dtype=np.int64), *rows])[:, [0, 2, 3, 4, 5]]
        return boxes if planes is None else boxes[np.isin(boxes[:, 0], list(planes))]

    def update(self, runs: Runs) -> None:
        """Follow a change of the labels."""
        parts = [
            _rows_of(piece, ids, sign, runs.shape)
            for piece in runs for ids, sign in ((piece.before, -1), (piece.after, 1))
        ]
        self._merge(parts)

    def _merge(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        for object_id, rows in _groups(*_combine(parts)):
            known = self._rows.get(object_id)
            if known is not None:
                rows = _combine([(np.zeros(len(r), dtype=np.int64), r) for r in (known, rows)])[1]
            rows = rows[rows[:, 1] > 0]
            if len(rows):
                self._rows[object_id] = rows
            else:
                self._rows.pop(object_id, None)

    def differing(self, other: "ObjectIndex") -> list[int]:
        """The ids that do not have the same number of pixels in every plane in both."""
        return [
            i for i in sorted(self._rows.keys() | other._rows.keys())
            if i not in self or i not in other or not np.array_equal(self._rows[i][:, :2], other._rows[i][:, :2])
        ]


def _rows_of(piece: Piece, ids: np.ndarray, sign: int, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = piece.yx(shape)
    rows = np.stack([z, sign * piece.length, y, y + 1, x, x + piece.length], axis=1)
    return _combine([(ids[ids != 0], rows[ids != 0])])


def _combine(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Join rows of equal id and plane; the result is sorted by both."""
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 6), dtype=np.int64)
    ids, rows = (np.concatenate(values) for values in zip(*parts))
    order = np.lexsort((rows[:, 0], ids))
    ids, rows = ids[order], rows[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = (ids[1:] != ids[:-1]) | (rows[1:, 0] != rows[:-1, 0])
    begin = np.flatnonzero(first)
    if len(begin) == len(ids):
        return ids, rows
    how = (np.minimum, np.add, np.minimum, np.maximum, np.minimum, np.maximum)
    return ids[begin], np.stack([f.reduceat(rows[:, k], begin) for k, f in enumerate(how)], axis=1)


def _groups(ids: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    begin = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    return zip(ids[begin].tolist(), np.split(rows, begin[1:]))


def index_steps(labels: Any) -> Steps[ObjectIndex]:
    """Find the objects of a label image block by block, as a generator of steps.

    Args:
        labels: Label image (Y, X), (Z, Y, X) or (T, Y, X), numpy or on disk; 0 is background.

    Returns:
        The index, to pass to an editor.

    Raises:
        InvalidInputError: For another shape, or ids that are negative or do not fit into 63 bits.
        InvalidTypeError: If the dtype is no integer.
    """
    store = LabelStore(labels)
    blocks, parts = list(store.blocks()), []
    yield Step(0, len(blocks), "Find objects")
    for done, block in enumerate(blocks, 1):
        values = store.read(block)
        piece = difference(np.zeros_like(values), values, block, store.shape)
        if len(piece.after) and piece.after.min() < 0:
            raise InvalidInputError("Ids of objects must be from 1 to 2^63 - 1, but there are others. Relabel first.")
        parts.append(_rows_of(piece, piece.after, 1, store.shape))
        yield Step(done, len(blocks), "Find objects")
    index = ObjectIndex()
    index._merge(parts)
    return index
