"""Functions on prompt layers, under the names that scripts and other plugins know. The annotators use a session."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..annotation.geometry import plane_of
from ..annotation.prompt_data import SHAPE_KINDS, Prompts, points_from_arrays, shapes_from_arrays
from ..annotation.prompts import PromptRefusal, PromptSet, plan_prompts, prompted_planes
from ..annotation.segment import segment_plane_steps
from ..core.errors import InvalidInputError
from ..core.masks import BoxedMask
from ..core.progress import drain
from ..core.prompts import extend_box
from ..editing.follow import propagate_track
from .annotator import active_annotator
from .layers import POINTS, SHAPES, choose_next

_SEGMENTED = "current_object"


def toggle_label(prompts: Any) -> None:
    """Let the next point of a points layer be positive if it would be negative, and the other way round."""
    positive = prompts.feature_defaults["label"].iloc[0] != "positive"
    annotator = active_annotator()
    if annotator is not None and annotator.views is not None and annotator.views[POINTS] is prompts:
        annotator.prompt_panel.toggle()
        return
    choose_next(prompts, label="positive" if positive else "negative")


def clear_annotations(viewer: Any, clear_segmentations: bool = True) -> None:
    """Remove all prompts, and the current object; in an annotator that can be undone.

    Args:
        viewer: The napari viewer.
        clear_segmentations: Whether to clear the current object, too.
    """
    _clear(viewer, None, clear_segmentations)


def clear_annotations_slice(viewer: Any, i: int, clear_segmentations: bool = True) -> None:
    """Remove the prompts of a slice or frame, and the current object in it; see `clear_annotations`.

    Args:
        viewer: The napari viewer.
        i: The slice or frame.
        clear_segmentations: Whether to clear the current object, too.
    """
    _clear(viewer, i, clear_segmentations)


def _clear(viewer: Any, i: int | None, clear_segmentations: bool) -> None:
    annotator = active_annotator()
    if annotator is not None and annotator.viewer is viewer and annotator.session is not None:
        session = annotator.session
        if clear_segmentations:
            session.clear(i)
        else:
            session.set_prompts(Prompts() if i is None else session.prompts.without_plane(i))
        return
    points, shapes = viewer.layers[POINTS], viewer.layers[SHAPES]
    for layer, first in ((points, points.data[:, 0]), (shapes, [v[:, 0].mean() for v in shapes.data])):
        layer.selected_data = {n for n, z in enumerate(first) if i is None or plane_of(float(z)) == i}
        layer.remove_selected()
    if clear_segmentations and _SEGMENTED in viewer.layers:
        labels = viewer.layers[_SEGMENTED]
        labels.data[... if i is None else i] = 0
        labels.refresh()


# --- what layers say ---


def _both(point_layer: Any, box_layer: Any, track_id: int | None) -> Prompts:
    return Prompts(_points(point_layer, None, track_id).points, _shapes(box_layer, None, track_id).shapes)


def _points(layer: Any, i: int | None, track_id: int | None) -> Prompts:
    features = layer.features
    states = list(features["state"]) if "state" in features else None
    tracks = list(features["track_id"]) if "track_id" in features else None
    return Prompts(points_from_arrays(layer.data, list(features["label"]), states, tracks)).in_plane(i, track_id)


def _shapes(layer: Any, i: int | None, track_id: int | None) -> Prompts:
    features, known = layer.features, [n for n, kind in enumerate(layer.shape_type) if kind in SHAPE_KINDS]
    tracks = [features["track_id"].iloc[n] for n in known] if "track_id" in features else None
    kinds = [str(layer.shape_type[n]) for n in known]
    return Prompts((), shapes_from_arrays([layer.data[n] for n in known], kinds, tracks)).in_plane(i, track_id)


def point_layer_to_prompts(
    layer: Any, i: int | None = None, track_id: int | None = None, with_stop_annotation: bool = True
) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the points of a layer.

    Args:
        layer: The points layer, with the property `label`.
        i: The slice or frame; None for an image.
        track_id: Take only points of this track.
        with_stop_annotation: Whether a single negative point in a slice means that the object has ended.

    Returns:
        Points (N, 2) as (y, x) and labels (N,), 1 for the object and 0 for background; None for a stop.
    """
    found = _points(layer, i, track_id)
    if with_stop_annotation and found.is_stop(i):
        return None
    points = np.array([p.position[-2:] for p in found.points], dtype=float).reshape(-1, 2)
    return points, np.array([p.positive for p in found.points], dtype=int)


def shape_layer_to_prompts(
    layer: Any, shape: Sequence[int], i: int | None = None, track_id: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Read the rectangles, ellipses and polygons of a layer; paths and lines are left out.

    Args:
        layer: The shapes layer.
        shape: Shape (Y, X) of the image, or of a plane of it.
        i: The slice or frame; None for an image.
        track_id: Take only shapes of this track.

    Returns:
        Boxes [y0, x0, y1, x1], and for each the mask (Y, X) of an ellipse or polygon, or None for a rectangle.

    Raises:
        PromptRefusal: If a shape covers no pixel.
    """
    areas = [s for s in _shapes(layer, i, track_id).shapes if s.kind in SHAPE_KINDS[:3]]
    mode = {"mode": "2d"} if i is None else {"mode": "3d", "plane": i}
    sets = [plan_prompts(Prompts((), (area,)), shape[-2:], **mode)[0] for area in areas]
    return [s.box for s in sets], [s.mask for s in sets]


def prompt_layer_to_state(prompt_layer: Any, i: int) -> str:
    """Whether any point in a frame marks a division: `division` or `track`."""
    return "division" if any(p.division for p in _points(prompt_layer, i, None).points) else "track"


def prompt_layers_to_state(point_layer: Any, box_layer: Any, i: int) -> str:
    """Whether any prompt in a frame marks a division: `division` or `track`. Shapes never do."""
    return prompt_layer_to_state(point_layer, i)


# --- segmentation ---


def prompt_segmentation(
    predictor: Any,
    points: np.ndarray,
    labels: np.ndarray,
    boxes: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    shape: Sequence[int],
    multiple_box_prompts: bool,
    image_embeddings: Any = None,
    i: int | None = None,
    box_extension: float = 0,
    batched: bool | None = None,
    previous_segmentation: np.ndarray | None = None,
) -> np.ndarray | None:
    """Segment from prompts as `point_layer_to_prompts` and `shape_layer_to_prompts` read them.

    Args:
        predictor: The predictor.
        points: Points (N, 2) as (y, x).
        labels: Labels (N,).
        boxes: Boxes [y0, x0, y1, x1].
        masks: A mask (Y, X) or None for each box.
        shape: Shape (Y, X) of the image or plane.
        multiple_box_prompts: Whether several boxes without points may give one object each.
        image_embeddings: The embeddings; None uses the image that the predictor is set to.
        i: The slice or frame, for embeddings of a stack.
        box_extension: How far boxes grow: below 1 a fraction of the side length, else pixels.
        batched: Whether each positive point and each box is an object of its own.
        previous_segmentation: Labels (Y, X) that new objects are added to, with ids after those in it. They are not
            changed.

    Returns:
        Labels (Y, X), uint32, where later objects lie over earlier ones. None if there are no prompts, or if they do
        not fit together: points with several boxes, several boxes where one is allowed, only negative points.
    """
    sets = _prompt_sets(points, labels, boxes, masks, shape, multiple_box_prompts, box_extension, batched)
    if sets is None:
        return None
    if image_embeddings is None:
        image_embeddings = {
            "features": predictor.get_image_embedding(), "input_size": predictor.input_size,
            "original_size": predictor.original_size,
        }
    results = drain(segment_plane_steps(predictor, image_embeddings, i, sets, shape), verbose=False)
    found = np.zeros(tuple(shape), np.uint32) if previous_segmentation is None else (
        np.array(previous_segmentation, np.uint32)
    )
    offset = int(found.max())
    for n, result in enumerate(results, 1):
        found[_pixels(result.mask)][result.mask.mask] = offset + n
    return found


def _pixels(mask: BoxedMask) -> tuple[slice, slice]:
    y0, x0, y1, x1 = mask.box
    return slice(y0, y1), slice(x0, x1)


def _prompt_sets(points, labels, boxes, masks, shape, several, extension, batched) -> list[PromptSet] | None:
    points, labels = np.reshape(np.asarray(points, float), (-1, 2)), np.asarray(labels, int).reshape(-1)
    if not len(boxes) == len(masks):
        raise InvalidInputError(f"There must be a mask or None for each box, but got {len(boxes)} and {len(masks)}.")
    areas = [(extend_box(box, shape, extension), mask) for box, mask in zip(boxes, masks)]
    negative = points[labels == 0]
    if batched:
        signs = np.r_[1, np.zeros(len(negative), int)]
        each = [PromptSet(0, np.vstack([p[None], negative]), signs) for p in points[labels == 1]]
        return [*each, *(PromptSet(0, negative, signs[1:], *area) for area in areas)] or None
    if len(areas) > 1:
        return None if len(points) or not several else [PromptSet(0, points, labels, *area) for area in areas]
    if not areas and not (labels == 1).any():
        return None
    return [PromptSet(0, points, labels, *(areas[0] if areas else ()))]


def segment_slices_with_prompts(
    predictor: Any,
    point_prompts: Any,
    box_prompts: Any,
    image_embeddings: Any,
    shape: Sequence[int],
    track_id: int | None = None,
    update_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """Segment an object in the slices or frames with prompts.

    Args:
        predictor: The predictor.
        point_prompts: The points layer.
        box_prompts: The shapes layer.
        image_embeddings: The embeddings of the stack.
        shape: Shape (Z, Y, X) or (T, Y, X).
        track_id: Take only prompts of this track.
        update_progress: Called as `update_progress(n)` when `n` more slices are done.

    Returns:
        The object (Z, Y, X), 1 for the object; the slices with prompts; and whether a single negative point says that
        it has ended below, and above them.

    Raises:
        PromptRefusal: If there are no prompts, or those of a slice do not fit together.
    """
    prompts = _both(point_prompts, box_prompts, track_id)
    planned = prompted_planes(prompts, shape[0])
    found, slices = np.zeros(tuple(shape), np.uint32), []
    for z in planned.planes:
        try:
            sets = plan_prompts(prompts, shape[-2:], plane=z, mode="3d")
        except PromptRefusal as error:
            if error.code != "only_negative":
                raise
            continue
        mask = drain(segment_plane_steps(predictor, image_embeddings, z, sets, shape[-2:]), verbose=False)[0].mask
        found[z][_pixels(mask)][mask.mask] = 1
        slices.append(z)
        if update_progress is not None:
            update_progress(1)
    return found, np.array(slices, dtype=int), planned.stop_lower, planned.stop_upper


def track_from_prompts(
    point_prompts: Any,
    box_prompts: Any,
    seg: np.ndarray,
    predictor: Any,
    slices: Sequence[int],
    image_embeddings: Any,
    stop_upper: bool,
    threshold: float,
    projection: str,
    motion_smoothing: float = 0.5,
    box_extension: float = 0,
    update_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, bool]:
    """Follow an object through a time series, after `segment_slices_with_prompts`.

    Args:
        point_prompts: The points layer. Its prompts of the track that the next point belongs to count.
        box_prompts: The shapes layer.
        seg: The object (T, Y, X) in the frames with prompts; it is not changed.
        predictor: The predictor.
        slices: The frames with prompts.
        image_embeddings: The embeddings of the time series.
        stop_upper: Whether a single negative point behind these frames says where the object has ended.
        threshold: The track ends where the IoU of the new mask and the moved one is smaller.
        projection: How the mask of a frame prompts the next one.
        motion_smoothing: Weight, 0 to 1, of the motion so far against that of the last frame.
        box_extension: How far projected boxes grow.
        update_progress: Called as `update_progress(n)` when `n` more frames are done.

    Returns:
        The object (T, Y, X) in all frames, and whether the track ends with a division.
    """
    masks = {int(t): seg[int(t)] != 0 for t in slices if seg[int(t)].any()}
    if not masks:
        raise InvalidInputError("There is no object in the frames with prompts. Place a point or a box on it.")
    track_id = point_prompts.feature_defaults["track_id"].iloc[0] if "track_id" in point_prompts.features else None
    own = _both(point_prompts, box_prompts, None if track_id is None else int(track_id))
    stops = [t for t in own.planes() if t > max(masks) and own.is_stop(t)] if stop_upper else []
    divisions = [t for t in masks if any(p.division for p in own.in_plane(t).points)]
    callbacks = {} if update_progress is None else {"pbar_init": lambda *_: None, "pbar_update": update_progress}
    result = propagate_track(
        predictor, image_embeddings, masks, stop_frame=min(stops, default=None), division_frames=divisions,
        projection=projection, iou_threshold=threshold, motion_smoothing=motion_smoothing,
        box_extension=box_extension, verbose=False, **callbacks,
    )
    found = np.zeros(seg.shape, np.uint32)
    for t, mask in result.masks.items():
        found[t][_pixels(mask)][mask.mask] = 1
    return found, result.reason == "division"
