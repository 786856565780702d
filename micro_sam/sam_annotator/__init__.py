"""The napari annotators. Names are looked up when they are used, so that importing this package loads no Qt."""

import importlib
import sys
from types import ModuleType

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
