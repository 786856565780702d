"""The work folder of a run over blocks: what is finished, and the labels of each block until they are joined.

`job.json` says what the run is, `done.jsonl` has a line for each finished block, `blocks/<id>.npz` its labels. A block
is finished if and only if it has a line; its file is complete then. The folder may lie on a file system that all
workers share. It is deleted when the output is complete.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BlockError, EmbeddingCacheError, OutputExistsError
from ..core.output import is_same, smallest_dtype, temporary_path, write_json, writing
from ..embeddings.lock import locked


def block_path(folder: str | Path, block_id: int) -> Path:
    """Where the labels of a block are."""
    return Path(folder) / "blocks" / f"{block_id}.npz"


def save_block(folder: str | Path, block_id: int, labels: np.ndarray) -> None:
    """Write the labels of the outer block, completely or not at all."""
    with temporary_path(block_path(folder, block_id), is_folder=False) as new, open(new, "wb") as file:
        np.savez_compressed(file, labels=labels.astype(smallest_dtype(labels)))


def load_block(folder: str | Path, block_id: int) -> np.ndarray:
    """Read the labels of the outer block."""
    with np.load(block_path(folder, block_id), allow_pickle=False) as file:
        return file["labels"]


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the right to work on an output; the system takes it back when the process ends, however it ends.

    Raises:
        BlockError: If another process has it.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        with writing(path):
            try:
                stack.enter_context(locked(lock))
            except EmbeddingCacheError as error:
                raise BlockError(
                    f"Another process is working on {path}. Wait until it is done, stop it, or choose another output."
                ) from error
        yield


class WorkFolder:
    """Opens the work folder of an output, or begins it; one process at a time writes to its log.

    Args:
        path: The folder.
        settings: What decides the result, fit for JSON.
        overwrite: Whether to begin anew if the folder belongs to other settings.

    Raises:
        OutputExistsError: If the folder belongs to a run with other settings.
        OutputWriteError: If it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path, self._log = path, path / "done.jsonl"
        with writing(path):
            if path.exists() and not self._belongs_to(settings, overwrite):
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "job.json").exists():
                write_json(path / "job.json", {"micro_sam": {"settings": settings}})
            self.done = self._read_log()

    def _belongs_to(self, settings: dict[str, Any], overwrite: bool) -> bool:
        try:
            if is_same(self.path / "job.json", settings):
                return True
        except OutputExistsError:
            if overwrite:
                return False
            raise
        if any(self.path.iterdir()) and not overwrite:
            raise OutputExistsError(
                f"{self.path} is needed for the unfinished work, but holds something else. Move it, pass overwrite to "
                "delete it, or choose another output."
            )
        return False

    def _read_log(self) -> dict[int, dict[str, Any]]:
        """Finished blocks; a line that was cut off by the end of the process is dropped."""
        entries: dict[int, dict[str, Any]] = {}
        if not self._log.exists():
            return entries
        lines = self._log.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:
            try:
                entry = json.loads(line)
                entries[int(entry["block"])] = entry
            except (ValueError, KeyError, TypeError):
                continue
        if lines[-1] or len(entries) < len(lines) - 1:
            with temporary_path(self._log, is_folder=False) as new:
                new.write_text("".join(json.dumps(e) + "\n" for e in entries.values()), encoding="utf-8")
        return entries

    def note(self, block_id: int, entry: dict[str, Any]) -> None:
        """Note that a block is finished."""
        entry = {"block": block_id, **entry}
        with writing(self.path), open(self._log, "ab", buffering=0) as log:
            log.write(json.dumps(entry).encode() + b"\n")
        self.done[block_id] = entry

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
