"""The napari annotators. Names are looked up when they are used, so that importing this package loads no Qt."""

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def _keep_llvm_apart() -> None:
    """Let triton, which torch may import, bind to its own LLVM.

    The OpenGL of Mesa has another one. If that is loaded first, as in a viewer that is open already, triton would take
    its functions and crash the process.
    """
    if not sys.platform.startswith("linux") or "triton" in sys.modules:
        return
    found = importlib.util.find_spec("triton")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        library = Path(folder) / "_C" / "libtriton.so"
        if library.is_file():
            ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)


_keep_llvm_apart()

_FUNCTIONS = {
    "annotator_2d": "annotator_2d",
    "annotator_3d": "annotator_3d",
    "annotator_tracking": "annotator_tracking",
    "image_series_annotator": "image_series_annotator",
    "image_folder_annotator": "image_series_annotator",
}
__all__ = [
    "annotator_2d", "annotator_3d", "annotator_tracking", "image_folder_annotator", "image_series_annotator",
]


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # Importing the module `annotator_2d` would put it in place of the function of that name.
        if name not in _FUNCTIONS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
