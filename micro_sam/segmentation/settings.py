"""What decides the result of a segmenter: its model and options. Serves records of outputs and checks of caches."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash

from ..core.errors import InvalidInputError, nearest_names
from ..embeddings.signature import model_identity
from .factory import SEGMENTER_CLASSES

# Arguments that say how to work, not what comes out, and those that the workflow sets itself.
_NOT_SETTINGS = {
    "n_threads", "optimize_memory", "segmentation", "output_mode", "tile_shape", "halo", "batch_size",
    "points_per_batch",
}


def mode_of(segmenter: Any) -> str:
    """Return `amg`, `ais` or `apg` for a segmenter."""
    # APG derives from AIS, so it has to be looked at first.
    for mode in ("amg", "apg", "ais"):
        if isinstance(segmenter, SEGMENTER_CLASSES[mode]):
            return mode
    raise InvalidInputError(
        f"Expected one of the segmenters of micro_sam, but got {type(segmenter).__name__}. "
        "Create one with get_predictor_and_segmenter."
    )


def is_tiled(segmenter: Any) -> bool:
    """Whether a segmenter works on tiled embeddings."""
    return isinstance(segmenter, tuple(classes[1] for classes in SEGMENTER_CLASSES.values()))


def check_tiled(segmenter: Any, tile_shape: Any) -> bool:
    """Return whether a segmenter is tiled; raise `InvalidInputError` if it does not fit the tile shape (or None)."""
    tiled = is_tiled(segmenter)
    if tiled != (tile_shape is not None):
        raise InvalidInputError(
            f"The segmenter is {type(segmenter).__name__}, but tile_shape is {tile_shape}. "
            f"{'Pass tile_shape' if tiled else 'Leave tile_shape out'}, or create a segmenter with "
            f"is_tiled={not tiled}."
        )
    return tiled


def decoder_hash(decoder: torch.nn.Module | None) -> str | None:
    """Return the hash of a decoder's weights, `xxh3_128:<hex>`; None without decoder."""
    if decoder is None:
        return None
    xxh3 = xxhash.xxh3_128()
    for name, tensor in sorted(decoder.state_dict().items()):
        if ".encoder." in f".{name}":  # that of the embeddings
            continue
        values = tensor.detach().cpu().contiguous()
        xxh3.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
        xxh3.update(values.flatten().float().numpy())
    return f"xxh3_128:{xxh3.hexdigest()}"


def model_settings(predictor: Any, decoder: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return `model_name`, `model_hash`, `precision` unless it is float32, and `decoder_hash` with a decoder."""
    identity = model_identity(predictor)
    settings = {k: identity[k] for k in ("model_name", "model_hash", "precision") if k in identity}
    return settings if decoder is None else {**settings, "decoder_hash": decoder_hash(decoder)}


def init_options(mode: str, is_tiled: bool) -> dict[str, inspect.Parameter]:
    """Return the options of the segmenter's class, for example `points_per_side`."""
    parameters = inspect.signature(SEGMENTER_CLASSES[mode][is_tiled].__init__).parameters
    return {name: p for name, p in parameters.items() if name not in ("self", "predictor", "decoder")}


def generate_options(mode: str, is_tiled: bool) -> dict[str, inspect.Parameter]:
    """Return the options of `generate`."""
    parameters = inspect.signature(SEGMENTER_CLASSES[mode][is_tiled].generate).parameters
    return {name: p for name, p in parameters.items() if name not in ("self", "output_mode", "segmentation")}


def check_options(options: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    """Raise `InvalidInputError` with the nearest names if an option is not known."""
    for name in options:
        if name not in known:
            raise InvalidInputError(f"There is no option {name!r} of {what}. {nearest_names(name, known)}")


def full_options(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options and the defaults of all others, as far as they decide the result."""
    defaults = {
        name: p.default for name, p in inspect.signature(function).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    chosen = {k: v for k, v in {**defaults, **options}.items() if k not in _NOT_SETTINGS}
    return json.loads(json.dumps(chosen, default=_describe))


def _describe(value: Any) -> Any:
    """Arrays by their hash, numbers of numpy as numbers, functions by their name."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    if hasattr(value, "tobytes"):
        return f"array {value.shape} {xxhash.xxh3_128_hexdigest(value.tobytes())}"
    return getattr(value, "__qualname__", None) or str(value)
