"""Downloads that are atomic, resumable and verified. Loads no torch."""

import glob
import logging
import os
import time
from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock

from ..core.errors import DownloadError, HashMismatchError, OutputWriteError, UnknownModelError, nearest_names
from .hashing import compute_hash, file_hash

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
TIMEOUT = (15, 60)  # seconds to connect, seconds without data
ATTEMPTS = 4  # in a row without new data


def _by_hand(url: str, path: Path) -> str:
    return f"Or download {url} on another computer and put the file at {path} (exactly this name, no extension)."


def _open_bar(progressbar: Any, name: str, total: int) -> tuple[Any, bool]:
    """Return a tqdm-like bar or None, and whether it is ours to close."""
    if progressbar is True:
        from tqdm.auto import tqdm
        return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name), True
    if progressbar in (None, False):
        return None, False
    progressbar.total = total
    return progressbar, False


class _Transfer:
    """One file on its way: keeps what arrived in `part` so that any later call can go on from there."""

    def __init__(self, url: str, path: Path, part: Path, progressbar: Any):
        self.url, self.path, self.part, self.progressbar = url, path, part, progressbar
        self.resumed = False

    @property
    def received(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def run(self) -> None:
        failures = 0
        while True:
            before = self.received
            try:
                if self._request():
                    return
                error = None
            except requests.RequestException as caught:
                error = caught
            failures = failures + 1 if self.received <= before else 0
            if failures >= ATTEMPTS or (error is not None and self.received == 0):
                raise DownloadError(
                    f"{self.path.name} could not be downloaded from {self.url}: {error or 'the connection was cut'}. "
                    f"{self.received} bytes are kept, the next call goes on from there. Check the network and proxy "
                    f"settings and try again. {_by_hand(self.url, self.path)}"
                ) from error
            time.sleep(0.5 * failures)

    def _request(self) -> bool:
        """Ask for what is missing; returns whether the file is complete now."""
        start = self.received
        # Compressed transfers would make byte ranges meaningless.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # nothing is left to send, or the file is shorter now: the hash tells
                self.resumed = True
                return True
            if response.status_code >= 400:
                raise DownloadError(
                    f"The server answered {response.status_code} ({response.reason}) to {self.url}. Try again later. "
                    f"{_by_hand(self.url, self.path)}"
                )
            if response.status_code != 206 or _range_start(response) != start:
                start = 0
            self.resumed |= start > 0
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            self._write(response, start, total)
        return total is None or self.received >= total

    def _write(self, response: requests.Response, start: int, total: int | None) -> None:
        bar, own = _open_bar(self.progressbar, self.path.name, total or 0)
        try:
            with open(self.part, "r+b" if start else "wb") as f:
                f.seek(start)
                if bar is not None:
                    bar.update(start - getattr(bar, "n", 0))
                for block in response.iter_content(CHUNK):
                    f.write(block)
                    if bar is not None:
                        bar.update(len(block))
                f.flush()
                os.fsync(f.fileno())
        except requests.RequestException:
            raise
        except OSError as error:
            raise OutputWriteError(
                f"{self.part} could not be written: {error}. Free space or choose another folder with the environment "
                "variable MICROSAM_CACHEDIR."
            ) from error
        finally:
            if own:
                bar.close()


def _range_start(response: requests.Response) -> int:
    value = response.headers.get("Content-Range", "")
    try:
        return int(value.split()[1].split("-")[0])
    except (IndexError, ValueError):
        return -1


def download(url: str, path: str | os.PathLike, known_hash: str, progressbar: Any = False) -> Path:
    """Download a file, going on where an earlier call was interrupted. The file appears only when it is verified.

    Args:
        url: Where from.
        path: Where to. Data arrive in a file beside it that ends with `.part`.
        known_hash: What the file must have, as `xxh128:<hex>`.
        progressbar: True for a bar in the terminal, or an object like one of tqdm.

    Returns:
        The path.

    Raises:
        DownloadError: If the server cannot be reached, refuses or breaks off again and again.
        HashMismatchError: If the complete file has another hash.
        OutputWriteError: If the folder cannot be written or the disk is full.
    """
    path = Path(path)
    # The hash in the name keeps the pieces of another version of the file apart.
    part = path.with_name(f"{path.name}.{known_hash.split(':')[1][:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise OutputWriteError(
            f"The folder {path.parent} cannot be written: {error}. Choose another one with the environment variable "
            "MICROSAM_CACHEDIR."
        ) from error
    try:
        if path.exists() and compute_hash(path) == known_hash:  # another process was faster
            return path
        transfer = _Transfer(url, path, part, progressbar)
        transfer.run()
        found = compute_hash(part)
        if found != known_hash and transfer.resumed:  # the old piece was damaged: once more from the beginning
            part.unlink()
            transfer.run()
            found = compute_hash(part)
        if found != known_hash:
            part.unlink()
            raise HashMismatchError(
                f"{url} was downloaded completely, but has the hash {found} instead of {known_hash}; it was deleted. "
                "A proxy or login page may have answered instead: try again from another network. "
                f"{_by_hand(url, path)}"
            )
        os.replace(part, path)
        for old in path.parent.glob(f"{glob.escape(path.name)}.????????.part"):
            old.unlink()  # pieces of other versions
    finally:
        lock.release()
    return path


class ModelRegistry(pooch.Pooch):
    """The registry of model files, with downloads that are resumable and hashes that are remembered."""

    def __init__(self, path: str | os.PathLike, files: dict[str, tuple[str, str]]):
        super().__init__(
            path=Path(path), base_url="", registry={name: digest for name, (_, digest) in files.items()},
            urls={name: url for name, (url, _) in files.items()},
        )

    def fetch(self, fname: str, processor: Any = None, downloader: Any = None, progressbar: Any = False) -> Any:
        """Return the path of a file, downloading it if it is absent or differs.

        Args:
            fname: The name of the file, see `registry`.
            processor: As in pooch: called with the path, "fetch" or "download", and this object.
            downloader: As in pooch: replaces the download, called with url, path and this object.
            progressbar: True for a bar in the terminal, or an object like one of tqdm.

        Raises:
            UnknownModelError: If there is no such file.
            DownloadError: If the download fails, with what to do then.
            HashMismatchError: If the complete download has another hash.
        """
        if fname not in self.registry:
            raise UnknownModelError(f"There is no model file {fname!r}. {nearest_names(fname, self.registry)}")
        path, known_hash = Path(self.path) / fname, self.registry[fname]
        action = "fetch"
        if not path.exists() or file_hash(path) != known_hash:
            action = "download"
            if path.exists():
                logger.warning("%s does not have the hash %s of %s, getting it again", path, known_hash, fname)
            if downloader is None:
                download(self.get_url(fname), path, known_hash, progressbar)
            else:
                super().fetch(fname, downloader=downloader)
            file_hash(path)
        return str(path) if processor is None else processor(str(path), action, self)

    def get_url(self, fname: str) -> str:
        """Return the url of a file.

        Raises:
            UnknownModelError: If there is no such file.
        """
        if fname not in self.urls:
            raise UnknownModelError(f"There is no model file {fname!r}. {nearest_names(fname, self.registry)}")
        return self.urls[fname]
