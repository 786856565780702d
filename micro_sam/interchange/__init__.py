"""Labels in the formats of other programs: ImageJ, QuPath (GeoJSON), COCO, OME-Zarr and Cellpose.

The names are loaded when they are first used, so that importing this package is quick.
"""

from importlib import import_module

_HOMES = {
    "contours": ("fill_rings", "trace_parts"),
    "files": (
        "read_labels", "read_labels_steps", "write_coco_dataset", "write_coco_dataset_steps", "write_labels",
        "write_labels_steps",
    ),
    "formats": ("FORMATS", "FORMAT_NAMES", "format_table"),
    "label_image": ("LabelImage",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOME_OF})
