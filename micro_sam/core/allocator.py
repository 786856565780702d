"""Memory that is freed and needed again at once, as in training on a CPU, stays with the process."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Parameters of mallopt, from malloc.h of glibc, and what they are without anybody's doing.
_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD = -3, -2, -1
_DEFAULT = 128 * 1024
_NEVER = 2**31 - 1


@contextlib.contextmanager
def reusing_memory() -> Iterator[None]:
    """Keep freed memory for the next allocation instead of handing it back to the system; glibc only.

    Large tensors are otherwise mapped anew each time, and the system clears every page of them first: a training step
    of the instance decoder at 1024 x 1024 pixels takes half as long again. At the end all free memory is handed
    back, and the thresholds are glibc's defaults, which no longer adapt by themselves. Not for nesting.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _NEVER)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.mallopt(_TOP_PAD, 64 * 2**20)
    try:
        yield
    finally:
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
            libc.mallopt(parameter, _DEFAULT)
        libc.malloc_trim(0)
