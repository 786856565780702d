"""Objects from prompts, decoded together: against `prompt_based_segmentation`, plain and tiled, alone and in stacks."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamPredictor

from micro_sam import prompt_based_segmentation
from micro_sam.annotation import segment
from micro_sam.annotation.prompts import PointPrompt, Prompts, PromptSet, ShapePrompt, plan_prompts
from micro_sam.annotation.segment import segment_plane_steps, segment_prompt_set, without_specks
from micro_sam.core.errors import InvalidInputError, PromptTileError
from micro_sam.core.labels import compute_iou
from micro_sam.core.masks import crop_mask
from micro_sam.core.progress import Step, drain
from micro_sam.core.prompts import box_from_mask
from micro_sam.embeddings.encode import load_embeddings, precompute_image_embeddings
from micro_sam.models.mask_upsampling import MaskUpsampler
from micro_sam.models.prompting import decode_prompts
from micro_sam.prompt_based_segmentation import (
    segment_from_box,
    segment_from_box_and_points,
    segment_from_mask,
    segment_from_points,
)
from micro_sam.volume import propagation_prompts

SHAPE = (150, 220)
TILING = {"tile_shape": (90, 120), "halo": (12, 16), "batch_size": 6}
KINDS = ("plain", "stored", "tiled", "stack", "stack_tiled")


@pytest.fixture(scope="module")
def precomputed(tiny_sam, tmp_path_factory):
    rng, predictor = np.random.default_rng(0), SamPredictor(tiny_sam)
    images = ndimage.gaussian_filter(rng.random((2, *SHAPE)), (0, 3, 3)).astype(np.float32)
    folder = tmp_path_factory.mktemp("embeddings")
    found = {
        "plain": precompute_image_embeddings(predictor, images[1], folder / "stored", verbose=False),
        "tiled": precompute_image_embeddings(predictor, images[1], verbose=False, **TILING),
    }
    precompute_image_embeddings(predictor, images, folder / "stack", ndim=3, batch_size=2, verbose=False)
    precompute_image_embeddings(predictor, images, folder / "stack_tiled", ndim=3, verbose=False, **TILING)
    for name in ("stored", "stack", "stack_tiled"):
        found[name] = load_embeddings(folder / name, lazy_loading=True)
    return found


@pytest.fixture
def embeddings(request, precomputed):
    return precomputed[request.param], 1 if "stack" in request.param else None


@pytest.fixture(autouse=True)
def _distinct_logits(monkeypatch):
    """The random model is unsure everywhere: with larger logits masks have a stability between 0 and 1."""
    def decode(*args):
        logits, scores = decode_prompts(*args)
        return 20 * logits, scores

    for module in (propagation_prompts, prompt_based_segmentation):
        monkeypatch.setattr(module, "decode_prompts", decode)


def disc(center=(40, 60), radius=15):
    y, x = np.ogrid[:SHAPE[0], :SHAPE[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def prompt_set(object_id=1, points=(), labels=(), box=None, mask=None):
    points = np.array(points, dtype=float).reshape(-1, 2)
    return PromptSet(object_id, points, np.array(labels, dtype=int), box, mask)


def direct(predictor, image_embeddings, i, prompts: PromptSet):
    """Mask, predicted IoU and low-resolution logits from the functions for one object."""
    options = {"image_embeddings": image_embeddings, "i": i, "return_all": True}
    points = {"points": prompts.points, "labels": prompts.labels} if len(prompts.points) else {}
    if prompts.mask is not None:
        found = segment_from_mask(predictor, prompts.mask, box=prompts.box, **points, **options)
    elif prompts.box is None:
        found = segment_from_points(predictor, **points, **options)
    elif points:
        found = segment_from_box_and_points(predictor, prompts.box, **points, **options)
    else:
        found = segment_from_box(predictor, prompts.box, **options)
    return [values[0] for values in found]


def check(result, predictor, image_embeddings, i, prompts: PromptSet):
    mask, iou, logits = direct(predictor, image_embeddings, i, prompts)
    assert result.object_id == prompts.object_id
    found = np.zeros(SHAPE, dtype=bool)
    y0, x0, y1, x1 = result.mask.box
    found[y0:y1, x0:x1] = result.mask.mask
    assert found.sum() == result.mask.area > 0
    assert compute_iou(found, mask) > 0.999  # rounding may move single pixels over the threshold
    assert result.predicted_iou == pytest.approx(float(iou), abs=1e-5)
    # The predictor still holds the image or tile of this object.
    upsampler = MaskUpsampler(logits.shape[-1], 256, predictor.input_size, predictor.original_size)
    (expected,) = upsampler.masks(torch.from_numpy(logits[None]), torch.zeros(1))
    assert result.stability == pytest.approx(expected.stability, abs=1e-3)
    assert 0 < result.stability < 1


SETS = {
    "one point": prompt_set(3, [(40, 60)], [1]),
    "points": prompt_set(4, [(40, 60), (30, 50), (10, 10)], [1, 1, 0]),
    "box": prompt_set(5, box=np.array([20, 30, 70, 90])),
    "box and points": prompt_set(6, [(40, 60), (10, 10)], [1, 0], np.array([20, 30, 70, 90])),
    "box and one point": prompt_set(7, [(40, 60)], [1], np.array([20, 30, 70, 90])),
    "box and negative": prompt_set(8, [(10, 10)], [0], np.array([20, 30, 70, 90])),
    "mask": prompt_set(9, mask=disc()),
    "mask, box and points": prompt_set(10, [(40, 60), (10, 10)], [1, 0], box_from_mask(disc()), disc()),
    "mask and negative": prompt_set(11, [(10, 10)], [0], mask=disc()),
}


@pytest.mark.parametrize("embeddings", ["plain", "tiled"], indirect=True)
@pytest.mark.parametrize("name", SETS)
def test_one_object(tiny_predictor, embeddings, name):
    result = segment_prompt_set(tiny_predictor, *embeddings, SETS[name], SHAPE)
    check(result, tiny_predictor, *embeddings, SETS[name])


def test_the_best_of_three_masks_is_for_one_positive_point(tiny_predictor, precomputed):
    plain = precomputed["plain"]
    result = segment_prompt_set(tiny_predictor, plain, None, SETS["one point"], SHAPE)
    _, scores, _ = segment_from_points(
        tiny_predictor, SETS["one point"].points, np.array([1]), plain, multimask_output=True, return_all=True
    )
    assert result.predicted_iou == pytest.approx(float(scores.max()), abs=1e-5)


@pytest.mark.parametrize("embeddings", KINDS, indirect=True)
def test_many_objects_come_in_batches_and_in_order(tiny_predictor, embeddings, monkeypatch):
    calls = []
    decode = segment.SliceDecoder.decode

    def counting(self, z, requests):
        calls.append(len(requests))
        return decode(self, z, requests)

    monkeypatch.setattr(segment.SliceDecoder, "decode", counting)
    far = [prompt_set(k, [(y, x)], [1]) for k, (y, x) in enumerate([(120, 180), (20, 200), (130, 20)], 20)]
    sets = [far[0], *SETS.values(), *far[1:]]
    steps = segment_plane_steps(tiny_predictor, *embeddings, sets, SHAPE, batch_size=5)
    seen = []
    results = drain(watched(steps, seen), verbose=False)
    assert calls == [5, 5, 2]
    assert seen == [Step(n, 12, "Segment objects") for n in (0, 5, 10, 12)]
    for result, prompts in zip(results, sets, strict=True):
        check(result, tiny_predictor, *embeddings, prompts)


def watched(steps, seen):
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return stop.value
        yield seen[-1]


def test_cancelling_stops_between_batches(tiny_predictor, precomputed, monkeypatch):
    steps = segment_plane_steps(tiny_predictor, precomputed["plain"], None, list(SETS.values()), SHAPE, batch_size=2)
    assert [next(steps).done for _ in range(2)] == [0, 2]
    monkeypatch.setattr(segment.SliceDecoder, "decode", lambda *_: pytest.fail("went on"))
    steps.close()


def test_batched_plan(tiny_predictor, precomputed):
    prompts = Prompts(
        [PointPrompt((40, 60), True), PointPrompt((5, 5), False), PointPrompt((70, 30), True)],
        [ShapePrompt("ellipse", ((20, 20), (20, 60), (50, 60), (50, 20))), ShapePrompt("path", ((9, 9), (9, 40)))],
    )
    sets = plan_prompts(prompts, SHAPE, batched=True, first_id=4)
    results = drain(segment_plane_steps(tiny_predictor, precomputed["plain"], None, sets, SHAPE), verbose=False)
    assert [r.object_id for r in results] == [4, 5, 6, 7]
    for result, one in zip(results, sets, strict=True):
        check(result, tiny_predictor, precomputed["plain"], None, one)


def test_masks_of_a_tile_end_there(tiny_predictor, precomputed):
    tiled = precomputed["tiled"]
    result = segment_prompt_set(tiny_predictor, tiled, None, prompt_set(1, [(120, 180)], [1]), SHAPE)
    y0, x0, y1, x1 = result.mask.box
    assert (y0 >= 90 - 12, x0 >= 120 - 16, y1 <= SHAPE[0], x1 <= SHAPE[1]) == (True,) * 4


@pytest.mark.parametrize(("prompts", "message"), [
    (prompt_set(2, [(40, 60)], [1], np.array([100, 140, 140, 200])), "Object 2.*different tiles"),
    (prompt_set(2, [(40, 60), (140, 200)], [1, 1]), "Object 2.*outside of tile.*larger tiles"),
    (prompt_set(2, [(40, 20), (40, 30), (40, 200)], [1, 1, 1]), r"\[40.0, 200.0\] lies outside of tile 0"),
])
@pytest.mark.parametrize("kind", ["tiled", "stack_tiled"])
def test_prompts_of_several_tiles(tiny_predictor, precomputed, prompts, message, kind):
    i = 1 if kind == "stack_tiled" else None
    with pytest.raises(PromptTileError, match=message):
        segment_prompt_set(tiny_predictor, precomputed[kind], i, prompts, SHAPE)
    segment_prompt_set(tiny_predictor, precomputed["plain"], None, prompts, SHAPE)


def test_negative_points_of_other_tiles_do_not_matter(tiny_predictor, precomputed):
    near = prompt_set(1, [(40, 60), (30, 70)], [1, 1])
    with_far = prompt_set(1, [(40, 60), (140, 210), (30, 70)], [1, 0, 1])
    a, b = (segment_prompt_set(tiny_predictor, precomputed["tiled"], None, p, SHAPE) for p in (near, with_far))
    assert a.predicted_iou == b.predicted_iou
    np.testing.assert_array_equal(a.mask.mask, b.mask.mask)


def test_embeddings_are_not_changed_and_stay_set(tiny_predictor, precomputed):
    plain = precomputed["plain"]
    before, features = dict(plain), plain["features"].copy()
    segment_prompt_set(tiny_predictor, plain, None, SETS["mask"], SHAPE)
    assert all(plain[key] is value for key, value in before.items())
    np.testing.assert_array_equal(plain["features"], features)
    np.testing.assert_array_equal(tiny_predictor.features, features)
    assert tiny_predictor.original_size == SHAPE


def test_empty_mask_has_no_stability(tiny_predictor, precomputed, monkeypatch):
    monkeypatch.setattr(tiny_predictor.model, "mask_threshold", 1e6)
    result = segment_prompt_set(tiny_predictor, precomputed["plain"], None, SETS["box"], SHAPE)
    assert (result.mask.area, result.mask.mask.shape, result.stability) == (0, (0, 0), 0.0)


@pytest.mark.parametrize(("points", "labels", "box", "kept"), [
    ([(12, 12)], [1], None, "a"),
    ([(9, 12)], [1], None, "a"),  # misses it by a pixel
    ([(12, 12), (30, 40)], [1, 0], None, "a"),
    ([(12, 12), (30, 40)], [1, 1], None, "ab"),
    ([], [], (8, 8, 31, 50), "ab"),
    ([(50, 60)], [1], (8, 8, 20, 20), "ac"),
    ([(0, 0)], [1], None, "abc"),  # nothing says which part is meant
    ([(30, 40)], [0], (0, 0, 5, 5), "abc"),
])
def test_specks(points, labels, box, kept):
    parts = np.zeros((70, 80), "uint8")
    parts[10:20, 10:20], parts[29:33, 38:44], parts[50, 60] = 1, 2, 3
    prompts = PromptSet(1, np.reshape(points, (-1, 2)), np.array(labels, int), None if box is None else np.array(box))
    found = without_specks(crop_mask(parts > 0), prompts)
    expected = np.isin(parts, ["abc".index(name) + 1 for name in kept])
    y0, x0, y1, x1 = found.box
    np.testing.assert_array_equal(found.mask, expected[y0:y1, x0:x1])
    assert found.area == expected.sum()


def test_specks_are_left_out_where_asked_for(tiny_predictor, precomputed):
    prompts = [PromptSet(1, np.array([[70.0, 100.0]]), np.array([1])), PromptSet(2, np.empty((0, 2)), np.empty(0, int),
                                                                               np.array([20, 30, 60, 90]))]
    options = (tiny_predictor, precomputed["plain"], None, prompts, SHAPE)
    plain = drain(segment_plane_steps(*options), verbose=False)
    clean = drain(segment_plane_steps(*options, drop_specks=True), verbose=False)
    assert any(p.mask.area > c.mask.area for p, c in zip(plain, clean)), "the random model makes specks"
    for one, other, prompt in zip(plain, clean, prompts):
        expected = without_specks(one.mask, prompt)
        assert (other.mask.box, other.mask.area) == (expected.box, expected.area)
        assert (other.predicted_iou, other.stability) == (one.predicted_iou, one.stability)


def test_no_objects(tiny_predictor, precomputed):
    assert drain(segment_plane_steps(tiny_predictor, precomputed["plain"], None, [], SHAPE), verbose=False) == []


@pytest.mark.parametrize(("kind", "i", "prompts", "shape", "message"), [
    ("plain", None, prompt_set(), SHAPE, "Object 1 has neither"),
    ("plain", None, prompt_set(2, [(4, 4)], [0]), SHAPE, "Object 2 has neither a positive point"),
    ("tiled", None, prompt_set(2, [(4, 4)], [0]), SHAPE, "Object 2 has neither"),
    ("plain", None, prompt_set(mask=np.zeros(SHAPE, bool)), SHAPE, "neither"),
    ("plain", None, prompt_set(mask=np.ones((4, 4), bool)), SHAPE, r"Object 1: The mask has the shape \(4, 4\)"),
    ("plain", None, prompt_set(1, [(4, np.nan)], [1]), SHAPE, "Object 1: Points must be finite"),
    ("plain", None, SETS["box"], (150, 221), r"shape \(150, 221\), but the embeddings are of one of shape \(150, 220"),
    ("plain", 1, SETS["box"], SHAPE, "single plane, but i=1"),
    ("tiled", 1, SETS["box"], SHAPE, "single plane, but i=1"),
    ("stack", None, SETS["box"], SHAPE, "pass i"),
    ("stack_tiled", 2, SETS["box"], SHAPE, "no plane 2"),
])
def test_refusals(tiny_predictor, precomputed, kind, i, prompts, shape, message):
    with pytest.raises(InvalidInputError, match=message):
        segment_prompt_set(tiny_predictor, precomputed[kind], i, prompts, shape)
