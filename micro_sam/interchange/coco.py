"""COCO JSON (https://cocodataset.org/#format-data): many images in one file, objects as run lengths or polygons.

Objects are written as compressed run lengths, since polygons of COCO can have no holes. Category is the class. Ids
and names of objects, planes of a stack, and pixel sizes are in members that other programs ignore.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..core import rle
from ..core.errors import ImageReadError, InvalidInputError, nearest_names
from ..core.labels import boxes_of_labels
from ..core.output import temporary_path
from ..core.progress import Step, Steps
from .contours import count_up
from .label_image import LabelImage
from .pieces import Piece, Skipped, Target, paint_pieces, read_id

_NO_CLASS = "unclassified"
_NO_MASK = "annotations have no segmentation and were left out"


# --- writing ---


def write_steps(path: Path, image: LabelImage, name: str) -> Steps[None]:
    """Write one image; its file name in the dataset is the name of the output."""
    write_dataset(path, (yield from encode_dataset_steps([(path.stem, image)])))


def encode_dataset_steps(images: Iterable[tuple[str, LabelImage]]) -> Steps["Dataset"]:
    """Encode a dataset; `images` gives file names and labels, one after the other, so that not all need memory."""
    dataset = Dataset()
    for name, image in images:
        if name in dataset.contents:
            raise InvalidInputError(f"Two images of a dataset have the name {name}. Give them different names.")
        planes = image.planes
        for n, plane in enumerate(planes):
            yield Step(n, len(planes), f"Encode {name}")
            dataset.add_plane(name, image, n, plane)
        yield Step(len(planes), len(planes), f"Encode {name}")
        dataset.contents[name] = image.content()
    return dataset


def write_dataset(path: Path, dataset: "Dataset") -> None:
    """Write an encoded dataset."""
    with temporary_path(path, is_folder=False) as new:
        new.write_text(json.dumps(dataset.content(), separators=(",", ":")), encoding="utf-8")


class Dataset:
    """Collects images and annotations; categories get their numbers at the end, sorted by name."""

    def __init__(self):
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.contents: dict[str, dict[str, Any]] = {}

    def add_plane(self, name: str, image: LabelImage, n: int, plane: np.ndarray) -> None:
        entry = {"id": len(self.images) + 1, "file_name": name, "height": plane.shape[0], "width": plane.shape[1]}
        if image.labels.ndim == 3:
            entry["stack"] = {"axis": image.axes[0], "plane": n}
        self.images.append(entry)
        ids, consecutive, boxes = boxes_of_labels(plane)
        for k, (label, (rows, columns)) in enumerate(zip(ids.tolist(), boxes), 1):
            counts = rle.encode_in_plane(
                consecutive[rows, columns] == k, (rows.start, columns.start), plane.shape
            )
            annotation = {
                "id": len(self.annotations) + 1, "image_id": entry["id"], "category_id": image.classes.get(label),
                "segmentation": {"size": list(plane.shape), "counts": rle.compress(counts)},
                "area": rle.area(counts), "iscrowd": 0,
                "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                "label": label,
            }
            if label in image.names:
                annotation["name"] = image.names[label]
            self.annotations.append(annotation)

    def content(self) -> dict[str, Any]:
        classes = sorted({a["category_id"] for a in self.annotations} - {None})
        numbers = {text: n for n, text in enumerate(classes, 1)}
        categories = [{"id": n, "name": text, "supercategory": "class"} for text, n in numbers.items()]
        if any(a["category_id"] is None for a in self.annotations) or not categories:
            numbers[None] = len(categories) + 1
            categories.append({"id": numbers[None], "name": "object", "supercategory": _NO_CLASS})
        return {
            "info": {"description": f"Labels written by micro_sam {__version__}"},
            "images": self.images, "categories": categories,
            "annotations": [{**a, "category_id": numbers[a["category_id"]]} for a in self.annotations],
            "micro_sam": {"version": __version__, "content": self.contents},
        }


# --- reading ---


def read_contents(path: Path) -> dict[str, dict[str, Any]] | None:
    """What `write_dataset` noted about the labels of each image, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["micro_sam"]["content"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none that is ours
        return None


def read_content(path: Path, name: str = "segmentation") -> dict[str, Any] | None:
    """What was noted about the labels, if there is one image."""
    contents = read_contents(path) or {}
    return next(iter(contents.values())) if len(contents) == 1 else None


def image_names(path: Path) -> list[str]:
    """The file names of the images in a dataset; a stack counts once."""
    return list(_by_name(_load(path), path))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{path} could not be read as JSON: {error}. Export it again.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise ImageReadError(f"{path} is no COCO dataset: it needs lists of images and annotations. Check the file.")
    return content


def _by_name(content: Mapping[str, Any], path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of each image; several for the planes of a stack."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in content["images"]:
        name = str(entry.get("file_name", entry["id"]))
        if name in entries and "stack" not in entry:
            raise ImageReadError(f"{path} lists the image {name} twice. Give its images different names.")
        entries.setdefault(name, []).append(entry)
    return entries


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read the objects of one image, or of the stack whose planes the images are."""
    content = _load(path)
    skipped = Skipped()
    try:
        entries = _by_name(content, path)
        name = target.key or (next(iter(entries)) if len(entries) == 1 else None)
        if name not in entries:
            which = nearest_names(name, entries) if name else f"Its images: {', '.join(list(entries)[:20])}."
            raise ImageReadError(f"{path} holds {len(entries)} images. Choose one with key (--key). {which}")
        planes = sorted(entries[name], key=lambda entry: entry.get("stack", {}).get("plane", 0))
        shapes = {(int(e["height"]), int(e["width"])) for e in planes}
        if len(shapes) != 1:
            raise ImageReadError(f"{path}: the planes of {name} differ in size. Check the file.")
        plane_shape = shapes.pop()
        is_stack = "stack" in planes[0]
        numbers = {entry["id"]: n for n, entry in enumerate(planes)}
        classes = {
            c["id"]: c["name"] for c in content.get("categories", []) if c.get("supercategory") != _NO_CLASS
        }
        pieces = []
        for annotation in content["annotations"]:
            if annotation["image_id"] in numbers:
                plane = numbers[annotation["image_id"]] if is_stack else None
                pieces += _read_annotation(annotation, plane_shape, plane, classes, skipped)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ImageReadError):
            raise
        raise ImageReadError(
            f"{path} could not be read as COCO: {type(error).__name__}: {error}. Export it again."
        ) from error
    shape = (len(planes), *plane_shape) if is_stack else plane_shape
    if target.shape not in (None, shape):
        raise InvalidInputError(f"{path} says that {name} has the shape {shape}, but {target.shape} was asked for.")
    note = (content.get("micro_sam") or {}).get("content", {}).get(name) or {}
    facts = [getattr(target, k) or note.get(k) for k in ("scale", "units")]
    axes = target.axes or (f"{planes[0]['stack']['axis']}YX" if is_stack else None)
    skipped.warn(path)
    return (yield from paint_pieces(pieces, Target(shape, axes, *facts), path))


def _read_annotation(
    annotation: Mapping[str, Any], shape: tuple[int, int], plane: int | None, classes: Mapping[int, str],
    skipped: Skipped,
) -> list[Piece]:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        skipped.add(_NO_MASK)
        return []
    facts = {
        "label": read_id(annotation.get("label", annotation.get("id"))), "name": annotation.get("name"),
        "class_name": classes.get(annotation.get("category_id")), "plane": plane,
    }
    if isinstance(segmentation, list):
        return [Piece([[np.reshape(ring, (-1, 2))[:, ::-1]] for ring in segmentation], **facts)]
    counts = segmentation["counts"]
    counts = np.array(decompress(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if tuple(segmentation["size"]) != shape or counts.sum() != shape[0] * shape[1]:
        raise ValueError(f"the run lengths of annotation {annotation.get('id')} do not fit the image of shape {shape}")
    ends = np.cumsum(counts)
    _, pixels = count_up(ends[0::2][:len(ends[1::2])], ends[1::2])
    column, row = np.divmod(pixels, shape[0])  # runs go down the columns
    return [Piece(pixels=row * shape[1] + column, **facts)]


def decompress(text: str) -> list[int]:
    """Return the counts from the string of COCO's compressed encoding; see `core.rle.compress`."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts
