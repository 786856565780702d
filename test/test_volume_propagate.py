"""Objects through volumes: against a plain loop over slices, with masks that are drawn and with the tiny model."""

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from scipy import ndimage
from segment_anything import SamPredictor

from micro_sam import prompt_based_segmentation
from micro_sam.core.errors import InvalidInputError, InvalidTypeError, PromptTileError
from micro_sam.core.masks import BoxedMask, crop_mask
from micro_sam.core.progress import Step
from micro_sam.core.prompts import logits_from_mask, points_from_mask
from micro_sam.core.tiling import TileSpec
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.embeddings.features import FeatureArray, TiledFeatures
from micro_sam.prompt_based_segmentation import (
    segment_from_box,
    segment_from_box_and_points,
    segment_from_mask,
    segment_from_points,
)
from micro_sam.volume import propagation_prompts
from micro_sam.volume.paint import paint_objects
from micro_sam.volume.propagate import (
    PROJECTION_MODES,
    Confidence,
    PropagatedObject,
    SlicePrompts,
    _plan,
    propagate_objects,
    propagate_objects_steps,
    segment_mask_in_volume,
    segment_mask_in_volume_steps,
)
from micro_sam.volume.propagation_prompts import logits_from_boxed_mask, points_from_boxed_mask

SHAPE = (13, 150, 220)
TILING = TileSpec.create(SHAPE[1:], (70, 100), (30, 40))
SHIFTS = np.random.default_rng(1).uniform(-3, 3, (SHAPE[0], 2))
GROWTH = np.random.default_rng(2).uniform(-0.8, 0.8, SHAPE[0])
FLAGS = {  # spec 02, section 10: use_box, use_mask, use_points, use_single_point
    "box": (True, False, False, False), "mask": (True, True, False, False), "points": (False, False, True, False),
    "points_and_mask": (False, True, True, False), "single_point": (False, False, False, True),
}


class Planes:
    """Features (Z, 1, C, h, w) whose values are the number of the slice; notes what is read."""

    shape = (SHAPE[0], 1, 256, 16, 16)

    def __init__(self):
        self.read = []

    def __getitem__(self, z):
        self.read.append(z)
        return np.full(self.shape[1:], z, dtype=np.float32)


@pytest.fixture
def plain():
    return {"features": Planes(), "input_size": (175, 256), "original_size": SHAPE[1:]}


class TilePlanes(Planes, FeatureArray):
    def __init__(self, tile):
        Planes.__init__(self)
        height, width = tile.outer_shape
        scale = 256 / max(height, width)
        self.attrs = {
            "original_size": (height, width), "input_size": (int(height * scale + 0.5), int(width * scale + 0.5))
        }


@pytest.fixture
def tiled():
    attrs = {"shape": TILING.shape, "tile_shape": TILING.tile_shape, "halo": TILING.halo}
    features = TiledFeatures({str(tile.id): TilePlanes(tile) for tile in TILING}, attrs, len(TILING))
    return {"features": features, "input_size": None, "original_size": None}


@pytest.fixture
def embeddings(request, plain, tiled):
    return {"plain": plain, "tiled": tiled}[request.param]


@pytest.fixture
def predictor(tiny_sam):
    return SamPredictor(tiny_sam)


def grid(predictor):
    """Positions (y, x), in pixels, of low-resolution logits."""
    centers = (np.arange(64) + 0.5) * 4 * max(predictor.original_size) / 256
    return centers[:, None], centers[None]


def draw(predictor, prompts, multimask_output):
    """Logits that depend on all prompts and on the slice: what the prompts have in common, moved and grown a bit."""
    z = int(predictor.features[0, 0, 0, 0])
    (y, x), spacing = grid(predictor), 4 * max(predictor.original_size) / 256
    y, x = y - SHIFTS[z, 0], x - SHIFTS[z, 1]
    logits = []
    for k in range(max(len(v) for v in (prompts.boxes, prompts.points, prompts.logits) if v is not None)):
        parts = []
        if prompts.boxes is not None:
            x0, y0, x1, y1 = prompts.boxes[k]
            a, b = max((x1 - x0) / 2, 1), max((y1 - y0) / 2, 1)
            parts.append((1 - np.hypot((x - (x0 + x1) / 2) / a, (y - (y0 + y1) / 2) / b)) * min(a, b))
        if prompts.points is not None:
            points, labels = prompts.points[k], prompts.labels[k]
            px, py = points[labels == 1].mean(axis=0) if (labels == 1).any() else points.mean(axis=0)
            parts.append(17 - 0.1 * len(points) - np.hypot(x - px, y - py))
            parts += [np.hypot(x - px, y - py) - 5 for px, py in points[labels == 0]]
        if prompts.logits is not None:
            mask = prompts.logits[k, 0] > 0
            distance = (ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)) * spacing
            parts.append(ndimage.shift(distance, SHIFTS[z] / spacing, order=1, mode="nearest"))
        logit = np.minimum.reduce(np.broadcast_arrays(*parts)) + GROWTH[z]
        logits.append([logit - 3, logit, logit + 2] if multimask_output else [logit])
    logits = torch.tensor(np.array(logits), dtype=torch.float32)
    ious = 0.6 + 0.2 * torch.sin(logits.mean(dim=(2, 3)))
    return logits, ious


class Calls(list):
    """(slice, number of objects) of all calls of a decoder that is drawn."""

    def install(self, monkeypatch, function):
        def decode(predictor, prompts, multimask_output):
            logits, ious = function(predictor, prompts, multimask_output)
            self.append((int(predictor.features[0, 0, 0, 0]), len(logits)))
            return logits, ious

        for module in (propagation_prompts, prompt_based_segmentation):
            monkeypatch.setattr(module, "decode_prompts", decode)


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    calls.install(monkeypatch, draw)
    return calls


def disc(center=(60, 120), radius=20, shape=SHAPE[1:]):
    y, x = np.ogrid[:shape[0], :shape[1]]
    return np.hypot(y - center[0], 0.8 * (x - center[1])) <= radius


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def full(mask: BoxedMask, shape=SHAPE[1:]):
    out = np.zeros(shape, dtype=bool)
    y0, x0, y1, x1 = mask.box
    out[y0:y1, x0:x1] = mask.mask
    return out


def sequential(masks, predictor, embeddings, stops, threshold, flags, extension, n_slices=SHAPE[0]):
    """Spec 02, 10.1 slice by slice. `masks` by annotated slice; returns all masks, the extent and the slices done."""
    masks, done = dict(masks), []

    def segment(z, mask):
        done.append(z)
        return segment_from_mask(
            predictor, mask, embeddings, z, *flags[:3], use_single_point=flags[3], box_extension=extension
        )[0]

    def follow(zs, step, threshold=None):
        for z in zs:
            new = segment(z, masks[z - step])
            if threshold is not None and (not new.any() or iou(masks[z - step], new) < threshold):
                break
            masks[z] = new

    slices = sorted(masks)
    if not stops[0] and masks[slices[0]].any():
        follow(range(slices[0] - 1, -1, -1), -1, threshold)
    if not stops[1] and masks[slices[-1]].any():
        follow(range(slices[-1] + 1, n_slices), 1, threshold)
    for a, b in zip(slices, slices[1:]):
        middle = (a + b) // 2
        if a == slices[0] and stops[0]:
            follow(range(b - 1, a, -1), -1)
        elif b == slices[-1] and stops[1]:
            follow(range(a + 1, b), 1)
        elif (b - a) % 2:
            follow(range(a + 1, middle + 1), 1)
            follow(range(b - 1, middle, -1), -1)
        else:
            follow(range(a + 1, middle), 1)
            follow(range(b - 1, middle, -1), -1)
            masks[middle] = segment(middle, masks[middle - 1] | masks[middle + 1])
    return masks, (min(masks), max(masks)), done


def annotated(slices, stops, shape=SHAPE):
    """Masks that move a bit; the outermost ones are empty where the object is said to have ended."""
    masks = {z: disc((55 + z, 110 + 2 * z), 18 + z % 3, shape[1:]) for z in slices}
    for end, z in zip(stops, (min(slices), max(slices))):
        if end and len(slices) > 1:
            masks[z] = np.zeros(shape[1:], dtype=bool)
    return masks


def check_against_reference(predictor, embeddings, slices, stops, threshold, projection, extension, shape=SHAPE):
    masks = annotated(slices, stops, shape)
    segmentation = np.zeros(shape, dtype=np.uint8)
    for z, mask in masks.items():
        segmentation[z] = mask
    updates = []
    result, extent = segment_mask_in_volume(
        segmentation, predictor, embeddings, np.array(slices), *stops, threshold, projection, updates.append, extension
    )
    flags = FLAGS[projection] if isinstance(projection, str) else (*projection.values(), False)
    expected, expected_extent, done = sequential(
        masks, predictor, embeddings, stops, threshold, flags, extension, shape[0]
    )
    assert result is segmentation
    assert extent == expected_extent
    for z in range(shape[0]):
        mask = expected.get(z, np.zeros(shape[1:], dtype=bool))
        assert iou(result[z] == 1, mask) > 0.99 or not (result[z].any() or mask.any()), z
    assert set(np.unique(result)) <= {0, 1}
    assert updates == [1] * len(done)  # 02-W21: the last slice of each range counts as well
    return expected, done


CASES = [
    ([6], (False, False)), ([4], (True, False)), ([4], (False, True)), ([5, 7], (False, False)),
    ([5, 6], (True, True)), ([2, 7], (False, False)), ([2, 8], (False, False)), ([2, 8], (True, False)),
    ([2, 7], (False, True)), ([8, 1, 5, 12], (True, True)), ([0, 12], (False, False)), ([9, 4, 3], (False, False)),
]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("projection", PROJECTION_MODES)
@pytest.mark.parametrize(("slices", "stops"), CASES)  # 02-W21: unsorted slices, single points in the slices of unions
def test_volume_equals_loop_over_slices(predictor, plain, projection, slices, stops):
    expected, done = check_against_reference(predictor, plain, slices, stops, 0.5, projection, 0.1)
    assert len(done) > 2 or slices == [5, 6]
    assert sum(mask.sum() > 100 for mask in expected.values()) >= len(done) * 0.4


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("projection", [*PROJECTION_MODES, {"use_box": True, "use_mask": True, "use_points": True}])
@pytest.mark.parametrize("extension", [0.0, 0.25, 3])
def test_volume_with_tiles(predictor, tiled, projection, extension):
    check_against_reference(predictor, tiled, [2, 9], (False, False), 0.5, projection, extension)


@pytest.fixture(scope="module")
def volume():
    values = ndimage.gaussian_filter(np.random.default_rng(0).random((5, 150, 220)), (0.5, 3, 3))
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def real(tiny_sam, volume):
    return precompute_image_embeddings(SamPredictor(tiny_sam), volume, ndim=3, batch_size=5, verbose=False)


@pytest.mark.parametrize("projection", PROJECTION_MODES)
def test_volume_with_model(predictor, real, projection):
    check_against_reference(predictor, real, [0, 3], (False, False), 0.0, projection, 0.0, (5, 150, 220))


def assert_same(found: PropagatedObject, expected: PropagatedObject, tolerance=1e-5):
    assert list(found.masks) == list(expected.masks) == sorted(found.masks)
    assert (found.anchors, found.stopped_lower, found.stopped_upper) == (
        expected.anchors, expected.stopped_lower, expected.stopped_upper
    )
    for z, mask in found.masks.items():
        assert iou(full(mask), full(expected.masks[z])) > 0.99
        assert mask.area == mask.mask.sum() > 0
        assert mask.mask[[0, -1]].any(axis=1).all()
        assert mask.mask[:, [0, -1]].any(axis=0).all()
    assert found.confidence.keys() == expected.confidence.keys()
    for z, confidence in found.confidence.items():
        assert confidence.predicted_iou == pytest.approx(expected.confidence[z].predicted_iou, abs=tolerance)
        assert confidence.stability == pytest.approx(expected.confidence[z].stability, abs=0.01)


def several():
    return {
        1: {3: disc((60, 60))},
        7: {3: disc((60, 160)), 9: disc((65, 165), 15)},
        2: {5: disc((110, 40), 15), 8: SlicePrompts(points=[[112, 44]], labels=[1]), 10: disc((110, 50), 15)},
        4: {0: SlicePrompts(box=[10, 150, 50, 200]), 12: SlicePrompts(points=[[30, 170], [5, 5]], labels=[1, 0])},
        300: {6: crop_mask(disc((100, 150)))},
    }


@pytest.mark.parametrize("projection", PROJECTION_MODES)
@pytest.mark.parametrize("embeddings", ["plain", "tiled"], indirect=True)
def test_several_objects_equal_one_at_a_time(predictor, embeddings, calls, projection):
    objects = several()
    before = {id_: {z: np.copy(getattr(p, "mask", p)) for z, p in prompts.items()} for id_, prompts in objects.items()}
    together = propagate_objects(predictor, embeddings, objects, projection, iou_threshold=0.6, verbose=False)
    n_together = len(calls)
    assert list(together) == list(objects)
    for id_, prompts in objects.items():
        alone = propagate_objects(
            predictor, embeddings, {id_: prompts}, projection, iou_threshold=0.6, batch_size=1, verbose=False
        )
        assert_same(together[id_], alone[id_])
        assert set(together[id_].confidence) == set(together[id_].masks) - {
            z for z, p in prompts.items() if not isinstance(p, SlicePrompts)
        }
    assert n_together < len(calls) - n_together
    for id_, prompts in objects.items():
        for z, p in prompts.items():
            np.testing.assert_array_equal(getattr(p, "mask", p), before[id_][z])


def test_one_call_per_slice_and_direction(predictor, plain, calls):
    objects = {k + 1: {6 - k % 2: disc((30 + 25 * (k % 4), 40 + 60 * (k // 4)), 12)} for k in range(8)}
    result = propagate_objects(predictor, plain, objects, "mask", iou_threshold=0, max_area_change=None,
                               max_drift=None, verbose=False)
    assert all(o.z_range == (0, 12) for o in result.values())
    assert calls == (
        [(5, 4)] + [(z, 8) for z in range(4, -1, -1)] + [(6, 4)] + [(z, 8) for z in range(7, 13)]
    )
    assert plain["features"].read == [z for z, _ in calls]  # lazy: a slice is read once per pass
    calls.clear()
    propagate_objects(predictor, plain, objects, "mask", z_range=(5, 6 + 1), batch_size=3, verbose=False)
    assert calls == [(5, 3), (5, 1), (6, 3), (6, 1)]


@pytest.mark.parametrize("projection", ["box", "points_and_mask"])
def test_several_objects_with_model(predictor, real, projection):
    objects = {
        k + 1: {z: disc(center, 15)} for k, (z, center) in enumerate([(0, (40, 50)), (2, (90, 150)), (2, (40, 170))])
    }
    objects[9] = {1: SlicePrompts(points=[[100, 60]], labels=[1]), 4: SlicePrompts(box=[80, 30, 120, 90])}
    options = {"iou_threshold": 0, "max_area_change": None, "max_drift": None, "verbose": False}
    together = propagate_objects(predictor, real, objects, projection, **options)
    for id_, prompts in objects.items():
        assert_same(together[id_], propagate_objects(predictor, real, {id_: prompts}, projection, **options)[id_])
    masks, scores, _ = segment_from_points(predictor, [[100, 60]], [1], real, 1, return_all=True)
    assert iou(full(together[9].masks[1]), masks[0]) > 0.99
    assert together[9].confidence[1].predicted_iou == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("embeddings", ["plain", "tiled"], indirect=True)
def test_prompts_give_the_masks_of_their_slices(predictor, embeddings):  # 02-W19: (y, x) everywhere
    point, two, box = np.array([[40, 170]]), np.array([[40, 170], [52, 180]]), [20, 150, 60, 200]
    objects = {
        1: {4: SlicePrompts(points=point, labels=[1])},
        2: {4: SlicePrompts(points=two, labels=[1, 0])},
        3: {4: SlicePrompts(box=box)},
        4: {4: SlicePrompts(points=two, labels=[1, 0], box=box)},
        5: {4: SlicePrompts(points=two[::-1], labels=[0, 1])},
    }
    found = propagate_objects(predictor, embeddings, objects, z_range=(4, 5), verbose=False)
    expected = [
        segment_from_points(predictor, point, [1], embeddings, 4),
        segment_from_points(predictor, two, [1, 0], embeddings, 4),
        segment_from_box(predictor, box, embeddings, 4),
        segment_from_box_and_points(predictor, box, two, [1, 0], embeddings, 4),
        segment_from_points(predictor, two[::-1], [0, 1], embeddings, 4),
    ]
    for item, masks in zip(found.values(), expected):
        assert iou(full(item.masks[4]), masks[0]) > 0.99
        assert item.anchors == (4,)
        assert (item.stopped_lower, item.stopped_upper) == ("z_range", "z_range")


@pytest.mark.usefixtures("calls")
def test_prompts_of_several_tiles(predictor, tiled):
    far = SlicePrompts(points=[[40, 170], [140, 10]], labels=[1, 0])  # the negative one is beyond the tile
    found = propagate_objects(predictor, tiled, {1: {4: far}}, verbose=False)[1]
    with pytest.warns(UserWarning, match="points lie outside"):
        expected = segment_from_points(predictor, far.points, far.labels, tiled, 4, use_best_multimask=False)
    assert iou(full(found.masks[4]), expected[0]) > 0.99
    apart = SlicePrompts(points=[[40, 170]], labels=[1], box=[80, 5, 120, 40])
    with pytest.raises(PromptTileError, match="different tiles"):
        propagate_objects(predictor, tiled, {1: {4: apart}}, verbose=False)
    corners = SlicePrompts(points=[[5, 215], [145, 5]], labels=[1, 1])
    with pytest.raises(PromptTileError, match="No positive point"):
        propagate_objects(predictor, tiled, {1: {4: corners}}, verbose=False)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("embeddings", ["plain", "tiled"], indirect=True)
@pytest.mark.parametrize("projection", ["box", "points_and_mask"])
def test_prompts_refine_what_is_projected(predictor, embeddings, projection):
    mask, negative = disc((60, 120)), np.array([[50.0, 110.0]])
    start, options = {4: mask}, {"iou_threshold": 0, "max_area_change": None, "max_drift": None, "verbose": False}
    free = propagate_objects(predictor, embeddings, {1: start}, projection, **options)[1]
    prompts = {**start, 6: SlicePrompts(points=negative, labels=[0])}
    found = propagate_objects(predictor, embeddings, {1: prompts}, projection, **options)[1]
    assert found.anchors == (4,)
    assert iou(full(found.masks[5]), full(free.masks[5])) == 1
    assert free.masks[6].mask[50 - free.masks[6].y0, 110 - free.masks[6].x0]
    assert not full(found.masks[6])[50, 110]
    # All that is projected, with the point of the user first and without the projected ones that contradict it.
    previous, points, labels = full(free.masks[5]), negative, [0]
    if projection != "box":
        tiling = TILING if embeddings["input_size"] is None else TileSpec(SHAPE[1:], SHAPE[1:], (0, 0))
        tile = tiling.tile_at(*np.argwhere(previous).mean(axis=0))
        derived, derived_labels = points_from_mask(previous[tile.outer], 0.05)
        derived = derived + tile.origin
        keep = (np.linalg.norm(derived - negative, axis=1) >= 5) | (derived_labels == 0)
        points, labels = np.concatenate([negative, derived[keep]]), np.concatenate([[0], derived_labels[keep]])
    expected = segment_from_mask(
        predictor, previous, embeddings, 6, *FLAGS[projection][:3], points=points, labels=labels, box_extension=0.05
    )[0]
    assert iou(full(found.masks[6]), expected) > 0.99


@pytest.fixture
def truth(monkeypatch):
    """A volume whose slices the decoder returns, whatever the prompts are."""
    truth, calls = np.zeros(SHAPE, dtype=bool), Calls()

    def decode(predictor, prompts, multimask_output):
        n = max(len(v) for v in (prompts.boxes, prompts.points, prompts.logits) if v is not None)
        mask = truth[int(predictor.features[0, 0, 0, 0])]
        distance = ndimage.distance_transform_edt(mask) - (ndimage.distance_transform_edt(~mask) if mask.any() else 9)
        y, x = grid(predictor)
        logits = ndimage.map_coordinates(distance, np.broadcast_arrays(y - 0.5, x - 0.5), order=1, mode="nearest")
        logits[int(predictor.input_size[0]) // 4 + 1:] = -10
        logits = torch.tensor(logits, dtype=torch.float32).expand(n, 3 if multimask_output else 1, 64, 64)
        return logits, torch.full((n, logits.shape[1]), 0.9)

    calls.install(monkeypatch, decode)
    return truth, calls


def follow(predictor, plain, prompts, **options):
    return propagate_objects(predictor, plain, {1: prompts}, "box", verbose=False, **options)[1]


def test_stops(predictor, plain, truth):
    truth, calls = truth
    truth[2:11] = disc((70, 110), 20)
    found = follow(predictor, plain, {6: truth[6]})
    assert found.z_range == (2, 10)
    assert (found.stopped_lower, found.stopped_upper) == ("empty", "empty")
    assert found.confidence[5].predicted_iou == pytest.approx(0.9)
    assert 0.8 < found.confidence[5].stability < 1

    truth[9:] = disc((70, 110), 30)  # a leak
    truth[3] = disc((70, 130), 20)  # a jump
    truth[:3] = disc((70, 130), 20)
    options = {"iou_threshold": 0.2, "max_drift": None, "max_area_change": None}
    found = follow(predictor, plain, {6: truth[6]}, **options)
    assert (found.z_range, found.stopped_lower, found.stopped_upper) == ((0, 12), "volume", "volume")
    found = follow(predictor, plain, {6: truth[6]}, **options | {"max_area_change": 2, "max_drift": 0.4})
    assert (found.z_range, found.stopped_lower, found.stopped_upper) == ((4, 8), "drift", "area")
    found = follow(predictor, plain, {6: truth[6]}, **options | {"iou_threshold": 0.6})
    assert (found.z_range, found.stopped_lower, found.stopped_upper) == ((4, 8), "iou", "iou")
    assert max(z for z, _ in calls) == 12
    found = follow(predictor, plain, {6: truth[6]}, z_range=(5, 8))
    assert (found.z_range, found.stopped_lower, found.stopped_upper) == ((5, 7), "z_range", "z_range")
    found = follow(predictor, plain, {6: truth[6]}, stop_slices={1: [2, 11]})
    assert (found.z_range, found.stopped_lower, found.stopped_upper) == ((3, 10), "stop_slice", "stop_slice")
    found = follow(predictor, plain, {6: truth[6], 11: truth[11]}, stop_slices={1: [8]})
    assert list(found.masks) == [4, 5, 6, 7, 9, 10, 11, 12]
    # A positive point further up says that the object is there: nothing stops it before.
    found = follow(
        predictor, plain, {6: truth[6], 11: SlicePrompts(points=[[70, 110]], labels=[1], refine=True)}
    )
    assert (found.z_range, found.anchors) == ((4, 12), (6,))


def test_criteria_in_volume_are_optional(predictor, plain, truth):
    truth, _ = truth
    truth[:] = disc((70, 110), 20)
    truth[8:] = disc((70, 110), 30)
    for options, expected in (({}, (0, 12)), ({"max_area_change": 1.5}, (0, 7))):
        segmentation = np.zeros(SHAPE, dtype=bool)
        segmentation[6] = truth[6]
        result, extent = segment_mask_in_volume(
            segmentation, predictor, plain, [6], False, False, 0.3, "box", **options
        )
        assert extent == expected
        assert result.dtype == bool
        assert result.any(axis=(1, 2)).nonzero()[0].tolist() == list(range(extent[0], extent[1] + 1))


@pytest.mark.parametrize("projection", PROJECTION_MODES)
def test_nothing_is_segmented_without_a_prompt(predictor, plain, truth, projection):  # 02-W21
    truth, calls = truth
    truth[:] = disc((70, 110), 20)
    segmentation = np.ones(SHAPE, dtype=np.int16)
    segmentation[[3, 8]] = 0
    result, extent = segment_mask_in_volume(
        segmentation, predictor, plain, [3, 8], False, False, 0.5, projection
    )
    assert calls == []
    assert extent == (3, 8)
    assert not result[3:9].any()
    assert result[:3].all()
    assert result[9:].all()
    found = propagate_objects(
        predictor, plain, {1: {3: np.zeros(SHAPE[1:], bool), 6: truth[6]}}, projection, verbose=False
    )[1]
    assert (found.stopped_lower, min(found.masks)) == ("empty", 5)
    calls.clear()
    truth[5] = False  # lost in a gap: the rest of it is left empty
    segmentation = np.zeros(SHAPE, dtype=np.uint8)
    segmentation[3], updates = truth[0], []
    result, _ = segment_mask_in_volume(
        segmentation, predictor, plain, [3, 12], False, True, 0.5, projection, updates.append
    )
    assert result.any(axis=(1, 2)).nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    assert updates == [1] * (3 + 8)
    assert sorted(z for z, _ in calls if z > 3) == [4, 5]


def test_result_of_zarr_and_second_run(predictor, plain, calls, tmp_path):
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[6] = disc()
    start = expected.copy()
    _, extent = segment_mask_in_volume(expected, predictor, plain, [6], False, False, 0.5, "mask")
    stored = zarr.create_array(tmp_path / "labels.zarr", shape=SHAPE, chunks=(1, 80, 80), dtype="uint8")
    stored[6] = disc()
    result, other = segment_mask_in_volume(stored, predictor, plain, [6], False, False, 0.5, "mask")
    assert result is stored
    assert other == extent
    np.testing.assert_array_equal(stored[:], expected)
    again, other = segment_mask_in_volume(expected.copy(), predictor, plain, [6], False, False, 0.5, "mask")
    assert other == extent
    np.testing.assert_array_equal(again, expected)
    assert start.sum() == disc().sum()


def test_steps_and_cancel(predictor, plain, calls):
    segmentation = np.zeros(SHAPE, dtype=np.uint8)
    segmentation[6] = disc()
    steps = segment_mask_in_volume_steps(segmentation, predictor, plain, [6], False, False, 0.0, "box")
    assert next(steps) == Step(0, 12, "Propagate objects")
    assert next(steps).done == 1
    steps.close()
    assert segmentation.any(axis=(1, 2)).nonzero()[0].tolist() == [5, 6]
    assert len(calls) == 1
    done = list(propagate_objects_steps(predictor, plain, several(), "box"))
    by_text = {step.text: step for step in done}
    assert list(by_text) == ["Segment prompts", "Propagate objects"]
    assert all(step.done == step.total for step in by_text.values())
    assert by_text["Segment prompts"].total == 3
    shown = []
    propagate_objects(
        predictor, plain, several(), "box", pbar_init=lambda *args: shown.append(args), pbar_update=shown.append
    )
    assert sum(n for n in shown if not isinstance(n, tuple)) == sum(step.total for step in by_text.values())


def test_plan_fills_every_gap_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        slices = sorted(rng.choice(20, rng.integers(1, 6), replace=False).tolist())
        marks = {z: bool(rng.random() < 0.7) for z in slices}
        runs, meetings = _plan(marks, (marks[slices[0]], marks[slices[-1]]), (0, 19))
        filled = sorted([z for run in runs for z in run.slices] + meetings)
        expected = [
            z for z in range(20) if z not in marks and (
                marks[max((s for s in slices if s < z), default=min(slices))]
                or marks[min((s for s in slices if s > z), default=max(slices))]
            )
        ]
        assert filled == expected
        for z in meetings:
            below, above = max(s for s in slices if s < z), min(s for s in slices if s > z)
            assert z - below == above - z


def test_windows_give_the_prompts_of_whole_slices():
    rng = np.random.default_rng(0)
    for n in range(60):
        shape = tuple(rng.integers(20, 400, 2).tolist())
        mask = np.zeros(shape, dtype=bool)
        size = rng.integers(1, np.array(shape) // (1 if n % 5 == 0 else 3) + 1)
        start = [rng.integers(0, s - k + 1) for s, k in zip(shape, size)]
        blob = ndimage.gaussian_filter(rng.random(size), 2) > 0.5 if n % 2 else np.ones(size, dtype=bool)
        mask[start[0]:start[0] + size[0], start[1]:start[1] + size[1]] = blob
        boxed = crop_mask(mask)
        for side in (64, 256):
            found, expected = logits_from_boxed_mask(boxed, shape, side), logits_from_mask(mask, side)
            assert found.shape == expected.shape
            assert found.dtype == np.float32
            differ = np.argwhere(found[0] != expected[0])  # only where as much of a pixel is foreground as background
            rows, columns = (int(s * side / max(shape) + 0.5) for s in shape)
            scaled = Image.fromarray(mask.astype(np.float32)).resize((columns, rows), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(np.asarray(scaled)[tuple(differ.T)], 0.5, atol=1e-5)
        for extension, single in ((0.0, False), (0.25, False), (0.05, True), (4, False)):
            found = points_from_boxed_mask(boxed, shape, extension, single)
            expected = points_from_mask(mask, extension, single)
            if expected is None:
                assert found is None
                continue
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def painted_by_brute_force(labels, objects, preserve):
    out = labels.copy()
    for z, y, x in np.ndindex(labels.shape):
        claims = []
        for id_, item in objects.items():
            if z in item.masks and full(item.masks[z], labels.shape[1:])[y, x]:
                score = item.confidence[z].predicted_iou if z in item.confidence else np.inf
                claims.append((score, -id_))
        if claims and (preserve == "none" or labels[z, y, x] == 0):
            out[z, y, x] = -max(claims)[1]
    return out


@pytest.mark.parametrize("preserve", ["existing", "none"])
def test_paint(preserve, tmp_path):
    rng = np.random.default_rng(0)
    shape = (3, 12, 14)
    objects = {}
    for id_ in (5, 2, 9, 3):
        masks = {z: crop_mask(disc(rng.integers(2, 10, 2), rng.integers(2, 5), shape[1:])) for z in (0, 2)}
        confidence = {} if id_ == 9 else {z: Confidence(0.5 if id_ == 5 else rng.random(), 1.0) for z in masks}
        confidence.pop(2 if id_ == 2 else -1, None)
        objects[id_] = PropagatedObject(id_, masks, confidence, (), "empty", "empty")
    labels = (rng.random(shape) < 0.3).astype(np.uint16) * rng.integers(1, 12, shape).astype(np.uint16)
    expected = painted_by_brute_force(labels, objects, preserve)
    assert (expected != labels).any()
    stored = zarr.create_array(tmp_path / "labels.zarr", shape=shape, chunks=(2, 5, 5), dtype="uint16")
    stored[:] = labels
    paint_objects(stored, objects, preserve)
    np.testing.assert_array_equal(stored[:], expected)
    paint_objects(labels, objects, preserve)
    np.testing.assert_array_equal(labels, expected)
    paint_objects(labels, {}, preserve)
    np.testing.assert_array_equal(labels, expected)


def test_errors_of_paint():
    item = PropagatedObject(300, {1: crop_mask(disc(shape=(150, 220)))}, {}, (1,), "empty", "empty")
    with pytest.raises(InvalidInputError, match="does not fit into uint8"):
        paint_objects(np.zeros(SHAPE, np.uint8), {300: item})
    with pytest.raises(InvalidInputError, match="shape"):
        paint_objects(np.zeros((1, 150, 220), np.uint16), {300: item})
    with pytest.raises(InvalidTypeError, match="integer"):
        paint_objects(np.zeros(SHAPE), {300: item})
    with pytest.raises(InvalidInputError, match="existing, none"):
        paint_objects(np.zeros(SHAPE, int), {300: item}, "all")


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("change", "message"), [
    ({"segmentation": np.full(SHAPE, 2)}, "only 0 and 1"),  # 02-W21
    ({"segmentation": np.zeros(SHAPE[1:])}, "shape"),
    ({"segmented_slices": []}, "at least one"),
    ({"segmented_slices": [13]}, "0 to 12"),
    ({"segmented_slices": [0.5]}, "at least one"),
    ({"projection": "boxes"}, "'box'"),
    ({"projection": {"use_box": True}}, "exactly the keys"),
    ({"projection": dict.fromkeys(("use_box", "use_mask", "use_points"), False)}, "at least one"),
    ({"projection": 3}, "exactly the keys"),
    ({"iou_threshold": 1.5}, "iou_threshold"),
    ({"box_extension": -1}, "box_extension"),
    ({"max_area_change": 0.5}, "max_area_change"),
])
def test_errors_of_volume(predictor, plain, change, message):
    arguments = {
        "segmentation": np.zeros(SHAPE, np.uint8), "segmented_slices": [3], "stop_lower": False, "stop_upper": False,
        "iou_threshold": 0.5, "projection": "box", "predictor": predictor, "image_embeddings": plain,
    }
    with pytest.raises(InvalidInputError, match=message):
        segment_mask_in_volume(**arguments | change)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("objects", "options", "message"), [
    ({0: {3: disc()}}, {}, "positive integer"),
    ({1: {}}, {}, "Object 1: there is no slice"),
    ({1: {13: disc()}}, {}, "slice 13 is not among"),
    ({1: {3: disc()[:5]}}, {}, "Object 1, slice 3: The mask has the shape"),
    ({1: {3: crop_mask(disc((400, 120), shape=(800, 220)))}}, {}, "lies outside"),
    ({1: {3: SlicePrompts()}}, {}, "Object 1, slice 3: There are no prompts"),
    ({1: {3: SlicePrompts(points=[[1, 2]])}}, {}, "belong together"),
    ({1: {3: SlicePrompts(points=[[1, 2]], labels=[0])}}, {}, "there is no slice"),
    ({1: {3: SlicePrompts(points=[[1, 2]], labels=[2])}}, {}, "Object 1, slice 3"),
    ({1: {3: SlicePrompts(mask=disc(), box=[0, 0, 5, 5])}}, {}, "either a mask"),
    ({1: {3: disc()}}, {"z_range": (5, 20)}, "z_range"),
    ({1: {3: disc()}}, {"z_range": (4, 9)}, "slice 3 is not among"),
    ({1: {3: disc()}}, {"stop_slices": {2: [3]}}, "stop_slices"),
    ({1: {3: disc()}}, {"stop_slices": {1: [3]}}, "stop slice"),
    ({1: {3: disc(), 8: SlicePrompts(points=[[1, 2]], labels=[0])}}, {"stop_slices": {1: [5]}}, "in slice 8 refine"),
    ({1: {3: disc()}}, {"batch_size": 0}, "batch_size"),
    ({1: {3: disc()}}, {"max_drift": -1}, "max_drift"),
])
def test_errors_of_objects(predictor, plain, objects, options, message):
    with pytest.raises(InvalidInputError, match=message):
        propagate_objects(predictor, plain, objects, verbose=False, **options)


def test_embeddings_must_be_of_a_stack(predictor, plain):
    features = np.zeros((1, 256, 16, 16), dtype=np.float32)
    with pytest.raises(InvalidInputError, match="ndim=3"):
        propagate_objects(predictor, plain | {"features": features}, {}, verbose=False)


def test_no_objects(predictor, plain, calls):
    assert propagate_objects(predictor, plain, {}, verbose=False) == {}
    assert calls == []
