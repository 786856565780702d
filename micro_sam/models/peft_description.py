"""How a network was changed for parameter-efficient finetuning: written down, read, and found in weights."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    PeftError,
    nearest_names,
    require_positive_int,
)
from .peft_layers import AdaptFormer, FacTSurgery, LoRASurgery, SSFSurgery, check_alpha, check_update_matrices
from .peft_selective import AttentionSurgery, BiasSurgery, ClassicalSurgery, LayerNormSurgery
from .tiny_vit import DEPTHS

METHODS: dict[str, type[nn.Module]] = {
    method.__name__: method for method in (
        LoRASurgery, FacTSurgery, SSFSurgery, AdaptFormer, AttentionSurgery, BiasSurgery, LayerNormSurgery,
        ClassicalSurgery,
    )
}
NEEDS_RANK = ("LoRASurgery", "FacTSurgery")
ADDS_LAYERS = (*NEEDS_RANK, "SSFSurgery", "AdaptFormer")
_GENERAL = ("peft_module", "rank", "attention_layers_to_update", "quantize")

# One parameter that each method adds to every block that it changes.
_MARKS = {
    "LoRASurgery": ("attn.qkv.w_a_linear_", "mlp.w_a_linear_"),
    "FacTSurgery": ("attn.qkv.FacTu.",),
    "SSFSurgery": ("attn.qkv.scale",),
    "AdaptFormer": ("mlp.down_proj.",),
}


def _method_of(value: Any) -> str:
    name = value if isinstance(value, str) else getattr(value, "__name__", repr(value))
    if name not in METHODS or not (isinstance(value, str) or METHODS[name] is value):
        raise PeftError(f"peft_module {name!r} is no method of parameter-efficient finetuning. "
                        + nearest_names(name, METHODS))
    return name


def _layers_of(value: Any) -> list[int] | None:
    if value is None:
        return None
    try:
        layers = [int(layer.__index__()) for layer in value]
    except (AttributeError, TypeError) as error:
        raise InvalidTypeError(f"attention_layers_to_update must be a list of integers, but is {value!r}.") from error
    if min(layers, default=0) < 0 or len(set(layers)) < len(layers):
        raise PeftError(
            f"attention_layers_to_update must name each block once, counted from 0, but is {layers}. Pass None for all."
        )
    return sorted(layers) or None


def module_defaults(method: str) -> dict[str, Any]:
    """The options of a method beside rank and block, with their default values."""
    parameters = inspect.signature(METHODS[method].__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if n not in ("self", "rank", "block")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def peft_settings(peft_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the options of `PEFT_Sam` and write them down in full.

    The result belongs into a checkpoint, as its `settings["peft"]`.

    Args:
        peft_kwargs: The keyword arguments of `PEFT_Sam`, or None. `peft_module` is a class or its name. It is not
            changed.

    Returns:
        All options as numbers, texts and lists, with default values for what was not passed; `peft_module` is the
        name of the class. Empty for no options.

    Raises:
        PeftError: If the method is unknown, needs a rank, or a block is named twice.
        InvalidInputError, InvalidTypeError: If an option of the method has a wrong value or name.

    Example:
        >>> peft_settings({"rank": 4, "attention_layers_to_update": [11]})["peft_module"]
        'LoRASurgery'
    """
    if peft_kwargs is not None and not isinstance(peft_kwargs, Mapping):
        raise InvalidTypeError(f"peft_kwargs must be a dict, but is {type(peft_kwargs).__name__}.")
    if not peft_kwargs:
        return {}
    method = _method_of(peft_kwargs.get("peft_module", LoRASurgery))
    rank = peft_kwargs.get("rank")
    if method in NEEDS_RANK and (not hasattr(rank, "__index__") or rank.__index__() <= 0):
        raise PeftError(f"{method} needs a rank of at least 1, but rank is {rank!r}. Pass for example rank=4.")
    defaults = module_defaults(method)
    options = {name: value for name, value in peft_kwargs.items() if name not in _GENERAL}
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise InvalidTypeError(
            f"{method} has no option {unknown[0]!r}. {nearest_names(unknown[0], [*_GENERAL, *defaults])}"
        )
    options = defaults | options
    _check_options(options)
    if "update_matrices" in options:
        options["update_matrices"] = [name for name in ("q", "k", "v", "mlp") if name in options["update_matrices"]]
    return {
        "peft_module": method, "rank": int(rank) if method in NEEDS_RANK else None,
        "attention_layers_to_update": _layers_of(peft_kwargs.get("attention_layers_to_update")),
        "quantize": bool(peft_kwargs.get("quantize", False)),
    } | options


def _check_options(options: Mapping[str, Any]) -> None:
    if "update_matrices" in options:
        check_update_matrices(options["update_matrices"])
    if "alpha" in options:
        check_alpha(options["alpha"])
    if "projection_size" in options:
        require_positive_int("projection_size", options["projection_size"])
    dropout = options.get("dropout")
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise InvalidInputError(f"dropout must be None or in the range from 0 to below 1, but is {dropout!r}.")


def peft_kwargs_from(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turn what `peft_settings` wrote into the keyword arguments of `PEFT_Sam`.

    Args:
        settings: The `settings["peft"]` of a checkpoint, or None.

    Returns:
        The keyword arguments, `peft_module` being the class. Empty for no settings.

    Raises:
        PeftError, InvalidInputError, InvalidTypeError: If the settings are not valid, see `peft_settings`.
    """
    settings = peft_settings(settings)
    return settings | {"peft_module": METHODS[settings["peft_module"]]} if settings else {}


def _split_block_name(name: str) -> tuple[int, str] | None:
    """The number of the transformer block that a parameter belongs to, and its name in the block."""
    parts = name.split(".")
    if parts[:2] == ["image_encoder", "blocks"] and len(parts) > 3:
        return int(parts[2]), ".".join(parts[3:])
    if parts[:2] == ["image_encoder", "layers"] and parts[3:4] == ["blocks"] and parts[2] != "0" and len(parts) > 5:
        return sum(DEPTHS[1:int(parts[2])]) + int(parts[4]), ".".join(parts[5:])
    return None


def detect_peft(
    model_state: Mapping[str, torch.Tensor], source: str = "the checkpoint"
) -> dict[str, Any] | None:
    """Find the layers of parameter-efficient finetuning in weights, and their options as far as they show.

    Methods without new layers leave no trace. Dropout, and an α of AdaptFormer that is not learned, do not show.

    Args:
        model_state: Weights under SAM's names.
        source: Named in errors.

    Returns:
        The options found, as in `peft_settings`; None if there are no such layers.

    Raises:
        CheckpointError: If the layers are of several methods, or differ between the blocks.
    """
    blocks: dict[int, dict[str, torch.Size]] = {}
    for name, value in model_state.items():
        split = _split_block_name(name)
        if split is not None:
            blocks.setdefault(split[0], {})[split[1]] = value.shape
    found: dict[int, dict[str, Any]] = {}
    for index, shapes in blocks.items():
        methods = [m for m, marks in _MARKS.items() if any(name.startswith(marks) for name in shapes)]
        if len(methods) > 1:
            raise CheckpointError(f"The weights of {source} mix {' and '.join(methods)} in block {index}.")
        if methods:
            found[index] = {"peft_module": methods[0]} | _options_in(methods[0], shapes)
    if not found:
        return None
    layers, options = sorted(found), list(found.values())
    if any(other != options[0] for other in options):
        raise CheckpointError(
            f"The layers of parameter-efficient finetuning in {source} differ between blocks: "
            + "; ".join(f"block {i}: {found[i]}" for i in layers if found[i] != options[0] or i == layers[0])
            + ". Such a network cannot be built."
        )
    return options[0] | {"attention_layers_to_update": None if len(layers) == len(blocks) else layers}


def _options_in(method: str, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The options that one block's parameters tell."""
    if method == "LoRASurgery":
        matrices = [name for name in "qkv" if f"attn.qkv.w_a_linear_{name}.weight" in shapes]
        matrices += ["mlp"] if "mlp.w_a_linear_1.weight" in shapes else []
        ranks = {shape[0] for name, shape in shapes.items() if ".w_a_linear_" in name}
        return {"rank": ranks.pop() if len(ranks) == 1 else sorted(ranks), "update_matrices": matrices}
    if method == "FacTSurgery":
        return {"rank": shapes["attn.qkv.FacTu.weight"][0]}
    if method == "AdaptFormer":
        options = {
            "projection_size": shapes["mlp.down_proj.weight"][0],
            "add_input": "mlp.input_is_not_added" not in shapes,
        }
        return options | ({"alpha": "learnable_scalar"} if "mlp.alpha" in shapes else {})
    return {}


def choose_peft(
    peft_kwargs: Mapping[str, Any] | None, model_state: Mapping[str, torch.Tensor],
    recorded: Mapping[str, Any] | None = None, source: str = "the checkpoint",
) -> tuple[dict[str, Any], bool]:
    """Bring together what the caller asks for, what a file says about itself, and what its weights show.

    Args:
        peft_kwargs: What the caller passed; may leave out what the file tells.
        model_state: The weights.
        recorded: The file's `settings["peft"]`.
        source: Named in errors.

    Returns:
        The settings to build the network with (empty for none), and whether the weights have the added layers.
        Settings without new layers come from the caller only: their files are plain weights.

    Raises:
        CheckpointError: If the caller's options, or those on record, contradict the weights.
        PeftError, InvalidInputError, InvalidTypeError: If the options are not valid.
    """
    detected = detect_peft(model_state, source)
    if detected is None:
        return peft_settings(peft_kwargs), False
    recorded = recorded if isinstance(recorded, Mapping) else {}
    if recorded.get("peft_module") == detected["peft_module"]:
        merged = {k: v for k, v in recorded.items() if v is not None} | detected
    else:
        merged = dict(detected)
    if "alpha" not in merged and detected["peft_module"] == "AdaptFormer":
        merged["alpha"] = (peft_kwargs or {}).get("alpha")
        if isinstance(merged["alpha"], str) or merged["alpha"] is None:
            raise CheckpointError(
                f"{source} was finetuned with AdaptFormer and a fixed alpha, which the file does not tell. Pass "
                "peft_kwargs={'peft_module': AdaptFormer, 'alpha': <the number>}."
            )
    if peft_kwargs:
        method = _method_of(peft_kwargs.get("peft_module", LoRASurgery))
        wanted = peft_settings({"rank": detected.get("rank"), **peft_kwargs}) if method == detected["peft_module"] \
            else {"peft_module": method}
        passed = {name: wanted[name] for name in ("peft_module", *peft_kwargs) if name in wanted}
        n_blocks = len({split[0] for split in map(_split_block_name, model_state) if split})
        _check_agreement(passed, detected, n_blocks, source)
        merged = merged | {name: value for name, value in passed.items() if name not in detected}
    return peft_settings(merged), True


def _check_agreement(passed: Mapping[str, Any], detected: Mapping[str, Any], n_blocks: int, source: str) -> None:
    def comparable(name, value):
        return list(range(n_blocks)) if name == "attention_layers_to_update" and value is None else value

    for name, value in passed.items():
        if name == "rank" and value is None:
            continue
        if name in detected and comparable(name, value) != comparable(name, detected[name]):
            raise CheckpointError(
                f"peft_kwargs has {name}={value!r}, but {source} was finetuned with {detected[name]!r}. Leave "
                f"{name} out to take it from the file. To finetune with other options, merge the file first "
                "(micro_sam.models.adapters.merge_adapter)."
            )
