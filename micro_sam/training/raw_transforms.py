"""How the values of images become the range 0 to 255 on which the networks are trained.

Each transform is a function of an array. The datasets of this package measure the named ones on the whole image and
apply the same numbers to all its patches (`limits_for`, `rescale`), so that a dark patch stays dark:

| transform | what it stretches to 0 and 255 | measured on |
|---|---|---|
| `require_8bit` (default) | nothing within 0 to 255; 0 and 1 of floats up to 1; else minimum and maximum | file |
| `normalize_image` | minimum and maximum per channel: what inference does (`micro_sam.core.normalize`) | plane |
| `normalize_minmax` | minimum and maximum | plane |
| `normalize_percentile` | percentiles 1 and 99 | plane |

Any other callable is applied to each patch as it is. Channels come first: (C, Y, X).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError, nearest_names
from ..core.normalize import check_finite
from .targets import DecoderTarget, pad_target

__all__ = [
    "ResizeLabelTrafo", "ResizeRawTrafo", "get_raw_transform", "identity", "limits_for", "normalize_image",
    "normalize_minmax", "normalize_percentile", "normalize_to_8bit", "require_8bit", "rescale",
]

_EPS = 1e-7


@dataclass(frozen=True)
class Limits:
    """The values that become 0 and 255: numbers, or arrays (C, 1, 1) with one value per channel."""

    lo: float | np.ndarray
    hi: float | np.ndarray


def rescale(values: np.ndarray, limits: Limits | None) -> np.ndarray:
    """Map `limits` to 0 and 255, clipping what lies outside, as float32. None returns the values as they are."""
    if limits is None:
        return values
    span = np.maximum(np.asarray(limits.hi, np.float64) - limits.lo, _EPS)
    scaled = (np.asarray(values, np.float64) - limits.lo) * (255.0 / span)
    return np.clip(scaled, 0.0, 255.0).astype(np.float32)


def _checked(values: Any) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "buif":
        raise InvalidTypeError(f"Images of dtype {values.dtype} are not supported. Convert to integers or real floats.")
    check_finite(values)
    return values.view(np.uint8) if values.dtype == bool else values


def _limits_8bit(values: np.ndarray) -> Limits | None:
    if np.asarray(values).dtype == bool:
        return Limits(0.0, 1.0)
    values = _checked(values)
    if values.dtype == np.uint8:
        return None
    lo, hi = float(values.min()), float(values.max())
    if lo >= 0 and hi <= 255:
        return Limits(0.0, 1.0) if values.dtype.kind == "f" and hi <= 1 else None
    return Limits(lo, hi)


def _limits_minmax(values: np.ndarray) -> Limits:
    values = _checked(values)
    return Limits(float(values.min()), float(values.max()))


def _limits_percentile(values: np.ndarray) -> Limits:
    lo, hi = np.percentile(_checked(values), [1.0, 99.0])
    return Limits(float(lo), float(hi))


def _limits_image(values: np.ndarray) -> Limits:
    values = _checked(values)
    if values.ndim < 3:
        return _limits_minmax(values)
    axes = tuple(range(1, values.ndim))
    return Limits(
        values.min(axis=axes, keepdims=True).astype(np.float64), values.max(axis=axes, keepdims=True).astype(np.float64)
    )


def identity(x: Any) -> Any:
    """Return the argument: the transform for images that are in the range 0 to 255 already."""
    return x


def require_8bit(x: np.ndarray) -> np.ndarray:
    """Bring an image to the range 0 to 255, if it is not there already.

    Args:
        x: Image of any real dtype, of any shape.

    Returns:
        The image itself if its values lie within 0 to 255. Floats from 0 to at most 1, and booleans, times 255.
        Anything else (16 bit, negative values) stretched from its minimum and maximum to 0 and 255. float32.

    Raises:
        InvalidInputError: For NaN or infinite values.

    Example:
        >>> require_8bit(np.array([0.0, 0.5])).max()
        np.float32(127.5)
    """
    return rescale(x, _limits_8bit(x))


def normalize_minmax(x: np.ndarray) -> np.ndarray:
    """Stretch an image from its minimum and maximum to 0 and 255, as float32; a constant image becomes 0."""
    return rescale(x, _limits_minmax(x))


def normalize_percentile(x: np.ndarray) -> np.ndarray:
    """Stretch an image from its percentiles 1 and 99 to 0 and 255, clipping what is beyond, as float32."""
    return rescale(x, _limits_percentile(x))


def normalize_image(x: np.ndarray) -> np.ndarray:
    """Stretch every channel of an image (C, Y, X) or (Y, X) from its minimum and maximum to 0 and 255, as float32.

    This is what inference does with an image (`micro_sam.core.normalize.to_image`), without its rounding.
    """
    return rescale(x, _limits_image(x))


def normalize_to_8bit(raw: np.ndarray) -> np.ndarray:
    """Stretch an image from its minimum and maximum to 0 and 255, as float32."""
    return normalize_minmax(raw)


_PREPROCESS: dict[str | None, Callable] = {
    None: require_8bit, "normalize_minmax": normalize_minmax, "normalize_percentile": normalize_percentile,
    "normalize_image": normalize_image,
}


def get_raw_transform(preprocess: str | None = None) -> Callable:
    """Return the raw transform of a name.

    Args:
        preprocess: None for `require_8bit`, `normalize_minmax`, `normalize_percentile` or `normalize_image`.

    Returns:
        The function.

    Raises:
        InvalidInputError: For another name.
    """
    if preprocess not in _PREPROCESS:
        names = [name for name in _PREPROCESS if name]
        raise InvalidInputError(f"There is no raw transform {preprocess!r}. {nearest_names(str(preprocess), names)}")
    return _PREPROCESS[preprocess]


@dataclass(frozen=True)
class Measure:
    """How the limits of a transform are found: `find(image)` -> limits, from the whole file or from one plane."""

    find: Callable[[np.ndarray], Limits | None]
    per_file: bool = False


_MEASURES: dict[Callable, Measure] = {
    require_8bit: Measure(_limits_8bit, per_file=True),
    normalize_minmax: Measure(_limits_minmax), normalize_to_8bit: Measure(_limits_minmax),
    normalize_percentile: Measure(_limits_percentile), normalize_image: Measure(_limits_image),
}


def limits_for(raw_transform: Callable) -> Measure | None:
    """How to measure a transform on a whole image; None if it can only be applied to patches."""
    try:
        return _MEASURES.get(raw_transform)
    except TypeError:  # callables need not be hashable
        return None


def _center_padding(shape: Sequence[int], desired: Sequence[int]) -> list[tuple[int, int]]:
    if any(have > want for have, want in zip(shape, desired)):
        raise InvalidInputError(
            f"An image of {tuple(shape)} does not fit into the desired shape {tuple(desired)}. Choose a larger shape."
        )
    missing = [want - have for have, want in zip(shape, desired)]
    return [(n - n // 2, n // 2) for n in missing]


def _plane_shape(desired_shape: Sequence[int]) -> tuple[int, int]:
    if len(desired_shape) not in (2, 3) or min(desired_shape) < 1:
        raise InvalidInputError(f"desired_shape must be (Y, X) or (C, Y, X), but is {tuple(desired_shape)}.")
    return tuple(int(n) for n in desired_shape[-2:])


class ResizeRawTrafo:
    """Pad an image around its centre to a given shape.

    Args:
        desired_shape: The shape (Y, X); a leading number of channels is allowed. An odd remainder goes first.
        do_rescaling: Whether to stretch the image by percentiles, then by minimum and maximum, to 0 to 255.
        valid_channels: Index or indices of the channels to keep; None keeps all.
        padding: Mode of `numpy.pad`.
        ensure_rgb: Whether a single channel is repeated three times.
    """

    def __init__(
        self,
        desired_shape: tuple[int, ...],
        do_rescaling: bool = False,
        valid_channels: int | tuple[int, ...] | None = None,
        padding: str = "constant",
        ensure_rgb: bool = True,
    ):
        self.desired_shape = tuple(desired_shape)
        self.do_rescaling, self.valid_channels = do_rescaling, valid_channels
        self.padding, self.ensure_rgb = padding, ensure_rgb
        self._plane = _plane_shape(desired_shape)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Pad an image.

        Args:
            raw: Image (Y, X), (C, Y, X), or (Y, X, C) with up to four channels.

        Returns:
            Image (C, Y, X); (Y, X) if it came so and `ensure_rgb` is off.

        Raises:
            InvalidInputError: If the image is larger than the desired shape or lacks a channel.
        """
        raw = np.asarray(raw)
        if raw.ndim == 3 and raw.shape[-1] <= 4 < raw.shape[0]:
            raw = np.moveaxis(raw, -1, 0)
        if self.valid_channels is not None:
            raw = self._select(raw)
        if self.do_rescaling:
            raw = normalize_to_8bit(normalize_percentile(raw))
        if self.ensure_rgb and raw.ndim == 2:
            raw = raw[None]
        if self.ensure_rgb and len(raw) == 1:
            raw = np.repeat(raw, 3, axis=0)
        widths = _center_padding(raw.shape[-2:], self._plane)
        return np.pad(raw, [(0, 0)] * (raw.ndim - 2) + widths, mode=self.padding)

    def _select(self, raw: np.ndarray) -> np.ndarray:
        channels = [self.valid_channels] if isinstance(self.valid_channels, int) else list(self.valid_channels)
        if raw.ndim != 3 or not all(-len(raw) <= c < len(raw) for c in channels):
            raise InvalidInputError(f"valid_channels={self.valid_channels} do not fit an image of shape {raw.shape}.")
        return raw[channels]


class ResizeLabelTrafo:
    """Compute the target for the decoder and pad it around its centre to a given shape.

    Args:
        desired_shape: The shape (Y, X); a leading number of channels is allowed. An odd remainder goes first.
        min_size: Components with fewer pixels become background.
        padding: Mode of `numpy.pad`; what `constant` adds is background.
    """

    def __init__(self, desired_shape: tuple[int, ...], min_size: int = 0, padding: str = "constant"):
        self.desired_shape, self.min_size, self.padding = tuple(desired_shape), min_size, padding
        self._plane = _plane_shape(desired_shape)
        self._target = DecoderTarget(min_size)

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Return the target (4, Y, X) of labels (Y, X): ids, foreground, centre and boundary distance.

        Raises:
            InvalidInputError: If the labels are larger than the desired shape, or are no labels.
        """
        target = self._target(labels)
        return pad_target(target, _center_padding(target.shape[1:], self._plane), self.padding)
