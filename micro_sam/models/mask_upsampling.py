"""From low-resolution mask logits to masks at image size, only where the mask can be.

SAM resizes logits bilinearly to its canvas, cuts off the padding and resizes them bilinearly to the image. Both
steps are linear and separable, so together they are one small matrix per axis; and each output value is a convex
combination of logits, so nothing can exceed a threshold where all logits in reach are below it. Masks are therefore
evaluated in a window around their support, with the same values as SAM's up to float rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# Logits this far below a threshold cannot exceed it by rounding.
_MARGIN = 1e-3


@dataclass(frozen=True)
class PredictedMask:
    """A mask cropped to its bounding box, on the host.

    `origin` (y, x) is the first pixel of `mask` (bool, (h, w)) in the image; an empty mask has the shape (0, 0).
    `stability` is the ratio of the areas at threshold + offset and threshold - offset (NaN if both are 0).
    """

    origin: tuple[int, int]
    mask: np.ndarray
    area: int
    stability: float

    @property
    def bbox_xywh(self) -> list[int]:
        return [self.origin[1], self.origin[0], self.mask.shape[1], self.mask.shape[0]]

    def paste(self, shape: Sequence[int]) -> np.ndarray:
        """The mask in a full image (Y, X)."""
        full = np.zeros(shape, dtype=bool)
        (y, x), (h, w) = self.origin, self.mask.shape
        full[y:y + h, x:x + w] = self.mask
        return full


@dataclass(frozen=True)
class Support:
    """Where a mask can be: `pixels` (y, x) of the image, the `reach` (y, x) of logits they depend on, and these."""

    pixels: tuple[slice, slice]
    reach: tuple[slice, slice]
    logits: torch.Tensor


class MaskUpsampler:
    """Upsamples logits of one image.

    Args:
        low_res: Side of the logits in pixels (256 for the original models).
        canvas: Side of the model's input in pixels (1024).
        input_size: Shape (h, w) of the resized image on the canvas, without padding.
        original_size: Shape (H, W) of the image.
        device: Where the logits are.
    """

    def __init__(
        self, low_res: int, canvas: int, input_size: Sequence[int], original_size: Sequence[int],
        device: str | torch.device = "cpu",
    ):
        self.original_size = tuple(int(s) for s in original_size)
        self._matrices, self._reach = [], []
        for inner, outer in zip(input_size, self.original_size):
            matrix = resize_matrix(low_res, canvas, int(inner), outer)
            used = (matrix != 0).numpy()
            # First and last logit that each pixel depends on; both grow with the pixel.
            self._reach.append((used.argmax(1), low_res - 1 - used[:, ::-1].argmax(1)))
            self._matrices.append(matrix.to(device))

    def masks(self, logits: torch.Tensor, thresholds: torch.Tensor, offset: float = 1.0) -> list[PredictedMask]:
        """Threshold upsampled logits.

        Args:
            logits: Low-resolution logits (N, h, w).
            thresholds: One threshold per mask (N,).
            offset: The change of the threshold for the stability score.

        Returns:
            The masks `upsampled > threshold`.
        """
        supports = self.supports(logits, thresholds, offset)
        return [self.mask(support, threshold, offset) for support, threshold in zip(supports, thresholds.tolist())]

    def supports(
        self, logits: torch.Tensor, thresholds: torch.Tensor, offset: float = 1.0
    ) -> list[Support | None]:
        """Find where masks can be, without upsampling anything; arguments as for `masks`.

        Returns:
            What `mask` needs for each mask. It refers to `logits`; None if the mask is certainly empty.
        """
        return [
            None if window is None else self._support(mask, window)
            for mask, window in zip(logits, _windows(logits, thresholds - offset - _MARGIN))
        ]

    def _support(self, logits: torch.Tensor, window) -> Support | None:
        pixels, reach = [], []
        for (low, high), (first, last) in zip(window, self._reach):
            start = int(np.searchsorted(last, low, side="left"))
            stop = int(np.searchsorted(first, high, side="right"))
            if start >= stop:
                return None  # in the padding
            pixels.append(slice(start, stop))
            reach.append(slice(int(first[start]), int(last[stop - 1]) + 1))
        return Support(tuple(pixels), tuple(reach), logits[tuple(reach)])

    def mask(self, support: Support | None, threshold: float, offset: float = 1.0) -> PredictedMask:
        """Upsample and threshold the logits of one mask; arguments as for `masks`."""
        if support is None:
            return PredictedMask((0, 0), np.zeros((0, 0), dtype=bool), 0, float("nan"))
        (y, x), (from_y, from_x) = support.pixels, support.reach
        rows, columns = self._matrices
        values = rows[y, from_y] @ (support.logits @ columns[x, from_x].T)
        values = values.cpu().numpy()
        union = int(np.count_nonzero(values > threshold - offset))
        stability = np.count_nonzero(values > threshold + offset) / union if union else float("nan")
        mask = values > threshold
        in_rows, in_columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if len(in_rows) == 0:
            return PredictedMask((0, 0), np.zeros((0, 0), dtype=bool), 0, stability)
        top, left = int(in_rows[0]), int(in_columns[0])
        mask = mask[top:in_rows[-1] + 1, left:in_columns[-1] + 1].copy()
        return PredictedMask((y.start + top, x.start + left), mask, int(np.count_nonzero(mask)), stability)


def resize_matrix(low_res: int, canvas: int, inner: int, outer: int) -> torch.Tensor:
    """Matrix (outer, low_res) of the two resizing steps along one axis."""
    rows = torch.eye(low_res)[None]
    rows = F.interpolate(rows, canvas, mode="linear", align_corners=False)[..., :inner]
    return F.interpolate(rows, outer, mode="linear", align_corners=False)[0].T.contiguous()


def _windows(logits: torch.Tensor, thresholds: torch.Tensor):
    """For each mask ((y0, y1), (x0, x1)), inclusive, of the logits above the threshold, or None if there are none."""
    above = logits > thresholds[:, None, None]
    limits = []
    for axis in (2, 1):
        line = above.any(dim=axis).cpu().numpy()
        limits.append((line.any(1), line.argmax(1), line.shape[1] - 1 - line[:, ::-1].argmax(1)))
    (present, top, bottom), (_, left, right) = limits
    return [
        ((int(top[k]), int(bottom[k])), (int(left[k]), int(right[k]))) if present[k] else None
        for k in range(len(logits))
    ]
