"""ImageJ ROIs: a zip as the ROI Manager saves it, with one ROI per object and plane, or a single `.roi`.

An outline in one ring becomes a traced ROI with integer corners, one with holes or several parts a composite ROI, whose
path ImageJ fills by the even-odd rule. Id, name and class are properties of the ROI, the class also its group. Image
size, axes and pixel size are in the comment of the zip, which other programs ignore and lose.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from roifile import ROI_OPTIONS, ROI_SUBTYPE, ROI_TYPE, ImagejRoi

from .._version import __version__
from ..core.errors import ImageReadError, InvalidInputError
from ..core.output import temporary_path
from ..core.progress import Steps
from .contours import Part
from .label_image import LabelImage
from .pieces import Piece, Skipped, Target, find_target, paint_pieces, read_id, trace_pieces

# Coordinates of plain ROIs are 16 bit, of which ImageJ takes the lowest as negative; those of paths are float32.
_MAX_INTEGER = 60535
_MAX_FLOAT = 2**24
_OUTLINES = (ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
_NO_AREA_KINDS = (ROI_SUBTYPE.TEXT, ROI_SUBTYPE.ARROW, ROI_SUBTYPE.IMAGE)
_CURVE_STEPS = 32
_UNFIT = re.compile(r"[^\w .,;()+=@#&'-]|[^\u0000-\uffff]")  # in names of files, or of ROIs in UTF-16
_PROPERTY = re.compile(r"^\s*(micro_sam_\w+)\s*[:=]\s*(\S*)\s*$", re.MULTILINE)
_NO_AREA = "ROIs are points, lines, texts or images without an area and were left out"
_SQUARE = "rectangles have round corners and were taken with square ones"
_STRAIGHT = "outlines are splines and were taken with straight lines between their points"


# --- writing ---


def write_steps(path: Path, image: LabelImage, name: str) -> Steps[None]:
    """Write all objects."""
    if max(image.labels.shape) > _MAX_FLOAT:
        raise InvalidInputError(
            f"ImageJ ROIs hold coordinates up to {_MAX_FLOAT}, but the labels have the shape {image.labels.shape}."
        )
    pieces = yield from trace_pieces(image)
    groups = {text: n for n, text in enumerate(sorted(set(image.classes.values())), 1)}
    comment = {"micro_sam": {"version": __version__, "content": image.content()}}
    with temporary_path(path, is_folder=False) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as file:
        file.comment = json.dumps(comment).encode()
        for plane, label, parts in pieces:
            class_name = image.classes.get(label)
            roi = _make_roi(parts)
            roi.name = _roi_name(label, image.names.get(label), plane if image.labels.ndim == 3 else None)
            roi.group = groups.get(class_name, 0)
            texts = {"micro_sam_name": image.names.get(label), "micro_sam_class": class_name}
            roi.properties = {"micro_sam_label": label} | {k: quote(text) for k, text in texts.items() if text}
            if image.labels.ndim == 3:  # stacks with one channel go by `position`, hyperstacks by `z` and `t`
                roi.position = plane + 1
                setattr(roi, "t_position" if image.axes == "TYX" else "z_position", plane + 1)
            file.writestr(f"{roi.name}.roi", roi.tobytes())


def _make_roi(parts: Sequence[Part]) -> ImagejRoi:
    rings = [ring[:, ::-1] for part in parts for ring in part.rings]
    points = np.concatenate(rings)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    roi = ImagejRoi(left=left, top=top, right=right, bottom=bottom)
    if len(rings) == 1 and max(right, bottom) <= _MAX_INTEGER:
        roi.roitype = ROI_TYPE.TRACED
        roi.n_coordinates = len(points)
        roi.integer_coordinates = (points - [left, top]).astype(np.int32)
        return roi
    path: list[np.ndarray] = []
    for ring in rings:
        commands = np.ones((len(ring), 1))  # line to
        commands[0] = 0  # move to
        path += [np.hstack([commands, ring]).ravel(), np.array([4.0])]  # close
    roi.roitype = ROI_TYPE.RECT
    roi.multi_coordinates = np.concatenate(path).astype(np.float32)
    roi.shape_roi_size = len(roi.multi_coordinates)
    return roi


def _roi_name(label: int, name: str | None, plane: int | None) -> str:
    """A name that no other ROI of the file has, and that is fit for a file; names in full are a property."""
    text = _UNFIT.sub("_", name or "")[:100]
    return f"{label:04d}{text and ' '}{text}{'' if plane is None else f' plane {plane + 1:04d}'}"


# --- reading ---


def read_content(path: Path, name: str = "segmentation") -> dict[str, Any] | None:
    """What `write_steps` noted about the labels, or None."""
    try:
        with zipfile.ZipFile(path) as file:
            return json.loads(file.comment)["micro_sam"]["content"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # there is none that is ours
        return None


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read ROIs as objects; where they have no id of ours, each ROI is an object."""
    skipped = Skipped()
    try:
        pieces = [piece for roi, name in _read_rois(path) for piece in _read_roi(roi, name, skipped)]
    except Exception as error:  # damaged ROIs may raise anything
        raise ImageReadError(
            f"{path} could not be read as ImageJ ROIs: {type(error).__name__}: {error}. Save it again from the ROI "
            "Manager."
        ) from error
    target = find_target(path, target, read_content(path), "ImageJ ROIs")
    skipped.warn(path)
    return (yield from paint_pieces(pieces, target, path))


def _read_rois(path: Path) -> Iterator[tuple[ImagejRoi, str]]:
    if path.suffix.lower() == ".roi":
        yield ImagejRoi.frombytes(path.read_bytes()), path.stem
        return
    with zipfile.ZipFile(path) as file:
        for entry in file.namelist():
            if entry.lower().endswith(".roi") and not Path(entry).name.startswith("."):
                yield ImagejRoi.frombytes(file.read(entry)), Path(entry).stem


def _read_roi(roi: ImagejRoi, entry: str, skipped: Skipped) -> Iterator[Piece]:
    rings = None if roi.subtype in _NO_AREA_KINDS else _rings(roi, skipped)
    if not rings:
        skipped.add(_NO_AREA)
        return
    own = {key: unquote(value) for key, value in _PROPERTY.findall(roi.props)}
    label = read_id(own.get("micro_sam_label"))
    name = own.get("micro_sam_name")
    plane = roi.position - 1 if roi.position > 0 else None
    hyperstack = max(roi.c_position, roi.z_position, roi.t_position) > 0
    z, t = ((p - 1 if p > 0 else None) for p in (roi.z_position, roi.t_position))
    if label is None or roi.name not in [_roi_name(label, name, p) for p in (None, plane, z, t)]:
        name = roi.name or entry  # not ours, or named anew
    class_name = own.get("micro_sam_class") or (f"group {roi.group}" if roi.group else None)
    yield Piece(
        [rings], label=label, name=name, class_name=class_name, z=z, t=t, plane=None if hyperstack else plane
    )


def _rings(roi: ImagejRoi, skipped: Skipped) -> list[np.ndarray]:
    """The rings of a ROI with an area, yx; nothing for others."""
    if roi.composite:
        return _parse_path(roi.multi_coordinates)
    if roi.roitype in (ROI_TYPE.RECT, ROI_TYPE.OVAL):
        top, left, height, width = roi.top, roi.left, roi.bottom - roi.top, roi.right - roi.left
        if roi.subpixelrect:
            top, left, height, width = roi.yd, roi.xd, roi.heightd, roi.widthd
        if roi.roitype == ROI_TYPE.RECT:
            if roi.rounded_rect_arc_size:
                skipped.add(_SQUARE)
            corners = [[0, 0], [0, 1], [1, 1], [1, 0]]
            return [np.array(corners) * [height, width] + [top, left]]
        angles = np.linspace(0, 2 * np.pi, 16 * int(width + height + 2), endpoint=False)
        return [(np.stack([np.sin(angles), np.cos(angles)], axis=1) + 1) / 2 * [height, width] + [top, left]]
    if roi.roitype in _OUTLINES and roi.n_coordinates > 2:
        if roi.options & ROI_OPTIONS.SPLINE_FIT:
            skipped.add(_STRAIGHT)
        return [np.asarray(roi.coordinates(), dtype=np.float64)[:, ::-1]]
    return []


def _parse_path(values: np.ndarray) -> list[np.ndarray]:
    """The rings of a path in the numbers of java.awt.geom.PathIterator.

    Each command is followed by its points xy: 0 move, 1 line, 2 and 3 Bézier curves, 4 close.
    """
    rings: list[list[np.ndarray]] = []
    numbers = np.asarray(values, dtype=np.float64)
    at = 0
    while at < len(numbers):
        command = int(numbers[at])
        n_points = (1, 1, 2, 3, 0)[command]
        points = numbers[at + 1:at + 1 + 2 * n_points].reshape(n_points, 2)[:, ::-1]
        at += 1 + 2 * n_points
        if command == 0:
            rings.append([points])
        elif command == 1:
            rings[-1].append(points)
        elif command in (2, 3):
            rings[-1].append(_bezier(np.concatenate([rings[-1][-1][-1:], points])))
    return [np.concatenate(ring) for ring in rings]


def _bezier(points: np.ndarray) -> np.ndarray:
    """Points on a Bézier curve after its first one, by de Casteljau's algorithm."""
    t = np.linspace(0, 1, _CURVE_STEPS + 1)[1:, None]
    curves = [np.repeat(p[None], _CURVE_STEPS, axis=0) for p in points]
    while len(curves) > 1:
        curves = [(1 - t) * a + t * b for a, b in zip(curves[:-1], curves[1:])]
    return curves[0]
