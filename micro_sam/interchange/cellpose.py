"""The masks in a `_seg.npy` of Cellpose: a pickled dictionary, read without running code from it."""

from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImageReadError
from ..core.progress import Step, Steps
from ..models.safe_pickle import Inert, SafePickle
from .label_image import LabelImage
from .pieces import Target
from .tif import whole_numbers


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read the masks; everything else in the file is left out."""
    yield Step(0, 1, "Read labels")
    masks = _read_dictionary(path).get("masks")
    if isinstance(masks, list) and masks and all(isinstance(m, np.ndarray) for m in masks):
        masks = np.stack(masks)
    if not isinstance(masks, np.ndarray) or masks.dtype == object:
        raise ImageReadError(f"{path} holds no masks. Save it again in Cellpose, with masks.")
    masks = whole_numbers(masks, path)
    if masks.ndim > 2:
        masks = masks.reshape([s for n, s in enumerate(masks.shape) if s > 1 or n >= masks.ndim - 2])
    yield Step(1, 1, "Read labels")
    return LabelImage(np.maximum(masks, 0), target.axes, scale=target.scale, units=target.units)


def _read_dictionary(path: Path) -> dict[str, Any]:
    """The dictionary in the file. Classes outside of an allow-list are not built; dangerous ones are an error."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            dtype = readers[version](file)[2]
            if dtype.kind != "O":
                raise ValueError(f"it holds an array of {dtype}")
            content = SafePickle().load(file)
        content = content.item() if isinstance(content, np.ndarray) else content
    except Exception as error:  # a damaged pickle may raise anything
        text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ImageReadError(
            f"{path} could not be read as a _seg.npy of Cellpose: {text}. Nothing of it was run. Save the masks in "
            "Cellpose again, as tif or _seg.npy."
        ) from error
    if not isinstance(content, dict) or isinstance(content.get("masks"), Inert):
        raise ImageReadError(f"{path} is no _seg.npy of Cellpose: it holds no dictionary with masks. Check the file.")
    return content
