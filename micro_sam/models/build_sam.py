"""Segment Anything networks of any image size, built from segment-anything's own parts."""

from collections.abc import Callable
from functools import partial
from os import PathLike

import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from ..core.errors import InvalidInputError, nearest_names
from .prompt_maps import MapPromptEncoder
from .vit_attention import fuse_attention

__all__ = [
    "ARCHITECTURES", "SamPredictor", "build_sam", "build_sam_vit_b", "build_sam_vit_h", "build_sam_vit_l",
    "sam_model_registry",
]

IMAGE_SIZE = 1024
PATCH_SIZE = 16
EMBED_DIM = 256
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]

# Encoder width, depth, number of heads and the blocks with global attention.
VIT_SETTINGS = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}
ARCHITECTURES = ("vit_t", *VIT_SETTINGS)


def _build_encoder(model_type: str, image_size: int) -> torch.nn.Module:
    if model_type == "vit_t":
        from .tiny_vit import TinyViT
        return TinyViT(img_size=image_size)
    width, depth, heads, global_blocks = VIT_SETTINGS[model_type]
    return fuse_attention(ImageEncoderViT(
        depth=depth, embed_dim=width, img_size=image_size, mlp_ratio=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=heads, patch_size=PATCH_SIZE, qkv_bias=True, use_rel_pos=True, global_attn_indexes=global_blocks,
        window_size=14, out_chans=EMBED_DIM,
    ))


def build_sam(
    model_type: str, *, image_size: int | None = None, num_multimask_outputs: int = 3, prompt_maps: bool = False
) -> Sam:
    """Build a network with random weights.

    Args:
        model_type: `vit_t`, `vit_b`, `vit_l` or `vit_h`.
        image_size: Side of the square canvas in pixels, a multiple of 16. By default 1024.
        num_multimask_outputs: Number of masks for an ambiguous prompt.
        prompt_maps: Whether prompts are also drawn as maps, see `MapPromptEncoder`.

    Returns:
        The network in evaluation mode. Embeddings have the shape (B, 256, image_size / 16, image_size / 16).

    Raises:
        InvalidInputError: If an argument is outside its range.
    """
    if model_type not in ARCHITECTURES:
        raise InvalidInputError(f"Unknown architecture {model_type!r}. {nearest_names(model_type, ARCHITECTURES)}")
    image_size = IMAGE_SIZE if image_size is None else image_size
    if image_size <= 0 or image_size % PATCH_SIZE:
        raise InvalidInputError(f"image_size must be a positive multiple of {PATCH_SIZE}, but is {image_size}.")
    if num_multimask_outputs < 1:
        raise InvalidInputError(f"num_multimask_outputs must be at least 1, but is {num_multimask_outputs}.")

    grid = image_size // PATCH_SIZE
    sam = Sam(
        image_encoder=_build_encoder(model_type, image_size),
        prompt_encoder=(MapPromptEncoder if prompt_maps else PromptEncoder)(
            embed_dim=EMBED_DIM, image_embedding_size=(grid, grid), input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=num_multimask_outputs,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBED_DIM, iou_head_depth=3, iou_head_hidden_dim=256,
        ),
        pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD,
    )
    return sam.eval()


def _build_with_checkpoint(
    model_type: str, checkpoint: str | PathLike | None, num_multimask_outputs: int, image_size: int
) -> Sam:
    sam = build_sam(model_type, image_size=image_size, num_multimask_outputs=num_multimask_outputs)
    if checkpoint is not None:
        from .checkpoints import read_checkpoint
        from .weight_loading import load_weights
        load_weights(sam, read_checkpoint(checkpoint).model_state)
    return sam


def build_sam_vit_h(checkpoint: str | PathLike | None = None, num_multimask_outputs: int = 3, image_size: int = 1024):
    """Build SAM with the huge encoder, see `build_sam`; a checkpoint must fit exactly."""
    return _build_with_checkpoint("vit_h", checkpoint, num_multimask_outputs, image_size)


def build_sam_vit_l(checkpoint: str | PathLike | None = None, num_multimask_outputs: int = 3, image_size: int = 1024):
    """Build SAM with the large encoder, see `build_sam`; a checkpoint must fit exactly."""
    return _build_with_checkpoint("vit_l", checkpoint, num_multimask_outputs, image_size)


def build_sam_vit_b(checkpoint: str | PathLike | None = None, num_multimask_outputs: int = 3, image_size: int = 1024):
    """Build SAM with the base encoder, see `build_sam`; a checkpoint must fit exactly."""
    return _build_with_checkpoint("vit_b", checkpoint, num_multimask_outputs, image_size)


sam_model_registry: dict[str, Callable[..., Sam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
}
