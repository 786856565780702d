"""Presets for finetuning on common hardware, and the choice among them. Loads no torch."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..core.errors import InvalidInputError, nearest_names


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(entry) for key, entry in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = _frozen({
    "Minimal": {"model_type": "vit_t", "n_objects_per_batch": 4, "n_sub_iteration": 4},
    "CPU": {"model_type": "vit_b", "n_objects_per_batch": 10},
    "gtx1080": {"model_type": "vit_t", "n_objects_per_batch": 5},
    "gtx3080": {
        "model_type": "vit_b", "n_objects_per_batch": 5,
        "peft_kwargs": {"attention_layers_to_update": [11], "peft_module": "ClassicalSurgery"},
    },
    "rtx5000": {"model_type": "vit_b", "n_objects_per_batch": 10},
    "V100": {"model_type": "vit_b"},
    "A100": {"model_type": "vit_h"},
})
"""Options of `train_sam` for a kind of hardware; what a preset does not name has `train_sam`'s default. Read-only."""

# Total memory of the card in units of 10**9 bytes, above which a preset is taken.
_CARDS = ((80, "A100"), (30, "V100"), (14, "rtx5000"), (8, "gtx3080"), (5, "gtx1080"), (0, "Minimal"))
_CPU_MEMORY = 16
_N_BLOCKS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}


def choose_configuration(device: Any = None) -> str:
    """Return the name of the preset that suits a device.

    For a CUDA card its total memory decides (in 10**9 bytes: above 80 A100, 30 V100, 14 rtx5000, 8 gtx3080, 5 gtx1080,
    else Minimal). For all else it is CPU, or Minimal if the machine has less than 16 * 10**9 bytes of memory.

    Args:
        device: The device that will train; None for the one that is chosen automatically.
    """
    import psutil
    import torch

    from ..core.settings import get_device

    device = torch.device(get_device(device))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        return next(name for limit, name in _CARDS if memory > limit)
    return "CPU" if psutil.virtual_memory().total / 1e9 >= _CPU_MEMORY else "Minimal"


def check_configuration(name: str) -> None:
    """Raise `InvalidInputError` with the nearest names if there is no preset of exactly this name."""
    if name not in CONFIGURATIONS:
        raise InvalidInputError(f"There is no training preset {name!r}. {nearest_names(name, CONFIGURATIONS)}")


def configuration_options(name: str, explicit: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the options of a preset, overridden by those that were given.

    Args:
        name: The preset.
        explicit: Options that were chosen. None stands for an option that was not, and leaves the preset's value; to
            switch off the parameter-efficient finetuning of a preset pass an empty dict as `peft_kwargs`.

    Returns:
        A new dict, which shares nothing with the presets.

    Raises:
        InvalidInputError: If there is no such preset.
    """
    check_configuration(name)
    options = _thawed(CONFIGURATIONS[name])
    explicit = {key: value for key, value in (explicit or {}).items() if value is not None or key not in options}
    if "peft_kwargs" in options and "peft_kwargs" not in explicit:
        _move_to_last_block(options, str(explicit.get("model_type", options["model_type"]))[:5])
    return options | explicit


def _move_to_last_block(options: dict[str, Any], architecture: str) -> None:
    """Let a preset adapt the last block of another architecture; the smallest one needs no adapting."""
    if architecture == "vit_t":
        del options["peft_kwargs"]
    elif architecture in _N_BLOCKS:
        options["peft_kwargs"]["attention_layers_to_update"] = [_N_BLOCKS[architecture] - 1]
