"""The right to write a journal or a commit record: one process at a time."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import EmbeddingCacheError, MicroSamError
from ..core.output import writing
from ..embeddings.lock import locked


class SessionInUseError(MicroSamError, RuntimeError):
    """Another session, in this or another process, is writing the same file."""


@contextlib.contextmanager
def exclusive(path: Path, remedy: str) -> Iterator[None]:
    """Hold the right to write a file or folder; the system takes it back when the process ends, however it ends.

    Args:
        path: The file or folder.
        remedy: What the user can do if another process has it.

    Raises:
        SessionInUseError: If another process (or thread) has it.
        OutputWriteError: If there is no permission, or no space, for the lock file.
    """
    path = Path(os.path.abspath(path))
    lock = lock_path(path)
    with contextlib.ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Who only asks whether it is in use holds the lock for a moment.
                stack.enter_context(locked(lock, timeout=0.2))
            except EmbeddingCacheError as error:
                raise SessionInUseError(f"{path} is being written by {_owner(lock)}. {remedy}") from error
        yield


def lock_path(path: Path) -> Path:
    """The lock file that belongs to a file or folder."""
    return path.with_name(f".{path.name}.lock")


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_text())
        name = "this process" if owner["pid"] == os.getpid() else f"process {owner['pid']}"
        return f"{name} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
