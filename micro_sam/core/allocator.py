"""Memory that is freed and needed again at once, as in a network on a CPU, stays with the process."""

import contextlib
import ctypes
import functools
import sys
import threading
import time
from collections.abc import Iterator

# Parameters of mallopt, from malloc.h of glibc.
_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD = -3, -2, -1
_ANY = 2**31 - 1
_REUSE = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20}
# Bytes that stay for the next use: more than the mask decoder takes for a prompt. Mapping them anew takes 70 ms, where
# the decoder needs 30.
_KEPT = 96 * 2**20
# Outside of uses large blocks come and go as glibc itself does it where blocks of 32 MiB are freed (it stops adapting
# once it is told anything), but a trim leaves `_KEPT`.
_USUAL = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 2 * _KEPT, _TOP_PAD: _KEPT}

# For a training, which keeps activations of all sizes: a fifth less memory, and as fast.
LARGEST_IN_TRAINING = 128 * 2**20

_lock = threading.Lock()
_users = 0
_since = _until = 0.0  # when the outermost use began, and when the last one ended
# Seconds of use from which memory is handed back, once nothing has used it for `IDLE` seconds: mapping it anew is a
# fifth of the time of segmenting an image. What shorter uses leave is the start of the next one.
_LONG = 1.0
IDLE = 10.0
_waits = False


@functools.cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None


@contextlib.contextmanager
def reusing_memory(largest: int = _ANY) -> Iterator[None]:
    """Keep freed memory for the next allocation instead of handing it back to the system; glibc only.

    Large tensors are otherwise mapped anew each time, and the system clears every page of them first: a training step
    of the instance decoder at 1024 x 1024 pixels takes half as long again, and segmentation a quarter more. After a
    long use all free memory is handed back, once there was no other for `IDLE` seconds. Concerns the whole process.

    Args:
        largest: Blocks of more bytes are handed back at once, so that they leave no gaps: what smaller ones are put
            into cannot be used for another large one. All is handed back at the end. The outermost use decides.
    """
    global _users, _since, _until, _waits
    with _lock:
        _users += 1
        if _users == 1:
            _since = time.monotonic()
            _tell({_MMAP_THRESHOLD: largest, **_REUSE})
    try:
        yield
    finally:
        starts = ends = False
        with _lock:
            _users -= 1
            if _users == 0:
                _until = time.monotonic()
                is_long = _until - _since > _LONG and _libc() is not None
                ends = is_long and largest < _ANY
                starts = is_long and not ends and not _waits
                _waits |= starts
                _tell({_MMAP_THRESHOLD: _USUAL[_MMAP_THRESHOLD]} if _waits and not ends else _USUAL)
        if ends:
            _hand_back()
        if starts:
            threading.Thread(target=_wait, name="hand back memory", daemon=True).start()


def _wait() -> None:
    """Hand free memory back when nothing has used it for a while."""
    global _waits
    while True:
        with _lock:
            left = IDLE if _users else _until + IDLE - time.monotonic()
            if left <= 0:
                _waits = False
                _tell(_USUAL)
                break
        time.sleep(left)
    _hand_back()


def _hand_back() -> None:
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _tell(parameters: dict[int, int]) -> None:
    if (libc := _libc()) is not None:
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
