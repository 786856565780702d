"""SAM for semantic segmentation of volumes: depth adapters inside of the image encoder.

Each block of the ViT gets two adapters with a convolution along the depth, so that planes see their neighbours. Based
on Chen et al. 2024, "MA-SAM: Modality-agnostic SAM Adaptation for 3D Medical Image Segmentation" (Medical Image
Analysis, arXiv:2309.08842).
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import nn

from ..core.errors import InvalidInputError, require_positive_int
from .build_sam import VIT_SETTINGS
from .loading import get_sam_model

__all__ = ["ImageEncoderViT3DWrapper", "NDBlockWrapper", "Sam3DWrapper", "get_sam_3d_model"]


def load_sam_for_volumes(
    device: str | torch.device, n_classes: int, image_size: int, lora_rank: int | None, model_type: str,
    checkpoint_path: str | os.PathLike | None,
) -> Sam:
    """Load a SAM with one mask per class, as far as the weights fit; with LoRA if there is a rank."""
    require_positive_int("n_classes", n_classes)
    return get_sam_model(
        model_type, device, checkpoint_path, return_sam=True, image_size=image_size, num_multimask_outputs=n_classes,
        flexible_load_checkpoint=True, peft_kwargs=None if lora_rank is None else {"rank": lora_rank},
    )[1]


def get_sam_3d_model(
    device: str | torch.device,
    n_classes: int,
    image_size: int,
    lora_rank: int | None = None,
    freeze_encoder: bool = False,
    model_type: str = "vit_b",
    checkpoint_path: str | os.PathLike | None = None,
) -> "Sam3DWrapper":
    """Load a SAM and prepare it for the semantic segmentation of volumes.

    Weights that depend on the image size are interpolated, and those for the classes start anew; both are reported
    with a warning.

    Args:
        device: Where to put the network.
        n_classes: Number of classes, including background.
        image_size: Height and width of the volumes in pixels, a multiple of 16.
        lora_rank: The rank of LoRA for the encoder, which is then frozen otherwise. None for no LoRA.
        freeze_encoder: Whether to train only the new layers of the encoder.
        model_type: A name of a `vit_b`, `vit_l` or `vit_h` model.
        checkpoint_path: A checkpoint to load instead of the published model.

    Returns:
        The network.

    Raises:
        InvalidInputError: If the model is a `vit_t`, or a number is not positive.
    """
    _require_vit(model_type)
    sam = load_sam_for_volumes(device, n_classes, image_size, lora_rank, model_type, checkpoint_path)
    # LoRA has frozen the encoder, but for its own layers.
    model = Sam3DWrapper(sam, freeze_encoder and lora_rank is None, model_type)
    return model.to(sam.device)


def _require_vit(model_type: str) -> None:
    if model_type[:5] not in VIT_SETTINGS:
        raise InvalidInputError(
            f"The depth adapters belong to the blocks of a ViT, but model_type is {model_type!r}. Use vit_b, vit_l or "
            "vit_h; get_simple_sam_3d_model also works with vit_t."
        )


def check_volumes(batched_input: list[dict[str, Any]], image_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Stack the volumes of a batch. Returns them as (B, D, 3, H, W), and their original size.

    Raises:
        InvalidInputError: If their shapes or original sizes differ or do not fit the network.
    """
    shapes = {tuple(record["image"].shape) for record in batched_input}
    sizes = {tuple(record["original_size"]) for record in batched_input}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[0] != 3 or shape[2:] != (image_size, image_size):
        raise InvalidInputError(
            f"All volumes of a batch must have the shape (3, depth, {image_size}, {image_size}), but they have "
            f"{sorted(shapes)}. Resize or crop them."
        )
    if len(sizes) != 1:
        raise InvalidInputError(f"All volumes of a batch must have one original_size, but they have {sorted(sizes)}.")
    return torch.stack([record["image"] for record in batched_input]).transpose(1, 2), sizes.pop()


class Sam3DWrapper(nn.Module):
    """A SAM whose image encoder sees neighbouring planes. It predicts all classes, without prompts.

    Args:
        sam_model: The network; its encoder is replaced.
        freeze_encoder: Whether to freeze the encoder, but for the depth adapters.
        model_type: `vit_b`, `vit_l` or `vit_h`, or a name that starts with it.

    Raises:
        InvalidInputError: If the type is another one, or not that of the network.
    """

    def __init__(self, sam_model: Sam, freeze_encoder: bool, model_type: str = "vit_b"):
        super().__init__()
        _require_vit(model_type)
        width, _, heads, _ = VIT_SETTINGS[model_type[:5]]
        encoder = sam_model.image_encoder
        if freeze_encoder:
            encoder.requires_grad_(False)
        sam_model.image_encoder = ImageEncoderViT3DWrapper(encoder, num_heads=heads, embed_dim=width)
        self.sam_model = sam_model

    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, torch.Tensor]]:
        """Predict volumes.

        Args:
            batched_input: For each volume its `image` (3, D, H, W) in 0…255, H and W being the image size, and its
                `original_size` (H, W), which is the same for all.
            multimask_output: Whether to predict all classes; otherwise one mask.

        Returns:
            For each volume `masks`, the logits (1, C, D, H, W) in the original size; `low_res_logits` (1, C, D, h, w);
            and `iou_predictions` (1, D, C), the predicted quality of each plane.

        Raises:
            InvalidInputError: If shapes do not fit.
        """
        sam = self.sam_model
        volumes, original_size = check_volumes(batched_input, sam.image_encoder.img_size)
        b, depth = volumes.shape[:2]
        planes = sam.preprocess(volumes.flatten(0, 1))
        embeddings = sam.image_encoder(planes, depth)
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        # One set of tokens serves all planes: it is broadcast.
        logits, iou = sam.mask_decoder(
            image_embeddings=embeddings, image_pe=sam.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense, multimask_output=multimask_output,
        )
        masks = sam.postprocess_masks(logits, planes.shape[-2:], original_size)
        masks, logits = (x.unflatten(0, (b, depth)).transpose(1, 2) for x in (masks, logits))
        iou = iou.unflatten(0, (b, depth))
        return [
            {"masks": masks[i:i + 1], "iou_predictions": iou[i:i + 1], "low_res_logits": logits[i:i + 1]}
            for i in range(b)
        ]


class ImageEncoderViT3DWrapper(nn.Module):
    """The image encoder with depth adapters in each block.

    Args:
        image_encoder: A ViT of SAM; its blocks are replaced.
        num_heads: The number of attention heads that it has.
        embed_dim: The width that it has.

    Raises:
        InvalidInputError: If the encoder is no ViT, or has another number of heads or width.
    """

    def __init__(self, image_encoder: nn.Module, num_heads: int = 12, embed_dim: int = 768):
        super().__init__()
        if not hasattr(image_encoder, "blocks"):
            raise InvalidInputError(f"image_encoder must be a ViT of SAM, but is {type(image_encoder).__name__}.")
        width = image_encoder.patch_embed.proj.out_channels
        if width != embed_dim:
            raise InvalidInputError(
                f"embed_dim is {embed_dim}, but the encoder has width {width}. Pass its model type (vit_b: 768, "
                "vit_l: 1024, vit_h: 1280)."
            )
        self.image_encoder = image_encoder
        self.img_size = image_encoder.img_size
        image_encoder.blocks = nn.ModuleList(
            NDBlockWrapper(block, embed_dim, num_heads) for block in image_encoder.blocks
        )

    def forward(self, x: torch.Tensor, d_size: int) -> torch.Tensor:
        """Encode planes (B * d_size, 3, H, W) to (B * d_size, 256, H / 16, W / 16)."""
        encoder = self.image_encoder
        x = encoder.patch_embed(x)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        for block in encoder.blocks:
            x = block(x, d_size)
        return encoder.neck(x.permute(0, 3, 1, 2))


class NDBlockWrapper(nn.Module):
    """A block of the ViT with a depth adapter before the attention and another before the MLP.

    An adapter is x + Up(GELU(Conv(Down(LayerNorm(x))))), where Conv is 3 x 1 x 1. Up starts as zero, so that the
    block first does what it did before.

    Args:
        block: The block.
        dim: Its width.
        num_heads: The number of attention heads that it has.
        norm_layer: The normalisation of the adapters.
        adapter_channels: Width of the adapters.
    """

    def __init__(
        self, block: nn.Module, dim: int, num_heads: int, norm_layer: type[nn.Module] = nn.LayerNorm,
        adapter_channels: int = 384,
    ):
        super().__init__()
        if block.attn.num_heads != num_heads:
            raise InvalidInputError(f"num_heads is {num_heads}, but the block has {block.attn.num_heads} heads.")
        self.block = block
        for suffix in ("", "_2"):
            layers = {
                "linear_down": nn.Linear(dim, adapter_channels, bias=False),
                "conv": nn.Conv3d(adapter_channels, adapter_channels, (3, 1, 1), padding=(1, 0, 0)),
                "linear_up": nn.Linear(adapter_channels, dim, bias=False),
                "norm": norm_layer(dim),
            }
            nn.init.zeros_(layers["linear_up"].weight)
            for name, layer in layers.items():
                setattr(self, f"adapter_{name}{suffix}", layer.train(block.training))

    def _adapt(self, x: torch.Tensor, d_size: int, suffix: str) -> torch.Tensor:
        down, conv, up, norm = (
            getattr(self, f"adapter_{name}{suffix}") for name in ("linear_down", "conv", "linear_up", "norm")
        )
        y = down(norm(x)).unflatten(0, (-1, d_size)).permute(0, 4, 1, 2, 3)
        y = F.gelu(conv(y)).permute(0, 2, 3, 4, 1).flatten(0, 1)
        return x + up(y)

    def forward(self, x: torch.Tensor, d_size: int) -> torch.Tensor:
        """Map planes (B * d_size, h, w, dim) to the same shape."""
        block = self.block
        x = self._adapt(x, d_size, "")
        y = block.norm1(x)
        if block.window_size > 0:
            size = y.shape[1:3]
            y, padded = window_partition(y, block.window_size)
            y = window_unpartition(block.attn(y), block.window_size, padded, size)
        else:
            y = block.attn(y)
        x = self._adapt(x + y, d_size, "_2")
        return x + block.mlp(block.norm2(x))
