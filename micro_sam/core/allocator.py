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
# What glibc adapts to by itself where blocks of 32 MiB are freed; it stops adapting once it is told anything.
_USUAL = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 128 * 2**10}

# For a training, which keeps activations of all sizes: a fifth less memory, and as fast.
LARGEST_IN_TRAINING = 128 * 2**20

_lock = threading.Lock()
_users = 0
_since = 0.0
# Seconds of use from which memory is handed back. Doing so takes milliseconds, and as long again when the next of many
# short uses (one object after the other) asks for it; what a short use leaves is the start of the next one.
_LONG = 1.0


@functools.cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None


@contextlib.contextmanager
def reusing_memory(largest: int = _ANY) -> Iterator[None]:
    """Keep freed memory for the next allocation instead of handing it back to the system; glibc only.

    Large tensors are otherwise mapped anew each time, and the system clears every page of them first: a training step
    of the instance decoder at 1024 x 1024 pixels takes half as long again, and segmentation a quarter more. At the end
    of the outermost use all free memory is handed back if it was long. Concerns the whole process.

    Args:
        largest: Blocks of more bytes are handed back at once, so that they leave no gaps: what smaller ones are put
            into cannot be used for another large one. The outermost use decides.
    """
    global _users, _since
    with _lock:
        _users += 1
        if _users == 1:
            _since = time.monotonic()
            _tell({_MMAP_THRESHOLD: largest, **_REUSE})
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _tell(_USUAL)
                if time.monotonic() - _since > _LONG and (libc := _libc()) is not None:
                    libc.malloc_trim(0)


def _tell(parameters: dict[int, int]) -> None:
    if (libc := _libc()) is not None:
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
