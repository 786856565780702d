"""What an action of an annotation is, and the one way in which anything changes: carry out, journal, undo, redo, tell.

The labels of three layers, the prompts and a small state change together. An action is an `Entry`: sparse deltas of the
labels, and prompts and state before and after it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from psygnal import Signal

from ..core.errors import MicroSamError, OutputWriteError
from ..editing.editor import LabelEditor
from ..editing.history import Delta
from .journal import Entry, Journal, Redo, Undo
from .prompt_data import Prompts

CURRENT, AUTO, COMMITTED = "current_object", "auto_segmentation", "committed_objects"
LAYERS = (CURRENT, AUTO, COMMITTED)
_MAKING = {CURRENT: "segment", AUTO: "automatic"}  # how the names of actions begin that fill a layer


class SessionEvents:
    """What views listen to. `labels` gives a layer and the box that changed, `message` a level and a text."""

    labels = Signal(str, object)
    prompts = Signal()
    state = Signal()
    tracks = Signal()
    history = Signal()
    model = Signal()
    message = Signal(str, str)


class ActionLog:
    """Labels, prompts and state, with all that was done to them.

    Args:
        editors: The labels by layer.
        journal: Where actions are written; None keeps them in memory only.
        has_tracks: Whether committed objects are tracks.
    """

    def __init__(self, editors: Mapping[str, LabelEditor], journal: Journal | None, *, has_tracks: bool = False):
        self.events = SessionEvents()
        self.prompts = Prompts()
        self._editors, self._has_tracks = dict(editors), has_tracks
        self._state: dict[str, Any] = {}
        self._done: list[Entry] = []
        self._undone: list[Entry] = []
        self._journal, self._unwritten = journal, []
        self._recorded: set[int] = set()  # commits that are in a record on disk, by the identity of their entry

    @property
    def can_undo(self) -> bool:
        return bool(self._done)

    @property
    def can_redo(self) -> bool:
        return bool(self._undone)

    @property
    def next_undo(self) -> str | None:
        """The name of the action that `undo` takes back."""
        return self._done[-1].name if self._done else None

    def undo(self) -> str | None:
        """Take back the last action; return its name, or None if there is none."""
        return self._travel(self._done, self._undone, reverse=True)

    def redo(self) -> str | None:
        """Repeat the action that was undone last; return its name, or None if there is none."""
        return self._travel(self._undone, self._done, reverse=False)

    def close(self) -> None:
        """Close the journal; the session takes no more actions."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def restore(self, records: Iterable[Entry | Undo | Redo | Any]) -> None:
        """Carry out the records of a journal that this session goes on with; nothing is written."""
        for record in records:
            if isinstance(record, Entry):
                self._carry_out(record, reverse=False)
                self._done.append(record)
                self._undone.clear()
                self._recorded.add(id(record))
            elif isinstance(record, Undo):
                self._step(self._done, self._undone, reverse=True)
            elif isinstance(record, Redo):
                self._step(self._undone, self._done, reverse=False)
            else:
                self._state.update(record.get("scores", {}))
                self._state.update({k: record[k] for k in ("settings",) if k in record})

    # The one way in which anything changes

    def _act(
        self,
        name: str,
        args: Mapping[str, Any] | None = None,
        deltas: Mapping[str, Delta] | None = None,
        prompts: Prompts | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Note an action whose deltas are carried out already; take over prompts and state; tell the views."""
        deltas = {layer: d for layer, d in (deltas or {}).items() if not d.is_empty}
        changes = {k: (self._state.get(k), v) for k, v in (state or {}).items() if self._state.get(k) != v}
        moved = None if prompts is None or prompts == self.prompts else (self.prompts, prompts)
        entry = Entry(name, dict(args or {}), deltas, moved, changes)
        self._take_over(entry, reverse=False)
        self._done.append(entry)
        self._undone.clear()
        self._write(lambda journal: journal.append(entry))
        self._tell(entry)

    def _carry_out(self, entry: Entry, reverse: bool) -> None:
        """Apply an entry to the labels, all or nothing, and to prompts and state."""
        layers = list(entry.deltas.items())
        applied = []
        try:
            for layer, delta in reversed(layers) if reverse else layers:
                delta = delta.reversed() if reverse else delta
                self._editors[layer].apply(delta)
                applied.append((layer, delta))
        except BaseException:
            for layer, delta in reversed(applied):
                self._editors[layer].apply(delta.reversed())
            raise
        self._take_over(entry, reverse)

    def _take_over(self, entry: Entry, reverse: bool) -> None:
        which = 0 if reverse else 1
        if entry.prompts is not None:
            self.prompts = entry.prompts[which]
        for key, values in entry.state.items():
            if values[which] is None:
                self._state.pop(key, None)
            else:
                self._state[key] = values[which]

    def _step(self, source: list[Entry], target: list[Entry], reverse: bool) -> Entry:
        entry = source[-1]
        self._carry_out(entry, reverse)
        target.append(source.pop())
        return entry

    def _travel(self, source: list[Entry], target: list[Entry], reverse: bool) -> str | None:
        if not source:
            return None
        while True:
            entry = self._step(source, target, reverse)
            self._write(lambda journal: journal.append_undo() if reverse else journal.append_redo())
            self._tell(entry)
            self._follow_record(entry, reverse)
            # A mask that followed a prompt by itself goes and comes together with the prompt.
            following = entry if reverse else source[-1] if source else None
            if not source or following is None or not following.args.get("live"):
                return entry.name

    def _tell(self, entry: Entry) -> None:
        for layer, delta in entry.deltas.items():
            self.events.labels.emit(layer, delta.box)
        if entry.prompts is not None:
            self.events.prompts.emit()
        if entry.state:
            self.events.state.emit()
        if self._has_tracks and COMMITTED in entry.deltas:
            self.events.tracks.emit()
        self.events.history.emit()

    def _write(self, write: Callable[[Journal], Any]) -> None:
        """Write to the journal; what cannot be written now is tried again with the next action."""
        if self._journal is None:
            return
        self._unwritten.append(write)
        try:
            while self._unwritten:
                self._unwritten[0](self._journal)
                self._unwritten.pop(0)
        except OutputWriteError as error:
            self.events.message.emit("error", f"The last actions could not be saved for recovery: {error}")

    def _record_commit(self) -> None:
        """Write the commit that was just carried out to its record on disk, or take it back."""
        try:
            self._write_record(self._done[-1])
        except BaseException:
            self.undo()
            raise

    def _write_record(self, entry: Entry) -> None:
        from .commit_files import record_commit
        layer = entry.args["layer"]
        made = [e for e in self._done if layer in e.deltas and e.name.startswith(_MAKING[layer])]
        record_commit(self, entry, made[-1].args if made else {})
        self._recorded.add(id(entry))

    def _follow_record(self, entry: Entry, reverse: bool) -> None:
        """The record on disk follows when a commit is undone or repeated."""
        if not entry.args.get("path") or entry.name != "commit":
            return
        from .commit_files import take_out
        try:
            if not reverse:
                self._write_record(entry)
            elif id(entry) in self._recorded:
                take_out(self, entry)
        except MicroSamError as error:
            self.events.message.emit("error", f"The record in {entry.args['path']} could not follow: {error}")
