"""Automatic segmentation of volumes: the same as slice by slice, in batches, in little memory, for all segmenters."""

import copy
import threading
import tracemalloc

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from embedding_helpers import small_predictor
from segment_anything import SamPredictor
from test_ais_apg import QuickDecoder, QuickEncoder
from test_amg import LocalDecoder

from micro_sam.core.errors import InvalidInputError
from micro_sam.core.progress import drain
from micro_sam.embeddings.encode import embedding_steps, precompute_image_embeddings
from micro_sam.segmentation.amg import AutomaticMaskGenerator
from micro_sam.segmentation.factory import get_instance_segmentation_generator
from micro_sam.volume import automatic
from micro_sam.volume.automatic import automatic_3d_segmentation, slices_steps, volume_steps
from micro_sam.volume.merge import merge_instance_segmentation_3d

TILES = {"tile_shape": (64, 80), "halo": (35, 35)}
# Options with which the random model finds several objects.
OPTIONS = {
    "amg": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.95, "crop_nms_thresh": 0.95},
    "ais": {"min_size": 10},
    "apg": {"min_size": 10},
}
ALL = [(mode, tiled) for mode in ("amg", "ais", "apg") for tiled in (False, True)]


class CountingEncoder(QuickEncoder):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return super().forward(x)


class ManyObjects(AutomaticMaskGenerator):
    """Finds an object in each pixel."""

    def generate(self, **kwargs):
        return np.arange(128 * 160, dtype=np.uint32).reshape(128, 160)


@pytest.fixture
def predictor(tiny_sam):
    """The tiny model with a quick encoder, and a mask decoder that gives spots at the points."""
    mask_decoder = copy.deepcopy(tiny_sam.mask_decoder)
    mask_decoder.__class__ = LocalDecoder
    mask_decoder.positive = tiny_sam.prompt_encoder.point_embeddings[1].weight[0]
    sam = copy.copy(tiny_sam)
    sam._modules = {**tiny_sam._modules, "image_encoder": CountingEncoder(), "mask_decoder": mask_decoder}
    predictor = SamPredictor(sam)
    predictor.model_type, predictor.model_name, predictor._hash = "vit_t", "quick", "xxh128:" + "0" * 32
    return predictor


@pytest.fixture
def volume(cells_image):
    """Five slices with an empty one; objects move by a pixel from slice to slice."""
    volume = np.stack([np.roll(cells_image, z, axis=1) for z in range(5)])
    volume[3] = 7
    return volume


def make(predictor, mode, tiled):
    options = {"points_per_side": 2 if tiled else 3} if mode == "amg" else {}
    return get_instance_segmentation_generator(
        predictor, tiled, None if mode == "amg" else QuickDecoder(), mode, **options
    )


def reference(volume, predictor, mode, tiled, **merging):
    """Slice by slice with the segmenter for images, then merged."""
    segmenter, slices, offset = make(predictor, mode, tiled), [], 0
    for plane in volume:
        embeddings = precompute_image_embeddings(predictor, plane, ndim=2, verbose=False, **(TILES if tiled else {}))
        segmenter.initialize(plane, embeddings)
        labels = segmenter.generate(**OPTIONS[mode]).astype(np.uint64)
        slices.append(np.where(labels > 0, labels + np.uint64(offset), 0))
        offset += int(labels.max())
    return merge_instance_segmentation_3d(np.stack(slices), verbose=False, **merging)


def run(volume, predictor, mode, tiled, segmenter=None, **kwargs):
    segmenter = segmenter or make(predictor, mode, tiled)
    return automatic_3d_segmentation(
        volume, predictor, segmenter, verbose=False, **(TILES if tiled else {}), **OPTIONS[mode], **kwargs
    )


@pytest.mark.parametrize(("mode", "tiled"), ALL)
def test_equals_slice_by_slice(predictor, volume, tmp_path, mode, tiled):
    volume = volume[1:]
    volume.flags.writeable = False
    before = volume.copy()
    merging = {"gap_closing": 1, "min_z_extent": 2}
    expected = reference(volume, predictor, mode, tiled, **merging)
    assert expected.max() > 0
    for batch_size in (1, 3) if mode != "amg" else (3,):
        labels = run(volume, predictor, mode, tiled, batch_size=batch_size, **merging)
        assert labels.dtype == np.uint64
        np.testing.assert_array_equal(labels, expected)
    kept, embeddings = run(
        da.from_array(volume, chunks=(2, 50, 50)), predictor, mode, tiled, embedding_path=tmp_path / "e.zarr",
        batch_size=2, return_embeddings=True, **merging,
    )
    np.testing.assert_array_equal(kept, expected)
    assert (embeddings["input_size"] is None) == tiled
    n_calls = len(predictor.model.image_encoder.calls)
    again = run(volume, predictor, mode, tiled, embedding_path=tmp_path / "e.zarr", **merging)
    np.testing.assert_array_equal(again, expected)
    assert len(predictor.model.image_encoder.calls) == n_calls
    np.testing.assert_array_equal(volume, before)


@pytest.mark.parametrize(("mode", "tiled"), [("ais", False), ("ais", True), ("apg", False), ("apg", True)])
def test_batches_reach_encoder_and_decoder(predictor, volume, mode, tiled):  # 02-W31
    segmenter = make(predictor, mode, tiled)
    run(volume, predictor, mode, tiled, segmenter, batch_size=2)
    decoded = segmenter._decoder.calls
    encoded = predictor.model.image_encoder.calls
    if tiled:  # 2 x 2 tiles of a slice
        assert decoded == [2] * 8
        assert encoded == [2] * 10
    else:  # the fourth slice is blank
        assert decoded == [2, 1, 1]
        assert encoded == [2, 2, 1]


def test_real_decoder_in_batches(tiny_predictor, tiny_decoder, volume):
    segmenter = get_instance_segmentation_generator(tiny_predictor, False, tiny_decoder, "ais")
    states = []
    segmenter.set_state, set_state = lambda state: (states.append(state), set_state(state)), segmenter.set_state
    automatic_3d_segmentation(volume[:3], tiny_predictor, segmenter, verbose=False, batch_size=3)
    single = get_instance_segmentation_generator(tiny_predictor, False, tiny_decoder, "ais")
    for plane, state in zip(volume[:3], states, strict=True):
        single.initialize(plane)
        for name, expected in single.get_state().items():
            np.testing.assert_allclose(state[name], expected, atol=1e-5)


@pytest.mark.parametrize("tiled", [False, True])
def test_background_option_of_the_mask_generator(predictor, volume, tiled):  # 02-W31
    segmenter, passed = make(predictor, "amg", tiled), []
    generate = segmenter.generate
    segmenter.generate = lambda **kwargs: (passed.append(kwargs), generate(**kwargs))[1]
    for choice in (None, False, True):
        run(volume[:1], predictor, "amg", tiled, segmenter, with_background=True, mask_with_background=choice)
    assert [p.get("with_background") for p in passed] == [None, False, True]
    with pytest.raises(InvalidInputError, match="mask_with_background.*'ais'"):
        run(volume, predictor, "ais", tiled, mask_with_background=True)


def test_merge_options_are_passed_on(predictor, volume, monkeypatch):
    passed = []

    def merge_steps(labels, *args, **kwargs):
        passed.append((*args, kwargs["ids_per_slice"]))
        yield from ()
        return labels

    monkeypatch.setattr(automatic, "merge_steps", merge_steps)
    labels = run(volume, predictor, "ais", False, with_background=False, gap_closing=2, min_z_extent=3, beta=0.4)
    assert passed == [(0.4, False, 2, 3, True)]
    assert all(labels[z].any() == (z != 3) for z in range(5))


def test_embeddings_of_one_batch_at_a_time(predictor, volume, monkeypatch):
    depths = []

    def counted(predictor, stack, *args, **kwargs):
        depths.append(len(stack))
        return (yield from embedding_steps(predictor, stack, *args, **kwargs))

    monkeypatch.setattr(automatic, "embedding_steps", counted)
    run(volume, predictor, "ais", False, batch_size=2)
    assert depths == [2, 2, 1]
    _, embeddings = run(volume, predictor, "ais", False, batch_size=2, return_embeddings=True)
    assert depths[3:] == [5]
    assert embeddings["features"].shape[0] == 5


def test_embeddings_are_those_of_the_function(predictor, volume):
    _, embeddings = run(volume, predictor, "ais", True, return_embeddings=True)
    expected = precompute_image_embeddings(predictor, volume, ndim=3, verbose=False, **TILES)
    for tile, features in expected["features"].items():
        np.testing.assert_array_equal(np.asarray(embeddings["features"][tile]), np.asarray(features))


@pytest.mark.parametrize("normalization", ["tile", "plane", "image", (0, 180)])
def test_normalization_is_that_of_the_volume(predictor, volume, tmp_path, normalization):
    volume[1] //= 2
    options = {"embedding_options": {"normalization": normalization}, "batch_size": 2}
    dropped = run(volume, predictor, "ais", False, **options)
    kept = run(volume, predictor, "ais", False, embedding_path=tmp_path / "e.zarr", **options)
    assert dropped.max() > 0
    np.testing.assert_array_equal(dropped, kept)


@pytest.mark.parametrize(("mode", "tiled"), ALL)
def test_colour(predictor, volume, mode, tiled):
    grey = run(volume[:2], predictor, mode, tiled)
    for channels in (1, 3):
        colour = np.repeat(volume[:2, ..., None], channels, axis=-1)
        np.testing.assert_array_equal(run(colour, predictor, mode, tiled), grey)


@pytest.mark.parametrize("dtype", ["bool", "uint16", "int32", "float32", "float64"])
def test_dtypes(predictor, volume, dtype):
    volume = volume > 60 if dtype == "bool" else volume.astype(dtype) * 3
    labels = run(volume, predictor, "ais", False)
    assert labels.dtype == np.uint64
    assert labels.max() > 3


def test_one_slice_and_blank_volume(predictor, volume):
    assert run(volume[:1], predictor, "ais", False).max() > 3
    for mode, tiled in ALL:
        assert not run(volume[3:4].repeat(3, axis=0), predictor, mode, tiled).any()


def test_output_array(predictor, volume, tmp_path):
    expected = run(volume, predictor, "ais", False, gap_closing=1)
    on_disk = zarr.create_array(tmp_path / "l.zarr", shape=volume.shape, chunks=(1, 64, 64), dtype="uint16")
    for output in (np.full(volume.shape, 3, np.int32), on_disk):
        assert run(volume, predictor, "ais", False, gap_closing=1, output=output, batch_size=2) is output
        np.testing.assert_array_equal(output[...], expected)
    with pytest.raises(InvalidInputError, match="too large for the output of dtype int8"):
        drain(slices_steps(volume, predictor, ManyObjects(predictor, 1), output=np.zeros(volume.shape, np.int8)), False)


def test_mask_selects_tiles(predictor, volume):
    mask = np.zeros(volume.shape, np.uint8)
    mask[:2, 100:, 130:] = 1  # touches the last of four tiles
    labels = run(volume, predictor, "ais", True, mask=mask, batch_size=2)
    assert labels[:2, 64:, 80:].any()
    assert not labels[:, :64].any()
    assert not labels[2:].any()
    assert len(predictor.model.image_encoder.calls) == 1
    assert not run(volume, predictor, "ais", True, mask=np.zeros_like(mask)).any()
    with pytest.raises(InvalidInputError, match="mask"):
        run(volume, predictor, "ais", True, mask=mask[0])


@pytest.mark.parametrize(("shape", "message"), [
    ((64, 64), r"\(64, 64\)"), ((10, 64, 64, 5), "up to four channels"), ((2, 3, 64, 64, 3), "shape"),
    ((64, 64, 3), r"image\[None\]"), ((0, 64, 64), r"\(0, 64, 64\)"), ((5,), "shape"),
])
def test_shapes_are_checked_first(predictor, shape, message):  # 02-W35
    with pytest.raises(InvalidInputError, match=message):
        run(np.zeros(shape, np.uint8), predictor, "ais", False)
    assert predictor.model.image_encoder.calls == []


def test_arguments_are_checked_first(predictor, volume):  # 02-W35
    segmenter, tiled = make(predictor, "ais", False), make(predictor, "ais", True)
    wrong = [
        (segmenter, TILES, "Leave tile_shape out"), (tiled, {}, "Pass tile_shape"),
        (segmenter, {"halo": (8, 8)}, "halo is for tiles"), (segmenter, {"mask": volume}, "mask is for tiles"),
        (segmenter, {"batch_size": 0}, "batch_size"), (segmenter, {"beta": 1}, "beta"),
        (segmenter, {"gap_closing": -1}, "gap_closing"), (segmenter, {"min_z_extent": 0.5}, "min_z_extent"),
        (segmenter, {"min_sise": 3}, "min_size"), (segmenter, {"output_mode": "binary_mask"}, "output_mode"),
        (segmenter, {"output": np.zeros((5, 128, 160))}, "output"),
        (segmenter, {"output": np.zeros((4, 128, 160), int)}, "output"),
        (segmenter, {"embedding_options": {"normalisation": "tile"}}, "normalization"),
        (segmenter, {"embedding_options": {"normalization": "none"}}, "normalization"),
        (object(), {}, "segmenters of micro_sam"),
    ]
    for chosen, options, message in wrong:
        with pytest.raises(InvalidInputError, match=message):
            automatic_3d_segmentation(volume, predictor, chosen, verbose=False, **options)
    assert predictor.model.image_encoder.calls == []


def test_bad_values_name_their_slice(predictor, volume):
    volume = volume.astype(float)
    volume[4, 3, 3] = np.nan
    with pytest.raises(InvalidInputError, match=r"plane 0.*counted from slice 4"):
        run(volume, predictor, "ais", False, batch_size=2)


def test_progress(predictor, volume):
    calls = []
    run(volume, predictor, "ais", False, batch_size=2, pbar_init=lambda *a: calls.append(a),
        pbar_update=lambda n: calls[-1] is not None and calls.append(n))
    phases = [c for c in calls if isinstance(c, tuple)]
    assert [total for total, _ in phases] == [5, 10]
    assert sum(c for c in calls if isinstance(c, int)) == 15


@pytest.mark.parametrize(("mode", "tiled"), ALL)
def test_can_be_cancelled_anywhere(predictor, volume, mode, tiled):
    n_threads = threading.active_count()
    for n_steps in (1, 4, 12):
        steps = volume_steps(
            volume, predictor, make(predictor, mode, tiled), batch_size=2, **(TILES if tiled else {}), **OPTIONS[mode]
        )
        for _ in range(n_steps):
            next(steps)
        steps.close()
        assert threading.active_count() == n_threads
    assert sum(predictor.model.image_encoder.calls) < 3 * len(volume) * (4 if tiled else 1)


def test_cancelled_work_goes_on(predictor, volume, tmp_path):
    path = tmp_path / "e.zarr"
    steps = volume_steps(volume, predictor, make(predictor, "ais", False), path)
    for _ in range(4):
        next(steps)
    steps.close()
    done = sum(predictor.model.image_encoder.calls)
    assert 0 < done < 5
    labels = run(volume, predictor, "ais", False, embedding_path=path)
    assert sum(predictor.model.image_encoder.calls) == 5
    np.testing.assert_array_equal(labels, run(volume, predictor, "ais", False))


def test_memory_does_not_grow_with_depth(tmp_path):
    predictor = small_predictor(64)
    shape = (128, 128)

    class Volume:
        dtype = np.dtype(np.uint8)

        def __init__(self, depth):
            self.shape, self.ndim = (depth, *shape), 3
            self.plane = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)

        def __getitem__(self, key):
            n = len(range(*key.indices(self.shape[0])))
            return np.stack([self.plane] * n)

    class Decoder(QuickDecoder):
        def __call__(self, features, input_size, original_size):
            return torch.nn.functional.interpolate(
                super().__call__(features, (256, 256), (64, 64)), tuple(original_size), mode="bilinear"
            )

    def peak(depth):
        output = zarr.create_array(
            tmp_path / f"{depth}.zarr", shape=(depth, *shape), chunks=(1, *shape), dtype="uint32"
        )
        segmenter = get_instance_segmentation_generator(predictor, False, Decoder(), "ais")
        tracemalloc.start()
        automatic_3d_segmentation(Volume(depth), predictor, segmenter, verbose=False, batch_size=2, output=output)
        _, bytes_ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return bytes_

    peak(4)
    one_plane_of_labels = 4 * 128 * 128
    assert peak(32) - peak(8) < one_plane_of_labels
