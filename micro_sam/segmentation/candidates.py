"""The candidate masks that a grid of points gives for a crop of an image, evaluated only as far as they are needed.

A candidate is kept as the part of its low-resolution logits that can reach the threshold. Only when it is asked for
it is upsampled, in that window, and from then on kept as run lengths. Most candidates are dropped by their predicted
IoU alone and are never upsampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.utils.amg import MaskData

from ..core import rle
from ..core.errors import InvalidInputError
from ..core.masks import BoxedMask, crop_mask
from ..models.mask_upsampling import MaskUpsampler, PredictedMask, Support

# Logits that are kept unevaluated, in bytes, over all crops.
LAZY_BYTES = 2**30


@dataclass(frozen=True)
class Measures:
    """Of N candidates: `boxes` int (N, 4) in the crop (x0, y0, x1, y1 of the outermost pixels; zeros if the mask is
    empty), `stability` (N,) and `area` (N,) in pixels."""

    boxes: np.ndarray
    stability: np.ndarray
    area: np.ndarray


@dataclass(frozen=True)
class _Evaluated:
    """A mask as run lengths within its bounding box."""

    origin: tuple[int, int]
    shape: tuple[int, int]
    counts: np.ndarray
    area: int
    stability: float

    @classmethod
    def create(cls, mask: PredictedMask) -> "_Evaluated":
        counts = rle.encode(mask.mask).astype(np.int32)
        return cls(mask.origin, mask.mask.shape, counts, mask.area, mask.stability)

    @property
    def box(self) -> tuple[int, int, int, int]:
        (y, x), (h, w) = self.origin, self.shape
        return (x, y, x + w - 1, y + h - 1) if self.area else (0, 0, 0, 0)

    @property
    def mask(self) -> np.ndarray:
        return rle.decode(self.counts, self.shape)


class PredictedCandidates:
    """Candidates of one crop, from the mask decoder.

    Args:
        crop_box: The crop (x0, y0, x1, y1), half-open, in pixels of the image.
        upsampler: For the logits of the crop.
        threshold: Logits above it are foreground.
        offset: The change of the threshold for the stability score.
    """

    def __init__(self, crop_box: Sequence[int], upsampler: MaskUpsampler, threshold: float, offset: float):
        self.crop_box = [int(c) for c in crop_box]
        self.n_bytes = 0
        self._upsampler, self._threshold, self._offset = upsampler, threshold, offset
        self._points, self._ious = [np.zeros((0, 2), np.float32)], [np.zeros(0, np.float32)]
        self._candidates: list[Support | _Evaluated | None] = []

    def add(self, points: np.ndarray, logits: torch.Tensor, ious: torch.Tensor, lazy: bool) -> None:
        """Add the candidates of a batch of points.

        Args:
            points: Points (B, 2) in the crop, x first.
            logits: Low-resolution logits (B, M, h, w).
            ious: Predicted IoUs (B, M).
            lazy: Whether to leave the evaluation for later.
        """
        n_masks = ious.shape[1]
        self._points.append(np.repeat(points, n_masks, axis=0).astype(np.float32))
        self._ious.append(ious.flatten().float().cpu().numpy())
        logits = logits.flatten(0, 1)
        thresholds = torch.full((len(logits),), self._threshold, device=logits.device)
        for support in self._upsampler.supports(logits, thresholds, self._offset):
            if support is not None and lazy:
                # A copy, so that the logits of the whole batch are not kept alive.
                support = Support(support.pixels, support.reach, support.logits.clone())
                self.n_bytes += support.logits.nbytes
            self._candidates.append(support if lazy else self._evaluated(support))

    def _evaluated(self, support: Support | None) -> _Evaluated:
        return _Evaluated.create(self._upsampler.mask(support, self._threshold, self._offset))

    def _get(self, k: int) -> _Evaluated:
        candidate = self._candidates[k]
        if not isinstance(candidate, _Evaluated):
            self.n_bytes -= 0 if candidate is None else candidate.logits.nbytes
            candidate = self._candidates[k] = self._evaluated(candidate)
        return candidate

    @property
    def ious(self) -> np.ndarray:
        """Predicted IoUs (N,)."""
        return np.concatenate(self._ious)

    @property
    def points(self) -> np.ndarray:
        """The point (x, y) of each candidate, (N, 2), in the crop."""
        return np.concatenate(self._points)

    def measure(self, index: np.ndarray) -> Measures:
        """Evaluate some candidates."""
        masks = [self._get(k) for k in index.tolist()]
        return Measures(
            np.array([m.box for m in masks], dtype=np.int32).reshape(-1, 4),
            np.array([m.stability for m in masks], dtype=np.float32), np.array([m.area for m in masks], dtype=np.int64),
        )

    def mask(self, k: int) -> BoxedMask:
        """The mask of a candidate in the image."""
        candidate = self._get(k)
        x, y = self.crop_box[:2]
        return BoxedMask(candidate.origin[0] + y, candidate.origin[1] + x, candidate.mask, candidate.area)

    def to_mask_data(self, shape: tuple[int, int]) -> MaskData:
        """Evaluate all candidates, with run lengths in the whole image of a shape (Y, X)."""
        measures = self.measure(np.arange(len(self._candidates)))
        masks = [self.mask(k) for k in range(len(self._candidates))]
        return MaskData(
            iou_preds=torch.from_numpy(self.ious), points=torch.from_numpy(self.points),
            stability_score=torch.from_numpy(measures.stability), boxes=torch.from_numpy(measures.boxes),
            rles=[
                {"size": list(shape), "counts": rle.encode_in_plane(m.mask, (m.y0, m.x0), shape).tolist()}
                for m in masks
            ],
        )


class RestoredCandidates:
    """Candidates of one crop from a state (see `AMGBase.get_state`); the same interface as `PredictedCandidates`.

    Raises:
        InvalidInputError: If the data do not fit together.
    """

    _KEYS = ("iou_preds", "points", "stability_score", "boxes", "rles")

    def __init__(self, crop_box: Sequence[int], data: MaskData | Mapping, shape: tuple[int, int]):
        self.crop_box = [int(c) for c in crop_box]
        content = dict(data.items())
        lengths = {key: len(content[key]) if key in content else None for key in self._KEYS}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise InvalidInputError(
                f"A crop of the state must hold {list(self._KEYS)}, all of the same length, but has {lengths}."
            )
        self.ious = np.asarray(content["iou_preds"], dtype=np.float32)
        self.points = np.asarray(content["points"], dtype=np.float32).reshape(-1, 2)
        self._boxes = np.asarray(content["boxes"], dtype=np.int32).reshape(-1, 4)
        self._stability = np.asarray(content["stability_score"], dtype=np.float32)
        self._rles = list(content["rles"])
        if any(tuple(r["size"]) != tuple(shape) for r in self._rles):
            raise InvalidInputError(f"The masks of the state are not all of the shape {tuple(shape)} of its image.")

    def measure(self, index: np.ndarray) -> Measures:
        """Measures of some candidates."""
        area = np.array([rle.area(self._rles[k]["counts"]) for k in index.tolist()], dtype=np.int64)
        return Measures(self._boxes[index], self._stability[index], area)

    def mask(self, k: int) -> BoxedMask:
        """The mask of a candidate in the image."""
        return crop_mask(rle.decode(self._rles[k]["counts"], self._rles[k]["size"]))

    def to_mask_data(self, shape: tuple[int, int]) -> MaskData:
        """The state that it was made from."""
        return MaskData(
            iou_preds=torch.from_numpy(self.ious), points=torch.from_numpy(self.points),
            stability_score=torch.from_numpy(self._stability), boxes=torch.from_numpy(self._boxes), rles=self._rles,
        )


Candidates = PredictedCandidates | RestoredCandidates
