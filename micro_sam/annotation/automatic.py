"""Automatic segmentation and tracking in a session.

What takes long (the maps of the decoder, or the candidates of the mask generator) is kept per plane, in memory and next
to the embeddings, so that thresholds can be changed and their effect seen at once.
"""

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core import rle
from ..core.errors import (
    EmbeddingCacheError,
    EmbeddingMismatchError,
    InvalidInputError,
    OutputWriteError,
    UnsafeCheckpointError,
)
from ..core.labels import mask_data_to_segmentation, relabel_consecutive
from ..core.progress import Step, Steps, during
from ..precompute_state import amg_state_steps, is_state_steps
from ..segmentation.ais import MAP_NAMES
from ..segmentation.amg import AMGBase
from ..segmentation.candidates import LAZY_BYTES
from ..segmentation.factory import get_instance_segmentation_generator, get_segmentation_mode
from ..segmentation.workflow import BLOCK_WATERSHED_PIXELS, LoadedModel, Segmenter, initialize_steps
from ..tracking.lineage import TrackForest
from ..tracking.linking import get_linker
from ..tracking.workflow import tracking_steps
from ..volume.merge import merge_steps
from .defaults import panel_defaults
from .embedding_source import EmbeddingSource, image_array

logger = logging.getLogger(__name__)

# Either the maps of a decoder, or a mask generator with its candidates.
State = Mapping[str, np.ndarray] | AMGBase

_STATE_ERRORS = (EmbeddingCacheError, EmbeddingMismatchError, OutputWriteError, UnsafeCheckpointError)


@dataclass(frozen=True)
class AutoSettings:
    """How to segment and track automatically. Thresholds go from 0 to 1, sizes and lengths are in pixels and planes.

    `controls` says which of these act in a mode.

    Attributes:
        mode: `ais`, `apg` or `amg`; `auto` is that of the model.
        center_distance_threshold: Objects start where the predicted distance to their centre is below this.
        boundary_distance_threshold: Objects start where the inverted distance to their boundary is below this.
        foreground_threshold: Objects are where the predicted foreground is above this.
        distance_smoothing: How much distances are smoothed; None takes what suits the model.
        nms_threshold: Of masks that overlap by more than this, one stays.
        points_per_side: Points of the grid along each side of the image, or tile.
        pred_iou_thresh: Masks need a predicted IoU above this.
        stability_score_thresh: Masks need at least this stability.
        box_nms_thresh: Of masks whose boxes overlap by more than this, one stays.
        min_size: Smallest object in a plane.
        gap_closing: Gaps of up to twice as many planes, or frames, are bridged.
        min_z_extent: Objects in fewer planes, and tracks in fewer frames, are left out.
        beta: Above 0.5 objects of neighbouring planes are joined more readily, below less.
        tracking_model: See `tracking.linking.get_linker`.
        tracking_mode: `greedy` with divisions, `greedy_nodiv` without, `ilp`.
    """

    mode: str = "auto"
    center_distance_threshold: float = 0.5
    boundary_distance_threshold: float = 0.5
    foreground_threshold: float = 0.5
    distance_smoothing: float | None = None
    nms_threshold: float = 0.9
    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    min_size: int = 100
    gap_closing: int = 2
    min_z_extent: int = 2
    beta: float = 0.5
    tracking_model: str = "motile"
    tracking_mode: str = "greedy"

    def __post_init__(self):
        for name in ("min_size", "gap_closing", "min_z_extent"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} must be 0 or more, but is {getattr(self, name)!r}.")

    @classmethod
    def for_model(cls, model_name: str | None, mode: str) -> "AutoSettings":
        """The settings that a model starts with, in the mode `ais`, `apg` or `amg`."""
        values = dict(panel_defaults(model_name).automatic(mode))
        if "min_object_size" in values:
            values["min_size"] = values.pop("min_object_size")
        return cls(mode, **values)

    @staticmethod
    def controls(mode: str, kind: str = "2d") -> tuple[str, ...]:
        """Which settings act in the mode `ais`, `apg` or `amg`, on an image of the kind `2d`, `3d` or `tracking`."""
        distances = ("center_distance_threshold", "boundary_distance_threshold", "foreground_threshold")
        of_mode = {
            "ais": (*distances, "distance_smoothing"), "apg": (*distances, "nms_threshold"),
            "amg": ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"),
        }[mode]
        across = {"2d": (), "3d": ("gap_closing", "min_z_extent", "beta"), "tracking": (
            "gap_closing", "min_z_extent", "tracking_model", "tracking_mode",
        )}[kind]
        return (*of_mode, "min_size", *across)

    def options(self, mode: str, model_name: str | None = None) -> dict[str, Any]:
        """The arguments of `generate` of the segmenter for a mode."""
        if mode == "amg":
            return self._pick("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
        options = self._pick("center_distance_threshold", "boundary_distance_threshold", "foreground_threshold")
        options["min_size"] = self.min_size
        if mode == "apg":
            return options | self._pick("nms_threshold")
        smoothing = self.distance_smoothing
        if smoothing is None:
            smoothing = panel_defaults(model_name).ais["distance_smoothing"]
        return options | {"distance_smoothing": smoothing}

    def _pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def advice(settings: AutoSettings, kind: str = "2d") -> str:
    """What to change if nothing was found on an image of the kind `2d`, `3d` or `tracking`."""
    changes = [f"a smaller minimum object size than {settings.min_size} pixels"] if settings.min_size else []
    if settings.mode == "amg":
        changes.append(
            f"lower thresholds for the predicted IoU ({settings.pred_iou_thresh:g}) and the stability "
            f"({settings.stability_score_thresh:g})"
        )
    else:
        changes.append(
            f"higher thresholds for the distances to centre ({settings.center_distance_threshold:g}) and boundary "
            f"({settings.boundary_distance_threshold:g}), or a lower one for the foreground "
            f"({settings.foreground_threshold:g})"
        )
    if kind != "2d" and settings.min_z_extent > 1:
        unit = "planes" if kind == "3d" else "frames"
        changes.append(f"a smaller minimum extent than {settings.min_z_extent} {unit}")
    return f"No objects were found. Try {'; '.join(changes)}; or another model or mode."


class AutomaticSource:
    """Segments and tracks all objects of the image of a session.

    Several of the generators that it gives may be under way at a time, as long as only one works on its step.

    Args:
        model: The model.
        image: An `AnnotationImage`; an array only if the embeddings are of it.
        embeddings: Its embeddings.
        memory_bytes: How much of the states is kept in memory; the last one always is.
    """

    def __init__(
        self, model: LoadedModel, image: Any, embeddings: EmbeddingSource, *, memory_bytes: int = 2 * 2**30
    ):
        self.model, self.embeddings = model, embeddings
        self._image, _ = image_array(image, embeddings.ndim)
        self._memory_bytes = memory_bytes
        self._states: OrderedDict[tuple, tuple[State, int]] = OrderedDict()
        self._use_disk = True

    def mode(self, settings: AutoSettings) -> str:
        """`amg`, `ais` or `apg`.

        Raises:
            DecoderMissingError: If the mode needs a decoder and the model has none.
        """
        mode = self.model.mode if settings.mode == "auto" else settings.mode
        return get_segmentation_mode(mode, self.model.decoder is not None)

    def is_initialized(self, plane: int | None, settings: AutoSettings) -> bool:
        """Whether segmenting a plane is quick, since its state is in memory."""
        return self._key(plane, settings) in self._states

    def prepare_steps(self, settings: AutoSettings | None = None) -> Steps[None]:
        """Compute ahead what takes long, for all planes. It is kept next to the embeddings if they are in a store.

        Args:
            settings: The mode, and for `amg` the grid of points; None for those of the model.
        """
        settings = settings or AutoSettings()
        mode, n_planes = self.mode(settings), self.embeddings.n_planes
        yield from self.embeddings.prepare_steps()
        if n_planes is None:
            yield from self._state_steps(None, settings, mode)
            return
        text = "Prepare automatic segmentation"
        yield Step(0, n_planes, text)
        for plane in range(n_planes):
            yield from during(self._state_steps(plane, settings, mode), Step(plane, n_planes, text))
            yield Step(plane + 1, n_planes, text)

    def segment_plane_steps(self, plane: int | None, settings: AutoSettings) -> Steps[np.ndarray]:
        """Segment the image, or one plane of a stack.

        Args:
            plane: The plane; None for a 2D image.
            settings: The settings.

        Returns:
            Labels (Y, X), uint32, 1 to n; all 0 if there is nothing (see `advice`).

        Raises:
            DecoderMissingError: If the mode needs a decoder and the model has none.
            InvalidInputError: If there is no such plane.
        """
        mode = self.mode(settings)
        state = yield from self._state_steps(plane, settings, mode)
        if mode == "apg":
            image_embeddings, i = yield from self.embeddings.plane_steps(plane)
            segmenter = self._segmenter(mode, settings)
            segmenter.set_state({**state, "image_embeddings": image_embeddings, "i": i})
            labels = yield from segmenter.generate_steps(**settings.options(mode))
        else:
            yield Step(0, 1, "Find objects")
            labels = self._generate(state, mode, settings)
            yield Step(1, 1, "Find objects")
        return relabel_consecutive(labels)

    def segment_volume_steps(self, settings: AutoSettings) -> Steps[np.ndarray]:
        """Segment each plane of a volume, and merge the objects across planes.

        Args:
            settings: The settings.

        Returns:
            Labels (Z, Y, X), uint32.

        Raises:
            DecoderMissingError: If the mode needs a decoder and the model has none.
            InvalidInputError: If the image is no stack.
        """
        labels = yield from self._all_planes_steps(settings)
        return (yield from merge_steps(
            labels, settings.beta, True, settings.gap_closing, self._extent(settings), ids_per_slice=True,
            output=labels,
        ))

    def track_steps(self, settings: AutoSettings) -> Steps[tuple[np.ndarray, TrackForest]]:
        """Segment each frame of a time series, and track the objects.

        Args:
            settings: The settings.

        Returns:
            Labels (T, Y, X), uint32, with the ids of tracks; and the tracks.

        Raises:
            DecoderMissingError, InvalidInputError: See `segment_volume_steps`.
            UnsupportedError, ModelError: See `tracking.linking.get_linker`.
        """
        linker = get_linker(settings.tracking_model, settings.tracking_mode, self.model.predictor.device)
        labels = yield from self._all_planes_steps(settings)
        return (yield from tracking_steps(
            self._image, labels, linker, gap_closing=settings.gap_closing, min_time_extent=self._extent(settings)
        ))

    def _extent(self, settings: AutoSettings) -> int:
        # Nothing can span more planes than there are.
        return min(settings.min_z_extent, self.embeddings.n_planes)

    def _all_planes_steps(self, settings: AutoSettings) -> Steps[np.ndarray]:
        """Segment all planes, each for itself. Where that takes long, the text says how long about."""
        n_planes = self.embeddings.n_planes
        if n_planes is None:
            raise InvalidInputError("The image is no stack. Use segment_plane_steps.")
        is_slow = self.mode(settings) == "amg" and torch.device(self.model.predictor.device).type != "cuda"
        yield from self.embeddings.prepare_steps()
        labels = np.zeros((n_planes, *self.embeddings.plane_shape), dtype=np.uint32)
        text, start = "Segment planes", time.perf_counter()
        yield Step(0, n_planes, text)
        for z in range(n_planes):
            n_missing = 0 if self.is_initialized(z, settings) else n_planes - z
            steps = self.segment_plane_steps(z, settings)
            try:
                while True:
                    try:
                        step = next(steps)
                    except StopIteration as stop:
                        labels[z] = stop.value
                        break
                    if is_slow and n_missing and step.done == 0:
                        start = time.perf_counter()
                    elif is_slow and n_missing and min(step.total, 4) <= step.done > 1:
                        seconds = (time.perf_counter() - start) * step.total / step.done
                        text, is_slow = f"Segment planes, which takes about {_duration(n_missing * seconds)}", False
                        yield Step(0, n_planes, text)
                    yield Step(z, n_planes, text)
            finally:
                steps.close()
            yield Step(z + 1, n_planes, text)
        return labels

    # The state of a plane

    def _key(self, plane: int | None, settings: AutoSettings) -> tuple:
        is_grid = self.mode(settings) == "amg"
        return ("candidates", settings.points_per_side, plane) if is_grid else ("maps", plane)

    def _state_steps(self, plane: int | None, settings: AutoSettings, mode: str) -> Steps[State]:
        key = self._key(plane, settings)
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key][0]
        image_embeddings, i = yield from self.embeddings.plane_steps(plane)
        pixels = np.asarray(self._image[...] if plane is None else self._image[plane])
        segmenter = yield from self._stored_steps(plane, i, pixels, image_embeddings, settings, mode)
        if segmenter is None:
            segmenter = self._segmenter("amg" if mode == "amg" else "ais", settings)
            yield from initialize_steps(segmenter, pixels, image_embeddings, i=i)
        state, n_bytes = _compact(segmenter, is_stack=plane is not None)
        self._states[key] = state, n_bytes
        while len(self._states) > 1 and sum(size for _, size in self._states.values()) > self._memory_bytes:
            self._states.popitem(last=False)
        return state

    def _stored_steps(self, plane, i, pixels, image_embeddings, settings: AutoSettings, mode: str):
        """Load or compute the state of a plane next to the embeddings; None if that is not possible."""
        folder = self.embeddings.path
        # Single planes that are ahead of the store have other indices than in it.
        if folder is None or not self._use_disk or i != plane or not self.embeddings.complete:
            return None
        predictor = copy.copy(self.model.predictor)
        try:
            if mode == "amg":
                return (yield from amg_state_steps(
                    predictor, pixels, image_embeddings, folder, i, points_per_side=settings.points_per_side
                ))
            return (yield from is_state_steps(predictor, self.model.decoder, pixels, image_embeddings, folder, i))
        except _STATE_ERRORS as error:
            # Not a reason to stop: it only takes longer. A folder that cannot be written is not tried again.
            logger.warning("The segmentation state of plane %s is kept in memory only. %s", plane, error)
            self._use_disk = not isinstance(error, OutputWriteError)
            return None

    def _segmenter(self, mode: str, settings: AutoSettings) -> Segmenter:
        # An own predictor each: another task may set another image between two steps.
        options = {"points_per_side": settings.points_per_side} if mode == "amg" else {}
        decoder = None if mode == "amg" else self.model.decoder
        return get_instance_segmentation_generator(
            copy.copy(self.model.predictor), bool(self.embeddings.tiling), decoder, mode, **options
        )

    def _generate(self, state: State, mode: str, settings: AutoSettings) -> np.ndarray:
        if mode == "amg":
            return _masks_to_labels(state, settings)
        segmenter = self._segmenter(mode, settings)
        segmenter.set_state(state)
        options = settings.options(mode, getattr(self.model.predictor, "model_name", None))
        if self.embeddings.tiling and np.prod(self.embeddings.plane_shape, dtype=np.int64) > BLOCK_WATERSHED_PIXELS:
            options |= self.embeddings.tiling
        return segmenter.generate(**options)


def _compact(segmenter: Segmenter, is_stack: bool) -> tuple[State, int]:
    """What to keep of a segmenter, and about how many bytes that are."""
    if not isinstance(segmenter, AMGBase):
        state = segmenter.get_state()
        maps = {name: state[name] for name in MAP_NAMES}
        return maps, sum(array.nbytes for array in maps.values())
    if not is_stack:
        return segmenter, LAZY_BYTES
    # Asking for the state evaluates all candidates, which are kept as run lengths from then on.
    counts = [len(mask["counts"]) for crop in segmenter.get_state()["crop_list"] for mask in crop["rles"]]
    return segmenter, 4 * sum(counts) + 500 * len(counts)


def _masks_to_labels(segmenter: AMGBase, settings: AutoSettings) -> np.ndarray:
    """Choose among the candidates; small ones are left out before larger ones are painted."""
    records = segmenter.generate(**settings.options("amg"), output_mode="rle")
    return mask_data_to_segmentation(
        [_cropped(record) for record in records], shape=segmenter.original_size, min_object_size=settings.min_size,
        with_background=True, merge_exclusively=False,
    )


def _cropped(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose mask is only that of its box, without making one of the whole image."""
    x, y, width, height = record["bbox"]
    n_rows = record["segmentation"]["size"][0]
    # Run lengths go column by column: those of some columns are a part of them.
    ends = np.clip(np.cumsum(record["segmentation"]["counts"]), x * n_rows, (x + width) * n_rows)
    columns = rle.decode(np.diff(ends, prepend=x * n_rows), (n_rows, width))
    return {
        "segmentation": columns[y:y + height], "area": record["area"], "bbox": [0, 0, width, height],
        "global_bbox": [x, y, width, height],
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

