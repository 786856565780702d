"""Parameter-efficient finetuning: what is trained, what is computed, files, adapters and merging."""

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from micro_sam.core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    MissingPackageError,
    PeftError,
    UnsupportedError,
)
from micro_sam.models import peft_sam
from micro_sam.models.adapters import load_adapter, merge_adapter, save_adapter
from micro_sam.models.build_sam import build_sam
from micro_sam.models.loading import export_custom_sam_model, get_sam_model
from micro_sam.models.peft_description import METHODS, choose_peft, detect_peft
from micro_sam.models.peft_sam import PEFT_Sam, peft_kwargs_from, peft_settings

SIZE = 64
ALL_METHODS = sorted(METHODS)
ADDING = ["AdaptFormer", "FacTSurgery", "LoRASurgery", "SSFSurgery"]
# More than the default options, so that files have something to tell.
OPTIONS = {
    "LoRASurgery": {"rank": 2, "update_matrices": ["q", "k", "v", "mlp"]}, "FacTSurgery": {"rank": 3, "dropout": 0.5},
    "AdaptFormer": {"projection_size": 5, "alpha": 0.5},
}


def kwargs_of(method, **more):
    return {"peft_module": getattr(peft_sam, method), **OPTIONS.get(method, {}), **more}


def randomize(network, seed=0):
    """Give adapters, and whatever else is trainable, other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def base():
    """A `vit_t` for images of 64 x 64 with random statistics and biases."""
    torch.manual_seed(5)
    sam = build_sam("vit_t", image_size=SIZE)
    for name, value in sam.named_parameters():
        if name.endswith(("attention_biases", "bias")):
            nn.init.normal_(value, std=0.1)
    for module in sam.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.05)
    return sam


@pytest.fixture
def tiny(base):
    return copy.deepcopy(base)


def small_vit():
    """A SAM with a ViT of three narrow blocks, the middle one with windows that do not divide the map."""
    torch.manual_seed(6)
    sam = build_sam("vit_t", image_size=SIZE)
    sam.image_encoder = ImageEncoderViT(
        img_size=SIZE, depth=3, embed_dim=24, num_heads=2, global_attn_indexes=(0, 2), window_size=3, out_chans=256,
        use_rel_pos=True,
    )
    for name, value in sam.image_encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(value, std=0.2)
    return sam.eval()


@pytest.fixture(params=["vit", "tiny"])
def sam(request, base):
    return small_vit() if request.param == "vit" else copy.deepcopy(base)


def image(n=1):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def embed(model):
    return getattr(model, "model", model).image_encoder(image())


def assert_same(a, b, tolerance=0.0):
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=tolerance, atol=tolerance)


def weights_and_biases(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


# Written out by hand: the parameters of one block that are trained, and the layers that get another name.
VIT = {
    "LoRASurgery": [f"attn.qkv.w_{s}_linear_{m}.weight" for m in "qkv" for s in "ab"]
    + [f"mlp.w_{s}_linear_{i}.weight" for i in "12" for s in "ab"],
    "FacTSurgery": [f"attn.qkv.{name}.weight" for name in ("FacTu", "FacTv", "q_FacTs", "v_FacTs")],
    "SSFSurgery": [f"{layer}.{kind}" for kind in ("scale", "shift")
                   for layer in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2", "norm1", "norm2")],
    "AdaptFormer": weights_and_biases("mlp.down_proj", "mlp.up_proj"),
    "AttentionSurgery": [*weights_and_biases("attn.qkv", "attn.proj"), "attn.rel_pos_h", "attn.rel_pos_w"],
    "BiasSurgery": [f"{n}.bias" for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")],
    "LayerNormSurgery": weights_and_biases("norm1", "norm2"),
    "ClassicalSurgery": [
        *weights_and_biases("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
        "attn.rel_pos_h", "attn.rel_pos_w",
    ],
}
_CONV = ["local_conv.c.weight", *weights_and_biases("local_conv.bn")]
TINY = VIT | {
    "SSFSurgery": [f"{layer}.{kind}" for kind in ("scale", "shift")
                   for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.norm", "mlp.norm")],
    "AttentionSurgery": [*weights_and_biases("attn.qkv", "attn.proj", "attn.norm"), "attn.attention_biases"],
    "BiasSurgery": [f"{n}.bias" for n in (
        "attn.norm", "mlp.norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "local_conv.bn")],
    "LayerNormSurgery": weights_and_biases("attn.norm", "mlp.norm"),
    "ClassicalSurgery": [
        *weights_and_biases("attn.norm", "mlp.norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        "attn.attention_biases", *_CONV,
    ],
}
RENAMED = {
    "LoRASurgery": {"attn.qkv.": "attn.qkv.qkv_proj.", "mlp.": "mlp.mlp_layer."},
    "FacTSurgery": {"attn.qkv.": "attn.qkv.qkv_proj."},
    "AdaptFormer": {"mlp.": "mlp.mlp_proj."},
    "SSFSurgery": {f"{n}.": f"{n}.layer." for n in (
        "attn.qkv", "attn.proj", "attn.norm", "mlp.lin1", "mlp.lin2", "mlp.fc1", "mlp.fc2", "mlp.norm", "norm1",
        "norm2")},
}


@pytest.mark.parametrize("method", ALL_METHODS)
def test_each_method_trains_and_names_what_it_should(method, sam):
    is_vit = hasattr(sam.image_encoder, "blocks")
    chosen, prefixes, names = ([0, 2], ["blocks.0.", "blocks.2."], VIT) if is_vit else \
        ([1, 8], ["layers.1.blocks.1.", "layers.3.blocks.0."], TINY)
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    expected = embed(sam)
    peft = PEFT_Sam(sam, attention_layers_to_update=chosen, **kwargs_of(method))
    assert (peft.sam, peft.peft_layers, len(peft.peft_blocks)) == (sam, chosen, 2)
    assert_same(embed(sam), expected, 1e-6)  # the identity, at first

    trained = {name for name, value in sam.named_parameters() if value.requires_grad}
    heads = {name for name, _ in sam.named_parameters() if not name.startswith("image_encoder.")}
    assert trained - heads == {f"image_encoder.{p}{name}" for p in prefixes for name in names[method]}
    assert heads <= trained

    def renamed(name):
        for prefix in (f"image_encoder.{p}" for p in prefixes):
            for old, new in RENAMED.get(method, {}).items():
                if name.startswith(prefix + old):
                    return name.replace(prefix + old, prefix + new)
        return name

    state = sam.state_dict()
    kept = {renamed(name): value for name, value in before.items()}
    for name, value in kept.items():
        assert torch.equal(state[name], value), name
    new = set(state) - set(kept)
    markers = {f"image_encoder.{p}mlp.input_is_not_added" for p in prefixes} if method == "AdaptFormer" else set()
    assert new == (trained - heads - set(kept)) | markers
    assert {name.removeprefix("sam.") for name in peft.state_dict()} == set(state)


def reference_qkv(block, x, additions):
    """The output of qkv with updates per matrix (C, C), written down without the code under test."""
    layer = block.attn.qkv.qkv_proj
    out = F.linear(x, layer.weight, layer.bias).clone()
    c, heads = x.shape[-1], block.attn.num_heads
    size = c // heads
    for name, matrix in additions.items():
        part, update = "qkv".index(name), x @ matrix.T
        for h in range(heads):
            start = part * c + h * size if isinstance(block, _vit_block()) else (3 * h + part) * size
            out[..., start:start + size] += update[..., h * size:(h + 1) * size]
    return out


def _vit_block():
    from segment_anything.modeling.image_encoder import Block
    return Block


def adapted_block(sam, method, **options):
    PEFT_Sam(sam, attention_layers_to_update=[1], **kwargs_of(method, **options))
    block = peft_sam.transformer_blocks(randomize(sam).image_encoder)[1]
    width = block.attn.proj.layer.in_features if method == "SSFSurgery" else block.attn.proj.in_features
    return block, torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_lora_formula(sam):
    block, x = adapted_block(sam, "LoRASurgery")
    qkv = block.attn.qkv
    updates = {n: getattr(qkv, f"w_b_linear_{n}").weight @ getattr(qkv, f"w_a_linear_{n}").weight for n in "qkv"}
    assert_same(qkv(x), reference_qkv(block, x, updates), 1e-5)
    lora, mlp = block.mlp, block.mlp.mlp_layer
    y = mlp.norm(x) if hasattr(mlp, "norm") else x
    first, second = (mlp.lin1, mlp.lin2) if hasattr(mlp, "lin1") else (mlp.fc1, mlp.fc2)
    h = F.gelu(first(y) + y @ (lora.w_b_linear_1.weight @ lora.w_a_linear_1.weight).T)
    assert_same(lora(x), second(h) + h @ (lora.w_b_linear_2.weight @ lora.w_a_linear_2.weight).T, 1e-5)


@torch.no_grad()
def test_fact_formula(sam):
    block, x = adapted_block(sam, "FacTSurgery")
    fact = block.attn.qkv
    updates = {n: fact.FacTv.weight @ getattr(fact, f"{n}_FacTs").weight @ fact.FacTu.weight for n in "qv"}
    assert_same(fact(x), reference_qkv(block, x, updates), 1e-5)


@torch.no_grad()
def test_ssf_formula(sam):
    block, x = adapted_block(sam, "SSFSurgery")
    for layer in (block.attn.qkv, block.attn.proj):
        assert_same(layer(x), F.linear(x, layer.layer.weight, layer.layer.bias) * layer.scale + layer.shift, 1e-6)
    conv = peft_sam.ScaleShiftLayer(nn.Conv2d(3, 7, 1), 7)
    nn.init.normal_(conv.scale)
    nn.init.normal_(conv.shift)
    y = conv.layer(image())
    assert_same(conv(image()), y * conv.scale[:, None, None] + conv.shift[:, None, None], 1e-6)
    with pytest.raises(InvalidInputError, match="9 channels were expected"):
        peft_sam.ScaleShiftLayer(nn.Conv2d(3, 7, 1), 9)(image())


@pytest.mark.parametrize(("alpha", "add_input"), [("learnable_scalar", False), (0.3, True)])
@torch.no_grad()
def test_adaptformer_formula(sam, alpha, add_input):
    block, x = adapted_block(sam, "AdaptFormer", alpha=alpha, add_input=add_input)
    layer = block.mlp
    n = layer.mlp_proj.norm(x) if hasattr(layer.mlp_proj, "norm") else x
    down, up = layer.down_proj, layer.up_proj
    hidden = (n @ down.weight.T + down.bias).clamp(min=0)
    expected = float(layer.alpha) * (hidden @ up.weight.T + up.bias) + layer.mlp_proj(x) + (n if add_input else 0)
    assert isinstance(layer.alpha, nn.Parameter) == (alpha == "learnable_scalar")
    assert_same(layer(x), expected, 1e-5)


@pytest.mark.parametrize("method", ["FacTSurgery", "AdaptFormer"])
def test_dropout_is_for_training_only(method, tiny):
    randomize(PEFT_Sam(tiny, **kwargs_of(method, dropout=0.5)).sam)
    assert not any(module.training for module in tiny.modules())
    assert_same(embed(tiny), embed(tiny))
    tiny.train()
    assert (embed(tiny) - embed(tiny)).abs().max() > 1e-4
    # A network in training mode gets new layers in training mode.
    assert any(isinstance(m, nn.Dropout) and m.training for m in PEFT_Sam(
        small_vit().train(), **kwargs_of(method)).sam.modules())


def test_training_changes_the_adapter_only_and_early_blocks_need_no_graph(tiny):
    PEFT_Sam(tiny, rank=2, attention_layers_to_update=[8, 9])
    graph = []
    for block in peft_sam.transformer_blocks(tiny.image_encoder):
        block.register_forward_hook(lambda module, args, output: graph.append(output.requires_grad))
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny.train()
    optimizer = torch.optim.SGD((p for p in tiny.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):  # A only gets a gradient once B is not zero
        optimizer.zero_grad()
        tiny.image_encoder(image(2)).square().mean().backward()
        optimizer.step()
    assert graph[:10] == [False] * 8 + [True] * 2
    changed = {name for name, value in tiny.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(tiny.peft_parameters)  # and no statistics of BatchNorm
    assert all(value.grad is None for value in tiny.parameters() if not value.requires_grad)


def in_form(sam, form, settings):
    state = {name: value.clone() for name, value in sam.state_dict().items()}
    recorded = {"settings": {"model_type": "vit_t", "image_size": SIZE, "peft": settings}}
    return {
        "plain": state, "described": {"model_state": {f"sam.{k}": v for k, v in state.items()}, **recorded},
        "parallel": {"model_state": {f"module.sam.{k}": v for k, v in state.items()}, **recorded},
    }[form]


@pytest.mark.parametrize(("method", "form"), [
    *((method, "described") for method in ALL_METHODS), *((method, "plain") for method in ADDING),
    ("LoRASurgery", "parallel"),
])
def test_checkpoints_give_the_same_predictions(method, form, tiny, tmp_path):
    kwargs = kwargs_of(method, attention_layers_to_update=[9, 1])
    peft = PEFT_Sam(tiny, **kwargs)
    randomize(tiny)
    torch.save(in_form(tiny, form, peft.sam.peft_settings), tmp_path / "best.pt")
    passed = dict(kwargs) if form == "plain" else None
    loaded, state = get_sam_model(
        "vit_t", "cpu", tmp_path / "best.pt", peft_kwargs=passed, image_size=SIZE, return_state=True
    )
    assert passed == (kwargs if form == "plain" else None)
    assert_same(embed(loaded), embed(tiny))
    assert not any(module.training for module in loaded.model.modules())
    if method in ADDING:  # the others leave plain weights
        assert loaded.model.peft_settings == peft.sam.peft_settings
        trained = {name for name, value in loaded.model.named_parameters() if value.requires_grad}
        assert trained == {name for name, value in tiny.named_parameters() if value.requires_grad}
    if form != "plain":
        assert peft_kwargs_from(state["settings"]["peft"])["peft_module"] is kwargs["peft_module"]
    if method == "LoRASurgery":
        export_custom_sam_model(tmp_path / "best.pt", "vit_t", tmp_path / "export.pt")
        assert_same(embed(get_sam_model("vit_t", "cpu", tmp_path / "export.pt", image_size=SIZE)), embed(tiny))


def test_base_weights_can_be_adapted_and_quantize_is_left_to_training(base, tmp_path):
    torch.save(base.state_dict(), tmp_path / "base.pt")
    passed = {"rank": 2, "quantize": True}
    sam = get_sam_model("vit_t", "cpu", tmp_path / "base.pt", peft_kwargs=passed, image_size=SIZE).model
    assert passed == {"rank": 2, "quantize": True}
    assert_same(embed(sam), embed(base), 1e-6)
    assert (len(sam.peft_parameters), sam.peft_settings["quantize"]) == (40, False)
    sam = get_sam_model("vit_t", "cpu", tmp_path / "base.pt", peft_kwargs={}, image_size=SIZE).model
    assert not hasattr(sam, "peft_settings")


def test_files_of_earlier_versions(tmp_path):
    """vit_b with LoRA on two blocks, known from the names only; and AdaptFormer with its earlier formula."""
    torch.manual_seed(2)
    sam = build_sam("vit_b", image_size=SIZE)
    state = {k: v.clone() for k, v in sam.state_dict().items()}
    plain = embed(sam)
    for i in (10, 11):
        prefix = f"image_encoder.blocks.{i}.attn.qkv."
        for kind in ("weight", "bias"):
            state[f"{prefix}qkv_proj.{kind}"] = state.pop(f"{prefix}{kind}")
        for part in "qv":
            state[f"{prefix}w_a_linear_{part}.weight"] = 0.1 * torch.randn(4, 768)
            state[f"{prefix}w_b_linear_{part}.weight"] = 0.1 * torch.randn(768, 4)
    torch.save({"model_state": {f"sam.{k}": v for k, v in state.items()}}, tmp_path / "lora.pt")
    found = {"peft_module": "LoRASurgery", "rank": 4, "attention_layers_to_update": [10, 11],
             "update_matrices": ["q", "v"]}
    assert detect_peft(state) == found
    for passed in (None, found | {"peft_module": peft_sam.LoRASurgery}):
        loaded = get_sam_model("vit_b", "cpu", tmp_path / "lora.pt", peft_kwargs=passed).model
        assert loaded.peft_settings == found | {"quantize": False}
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert (embed(loaded) - plain).abs().max() > 1e-3

    with torch.no_grad():
        for i in (10, 11):
            qkv = sam.image_encoder.blocks[i].attn.qkv
            for row, part in ((0, "q"), (1536, "v")):
                prefix = f"image_encoder.blocks.{i}.attn.qkv."
                qkv.weight[row:row + 768] += \
                    state[f"{prefix}w_b_linear_{part}.weight"] @ state[f"{prefix}w_a_linear_{part}.weight"]
    assert_same(embed(loaded), embed(sam), 1e-4)

    for passed, match in (
        ({"rank": 8}, "rank=8, but lora.pt was finetuned with 4"),
        ({"rank": 4, "attention_layers_to_update": [11]}, r"was finetuned with \[10, 11\]"),
        ({"rank": 4, "update_matrices": ["q"]}, r"update_matrices=\['q'\]"),
        ({"rank": 4, "peft_module": peft_sam.FacTSurgery}, "peft_module='FacTSurgery'.*merge"),
        ({"peft_module": peft_sam.ClassicalSurgery}, "peft_module='ClassicalSurgery'.*merge"),
    ):
        with pytest.raises(CheckpointError, match=match):
            choose_peft(passed, state, source="lora.pt")
    assert choose_peft({"rank": 4}, state) == (found | {"quantize": False}, True)


def test_adaptformer_files_of_earlier_versions_keep_their_formula(tiny, tmp_path):
    randomize(PEFT_Sam(tiny, peft_module=peft_sam.AdaptFormer, alpha=0.5, add_input=True).sam)
    torch.save(tiny.state_dict(), tmp_path / "old.pt")
    assert not any("input_is_not_added" in name for name in tiny.state_dict())
    passed = {"peft_module": peft_sam.AdaptFormer, "alpha": 0.5}
    assert_same(embed(get_sam_model("vit_t", "cpu", tmp_path / "old.pt", peft_kwargs=passed, image_size=SIZE)),
                embed(tiny))
    with pytest.raises(CheckpointError, match="fixed alpha, which the file does not tell"):
        get_sam_model("vit_t", "cpu", tmp_path / "old.pt", image_size=SIZE)
    with pytest.raises(CheckpointError, match="add_input=False"):
        get_sam_model("vit_t", "cpu", tmp_path / "old.pt", peft_kwargs={**passed, "add_input": False})


def test_weights_that_no_network_has(tiny, tmp_path):
    PEFT_Sam(tiny, rank=2, attention_layers_to_update=[0, 9])
    state = dict(tiny.state_dict())
    mixed = state | {"image_encoder.layers.1.blocks.0.attn.qkv.scale": torch.ones(384)}
    with pytest.raises(CheckpointError, match="mix LoRASurgery and SSFSurgery in block 0"):
        detect_peft(mixed)
    unequal = {name: value for name, value in state.items() if "layers.3.blocks.1.attn.qkv.w_a_linear_v" not in name}
    with pytest.raises(CheckpointError, match="differ between blocks: block 0: .*block 9: "):
        detect_peft(unequal)
    quantized = state | {"image_encoder.layers.1.blocks.0.attn.proj.weight.absmax": torch.ones(4)}
    torch.save(quantized, tmp_path / "qlora.pt")
    with pytest.raises(CheckpointError, match="export_custom_qlora_model"):
        get_sam_model("vit_t", "cpu", tmp_path / "qlora.pt")


# --- adapters ---


@pytest.mark.parametrize("method", ALL_METHODS)
def test_adapters_are_small_and_turn_the_base_into_the_finetuned_model(method, tiny, base, tmp_path):
    PEFT_Sam(tiny, attention_layers_to_update=[8, 9], **kwargs_of(method))
    randomize(tiny)
    save_adapter(tiny, tmp_path / "adapter.pt", base_name="vit_t_mine", with_heads=False)
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    marker = [f"image_encoder.layers.3.blocks.{i}.mlp.input_is_not_added" for i in (0, 1)]
    expected = {*tiny.peft_parameters, *(marker if method == "AdaptFormer" else ())}
    assert set(content["adapter_state"]) == expected
    assert (content["settings"]["peft"], content["base"]["name"]) == (tiny.peft_settings, "vit_t_mine")

    save_adapter(SamPredictor(tiny), tmp_path / "adapter.pt")
    predictor = SamPredictor(copy.deepcopy(base))
    predictor._hash, predictor.is_image_set = "xxh128:0", True
    assert load_adapter(predictor, tmp_path / "adapter.pt") is predictor
    state = predictor.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())
    assert_same(embed(predictor), embed(tiny))
    assert predictor._hash != "xxh128:0"  # or embeddings of the base would be taken for its own
    assert not predictor.is_image_set
    assert not any(module.training for module in predictor.model.modules())

    randomize(tiny, seed=7)  # a second adapter of the same kind takes the place of the first
    save_adapter(tiny, tmp_path / "second.pt")
    assert_same(embed(load_adapter(predictor, tmp_path / "second.pt")), embed(tiny))


def test_adapter_file_is_a_fraction_of_the_checkpoint(tiny, tmp_path):
    PEFT_Sam(tiny, rank=2)
    save_adapter(tiny, tmp_path / "adapter.pt", with_heads=False)
    torch.save(tiny.state_dict(), tmp_path / "all.pt")
    assert (tmp_path / "adapter.pt").stat().st_size < 0.02 * (tmp_path / "all.pt").stat().st_size


def test_adapter_of_another_base_changes_nothing(tiny, base, tmp_path):
    PEFT_Sam(tiny, rank=2)
    save_adapter(tiny, tmp_path / "adapter.pt", base_name="vit_t_mine")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.image_encoder.layers[1].downsample.conv1.bn.running_mean[3] += 1e-3
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another base model, 'vit_t_mine'"):
        load_adapter(other, tmp_path / "adapter.pt")

    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    name = "image_encoder.layers.1.blocks.0.attn.qkv.w_a_linear_q.weight"
    del content["adapter_state"][name]
    torch.save(content, tmp_path / "damaged.pt")
    with torch.no_grad():
        other.load_state_dict(base.state_dict())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"1 missing .{name}"):
        load_adapter(other, tmp_path / "damaged.pt")
    after = other.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.requires_grad for value in other.parameters())

    with pytest.raises(PeftError, match="an adapter with the options"):
        load_adapter(PEFT_Sam(other, rank=3), tmp_path / "adapter.pt")
    torch.save(content | {"settings": {}}, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match="description in the adapter .* is damaged"):
        load_adapter(other, tmp_path / "damaged.pt")
    torch.save(content | {"version": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="version 99"):
        load_adapter(other, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="load_adapter"):
        get_sam_model("vit_t", "cpu", tmp_path / "adapter.pt")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    with pytest.raises(CheckpointError, match="is not an adapter"):
        load_adapter(other, tmp_path / "base.pt")
    with pytest.raises(PeftError, match="not prepared"):
        save_adapter(copy.deepcopy(base), tmp_path / "none.pt")
    with pytest.raises(InvalidTypeError, match="Linear"):
        save_adapter(nn.Linear(1, 1), tmp_path / "none.pt")


@pytest.mark.parametrize("method", sorted(set(ALL_METHODS) - {"AdaptFormer"}))
def test_merged_weights_predict_the_same_under_plain_names(method, sam, tmp_path):
    plain = set(sam.state_dict())
    randomize(PEFT_Sam(sam, **kwargs_of(method)).sam)
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    is_vit = hasattr(sam.image_encoder, "blocks")  # too narrow for a file
    decoder = {"decoder_state": {"out_conv.weight": torch.zeros(1)}, "decoder_settings": {"normalization": "running"},
               "settings": {"peft": sam.peft_settings, "note": "kept"}}
    merged = merge_adapter(sam, None if is_vit else tmp_path / "merged.pt", state=decoder)
    assert set(merged) == plain
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    if is_vit:
        fresh = small_vit()
        fresh.load_state_dict(merged)
    else:
        fresh, state = get_sam_model("vit_t", "cpu", tmp_path / "merged.pt", return_state=True)
        assert state["settings"] == {"model_type": "vit_t", "image_size": SIZE, "note": "kept"}
        assert state["decoder_settings"] == {"normalization": "running"}
        assert not hasattr(fresh.model, "peft_settings")
    assert_same(embed(fresh), embed(sam), 2e-5)


def test_what_cannot_be_merged(tiny, base):
    PEFT_Sam(tiny, peft_module=peft_sam.AdaptFormer)
    with pytest.raises(UnsupportedError, match="AdaptFormer cannot be merged"):
        merge_adapter(tiny)
    with pytest.raises(PeftError, match="not prepared"):
        merge_adapter(base)


# --- options ---


@pytest.mark.parametrize("method", ALL_METHODS)
def test_settings_are_plain_and_complete(method):
    passed = kwargs_of(method, attention_layers_to_update=(np.int64(3), 1))
    settings = peft_settings(passed)
    assert json.loads(json.dumps(settings)) == settings
    assert settings["attention_layers_to_update"] == [1, 3]
    kwargs = peft_kwargs_from(settings)
    assert kwargs["peft_module"] is passed["peft_module"]
    assert peft_settings(kwargs) == settings
    assert passed == kwargs_of(method, attention_layers_to_update=(3, 1))
    assert peft_settings(None) == peft_settings({}) == peft_kwargs_from(None) == {}


@pytest.mark.parametrize(("kwargs", "errors", "match"), [
    ({}, (PeftError, RuntimeError), "needs a rank"),
    ({"rank": 0}, (PeftError, RuntimeError), "needs a rank"),
    ({"rank": None, "peft_module": peft_sam.FacTSurgery}, (PeftError, RuntimeError), "FacTSurgery needs a rank"),
    ({"rank": 2, "peft_module": nn.Linear}, (PeftError,), "'Linear' is no method"),
    ({"peft_module": "LoraSurgery"}, (PeftError,), "'LoRASurgery'"),
    ({"rank": 2, "attention_layers_to_update": [3, 10]}, (PeftError, ValueError), "block 10, .*0 to 9"),
    ({"rank": 2, "attention_layers_to_update": [-1]}, (PeftError, ValueError), "counted from 0"),
    ({"rank": 2, "attention_layers_to_update": [1, 1]}, (PeftError, ValueError), "each block once"),
    ({"rank": 2, "attention_layers_to_update": ["a"]}, (InvalidTypeError,), "list of integers"),
    ({"rank": 2, "update_matrices": ["q", "w"]}, (InvalidInputError, ValueError), "some of q, k, v, mlp"),
    ({"rank": 2, "update_matrices": "q"}, (InvalidInputError, ValueError), "some of q, k, v, mlp"),
    ({"rank": 2, "dropout": 0.1}, (InvalidTypeError, TypeError), "no option 'dropout'"),
    ({"rank": 2, "peft_module": "FacTSurgery", "dropout": 2}, (InvalidInputError,), "dropout must be"),
    ({"peft_module": "AdaptFormer", "alpha": "learnable"}, (InvalidInputError,), "'learnable_scalar'"),
    ({"peft_module": "AdaptFormer", "projection_size": 0}, (InvalidInputError,), "projection_size"),
])
def test_wrong_options_leave_the_network_alone(kwargs, errors, match, tiny):
    names = list(tiny.state_dict())
    for error in errors:
        with pytest.raises(error, match=match):
            PEFT_Sam(tiny, **kwargs)
    assert list(tiny.state_dict()) == names
    assert all(value.requires_grad for value in tiny.parameters())


def test_blocks_that_do_not_fit(tiny):
    with pytest.raises(PeftError, match="MBConv has none"):
        peft_sam.LoRASurgery(2, tiny.image_encoder.layers[0].blocks[0])
    with pytest.raises(PeftError, match="LayerNormSurgery found no parameter"):
        peft_sam.LayerNormSurgery(tiny.image_encoder.layers[0].blocks[0])
    block = tiny.image_encoder.layers[1].blocks[0]
    x = torch.randn(1, 8, 8, 128)
    assert_same(peft_sam.LoRASurgery(2, block)(x).detach(), block(x).detach())
    with pytest.raises(PeftError, match="already has layers"):
        peft_sam.FacTSurgery(2, block)
    PEFT_Sam(tiny, rank=2, attention_layers_to_update=[9])
    with pytest.raises(PeftError, match="already has layers of LoRASurgery.*merge_adapter"):
        PEFT_Sam(tiny, rank=2, attention_layers_to_update=[8])
    tiny.image_encoder = nn.Conv2d(3, 256, 16, 16)
    del tiny.peft_settings
    with pytest.raises(PeftError, match="Conv2d has none"):
        PEFT_Sam(tiny, rank=2)


def test_quantisation_needs_its_package_and_spares_what_is_trained(tiny, base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for error in (MissingPackageError, ModuleNotFoundError):
        with pytest.raises(error, match="pip install bitsandbytes"):
            PEFT_Sam(tiny, rank=2, quantize=True)
    assert all(value.requires_grad for value in tiny.parameters())

    class Linear4bit(nn.Linear):
        def __init__(self, *sizes, bias, quant_type):
            super().__init__(*sizes, bias)

    class Params4bit(nn.Parameter):
        def __new__(cls, data, requires_grad, quant_type):
            return super().__new__(cls, data, requires_grad)

    fake = types.SimpleNamespace(nn=types.SimpleNamespace(Linear4bit=Linear4bit, Params4bit=Params4bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    expected = embed(tiny)
    PEFT_Sam(tiny, rank=2, attention_layers_to_update=[9], quantize=True)
    kinds = {name: type(m) for name, m in tiny.named_modules() if isinstance(m, nn.Linear)}
    lora = {name for name in kinds if "_linear_" in name}
    assert len(lora) == 4
    assert all((kind is Linear4bit) == (name.startswith("image_encoder.") and name not in lora)
               for name, kind in kinds.items())
    assert_same(embed(tiny), expected, 1e-6)

    with torch.no_grad():  # what was trained on quantised weights belongs to the base model too
        for name, module in randomize(tiny).named_modules():
            if kinds.get(name) is Linear4bit:
                module.weight.round_(decimals=1)
    save_adapter(tiny, tmp_path / "adapter.pt")
    adapted = load_adapter(copy.deepcopy(base), tmp_path / "adapter.pt")
    assert adapted.peft_settings == tiny.peft_settings | {"quantize": False}
    with torch.no_grad():
        base_like = copy.deepcopy(base)
        base_like.image_encoder.neck[0].weight += 1
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(base_like, tmp_path / "adapter.pt")
