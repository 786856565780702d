"""Tracks in the Graph Exchange File Format (GEFF), which other tools for lineages read and write.

See https://github.com/live-image-tracking-tools/geff. A zarr folder holds the graph as `tracks.geff`, with a node per
object and an edge from each object to what becomes of it, and beside it the label images as `segmentation`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImageReadError, InvalidInputError, MissingFileError, OutputExistsError, UnsupportedError
from ..core.output import smallest_dtype, temporary_path
from ..core.progress import Step, Steps, drain
from .lineage import Lineages, Link, Track, TrackForest, as_forest, forest_from_links
from .objects import FrameObjects, check_series, find_objects, read_frame

_GRAPH, _LABELS, _TRACK = "tracks.geff", "segmentation", "track_id"


def _import_geff():
    try:
        import geff
        import geff_spec
        from geff.core_io import write_arrays
    except ImportError as error:
        raise UnsupportedError(
            f"GEFF files need the package geff, which cannot be imported ({error}). Install it: pip install geff"
        ) from error
    return geff, geff_spec, write_arrays


def write_geff(
    path: str | os.PathLike, tracks: np.ndarray, lineages: Lineages | TrackForest, overwrite: bool = False
) -> Path:
    """Write tracks and their label images to a zarr folder, completely or not at all.

    Args:
        path: The folder; `.zarr` is appended if the name has no such suffix.
        tracks: Label images (T, Y, X) with the ids of the tracks, may be lazy.
        lineages: The lineages, as the tracking functions return them, or the tracks.
        overwrite: Whether to replace tracks that were written there before.

    Returns:
        The folder.

    Raises:
        OutputExistsError: If the path exists: always if it does not hold tracks, else without `overwrite`.
        OutputWriteError: If it cannot be written; then nothing of it is left.
        UnsupportedError: If the package geff is not installed.
        InvalidInputError: If an object has no track, or a track no object.
    """
    return drain(write_geff_steps(path, tracks, lineages, overwrite), verbose=False)


def write_geff_steps(
    path: str | os.PathLike, tracks: np.ndarray, lineages: Lineages | TrackForest, overwrite: bool = False
) -> Steps[Path]:
    """Generator behind `write_geff`: yields `Step`, returns the folder."""
    import zarr

    _import_geff()
    check_series(tracks)
    path = Path(path).expanduser()
    path = path if path.suffix == ".zarr" else path.with_name(f"{path.name}.zarr")
    if path.exists() and not (overwrite and (path / _GRAPH).is_dir()):
        advice = "Pass overwrite to replace it, or choose" if (path / _GRAPH).is_dir() else "Choose"
        raise OutputExistsError(f"{path} exists. {advice} another output.")
    forest = as_forest(lineages, tracks)
    objects: list[FrameObjects] = []
    with temporary_path(path, is_folder=True) as new:
        group = zarr.create_group(str(new), zarr_format=2)
        highest = np.array([max(forest, default=0)])
        labels = group.create_array(
            _LABELS, shape=tracks.shape, dtype=smallest_dtype(highest), chunks=(1, *tracks.shape[1:]),
        )
        for t in range(tracks.shape[0]):
            yield Step(t, tracks.shape[0], "Write tracks")
            frame = read_frame(tracks, t)
            objects.append(find_objects(frame))
            labels[t] = frame
        _write_graph(new / _GRAPH, forest, objects)
    yield Step(tracks.shape[0], tracks.shape[0], "Write tracks")
    return path


def _write_graph(path: Path, forest: TrackForest, objects: list[FrameObjects]) -> None:
    geff, geff_spec, write_arrays = _import_geff()
    times = np.repeat(np.arange(len(objects)), [len(frame) for frame in objects])
    track_ids = np.concatenate([frame.labels for frame in objects]) if objects else np.zeros(0, dtype=np.int64)
    centroids = np.concatenate([frame.centroids for frame in objects]) if objects else np.zeros((0, 2))
    if set(track_ids.tolist()) != set(forest):
        raise InvalidInputError("The objects in the label images and the tracks do not have the same ids.")
    nodes = np.arange(len(times), dtype=np.uint64)
    values = {"t": times, "y": centroids[:, 0], "x": centroids[:, 1], _TRACK: track_ids}
    axes = [
        geff_spec.Axis(name="t", type="time", unit="frame"), geff_spec.Axis(name="y", type="space", unit="pixel"),
        geff_spec.Axis(name="x", type="space", unit="pixel"),
    ]
    # A tracklet in the sense of the format ends only where there is no successor or more than one.
    is_maximal = all(len(forest.children(i)) != 1 for i in forest)
    # Called label_prop before version 1.2.1 of the format.
    link = "node_prop" if "node_prop" in geff_spec.RelatedObject.model_fields else "label_prop"
    metadata = geff_spec.GeffMetadata(
        directed=True, axes=axes, node_props_metadata={}, edge_props_metadata={},
        track_node_props={"tracklet": _TRACK} if is_maximal and len(nodes) else None,
        related_objects=[geff_spec.RelatedObject(type="labels", path=f"../{_LABELS}", **{link: _TRACK})],
    )
    write_arrays(
        path, nodes, {name: {"values": v, "missing": None} for name, v in values.items()},
        np.array(list(_edges(forest, track_ids)), dtype=np.uint64).reshape(-1, 2), {}, metadata,
    )


def _edges(forest: TrackForest, track_ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """From each object to the next one of its track, and from the last one to the first ones of the children."""
    latest: dict[int, int] = {}
    for node, track_id in enumerate(track_ids.tolist()):
        before = latest.get(track_id, latest.get(forest[track_id].parent))
        if before is not None:
            yield before, node
        latest[track_id] = node


def read_geff(path: str | os.PathLike) -> tuple[np.ndarray | None, TrackForest]:
    """Read tracks from a GEFF file of any origin.

    Args:
        path: A folder that holds one graph (`*.geff`), or the graph itself.

    Returns:
        Label images (T, Y, X) with the ids of the tracks, None if the file has none; and the tracks. They have the ids
        of the file if it says which; otherwise they are cut at divisions and numbered.

    Raises:
        MissingFileError: If there is no such file.
        ImageReadError: If it cannot be read.
        InvalidInputError: If the graph is no forest of tracks over time: it is not directed, has merges, or no axis
            of time.
        UnsupportedError: If the package geff is not installed.
    """
    geff, _, _ = _import_geff()
    path = _find_graph(Path(path).expanduser())
    try:
        reader = geff.GeffReader(path)
        reader.read_node_props()
        content = reader.build()
    except Exception as error:  # a store can be damaged in many ways
        raise ImageReadError(f"{path} cannot be read as GEFF ({type(error).__name__}: {error}).") from error
    metadata = content["metadata"]
    if not metadata.directed:
        raise InvalidInputError(f"The graph in {path} is not directed: it does not tell who descends from whom.")
    props = {name: prop["values"] for name, prop in content["node_props"].items()}
    time = next((axis.name for axis in metadata.axes or [] if axis.type == "time"), "t")
    if time not in props:
        raise InvalidInputError(f"The graph in {path} has no axis of time, and no property 't' of its nodes.")
    related = next((r for r in _attributes(path).get("related_objects") or [] if r["type"] == "labels"), None)
    name = (metadata.track_node_props or {}).get("tracklet") or (_TRACK if _TRACK in props else None)
    forest, ids = _read_forest(content, props[time].astype(np.int64), None if name is None else props[name])
    if related is None:
        return None, forest
    return _read_labels(path, related, props, props[time].astype(np.int64), ids), forest


def _find_graph(path: Path) -> Path:
    if not path.is_dir():
        raise MissingFileError(f"{path} does not exist, or is no folder.")
    graphs = [path] if (path / "nodes").is_dir() else sorted(p for p in path.glob("*.geff") if p.is_dir())
    if len(graphs) != 1:
        raise MissingFileError(f"Expected one graph (*.geff) in {path}, but found {len(graphs)}. Pass one.")
    return graphs[0]


def _attributes(path: Path) -> dict[str, Any]:
    """The metadata as they are in the file: the package reads only those of its own version."""
    import zarr

    return dict(zarr.open_group(str(path), mode="r").attrs["geff"])


def _read_forest(content: Any, times: np.ndarray, track_ids: np.ndarray | None) -> tuple[TrackForest, np.ndarray]:
    """Return the tracks and the id of the track of each node."""
    position = {int(node): n for n, node in enumerate(content["node_ids"])}
    edges = [(position[int(a)], position[int(b)]) for a, b in content["edge_ids"]]
    if track_ids is None:
        return _number_tracks(times, edges)
    track_ids = np.asarray(track_ids).astype(np.int64)
    parents: dict[int, int] = {}
    for a, b in edges:
        parent, child = int(track_ids[a]), int(track_ids[b])
        if parent != child and parents.setdefault(child, parent) != parent:
            raise InvalidInputError(f"Track {child} has two parents, {parents[child]} and {parent}.")
    tracks = []
    for track_id in np.unique(track_ids).tolist():
        own = times[track_ids == track_id]
        tracks.append(Track(track_id, int(own.min()), int(own.max()), parents.get(track_id, 0)))
    return TrackForest(tracks), track_ids


def _number_tracks(times: np.ndarray, edges: list[tuple[int, int]]) -> tuple[TrackForest, np.ndarray]:
    members = [np.flatnonzero(times == t) for t in range(int(times.max()) + 1 if len(times) else 0)]
    objects = [FrameObjects(m, np.zeros((len(m), 2)), np.ones(len(m), dtype=np.int64)) for m in members]
    links: list[Link] = [((int(times[a]), a), (int(times[b]), b)) for a, b in edges]
    forest, lookup = forest_from_links(objects, links)
    return forest, np.array([lookup[t][n] for n, t in enumerate(times.tolist())], dtype=np.int64)


def _read_labels(path: Path, related: Any, props: dict, times: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Read the label images of a graph, and give each object the id of its track."""
    import zarr

    name = related.get("node_prop") or related.get("label_prop")
    target = (path / related["path"]).resolve()
    try:
        array = zarr.open_array(str(target), mode="r")
    except Exception as error:
        raise ImageReadError(f"The label images of {path} cannot be read from {target}: {error}.") from error
    if name not in props:
        raise InvalidInputError(f"The graph in {path} does not tell the labels of its nodes: no property {name!r}.")
    if array.ndim != 3:
        raise InvalidInputError(f"The label images must have the shape (T, Y, X), but {target} has {array.shape}.")
    labels = np.zeros(array.shape, dtype=smallest_dtype(ids))
    for t in range(len(labels)):
        own = times == t
        mapping = dict(zip(props[name][own].tolist(), ids[own].tolist()))
        known, index = np.unique(array[t], return_inverse=True)
        values = np.array([mapping.get(label, 0) for label in known.tolist()], dtype=labels.dtype)
        labels[t] = values[index].reshape(labels.shape[1:])
    return labels
