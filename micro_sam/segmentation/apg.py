"""Automatic prompt generation (APG): the decoder's maps give one point per object, the prompts give the masks."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from bioimage_cpp.distance import distance_transform
from scipy import ndimage
from skimage.segmentation import find_boundaries

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError, NotInitializedError
from ..core.labels import apply_nms
from ..core.progress import Steps, drain
from ..core.prompts import BatchedPrompts
from ..embeddings.encode import set_precomputed
from ..inference import merged_tile_steps, prediction_steps, tiled_prediction_steps
from ..models.prompting import check_threshold
from .ais import (
    MAP_NAMES,
    InstanceSegmentationWithDecoder,
    Record,
    TiledInstanceSegmentationWithDecoder,
    check_output_mode,
    labels_to_records,
)

_PROMPT_KEYS = {"boxes", "points", "point_labels", "logits_masks"}
# Boxes for refinement are this fraction of their size larger on each side.
_BOX_MARGIN = 0.01


def point_prompts_from_maps(
    foreground: np.ndarray,
    center_distances: np.ndarray,
    boundary_distances: np.ndarray,
    foreground_threshold: float = 0.5,
    center_distance_threshold: float = 0.5,
    boundary_distance_threshold: float = 0.5,
) -> dict[str, np.ndarray] | None:
    """Derive one positive point per object from the maps of the decoder.

    Objects are the 4-connected components where both distances are below their thresholds and the foreground is not
    below its own; the point is the pixel of a component that is farthest from what surrounds it.

    Args:
        foreground: Foreground probability (Y, X).
        center_distances: Distance to the centre (Y, X).
        boundary_distances: Inverted distance to the boundary (Y, X).
        foreground_threshold: .
        center_distance_threshold: .
        boundary_distance_threshold: .

    Returns:
        `points` (N, 1, 2) int in the order (x, y) and `point_labels` (N, 1), or None if there is no object.
    """
    candidates = center_distances < center_distance_threshold
    candidates &= boundary_distances < boundary_distance_threshold
    candidates &= ~(foreground < foreground_threshold)
    components, n = ndimage.label(candidates)
    if n == 0:
        return None
    outside = find_boundaries(components, mode="outer")
    outside[[0, -1]] = True
    outside[:, [0, -1]] = True
    distances = distance_transform(~outside)
    points = np.zeros((n, 1, 2), dtype=np.int64)
    for k, box in enumerate(ndimage.find_objects(components)):
        inside = np.where(components[box] == k + 1, distances[box], -1)
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        points[k, 0] = x + box[1].start, y + box[0].start
    return {"points": points, "point_labels": np.ones((n, 1), dtype=np.int64)}


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _call_prompt_function(function: Callable, maps: Mapping[str, np.ndarray], thresholds: dict[str, float]):
    """Pass the maps by name if the function takes them so, else by position."""
    try:
        inspect.signature(function).bind(**maps, **thresholds)
        by_name = True
    except (TypeError, ValueError):  # it does not, or has no signature
        by_name = False
    prompts = function(**maps, **thresholds) if by_name else function(*maps.values(), **thresholds)
    if prompts is None:
        return None
    unknown = set(prompts) - _PROMPT_KEYS
    if unknown:
        raise InvalidInputError(
            f"The prompt function must return None or a dictionary with some of {sorted(_PROMPT_KEYS)}, "
            f"but it has {sorted(unknown)} too."
        )
    return prompts


def _refinement_boxes(records: list[Record], shape: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) XYXY of the masks that are not empty, slightly enlarged and clipped to the image."""
    boxes = np.array([r["global_bbox"] for r in records if r["area"] > 0], dtype=float).reshape(-1, 4)
    origin, extent = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([origin - _BOX_MARGIN * extent, origin + (1 + _BOX_MARGIN) * extent], axis=1)
    height, width = shape
    return np.clip(corners, 0, [width, height, width, height])


class _PromptGeneration:
    """What the plain and the tiled generator share; subclasses say how prompts are run."""

    def _predict(self, prompts: BatchedPrompts, options: dict) -> Steps[list[Record]]:
        raise NotImplementedError

    def _merge(
        self, prompts: BatchedPrompts, options: dict, nms: dict, optimize_memory: bool
    ) -> Steps[np.ndarray]:
        records = yield from self._predict(prompts, options)
        return apply_nms(records, shape=self._foreground.shape, **nms)

    def _segment_steps(
        self,
        thresholds: dict[str, float],
        options: dict,
        nms: dict,
        refine: bool,
        prompt_function: Callable | None,
        optimize_memory: bool,
    ) -> Steps[np.ndarray]:
        maps = {name: _read_only(getattr(self, f"_{name}")) for name in MAP_NAMES}
        prompts = _call_prompt_function(prompt_function or point_prompts_from_maps, maps, thresholds)
        shape = self._foreground.shape
        if prompts is None:
            return np.zeros(shape, dtype=np.uint32)
        prompts = BatchedPrompts.create(**prompts)
        if refine:
            records = yield from self._predict(prompts, options)
            boxes = _refinement_boxes(records, shape)
            if len(boxes) == 0:
                return np.zeros(shape, dtype=np.uint32)
            prompts = BatchedPrompts.create(boxes=boxes)
        return (yield from self._merge(prompts, options, nms, optimize_memory))

    def generate_steps(
        self,
        min_size: int = 25,
        center_distance_threshold: float = 0.5,
        boundary_distance_threshold: float = 0.5,
        foreground_threshold: float = 0.5,
        multimasking: bool = False,
        batch_size: int = 32,
        nms_threshold: float = 0.9,
        intersection_over_min: bool = False,
        output_mode: str = "instance_segmentation",
        mask_threshold: float | str | None = None,
        refine_with_box_prompts: bool = False,
        prompt_function: Callable | None = None,
        optimize_memory: bool = False,
    ) -> Steps[list[Record] | np.ndarray]:
        """Generator behind `generate`."""
        self._check_initialized()
        check_output_mode(output_mode)
        check_threshold(mask_threshold, 0.0)
        thresholds = {
            "foreground_threshold": foreground_threshold, "center_distance_threshold": center_distance_threshold,
            "boundary_distance_threshold": boundary_distance_threshold,
        }
        options = {"batch_size": batch_size, "multimasking": multimasking, "mask_threshold": mask_threshold}
        nms = {"min_size": min_size, "nms_thresh": nms_threshold, "intersection_over_min": intersection_over_min}
        labels = yield from self._segment_steps(
            thresholds, options, nms, refine_with_box_prompts, prompt_function, optimize_memory
        )
        return labels_to_records(labels) if output_mode == "binary_mask" else labels

    def get_state(self) -> dict[str, Any]:
        """Return the maps of the decoder and the embeddings (`image_embeddings`, `i`) on which prompts are run.

        Raises:
            NotInitializedError: If `initialize` was not called.
        """
        return {**super().get_state(), "image_embeddings": self._image_embeddings, "i": self._i}

    def _embeddings(self):
        if self._image_embeddings is None:
            raise NotInitializedError(
                "The state that was set has no image embeddings, which prompts need. Add them to it: "
                "set_state({**state, 'image_embeddings': embeddings, 'i': i})."
            )
        return self._image_embeddings


class AutomaticPromptGenerator(_PromptGeneration, InstanceSegmentationWithDecoder):
    """Segments instances by prompting with points that are derived from the maps of a segmentation decoder.

    The embeddings belong to what it remembers: which image the predictor holds meanwhile plays no role.

    Args:
        predictor: The predictor.
        decoder: The decoder, see `get_predictor_and_decoder`.
    """

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, so that `generate` can be called.

        Args:
            state: What `get_state` returned. If it has no `image_embeddings` (like states of
                `InstanceSegmentationWithDecoder`), the image that is set in the predictor now is used.

        Raises:
            InvalidInputError: If a map is missing, or shapes differ.
        """
        super().set_state(state)
        predictor = self._predictor
        if self._image_embeddings is None and predictor.is_image_set:
            if tuple(predictor.original_size) == self._foreground.shape:
                sizes = {name: tuple(getattr(predictor, name)) for name in ("input_size", "original_size")}
                self._image_embeddings = {"features": predictor.features, **sizes}

    def _predict(self, prompts: BatchedPrompts, options: dict) -> Steps[list[Record]]:
        set_precomputed(self._predictor, self._embeddings(), i=self._i)
        return (yield from prediction_steps(self._predictor, prompts, **options))

    def generate(
        self,
        min_size: int = 25,
        center_distance_threshold: float = 0.5,
        boundary_distance_threshold: float = 0.5,
        foreground_threshold: float = 0.5,
        multimasking: bool = False,
        batch_size: int = 32,
        nms_threshold: float = 0.9,
        intersection_over_min: bool = False,
        output_mode: str = "instance_segmentation",
        mask_threshold: float | str | None = None,
        refine_with_box_prompts: bool = False,
        prompt_function: Callable | None = None,
    ) -> list[Record] | np.ndarray:
        """Segment instances by prompting.

        Args:
            min_size: Smallest object in pixels.
            center_distance_threshold: Prompts are placed where the distance to the centre is below this.
            boundary_distance_threshold: Prompts are placed where the inverted distance to the boundary is below this.
            foreground_threshold: Prompts are placed where the foreground probability is at least this.
            multimasking: Whether to predict three masks per prompt and take the best.
            batch_size: Number of prompts to process together.
            nms_threshold: Of masks that overlap by more than this, the one with the best score stays.
            intersection_over_min: Whether overlap is measured relative to the smaller mask instead of the union.
            output_mode: `instance_segmentation` for labels, `binary_mask` for records.
            mask_threshold: Threshold of the logits; None takes the model's, `auto` Otsu's method for each mask.
            refine_with_box_prompts: Whether to segment again from the bounding boxes of the masks.
            prompt_function: Function `(foreground, center_distances, boundary_distances, foreground_threshold=...,
                center_distance_threshold=..., boundary_distance_threshold=...)` that returns the prompts as keyword
                arguments of `batched_inference`, or None. By default `point_prompts_from_maps`.

        Returns:
            Labels uint32 (Y, X) with 0 for background; or records, see `labels_to_records`.

        Raises:
            NotInitializedError: If `initialize` was not called, or the state that was set has no embeddings.
            InvalidInputError: For wrong arguments.
        """
        steps = self.generate_steps(
            min_size, center_distance_threshold, boundary_distance_threshold, foreground_threshold, multimasking,
            batch_size, nms_threshold, intersection_over_min, output_mode, mask_threshold, refine_with_box_prompts,
            prompt_function,
        )
        return drain(steps, verbose=False)


class TiledAutomaticPromptGenerator(_PromptGeneration, TiledInstanceSegmentationWithDecoder):
    """Like `AutomaticPromptGenerator`, with tiled embeddings: each prompt is run in its tile."""

    def _predict(self, prompts: BatchedPrompts, options: dict) -> Steps[list[Record]]:
        embeddings = self._embeddings()
        return (yield from tiled_prediction_steps(
            self._predictor, embeddings, embedding_tiling(embeddings), prompts, self._i, **options
        ))

    def _merge(
        self, prompts: BatchedPrompts, options: dict, nms: dict, optimize_memory: bool
    ) -> Steps[np.ndarray]:
        if not optimize_memory:
            return (yield from super()._merge(prompts, options, nms, False))
        embeddings = self._embeddings()
        return (yield from merged_tile_steps(
            self._predictor, embeddings, embedding_tiling(embeddings), prompts, self._i, nms, **options
        ))

    def generate(
        self,
        min_size: int = 25,
        center_distance_threshold: float = 0.5,
        boundary_distance_threshold: float = 0.5,
        foreground_threshold: float = 0.5,
        multimasking: bool = False,
        batch_size: int = 32,
        nms_threshold: float = 0.9,
        intersection_over_min: bool = False,
        output_mode: str = "instance_segmentation",
        mask_threshold: float | str | None = None,
        refine_with_box_prompts: bool = False,
        prompt_function: Callable | None = None,
        optimize_memory: bool = False,
    ) -> list[Record] | np.ndarray:
        """Segment instances by prompting, see `AutomaticPromptGenerator.generate`.

        Args:
            min_size: See there; also for the following.
            center_distance_threshold: .
            boundary_distance_threshold: .
            foreground_threshold: .
            multimasking: .
            batch_size: .
            nms_threshold: .
            intersection_over_min: .
            output_mode: .
            mask_threshold: .
            refine_with_box_prompts: .
            prompt_function: .
            optimize_memory: Whether to suppress duplicates within each tile and merge tile by tile, where the
                earlier tile wins, instead of holding the masks of all tiles.

        Returns:
            See there.
        """
        steps = self.generate_steps(
            min_size, center_distance_threshold, boundary_distance_threshold, foreground_threshold, multimasking,
            batch_size, nms_threshold, intersection_over_min, output_mode, mask_threshold, refine_with_box_prompts,
            prompt_function, optimize_memory,
        )
        return drain(steps, verbose=False)
