"""Tables of measurements: size, shape, position and intensity of objects, and the lineage of tracks.

The columns, in this order (`unit` is that of the scale, or px):

- `label`: id of the object. In tables of tracks instead: `track` (its id), `frame` (from 0), `time` (in `time_unit`),
  `parent` (id of the track it came from by division; 0 for none), `generation` (number of divisions before),
  `first_frame`, `last_frame` and `n_frames` of the track, `displacement` (of the centroid, since the frame before in
  which the track has an object; unit) and `speed` (displacement per time; unit / time_unit). The last two are NaN in
  the first frame of a track.
- `n_pixels`: number of pixels.
- `area` (unit^2) or, in 3D, `volume` (unit^3).
- `equivalent_diameter` (unit): diameter of the disk, or ball, of this area, or volume.
- `axis_major_length`, `axis_minor_length` (unit): of the ellipse, or ellipsoid, with the same second moments.
- `eccentricity` (2D): of that ellipse; 0 for a circle, near 1 for a line.
- `solidity`: area, or volume, relative to that of the convex hull. In 3D only on request, since it takes
  long; NaN for objects that are flat there.
- `perimeter` (2D; unit): length of the outline. Not with pixels that are not square.
- `centroid_z` (3D), `centroid_y`, `centroid_x` (unit): mean position of the centres of the pixels; pixel 0 is at 0.
- `bbox_z0` (3D), `bbox_y0`, `bbox_x0`, `bbox_z1` (3D), `bbox_y1`, `bbox_x1`: bounding box in pixels, half-open.
- `intensity_mean`, `intensity_min`, `intensity_max`, `intensity_std`, if there is an image; for an image with channels
  each with `_` and the name of the channel.
- `unit` and, for tracks, `time_unit`: the units, as text.

Definitions are those of `skimage.measure.regionprops`.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from skimage.measure import regionprops_table

from .core.errors import InvalidInputError, InvalidTypeError, OutputExistsError, UnsupportedError
from .core.labels import boxes_of_labels, check_labels
from .core.output import temporary_path
from .core.progress import Step, Steps, drain

__all__ = ["measure_objects", "measure_tracks", "object_measurement_steps", "track_measurement_steps", "write_table"]

# Our names, in the order of the columns, and those of regionprops.
_PROPERTIES = {
    "equivalent_diameter": "equivalent_diameter_area", "axis_major_length": "axis_major_length",
    "axis_minor_length": "axis_minor_length", "eccentricity": "eccentricity", "solidity": "solidity",
    "perimeter": "perimeter",
}
_ONLY_2D = ("eccentricity", "perimeter")
_INTENSITIES = ("intensity_mean", "intensity_min", "intensity_max", "intensity_std")
_SLAB_BYTES = 2**24
_CACHE_BYTES = 2**28

Box = tuple[slice, ...]


@dataclass(frozen=True)
class _Plan:
    """What is measured of objects with `ndim` axes. `channels` is None without an image, "" names a single one."""

    ndim: int
    spacing: tuple[float, ...]
    properties: tuple[str, ...]
    channels: tuple[str, ...] | None
    unit: str

    @property
    def columns(self) -> dict[str, type]:
        axes = "zyx"[-self.ndim:]
        names = [
            "area" if self.ndim == 2 else "volume", *self.properties, *(f"centroid_{a}" for a in axes),
        ]
        boxes = [f"bbox_{a}{end}" for end in (0, 1) for a in axes]
        intensities = [f"{i}_{c}" if c else i for i in _INTENSITIES for c in self.channels or ()]
        return (
            {"label": np.int64, "n_pixels": np.int64} | dict.fromkeys(names, np.float64)
            | dict.fromkeys(boxes, np.int64) | dict.fromkeys(intensities, np.float64)
        )

    def measure(self, label: int, box: Box, mask: np.ndarray, image: np.ndarray | None) -> tuple:
        """Measure one object, given as mask and image within its bounding box; values as in `columns`."""
        names = ["num_pixels", "area", *(_PROPERTIES[p] for p in self.properties), "centroid"]
        if image is not None:
            image = image.astype(np.float64)  # the mean of few bits has few bits
            names.extend(_INTENSITIES)
        with warnings.catch_warnings(), np.errstate(divide="ignore"):
            warnings.simplefilter("ignore", UserWarning)  # flat objects in 3D have no convex hull
            table = regionprops_table(mask.view(np.uint8), image, names, spacing=self.spacing)
        if "solidity" in table:
            table["solidity"][np.isinf(table["solidity"])] = np.nan
        values = [v[0] for k, v in table.items() if not k.startswith("centroid")]
        starts = [s.start for s in box]
        centroid = [table[f"centroid-{k}"][0] + start * s for k, (start, s) in enumerate(zip(starts, self.spacing))]
        n_shape = 2 + len(self.properties)
        return (label, *values[:n_shape], *centroid, *starts, *(s.stop for s in box), *values[n_shape:])

    def table(self, rows: list[tuple]) -> pd.DataFrame:
        columns = {n: np.array([r[k] for r in rows], dtype=t) for k, (n, t) in enumerate(self.columns.items())}
        table = pd.DataFrame(columns)
        table["unit"] = pd.Series([self.unit] * len(table), dtype=str)
        return table


def _make_plan(
    segmentation: Any, image: Any, ndim: int, scale: Sequence[float] | None, unit: str | None,
    channel_names: Sequence[str] | None, properties: Sequence[str] | None,
) -> _Plan:
    """Check the arguments; objects have the last `ndim` axes of the segmentation."""
    shape = tuple(segmentation.shape)
    if np.dtype(segmentation.dtype).kind not in "bui":
        raise InvalidTypeError(f"A segmentation must have an integer dtype, but has {segmentation.dtype}.")
    if 0 in shape:
        raise InvalidInputError(f"The segmentation is empty: its shape is {shape}.")
    channels = _check_image(image, shape, channel_names)
    spacing = tuple(_check_scale(scale, unit, len(shape))[-ndim:])
    return _Plan(ndim, spacing, _check_properties(properties, ndim, spacing), channels, unit or "px")


def _check_image(image: Any, shape: tuple[int, ...], names: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the channels, as in `_Plan`."""
    found = None if image is None else tuple(image.shape)
    if found is not None and (found[:len(shape)] != shape or len(found) > len(shape) + 1):
        raise InvalidInputError(
            f"The image must have the shape {shape} of the segmentation, with or without channels as its last axis, "
            f"but has {found}."
        )
    n_channels = found[-1] if found is not None and len(found) > len(shape) else 0
    if names is None:
        return None if found is None else tuple(str(c) for c in range(n_channels)) or ("",)
    if not n_channels == len(names) == len(set(names)):
        raise InvalidInputError(
            f"channel_names must be one name for each of the {n_channels} channels of the image, but are {names!r}."
        )
    return tuple(str(name) for name in names)


def _check_scale(scale: Sequence[float] | None, unit: str | None, n_axes: int) -> list[float]:
    if (scale is None) != (unit is None):
        raise InvalidInputError(f"scale and unit belong together, but are {scale!r} and {unit!r}. Pass both or none.")
    if scale is None:
        return [1.0] * n_axes
    try:
        values = [float(s) for s in scale]
    except (TypeError, ValueError):
        values = []
    if len(values) != n_axes or not all(np.isfinite(v) and v > 0 for v in values):
        raise InvalidInputError(
            f"scale must be {n_axes} positive numbers, one per axis of the segmentation, but is {scale!r}."
        )
    return values


def _check_properties(properties: Sequence[str] | None, ndim: int, spacing: Sequence[float]) -> tuple[str, ...]:
    square = len(set(spacing)) == 1
    if properties is None:
        skipped = ("solidity", *_ONLY_2D) if ndim == 3 else () if square else ("perimeter",)
        return tuple(p for p in _PROPERTIES if p not in skipped)
    possible = [p for p in _PROPERTIES if ndim == 2 or p not in _ONLY_2D]
    unknown = [p for p in properties if p not in possible]
    if unknown:
        raise InvalidInputError(f"In {ndim}D there is no {unknown[0]!r}. There are: {', '.join(possible)}.")
    if "perimeter" in properties and not square:
        raise InvalidInputError(f"The perimeter needs square pixels, but the scale is {tuple(spacing)}. Leave it out.")
    return tuple(p for p in _PROPERTIES if p in properties)


class _Slabs:
    """Reads boxes of an array; a lazy one through a cache of slabs along its first axis, each read once if it can."""

    def __init__(self, array: Any):
        self._array, self._lazy = array, not isinstance(array, np.ndarray)
        layer = max(1, int(np.prod(array.shape[1:])) * np.dtype(array.dtype).itemsize)
        chunks = getattr(array, "chunks", None)
        chunk = int(np.ravel(chunks[0])[0]) if chunks else 1  # of dask or zarr
        thickness = chunk * max(1, _SLAB_BYTES // (layer * chunk)) if self._lazy else len(array)
        self.thickness, self._n_cached = thickness, max(1, _CACHE_BYTES // (layer * thickness))
        self.slab = lru_cache(self._n_cached)(lambda k: np.asarray(array[k * thickness:(k + 1) * thickness]))

    def __len__(self) -> int:
        return -(-len(self._array) // self.thickness)

    def box(self, box: Box) -> np.ndarray:
        first, last = box[0].start // self.thickness, (box[0].stop - 1) // self.thickness
        if not self._lazy or last - first >= self._n_cached:
            return np.asarray(self._array[box])
        parts = []
        for k in range(first, last + 1):
            origin = k * self.thickness
            inside = slice(max(box[0].start - origin, 0), box[0].stop - origin)
            parts.append(self.slab(k)[(inside, *box[1:])])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _find_boxes(block: np.ndarray, offset: int = 0) -> dict[int, Box]:
    """The bounding box of each id in a block that starts at `offset` along the first axis."""
    ids, _, boxes = boxes_of_labels(check_labels(block))
    return {
        int(i): (slice(box[0].start + offset, box[0].stop + offset), *box[1:]) for i, box in zip(ids, boxes)
    }


def object_measurement_steps(
    segmentation: np.ndarray,
    image: np.ndarray | None = None,
    *,
    scale: Sequence[float] | None = None,
    unit: str | None = None,
    channel_names: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
) -> Steps[pd.DataFrame]:
    """Generator behind `measure_objects`: yields a `Step` per part that is read, and per object."""
    if len(segmentation.shape) not in (2, 3):
        raise InvalidInputError(
            f"The segmentation must have the shape (Y, X) or (Z, Y, X), but has {tuple(segmentation.shape)}."
        )
    plan = _make_plan(segmentation, image, len(segmentation.shape), scale, unit, channel_names, properties)
    labels, values = _Slabs(segmentation), None if image is None else _Slabs(image)
    boxes: dict[int, Box] = {}
    yield Step(0, len(labels), "Find objects")
    for k in range(len(labels)):
        for i, box in _find_boxes(labels.slab(k), k * labels.thickness).items():
            known = boxes.get(i, box)
            boxes[i] = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(known, box))
        yield Step(k + 1, len(labels), "Find objects")
    rows = []
    yield Step(0, len(boxes), "Measure objects")
    for i, box in sorted(boxes.items(), key=lambda item: item[1][0].start):  # the order in which slabs are read
        rows.append(plan.measure(i, box, labels.box(box) == i, None if values is None else values.box(box)))
        yield Step(len(rows), len(boxes), "Measure objects")
    return plan.table(sorted(rows))


def measure_objects(
    segmentation: np.ndarray,
    image: np.ndarray | None = None,
    *,
    scale: Sequence[float] | None = None,
    unit: str | None = None,
    channel_names: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Measure the objects of an image or volume.

    Lazy arrays are read in slabs along the first axis; what is in memory at a time are some slabs and the bounding
    box of one object.

    Args:
        segmentation: Label image (Y, X) or (Z, Y, X), any integer dtype, 0 is background; may be lazy.
        image: Image of the same shape, or with channels as an additional last axis; may be lazy.
        scale: Size of a pixel (y, x) or (z, y, x) in `unit`. None measures in pixels.
        unit: Unit of the scale, for example `um`.
        channel_names: Names of the channels; None numbers them from 0.
        properties: Which of `equivalent_diameter`, `axis_major_length`, `axis_minor_length`, `eccentricity`,
            `solidity` and `perimeter` to measure; the other columns are always there. None takes all that the
            dimension and scale allow, but in 3D not `solidity`.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Returns:
        One row per object, ascending by `label`; the columns are described at the top of this module.

    Raises:
        InvalidInputError: If shapes, scale, unit, names or properties do not fit, or ids are negative.
        InvalidTypeError: If the segmentation has no integer dtype.

    Example:
        >>> table = measure_objects(np.array([[0, 5, 5], [0, 5, 5]]), scale=(0.5, 0.5), unit="um", verbose=False)
        >>> table[["label", "area", "centroid_y", "centroid_x", "unit"]].values.tolist()
        [[5, 1.0, 0.25, 0.75, 'um']]
    """
    steps = object_measurement_steps(
        segmentation, image, scale=scale, unit=unit, channel_names=channel_names, properties=properties
    )
    return drain(steps, verbose, pbar_init, pbar_update)


def track_measurement_steps(
    segmentation: np.ndarray,
    image: np.ndarray | None = None,
    lineages: Sequence[Mapping[int, Sequence[int]]] | None = None,
    *,
    scale: Sequence[float] | None = None,
    unit: str | None = None,
    time_unit: str | None = None,
    channel_names: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
) -> Steps[pd.DataFrame]:
    """Generator behind `measure_tracks`: yields a `Step` per frame."""
    shape = tuple(segmentation.shape)
    if len(shape) != 3:
        raise InvalidInputError(f"The segmentation of a time series must have the shape (T, Y, X), but has {shape}.")
    plan = _make_plan(segmentation, image, 2, scale, unit, channel_names, properties)
    if time_unit is not None and scale is None:
        raise InvalidInputError("time_unit is the unit of the first number of scale, but there is no scale.")
    interval = 1.0 if scale is None else float(scale[0])
    parents = _parents(lineages or ())
    rows, frames = [], []
    yield Step(0, shape[0], "Measure tracks")
    for t in range(shape[0]):
        labels, values = np.asarray(segmentation[t]), None if image is None else np.asarray(image[t])
        for i, box in _find_boxes(labels).items():
            rows.append(plan.measure(i, box, labels[box] == i, None if values is None else values[box]))
            frames.append(t)
        yield Step(t + 1, shape[0], "Measure tracks")
    table = plan.table(rows).rename(columns={"label": "track"})
    table.insert(1, "frame", np.array(frames, dtype=np.int64))
    table = table.sort_values(["track", "frame"], ignore_index=True)
    _insert_track_columns(table, parents, interval)
    table["time_unit"] = pd.Series([time_unit or "frame"] * len(table), dtype=str)
    return table


def _insert_track_columns(table: pd.DataFrame, parents: dict[int, int], interval: float) -> None:
    """Add what is known of tracks to a table that is sorted by track and frame, in place."""
    frames, tracks = table["frame"], table.groupby("track")
    step = tracks[["frame", "centroid_y", "centroid_x"]].diff()
    displacement = np.hypot(step["centroid_y"], step["centroid_x"])
    parent = table["track"].map(lambda i: parents.get(i, 0)).astype(np.int64)
    columns = {
        "time": frames * interval, "parent": parent,
        "generation": table["track"].map(lambda i: _generation(i, parents)).astype(np.int64),
        "first_frame": tracks["frame"].transform("min"), "last_frame": tracks["frame"].transform("max"),
        "n_frames": tracks["frame"].transform("size"), "displacement": displacement,
        "speed": displacement / (step["frame"] * interval),
    }
    for position, (name, values) in enumerate(columns.items(), 2):
        table.insert(position, name, values)


def _parents(lineages: Sequence[Mapping[int, Sequence[int]]]) -> dict[int, int]:
    """Parent of each track that has one; the lineages must be trees."""
    parents: dict[int, int] = {}
    for lineage in [lineages] if isinstance(lineages, Mapping) else lineages:
        for parent, children in lineage.items():
            for child in children:
                if parents.setdefault(int(child), int(parent)) != int(parent):
                    raise InvalidInputError(
                        f"Track {child} has two parents in the lineages: {parents[int(child)]} and {parent}."
                    )
    for track in parents:
        if _generation(track, parents) is None:
            raise InvalidInputError(f"Track {track} is its own ancestor in the lineages.")
    return parents


def _generation(track: int, parents: dict[int, int]) -> int | None:
    """Number of ancestors; None if they form a circle."""
    generation = 0
    while track in parents:
        track, generation = parents[track], generation + 1
        if generation > len(parents):
            return None
    return generation


def measure_tracks(
    segmentation: np.ndarray,
    image: np.ndarray | None = None,
    lineages: Sequence[Mapping[int, Sequence[int]]] | None = None,
    *,
    scale: Sequence[float] | None = None,
    unit: str | None = None,
    time_unit: str | None = None,
    channel_names: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Measure the objects of a time series, frame by frame, and their tracks.

    Args:
        segmentation: Label image (T, Y, X) whose ids are tracks, 0 is background; may be lazy.
        image: Image of the same shape, or with channels as an additional last axis; may be lazy.
        lineages: Dictionaries from tracks to the tracks that they divided into, as tracking returns them.
        scale: Time between frames in `time_unit`, and size of a pixel (y, x) in `unit`. None measures in frames and
            pixels.
        unit: Unit of the last two numbers of the scale, for example `um`.
        time_unit: Unit of the first number of the scale, for example `min`; None for frames.
        channel_names: Names of the channels; None numbers them from 0.
        properties: Which properties of the shape to measure, see `measure_objects`.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Returns:
        One row per track and frame in which it has an object, ascending; the columns are described at the top of this
        module.

    Raises:
        InvalidInputError: If shapes, scale, units, names or properties do not fit, ids are negative, or a track has
            two parents or is its own ancestor.
        InvalidTypeError: If the segmentation has no integer dtype.
    """
    steps = track_measurement_steps(
        segmentation, image, lineages, scale=scale, unit=unit, time_unit=time_unit, channel_names=channel_names,
        properties=properties,
    )
    return drain(steps, verbose, pbar_init, pbar_update)


def write_table(table: pd.DataFrame, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Write a table completely or not at all.

    Args:
        table: The table.
        path: The file, with the suffix `.csv` or `.parquet` (needs pyarrow or fastparquet).
        overwrite: Whether to replace an existing file.

    Returns:
        The path of the file.

    Raises:
        InvalidInputError: For another suffix.
        UnsupportedError: For Parquet, if neither pyarrow nor fastparquet is installed.
        OutputExistsError: If the file exists and `overwrite` is not set.
        OutputWriteError: If it cannot be written.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise InvalidInputError(f"Tables are written as .csv or .parquet, not as {path.suffix!r} ({path}).")
    if suffix == ".parquet" and not any(importlib.util.find_spec(name) for name in ("pyarrow", "fastparquet")):
        raise UnsupportedError("Parquet files need pyarrow: install it with `pip install pyarrow`, or write a .csv.")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists. Pass overwrite=True to replace it, or choose another path.")
    with temporary_path(path, is_folder=False) as new:
        if suffix == ".csv":
            table.to_csv(new, index=False)
        else:
            table.to_parquet(new, index=False)
    return path
