"""Journals of sessions on disk: writing them, one writer at a time, and keeping them in the cache folder."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import MicroSamError, MissingFileError, NotInitializedError, OutputExistsError, OutputWriteError
from ..core.output import temporary_path, writing
from ..core.settings import get_cache_directory
from ..embeddings.lock import is_locked
from .file_lock import SessionInUseError, exclusive, lock_path
from .journal_format import (
    FORMAT,
    LAYERS,
    MODES,
    VERSION,
    Entry,
    JournalDamageError,
    Note,
    Record,
    Redo,
    Undo,
    check_header,
    parse_record,
    plain,
    read_header,
    read_journal,
    scan_journal,
)

__all__ = [
    "LAYERS", "MODES", "Entry", "Journal", "JournalDamageError", "Note", "Record", "Redo", "SessionInUseError",
    "Summary", "Undo", "discard", "find_journals", "is_finished", "is_open", "journal_path", "key_of", "read_journal",
    "session_folder", "summary", "tidy",
]

SAVED = "saved"
_DURABLE = ("commit", "load", "save")  # must survive a power failure, not only the end of the process
KEPT_JOURNALS = 100
_TRASH, _TRASH_FILES, _TRASH_BYTES = "trash", 20, 10**9


class Journal:
    """A journal that is open for writing; make it with `create` or `resume`, and close it. One writer at a time.

    Each line is handed to the system at once, so that it survives the end of the process. If a line cannot be
    written, nothing of it stays in the file, and the journal can be used on.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self._lock, self._torn = contextlib.ExitStack(), False
        with writing(path):
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
            self._end = os.fstat(self._fd).st_size

    @classmethod
    def create(cls, path: str | os.PathLike, header: Mapping[str, Any]) -> "Journal":
        """Begin a journal.

        Args:
            path: The new file, for example from `journal_path`.
            header: `mode` (`2d`, `3d` or `tracking`), `image` (with at least its `shape` without channels), and
                whatever else describes the session. Format, version, software and start are added.

        Raises:
            OutputExistsError: If the file exists.
            SessionInUseError: If another process is just creating it.
            OutputWriteError: If it cannot be written; then there is nothing of it.
        """
        path = Path(path).expanduser()
        header = {
            "format": FORMAT, "version": VERSION, "software": f"micro_sam {__version__}", "started": time.time(),
            **plain(header),
        }
        check_header(header, path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(path, "Close it there."))
            if path.exists():
                raise OutputExistsError(f"{path} exists. Resume that session, or choose another file.")
            with temporary_path(path, is_folder=False) as new, open(new, "wb") as file:
                file.write(_line(header))
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(path.parent)
            journal = cls(path, header)
            journal._lock = stack.pop_all()
        return journal

    @classmethod
    def resume(cls, path: str | os.PathLike) -> "tuple[Journal, list[Record]]":
        """Open a journal to go on with it; an action that was being written when the session ended is cut off.

        Returns:
            The journal, and what it holds already.

        Raises:
            SessionInUseError: If another process has it open.
            JournalDamageError: See `read_journal`. Replay what is before the damage, and begin a new journal with it.
            OutputWriteError: If it cannot be written.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingFileError(f"There is no session {path}.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(path, "Close it there, or begin a new session."))
            scan = scan_journal(path, parse_record)
            journal = cls(path, scan.header)
            journal._lock = stack.pop_all()
        try:
            with writing(path):
                os.ftruncate(journal._fd, scan.end)
                if not scan.ends_with_newline:
                    os.write(journal._fd, b"\n")
                journal._end = os.fstat(journal._fd).st_size
        except BaseException:
            journal.close()
            raise
        return journal, [record for _, record in scan.records]

    def append(self, entry: Entry) -> None:
        """Write an action.

        Raises:
            OutputWriteError: If it cannot be written (disk full, permission, file deleted); it may be tried again.
            InvalidTypeError: If args or state do not fit into JSON.
        """
        self._write(entry.to_json(), durable=entry.name in _DURABLE)

    def append_undo(self) -> None:
        """Write that the last action was taken back; see `append` for errors."""
        self._write({"undo": 1})

    def append_redo(self) -> None:
        """Write that an action was repeated; see `append` for errors."""
        self._write({"redo": 1})

    def note(self, content: Mapping[str, Any]) -> None:
        """Write a remark that changes nothing; see `append` for errors."""
        self._write({"note": plain(content)})

    def mark_saved(self, content: Mapping[str, Any] | None = None) -> None:
        """Write that all work so far is saved elsewhere, and where; see `append` for errors."""
        self._write({"note": {SAVED: plain(content or {})}}, durable=True)

    def close(self) -> None:
        """Close the file and let others write it. Closing twice is allowed."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            with writing(self.path):
                os.fsync(fd)
        finally:
            os.close(fd)
            self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, values: dict[str, Any], durable: bool = False) -> None:
        if self._fd is None:
            raise NotInitializedError(f"The journal {self.path} is closed. Resume it to write more.")
        line = _line({**values, "time": round(time.time(), 3)})
        with writing(self.path):
            if os.fstat(self._fd).st_nlink == 0:
                raise OutputWriteError(
                    f"{self.path} was deleted while its session is open. Save the labels now, and begin a new session."
                )
            try:
                if self._torn:
                    os.ftruncate(self._fd, self._end)
                    self._torn = False
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._fd, rest):]
                if durable:
                    os.fsync(self._fd)
            except BaseException:
                self._torn = True
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
                    self._torn = False
                raise
        self._end += len(line)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure, where the system knows how."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)




# --- the folder of journals ---


def session_folder() -> Path:
    """Return the folder of the journals (not created here)."""
    return get_cache_directory() / "sessions"


def key_of(image_signature: str, mode: str) -> str:
    """Return what the names of all journals of an image and a mode begin with."""
    return f"{hashlib.sha256(image_signature.encode()).hexdigest()[:12]}_{mode}"


def journal_path(image_signature: str, mode: str) -> Path:
    """Return the path for a new journal."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime())
    return session_folder() / f"{key_of(image_signature, mode)}_{moment}-{time.time_ns() % 10**9 // 1000:06}.jsonl"


def find_journals(
    image_signature: str | None = None, mode: str | None = None, *, include_open: bool = False
) -> list[Path]:
    """Return the journals in the session folder, the one that was written last first.

    Args:
        image_signature: Only those of this image.
        mode: Only those of this mode.
        include_open: Whether to return those that a session is writing, too.
    """
    folder = session_folder()
    pattern = "*.jsonl" if image_signature is None or mode is None else f"{key_of(image_signature, mode)}_*.jsonl"
    found = []
    for path in folder.glob(pattern) if folder.is_dir() else ():
        try:
            header = read_header(path)
            written = path.stat().st_mtime_ns
        except (MicroSamError, OSError):  # another file, or removed meanwhile
            continue
        fits = mode in (None, header["mode"]) and image_signature in (None, header["image"].get("signature"))
        if fits and (include_open or not is_open(path)):
            found.append((written, path))
    return [path for _, path in sorted(found, reverse=True)]


def is_open(path: str | os.PathLike) -> bool:
    """Whether a session, in any process, is writing a journal."""
    return is_locked(lock_path(Path(path)))


@dataclass(frozen=True)
class Summary:
    """What to tell about a session before it is replayed.

    Attributes:
        path: The journal.
        header: Its header.
        n_actions: Number of actions that are in effect: those that were undone do not count.
        n_objects: Number of committed objects.
        last_change: When the last action was done, undone or redone, in seconds since 1970; None without any.
        is_finished: Whether all work was saved elsewhere, or there is none.
        damage: What is wrong with the first damaged line, after which nothing was counted.
    """

    path: Path
    header: dict[str, Any]
    n_actions: int
    n_objects: int
    last_change: float | None
    is_finished: bool
    damage: JournalDamageError | None

    @property
    def image_name(self) -> str:
        """The name of the image, or an empty text."""
        return str(self.header["image"].get("name") or "")


def summary(path: str | os.PathLike) -> Summary:
    """Describe a session, for the question whether to restore it; label images are not built.

    Raises:
        InvalidInputError: If it is no journal.
    """
    path = Path(path).expanduser()
    scan = scan_journal(path, _changed_ids, until_damage=True)
    done: list[tuple[set[int], set[int]]] = []
    undone: list[tuple[set[int], set[int]]] = []
    objects: set[int] = set()
    last_change, finished = None, True
    for _, (kind, moment, created, removed) in scan.records:
        if kind == "note":
            continue
        if kind == SAVED:
            finished = True
            continue
        last_change, finished = moment, False
        if kind == "do":
            done.append((created, removed))
            undone.clear()
        elif kind == "redo" and undone:
            done.append(undone.pop())
            created, removed = done[-1]
        elif kind == "undo" and done:
            undone.append(done.pop())
            removed, created = undone[-1]
        objects = (objects - removed) | created
    return Summary(path, scan.header, len(done), len(objects), last_change, finished, scan.damage)


def _changed_ids(values: Mapping[str, Any]) -> tuple[str, float | None, set[int], set[int]]:
    """Kind and time of a record, and which committed objects it made and removed."""
    kind = next((key for key in ("do", "undo", "redo", "note") if key in values), None)
    if kind is None:
        raise KeyError("do")
    if kind == "note" and SAVED in values["note"]:
        kind = SAVED
    delta = values.get("labels", {}).get("committed_objects", {}) if kind == "do" else {}
    return kind, values.get("time"), set(delta.get("created", ())), set(delta.get("removed", ()))


def is_finished(path: str | os.PathLike) -> bool:
    """Whether all work of a session was saved elsewhere, or there is none."""
    return summary(path).is_finished


def discard(path: str | os.PathLike) -> Path:
    """Move a journal to the folder `trash` beside it, which keeps the last 20 (together at most 1 GB).

    Returns:
        Where it is now.

    Raises:
        SessionInUseError: If a session is writing it.
        OutputWriteError: If it cannot be moved.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no session {path}.")
    with exclusive(path, "Close it there first."), writing(path):
        trash = path.parent / _TRASH
        trash.mkdir(exist_ok=True)
        new, n = trash / path.name, 1
        while new.exists():
            new, n = trash / f"{path.stem}.{n}{path.suffix}", n + 1
        os.replace(path, new)
        os.utime(new)
    _empty_trash(trash, keep=new)
    return new


def tidy(keep: int = KEPT_JOURNALS) -> list[Path]:
    """Discard old journals whose work was saved; those with work that was not saved stay for ever.

    Args:
        keep: How many of the newest journals stay in any case.

    Returns:
        Where they are now.
    """
    found = []
    for path in find_journals()[keep:]:
        with contextlib.suppress(MicroSamError, OSError):  # it is damaged, or another process has opened or moved it
            if is_finished(path):
                found.append(discard(path))
    return found


def _empty_trash(trash: Path, keep: Path) -> None:
    """Delete what was thrown away longest ago."""
    with contextlib.suppress(OSError):  # another process empties it at the same time
        others = sorted((p for p in trash.glob("*.jsonl") if p != keep), key=lambda p: p.stat().st_mtime_ns)
        others.append(keep)
        sizes = [p.stat().st_size for p in others]
        while len(others) > 1 and (len(others) > _TRASH_FILES or sum(sizes) > _TRASH_BYTES):
            others.pop(0).unlink()
            sizes.pop(0)
