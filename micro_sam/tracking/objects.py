"""The objects of single frames: where they are, how large, and how they overlap with those of the next frame."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError
from ..core.progress import Step, Steps

Node = tuple[int, int]  # frame, label


@dataclass(frozen=True)
class FrameObjects:
    """The objects of one frame, in ascending order of their labels.

    Attributes:
        labels: The labels, (N,) int64.
        centroids: The mean (y, x) of their pixels, (N, 2) float64.
        areas: The numbers of their pixels, (N,) int64.
    """

    labels: np.ndarray
    centroids: np.ndarray
    areas: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Overlaps(NamedTuple):
    """The objects of two frames that share pixels: their positions in `FrameObjects`, and how many, (K,) int64 each."""

    first: np.ndarray
    second: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Scan:
    """What one pass over a time series finds: the objects of each frame, and the overlaps of each with the next one."""

    objects: list[FrameObjects]
    overlaps: list[Overlaps]


def read_frame(segmentation, t: int) -> np.ndarray:
    """Read one frame (Y, X) of a series of label images, which may be lazy."""
    return np.asarray(segmentation[t])


def check_series(segmentation, timeseries=None) -> None:
    """Check the shape and type of a series of label images, and that it fits its images.

    Raises:
        InvalidInputError: If it is not (T, Y, X), or the images are not (T, Y, X[, C]).
        InvalidTypeError: If its dtype is no integer.
    """
    shape = tuple(segmentation.shape)
    if len(shape) != 3:
        raise InvalidInputError(f"The segmentation must have the shape (T, Y, X), but has {shape}.")
    if np.dtype(segmentation.dtype).kind not in "ui":
        raise InvalidTypeError(f"The segmentation must have an integer dtype, but has {segmentation.dtype}.")
    if timeseries is None:
        return
    images = tuple(timeseries.shape)
    if images[:3] != shape or len(images) > 4:
        raise InvalidInputError(
            f"The time series must have the shape (T, Y, X) or (T, Y, X, C) with the T, Y and X of the segmentation, "
            f"{shape}, but has {images}."
        )


def find_objects(frame: np.ndarray) -> FrameObjects:
    """Find the objects of a label image (Y, X).

    Raises:
        InvalidInputError: If there are negative labels.
    """
    y, x = np.nonzero(frame)
    labels, index, areas = np.unique(frame[y, x], return_inverse=True, return_counts=True)
    if len(labels) and labels[0] < 0:
        raise InvalidInputError("A label image must not have negative labels; 0 is background.")
    sums = np.stack([np.bincount(index, weights=values, minlength=len(labels)) for values in (y, x)], axis=1)
    return FrameObjects(labels.astype(np.int64), sums / np.maximum(areas, 1)[:, None], areas.astype(np.int64))


def find_overlaps(
    first: np.ndarray, second: np.ndarray, first_objects: FrameObjects, second_objects: FrameObjects
) -> Overlaps:
    """Find the objects of two label images (Y, X) that share pixels."""
    both = (first != 0) & (second != 0)
    i = np.searchsorted(first_objects.labels, first[both].astype(np.int64))
    j = np.searchsorted(second_objects.labels, second[both].astype(np.int64))
    n = max(len(second_objects), 1)
    pairs, counts = np.unique(i * n + j, return_counts=True)
    return Overlaps(pairs // n, pairs % n, counts)


def scan_steps(segmentation) -> Steps[Scan]:
    """Read a series of label images (T, Y, X) frame by frame. Yields `Step`, returns the `Scan`."""
    scan, last, total = Scan([], []), None, segmentation.shape[0]
    for t in range(total):
        yield Step(t, total, "Find objects")
        frame = read_frame(segmentation, t)
        scan.objects.append(find_objects(frame))
        if last is not None:
            scan.overlaps.append(find_overlaps(last, frame, *scan.objects[-2:]))
        last = frame
    yield Step(total, total, "Find objects")
    return scan
