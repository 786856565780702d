"""The TinyViT image encoder (`vit_t`) in the parameter layout of MobileSAM checkpoints.

Wu et al. 2022, "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (ECCV,
arXiv:2207.10666); Zhang et al. 2023, "Faster Segment Anything" (arXiv:2306.14289), which replaced the stride of
the last merging layer by 1 and added SAM's neck. The network has no absolute position embedding, so it runs on
inputs of any size that is a multiple of 16; the output has a sixteenth of the input's height and width.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

EMBED_DIMS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
NUM_HEADS = (2, 4, 5, 10)
WINDOW_SIZES = (7, 7, 14, 7)
MLP_RATIO = 4
NUM_CLASSES = 1000


class ConvBN(nn.Sequential):
    """Convolution without bias and batch normalisation, under the names `c` and `bn`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.add_module(
            "c", nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        )
        self.add_module("bn", nn.BatchNorm2d(out_channels))


class PatchEmbed(nn.Module):
    """Two strided convolutions: (B, 3, H, W) to (B, 64, H/4, W/4)."""

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.seq = nn.Sequential(
            ConvBN(in_chans, embed_dim // 2, 3, 2), nn.GELU(), ConvBN(embed_dim // 2, embed_dim, 3, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted residual block with expansion 4."""

    def __init__(self, channels: int, expand_ratio: int = 4):
        super().__init__()
        hidden = channels * expand_ratio
        self.conv1 = ConvBN(channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBN(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.conv1(x))
        y = F.gelu(self.conv2(y))
        return F.gelu(self.conv3(y) + x)


class PatchMerging(nn.Module):
    """Changes the number of channels and, with stride 2, halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = ConvBN(in_channels, out_channels)
        self.conv2 = ConvBN(out_channels, out_channels, 3, stride, groups=out_channels)
        self.conv3 = ConvBN(out_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Self-attention inside a window, with one learned bias per head and absolute offset (|dy|, |dx|)."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        self.use_biases = True
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y[None]).abs() * window + (x[:, None] - x[None]).abs()
        self.register_buffer("_offset_index", index, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map windows (N, window², dim) to the same shape."""
        n, length, dim = x.shape
        # The output of the projection is grouped per head: [q, k, v] of head 0, [q, k, v] of head 1, …
        qkv = self.qkv(self.norm(x)).view(n, length, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        # The table is expanded on each call: a cached copy would go stale when weights are loaded.
        bias = self.attention_biases[:, self._offset_index].to(qkv.dtype) if self.use_biases else None
        x = F.scaled_dot_product_attention(*qkv, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(n, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, depthwise convolution, MLP. Works on maps (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, num_heads, window)
        self.mlp = Mlp(dim, dim * MLP_RATIO)
        self.local_conv = ConvBN(dim, dim, 3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        s = self.window
        x = F.pad(x, (0, 0, 0, -w % s, 0, -h % s))
        rows, columns = x.shape[1] // s, x.shape[2] // s
        windows = x.view(b, rows, s, columns, s, c).transpose(2, 3).reshape(-1, s * s, c)
        x = self.attn(windows).view(b, rows, columns, s, s, c).transpose(2, 3)
        return x.reshape(b, rows * s, columns * s, c)[:, :h, :w]


class Stage(nn.Module):
    """Blocks of one resolution and the merging layer that follows them; maps are (B, C, H, W)."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.attention:
            x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        if self.attention:
            x = x.permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """Image encoder of `vit_t`.

    Args:
        img_size: Side of the padded square input in pixels, a multiple of 16. It does not influence the weights.
        in_chans: Number of input channels.
        out_chans: Number of channels of the embedding.
    """

    def __init__(self, img_size: int = 1024, in_chans: int = 3, out_chans: int = 256):
        super().__init__()
        self.img_size = img_size
        self.in_chans = in_chans
        self.patch_embed = PatchEmbed(in_chans, EMBED_DIMS[0])
        strides = (2, 2, 1)
        layers = []
        for i, (dim, depth, heads, window) in enumerate(zip(EMBED_DIMS, DEPTHS, NUM_HEADS, WINDOW_SIZES)):
            blocks = [MBConv(dim) if i == 0 else TinyViTBlock(dim, heads, window) for _ in range(depth)]
            merge = PatchMerging(dim, EMBED_DIMS[i + 1], strides[i]) if i < len(strides) else None
            layers.append(Stage(blocks, merge, attention=i > 0))
        self.layers = nn.ModuleList(layers)
        # The classifier of the original network is never used, but its parameters belong to the file format.
        self.norm_head = nn.LayerNorm(EMBED_DIMS[-1])
        self.head = nn.Linear(EMBED_DIMS[-1], NUM_CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(EMBED_DIMS[-1], out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def use_attention_biases(self, use: bool = True) -> None:
        """Switch the attention biases off, only to reproduce embeddings that were computed without them.

        Versions 1 of micro_sam ran this encoder with all biases zero, whatever the checkpoint held.
        """
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.use_biases = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode preprocessed images.

        Args:
            x: Normalised and padded images (B, 3, H, W); H and W are multiples of 16.

        Returns:
            The embedding (B, 256, H/16, W/16).
        """
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)
