"""The workflow from an image to labels: choices, checks before work, records, and equality with the segmenters."""

import dataclasses

import numpy as np
import pytest
import tifffile
import zarr
from test_image import TrackingArray

import micro_sam
from micro_sam import automatic_segmentation
from micro_sam.automatic_segmentation import (
    automatic_instance_segmentation,
    automatic_tracking,
    get_predictor_and_segmenter,
    segment,
)
from micro_sam.core.errors import (
    DecoderMissingError,
    InvalidInputError,
    ModelError,
    OutputExistsError,
    UnknownModelError,
    UnsupportedError,
)
from micro_sam.core.image import LazyImage
from micro_sam.core.output import read_record
from micro_sam.core.progress import drain
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.embeddings.store import stored_canvas
from micro_sam.models import registry
from micro_sam.models.specs import SHIPPED_MODEL
from micro_sam.precompute_state import precompute_steps
from micro_sam.segmentation import workflow
from micro_sam.segmentation.ais import InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder
from micro_sam.segmentation.settings import mode_of
from micro_sam.segmentation.workflow import Strategy, choose_strategy, segmentation_steps

# The decoder has random weights: these thresholds make it find something.
LOOSE = {"center_distance_threshold": 0.485, "boundary_distance_threshold": 0.54, "foreground_threshold": 0.4}
TILES = {"tile_shape": (64, 80), "halo": (16, 16)}


@pytest.fixture
def ais(tiny_checkpoint):
    return get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu")


@pytest.fixture
def tiled_ais(tiny_checkpoint):
    return get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu", is_tiled=True)


def test_one_liner_is_the_segmenter(cells_image, ais, tiny_checkpoint):
    _, segmenter = ais
    segmenter.initialize(cells_image)
    expected = segmenter.generate(**LOOSE)
    labels = micro_sam.segment(cells_image, checkpoint=tiny_checkpoint, device="cpu", **LOOSE)
    assert labels.max() > 0
    np.testing.assert_array_equal(labels, expected)


def test_file_channel_and_container(tmp_path, cells_image, tiny_checkpoint):
    options = {"checkpoint": tiny_checkpoint, "device": "cpu", **LOOSE}
    expected = segment(cells_image, **options)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([cells_image[::-1], cells_image]))
    np.testing.assert_array_equal(segment(tmp_path / "a.tif", axes="CYX", channel=1, **options), expected)
    zarr.create_group(tmp_path / "a.zarr").create_array("raw", data=cells_image)
    np.testing.assert_array_equal(segment(tmp_path / "a.zarr", key="raw", **options), expected)


def test_tiled_one_liner_is_the_tiled_segmenter(cells_image, tiled_ais, tiny_checkpoint):
    _, segmenter = tiled_ais
    segmenter.initialize(cells_image, **TILES)
    labels = segment(cells_image, checkpoint=tiny_checkpoint, device="cpu", **TILES, **LOOSE)
    np.testing.assert_array_equal(labels, segmenter.generate(**LOOSE))
    assert labels.max() > 0


@pytest.mark.parametrize(
    ("shape", "tile_shape", "expected"),
    [
        ((512, 512), "auto", Strategy(640, normalization="image")),
        ((300, 513), "auto", Strategy(1024, normalization="image")),
        ((300, 513), None, Strategy(1024, normalization="image")),
        ((1024, 1025), "auto", Strategy(1024, (768, 768), (128, 128), "image")),
        ((1024, 1025), (384, 384), Strategy(640, (384, 384), (48, 48), "image")),
        ((256, 200), "auto", Strategy(640, normalization="image")),
        ((100, 61), "auto", Strategy(256, normalization="image")),
        ((64, 50), "auto", Strategy(192, normalization="image")),
        ((20, 30), "auto", Strategy(128, normalization="image")),
        ((300, 513), (64, 64), Strategy(192, (64, 64), (8, 8), "image")),
    ],
)
def test_strategy_of_the_shipped_model(shape, tile_shape, expected):
    assert choose_strategy(SHIPPED_MODEL, 640, shape, tile_shape) == expected


def test_strategy_of_other_models():
    assert choose_strategy("vit_b_lm", 1024, (2048, 1500)) == Strategy()
    assert choose_strategy("vit_b_lm", 1024, (1500, 2049)) == Strategy(None, (768, 768), (128, 128))
    assert choose_strategy("vit_b_lm", 1024, (1500, 2049), None) == Strategy()
    with pytest.raises(InvalidInputError, match="'automatic'"):
        choose_strategy("vit_b_lm", 1024, (1500, 2049), "automatic")


def test_shipped_model_with_another_canvas(rgb_image):
    """The canvas grows with the image; the weights are those of the same file."""
    model = workflow.load_model(SHIPPED_MODEL, device="cpu")
    plan = workflow.plan_image(model, (600, 400), "auto", None, {}, SHIPPED_MODEL)
    assert (model.canvas, plan.model.canvas) == (640, 1024)
    assert plan.model.predictor._hash == model.predictor._hash
    assert workflow.plan_image(model, (600, 600), "auto", None, {}, SHIPPED_MODEL).model is plan.model
    labels = segment(rgb_image, SHIPPED_MODEL, device="cpu")
    assert labels.max() > 3, "nuclei are found"


def test_embeddings_that_are_there_are_used_with_their_canvas(cells_image, tmp_path):
    """Those computed with the library have the canvas of the model, small images another one."""
    store = tmp_path / "e.zarr"
    model = workflow.load_model(SHIPPED_MODEL, device="cpu", mode="ais")
    precompute_image_embeddings(model.predictor, cells_image, store, ndim=2, verbose=False)
    labels = segment(cells_image, SHIPPED_MODEL, "ais", device="cpu", embedding_path=store)
    assert stored_canvas(store) == model.canvas == 640
    segmenter = model.segmenter(False)
    segmenter.initialize(cells_image)
    np.testing.assert_array_equal(labels, segmenter.generate(**workflow.default_options(SHIPPED_MODEL, "ais")))
    segment(cells_image, SHIPPED_MODEL, "ais", device="cpu", embedding_path=tmp_path / "new.zarr")
    assert stored_canvas(tmp_path / "new.zarr") == 384

    # Those computed ahead of time with the command are those of `segment`.
    drain(precompute_steps(model, LazyImage(cells_image, "YX"), tmp_path / "ahead.zarr"), verbose=False)
    assert stored_canvas(tmp_path / "ahead.zarr") == 384


def test_large_image_is_tiled_by_itself(cells_image, tiny_checkpoint):
    large = np.tile(cells_image, (3, 4))[:300, :520]
    options = {"checkpoint": tiny_checkpoint, "device": "cpu", **LOOSE}
    labels = segment(large, **options)
    np.testing.assert_array_equal(labels, segment(large, tile_shape=(192, 192), halo=(32, 32), **options))
    assert not np.array_equal(labels, segment(large, tile_shape=None, **options))


def test_default_model(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    assert workflow.default_model() == "vit_t_lite"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_b_lm").write_bytes(b"x")
    assert workflow.default_model() == "vit_t_lite", "its decoder is missing"
    (tmp_path / "models" / "vit_b_lm_decoder").write_bytes(b"x")
    assert workflow.default_model() == "vit_b_lm"


@pytest.mark.parametrize("mode", ["ais", "apg", "amg"])
def test_prompts_and_decoder_of_the_shipped_model_share_a_canvas(mode):
    model = workflow.load_model("vit_t_lite", None, "cpu", mode=mode)
    plan = workflow.plan_image(model, (520, 696), "auto", None, {}, "vit_t_lite")
    assert plan.model.canvas == model.for_prompts((520, 696)).canvas == 1024
    assert plan.work["tile_shape"] is None


def test_amg_of_the_shipped_model_has_thresholds_of_its_own(cells_image):
    model = workflow.load_model("vit_t_lite", device="cpu", mode="amg")
    plan = workflow.plan_image(model, cells_image.shape, "auto", None, {}, "vit_t_lite")
    assert plan.work["pred_iou_thresh"] < 0.88
    assert segment(cells_image, "vit_t_lite", "amg", device="cpu", points_per_side=8).max() > 0
    assert segment(cells_image, "vit_t_lite", "amg", device="cpu", points_per_side=8, pred_iou_thresh=0.999).max() == 0


def test_model_without_prompts(cells_image, monkeypatch):
    spec = dataclasses.replace(registry.find_spec("vit_t_lite"), modes=("ais",))
    monkeypatch.setattr(registry, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="was trained for ais"):
        segment(cells_image, model="vit_t_lite", mode="amg")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "vit_b_ml"}, UnknownModelError, "vit_b_lm"),
        ({"model": "vit_b_lm_decoder"}, UnknownModelError, "file of a decoder"),
        ({"model": "vit_b", "mode": "ais"}, DecoderMissingError, "was trained for amg"),
        ({"mode": "aiz"}, InvalidInputError, "'ais'"),
        ({"min_z_extent": 2}, InvalidInputError, "min_z_extent are for volumes"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(cells_image, monkeypatch, arguments, error, message):
    monkeypatch.setattr("micro_sam.models.loading.get_sam_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        segment(**{"image": cells_image, **arguments})


def test_unknown_options(cells_image, ais, tiny_checkpoint):
    with pytest.raises(InvalidInputError, match="'min_siz'.*'min_size'"):
        segment(cells_image, checkpoint=tiny_checkpoint, device="cpu", min_siz=3)
    with pytest.raises(InvalidInputError, match="'min_siz'.*'min_size'"):
        automatic_instance_segmentation(*ais, cells_image, min_siz=3)
    with pytest.raises(InvalidInputError, match="points_per_sid.*points_per_side"):
        get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu", "amg", points_per_sid=3)


def test_predictor_with_state(tiny_predictor, tiny_decoder_state):
    predictor, segmenter = get_predictor_and_segmenter(
        "vit_t", predictor=tiny_predictor, state={"decoder_state": tiny_decoder_state}
    )
    assert predictor is tiny_predictor
    assert type(segmenter) is InstanceSegmentationWithDecoder
    assert mode_of(get_predictor_and_segmenter("vit_t", predictor=predictor, state={})[1]) == "amg"
    with pytest.raises(InvalidInputError, match="without its state"):
        get_predictor_and_segmenter("vit_t", predictor=predictor)
    with pytest.raises(DecoderMissingError):
        get_predictor_and_segmenter("vit_t", predictor=predictor, state={}, segmentation_mode="apg")


def test_tiled_class_and_mode(tiny_checkpoint):
    _, segmenter = get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu", "AIS", is_tiled=True)
    assert type(segmenter) is TiledInstanceSegmentationWithDecoder


def test_output_is_recorded_loaded_and_protected(tmp_path, cells_image, ais, monkeypatch):
    predictor, segmenter = ais
    path = tmp_path / "exp.1.result"
    labels = automatic_instance_segmentation(predictor, segmenter, cells_image, path, verbose=False, **LOOSE)
    assert labels.dtype == np.uint64
    written = tmp_path / "exp.1.result.tif"
    np.testing.assert_array_equal(tifffile.imread(written), labels)
    settings = read_record(written)["settings"]
    assert settings["mode"] == "ais"
    assert settings["options"]["foreground_threshold"] == 0.4
    assert settings["options"]["distance_smoothing"] == 1.6, "defaults are recorded too"

    with monkeypatch.context() as patch:
        patch.setattr(automatic_segmentation, "image_steps", lambda *a, **k: pytest.fail("computed again"))
        again = automatic_instance_segmentation(predictor, segmenter, cells_image, path, verbose=False, **LOOSE)
    assert again.dtype == labels.dtype
    np.testing.assert_array_equal(again, labels)
    with pytest.raises(OutputExistsError, match="min_size"):
        automatic_instance_segmentation(predictor, segmenter, cells_image, path, **LOOSE, min_size=5)
    with pytest.raises(OutputExistsError, match="image"):
        automatic_instance_segmentation(predictor, segmenter, cells_image[::-1], path, **LOOSE)
    replaced = automatic_instance_segmentation(
        predictor, segmenter, cells_image, path, overwrite=True, verbose=False, **LOOSE, min_size=50
    )
    np.testing.assert_array_equal(tifffile.imread(written), replaced)


def test_embeddings_are_kept_and_returned(tmp_path, cells_image, tiled_ais):
    predictor, segmenter = tiled_ais
    arguments = {"verbose": False, "return_embeddings": True, **TILES, **LOOSE}
    labels, embeddings = automatic_instance_segmentation(
        predictor, segmenter, cells_image, embedding_path=tmp_path / "e.zarr", **arguments
    )
    assert embeddings["input_size"] is None
    predictor.model.image_encoder.forward = lambda x: pytest.fail("embedded again")
    try:
        again, _ = automatic_instance_segmentation(
            predictor, segmenter, cells_image, embedding_path=tmp_path / "e.zarr", **arguments
        )
    finally:
        del predictor.model.image_encoder.forward
    np.testing.assert_array_equal(again, labels)


def test_tiled_input_is_read_tile_by_tile(cells_image, tiny_checkpoint):
    large = TrackingArray(np.tile(cells_image, (3, 3)))
    labels = segment(large, checkpoint=tiny_checkpoint, device="cpu", **TILES, **LOOSE)
    assert labels.max() > 0
    assert max(large.blocks) <= (64 + 32) * (80 + 32), "never the whole image"


def test_mask_selects_tiles(cells_image, tiled_ais):
    predictor, segmenter = tiled_ais
    mask = np.zeros(cells_image.shape, np.uint8)
    mask[100:, 100:] = 1
    labels = automatic_instance_segmentation(
        predictor, segmenter, cells_image, mask_path=mask, verbose=False, **TILES, **LOOSE
    )
    assert labels[64:, 80:].max() > 0
    assert labels[:64].max() == 0


def test_colour_image(rgb_image, ais):
    labels = automatic_instance_segmentation(*ais, rgb_image, verbose=False, **LOOSE)
    assert labels.shape == rgb_image.shape[:2]


def test_arguments_that_do_not_fit(cells_image, ais, tiled_ais):
    with pytest.raises(InvalidInputError, match="is_tiled=True"):
        automatic_instance_segmentation(*ais, cells_image, **TILES)
    with pytest.raises(InvalidInputError, match="is_tiled=False"):
        automatic_instance_segmentation(*tiled_ais, cells_image)
    with pytest.raises(InvalidInputError, match="mask selects tiles"):
        automatic_instance_segmentation(*ais, cells_image, mask_path=cells_image)
    with pytest.raises(UnsupportedError, match="annotat"):
        automatic_tracking(*ais, np.zeros((10, 64, 64)), annotate=True)
    with pytest.raises(InvalidInputError, match="for volumes"):
        automatic_instance_segmentation(*ais, cells_image, gap_closing=1)
    with pytest.raises(InvalidInputError, match="min_time_extent"):
        automatic_instance_segmentation(*ais, np.zeros((10, 64, 64)), min_time_extent=1)


def test_closing_the_steps_cancels(tmp_path, cells_image, tiled_ais):
    predictor, segmenter = tiled_ais
    steps = segmentation_steps(predictor, segmenter, cells_image, embedding_path=tmp_path / "e.zarr", **TILES)
    texts = {next(steps).text, next(steps).text}
    steps.close()
    assert len(texts) == 1
    assert not segmenter.is_initialized
    assert (tmp_path / "e.zarr").exists(), "what was embedded is kept"


def test_input_is_not_changed(cells_image, ais):
    image = cells_image.copy()
    image.flags.writeable = False
    automatic_instance_segmentation(*ais, image, verbose=False)
    np.testing.assert_array_equal(image, cells_image)
