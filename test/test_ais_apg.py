"""Segmenters with a decoder: one contract for all four, the geometry of tiles, and prompts derived from maps."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from scipy import ndimage
from segment_anything import SamPredictor
from skimage.segmentation import find_boundaries
from test_inference import draw
from test_watershed import cell_maps, random_maps, same_partition

from micro_sam.core.errors import (
    DecoderMissingError,
    InvalidInputError,
    ModelError,
    NotInitializedError,
    UnsupportedError,
)
from micro_sam.core.normalize import to_image
from micro_sam.embeddings.encode import precompute_image_embeddings, set_precomputed
from micro_sam.models import prompting
from micro_sam.segmentation.ais import (
    MAP_NAMES,
    InstanceSegmentationWithDecoder,
    TiledInstanceSegmentationWithDecoder,
    labels_to_records,
)
from micro_sam.segmentation.amg import AutomaticMaskGenerator, TiledAutomaticMaskGenerator
from micro_sam.segmentation.apg import (
    AutomaticPromptGenerator,
    TiledAutomaticPromptGenerator,
    point_prompts_from_maps,
)
from micro_sam.segmentation.factory import get_instance_segmentation_generator, get_segmentation_mode
from micro_sam.segmentation.planes import is_blank, select_plane

SHAPE = (128, 160)
TILES = {"tile_shape": (64, 80), "halo": (16, 16)}


class QuickEncoder(torch.nn.Module):
    """Random linear features of patches; the first one is the brightness."""

    img_size = 256

    def __init__(self):
        super().__init__()
        weight = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.05
        weight[0] = 1 / weight[0].numel()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return F.conv2d(x, self.weight, stride=16)


class QuickDecoder:
    """Bright patches are objects. Notes the number of images in each call, and fails on demand."""

    def __init__(self, n_maps=3):
        self.calls, self.fails, self.n_maps = [], False, n_maps

    def __call__(self, features, input_size, original_size):
        if self.fails:
            raise RuntimeError("out of memory")
        self.calls.append(len(features))
        foreground = torch.sigmoid(4 * features[:, :1] + 3)
        maps = torch.cat([foreground, 1 - foreground, (1 - foreground) ** 2, foreground], dim=1)[:, :self.n_maps]
        maps = F.interpolate(maps, (256, 256), mode="bilinear")[..., :input_size[0], :input_size[1]]
        return F.interpolate(maps, tuple(original_size), mode="bilinear")


@pytest.fixture
def predictor(tiny_sam):
    """The tiny model with a quick encoder; its mask decoder has random weights."""
    sam = copy.copy(tiny_sam)
    sam._modules = {**tiny_sam._modules, "image_encoder": QuickEncoder()}
    return SamPredictor(sam)


@pytest.fixture
def decoder():
    return QuickDecoder()


@pytest.fixture
def volume(cells_image):
    return np.stack([cells_image[::-1], cells_image, cells_image[:, ::-1]])


def embed(predictor, image, **kwargs):
    return precompute_image_embeddings(predictor, image, verbose=False, **kwargs)


def assert_same_maps(a, b, atol=0.0):
    for name in MAP_NAMES:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol)


def copied(state):
    return {name: state[name].copy() for name in MAP_NAMES}


class SegmenterContract:
    """What every segmenter with a decoder does; subclasses name the class and options that find several objects."""

    segmenter_class = None
    tiles: dict = {}
    options: dict = {}
    dtype = np.uint64

    @pytest.fixture
    def make(self, predictor, decoder):
        return lambda: self.segmenter_class(predictor, decoder)

    @pytest.fixture
    def segmenter(self, make, cells_image):
        segmenter = make()
        segmenter.initialize(cells_image, **self.tiles)
        return segmenter

    def test_not_initialized(self, make, segmenter):
        segmenter.generate(**self.options)
        segmenter.clear_state()
        for empty in (make(), segmenter):
            assert not empty.is_initialized
            with pytest.raises(NotInitializedError, match=self.segmenter_class.__name__):
                empty.generate()
            with pytest.raises(NotInitializedError, match="initialize"):
                empty.get_state()

    def test_generate_is_repeatable_and_changes_nothing(self, predictor, make, cells_image):
        image = cells_image.copy()
        image.flags.writeable = False
        embeddings = embed(predictor, image, **self.tiles)
        tiles = embeddings["features"].values() if self.tiles else [embeddings["features"]]
        features = [np.array(tile) for tile in tiles]
        segmenter = make()
        segmenter.initialize(image, embeddings)
        before = copied(segmenter.get_state())
        labels = segmenter.generate(**self.options)
        assert labels.shape == SHAPE
        assert labels.dtype == self.dtype
        assert len(np.unique(labels)) > 4
        others = segmenter.generate(**{**self.options, "foreground_threshold": 0.9, "min_size": 60})
        assert (others != labels).any()
        np.testing.assert_array_equal(segmenter.generate(**self.options), labels)
        assert_same_maps(segmenter.get_state(), before)
        for tile, expected in zip(tiles, features, strict=True):
            np.testing.assert_array_equal(np.asarray(tile), expected)

    def test_state_moves_to_another_instance(self, make, segmenter):
        state, expected = segmenter.get_state(), segmenter.generate(**self.options)
        fresh = make()
        fresh.set_state({**state, "something": 1})
        assert fresh.is_initialized
        np.testing.assert_array_equal(fresh.generate(**self.options), expected)
        assert_same_maps(fresh.get_state(), state)
        with pytest.raises(InvalidInputError, match=r"lacks \['center_distances'\]"):
            fresh.set_state({name: value for name, value in state.items() if name != "center_distances"})
        with pytest.raises(InvalidInputError, match="one shape"):
            fresh.set_state({**state, "foreground": state["foreground"][1:]})
        np.testing.assert_array_equal(fresh.generate(**self.options), expected)

    @pytest.mark.parametrize("image", [
        np.full(SHAPE, 7, np.uint8), np.zeros(SHAPE, bool), np.tile(np.array([3, 200, 9], np.uint16), (*SHAPE, 1)),
    ])
    def test_constant_image_is_background(self, make, decoder, image):
        segmenter = make()
        segmenter.initialize(image, **self.tiles)
        assert decoder.calls == []
        assert all(segmenter.get_state()[name].shape == SHAPE for name in MAP_NAMES)
        labels = segmenter.generate(**self.options)
        assert labels.shape == SHAPE
        assert labels.dtype == self.dtype
        assert not labels.any()
        assert segmenter.generate(**self.options, output_mode="binary_mask") == []

    @pytest.mark.parametrize("convert", [
        lambda image: image.astype(np.uint16) * 257, lambda image: image.astype(np.float32) / 255,
        lambda image: image * 1e6 - 3e7, lambda image: image.astype(np.int32) - 100,
        lambda image: np.stack([image] * 3, axis=-1),
    ])
    def test_dtype_and_range_play_no_role(self, make, segmenter, cells_image, convert):
        other = make()
        other.initialize(convert(cells_image), **self.tiles)
        assert_same_maps(other.get_state(), segmenter.get_state(), atol=0.03)

    def test_binary_image(self, make, cells_image):
        segmenter = make()
        segmenter.initialize(cells_image > 60, **self.tiles)
        assert len(np.unique(segmenter.generate(**self.options))) > 3

    def test_records_agree_with_labels(self, segmenter):
        labels = segmenter.generate(**self.options)
        records = segmenter.generate(**self.options, output_mode="binary_mask")
        painted = np.zeros_like(labels)
        for record in records:
            mask = record["segmentation"]
            assert mask.dtype == bool
            assert not painted[mask].any()
            painted[mask] = record["seg_id"]
            y, x = np.nonzero(mask)
            assert record["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert record["area"] == mask.sum()
            assert record["crop_box"] == [0, 0, SHAPE[1], SHAPE[0]]
        np.testing.assert_array_equal(painted, labels)
        ids = [record["seg_id"] for record in records]
        assert ids == sorted(ids)
        with pytest.raises(InvalidInputError, match="'coco_rle'"):
            segmenter.generate(output_mode="coco_rle")

    def test_given_embeddings_equal_those_computed_here(self, predictor, make, segmenter, cells_image):
        embeddings = embed(predictor, cells_image, **self.tiles)
        for image in (cells_image, None):
            given = make()
            given.initialize(image, embeddings)
            assert_same_maps(given.get_state(), segmenter.get_state())
            np.testing.assert_array_equal(given.generate(**self.options), segmenter.generate(**self.options))

    def test_plane_of_a_stack(self, predictor, make, segmenter, volume):
        embeddings = embed(predictor, volume, ndim=3, **self.tiles)
        expected = segmenter.generate(**self.options)
        for image, given in ((volume, embeddings), (volume[1], embeddings), (None, embeddings), (volume, None)):
            plane = make()
            plane.initialize(image, given, i=1, **self.tiles)
            assert_same_maps(plane.get_state(), segmenter.get_state())
            np.testing.assert_array_equal(plane.generate(**self.options), expected)
            fresh = make()
            fresh.set_state(plane.get_state())
            np.testing.assert_array_equal(fresh.generate(**self.options), expected)
        with pytest.raises(InvalidInputError, match="stack"):
            make().initialize(volume[1], embeddings)
        with pytest.raises(InvalidInputError, match="i"):
            make().initialize(volume[1], embed(predictor, volume[1], **self.tiles), i=0)

    @pytest.mark.parametrize("i", [3, -1])
    @pytest.mark.parametrize("whole", [True, False])
    def test_plane_that_is_not_there(self, predictor, make, volume, i, whole):
        embeddings = embed(predictor, volume, ndim=3, **self.tiles)
        with pytest.raises(InvalidInputError, match="plane"):
            make().initialize(volume if whole else volume[0], embeddings, i=i)

    def test_embeddings_of_another_image_or_kind(self, predictor, segmenter, cells_image):
        before = copied(segmenter.get_state())
        embeddings = embed(predictor, cells_image, **self.tiles)
        for image in (cells_image[1:], cells_image.T, np.stack([cells_image] * 2)):
            with pytest.raises(InvalidInputError, match=r"embeddings are of an image of shape \(128, 160\)"):
                segmenter.initialize(image, embeddings)
        others = embed(predictor, cells_image, **({} if self.tiles else TILES))
        with pytest.raises(InvalidInputError, match="tiled"):
            segmenter.initialize(cells_image, others)
        assert_same_maps(segmenter.get_state(), before)

    def test_callbacks_count_to_the_total_whatever_verbose_says(self, predictor, make, cells_image):
        bars = []

        def update(n):
            bars[-1][1] += n

        for embeddings in (None, embed(predictor, cells_image, **self.tiles)):
            make().initialize(
                cells_image, embeddings, **self.tiles, verbose=False, pbar_update=update,
                pbar_init=lambda total, text: bars.append([total, 0, text]),
            )
        n = 4 if self.tiles else 1
        assert [bar[:2] for bar in bars] == [[n, n]] * 3
        assert ["decoder" in text for *_, text in bars] == [False, True, True]

    def test_cancelled_or_failed_initialize_leaves_the_old_state(self, make, decoder, segmenter, cells_image):
        before, labels = copied(segmenter.get_state()), segmenter.generate(**self.options)
        other = cells_image[::-1]
        n_steps = len(list(make().initialize_steps(other, **self.tiles)))
        for stop in range(1, n_steps):
            steps = segmenter.initialize_steps(other, **self.tiles)
            for _ in range(stop):
                next(steps)
            steps.close()
        decoder.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            segmenter.initialize(other, **self.tiles)
        with pytest.raises(InvalidInputError, match="NaN"):
            segmenter.initialize(np.where(other > 100, np.nan, other), **self.tiles)
        assert_same_maps(segmenter.get_state(), before)
        np.testing.assert_array_equal(segmenter.generate(**self.options), labels)
        decoder.fails = False
        segmenter.initialize(other, **self.tiles)
        assert (segmenter.get_state()["foreground"] != before["foreground"]).any()

    def test_image_in_the_predictor_plays_no_role(self, predictor, segmenter, cells_image):
        expected = segmenter.generate(**self.options)
        set_precomputed(predictor, embed(predictor, cells_image.T))
        np.testing.assert_array_equal(segmenter.generate(**self.options), expected)
        predictor.reset_image()
        np.testing.assert_array_equal(segmenter.generate(**self.options), expected)

    def test_decoder_that_is_missing_or_unfitting(self, predictor, cells_image):
        with pytest.raises(DecoderMissingError, match="amg"):
            self.segmenter_class(predictor, None)
        for n_maps in (2, 4):
            segmenter = self.segmenter_class(predictor, QuickDecoder(n_maps))
            with pytest.raises(ModelError, match=f"gives {n_maps}"):
                segmenter.initialize(cells_image, **self.tiles)
            assert not segmenter.is_initialized


class TestInstanceSegmentationWithDecoder(SegmenterContract):
    segmenter_class = InstanceSegmentationWithDecoder


class TestTiledInstanceSegmentationWithDecoder(SegmenterContract):
    segmenter_class = TiledInstanceSegmentationWithDecoder
    tiles = TILES


class TestAutomaticPromptGenerator(SegmenterContract):
    segmenter_class = AutomaticPromptGenerator
    options = {"min_size": 0}
    dtype = np.uint32


class TestTiledAutomaticPromptGenerator(SegmenterContract):
    segmenter_class = TiledAutomaticPromptGenerator
    options = {"min_size": 0}
    tiles = TILES
    dtype = np.uint32


# Tiles

@pytest.fixture
def tiled(predictor, decoder):
    return TiledInstanceSegmentationWithDecoder(predictor, decoder)


def decode_tile_by_tile(predictor, decoder, image, tile_shape, halo):
    """Maps (3, Y, X): each outer tile as an image of its own, of which the inner block is taken."""
    maps = np.full((3, *image.shape), np.nan, np.float32)
    for y0 in range(0, image.shape[0], tile_shape[0]):
        for x0 in range(0, image.shape[1], tile_shape[1]):
            top, left = max(y0 - halo[0], 0), max(x0 - halo[1], 0)
            y1, x1 = y0 + tile_shape[0], x0 + tile_shape[1]
            predictor.set_image(to_image(image[top:y1 + halo[0], left:x1 + halo[1]]))
            result = decoder(predictor.features, predictor.input_size, predictor.original_size)[0].numpy()
            target = maps[:, y0:y1, x0:x1]
            y, x = y0 - top, x0 - left
            target[...] = result[:, y:y + target.shape[1], x:x + target.shape[2]]
    return dict(zip(MAP_NAMES, maps))


def test_tiles_are_independent_of_their_batch(predictor, tiny_decoder, cells_image):
    image = cells_image[:100, :140]
    tiles = {"tile_shape": [50, 100], "halo": [10, 20]}  # the tiles on the right are ragged
    expected = decode_tile_by_tile(predictor, tiny_decoder, image, (50, 100), (10, 20))
    embeddings = embed(predictor, image, **tiles)
    for batch_size in (1, 3):
        segmenter = TiledInstanceSegmentationWithDecoder(predictor, tiny_decoder)
        segmenter.initialize(image, embeddings, batch_size=batch_size, **tiles)
        assert_same_maps(segmenter.get_state(), expected, atol=1e-5)
    assert np.ptp(expected["foreground"]) > 0.1


@pytest.mark.parametrize("shape", [(128, 160), (101, 87), (64, 150)])
@pytest.mark.parametrize(("tile_shape", "halo"), [((64, 80), (16, 16)), ((30, 47), (0, 9)), ((200, 50), (8, 0))])
def test_any_tiling_takes_inner_blocks(predictor, decoder, tiled, cells_image, shape, tile_shape, halo):
    image = cells_image[:shape[0], :shape[1]]
    expected = decode_tile_by_tile(predictor, decoder, image, tile_shape, halo)
    tiled.initialize(image, tile_shape=tile_shape, halo=halo, batch_size=4)
    assert_same_maps(tiled.get_state(), expected, atol=1e-5)


def test_one_tile_equals_plain(tiny_predictor, tiny_decoder, cells_image):
    plain = InstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder)
    plain.initialize(cells_image)
    segmenter = TiledInstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder)
    segmenter.initialize(cells_image, tile_shape=SHAPE, halo=(0, 0))
    assert_same_maps(segmenter.get_state(), plain.get_state())
    thresholds = {name: float(np.median(plain.get_state()[name])) for name in MAP_NAMES}
    options = {f"{name.removesuffix('s')}_threshold": value for name, value in thresholds.items()}
    labels = plain.generate(**options)
    assert len(np.unique(labels)) > 3
    np.testing.assert_array_equal(segmenter.generate(**options), labels)


def test_tiles_of_equal_shape_share_a_call(predictor, decoder, tiled, cells_image):
    tiled.initialize(cells_image, **TILES, batch_size=3)
    assert decoder.calls == [3, 1]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_must_be_positive(predictor, tiled, cells_image, batch_size):
    with pytest.raises(InvalidInputError, match="batch_size"):
        tiled.initialize(cells_image, embed(predictor, cells_image, **TILES), batch_size=batch_size)


def test_blank_tiles_are_skipped(predictor, decoder, tiled, cells_image):
    image = cells_image.copy()
    image[:, 80:] = 30
    image[64:, 60:] = 30
    tiled.initialize(image, **TILES)
    assert sum(decoder.calls) == 4, "all tiles see something in their halo"
    decoder.calls.clear()
    tiled.initialize(image, tile_shape=(64, 80), halo=(0, 0))
    assert sum(decoder.calls) == 2
    foreground = tiled.get_state()["foreground"]
    assert not foreground[:, 80:].any()
    assert foreground[:, :80].all()
    colour = np.stack([image, np.full_like(image, 9), np.full_like(image, 100)], axis=-1)
    decoder.calls.clear()
    tiled.initialize(colour, tile_shape=(64, 80), halo=(0, 0))
    assert sum(decoder.calls) == 2


def test_mask_selects_tiles(predictor, decoder, tiled, cells_image, volume):
    tiled.initialize(cells_image, **TILES)
    everything = copied(tiled.get_state())
    mask = np.zeros(SHAPE, np.uint8)
    mask[100, 140] = 9
    expected = {name: np.zeros(SHAPE, np.float32) for name in MAP_NAMES}
    for name in MAP_NAMES:
        expected[name][64:, 80:] = everything[name][64:, 80:]

    only_there = embed(predictor, cells_image, mask=mask, **TILES)
    assert list(only_there["features"]) == ["3"]
    complete = embed(predictor, cells_image, **TILES)
    for embeddings, given in ((None, mask), (None, mask > 0), (only_there, None), (complete, mask), (only_there, mask)):
        decoder.calls.clear()
        tiled.initialize(cells_image, embeddings, **TILES, mask=given, batch_size=2)
        assert decoder.calls == [1]
        assert_same_maps(tiled.get_state(), expected)

    masks = np.stack([np.zeros_like(mask), mask, np.ones_like(mask)])
    stack = embed(predictor, volume, ndim=3, mask=masks, **TILES)
    tiled.initialize(volume, stack, i=1)
    assert_same_maps(tiled.get_state(), expected)
    tiled.initialize(volume, stack, i=0)
    assert not tiled.get_state()["foreground"].any()
    tiled.initialize(volume, embed(predictor, volume, ndim=3, **TILES), i=1, mask=masks)
    assert_same_maps(tiled.get_state(), expected)
    with pytest.raises(InvalidInputError, match=r"shape \(128, 160\)"):
        tiled.initialize(cells_image, complete, mask=mask[1:])


@pytest.mark.parametrize("segmenter_class", [TiledInstanceSegmentationWithDecoder, TiledAutomaticPromptGenerator])
def test_mask_that_touches_no_tile_gives_background(predictor, decoder, cells_image, segmenter_class):
    segmenter, mask = segmenter_class(predictor, decoder), np.zeros(SHAPE, bool)
    for embeddings in (None, embed(predictor, cells_image, mask=mask, **TILES), embed(predictor, cells_image, **TILES)):
        segmenter.initialize(cells_image, embeddings, **TILES, mask=mask)
        labels = segmenter.generate()
        assert labels.shape == SHAPE
        assert not labels.any()
    assert decoder.calls == []


def test_tiling_that_is_missing_or_another_one(predictor, tiled, cells_image):
    with pytest.raises(InvalidInputError, match="tile_shape"):
        tiled.initialize(cells_image)
    embeddings = embed(predictor, cells_image, **TILES)
    tiled.initialize(cells_image, embeddings, tile_shape=[64, 80], halo=[16, 16])
    for wrong in ({"tile_shape": (80, 64)}, {"halo": (16, 8)}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            tiled.initialize(cells_image, embeddings, **wrong)
    tiled.initialize(cells_image, tile_shape=(64, 80))
    expected = copied(tiled.get_state())
    tiled.initialize(cells_image, tile_shape=(64, 80), halo=(8, 10))
    assert_same_maps(tiled.get_state(), expected)


# Watershed on given maps

@pytest.fixture(scope="module")
def cells():
    center, boundary, foreground = cell_maps()
    return {"center_distances": center, "boundary_distances": boundary, "foreground": foreground}


@pytest.fixture
def with_cells(predictor, decoder, cells):
    """A segmenter that remembers drawn cells."""
    segmenter = TiledInstanceSegmentationWithDecoder(predictor, decoder)
    segmenter.set_state(copied(cells))
    return segmenter


@pytest.mark.parametrize("options", [{}, {"distance_smoothing": 0, "foreground_smoothing": 0, "min_size": 30}])
def test_blocks_equal_whole_and_leave_the_maps(with_cells, options):
    before = copied(with_cells.get_state())
    expected = with_cells.generate(**options)
    labels = with_cells.generate(**options, tile_shape=[100, 90], halo=[60, 60], n_threads=3)
    assert (labels != expected).sum() <= 2
    assert len(np.unique(expected)) > 80
    assert_same_maps(with_cells.get_state(), before)
    np.testing.assert_array_equal(with_cells.generate(**options), expected)


def test_every_option_reaches_the_watershed(with_cells):
    plain = with_cells.generate()
    for option, value in {
        "center_distance_threshold": 0.2, "boundary_distance_threshold": 0.2, "foreground_threshold": 0.8,
        "foreground_smoothing": 4.0, "distance_smoothing": 5.0, "min_size": 400,
    }.items():
        changed = with_cells.generate(**{option: value})
        blocks = with_cells.generate(**{option: value}, tile_shape=(128, 128), halo=(64, 64), n_threads=2)
        assert (changed != plain).any(), option
        assert same_partition(changed, blocks) > 0.99, option


@pytest.mark.parametrize("blocks", [{}, {"tile_shape": (128, 128), "halo": (40, 40), "optimize_memory": True}])
def test_labels_go_where_they_are_asked_for(with_cells, tmp_path, blocks):
    expected = with_cells.generate(**blocks)
    for output in (
        np.full(expected.shape, 9, np.int32),
        zarr.create_array(tmp_path / "labels.zarr", shape=expected.shape, chunks=(64, 64), dtype="uint16"),
    ):
        returned = with_cells.generate(**blocks, segmentation=output)
        assert returned is output
        assert same_partition(output[...], expected) > 0.999
        records = with_cells.generate(**blocks, segmentation=output, output_mode="binary_mask")
        assert [record["seg_id"] for record in records] == np.unique(expected)[1:].tolist()
    for unfit in (np.zeros((3, 3), np.uint32), np.zeros(expected.shape, np.float32)):
        with pytest.raises(InvalidInputError, match="output `segmentation`"):
            with_cells.generate(**blocks, segmentation=unfit)


@pytest.mark.parametrize("blocks", [{}, {"tile_shape": (128, 128), "halo": (40, 40)}])
def test_labels_that_do_not_fit_the_output_are_no_other_labels(with_cells, blocks):
    state = {name: np.tile(value, (2, 2)) for name, value in with_cells.get_state().items() if name in MAP_NAMES}
    with_cells.set_state(state)
    assert with_cells.generate().max() > 255
    with pytest.raises(InvalidInputError, match="uint8"):
        with_cells.generate(**blocks, segmentation=np.zeros(state["foreground"].shape, np.uint8))


def test_arguments_of_the_watershed_that_do_not_fit(with_cells):
    with pytest.raises(InvalidInputError, match="optimize_memory.*tile_shape"):
        with_cells.generate(optimize_memory=True)
    with pytest.raises(InvalidInputError, match="halo"):
        with_cells.generate(tile_shape=(64, 64))


def test_records_of_a_volume_and_of_odd_labels():
    labels = np.zeros((12, 30, 40), np.uint16)
    labels[5:9, 10:20, 7:31] = 300
    labels[0, 29, 39] = 7
    first, second = labels_to_records(labels)
    assert (first["seg_id"], second["seg_id"]) == (7, 300)
    assert first["bbox"] == [39, 29, 0, 1, 1, 1]
    assert second["bbox"] == [7, 10, 5, 24, 10, 4]
    assert second["crop_box"] == [0, 0, 0, 40, 30, 12]
    assert second["area"] == 4 * 10 * 24
    np.testing.assert_array_equal(second["segmentation"], labels == 300)
    left, right = labels_to_records(np.repeat([[4, 9]], 3, axis=1))
    assert (left["bbox"], right["bbox"]) == ([0, 0, 3, 1], [3, 0, 3, 1])
    assert labels_to_records(np.zeros((5, 6), int)) == []


# Planes

@pytest.mark.parametrize(("shape", "plane_shape", "ndim", "expected"), [
    ((128, 160), (128, 160), 2, (128, 160)),
    ((9, 128, 160), (128, 160), 2, (128, 160)),
    ((9, 128, 160), None, 2, (128, 160)),
    ((9, 128, 160, 3), (128, 160), 2, (128, 160, 3)),
    ((128, 160, 3), (128, 160), 2, (128, 160, 3)),
    ((128, 160, 3), None, 2, (128, 160, 3)),
    ((128, 160, 3), None, 3, (160, 3)),
    ((64, 64, 64), (64, 64), 2, (64, 64)),
    ((64, 64, 64, 3), (64, 64), 2, (64, 64, 3)),
])
def test_plane_is_found_in_what_was_passed(shape, plane_shape, ndim, expected):
    image = np.random.default_rng(0).random(shape)
    plane = select_plane(image, 2, plane_shape, ndim)
    assert plane.shape == expected
    np.testing.assert_array_equal(plane, image if shape == expected else image[2])
    assert select_plane(image, None, plane_shape, ndim) is image


def test_blank_is_one_value_per_channel():
    image = np.tile(np.array([5, 0, 77], np.uint8), (6, 7, 1))
    assert is_blank(image)
    assert is_blank(image[..., 0])
    image[3, 4, 1] = 1
    assert not is_blank(image)
    assert not is_blank(np.full((4, 4), np.nan))


# Points from maps

def maps_of(objects):
    """Maps in which the distances are 0 in objects, where the foreground is 1."""
    foreground = objects.astype(np.float32)
    return foreground, 1 - foreground, 1 - foreground


def test_large_square_gets_its_middle():
    objects = np.zeros((1040, 1060), bool)
    objects[20:1020, 30:1030] = True
    prompts = point_prompts_from_maps(*maps_of(objects))
    assert prompts["points"].shape == (1, 1, 2)
    assert prompts["points"].dtype.kind == "i"
    np.testing.assert_array_equal(prompts["point_labels"], [[1]])
    assert np.abs(prompts["points"][0, 0] - [529.5, 519.5]).max() <= 0.5


def test_component_on_the_rim_gets_a_point_inside_itself():
    objects = np.zeros((50, 60), bool)
    objects[0, 20:30] = objects[10:20, 59] = objects[49, 0] = True
    objects[20:31, 10:21] = True
    points = point_prompts_from_maps(*maps_of(objects))["points"][:, 0]
    components, n = ndimage.label(objects)
    assert sorted(components[y, x] for x, y in points) == list(range(1, n + 1))
    assert [15, 25] in points.tolist()


def test_diagonal_components_are_separate():
    objects = np.zeros((40, 40), bool)
    objects[5:15, 5:15] = objects[15:25, 15:25] = True
    assert len(point_prompts_from_maps(*maps_of(objects))["points"]) == 2
    objects[14, 15] = True
    assert len(point_prompts_from_maps(*maps_of(objects))["points"]) == 1


def test_limits_of_the_thresholds():
    objects = np.zeros((40, 40), bool)
    objects[10:20, 10:20] = True
    foreground, center, boundary = maps_of(objects)
    foreground *= 0.25
    assert point_prompts_from_maps(foreground, center, boundary, foreground_threshold=0.25) is not None
    assert point_prompts_from_maps(foreground, center, boundary, foreground_threshold=0.26) is None
    for which in (1, 2):
        maps = [foreground, center, boundary]
        maps[which] = np.full_like(center, 0.5)
        assert point_prompts_from_maps(*maps, foreground_threshold=0.2) is None
        names = ("", "center_distance_threshold", "boundary_distance_threshold")
        assert point_prompts_from_maps(*maps, 0.2, **{names[which]: 0.51}) is not None


def test_every_component_gets_its_deepest_point():
    center, boundary, foreground = random_maps()
    points = point_prompts_from_maps(foreground, center, boundary)["points"][:, 0]
    components, n = ndimage.label((center < 0.5) & (boundary < 0.5) & (foreground >= 0.5))
    outside = np.pad(find_boundaries(components, mode="outer")[1:-1, 1:-1], 1, constant_values=True)
    depth = ndimage.distance_transform_edt(~outside)
    assert n > 20
    assert sorted(components[y, x] for x, y in points) == list(range(1, n + 1))
    for x, y in points:
        assert depth[y, x] == pytest.approx(depth[components == components[y, x]].max(), abs=1e-4)


# Prompts: the masks are drawn (discs around points, boxes in boxes) instead of predicted.

CENTERS = {(100, 220): [(30, 180), (70, 40), (50, 110), (88, 205)], (128, 160): [(30, 130), (100, 30), (64, 82)]}


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(prompting, "predict_low_res", draw)


def disc(shape, center, radius):
    y, x = np.ogrid[:shape[0], :shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def noise(shape, seed=0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape, dtype=np.float32), 6)


def prompted(predictor, shape, tiles, centers=None):
    """A generator that remembers small objects at the centres, and embeddings of noise."""
    segmenter_class = TiledAutomaticPromptGenerator if tiles else AutomaticPromptGenerator
    segmenter = segmenter_class(predictor, QuickDecoder())
    objects = np.zeros(shape, bool)
    for center in CENTERS[shape] if centers is None else centers:
        objects |= disc(shape, center, 4)
    state = dict(zip(MAP_NAMES, maps_of(objects)))
    segmenter.set_state({**state, "image_embeddings": embed(predictor, noise(shape), **tiles)})
    return segmenter


both = pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])


@both
@pytest.mark.parametrize("shape", CENTERS)
def test_each_object_gets_the_mask_of_its_point(predictor, drawn, tiles, shape):
    labels = prompted(predictor, shape, tiles).generate()
    assert labels.max() == len(CENTERS[shape])
    for center in CENTERS[shape]:
        assert iou(labels == labels[center], disc(shape, center, 8)) > 0.85


@both
@pytest.mark.parametrize("shape", CENTERS)
def test_refinement_puts_boxes_where_the_masks_are(predictor, drawn, tiles, shape):
    labels = prompted(predictor, shape, tiles).generate(refine_with_box_prompts=True)
    assert labels.max() == len(CENTERS[shape])
    for y, x in CENTERS[shape]:
        square = np.zeros(shape, bool)
        square[y - 8:y + 9, x - 8:x + 9] = True
        assert iou(labels == labels[y, x], square) > 0.85


@both
def test_mask_threshold_is_honoured(predictor, drawn, monkeypatch, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    canvas_pixel = (96 if tiles else 160) / 256  # drawn logits are distances in pixels of the canvas
    for threshold in (0, 4, None):
        labels = segmenter.generate(mask_threshold=threshold)
        radius = 8 - (threshold or 0) * canvas_pixel
        for center in CENTERS[SHAPE]:
            assert (labels == labels[center]).sum() == pytest.approx(np.pi * radius**2, rel=0.15)
    monkeypatch.setattr(prompting, "otsu_thresholds", lambda logits: torch.full((len(logits),), 4.0))
    np.testing.assert_array_equal(segmenter.generate(mask_threshold="auto"), segmenter.generate(mask_threshold=4))
    with pytest.raises(InvalidInputError, match="mask_threshold"):
        segmenter.generate(mask_threshold="otsu")


@pytest.mark.parametrize("options", [{}, {"refine_with_box_prompts": True}, {"multimasking": True}])
def test_merging_tile_by_tile_gives_the_same_foreground(predictor, drawn, options):
    centers = [*CENTERS[SHAPE], (60, 20), (20, 79), (90, 150), (66, 140)]
    segmenter = prompted(predictor, SHAPE, TILES, centers)
    expected = segmenter.generate(**options)
    labels = segmenter.generate(**options, optimize_memory=True)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels > 0, expected > 0)
    assert len(np.unique(labels)) == len(centers) + 1
    assert same_partition(labels, expected) == same_partition(expected, labels) == 1
    records = segmenter.generate(**options, optimize_memory=True, output_mode="binary_mask")
    assert len(records) == len(centers)
    assert not segmenter.generate(**options, optimize_memory=True, min_size=1000).any()


@both
def test_best_of_three_masks_is_taken(predictor, monkeypatch, tiles):
    def draw_three(*args, multimask_output=True, **kwargs):
        logits, scores = draw(*args, **kwargs) if multimask_output else draw(*args, multimask_output=False, **kwargs)
        if multimask_output:
            logits = logits - torch.tensor([0.0, 6, 3])[:, None, None]
            scores = torch.tensor([[0.5, 0.9, 0.7]]).expand(len(logits), -1)
        return logits, scores

    def adapted(predictor, points, labels, boxes, multimask_output):
        return draw_three(predictor, points, labels, boxes, multimask_output=multimask_output)

    monkeypatch.setattr(prompting, "predict_low_res", adapted)
    segmenter = prompted(predictor, SHAPE, tiles)
    radius = 8 - 6 * (96 if tiles else 160) / 256
    for multimasking, expected in ((False, 8), (True, radius)):
        labels = segmenter.generate(multimasking=multimasking)
        for center in CENTERS[SHAPE]:
            assert (labels == labels[center]).sum() == pytest.approx(np.pi * expected**2, rel=0.2)


@both
def test_duplicates_and_small_objects_are_dropped(predictor, drawn, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)

    def count(**options):
        boxes = np.array([[10, 10, 50, 50], [10, 18, 50, 58], [60, 10, 72, 22]])  # the first two overlap by 2/3
        labels = segmenter.generate(prompt_function=lambda *maps, **thresholds: {"boxes": boxes}, **options)
        return len(np.unique(labels)) - 1

    assert count() == 3
    assert count(nms_threshold=0.5) == 2
    assert count(nms_threshold=0.72) == 3
    assert count(nms_threshold=0.72, intersection_over_min=True) == 2
    assert count(min_size=250) == 2
    assert count(min_size=5000) == 0


@both
def test_batch_size_plays_no_role(predictor, drawn, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    np.testing.assert_array_equal(segmenter.generate(batch_size=1), segmenter.generate())
    with pytest.raises(InvalidInputError, match="batch_size"):
        segmenter.generate(batch_size=0)


@both
def test_masks_come_from_the_remembered_embeddings(predictor, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    labels = segmenter.generate(min_size=0)
    embeddings = embed(predictor, noise(SHAPE, seed=1), **tiles)
    np.testing.assert_array_equal(segmenter.generate(min_size=0), labels)
    segmenter.set_state({**segmenter.get_state(), "image_embeddings": embeddings})
    assert (segmenter.generate(min_size=0) != labels).any(), "else the comparison shows nothing"


@both
def test_state_without_embeddings(predictor, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    expected, state = segmenter.generate(min_size=0), copied(segmenter.get_state())
    predictor.reset_image()
    segmenter.set_state(state)
    with pytest.raises(NotInitializedError, match="image_embeddings"):
        segmenter.generate()
    set_precomputed(predictor, embed(predictor, noise((50, 60))))
    segmenter.set_state(state)
    with pytest.raises(NotInitializedError, match="image_embeddings"):
        segmenter.generate()
    if not tiles:
        set_precomputed(predictor, embed(predictor, noise(SHAPE)))
        segmenter.set_state(state)
        predictor.set_image(np.zeros((50, 60, 3), np.uint8))
        np.testing.assert_array_equal(segmenter.generate(min_size=0), expected)


@both
def test_prompt_function_gets_maps_and_thresholds(predictor, drawn, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    state, seen = segmenter.get_state(), []
    thresholds = {
        "foreground_threshold": 0.1, "center_distance_threshold": 0.2, "boundary_distance_threshold": 0.3
    }

    def note(maps, given):
        for name, value in zip(MAP_NAMES, maps):
            np.testing.assert_array_equal(value, state[name])
        assert given == thresholds
        seen.append(maps)
        return {"points": np.array([[[130, 30]]]), "point_labels": np.array([[1]])}

    def by_keyword(*, foreground_threshold, boundary_distance_threshold, boundary_distances, foreground,
                   center_distances, center_distance_threshold):
        return note((foreground, center_distances, boundary_distances), {
            "foreground_threshold": foreground_threshold, "center_distance_threshold": center_distance_threshold,
            "boundary_distance_threshold": boundary_distance_threshold,
        })

    def by_position(a, b, c, foreground_threshold, center_distance_threshold, boundary_distance_threshold):
        return by_keyword(
            foreground=a, center_distances=b, boundary_distances=c, foreground_threshold=foreground_threshold,
            center_distance_threshold=center_distance_threshold,
            boundary_distance_threshold=boundary_distance_threshold,
        )

    functions = [
        by_keyword, by_position,
        lambda **all_: note([all_.pop(name) for name in MAP_NAMES], all_),
        lambda *maps, **rest: note(maps or [rest.pop(name) for name in MAP_NAMES], rest),
    ]
    for function in functions:
        labels = segmenter.generate(prompt_function=function, **thresholds)
        assert iou(labels > 0, disc(SHAPE, (30, 130), 8)) > 0.85
    assert len(seen) == len(functions)


@both
@pytest.mark.parametrize("function", [
    lambda a, b, c, **thresholds: point_prompts_from_maps(a, b, c, **thresholds),
    lambda foreground, center_distances, boundary_distances, /, **thresholds: point_prompts_from_maps(
        foreground, center_distances, boundary_distances, **thresholds),
], ids=["other names", "positional only"])
def test_prompt_function_with_positional_maps_and_keyword_thresholds(predictor, drawn, tiles, function):
    segmenter = prompted(predictor, SHAPE, tiles)
    np.testing.assert_array_equal(segmenter.generate(prompt_function=function), segmenter.generate())


@both
@pytest.mark.parametrize("prompts", [
    None, {"boxes": np.zeros((0, 4))}, {"points": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))},
])
@pytest.mark.parametrize("refine", [False, True])
def test_no_prompts_give_background(predictor, tiles, prompts, refine):
    segmenter = prompted(predictor, SHAPE, tiles)
    options = {"prompt_function": lambda *maps, **thresholds: prompts, "refine_with_box_prompts": refine}
    for memory in [{}, {"optimize_memory": True}] if tiles else [{}]:
        labels = segmenter.generate(**options, **memory)
        assert labels.shape == SHAPE
        assert labels.dtype == np.uint32
        assert not labels.any()
        assert segmenter.generate(**options, **memory, output_mode="binary_mask") == []


@both
def test_prompt_function_that_does_not_fit(predictor, drawn, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    before = copied(segmenter.get_state())

    def generate(prompts):
        return segmenter.generate(prompt_function=lambda *maps, **thresholds: prompts)

    with pytest.raises(InvalidInputError, match="'labels'"):
        generate({"points": np.zeros((1, 1, 2)), "labels": np.ones((1, 1))})
    with pytest.raises(InvalidInputError, match="point_labels"):
        generate({"points": np.zeros((1, 1, 2))})
    with pytest.raises(InvalidInputError, match="no prompts"):
        generate({})

    def careless(foreground, center_distances, boundary_distances, **thresholds):
        foreground[foreground > 0.5] = 0

    with pytest.raises(ValueError, match="read-only"):
        segmenter.generate(prompt_function=careless)
    assert_same_maps(segmenter.get_state(), before)


def test_mask_prompts_are_refused_with_tiles_and_used_without(predictor):
    box = np.array([[110, 10, 150, 50]])
    logits = np.full((1, 1, 64, 64), 20, np.float32)

    def with_masks(*maps, **thresholds):
        return {"boxes": box, "logits_masks": torch.from_numpy(logits)}

    def without_masks(*maps, **thresholds):
        return {"boxes": box}

    plain = prompted(predictor, SHAPE, {})
    labels = plain.generate(min_size=0, prompt_function=with_masks)
    assert (labels != plain.generate(min_size=0, prompt_function=without_masks)).any()
    with pytest.raises(UnsupportedError, match="[Mm]ask prompts"):
        prompted(predictor, SHAPE, TILES).generate(min_size=0, prompt_function=with_masks)


@both
def test_generate_reports_its_steps_and_can_be_cancelled(predictor, drawn, tiles):
    segmenter = prompted(predictor, SHAPE, tiles)
    expected = segmenter.generate()
    steps = list(segmenter.generate_steps(batch_size=1))
    assert steps[0].done == 0
    assert steps[-1].done == steps[-1].total == len(CENTERS[SHAPE])
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    cancelled = segmenter.generate_steps(batch_size=1)
    next(cancelled)
    next(cancelled)
    cancelled.close()
    np.testing.assert_array_equal(segmenter.generate(), expected)


# Factory

@pytest.mark.parametrize(("mode", "is_tiled", "has_decoder", "expected"), [
    (None, False, True, InstanceSegmentationWithDecoder),
    (None, True, True, TiledInstanceSegmentationWithDecoder),
    ("auto", False, False, AutomaticMaskGenerator),
    (None, True, False, TiledAutomaticMaskGenerator),
    ("AIS", False, True, InstanceSegmentationWithDecoder),
    ("Apg", False, True, AutomaticPromptGenerator),
    ("apg", True, True, TiledAutomaticPromptGenerator),
    ("AMG", False, True, AutomaticMaskGenerator),
    ("amg", True, True, TiledAutomaticMaskGenerator),
])
def test_class_of_a_mode(predictor, decoder, mode, is_tiled, has_decoder, expected):
    decoder = decoder if has_decoder else None
    segmenter = get_instance_segmentation_generator(predictor, is_tiled, decoder, segmentation_mode=mode)
    assert type(segmenter) is expected
    assert not segmenter.is_initialized


def test_arguments_of_the_class_are_passed_on(predictor, cells_image):
    segmenter = get_instance_segmentation_generator(predictor, False, points_per_side=2)
    segmenter.initialize(cells_image)
    assert len(np.unique(np.asarray(segmenter.get_state()["crop_list"][0]["points"]), axis=0)) == 4


def test_modes_that_are_not_possible(predictor):
    for mode in ("ais", "APG"):
        with pytest.raises(DecoderMissingError, match="amg"):
            get_instance_segmentation_generator(predictor, False, None, mode)
    with pytest.raises(InvalidInputError, match="Unknown segmentation mode 'amgg'.*amg"):
        get_segmentation_mode("amgg", True)
