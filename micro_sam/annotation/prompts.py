"""What is asked of the model because of the prompts of a user. No torch, no viewer.

The prompts themselves are in `prompt_data`; this module has their names as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from skimage.draw import ellipse

from ..core.errors import InvalidInputError
from ..core.prompts import box_from_mask, extend_box, mask_from_polygon, points_from_scribbles
from .geometry import check_mode
from .prompt_data import (
    SCRIBBLES,
    SHAPE_KINDS,
    PointArrays,
    PointPrompt,
    Prompts,
    ShapeArrays,
    ShapePrompt,
    points_from_arrays,
    points_to_arrays,
    shapes_from_arrays,
    shapes_to_arrays,
)

__all__ = [
    "SCRIBBLES", "SHAPE_KINDS", "PointArrays", "PointPrompt", "PromptRefusal", "PromptSet", "PromptedPlanes", "Prompts",
    "ShapeArrays", "ShapePrompt", "check_batched", "plan_prompts", "points_from_arrays", "points_to_arrays",
    "prompted_planes", "shapes_from_arrays", "shapes_to_arrays",
]


class PromptRefusal(InvalidInputError):
    """The prompts cannot be used as they are; the message says what to do.

    Args:
        message: For the user.
        code: `none`, `stop`, `only_negative`, `several_shapes`, `negative_shape`, `across_planes`, `outside` or
            `batched`.
    """

    def __init__(self, message: str, *, code: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, eq=False)
class PromptSet:
    """What is asked of the model for one object in one plane, in (y, x).

    Attributes:
        object_id: The id that the object gets.
        points: Points (N, 2), float; N may be 0.
        labels: Labels (N,), int: 1 for the object, 0 for background.
        box: Half-open box [y0, x0, y1, x1], int, or None.
        mask: Mask (Y, X), bool, or None.
    """

    object_id: int
    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None = None
    mask: np.ndarray | None = None


def plan_prompts(
    prompts: Prompts,
    plane_shape: Sequence[int],
    *,
    plane: int | None = None,
    track_id: int | None = None,
    batched: bool = False,
    mode: str = "2d",
    first_id: int = 1,
    correcting: bool = False,
) -> list[PromptSet]:
    """Decide which objects the prompts of an image, or of one plane, ask for.

    | prompts | objects |
    |---|---|
    | points, scribbles | one |
    | one shape, with or without points and scribbles | one |
    | several shapes and nothing else | one each in an image; refused in a plane of a stack |
    | several shapes and points or scribbles | refused |
    | nothing positive | refused; none in a batch of an image |
    | batched | one for each positive point, then for each positive scribble or shape, always with all negative ones |

    A batch of a volume numbers the prompts of all planes, so that an object has the same id in each of them.

    Args:
        prompts: The prompts.
        plane_shape: Shape (Y, X). Shapes are clipped to it.
        plane: The plane of a stack; None for an image.
        track_id: Take only prompts of this track.
        batched: Whether each prompt is an object of its own.
        mode: `2d`, `3d` or `tracking`.
        first_id: Id of the first object; the others are numbered from there.
        correcting: Whether the prompts correct an existing mask. Then negative points alone are enough.

    Returns:
        The objects; where they overlap, later ones are meant to paint over earlier ones.

    Raises:
        PromptRefusal: If there is nothing to segment, or the prompts do not fit together.
        InvalidInputError: If plane, coordinates and mode do not fit.
    """
    candidates = _select(prompts, plane, track_id, mode)
    here = candidates.in_plane(plane)
    shape = (int(plane_shape[0]), int(plane_shape[1]))
    where = _where(plane, track_id)
    if batched:
        check_batched(mode, correcting)
    if here.is_empty:
        raise PromptRefusal(
            f"There are no prompts {where}. Place a point on an object, or draw a box around it.", code="none"
        )
    if not correcting and here.is_stop(plane):
        raise PromptRefusal(
            f"The only prompt {where} is a negative point, which says that the object has ended. Add a positive point "
            "or a box if it is there.", code="stop",
        )
    if batched:
        parts = [(k, part.in_plane(plane)) for k, part in enumerate(candidates.split())]
        sets = [(k, _prompt_sets(part, shape, where)[0]) for k, part in parts if _has_positive(part)]
        is_missing = not sets and mode != "2d"
    else:
        several, can_batch = mode == "2d" and not correcting, mode != "tracking" and not correcting
        sets = list(enumerate(_prompt_sets(here, shape, where, several=several, can_batch=can_batch)))
        is_missing = not correcting and sets[0][1].box is None and not (sets[0][1].labels == 1).any()
    if is_missing:
        raise PromptRefusal(
            f"There are only negative prompts {where}. Add a positive point or a box.", code="only_negative"
        )
    return [replace(s, object_id=first_id + k) for k, s in sets]


def check_batched(mode: str, correcting: bool) -> None:
    """Raise `PromptRefusal` where several objects at once are not possible."""
    if mode == "tracking" or correcting:
        raise PromptRefusal(
            "Several objects at once are not possible in a time series, and not while one is being corrected. Switch "
            "off 'batched'.", code="batched",
        )


def _has_positive(prompts: Prompts) -> bool:
    return any(p.positive for p in (*prompts.points, *prompts.shapes))


def _select(prompts: Prompts, plane: int | None, track_id: int | None, mode: str) -> Prompts:
    """The prompts that count, after a look at whether plane, coordinates and mode fit."""
    check_mode(mode)
    ndim = 2 if mode == "2d" else 3
    if (plane is None) != (ndim == 2):
        raise InvalidInputError(f"The mode {mode!r} needs {'no plane' if ndim == 2 else 'a plane'}, but got {plane!r}.")
    if prompts.ndim not in (None, ndim):
        raise InvalidInputError(f"The mode {mode!r} needs {ndim} coordinates, but the prompts have {prompts.ndim}.")
    candidates = prompts if track_id is None else prompts.of_track(track_id)
    for s in candidates.across_planes():
        if s.span[0] <= plane <= s.span[1]:
            raise PromptRefusal(f"{_across(s)} Delete it, and draw it in plane {plane}.", code="across_planes")
    return candidates


def _where(plane: int | None, track_id: int | None) -> str:
    place = "in the image" if plane is None else f"in plane {plane}"
    return place if track_id is None else f"of track {track_id} {place}"


def _across(shape: ShapePrompt) -> str:
    low, high = shape.span
    return f"A {shape.kind} lies across planes, from {low:g} to {high:g}, and cannot be used."


def _prompt_sets(
    prompts: Prompts, shape: tuple[int, int], where: str, several: bool = False, can_batch: bool = False
) -> list[PromptSet]:
    """One object from all prompts, or (`several`) one from each shape if there is nothing else."""
    areas = [s for s in prompts.shapes if s.kind not in SCRIBBLES]
    if any(not s.positive for s in areas):
        raise PromptRefusal(
            f"A negative {next(s.kind for s in areas if not s.positive)} {where} cannot be used: only points, paths "
            "and lines can be negative. Delete it.", code="negative_shape",
        )
    points, labels = _points(prompts, shape, where)
    if len(areas) > 1 and (len(points) or not several):
        advice = ", with points. Remove the points or all but one shape" if several else ". Remove the others"
        batch = ", or switch on 'batched'" if can_batch else ""
        raise PromptRefusal(
            f"There are {len(areas)} shapes {where}, but an object may have only one{advice}{batch}.",
            code="several_shapes",
        )
    if not areas:
        return [PromptSet(0, points, labels)]
    return [PromptSet(0, points, labels, *_box_and_mask(area, shape, where)) for area in areas]


def _points(prompts: Prompts, shape: tuple[int, int], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 2) and labels (N,) of points and scribbles."""
    limits = np.array(shape) - 1
    points = np.array([p.position[-2:] for p in prompts.points], dtype=float).reshape(-1, 2)
    labels = np.array([p.positive for p in prompts.points], dtype=int)
    beyond = _beyond(points, shape)
    if beyond.any():
        raise PromptRefusal(
            f"A point {where} lies outside of it, at (y, x) = {points[beyond][0].round(1).tolist()}; the shape is "
            f"{shape}. Move it or delete it.", code="outside",
        )
    points, labels = [np.clip(points, 0, limits)], [labels]
    for s in prompts.shapes:
        if s.kind not in SCRIBBLES:
            continue
        sampled, values = points_from_scribbles([s.yx], [int(s.positive)])
        inside = ~_beyond(sampled, shape)
        if not inside.any():
            raise _outside(s, shape, where)
        points.append(np.clip(sampled[inside], 0, limits))
        labels.append(values[inside])
    return np.concatenate(points), np.concatenate(labels)


def _beyond(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which points (N, 2) are not on a pixel. Pixels reach half a pixel around their centre."""
    return ((points < -0.5) | (points > np.array(shape) - 0.5)).any(axis=1)


def _box_and_mask(area: ShapePrompt, shape: tuple[int, int], where: str) -> tuple[np.ndarray, np.ndarray | None]:
    corners = area.yx
    try:
        if area.kind == "rectangle":
            mask = None
            box = extend_box([*corners.min(axis=0), *corners.max(axis=0)], shape)
        else:
            mask = _ellipse_mask(corners, shape) if area.kind == "ellipse" else mask_from_polygon(corners, shape)
            box = box_from_mask(mask)
    except InvalidInputError as error:
        raise _outside(area, shape, where) from error
    if box is None or (box[:2] >= box[2:]).any():
        raise _outside(area, shape, where)
    return box, mask


def _ellipse_mask(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels inside the ellipse in a rectangle, which may be rotated."""
    side_a, side_b = corners[1] - corners[0], corners[3] - corners[0]
    mask = np.zeros(shape, dtype=bool)
    radii = np.linalg.norm(side_a) / 2, np.linalg.norm(side_b) / 2
    if min(radii) > 0:
        mask[ellipse(*corners.mean(axis=0), *radii, shape=shape, rotation=np.arctan2(side_a[1], side_a[0]))] = True
    return mask


def _outside(shape_prompt: ShapePrompt, shape: tuple[int, int], where: str) -> PromptRefusal:
    low, high = shape_prompt.yx.min(axis=0).round(1).tolist(), shape_prompt.yx.max(axis=0).round(1).tolist()
    return PromptRefusal(
        f"A {shape_prompt.kind} {where} covers no pixel: it reaches from {low} to {high} (y, x); the shape is "
        f"{shape}. Delete it, or draw it again.", code="outside",
    )


@dataclass(frozen=True)
class PromptedPlanes:
    """The planes of a stack in which something is said about an object.

    Attributes:
        planes: Planes with prompts, ascending, without stops.
        stop_lower: Whether a stop lies below the lowest of them.
        stop_upper: Whether a stop lies above the highest of them.
        stops: The planes of these stops, ascending.
        ignored: What was left out and why, for the user.
    """

    planes: tuple[int, ...]
    stop_lower: bool
    stop_upper: bool
    stops: tuple[int, ...]
    ignored: tuple[str, ...]


def prompted_planes(prompts: Prompts, n_planes: int, *, track_id: int | None = None) -> PromptedPlanes:
    """List the planes of a stack with prompts, and the stops at their ends. Stops between prompts are left out.

    Args:
        prompts: The prompts.
        n_planes: Number of planes of the stack.
        track_id: Take only prompts of this track.

    Raises:
        PromptRefusal: If there is no plane with prompts other than a stop.
    """
    selected = prompts if track_id is None else prompts.of_track(track_id)
    ignored = [_across(s) for s in selected.across_planes()]
    planes, marks = [], []
    for plane in selected.planes():
        if not 0 <= plane < n_planes:
            ignored.append(f"Prompts in plane {plane} are ignored: the image has the planes 0 to {n_planes - 1}.")
        else:
            (marks if selected.is_stop(plane) else planes).append(plane)
    if not planes:
        track = "" if track_id is None else f" of track {track_id}"
        what = f"There are only stops (single negative points){track}" if marks else f"There are no prompts{track}"
        raise PromptRefusal(
            " ".join([*ignored, f"{what}. Place a positive point or a box in a plane with the object."]),
            code="stop" if marks else "none",
        )
    stops = tuple(plane for plane in marks if not planes[0] < plane < planes[-1])
    ignored += [
        f"The single negative point in plane {plane} is no stop, since the object is prompted below and above."
        for plane in marks if plane not in stops
    ]
    return PromptedPlanes(
        tuple(planes), any(p < planes[0] for p in stops), any(p > planes[-1] for p in stops), stops, tuple(ignored)
    )
