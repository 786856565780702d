"""From the name of a model, or a checkpoint, to networks that are ready for training."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn
from torch_em.model.unet import Upsampler2d

from ..core.errors import InvalidInputError, InvalidTypeError, nearest_names
from ..models.decoder import get_unetr
from ..models.loading import get_sam_model
from ..models.peft_sam import quantize_encoder
from ..models.specs import DEFAULT_MODEL
from .trainable_sam import TrainableSAM

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def check_freeze(freeze: str | Sequence[str] | None, peft_kwargs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return the parts to freeze, each once.

    Raises:
        InvalidInputError: For an unknown part, with the nearest names, or a frozen encoder together with layers that
            adapt it.
    """
    if freeze is None:
        return ()
    names = (freeze,) if isinstance(freeze, str) else freeze
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(f"freeze must be a name or a list of names, but is {freeze!r}. Use some of {PARTS}.")
    for name in names:
        if name not in PARTS:
            raise InvalidInputError(f"There is no part {name!r} to freeze. {nearest_names(name, PARTS)}")
    if "image_encoder" in names and (peft_kwargs or {}).get("rank") is not None:
        raise InvalidInputError(
            "freeze='image_encoder' and peft_kwargs with a rank exclude each other: the adapted layers are part of the "
            "encoder. The rest of the encoder is frozen anyway; leave it out of freeze."
        )
    return tuple(dict.fromkeys(names))


def _stay_in_evaluation(module: nn.Module, args: Any) -> None:
    if module.training:
        module.eval()


def freeze_parts(sam: Sam, parts: Sequence[str]) -> None:
    """Freeze parts of a SAM: their parameters get no gradients, and their statistics (BatchNorm) stay as they are.

    A frozen part goes back to evaluation mode whenever it is used, whatever `train()` is called on around it.
    """
    for part in parts:
        module = getattr(sam, part).requires_grad_(False).eval()
        module.register_forward_pre_hook(_stay_in_evaluation)


def _quantize(sam: Sam) -> None:
    """Keep the frozen layers of the encoder in 4 bits; that happens when they are moved to the GPU."""
    device = sam.device
    quantize_encoder(sam.cpu().image_encoder)
    sam.peft_settings = {**sam.peft_settings, "quantize": True}
    sam.to(device)


def get_trainable_sam_model(
    model_type: str = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    freeze: str | Sequence[str] | None = None,
    return_state: bool = False,
    peft_kwargs: dict | None = None,
    flexible_load_checkpoint: bool = False,
    **model_kwargs: Any,
) -> TrainableSAM | tuple[TrainableSAM, dict[str, Any]]:
    """Load a model for training.

    Args:
        model_type: Name or architecture of the model, see `micro_sam.util.get_sam_model`.
        device: The device; None chooses it.
        checkpoint_path: A checkpoint to start from instead of the published weights: plain SAM weights, an export, a
            training checkpoint (also of several processes), or one with parameter-efficient layers.
        freeze: What is not trained: some of `image_encoder`, `prompt_encoder` and `mask_decoder`. Frozen parts also
            keep the statistics of their BatchNorm layers.
        return_state: Whether to return the content of the checkpoint too.
        peft_kwargs: Options of `micro_sam.models.peft_sam.PEFT_Sam`, to train few parameters of the encoder.
        flexible_load_checkpoint: Whether to load what fits and warn about the rest instead of raising.
        model_kwargs: `image_size` (pixels) and `num_multimask_outputs`; by default those of the checkpoint.

    Returns:
        The model, and the state as `get_sam_model` returns it if asked for.

    Raises:
        InvalidInputError: For unknown names in `freeze`, or a frozen encoder together with a rank.
        PeftError: If `peft_kwargs` are not valid for the model.
        UnknownModelError, CheckpointError, DownloadError: See `get_sam_model`.

    Example:
        >>> model = get_trainable_sam_model("vit_t_lite", device="cpu", freeze="prompt_encoder")
    """
    parts = check_freeze(freeze, peft_kwargs)
    _, sam, state = get_sam_model(
        model_type, device, checkpoint_path, return_sam=True, return_state=True, peft_kwargs=peft_kwargs,
        flexible_load_checkpoint=flexible_load_checkpoint, **model_kwargs,
    )
    if (peft_kwargs or {}).get("quantize"):
        _quantize(sam)
    freeze_parts(sam, parts)
    model = TrainableSAM(sam)
    return (model, state) if return_state else model


# --- the decoder for automatic segmentation ---


class _SampleNorm(nn.BatchNorm2d):
    """Normalises by the statistics of each sample, as inference with `normalization="instance"` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class _StoredNorm(nn.BatchNorm2d):
    """Normalises by the stored statistics, as inference with `normalization="running"` does.

    They stay as they are: those of the small batches of finetuning are too noisy to replace them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


_NORMS = {"instance": _SampleNorm, "running": _StoredNorm}


def _set_normalization(unetr: nn.Module, normalization: str) -> None:
    """Make the decoder's BatchNorm layers compute in training and validation what they compute at inference."""
    for name, part in unetr.named_children():
        if name == "encoder":
            continue
        for module in part.modules():
            for child_name, child in module.named_children():
                if type(child) is nn.BatchNorm2d:
                    norm = _NORMS[normalization](child.num_features, eps=child.eps, momentum=child.momentum)
                    norm.load_state_dict(child.state_dict())
                    setattr(module, child_name, norm.to(child.weight.device))


class _EarlyConvolution(nn.Module):
    """Interpolates after the 1x1 convolution: they commute, and so the convolution sees a quarter of the pixels."""

    def __init__(self, upsampler: nn.Module):
        super().__init__()
        self.conv, self.mode, self.scale_factor = upsampler.conv, upsampler.mode, upsampler.scale_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), scale_factor=self.scale_factor, mode=self.mode, align_corners=False)


def _convolve_early(unetr: nn.Module) -> None:
    """Replace the decoder's upsamplers; the names of parameters stay."""
    for module in list(unetr.modules()):
        for name, child in module.named_children():
            if type(child) is Upsampler2d:
                setattr(module, name, _EarlyConvolution(child))


def decoder_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be recorded about the decoder that starts from the content of a checkpoint."""
    recorded = dict(state.get("decoder_settings") or {})
    return {**recorded, "normalization": str(recorded.get("normalization", "instance"))}


def get_trainable_decoder(
    image_encoder: nn.Module,
    state: Mapping[str, Any],
    device: str | torch.device | None = None,
    *,
    strict: bool = True,
) -> nn.Module:
    """Build the decoder for automatic segmentation around the encoder, for training.

    Its BatchNorm layers compute the same in training, validation and inference: they use the statistics of each
    sample, or the stored ones if the checkpoint says that its decoder was made for them. A new decoder uses those of
    each sample, as the published ones.

    Args:
        image_encoder: The encoder, which is shared and not copied.
        state: The content of the checkpoint, with `decoder_state` (and `decoder_settings`) if it has a decoder.
        device: Where to put it.
        strict: Whether a decoder whose weights do not fit is an error; otherwise they start anew, with a warning.

    Returns:
        torch-em's UNETR, with the attribute `normalization`; it takes images (B, C, H, W) in 0…255 and gives maps
        (B, 3, H, W) in 0…1.

    Raises:
        CheckpointError: If weights are missing or have another shape.
    """
    settings = decoder_settings(state)
    if settings["normalization"] not in _NORMS:
        raise InvalidInputError(
            f"The checkpoint records the decoder normalization {settings['normalization']!r}; known are "
            f"{', '.join(_NORMS)}. Update micro_sam."
        )
    unetr = get_unetr(image_encoder, state.get("decoder_state"), device, flexible_load_checkpoint=not strict)
    _set_normalization(unetr, settings["normalization"])
    _convolve_early(unetr)
    unetr.normalization = settings["normalization"]  # trainers record it in checkpoints
    return unetr
