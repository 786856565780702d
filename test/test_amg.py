"""Automatic mask generation: the same masks as segment_anything's generator, and tiles with drawn masks."""

import copy

import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import MaskDecoder
from segment_anything.utils.amg import rle_to_mask

from micro_sam.core import rle
from micro_sam.core.errors import InvalidInputError, NotInitializedError
from micro_sam.embeddings.encode import precompute_image_embeddings, set_precomputed
from micro_sam.models import prompting
from micro_sam.models.mask_upsampling import MaskUpsampler
from micro_sam.segmentation import amg
from micro_sam.segmentation.amg import AutomaticMaskGenerator, TiledAutomaticMaskGenerator

SHAPE = (150, 220)
TILES = {"tile_shape": (80, 120), "halo": (35, 35)}
LOOSE = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.95, "crop_nms_thresh": 0.95}


class LocalDecoder(MaskDecoder):
    """Random weights give masks all over the image; here they fade out around the point, and so are like objects."""

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        logits, ious = super().forward(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output
        )
        embedded = sparse_prompt_embeddings[:, 0] - self.positive
        width = image_pe.shape[-1]
        cells = torch.einsum("bc,chw->bhw", embedded, image_pe[0]).flatten(1).argmax(1)
        center = 4 * torch.stack([cells // width, cells % width], dim=-1) + 1.5
        grid = torch.stack(torch.meshgrid(*2 * [torch.arange(4.0 * width)], indexing="ij"), dim=-1)
        distance = (grid - center[:, None, None]).norm(dim=-1)
        fade = torch.stack([scale * (radius - distance) for radius, scale in ((5, 1), (8, 0.7), (13, 0.5))], dim=1)
        ragged = 20 * (logits - logits.mean(dim=(2, 3), keepdim=True))
        return fade + ragged, 0.5 + ious + 0.1 * torch.sin(cells[:, None])


@pytest.fixture(scope="module")
def local_sam(tiny_sam):
    sam = copy.deepcopy(tiny_sam)
    sam.mask_decoder.__class__ = LocalDecoder
    sam.mask_decoder.positive = sam.prompt_encoder.point_embeddings[1].weight[0]
    return sam


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    values = np.stack([ndimage.gaussian_filter(rng.random(SHAPE), 4) for _ in range(3)], axis=-1)
    values -= values.min(axis=(0, 1))
    return np.round(values / values.max(axis=(0, 1)) * 255).astype(np.uint8)


@pytest.fixture
def predictor(local_sam):
    return SamPredictor(local_sam)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def assert_equal_records(records, expected):
    assert len(records) == len(expected) > 5
    for record, other in zip(records, expected):
        assert iou(record["segmentation"], other["segmentation"]) > 0.99
        assert record["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert record["stability_score"] == pytest.approx(other["stability_score"], abs=2e-3)
        assert record["area"] == record["segmentation"].sum()
        np.testing.assert_allclose(record["point_coords"], other["point_coords"], rtol=1e-6)
        assert record["crop_box"] == other["crop_box"]
        rows, columns = np.nonzero(record["segmentation"])
        x, y, width, height = record["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(("options", "quantiles", "nms"), [
    ({"points_per_side": 8}, (0.3, 0.2), 0.7),
    ({"points_per_side": 8, "stability_score_offset": 0.3}, (0.6, 0.5), 0.95),
    ({"points_per_side": 6, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}, (0.1, 0.1), 0.9),
    ({"points_per_side": None, "point_grids": [np.random.default_rng(0).random((30, 2))]}, (0.2, 0.2), 0.9),
])
def test_masks_are_those_of_segment_anything(local_sam, predictor, image, options, quantiles, nms):
    segmenter = AutomaticMaskGenerator(predictor, points_per_batch=10, **options)
    segmenter.initialize(image)
    state = segmenter.get_state()
    thresholds = [
        float(np.quantile(np.concatenate([np.asarray(crop[key]) for crop in state["crop_list"]]), quantile))
        for key, quantile in zip(("iou_preds", "stability_score"), quantiles)
    ]
    # Halfway between two candidates, so that rounding cannot decide.
    arguments = {"pred_iou_thresh": thresholds[0] + 1e-6, "stability_score_thresh": thresholds[1] + 1e-6}
    arguments |= {"box_nms_thresh": nms, "crop_nms_thresh": nms}
    records = segmenter.generate(**arguments, output_mode="binary_mask")
    reference = SamAutomaticMaskGenerator(local_sam, points_per_batch=7, **arguments, **options)
    assert_equal_records(records, reference.generate(image))


def test_predicted_masks_in_state_are_those_of_the_predictor(local_sam, predictor, image):
    segmenter = AutomaticMaskGenerator(predictor, points_per_side=3)
    segmenter.initialize(image)
    crop = segmenter.crop_list[0]
    other = SamPredictor(local_sam)
    other.set_image(image)
    for k, point in enumerate(crop["points"][::3]):
        logits, scores, _ = other.predict(point[None].numpy(), np.ones(1), multimask_output=True, return_logits=True)
        np.testing.assert_allclose(crop["iou_preds"][3 * k:3 * k + 3], scores, atol=1e-5)
        for n, logit in enumerate(logits):
            mask = rle_to_mask(crop["rles"][3 * k + n])
            clear = np.abs(logit) > 1e-3
            np.testing.assert_array_equal(mask[clear], (logit > 0)[clear])
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), x.max(), y.max()] if mask.any() else [0, 0, 0, 0]
            assert crop["boxes"][3 * k + n].tolist() == box


class MaskGeneratorContract:
    """What holds with and without tiles."""

    def create(self, predictor, **options):
        raise NotImplementedError

    tiling: dict = {}

    @pytest.fixture
    def segmenter(self, predictor, image):
        segmenter = self.create(predictor, points_per_side=4)
        segmenter.initialize(image, **self.tiling)
        return segmenter

    def test_needs_initialization(self, predictor):
        segmenter = self.create(predictor)
        assert not segmenter.is_initialized
        for call in (segmenter.generate, segmenter.get_state, lambda: segmenter.crop_boxes,
                     lambda: segmenter.crop_list, lambda: segmenter.original_size):
            with pytest.raises(NotInitializedError, match="Call initialize"):
                call()

    def test_generate_repeats_itself_and_keeps_the_state(self, segmenter):
        before = segmenter.get_state()
        first = segmenter.generate(**LOOSE)
        assert first.dtype == np.uint32
        assert first.shape == SHAPE
        assert first.max() > 2
        segmenter.generate(pred_iou_thresh=0.02, stability_score_thresh=0.3, min_mask_region_area=20)
        np.testing.assert_array_equal(segmenter.generate(**LOOSE), first)
        assert_same_state(segmenter.get_state(), before)

    def test_state_moves_to_another_generator(self, segmenter, predictor):
        state = segmenter.get_state()
        other = self.create(predictor)
        other.set_state(state)
        predictor.reset_image()
        for options in (LOOSE, {"pred_iou_thresh": 0.01, "stability_score_thresh": 0.2, "box_nms_thresh": 0.5}):
            np.testing.assert_array_equal(other.generate(**options), segmenter.generate(**options))
        assert_same_state(other.get_state(), state)
        assert other.original_size == SHAPE
        other.clear_state()
        assert not other.is_initialized

    def test_embeddings_can_be_given(self, segmenter, predictor, local_sam, image):
        embeddings = precompute_image_embeddings(SamPredictor(local_sam), image, ndim=2, verbose=False, **self.tiling)
        other = self.create(predictor, points_per_side=4)
        other.initialize(image, embeddings)
        np.testing.assert_array_equal(other.generate(**LOOSE), segmenter.generate(**LOOSE))

    def test_plane_or_whole_stack_may_be_passed(self, segmenter, predictor, image):
        stack = np.stack([image[::-1], image])
        embeddings = precompute_image_embeddings(predictor, stack, ndim=3, verbose=False, **self.tiling)
        for given in (stack, image):  # 02-W25
            other = self.create(predictor, points_per_side=4)
            other.initialize(given, embeddings, i=1)
            assert other.original_size == SHAPE
            np.testing.assert_array_equal(other.generate(**LOOSE), segmenter.generate(**LOOSE))

    def test_output_modes_agree(self, segmenter):
        masks = segmenter.generate(**LOOSE, output_mode="binary_mask")
        runs = segmenter.generate(**LOOSE, output_mode="rle")
        strings = segmenter.generate(**LOOSE, output_mode="coco_rle")  # 02-W22: without pycocotools
        assert len(masks) == len(runs) == len(strings) > 5
        for mask, run, string in zip(masks, runs, strings):
            np.testing.assert_array_equal(rle_to_mask(run["segmentation"]), mask["segmentation"])
            assert isinstance(string["segmentation"]["counts"], str)
            assert {k: v for k, v in run.items() if k != "segmentation"} == {
                k: v for k, v in mask.items() if k != "segmentation"
            }
        with pytest.raises(InvalidInputError, match="output_mode"):
            segmenter.generate(output_mode="masks")

    def test_labels_are_painted_smallest_last(self, segmenter):
        expected = np.zeros(SHAPE, dtype=int)
        records = segmenter.generate(**LOOSE, output_mode="binary_mask")
        for record in sorted(records, key=lambda r: -r["area"]):
            expected[record["segmentation"]] = len(records) + 1 if expected.max() == 0 else expected.max() + 1
        labels = segmenter.generate(**LOOSE, with_background=False)
        np.testing.assert_array_equal(labels > 0, expected > 0)
        pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1]  # each label lies within one mask

    def test_nothing_passes(self, segmenter):
        assert not segmenter.generate(pred_iou_thresh=10).any()
        assert segmenter.generate(pred_iou_thresh=10, output_mode="binary_mask") == []

    def test_constant_image_gives_nothing(self, predictor):
        segmenter = self.create(predictor, points_per_side=2)
        segmenter.initialize(np.full(SHAPE, 7, dtype=np.uint16), **self.tiling)
        assert segmenter.crop_list == []
        assert not segmenter.generate(**LOOSE).any()
        assert segmenter.generate(**LOOSE).shape == SHAPE

    def test_progress_reaches_callbacks_and_cancelling_keeps_the_old_state(self, segmenter, predictor, image):
        calls = []
        segmenter.initialize(
            image, **self.tiling, pbar_init=lambda total, text: calls.append([total]),
            pbar_update=lambda n: calls[-1].append(n),
        )
        assert all(total == sum(updates) for total, *updates in calls)
        before = segmenter.get_state()
        steps = segmenter.initialize_steps(image[::-1], **self.tiling)
        while next(steps).text != "Predict masks for grid of points":
            pass
        next(steps)
        steps.close()
        assert_same_state(segmenter.get_state(), before)

    def test_points_per_batch_plays_no_role(self, segmenter, predictor, image):
        other = self.create(predictor, points_per_side=4, points_per_batch=3)
        other.initialize(image, **self.tiling)
        np.testing.assert_array_equal(other.generate(**LOOSE), segmenter.generate(**LOOSE))

    def test_evaluating_at_once_gives_the_same(self, segmenter, predictor, image, monkeypatch):
        monkeypatch.setattr(amg, "LAZY_BYTES", 0)
        other = self.create(predictor, points_per_side=4)
        other.initialize(image, **self.tiling)
        np.testing.assert_array_equal(other.generate(**LOOSE), segmenter.generate(**LOOSE))

    @pytest.mark.parametrize("dtype", ["uint16", "float32", "bool"])
    def test_odd_dtypes(self, predictor, image, dtype):
        segmenter = self.create(predictor, points_per_side=2)
        plane = image[..., 0] > 120 if dtype == "bool" else image[..., 0].astype(dtype)
        segmenter.initialize(plane, **self.tiling)
        assert segmenter.generate(**LOOSE).shape == SHAPE


def assert_same_state(a, b):
    assert a["original_size"] == b["original_size"]
    assert a["crop_boxes"] == b["crop_boxes"]
    for crop, other in zip(a["crop_list"], b["crop_list"], strict=True):
        for key, value in crop.items():
            if key == "rles":
                assert value == other[key]
            else:
                np.testing.assert_array_equal(value, other[key])


class TestPlain(MaskGeneratorContract):
    def create(self, predictor, **options):
        return AutomaticMaskGenerator(predictor, **options)


class TestTiled(MaskGeneratorContract):
    tiling = TILES

    def create(self, predictor, **options):
        return TiledAutomaticMaskGenerator(predictor, **options)


def test_only_what_passes_the_predicted_iou_is_upsampled(predictor, image, monkeypatch):
    segmenter = AutomaticMaskGenerator(predictor, points_per_side=6)
    n_evaluated = []
    upsample = MaskUpsampler.mask
    monkeypatch.setattr(MaskUpsampler, "mask", lambda *args: n_evaluated.append(1) or upsample(*args))
    segmenter.initialize(image)
    assert n_evaluated == []
    ious = segmenter._crops[0].ious
    assert len(ious) == 3 * 36
    threshold = float(np.sort(ious)[-9]) - 1e-7
    segmenter.generate(pred_iou_thresh=threshold, stability_score_thresh=0.0)
    assert len(n_evaluated) == 9
    segmenter.generate(pred_iou_thresh=threshold, stability_score_thresh=0.1)
    assert len(n_evaluated) == 9


def test_one_tile_equals_plain(predictor, image):
    plain = AutomaticMaskGenerator(predictor, points_per_side=5)
    plain.initialize(image)
    tiled = TiledAutomaticMaskGenerator(predictor, points_per_side=5)
    tiled.initialize(image, tile_shape=SHAPE, halo=(0, 0))
    assert_same_state(tiled.get_state(), plain.get_state())


# Discs that are drawn instead of predicted: what is tested is which masks come out, and where.

DISCS = [(30, 40, 14), (75, 100, 18), (120, 170, 12), (70, 190, 9), (20, 205, 13)]  # y, x, radius


def disc(y, x, radius):
    rows, columns = np.ogrid[:SHAPE[0], :SHAPE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.fixture
def drawn(monkeypatch):
    """A model that knows the discs: a point in one gets it, with three predicted IoUs; others get a low one."""
    calls = []

    def draw(predictor, points, labels, boxes, multimask_output):
        calls.append(len(points))
        size = predictor.model.image_encoder.img_size
        height, width = predictor.original_size
        scale = size / max(height, width)
        oy, ox = predictor.origin
        centers = (torch.arange(size // 4) + 0.5) * 4 / scale - 0.5
        y, x = centers[:, None] + oy, centers[None] + ox
        logits, ious = [], []
        for px, py in points[:, 0].numpy() / scale:
            inside = [d for d in DISCS if np.hypot(px + ox - d[1], py + oy - d[0]) < d[2]]
            cy, cx, radius = inside[0] if inside else (py + oy, px + ox, 5)
            logits.append((radius - ((y - cy) ** 2 + (x - cx) ** 2).sqrt()) * 30)
            ious.append(torch.tensor([0.9, 0.95, 0.91]) if inside else torch.tensor([0.5, 0.4, 0.3]))
        return torch.stack(logits)[:, None].repeat(1, 3, 1, 1).float(), torch.stack(ious)

    monkeypatch.setattr(prompting, "predict_low_res", draw)
    return calls


@pytest.fixture
def placed(monkeypatch):
    """Note in the predictor which part of the image is set."""
    def set_tile(predictor, embeddings, i=None, tile_id=None):
        set_precomputed(predictor, embeddings, i=i, tile_id=tile_id)
        attrs = dict(getattr(embeddings["features"], "attrs", {}))
        predictor.origin = (0, 0)
        if tile_id is not None:
            iy, ix = divmod(tile_id, -(-attrs["shape"][1] // attrs["tile_shape"][1]))
            predictor.origin = tuple(
                max(k * t - h, 0) for k, t, h in zip((iy, ix), attrs["tile_shape"], attrs["halo"])
            )
        return predictor

    monkeypatch.setattr(amg, "set_precomputed", set_tile)


@pytest.mark.parametrize("tiled", [False, True])
def test_discs_come_out_whole_and_once(predictor, image, drawn, placed, tiled):
    segmenter = (TiledAutomaticMaskGenerator if tiled else AutomaticMaskGenerator)(predictor, points_per_side=16)
    segmenter.initialize(image, **(TILES if tiled else {}))
    for box in segmenter.crop_boxes:
        x0, y0, x1, y1 = box
        assert min(x0, y0) >= 0
        assert (y1, x1) <= SHAPE
    labels = segmenter.generate(crop_nms_thresh=0.5)
    assert labels.max() == len(DISCS)
    for y, x, radius in DISCS:
        assert iou(labels == labels[y, x], disc(y, x, radius)) > 0.9


def test_blank_and_masked_tiles_are_skipped(predictor, image, drawn, placed):
    image = image.copy()
    image[:115, :155] = 9  # tile 0 with halo
    segmenter = TiledAutomaticMaskGenerator(predictor, points_per_side=8, points_per_batch=64)
    segmenter.initialize(image, **TILES)
    assert len(drawn) == 3
    assert len(segmenter.crop_list) == len(segmenter.crop_boxes) == 3
    assert [0, 0, 155, 115] not in segmenter.crop_boxes

    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[5, 219] = 1
    drawn.clear()
    segmenter.initialize(image, **TILES, mask=mask)  # 02-W26: embeddings with a mask that misses tiles
    assert segmenter.crop_boxes == [[85, 0, 220, 115]]
    assert len(drawn) == 1
    labels = segmenter.generate()
    assert not labels[115:].any()
    assert labels[20, 205] > 0

    segmenter.initialize(image, **TILES, mask=np.zeros(SHAPE, dtype=bool))  # 02-W14
    assert not segmenter.generate().any()


def state_of(masks, ious, shape=SHAPE):
    rles = [{"size": list(shape), "counts": rle.encode(mask).tolist()} for mask in masks]
    boxes = []
    for mask in masks:
        y, x = np.nonzero(mask)
        boxes.append([x.min(), y.min(), x.max(), y.max()])
    n = len(masks)
    crop = {"iou_preds": ious, "points": np.zeros((n, 2)), "stability_score": np.ones(n), "boxes": boxes, "rles": rles}
    return {"crop_list": [crop], "crop_boxes": [[0, 0, shape[1], shape[0]]], "original_size": shape}


def test_small_regions_are_cleaned(predictor):
    solid = disc(70, 60, 25)
    messy = solid.copy()
    messy[60:63, 50:53] = False  # a hole of 9 pixels
    messy[100, 150] = messy[101, 151] = True  # an 8-connected island of 2 pixels
    large_hole = disc(70, 150, 30) & ~disc(70, 150, 10)
    specks = np.zeros(SHAPE, dtype=bool)
    specks[5, 5:8] = specks[5, 20:22] = True
    segmenter = AutomaticMaskGenerator(predictor)
    segmenter.set_state(state_of([messy, large_hole, specks], [0.9, 0.95, 0.99]))
    first, second, third = segmenter.generate(min_mask_region_area=10, output_mode="binary_mask")
    by_point = {tuple(np.argwhere(r["segmentation"])[0]): r["segmentation"] for r in (first, second, third)}
    np.testing.assert_array_equal(by_point[tuple(np.argwhere(solid)[0])], solid)
    np.testing.assert_array_equal(by_point[tuple(np.argwhere(large_hole)[0])], large_hole)
    assert np.argwhere(by_point[5, 5]).tolist() == [[5, 5], [5, 6], [5, 7]]  # all are small: the largest stays

    segmenter.set_state(state_of([messy, solid], [0.95, 0.9]))
    records = segmenter.generate(min_mask_region_area=10, box_nms_thresh=0.7, output_mode="binary_mask")
    assert len(records) == 1
    assert records[0]["predicted_iou"] == pytest.approx(0.95 if records[0]["bbox"][2] > 60 else 0.9)
    np.testing.assert_array_equal(records[0]["segmentation"], solid)


def test_larger_real_object_is_no_background(predictor):
    big = np.zeros(SHAPE, dtype=bool)
    big[5:-5, 5:150] = True
    rest = ~big
    segmenter = AutomaticMaskGenerator(predictor)
    segmenter.set_state(state_of([big, disc(75, 190, 20)], [0.9, 0.95]))
    assert segmenter.generate().max() == 2
    segmenter.set_state(state_of([rest | ~disc(75, 80, 20), disc(75, 80, 15)], [0.9, 0.95]))
    labels = segmenter.generate(with_background=True)
    assert labels.max() == 1
    assert segmenter.generate(with_background=False).max() == 2


@pytest.mark.parametrize(("state", "message"), [
    ({"crop_list": []}, "lacks"),
    ({"crop_list": [{}], "crop_boxes": [], "original_size": SHAPE}, "1 crops, but 0 boxes"),
    ({"crop_list": [{"rles": []}], "crop_boxes": [[0, 0, 5, 5]], "original_size": SHAPE}, "must hold"),
    ({**state_of([disc(20, 20, 5)], [0.9]), "original_size": (9, 9)}, "not all of the shape"),
])
def test_unfitting_states(predictor, state, message):
    with pytest.raises(InvalidInputError, match=message):
        AutomaticMaskGenerator(predictor).set_state(state)


@pytest.mark.parametrize(("options", "message"), [
    ({"points_per_side": None}, "points_per_side or point_grids"),
    ({"points_per_side": 0}, "positive integer"),
    ({"points_per_batch": 0}, "points_per_batch"),
    ({"points_per_side": 2, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, "no points for layer 2"),
    ({"point_grids": [np.zeros((4, 3))]}, "point_grids"),
    ({"point_grids": [np.zeros((4, 2))], "crop_n_layers": 1}, "2 arrays"),
    ({"point_grids": [np.full((4, 2), 1.5)]}, "from 0 to 1"),
])
def test_wrong_options(predictor, options, message):
    with pytest.raises(InvalidInputError, match=message):
        AutomaticMaskGenerator(predictor, **options)


def test_image_and_embeddings_must_fit(predictor, image):
    plain = precompute_image_embeddings(predictor, image, ndim=2, verbose=False)
    tiled = precompute_image_embeddings(predictor, image, ndim=2, verbose=False, **TILES)
    for segmenter, embeddings, given, message in (
        (AutomaticMaskGenerator, plain, image[:-1], "shape"),
        (AutomaticMaskGenerator, tiled, image, "tiled"),
        (TiledAutomaticMaskGenerator, plain, image, "not tiled"),
        (TiledAutomaticMaskGenerator, tiled, image[:, :-1], "shape"),
        (TiledAutomaticMaskGenerator, None, image, "tile_shape"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            segmenter(predictor, points_per_side=2).initialize(given, embeddings)


def test_lists_are_fine_as_tiling(predictor, image):
    segmenter = TiledAutomaticMaskGenerator(predictor, points_per_side=2)  # 02-W26
    segmenter.initialize(image, tile_shape=[80, 120], halo=[35, 35])
    embeddings = precompute_image_embeddings(predictor, image, ndim=2, verbose=False, **TILES)
    segmenter.initialize(image, embeddings, tile_shape=[80, 120], halo=[35, 35])
    with pytest.raises(InvalidInputError, match="tile_shape"):
        segmenter.initialize(image, embeddings, tile_shape=[64, 64], halo=[35, 35])


def test_wide_masks_do_not_overflow():
    logits = torch.full((1, 16, 16), 0.5)
    logits[:, :, 8:] = 5
    mask = MaskUpsampler(16, 64, (1, 64), (2, 70_000)).masks(logits, torch.zeros(1))[0]
    assert mask.area == 140_000
    assert mask.stability == pytest.approx(0.5, abs=0.1)
