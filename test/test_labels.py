"""Masks to label images: against brute force over full planes, and everything that is empty, thin or full."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from skimage.measure import label, regionprops
from skimage.segmentation import find_boundaries

from micro_sam.core import masks as masks_module
from micro_sam.core.labels import (
    apply_nms,
    compute_iou,
    get_block_shape,
    get_centers_and_bounding_boxes,
    mask_data_to_segmentation,
    relabel_consecutive,
    remove_small_labels,
    segmentation_to_one_hot,
)
from micro_sam.core.masks import as_bool_array, crop_mask, order_by_score, paint_masks, suppress_masks

SHAPE = (53, 67)


def random_masks(rng, n, shape=SHAPE):
    """Ellipses, rectangles, thin lines and sparse noise of all sizes, a third of them near-copies of earlier ones."""
    y, x = np.indices(shape)
    masks = []
    for _ in range(n):
        cy, cx = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        ry, rx = rng.choice([0, 1, 3, 6, 12, 40], size=2, p=[0.1, 0.1, 0.25, 0.3, 0.2, 0.05])
        kind = rng.integers(0, 6) if masks else 0
        if kind == 0:
            mask = (np.abs(y - cy) <= ry) & (np.abs(x - cx) <= rx)
        elif kind < 3:
            mask = ((y - cy) / (ry + 0.5)) ** 2 + ((x - cx) / (rx + 0.5)) ** 2 <= 1
        elif kind == 3:
            mask = (np.abs(y - cy) <= ry) & (np.abs(x - cx) <= rx) & (rng.random(shape) < 0.6)
        else:
            mask = np.roll(masks[rng.integers(len(masks))], rng.integers(-1, 2, size=2), axis=(0, 1))
            mask &= rng.random(shape) < rng.choice([0.5, 0.8, 1.0])
        masks.append(mask)
    return masks


def xywh(mask):
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()] if len(y) else [0, 0, 0, 0]


def to_record(mask, **values):
    return {"segmentation": mask, "area": int(mask.sum()), "bbox": xywh(mask), **values}


def to_tile_record(mask, tile, **values):
    """A record of the part of `mask` in a tile (slices), and that part in the full plane."""
    local = mask[tile].copy()
    full = np.zeros_like(mask)
    full[tile] = local
    x, y, w, h = xywh(local)
    global_bbox = [x + tile[1].start, y + tile[0].start, w, h]
    return {"segmentation": local, "bbox": [x, y, w, h], "global_bbox": global_bbox, **values}, full


def overlapping_tiles(shape, size=20, halo=5):
    rows, columns = (
        [slice(max(start - halo, 0), min(start + size + halo, end)) for start in range(0, end, size)] for end in shape
    )
    return [(row, column) for row in rows for column in columns]


def brute_force_nms(masks, scores, threshold, over_min=False, boxes=False):
    if boxes:
        rectangles = []
        for mask in masks:
            x, y, w, h = xywh(mask)
            rectangles.append(np.zeros_like(mask))
            rectangles[-1][y:y + h, x:x + w] = True
        masks = rectangles
    kept = []
    for k in sorted(range(len(masks)), key=lambda k: -np.inf if np.isnan(scores[k]) else scores[k], reverse=True):
        for j in kept:
            common = (masks[k] & masks[j]).sum()
            divisor = min(masks[k].sum(), masks[j].sum()) if over_min else (masks[k] | masks[j]).sum()
            if common and common / divisor > threshold:
                break
        else:
            kept.append(k)
    return kept


def brute_force_merge(masks, areas, shape, ids=None, min_size=0, max_size=None, label_masks=True, exclusive=True,
                      keep_ids=False):
    ids = list(range(1, len(masks) + 1)) if ids is None else ids
    order = [k for k in sorted(range(len(masks)), key=lambda k: -areas[k])
             if areas[k] >= min_size and (max_size is None or areas[k] <= max_size)]
    values = {k: ids[k] if keep_ids or not label_masks else n for n, k in enumerate(order, 1)}
    canvas = np.zeros(shape, dtype=np.int64)
    for y, x in np.ndindex(*shape):
        covering = [k for k in order if masks[k][y, x]]
        if covering:
            canvas[y, x] = values[covering[0 if exclusive else -1]]
    parts = label(canvas, connectivity=1) if label_masks else canvas
    out, number = np.zeros(shape, dtype=np.int64), 0
    for part in np.unique(parts[parts > 0]):
        region = parts == part
        if region.sum() >= min_size:
            number += 1
            out[region] = canvas[region] if keep_ids else number
    return out


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_suppression_equals_brute_force(seed, threshold):
    rng = np.random.default_rng(seed)
    masks = random_masks(rng, 60) + [np.zeros(SHAPE, dtype=bool)]
    scores = rng.choice([0.1, 0.25, 0.5, 0.9, np.nan], size=61)  # many ties
    boxed = [crop_mask(m) for m in masks]
    dropped = 0
    for kwargs in ({}, {"intersection_over_min": True}, {"use_boxes": True}):
        kept = suppress_masks(boxed, scores, threshold, **kwargs)
        expected = brute_force_nms(
            masks, scores, threshold, "intersection_over_min" in kwargs, "use_boxes" in kwargs
        )
        assert kept == expected
        dropped += len(masks) - len(kept)
    assert dropped > 10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [
    {}, {"nms_thresh": 0.3}, {"nms_thresh": 0.4, "perform_box_nms": True},
    {"nms_thresh": 0.5, "intersection_over_min": True}, {"nms_thresh": 0.6, "max_size": 150, "min_size": 9},
])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_nms_and_merging_equal_brute_force(seed, options, tiled, as_tensor):
    rng = np.random.default_rng(seed)
    planes, predictions = [], []
    tiles = overlapping_tiles(SHAPE)
    for mask in random_masks(rng, 30):
        scores = {"predicted_iou": float(rng.choice([0.25, 0.5, 1])), "stability_score": float(rng.choice([0.5, 1]))}
        if tiled:
            for k in rng.choice(len(tiles), size=4, replace=False):
                record, plane = to_tile_record(mask, tiles[k], **scores)
                predictions.append(record)
                planes.append(plane)
        else:
            predictions.append(to_record(mask, **scores))
            planes.append(mask)
    if as_tensor:
        for p in predictions:
            p["segmentation"] = torch.from_numpy(p["segmentation"])[None]
            p["predicted_iou"] = torch.tensor([p["predicted_iou"]])
            p["area"] = torch.tensor(10 ** 6)  # areas are counted on the masks
    options = {"min_size": 0, "max_size": None, **options}
    sizes = [int(m.sum()) for m in planes]
    max_size = np.inf if options["max_size"] is None else options["max_size"]
    chosen = [k for k, size in enumerate(sizes) if size and options["min_size"] <= size <= max_size]
    scores = [float(predictions[k]["predicted_iou"]) * predictions[k]["stability_score"] for k in chosen]
    kept = brute_force_nms(
        [planes[k] for k in chosen], scores, options.get("nms_thresh", 0.9),
        options.get("intersection_over_min", False), options.get("perform_box_nms", False),
    )
    kept = [chosen[k] for k in kept]
    expected = brute_force_merge(
        [planes[k] for k in kept], [sizes[k] for k in kept], SHAPE, min_size=options["min_size"]
    )
    labels = apply_nms(predictions, shape=SHAPE, **options)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels, expected)
    assert labels.max() > 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("label_masks", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"min_size": 12}, {"min_size": 12, "max_size": 200, "ids": True},
    {"min_size": 5, "ids": True, "keep_ids": True},
])
def test_merging_equals_brute_force(seed, exclusive, label_masks, options):
    rng = np.random.default_rng(100 + seed)
    masks = random_masks(rng, 25)
    options = dict(options)
    ids = rng.permutation(np.arange(1, 60))[:25].tolist() if options.pop("ids", False) else None
    areas = [int(m.sum()) for m in masks]
    if ids is None and not label_masks:  # ids in the order of painting
        ids_of_reference = (np.argsort(np.argsort(-np.array(areas), kind="stable"), kind="stable") + 1).tolist()
    else:
        ids_of_reference = ids
    expected = brute_force_merge(
        masks, areas, SHAPE, ids_of_reference, label_masks=label_masks, exclusive=exclusive, **options
    )
    records = [to_record(m, **({} if ids is None else {"seg_id": ids[k]})) for k, m in enumerate(masks)]
    labels = mask_data_to_segmentation(
        records, min_object_size=options.get("min_size", 0), max_object_size=options.get("max_size"),
        label_masks=label_masks, merge_exclusively=exclusive, keep_ids=options.get("keep_ids", False),
    )
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels, expected)


def test_area_of_the_record_decides_the_order():
    mask = np.ones((4, 5), dtype=bool)
    small = mask.copy()
    small[1:] = False
    for area, expected in ((3, 1), (30, 2)):  # numbered in raster order: the small one is hidden or comes first
        records = [{"segmentation": mask, "area": 20}, {"segmentation": small, "area": torch.tensor(area)}]
        assert mask_data_to_segmentation(records).max() == expected
    np.testing.assert_array_equal(mask_data_to_segmentation([{"segmentation": mask}, {"segmentation": small}]), 1)


def test_one_mask_may_split_into_objects():  # 01-37
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, :2] = mask[1, 2] = mask[3, 4:] = True  # the first two touch by a corner only
    records = [to_record(mask, seg_id=7)]
    expected = np.zeros((4, 6), dtype=int)
    expected[0, :2], expected[1, 2], expected[3, 4:] = 1, 2, 3
    np.testing.assert_array_equal(mask_data_to_segmentation(records), expected)
    np.testing.assert_array_equal(mask_data_to_segmentation(records, label_masks=False), mask)
    np.testing.assert_array_equal(mask_data_to_segmentation(records, keep_ids=True), 7 * mask)
    expected[1, 2] = 0  # pieces below the smallest size vanish one by one
    labels = mask_data_to_segmentation(records, min_object_size=2, keep_ids=True)
    np.testing.assert_array_equal(labels, 7 * (expected > 0))


def test_kept_ids_and_free_ids():
    masks = [np.arange(6)[None] == k for k in range(4)]
    ids = [2, None, 1, None]
    records = [to_record(m, seg_id=i, predicted_iou=1, stability_score=1) for m, i in zip(masks, ids)]
    for labels in (mask_data_to_segmentation(records, keep_ids=True), apply_nms(records, 0, keep_ids=True)):
        np.testing.assert_array_equal(labels, [[2, 3, 1, 4, 0, 0]])
    by_id = mask_data_to_segmentation(records, label_masks=False)  # painted with 2, 3, 1 and 2 once more
    np.testing.assert_array_equal(by_id, [[2, 3, 1, 2, 0, 0]])
    same = [{**r, "seg_id": 9} for r in records]
    np.testing.assert_array_equal(mask_data_to_segmentation(same, keep_ids=True), [[9, 9, 9, 9, 0, 0]])
    np.testing.assert_array_equal(mask_data_to_segmentation(same, label_masks=False), [[1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("function", [
    mask_data_to_segmentation, lambda records, **kwargs: apply_nms(records, 0, **kwargs),
    lambda records, **kwargs: mask_data_to_segmentation(records, label_masks=False, **kwargs),
])
def test_no_background_pixel_keeps_all_objects(function):  # 01-37, 02-W17
    half = np.zeros((6, 8), dtype=bool)
    half[:, :4] = True
    records = [to_record(m, predicted_iou=1, stability_score=1) for m in (half, ~half)]
    np.testing.assert_array_equal(function(records), np.where(half, 1, 2))


@pytest.mark.parametrize("keep_ids", [False, True])
@pytest.mark.parametrize("shape", [None, (5, 7)])
def test_nothing_gives_zeros(shape, keep_ids):  # 01-37, 01-38, 02-W14
    scores = {"predicted_iou": 1.0, "stability_score": 1.0}
    empty = to_record(np.zeros((5, 7), dtype=bool), **scores)
    full = to_record(np.ones((5, 7), dtype=bool), **scores)
    options = {"shape": shape, "keep_ids": keep_ids}
    results = {
        "no masks": [mask_data_to_segmentation([], **options), apply_nms([], 3, **options)],
        "filtered": [
            mask_data_to_segmentation([full], min_object_size=36, **options), apply_nms([full], 36, **options),
            mask_data_to_segmentation([full], max_object_size=34, **options),
            apply_nms([full], 0, max_size=34, **options),
            mask_data_to_segmentation([full], with_background=True, **options),
        ],
        "empty": [
            mask_data_to_segmentation([empty, empty], label_masks=True, **options),
            mask_data_to_segmentation([empty, empty], label_masks=False, **options),
            apply_nms([empty], 0, **options), apply_nms([empty], 0, perform_box_nms=True, **options),
        ],
    }
    for name, labels in [(name, labels) for name, group in results.items() for labels in group]:
        assert labels.shape == ((0, 0) if shape is None and name == "no masks" else (5, 7))
        assert labels.dtype == np.uint32
        assert not labels.any()


def test_empty_mask_among_others():  # 02-W14
    mask = np.zeros((5, 7), dtype=bool)
    other = mask.copy()
    other[1:3, 2:4] = True
    records = [to_record(m, predicted_iou=1, stability_score=1) for m in (mask, other, mask)]
    np.testing.assert_array_equal(mask_data_to_segmentation(records), other)
    for options in ({}, {"perform_box_nms": True}, {"intersection_over_min": True}):
        np.testing.assert_array_equal(apply_nms(records, 0, **options), other)


@pytest.mark.parametrize(("bounds", "kept"), [
    ((4, None), [4, 5, 6]), ((5, None), [5, 6]), ((7, None), []), ((0, 6), [4, 5, 6]), ((0, 5), [4, 5]), ((5, 5), [5]),
    ((0, 3), []),
])
def test_size_bounds_are_inclusive(bounds, kept):  # 01-38
    masks = []
    for row, size in enumerate((4, 5, 6)):
        masks.append(np.zeros((5, 7), dtype=bool))
        masks[-1][2 * row, :size] = True
    records = [to_record(m, predicted_iou=1, stability_score=1) for m in masks]
    low, high = bounds
    for labels in (apply_nms(records, low, max_size=high), mask_data_to_segmentation(records, None, low, high)):
        sizes = np.bincount(labels.ravel())[1:]
        assert sizes.tolist() == kept


@pytest.mark.parametrize("widths", ["half-open", "inclusive"])
def test_tiled_objects_are_whole_and_thin_duplicates_are_suppressed(widths):  # 01-36, 02-W6
    masks = [np.zeros((40, 50), dtype=bool) for _ in range(3)]
    masks[0][10:16, 30:34] = True
    masks[1][12:30, 20] = True
    masks[2][39, 40:50] = True
    tiles = [(slice(0, 35), slice(0, 40)), (slice(5, 40), slice(15, 50))]  # (35, 35) at the end of the plane
    records = []
    for mask in masks:
        for tile in tiles:
            record, part = to_tile_record(mask, tile, predicted_iou=1, stability_score=1)
            if not (part == mask).all():
                continue
            if widths == "inclusive":
                for key in ("bbox", "global_bbox"):
                    record[key] = [*record[key][:2], record[key][2] - 1, record[key][3] - 1]
            records.append(record)
    assert len(records) == 5
    expected = masks[0] * 1 + masks[1] * 2 + masks[2] * 3
    for options in ({}, {"perform_box_nms": True}, {"intersection_over_min": True}):
        labels = apply_nms(records, 0, **options)
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(apply_nms(records, 0, shape=(32, 31), **options), expected[:32, :31])
    np.testing.assert_array_equal(mask_data_to_segmentation(records), expected)


def test_only_one_of_two_thin_duplicates_is_kept():  # 02-W6
    mask = np.zeros((20, 20), dtype=bool)
    mask[3:17, 8] = True
    shifted = mask.copy()
    shifted[3, 8] = False
    tiles = [(slice(0, 20), slice(0, 12)), (slice(0, 20), slice(4, 20))]
    records = [
        to_tile_record(m, tile, predicted_iou=score, stability_score=1, seg_id=k + 1)[0]
        for k, (m, tile, score) in enumerate(zip((mask, shifted), tiles, (0.5, 0.9)))
    ]
    for options in ({}, {"perform_box_nms": True}, {"intersection_over_min": True}):
        np.testing.assert_array_equal(apply_nms(records, 0, keep_ids=True, **options), 2 * shifted)


def test_masks_are_cut_at_the_plane():
    record = {"segmentation": np.ones((10, 10), dtype=bool), "bbox": [0, 0, 10, 10]}
    for x, y in ((-4, -7), (5, 3), (-1, -1), (30, 2)):
        labels = mask_data_to_segmentation([{**record, "global_bbox": [x, y, 10, 10]}], shape=(8, 9))
        rows, columns = np.indices((8, 9))
        np.testing.assert_array_equal(labels, (rows >= y) & (rows < y + 10) & (columns >= x) & (columns < x + 10))


def test_shape_is_the_extent_of_all_tiles():
    records = [
        {"segmentation": np.eye(h, w, dtype=bool), "bbox": [0, 0, 1, 1], "global_bbox": [x, y, 1, 1],
         "predicted_iou": 1, "stability_score": 1}
        for h, w, y, x in ((10, 12, 0, 20), (11, 9, 15, 3))
    ]
    assert mask_data_to_segmentation(records).shape == (26, 32)
    assert apply_nms(records, 0).shape == (26, 32)
    assert mask_data_to_segmentation(records, shape=(30, 40)).shape == (30, 40)


@pytest.mark.parametrize("label_masks", [True, False])
@pytest.mark.parametrize(("background", "removed"), [
    ((slice(None), slice(None)), True),
    ((slice(None), slice(2, None)), True),
    ((slice(0, 8), slice(None)), True),
    ((slice(1, -1), slice(1, -1)), False),  # a real object that is larger than the empty area
    ((slice(0, 9), slice(0, 11)), False),  # touches two borders, but none opposite to each other
    ((slice(None), slice(0, 5)), False),  # reaches across, but more is empty
])
def test_with_background_removes_only_what_surrounds_the_objects(background, removed, label_masks):
    cell = np.zeros((10, 12), dtype=bool)
    cell[3:6, 4:7] = True
    surroundings = np.zeros((10, 12), dtype=bool)
    surroundings[background] = True
    surroundings &= ~cell
    for masks in ([cell, surroundings], [cell.T, surroundings.T]):
        records = [to_record(m, seg_id=k + 4) for k, m in enumerate(masks)]
        options = {"label_masks": label_masks, "merge_exclusively": False, "keep_ids": True}
        np.testing.assert_array_equal(mask_data_to_segmentation(records, **options), 4 * masks[0] + 5 * masks[1])
        labels = mask_data_to_segmentation(records, with_background=True, **options)
        np.testing.assert_array_equal(labels, 4 * masks[0] + (not removed) * 5 * masks[1])
        options["keep_ids"] = False
        labels = mask_data_to_segmentation(records, with_background=True, **options)
        assert labels.max() == (1 if removed else 2)
        assert (labels[masks[0]] > 0).all()


def test_distant_masks_are_never_compared(monkeypatch):  # 01-38
    calls = []
    real = masks_module.intersection
    monkeypatch.setattr(masks_module, "intersection", lambda a, b: calls.append(1) or real(a, b))
    square = np.ones((6, 6), dtype=bool)
    masks = [crop_mask(square, (8 * y, 8 * x)) for y in range(40) for x in range(40)]
    masks += [crop_mask(np.ones((320, 2), dtype=bool), (0, 0))]  # touches the 40 squares at the left
    assert suppress_masks(masks, [1.0] * 1600 + [0.5], 0.001, intersection_over_min=True) == list(range(1600))
    assert len(calls) <= 40
    calls.clear()
    assert suppress_masks(masks, [1.0] * 1600 + [0.5], 0.5) == list(range(1601))
    assert not calls  # the areas alone tell that the overlap is small


@pytest.mark.parametrize("large_score", [0.1, 0.9])
@pytest.mark.parametrize("over_min", [False, True])
def test_large_masks_among_many_small_ones(large_score, over_min):
    planes = np.zeros((102, 210, 220), dtype=bool)
    for k, (y, x) in enumerate(np.ndindex(10, 10)):
        planes[k, 21 * y:21 * y + 5, 22 * x:22 * x + 5] = True
    planes[100, :200, :200] = planes[101, 8:208, 3:203] = True
    scores = [0.5] * 100 + [large_score, large_score]
    kept = suppress_masks([crop_mask(m) for m in planes], scores, 0.6, over_min)
    assert kept == brute_force_nms(planes, scores, 0.6, over_min)
    assert 101 not in kept


@pytest.mark.parametrize("seed", range(5))
def test_crop_does_not_depend_on_the_hint(seed):  # 02-W24: boxes come in several orders
    rng = np.random.default_rng(seed)
    for mask in random_masks(rng, 12):
        plain = crop_mask(mask, (3, -4))
        y0, x0, y1, x1 = plain.box
        assert plain.area == mask.sum()
        if plain.area:
            full = np.zeros_like(mask)
            full[y0 - 3:y1 - 3, x0 + 4:x1 + 4] = plain.mask
            np.testing.assert_array_equal(full, mask)
            assert all(plain.mask[edge].any() for edge in (0, -1, (slice(None), 0), (slice(None), -1)))
        x, y, w, h = xywh(mask)
        for hint in ([x, y, w, h], [x, y, w - 1, h - 1], [y, x, h, w], [x, w, y, h], [-5, -5, 3, 3],
                     [x - SHAPE[1], y - SHAPE[0], w - 1, h - 1],
                     [60.7, 2.2, 900, 900], [x + 1, y, w, h], rng.integers(-9, 70, 4)):
            hinted = crop_mask(mask, (3, -4), hint)
            assert (hinted.box, hinted.area) == (plain.box, plain.area)
            np.testing.assert_array_equal(hinted.mask, plain.mask)


def test_scores_order_with_ties_and_nan():
    assert order_by_score([0.5, np.nan, 0.9, 0.5, -np.inf, 0.9]).tolist() == [2, 5, 0, 3, 1, 4]
    mask = np.ones((3, 3), dtype=bool)
    records = [to_record(mask, seg_id=1), to_record(mask, seg_id=2, predicted_iou=0.1, stability_score=0.1)]
    np.testing.assert_array_equal(apply_nms(records, 0, keep_ids=True), 2)  # without a score: last


def test_paint_masks_cuts_and_keeps():
    masks = [crop_mask(np.ones((3, 3), dtype=bool), (-1, -2)), crop_mask(np.ones((4, 4), dtype=bool), (1, 0))]
    for exclusive, corner in ((True, 5), (False, 6)):
        painted = paint_masks((3, 3), masks, [5, 6], exclusive)
        np.testing.assert_array_equal(painted, [[5, 0, 0], [corner, 6, 6], [6, 6, 6]])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint64"])
def test_masks_of_integer_dtype(dtype):
    mask = np.zeros((6, 7), dtype=bool)
    mask[2:4, 1:5] = True
    numbers = mask.astype(dtype) * np.array(3, dtype=dtype)
    np.testing.assert_array_equal(apply_nms([{"segmentation": numbers}], 8), mask)
    np.testing.assert_array_equal(as_bool_array(mask[None].astype(dtype)), mask)


def test_compute_iou():
    rng = np.random.default_rng(0)
    for shape in ((30,), (6, 7), (4, 5, 6)):
        a, b = rng.random((2, *shape)) < 0.4
        expected = (a & b).sum() / (a | b).sum()
        assert expected > 0.1
        for dtypes in ((bool, bool), (np.uint8, np.float32), (np.int16, bool)):
            assert compute_iou(a.astype(dtypes[0]), b.astype(dtypes[1])) == pytest.approx(expected, rel=1e-6)
        assert compute_iou(a, ~a) == 0
    empty = np.zeros((3, 3), dtype=bool)
    assert compute_iou(empty, empty) == 0
    assert compute_iou(np.ones((3, 3)), np.ones((3, 3))) == pytest.approx(1)
    assert type(compute_iou(empty, empty)) is float


def random_labels(rng, shape, n, ids=None):
    """Touching and overlapping ellipsoids, some of them cut, with thin and one-pixel objects."""
    grid = np.indices(shape)
    labels = np.zeros(shape, dtype=np.int64)
    ids = rng.permutation(np.arange(1, 3 * n))[:n] if ids is None else ids
    for i in ids:
        radii = rng.choice([0.4, 1.5, 4, 8], size=len(shape))
        center = [rng.integers(0, s) for s in shape]
        labels[sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii)) <= 1] = i
    return labels


def deepest_pixels(labels):
    boundary = find_boundaries(np.pad(labels, 1), mode="inner")
    distances = distance_transform_edt(~boundary)[(slice(1, -1),) * labels.ndim]
    return {
        int(i): tuple(int(k) for k in np.unravel_index(np.where(labels == i, distances, -1).argmax(), labels.shape))
        for i in np.unique(labels[labels > 0])
    }


@pytest.mark.parametrize("shape", [(60, 75), (14, 30, 35), (1, 40), (40, 1), (1, 30, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_centers_and_boxes(shape, seed):  # 02-W24: depth is z1 - z0
    rng = np.random.default_rng(seed)
    volume = random_labels(rng, shape, 25)
    no_background = np.where(volume == 0, 99, volume)
    for labels in (volume, no_background, np.asfortranarray(volume)):
        deepest, boxes = get_centers_and_bounding_boxes(labels)
        centroids, boxes_again = get_centers_and_bounding_boxes(labels, mode="p")
        props = regionprops(labels)
        assert len(props) >= 3
        assert boxes == boxes_again == {p.label: p.bbox for p in props}
        assert deepest == deepest_pixels(labels)
        assert centroids.keys() == deepest.keys()
        for p in props:
            assert centroids[p.label] == pytest.approx(p.centroid)
            assert labels[deepest[p.label]] == p.label
        assert all(type(k) is int for center in deepest.values() for k in center)
        assert all(type(k) is float for center in centroids.values() for k in center)


def test_centers_of_sparse_ids():
    rng = np.random.default_rng(3)
    ids = np.array([7, 300, 2 ** 31, 2 ** 40, 2 ** 62], dtype=np.uint64)
    dense = random_labels(rng, (50, 60), 5, ids=range(1, 6))
    for labels, names in ((dense, [0, *ids]), (np.where(dense == 0, 5, dense), [8, *ids])):
        sparse = np.array(names, dtype=np.uint64)[labels]
        for mode in ("v", "p"):
            for part, part_of_dense in zip(
                get_centers_and_bounding_boxes(sparse, mode), get_centers_and_bounding_boxes(labels, mode)
            ):
                assert len(part) == len(np.unique(labels[labels > 0])) >= 4
                assert part == {int(names[i]): value for i, value in part_of_dense.items()}


@pytest.mark.parametrize("labels", [np.zeros((4, 5), int), np.zeros((0, 5), int), np.zeros((2, 3, 4), bool)])
def test_centers_of_no_objects(labels):  # 02-W14
    for mode in ("v", "p"):
        assert get_centers_and_bounding_boxes(labels, mode) == ({}, {})


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint32", "uint64", ">u2", ">i8"])
def test_label_images_of_any_integer_dtype(dtype):
    base = np.zeros((12, 15), dtype=np.int64)
    base[1:6, 2:8] = 1
    if dtype != "bool":
        base[6:11, 5:14] = 4
        base[0, 0] = 9
    labels = base.astype(dtype)
    copy = labels.copy()
    labels.setflags(write=False)
    for mode in ("v", "p"):
        assert get_centers_and_bounding_boxes(labels, mode) == get_centers_and_bounding_boxes(base, mode)
    assert get_centers_and_bounding_boxes(labels)[0][1] == (3, 4)
    np.testing.assert_array_equal(segmentation_to_one_hot(labels), segmentation_to_one_hot(base))
    np.testing.assert_array_equal(relabel_consecutive(labels), np.searchsorted(np.unique(base), base))
    removed = remove_small_labels(labels, 2)
    np.testing.assert_array_equal(removed, np.where(base == 9, 0, base))
    assert removed.dtype == (np.uint8 if dtype == "bool" else labels.dtype)
    np.testing.assert_array_equal(labels, copy)


def test_one_hot():
    labels = np.zeros((6, 7), dtype=np.uint16)
    labels[0:2, 1:4], labels[3:5], labels[5, 6] = 3, 1, 300
    one_hot = segmentation_to_one_hot(labels, [300, 3, 1, 3])
    assert one_hot.dtype == torch.float32
    assert one_hot.shape == (3, 1, 6, 7)
    for channel, i in enumerate((1, 3, 300)):
        np.testing.assert_array_equal(one_hot[channel, 0], labels == i)
    everything = segmentation_to_one_hot(labels)
    assert everything.shape == (300, 1, 6, 7)
    assert everything.sum(dim=(1, 2, 3)).nonzero().ravel().tolist() == [0, 2, 299]
    np.testing.assert_array_equal(everything[2, 0], labels == 3)
    assert segmentation_to_one_hot(np.zeros((6, 7), dtype=int)).shape == (0, 1, 6, 7)


def test_one_hot_of_absent_ids_has_empty_channels():  # 01-42
    labels = np.zeros((6, 7), dtype=np.uint8)
    labels[:, 2], labels[:, 5] = 1, 4
    one_hot = segmentation_to_one_hot(labels, [4, 1000, 2, 1])
    sums = one_hot.sum(dim=(1, 2, 3)).tolist()
    assert sums == [6, 0, 6, 0]
    np.testing.assert_array_equal(one_hot[2, 0], labels == 4)


@pytest.mark.parametrize(("shape", "expected"), [
    ((3000, 500), (1024, 500)), ((1024, 1025), (1024, 1024)), ((7, 300, 200), (7, 256, 200)),
    ((100, 9999, 256), (32, 256, 256)),
])
def test_block_shape(shape, expected):
    assert get_block_shape(shape) == expected
    assert get_block_shape(list(np.array(shape))) == expected


def test_relabelling_and_removal():
    rng = np.random.default_rng(0)
    for low in (0, 1):  # with and without background
        labels = rng.choice([low, 5, 2 ** 33, 2 ** 63], p=[0.5, 0.3, 0.15, 0.05], size=(5, 12, 13)).astype(np.uint64)
        relabelled = relabel_consecutive(labels)
        assert relabelled.dtype == np.uint32
        names = np.array([low, 5, 2 ** 33, 2 ** 63], dtype=np.uint64)
        np.testing.assert_array_equal(names[relabelled - low], labels)
        sizes = [int((labels == i).sum()) for i in names]
        for min_size in sizes + [size + 1 for size in sizes]:
            expected = labels.copy()
            for i, size in zip(names, sizes):
                expected[labels == i] = i if size >= min_size else 0
            np.testing.assert_array_equal(remove_small_labels(labels, min_size), expected)


def test_relabelling_and_removal_give_new_arrays():
    labels = np.array([[0, 1, 1, 2]], dtype=np.uint32)
    for result in (relabel_consecutive(labels), remove_small_labels(labels, 0), remove_small_labels(labels, 1)):
        np.testing.assert_array_equal(result, labels)
        assert not np.shares_memory(result, labels)
    for empty in (np.zeros((0, 4), dtype=np.uint8), np.zeros((2, 4), dtype=np.uint8)):
        np.testing.assert_array_equal(relabel_consecutive(empty), empty)
        np.testing.assert_array_equal(remove_small_labels(empty, 3), empty)


def test_masks_and_records_are_not_modified():
    rng = np.random.default_rng(5)
    records = [
        to_record(m, predicted_iou=0.5, stability_score=0.5, seg_id=k + 1) for k, m in enumerate(random_masks(rng, 20))
    ]
    records.append(to_record(np.ones(SHAPE, dtype=bool), predicted_iou=0.9, stability_score=0.9, seg_id=30))
    copies = [{**r, "segmentation": r["segmentation"].copy(), "bbox": list(r["bbox"])} for r in records]
    for exclusive in (True, False):
        mask_data_to_segmentation(records, merge_exclusively=exclusive, with_background=True)
    for options in ({}, {"perform_box_nms": True}, {"intersection_over_min": True}):
        apply_nms(records, 5, **options)
    for record, copy in zip(records, copies):
        assert record.keys() == copy.keys()
        np.testing.assert_array_equal(record.pop("segmentation"), copy.pop("segmentation"))
        assert record == copy


PLANE = np.zeros((4, 5), dtype=bool)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: compute_iou(PLANE * 4 + 4, PLANE), ValueError, "mask1 must hold only 0 and 1"),  # 01-42
    (lambda: compute_iou(PLANE, np.full((4, 5), np.nan)), ValueError, "mask2 must hold only 0 and 1"),
    (lambda: compute_iou(PLANE, PLANE.T), ValueError, r"same shape, but got \(4, 5\) and \(5, 4\)"),
    (lambda: get_centers_and_bounding_boxes(PLANE, mode="c"), ValueError, "mode must be 'v'.* but got 'c'"),
    (lambda: get_centers_and_bounding_boxes(PLANE[0]), ValueError, r"\(Y, X\) or \(Z, Y, X\), but got \(5,\)"),
    (lambda: get_centers_and_bounding_boxes(PLANE - np.int8(1)), ValueError, "negative ids"),
    (lambda: get_centers_and_bounding_boxes(PLANE.astype(float)), TypeError, "integer dtype, but got float64"),
    (lambda: segmentation_to_one_hot(PLANE, []), RuntimeError, "positive ids, at least one"),
    (lambda: segmentation_to_one_hot(PLANE, [0, 1]), RuntimeError, r"positive ids, at least one, but got \[0, 1\]"),
    (lambda: segmentation_to_one_hot(PLANE, [0, 1]), ValueError, "positive ids"),
    (lambda: segmentation_to_one_hot(PLANE[None]), ValueError, r"\(H, W\), but got \(1, 4, 5\)"),
    (lambda: segmentation_to_one_hot(PLANE.astype("float32")), TypeError, "integer dtype"),
    (lambda: get_block_shape((3,)), ValueError, r"2D and 3D shapes are supported, but got \(3,\)"),
    (lambda: get_block_shape((3, 4, 5, 6)), ValueError, "2D and 3D"),
    (lambda: relabel_consecutive(np.array([-1, 2])), ValueError, "negative ids"),
    (lambda: remove_small_labels(np.array([0.5]), 3), TypeError, "integer dtype"),
    (lambda: mask_data_to_segmentation([to_record(PLANE), to_record(PLANE.T)]), ValueError, "need 'global_bbox'"),
    (lambda: mask_data_to_segmentation([to_record(PLANE)], shape=(9, 9)), ValueError, r"\(4, 5\).* has \(9, 9\)"),
    (lambda: apply_nms([to_record(PLANE)], 0, shape=(4, 5, 1)), ValueError, r"shape must be \(H, W\)"),
    (lambda: mask_data_to_segmentation([{"area": 3}]), ValueError, r"needs the key 'segmentation'.*\['area'\]"),
    (lambda: mask_data_to_segmentation([to_record(PLANE, seg_id=0)]), ValueError, "seg_id must be from 1.* got 0"),
    (lambda: apply_nms([to_record(PLANE, seg_id=-3)], 0), ValueError, "seg_id must be from 1.* got -3"),
    (lambda: apply_nms([to_record(PLANE, seg_id=2**32)], 0), ValueError, "seg_id must be from 1.* got 4294967296"),
    (lambda: apply_nms([{"segmentation": PLANE, "global_bbox": [0, 0, 1, 1]}], 0), ValueError, "needs 'bbox' too"),
    (lambda: apply_nms([{"segmentation": PLANE.astype(float)}], 0), TypeError, "must be bool, but got float64"),
    (lambda: apply_nms([{"segmentation": torch.zeros(2, 4, 5)}], 0), ValueError, r"\(H, W\), but got \(2, 4, 5\)"),
    (lambda: apply_nms([], 0, perform_box_nms=True, intersection_over_min=True), ValueError, "cannot be combined"),
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
