"""Plain label images: written as tif or zarr, read from every image format.

Names, classes and axes go into the record of the output, which other programs do not read.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..core import output
from ..core.errors import InvalidInputError
from ..core.image import open_image
from ..core.progress import Step, Steps
from .label_image import LabelImage, table_from_json
from .pieces import Target


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read a label image."""
    yield Step(0, 1, "Read labels")
    known = (read_content(path) or {}) if target.key is None else {}
    image = open_image(path, key=target.key)
    if image.has_channels:
        raise InvalidInputError(
            f"{path} is an image with channels (axes {image.axes}), but labels have none. Pass the label image itself."
        )
    labels = whole_numbers(image.read(), path)
    if known.get("size") == [1, *labels.shape]:  # a stack of one plane, which a tif cannot tell from a plane
        labels = labels[None]
    if known.get("size") != list(labels.shape):
        known = {}
    tables = [table_from_json(known.get(name)) for name in ("names", "classes")]
    axes = target.axes or known.get("axes") or image.axes
    yield Step(1, 1, "Read labels")
    return LabelImage(
        labels, axes, *tables, target.scale or known.get("scale") or image.scale, target.units or known.get("units")
    )


def whole_numbers(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels as integers; ImageJ, for one, keeps large ids as floats."""
    if labels.dtype.kind != "f":
        return labels
    whole = labels.astype(np.int64, casting="unsafe") if np.isfinite(labels).all() else None
    if whole is None or not np.array_equal(whole, labels):
        raise InvalidInputError(
            f"{path} holds numbers that are no integers, so it is no label image. Pass labels, 0 for background and "
            "one number per object."
        )
    return whole


def write_steps(path: Path, image: LabelImage, name: str) -> Steps[None]:
    """Write a label image."""
    yield Step(0, 1, "Write labels")
    tables = {"names": _for_json(image.names), "classes": _for_json(image.classes)}
    output.write_labels(path, image.labels, {"interchange": {**image.content(), **tables}})
    yield Step(1, 1, "Write labels")


def _for_json(table: Any) -> dict[str, str]:
    return {str(i): text for i, text in table.items()}


def read_content(path: Path, name: str = "segmentation") -> dict[str, Any] | None:
    """What `write_steps` noted about the labels, or None."""
    record = output.read_record(path, name) or {}
    return record.get("settings", {}).get("interchange")
