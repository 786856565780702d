"""Prompts of a user as plain data, and their form in layers of a viewer and in a journal. Numpy only.

Coordinates are voxels of the image: (y, x), or (z, y, x) and (t, y, x). The first axis is rounded to the plane that a
prompt belongs to. Rectangles, ellipses and polygons are shapes; paths and lines are scribbles, which stand for points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InvalidInputError
from .geometry import plane_of

SCRIBBLES = ("path", "line")
SHAPE_KINDS = ("rectangle", "ellipse", "polygon", *SCRIBBLES)


def _coordinates(values: Sequence[float]) -> tuple[float, ...]:
    try:
        position = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        position = ()
    if len(position) not in (2, 3) or not all(map(isfinite, position)):
        raise InvalidInputError(f"A position must be two or three finite numbers, but is {values!r}.")
    return position


def _track_id(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or number != float(value):
        raise InvalidInputError(f"A track id must be a whole number from 1 on, but is {value!r}.")
    return number


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or value in ("positive", "negative"):
        return value != "negative" and bool(value)
    raise InvalidInputError(f"A prompt must be 'positive' or 'negative' (True or False), but is {value!r}.")


@dataclass(frozen=True)
class PointPrompt:
    """A point; `division` says that its track divides in this frame."""

    position: tuple[float, ...]
    positive: bool
    track_id: int = 1
    division: bool = False

    def __post_init__(self):
        object.__setattr__(self, "position", _coordinates(self.position))
        object.__setattr__(self, "positive", _is_positive(self.positive))
        object.__setattr__(self, "track_id", _track_id(self.track_id))

    @property
    def plane(self) -> int | None:
        """The plane; None in an image."""
        return plane_of(self.position[0]) if len(self.position) == 3 else None


@dataclass(frozen=True)
class ShapePrompt:
    """A shape or scribble; `kind` is one of `SHAPE_KINDS`. An ellipse is given by the four corners around it."""

    kind: str
    vertices: tuple[tuple[float, ...], ...]
    positive: bool = True
    track_id: int = 1

    def __post_init__(self):
        vertices = tuple(_coordinates(v) for v in self.vertices)
        if self.kind not in SHAPE_KINDS:
            raise InvalidInputError(f"A shape must be one of {', '.join(SHAPE_KINDS)}, but is {self.kind!r}.")
        if len({len(v) for v in vertices}) != 1:
            raise InvalidInputError(f"A {self.kind} needs vertices with equally many coordinates, but has {vertices}.")
        if self.kind == "ellipse" and len(vertices) != 4:
            raise InvalidInputError(f"An ellipse needs the four corners around it, but has {len(vertices)} vertices.")
        object.__setattr__(self, "vertices", vertices)
        object.__setattr__(self, "positive", _is_positive(self.positive))
        object.__setattr__(self, "track_id", _track_id(self.track_id))

    @property
    def plane(self) -> int | None:
        """The plane; None in an image, and for a shape that lies across planes."""
        span = self.span
        return None if span is None or span[1] - span[0] > 0.5 else plane_of((span[0] + span[1]) / 2)

    @property
    def span(self) -> tuple[float, float] | None:
        """Lowest and highest position on the first axis; None in an image."""
        if len(self.vertices[0]) == 2:
            return None
        first = [v[0] for v in self.vertices]
        return min(first), max(first)

    @property
    def yx(self) -> np.ndarray:
        """The vertices (N, 2) in the plane."""
        return np.array(self.vertices)[:, -2:]


@dataclass(frozen=True)
class Prompts:
    """All prompts of an image. Like any value: to change them, make new ones."""

    points: tuple[PointPrompt, ...] = ()
    shapes: tuple[ShapePrompt, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "points", tuple(self.points))
        object.__setattr__(self, "shapes", tuple(self.shapes))
        if len({len(p.position) for p in self.points} | {len(s.vertices[0]) for s in self.shapes}) > 1:
            raise InvalidInputError("Some prompts have two coordinates and others three. Place them in one image.")

    @property
    def is_empty(self) -> bool:
        return not (self.points or self.shapes)

    @property
    def ndim(self) -> int | None:
        """Number of coordinates; None without prompts."""
        for position in (*(p.position for p in self.points), *(s.vertices[0] for s in self.shapes)):
            return len(position)
        return None

    def planes(self) -> list[int]:
        """The planes with prompts, ascending; none in an image."""
        return sorted({p.plane for p in (*self.points, *self.shapes)} - {None})

    def in_plane(self, plane: int | None, track_id: int | None = None) -> "Prompts":
        """The prompts in a plane (None: in all) and of a track (None: of all), with all their coordinates."""
        def wanted(p: PointPrompt | ShapePrompt) -> bool:
            return (plane is None or p.plane == plane) and (track_id is None or p.track_id == track_id)

        return Prompts(tuple(filter(wanted, self.points)), tuple(filter(wanted, self.shapes)))

    def without_plane(self, plane: int) -> "Prompts":
        """All prompts that are not in a plane."""
        return Prompts(
            tuple(p for p in self.points if p.plane != plane), tuple(s for s in self.shapes if s.plane != plane)
        )

    def of_track(self, track_id: int) -> "Prompts":
        """The prompts of a track."""
        return self.in_plane(None, track_id)

    def across_planes(self) -> tuple[ShapePrompt, ...]:
        """Shapes that lie across planes, which nothing can use."""
        return tuple(s for s in self.shapes if s.span is not None and s.plane is None)

    def is_stop(self, plane: int | None, track_id: int | None = None) -> bool:
        """Whether the only prompt in a plane is a negative point: it says that the object has ended before."""
        here = self.in_plane(plane, track_id)
        return plane is not None and len(here.points) == 1 and not here.points[0].positive and not here.shapes

    def split(self) -> "list[Prompts]":
        """Each positive point and each positive shape or scribble on its own, with all negative points and scribbles.

        Points come first, then shapes, each in their order.
        """
        points = tuple(p for p in self.points if not p.positive)
        shapes = tuple(s for s in self.shapes if not s.positive)
        return [
            *(Prompts((p, *points), shapes) for p in self.points if p.positive),
            *(Prompts(points, (s, *shapes)) for s in self.shapes if s.positive),
        ]

    def to_json(self) -> dict[str, list]:
        """Lists and numbers for a file; `from_json` reads them."""
        return {
            "points": [[list(p.position), int(p.positive), p.track_id, int(p.division)] for p in self.points],
            "shapes": [[s.kind, [list(v) for v in s.vertices], int(s.positive), s.track_id] for s in self.shapes],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Prompts":
        """Read what `to_json` gave.

        Raises:
            InvalidInputError: If it is something else.
        """
        try:
            return cls(
                [PointPrompt(position, bool(positive), track_id, bool(division))
                 for position, positive, track_id, division in content["points"]],
                [ShapePrompt(kind, vertices, bool(positive), track_id)
                 for kind, vertices, positive, track_id in content["shapes"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"These are no prompts as they are written to a journal: {error}.") from error


class PointArrays(NamedTuple):
    """Points as a layer holds them: coordinates (N, D), and per point `positive` or `negative`, `track` or `division`,
    and the track id as text."""

    coordinates: np.ndarray
    labels: list[str]
    states: list[str]
    track_ids: list[str]


class ShapeArrays(NamedTuple):
    """Shapes as a layer holds them: arrays (N, D) of vertices, and per shape its kind, track id, and sign."""

    vertices: list[np.ndarray]
    kinds: list[str]
    track_ids: list[str]
    positive: list[bool]


def points_from_arrays(
    coordinates: np.ndarray,
    labels: Sequence[str],
    states: Sequence[str] | None = None,
    track_ids: Sequence[str | int] | None = None,
) -> tuple[PointPrompt, ...]:
    """Read points from what a layer holds.

    Args:
        coordinates: Voxels (N, D) with D of 2 or 3.
        labels: `positive` or `negative` for each point.
        states: `track` or `division` for each point; None for `track`.
        track_ids: The track of each point; None for 1.

    Raises:
        InvalidInputError: If numbers differ, or a value is none of these.
    """
    n = len(coordinates)
    states, track_ids = ["track"] * n if states is None else states, [1] * n if track_ids is None else track_ids
    _check_lengths(n, labels=labels, states=states, track_ids=track_ids)
    unknown = set(states) - {"track", "division"}
    if unknown:
        raise InvalidInputError(f"The state of a point must be 'track' or 'division', but is {unknown.pop()!r}.")
    return tuple(
        PointPrompt(position, label, track_id, state == "division")
        for position, label, state, track_id in zip(coordinates, labels, states, track_ids)
    )


def points_to_arrays(points: Sequence[PointPrompt], ndim: int = 2) -> PointArrays:
    """What a layer has to hold for points; `ndim` is that of the image."""
    return PointArrays(
        np.array([p.position for p in points], dtype=float).reshape(-1, ndim),
        ["positive" if p.positive else "negative" for p in points],
        ["division" if p.division else "track" for p in points],
        [str(p.track_id) for p in points],
    )


def shapes_from_arrays(
    vertices: Sequence[np.ndarray],
    kinds: Sequence[str],
    track_ids: Sequence[str | int] | None = None,
    positive: Sequence[bool | str] | None = None,
) -> tuple[ShapePrompt, ...]:
    """Read shapes from what a layer holds.

    Args:
        vertices: Voxels (N, D) of each shape.
        kinds: One of `SHAPE_KINDS` for each.
        track_ids: The track of each shape; None for 1.
        positive: Whether each is part of the object, or `positive` and `negative`; None for all.

    Raises:
        InvalidInputError: If numbers differ, or a value is none of these.
    """
    n = len(vertices)
    track_ids, positive = [1] * n if track_ids is None else track_ids, [True] * n if positive is None else positive
    _check_lengths(n, kinds=kinds, track_ids=track_ids, positive=positive)
    return tuple(
        ShapePrompt(str(kind), corners, sign, track_id)
        for kind, corners, sign, track_id in zip(kinds, vertices, positive, track_ids)
    )


def shapes_to_arrays(shapes: Sequence[ShapePrompt]) -> ShapeArrays:
    """What a layer has to hold for shapes."""
    return ShapeArrays(
        [np.array(s.vertices) for s in shapes], [s.kind for s in shapes], [str(s.track_id) for s in shapes],
        [s.positive for s in shapes],
    )


def _check_lengths(n: int, **columns: Sequence) -> None:
    for name, values in columns.items():
        if len(values) != n:
            raise InvalidInputError(f"There must be one of {name} for each of the {n} prompts, but got {len(values)}.")
