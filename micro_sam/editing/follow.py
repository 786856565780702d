"""Follow an object through the frames of a time series with the model, from its mask in some frames."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError
from ..core.masks import BoxedMask, as_bool_array, crop_mask, intersection
from ..core.progress import Step, Steps, drain
from ..embeddings.encode import ImageEmbeddings
from ..prompt_based_segmentation import image_shape, segment_from_mask
from ..volume.propagation_prompts import Projection


@dataclass(frozen=True)
class Propagation:
    """An object followed through frames.

    `masks` has its mask by frame, for `TrackEditor.add` or `replace`; `scores` the predicted IoU of frames that were
    not prompted. `reason` is why it ends in frame `last`: `iou`, `area`, `lost`, `division`, `stop` or `end`.
    """

    masks: dict[int, BoxedMask]
    scores: dict[int, float]
    last: int
    reason: str


def propagate_track_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    masks: Mapping[int, np.ndarray],
    *,
    stop_frame: int | None = None,
    division_frames: Collection[int] = (),
    projection: str = "mask",
    iou_threshold: float = 0.5,
    motion_smoothing: float = 0.5,
    box_extension: float = 0.0,
    max_area_ratio: float | None = 2.0,
) -> Steps[Propagation]:
    """Follow an object through frames, as a generator of steps; see `propagate_track`."""
    use = vars(Projection.create(projection))
    if not 0 <= motion_smoothing <= 1 or not 0 <= iou_threshold <= 1 or not (max_area_ratio or 1) >= 1:
        raise InvalidInputError(
            "motion_smoothing and iou_threshold must be in 0 to 1 and max_area_ratio at least 1, but are "
            f"{motion_smoothing!r}, {iou_threshold!r} and {max_area_ratio!r}."
        )
    shape = image_shape(predictor, image_embeddings)
    prompted, end = _check_prompted(masks, shape, _n_frames(image_embeddings), stop_frame, division_frames)
    first, last_prompted = min(prompted), max(prompted)

    found, scores, motion, position = {}, {}, None, None
    previous, reason = prompted[first], "end" if stop_frame is None else "stop"
    yield Step(0, end - first, "Track object")
    for frame in range(first, end):
        mask = prompted.get(frame)
        if mask is None:
            guess = _shift(previous, np.zeros(2) if motion is None else motion, shape)
            mask, score = _project(predictor, image_embeddings, guess, frame, use, box_extension, shape)
            failure = _failure(guess, mask, iou_threshold, max_area_ratio)
            if frame > last_prompted and failure:
                reason = failure
                break
            scores[frame] = score
        if mask.area:
            found[frame], previous = mask, mask
            centre = np.argwhere(mask.mask).mean(axis=0) + (mask.y0, mask.x0)
            if position is not None:
                step = (centre - position[1]) / (frame - position[0])
                motion = step if motion is None else motion_smoothing * motion + (1 - motion_smoothing) * step
            position = (frame, centre)
        yield Step(frame - first + 1, end - first, "Track object")
        if frame in division_frames:
            reason = "division"
            break
    return Propagation(found, scores, max(found), reason)


def propagate_track(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    masks: Mapping[int, np.ndarray],
    *,
    stop_frame: int | None = None,
    division_frames: Collection[int] = (),
    projection: str = "mask",
    iou_threshold: float = 0.5,
    motion_smoothing: float = 0.5,
    box_extension: float = 0.0,
    max_area_ratio: float | None = 2.0,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> Propagation:
    """Follow an object from the first frame in which it is given to the following ones.

    In a frame without a mask, the last mask is shifted by the smoothed displacement of its centroid and is the prompt.
    Behind the last given mask the object ends as soon as the new mask does not fit the shifted one.

    Args:
        predictor: The predictor.
        image_embeddings: Embeddings of the time series, plain or tiled.
        masks: Masks (Y, X) by frame, at least one, none of them empty; these are kept as they are.
        stop_frame: The first frame in which the object must not be; None goes to the end of the time series.
        division_frames: Frames in which the object divides: it ends there.
        projection: How the shifted mask becomes a prompt: `box`, `mask` (with box), `points`, `points_and_mask`,
            `single_point`.
        iou_threshold: The object ends if the IoU of the new and the shifted mask is below this.
        motion_smoothing: Weight, 0 to 1, of the motion so far against the last displacement; 0 uses only the last.
        box_extension: How far to extend the box, see `segment_from_box`.
        max_area_ratio: The object ends if its area grows or shrinks by more than this factor; None for no limit.
        verbose: Whether to show a progress bar.
        pbar_init: See `core.progress.drain`.
        pbar_update: See `core.progress.drain`.

    Returns:
        The masks, and why they end.

    Raises:
        InvalidInputError: If no mask is given, or one is empty, of another shape, or in a frame behind the end; or
            for embeddings of a single image.
    """
    steps = propagate_track_steps(
        predictor, image_embeddings, masks, stop_frame=stop_frame, division_frames=division_frames,
        projection=projection, iou_threshold=iou_threshold, motion_smoothing=motion_smoothing,
        box_extension=box_extension, max_area_ratio=max_area_ratio,
    )
    return drain(steps, verbose, pbar_init, pbar_update)


def _n_frames(image_embeddings: ImageEmbeddings) -> int:
    features = image_embeddings["features"]
    if image_embeddings["input_size"] is None:
        features = next(iter(features.values()))
    if len(features.shape) != 5:
        raise InvalidInputError("The embeddings are of a single image. Compute them for the time series with ndim=3.")
    return int(features.shape[0])


def _check_prompted(masks, shape, n_frames, stop_frame, division_frames) -> tuple[dict[int, BoxedMask], int]:
    """The given masks by frame, and the frame before which to stop."""
    end = n_frames if stop_frame is None else min(stop_frame, n_frames)
    if not masks:
        raise InvalidInputError("There must be a mask in at least one frame.")
    limit = min([end, *(f + 1 for f in division_frames if f >= min(masks))])
    prompted = {}
    for frame, mask in sorted(masks.items()):
        if not 0 <= frame < limit:
            raise InvalidInputError(
                f"There is a mask in frame {frame}, but the object is in frames 0 to {limit - 1} at most: then it has "
                "divided or stopped, or the time series is over. Take the mask away, or give it to another track."
            )
        mask = as_bool_array(mask)
        if mask.shape != tuple(shape) or not mask.any():
            raise InvalidInputError(
                f"The mask in frame {frame} must have the shape {tuple(shape)} and pixels, but has {mask.shape} and "
                f"{np.count_nonzero(mask)}."
            )
        prompted[int(frame)] = crop_mask(mask)
    return prompted, end


def _shift(mask: BoxedMask, motion: np.ndarray, shape: Sequence[int]) -> BoxedMask:
    """Move a mask by whole pixels; what leaves the plane is cut off."""
    y0, x0 = (int(o + round(float(d))) for o, d in zip((mask.y0, mask.x0), motion))
    cut_y, cut_x = max(-y0, 0), max(-x0, 0)
    inside = mask.mask[cut_y:max(shape[0] - y0, 0), cut_x:max(shape[1] - x0, 0)]
    return crop_mask(inside, (y0 + cut_y, x0 + cut_x))


def _project(predictor, image_embeddings, guess, frame, use, box_extension, shape) -> tuple[BoxedMask, float]:
    if not guess.area:
        return guess, 0.0
    prompt = np.zeros(shape, dtype=bool)
    y0, x0, y1, x1 = guess.box
    prompt[y0:y1, x0:x1] = guess.mask
    masks, scores, _ = segment_from_mask(
        predictor, prompt, image_embeddings, frame, box_extension=box_extension, return_all=True, **use
    )
    return crop_mask(masks[0]), float(scores[0])


def _failure(guess: BoxedMask, mask: BoxedMask, iou_threshold: float, max_area_ratio: float | None) -> str | None:
    """Why a new mask does not go on with the object, or None."""
    if not guess.area or not mask.area:
        return "lost"
    common = intersection(guess, mask)
    if max_area_ratio is not None and max(guess.area, mask.area) > max_area_ratio * min(guess.area, mask.area):
        return "area"
    return "iou" if common < iou_threshold * (guess.area + mask.area - common) else None
