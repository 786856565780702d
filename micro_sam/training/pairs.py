"""Images and their labels, as files or arrays: what belongs together, which axes there are, reading of patches.

The axes follow from the shapes of an image and its labels: labels (Y, X), or (Z, Y, X) with any number of leading
axes, are planes to train on, and one axis more in the image holds its channels. Axes of length one do not count.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImageReadError, InvalidInputError, InvalidTypeError, MicroSamError, MissingFileError
from ..core.inputs import find_inputs, has_pattern
from ..core.lazy_array import view
from ..core.readers import PICTURES, TIF, is_zarr, open_source, suffix_of

Roi = tuple[slice, ...]

_MAX_OPEN = 64
_MAX_OPEN_BYTES = 2**30
_MAX_MEASURED = 2**26


def is_array(value: Any) -> bool:
    """Whether something is an array or tensor, not a path."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def is_folder_pattern(path: Any, key: str | None) -> bool:
    """Whether path and key mean files of a folder."""
    return is_path(path) and key is not None and has_pattern(key) and Path(path).is_dir() and not is_zarr(Path(path))


def probe(path_or_array: Any, key: str | None = None) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an image as it lies in its file, from the header where the format allows it."""
    if is_array(path_or_array):
        return tuple(path_or_array.shape), np.asarray(path_or_array[:0]).dtype
    path = Path(path_or_array).expanduser()
    if path.is_file() and key is None:
        try:
            if suffix_of(path) in TIF:
                import tifffile
                with tifffile.TiffFile(path) as file:
                    return tuple(file.series[0].shape), np.dtype(file.series[0].dtype)
            if suffix_of(path) in PICTURES:
                import imageio.v3 as imageio
                properties = imageio.improps(path, plugin="pillow")
                if not (len(properties.shape) == 3 and properties.shape[-1] == 2):  # opacity is dropped on reading
                    return tuple(properties.shape), np.dtype(properties.dtype)
        except Exception:  # many kinds, depending on the format; the reader below says what is wrong with the file
            pass
    data = open_source(path, key).data
    return tuple(data.shape), np.dtype(data.dtype)


@dataclass(frozen=True)
class Geometry:
    """Axes of a pair: shape of `labels` without axes of length one, where the image has channels, and how many."""

    shape: tuple[int, ...]
    channel_axis: int | None
    n_channels: int
    is_picture: bool
    """Whether the channels are the last axis of a single plane."""


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(int(n) for n in shape if n != 1)
    return kept if len(kept) >= 2 else tuple(int(n) for n in shape[-2:])


def _squeeze(data: Any, name: str) -> Any:
    shape = tuple(data.shape)
    kept = [axis for axis, n in enumerate(shape) if n != 1]
    if len(kept) < 2:
        kept = list(range(len(shape)))[-2:]
    return view(data, {axis: 0 for axis in range(len(shape)) if axis not in kept}, kept, name)


class Pair:
    """An image and its labels.

    Args:
        raw: Path or array of the image.
        raw_key: Name inside a container, or pattern for the files of a folder; None for others.
        labels: Path or array of the labels.
        label_key: As `raw_key`.
        with_channels: Whether the image has channels; None finds out.
        roi: Part of the labels to use, a slice per axis of the labels; None for all.
    """

    def __init__(
        self, raw: Any, raw_key: str | None, labels: Any, label_key: str | None,
        with_channels: bool | None = None, roi: slice | Roi | None = None,
    ):
        self.raw, self.raw_key, self.labels, self.label_key = raw, raw_key, labels, label_key
        self.with_channels = with_channels
        self.roi = (roi,) if isinstance(roi, slice) else None if roi is None else tuple(roi)

    @property
    def name(self) -> str:
        if is_array(self.raw):
            return f"the image of shape {tuple(self.raw.shape)}"
        return str(self.raw) if self.raw_key is None else f"{self.raw} ({self.raw_key})"

    @property
    def label_name(self) -> str:
        if is_array(self.labels):
            return f"the labels of shape {tuple(self.labels.shape)}"
        return str(self.labels) if self.label_key is None else f"{self.labels} ({self.label_key})"

    @cached_property
    def geometry(self) -> Geometry:
        """The axes, from the headers of the files.

        Raises:
            InvalidInputError: If the shapes do not fit to each other.
            ImageReadError: If a file cannot be read.
        """
        raw, labels = _squeezed(probe(self.raw, self.raw_key)[0]), _squeezed(probe(self.labels, self.label_key)[0])
        if len(labels) < 2 or 0 in labels or 0 in raw:
            raise ImageReadError(f"{self.name} or {self.label_name} is empty or no image: shapes {raw} and {labels}.")
        if raw == labels and not self.with_channels:
            return Geometry(labels, None, 1, False)
        axes = [a for a in range(len(raw)) if raw[:a] + raw[a + 1:] == labels]
        if not axes or self.with_channels is False:
            raise InvalidInputError(self._mismatch(raw, labels))
        axis = 0 if self.with_channels and 0 in axes else axes[-1] if raw[axes[-1]] <= 4 else axes[0]
        is_last = axis == len(raw) - 1
        n_channels = 3 if is_last and raw[axis] == 4 else raw[axis]  # opacity
        return Geometry(labels, axis, n_channels, is_last and len(labels) == 2)

    def _mismatch(self, raw: tuple[int, ...], labels: tuple[int, ...]) -> str:
        text = f"{self.name} has the shape {raw}, but its labels {self.label_name} have {labels}. "
        if len(labels) == 3 and labels[:2] == raw[:2] and labels[2] in (3, 4):
            return text + "The labels are a colour picture: save them with one id per pixel (integers, 0 background)."
        if self.with_channels is not None:
            return text + f"with_channels={self.with_channels} was given, which does not fit; leave it out."
        return text + "They must agree in Z, Y and X; check that the two lists are in the same order."

    @cached_property
    def box(self) -> Roi:
        """The slices of the labels that are used.

        Raises:
            InvalidInputError: If the region of interest has too many axes, or is empty.
        """
        shape = self.geometry.shape
        roi = self.roi or ()
        if len(roi) > len(shape) or any(s.step not in (None, 1) for s in roi):
            raise InvalidInputError(
                f"The region of interest {roi} of {self.name} must have one slice without step for each axis of its "
                f"labels, whose shape is {shape}."
            )
        box = tuple(
            slice(*s.indices(n)[:2]) for s, n in zip((*roi, *[slice(None)] * (len(shape) - len(roi))), shape)
        )
        if any(s.stop <= s.start for s in box):
            raise InvalidInputError(f"The region of interest {roi} of {self.name} is empty; its shape is {shape}.")
        return box

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part that is used, (..., Y, X)."""
        return tuple(s.stop - s.start for s in self.box)

    @property
    def n_planes(self) -> int:
        return math.prod(self.shape[:-2])

    def open(self) -> "OpenPair":
        """Open both files."""
        return OpenPair(self)


class OpenPair:
    """A pair whose files are open; reads patches of planes."""

    def __init__(self, pair: Pair):
        self._pair, self._geometry = pair, pair.geometry
        self.raw = _squeeze(_open(pair.raw, pair.raw_key), pair.name)
        self.labels = _squeeze(_open(pair.labels, pair.label_key), pair.label_name)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are held in memory."""
        held = [a for a in (self.raw, self.labels) if isinstance(a, np.ndarray) and not isinstance(a, np.memmap)]
        return sum(a.nbytes for a in held)

    def _key(self, plane: int, y: slice, x: slice, whole: bool = False) -> tuple[int | slice, ...]:
        box, leading = self._pair.box, self._pair.shape[:-2]
        index = tuple(int(i) + s.start for i, s in zip(np.unravel_index(plane, leading), box)) if leading else ()
        if whole:
            return (*index, y, x)
        dy, dx = box[-2].start, box[-1].start
        return (*index, slice(y.start + dy, y.stop + dy), slice(x.start + dx, x.stop + dx))

    def _raw(self, key: tuple[int | slice, ...]) -> np.ndarray:
        axis = self._geometry.channel_axis
        if axis is None:
            return np.asarray(self.raw[key])[None]
        index = (*key[:axis], slice(None), *key[axis:])
        patch = np.asarray(self.raw[index])
        patch = np.moveaxis(patch, sum(isinstance(k, slice) for k in key[:axis]), 0)
        return patch[:self._geometry.n_channels]

    def read(self, plane: int, y: slice, x: slice) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch (C, Y, X) of the image and one (Y, X) of the labels, counted within the region of interest."""
        key = self._key(plane, y, x)
        return np.array(self._raw(key)), np.array(self.labels[key])  # transforms may write into them

    def read_labels(self, plane: int, y: slice, x: slice) -> np.ndarray:
        """Read a patch (Y, X) of the labels alone."""
        return np.asarray(self.labels[self._key(plane, y, x)])

    def whole_plane(self, plane: int) -> np.ndarray:
        """The image plane (C, Y, X) in full, also outside of the region of interest."""
        return self._raw(self._key(plane, slice(None), slice(None), whole=True))

    def representative(self) -> np.ndarray:
        """The image (C, N, Y, X), of large volumes some evenly spaced planes."""
        n_planes = self._pair.n_planes
        size = self._geometry.n_channels * math.prod(self._geometry.shape[-2:])
        n_read = int(np.clip(_MAX_MEASURED // size, 1, n_planes))
        return np.stack([self.whole_plane(int(n)) for n in np.linspace(0, n_planes - 1, n_read).round()], axis=1)


def _open(path_or_array: Any, key: str | None) -> Any:
    if is_array(path_or_array):
        return path_or_array
    return open_source(Path(path_or_array).expanduser(), key).data


class OpenPairs:
    """Keeps some pairs open, those that were used last. Each process opens the files for itself."""

    def __init__(self, pairs: Sequence[Pair]):
        self._pairs = pairs
        self._open: OrderedDict[int, OpenPair] = OrderedDict()
        self._process = os.getpid()

    def __getitem__(self, index: int) -> OpenPair:
        if self._process != os.getpid():  # handles of hdf5 files must not be shared with a forked process
            self._open, self._process = OrderedDict(), os.getpid()
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        self._open[index] = self._pairs[index].open()
        while len(self._open) > 1 and (
            len(self._open) > _MAX_OPEN or sum(p.nbytes for p in self._open.values()) > _MAX_OPEN_BYTES
        ):
            self._open.popitem(last=False)
        return self._open[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"_pairs": self._pairs, "_open": OrderedDict(), "_process": -1}


@dataclass(frozen=True)
class Pairs:
    """What paths and keys mean: the pairs, and whether they came as arrays, one path, or unequal files of folders."""

    pairs: tuple[Pair, ...]
    are_arrays: bool = False
    is_single: bool = False
    are_folder_files: bool = False


def _as_list(value: Any, what: str) -> list[Any]:
    if is_path(value) or is_array(value):
        return [value]
    if not isinstance(value, Sequence) or not all(is_path(v) or is_array(v) for v in value):
        raise InvalidTypeError(f"{what} must be a path, or a list of paths or arrays, but got {value!r:.200}.")
    if len(value) == 0:
        raise InvalidInputError(f"{what} is an empty list. Give at least one image.")
    return [v.numpy() if hasattr(v, "numpy") else v for v in value]


def _check_counts(raw: Sequence[Any], labels: Sequence[Any], where: str = "") -> None:
    if len(raw) != len(labels):
        stems = [{Path(p).stem for p in paths if is_path(p)} for paths in (raw, labels)]
        lonely = sorted(stems[0] ^ stems[1])[:5] if stems[0] & stems[1] else []
        hint = f" Without partner: {', '.join(lonely)}." if lonely else ""
        raise InvalidInputError(
            f"There are {len(raw)} images, but {len(labels)} labels{where}. Each image needs its labels, in the same "
            f"order.{hint}"
        )


def _check_exist(paths: Sequence[Any]) -> None:
    missing = [str(p) for p in paths if is_path(p) and not Path(p).expanduser().exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MissingFileError(f"There is no file or folder {', '.join(missing[:3])}{more}. Check the paths.")


def _spread(rois: Any, n: int) -> list[Any]:
    """One region of interest per image."""
    if rois is None or isinstance(rois, slice) or all(isinstance(r, slice) for r in rois):
        return [rois] * n
    if len(rois) != n:
        raise InvalidInputError(f"There are {n} images, but {len(rois)} regions of interest (rois). Give one for each.")
    return list(rois)


def folder_files(folder: Any, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted by name."""
    return [file.path for file in find_inputs(folder, pattern)]


def _folder_pairs(raw, raw_key, labels, label_key, with_channels, roi, as_stack: bool | None) -> list[Pair]:
    """The files of two folders: one stack if all are grey and of one shape, else one pair per file."""
    raw_files, label_files = folder_files(raw, raw_key), folder_files(labels, label_key)
    _check_counts(raw_files, label_files, f" in {raw} and {labels}")
    if as_stack is None:
        shapes = {_squeezed(probe(p)[0]) for p in (*raw_files, *label_files)}
        as_stack = len(shapes) == 1 and len(shapes.pop()) == 2 and len(raw_files) > 1
    if as_stack:
        return [Pair(raw, raw_key, labels, label_key, with_channels, roi)]
    if roi is not None:
        chosen, *rest = (roi,) if isinstance(roi, slice) else roi
        raw_files, label_files, roi = raw_files[chosen], label_files[chosen], tuple(rest) or None
        if not raw_files:
            raise InvalidInputError(f"The region of interest {chosen} leaves no file of {raw}.")
    return [Pair(r, None, lab, None, with_channels, roi) for r, lab in zip(raw_files, label_files)]


def find_pairs(
    raw_paths: Any,
    raw_key: str | None,
    label_paths: Any,
    label_key: str | None,
    with_channels: bool | None = None,
    rois: Any = None,
    verify_paths: bool = True,
    as_stack: bool | None = None,
) -> Pairs:
    """Pair images with labels, without reading pixels.

    Args:
        raw_paths: Path, list of paths, array or list of arrays.
        raw_key: Name inside a container, or pattern for the files of a folder.
        label_paths: As `raw_paths`.
        label_key: As `raw_key`.
        with_channels: Whether the images have channels; None finds out.
        rois: Region of interest for all images, or one per image.
        verify_paths: Whether to look if the files exist.
        as_stack: Whether the files of a folder form a stack; None finds out.

    Returns:
        The pairs, in order.

    Raises:
        MissingFileError: If a file does not exist.
        InvalidInputError: If the numbers of images and labels differ, or keys do not fit.
        InvalidTypeError: If there is something else than paths and arrays.
    """
    raw, labels = _as_list(raw_paths, "raw_paths"), _as_list(label_paths, "label_paths")
    are_arrays = [is_array(v) for v in (*raw, *labels)]
    if any(are_arrays) and not all(are_arrays):
        raise InvalidInputError("Images and labels must be all arrays or all paths, but there are both.")
    if are_arrays[0] and (raw_key is not None or label_key is not None):
        raise InvalidInputError("raw_key and label_key choose from files, but arrays were given. Set both to None.")
    if verify_paths:
        _check_exist([*raw, *labels])
    _check_counts(raw, labels)
    pairs, from_folder = [], False
    for r, lab, roi in zip(raw, labels, _spread(rois, len(raw))):
        if is_folder_pattern(r, raw_key) and is_folder_pattern(lab, label_key):
            new = _folder_pairs(r, raw_key, lab, label_key, with_channels, roi, as_stack)
            from_folder |= new[0].raw_key is None
            pairs += new
        else:
            pairs.append(Pair(r, raw_key, lab, label_key, with_channels, roi))
    return Pairs(tuple(pairs), are_arrays[0], is_path(raw_paths) and not from_folder, from_folder)


def problem_of(pair: Pair) -> MicroSamError | None:
    """What is wrong with the shapes of a pair, or None."""
    try:
        pair.box  # noqa: B018  computed here
    except MicroSamError as error:
        return error
    return None
