"""The TinyViT encoder against timm's implementation, an independent computation with the same weights."""

import re

import pytest
import torch
from timm.models.tiny_vit import TinyVit

from micro_sam.models.tiny_vit import TinyViT


def randomise(encoder):
    """Make every parameter and statistic matter: at initialisation biases are zero and statistics neutral."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("attention_biases"):
            torch.nn.init.normal_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return randomise(TinyViT(img_size=256)).eval()


def timm_reference(encoder):
    reference = TinyVit(
        embed_dims=(64, 128, 160, 320), depths=(2, 2, 6, 2), num_heads=(2, 4, 5, 10), window_sizes=(7, 7, 14, 7),
        num_classes=0,
    ).eval()
    reference.stages[3].downsample.conv2.conv.stride = (1, 1)
    state = {}
    for key, value in encoder.state_dict().items():
        if key.startswith(("head.", "norm_head.", "neck.")):
            continue
        key = re.sub(r"patch_embed\.seq\.([02])\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}.", key)
        merge = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        key = f"stages.{int(merge[1]) + 1}.downsample.{merge[2]}" if merge else key.replace("layers.", "stages.")
        state[key.replace(".c.weight", ".conv.weight")] = value
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("head.") for key in missing)
    return reference


@pytest.mark.parametrize("shape", [(256, 256), (272, 336), (64, 128)])
def test_equals_timm(encoder, shape):
    image = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = encoder(image)
        expected = encoder.neck(timm_reference(encoder).forward_features(image))
    assert output.shape == (2, 256, shape[0] // 16, shape[1] // 16)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_attention_biases_are_used_after_loading(encoder):
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    fresh = TinyViT(img_size=128).eval()
    with torch.no_grad():
        fresh(image)  # would fill a cache of the biases, if there were one
        fresh.load_state_dict(encoder.state_dict())
        expected = encoder(image)
        torch.testing.assert_close(fresh(image), expected)
        fresh.use_attention_biases(False)
        assert (fresh(image) - expected).abs().max() > 0.01
        fresh.use_attention_biases(True)
        torch.testing.assert_close(fresh(image), expected)


def test_parameter_names(encoder):
    keys = set(encoder.state_dict())
    assert len(keys) == 302
    assert {
        "patch_embed.seq.0.c.weight", "patch_embed.seq.2.bn.running_var", "head.weight", "norm_head.weight",
        "layers.0.blocks.1.conv3.bn.num_batches_tracked", "layers.0.downsample.conv2.c.weight",
        "layers.3.blocks.1.attn.attention_biases", "layers.1.blocks.0.attn.qkv.bias",
        "layers.2.blocks.5.mlp.fc2.weight", "layers.2.blocks.0.local_conv.bn.weight", "neck.0.weight", "neck.3.bias",
    } <= keys
    assert encoder.state_dict()["layers.2.blocks.0.attn.attention_biases"].shape == (5, 196)
    assert encoder.state_dict()["head.weight"].shape == (1000, 320)
    assert sum(p.numel() for p in encoder.parameters()) == 6_065_532
