"""Many prompts on one image: against segment_anything one by one, and the geometry of tiles with drawn masks."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamPredictor

from micro_sam.core.errors import InvalidInputError, NotInitializedError, UnsupportedError
from micro_sam.embeddings.encode import precompute_image_embeddings, set_precomputed
from micro_sam.inference import batched_inference, batched_tiled_inference
from micro_sam.models import prompting
from micro_sam.models.mask_upsampling import MaskUpsampler
from micro_sam.models.otsu import otsu_thresholds

SHAPE = (150, 220)
BOXES = np.array([[20, 30, 60, 50], [100, 20, 210, 140], [5, 100, 45, 145], [150, 80, 160, 130.5], [0, 0, 220, 150]])
POINTS = np.array([[[40, 40], [30, 45]], [[150, 80], [10, 10]], [[20, 120], [25, 110]], [[155, 90], [219, 149]],
                   [[110, 75], [111, 75]]])
LABELS = np.array([[1, 1], [1, 0], [1, 1], [1, 0], [0, 1]])


@pytest.fixture(scope="module")
def image():
    return ndimage.gaussian_filter(np.random.default_rng(0).random(SHAPE), 3).astype(np.float32)


@pytest.fixture(scope="module")
def precomputed(tiny_sam, image):
    predictor = SamPredictor(tiny_sam)
    return {
        "plain": precompute_image_embeddings(predictor, image, verbose=False),
        "tiled": precompute_image_embeddings(
            predictor, image, tile_shape=(70, 100), halo=(12, 16), batch_size=9, verbose=False
        ),
        "one_tile": precompute_image_embeddings(predictor, image, tile_shape=SHAPE, halo=(0, 0), verbose=False),
    }


@pytest.fixture
def predictor(tiny_sam, precomputed):
    return set_precomputed(SamPredictor(tiny_sam), precomputed["plain"])


def expected_masks(predictor, k, boxes=None, points=None, labels=None, multimask=False):
    return predictor.predict(
        point_coords=None if points is None else points[k], point_labels=None if labels is None else labels[k],
        box=None if boxes is None else boxes[k], multimask_output=multimask, return_logits=True,
    )


@pytest.mark.parametrize("prompts", [
    {"boxes": BOXES}, {"points": POINTS, "labels": LABELS}, {"points": POINTS[:, :1], "labels": LABELS[:, :1]},
    {"boxes": BOXES, "points": POINTS, "labels": LABELS},
])
@pytest.mark.parametrize("multimasking", [False, True])
def test_equals_predictor_one_by_one(predictor, prompts, multimasking):
    kwargs = {"point_labels" if name == "labels" else name: value for name, value in prompts.items()}
    records = batched_inference(
        predictor, None, batch_size=2, multimasking=multimasking, return_instance_segmentation=False,
        return_highres_logits=True, **kwargs,
    )
    assert [r["seg_id"] for r in records] == [1, 2, 3, 4, 5]
    for k, record in enumerate(records):
        logits, scores, low_res = expected_masks(predictor, k, **prompts, multimask=multimasking)
        best = scores.argmax()
        logits = logits[best]
        mask = record["segmentation"]
        assert mask.dtype == torch.bool
        clear = np.abs(logits) > 1e-3
        np.testing.assert_array_equal(mask.numpy()[clear], (logits > 0)[clear])
        np.testing.assert_allclose(record["logits"], logits, atol=1e-3)
        assert record["predicted_iou"] == pytest.approx(scores[best], abs=1e-5)
        assert record["stability_score"] == pytest.approx((logits > 1).sum() / (logits > -1).sum(), abs=2e-3)
        assert int(record["area"]) == mask.sum()
        y, x = np.nonzero(mask.numpy())
        assert record["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]


def test_batch_size_plays_no_role(predictor):
    results = [
        batched_inference(predictor, None, n, boxes=BOXES, return_instance_segmentation=False) for n in (1, 3, 100)
    ]
    for records in zip(*results):
        for record in records[1:]:
            np.testing.assert_allclose(record["logits"], records[0]["logits"], atol=1e-4)


def test_all_three_masks(predictor):
    records = batched_inference(
        predictor, None, 2, boxes=BOXES, multimasking=True, reduce_multimasking=False, mask_threshold="auto",
        return_instance_segmentation=False,
    )
    assert len(records) == 15
    for k, record in enumerate(records):
        logits, scores, low_res = expected_masks(predictor, k // 3, BOXES, multimask=True)
        np.testing.assert_allclose(record["logits"][0], low_res[k % 3], atol=1e-3)
        assert record["predicted_iou"] == pytest.approx(scores[k % 3], abs=1e-5)
        threshold = float(otsu_thresholds(torch.from_numpy(low_res[k % 3])[None])[0])
        clear = np.abs(logits[k % 3] - threshold) > 1e-2
        np.testing.assert_array_equal(record["segmentation"].numpy()[clear], (logits[k % 3] > threshold)[clear])
    labels = batched_inference(predictor, None, 2, boxes=BOXES, multimasking=True, reduce_multimasking=False)
    assert labels.dtype == np.uint32


def test_mask_prompts(predictor):
    logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 5
    records = batched_inference(
        predictor, None, 2, boxes=BOXES[:2], logits_masks=logits, return_instance_segmentation=False
    )
    for k, record in enumerate(records):
        _, _, low_res = predictor.predict(box=BOXES[k], mask_input=logits[k].numpy(), multimask_output=False)
        np.testing.assert_allclose(record["logits"], low_res, atol=1e-3)


def test_image_is_embedded(tiny_sam, predictor, image, precomputed):
    expected = batched_inference(predictor, None, 4, boxes=BOXES)
    fresh = SamPredictor(tiny_sam)
    labels = batched_inference(fresh, image, 4, boxes=BOXES, verbose_embeddings=False)
    np.testing.assert_array_equal(labels, expected)
    stack = np.stack([np.zeros_like(image), image])
    labels = batched_inference(fresh, stack, 4, boxes=BOXES, verbose_embeddings=False, i=1)
    np.testing.assert_array_equal(labels, expected)


# Masks that are drawn instead of predicted: what is tested is where prompts and masks go.

def draw(predictor, points=None, labels=None, boxes=None, multimask_output=True):
    """Logits: signed distance (in canvas pixels) into the box, or to a disc of 8 image pixels around the mean point."""
    size = predictor.model.image_encoder.img_size
    scale = size / max(predictor.original_size)
    centers = (torch.arange(size // 4) + 0.5) * 4
    y, x = centers[:, None], centers[None]
    logits = []
    for k in range(len(boxes) if points is None else len(points)):
        if boxes is not None:
            x0, y0, x1, y1 = boxes[k]
            logit = torch.minimum(torch.minimum(x - x0, x1 - x), torch.minimum(y - y0, y1 - y))
        else:
            px, py = points[k][labels[k] == 1].mean(0)
            logit = 8 * scale - ((x - px) ** 2 + (y - py) ** 2).sqrt()
        logits.append(logit)
    logits = torch.stack(logits)[:, None]
    if multimask_output:
        logits = logits.repeat(1, 3, 1, 1)
    return logits, torch.linspace(0.9, 0.8, logits[:, :, 0, 0].numel()).reshape(logits.shape[:2])


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(prompting, "predict_low_res", draw)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def box_mask(box):
    x0, y0, x1, y1 = box
    mask = np.zeros(SHAPE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def full_mask(record):
    """The mask of a record with `global_bbox` in the image."""
    x, y, w, h = record["global_bbox"]
    u, v, *_ = record["bbox"]
    mask = np.zeros(SHAPE, dtype=bool)
    mask[y:y + h, x:x + w] = record["segmentation"].numpy()[v:v + h, u:u + w]
    assert mask.sum() == record["segmentation"].sum()
    return mask


TILED_BOXES = np.array([
    [170, 30, 200, 42], [10, 105, 22, 140], [20, 10, 50, 22], [130, 60, 142, 100], [60, 62, 90, 74]
])


def test_tiled_boxes_are_not_swapped_and_order_is_kept(predictor, precomputed, drawn):
    records = batched_tiled_inference(
        predictor, None, 2, precomputed["tiled"], boxes=TILED_BOXES, return_instance_segmentation=False
    )
    assert [r["seg_id"] for r in records] == [1, 2, 3, 4, 5]
    for record, box in zip(records, TILED_BOXES):
        assert iou(full_mask(record), box_mask(box)) > 0.85
    labels = batched_tiled_inference(predictor, None, 2, precomputed["tiled"], boxes=TILED_BOXES)
    assert labels.dtype == np.uint32
    assert labels.shape == SHAPE
    for box in TILED_BOXES:
        values = np.unique(labels[box_mask(box)])
        assert iou(labels == values[-1], box_mask(box)) > 0.85
    assert labels.max() == 5


def test_merged_tiles_equal_records(predictor, precomputed, drawn):
    kwargs = {"boxes": TILED_BOXES}
    expected = batched_tiled_inference(predictor, None, 2, precomputed["tiled"], **kwargs)
    merged = batched_tiled_inference(
        predictor, None, 2, precomputed["tiled"], optimize_memory=True, min_size=10, nms_thresh=0.8, **kwargs
    )
    np.testing.assert_array_equal(merged > 0, expected > 0)
    pairs = np.unique(np.stack([merged, expected], -1).reshape(-1, 2), axis=0)
    assert len(pairs) == 6  # one to one, and ids stay unique across tiles
    assert merged.max() == 5


def test_object_seen_from_two_tiles_is_one(predictor, precomputed, drawn):
    boxes = np.array([[85, 30, 113, 50], [86, 30, 115, 50], [150, 30, 170, 50]])  # centres in tiles 0, 1 and 1
    labels = batched_tiled_inference(predictor, None, 2, precomputed["tiled"], boxes=boxes, optimize_memory=True)
    assert labels.max() == 2
    assert iou(labels == labels[40, 160], box_mask(boxes[2])) > 0.85
    assert labels[40, 90] == labels[40, 110] > 0


def test_one_tile_equals_plain(predictor, precomputed):
    for kwargs in ({"boxes": BOXES}, {"points": POINTS, "point_labels": LABELS}):
        expected = batched_inference(predictor, None, 3, return_instance_segmentation=False, **kwargs)
        records = batched_tiled_inference(
            predictor, None, 3, precomputed["one_tile"], return_instance_segmentation=False, **kwargs
        )
        for record, plain in zip(records, expected):
            np.testing.assert_array_equal(record["segmentation"], plain["segmentation"])
            assert record["bbox"] == record["global_bbox"] == plain["bbox"]
        set_precomputed(predictor, precomputed["plain"])


def test_tiled_points_use_all_points_of_a_prompt(predictor, precomputed):
    points, labels = np.array([[[190, 20], [170, 40], [215, 60]], [[20, 100], [30, 120], [60, 130]]]), np.array(
        [[1, 1, 0], [1, 0, 1]]
    )
    records = batched_tiled_inference(
        predictor, None, 2, precomputed["tiled"], points=points, point_labels=labels, return_instance_segmentation=False
    )
    for record, tile_id, origin, k in zip(records, (1, 3), ((84, 0), (0, 58)), (0, 1)):
        set_precomputed(predictor, precomputed["tiled"], tile_id=tile_id)
        _, scores, low_res = predictor.predict(points[k] - np.array(origin), labels[k], multimask_output=False)
        np.testing.assert_allclose(record["logits"], low_res, atol=1e-3)
        assert record["predicted_iou"] == pytest.approx(scores[0], abs=1e-5)


def test_tiled_points_outside_of_the_tile_are_left_out(predictor, precomputed):
    points = np.array([[[190, 20], [5, 145]], [[170, 30], [180, 30]]])
    labels = np.array([[1, 0], [1, 1]])
    with pytest.warns(UserWarning, match="1 points lie outside of tile 1"):
        records = batched_tiled_inference(
            predictor, None, 8, precomputed["tiled"], points=points, point_labels=labels,
            return_instance_segmentation=False,
        )
    set_precomputed(predictor, precomputed["tiled"], tile_id=1)
    for record, k, n in zip(records, (0, 1), (1, 2)):
        _, _, low_res = predictor.predict(points[k, :n] - np.array([84, 0]), labels[k, :n], multimask_output=False)
        np.testing.assert_allclose(record["logits"], low_res, atol=1e-3)


def test_tiled_points_on_the_border(predictor, precomputed, drawn):
    points = np.array([[[219.6, 149.7]], [[220, 150]]])
    records = batched_tiled_inference(
        predictor, None, 8, precomputed["tiled"], points=points, point_labels=np.ones((2, 1)),
        return_instance_segmentation=False,
    )
    for record in records:
        assert full_mask(record)[148, 218]


def test_requested_ids_are_kept(predictor, drawn):
    boxes = np.array([[10, 10, 40, 40], [50, 50, 90, 100], [150, 20, 200, 60]])
    labels = batched_inference(predictor, None, 2, boxes=boxes, segmentation_ids=[42, 7, 1000])
    assert np.unique(labels).tolist() == [0, 7, 42, 1000]
    for id_, box in zip([42, 7, 1000], boxes):
        assert iou(labels == id_, box_mask(box)) > 0.85


def test_no_prompts_give_nothing(predictor, precomputed):
    for kwargs in ({"boxes": np.zeros((0, 4))}, {"points": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))}):
        for labels in (
            batched_inference(predictor, None, 2, **kwargs),
            batched_tiled_inference(predictor, None, 2, precomputed["tiled"], **kwargs),
            batched_tiled_inference(predictor, None, 2, precomputed["tiled"], optimize_memory=True, **kwargs),
        ):
            assert labels.shape == SHAPE
            assert labels.dtype == np.uint32
            assert not labels.any()
        assert batched_inference(predictor, None, 2, return_instance_segmentation=False, **kwargs) == []
        assert batched_tiled_inference(
            predictor, None, 2, precomputed["tiled"], return_instance_segmentation=False, **kwargs
        ) == []


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({}, InvalidInputError, "no prompts"),
    ({"points": POINTS}, InvalidInputError, "without point_labels"),
    ({"point_labels": LABELS, "boxes": BOXES}, InvalidInputError, "without points"),
    ({"points": POINTS, "point_labels": LABELS[:2]}, InvalidInputError, "point_labels must have the shape"),
    ({"points": POINTS[:2], "point_labels": LABELS[:2], "boxes": BOXES}, InvalidInputError, "same number"),
    ({"boxes": BOXES[:, :3]}, InvalidInputError, "boxes must be finite"),
    ({"boxes": BOXES, "segmentation_ids": [1, 2]}, InvalidInputError, "one positive integer"),
    ({"boxes": BOXES[:1], "segmentation_ids": [0]}, InvalidInputError, "one positive integer"),
    ({"boxes": BOXES, "logits_masks": torch.zeros(2, 1, 64, 64)}, InvalidInputError, "same number"),
    ({"boxes": BOXES, "logits_masks": torch.zeros(5, 1, 256, 256)}, InvalidInputError, "1, 64, 64"),
    ({"boxes": BOXES, "mask_threshold": "otsu"}, InvalidInputError, "mask_threshold"),
    ({"boxes": BOXES, "batch_size": 0}, InvalidInputError, "batch_size"),
    (
        {"boxes": BOXES, "segmentation_ids": [1, 2, 3, 4, 5], "multimasking": True, "reduce_multimasking": False},
        UnsupportedError, "segmentation_ids",
    ),
])
def test_bad_arguments(predictor, kwargs, error, message):
    with pytest.raises(error, match=message):
        batched_inference(predictor, None, **{"batch_size": 2, **kwargs})


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"logits_masks": torch.zeros(5, 1, 64, 64)}, NotImplementedError, "Mask prompts"),
    ({"tile_shape": (64, 64)}, ValueError, r"tile_shape=\(70, 100\)"),
    ({"halo": (12, 17)}, ValueError, "halo"),
    ({"image_embeddings": None}, ValueError, "tile_shape and halo"),
    ({"min_size": 5}, ValueError, "optimize_memory"),
    ({"optimize_memory": True, "return_instance_segmentation": False}, ValueError, "label image"),
    (
        {"boxes": TILED_BOXES[:2], "points": np.array([[[180, 35]], [[200, 10]]]), "point_labels": np.ones((2, 1))},
        ValueError, "prompt 1 do not agree",
    ),
])
def test_bad_tiled_arguments(predictor, precomputed, kwargs, error, message):
    kwargs = {"image_embeddings": precomputed["tiled"], "boxes": TILED_BOXES, **kwargs}
    with pytest.raises(error, match=message):
        batched_tiled_inference(predictor, None, 2, **kwargs)


def test_lists_are_fine_as_tiling_and_embeddings_must_be_tiled(predictor, precomputed, drawn):
    arguments = {"boxes": TILED_BOXES, "tile_shape": [70, 100], "halo": [12, 16]}
    assert batched_tiled_inference(predictor, None, 2, precomputed["tiled"], **arguments).max() == 5
    with pytest.raises(InvalidInputError, match="not tiled"):
        batched_tiled_inference(predictor, None, 2, precomputed["plain"], boxes=TILED_BOXES)


def test_no_image_is_set(tiny_sam):
    with pytest.raises(NotInitializedError, match="No image is set"):
        batched_inference(SamPredictor(tiny_sam), None, 2, boxes=BOXES)


# Numerics

@pytest.mark.parametrize(("canvas", "input_size", "original_size"), [
    (256, (175, 256), SHAPE), (256, (256, 200), (90, 71)), (1024, (512, 1024), (700, 1400)),
    (256, (256, 256), (256, 256)),
])
def test_masks_in_windows_equal_full_upsampling(canvas, input_size, original_size):
    low_res = canvas // 4
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, low_res, low_res, generator=generator) * 3
    y, x = torch.meshgrid(torch.arange(low_res), torch.arange(low_res), indexing="ij")
    logits[0] = 6 - ((y - low_res // 5) ** 2 + (x - low_res // 3) ** 2) / 10
    logits[1] = torch.minimum(6.0 - y, 6.0 - x)  # at the border
    logits[2] = -10  # nothing
    logits[3] = 10 + torch.rand(low_res, low_res, generator=generator)  # everything
    logits[4] = -9
    logits[4, low_res // 2, low_res // 4] = 3  # one pixel
    thresholds = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 1.2])
    full = torch.nn.functional.interpolate(logits[None], (canvas, canvas), mode="bilinear", align_corners=False)
    full = full[..., :input_size[0], :input_size[1]]
    full = torch.nn.functional.interpolate(full, original_size, mode="bilinear", align_corners=False)[0].numpy()
    masks = MaskUpsampler(low_res, canvas, input_size, original_size).masks(logits, thresholds)
    for mask, expected, threshold in zip(masks, full, thresholds.numpy()):
        pasted = mask.paste(original_size)
        clear = np.abs(expected - threshold) > 1e-4
        np.testing.assert_array_equal(pasted[clear], (expected > threshold)[clear])
        assert mask.area == pasted.sum()
        union = (expected > threshold - 1).sum()
        if union == 0:
            assert np.isnan(mask.stability)
        else:
            assert mask.stability == pytest.approx((expected > threshold + 1).sum() / union, abs=1e-3)
    assert masks[0].mask.size < 0.3 * np.prod(original_size)
    assert masks[2].mask.shape == (0, 0)
    assert masks[3].area == np.prod(original_size)


def brute_force_otsu(logits):
    """The definition, window by window."""
    low, scale = logits.min(), max(logits.max() - logits.min(), np.float32(1e-6))
    padded = np.pad((logits - low) / scale, 15)
    best = 0
    for y, x in np.ndindex(*logits.shape):
        histogram = np.bincount((padded[y:y + 31, x:x + 31] * 63).astype(int).ravel(), minlength=64)
        values = []
        for k in range(64):
            below, above = histogram[:k + 1], histogram[k + 1:]
            w1, w2 = int(below.sum()), int(above.sum())
            s1, s2 = int((below * np.arange(k + 1)).sum()), int((above * np.arange(k + 1, 64)).sum())
            # w1 w2 (s1/w1 - s2/w2)^2 with exact integers, rounded once
            values.append((s1 * w2 - s2 * w1) ** 2 / (w1 * w2) if w1 and w2 else 0.0)
        best = max(best, int(np.argmax(values)))
    return max(0.0, low + best / 63 * scale)


def test_otsu_threshold_equals_its_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (4, 20, 34)).astype(np.float32)
    logits[1] = ndimage.gaussian_filter(logits[1], 3) * 9
    logits[2] = np.where(np.arange(34) > 20, 12, 3) + rng.normal(0, 1, (20, 34))
    logits[3] = -3
    thresholds = otsu_thresholds(torch.from_numpy(logits))
    np.testing.assert_allclose(thresholds, [brute_force_otsu(mask) for mask in logits], atol=1e-5)
    assert thresholds[2] > 1  # not the clamp
    assert otsu_thresholds(torch.zeros(0, 20, 34)).shape == (0,)
