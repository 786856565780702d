"""Segment Anything for microscopy.

`import micro_sam` is light: torch and napari are only loaded by what needs them.
"""

import importlib
import os

from ._version import __version__

# Operations that Apple's MPS backend lacks run on the CPU; a value that the user has set is kept.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__all__ = ["__version__", "segment"]


def __getattr__(name):
    if name == "segment":
        from .automatic_segmentation import segment
        return segment
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
