"""How the values of an image become those of the encoder's input, and the reading of items with it."""

import logging
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from ..core.normalize import channel_range, percentile_range, to_image
from .plan import EmbeddingPlan, Item
from .signature import LazyView, iter_slabs

logger = logging.getLogger(__name__)

PERCENTILES = (0.1, 99.9)
_MAX_PIECES = 64
_MAX_VALUES = 2**26


def check_normalization(normalization) -> Any:
    """Check the option and return its form in the attributes of a cache.

    Raises:
        InvalidInputError: If it is not `tile`, `plane`, `image` or a range (lo, hi).
    """
    if isinstance(normalization, str):
        if normalization == "tile":
            return "tile"
        if normalization in ("plane", "image"):
            return {"mode": normalization, "percentiles": list(PERCENTILES)}
    elif isinstance(normalization, tuple | list) and len(normalization) == 2:
        limits = [np.asarray(v, dtype=float).tolist() for v in normalization]
        channel_range(limits, 0)
        return {"mode": "range", "range": limits}
    raise InvalidInputError(
        f"normalization must be 'tile', 'plane', 'image' or a range (lo, hi), but got {normalization!r}."
    )


class ItemReader:
    """Reads items of a plan as uint8 RGB images. One thread at a time.

    Args:
        input_: The image, may be lazy.
        plan: The plan.
        normalization: What `check_normalization` returned.
    """

    def __init__(self, input_, plan: EmbeddingPlan, normalization: Any):
        self._input = input_ if hasattr(input_, "shape") else np.asarray(input_)
        self._plan, self._normalization = plan, normalization
        self._ranges: dict[int | None, tuple] = {}

    def __call__(self, item: Item) -> np.ndarray:
        try:
            return to_image(self._plan.read(self._input, item), self._range(item.z))
        except InvalidInputError as error:
            if item == (None, None):
                raise
            raise type(error)(f"{error} This is in {item}.") from error

    def _range(self, z: int | None):
        settings = self._normalization
        if settings == "tile":
            return None
        if settings["mode"] == "range":
            return settings["range"]
        key = z if settings["mode"] == "plane" else None
        if key not in self._ranges:
            self._ranges.clear()
            array = self._input if key is None else LazyView(self._input, key)
            self._ranges[key] = measure_range(array, self._plan.has_channels, settings["percentiles"])
            logger.info("Values %s become 0 and 255", self._ranges[key])
        return self._ranges[key]


def measure_range(array, has_channels: bool, percentiles) -> tuple[list[float], list[float]]:
    """Percentiles per channel of a lazy array; of large arrays 64 evenly spaced rows or planes are read."""
    shape = tuple(array.shape)
    n_values = int(np.prod(shape[:-1] if has_channels else shape, dtype=np.int64))
    if n_values <= _MAX_VALUES or shape[0] <= _MAX_PIECES:
        pieces = iter_slabs(array)
    else:
        indices = np.unique(np.linspace(0, shape[0] - 1, _MAX_PIECES).astype(int))
        pieces = (slab for i in indices for slab in iter_slabs(LazyView(array, int(i))))
        n_values = n_values // shape[0] * len(indices)
    return percentile_range(pieces, n_values, tuple(percentiles), channels=has_channels)
