"""Adapters: what parameter-efficient finetuning changed, as a small file beside the base model.

An adapter file holds the trained parameters of the image encoder, the prompt encoder and the mask decoder (which are
trained too), and a description. It is read without running code. Whether a network is the base of an adapter is
decided by a hash of the weights that the finetuning left as they were.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from .._version import __version__
from ..core.errors import CheckpointError, InvalidTypeError, PeftError
from .build_sam import build_sam
from .checkpoints import ENCODER, check_weights, detect_architecture, read_torch_file
from .export import save_checkpoint
from .hashing import compute_hash
from .peft_description import peft_kwargs_from
from .peft_sam import PEFT_Sam
from .prompt_maps import MapPromptEncoder
from .weight_loading import check_fit, load_weights

__all__ = ["load_adapter", "merge_adapter", "save_adapter"]

FORMAT_VERSION = 1
_HEADS = ("prompt_encoder.", "mask_decoder.")
# Layer that an adapter took the place of -> the name under which it keeps that layer.
_INNER = ("qkv_proj.", "mlp_layer.", "mlp_proj.", "layer.")


def _sam_of(model: Any) -> Sam:
    for inner in (model, getattr(model, "model", None), getattr(model, "sam", None)):
        if isinstance(inner, Sam):
            return inner
    raise InvalidTypeError(
        f"model must be a predictor, a Sam, or a PEFT_Sam or trainable model around one, but is {type(model).__name__}."
    )


def _require_adapted(sam: Sam) -> dict[str, Any]:
    settings = getattr(sam, "peft_settings", None)
    if not settings:
        raise PeftError(
            "The network was not prepared for parameter-efficient finetuning. Load a checkpoint that was finetuned so "
            "with get_sam_model, pass peft_kwargs to it, or use PEFT_Sam."
        )
    return settings


def _base_name(name: str) -> str:
    """The name that a parameter of an adapted network has without the adapter."""
    for inner in _INNER:
        name = name.replace(f".{inner}", ".")
    return name


def _frozen_hash(sam: Sam, left_out: Iterable[str], without_linear: bool) -> str:
    """A hash of the encoder's weights, the same with and without adapters.

    `left_out` names what belongs to the adapter. Quantised layers have other weights than the base model
    (`without_linear`).
    """
    linear = tuple(f"{name}.weight" for name, module in sam.named_modules() if isinstance(module, nn.Linear))
    digest, left_out = xxhash.xxh3_128(), frozenset(left_out)
    weights = {
        _base_name(name): value for name, value in sam.state_dict().items()
        if name.startswith(ENCODER) and name not in left_out and not (without_linear and name.startswith(linear))
    }
    for name in sorted(weights):
        value = weights[name].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return f"xxh3_128:{digest.hexdigest()}"


def _adapter_names(sam: Sam) -> list[str]:
    """The encoder's parameters and buffers that belong to the adapter."""
    trained = set(sam.peft_parameters)
    return [name for name in sam.state_dict() if name in trained or name.endswith(".input_is_not_added")]


def save_adapter(
    model: SamPredictor | nn.Module, path: str | os.PathLike, *, base_name: str | None = None, with_heads: bool = True
) -> None:
    """Save what parameter-efficient finetuning changed, without the base model.

    The file has a few per cent of the size of a checkpoint. It holds `adapter_state` (names to tensors, under the
    names of the adapted network), `settings` (`peft` as `micro_sam.models.peft_sam.peft_settings` gives it,
    `model_type`, `image_size`), `base` (a hash of the weights that it needs, and their name) and `version`.

    Args:
        model: The finetuned predictor or network.
        path: The file to write, complete or not at all.
        base_name: The name of the base model, to tell people what to load. Not used otherwise.
        with_heads: Whether to save prompt encoder and mask decoder, which are trained unless they were frozen.

    Raises:
        PeftError: If the network was not prepared with `PEFT_Sam`.
        OutputWriteError: If the file cannot be written.
    """
    sam = _sam_of(model)
    settings = _require_adapted(sam)
    names, state = _adapter_names(sam), sam.state_dict()
    if with_heads:
        names += [name for name in state if name.startswith(_HEADS)]
    content = {
        "adapter_state": {name: state[name].detach().cpu().clone() for name in names},
        "settings": {
            "peft": settings, "model_type": detect_architecture(state), "image_size": sam.image_encoder.img_size,
        },
        "base": {"name": base_name, "hash": _frozen_hash(sam, names, settings["quantize"])},
        "version": FORMAT_VERSION, "micro_sam_version": __version__,
    }
    save_checkpoint(content, path)


def _read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    content, refused = read_torch_file(path)
    if not isinstance(content, Mapping) or "adapter_state" not in content:
        raise CheckpointError(
            f"{path} is not an adapter. Pass a file of save_adapter, or load a checkpoint with get_sam_model."
        )
    if content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"The adapter {path} has the version {content.get('version')!r}, but {FORMAT_VERSION} is known. "
            "Install the version of micro_sam that wrote it, or a newer one."
        )
    state = check_weights(content["adapter_state"], "'adapter_state'", path, refused)
    settings, base = content.get("settings"), content.get("base")
    described = isinstance(settings, Mapping) and isinstance(settings.get("peft"), Mapping) and "model_type" in settings
    if not described or not isinstance(base, Mapping) or "hash" not in base:
        raise CheckpointError(f"The description in the adapter {path} is damaged. Save the adapter again.")
    return dict(state), dict(settings), dict(base)


def _check_adapter(sam: Sam, state: Mapping[str, torch.Tensor], architecture: str, kwargs: dict, path: Path) -> tuple:
    """Check that an adapter is complete and fits; returns the names of what it may lack.

    That is seen on a network without memory, before anything is changed.
    """
    with torch.device("meta"):
        blank = build_sam(
            architecture, image_size=sam.image_encoder.img_size,
            num_multimask_outputs=sam.mask_decoder.num_multimask_outputs,
            prompt_maps=isinstance(sam.prompt_encoder, MapPromptEncoder),
        )
        PEFT_Sam(blank, **kwargs)
    heads = () if any(name.startswith(_HEADS) for name in state) else _HEADS
    adapter = set(_adapter_names(blank))
    may_lack = tuple(n for n in blank.state_dict() if n.startswith(ENCODER) and n not in adapter) + heads
    check_fit(blank, state, str(path), may_lack)
    return may_lack


def load_adapter(model: SamPredictor | nn.Module, path: str | os.PathLike) -> SamPredictor | nn.Module:
    """Add an adapter to its base model.

    A network that already has an adapter with the same options gets the weights of this one instead.

    Args:
        model: The predictor or network with the base model. It is changed; a predictor forgets its image, and its
            hash becomes another, so that embeddings of the base model are not taken for those of the adapted one.
        path: A file of `save_adapter`.

    Returns:
        `model`.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is not an adapter, is damaged, or belongs to another base model. The network then stays
            as it was.
        PeftError: If the network has an adapter with other options.
    """
    path = Path(path)
    sam = _sam_of(model)
    state, settings, base = _read_adapter(path)
    options = settings["peft"] | {"quantize": False}
    current = getattr(sam, "peft_settings", None)
    if current and current | {"quantize": False} != options:
        raise PeftError(
            f"The network has an adapter with the options {current}, but {path} has {options}. Load the base model "
            "without an adapter."
        )
    left_out = [*state, *(_adapter_names(sam) if current else ())]
    if _frozen_hash(sam, left_out, settings["peft"]["quantize"]) != base["hash"]:
        named = f", {base['name']!r}" if base.get("name") else ""
        raise CheckpointError(
            f"The adapter {path} belongs to another base model{named} ({settings['model_type']}). Load the model that "
            "was finetuned."
        )
    kwargs = peft_kwargs_from(options)
    may_lack = _check_adapter(sam, state, settings["model_type"], kwargs, path)
    if not current:
        PEFT_Sam(sam, **kwargs)
    load_weights(sam, state, str(path), may_lack)
    if isinstance(model, SamPredictor):
        model.reset_image()
        hashes = f"{getattr(model, '_hash', '')}{compute_hash(path)}"
        model._hash = f"xxh128:{xxhash.xxh128(hashes.encode()).hexdigest()}"
    return model


def merge_adapter(
    model: SamPredictor | nn.Module, save_path: str | os.PathLike | None = None, *,
    state: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Fold the layers of LoRA, FacT or SSF into the weights, which gives plain weights under SAM's own names.

    Predictions stay the same up to rounding. Methods without new layers have plain weights anyway.

    Args:
        model: The finetuned predictor or network. It is not changed.
        save_path: A file to write: `model_state` and `settings` (`model_type`, `image_size`), complete or not at all.
        state: The content of the finetuned checkpoint, as `get_sam_model` returns it. The segmentation decoder and
            the settings that are in it are written too.

    Returns:
        The weights, on the device of the network.

    Raises:
        PeftError: If the network was not prepared with `PEFT_Sam`.
        UnsupportedError: If the method cannot be merged (AdaptFormer), or the weights are quantised.
        OutputWriteError: If the file cannot be written.
    """
    sam = _sam_of(model)
    _require_adapted(sam)
    merged = {name: value.detach().clone() for name, value in sam.state_dict().items()}
    for prefix, module in sam.named_modules():
        if hasattr(module, "merged"):
            for name in [name for name in merged if name.startswith(f"{prefix}.")]:
                del merged[name]
            merged |= {f"{prefix}.{name}": value for name, value in module.merged().items()}
    if save_path is not None:
        state = {} if state is None else state
        settings = {k: v for k, v in dict(state.get("settings") or {}).items() if k != "peft"}
        settings |= {"model_type": detect_architecture(merged), "image_size": sam.image_encoder.img_size}
        kept = {name: state[name] for name in ("decoder_state", "decoder_settings") if name in state}
        save_checkpoint({"model_state": merged, "settings": settings} | kept, save_path)
    return merged
