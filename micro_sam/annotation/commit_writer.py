"""Writing a commit record in steps that can be torn anywhere, and opening one; see `commit_record`."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import MicroSamError
from ..core.output import temporary_path
from .commit_prompts import read_prompts, write_prompts

if TYPE_CHECKING:
    import zarr

    from .prompt_data import Prompts

LABELS, PROMPTS = "committed_objects", "prompts"
HISTORY, LINEAGES, PENDING = "commit_history", "committed_lineages", "pending_commit"
SIGNATURE = "data_signature"
ATTRIBUTES = (SIGNATURE, "tile_shape", "halo", "model_type", "model_name", "micro_sam_version", "model_hash")
_CHUNKS = {2: (1024, 1024), 3: (32, 256, 256)}

Region = tuple[slice, ...]


class CommitRecordMismatch(MicroSamError, RuntimeError):
    """A folder holds something else than the record that is to be written; nothing in it was changed.

    Attributes:
        reason: `foreign` (no record at all), `data` (of another image), `shape`, `history` (commits that the caller
            does not know), `ids` (its objects have the ids of new ones), or `damaged`.
    """

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class CommitEntry:
    """A commit: the layer that its objects came from, their ids, and the settings."""

    layer: str
    object_ids: tuple[int, ...]
    settings: dict[str, Any]


class RecordWriter:
    """A record that is open for writing, with the labels that it is to hold. The right to write it must be held."""

    def __init__(self, path: Path, group: "zarr.Group | None", labels: Any, attrs: Mapping[str, Any]):
        self.path, self.group, self._labels = path, group, labels
        self.attrs: dict[str, Any] = {HISTORY: [], **attrs}

    @classmethod
    def open(cls, path: Path, labels: Any, attrs: Mapping[str, Any]) -> "RecordWriter":
        """Open the record in a folder; or one with these attributes that is created by the first change.

        Raises:
            CommitRecordMismatch: If something else is there.
        """
        group = open_record(path, "r+")
        record = cls(path, group, labels, attrs if group is None else dict(group.attrs))
        found = None if group is None else group.get(LABELS)
        if found is not None and tuple(found.shape) != tuple(labels.shape):
            raise CommitRecordMismatch(
                f"The commit record in {path} has labels of shape {tuple(found.shape)}, but here they have "
                f"{tuple(labels.shape)}. Choose another commit path.", reason="shape",
            )
        return record

    def check_data(self, signature: str, same_data: Collection[str]) -> None:
        found = self.attrs.get(SIGNATURE)
        if found not in {signature, *same_data}:
            raise CommitRecordMismatch(
                f"The commit record in {self.path} is of another image (data_signature {found!r}, here {signature!r}). "
                "It was left as it is, and nothing was recorded. Choose another commit path for this image, or move "
                "the record away.", reason="data",
            )

    def check_commits(self, known_commits: int | None, known_ids: Collection[int]) -> None:
        found = len(self.attrs[HISTORY])
        choices = (
            "Load its objects first (read_commit_record), so that new ones get other ids; or choose another commit "
            "path; or move the record away. It was left as it is."
        )
        if known_commits not in (None, found):
            raise CommitRecordMismatch(
                f"The commit record in {self.path} has {found} commits, but {known_commits} are known here: it is of "
                f"another session. {choices}", reason="history",
            )
        if known_ids:
            raise CommitRecordMismatch(
                f"The commit record in {self.path} has objects with the ids {name_some(sorted(known_ids))} already. "
                f"{choices}", reason="ids",
            )

    def known_ids(self) -> set[int]:
        """The ids of all objects in the history."""
        return {i for values in self.attrs[HISTORY] for i in parse_entry(values, self.path).object_ids}

    def has_commit(
        self, entry: dict, prompts: "Mapping[int, Prompts]", lineages: Sequence[Any], region: Region | None
    ) -> bool:
        """Whether the record has the same commit already: entry, prompts, lineages and pixels."""
        array, ids = self.group.get(LABELS), next(iter(entry.values()))["object_ids"]
        if entry not in self.attrs[HISTORY] or array is None or PENDING in self.attrs:
            return False
        if any(tree not in (self.attrs.get(LINEAGES) or []) for tree in lineages):
            return False
        for i in ids:
            name, own = f"{PROMPTS}/{i}", prompts.get(i)
            stored = read_prompts(self.group[name]) if name in self.group else None
            if stored != (None if own is None or own.is_empty else own):
                return False
        for chunk in _chunks(region, array.shape, array.chunks):
            there, here = (np.where(np.isin(a, ids), a, 0) for a in (array[chunk], self._read(chunk)))
            if not np.array_equal(there, here):
                return False
        return True

    def change(
        self,
        ids: Collection[int],
        region: Region | None,
        updates: Mapping[str, Any],
        prompts: "Mapping[int, Prompts] | None" = None,
        before: Mapping[str, Any] | None = None,
    ) -> int:
        """Write labels, prompts and attributes, and repair what was torn.

        Args:
            ids: The objects that change; the prompts that they had are removed.
            region: Where pixels changed.
            updates: Attributes that are written last.
            prompts: The prompts by object.
            before: Attributes that are written first.

        Returns:
            The number of chunks of labels that were written.
        """
        if self.group is None or LABELS not in self.group:
            region = tuple(slice(0, s) for s in self._labels.shape)
        pending = self._pending(ids, region)
        self._put({**(before or {}), PENDING: pending})
        for i in {*ids, *pending["object_ids"]} - (self.known_ids() - set(ids)):
            if f"{PROMPTS}/{i}" in self.group:
                del self.group[f"{PROMPTS}/{i}"]
        for object_id, own in (prompts or {}).items():
            if not own.is_empty:
                write_prompts(self.group.create_group(f"{PROMPTS}/{object_id}"), own)
        box = pending["box"]
        n_written = self._write_labels(None if box is None else tuple(slice(a, b) for a, b in box))
        self._put({**updates, PENDING: None})
        return n_written

    def _pending(self, ids: Collection[int], region: Region | None) -> dict[str, Any]:
        """What to note before a change: ids and region, together with those of a commit that was torn."""
        torn = self.attrs.get(PENDING) or {"object_ids": [], "box": None}
        boxes = [b for b in (torn["box"], None if region is None else [[s.start, s.stop] for s in region]) if b]
        hull = [[min(a for a, _ in axis), max(b for _, b in axis)] for axis in zip(*boxes)]
        return {"object_ids": sorted({*torn["object_ids"], *ids}), "box": hull or None}

    def _put(self, updates: Mapping[str, Any]) -> None:
        """Replace all attributes at once, and create the record if need be; None takes out one that may be absent."""
        self.attrs = {k: v for k, v in {**self.attrs, **updates}.items() if v is not None or k in ATTRIBUTES}
        if self.group is None:
            import zarr

            self.group = zarr.open_group(str(self.path), mode="a", zarr_format=2)
        self.group.attrs.put(self.attrs)

    def _write_labels(self, region: Region | None) -> int:
        array, n_written = self._label_array(), 0
        # One after the other: zarr writes many chunks at once in threads, which go on after one has failed.
        for chunk in _chunks(region, array.shape, array.chunks):
            values = self._read(chunk).astype(array.dtype)
            if not _holds(array, chunk, values):
                array[chunk] = values
                n_written += 1
        return n_written

    def _read(self, chunk: Region) -> np.ndarray:
        return np.asarray(self._labels[chunk])

    def _label_array(self) -> "zarr.Array":
        """The array of the labels, in a dtype that holds their ids."""
        wanted = np.dtype(np.uint64 if np.dtype(self._labels.dtype).itemsize > 4 else np.uint32)
        array = self.group.get(LABELS)
        if array is None:
            return _create_labels(self.path / LABELS, self._labels.shape, wanted)
        if np.can_cast(wanted, array.dtype):
            return array
        with temporary_path(self.path / LABELS, is_folder=True) as new:
            wide = _create_labels(new, array.shape, wanted)
            for chunk in _chunks(tuple(slice(0, s) for s in array.shape), array.shape, array.chunks):
                wide[chunk] = array[chunk].astype(wanted)
        return self.group[LABELS]


def _create_labels(path: Path, shape: Sequence[int], dtype: np.dtype) -> "zarr.Array":
    import zarr
    from numcodecs import GZip

    chunks = tuple(min(c, s) for c, s in zip(_CHUNKS[len(shape)], shape))
    return zarr.create_array(
        str(path), shape=tuple(shape), chunks=chunks, dtype=dtype, compressors=GZip(level=5), fill_value=0,
        zarr_format=2,
    )


def _chunks(region: Region | None, shape: Sequence[int], chunks: Sequence[int]) -> Iterator[Region]:
    """The whole chunks that a region touches."""
    if region is None:
        return
    starts = [range(s.start - s.start % c, s.stop, c) for s, c in zip(region, chunks)]
    for start in itertools.product(*starts):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, chunks, shape))


def _holds(array: "zarr.Array", chunk: Region, values: np.ndarray) -> bool:
    try:
        return np.array_equal(array[chunk], values)
    except Exception:  # a damaged chunk raises errors of many kinds, and is to be written anew
        return False


def open_record(path: Path, mode: str) -> "zarr.Group | None":
    """Open a record; None if there is none and one may be created there.

    Raises:
        CommitRecordMismatch: If something else is there.
    """
    import zarr

    if path.exists() and (not path.is_dir() or any((path / name).exists() for name in ("zarr.json", ".zarray"))):
        raise foreign(path)
    if not (path / ".zgroup").exists():
        return None
    try:
        group = zarr.open_group(str(path), mode=mode, zarr_format=2)
        attrs = dict(group.attrs)
        for values in attrs.get(HISTORY, []):
            parse_entry(values, path)
        is_empty = not attrs and not any(group.keys())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, error) from error
    if is_empty:
        return None
    if not {HISTORY, PENDING} & attrs.keys():
        raise foreign(path)
    return group


def parse_entry(values: Mapping[str, Any], path: Path) -> CommitEntry:
    """Read an entry of the history."""
    try:
        (layer, content), = values.items()
        ids = tuple(int(i) for i in content["object_ids"])
        return CommitEntry(layer, ids, {k: v for k, v in content.items() if k != "object_ids"})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, error) from error


def foreign(path: Path) -> CommitRecordMismatch:
    return CommitRecordMismatch(
        f"{path} holds something else than a commit record. It was left as it is. Choose a new or an empty folder as "
        "commit path.", reason="foreign",
    )


def damaged(path: Path, error: Exception) -> CommitRecordMismatch:
    return CommitRecordMismatch(
        f"The commit record in {path} cannot be read ({type(error).__name__}: {error}). Restore it from a copy, or "
        "choose another commit path.", reason="damaged",
    )


def name_some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:10])) + (" and more" if len(ids) > 10 else "")
