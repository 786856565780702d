"""Small pictures of images for a list, made from as little of their data as possible."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImageReadError, InvalidInputError, MissingFileError, require_positive_int
from ..core.image import LazyImage, open_image
from ..core.lazy_array import from_array
from ..core.normalize import to_image
from ..core.readers import TIF, suffix_of

_PERCENTILES = (0.5, 99.5)


def thumbnail(image: Any, size: int = 64, *, image_options: Mapping[str, Any] | None = None) -> np.ndarray:
    """Make a small picture of an image, or of the middle plane of a stack.

    Of pyramids a low level is read, of stacks one plane, of what lies plainly on disk every n-th pixel. Where the image
    leaves a choice, the first channel or time point is shown.

    Args:
        image: Path or array.
        size: Length of the longer side in pixels.
        image_options: More arguments of `open_image`, such as `channel` or `key`.

    Returns:
        Picture (h, w, 3), uint8. Colours stay as they are, grey values are stretched.

    Raises:
        MissingFileError: If there is no such file.
        ImageReadError: If no image can be read from it.
        InvalidInputError: If it is not clear which image is meant.
    """
    require_positive_int("size", size)
    opened = _open_small(image, size, dict(image_options or {}))
    height, width = opened.shape[-2:]
    step = max(1, max(height, width) // (2 * size))
    plane = [opened.shape[0] // 2] if opened.ndim == 3 else []
    pixels = np.asarray(opened.data[(*plane, slice(None, None, step), slice(None, None, step))])
    return _picture(pixels, [max(1, round(side * size / max(height, width))) for side in (height, width)])


def _picture(pixels: np.ndarray, shape: list[int]) -> np.ndarray:
    from skimage.transform import resize

    is_colour = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3
    pixels = np.nan_to_num(pixels.astype("float32"))
    small = resize(pixels, (*shape, *pixels.shape[2:]), anti_aliasing=min(shape) < min(pixels.shape[:2]))
    if is_colour:
        return np.clip(np.rint(small), 0, 255).astype("uint8")
    return to_image(small, tuple(np.percentile(small, _PERCENTILES, axis=(0, 1))))


def _open_small(image: Any, size: int, options: dict[str, Any]) -> LazyImage:
    if not isinstance(image, str | os.PathLike):
        return _open(image, options)
    path = Path(image).expanduser()
    if suffix_of(path) in TIF and path.is_file() and not options:
        return _open_tif(path, size)
    opened = _open(path, options)
    while path.is_dir() and max(opened.shape[-2:]) > size:
        level = options.get("level", 0) + 1
        try:
            lower = _open(path, options | {"level": level})
        except InvalidInputError:  # there is no lower level
            break
        if max(lower.shape[-2:]) < size:
            break
        opened, options = lower, options | {"level": level}
    return opened


def _open_tif(path: Path, size: int) -> LazyImage:
    """Open a tif so that only the pages or tiles that are asked for are read, however small it is."""
    import tifffile
    import zarr

    file = None
    try:
        file = tifffile.TiffFile(path)
        series = file.series[0]
        sides = [max(s for a, s in zip(level.axes, level.shape) if a in "YX") for level in series.levels]
        level = max(n for n, side in enumerate(sides) if side >= size or n == 0)
        pages = from_array(zarr.open(series.aszarr(level=level), mode="r"), str(path), file)
        axes = series.levels[level].axes.replace("Q", "Z").replace("I", "Z")
        return _open(pages, {"axes": axes})
    except Exception:  # an unusual file: the reader for all images knows better, or says what is wrong
        if file is not None:
            file.close()
        return _open(path, {})


def _open(image: Any, options: Mapping[str, Any]) -> LazyImage:
    """Open an image; of more channels or time points than can be shown, the first."""
    refusal = None
    for choice in ({}, {"channel": 0}, {"time": 0}, {"channel": 0, "time": 0}):
        try:
            return open_image(image, **{**choice, **options})
        except (ImageReadError, MissingFileError):
            raise
        except InvalidInputError as error:
            refusal = refusal or error
    raise refusal
