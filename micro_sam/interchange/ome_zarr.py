"""Labels in OME-Zarr, as an image of their own or inside an image, by the specification of OME-NGFF 0.4 and 0.5.

Names and classes are `properties` of `image-label` (https://ngff.openmicroscopy.org/0.5/), keyed by `label-value`.
"""

from pathlib import Path
from typing import Any

from ..core import output
from ..core.errors import ImageReadError, nearest_names
from ..core.image import open_image
from ..core.progress import Step, Steps
from .label_image import LabelImage
from .pieces import Target
from .tif import read_content, whole_numbers

__all__ = ["labels_path", "read_content", "read_steps", "write_steps"]


def _metadata(path: Path) -> dict[str, Any]:
    """The attributes of OME-NGFF of a group."""
    import zarr

    try:
        attributes = dict(zarr.open_group(str(path), mode="r").attrs)
    except (OSError, ValueError, KeyError) as error:
        raise ImageReadError(f"{path} could not be read as OME-Zarr: {error}. Check the path.") from error
    return attributes.get("ome") or attributes


def labels_path(path: Path, name: str) -> Path:
    """Where labels of a name are written: inside an OME-Zarr image that is there already, else at the path itself."""
    if not path.is_dir():
        return path
    try:
        metadata = _metadata(path)
    except ImageReadError:
        return path
    is_image = "multiscales" in metadata and "image-label" not in metadata
    return path / "labels" / name if is_image else path


def _find_labels(path: Path, key: str | None) -> Path:
    """The group of the labels: the path itself, or those of an image, chosen by name if there are several."""
    metadata = _metadata(path)
    folder = path
    names = metadata.get("labels")
    if names is None:
        if "image-label" in metadata or not (path / "labels").is_dir():
            return path / key if key else path
        folder = path / "labels"
        names = _metadata(folder).get("labels", [])
    if key is None and len(names) == 1:
        key = names[0]
    if key is None or key.removeprefix("labels/") not in names:
        which = nearest_names(key, names) if key and names else f"It has: {', '.join(names) or 'none'}."
        raise ImageReadError(f"{path} holds {len(names)} sets of labels. Choose one with key (--key). {which}")
    return folder / key.removeprefix("labels/")


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read the labels of an OME-Zarr image, or labels that stand for themselves."""
    yield Step(0, 1, "Read labels")
    group = _find_labels(path, target.key)
    known = (read_content(group) or {}).get("size", ())
    image = open_image(group, ndim=len(known) if len(known) == 3 else None)  # a stack of one plane stays one
    metadata = _metadata(group)
    if image.has_channels:
        raise ImageReadError(f"{group} has channels (axes {image.axes}), but labels have none. Choose labels with key.")
    labels = whole_numbers(image.read(), group)
    axes = (metadata.get("multiscales") or [{}])[0].get("axes", [])
    units = {axis["name"][:1].upper(): axis.get("unit") for axis in axes if isinstance(axis, dict)}
    present = set(LabelImage(labels).ids.tolist())
    rows = [r for r in metadata.get("image-label", {}).get("properties") or [] if r.get("label-value") in present]
    tables = [{r["label-value"]: str(r[name]) for r in rows if r.get(name)} for name in ("name", "class")]
    yield Step(1, 1, "Read labels")
    return LabelImage(
        labels, target.axes or image.axes, *tables, target.scale or image.scale,
        target.units or [units.get(axis) for axis in image.axes],
    )


def write_steps(path: Path, image: LabelImage, name: str) -> Steps[None]:
    """Write labels; inside an OME-Zarr image if one lies at the path."""
    yield Step(0, 1, "Write labels")
    record = {"interchange": image.content()}
    if labels_path(path, name) == path:
        with output.temporary_path(path, is_folder=True) as new:
            _describe(output.write_labels(new, image.labels, record, scale=image.scale), image)
    else:
        _describe(output.write_labels(path, image.labels, record, scale=image.scale, name=name), image)
    yield Step(1, 1, "Write labels")


def _describe(path: Path, image: LabelImage) -> None:
    """Add to the metadata of written labels what the writer of plain labels does not know."""
    import zarr

    group = zarr.open_group(str(path), mode="r+")
    attributes = dict(group.attrs)
    metadata = attributes.get("ome", attributes)
    for axis, letter, unit in zip(metadata["multiscales"][0]["axes"], image.axes, image.units or (None,) * 3):
        axis["name"] = letter.lower()
        axis["type"] = "time" if letter == "T" else "space"
        axis.update({"unit": unit} if unit else {})
    properties: dict[int, dict[str, Any]] = {}
    for key, table in (("name", image.names), ("class", image.classes)):
        for label, text in table.items():
            properties.setdefault(label, {"label-value": label})[key] = text
    if properties:
        metadata["image-label"]["properties"] = [properties[label] for label in sorted(properties)]
    group.attrs.update(attributes)
