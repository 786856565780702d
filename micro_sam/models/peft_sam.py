"""Parameter-efficient finetuning (PEFT): train few parameters of the image encoder, and none of the others.

The prompt encoder and the mask decoder stay trainable. The methods are in `peft_layers` (LoRA, FacT, SSF,
AdaptFormer: new layers) and `peft_selective` (a selection of the existing parameters).
"""

from collections.abc import Sequence
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import nn

from ..core.errors import MissingPackageError, PeftError
from .peft_description import ADDS_LAYERS, METHODS, module_defaults, peft_kwargs_from, peft_settings
from .peft_layers import AdaptFormer, AttentionLoRA, FacTSurgery, LoRASurgery, MLPLoRA, ScaleShiftLayer, SSFSurgery
from .peft_selective import AttentionSurgery, BiasSurgery, ClassicalSurgery, LayerNormSurgery, SelectiveSurgery
from .tiny_vit import TinyViT

__all__ = [
    "AdaptFormer", "AttentionLoRA", "AttentionSurgery", "BiasSurgery", "ClassicalSurgery", "FacTSurgery",
    "LayerNormSurgery", "LoRASurgery", "MLPLoRA", "PEFT_Sam", "SSFSurgery", "ScaleShiftLayer", "SelectiveSurgery",
    "fix_statistics", "peft_kwargs_from", "peft_settings", "quantize_encoder", "transformer_blocks",
]


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that uses its running statistics in training too, and never changes them."""

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        """Stay in evaluation mode."""
        return super().train(False)


def fix_statistics(encoder: nn.Module) -> None:
    """Make batch normalisation keep its statistics in training: a frozen encoder must not change through them."""
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                fixed = FixedBatchNorm2d(child.num_features, child.eps, child.momentum).eval()
                fixed.weight, fixed.bias = child.weight, child.bias
                for buffer, value in child.named_buffers():
                    setattr(fixed, buffer, value)
                setattr(module, name, fixed)


def transformer_blocks(image_encoder: nn.Module) -> list[nn.Module]:
    """Return the blocks that `attention_layers_to_update` counts.

    For ViT these are `image_encoder.blocks`. For TinyViT they are the ten attention blocks of the stages 1, 2 and 3 in
    this order: 0 and 1 are `layers.1.blocks.{0,1}`, 2 to 7 are `layers.2.blocks.{0..5}`, 8 and 9 are
    `layers.3.blocks.{0,1}`. The convolutional blocks of stage 0 do not count.
    """
    if isinstance(image_encoder, TinyViT):
        return [block for stage in image_encoder.layers if stage.attention for block in stage.blocks]
    blocks = getattr(image_encoder, "blocks", None)
    if blocks is None:
        raise PeftError(
            f"Parameter-efficient finetuning changes transformer blocks, but {type(image_encoder).__name__} has none. "
            "Pass a SAM with the image encoder of vit_t, vit_b, vit_l or vit_h."
        )
    return list(blocks)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "quantize=True needs the package bitsandbytes, which is not installed. Install it with "
            "'pip install bitsandbytes', or leave quantize out."
        ) from error
    return bitsandbytes


def quantize_encoder(image_encoder: nn.Module) -> None:
    """Turn each linear layer of an encoder whose weight is frozen into one of 4 bits (QLoRA), in place.

    The weights are quantised when the network is moved to a GPU. Dettmers et al. 2023, "QLoRA: Efficient Finetuning
    of Quantized LLMs" (arXiv:2305.14314).

    Raises:
        MissingPackageError: If bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    for module in list(image_encoder.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and not child.weight.requires_grad:
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                )
                linear.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                linear.bias = child.bias
                setattr(module, name, linear)


class PEFT_Sam(nn.Module):
    """Prepares a SAM for parameter-efficient finetuning. The network is changed, and is `.sam`.

    The image encoder is frozen, and the method changes or unfreezes parts of the chosen blocks. Blocks before the
    first chosen one need no memory for activations. Batch normalisation, which `vit_t` has, keeps its statistics.
    Each method starts as the identity: predictions only change by training. New layers have the mode (training or
    evaluation) of the network. The options are kept in `.sam.peft_settings`, the names of the trained parameters of
    the encoder in `.sam.peft_parameters`.

    Args:
        model: The network, without such layers.
        rank: The rank of LoRA and FacT, which need it. The other methods do not use it.
        peft_module: The method: `LoRASurgery`, `FacTSurgery`, `SSFSurgery`, `AdaptFormer`, `AttentionSurgery`,
            `BiasSurgery`, `LayerNormSurgery` or `ClassicalSurgery`.
        attention_layers_to_update: The numbers of the blocks to adapt, see `transformer_blocks`. By default all.
        quantize: Whether to keep the frozen linear layers in 4 bits, see `quantize_encoder`.
        module_kwargs: Options of the method: `update_matrices` (LoRA), `dropout` (FacT, AdaptFormer), `alpha`,
            `projection_size` and `add_input` (AdaptFormer).

    Raises:
        PeftError: If the method is unknown, a rank is missing, a block does not exist, or the network has been
            changed before. It is a ValueError and a RuntimeError.
        InvalidInputError, InvalidTypeError: If an option of the method is wrong.
        MissingPackageError: If `quantize` is set without bitsandbytes.

    Example:
        >>> from micro_sam.models.build_sam import build_sam
        >>> sam = PEFT_Sam(build_sam("vit_t"), rank=4, attention_layers_to_update=[8, 9]).sam
    """

    def __init__(
        self,
        model: Sam,
        rank: int | None = None,
        peft_module: type[nn.Module] | str = LoRASurgery,
        attention_layers_to_update: Sequence[int] | None = None,
        quantize: bool = False,
        **module_kwargs: Any,
    ):
        super().__init__()
        settings = peft_settings({
            "peft_module": peft_module, "rank": rank, "attention_layers_to_update": attention_layers_to_update,
            "quantize": quantize,
        } | module_kwargs)
        if getattr(model, "peft_settings", None) and model.peft_settings["peft_module"] in ADDS_LAYERS:
            raise PeftError(
                f"The network already has layers of {model.peft_settings['peft_module']}. Load the base model, or "
                "merge what was trained with micro_sam.models.adapters.merge_adapter."
            )
        encoder = model.image_encoder
        blocks = transformer_blocks(encoder)
        layers = settings["attention_layers_to_update"] or list(range(len(blocks)))
        if layers[-1] >= len(blocks):
            raise PeftError(
                f"attention_layers_to_update names block {layers[-1]}, but the encoder has the blocks 0 to "
                f"{len(blocks) - 1}."
            )

        if quantize:
            _bitsandbytes()  # before anything is changed
        fix_statistics(encoder)
        encoder.requires_grad_(False)
        name = settings["peft_module"]
        options = {option: settings[option] for option in module_defaults(name)}
        if name in ADDS_LAYERS:
            options["rank"] = settings["rank"]
        surgeries = nn.ModuleList()
        for layer in layers:
            surgeries.append(METHODS[name](block=blocks[layer], **options))
            blocks[layer].train(blocks[layer].training)
        if quantize:
            quantize_encoder(encoder)

        self.sam = model
        self.peft_layers = layers
        # The blocks are parts of the network too: as its own children they would appear twice in checkpoints.
        object.__setattr__(self, "peft_blocks", surgeries)
        model.peft_settings = settings
        model.peft_parameters = tuple(
            f"image_encoder.{name}" for name, value in encoder.named_parameters() if value.requires_grad
        )
        self.training = model.training

    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, torch.Tensor]]:
        """Predict masks, see `segment_anything.modeling.Sam.forward`."""
        return self.sam(batched_input, multimask_output)
