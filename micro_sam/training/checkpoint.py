"""What a training checkpoint holds: tensors and plain values, so that it can be read without running code from it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._version import __version__
from ..core.errors import CheckpointError, InvalidInputError
from ..models.checkpoints import detect_architecture, read_checkpoint

FORMAT_VERSION = 1
_PLAIN = (bool, int, float, str, bytes, type(None), torch.Tensor, torch.device, torch.dtype)
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")


def plain(value: Any, name: str = "The checkpoint") -> Any:
    """Return a copy of nested containers with nothing but tensors, numbers, texts and built-in containers.

    Raises:
        InvalidInputError: If there is anything else; says where.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, nn.Parameter):
        return value.detach()
    if type(value) in _PLAIN or isinstance(value, torch.Tensor):
        return str(value) if isinstance(value, torch.device | torch.dtype) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key, name): plain(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([plain(entry, f"{name}[{k}]") for k, entry in enumerate(value)]) \
            if type(value) in (tuple, list) else [plain(entry, name) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(entry, name) for entry in value)
    raise InvalidInputError(
        f"{name} holds {type(value).__module__}.{type(value).__qualname__}, but checkpoints hold only tensors and "
        "plain values, so that they can be read safely. Leave it out, or pass it as a number, text, list or dict."
    )


def read(path: str | os.PathLike) -> Mapping[str, Any]:
    """Read a training checkpoint, without running code from it.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If it is damaged, or holds no state of a training.
    """
    content = read_checkpoint(path).state
    missing = [key for key in ("model_state", "optimizer_state", "iteration", "epoch") if key not in content]
    if missing:
        raise CheckpointError(
            f"{path} is no training checkpoint: it has no {' and no '.join(missing)}. To start from weights, pass it "
            "as checkpoint_path; to continue a training, pass its latest.pt."
        )
    return content


def unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under their own names, without the prefixes of compiled or distributed networks."""
    result = {}
    for key, value in state.items():
        for prefix in _WRAPPER_PREFIXES:
            key = key.removeprefix(prefix)
        result[key] = value
    return result


def class_name(value: Any) -> str | None:
    """The dotted name of a class, a function, or of the class of an instance."""
    if value is None:
        return None
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about its own weights: architecture, image size, whether layers were adapted, version."""
    sam = getattr(model, "sam", None)
    encoder = getattr(model, "encoder", None) if sam is None else getattr(sam, "image_encoder", None)
    settings = {"micro_sam_version": __version__}
    if isinstance(encoder, nn.Module):
        state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
        try:
            settings["model_type"] = detect_architecture(state, "the model")
        except CheckpointError:  # an encoder of the user's own
            settings["model_type"] = class_name(encoder)
        if hasattr(encoder, "img_size"):
            settings["image_size"] = int(encoder.img_size)
    if getattr(sam, "scales_positions", False):
        settings["scale_positions"] = True
    return settings


def describe_decoder(unetr: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about its decoder: the number of features, and how its BatchNorm layers normalise."""
    settings = {"normalization": "running"}
    if hasattr(unetr, "initial_features"):
        settings["initial_features"] = int(unetr.initial_features)
    return settings


def describe_loader(loader: Any) -> dict[str, Any]:
    """The settings of a loader, without its data."""
    sampler = getattr(loader, "sampler", None)
    dataset = getattr(loader, "dataset", None)
    return {
        "class": class_name(loader), "n_batches": len(loader),
        "batch_size": getattr(loader, "batch_size", None), "num_workers": getattr(loader, "num_workers", None),
        "sampler": class_name(sampler), "shuffle": isinstance(sampler, torch.utils.data.RandomSampler),
        "dataset": class_name(dataset), "n_items": len(dataset) if hasattr(dataset, "__len__") else None,
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class and the defaults of an optimizer."""
    kept = {k: v for k, v in optimizer.defaults.items() if isinstance(v, bool | int | float | str | tuple | None)}
    return {"class": class_name(optimizer), **kept}


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return {key: _to_numpy(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def _own_generators(owners: Mapping[str, Any]) -> dict[str, np.random.Generator]:
    found = {}
    for name, owner in owners.items():
        for attribute in ("rng", "_rng"):
            value = getattr(owner, attribute, None)
            if isinstance(value, np.random.Generator):
                found[name] = value
    return found


def random_states(owners: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the generators that objects brought along; all other random numbers follow from the seed."""
    return {name: plain(own.bit_generator.state) for name, own in _own_generators(owners).items()}


def restore_random_states(owners: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set the generators of objects to the states of a checkpoint."""
    for name, own in _own_generators(owners).items():
        if name in states:
            own.bit_generator.state = _to_numpy(states[name])


def path_of(folder: str | os.PathLike, checkpoint: str | os.PathLike) -> Path:
    """The file of a checkpoint that is given as a name in a folder (`best`, `latest`) or as a path."""
    path = Path(checkpoint)
    return path if path.suffix or len(path.parts) > 1 else Path(folder) / f"{checkpoint}.pt"
