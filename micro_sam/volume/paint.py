"""Painting objects into a label volume, slice by slice."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError
from ..core.progress import Step, Steps, drain
from .propagate import PropagatedObject

PRESERVE_MODES = ("existing", "none")


def paint_objects_steps(
    segmentation: np.ndarray, objects: Mapping[int, PropagatedObject], preserve: str = "existing"
) -> Steps[None]:
    """Generator behind `paint_objects`: yields one `Step` per slice."""
    if preserve not in PRESERVE_MODES:
        raise InvalidInputError(f"preserve must be one of {', '.join(PRESERVE_MODES)}, but is {preserve!r}.")
    by_slice = defaultdict(list)
    for id_, item in objects.items():
        for z, mask in item.masks.items():
            by_slice[z].append((item.confidence[z].predicted_iou if z in item.confidence else math.inf, id_, mask))
    _check_labels(segmentation, by_slice)
    yield Step(0, len(by_slice), "Paint objects")
    for n, (z, found) in enumerate(sorted(by_slice.items())):
        boxes = np.array([mask.box for _, _, mask in found])
        (y0, x0), (y1, x1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
        painted = np.zeros((y1 - y0, x1 - x0), dtype=segmentation.dtype)
        for _, id_, mask in sorted(found, key=lambda item: (item[0], -item[1])):
            top, left, bottom, right = mask.box
            painted[top - y0:bottom - y0, left - x0:right - x0][mask.mask] = id_
        labels = np.array(segmentation[z, y0:y1, x0:x1])
        where = (painted != 0) & (labels == 0) if preserve == "existing" else painted != 0
        labels[where] = painted[where]
        segmentation[z, y0:y1, x0:x1] = labels
        yield Step(n + 1, len(by_slice), "Paint objects")


def paint_objects(
    segmentation: np.ndarray,
    objects: Mapping[int, PropagatedObject],
    preserve: str = "existing",
    verbose: bool = False,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> None:
    """Paint objects into a label volume, in place, slice by slice.

    A pixel that several of the objects claim goes to the one whose mask the user gave in that slice, else to the one
    with the higher predicted IoU, else to the smaller id.

    Args:
        segmentation: Label volume (Z, Y, X), numpy or zarr; of a slice only the window around the objects is read.
        objects: The objects by id, as returned by `propagate_objects`.
        preserve: `existing` keeps all labels that are there already, `none` paints over them.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Raises:
        InvalidInputError: If an object or id does not fit into the volume, or for an unknown mode.
        InvalidTypeError: If the volume has no integer dtype.
    """
    drain(paint_objects_steps(segmentation, objects, preserve), verbose, pbar_init, pbar_update)


def _check_labels(segmentation: np.ndarray, by_slice: Mapping[int, list]) -> None:
    shape, dtype = tuple(segmentation.shape), np.dtype(segmentation.dtype)
    if dtype.kind not in "ui":
        raise InvalidTypeError(f"A label volume must have an integer dtype, but got {dtype}.")
    highest = max((id_ for found in by_slice.values() for _, id_, _ in found), default=0)
    if highest > np.iinfo(dtype).max:
        raise InvalidInputError(f"The id {highest} does not fit into {dtype}. Use a label volume of a wider dtype.")
    ends = [(z + 1, *mask.box[2:]) for z, found in by_slice.items() for _, _, mask in found]
    if len(shape) != 3 or any((end > np.array(shape)).any() for end in ends):
        raise InvalidInputError(
            f"The objects end at {np.max(ends, axis=0).tolist() if ends else 0} (z, y, x), but the label volume has "
            f"the shape {shape}."
        )
