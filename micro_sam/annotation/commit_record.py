"""The commit record: a zarr folder (format 2) with the committed objects of an image, and what each was made from.

Attributes of the root: `data_signature`, `tile_shape`, `halo`, `model_type`, `model_name`, `micro_sam_version` and
`model_hash` of the first commit; `commit_history`, a list of `{layer: {"object_ids": [...], settings...}}`, where a
commit that was made with another model has its own `attributes`; for tracks `committed_lineages`, a list of
`{id: [daughters]}`. The array `committed_objects` has the labels, the groups `prompts/<object id>` the prompts.

A write goes in this order: the attribute `pending_commit` with the ids and the region; prompts; labels, chunk by
chunk; and last, in one replacement of the attributes, the entry of the history, lineages, and the removal of
`pending_commit`. A commit that was torn by a crash or a full disk thus shows by `pending_commit`, and is not in the
history. The next write (of any kind) repairs it: it gets all labels, writes the region of the torn commit as well, and
removes the prompts of objects that no entry of the history has.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..core.errors import InvalidInputError, InvalidTypeError, MissingFileError, NoObjectsError
from ..core.output import writing
from .commit_prompts import read_prompts
from .commit_writer import (
    ATTRIBUTES,
    HISTORY,
    LABELS,
    LINEAGES,
    PENDING,
    PROMPTS,
    SIGNATURE,
    CommitEntry,
    CommitRecordMismatch,
    RecordWriter,
    Region,
    damaged,
    name_some,
    open_record,
    parse_entry,
)
from .file_lock import exclusive
from .journal_format import plain

if TYPE_CHECKING:
    import zarr

    from .prompt_data import Prompts

__all__ = [
    "CommitEntry", "CommitRecord", "CommitRecordMismatch", "read_commit_record", "revert_commit", "sync_labels",
    "write_commit",
]

SOURCES = ("current_object", "auto_segmentation")

Box = Sequence[Sequence[int]]


@dataclass(frozen=True)
class CommitRecord:
    """What is in a commit record.

    Attributes:
        path: The folder.
        labels: The committed objects; on disk, read when indexed. None if the first commit was torn.
        history: The commits in their order.
        prompts: The prompts by object, for objects that have some.
        lineages: One dictionary per lineage, from the id of a track to those of its daughters.
        attributes: Image, model and tiling.
        pending: Ids and region of a commit that was torn, whose pixels may be there in part; None without one.
    """

    path: Path
    labels: "zarr.Array | None"
    history: tuple[CommitEntry, ...]
    prompts: "dict[int, Prompts]"
    lineages: tuple[dict[int, list[int]], ...]
    attributes: dict[str, Any]
    pending: dict[str, Any] | None


def write_commit(
    path: str | os.PathLike,
    *,
    shape: Sequence[int],
    labels: Any,
    box: Box | None,
    object_ids: Iterable[int],
    layer: str,
    settings: Mapping[str, Any] | None = None,
    prompts_by_object: "Mapping[int, Prompts] | None" = None,
    attributes: Mapping[str, Any],
    lineages: Sequence[Mapping[int, Sequence[int]]] | None = None,
    same_data: Collection[str] = (),
    known_commits: int | None = None,
    corrects: bool = False,
) -> int:
    """Add a commit to a record, which is created if need be; everything is checked before anything is written.

    The same commit once more changes nothing: a script may be run twice.

    Args:
        path: The folder.
        shape: Shape of the image without channels, 2D or 3D.
        labels: All committed objects, as they are after the commit, lazy or not, in this shape.
        box: First and last + 1 of the changed pixels on each axis (a first axis of length 1 may precede those of an
            image); None if none changed. All of `labels` is written when the record is created.
        object_ids: The ids of the new objects.
        layer: Where they came from, `current_object` or `auto_segmentation`.
        settings: How they were made, to be kept in the history.
        prompts_by_object: The prompts by id, for objects that have some.
        attributes: `data_signature` of the image, and the others of `ATTRIBUTES`; take tiling and model from the
            embeddings that were used.
        lineages: All committed lineages, for tracks.
        same_data: Other signatures of the same image, for example the SHA-1 of older versions.
        known_commits: How many commits the record has as far as the caller knows; None does not check it.
        corrects: Whether the objects are in the record already, and have got new pixels and prompts.

    Returns:
        The number of commits in the record.

    Raises:
        CommitRecordMismatch: If the folder holds something else, see there; nothing is deleted or changed.
        NoObjectsError: If there are no objects.
        InvalidInputError: If arguments do not fit each other.
        SessionInUseError: If another process is writing the record.
        OutputWriteError: If it cannot be written; the next write repairs what is there in part.
    """
    path, ids, prompts = Path(path).expanduser(), sorted({int(i) for i in object_ids}), dict(prompts_by_object or {})
    _check_labels(labels, shape)
    _check_commit(ids, layer, prompts, len(shape))
    given = _checked_attributes(attributes)
    content = {**plain(settings or {}), "object_ids": ids}
    region = _region(box, shape)
    updates = {} if lineages is None else {LINEAGES: _plain_lineages(lineages)}

    with exclusive(path, "Close it there, or choose another commit path."), writing(path):
        record = RecordWriter.open(path, labels, given)
        record.check_data(given[SIGNATURE], same_data)
        history = record.attrs[HISTORY]
        other = {k: v for k, v in given.items() if k != SIGNATURE and record.attrs.get(k) != v}
        entry = {layer: {**content, **({"attributes": other} if other else {})}}
        known = set() if corrects else set(ids) & record.known_ids()
        if known and record.has_commit(entry, prompts, updates.get(LINEAGES, []), region):
            return len(history)
        record.check_commits(known_commits, known)
        record.change(ids, region, {**updates, HISTORY: [*history, entry]}, prompts)
    return len(history) + 1


def revert_commit(
    path: str | os.PathLike,
    *,
    labels: Any,
    box: Box | None,
    object_ids: Iterable[int],
    lineages: Sequence[Mapping[int, Sequence[int]]] | None = None,
) -> int:
    """Take the last commit out of a record, because it was undone; see `write_commit` for arguments and errors.

    Returns:
        The number of commits in the record.

    Raises:
        CommitRecordMismatch: If the last commit in the record is another one (`history`).
    """
    path, ids = Path(path).expanduser(), sorted({int(i) for i in object_ids})
    _check_labels(labels, labels.shape)
    _existing(path)
    with exclusive(path, "Close it there."), writing(path):
        record = RecordWriter.open(path, labels, {})
        history = record.attrs[HISTORY]
        if not history or parse_entry(history[-1], path).object_ids != tuple(ids):
            raise CommitRecordMismatch(
                f"The last commit in {path} is not that of the objects {name_some(ids)}: only the last one can be "
                "taken back. Leave the record as it is, or write the labels with sync_labels.", reason="history",
            )
        updates = {} if lineages is None else {LINEAGES: _plain_lineages(lineages)}
        # Out of the history first: if this is torn, the next write removes what is left of the commit.
        record.change(ids, _region(box, labels.shape), updates, before={HISTORY: history[:-1]})
    return len(history) - 1


def sync_labels(
    path: str | os.PathLike, labels: Any, *, lineages: Sequence[Mapping[int, Sequence[int]]] | None = None
) -> int:
    """Write all labels that differ from those in a record, for example after objects were edited by hand.

    Args:
        path: The record.
        labels: All committed objects.
        lineages: All committed lineages, for tracks.

    Returns:
        The number of chunks that were written.

    Raises:
        CommitRecordMismatch, SessionInUseError, OutputWriteError: See `write_commit`.
    """
    path = Path(path).expanduser()
    _check_labels(labels, labels.shape)
    _existing(path)
    with exclusive(path, "Close it there."), writing(path):
        record = RecordWriter.open(path, labels, {})
        updates = {} if lineages is None else {LINEAGES: _plain_lineages(lineages)}
        return record.change([], _region([(0, s) for s in labels.shape], labels.shape), updates)


def read_commit_record(path: str | os.PathLike) -> CommitRecord:
    """Read a record, also one of an older version; see `CommitRecord`.

    Raises:
        MissingFileError: If there is none.
        CommitRecordMismatch: If the folder holds something else (`foreign`), or it cannot be read (`damaged`).
    """
    path = Path(path).expanduser()
    group = _existing(path)
    attrs = dict(group.attrs)
    history = tuple(parse_entry(values, path) for values in attrs.get(HISTORY, []))
    known = {i for entry in history for i in entry.object_ids}
    try:
        # Asked for by name: next to the groups may lie what a killed writer has left.
        stored = group[PROMPTS] if PROMPTS in group else {}
        prompts = {i: read_prompts(stored[str(i)]) for i in sorted(known) if str(i) in stored}
        lineages = tuple(
            {int(t): list(map(int, daughters)) for t, daughters in tree.items()} for tree in attrs.get(LINEAGES) or ()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, error) from error
    return CommitRecord(
        path, group.get(LABELS), history, prompts, lineages,
        {k: v for k, v in attrs.items() if k not in (HISTORY, LINEAGES, PENDING)}, attrs.get(PENDING),
    )


def _existing(path: Path) -> "zarr.Group":
    group = open_record(path, "r")
    if group is None:
        raise MissingFileError(f"There is no commit record in {path}. Commit something with this path first.")
    return group


def _check_commit(ids: Sequence[int], layer: str, prompts: "Mapping[int, Prompts]", ndim: int) -> None:
    if not ids:
        raise NoObjectsError("There are no objects to record: object_ids is empty.")
    if ids[0] < 1:
        raise InvalidInputError(f"Ids of objects must be positive, but there is {ids[0]}.")
    if layer not in SOURCES:
        raise InvalidInputError(f"layer must be one of {', '.join(SOURCES)}, but is {layer!r}.")
    unknown = sorted(set(prompts) - set(ids))
    if unknown:
        raise InvalidInputError(f"There are prompts of the objects {name_some(unknown)}, which are not in object_ids.")
    for object_id, own in prompts.items():
        if own.ndim not in (None, ndim):
            raise InvalidInputError(
                f"The prompts of object {object_id} have {own.ndim} coordinates, but must have {ndim}, as the image."
            )


def _check_labels(labels: Any, shape: Sequence[int]) -> None:
    if np.dtype(labels.dtype).kind != "u":
        raise InvalidTypeError(f"labels must be unsigned integers, but have the dtype {labels.dtype}. Convert them.")
    if tuple(labels.shape) != tuple(shape) or len(shape) not in (2, 3):
        raise InvalidInputError(f"labels must have the shape of the image, {tuple(shape)}, but have {labels.shape}.")


def _checked_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(attributes) - set(ATTRIBUTES))
    if unknown or not isinstance(attributes.get(SIGNATURE), str):
        raise InvalidInputError(
            f"attributes must have {SIGNATURE!r} and may have {', '.join(ATTRIBUTES[1:])}, but have "
            f"{sorted(attributes)}."
        )
    found = {name: plain(attributes.get(name)) for name in ATTRIBUTES}
    return found | {"micro_sam_version": found["micro_sam_version"] or __version__}


def _plain_lineages(lineages: Sequence[Mapping[int, Sequence[int]]]) -> list[dict[str, list[int]]]:
    return [{str(int(t)): [int(d) for d in daughters] for t, daughters in tree.items()} for tree in lineages]


def _region(box: Box | None, shape: Sequence[int]) -> Region | None:
    if box is None:
        return None
    axes = [tuple(int(v) for v in axis) for axis in box]
    if len(axes) == len(shape) + 1 == 3 and axes[0] == (0, 1):
        axes = axes[1:]
    if len(axes) != len(shape) or not all(0 <= a < b <= s for (a, b), s in zip(axes, shape)):
        raise InvalidInputError(
            f"box must have first and last + 1 of the pixels on each axis of {tuple(shape)}, but is {box!r}."
        )
    return tuple(slice(a, b) for a, b in axes)
