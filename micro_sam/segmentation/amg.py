"""Automatic mask generation (AMG): a grid of points prompts the model, filters and suppression choose among the masks.

The method is that of Kirillov et al., Segment Anything (2023), https://arxiv.org/abs/2304.02643. It needs no decoder.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from segment_anything import SamPredictor
from segment_anything.utils.amg import (
    MaskData,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
)
from torchvision.ops import nms

from .._tiled_prompting import embedding_tiling
from ..core import rle
from ..core.errors import InvalidInputError, NotInitializedError
from ..core.labels import mask_data_to_segmentation
from ..core.masks import BoxedMask, crop_mask
from ..core.normalize import to_image
from ..core.progress import Step, Steps, drain
from ..core.prompts import BatchedPrompts
from ..core.tiling import Tile
from ..embeddings.encode import ImageEmbeddings, embedding_steps, set_precomputed
from ..models.mask_upsampling import MaskUpsampler
from ..models.prompting import decode_prompts
from .candidates import LAZY_BYTES, Candidates, PredictedCandidates, RestoredCandidates
from .planes import check_plane, check_tiled_plane_index, is_blank, select_plane, tiles_to_process

Record = dict[str, Any]
OUTPUT_MODES = ("instance_segmentation", "binary_mask", "rle", "coco_rle")


@dataclass(frozen=True)
class _Crop:
    """A part of the image that is shown to the model: its box (x0, y0, x1, y1), the grid (N, 2) of points in it
    (x, y from 0 to 1), and a function that sets it in the predictor."""

    box: Sequence[int]
    grid: np.ndarray
    set_in_predictor: Callable[[], Any]


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


def _check_grids(points_per_side: int | None, point_grids, n_layers: int, downscale: int) -> list[np.ndarray]:
    """The grid of points, (N, 2) with x and y from 0 to 1, for each layer of crops."""
    if point_grids is None:
        if points_per_side is None:
            raise InvalidInputError("Pass points_per_side or point_grids: both are None.")
        if int(points_per_side) != points_per_side or points_per_side < 1:
            raise InvalidInputError(f"points_per_side must be a positive integer, but is {points_per_side!r}.")
        if points_per_side // downscale**n_layers < 1:
            raise InvalidInputError(
                f"points_per_side={points_per_side} leaves no points for layer {n_layers} of crops, which has "
                f"{downscale}**{n_layers} times fewer. Lower crop_n_points_downscale_factor or crop_n_layers."
            )
        return build_all_layer_point_grids(int(points_per_side), n_layers, downscale)
    grids = [np.asarray(grid, dtype=float) for grid in point_grids]
    if len(grids) <= n_layers or any(g.ndim != 2 or g.shape[1] != 2 or g.min() < 0 or g.max() > 1 for g in grids):
        raise InvalidInputError(
            f"point_grids must be {n_layers + 1} arrays (N, 2) of points (x, y) from 0 to 1, one for each layer of "
            f"crops, but got shapes {[g.shape for g in grids]}."
        )
    return grids


class AutomaticMaskGenerator(AMGBase):
    """Generates masks from a grid of points on an image.

    Args:
        predictor: The predictor.
        points_per_side: Number of points along each side of the image.
        points_per_batch: Number of points that go through the model together; None chooses it.
        crop_n_layers: How many times to repeat everything in crops: layer k has 2^k crops along each side.
        crop_overlap_ratio: How much crops overlap, as a fraction of the shorter side of the image.
        crop_n_points_downscale_factor: By how much each layer has fewer points along the sides of its crops.
        point_grids: Points (N, 2) (x, y, from 0 to 1) for each layer; if given, they replace the regular grid.
        stability_score_offset: The change of the threshold of logits for the stability score.

    Raises:
        InvalidInputError: For arguments out of range.

    Example:
        >>> segmenter = AutomaticMaskGenerator(predictor, points_per_side=16)  # doctest: +SKIP
        >>> segmenter.initialize(image)  # doctest: +SKIP
        >>> labels = segmenter.generate(pred_iou_thresh=0.7)  # doctest: +SKIP
    """

    def __init__(
        self,
        predictor: SamPredictor,
        points_per_side: int | None = 32,
        points_per_batch: int | None = None,
        crop_n_layers: int = 0,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        stability_score_offset: float = 1.0,
    ) -> None:
        super().__init__()
        self._grids = _check_grids(points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor)
        if points_per_batch is None:
            points_per_batch = 16 if torch.device(predictor.device).type == "mps" else 64
        if points_per_batch < 1:
            raise InvalidInputError(f"points_per_batch must be at least 1, but is {points_per_batch}.")
        self._predictor = predictor
        self._points_per_side, self._point_grids = points_per_side, point_grids
        self._points_per_batch = int(points_per_batch)
        self._crop_n_layers, self._crop_overlap_ratio = int(crop_n_layers), crop_overlap_ratio
        self._crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self._stability_score_offset = float(stability_score_offset)

    def initialize(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        verbose: bool = False,
        pbar_init: Callable[[int, str], None] | None = None,
        pbar_update: Callable[[int], None] | None = None,
    ) -> None:
        """Predict masks for all points.

        Args:
            image: Image (Y, X[, C]). With `i` also the stack is accepted. A constant image gives no masks.
            image_embeddings: Its embeddings; computed by default. Crops are always encoded here.
            i: The plane, for embeddings of a stack.
            verbose: Whether to show progress.
            pbar_init: Callback `(total, description)` for progress.
            pbar_update: Callback `(n)` for progress.

        Raises:
            InvalidInputError: If image and embeddings do not fit.
        """
        steps = self.initialize_steps(image, image_embeddings, i)
        drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)

    def initialize_steps(
        self, image: np.ndarray, image_embeddings: ImageEmbeddings | None = None, i: int | None = None
    ) -> Steps[None]:
        """Generator behind `initialize`. Nothing is remembered until it is finished."""
        if image_embeddings is None:
            image, i = select_plane(image, i, None), None
            image_embeddings = yield from embedding_steps(self._predictor, image, ndim=2)
        elif image_embeddings["input_size"] is None:
            raise InvalidInputError(f"The embeddings are tiled: use the tiled class instead of {type(self).__name__}.")
        shape = tuple(int(s) for s in image_embeddings["original_size"])
        image = check_plane(image, i, shape)
        boxes, layers = generate_crop_boxes(shape, self._crop_n_layers, self._crop_overlap_ratio)
        if len(boxes) > 1 and image is None:
            raise InvalidInputError("Crops are encoded from the image, but it is None. Pass the image.")
        pixels = None if image is None or len(boxes) == 1 else to_image(image)

        crops = []
        for box, layer in zip(boxes, layers):
            x0, y0, x1, y1 = box
            if image is not None and is_blank(image[y0:y1, x0:x1]):
                continue
            if layer == 0:
                def set_crop():
                    set_precomputed(self._predictor, image_embeddings, i=i)
            else:
                def set_crop(crop=(slice(y0, y1), slice(x0, x1))):
                    self._predictor.set_image(pixels[crop])
            crops.append(_Crop(box, self._grids[layer], set_crop))
        yield from self._predict_steps(crops, shape)
        if len(boxes) > 1:
            self._predictor.reset_image()

    def _predict_steps(self, crops: list[_Crop], shape: tuple[int, int]) -> Steps[None]:
        """Predict the candidates of crops, and remember them when all are there."""
        text, size = "Predict masks for grid of points", self._points_per_batch
        total, done = sum(math.ceil(len(crop.grid) / size) for crop in crops), 0
        yield Step(0, total, text)
        results, n_bytes = [], 0
        for crop in crops:
            crop.set_in_predictor()
            height, width = self._predictor.original_size
            points = crop.grid * (width, height)
            candidates = None
            for start in range(0, len(points), size):
                batch = points[start:start + size]
                prompts = BatchedPrompts(None, batch[:, None], np.ones((len(batch), 1), dtype=int), None)
                logits, ious = decode_prompts(self._predictor, prompts, multimask_output=True)
                if candidates is None:
                    candidates = self._new_candidates(crop, logits)
                candidates.add(batch, logits, ious, lazy=n_bytes + candidates.n_bytes < LAZY_BYTES)
                done += 1
                yield Step(done, total, text)
            n_bytes += candidates.n_bytes
            results.append(candidates)
        self._crops, self._original_size = results, shape

    def _new_candidates(self, crop: _Crop, logits: torch.Tensor) -> PredictedCandidates:
        model = self._predictor.model
        upsampler = MaskUpsampler(
            logits.shape[-1], model.image_encoder.img_size, self._predictor.input_size, self._predictor.original_size,
            logits.device,
        )
        return PredictedCandidates(crop.box, upsampler, model.mask_threshold, self._stability_score_offset)


class TiledAutomaticMaskGenerator(AutomaticMaskGenerator):
    """Like `AutomaticMaskGenerator`, with tiled embeddings: each tile with its halo has a complete grid of points.

    Objects that end at the border of a tile are left to the neighbour that sees them whole, so the halo should be
    as large as the objects. Tiles without image content (all values equal) are skipped.

    Args:
        predictor: The predictor.
        points_per_side: Number of points along each side of a tile.
        points_per_batch: Number of points that go through the model together.
        point_grids: One array (N, 2) of points (x, y, from 0 to 1) in a list; if given, it replaces the regular grid.
        stability_score_offset: The change of the threshold of logits for the stability score.
    """

    def __init__(
        self,
        predictor: SamPredictor,
        points_per_side: int | None = 32,
        points_per_batch: int | None = 64,
        point_grids: list[np.ndarray] | None = None,
        stability_score_offset: float = 1.0,
    ) -> None:
        super().__init__(
            predictor, points_per_side, points_per_batch, point_grids=point_grids,
            stability_score_offset=stability_score_offset,
        )

    def initialize(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        verbose: bool = False,
        pbar_init: Callable[[int, str], None] | None = None,
        pbar_update: Callable[[int], None] | None = None,
        batch_size: int = 1,
        mask: np.typing.ArrayLike | None = None,
    ) -> None:
        """Predict masks for all points of all tiles.

        Args:
            image: Image (Y, X[, C]), may be lazy. With `i` also the stack is accepted.
            image_embeddings: Its tiled embeddings; computed by default.
            i: The plane, for embeddings of a stack.
            tile_shape: Tile shape (y, x) in pixels; by default that of the embeddings.
            halo: Halo (y, x) in pixels; by default that of the embeddings.
            verbose: Whether to show progress.
            pbar_init: Callback `(total, description)` for progress.
            pbar_update: Callback `(n)` for progress.
            batch_size: Number of tiles to encode together, if the embeddings are computed.
            mask: Array (Y, X): only tiles that, with their halo, touch a non-zero pixel are processed.

        Raises:
            InvalidInputError: If image, embeddings and tiling do not fit.
        """
        steps = self.initialize_steps(
            image, image_embeddings, i, tile_shape=tile_shape, halo=halo, batch_size=batch_size, mask=mask
        )
        drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)

    def initialize_steps(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        *,
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        batch_size: int = 1,
        mask: np.typing.ArrayLike | None = None,
    ) -> Steps[None]:
        """Generator behind `initialize`. Nothing is remembered until it is finished."""
        if image_embeddings is None:
            if tile_shape is None:
                raise InvalidInputError("Pass tiled image_embeddings, or tile_shape (and halo) to compute them.")
            image, i = select_plane(image, i, None), None
            image_embeddings = yield from embedding_steps(
                self._predictor, image, ndim=2, tile_shape=tile_shape, halo=halo, batch_size=batch_size, mask=mask
            )
        tiling = embedding_tiling(image_embeddings, tile_shape, halo)
        check_tiled_plane_index(image_embeddings, i)
        image = check_plane(image, i, tiling.shape)

        def set_tile(tile: Tile):
            return lambda: set_precomputed(self._predictor, image_embeddings, i=i, tile_id=tile.id)

        crops = []
        for tile in tiles_to_process(image_embeddings, tiling, i, mask):
            y, x = tile.outer
            if image is None or not is_blank(image[tile.outer]):
                crops.append(_Crop([x.start, y.start, x.stop, y.stop], self._grids[0], set_tile(tile)))
        yield from self._predict_steps(crops, tiling.shape)
