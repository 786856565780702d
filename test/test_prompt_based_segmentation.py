"""Prompts on an image: against segment_anything's own predictor, in coordinates (y, x), plain and tiled."""

import copy

import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamPredictor

from micro_sam.core.errors import InvalidInputError, NotInitializedError, PromptTileError
from micro_sam.core.prompts import (
    extend_box,
    logits_from_mask,
    mask_from_polygon,
    points_from_mask,
    points_from_scribbles,
)
from micro_sam.core.tiling import TileSpec
from micro_sam.embeddings.encode import precompute_image_embeddings, set_precomputed
from micro_sam.prompt_based_segmentation import (
    segment_from_box,
    segment_from_box_and_points,
    segment_from_mask,
    segment_from_points,
    segment_from_polygon,
    segment_from_scribble,
)

SHAPE = (150, 220)
TILE_SHAPE, HALO = (70, 100), (12, 16)


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.random((2, *SHAPE)), (0, 3, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def precomputed(tiny_sam, image):
    predictor = SamPredictor(tiny_sam)
    tiling = {"tile_shape": TILE_SHAPE, "halo": HALO, "batch_size": 6}
    return {
        "plain": precompute_image_embeddings(predictor, image[0], verbose=False),
        "tiled": precompute_image_embeddings(predictor, image[0], verbose=False, **tiling),
        "stack": precompute_image_embeddings(predictor, image, ndim=3, batch_size=2, verbose=False),
        "stack_tiled": precompute_image_embeddings(predictor, image, ndim=3, verbose=False, **tiling),
    }


@pytest.fixture
def predictor(tiny_sam):
    return SamPredictor(tiny_sam)


@pytest.fixture
def embeddings(precomputed):
    return precomputed["plain"]


@pytest.fixture
def tiled(precomputed):
    return precomputed["tiled"]


def disc(shape=SHAPE, center=(60, 150), radius=20):
    y, x = np.ogrid[:shape[0], :shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def check(result, predictor, outer=None, **prompts):
    """Compare (masks, scores, logits) with the predictor's own answer to prompts in (x, y)."""
    masks, scores, low_res = result
    expected, expected_scores, expected_low_res = predictor.predict(return_logits=True, **prompts)
    assert masks.dtype == bool
    assert masks.shape == (len(expected), *SHAPE)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    np.testing.assert_allclose(low_res, expected_low_res, atol=1e-3)
    inner = masks if outer is None else masks[(slice(None), *outer)]
    clear = np.abs(expected) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(inner[clear], (expected > 0)[clear])
    assert inner.sum() == masks.sum()


def test_points(predictor, embeddings):
    points, labels = np.array([[30, 170], [100, 40], [10, 10]]), np.array([1, 1, 0])
    result = segment_from_points(predictor, points, labels, embeddings, return_all=True)
    check(result, predictor, point_coords=points[:, ::-1], point_labels=labels, multimask_output=False)
    masks = segment_from_points(predictor, points, labels)  # the image that is set
    np.testing.assert_array_equal(masks, result[0])


@pytest.mark.parametrize(("n_points", "multimask_output", "use_best_multimask", "n_masks"), [
    (1, False, None, 1), (1, False, False, 1), (1, True, None, 3), (1, True, True, 3), (2, False, None, 1),
    (2, True, False, 3), (2, False, True, 1),
])
def test_masks_scores_and_logits_belong_together(
    predictor, embeddings, n_points, multimask_output, use_best_multimask, n_masks
):
    points, labels = np.array([[30, 170], [44, 160]])[:n_points], np.ones(n_points)
    masks, scores, low_res = segment_from_points(
        predictor, points, labels, embeddings, multimask_output=multimask_output, return_all=True,
        use_best_multimask=use_best_multimask,
    )
    assert len(masks) == len(scores) == len(low_res) == n_masks
    best = (use_best_multimask or (use_best_multimask is None and n_points == 1)) and not multimask_output
    _, expected, expected_low_res = predictor.predict(
        points[:, ::-1], labels, multimask_output=best or multimask_output
    )
    if best:
        k = expected.argmax()
        expected, expected_low_res = expected[k:k + 1], expected_low_res[k:k + 1]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(low_res, expected_low_res, atol=1e-3)


@pytest.mark.parametrize(("extension", "expected"), [
    (0.0, [100, 20, 160, 60]), (0.25, [85, 10, 175, 70]), (7, [93, 13, 167, 67]), (2000, [0, 0, 220, 150]),
])
def test_box(predictor, embeddings, extension, expected):
    result = segment_from_box(predictor, [20, 100, 60, 160], embeddings, return_all=True, box_extension=extension)
    check(result, predictor, box=np.array(expected), multimask_output=False)


def test_masks_follow_the_weights_after_a_change_in_place(tiny_sam, embeddings):
    predictor = SamPredictor(copy.deepcopy(tiny_sam))
    box = [20, 100, 60, 160]
    segment_from_box(predictor, box, embeddings)
    with torch.no_grad():
        predictor.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
    result = segment_from_box(predictor, box, embeddings, return_all=True)
    check(result, predictor, box=np.array([100, 20, 160, 60]), multimask_output=False)


def test_box_and_points(predictor, embeddings):
    points, labels = np.array([[40, 130], [25, 155]]), np.array([1, 0])
    result = segment_from_box_and_points(
        predictor, [20, 100, 60, 160], points, labels, embeddings, multimask_output=True, return_all=True
    )
    check(
        result, predictor, box=np.array([100, 20, 160, 60]), point_coords=points[:, ::-1], point_labels=labels,
        multimask_output=True,
    )


@pytest.mark.parametrize("use", [
    {"use_box": True, "use_mask": True}, {"use_box": False, "use_mask": True}, {"use_box": True, "use_mask": False},
    {"use_box": False, "use_mask": False, "use_points": True}, {"use_box": True, "use_mask": True, "use_points": True},
    {"use_box": False, "use_mask": False, "use_single_point": True},
])
def test_mask(predictor, embeddings, use):
    mask = disc()
    prompts = {}
    if use["use_box"]:
        prompts["box"] = np.array([130, 40, 171, 81])
    if use["use_mask"]:
        prompts["mask_input"] = logits_from_mask(mask, 64)
    if use.get("use_points"):
        points, labels = points_from_mask(mask)
        prompts.update(point_coords=points[:, ::-1], point_labels=labels)
    if use.get("use_single_point"):
        prompts.update(point_coords=np.array([[150, 60]]), point_labels=np.ones(1))
    result = segment_from_mask(predictor, mask.astype("uint8"), embeddings, return_all=True, **use)
    check(result, predictor, multimask_output=False, **prompts)
    logits = segment_from_mask(predictor, mask, embeddings, return_logits=True, **use)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits > 0, result[0])


def test_explicit_prompts_of_a_mask_are_yx_plain_and_tiled(predictor, embeddings, tiled):
    mask, points, labels = disc(), np.array([[62, 140], [45, 165]]), np.array([1, 0])
    kwargs = {"use_mask": False, "points": points, "labels": labels, "box": [38, 128, 84, 174], "return_all": True}
    result = segment_from_mask(predictor, mask, embeddings, **kwargs)
    check(
        result, predictor, box=np.array([128, 38, 174, 84]), point_coords=points[:, ::-1], point_labels=labels,
        multimask_output=False,
    )
    tile = TileSpec.create(SHAPE, TILE_SHAPE, HALO)[1]
    result = segment_from_mask(predictor, mask, tiled, **kwargs)
    origin = np.array([tile.origin[1], tile.origin[0]])
    assert predictor.original_size == tile.outer_shape
    check(
        result, predictor, tile.outer, box=np.array([128 - 84, 38, 174 - 84, 82]),
        point_coords=points[:, ::-1] - origin, point_labels=labels, multimask_output=False,
    )


def test_tile_is_that_of_the_positive_points(predictor, tiled):
    tile = TileSpec.create(SHAPE, TILE_SHAPE, HALO)[4]
    points, labels = np.array([[100, 130], [5, 5], [3, 60], [90, 150]]), np.array([1, 0, 0, 0])
    with pytest.warns(UserWarning, match="2 of 4 points lie outside of tile 4"):
        result = segment_from_points(predictor, points, labels, tiled, return_all=True)
    local = points[[0, 3], ::-1] - np.array([tile.origin[1], tile.origin[0]])
    assert predictor.original_size == tile.outer_shape
    check(result, predictor, tile.outer, point_coords=local, point_labels=labels[[0, 3]], multimask_output=False)


def test_tiled_box_is_clipped_to_its_tile(predictor, tiled):
    tile = TileSpec.create(SHAPE, TILE_SHAPE, HALO)[3]  # y 58 to 152, x 0 to 116
    result = segment_from_box(predictor, [50, 10, 140, 130], tiled, return_all=True)
    assert predictor.original_size == tile.outer_shape
    check(result, predictor, tile.outer, box=np.array([10, 0, 116, 82]), multimask_output=False)


def test_tiled_mask(predictor, tiled):
    tile, mask = TileSpec.create(SHAPE, TILE_SHAPE, HALO)[4], disc(center=(100, 150), radius=18)
    result = segment_from_mask(predictor, mask, tiled, return_all=True)
    check(
        result, predictor, tile.outer, mask_input=logits_from_mask(mask[tile.outer], 64), multimask_output=False,
        box=np.array([132 - 84, 82 - 58, 169 - 84, 119 - 58]),
    )


def test_points_on_the_image_border_have_a_tile(predictor, tiled):
    masks = segment_from_points(predictor, np.array([[149.6, 219.9]]), np.array([1]), tiled)
    assert masks.shape == (1, *SHAPE)
    assert predictor.original_size == TileSpec.create(SHAPE, TILE_SHAPE, HALO)[8].outer_shape


def test_prompts_in_different_tiles(predictor, tiled):
    arguments = ([5, 5, 40, 40], np.array([[120, 200]]), np.array([1]), tiled)
    for error in (PromptTileError, RuntimeError, ValueError):
        with pytest.raises(error, match="box in tile 0, points in tile 5"):
            segment_from_box_and_points(predictor, *arguments)
    with pytest.raises(PromptTileError, match="No positive point"):
        segment_from_points(predictor, np.array([[10, 10], [10, 219]]), np.array([1, 1]), tiled)


def test_planes_of_a_stack(predictor, precomputed):
    stack, stack_tiled = precomputed["stack"], precomputed["stack_tiled"]
    for embeddings in (stack, stack_tiled):
        results = [
            segment_from_box(predictor, [20, 110, 60, 160], embeddings, i=z, return_all=True)[2] for z in (0, 1)
        ]
        assert np.abs(results[0] - results[1]).max() > 1e-3
    set_precomputed(predictor, stack, i=1)
    result = segment_from_box(predictor, [20, 110, 60, 160], stack, i=1, return_all=True)
    check(result, predictor, box=np.array([110, 20, 160, 60]), multimask_output=False)
    with pytest.raises(InvalidInputError, match="pass i"):
        segment_from_box(predictor, [20, 110, 60, 160], stack)
    with pytest.raises(InvalidInputError, match="i=1"):
        segment_from_box(predictor, [20, 110, 60, 160], i=1)


def test_mask_at_low_resolution(predictor, embeddings):
    full = disc()
    canvas = np.zeros((220, 220), dtype=bool)
    canvas[:150] = full
    low = canvas[::4, ::4]  # like the 256 x 256 output of a model, padded to a square
    result = segment_from_mask(predictor, low, embeddings, original_size=SHAPE, use_mask=False, return_all=True)
    y0, x0, y1, x1 = (4 * v for v in (11, 33, 20, 43))
    assert low.any(axis=1).nonzero()[0][[0, -1]].tolist() == [11, 19]
    assert low.any(axis=0).nonzero()[0][[0, -1]].tolist() == [33, 42]
    check(result, predictor, box=np.array([x0, y0, x1, y1]), multimask_output=False)
    with pytest.raises(InvalidInputError, match="original_size"):
        segment_from_mask(predictor, low, embeddings)


def test_empty_mask_gives_empty_result(predictor, embeddings, tiled):
    for each in (embeddings, tiled):
        masks, scores, low_res = segment_from_mask(predictor, np.zeros(SHAPE), each, use_points=True, return_all=True)
        assert masks.shape == (1, *SHAPE)
        assert not masks.any()
        assert scores.tolist() == [0]
        assert low_res.shape == (1, 64, 64)
    with_box = segment_from_mask(predictor, np.zeros(SHAPE), embeddings, box=[20, 100, 60, 160], return_all=True)
    check(with_box, predictor, box=np.array([100, 20, 160, 60]), multimask_output=False)


def test_mask_values(predictor, embeddings):
    mask = disc()
    expected = segment_from_mask(predictor, mask, embeddings)
    for values in (mask * 255, np.where(mask, 1, 7), mask.astype(float)):
        np.testing.assert_array_equal(segment_from_mask(predictor, values, embeddings), expected)
    with pytest.raises(InvalidInputError, match="one object"):
        segment_from_mask(predictor, np.where(mask, 5, 7), embeddings)


def test_points_of_an_object_that_fills_its_box():
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:31, 20:61] = True
    points, labels = points_from_mask(mask, single=True)
    assert labels.tolist() == [1]
    assert points[0, 0] == 20
    assert 29 <= points[0, 1] <= 51
    points, labels = points_from_mask(disc((60, 80), (30, 40), 14), box_extension=8)
    np.testing.assert_array_equal(points[0], [30, 40])
    assert labels[0] == 1
    assert (labels == 0).any()
    inside = disc((60, 80), (30, 40), 14)[tuple(points.astype(int).T)]
    np.testing.assert_array_equal(inside, labels == 1)
    assert (points >= [8, 18]).all()
    assert (points < [53, 63]).all()


@pytest.mark.parametrize("size", [64, 256])
def test_mask_logits(size):
    mask = disc((100, 200), (50, 150), 30)
    logits = logits_from_mask(mask, size)
    assert logits.shape == (1, size, size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(np.unique(np.abs(logits)), 6.9068, atol=1e-4)
    assert (logits[0, size // 2:] < 0).all()
    upscaled = np.kron(logits[0], np.ones((16, 16)))[: 8 * size, : 16 * size] > 0
    expected = disc((8 * size, 16 * size), (4 * size, 12 * size), 30 * 16 * size / 200)
    assert (upscaled & expected).sum() / (upscaled | expected).sum() > 0.93


def test_polygon(predictor, embeddings, tiled):
    polygon = np.array([[20, 110], [20, 160], [60, 180], [70, 120]])
    mask = mask_from_polygon(polygon, SHAPE)
    assert mask[40, 130]
    assert not mask[130, 40]
    assert abs(mask.sum() - 2650) < 90
    for each in (embeddings, tiled):
        np.testing.assert_array_equal(
            segment_from_polygon(predictor, polygon, each), segment_from_mask(predictor, mask, each)
        )


def test_scribbles(predictor, embeddings):
    scribbles, labels = [np.array([[5, 5], [5, 45]]), np.array([[30, 100], [60, 100], [60, 150]])], [0, 1]
    points, point_labels = points_from_scribbles(scribbles, labels, max_points=4)
    np.testing.assert_array_equal(point_labels, [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(points[:4], [[40, 100], [60, 100], [60, 120], [60, 140]])
    np.testing.assert_allclose(points[4:], [[5, 10], [5, 20], [5, 30], [5, 40]])
    result = segment_from_scribble(predictor, scribbles, labels, embeddings, max_points=4, return_all=True)
    check(result, predictor, point_coords=points[:, ::-1], point_labels=point_labels, multimask_output=False)
    assert len(points_from_scribbles([np.array([[3, 4]])], [1])[0]) == 1
    assert len(points_from_scribbles([np.array([[3, 4], [3, 7.5]])], [1])[0]) == 3


def test_box_geometry():
    assert extend_box([10.5, 11.5, 20.2, 300], (100, 200)).tolist() == [10, 12, 20, 200]
    assert extend_box([10, 10, 20, 30], (100, 200), 0.5).tolist() == [5, 0, 25, 40]


@pytest.mark.parametrize(("call", "message"), [
    (lambda p, e: segment_from_points(p, np.zeros((0, 2)), np.zeros(0), e), "N >= 1"),
    (lambda p, e: segment_from_points(p, np.zeros((2, 2)), np.ones(1), e), "one label"),
    (lambda p, e: segment_from_points(p, np.zeros((1, 2)), np.array([2]), e), "one label"),
    (lambda p, e: segment_from_points(p, np.array([[np.nan, 1]]), np.ones(1), e), "finite"),
    (lambda p, e: segment_from_box(p, [10, 10, 5, 20], e), "y0 <= y1"),
    (lambda p, e: segment_from_box(p, [160, 10, 170, 20], e), "outside of the image"),
    (lambda p, e: segment_from_box(p, [10, 10, 50, 20], e, box_extension=-1), "box_extension"),
    (lambda p, e: segment_from_mask(p, disc(), e, points=np.zeros((1, 2))), "belong together"),
    (lambda p, e: segment_from_mask(p, disc(), e, use_box=False, use_mask=False), "choose one"),
    (lambda p, e: segment_from_mask(p, disc()[None], e), r"shape \(Y, X\)"),
    (lambda p, e: segment_from_polygon(p, np.zeros((2, 2)), e), "at least three"),
    (lambda p, e: segment_from_polygon(p, np.array([[500, 500], [500, 600], [600, 500]]), e), "No pixel"),
    (lambda p, e: segment_from_scribble(p, [], [], e), "at least one scribble"),
    (lambda p, e: segment_from_scribble(p, [np.zeros((2, 2))], [1], e, max_points=0), "max_points"),
])
def test_bad_prompts(predictor, embeddings, call, message):
    with pytest.raises(InvalidInputError, match=message):
        call(predictor, embeddings)


def test_no_image(predictor):
    with pytest.raises(NotInitializedError, match="set_precomputed"):
        segment_from_points(predictor, np.zeros((1, 2)), np.ones(1))
