"""Rebuild the labels, prompts and tracks of a session from its journal, without the model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.errors import InvalidInputError
from ..core.output import is_done, is_same, label_path, write_json, write_labels
from ..core.progress import Step, Steps, drain
from ..editing.history import Delta, EditConflictError, LabelStore
from .journal_format import LAYERS, Entry, Note, Record, Undo, read_journal

if TYPE_CHECKING:
    from .prompt_data import Prompts

COMMITTED = "committed_objects"
TRACK_FORMATS = ("ctc", "geff")


@dataclass(frozen=True)
class Replayed:
    """The state of a session.

    Attributes:
        header: The header of its journal.
        labels: Label images of the shape of the image by layer; uint32, or uint64 if an id needs it.
        prompts: All prompts.
        state: Other values of the session.
        links: Parent by track, for each layer.
        done: The actions that are in effect, in their order: those that can be undone.
        undone: The actions that can be redone; the last one is the next.
        n_records: How many records of the journal were carried out.
    """

    header: dict[str, Any]
    labels: dict[str, np.ndarray]
    prompts: "Prompts"
    state: dict[str, Any]
    links: dict[str, dict[int, int]]
    done: tuple[Entry, ...]
    undone: tuple[Entry, ...]
    n_records: int

    @property
    def parents(self) -> dict[int, int]:
        """Parent by committed track, for tracks that have one."""
        return self.links[COMMITTED]


def replay(
    path: str | os.PathLike, until: int | None = None, *, until_damage: bool = False, verbose: bool = False
) -> Replayed:
    """Rebuild the state of a session.

    Args:
        path: The journal; a session may be writing it.
        until: How many records to carry out, see `micro_sam.replay --list`; None for all.
        until_damage: Whether to stop before the first damaged line, instead of an error.
        verbose: Whether to show a progress bar.

    Returns:
        The state, the same as that of the session at this moment.

    Raises:
        InvalidInputError: If it is no journal, or has fewer records.
        JournalDamageError: If a line is damaged.
        EditConflictError: If an action does not start from the labels that those before it gave.
    """
    return drain(replay_steps(path, until, until_damage=until_damage), verbose)


def replay_steps(
    path: str | os.PathLike, until: int | None = None, *, until_damage: bool = False
) -> Steps[Replayed]:
    """Generator behind `replay`: yields `Step`, returns the state."""
    header, records = read_journal(path, until_damage=until_damage)
    return (yield from replay_records_steps(header, _until(records, until, path), path))


def replay_records_steps(
    header: dict[str, Any], records: Sequence[Record], path: str | os.PathLike = "the journal"
) -> Steps[Replayed]:
    """Carry out what `read_journal` returned: yields `Step`, returns the state; `path` is for messages."""
    state = _State(header)
    yield Step(0, len(records), "Replay")
    for number, record in enumerate(records, 1):
        try:
            state.carry_out(record)
        except EditConflictError as error:
            name = f" ({record.name})" if isinstance(record, Entry) else ""
            raise EditConflictError(
                f"Line {number + 1} of {path}{name} cannot be carried out: {error} For the state before it, pass "
                f"until={number - 1} (--until {number - 1})."
            ) from error
        yield Step(number, len(records), "Replay")
    return Replayed(
        header, {layer: store.array for layer, store in state.stores.items()}, state.prompts, state.values,
        state.links, tuple(state.done), tuple(state.undone), len(records),
    )


def _until(records: list[Record], until: int | None, path: str | os.PathLike) -> list[Record]:
    if until is None:
        return records
    if not 0 <= until <= len(records):
        raise InvalidInputError(f"until must be from 0 to {len(records)}, the records of {path}, but is {until}.")
    return records[:until]


@dataclass
class _State:
    """What the records are applied to, one after the other."""

    header: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    done: list[Entry] = field(default_factory=list)
    undone: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        from .prompt_data import Prompts

        shape = tuple(self.header["image"]["shape"])
        # Pages of these arrays that nothing is written to take no memory.
        self.stores = {layer: LabelStore(np.zeros(shape, dtype=np.uint32)) for layer in LAYERS}
        self.links: dict[str, dict[int, int]] = {layer: {} for layer in LAYERS}
        self.prompts = Prompts()

    def carry_out(self, record: Record) -> None:
        if isinstance(record, Entry):
            self._change(record, reverse=False)
            self.done.append(record)
            self.undone.clear()
        elif isinstance(record, Note):
            if "settings" in record:  # kept with the session, but never undone
                self.values["settings"] = record["settings"]
        else:
            reverse = isinstance(record, Undo)
            source, target = (self.done, self.undone) if reverse else (self.undone, self.done)
            if not source:
                raise EditConflictError(f"There is nothing to {'undo' if reverse else 'redo'}.")
            self._change(source[-1], reverse)
            target.append(source.pop())

    def _change(self, entry: Entry, reverse: bool) -> None:
        for layer, delta in entry.deltas.items():
            self._apply(layer, delta.reversed() if reverse else delta)
        which = 0 if reverse else 1
        if entry.prompts is not None:
            self.prompts = entry.prompts[which]
        for key, pair in entry.state.items():
            if pair[which] is None:
                self.values.pop(key, None)
            else:
                self.values[key] = pair[which]

    def _apply(self, layer: str, delta: Delta) -> None:
        store, links = self.stores[layer], self.links[layer]
        if delta.runs.shape != store.shape:
            raise EditConflictError(
                f"It changes labels of shape {delta.runs.shape}, but those of {layer} have {store.shape}."
            )
        for track, before, _ in delta.links:
            if links.get(track, 0) != before:
                raise EditConflictError(
                    f"It starts from parent {before} of track {track} in {layer}, but that is {links.get(track, 0)}."
                )
        if store.dtype == np.uint32 and any(p.after.max() > np.iinfo(np.uint32).max for p in delta.runs):
            store = self.stores[layer] = LabelStore(store.array.astype(np.uint64))
        store.apply(delta.runs)
        for track, _, parent in delta.links:
            if parent:
                links[track] = parent
            else:
                links.pop(track, None)


class Written(NamedTuple):
    """What `write_replay` wrote: where, how many objects, and whether it was there already."""

    path: Path
    n_objects: int | None
    was_there: bool


def write_replay(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    layer: str = COMMITTED,
    until: int | None = None,
    tracks: str | None = None,
    overwrite: bool = False,
    until_damage: bool = False,
    verbose: bool = False,
) -> Written:
    """Write the labels of a session to a file, completely or not at all.

    Args:
        path: The journal.
        output: The label image (tif, zarr, see `write_labels`); with `tracks` a folder.
        layer: Which labels.
        until: See `replay`.
        tracks: `ctc` or `geff` writes the tracks of a time series with their lineage; None writes the labels alone.
        overwrite: Whether to replace an output that holds something else.
        until_damage: See `replay`.
        verbose: Whether to show a progress bar.

    Raises:
        OutputExistsError: If there is another output, and `overwrite` is not set.
        OutputWriteError: If it cannot be written; then nothing of it is left.
        InvalidInputError: If tracks are asked for, but it is no session of a time series; see `replay` for more.
    """
    steps = write_replay_steps(
        path, output, layer=layer, until=until, tracks=tracks, overwrite=overwrite, until_damage=until_damage
    )
    return drain(steps, verbose)


def write_replay_steps(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    layer: str = COMMITTED,
    until: int | None = None,
    tracks: str | None = None,
    overwrite: bool = False,
    until_damage: bool = False,
) -> Steps[Written]:
    """Generator behind `write_replay`: yields `Step`, returns what was written."""
    if layer not in LAYERS:
        raise InvalidInputError(f"layer must be one of {', '.join(LAYERS)}, but is {layer!r}.")
    if tracks not in (None, *TRACK_FORMATS):
        raise InvalidInputError(f"tracks must be one of {', '.join(TRACK_FORMATS)}, but is {tracks!r}.")
    header, records = read_journal(path, until_damage=until_damage)
    records = _until(records, until, path)
    if tracks is not None and header["mode"] != "tracking":
        raise InvalidInputError(f"{path} is a session of mode {header['mode']}, not of tracking: leave out tracks.")
    settings = {
        "session": Path(path).name, "started": header.get("started"), "layer": layer, "records": len(records),
    }
    target = _track_folder(output, tracks) if tracks else label_path(output)
    if is_done(target, settings, overwrite) if tracks is None else _are_done(target, tracks, settings, overwrite):
        return Written(target, None, True)
    found = yield from replay_records_steps(header, records, path)
    labels = found.labels[layer]
    if tracks is None:
        written = write_labels(target, labels, settings)
        return Written(written, int(np.count_nonzero(np.unique(labels))), False)
    return (yield from _write_tracks_steps(target, labels, found.links[layer], tracks, settings, overwrite))


def _track_folder(output: str | os.PathLike, tracks: str) -> Path:
    folder = Path(output).expanduser()
    return folder if tracks == "ctc" or folder.suffix == ".zarr" else folder.with_name(f"{folder.name}.zarr")


def _track_record(folder: Path, tracks: str) -> Path:
    """Where the settings are noted from which tracks were written."""
    from ..tracking.ctc import RECORD_NAME

    return folder / (RECORD_NAME if tracks == "ctc" else "tracks.json")


def _are_done(folder: Path, tracks: str, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the tracks are there already; raises `OutputExistsError` if something else is."""
    from ..tracking.ctc import check_ctc_folder

    if not overwrite and is_same(_track_record(folder, tracks), settings):
        return True
    if tracks == "ctc":
        check_ctc_folder(folder, overwrite)
    return False


def _write_tracks_steps(
    folder: Path, labels: np.ndarray, parents: dict[int, int], tracks: str, settings: dict[str, Any], overwrite: bool
) -> Steps[Written]:
    from ..tracking.ctc import write_ctc_steps
    from ..tracking.geff import write_geff_steps
    from ..tracking.lineage import as_forest

    daughters: dict[int, list[int]] = {}
    for track, parent in sorted(parents.items()):
        daughters.setdefault(parent, []).append(track)
    forest = as_forest([daughters], labels)
    write = write_ctc_steps if tracks == "ctc" else write_geff_steps
    written = yield from write(folder, labels, forest, overwrite)
    write_json(_track_record(written, tracks), {"micro_sam": {"settings": settings}})
    return Written(written, len(forest), False)
