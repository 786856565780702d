"""The format of a session's journal: a file with one line of JSON per action, and how it is read.

The first line is a header that says which image was annotated. Each further line is an action, the undoing or redoing
of one, or a note. A line counts when it is whole: what a killed process left behind its last whole line is the action
that it was writing, and is left out. Everything else is checked when it is read, and named by its line if it is wrong.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ImageReadError, InvalidInputError, InvalidTypeError, MissingFileError
from ..editing.history import Delta

if TYPE_CHECKING:
    from .prompt_data import Prompts

FORMAT, VERSION = "micro_sam.session", 1
MODES = ("2d", "3d", "tracking")
LAYERS = ("current_object", "auto_segmentation", "committed_objects")


class JournalDamageError(InvalidInputError):
    """A line of a journal is damaged, and it is not the one that was being written when the session ended.

    Attributes:
        path: The journal.
        line: Number of the line; the header is line 1.
    """

    def __init__(self, message: str, path: Path, line: int):
        super().__init__(message)
        self.path, self.line = path, line


@dataclass(frozen=True)
class Entry:
    """One action: what was done, and what it changed.

    Args:
        name: What was done.
        args: How; plain values that fit into JSON, numpy numbers and arrays, paths.
        deltas: The changes of label images by layer, one of `LAYERS`.
        prompts: All prompts before and after.
        state: Other values that changed, before and after, as they come out of JSON: lists rather than tuples, and
            strings as keys. None stands for a value that is not there.
        time: When, in seconds since 1970; set when it is written.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    prompts: "tuple[Prompts, Prompts] | None" = None
    state: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    time: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for `json.dumps`; it has nothing of what did not change."""
        unknown = [layer for layer in self.deltas if layer not in LAYERS]
        if unknown:
            raise InvalidInputError(f"A layer must be one of {', '.join(LAYERS)}, but is {unknown[0]!r}.")
        values: dict[str, Any] = {"do": self.name}
        if self.args:
            values["args"] = plain(self.args)
        labels = {layer: delta.to_json() for layer, delta in self.deltas.items() if not delta.is_empty}
        if labels:
            values["labels"] = labels
        if self.prompts is not None and self.prompts[0] != self.prompts[1]:
            values["prompts"] = [prompts.to_json() for prompts in self.prompts]
        state = {key: plain(list(pair)) for key, pair in self.state.items()}
        state = {key: pair for key, pair in state.items() if pair[0] != pair[1]}
        if state:
            values["state"] = state
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Entry":
        """Read what `to_json` returned.

        Raises:
            InvalidInputError: If it is something else, or damaged; other errors of wrong values may be raised too.
        """
        labels, prompts, state = values.get("labels", {}), values.get("prompts"), values.get("state", {})
        if set(labels) - set(LAYERS):
            raise InvalidInputError(f"unknown layers {sorted(set(labels) - set(LAYERS))}")
        if prompts is not None:
            from .prompt_data import Prompts
            before, after = prompts
            prompts = (Prompts.from_json(before), Prompts.from_json(after))
        return cls(
            str(values["do"]), dict(values.get("args", {})),
            {layer: Delta.from_json(delta) for layer, delta in labels.items()},
            prompts, {key: (before, after) for key, (before, after) in state.items()}, values.get("time"),
        )


@dataclass(frozen=True)
class Undo:
    """The last action was taken back."""

    time: float | None = None


@dataclass(frozen=True)
class Redo:
    """The action that was taken back last was repeated."""

    time: float | None = None


class Note(dict[str, Any]):
    """A remark that changes nothing, such as the model, or that the result was saved."""

    def __init__(self, content: Mapping[str, Any], time: float | None = None):
        super().__init__(content)
        self.time = time


Record = Entry | Undo | Redo | Note


def plain(value: Any) -> Any:
    """Return a value as it comes out of JSON: numpy numbers and arrays, tuples and paths as plain values.

    Raises:
        InvalidTypeError: For anything that JSON would not give back, such as integers as keys.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise InvalidTypeError(
        f"A journal keeps numbers, texts, lists and dictionaries with texts as keys, but got {value!r} "
        f"({type(value).__name__}). Convert it first."
    )


def read_journal(
    path: str | os.PathLike, *, until_damage: bool = False
) -> tuple[dict[str, Any], list[Record]]:
    """Read a journal; an action that was being written when its session ended is left out.

    Args:
        path: The journal; another process may be writing it.
        until_damage: Whether to return what is before the first damaged line, instead of an error.

    Returns:
        The header, and what follows it, one for each line: the record at index `n` is in line `n + 2`.

    Raises:
        MissingFileError: If there is no such file.
        InvalidInputError: If it is no journal, or of a newer version.
        JournalDamageError: If a line is damaged.
    """
    path = Path(path).expanduser()
    scan = scan_journal(path, parse_record, until_damage)
    return scan.header, [record for _, record in scan.records]


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a journal; see `read_journal` for errors."""
    with _reading(path), open(path, "rb") as file:
        return _parse_header(file.readline(2**20), path)


def parse_record(values: Mapping[str, Any]) -> Record:
    """Read a line of a journal but the first; raises errors of many kinds if it is damaged."""
    if "do" in values:
        return Entry.from_json(values)
    if "note" in values:
        return Note(values["note"], values.get("time"))
    for key, kind in (("undo", Undo), ("redo", Redo)):
        if values.get(key) == 1:
            return kind(values.get("time"))
    raise InvalidInputError(f"it has none of the keys do, undo, redo and note, but {sorted(values)[:5]}")


@dataclass(frozen=True)
class Scan:
    """What is in a journal.

    Attributes:
        header: The header.
        records: Number of the line and what it holds.
        end: Number of bytes up to the last line that counts.
        ends_with_newline: Whether that line has one.
        damage: What is wrong with the line where reading stopped.
    """

    header: dict[str, Any]
    records: list[tuple[int, Any]]
    end: int
    ends_with_newline: bool
    damage: JournalDamageError | None


def scan_journal(path: Path, parse: Callable[[Any], Any], until_damage: bool = False) -> Scan:
    """Read a journal line by line, see `read_journal`; `parse` gets what JSON gives for each line but the header."""
    with _reading(path), open(path, "rb") as file:
        first = file.readline()
        header, records, end, whole, damage = _parse_header(first, path), [], len(first), True, None
        for number, line in enumerate(file, 2):
            whole = line.endswith(b"\n")
            try:
                records.append((number, parse(json.loads(line))))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if not whole:
                    whole = True
                    break
                damage = _damage(path, number, error)
                if until_damage:
                    break
                raise damage from error
            end += len(line)
    return Scan(header, records, end, whole, damage)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one that names the journal."""
    if not path.is_file():
        raise MissingFileError(f"There is no session {path}.")
    try:
        yield
    except OSError as error:
        raise ImageReadError(f"{path} cannot be read: {error}. Check disk and permissions.") from error


def _damage(path: Path, number: int, error: Exception) -> JournalDamageError:
    return JournalDamageError(
        f"Line {number} of {path} is damaged ({type(error).__name__}: {error}). Restore the file from a copy; or "
        f"replay the {number - 2} records before it with until_damage=True (--until_damage).", path, number,
    )


def _parse_header(line: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(line)
        is_ours = header["format"] == FORMAT and line.endswith(b"\n")
    except (ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise InvalidInputError(
            f"{path} is no journal of a session: its first line is not a header of {FORMAT!r}. Pass a *.jsonl file "
            "that an annotator wrote."
        )
    if header.get("version") != VERSION:
        raise InvalidInputError(
            f"{path} has version {header.get('version')!r} of the format, but only version {VERSION} is known. Update "
            "micro_sam."
        )
    check_header(header, path)
    return header


def check_header(header: Mapping[str, Any], path: Path) -> None:
    """Raise `InvalidInputError` unless a header has a mode, and an image with a shape that fits it."""
    mode, image = header.get("mode"), header.get("image")
    shape = image.get("shape") if isinstance(image, Mapping) else None
    if mode not in MODES:
        raise InvalidInputError(f"The mode of a session must be one of {', '.join(MODES)}, but is {mode!r} ({path}).")
    n_axes = 2 if mode == "2d" else 3
    if not isinstance(shape, list) or len(shape) != n_axes or not all(isinstance(s, int) and s > 0 for s in shape):
        raise InvalidInputError(
            f"The image of a session of mode {mode} must have a shape of {n_axes} positive numbers, without channels, "
            f"but has {shape!r} ({path})."
        )
