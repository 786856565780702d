"""Prompts of an object in a commit record: a zarr group with arrays of coordinates, and their kinds as attributes.

`prompts` has shapes (n, vertices, ndim); where their numbers of vertices differ, rows of NaN fill the rest.
`point_prompts` is (n, ndim), `point_labels` (n,) with 1 for the object and 0 for background. Arrays without entries are
left out. Older records know shapes with equally many vertices only, and neither their kinds nor whose prompts they are.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import zarr

    from .prompt_data import Prompts, ShapePrompt


def write_prompts(group: "zarr.Group", prompts: "Prompts") -> None:
    """Write prompts into an empty group."""
    if prompts.shapes:
        counts = [len(s.vertices) for s in prompts.shapes]
        vertices = np.full((len(counts), max(counts), len(prompts.shapes[0].vertices[0])), np.nan)
        for row, shape in zip(vertices, prompts.shapes):
            row[:len(shape.vertices)] = shape.vertices
        _write(group, "prompts", vertices, {
            "shape_kinds": [s.kind for s in prompts.shapes], "n_vertices": counts,
            "positive": [s.positive for s in prompts.shapes], "track_ids": [s.track_id for s in prompts.shapes],
        })
    if prompts.points:
        _write(group, "point_prompts", np.array([p.position for p in prompts.points], dtype=np.float64), {})
        _write(group, "point_labels", np.array([p.positive for p in prompts.points], dtype=np.int64), {
            "track_state": ["division" if p.division else "track" for p in prompts.points],
            "track_ids": [p.track_id for p in prompts.points],
        })


def _write(group: "zarr.Group", name: str, values: np.ndarray, attributes: dict[str, Any]) -> None:
    from numcodecs import GZip

    array = group.create_array(
        name, shape=values.shape, chunks=values.shape, dtype=values.dtype, compressors=GZip(level=5), fill_value=0,
        attributes=attributes,
    )
    array[...] = values


def read_prompts(group: "zarr.Group") -> "Prompts":
    """Read the prompts of an object."""
    from .prompt_data import PointPrompt, Prompts

    points, shapes = (), ()
    if "point_prompts" in group:
        positions, labels = np.asarray(group["point_prompts"][...]), group["point_labels"]
        positive, attrs = np.asarray(labels[...]), dict(labels.attrs)
        states = attrs.get("track_state", ["track"] * len(positions))
        tracks = attrs.get("track_ids", [1] * len(positions))
        points = tuple(
            PointPrompt(tuple(p), bool(label), track, state == "division")
            for p, label, track, state in zip(positions.tolist(), positive, tracks, states, strict=True)
        )
    if "prompts" in group:
        array = group["prompts"]
        shapes = _read_shapes(np.asarray(array[...], dtype=np.float64), dict(array.attrs))
    return Prompts(points, shapes)


def _read_shapes(vertices: np.ndarray, attrs: dict[str, Any]) -> "tuple[ShapePrompt, ...]":
    from .prompt_data import ShapePrompt

    counts = attrs.get("n_vertices", [vertices.shape[1]] * len(vertices))
    rows = [row[:count] for row, count in zip(vertices, counts, strict=True)]
    kinds = attrs.get("shape_kinds") or [_guess_kind(row) for row in rows]
    positive, tracks = attrs.get("positive", [True] * len(rows)), attrs.get("track_ids", [1] * len(rows))
    return tuple(
        ShapePrompt(kind, tuple(map(tuple, row.tolist())), is_positive, track)
        for kind, row, is_positive, track in zip(kinds, rows, positive, tracks, strict=True)
    )


def _guess_kind(vertices: np.ndarray) -> str:
    """Four corners of a box are a rectangle: ellipses are stored like this as well, and cannot be told apart."""
    is_box = len(vertices) == 4 and all(len(np.unique(column)) == 2 for column in vertices[:, -2:].T)
    return "rectangle" if is_box else "polygon"
