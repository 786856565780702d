"""Hashes of large files, remembered as long as size and time of the file stay the same. Loads no torch."""

import contextlib
import json
import os
import time
from pathlib import Path

import xxhash

from ..core.errors import OutputWriteError
from ..core.settings import get_cache_directory
from .files import replacing

_BLOCK = 1 << 23
_MAX_REMEMBERED = 200
# A file that was changed this recently can change again without a new time stamp.
_SETTLE_SECONDS = 2.0


def compute_hash(path: str | os.PathLike) -> str:
    """Read a file and return its hash as `xxh128:<hex>`."""
    digest = xxhash.xxh128()
    with open(path, "rb", buffering=0) as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return f"xxh128:{digest.hexdigest()}"


def _memory_path() -> Path:
    return get_cache_directory() / "file_hashes.json"


def _read_memory() -> dict[str, list]:
    try:
        memory = json.loads(_memory_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def remembered_hash(path: str | os.PathLike) -> str | None:
    """Return the hash of a file if it is remembered and the file is unchanged since, else None."""
    path = Path(path).resolve()
    entry = _read_memory().get(str(path))
    if isinstance(entry, list) and len(entry) == 4 and entry[:3] == _stamp(path) and isinstance(entry[3], str):
        return entry[3]
    return None


def file_hash(path: str | os.PathLike) -> str:
    """Return the hash of a file as `xxh128:<hex>`; it is read only if it changed since the last time.

    The hashes are remembered in the cache directory, by size, modification time and inode.
    """
    known = remembered_hash(path)
    if known is not None:
        return known
    path = Path(path).resolve()
    stamp = _stamp(path)
    value = compute_hash(path)
    if stamp == _stamp(path) and time.time() - stamp[1] / 1e9 > _SETTLE_SECONDS:
        _remember(path, stamp, value)
    return value


def _remember(path: Path, stamp: list[int], value: str) -> None:
    memory = _read_memory()
    memory.pop(str(path), None)
    memory = dict([*memory.items(), (str(path), [*stamp, value])][-_MAX_REMEMBERED:])
    # A cache directory that cannot be written costs time, nothing else.
    with contextlib.suppress(OutputWriteError), replacing(_memory_path()) as new:
        new.write_text(json.dumps(memory), encoding="utf-8")
