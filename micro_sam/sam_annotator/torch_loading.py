"""Importing torch, and what is built on it, while a window is open."""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LIBRARY = {"linux": "libtorch_python.so", "darwin": "libtorch_python.dylib"}


def load_torch() -> None:
    """Import torch without stopping the other threads.

    An import keeps Python's lock while it loads libraries, which for torch takes half a second. So they are loaded
    before by a call of C, during which other threads go on. On Windows torch does that itself.
    """
    if "torch" in sys.modules:
        return
    with _collection_kept_short():
        _load_torch()


def load_module(name: str) -> None:
    """Import a large module without stopping the other threads.

    Args:
        name: Its full name.
    """
    if name not in sys.modules:
        with _collection_kept_short():
            importlib.import_module(name)


@cache
def keep_collection_short() -> None:
    """Take what is loaded by now out of the garbage collection, once in a process.

    A full collection looks at every object with Python's lock held. With torch loaded that blocks the window for about
    0.4 s, again and again, although hardly any of these objects is ever garbage.
    """
    gc.freeze()


@contextlib.contextmanager
def _collection_kept_short() -> Iterator[None]:
    """Collect nothing during an import, which makes objects faster than anything else, and then leave them out."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _load_torch() -> None:
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None and sys.platform in _LIBRARY:
        library = Path(found.origin).parent / "lib" / _LIBRARY[sys.platform]
        if library.is_file():
            load = ctypes.CDLL(None).dlopen
            load.argtypes, load.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
            load(os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL)  # should that fail, the import says why
    import torch  # noqa: F401
