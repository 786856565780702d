"""Files that are complete or absent."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import OutputWriteError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, which replaces `path` at the end, or vanishes if anything is raised.

    Raises:
        OutputWriteError: If the folder or the file cannot be written.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except OSError as error:
        raise OutputWriteError(f"{path} cannot be written: {error}. Free space or choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
