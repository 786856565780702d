"""Outlines of objects along the edges of their pixels, and back: exact both ways.

A pixel (y, x) is the square from (y, x) to (y + 1, x + 1). A ring is an array (N, 2) of its corners as yx, without the
first one repeated. Filling takes the pixels whose centres are inside by the even-odd rule, which is also how ImageJ and
QuPath fill; for rings made here that gives back the same pixels. Both directions handle all objects of a plane at
once, so that their cost grows with the number of corners and pixels only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from bioimage_cpp.segmentation import label as label_components

_BAND = 1024  # rows that are searched for corners at once

# The corners of an outline at a point where four pixels meet, one row for each of these (up-left, up-right, down-left,
# down-right). A corner belongs to the pixel if that differs from its two neighbours around the point (convex), or to
# the other three if these are equal and the pixel is not (concave). Its two edges go the same ways in both cases.
_NEIGHBOURS = ((1, 2, 3), (0, 3, 2), (3, 0, 1), (2, 1, 0))  # left or right of it, above or below it, across
_GOES_RIGHT = (False, True, False, True)
_GOES_DOWN = (False, False, True, True)
# With the object to the right of the way, a convex corner at these pixels is left along its horizontal edge, and a
# concave one along its vertical edge; at the others it is the other way round.
_LEAVES_SIDEWAYS = (True, False, False, True)


@dataclass(frozen=True)
class Part:
    """A part of an object whose pixels are connected by their edges: its outer ring, then the rings of its holes."""

    label: int
    rings: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Corners:
    part: np.ndarray
    y: np.ndarray
    x: np.ndarray
    goes_right: np.ndarray
    goes_down: np.ndarray
    leaves_sideways: np.ndarray
    meets_itself: np.ndarray  # the part has two corners at this point


def trace_parts(plane: np.ndarray) -> list[Part]:
    """Trace the outlines of all objects of a label image.

    Rings touch themselves nowhere, and holes touch other rings in points only: as polygons they are valid by the rules
    of OGC Simple Features. Outer rings go clockwise on the screen (y down), holes the other way.

    Args:
        plane: Label image (Y, X), 0 is background.

    Returns:
        The parts, sorted by label; parts of one label in raster order of their first pixels.
    """
    components = label_components(np.ascontiguousarray(plane), connectivity=1)
    n_parts = int(components.max()) if components.size else 0
    if not n_parts:
        return []
    flat = components.ravel()
    first = np.zeros(n_parts + 1, dtype=np.int64)
    first[flat[::-1]] = np.arange(flat.size - 1, -1, -1)  # of repeated indices the last value stays
    labels = plane.ravel()[first[1:]]
    rings = _follow(_find_corners(components))
    order = np.argsort(labels, kind="stable")
    return [Part(int(labels[k]), tuple(rings[int(k) + 1])) for k in order]


def _find_corners(components: np.ndarray) -> _Corners:
    """All corners of all parts, sorted by part, y and x."""
    height, width = components.shape
    found: list[list[np.ndarray]] = [[] for _ in range(7)]
    for start in range(0, height + 1, _BAND):
        stop = min(start + _BAND, height + 1)
        band = np.zeros((stop - start + 1, width + 2), dtype=np.int64)
        inside = components[max(start - 1, 0):min(stop, height)]
        offset = 1 if start == 0 else 0
        band[offset:offset + len(inside), 1:-1] = inside
        pixels = band[:-1, :-1], band[:-1, 1:], band[1:, :-1], band[1:, 1:]
        for k, (beside, above, across) in enumerate(_NEIGHBOURS):
            pixel, a, b, c = pixels[k], pixels[beside], pixels[above], pixels[across]
            convex = (pixel != 0) & (pixel != a) & (pixel != b)
            concave = (a != 0) & (a == b) & (a == c) & (pixel != a)
            for where, owner, is_convex in ((convex, pixel, True), (concave, a, False)):
                y, x = np.nonzero(where)
                values = (
                    owner[y, x], y + start, x, np.full(len(y), _GOES_RIGHT[k]), np.full(len(y), _GOES_DOWN[k]),
                    np.full(len(y), _LEAVES_SIDEWAYS[k] == is_convex),
                    pixel[y, x] == c[y, x] if is_convex else np.zeros(len(y), dtype=bool),
                )
                for column, value in zip(found, values):
                    column.append(value)
    columns = [np.concatenate(column) for column in found]
    order = np.lexsort((columns[2], columns[1], columns[0]))
    return _Corners(*(column[order] for column in columns))


def _follow(corners: _Corners) -> dict[int, list[np.ndarray]]:
    """Rings by part, the outer one first."""
    following = np.where(
        corners.leaves_sideways,
        _partners(corners.part, corners.y, corners.x, corners.goes_right),
        _partners(corners.part, corners.x, corners.y, corners.goes_down),
    ).tolist()
    parts, meets_itself = corners.part.tolist(), corners.meets_itself.tolist()
    points = np.stack([corners.y, corners.x], axis=1)
    places = list(map(tuple, points.tolist()))
    seen = [False] * len(parts)
    rings: dict[int, list[np.ndarray]] = {}
    for start, part in enumerate(parts):
        if seen[start]:
            continue
        path: list[int] = []
        passed: dict[tuple[int, int], int] = {}
        loops: list[list[int]] = []
        k = start
        while not seen[k]:
            seen[k] = True
            if meets_itself[k]:  # a ring that comes back to a point is cut there into two
                if places[k] in passed:
                    loop = path[passed[places[k]]:]
                    loops.append(loop)
                    del path[-len(loop):]
                    for n in loop:
                        passed.pop(places[n], None)
                passed[places[k]] = len(path)
            path.append(k)
            k = following[k]
        rings.setdefault(part, []).extend(points[loop] for loop in (path, *loops))
    for found in rings.values():
        if len(found) > 1:
            found.sort(key=_is_hole)
    return rings


def _partners(part: np.ndarray, line: np.ndarray, along: np.ndarray, opens: np.ndarray) -> np.ndarray:
    """The other end of the edge of each corner along its line: corners of a line open and close edges in turn."""
    order = np.lexsort((opens, along, line, part))  # at a point with two corners, the one that closes comes first
    partners = np.empty(len(order), dtype=np.int64)
    partners[order[0::2]], partners[order[1::2]] = order[1::2], order[0::2]
    return partners


def _is_hole(ring: np.ndarray) -> bool:
    """Whether a ring goes anticlockwise on the screen; the sign of the area by the shoelace formula tells."""
    y, x = ring[:, 0], ring[:, 1]
    return bool(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)) < 0)


def fill_rings(
    rings: Sequence[np.ndarray], owners: Sequence[int], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels whose centres are inside of polygons, by the even-odd rule over all rings of one owner.

    Args:
        rings: The rings of all polygons, arrays (N, 2) yx of any numbers.
        owners: The number of the polygon that each ring belongs to.
        shape: Shape (H, W) of the plane; what lies outside of it is cut off.

    Returns:
        The number of the polygon of each pixel, int64, and the pixels, as indices into the flat plane.
    """
    nothing = np.zeros(0, dtype=np.int64)
    kept = [(np.asarray(ring, dtype=np.float64), owner) for ring, owner in zip(rings, owners) if len(ring) > 2]
    if not kept:
        return nothing, nothing
    start = np.concatenate([ring for ring, _ in kept])
    stop = np.concatenate([np.roll(ring, -1, axis=0) for ring, _ in kept])
    owner = np.repeat([owner for _, owner in kept], [len(ring) for ring, _ in kept])
    down = start[:, 0] < stop[:, 0]
    top, bottom = np.where(down[:, None], start, stop), np.where(down[:, None], stop, start)
    # Row r is crossed if its middle, r + 0.5, is in [top, bottom).
    first, last = (np.clip(np.ceil(y - 0.5), 0, shape[0]).astype(np.int64) for y in (top[:, 0], bottom[:, 0]))
    edge, row = count_up(first, last)
    way = bottom[edge] - top[edge]
    x = top[edge, 1] + (row + 0.5 - top[edge, 0]) * way[:, 1] / way[:, 0]
    order = np.lexsort((x, row, owner[edge]))
    column = np.clip(np.ceil(x[order] - 0.5), 0, shape[1]).astype(np.int64)
    entry = order[0::2]  # crossings go in and out in turn
    span, pixel = count_up(column[0::2], column[1::2])
    return owner[edge[entry]][span], row[entry][span] * shape[1] + pixel


def count_up(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of half-open intervals, with the number of the interval that each is of."""
    n = last - first
    interval = np.repeat(np.arange(len(n)), n)
    return interval, np.arange(len(interval)) + np.repeat(first - (np.cumsum(n) - n), n)
