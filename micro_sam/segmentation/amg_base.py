"""Choosing among candidate masks: filters, suppression of duplicates, cleaning, and the output of mask generators."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from segment_anything.utils.amg import MaskData, is_box_near_crop_edge
from torchvision.ops import nms

from ..core import rle
from ..core.errors import InvalidInputError, NotInitializedError
from ..core.labels import mask_data_to_segmentation
from ..core.masks import BoxedMask, crop_mask
from .candidates import Candidates, RestoredCandidates

Record = dict[str, Any]
OUTPUT_MODES = ("instance_segmentation", "binary_mask", "rle", "coco_rle")


@dataclass(frozen=True)
class _Chosen:
    """A candidate that passed the filters; `mask` is only there if it was changed afterwards."""

    candidates: Candidates
    k: int
    box: tuple[float, float, float, float]
    stability: float
    mask: BoxedMask | None = None

    def get_mask(self) -> BoxedMask:
        return self.candidates.mask(self.k) if self.mask is None else self.mask


class AMGBase(ABC):
    """What all mask generators share: they choose from candidates, which `initialize` computes.

    Settings of `generate` can be varied without computing anything twice; it never changes what is remembered.
    """

    def __init__(self) -> None:
        self.clear_state()

    @abstractmethod
    def initialize(self, image: np.ndarray, *args, **kwargs) -> None:
        """Compute the candidates of an image."""

    @property
    def is_initialized(self) -> bool:
        """Whether there is something to generate from."""
        return self._crops is not None

    @property
    def crop_list(self) -> list[MaskData]:
        """The candidates of each crop, see `get_state`."""
        return self.get_state()["crop_list"]

    @property
    def crop_boxes(self) -> list[list[int]]:
        """The box [x0, y0, x1, y1] of each crop (or tile with halo) in pixels, half-open."""
        self._check_initialized()
        return [list(crop.crop_box) for crop in self._crops]

    @property
    def original_size(self) -> tuple[int, int]:
        """Shape (Y, X) of the image."""
        self._check_initialized()
        return self._original_size

    def _check_initialized(self) -> None:
        if not self.is_initialized:
            raise NotInitializedError(f"{type(self).__name__} is not initialized. Call initialize(image) first.")

    def get_state(self) -> dict[str, Any]:
        """Return what `initialize` computed, with all masks evaluated.

        Returns:
            `original_size` (Y, X); `crop_boxes`; and `crop_list`, for each crop a `MaskData` with `iou_preds` (N,),
            `points` (N, 2) (x, y in the crop), `stability_score` (N,), `boxes` (N, 4) (x0, y0, x1, y1 in the crop, the
            outermost pixels) and `rles`, N uncompressed run lengths in the whole image.

        Raises:
            NotInitializedError: If `initialize` was not called.
        """
        self._check_initialized()
        return {
            "crop_list": [crop.to_mask_data(self._original_size) for crop in self._crops],
            "crop_boxes": self.crop_boxes, "original_size": self._original_size,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, so that `generate` can be called.

        Args:
            state: What `get_state` returned.

        Raises:
            InvalidInputError: If something is missing or does not fit together.
        """
        missing = [name for name in ("crop_list", "crop_boxes", "original_size") if name not in state]
        if missing:
            raise InvalidInputError(f"The state lacks {missing}: pass what get_state returned.")
        crops, boxes = state["crop_list"], state["crop_boxes"]
        if len(crops) != len(boxes):
            raise InvalidInputError(f"The state has {len(crops)} crops, but {len(boxes)} boxes of crops.")
        shape = tuple(int(s) for s in state["original_size"])
        self._crops = [RestoredCandidates(box, crop, shape) for box, crop in zip(boxes, crops)]
        self._original_size = shape

    def clear_state(self) -> None:
        """Forget what `initialize` computed."""
        self._crops: list[Candidates] | None = None
        self._original_size: tuple[int, int] | None = None

    def generate(
        self,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        box_nms_thresh: float = 0.7,
        crop_nms_thresh: float = 0.7,
        min_mask_region_area: int = 0,
        output_mode: str = "instance_segmentation",
        with_background: bool = True,
    ) -> list[Record] | np.ndarray:
        """Choose masks from the candidates.

        Args:
            pred_iou_thresh: Masks must have a predicted IoU above this; 0 keeps all.
            stability_score_thresh: Masks must have at least this stability, which is the ratio of their areas for a
                threshold that is higher and one that is lower by `stability_score_offset`; 0 keeps all.
            box_nms_thresh: Of masks whose boxes overlap by more than this (IoU), the one with the highest predicted
                IoU stays.
            crop_nms_thresh: The same between crops (or tiles), where the smaller crop is preferred.
            min_mask_region_area: Holes and separate parts of masks smaller than this, in pixels, are filled and
                removed; 0 for none.
            output_mode: `instance_segmentation` for labels; `binary_mask`, `rle` or `coco_rle` for records with bool
                masks, uncompressed run lengths, or the compressed ones of COCO.
            with_background: Whether to remove the largest object if it is the background, segmented like an object.

        Returns:
            Labels uint32 (Y, X) with 0 for background, where smaller masks are painted over larger ones; or records
            with `segmentation`, `area` in pixels, `bbox` [x, y, width, height] in pixels, `predicted_iou`,
            `stability_score`, `crop_box` [x, y, width, height] and `point_coords` [[x, y]].

        Raises:
            NotInitializedError: If `initialize` was not called.
            InvalidInputError: For an unknown output mode.
        """
        self._check_initialized()
        if output_mode not in OUTPUT_MODES:
            raise InvalidInputError(f"output_mode must be one of {OUTPUT_MODES}, but is {output_mode!r}.")
        chosen: list[_Chosen] = []
        for crop in self._crops:
            chosen += self._choose(crop, pred_iou_thresh, stability_score_thresh, box_nms_thresh)
        if len(self._crops) > 1:
            chosen = _suppress(chosen, [1 / _area(c.candidates.crop_box) for c in chosen], crop_nms_thresh)
        if min_mask_region_area > 0:
            chosen = self._clean(chosen, min_mask_region_area, max(box_nms_thresh, crop_nms_thresh))

        if output_mode == "instance_segmentation":
            records = [_painting_record(c.get_mask()) for c in chosen]
            return mask_data_to_segmentation(
                records, shape=self._original_size, with_background=with_background, merge_exclusively=False
            )
        return [self._record(c, output_mode) for c in chosen]

    def _choose(self, crop: Candidates, iou_thresh: float, stability_thresh: float, nms_thresh: float) -> list[_Chosen]:
        """Filter and suppress within a crop; ordered by predicted IoU."""
        ious = crop.ious
        index = np.flatnonzero(ious > iou_thresh) if iou_thresh > 0 else np.arange(len(ious))
        measures = crop.measure(index)
        keep = measures.area > 0
        if stability_thresh > 0:
            keep &= measures.stability >= stability_thresh
        height, width = self._original_size
        boxes = torch.from_numpy(measures.boxes).float()
        keep &= ~is_box_near_crop_edge(boxes, crop.crop_box, [0, 0, width, height]).numpy()
        origin = np.tile(crop.crop_box[:2], 2)
        chosen = [
            _Chosen(crop, int(index[n]), tuple((measures.boxes[n] + origin).tolist()), float(measures.stability[n]))
            for n in np.flatnonzero(keep)
        ]
        return _suppress(chosen, [ious[c.k] for c in chosen], nms_thresh)

    def _clean(self, chosen: list[_Chosen], min_area: int, nms_thresh: float) -> list[_Chosen]:
        """Remove small holes and parts; of masks that became alike, one that was not changed stays."""
        cleaned, scores = [], []
        for c in chosen:
            original = c.get_mask()
            plane = _paste(original, self._original_size)
            plane, no_hole = _remove_small_regions(plane, min_area, "holes")
            plane, no_island = _remove_small_regions(plane, min_area, "islands")
            mask = original if no_hole and no_island else crop_mask(plane)
            y0, x0, y1, x1 = mask.box
            cleaned.append(_Chosen(c.candidates, c.k, (x0, y0, x1 - 1, y1 - 1), c.stability, mask))
            scores.append(float(no_hole and no_island))
        return _suppress(cleaned, scores, nms_thresh)

    def _record(self, chosen: _Chosen, output_mode: str) -> Record:
        mask, crop = chosen.get_mask(), chosen.candidates
        x0, y0, x1, y1 = crop.crop_box
        if output_mode == "binary_mask":
            segmentation = _paste(mask, self._original_size)
        else:
            counts = rle.encode_in_plane(mask.mask, (mask.y0, mask.x0), self._original_size)
            counts = rle.compress(counts) if output_mode == "coco_rle" else counts.tolist()
            segmentation = {"size": list(self._original_size), "counts": counts}
        height, width = mask.mask.shape
        return {
            "segmentation": segmentation, "area": mask.area, "bbox": [mask.x0, mask.y0, width, height],
            "predicted_iou": float(crop.ious[chosen.k]), "stability_score": chosen.stability,
            "crop_box": [x0, y0, x1 - x0, y1 - y0], "point_coords": [(crop.points[chosen.k] + (x0, y0)).tolist()],
        }


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _suppress(chosen: list[_Chosen], scores: Iterable[float], threshold: float) -> list[_Chosen]:
    """Non-maximum suppression by boxes; ordered by score."""
    boxes = torch.tensor([c.box for c in chosen], dtype=torch.float).reshape(-1, 4)
    kept = nms(boxes, torch.tensor(list(scores), dtype=torch.float), threshold)
    return [chosen[n] for n in kept.tolist()]


def _paste(mask: BoxedMask, shape: tuple[int, int]) -> np.ndarray:
    plane = np.zeros(shape, dtype=bool)
    y0, x0, y1, x1 = mask.box
    plane[y0:y1, x0:x1] = mask.mask
    return plane


def _painting_record(mask: BoxedMask) -> Record:
    """A record for merging that holds only the box of a mask."""
    height, width = mask.mask.shape
    return {
        "segmentation": mask.mask, "area": mask.area, "bbox": [0, 0, width, height],
        "global_bbox": [mask.x0, mask.y0, width, height],
    }


def _remove_small_regions(mask: np.ndarray, min_area: int, what: str) -> tuple[np.ndarray, bool]:
    """Fill 8-connected `holes`, or remove `islands`, smaller than an area; the largest island always stays.

    Returns:
        The mask, and whether there was nothing to do.
    """
    regions, n = ndimage.label(mask != (what == "holes"), structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=n + 1)[1:]
    small = sizes < min_area
    if not small.any():
        return mask, True
    if what == "islands" and small.all():
        small[sizes.argmax()] = False
    is_small = np.r_[False, small][regions]
    return (mask | is_small if what == "holes" else mask & ~is_small), False
