"""Automatic segmentation in a session: what is kept, that each setting acts, planes merged and tracked."""

import dataclasses
import logging
import time

import numpy as np
import pytest
import torch
from embedding_helpers import one_thread, small_predictor  # noqa: F401
from scipy import ndimage

from micro_sam import segment
from micro_sam.annotation.automatic import AutomaticSource, AutoSettings, advice
from micro_sam.annotation.embedding_source import EmbeddingSource
from micro_sam.annotation.geometry import AnnotationImage
from micro_sam.core.errors import DecoderMissingError, InvalidInputError, OutputWriteError
from micro_sam.core.labels import relabel_consecutive
from micro_sam.core.progress import Step, drain
from micro_sam.segmentation import ais
from micro_sam.segmentation.amg import AutomaticMaskGenerator
from micro_sam.segmentation.apg import AutomaticPromptGenerator
from micro_sam.segmentation.workflow import LoadedModel, load_model

SHAPE = (64, 80)
TILES = {"tile_shape": (48, 48), "halo": (8, 8)}
GRID = AutoSettings("amg", points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0, min_size=0)


def run(steps):
    return drain(steps, verbose=False)


def disc(image, center, radius, value=200):
    y, x = np.ogrid[:image.shape[0], :image.shape[1]]
    image[np.hypot(y - center[0], x - center[1]) <= radius] = value


@pytest.fixture
def model():
    """A small model; `decoded` stands in for its decoder."""
    return LoadedModel(small_predictor(), torch.nn.Identity(), "ais")


@pytest.fixture
def tiny_model(tiny_predictor, tiny_decoder):
    return LoadedModel(tiny_predictor, tiny_decoder, "ais")


@pytest.fixture
def decoded(monkeypatch):
    """A decoder that sees what is bright as objects; returns the planes that it was asked for."""
    calls = []

    def initialize_steps(self, image, image_embeddings=None, i=None, **_):
        yield Step(0, 1, "Run decoder")
        calls.append(i)
        objects, n = ndimage.label(image > 0.4 * image.max())
        maps = np.ones((3, *image.shape), dtype=np.float32)
        maps[0] = (objects > 0) * (image / max(image.max(), 1))
        for k in range(1, n + 1):
            inside = ndimage.distance_transform_edt(objects == k)
            relative = inside / inside.max()
            maps[1:][:, objects == k] = 1 - relative[objects == k]
        self._remember(dict(zip(ais.MAP_NAMES, maps)), image_embeddings, i)
        yield Step(1, 1, "Run decoder")

    for cls in (ais.InstanceSegmentationWithDecoder, ais.TiledInstanceSegmentationWithDecoder):
        monkeypatch.setattr(cls, "initialize_steps", initialize_steps)
    return calls


@pytest.fixture
def plane():
    """Three bright discs of 9, 7 and 4 pixels radius, the second one less bright."""
    image = np.full(SHAPE, 10, dtype=np.uint8)
    disc(image, (20, 20), 9, 250)
    disc(image, (40, 50), 7, 180)
    disc(image, (10, 60), 4, 250)
    return image


@pytest.fixture
def volume():
    """An object in planes 0 to 4, one with a gap in plane 2, and one in plane 1 only."""
    stack = np.full((5, *SHAPE), 10, dtype=np.uint16)
    for z in range(5):
        disc(stack[z], (20, 20), 9)
        if z != 2:
            disc(stack[z], (40, 50), 8)
    disc(stack[1], (50, 15), 7)
    return stack


def open_source(model, image, mode="2d", save_path=None, prepare=True, **options):
    image = AnnotationImage.create(image, mode=mode)
    tiles = {k: v for k, v in options.items() if k in TILES}
    embeddings = EmbeddingSource(model, image, save_path=save_path, **tiles)
    if prepare:
        run(embeddings.prepare_steps())
    rest = {k: v for k, v in options.items() if k not in TILES}
    return AutomaticSource(model, image, embeddings, **rest)


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_each_threshold_acts_and_none_computes_anew(model, decoded, plane, tiles):
    source = open_source(model, plane, **tiles)
    settings = AutoSettings("ais", min_size=10, distance_smoothing=0.5)
    assert not source.is_initialized(None, settings)
    labels = run(source.segment_plane_steps(None, settings))
    assert source.is_initialized(None, settings)
    assert (labels.dtype, labels.max()) == (np.uint32, 3)
    assert len({labels[20, 20], labels[40, 50], labels[10, 60]} - {0}) == 3
    changes = {
        "center_distance_threshold": 0.01, "boundary_distance_threshold": 0.01, "foreground_threshold": 0.8,
        "distance_smoothing": 6.0, "min_size": 60,
    }
    assert set(changes) == set(AutoSettings.controls("ais"))
    for name, value in changes.items():
        changed = run(source.segment_plane_steps(None, dataclasses.replace(settings, **{name: value})))
        assert not np.array_equal(changed, labels), name
    assert len(decoded) == 1
    np.testing.assert_array_equal(run(source.segment_plane_steps(None, settings)), labels)
    small = run(source.segment_plane_steps(None, dataclasses.replace(settings, min_size=60)))
    assert (small[20, 20] > 0, small[10, 60], small.max()) == (True, 0, 2)


def test_volume_settings_act(model, decoded, volume):
    source = open_source(model, volume, "3d")
    settings = AutoSettings("ais", min_size=10, gap_closing=0, min_z_extent=0)
    labels = run(source.segment_volume_steps(settings))
    assert (labels.shape, labels.dtype) == (volume.shape, np.uint32)
    assert len(np.unique(labels[:, 20, 20])) == 1
    assert len(np.unique(labels[[0, 1, 3, 4], 40, 50])) == 2
    assert labels[1, 50, 15] > 0
    closed = run(source.segment_volume_steps(dataclasses.replace(settings, gap_closing=1)))
    assert len(np.unique(closed[:, 40, 50])) == 1
    long = run(source.segment_volume_steps(dataclasses.replace(settings, min_z_extent=2)))
    assert long[1, 50, 15] == 0
    assert long.max() == labels.max() - 1
    apart = run(source.segment_volume_steps(dataclasses.replace(settings, beta=0.0001)))
    assert apart.max() > labels.max()
    assert len(decoded) == 5
    assert set(AutoSettings.controls("ais", "3d")) > {"gap_closing", "min_z_extent", "beta"}


def test_a_volume_of_one_plane_keeps_its_objects(model, decoded, plane):
    source = open_source(model, plane[None], "3d")
    labels = run(source.segment_volume_steps(AutoSettings("ais", min_size=10, min_z_extent=2)))
    assert labels.max() == 3


def test_tracking_settings_act(model, decoded):
    movie = np.full((6, *SHAPE), 10, dtype=np.uint8)
    for t in range(6):
        disc(movie[t], (20, 20 + 3 * t), 8)
        if t < 3:
            disc(movie[t], (50, 40), 8)
        else:
            disc(movie[t], (44, 40), 6)
            disc(movie[t], (57, 40), 6)
    disc(movie[2], (15, 65), 6)
    source = open_source(model, movie, "tracking")
    settings = AutoSettings("ais", min_size=10, gap_closing=0, min_z_extent=0)
    labels, forest = run(source.track_steps(settings))
    assert (labels.shape, labels.dtype) == (movie.shape, np.uint32)
    moving = np.array([labels[t, 20, 20 + 3 * t] for t in range(6)])
    assert len(set(moving.tolist())) == 1
    mother, daughters = labels[0, 50, 40], {labels[5, 44, 40], labels[5, 57, 40]}
    assert {forest[d].parent for d in daughters} == {mother}
    assert forest[labels[2, 15, 65]].first == forest[labels[2, 15, 65]].last == 2

    long, forest = run(source.track_steps(dataclasses.replace(settings, min_z_extent=2)))
    assert long[2, 15, 65] == 0
    _, forest = run(source.track_steps(dataclasses.replace(settings, tracking_mode="greedy_nodiv")))
    assert all(len(forest.children(t)) < 2 for t in forest)
    with pytest.raises(InvalidInputError, match="tracking model"):
        run(source.track_steps(dataclasses.replace(settings, tracking_model="nobody")))
    assert len(decoded) == 6


def test_gaps_in_tracks_and_one_frame(model, decoded, volume):
    source = open_source(model, volume, "tracking")
    settings = AutoSettings("ais", min_size=10, gap_closing=1, min_z_extent=2)
    labels, forest = run(source.track_steps(settings))
    assert len(np.unique(labels[:, 40, 50])) == 1
    assert len(forest) == 2
    one = open_source(model, volume[:1], "tracking")
    labels, forest = run(one.track_steps(settings))
    assert len(forest) == labels.max() == 2


@pytest.mark.parametrize("mode", ["ais", "apg", "amg"])
def test_nothing_found(model, mode):
    blank = np.zeros((3, *SHAPE), dtype=np.float32)
    source = open_source(model, blank, "3d")
    settings = AutoSettings(mode, points_per_side=2)
    assert not run(source.segment_plane_steps(1, settings)).any()
    assert not run(source.segment_volume_steps(settings)).any()
    labels, forest = run(open_source(model, blank, "tracking").track_steps(settings))
    assert (labels.any(), len(forest)) == (False, 0)
    text = advice(settings, "3d")
    assert "minimum object size than 100 pixels" in text
    assert ("stability (0.95)" in text) == (mode == "amg")
    assert "minimum extent than 2 planes" in text
    assert "extent" not in advice(settings)


def grid_reference(model, image, **options):
    segmenter = AutomaticMaskGenerator(model.predictor, points_per_side=4)
    segmenter.initialize(image)
    return segmenter.generate(pred_iou_thresh=0.0, stability_score_thresh=0.0, **options)


def test_the_mask_generator_leaves_out_small_objects(model, cells_image):
    image = cells_image[:96, :80]
    source = open_source(model, image)
    labels = run(source.segment_plane_steps(None, GRID))
    np.testing.assert_array_equal(labels, grid_reference(model, image))
    sizes = np.bincount(labels.ravel())[1:]
    limit = int(np.median(sizes)) + 1
    large = run(source.segment_plane_steps(None, dataclasses.replace(GRID, min_size=limit)))
    assert 0 < large.max() < labels.max()
    assert np.bincount(large.ravel())[1:].min() >= limit
    changes = {
        "points_per_side": 3, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.5, "box_nms_thresh": 0.3,
        "min_size": limit,
    }
    assert set(changes) == set(AutoSettings.controls("amg"))
    for name, value in changes.items():
        changed = run(source.segment_plane_steps(None, dataclasses.replace(GRID, **{name: value})))
        assert not np.array_equal(changed, labels), name


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_prompts_from_the_decoder(model, decoded, cells_image, tiles):
    image = cells_image[:96, :80]
    source = open_source(model, image, **tiles)
    settings = AutoSettings("apg", min_size=1)
    labels = run(source.segment_plane_steps(None, settings))
    assert labels.any()
    if not tiles:
        segmenter = AutomaticPromptGenerator(model.predictor, model.decoder)
        segmenter.initialize(image, run(source.embeddings.prepare_steps()))
        np.testing.assert_array_equal(labels, segmenter.generate(min_size=1))
        decoded.pop()
    run(source.segment_plane_steps(None, AutoSettings("ais")))
    assert len(decoded) == 1  # both look at the same maps
    for name, value in {"nms_threshold": 0.999, "min_size": 9000, "foreground_threshold": 0.99}.items():
        changed = run(source.segment_plane_steps(None, dataclasses.replace(settings, **{name: value})))
        assert not np.array_equal(changed, labels), name


def test_the_shipped_model_segments_as_segment_does(cells_image):
    image = np.ascontiguousarray(np.tile(cells_image, (2, 2))[:200, :300])
    model = load_model("vit_t_lite", device="cpu").for_prompts(image.shape)
    source = open_source(model, image)
    for mode in ("ais", "apg"):
        labels = run(source.segment_plane_steps(None, AutoSettings.for_model("vit_t_lite", mode)))
        expected = segment(image, "vit_t_lite", mode, device="cpu")
        assert expected.max() > 20
        np.testing.assert_array_equal(labels, relabel_consecutive(expected))


# What is kept


@pytest.mark.parametrize("settings", [AutoSettings("ais", min_size=10), GRID], ids=["ais", "amg"])
@pytest.mark.parametrize("mode", ["2d", "3d"])
def test_states_next_to_the_embeddings(model, decoded, volume, tmp_path, monkeypatch, settings, mode):
    image, index = (volume[0], None) if mode == "2d" else (volume[:2], 1)
    first = open_source(model, image, mode, tmp_path / "a.zarr")
    labels = run(first.segment_plane_steps(index, settings))
    assert labels.any()
    name = "is_state.h5" if settings.mode == "ais" else "amg_state.npz" if mode == "2d" else "amg_state/state-1.npz"
    assert (tmp_path / "a.zarr" / name).exists()

    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(ais.InstanceSegmentationWithDecoder, "initialize_steps", refuse)
    monkeypatch.setattr(AutomaticMaskGenerator, "initialize_steps", refuse)
    again = open_source(model, image, mode, tmp_path / "a.zarr")
    np.testing.assert_array_equal(run(again.segment_plane_steps(index, settings)), labels)


def test_states_of_other_options_do_no_harm(model, volume, tmp_path, caplog):
    image = volume[0]
    run(open_source(model, image, save_path=tmp_path / "a.zarr").segment_plane_steps(None, GRID))
    before = (tmp_path / "a.zarr" / "amg_state.npz").read_bytes()
    source = open_source(model, image, save_path=tmp_path / "a.zarr")
    other = dataclasses.replace(GRID, points_per_side=3)
    with caplog.at_level(logging.WARNING):
        labels = run(source.segment_plane_steps(None, other))
    assert "memory only" in caplog.text
    np.testing.assert_array_equal(labels, run(open_source(model, image).segment_plane_steps(None, other)))
    assert (tmp_path / "a.zarr" / "amg_state.npz").read_bytes() == before


@pytest.mark.parametrize("damage", ["read-only", "damaged"])
def test_trouble_with_the_disk_costs_only_time(model, decoded, volume, tmp_path, monkeypatch, damage):
    settings = AutoSettings("ais", min_size=10)
    source = open_source(model, volume, "3d", tmp_path / "a.zarr")
    tries = []
    if damage == "damaged":
        (tmp_path / "a.zarr" / "is_state.h5").write_bytes(b"no hdf5")
    else:
        def write_maps(*_):
            tries.append(1)
            raise OutputWriteError("The disk is full.")

        monkeypatch.setattr("micro_sam.precompute_state.write_maps", write_maps)
    labels = run(source.segment_volume_steps(settings))
    np.testing.assert_array_equal(labels, run(open_source(model, volume, "3d").segment_volume_steps(settings)))
    assert len(tries) == (damage == "read-only")
    n_decoded = len(decoded)
    run(source.segment_plane_steps(3, settings))
    assert len(decoded) == n_decoded


def test_memory_is_bounded(model, decoded, volume):
    settings = AutoSettings("ais")
    maps = 3 * 4 * SHAPE[0] * SHAPE[1]
    source = open_source(model, volume, "3d", memory_bytes=2 * maps)
    run(source.segment_volume_steps(settings))
    assert [source.is_initialized(z, settings) for z in range(5)] == [False, False, False, True, True]
    run(open_source(model, volume, "3d", memory_bytes=0).segment_volume_steps(settings))


def test_a_plane_ahead_of_the_store(model, decoded, volume, tmp_path):
    settings = AutoSettings("ais", min_size=10)
    source = open_source(model, volume, "3d", tmp_path / "a.zarr", prepare=False)
    early = run(source.segment_plane_steps(3, settings))
    assert not source.embeddings.complete
    assert not (tmp_path / "a.zarr").exists()
    run(source.segment_volume_steps(settings))
    np.testing.assert_array_equal(run(source.segment_plane_steps(3, settings)), early)
    fresh = open_source(model, volume, "3d", tmp_path / "a.zarr")
    np.testing.assert_array_equal(run(fresh.segment_plane_steps(3, settings)), early)


@pytest.mark.parametrize("mode", ["2d", "3d"])
def test_preparation(model, decoded, volume, tmp_path, mode):
    image = volume[0] if mode == "2d" else volume
    source = open_source(model, image, mode, tmp_path / "a.zarr", prepare=False)
    run(source.prepare_steps())
    n_planes = 1 if mode == "2d" else 5
    assert len(decoded) == n_planes
    again = open_source(model, image, mode, tmp_path / "a.zarr")
    run(again.prepare_steps())
    run(again.segment_plane_steps(None if mode == "2d" else 2, AutoSettings()))
    assert len(decoded) == n_planes


def test_cancelled_volumes_go_on_where_they_were(model, decoded, volume):
    source, settings = open_source(model, volume, "3d", prepare=False), AutoSettings("ais", min_size=10)
    steps = source.segment_volume_steps(settings)
    for step in steps:
        if step.text == "Segment planes" and step.done == 3:
            break
    steps.close()
    assert len(decoded) == 3
    run(source.segment_volume_steps(settings))
    assert len(decoded) == 5


@pytest.mark.parametrize("mode", ["ais", "apg", "amg"])
def test_tasks_that_take_turns_do_not_disturb_each_other(tiny_model, cells_image, mode):
    model, thresholds = tiny_model, {
        "center_distance_threshold": 0.42, "boundary_distance_threshold": 0.55, "foreground_threshold": 0.44,
    }
    settings = dataclasses.replace(GRID, mode=mode, **thresholds)
    volume = np.stack([cells_image[:96, :80], cells_image[30:126, 60:140]])
    source = open_source(model, volume, "3d")
    alone = [run(open_source(model, volume, "3d").segment_plane_steps(z, settings)) for z in range(2)]
    tasks, results = {z: source.segment_plane_steps(z, settings) for z in range(2)}, {}
    while tasks:
        for z, steps in list(tasks.items()):
            try:
                next(steps)
            except StopIteration as stop:
                results[z] = stop.value
                del tasks[z]
    for z in range(2):
        np.testing.assert_array_equal(results[z], alone[z])
    assert not np.array_equal(alone[0], alone[1])


def test_the_mask_generator_says_how_long_it_takes(model, volume, monkeypatch):
    now = [0.0]

    def perf_counter():
        now[0] += 10.0
        return now[0]

    source = open_source(model, volume, "3d")
    monkeypatch.setattr(time, "perf_counter", perf_counter)
    settings = dataclasses.replace(GRID, points_per_side=16)  # four batches of points
    texts = list(dict.fromkeys(
        step.text for step in source.segment_volume_steps(settings) if step.text.startswith("Segment")
    ))
    assert texts == ["Segment planes", "Segment planes, which takes about 50 s"]
    assert {s.text for s in source.segment_volume_steps(settings)} == {
        "Segment planes", "Merge segmentation of slices"
    }


# Settings


def test_modes(tiny_predictor, tiny_decoder, plane):
    without = LoadedModel(tiny_predictor, None, "amg")
    source = open_source(without, plane)
    assert source.mode(AutoSettings()) == "amg"
    for mode in ("ais", "apg"):
        with pytest.raises(DecoderMissingError, match=mode):
            run(source.segment_plane_steps(None, AutoSettings(mode)))
    with pytest.raises(InvalidInputError, match="no stack"):
        run(source.segment_volume_steps(GRID))
    with pytest.raises(InvalidInputError, match="plane 0"):
        run(source.segment_plane_steps(0, GRID))
    assert open_source(LoadedModel(tiny_predictor, tiny_decoder, "apg"), plane).mode(AutoSettings()) == "apg"
    with pytest.raises(InvalidInputError, match="min_size"):
        AutoSettings(min_size=-1)


def test_settings_of_models():
    settings = AutoSettings.for_model("vit_b_lm", "ais")
    assert (settings.center_distance_threshold, settings.distance_smoothing, settings.min_size) == (0.4, 2.0, 100)
    assert AutoSettings.for_model("vit_b_lm", "amg").pred_iou_thresh == 0.65
    assert AutoSettings.for_model(None, "amg") == AutoSettings("amg")
    assert AutoSettings("ais").options("ais", "vit_l_lm")["distance_smoothing"] == 1.6
    assert AutoSettings("ais").options("ais", "vit_h_lm")["distance_smoothing"] == 1.4
    names = {f.name for f in dataclasses.fields(AutoSettings)} - {"mode"}
    shown = {n for m in ("ais", "apg", "amg") for k in ("2d", "3d", "tracking") for n in AutoSettings.controls(m, k)}
    assert shown == names


def test_colours_and_other_types(tiny_model, rgb_image):
    for image in (rgb_image[:64, :64], rgb_image[:64, :64].astype("float64"), rgb_image[:64, :64, :2].astype(">u2")):
        labels = run(open_source(tiny_model, image).segment_plane_steps(None, AutoSettings("ais", min_size=0)))
        assert (labels.shape, labels.dtype) == ((64, 64), np.uint32)
