"""Inference in half precision: who computes in it, what stays exact, and what is recorded."""

import logging

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import zarr

import micro_sam
from micro_sam.blockwise.tasks import ModelSource
from micro_sam.cli.automatic_segmentation import main
from micro_sam.core.errors import EmbeddingMismatchError, InvalidInputError
from micro_sam.core.settings import get_precision
from micro_sam.embeddings.encode import embedding_steps, precompute_image_embeddings
from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_decoder
from micro_sam.models.loading import get_predictor_and_decoder, get_sam_model
from micro_sam.models.mask_decoder import predict_low_res
from micro_sam.models.precision import gains_from_half_precision, inference_dtype
from micro_sam.segmentation.workflow import load_model

POINTS, LABELS = torch.tensor([[[90.0, 70.0]], [[30.0, 200.0]]]), torch.ones(2, 1)


@pytest.fixture
def exact():
    return get_predictor_and_decoder("vit_t_lite", device="cpu", image_size=256)


@pytest.fixture
def half():
    return get_predictor_and_decoder("vit_t_lite", device="cpu", precision="bfloat16", image_size=256)


def relative(found, expected):
    """The largest difference as a share of the largest value; results are in single precision."""
    assert found.dtype == expected.dtype == torch.float32
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("instructions", "gains"), [
    ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),  # oneDNN would emulate it
    ({"avx512_f": True, "avx512_bf16": True}, True),
    ({"neon": True, "bf16": True}, True),
    (None, False),
])
def test_auto_is_half_precision_where_the_processor_has_instructions(monkeypatch, instructions, gains):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    if instructions is None:  # torch before 2.11
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert gains_from_half_precision("cpu") is gains
    assert inference_dtype("auto", "cpu") == (torch.bfloat16 if gains else None)
    assert inference_dtype("bfloat16", "cpu") == torch.bfloat16
    assert inference_dtype(None, "cpu") is inference_dtype("float32", "cuda:1") is None


def test_auto_on_gpus(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert inference_dtype("auto", "cuda:0") == dtype
    assert inference_dtype("auto", "mps") is None


def test_the_choice_of_the_user(monkeypatch, tmp_path):
    from micro_sam.core import settings
    monkeypatch.setattr(settings, "user_settings_file", lambda: tmp_path / "settings.json")
    assert get_precision() == "float32"
    settings.write_user_settings(precision="auto")
    assert get_precision() == "auto"
    monkeypatch.setenv("MICROSAM_PRECISION", "bfloat16")
    assert get_precision() == "bfloat16"
    assert get_precision("float32") == "float32"
    assert get_sam_model("vit_t_lite", device="cpu").inference_dtype == torch.bfloat16
    monkeypatch.setenv("MICROSAM_PRECISION", "float23")
    with pytest.raises(InvalidInputError, match="MICROSAM_PRECISION is 'float23', .*float32"):
        get_precision()
    monkeypatch.delenv("MICROSAM_PRECISION")
    settings.write_user_settings(precision=16)
    with pytest.raises(InvalidInputError, match=r"settings\.json is 16, .*bfloat16"):
        get_sam_model("vit_t_lite", device="cpu")


def test_results_are_close_and_prompts_exact(exact, half, cells_image):
    results, image = [], np.stack([cells_image] * 3, axis=-1)
    for predictor, decoder in (exact, half):
        seen, is_half = [], predictor is half[0]
        for part in (predictor.model.prompt_encoder, predictor.model.mask_decoder.transformer.layers[0].mlp):
            part.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        predictor.set_image(image)
        assert {p.dtype for p in predictor.model.parameters()} == {torch.float32}
        maps = decoder(predictor.features, predictor.input_size, predictor.original_size)
        logits, scores = predict_low_res(predictor, POINTS, LABELS)
        # So many tokens go through segment_anything's own code.
        many, _ = predict_low_res(predictor, POINTS.repeat(1, 12, 1), LABELS.repeat(1, 12))
        assert seen == [False, is_half, False, is_half]
        results.append((predictor.features, maps, logits, scores, many))
    for found, expected, tolerance in zip(results[1], results[0], (0.03, 0.1, 0.03, 0.03, 0.03), strict=True):
        assert 0 < relative(found, expected) < tolerance
    assert ((results[0][2] > 0) == (results[1][2] > 0)).float().mean() > 0.999


def test_embeddings_are_those_of_set_image(half, cells_image):
    predictor, _ = half
    features = precompute_image_embeddings(predictor, cells_image, ndim=2, verbose=False)["features"]
    stretched = (cells_image - cells_image.min()) / np.float32(np.ptp(cells_image) + np.float32(1e-7)) * np.float32(255)
    predictor.set_image(np.stack([stretched.astype("uint8")] * 3, axis=-1))
    assert relative(torch.from_numpy(features), predictor.features) < 0.03


def test_a_vit_in_half_precision():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = build_sam("vit_b", image_size=64).image_encoder
        x = torch.randn(1, 3, 64, 64)
        expected = encoder(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder(x)
    assert relative(found.float(), expected) < 0.05


def test_strips_and_layers_of_the_decoder(tiny_sam, tiny_decoder_state, monkeypatch):
    features = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    for normalization in ("instance", "running"):
        exact = get_decoder(tiny_sam.image_encoder, tiny_decoder_state, "cpu", normalization=normalization)
        half = get_decoder(
            tiny_sam.image_encoder, tiny_decoder_state, "cpu", normalization=normalization, dtype=torch.bfloat16
        )
        expected = exact._forward_impl(features)
        monkeypatch.setattr("micro_sam.models.decoder_cpu._VALUES_PER_STRIP", 4096)
        strips = half._forward_impl(features)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # what a GPU does
            layers = half._layers(features).float().sigmoid()
        for found in (strips, layers):
            assert relative(found, expected) < 0.1
            assert 0 < (found - expected).abs().mean() < 0.003


def test_caches_record_the_precision(exact, half, cells_image, tmp_path, caplog):
    for (predictor, _), name, precision in ((exact, "a.zarr", None), (half, "b.zarr", "bfloat16")):
        precompute_image_embeddings(predictor, cells_image, tmp_path / name, ndim=2, verbose=False)
        assert zarr.open_group(tmp_path / name, mode="r").attrs.get("precision") == precision
    with caplog.at_level(logging.WARNING):
        precompute_image_embeddings(half[0], cells_image, tmp_path / "a.zarr", ndim=2, verbose=False)
        assert not caplog.records
        features = precompute_image_embeddings(exact[0], cells_image, tmp_path / "b.zarr", ndim=2, verbose=False)
    assert "b.zarr were computed in bfloat16" in caplog.text
    assert "overwrite=True" in caplog.text
    own = precompute_image_embeddings(half[0], cells_image, ndim=2, verbose=False)
    np.testing.assert_array_equal(features["features"], own["features"])


def test_unfinished_caches_are_resumed_in_their_precision(exact, half, cells_image, tmp_path):
    stack, path = np.stack([cells_image] * 2), tmp_path / "stack.zarr"
    steps = embedding_steps(half[0], stack, path, ndim=3)
    while next(steps).done < 1:
        pass
    steps.close()
    with pytest.raises(EmbeddingMismatchError, match="precision=bfloat16, but precision=float32 was asked for"):
        precompute_image_embeddings(exact[0], stack, path, ndim=3, verbose=False)
    half[0].inference_dtype = torch.float16
    with pytest.raises(EmbeddingMismatchError, match="Pass precision='bfloat16' to go on"):
        precompute_image_embeddings(half[0], stack, path, ndim=3, verbose=False)
    zarr.open_group(path, mode="a").attrs["precision"] = "float16"
    with pytest.raises(EmbeddingMismatchError, match="Pass precision='auto' on such a GPU as it was begun on"):
        precompute_image_embeddings(exact[0], stack, path, ndim=3, verbose=False)
    zarr.open_group(path, mode="a").attrs["precision"] = "bfloat16"
    half[0].inference_dtype = torch.bfloat16
    precompute_image_embeddings(half[0], stack, path, ndim=3, verbose=False)


def test_the_model_keeps_its_precision_in_other_sizes_and_processes():
    model = load_model("vit_t_lite", device="cpu", precision="bfloat16")
    assert model.at_canvas(256).predictor.inference_dtype == torch.bfloat16
    loaded = ModelSource("vit_t_lite", device="cpu", precision="bfloat16").load()
    assert loaded.predictor.inference_dtype == loaded.decoder.inference_dtype == torch.bfloat16


def test_segmentation_of_a_real_image(cells_image):
    expected = micro_sam.segment(cells_image, "vit_t_lite", device="cpu")
    found = micro_sam.segment(cells_image, "vit_t_lite", device="cpu", precision="bfloat16")
    assert found.max() == expected.max() > 5
    assert ((found > 0) & (expected > 0)).sum() / ((found > 0) | (expected > 0)).sum() > 0.99


def test_outputs_of_another_precision_are_not_taken_for_the_same(cells_image, tmp_path, capsys):
    image, output = tmp_path / "cells.png", tmp_path / "labels.tif"
    imageio.imwrite(image, cells_image)
    arguments = ["-i", str(image), "-o", str(output), "-m", "vit_t_lite", "-d", "cpu"]
    for _ in range(2):
        assert main([*arguments, "--precision", "bfloat16"]) == 0
    assert main(arguments) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
