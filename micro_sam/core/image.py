"""Images from files: one lazy reader for all formats, with named axes and a choice of channels.

Axes are letters: T time, Z plane, C channel, Y, X, and S for the samples (red, green, blue) of a colour pixel.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageReadError, InvalidInputError, InvalidTypeError
from .lazy_array import view
from .readers import SUFFIXES, Source, open_source

__all__ = ["SUFFIXES", "LazyImage", "load_image_data", "open_image"]

_LETTERS = "TCZYXS"


@dataclass(frozen=True)
class LazyImage:
    """An image (Y, X[, C]) or a stack (Z, Y, X[, C]); `data` is read when it is indexed.

    `axes` has one letter per axis of `data`, with C for channels and T for a stack over time. `scale` is the pixel
    size per spatial axis in the unit of the file, if the file tells. `name` is the path, for messages.
    """

    data: Any
    axes: str
    name: str = "image"
    scale: tuple[float, ...] | None = None

    @property
    def ndim(self) -> int:
        """2 or 3; channels do not count."""
        return len(self.axes) - self.has_channels

    @property
    def has_channels(self) -> bool:
        return self.axes.endswith("C")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without channels: (Y, X) or (Z, Y, X)."""
        return tuple(int(s) for s in self.data.shape[:self.ndim])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.data.dtype)

    def read(self) -> np.ndarray:
        """Read the whole image, as an array with the axes `axes`."""
        return np.asarray(self.data[...] if hasattr(self.data, "__getitem__") else self.data)


def open_image(
    path_or_array: Any,
    key: str | None = None,
    *,
    axes: str | None = None,
    channel: int | None = None,
    time: int | None = None,
    level: int | None = None,
    series: int | None = None,
    ndim: int | None = None,
) -> LazyImage:
    """Open an image without reading its pixels, as far as the format allows it.

    Reads tif (also OME-TIFF, ImageJ, pyramids, svs, lsm), png, jpg, bmp, OME-Zarr, zarr, hdf5, mrc, czi, npy, NIfTI
    (with nibabel), and folders as stacks. Axes of length one vanish. A colour image keeps its three channels.

    Args:
        path_or_array: The path, or an array (numpy, dask, zarr, h5py ...), which passes through.
        key: Name of the image in an hdf5 or zarr container (may be left out if it has just one), or a pattern such
            as `*.tif` for a folder whose files form a stack.
        axes: One letter out of TCZYXS per axis of the data, if the file does not say or says it wrongly.
        channel: Which channel to take; None keeps up to three channels (four samples count as colour and opacity).
        time: Which time point to take.
        level: Resolution level of a pyramid; 0 is the full resolution.
        series: Which image to take of a file with several ones.
        ndim: 2 or 3, channels not counted, to settle what the shape leaves open.

    Returns:
        The image, with `ndim` 2 or 3.

    Raises:
        MissingFileError: If there is no such file.
        ImageReadError: If no image can be read from it, or the image is empty.
        InvalidInputError: If axes, channel, time, level or series do not fit.
        InvalidTypeError: If the pixels are no numbers, or no path or array was given.

    Example:
        >>> open_image(np.zeros((1, 40, 50)), axes="CYX").axes
        'YX'
    """
    if ndim not in (None, 2, 3):
        raise InvalidInputError(f"ndim must be 2 or 3 (channels do not count), but is {ndim!r}.")
    if isinstance(path_or_array, LazyImage):
        path_or_array = path_or_array.data
    if isinstance(path_or_array, str | os.PathLike):
        path = Path(path_or_array).expanduser()
        source, name = open_source(path, key, level, series), str(path)
    elif hasattr(path_or_array, "shape") and hasattr(path_or_array, "dtype"):
        if key is not None or level is not None or series is not None:
            raise InvalidInputError("key, level and series choose from files, but an array was given. Leave them out.")
        source, name = Source(path_or_array), "the image"
    else:
        raise InvalidTypeError(
            f"An image must be a path or an array, but got {type(path_or_array).__name__}. "
            "Convert it with numpy.asarray."
        )
    _check_content(source.data, name)
    letters = _check_axes(axes, source, name) if axes is not None else source.axes
    if letters is None:
        letters = _guess_axes(tuple(source.data.shape), ndim, name)
    return _arrange(source, letters, channel, time, ndim, name)


def _check_content(data: Any, name: str) -> None:
    if 0 in data.shape:
        raise ImageReadError(f"{name} is empty: its shape is {tuple(data.shape)}.")
    if np.dtype(data.dtype).kind not in "buif":
        raise InvalidTypeError(
            f"{name} has pixels of type {data.dtype}, which is not supported. Convert them to integers or real floats."
        )


def _check_axes(axes: str, source: Source, name: str) -> str:
    letters = axes.upper()
    n = len(source.data.shape)
    if len(letters) != n or len(set(letters)) != n or not set("YX") <= set(letters) <= set(_LETTERS):
        raise InvalidInputError(
            f"axes must name each of the {n} axes of {name} (shape {tuple(source.data.shape)}) by another letter out "
            f"of {_LETTERS}, with Y and X among them, but got {axes!r}."
        )
    return letters


def _guess_axes(shape: tuple[int, ...], ndim: int | None, name: str) -> str:
    """Axes of an image whose file says nothing; axes of length one get a letter that is not used."""
    kept = [n for n, size in enumerate(shape) if size > 1]
    if len(kept) < 2:
        kept = list(range(len(shape)))[-2:]
    if ndim == 3 and len(kept) == 2 and kept[0] > 0:
        kept.insert(0, kept[0] - 1)  # a stack of one plane
    sizes = [shape[n] for n in kept]
    colour = len(sizes) >= 3 and (sizes[-1] in (3, 4) if ndim is None else len(sizes) == ndim + 1)
    spatial = len(sizes) - colour
    if spatial not in (2, 3) or ndim not in (None, spatial):
        raise InvalidInputError(
            f"{name} has {len(shape)} axes of shape {shape}, and the file does not say what they are. Name them with "
            f"axes, for example axes={'TCZYX'[-len(shape):] if 2 <= len(shape) <= 5 else 'ZYX'!r}, and choose with "
            "channel and time what to segment."
        )
    letters = "ZYX"[3 - spatial:] + "C" * colour
    named, unused = dict(zip(kept, letters)), iter(c for c in "TSZC?" if c not in letters)
    return "".join(named[n] if n in named else next(unused, "?") for n in range(len(shape)))


def _arrange(
    source: Source, axes: str, channel: int | None, time: int | None, ndim: int | None, name: str
) -> LazyImage:
    """Choose indices, drop axes of length one, put channels last."""
    shape = dict(zip(axes, source.data.shape))
    fixed: dict[int, int | slice] = {}
    for letter, what, index in (("C", "channel", channel), ("T", "time", time)):
        if index is None:
            continue
        if letter == "C" and shape.get("C", 1) == 1 and "S" in shape:
            letter = "S"
        if letter not in shape:
            raise InvalidInputError(
                f"{name} has no {what} axis, but {what}={index} was given. Its axes are {_describe(shape)}. "
                "Leave it out, or name the axes with axes."
            )
        if not 0 <= index < shape[letter]:
            raise InvalidInputError(f"{name} has no {what} {index}: there are {shape[letter]}, numbered from 0.")
        fixed[axes.index(letter)] = index
    needed = "YX"
    if ndim == 3 and shape.get("Z", 1) == shape.get("T", 1) == 1:  # a stack of one plane
        needed += next((a for a in "ZT" if a in shape and axes.index(a) not in fixed), "")
    for n, letter in enumerate(axes):
        if n not in fixed and source.data.shape[n] == 1 and letter not in needed:
            fixed[n] = 0

    left = [letter for n, letter in enumerate(axes) if n not in fixed]
    colours, stacks = [a for a in left if a in "CS"], [a for a in left if a not in "CSYX"]
    unknown = [a for a in left if a not in _LETTERS]
    if len(stacks) > 1 or len(colours) > 1 or unknown:
        raise InvalidInputError(
            f"{name} has the axes {_describe(shape)}; an image may have Y, X, one of Z or T, and channels. "
            f"{_advice(stacks, colours)}"
        )
    if colours:
        letter = colours[0]
        limit = 4 if letter == "S" or axes.endswith("C") else 3
        if shape[letter] > limit:
            raise InvalidInputError(
                f"{name} has {shape[letter]} channels (axes {_describe(shape)}), but at most 3 are used together. "
                f"Choose one with channel=0 to channel={shape[letter] - 1}."
            )
        if shape[letter] == 4:  # opacity
            fixed[axes.index(letter)] = slice(0, 3)
    if ndim is not None and len(stacks) + 2 != ndim:
        raise InvalidInputError(
            f"{name} has {len(stacks) + 2} dimensions (axes {_describe(shape)}), but ndim={ndim} was given. "
            "Leave ndim out, or say with axes what the axes are."
        )
    final = [*stacks, "Y", "X", *colours]
    data = view(source.data, fixed, [axes.index(a) for a in final], name)
    scale = source.scale and tuple(source.scale.get(a, 1.0) for a in [*stacks, "Y", "X"])
    return LazyImage(data, "".join("C" if a == "S" else a for a in final), name, scale or None)


def _describe(shape: dict[str, int]) -> str:
    return f"{''.join(shape)} ({', '.join(f'{a}={n}' for a, n in shape.items())})"


def _advice(stacks: list[str], colours: list[str]) -> str:
    choices = {"T": "time", "C": "channel", "S": "channel"}
    choose = [name for name in dict.fromkeys(choices.get(a) for a in [*stacks, *colours]) if name]
    if not choose:
        return "Say with axes what the axes are."
    return f"Choose an index with {' and '.join(choose)} (counted from 0), or say with axes what the axes are."


def load_image_data(path: str, key: str | None = None, lazy_loading: bool = False) -> np.ndarray:
    """Load an image as it lies in its file, with all its axes in the order of the file.

    Args:
        path: The file, container or folder.
        key: Name of the image in a container, or a pattern for a folder whose files form a stack.
        lazy_loading: Whether to return an array that is read when it is indexed, where the format allows it.

    Returns:
        The image.

    Raises:
        MissingFileError: If there is no such file.
        ImageReadError: If no image can be read from it.
    """
    data = open_source(Path(path).expanduser(), key).data
    return data if lazy_loading else np.array(data[...])
