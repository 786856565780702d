"""Loading models by name and from checkpoints, exactly and flexibly, and the exporters."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor

from micro_sam.core.errors import (
    CheckpointError,
    DecoderMissingError,
    DownloadError,
    HashMismatchError,
    InvalidTypeError,
    MissingFileError,
    OutputWriteError,
    PeftError,
    UnknownModelError,
)
from micro_sam.models import loading, registry
from micro_sam.models.build_sam import build_sam, build_sam_vit_b
from micro_sam.models.decoder import DecoderAdapter
from micro_sam.models.hashing import compute_hash
from micro_sam.models.loading import (
    export_custom_qlora_model,
    export_custom_sam_model,
    get_predictor_and_decoder,
    get_sam_model,
)
from micro_sam.models.weight_loading import SkipInit, load_weights_flexibly


@pytest.fixture(scope="module")
def vit_b_state():
    """Weights of a vit_b for images of 64 x 64, with position embeddings that are not zero."""
    torch.manual_seed(3)
    sam = build_sam("vit_b", image_size=64)
    for name, value in sam.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(value)
    return {k: v.clone() for k, v in sam.state_dict().items()}


@pytest.fixture
def save(tmp_path):
    def function(content, name="weights.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return function


@pytest.fixture
def local_models(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_MODELS", str(tmp_path / "models.toml"))


def same(sam, state):
    own = sam.state_dict()
    return set(own) == set(state) and all(torch.equal(own[k], v.to(own[k].dtype)) for k, v in state.items())


def test_flags_and_attributes(tiny_checkpoint, tiny_sam):
    predictor = get_sam_model("vit_t_mine", "cpu", tiny_checkpoint)
    assert type(predictor) is SamPredictor
    assert (predictor.model_type, predictor.model_name) == ("vit_t", "vit_t_mine")
    assert predictor._hash == compute_hash(tiny_checkpoint)
    assert predictor.checkpoint_path == tiny_checkpoint
    assert predictor.model.image_encoder.img_size == 256
    assert not any(module.training for module in predictor.model.modules())
    assert same(predictor.model, tiny_sam.state_dict())

    options = {"model_type": "vit_t", "device": "cpu", "checkpoint_path": str(tiny_checkpoint)}
    predictor, sam = get_sam_model(**options, return_sam=True)
    assert predictor.model is sam
    predictor, state = get_sam_model(**options, return_state=True)
    assert set(state) == {"model_state", "decoder_state", "settings", "decoder_settings"}
    predictor, sam, state = get_sam_model(**options, return_sam=True, return_state=True)
    assert predictor.model is sam
    assert isinstance(state, dict)


def test_attention_biases_of_the_checkpoint_are_used(tiny_checkpoint, tiny_sam):
    state = torch.load(tiny_checkpoint)["model_state"]
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    loaded = get_sam_model("vit_t", "cpu", tiny_checkpoint).model.image_encoder
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(x), tiny_sam.image_encoder(x))
        loaded.use_attention_biases(False)
        assert (loaded(x) - tiny_sam.image_encoder(x)).abs().max() > 1e-3
    assert max(v.abs().max() for k, v in state.items() if k.endswith("attention_biases")) > 0


@pytest.mark.parametrize("form", ["plain", "half", "prefixed", "legacy"])
def test_formats_give_the_same_network(vit_b_state, tmp_path, form):
    content = {
        "plain": vit_b_state, "legacy": vit_b_state,
        "half": {k: v.half() if v.is_floating_point() else v for k, v in vit_b_state.items()},
        "prefixed": {"model_state": {f"sam.{k}": v for k, v in vit_b_state.items()}, "iteration": 1},
    }[form]
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=form != "legacy")
    sam = get_sam_model("vit_b", "cpu", tmp_path / "weights.pt").model
    assert sam.image_encoder.img_size == 64
    assert {v.dtype for v in sam.parameters()} == {torch.float32}
    assert same(sam, content if form == "half" else vit_b_state)


def test_architecture_of_the_file_wins_with_a_warning(vit_b_state, save):
    with pytest.warns(UserWarning, match="holds a vit_b, not a vit_t"):
        predictor = get_sam_model("vit_t_lm", "cpu", save(vit_b_state))
    assert (predictor.model_type, predictor.model_name) == ("vit_b", "vit_t_lm")


def test_number_of_masks_and_image_size(tiny_checkpoint, save):
    path = save(build_sam("vit_t", num_multimask_outputs=2, image_size=64).state_dict())
    assert get_sam_model("vit_t", "cpu", path).model.mask_decoder.num_multimask_outputs == 2
    sam = get_sam_model("vit_t", "cpu", tiny_checkpoint, image_size=128).model
    assert (sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size) == (128, (8, 8))
    with pytest.raises(CheckpointError, match="of another shape .*flexible_load_checkpoint"):
        get_sam_model("vit_t", "cpu", tiny_checkpoint, num_multimask_outputs=5)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"model_type": "vit_b_ml"}, UnknownModelError, "'vit_b_lm'"),
    ({"model_type": "vit_b_lm_decoder"}, UnknownModelError, "file of a decoder"),
    ({"model_type": "vit_b_lm_decoder", "checkpoint_path": "{tiny}"}, UnknownModelError, "Pass 'vit_b_lm'"),
    ({"model_type": "resnet", "checkpoint_path": "{tiny}"}, UnknownModelError, "no model 'resnet'"),
    ({"checkpoint_path": "gone.pt"}, MissingFileError, "gone.pt does not exist"),
    ({"model_type": "vit_t", "checkpoint_path": "{tiny}", "decoder_path": "no.pt"}, MissingFileError, "decoder no.pt"),
    ({"model_type": "vit_b", "peft_kwargs": {"rank": 0}}, PeftError, "needs a rank"),
    ({"model_type": "vit_b", "peft_kwargs": [4]}, InvalidTypeError, "must be a dict"),
    ({"model_type": "vit_b", "img_size": 4}, InvalidTypeError, "'image_size'"),
])
def test_wrong_arguments(options, error, match, tiny_checkpoint):
    if options.get("checkpoint_path") == "{tiny}":
        options = options | {"checkpoint_path": tiny_checkpoint}
    with pytest.raises(error, match=match) as raised:
        get_sam_model(device="cpu", **options)
    assert isinstance(raised.value, ValueError | TypeError | NotImplementedError)


def test_strict_loading_names_what_does_not_fit(vit_b_state, save):
    state = dict(vit_b_state, extra=torch.zeros(1))
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(CheckpointError) as error:
        get_sam_model("vit_b", "cpu", save(state))
    for text in ("weights.pt", "1 missing (mask_decoder.iou_token.weight)", "1 unknown (extra)", "flexible_load"):
        assert text in str(error.value)


def test_flexible_loading_interpolates_and_reports(vit_b_state, save):
    state = dict(vit_b_state, extra=torch.zeros(1))
    del state["prompt_encoder.not_a_point_embed.weight"]
    state["image_encoder.neck.1.weight"] = torch.zeros(7)
    state["image_encoder.neck.1.bias"] = torch.zeros(7)
    state["image_encoder.neck.2.weight"] = torch.zeros(7, 7)
    sam = build_sam("vit_b", image_size=128)
    with pytest.warns(UserWarning, match="Weights of the file") as record:
        report = load_weights_flexibly(sam, state, "the file")
    (message,) = (str(w.message) for w in record)
    assert report["absent"] == ["prompt_encoder.not_a_point_embed.weight"]
    assert report["surplus"] == ["extra"]
    assert report["initialized"] == [f"image_encoder.neck.{k}" for k in ("1.weight", "1.bias", "2.weight")]
    positions = [f"image_encoder.blocks.{i}.attn.rel_pos_{a}" for i in (2, 5, 8, 11) for a in "hw"]
    assert report["interpolated"] == ["image_encoder.pos_embed", *positions]
    for text in ("the file", "not_a_point_embed", "extra", "neck.1.weight", "pos_embed"):
        assert text in message

    own = sam.state_dict()
    expected = F.interpolate(
        vit_b_state["image_encoder.pos_embed"].permute(0, 3, 1, 2), (8, 8), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    assert torch.equal(own["image_encoder.pos_embed"], expected)
    # SAM itself interpolates tables of another length in the same way.
    from segment_anything.modeling.image_encoder import get_rel_pos
    table = vit_b_state[positions[0]]
    np.testing.assert_allclose(own[positions[0]][7], get_rel_pos(8, 8, table)[0, 0], atol=1e-6)
    assert (own["image_encoder.neck.1.weight"] == 1).all()
    assert (own["image_encoder.neck.1.bias"] == 0).all()
    untouched = "mask_decoder.output_upscaling.0.weight"
    assert torch.equal(own[untouched], vit_b_state[untouched])

    with pytest.warns(UserWarning, match="interpolated"):
        sam = get_sam_model("vit_b", "cpu", save(vit_b_state), flexible_load_checkpoint=True, image_size=128).model
    assert torch.equal(sam.state_dict()["image_encoder.pos_embed"], expected)
    with pytest.raises(CheckpointError, match="None of the weights"):
        load_weights_flexibly(sam, {"a": torch.zeros(1)})


def test_weights_of_other_programs_for_vit_t(tiny_sam, save):
    """Index tables are constants, and the classifier is never used: they may be there or not."""
    state = {k: v for k, v in tiny_sam.state_dict().items() if ".head." not in k and ".norm_head." not in k}
    state["image_encoder.layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(1)
    state["pixel_mean"] = torch.zeros(3, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam = get_sam_model("vit_t", "cpu", save(state)).model
    assert sam.image_encoder.img_size == 1024
    assert all(torch.isfinite(v).all() for v in sam.parameters())


def test_predictor_and_decoder(tiny_checkpoint, tiny_decoder, tiny_decoder_state, tiny_sam, save):
    predictor, decoder = get_predictor_and_decoder("vit_t", tiny_checkpoint, "cpu")
    assert isinstance(decoder, DecoderAdapter)
    assert decoder.normalization == "instance"
    embedding = torch.randn(2, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = tiny_decoder(embedding, (200, 256), (100, 128))
    np.testing.assert_array_equal(decoder(embedding, (200, 256), (100, 128)), expected)

    plain = save(tiny_sam.state_dict())
    with pytest.raises(DecoderMissingError, match="has no decoder.*vit_b_lm"):
        get_predictor_and_decoder("vit_t", plain, "cpu", image_size=256)
    extra = save(tiny_decoder_state, "decoder.pt")
    _, decoder = get_predictor_and_decoder("vit_t", plain, "cpu", decoder_path=extra, image_size=256)
    np.testing.assert_array_equal(decoder(embedding, (200, 256), (100, 128)), expected)
    predictor, state = get_sam_model("vit_t", "cpu", plain, decoder_path=extra, return_state=True)
    assert set(state["decoder_state"]) == set(tiny_decoder_state)
    assert predictor.decoder_path == str(extra)
    assert get_sam_model("vit_t", "cpu", plain, decoder_path=extra).decoder_path == str(extra)


def test_decoder_settings_come_with_the_decoder(tiny_checkpoint, tiny_decoder_state, save):
    """A decoder file replaces weights and settings of the decoder in the checkpoint, not only one of them."""
    content = torch.load(tiny_checkpoint) | {"decoder_settings": {"normalization": "running"}}
    path = save(content)
    assert get_predictor_and_decoder("vit_t", path, "cpu")[1].normalization == "running"
    decoder = save(tiny_decoder_state, "decoder.pt")
    assert get_predictor_and_decoder("vit_t", path, "cpu", decoder_path=decoder)[1].normalization == "instance"
    for options, expected in (({}, {"normalization": "running"}), ({"decoder_path": decoder}, {})):
        state = get_sam_model("vit_t", "cpu", path, return_state=True, **options)[1]
        assert state["decoder_settings"] == expected


def test_checkpoint_of_encoder_and_decoder_alone(tiny_sam, tiny_decoder_state, save):
    encoder = {f"encoder.{k[14:]}": v for k, v in tiny_sam.state_dict().items() if k.startswith("image_encoder.")}
    path = save({"model_state": encoder | tiny_decoder_state})
    with pytest.warns(UserWarning, match="no weights for prompts"):
        predictor, decoder = get_predictor_and_decoder("vit_t", path, "cpu", image_size=256)
    own = predictor.model.image_encoder.state_dict()
    assert all(torch.equal(own[k[8:]], v) for k, v in encoder.items())


def test_shipped_model_is_complete_and_honours_its_settings():
    predictor, decoder = get_predictor_and_decoder("vit_t_lite", device="cpu")
    assert (predictor.model_type, predictor.model_name) == ("vit_t", "vit_t_lite")
    assert predictor.model.image_encoder.img_size == decoder.img_size == 640
    assert decoder.normalization == "running"
    assert {v.dtype for v in [*predictor.model.parameters(), *decoder.parameters()]} == {torch.float32}
    assert get_sam_model("vit_t_lite", "cpu", image_size=1024).model.image_encoder.img_size == 1024


def test_local_model_by_name(local_models, tiny_checkpoint, tiny_sam, save):
    registry.register_local_model("my_cells", tiny_checkpoint, hash=compute_hash(tiny_checkpoint))
    predictor, decoder = get_predictor_and_decoder("my_cells", device="cpu")
    assert (predictor.model_type, predictor.model_name) == ("vit_t", "my_cells")
    assert predictor.model.image_encoder.img_size == 256
    assert same(predictor.model, tiny_sam.state_dict())
    path = save(tiny_sam.state_dict())
    registry.register_local_model("other", path, image_size=128)
    assert get_sam_model("other", "cpu").model.image_encoder.img_size == 128
    path.unlink()
    with pytest.raises(MissingFileError, match=r"weights\.pt of the model 'other'"):
        get_sam_model("other", "cpu")
    registry.register_local_model("my_cells", tiny_checkpoint, hash="xxh128:" + "0" * 32, replace=True)
    with pytest.raises(HashMismatchError, match="my_cells.*the file changed"):
        get_sam_model("my_cells", "cpu")


def test_published_model_by_name(monkeypatch, tiny_checkpoint, tiny_decoder_state, save):
    decoder = save(tiny_decoder_state, "decoder.pt")
    asked = []

    def download(name, factory):
        asked.append((name, factory))
        return str(tiny_checkpoint), "xxh128:1", str(decoder)

    monkeypatch.setattr(loading, "download_sam_model", download)
    factory = object()
    predictor, state = get_sam_model("vit_t_lm", "cpu", return_state=True, progress_bar_factory=factory)
    assert asked == [("vit_t_lm", factory)]
    assert (predictor.model_type, predictor.model_name, predictor._hash) == ("vit_t", "vit_t_lm", "xxh128:1")
    assert predictor.checkpoint_path == str(tiny_checkpoint)
    assert "decoder_state" in state


def test_without_network_the_place_for_the_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    monkeypatch.setattr(registry.models().__class__, "get_url", lambda self, name: "http://127.0.0.1:9/weights")
    with pytest.raises(DownloadError) as error:
        get_sam_model("vit_t", "cpu")
    assert f"put the file at {tmp_path / 'models' / 'vit_t'}" in str(error.value)


def test_builder_with_checkpoint(vit_b_state, save):
    path = save(vit_b_state)
    assert same(build_sam_vit_b(path, image_size=64), vit_b_state)
    with pytest.raises(CheckpointError, match="of another shape"):
        build_sam_vit_b(path)


def test_networks_built_without_initialisation_have_no_other_layers():
    with SkipInit():
        sam = build_sam("vit_b", image_size=64)
    assert set(sam.state_dict()) == set(build_sam("vit_b", image_size=64).state_dict())
    assert torch.nn.Linear(50, 50).weight.std() > 0


def test_export(tiny_checkpoint, tiny_sam, tiny_decoder_state, tmp_path, save):
    content = torch.load(tiny_checkpoint)
    trained = save({
        "model_state": {f"sam.{k}": v for k, v in content["model_state"].items()}, "iteration": 3,
        "decoder_state": content["decoder_state"], "decoder_settings": {"normalization": "running"},
    })
    target = tmp_path / "exported" / "model.pt"
    export_custom_sam_model(trained, "vit_t_lm", target)
    exported = torch.load(target, weights_only=True)
    assert same(tiny_sam, exported)
    export_custom_sam_model(trained, "vit_t", target, with_segmentation_decoder=True)
    exported = torch.load(target, weights_only=True)
    assert set(exported) == {"model_state", "decoder_state", "decoder_settings"}
    assert same(tiny_sam, exported["model_state"])
    assert set(exported["decoder_state"]) == set(tiny_decoder_state)
    assert get_predictor_and_decoder("vit_t", target, "cpu", image_size=256)[1].normalization == "running"
    assert [p.name for p in target.parent.iterdir()] == ["model.pt"]

    with pytest.raises(CheckpointError, match="holds a vit_t"):
        export_custom_sam_model(trained, "vit_b", target)
    with pytest.raises(DecoderMissingError):
        export_custom_sam_model(save(content["model_state"], "plain.pt"), "vit_t", target, True)
    with pytest.raises(OutputWriteError, match="choose another folder"):
        export_custom_sam_model(trained, "vit_t", trained / "model.pt")
    other = save({"model_state": {f"net.{k}": v for k, v in content["model_state"].items()}}, "other.pt")
    export_custom_sam_model(other, "vit_t", target, prefix="net.")
    assert same(tiny_sam, torch.load(target, weights_only=True))


def test_export_to_a_full_disk(tiny_checkpoint, tmp_path):
    resource = pytest.importorskip("resource")
    target = tmp_path / "model.pt"
    target.write_bytes(b"the last export")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OutputWriteError, match="cannot be written"):
            export_custom_sam_model(tiny_checkpoint, "vit_t", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"the last export"
    assert list(tmp_path.iterdir()) == [target]


def test_qlora_export_keeps_what_was_finetuned(vit_b_state, save, tmp_path):
    """Only the quantised linear layers of the encoder come from the base model."""
    base, block, finetuned = vit_b_state, "image_encoder.blocks.0.", {}
    for name, value in base.items():
        new = name.replace(f"{block}attn.qkv.", f"{block}attn.qkv.qkv_proj.").replace(
            f"{block}mlp.", f"{block}mlp.mlp_layer."
        )
        linear = name.startswith("image_encoder.blocks.") and name.endswith(
            ("qkv.weight", "proj.weight", "lin1.weight", "lin2.weight")
        )
        if linear:
            finetuned[new] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)
            finetuned[f"{new}.absmax"] = torch.ones(4)
            finetuned[f"{new}.quant_state.bitsandbytes__nf4"] = torch.ones(4, dtype=torch.uint8)
        else:
            finetuned[new] = value + 1
    lora = {f"{block}attn.qkv.w_{s}_linear_{p}.weight": torch.ones(2, 2) for s in "ab" for p in "qv"}
    lora |= {f"{block}mlp.w_{s}_linear_{p}.weight": torch.ones(2, 2) for s in "ab" for p in "12"}
    trained = save({"model_state": {f"sam.{k}": v for k, v in (finetuned | lora).items()}, "decoder_state": {
        "out_conv.weight": torch.zeros(1)}}, "trained.pt")
    export_custom_qlora_model(save(base), trained, "vit_b", tmp_path / "out.pt")
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    state = content["model_state"]
    assert "decoder_state" in content
    assert set(state) == {k for k in finetuned if not k.endswith(("absmax", "nf4"))} | set(lora)
    assert torch.equal(state[f"{block}attn.qkv.qkv_proj.weight"], base[f"{block}attn.qkv.weight"])
    assert torch.equal(state[f"{block}mlp.mlp_layer.lin1.weight"], base[f"{block}mlp.lin1.weight"])
    assert torch.equal(state["image_encoder.blocks.1.attn.qkv.weight"], base["image_encoder.blocks.1.attn.qkv.weight"])
    kept = ("mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight", "image_encoder.neck.0.weight",
            f"{block}norm1.weight")
    for name in kept:
        assert torch.equal(state[name], base[name] + 1), name
    assert torch.equal(state[f"{block}attn.qkv.w_a_linear_q.weight"], torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="no LoRA layers"):
        export_custom_qlora_model(save(base), save(base, "same.pt"), "vit_b", tmp_path / "out.pt")
