"""Writing checkpoints that other programs read: plain SAM weights, with or without the decoder."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import CheckpointError, DecoderMissingError
from .checkpoints import ENCODER, detect_architecture, read_checkpoint
from .files import replacing
from .peft_description import detect_peft
from .registry import download_sam_model

_LORA_LAYERS = tuple(f"w_{side}_linear_{part}" for side in "ab" for part in ("q", "k", "v", "1", "2"))


def save_checkpoint(content: Mapping[str, Any], save_path: str | os.PathLike) -> None:
    """Write a torch file that is complete or absent."""
    with replacing(save_path) as new, open(new, "wb") as f:
        try:
            torch.save(content, f)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error)) from error


def _check_architecture(weights: Mapping[str, torch.Tensor], model_type: str, path: Any) -> None:
    found = detect_architecture(weights, path)
    if found != model_type[:5]:
        raise CheckpointError(f"{path} holds a {found}, but model_type={model_type!r} was passed. Pass {found!r}.")


def export_custom_sam_model(
    checkpoint_path: str | os.PathLike,
    model_type: str,
    save_path: str | os.PathLike,
    with_segmentation_decoder: bool = False,
    prefix: str = "sam.",
) -> None:
    """Export a training checkpoint as plain SAM weights that any program for Segment Anything reads.

    Layers of parameter-efficient finetuning (LoRA and others) stay as they are, and the file then holds a
    `model_state`, and `settings` that describe them. For plain weights, merge them with
    `micro_sam.models.adapters.merge_adapter`.

    Args:
        checkpoint_path: The training checkpoint.
        model_type: Its architecture, or a name that starts with it.
        save_path: The file to write. An existing file is replaced when the new one is complete.
        with_segmentation_decoder: Whether to write `model_state` and `decoder_state` instead of plain weights.
        prefix: Removed from the names of the weights.

    Raises:
        DecoderMissingError: If the decoder is asked for and the checkpoint has none.
        CheckpointError: If the checkpoint is damaged or of another architecture.
        OutputWriteError: If the file cannot be written.
    """
    checkpoint = read_checkpoint(checkpoint_path, prefix=prefix)
    _check_architecture(checkpoint.model_state, model_type, checkpoint_path)
    has_layers = detect_peft(checkpoint.model_state, str(checkpoint_path)) is not None
    if not (with_segmentation_decoder or has_layers):
        save_checkpoint(dict(checkpoint.model_state), save_path)
        return
    if with_segmentation_decoder and checkpoint.decoder_state is None:
        raise DecoderMissingError(
            f"{checkpoint_path} has no segmentation decoder. Export without with_segmentation_decoder, or pass a "
            "checkpoint that was trained with one."
        )
    content = {"model_state": dict(checkpoint.model_state)}
    recorded = {"settings": checkpoint.settings}
    if with_segmentation_decoder:
        content["decoder_state"] = dict(checkpoint.decoder_state)
        recorded["decoder_settings"] = checkpoint.decoder_settings
    save_checkpoint(content | {name: dict(value) for name, value in recorded.items() if value}, save_path)


def _base_name(name: str) -> str:
    """The name that a parameter wrapped by LoRA has in the network without it."""
    return name.replace(".attn.qkv.qkv_proj.", ".attn.qkv.").replace(".mlp.mlp_layer.", ".mlp.")


def _wrapped_names(finetuned: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The modules that LoRA wrapped: name of the module without LoRA -> its name with LoRA."""
    wrapped = {}
    for name in finetuned:
        parts = name.split(".")
        for k, part in enumerate(parts):
            module = ".".join(parts[:k])
            if part == "qkv_proj" or (part in _LORA_LAYERS and parts[k - 1] == "qkv"):
                wrapped[f"{module}."] = f"{module}.qkv_proj."
            elif part == "mlp_layer" or (part in _LORA_LAYERS and parts[k - 1] == "mlp"):
                wrapped[f"{module}."] = f"{module}.mlp_layer."
    return wrapped


def export_custom_qlora_model(
    checkpoint_path: str | os.PathLike | None,
    finetuned_path: str | os.PathLike,
    model_type: str,
    save_path: str | os.PathLike,
) -> None:
    """Export a checkpoint that was finetuned with QLoRA, so that it loads without quantisation.

    Only the linear layers of the image encoder that were quantised come from the base model, in full precision.
    Everything that was finetuned stays: the LoRA layers, the prompt encoder and the mask decoder.

    Args:
        checkpoint_path: The checkpoint that was finetuned. None takes the published model `model_type`.
        finetuned_path: The finetuned checkpoint.
        model_type: The architecture or name of the base model.
        save_path: The file to write: the finetuned checkpoint with another `model_state`.

    Raises:
        CheckpointError: If a checkpoint is damaged, or they do not belong together.
        OutputWriteError: If the file cannot be written.
    """
    if checkpoint_path is None:
        checkpoint_path = download_sam_model(model_type)[0]
    base = read_checkpoint(checkpoint_path).model_state
    _check_architecture(base, model_type, checkpoint_path)
    checkpoint = read_checkpoint(finetuned_path)
    finetuned = checkpoint.model_state
    wrapped = _wrapped_names(finetuned)

    merged = {}
    for name, value in finetuned.items():
        if name.startswith(ENCODER) and not any(part in _LORA_LAYERS for part in name.split(".")):
            original = base.get(_base_name(name))
            # Quantised weights are packed integers of another shape, with tables beside them that the base lacks.
            if original is None or original.shape != value.shape or not value.is_floating_point():
                continue
        merged[name] = value
    for name, value in base.items():
        target = next((name.replace(old, new) for old, new in wrapped.items() if name.startswith(old)), name)
        merged.setdefault(target, value)
    if len(merged) <= len(base) and not wrapped:
        raise CheckpointError(
            f"{finetuned_path} has no LoRA layers. Pass a checkpoint that was finetuned with QLoRA, or use "
            "export_custom_sam_model."
        )
    rest = {k: v for k, v in checkpoint.state.items() if k in ("decoder_state", "settings", "decoder_settings")}
    save_checkpoint({"model_state": merged} | rest, save_path)
