"""Attention of SAM's ViT without its matrix of (heads, tokens, tokens).

The logits of the ViT are q·k plus two terms of relative position, one for the row and one for the column of the key
(Li et al. 2022, "MViTv2", arXiv:2112.01526; decomposed as in ViTDet, arXiv:2203.16527). segment_anything adds them to
the full matrix of logits, which has 800 MB per image and layer in a ViT-B of 1024 pixels. Here the softmax is fused
with both products (`scaled_dot_product_attention`), and the terms reach it in one of two ways, equal up to rounding:

- as a bias, for some rows of queries at a time: the fastest on the CPU, but its kernel cannot pass gradients to a bias;
- inside the product: queries are extended by their terms, keys by the one-hot code of their row and column, so that
  the extended product is the sum. Gradients flow through it, and no bias is made at all.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn

_BIAS_VALUES = 2**25  # the largest bias made at a time, 128 MiB in float32


class FusedAttention(nn.Module):
    """What segment_anything's `Attention` computes, with its parameters under their names.

    Args:
        attention: The layer to replace, with relative positions. Its parameters are shared, not copied.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape; each of the B is a window or a whole image."""
        b, h, w, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        maps = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwc,hkc->bnhwk", maps, get_rel_pos(h, h, self.rel_pos_h))
        columns = torch.einsum("bnhwc,wkc->bnhwk", maps, get_rel_pos(w, w, self.rel_pos_w))
        attend = _with_bias if x.device.type == "cpu" and not torch.is_grad_enabled() else _with_extended_product
        x = attend(q, k, v, rows.to(q.dtype), columns.to(q.dtype), self.scale)
        return self.proj(x.transpose(1, 2).reshape(b, h, w, -1))


def _with_bias(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attention of q, k, v (B, heads, H * W, c) with logits of key rows (B, heads, H, W, H) and columns (…, W)."""
    b, n, h, w, _ = rows.shape
    step = min(h, max(1, _BIAS_VALUES // (b * n * w * h * w)))
    memory = rows.new_empty(b, n, step, w, h, w)  # new memory for each chunk would cost as much as its sums
    parts = []
    for start in range(0, h, step):
        chunk = slice(start, min(start + step, h))
        bias = memory[:, :, :chunk.stop - start]
        torch.add(rows[:, :, chunk, :, :, None], columns[:, :, chunk, :, None, :], out=bias)
        queries, bias = q[:, :, start * w:(start + step) * w], bias.flatten(2, 3).flatten(3)
        parts.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=bias, scale=scale))
    return torch.cat(parts, dim=2)


def _with_extended_product(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """The same as `_with_bias`, with gradients."""
    b, n, h, w, _ = rows.shape
    position = torch.arange(h * w, device=q.device)
    codes = torch.cat([F.one_hot(position // w, h), F.one_hot(position % w, w)], dim=1).to(k.dtype)
    q = torch.cat([q * scale, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)
    k = torch.cat([k, codes.expand(b, n, -1, -1)], dim=-1)
    # The fused kernels want values as wide as queries and keys.
    width = v.shape[-1]
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, h + w)), scale=1.0)[..., :width]


def fuse_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """Replace the attention layers of an encoder with relative positions; returns the encoder."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn)
    return encoder
