"""Binary masks as tight crops with an origin: reading SAM-style records, suppressing duplicates, painting.

A mask of one object covers a tiny part of a plane. `BoxedMask` keeps just that part, so that comparing and painting
N masks costs the area of the objects instead of N full planes. All boxes are half-open and in pixels; `y0, x0` is
the position of the crop in the plane.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InvalidInputError, InvalidTypeError


@dataclass(frozen=True, eq=False)
class BoxedMask:
    """A mask (h, w), bool, cropped to its pixels; (y0, x0) is its position in the plane; `area` counts pixels."""

    y0: int
    x0: int
    mask: np.ndarray
    area: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Half-open box (y0, x0, y1, x1)."""
        return self.y0, self.x0, self.y0 + self.mask.shape[0], self.x0 + self.mask.shape[1]


def as_bool_array(mask: Any) -> np.ndarray:
    """Return a mask (numpy array or torch tensor, (H, W) or (1, H, W)) as a bool array (H, W).

    Raises:
        InvalidTypeError: If the dtype is neither bool nor integer.
        InvalidInputError: If it is not a plane.
    """
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy()
    mask = np.asarray(mask)
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise InvalidInputError(f"A mask must have the shape (H, W), but got {mask.shape}. Pass one mask per record.")
    if mask.dtype.kind not in "bui":
        raise InvalidTypeError(f"A mask must be bool, but got {mask.dtype}. Threshold it first.")
    return mask if mask.dtype == bool else mask != 0


def crop_mask(mask: np.ndarray, origin: tuple[int, int] = (0, 0), hint: Sequence[int] | None = None) -> BoxedMask:
    """Crop a bool mask (H, W) to its pixels.

    Args:
        mask: The mask.
        origin: Position (y, x) of the mask in the plane.
        hint: A box [x, y, w, h] in which the pixels are expected. It only saves time: it is checked, and whether
            its extents are inclusive or exclusive does not matter.

    Returns:
        The crop; of an empty mask one of shape (0, 0).
    """
    y0, x0 = 0, 0
    if hint is not None:
        x, y, w, h = (int(v) for v in hint)
        y, x = max(y, 0), max(x, 0)
        window = mask[y:y + h + 1, x:x + w + 1]
        if np.count_nonzero(window) == np.count_nonzero(mask):
            mask, y0, x0 = window, y, x
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return BoxedMask(int(origin[0]), int(origin[1]), np.zeros((0, 0), dtype=bool), 0)
    mask = mask[rows[0]:rows[-1] + 1]
    columns = np.flatnonzero(mask.any(axis=0))
    mask = np.ascontiguousarray(mask[:, columns[0]:columns[-1] + 1])
    y0, x0 = int(origin[0]) + y0 + int(rows[0]), int(origin[1]) + x0 + int(columns[0])
    return BoxedMask(y0, x0, mask, int(np.count_nonzero(mask)))


def read_record(record: Mapping[str, Any]) -> tuple[BoxedMask, tuple[int, int]]:
    """Crop the mask of a SAM-style record and return it with the end (y, x) of the record's plane.

    A record with `global_bbox` holds the mask of a tile (or any crop), whose origin in the plane is
    `global_bbox[:2] - bbox[:2]`, x first. The end is the origin plus the shape of the tile's mask.
    """
    if "segmentation" not in record:
        raise InvalidInputError(f"A mask record needs the key 'segmentation', but has only {sorted(record)}.")
    mask = as_bool_array(record["segmentation"])
    bbox, global_bbox = record.get("bbox"), record.get("global_bbox")
    origin = (0, 0)
    if global_bbox is not None:
        if bbox is None:
            raise InvalidInputError("A record with 'global_bbox' needs 'bbox' too: their difference places the tile.")
        origin = tuple(int(round(float(global_bbox[k]) - float(bbox[k]))) for k in (1, 0))
    end = (origin[0] + mask.shape[0], origin[1] + mask.shape[1])
    return crop_mask(mask, origin, bbox), end


def intersection(a: BoxedMask, b: BoxedMask) -> int:
    """Number of common pixels of two masks."""
    y0, x0 = max(a.y0, b.y0), max(a.x0, b.x0)
    y1 = min(a.y0 + a.mask.shape[0], b.y0 + b.mask.shape[0])
    x1 = min(a.x0 + a.mask.shape[1], b.x0 + b.mask.shape[1])
    if y1 <= y0 or x1 <= x0:
        return 0
    common = a.mask[y0 - a.y0:y1 - a.y0, x0 - a.x0:x1 - a.x0] & b.mask[y0 - b.y0:y1 - b.y0, x0 - b.x0:x1 - b.x0]
    return int(np.count_nonzero(common))


class _BoxIndex:
    """Finds the boxes that overlap a box, by a grid of cells; boxes of many cells are kept in a list of their own."""

    _MAX_CELLS = 64

    def __init__(self, cell: int):
        self._cell = max(int(cell), 1)
        self._cells: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._large: list[int] = []
        self._boxes: dict[int, tuple[int, int, int, int]] = {}

    def _touched(self, box):
        y0, x0, y1, x1 = box
        c = self._cell
        rows, columns = range(y0 // c, (y1 - 1) // c + 1), range(x0 // c, (x1 - 1) // c + 1)
        if len(rows) * len(columns) > self._MAX_CELLS:
            return None
        return [(r, k) for r in rows for k in columns]

    def add(self, index: int, box: tuple[int, int, int, int]) -> None:
        cells = self._touched(box)
        self._boxes[index] = box
        if cells is None:
            self._large.append(index)
            return
        for cell in cells:
            self._cells[cell].append(index)

    def overlapping(self, box: tuple[int, int, int, int]) -> list[int]:
        cells = self._touched(box)
        if cells is None:
            found = list(self._boxes)
        else:
            found = set(self._large)
            for cell in cells:
                found.update(self._cells.get(cell, ()))
        y0, x0, y1, x1 = box
        boxes = self._boxes
        return sorted(
            i for i in found
            if boxes[i][0] < y1 and y0 < boxes[i][2] and boxes[i][1] < x1 and x0 < boxes[i][3]
        )


def order_by_score(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Indices by descending score; ties keep their order, NaN comes last."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")


def suppress_masks(
    masks: Sequence[BoxedMask],
    scores: Sequence[float],
    threshold: float,
    intersection_over_min: bool = False,
    use_boxes: bool = False,
) -> list[int]:
    """Greedy non-maximum suppression: visit masks by descending score, drop those that overlap a kept one too much.

    Args:
        masks: The masks; empty ones overlap nothing.
        scores: One score per mask; ties are visited in their order.
        threshold: A mask is dropped if its overlap with a kept mask is larger than this.
        intersection_over_min: Divide the intersection by the smaller area instead of by the union.
        use_boxes: Compare the boxes of the masks instead of their pixels.

    Returns:
        Indices of the kept masks, by descending score.
    """
    sides = [side for m in masks for side in m.mask.shape]
    index = _BoxIndex(cell=max(16, round(float(np.mean(sides))) if sides else 16))
    kept = []
    for i in order_by_score(scores).tolist():
        a = masks[i]
        if a.area and any(
            _overlap(a, masks[j], threshold, intersection_over_min, use_boxes) > threshold
            for j in index.overlapping(a.box)
        ):
            continue
        kept.append(i)
        if a.area:
            index.add(i, a.box)
    return kept


def _overlap(a: BoxedMask, b: BoxedMask, threshold: float, over_min: bool, use_boxes: bool) -> float:
    area_a, area_b = (a.mask.size, b.mask.size) if use_boxes else (a.area, b.area)
    smaller, larger = min(area_a, area_b), max(area_a, area_b)
    if not over_min and smaller <= threshold * larger:
        return 0.0  # the intersection over union is at most the ratio of the areas
    if use_boxes:
        (ay0, ax0, ay1, ax1), (by0, bx0, by1, bx1) = a.box, b.box
        common = max(min(ay1, by1) - max(ay0, by0), 0) * max(min(ax1, bx1) - max(ax0, bx0), 0)
    else:
        common = intersection(a, b)
    return common / (smaller if over_min else area_a + area_b - common)


def paint_masks(
    shape: tuple[int, int], masks: Sequence[BoxedMask], labels: Sequence[int], exclusive: bool
) -> np.ndarray:
    """Paint masks into a new label image, in their order.

    Args:
        shape: Shape (H, W) of the plane; parts of masks outside of it are cut off.
        masks: The masks.
        labels: One positive label per mask.
        exclusive: Whether a mask only takes pixels that are still empty; otherwise it paints over earlier ones.

    Returns:
        Label image uint32 (H, W), 0 is background.
    """
    out = np.zeros(shape, dtype=np.uint32)
    for m, label in zip(masks, labels):
        y0, x0, y1, x1 = m.box
        cut_y, cut_x = max(-y0, 0), max(-x0, 0)
        y1, x1 = min(y1, shape[0]), min(x1, shape[1])
        window = out[y0 + cut_y:y1, x0 + cut_x:x1] if y1 > y0 + cut_y and x1 > x0 + cut_x else None
        if window is None:
            continue
        mask = m.mask[cut_y:cut_y + window.shape[0], cut_x:cut_x + window.shape[1]]
        if exclusive:
            mask = mask & (window == 0)
        np.copyto(window, label, where=mask)
    return out


def to_float(value: Any) -> float:
    """Read a number that may be a tensor of one element; None counts as NaN."""
    return math.nan if value is None else float(value)
