"""SAM for semantic segmentation of volumes: the image encoder for each plane, then a convolutional decoder in 3D."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import nn

from .build_sam import EMBED_DIM
from .peft_sam import fix_statistics
from .sam_3d_wrapper import check_volumes, load_sam_for_volumes

__all__ = ["BasicBlock", "SegmentationHead", "SimpleSam3DWrapper", "get_simple_sam_3d_model"]

_CHANNELS = (EMBED_DIM, 128, 64, 32, 16)


def get_simple_sam_3d_model(
    device: str | torch.device,
    n_classes: int,
    image_size: int,
    lora_rank: int | None = None,
    freeze_encoder: bool = False,
    model_type: str = "vit_b",
    checkpoint_path: str | os.PathLike | None = None,
) -> "SimpleSam3DWrapper":
    """Load a SAM and put a decoder for volumes behind its image encoder.

    Weights that depend on the image size are interpolated, with a warning.

    Args:
        device: Where to put the network.
        n_classes: Number of classes, including background.
        image_size: Height and width of the volumes in pixels, a multiple of 16.
        lora_rank: The rank of LoRA for the encoder, which is then frozen otherwise. None for no LoRA.
        freeze_encoder: Whether to train only the decoder.
        model_type: The name of a model.
        checkpoint_path: A checkpoint to load instead of the published model.

    Returns:
        The network.

    Raises:
        InvalidInputError: If a number is not positive.
    """
    sam = load_sam_for_volumes(device, n_classes, image_size, lora_rank, model_type, checkpoint_path)
    # LoRA has frozen the encoder, but for its own layers.
    return SimpleSam3DWrapper(sam, n_classes, freeze_encoder and lora_rank is None).to(sam.device)


class BasicBlock(nn.Module):
    """Residual block of two convolutions, then upsampling by two in the plane.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Of both convolutions.
        stride: Of the first convolution and of the shortcut.
        padding: Of both convolutions.
        bias: Whether the convolutions have a bias.
        mode: Mode of the upsampling, see `torch.nn.Upsample`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int] = (3, 3, 3),
        stride: Sequence[int] = (1, 1, 1), padding: Sequence[int] = (1, 1, 1), bias: bool = True,
        mode: str = "nearest",
    ):
        super().__init__()
        kernel_size, stride, padding = tuple(kernel_size), tuple(stride), tuple(padding)
        self.conv1 = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=bias),
            nn.InstanceNorm3d(out_channels), nn.LeakyReLU(),
        )
        self.conv2 = nn.Sequential(
            nn.Conv3d(out_channels, out_channels, kernel_size, padding=padding, bias=bias),
            nn.InstanceNorm3d(out_channels),
        )
        self.downsample = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 1, stride, bias=bias), nn.InstanceNorm3d(out_channels)
        )
        self.leakyrelu = nn.LeakyReLU()
        self.up = nn.Upsample(scale_factor=(1, 2, 2), mode=mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, D, H, W) to (B, out, D, 2H, 2W)."""
        return self.up(self.leakyrelu(self.conv2(self.conv1(x)) + self.downsample(x)))


class SegmentationHead(nn.Sequential):
    """A convolution to half of the channels, then one that gives the classes.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of classes.
        kernel_size: Of the first convolution.
        stride: Of the first convolution.
        padding: Of the first convolution.
        bias: Whether the convolutions have a bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int] = (3, 3, 3),
        stride: Sequence[int] = (1, 1, 1), padding: Sequence[int] = (1, 1, 1), bias: bool = True,
    ):
        super().__init__()
        hidden = in_channels // 2
        self.conv_pred = nn.Sequential(
            nn.Conv3d(in_channels, hidden, tuple(kernel_size), tuple(stride), tuple(padding), bias=bias),
            nn.InstanceNorm3d(hidden), nn.LeakyReLU(),
        )
        self.segmentation_head = nn.Conv3d(hidden, out_channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, D, H, W) to logits (B, out, D, H, W)."""
        return self.segmentation_head(self.conv_pred(x))


class SimpleSam3DWrapper(nn.Module):
    """The image encoder of a SAM, applied to each plane, and a decoder for volumes. There are no prompts.

    Args:
        sam: The network.
        num_classes: Number of classes.
        freeze_encoder: Whether to freeze the image encoder.
    """

    def __init__(self, sam: Sam, num_classes: int, freeze_encoder: bool):
        super().__init__()
        self.sam = sam
        if freeze_encoder:
            sam.image_encoder.requires_grad_(False)
            fix_statistics(sam.image_encoder)
        self.decoders = nn.ModuleList(BasicBlock(a, b) for a, b in zip(_CHANNELS[:-1], _CHANNELS[1:]))
        self.out_conv = SegmentationHead(_CHANNELS[-1], num_classes)

    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, torch.Tensor]]:
        """Predict volumes.

        Args:
            batched_input: For each volume its `image` (3, D, H, W), H and W being the image size. The values reach
                the encoder as they are. All volumes of a batch have one shape.
            multimask_output: Not used: all classes are predicted. It is here because trainers pass it.

        Returns:
            For each volume its `masks`, the logits (1, classes, D, H, W).

        Raises:
            InvalidInputError: If shapes do not fit.
        """
        records = [{"original_size": record["image"].shape[-2:], **record} for record in batched_input]
        volumes, _ = check_volumes(records, self.sam.image_encoder.img_size)
        planes = [self.sam.image_encoder(volumes[:, z]) for z in range(volumes.shape[1])]
        x = torch.stack(planes, dim=2)
        for decoder in self.decoders:
            x = decoder(x)
        return [{"masks": masks[None]} for masks in self.out_conv(x)]
