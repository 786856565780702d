"""The fused attention of the ViT against segment_anything's own layers."""

import copy
from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention

from micro_sam.models import vit_attention
from micro_sam.models.build_sam import build_sam
from micro_sam.models.peft_sam import PEFT_Sam
from micro_sam.models.vit_attention import FusedAttention, fuse_attention


def make_layer(size, heads=2, dim=16, seed=0):
    torch.manual_seed(seed)
    layer = Attention(dim, heads, use_rel_pos=True, input_size=size)
    torch.nn.init.normal_(layer.rel_pos_h)
    torch.nn.init.normal_(layer.rel_pos_w)
    return layer


def make_encoder():
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=96, depth=2, embed_dim=24, num_heads=2, mlp_ratio=2, use_rel_pos=True, window_size=4,
        global_attn_indexes=(1,), norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), out_chans=256,
    )
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    return encoder.eval()


@pytest.mark.parametrize("limit", [1, 700, 2**25])
@pytest.mark.parametrize("size", [(5, 5), (3, 7)])
def test_bias_equals_the_library(size, limit, monkeypatch):
    monkeypatch.setattr(vit_attention, "_BIAS_VALUES", limit)
    layer, x = make_layer(size), torch.randn(3, *size, 16)
    with torch.no_grad():
        torch.testing.assert_close(FusedAttention(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(5, 5), (3, 7)])
def test_extended_product_and_its_gradients_equal_the_library(size):
    layer = make_layer(size)
    fused = FusedAttention(copy.deepcopy(layer))
    outputs, gradients = [], []
    for module in (layer, fused):
        x = torch.randn(3, *size, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = module(x)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append({"x": x.grad} | {name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_table_of_another_size_is_interpolated():
    layer, x = make_layer((4, 4)), torch.randn(1, 6, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(FusedAttention(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


def test_encoder_equals_the_library_and_keeps_its_names():
    encoder = make_encoder()
    fused = fuse_attention(copy.deepcopy(encoder))
    assert list(fused.state_dict()) == list(encoder.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = encoder(x)
        torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused(x).detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_no_matrix_of_all_tokens(grad):
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return output

    tokens, heads = 48 * 48, 8
    layer = FusedAttention(make_layer((48, 48), heads=heads, dim=32))
    with Watch(), torch.set_grad_enabled(grad):
        layer(torch.randn(1, 48, 48, 32))
    assert largest < heads * tokens * tokens


def test_autocast_adapters_and_checkpointing():
    sam = build_sam("vit_b", image_size=32)
    assert all(isinstance(block.attn, FusedAttention) for block in sam.image_encoder.blocks)
    block = PEFT_Sam(sam, rank=2).sam.image_encoder.blocks[2]
    x = torch.randn(1, 2, 2, 768, requires_grad=True)
    plain = block(x)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False), plain)
    plain.sum().backward()
    assert block.attn.qkv.w_b_linear_q.weight.grad.abs().sum() > 0
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(enabled):
            torch.testing.assert_close(block(x).float(), plain, atol=0.1, rtol=0.1)
