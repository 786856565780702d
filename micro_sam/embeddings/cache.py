"""Automatic caches: where `save_path="auto"` puts embeddings, and how much of them is kept."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInputError
from ..core.settings import get_cache_directory, read_user_settings
from .lock import is_locked
from .store import lock_path

logger = logging.getLogger(__name__)

SIZE_VARIABLE = "MICROSAM_EMBEDDING_CACHE_GB"
DEFAULT_SIZE_GB = 20.0
_NAME = re.compile(r"^[0-9a-f]{32}\.zarr$")


def auto_cache_directory() -> Path:
    """Return the folder of the automatic caches (not created here)."""
    return get_cache_directory() / "embeddings"


def auto_cache_path(key: dict[str, Any]) -> Path:
    """Return the path for a key of content, model, tiling and settings."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return auto_cache_directory() / f"{digest}.zarr"


def auto_cache_limit() -> int:
    """Return the size cap in bytes: from `MICROSAM_EMBEDDING_CACHE_GB` (10^9 bytes), the user's settings, or 20 GB.

    Raises:
        InvalidInputError: If the variable is not a number of at least 0.
    """
    value = os.environ.get(SIZE_VARIABLE) or read_user_settings().get("embedding_cache_gb", DEFAULT_SIZE_GB)
    try:
        size = float(value)
    except (TypeError, ValueError):
        size = -1.0
    if not size >= 0:
        raise InvalidInputError(f"{SIZE_VARIABLE} must be a number of gigabytes (0 or more), but is {value!r}.")
    return int(size * 1e9)


def folder_size(path: Path) -> int:
    """Size of all files below a folder, in bytes."""
    total = 0
    for root, _, files in os.walk(path):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def touch(path: Path) -> None:
    """Note that a cache was used now."""
    try:
        os.utime(path)
    except OSError:
        logger.debug("The time of use of %s could not be set", path)


def evict(limit: int | None = None, keep: Path | None = None, reserve: int = 0) -> list[Path]:
    """Delete the automatic caches that were not used for longest, until the rest fits.

    Only folders that have the name of an automatic cache are counted and deleted, and none that is being written.

    Args:
        limit: Size cap in bytes; None takes `auto_cache_limit`.
        keep: A cache that stays in any case.
        reserve: Bytes to leave free below the cap, for a cache to be written.

    Returns:
        The deleted caches.
    """
    limit = auto_cache_limit() if limit is None else limit
    folder = auto_cache_directory()
    if not folder.is_dir():
        return []
    caches = [path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir() and path != keep]
    caches.sort(key=lambda path: path.stat().st_mtime)
    sizes = {path: folder_size(path) for path in caches}
    total = sum(sizes.values()) + reserve + (folder_size(keep) if keep is not None and keep.exists() else 0)
    deleted = []
    for path in caches:
        if total <= limit:
            break
        if is_locked(lock_path(path)):
            continue
        # Renamed first, so that nobody finds half a cache.
        doomed = path.with_suffix(f".{os.getpid()}.deleted")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        except OSError as error:
            logger.warning("The embedding cache %s could not be deleted: %s", path, error)
            continue
        total -= sizes[path]
        deleted.append(path)
        logger.info("Deleted the embedding cache %s to stay below %.1f GB", path, limit / 1e9)
    return deleted
