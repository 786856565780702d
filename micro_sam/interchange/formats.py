"""The formats that labels are exchanged in, one row each. Light: command lines and documentation read this table."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ImageReadError, InvalidInputError, nearest_names


@dataclass(frozen=True)
class Format:
    """One format.

    `module` reads and writes it. New files have the first of `suffixes`; `patterns` find files in folders. What is in
    `private` is written where only this package reads it.
    """

    name: str
    title: str
    module: str
    suffixes: tuple[str, ...]
    patterns: tuple[str, ...]
    keeps: str
    loses: str
    private: tuple[str, ...] = ()
    writable: bool = True

    @property
    def suffix(self) -> str:
        return self.suffixes[0]


_OVERLAP = "objects that overlap"
_SIZES = "image size and pixel size (files of micro_sam have a note for itself, until another program saves them)"

FORMATS = (
    Format(
        "tif", "label image .tif or .zarr; reads png, npy, hdf5 and others too", "tif", (".tif", ".tiff", ".zarr"),
        ("*.tif", "*.tiff"),
        "pixels, ids, stacks",
        f"{_OVERLAP}; names, classes, pixel size, whether a stack is over time (there is a note for micro_sam itself)",
        ("names", "classes", "scale", "time"),
    ),
    Format(
        "ome-zarr", "OME-Zarr labels 0.4 and 0.5, also inside an image", "ome_zarr", (".ome.zarr",), ("*.zarr",),
        "pixels, ids, names, classes, planes or frames, pixel size and unit",
        f"{_OVERLAP}",
    ),
    Format(
        "imagej", "ImageJ ROIs .zip (reads .roi too)", "imagej", (".zip",), ("*.zip", "*.roi"),
        "exact outlines with holes and parts, ids, names, classes, plane or frame of each outline",
        f"{_SIZES}; coordinates above 16777216",
        ("scale",),
    ),
    Format(
        "geojson", "GeoJSON as QuPath reads and writes it", "geojson", (".geojson", ".json"), ("*.geojson",),
        "exact outlines with holes and parts, ids, names, classes, plane or frame of each outline",
        _SIZES,
        ("scale",),
    ),
    Format(
        "coco", "COCO JSON, with run lengths", "coco", (".json",), ("*.json",),
        "pixels, image size, classes as categories, many images in one file",
        "pixel size, ids in several images, names, and that planes are a stack (there are notes for micro_sam itself)",
        ("names", "scale", "stack"),
    ),
    Format(
        "cellpose", "Cellpose _seg.npy, read only", "cellpose", ("_seg.npy",), ("*_seg.npy",),
        "pixels, ids, stacks",
        f"{_OVERLAP}; names, classes, pixel size; its flows and settings are not read",
        writable=False,
    ),
)
FORMAT_NAMES = tuple(f.name for f in FORMATS)
_BY_NAME = {f.name: f for f in FORMATS}


def find_format(name: str) -> Format:
    """Return the row of a format.

    Raises:
        InvalidInputError: For an unknown name, with the nearest ones.
    """
    if name not in _BY_NAME:
        raise InvalidInputError(f"There is no format {name!r}. {nearest_names(name, FORMAT_NAMES)}")
    return _BY_NAME[name]


def format_table() -> str:
    """Return the table of formats as Markdown: what each keeps and what it cannot hold."""
    rows = [f"| `{f.name}` | {f.title} | {f.keeps} | {f.loses} |" for f in FORMATS]
    return "\n".join(["| format | files | keeps | cannot hold |", "|---|---|---|---|", *rows])


def output_path(path: str | os.PathLike, format: str | None = None) -> tuple[Path, Format]:
    """Return the path of an output and its format, of which each can tell the other.

    Args:
        path: The path; the suffix of the format is appended to a name without a known one.
        format: The format; by default the suffix tells.

    Raises:
        InvalidInputError: If the format is unknown or only read, the suffix is that of another one, or neither tells.
    """
    path = Path(path).expanduser()
    name = path.name.lower()
    suffixes = sorted({s for f in FORMATS for s in f.suffixes}, key=len, reverse=True)  # .ome.zarr before .zarr
    suffix = next((s for s in suffixes if name.endswith(s)), None)
    possible = [f for f in FORMATS if suffix in f.suffixes]
    row = None if format is None else find_format(format)
    if row is None and len(possible) == 1:
        row = possible[0]
    writable = [f for f in FORMATS if f.writable]
    if row is None:
        names = ", ".join(f.name for f in possible or writable)
        raise InvalidInputError(
            f"The name {path} does not say whether the format is {names}. Say it with format (--to), or use one of "
            f"the suffixes {', '.join(f.suffix for f in writable)}."
        )
    if not row.writable:
        raise InvalidInputError(
            f"The format {row.name} is only read. Write one of {', '.join(f.name for f in writable)}; Cellpose itself "
            "opens a tif of labels."
        )
    if suffix is None:
        return path.with_name(path.name + row.suffix), row
    if row not in possible:
        raise InvalidInputError(f"The suffix of {path} is not that of the format {row.name}. Use {row.suffix}.")
    return path, row


def format_to_read(path: str | os.PathLike) -> Format:
    """Return the format of a file by its name and, where that leaves it open, by its content.

    What is no other format counts as a label image, `tif`, whose reader knows many image formats.

    Raises:
        ImageReadError: If it is JSON, but neither COCO nor GeoJSON.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".json"):
        return find_format(_kind_of_json(path))
    if path.is_dir():
        return find_format("ome-zarr" if _is_ome(path) else "tif")
    for row in FORMATS[2:]:
        if any(name.endswith(pattern[1:]) for pattern in row.patterns):
            return row
    return find_format("tif")


def _is_ome(path: Path) -> bool:
    """Whether a folder is an image, or labels, of OME-Zarr."""
    for name in ("zarr.json", ".zattrs"):
        try:
            content = json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        attributes = content.get("attributes", {}) if name == "zarr.json" else content
        attributes = attributes.get("ome", attributes)
        if "multiscales" in attributes or "labels" in attributes:
            return True
    return False


def _kind_of_json(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            head = file.read(4096)
            if re.search(r'"type"\s*:\s*"Feature(Collection)?"', head):
                return "geojson"
            if re.search(r'"(images|annotations|categories|licenses)"\s*:', head):
                return "coco"
            content = json.loads(head + file.read())
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{path} could not be read as JSON: {error}. Check the file.") from error
    if isinstance(content, dict) and "annotations" in content:
        return "coco"
    if isinstance(content, list) or (isinstance(content, dict) and "type" in content):
        return "geojson"
    raise ImageReadError(
        f"{path} is JSON, but neither GeoJSON (no type) nor COCO (no annotations). Check that it is the right file."
    )
