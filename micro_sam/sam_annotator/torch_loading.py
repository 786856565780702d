"""Importing torch while a window is open."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

_LIBRARY = {"linux": "libtorch_python.so", "darwin": "libtorch_python.dylib"}


def load_torch() -> None:
    """Import torch without stopping the other threads.

    An import keeps Python's lock while it loads libraries, which for torch takes half a second. So they are loaded
    before by a call of C, during which other threads go on. On Windows torch does that itself.
    """
    if "torch" in sys.modules:
        return
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None and sys.platform in _LIBRARY:
        library = Path(found.origin).parent / "lib" / _LIBRARY[sys.platform]
        if library.is_file():
            load = ctypes.CDLL(None).dlopen
            load.argtypes, load.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
            load(os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL)  # should that fail, the import says why
    import torch  # noqa: F401
