"""Copying weights into a network: exactly, or as far as they fit."""

import warnings
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import CheckpointError

# Written by other programs, but constants here; and the classifier of TinyViT, which is never used.
_IGNORED_SUFFIXES = ("attention_bias_idxs", ".ab")
_IGNORED = ("pixel_mean", "pixel_std")
_OPTIONAL = ("image_encoder.head.", "image_encoder.norm_head.")


class SkipInit(torch.overrides.TorchFunctionMode):
    """Inside of it, networks are built with memory as it is: for weights that are all loaded afterwards."""

    _SKIPPED = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self._SKIPPED:
            return args[0]
        return func(*args, **(kwargs or {}))


def _shorten(names: Iterable[str], n: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _relevant(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k not in _IGNORED and not k.endswith(_IGNORED_SUFFIXES)}


def check_fit(
    network: nn.Module, state: Mapping[str, torch.Tensor], source: str = "the checkpoint",
    may_lack: tuple[str, ...] = (),
) -> None:
    """Raise `CheckpointError` if weights are missing, unknown or of another shape, see `load_weights`."""
    state, own = _relevant(state), network.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(_OPTIONAL + may_lack)]
    unknown = [k for k in state if k not in own]
    wrong = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own if k in state and state[k].shape != own[k].shape
    ]
    parts = [
        f"{len(names)} {text} ({_shorten(names)})"
        for text, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)) if names
    ]
    if parts:
        raise CheckpointError(
            f"The weights of {source} do not fit the network: {'; '.join(parts)}. Check the model type and options "
            "such as image_size, or pass flexible_load_checkpoint=True to load what fits."
        )


def load_weights(
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str = "the checkpoint",
    may_lack: tuple[str, ...] = (),
) -> None:
    """Copy weights that must fit exactly; half precision becomes single precision.

    Args:
        network: Receives the weights.
        state: The weights; not changed.
        source: Named in errors.
        may_lack: Prefixes of parameters that keep their value if the state does not have them.

    Raises:
        CheckpointError: If weights are missing, unknown or of another shape.
    """
    check_fit(network, state, source, may_lack)
    network.load_state_dict(_relevant(state), strict=False)


def _interpolate(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Resize position embeddings to another image size; None for other parameters."""
    value = value.float()
    if name.endswith("pos_embed") and value.ndim == 4 and value.shape[-1] == shape[-1]:
        grid = F.interpolate(value.permute(0, 3, 1, 2), tuple(shape[1:3]), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1)
    if name.endswith(("rel_pos_h", "rel_pos_w")) and value.ndim == 2 and value.shape[-1] == shape[-1]:
        return F.interpolate(value.T[None], shape[0], mode="linear", align_corners=False)[0].T
    return None


def _initialize(name: str, value: torch.Tensor) -> None:
    if "bias" in name:
        nn.init.zeros_(value)
    elif "weight" in name and value.ndim >= 2:
        nn.init.kaiming_uniform_(value)
    elif "weight" in name:  # scales of normalisation layers
        nn.init.ones_(value)


@torch.no_grad()
def load_weights_flexibly(
    network: nn.Module, state: Mapping[str, torch.Tensor], source: str = "the checkpoint"
) -> dict[str, list[str]]:
    """Copy the weights that fit, and warn about all others.

    Position embeddings of another image size are interpolated. Weights of another shape are initialised anew.

    Args:
        network: Receives the weights.
        state: The weights; not changed.
        source: Named in warnings.

    Returns:
        The names of the parameters that are `absent` from the state (they keep their values), of the `surplus`
        weights that the network does not have, and of the `interpolated` and the `initialized` ones.

    Raises:
        CheckpointError: If nothing fits.
    """
    state, own = _relevant(state), network.state_dict()
    report = {
        "absent": [k for k in own if k not in state and not k.startswith(_OPTIONAL)],
        "surplus": [k for k in state if k not in own],
        "interpolated": [], "initialized": [],
    }
    fitting = {}
    for name, target in own.items():
        if name not in state:
            continue
        value = state[name]
        if value.shape != target.shape:
            value = _interpolate(name, value, target.shape)
            report["initialized" if value is None else "interpolated"].append(name)
        if value is None:
            _initialize(name, target)
        else:
            fitting[name] = value
    if not fitting:
        raise CheckpointError(
            f"None of the weights of {source} fit the network (its names start with {_shorten(state, 3)}). "
            "Check the model type."
        )
    network.load_state_dict(fitting, strict=False)
    texts = {
        "absent": "keep their initial values", "surplus": "are not part of the network",
        "interpolated": "were interpolated to the image size", "initialized": "have another shape and start anew",
    }
    parts = [f"{len(report[key])} {text} ({_shorten(report[key])})" for key, text in texts.items() if report[key]]
    if parts:
        warnings.warn(f"Weights of {source}: {'; '.join(parts)}.", stacklevel=3)
    return report
