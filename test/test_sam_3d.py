"""SAM for volumes: depth adapters in the encoder, or a 3D decoder behind it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from micro_sam.core.errors import InvalidInputError
from micro_sam.models import build_sam as builders
from micro_sam.models.build_sam import build_sam
from micro_sam.models.sam_3d_wrapper import ImageEncoderViT3DWrapper, NDBlockWrapper, Sam3DWrapper, get_sam_3d_model
from micro_sam.models.simple_sam_3d_wrapper import SimpleSam3DWrapper, get_simple_sam_3d_model

SIZE, CLASSES, DEPTH = 64, 4, 3
ADAPTER = {
    f"adapter_{name}{suffix}": shape for suffix in ("", "_2") for name, shape in {
        "linear_down.weight": (384, 24), "conv.weight": (384, 384, 3, 1, 1), "conv.bias": (384,),
        "linear_up.weight": (24, 384), "norm.weight": (24,), "norm.bias": (24,),
    }.items()
}
ADAPTER = {name.replace(".weight_2", "_2.weight").replace(".bias_2", "_2.bias"): s for name, s in ADAPTER.items()}


@pytest.fixture
def narrow(monkeypatch):
    """Take for `vit_b` what has three narrow blocks, the first two with windows."""
    monkeypatch.setitem(builders.VIT_SETTINGS, "vit_b", (24, 3, 2, (2,)))
    torch.manual_seed(0)
    sam = build_sam("vit_t", image_size=SIZE, num_multimask_outputs=CLASSES)
    sam.image_encoder = ImageEncoderViT(
        img_size=SIZE, depth=3, embed_dim=24, num_heads=2, global_attn_indexes=(2,), window_size=3, out_chans=256,
        use_rel_pos=True,
    ).eval()
    return sam


def volumes(n, depth=DEPTH, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": 255 * torch.rand(3, depth, size, size, generator=generator), "original_size": (50, 60)}
        for _ in range(n)
    ]


def randomize_adapters(model):
    generator = torch.Generator().manual_seed(4)
    for name, value in model.named_parameters():
        if "adapter_" in name:
            value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return model


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_new_adapters_leave_each_plane_as_it_was(narrow):
    """Shapes and values against segment-anything, plane by plane; also the quality of each plane."""
    batch, expected = volumes(2), []
    for record in batch:
        for z in range(DEPTH):
            plane = {"image": record["image"][:, z], "original_size": record["original_size"]}
            expected.append(narrow([plane], multimask_output=True)[0])
    model = Sam3DWrapper(narrow, freeze_encoder=False)
    output = model(batch, multimask_output=True)
    assert [tuple(output[0][k].shape) for k in ("masks", "low_res_logits", "iou_predictions")] == [
        (1, CLASSES, DEPTH, 50, 60), (1, CLASSES, DEPTH, 16, 16), (1, DEPTH, CLASSES)]
    for i in range(2):
        for z in range(DEPTH):
            plane = expected[i * DEPTH + z]
            close(output[i]["low_res_logits"][:, :, z], plane["low_res_logits"])
            close(output[i]["iou_predictions"][:, z], plane["iou_predictions"])
            same = (output[i]["masks"][:, :, z] > 0) == plane["masks"]
            assert same.float().mean() > 0.999
    assert model(batch, multimask_output=False)[0]["masks"].shape == (1, 1, DEPTH, 50, 60)


@torch.no_grad()
def test_names_and_formula_of_the_adapted_block(narrow):
    plain = {f"block.{name}" for name in narrow.image_encoder.blocks[0].state_dict()}
    model = randomize_adapters(Sam3DWrapper(narrow, freeze_encoder=False))
    prefix = "sam_model.image_encoder.image_encoder.blocks.0."
    state = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    assert set(state) == plain | set(ADAPTER)
    assert {name: tuple(state[name].shape) for name in ADAPTER} == ADAPTER

    def adapt(x, suffix):  # (B, D, H, W, C)
        def p(name):
            layer, kind = name.split(".")
            return state[f"adapter_{layer}{suffix}.{kind}"]
        y = F.layer_norm(x, (24,), p("norm.weight"), p("norm.bias")) @ p("linear_down.weight").T
        padded = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 1))
        kernel = p("conv.weight")[..., 0, 0]
        y = sum(padded[:, k:k + x.shape[1]] @ kernel[..., k].T for k in range(3)) + p("conv.bias")
        return x + F.gelu(y) @ p("linear_up.weight").T

    wrapped = model.sam_model.image_encoder.image_encoder.blocks[2]  # without windows
    state = wrapped.state_dict()
    x = torch.randn(2, DEPTH, 4, 4, 24)
    y = adapt(x, "")
    y = y.flatten(0, 1) + wrapped.block.attn(wrapped.block.norm1(y.flatten(0, 1)))
    y = adapt(y.unflatten(0, (2, DEPTH)), "_2").flatten(0, 1)
    y = y + wrapped.block.mlp(wrapped.block.norm2(y))
    close(wrapped(x.flatten(0, 1), DEPTH), y)


@torch.no_grad()
def test_planes_see_their_neighbours_but_volumes_do_not(narrow):
    model = randomize_adapters(Sam3DWrapper(narrow, freeze_encoder=False))
    one, other = volumes(1)[0], volumes(1, seed=9)[0]
    alone = model([one], True)[0]["masks"]
    close(model([other, one], True)[1]["masks"], alone, 1e-4)
    changed = {**one, "image": one["image"].clone()}
    changed["image"][:, 0] = other["image"][:, 0]
    assert (model([changed], True)[0]["masks"] - alone)[:, :, 1].abs().max() > 1e-4


def test_frozen_encoder_still_trains_its_adapters(narrow):
    model = Sam3DWrapper(narrow, freeze_encoder=True)
    encoder = {name for name, _ in model.named_parameters() if ".image_encoder." in name}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    adapters = {f"sam_model.image_encoder.image_encoder.blocks.{i}.{name}" for i in range(3) for name in ADAPTER}
    assert trained & encoder == adapters
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # what is before Up only gets a gradient once Up is not zero
        optimizer.zero_grad()
        model(volumes(1), True)[0]["masks"].square().mean().backward()
        optimizer.step()
    assert {n for n, v in model.named_parameters() if ".image_encoder." in n and v.grad is not None} == adapters
    assert all(v.grad.abs().max() > 0 for n, v in model.named_parameters() if n in adapters)


@torch.no_grad()
def test_simple_wrapper():
    torch.manual_seed(1)
    model = SimpleSam3DWrapper(build_sam("vit_t", image_size=SIZE), CLASSES, freeze_encoder=True).train()
    own = {n: tuple(v.shape) for n, v in model.state_dict().items() if n[:4] != "sam." and n.endswith("weight")}
    channels = (256, 128, 64, 32, 16)
    expected = {}
    for i, (a, b) in enumerate(zip(channels[:-1], channels[1:])):
        expected |= {f"decoders.{i}.conv1.0.weight": (b, a, 3, 3, 3), f"decoders.{i}.conv2.0.weight": (b, b, 3, 3, 3),
                     f"decoders.{i}.downsample.0.weight": (b, a, 1, 1, 1)}
    expected |= {"out_conv.conv_pred.0.weight": (8, 16, 3, 3, 3), "out_conv.segmentation_head.weight": (4, 8, 1, 1, 1)}
    assert own == expected
    assert not any(v.requires_grad for v in model.sam.image_encoder.parameters())

    statistics = {n: v.clone() for n, v in model.sam.named_buffers()}
    batch = volumes(2)
    output = model(batch, multimask_output=False)
    assert [set(o) for o in output] == [{"masks"}] * 2
    assert output[0]["masks"].shape == (1, CLASSES, DEPTH, SIZE, SIZE)
    assert all(torch.equal(v, statistics[n]) for n, v in model.sam.named_buffers())

    # Recomputed from the parameters; the encoder gets values as they are.
    def norm(x):
        return (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()

    p = dict(model.named_parameters())
    x = torch.stack([model.sam.image_encoder(batch[1]["image"][None, :, z]) for z in range(DEPTH)], 2)
    for i in range(4):
        def conv(name, x, i=i):
            name = f"decoders.{i}.{name}.0"
            return norm(F.conv3d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding="same"))
        x = F.leaky_relu(conv("conv2", F.leaky_relu(conv("conv1", x))) + conv("downsample", x))
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    x = F.leaky_relu(norm(F.conv3d(x, p["out_conv.conv_pred.0.weight"], p["out_conv.conv_pred.0.bias"], padding=1)))
    x = F.conv3d(x, p["out_conv.segmentation_head.weight"], p["out_conv.segmentation_head.bias"])
    close(output[1]["masks"], x, 2e-3)


def test_getters_load_flexibly_and_know_lora(tmp_path):
    torch.manual_seed(0)
    base = build_sam("vit_b", image_size=SIZE)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    with pytest.warns(UserWarning, match=r"have another shape and start anew \(mask_decoder.mask_tokens"):
        model = get_sam_3d_model("cpu", 6, SIZE, lora_rank=2, freeze_encoder=True, checkpoint_path=tmp_path / "base.pt")
    state = model.state_dict()
    prefix = "sam_model.image_encoder.image_encoder."
    qkv = f"{prefix}blocks.11.block.attn.qkv."
    assert torch.equal(state[f"{qkv}qkv_proj.weight"], base.state_dict()["image_encoder.blocks.11.attn.qkv.weight"])
    trained = {n.removeprefix(prefix) for n, v in model.named_parameters() if n.startswith(prefix) and v.requires_grad}
    assert trained == {
        f"blocks.{i}.{name}" for i in range(12)
        for name in [*ADAPTER, *(f"block.attn.qkv.w_{s}_linear_{m}.weight" for s in "ab" for m in "qv")]
    }
    assert model.sam_model.mask_decoder.num_multimask_outputs == 6
    with torch.no_grad():
        assert model(volumes(1, depth=1), True)[0]["masks"].shape == (1, 6, 1, 50, 60)


def test_simple_getter_works_with_vit_t(tiny_checkpoint):
    model = get_simple_sam_3d_model("cpu", 3, 256, model_type="vit_t", checkpoint_path=tiny_checkpoint)
    assert isinstance(model.sam.image_encoder, nn.Module)
    assert all(v.requires_grad for v in model.sam.image_encoder.parameters())
    assert model.out_conv.segmentation_head.out_channels == 3


def test_wrong_input(narrow, tiny_checkpoint):
    for call in (
        lambda: Sam3DWrapper(narrow, False, "vit_t"),
        lambda: get_sam_3d_model("cpu", 2, 256, model_type="vit_t_lm", checkpoint_path=tiny_checkpoint),
    ):
        with pytest.raises(ValueError, match="Use vit_b, vit_l or vit_h"):
            call()
    with pytest.raises(InvalidInputError, match="embed_dim is 1024, but the encoder has width 24"):
        Sam3DWrapper(narrow, False, "vit_l")
    with pytest.raises(InvalidInputError, match="num_heads is 12, but the block has 2"):
        NDBlockWrapper(narrow.image_encoder.blocks[0], 24, 12)
    with pytest.raises(InvalidInputError, match="must be a ViT of SAM, but is TinyViT"):
        ImageEncoderViT3DWrapper(build_sam("vit_t", image_size=SIZE).image_encoder)
    with pytest.raises(InvalidInputError, match="n_classes must be a positive integer"):
        get_simple_sam_3d_model("cpu", 0, 256, model_type="vit_t", checkpoint_path=tiny_checkpoint)
    model = Sam3DWrapper(narrow, False)
    for batch in (volumes(1, size=32), [*volumes(1), *volumes(1, depth=2)]):
        with pytest.raises(InvalidInputError, match=r"shape \(3, depth, 64, 64\)"):
            model(batch, True)
    with pytest.raises(InvalidInputError, match="one original_size"):
        model([*volumes(1), volumes(1)[0] | {"original_size": (1, 2)}], True)
