"""A volume whose objects are prompted by the ground truth, each in one slice, and followed from there."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, InvalidTypeError, NoObjectsError
from ..core.labels import check_labels, get_centers_and_bounding_boxes, segmentation_to_one_hot
from ..core.output import is_done, label_path, prepare_folder, read_labels, write_labels
from ..core.progress import Steps
from ..embeddings.encode import ImageEmbeddings, embedding_steps
from ..embeddings.signature import compute_data_signature
from ..prompt_generators import PointAndBoxPromptGenerator
from ..segmentation.settings import model_settings
from ..volume.paint import paint_objects_steps
from ..volume.propagate import SlicePrompts, propagate_objects_steps

PROMPT_MODES = ("box", "points")

# How far from an object its negative points are, in pixels.
_DILATION = 10


@dataclass(frozen=True)
class PropagationOptions:
    """How objects are prompted and followed; see `multi_dimensional_segmentation.segment_slices_from_ground_truth`."""

    iou_threshold: float = 0.8
    projection: str | Mapping[str, bool] = "mask"
    box_extension: float = 0.025
    interactive_seg_mode: str = "box"
    min_size: int = 0
    prompt_slice: str = "middle"
    max_area_change: float | None = None
    max_drift: float | None = None
    seed: int = 0


def prompts_from_ground_truth(
    ground_truth: np.ndarray,
    interactive_seg_mode: Literal["box", "points"] = "box",
    min_size: int = 0,
    *,
    prompt_slice: Literal["middle", "largest"] = "middle",
    seed: int = 0,
) -> dict[int, dict[int, SlicePrompts]]:
    """Prompt each object of a volume in one slice, as `propagate_objects` takes it.

    Args:
        ground_truth: Label volume (Z, Y, X).
        interactive_seg_mode: `box` gives the bounding box; `points` gives the pixel deepest inside of the object and
            a random one outside of it, at least ten pixels away where that is possible.
        min_size: Objects with fewer pixels in their slice are left out.
        prompt_slice: `middle` takes the slice halfway between the first and the last one of the object, or, if the
            object is interrupted there, its nearest slice; `largest` takes the one with the most pixels.
        seed: Seed of the random points.

    Returns:
        The prompts by id of the object and slice.

    Raises:
        InvalidInputError: For an unknown mode or slice, or labels of another shape.
        NoObjectsError: If there is no object (of that size).
    """
    for name, value, known in (
        ("interactive_seg_mode", interactive_seg_mode, PROMPT_MODES), ("prompt_slice", prompt_slice, _CHOOSE_SLICE),
    ):
        if value not in known:
            raise InvalidInputError(f"{name} must be one of {', '.join(known)}, but is {value!r}.")
    truth = check_labels(ground_truth)
    if truth.ndim != 3:
        raise InvalidInputError(f"The ground truth must be a volume (Z, Y, X), but has the shape {truth.shape}.")
    rng, prompts = np.random.default_rng(seed), {}
    _, boxes = get_centers_and_bounding_boxes(truth, mode="p")
    for id_, (z0, y0, x0, z1, y1, x1) in boxes.items():
        sizes = (truth[z0:z1, y0:y1, x0:x1] == id_).sum(axis=(1, 2))
        z = _CHOOSE_SLICE[prompt_slice](sizes)
        if sizes[z] >= min_size:
            prompts[id_] = {z0 + z: _prompt(truth[z0 + z] == id_, interactive_seg_mode, rng)}
    if not prompts:
        what = f"of at least {min_size} pixels in its {prompt_slice} slice" if boxes else "in the ground truth"
        raise NoObjectsError(f"There is no object {what}. Choose a smaller min_size, or another volume.")
    return prompts


def _middle(sizes: np.ndarray) -> int:
    """The slice nearest to the middle in which the object is; the lower one of two."""
    present = np.flatnonzero(sizes)
    return int(present[np.abs(present - (len(sizes) - 1) // 2).argmin()])


_CHOOSE_SLICE = {"middle": _middle, "largest": lambda sizes: int(sizes.argmax())}


def _prompt(mask: np.ndarray, mode: str, rng: np.random.Generator) -> SlicePrompts:
    """The prompts of one object, in the order y, x."""
    centers, boxes = get_centers_and_bounding_boxes(mask)
    if mode == "box":
        return SlicePrompts(box=boxes[1])
    n_negative = 0 if mask.all() else 1  # an object that fills its slice leaves no place for a negative point
    generator = PointAndBoxPromptGenerator(1, n_negative, _DILATION, rng=rng)
    points, labels, _, _ = generator(segmentation_to_one_hot(mask), [boxes[1]], [centers[1]])
    return SlicePrompts(points=points[0].numpy()[:, ::-1].copy(), labels=labels[0].numpy())


class PromptedVolume:
    """A volume with its ground truth, embedded once for any number of settings.

    Args:
        predictor: The predictor.
        volume: Volume (Z, Y, X[, C]), may be lazy.
        ground_truth: Label volume (Z, Y, X).
        embedding_path: Where to keep the embeddings; None keeps them in memory.
        batch_size: Slices per call of the encoder.

    Raises:
        InvalidInputError: If the shapes differ.
    """

    def __init__(
        self, predictor: SamPredictor, volume: np.ndarray, ground_truth: np.ndarray,
        embedding_path: str | os.PathLike | None = None, batch_size: int = 1,
    ):
        self.truth = check_labels(ground_truth)
        shape = tuple(int(n) for n in volume.shape[:3])
        if self.truth.ndim != 3 or shape != self.truth.shape or len(volume.shape) not in (3, 4):
            raise InvalidInputError(
                f"Volume and ground truth must be (Z, Y, X) of the same shape (the volume may have channels behind), "
                f"but have {tuple(volume.shape)} and {self.truth.shape}."
            )
        self._predictor, self._volume, self._path = predictor, volume, embedding_path
        self._batch_size = batch_size
        self._embeddings: ImageEmbeddings | None = None
        self._signature: dict[str, Any] | None = None

    def kept_truth(self, ids: Sequence[int]) -> np.ndarray:
        """The ground truth of the objects that were prompted; the others were too small."""
        return np.where(np.isin(self.truth, list(ids)), self.truth, 0)

    def settings(self, options: PropagationOptions) -> dict[str, Any]:
        """What decides the result."""
        if self._signature is None:
            self._signature = {
                **model_settings(self._predictor), "image": compute_data_signature(self._volume),
                "ground_truth": compute_data_signature(self.truth),
            }
        return json.loads(json.dumps({**self._signature, **asdict(options)}))

    def steps(self, options: PropagationOptions) -> Steps[tuple[np.ndarray, np.ndarray]]:
        """Segment the objects. Yields `Step`; returns labels uint32 with the ids of the truth, and that truth."""
        prompts = prompts_from_ground_truth(
            self.truth, options.interactive_seg_mode, options.min_size, prompt_slice=options.prompt_slice,
            seed=options.seed,
        )
        if max(prompts) > np.iinfo(np.uint32).max:
            raise InvalidTypeError(f"The id {max(prompts)} is too large for uint32. Renumber the ground truth.")
        if self._embeddings is None:
            self._embeddings = yield from embedding_steps(
                self._predictor, self._volume, self._path, lazy_loading=True, ndim=3, batch_size=self._batch_size,
            )
        objects = yield from propagate_objects_steps(
            self._predictor, self._embeddings, prompts, options.projection, box_extension=options.box_extension,
            iou_threshold=options.iou_threshold, max_area_change=options.max_area_change, max_drift=options.max_drift,
        )
        labels = np.zeros(self.truth.shape, dtype=np.uint32)
        yield from paint_objects_steps(labels, objects)
        return labels, self.kept_truth([*prompts])

    def saved_steps(
        self, options: PropagationOptions, save_path: str | os.PathLike | None, overwrite: bool = False
    ) -> Steps[tuple[np.ndarray, np.ndarray]]:
        """`steps` with a file: what is there already, made in the same way, is read."""
        if save_path is None:
            return (yield from self.steps(options))
        path, settings = label_path(save_path), self.settings(options)
        if is_done(path, settings, overwrite):
            prompts = prompts_from_ground_truth(
                self.truth, options.interactive_seg_mode, options.min_size, prompt_slice=options.prompt_slice,
                seed=options.seed,
            )
            return read_labels(path).astype(np.uint32), self.kept_truth([*prompts])
        prepare_folder(path)
        labels, truth = yield from self.steps(options)
        write_labels(path, labels, settings)
        return labels, truth
