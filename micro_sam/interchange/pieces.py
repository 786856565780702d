"""Objects in files of outlines: a label image becomes pieces in planes, and pieces are painted into a label image."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from ..core.output import smallest_dtype
from ..core.progress import Step, Steps
from .contours import Part, fill_rings, trace_parts
from .label_image import AXES, LabelImage

_OVERLAP = "pixels belong to several objects; a label image holds one, and the smaller object was taken"


@dataclass(frozen=True)
class Piece:
    """What one outline of a file says: the whole object, or its part in one plane.

    `polygons` are filled each by the even-odd rule of its rings (N, 2) yx, and put together; or `pixels` are indices
    into the flat plane. `label` is None if the file has no id. `z` and `t` count from 0; `plane` is the number in a
    stack of any axis, used where both are None. With none of them the piece is in all planes.
    """

    polygons: Sequence[Sequence[np.ndarray]] = ()
    pixels: np.ndarray | None = None
    label: int | None = None
    name: str | None = None
    class_name: str | None = None
    z: int | None = None
    t: int | None = None
    plane: int | None = None


@dataclass(frozen=True)
class Target:
    """The label image that is wanted; what is None is taken from the file, if that tells."""

    shape: tuple[int, ...] | None = None
    axes: str | None = None
    scale: tuple[float, ...] | None = None
    units: tuple[str | None, ...] | None = None
    key: str | None = None


@dataclass
class Skipped:
    """Counts what could not be taken over from a file; `warn` says it, once per reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, n: int = 1) -> None:
        if n:
            self.counts[reason] = self.counts.get(reason, 0) + n

    def warn(self, path: Any) -> None:
        for reason, n in self.counts.items():
            warnings.warn(f"{path}: {n} {reason}.", stacklevel=2)


def trace_pieces(image: LabelImage) -> Steps[list[tuple[int, int, list[Part]]]]:
    """Trace all outlines of a label image; return (number of the plane, id, parts) for each object in each plane."""
    found = []
    for n, plane in enumerate(image.planes):
        yield Step(n, len(image.planes), "Trace outlines")
        parts = itertools.groupby(trace_parts(plane), lambda part: part.label)
        found += [(n, label, list(group)) for label, group in parts]
    yield Step(len(image.planes), len(image.planes), "Trace outlines")
    return found


def find_target(path: Any, target: Target, record: dict[str, Any] | None, what: str) -> Target:
    """Complete the target by the record that this package left in a file.

    Raises:
        InvalidInputError: If the shape of the image remains unknown, or is another one, or the axes do not fit it.
    """
    record = record or {}
    shape = target.shape or record.get("size")
    if shape is None:
        raise InvalidInputError(
            f"{path} does not say how large the image is: {what} hold outlines only. Pass the image they belong to as "
            "like (--like), or its shape (--shape Y X, or --shape Z Y X)."
        )
    shape = tuple(int(s) for s in shape)
    if record and list(shape) != record.get("size"):
        raise InvalidInputError(
            f"The outlines in {path} were written for an image of the shape {record.get('size')}, but {list(shape)} "
            "was given. Check that they belong to this image."
        )
    axes = target.axes or record.get("axes")
    if len(shape) not in (2, 3) or min(shape) < 1 or (axes and (axes not in AXES or len(axes) != len(shape))):
        raise InvalidInputError(
            f"The shape must be (Y, X), (Z, Y, X) or (T, Y, X) and fit the axes, but shape={shape} and axes={axes!r}."
        )
    facts = [getattr(target, name) or record.get(name) for name in ("scale", "units")]
    return Target(shape, axes, *(fact and tuple(fact) for fact in facts), target.key)


def paint_pieces(pieces: Sequence[Piece], target: Target, path: Any) -> Steps[LabelImage]:
    """Paint pieces into a label image; where objects overlap, the one with fewer pixels in the plane is on top.

    Pieces without an id become objects of their own, with new ids after the highest one.

    Args:
        pieces: The pieces.
        target: The label image, with a shape.
        path: The file, for messages.

    Returns:
        The labels with names and classes; warns of pieces outside of the image and of overlaps.

    Raises:
        InvalidInputError: If the pieces need another axis than the image has, or none of them is in the image.
    """
    skipped = Skipped()
    axes = target.axes or ("YX" if len(target.shape) == 2 else _stack_axes(pieces))
    n_planes = target.shape[0] if len(target.shape) == 3 else 1
    labels = _complete_labels(pieces)
    by_plane: list[list[int]] = [[] for _ in range(n_planes)]
    for k, piece in enumerate(pieces):
        plane = _plane_of(piece, axes, path)
        if plane is None:
            if n_planes > 1:
                skipped.add("outlines name no plane and were painted into all of them")
            for members in by_plane:
                members.append(k)
        elif plane < n_planes:
            by_plane[plane].append(k)
        else:
            skipped.add(f"outlines are in planes that the image, with {n_planes}, does not have and were left out")
    out = np.zeros((n_planes, *target.shape[-2:]), dtype=smallest_dtype(labels))
    for n, members in enumerate(by_plane):
        yield Step(n, n_planes, "Paint objects")
        _paint_plane(out[n], [pieces[k] for k in members], labels[members], skipped)
    yield Step(n_planes, n_planes, "Paint objects")
    present = set(np.unique(out).tolist())
    if pieces and present == {0}:
        raise InvalidInputError(
            f"None of the {len(set(labels.tolist()))} objects in {path} has a pixel in the image of shape "
            f"{target.shape}. Check that they belong to this image."
        )
    n_lost = len(set(labels.tolist()) - present)
    skipped.add("objects have no pixel in the image or are hidden by others, and are lost", n_lost)
    skipped.warn(path)
    tables = []
    for name in ("name", "class_name"):
        texts = [(int(label), getattr(piece, name)) for label, piece in zip(labels, pieces)]
        table = {label: text for label, text in reversed(texts) if text and label in present}  # the first one counts
        tables.append(dict(sorted(table.items())))
    return LabelImage(out.reshape(target.shape), axes, *tables, target.scale, target.units)


def read_id(value: Any) -> int | None:
    """The id of an object as a file has it, number or text; None if it is none."""
    text = str(value)
    return int(text) if text.isdecimal() and 0 < int(text) < 2**64 else None


def _stack_axes(pieces: Sequence[Piece]) -> str:
    return "TYX" if any(p.t for p in pieces) and not any(p.z for p in pieces) else "ZYX"


def _complete_labels(pieces: Sequence[Piece]) -> np.ndarray:
    """The id of each piece, uint64."""
    highest = max((p.label for p in pieces if p.label is not None), default=0)
    labels = np.zeros(len(pieces), dtype=np.uint64)
    for k, piece in enumerate(pieces):
        if piece.label is None:
            highest += 1
        labels[k] = highest if piece.label is None else piece.label
    return labels


def _plane_of(piece: Piece, axes: str, path: Any) -> int | None:
    """The number of the plane that a piece is in; None for all."""
    along, other = (piece.t, piece.z) if axes == "TYX" else (piece.z, piece.t)
    if axes == "YX":
        other, along = along or other, None
    if other or (axes == "YX" and piece.plane):
        raise InvalidInputError(
            f"{path} has outlines in several planes or frames ({_where(piece)}), but the image has the axes {axes}. "
            "Pass the stack they belong to as like (--like), or its shape and axes (--shape and --axes). Files with "
            "both planes and frames are not supported: save them one time point at a time."
        )
    if axes == "YX":
        return 0
    return along if along is not None else piece.plane


def _where(piece: Piece) -> str:
    return ", ".join(f"{a}={v}" for a, v in (("z", piece.z), ("t", piece.t), ("plane", piece.plane)) if v)


def _paint_plane(plane: np.ndarray, pieces: Sequence[Piece], labels: np.ndarray, skipped: Skipped) -> None:
    """Paint into one plane, in place."""
    polygons = [(k, rings) for k, piece in enumerate(pieces) for rings in piece.polygons]
    polygon, pixels = fill_rings(
        [ring for _, rings in polygons for ring in rings], [n for n, (_, rings) in enumerate(polygons) for _ in rings],
        plane.shape,
    )
    owners = [np.array([k for k, _ in polygons], dtype=np.int64)[polygon]]
    painted = [pixels]
    for k, piece in enumerate(pieces):
        if piece.pixels is not None:
            owners.append(np.full(len(piece.pixels), k))
            painted.append(piece.pixels)
    pixels, owner = np.concatenate(painted), np.concatenate(owners)
    if not len(pixels):
        return
    ids, number = np.unique(labels, return_inverse=True)  # pieces of one object belong together
    owner = number[owner]
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(-np.bincount(owner, minlength=len(ids)), kind="stable")] = np.arange(len(ids))
    order = np.argsort(rank[owner], kind="stable")
    pixels, owner = pixels[order], owner[order]
    flat = plane.reshape(-1)
    flat[pixels] = ids[owner].astype(plane.dtype)  # of repeated pixels the last value stays
    if len(pixels) > np.count_nonzero(flat):
        claims = np.unique(pixels * len(ids) + owner) // len(ids)
        skipped.add(_OVERLAP, int((np.unique(claims, return_counts=True)[1] > 1).sum()))
