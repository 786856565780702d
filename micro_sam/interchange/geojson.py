"""GeoJSON (RFC 7946) with the members that QuPath reads and writes, in pixels.

Ids go into the `metadata` of an object, which QuPath keeps. Image size, axes and pixel size are in a member of the
file, `micro_sam`, that other programs ignore and lose.
"""

import colorsys
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..core.errors import ImageReadError
from ..core.output import temporary_path
from ..core.progress import Steps
from .contours import Part
from .label_image import LabelImage
from .pieces import Piece, Skipped, Target, find_target, paint_pieces, read_id, trace_pieces

_ID = "micro_sam label"
_NAMESPACE = uuid.UUID("2a4c1ad1-9b3e-5d0c-8c55-6f1f0e2b7d11")
_NO_AREA = "points and lines have no area and were left out"
_NUCLEI = "cells have a nucleus of their own, which was left out"


def write_steps(path: Path, image: LabelImage, name: str) -> Steps[None]:
    """Write all objects, with one feature per object and plane."""
    pieces = yield from trace_pieces(image)
    colors = {text: _color(n) for n, text in enumerate(sorted(set(image.classes.values())))}
    content = {
        "type": "FeatureCollection",
        "features": [_feature(image, colors, *piece) for piece in pieces],
        "micro_sam": {"version": __version__, "content": image.content()},
    }
    with temporary_path(path, is_folder=False) as new:
        new.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _color(number: int) -> list[int]:
    """The colour of a class, red, green and blue from 0 to 255; hues are evenly far apart by the golden ratio."""
    return [round(255 * c) for c in colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.8, 0.9)]


def _feature(
    image: LabelImage, colors: dict[str, list[int]], plane: int, label: int, parts: Sequence[Part]
) -> dict[str, Any]:
    polygons = [[_closed(ring) for ring in part.rings] for part in parts]
    geometry: dict[str, Any] = {"type": "Polygon", "coordinates": polygons[0]} if len(polygons) == 1 else {
        "type": "MultiPolygon", "coordinates": polygons
    }
    if image.labels.ndim == 3:
        z, t = (0, plane) if image.axes == "TYX" else (plane, 0)
        geometry["plane"] = {"c": -1, "z": z, "t": t}
    properties: dict[str, Any] = {"objectType": "annotation", "metadata": {_ID: str(label)}}
    if label in image.names:
        properties["name"] = image.names[label]
    if label in image.classes:
        text = image.classes[label]
        properties["classification"] = {"name": text, "color": colors[text]}
    # QuPath wants a UUID; the same object in the same place has the same one.
    key = f"{label} {plane} {polygons}"
    return {
        "type": "Feature", "id": str(uuid.uuid5(_NAMESPACE, key)), "geometry": geometry, "properties": properties,
    }


def _closed(ring: np.ndarray) -> list[list[int]]:
    points = ring[:, ::-1].tolist()
    return [*points, points[0]]


def read_content(path: Path, name: str = "segmentation") -> dict[str, Any] | None:
    """What `write_steps` noted about the labels, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["micro_sam"]["content"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none that is ours
        return None


def read_steps(path: Path, target: Target) -> Steps[LabelImage]:
    """Read polygons as objects; where they have no id of ours, each feature is an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        skipped = Skipped()
        pieces = [piece for feature in _features(content) for piece in _read_feature(feature, skipped)]
        note = content.get("micro_sam", {}).get("content") if isinstance(content, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ImageReadError(
            f"{path} could not be read as GeoJSON: {type(error).__name__}: {error}. Export it again."
        ) from error
    target = find_target(path, target, note, "GeoJSON files")
    skipped.warn(path)
    return (yield from paint_pieces(pieces, target, path))


def _features(content: Any) -> Iterator[dict[str, Any]]:
    """All features, also of a plain list of them (older versions of QuPath) or a single geometry."""
    if isinstance(content, list):
        for member in content:
            yield from _features(member)
    elif content["type"] == "FeatureCollection":
        yield from content["features"]
    elif content["type"] == "Feature":
        yield content
    else:
        yield {"type": "Feature", "geometry": content, "properties": {}}


def _read_feature(feature: dict[str, Any], skipped: Skipped) -> Iterator[Piece]:
    geometry, properties = feature.get("geometry") or {}, feature.get("properties") or {}
    polygons = list(_polygons(geometry))
    if not polygons:
        skipped.add(_NO_AREA)
        return
    if "nucleusGeometry" in feature:
        skipped.add(_NUCLEI)
    plane, classification = geometry.get("plane") or {}, properties.get("classification") or {}
    names = classification.get("names") or []
    yield Piece(
        polygons, label=read_id((properties.get("metadata") or {}).get(_ID)), name=properties.get("name"),
        class_name=classification.get("name") or ": ".join(names) or None,
        z=int(plane.get("z", 0)), t=int(plane.get("t", 0)),
    )


def _polygons(geometry: dict[str, Any]) -> Iterator[list[np.ndarray]]:
    """The rings of each polygon, yx."""
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for member in geometry["geometries"]:
            yield from _polygons(member)
    elif kind in ("Polygon", "MultiPolygon"):
        for polygon in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            yield [np.array([point[1::-1] for point in ring], dtype=np.float64) for ring in polygon]
