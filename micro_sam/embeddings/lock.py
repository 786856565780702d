"""A lock on a cache folder, so that two processes never write the same cache.

The lock belongs to the open file: the system drops it when the process ends, also by kill -9, so there are no
stale locks. The file names its owner for the message that the other process shows.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import EmbeddingCacheError

logger = logging.getLogger(__name__)

if os.name == "nt":
    import msvcrt

    def _try_lock(fd: int) -> None:
        os.lseek(fd, 2**30, os.SEEK_SET)  # beyond the text, which stays readable
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _acquire(path: Path) -> int | None:
    """Open and lock the file; None if another process holds it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(fd)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            return None
        except OSError as error:
            logger.warning("No locks on this file system (%s): do not write %s twice at a time", error, path.parent)
            return fd
        try:
            # The previous owner may have removed the file after we opened it; then our lock guards nothing.
            if os.name == "nt" or os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def locked(path: Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock file at `path`; it is removed afterwards.

    Args:
        path: The file; its folder must exist.
        timeout: Seconds to wait for another owner.

    Raises:
        EmbeddingCacheError: If another process (or thread) still holds it after that time.
    """
    deadline = time.monotonic() + timeout
    while (fd := _acquire(path)) is None:
        if time.monotonic() >= deadline:
            raise EmbeddingCacheError(
                f"The embeddings in {path.parent.parent} are being computed by {_owner(path)}. Wait until it is "
                f"done, pass lock_timeout=<seconds> to wait for it here, or choose another path."
            )
        time.sleep(min(0.1, max(timeout, 0.01)))
    try:
        os.ftruncate(fd, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(fd, json.dumps(owner).encode(), 0) if os.name != "nt" else os.write(fd, json.dumps(owner).encode())
        yield
    finally:
        # Remove before unlocking: whoever opened the file meanwhile sees that it is gone and opens a new one.
        if os.name != "nt":
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file at `path`."""
    if not path.exists():
        return False
    fd = _acquire(path)
    if fd is None:
        return True
    os.close(fd)
    return False
