"""Automatic mask generation (AMG): a grid of points prompts the model, filters and suppression choose among the masks.

The method is that of Kirillov et al., Segment Anything (2023), https://arxiv.org/abs/2304.02643. It needs no decoder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError, require_positive_int
from ..core.normalize import to_image
from ..core.progress import Step, Steps, drain
from ..core.prompts import BatchedPrompts
from ..core.tiling import Tile
from ..embeddings.encode import ImageEmbeddings, embedding_steps, set_precomputed
from ..models.mask_upsampling import MaskUpsampler
from ..models.prompting import decode_prompts
from .amg_base import AMGBase
from .candidates import LAZY_BYTES, PredictedCandidates
from .planes import check_plane, check_tiled_plane_index, is_blank, select_plane, tiles_to_process

__all__ = ["AMGBase", "AutomaticMaskGenerator", "TiledAutomaticMaskGenerator"]


@dataclass(frozen=True)
class _Crop:
    """A part of the image that is shown to the model: its box (x0, y0, x1, y1), the grid (N, 2) of points in it
    (x, y from 0 to 1), and a function that sets it in the predictor."""

    box: Sequence[int]
    grid: np.ndarray
    set_in_predictor: Callable[[], Any]


def _check_grids(points_per_side: int | None, point_grids, n_layers: int, downscale: int) -> list[np.ndarray]:
    """The grid of points, (N, 2) with x and y from 0 to 1, for each layer of crops."""
    if point_grids is None:
        if points_per_side is None:
            raise InvalidInputError("Pass points_per_side or point_grids: both are None.")
        require_positive_int("points_per_side", points_per_side)
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
        require_positive_int("points_per_batch", points_per_batch)
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
