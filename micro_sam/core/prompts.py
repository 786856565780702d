"""Prompts from boxes, masks, polygons and scribbles. Numpy only; coordinates are (y, x) in pixels.

Models take (x, y): the functions that talk to a model convert with `core.tiling`, nothing here does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.feature import peak_local_max
from skimage.segmentation import find_boundaries

from .errors import InvalidInputError

# The logit of a pixel that a mask prompt calls foreground (probability 0.999); background has the negative.
MASK_LOGIT = math.log(0.999 / 0.001)


def check_points(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points as float array (N, 2) and labels as int array (N,), or raise `InvalidInputError`."""
    points, labels = np.asarray(points, dtype=float), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or not np.isfinite(points).all():
        raise InvalidInputError(
            f"Points must be finite coordinates (N, 2) in the order (y, x) with N >= 1, but got {points.shape}."
        )
    if labels.shape != (len(points),) or not np.isin(labels, (0, 1)).all():
        raise InvalidInputError(
            f"There must be one label, 1 (object) or 0 (background), for each of the {len(points)} points, "
            f"but got {labels.tolist()!r}."
        )
    return points, labels.astype(int)


def extend_box(box: Sequence[float], shape: Sequence[int], box_extension: float = 0.0) -> np.ndarray:
    """Grow a box, clip it to the image and round it.

    Args:
        box: Half-open box [y0, x0, y1, x1] in pixels.
        shape: Shape (Y, X) of the image.
        box_extension: 0 for none; below 1 the fraction of its own side length by which each side moves outwards;
            from 1 on the number of pixels.

    Returns:
        The box [y0, x0, y1, x1] as integers (half to even).

    Raises:
        InvalidInputError: If it is not a box, lies outside of the image, or the extension is negative.
    """
    corners = np.asarray(box, dtype=float)
    if corners.shape != (4,) or not np.isfinite(corners).all() or (corners[2:] < corners[:2]).any():
        raise InvalidInputError(f"A box must be [y0, x0, y1, x1] with y0 <= y1 and x0 <= x1, but got {box!r}.")
    if not box_extension >= 0:
        raise InvalidInputError(
            f"box_extension must be a fraction of the box, or a number of pixels from 1 on, but got {box_extension!r}."
        )
    margin = (corners[2:] - corners[:2]) * box_extension if box_extension < 1 else np.full(2, float(box_extension))
    limits = np.asarray(shape[:2], dtype=float)
    corners = np.concatenate([corners[:2] - margin, corners[2:] + margin])
    if (corners[2:] < 0).any() or (corners[:2] > limits).any():
        raise InvalidInputError(f"The box {box!r} (y0, x0, y1, x1) lies outside of the image of shape {shape}.")
    return np.rint(np.clip(corners, 0, np.tile(limits, 2))).astype(int)


def binary_mask(mask: np.ndarray) -> np.ndarray:
    """Return the boolean foreground of a mask prompt (Y, X).

    Foreground is where the mask is 1 (or True). A mask that has one other value besides 0, for example 255 or the
    id of an object, is understood as well.

    Raises:
        InvalidInputError: If the mask is not two-dimensional, or several values could be meant.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise InvalidInputError(f"A mask prompt must have the shape (Y, X), but has {mask.shape}.")
    if mask.dtype == bool:
        return mask
    foreground = mask == 1
    if foreground.any():
        return foreground
    foreground = mask != 0
    values = np.unique(mask[foreground])
    if len(values) > 1:
        raise InvalidInputError(
            f"The mask prompt has the values {values[:5].tolist()}: pass the mask of one object, `labels == id`."
        )
    return foreground


def mask_scale(mask_shape: Sequence[int], original_size: Sequence[int] | None) -> float:
    """Factor from mask pixels to image pixels, for masks at low resolution (padded to a square or not)."""
    return 1.0 if original_size is None else max(original_size[:2]) / max(mask_shape)


def box_from_mask(mask: np.ndarray) -> np.ndarray | None:
    """Return the half-open bounding box [y0, x0, y1, x1] of a boolean mask, or None if it is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return None
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])


def points_from_mask(
    mask: np.ndarray, box_extension: float = 0.0, single: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """Place points deep inside an object, and in the background between it and its bounding box.

    Args:
        mask: Boolean mask (Y, X).
        box_extension: Negative points are placed within the bounding box extended by this, see `extend_box`.
        single: Whether to give only the innermost point.

    Returns:
        Points (N, 2) float in (y, x), the positive ones first, and labels (N,) uint8. None for an empty mask.
    """
    box = box_from_mask(mask)
    if box is None:
        return None
    y0, x0, y1, x1 = extend_box(box, mask.shape, box_extension)
    # One more line on each side: an object that fills its box has a boundary there as well.
    crop = np.pad(mask[y0:y1, x0:x1], 1)
    distances = ndimage.distance_transform_edt(~find_boundaries(crop, mode="outer"))
    distances = ndimage.gaussian_filter(distances, sigma=1)
    inside = np.where(crop, distances, 0)
    outside = np.where(crop, 0, distances)
    outside[[0, -1]] = 0
    outside[:, [0, -1]] = 0
    innermost = np.array([np.unravel_index(np.where(crop, distances, -1).argmax(), crop.shape)])

    offset = np.array([y0 - 1, x0 - 1])
    if single:
        return (innermost + offset).astype(float), np.ones(1, dtype=np.uint8)
    positive = peak_local_max(inside, min_distance=3, exclude_border=False)
    positive = positive if len(positive) else innermost
    negative = peak_local_max(outside, min_distance=5, exclude_border=False)
    points = np.concatenate([positive, negative]) + offset
    labels = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))]).astype(np.uint8)
    return points.astype(float), labels


def logits_from_mask(mask: np.ndarray, size: int = 256) -> np.ndarray:
    """Turn a mask into the low-resolution logits that the prompt encoder takes.

    Args:
        mask: Boolean mask (Y, X) of the image, or already scaled down like it.
        size: Side of the model's mask input in pixels (a quarter of its image size).

    Returns:
        float32 array (1, size, size): the mask scaled so that its longer side is `size`, padded at the bottom
        and right, with +6.9 for foreground and -6.9 for background and padding.
    """
    scale = size / max(mask.shape)
    height, width = (int(n * scale + 0.5) for n in mask.shape)
    values = Image.fromarray(np.ascontiguousarray(mask, dtype=np.float32))
    if (width, height) != values.size:
        values = values.resize((max(width, 1), max(height, 1)), Image.Resampling.BILINEAR)
    logits = np.full((1, size, size), -MASK_LOGIT, dtype=np.float32)
    foreground = np.asarray(values) > 0.5
    logits[0, :foreground.shape[0], :foreground.shape[1]][foreground] = MASK_LOGIT
    return logits


def mask_from_polygon(polygon: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Fill a polygon.

    Args:
        polygon: Corners (N, 2) in (y, x), N >= 3; it is closed automatically and may leave the image.
        shape: Shape (Y, X) of the image.

    Returns:
        Boolean mask (Y, X).

    Raises:
        InvalidInputError: If there are fewer than three corners, or no pixel of the image is inside.
    """
    corners = np.asarray(polygon, dtype=float)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3 or not np.isfinite(corners).all():
        raise InvalidInputError(
            f"A polygon must have at least three finite corners (N, 2) in the order (y, x), but got {corners.shape}."
        )
    mask = polygon2mask(tuple(shape[:2]), corners)
    if not mask.any():
        raise InvalidInputError(
            f"No pixel of the image of shape {tuple(shape[:2])} is inside the polygon with corners from "
            f"{corners.min(axis=0).tolist()} to {corners.max(axis=0).tolist()} (y, x)."
        )
    return mask


def points_from_scribbles(
    scribbles: Sequence[np.ndarray], labels: Sequence[int], max_points: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points along scribbles.

    Args:
        scribbles: Polylines, each (N, 2) in (y, x) with N >= 1.
        labels: For each scribble 1 (object) or 0 (background).
        max_points: Largest number of points per scribble. Points are the middles of equally long pieces, at most
            one per pixel of length.

    Returns:
        Points (N, 2) float in (y, x) and labels (N,), positive ones first.

    Raises:
        InvalidInputError: For empty or malformed scribbles, labels other than 0 and 1, or `max_points` below 1.
    """
    labels = np.asarray(labels)
    if len(scribbles) == 0 or labels.shape != (len(scribbles),):
        raise InvalidInputError(
            f"There must be one label for each scribble, and at least one scribble, but got {len(scribbles)} "
            f"scribbles and labels of shape {labels.shape}."
        )
    if max_points < 1:
        raise InvalidInputError(f"max_points must be at least 1, but is {max_points}.")
    sampled = [_along(*check_points(line, np.full(len(line), label)), max_points)
               for line, label in zip(scribbles, labels)]
    order = np.argsort(1 - labels, kind="stable")
    points = np.concatenate([sampled[k] for k in order])
    return points, np.concatenate([np.full(len(sampled[k]), labels[k], dtype=int) for k in order])


def _along(line: np.ndarray, _labels: np.ndarray, max_points: int) -> np.ndarray:
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    n = min(max_points, max(int(lengths[-1]), 1))
    position = (np.arange(n) + 0.5) / n * lengths[-1]
    return np.stack([np.interp(position, lengths, line[:, axis]) for axis in range(2)], axis=1)


@dataclass(frozen=True)
class BatchedPrompts:
    """Prompts for N objects in pixels of the original image, in the model's (x, y) order.

    `boxes` float (N, 4) XYXY; `points` float (N, P, 2) XY with `labels` int (N, P), where -1 marks entries to
    ignore; `logits` float (N, 1, h, w). Absent kinds are None.
    """

    boxes: np.ndarray | None
    points: np.ndarray | None
    labels: np.ndarray | None
    logits: Any | None

    @classmethod
    def create(cls, boxes=None, points=None, point_labels=None, logits_masks=None) -> "BatchedPrompts":
        """Check user values and build the prompts.

        Raises:
            InvalidInputError: If there are neither boxes nor points, points without labels or the reverse, or
                lengths differ.
        """
        if (points is None) != (point_labels is None):
            given, missing = ("points", "point_labels") if point_labels is None else ("point_labels", "points")
            raise InvalidInputError(f"{given} were passed without {missing}. Pass both or none.")
        if points is None and boxes is None:
            raise InvalidInputError("There are no prompts: pass boxes, or points with point_labels, or both.")
        if points is not None:
            points = _batch("points", points, (-1, -1, 2))
            point_labels = np.asarray(point_labels)
            point_labels = point_labels.reshape(len(point_labels), -1) if point_labels.size else np.zeros((0, 1))
            if point_labels.shape != points.shape[:2] or not np.isin(point_labels, (-1, 0, 1)).all():
                raise InvalidInputError(
                    f"For points of shape {points.shape}, point_labels must have the shape {points.shape[:2]} and "
                    f"the values 1 (object), 0 (background) or -1 (ignore), but have {point_labels.shape}."
                )
            point_labels = point_labels.astype(int)
        if boxes is not None:
            boxes = _batch("boxes", boxes, (-1, 4))
        counts = {
            name: len(value) for name, value in
            (("boxes", boxes), ("points", points), ("logits_masks", logits_masks)) if value is not None
        }
        if len(set(counts.values())) > 1:
            raise InvalidInputError(f"All prompts must be for the same number of objects, but got {counts}.")
        return cls(boxes, points, point_labels, logits_masks)

    def __len__(self) -> int:
        return len(self.boxes if self.points is None else self.points)

    def select(self, index) -> "BatchedPrompts":
        """The prompts of some objects: `index` is a slice or an index array."""
        return BatchedPrompts(*(
            None if value is None else value[index] for value in (self.boxes, self.points, self.labels, self.logits)
        ))


def _batch(name: str, value, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value, dtype=float)
    if value.size == 0:
        return np.zeros(tuple(max(s, i) for i, s in enumerate(shape)))
    if value.ndim == len(shape) - 1 and len(shape) == 3:
        value = value[:, None]  # one point per object
    if value.ndim != len(shape) or value.shape[-1] != shape[-1] or not np.isfinite(value).all():
        axes = ", ".join("NP"[i] if s < 0 else str(s) for i, s in enumerate(shape))
        raise InvalidInputError(f"{name} must be finite and have the shape ({axes}), but have {value.shape}.")
    return value
