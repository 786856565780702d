"""Prompts from segmentations: against dilations of the whole image, step by step, with the same random numbers."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from micro_sam.core.errors import InvalidInputError
from micro_sam.core.labels import get_centers_and_bounding_boxes, segmentation_to_one_hot
from micro_sam.prompt_generators import IterativePromptGenerator, PointAndBoxPromptGenerator, PromptGeneratorBase

SHAPE = (48, 61)


def random_labels(seed, shape=SHAPE):
    """Blobs of all sizes, at the borders, of single pixels and with holes; consecutive ids."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.random(shape), 2.5)
    labels, n = ndimage.label(blobs > np.quantile(blobs, 0.6))
    labels[rng.random(shape) < 0.03] = 0
    labels[0, 0], labels[-1, -1], labels[20, 30] = n + 1, n + 2, n + 3
    _, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(shape)


def prepare(labels):
    centers, boxes = get_centers_and_bounding_boxes(labels)
    return segmentation_to_one_hot(labels), list(boxes.values()), list(centers.values())


def reference(mask, box, center, n_positive, n_negative, dilation):
    """Section 9 of the specification on the whole image; points as (x, y)."""
    points = []
    if center is not None:
        points.append([int(c) for c in center])
        n_positive -= 1
    inside = np.argwhere(mask)
    if n_positive:
        points.extend(inside[np.random.choice(len(inside), size=n_positive, replace=n_positive > len(inside))])
    dilated = mask
    if dilation:
        dilated = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=dilation)
    near = np.zeros(mask.shape, dtype=bool)
    y0, x0, y1, x1 = box
    near[max(y0 - dilation, 0):y1 + dilation, max(x0 - dilation, 0):x1 + dilation] = True
    around = np.argwhere(near & ~dilated)
    if n_negative and len(around):
        points.extend(around[np.random.choice(len(around), size=min(n_negative, len(around)), replace=False)])
    n_missing = n_negative - len(around)
    if n_missing > 0:
        outside = np.argwhere(~mask)
        points.extend(outside[np.random.choice(len(outside), size=n_missing, replace=n_missing > len(outside))])
    return np.array(points)[:, ::-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_positive", "n_negative", "dilation"), [(1, 3, 5), (4, 0, 3), (2, 90, 1), (0, 5, 0)])
@pytest.mark.parametrize("with_center", [True, False])
def test_points_equal_the_definition_on_the_whole_image(seed, n_positive, n_negative, dilation, with_center):
    if with_center and n_positive == 0:
        with pytest.raises(InvalidInputError, match="n_positive_points"):
            PointAndBoxPromptGenerator(0, 5, 1)(torch.ones(1, 1, 4, 4), [(0, 0, 4, 4)], [(1, 1)])
        return
    masks, boxes, centers = prepare(random_labels(seed))
    before = masks.clone()
    centers = [np.array(c) + 0.9 for c in centers] if with_center else None
    generator = PointAndBoxPromptGenerator(n_positive, n_negative, dilation, get_box_prompts=True)
    np.random.seed(seed)
    points, labels, box_prompts, mask_prompts = generator(masks, boxes, centers)
    np.random.seed(seed)
    for n, mask in enumerate(masks[:, 0].numpy() > 0):
        center = centers[n] if with_center else None
        np.testing.assert_array_equal(points[n], reference(mask, boxes[n], center, n_positive, n_negative, dilation))
        x, y = points[n].numpy().T
        np.testing.assert_array_equal(mask[y, x], labels[n].numpy() == 1)
    assert points.dtype == labels.dtype == torch.int64
    np.testing.assert_array_equal(labels[0], [1] * n_positive + [0] * n_negative)
    np.testing.assert_array_equal(box_prompts, np.array(boxes)[:, [1, 0, 3, 2]])
    assert mask_prompts is None
    assert torch.equal(masks, before)


def test_a_seed_decides_and_leaves_the_global_state():
    masks, boxes, _ = prepare(random_labels(0))
    state = np.random.get_state()[1].copy()
    first, second, third = (
        PointAndBoxPromptGenerator(3, 3, 2, rng=rng)(masks, boxes)[0] for rng in (7, np.random.default_rng(7), 8)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    one, other = (IterativePromptGenerator(rng=7)(masks, torch.zeros_like(masks))[0] for _ in range(2))
    assert torch.equal(one, other)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_boxes_alone_and_points_alone():
    masks, boxes, _ = prepare(random_labels(1))
    points, labels, box_prompts, _ = PointAndBoxPromptGenerator(1, 1, 2, False, True)(masks, boxes)
    assert points is None
    assert labels is None
    assert box_prompts.shape == (len(masks), 4)
    assert PointAndBoxPromptGenerator(1, 1, 2)(masks.bool(), boxes)[2] is None
    with pytest.raises(InvalidInputError, match="Neither"):
        PointAndBoxPromptGenerator(1, 1, 2, get_point_prompts=False)


def test_no_objects():  # 02-W14
    masks = torch.zeros(0, 1, 8, 9)
    points, labels, boxes, _ = PointAndBoxPromptGenerator(2, 1, 3, get_box_prompts=True)(masks, [], [])
    assert points.shape == (0, 3, 2)
    assert labels.shape == (0, 3)
    assert boxes.shape == (0, 4)
    points, labels, _, _ = IterativePromptGenerator()(masks, masks)
    assert points.shape == (0, 2, 2)
    assert labels.shape == (0, 2)


def test_objects_without_a_pixel_for_a_point_are_named():  # 02-W20, asserts and numpy errors of section 9
    empty, full = torch.zeros(2, 1, 6, 6), torch.ones(2, 1, 6, 6)
    empty[0] = 1
    full[1, 0, 0, 0] = 0
    box = [(0, 0, 6, 6)] * 2
    with pytest.raises(InvalidInputError, match="Object 1 is empty"):
        PointAndBoxPromptGenerator(1, 0, 1)(empty, box)
    with pytest.raises(InvalidInputError, match="Object 0 covers"):
        PointAndBoxPromptGenerator(1, 1, 1)(full, box)
    assert PointAndBoxPromptGenerator(1, 0, 1)(full, box)[0].shape == (2, 1, 2)
    with pytest.raises(InvalidInputError, match="Object 1 is empty"):
        IterativePromptGenerator()(empty, torch.ones_like(empty))
    with pytest.raises(InvalidInputError, match="Object 0 covers"):
        IterativePromptGenerator()(full, full)


def test_wrong_arguments_are_refused():
    masks, boxes, centers = prepare(random_labels(2))
    generator = PointAndBoxPromptGenerator(1, 1, 1)
    for arguments in ((masks[:, 0], boxes), (masks, boxes[1:]), (masks, [b[:3] for b in boxes]),
                      (masks, boxes, centers[1:])):
        with pytest.raises(InvalidInputError):
            generator(*arguments)
    for numbers in ((-1, 1, 1), (1, 1.5, 1), (1, 1, -2)):
        with pytest.raises(InvalidInputError, match="non-negative"):
            PointAndBoxPromptGenerator(*numbers)
    with pytest.raises(InvalidInputError, match="equal shapes"):
        IterativePromptGenerator()(masks, masks[1:])
    with pytest.raises(InvalidInputError, match="must have the shape"):
        IterativePromptGenerator()(masks[:, 0], masks[:, 0])
    with pytest.raises(NotImplementedError):
        PromptGeneratorBase()(masks)


def allowed(mask, predicted):
    """Where the positive and the negative point of the iterative generator may be."""
    positive = mask & ~predicted if (mask & ~predicted).any() else mask & predicted
    negative = predicted & ~mask
    if not negative.any():
        near = np.zeros(mask.shape, dtype=bool)
        near[tuple(slice(max(i.min() - 3, 0), i.max() + 4) for i in np.nonzero(mask))] = True
        negative = near & ~mask
    return positive, negative


@pytest.mark.parametrize("shape", [SHAPE, (5, 20, 24)])
def test_corrections_cover_the_definition_and_nothing_else(shape):
    labels = random_labels(3, SHAPE)
    if len(shape) == 3:
        labels = np.stack([np.roll(labels, 2 * z, axis=1) for z in range(5)])[:, :20, :24]
    ids = np.unique(labels)[1:][:6]
    masks = np.stack([labels == i for i in ids])
    predictions = np.stack([np.roll(masks[0], 2, -1), masks[1], masks[2] & False, *masks[3:]])
    predictions[3] |= np.roll(masks[3], 1, -2)
    tensors = [torch.from_numpy(m[:, None]).float() for m in (masks, predictions)]
    generator = IterativePromptGenerator(rng=0)
    seen = np.zeros((len(ids), 2, *shape), dtype=bool)
    for _ in range(400):
        points, point_labels, _, _ = generator(*tensors)
        assert points.shape == (len(ids), 2, len(shape))
        assert points.dtype == torch.int64
        assert point_labels.tolist() == [[1, 0]] * len(ids)
        for n in range(len(ids)):
            for k in range(2):
                seen[(n, k, *points[n, k].flip(0).tolist())] = True
    for n in range(len(ids)):
        for k, expected in enumerate(allowed(masks[n], predictions[n])):
            assert not (seen[n, k] & ~expected).any()
            assert seen[n, k].sum() > 0.4 * min(expected.sum(), 250)


def test_negative_points_of_volumes_stay_near_the_object_along_each_axis():  # 02-W20
    mask = torch.zeros(1, 1, 12, 40, 60)
    mask[:, :, 5:7, 10:14, 30:40] = 1
    generator = IterativePromptGenerator(rng=1)
    points = torch.stack([generator(mask, mask)[0][0, 1] for _ in range(300)])
    assert points.amin(0).tolist() == [27, 7, 2]
    assert points.amax(0).tolist() == [42, 16, 9]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    masks, boxes, centers = prepare(random_labels(4))
    for make in (lambda: PointAndBoxPromptGenerator(3, 40, 4, get_box_prompts=True, rng=0),
                 lambda: IterativePromptGenerator(rng=0)):
        arguments = (boxes, centers) if isinstance(make(), PointAndBoxPromptGenerator) else (masks.roll(2, -1),)
        for here, there in zip(make()(masks, *arguments), make()(masks.cuda(), *arguments)):
            assert (here is None) == (there is None)
            if here is not None:
                assert there.device.type == "cuda"
                assert torch.equal(here, there.cpu())
