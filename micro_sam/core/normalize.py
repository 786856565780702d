"""From any microscopy image to what SAM eats: uint8 RGB. Numpy only.

`to_image` stretches every channel from its minimum to its maximum, truncating to integers. For ordinary
images this is bit for bit the arithmetic on which the published models were trained (float32, epsilon
1e-7); where that arithmetic loses the image (large offsets, tiny ranges) float64 takes over.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from .errors import InvalidInputError, InvalidTypeError

_EPS = np.float32(1e-7)
# The float32 arithmetic is kept while its rounding and its epsilon stay far below one grey level.
_MIN_RANGE = 1e-3
_MAX_OFFSET = 2.0**12
_EXACT_FLOAT32 = 2**24

ValueRange = tuple[Sequence[float] | float, Sequence[float] | float]


def to_image(image: np.ndarray, value_range: ValueRange | None = None) -> np.ndarray:
    """Convert an image to the uint8 RGB image that the encoder expects.

    Args:
        image: Image (Y, X) or (Y, X, C), of any boolean, integer or real dtype; may be lazy (it is read here).
            One channel is replicated, to two a channel of zeros is added, of more than three the first three
            are taken, with a warning.
        value_range: The values (lo, hi) that become 0 and 255, numbers or one per channel; values outside are
            clipped. None takes the minimum and maximum of each channel.

    Returns:
        New uint8 array (Y, X, 3). Constant channels become 0.

    Raises:
        InvalidInputError: If the shape fits no image, or values are NaN or infinite.
        InvalidTypeError: If the dtype is complex or holds objects.

    Example:
        >>> to_image(np.array([[0, 10], [20, 40]], dtype="uint16"))[..., 0]
        array([[  0,  63],
               [127, 255]], dtype=uint8)
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise InvalidInputError(
            f"An image must have the shape (Y, X) or (Y, X, C) without empty axes, but got {image.shape}. "
            "Pass one plane at a time, with the channels on the last axis."
        )
    if image.dtype.kind not in "buif":
        raise InvalidTypeError(
            f"Images of dtype {image.dtype} are not supported. Convert to integers or real floats first."
        )
    if image.ndim == 2:
        image = image[..., None]
    n_channels = image.shape[-1]
    if n_channels > 3:
        warnings.warn(
            f"The image has {n_channels} channels; the first three are used. Select channels to avoid this.",
            stacklevel=2,
        )
        n_channels = 3

    out = np.zeros(image.shape[:2] + (3,), dtype=np.uint8)
    for c in range(n_channels):
        limits = None if value_range is None else channel_range(value_range, c)
        out[..., c] = _stretch(image[..., c], limits)
    if n_channels == 1:
        out[..., 1:] = out[..., :1]
    return out


def channel_range(value_range: ValueRange, channel: int) -> tuple[float, float]:
    """Return (lo, hi) of one channel of a range given as two numbers or as two sequences over channels."""
    try:
        lo, hi = value_range
        lo, hi = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (lo, hi))
        lo, hi = (float(v[channel] if len(v) > 1 else v[0]) for v in (lo, hi))
        valid = np.isfinite(lo) and np.isfinite(hi) and hi >= lo
    except (TypeError, ValueError, IndexError):
        valid = False
    if not valid:
        raise InvalidInputError(
            f"A value range must be (lo, hi) with finite lo <= hi, numbers or one per channel, but got "
            f"{value_range!r} for channel {channel}."
        )
    return lo, hi


def check_finite(values: np.ndarray) -> None:
    """Raise `InvalidInputError`, saying how many, if there are NaN or infinite values."""
    if values.dtype.kind != "f":
        return
    # A sum is finite only if all values are (it may overflow, then the exact check decides).
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(values, dtype=np.float64)):
            return
    n_bad = values.size - int(np.isfinite(values).sum())
    if n_bad:
        raise InvalidInputError(
            f"The image has {n_bad} NaN or infinite values of {values.size}. Replace them first, "
            "for example with numpy.nan_to_num(image) or by the background value."
        )


def _stretch(channel: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    check_finite(channel)
    if channel.dtype == bool:
        channel = channel.view(np.uint8)
    if channel.dtype.kind in "ui" and channel.dtype.itemsize <= 2:
        return _stretch_small_integers(channel, limits)
    if limits is not None:
        return _stretch_between(channel, *limits)
    if channel.dtype.kind in "ui":
        return _stretch_large_integers(channel)

    lo, hi = float(channel.min()), float(channel.max())
    if hi - lo >= _MIN_RANGE and max(abs(lo), abs(hi)) <= _MAX_OFFSET * (hi - lo):
        return _stretch_float32(channel.astype(np.float32))
    return _stretch_between(channel, lo, hi)


def _stretch_float32(values: np.ndarray) -> np.ndarray:
    """The arithmetic of the published models; overwrites `values`."""
    values -= values.min()
    values /= values.max() + _EPS
    values *= np.float32(255)
    return values.astype(np.uint8)


def _stretch_small_integers(channel: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    # A table with one entry per possible value: no temporaries of the size of the image in float.
    lo, hi = int(channel.min()), int(channel.max())
    values = np.arange(lo, hi + 1)
    table = _stretch_float32(values.astype(np.float32)) if limits is None else _stretch_between(values, *limits)
    if lo == 0 and channel.dtype.kind == "u":
        return np.take(table, channel)
    return np.take(table, channel.astype(np.int32) - lo)


def _stretch_large_integers(channel: np.ndarray) -> np.ndarray:
    lo, hi = int(channel.min()), int(channel.max())
    if max(abs(lo), abs(hi)) <= _EXACT_FLOAT32:
        return _stretch_float32(channel.astype(np.float32))
    # Differences modulo 2**64 are exact for all 64-bit integers, signed or not.
    signed = channel.dtype.kind == "i"
    wide = channel.astype(np.int64 if signed else np.uint64).view(np.uint64)
    return _stretch_between(wide - np.uint64(lo % 2**64), 0, hi - lo)


def _stretch_between(values: np.ndarray, lo: float, hi: float) -> np.ndarray:
    if hi <= lo:
        return np.zeros(values.shape, dtype=np.uint8)
    # Half the values first: the difference of two large floats of different sign would overflow.
    scaled = (values.astype(np.float64) / 2 - lo / 2) / (hi / 2 - lo / 2)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= 255
    return scaled.astype(np.uint8)


def percentile_range(
    slabs: Iterator[np.ndarray] | Sequence[np.ndarray],
    n_values: int,
    percentiles: tuple[float, float] = (0.1, 99.9),
    channels: bool = False,
    max_samples: int = 4_000_000,
) -> tuple[list[float], list[float]]:
    """Estimate percentiles of an image from pieces of it, on a regular subsample.

    Args:
        slabs: Pieces of the image; only one is held at a time.
        n_values: Number of values per channel in all pieces together, which sets the sampling step.
        percentiles: Lower and upper percentile, within 0 to 100.
        channels: Whether the last axis of the pieces holds channels.
        max_samples: Largest number of values to keep per channel.

    Returns:
        The lower and the upper values, each a list with one value per channel (one without channels).

    Raises:
        InvalidInputError: For NaN or infinite values, or wrong percentiles.
    """
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise InvalidInputError(f"percentiles must be (low, high) within 0 to 100, but got {percentiles!r}.")
    step = max(1, -(-n_values // max_samples))
    samples, offset = [], 0
    for slab in slabs:
        values = np.asarray(slab)
        check_finite(values)
        values = values.reshape(-1, values.shape[-1] if channels else 1)
        samples.append(values[offset::step].copy())
        offset = (offset - len(values)) % step
    if not samples:
        raise InvalidInputError("The image is empty: there are no values to take percentiles of.")
    stacked = np.concatenate(samples)
    if stacked.dtype == bool:
        stacked = stacked.view(np.uint8)
    lo, hi = np.percentile(stacked, [low, high], axis=0)
    return lo.tolist(), hi.tolist()
