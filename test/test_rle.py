"""Run lengths and boxes of masks: equal to segment_anything, to COCO's strings, and back again."""

import numpy as np
import pytest
import torch
from segment_anything.utils import amg

from micro_sam._vendored import batched_mask_to_box, mask_to_rle_pytorch
from micro_sam.core import rle
from micro_sam.core.errors import InvalidInputError, InvalidTypeError


def random_masks(rng, shape, n=8):
    masks = rng.random((n, *shape)) < rng.choice([0.02, 0.3, 0.7, 0.98], size=(n, 1, 1))
    masks[0], masks[1] = False, True
    masks[2] = False
    masks[2, -1, -1] = True
    return masks


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17), (40, 31)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_segment_anything(shape, seed):
    masks = random_masks(np.random.default_rng(seed), shape)
    tensor = torch.from_numpy(masks)
    expected = amg.mask_to_rle_pytorch(tensor)
    for implementation in ("default", "numpy", "numba", "bioimage_cpp"):
        result = mask_to_rle_pytorch(tensor, rle_implementation=implementation)
        assert result == expected
        assert all(type(count) is int for r in result for count in r["counts"])
    for mask, record in zip(masks, expected):
        counts = rle.encode(mask)
        assert counts.tolist() == record["counts"]
        assert rle.area(counts) == rle.area(record["counts"]) == mask.sum()
        decoded = rle.decode(record["counts"], shape)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(decoded, amg.rle_to_mask(record))
        np.testing.assert_array_equal(rle.decode(counts, shape), mask)

    boxes = batched_mask_to_box(tensor)
    assert boxes.dtype == torch.int32
    np.testing.assert_array_equal(boxes, amg.batched_mask_to_box(tensor))
    np.testing.assert_array_equal(batched_mask_to_box(tensor.reshape(2, 4, *shape)), boxes.reshape(2, 4, 4))
    np.testing.assert_array_equal(batched_mask_to_box(tensor[3]), boxes[3])
    np.testing.assert_array_equal(boxes[0], [0, 0, 0, 0])
    np.testing.assert_array_equal(boxes[1], [0, 0, shape[1] - 1, shape[0] - 1])


def test_masks_that_are_no_contiguous_block():
    masks = torch.from_numpy(random_masks(np.random.default_rng(0), (20, 24)))[:, ::2, 3:].transpose(1, 2)
    assert mask_to_rle_pytorch(masks) == amg.mask_to_rle_pytorch(masks)
    np.testing.assert_array_equal(batched_mask_to_box(masks), amg.batched_mask_to_box(masks))


@pytest.mark.parametrize("shape", [(0, 5, 6), (3, 0, 6), (2, 3, 4, 0)])
def test_boxes_of_nothing(shape):
    boxes = batched_mask_to_box(torch.zeros(shape, dtype=torch.bool))
    assert boxes.shape == (*shape[:-2], 4)
    assert boxes.dtype == torch.int32
    assert not boxes.any()
    assert mask_to_rle_pytorch(torch.zeros((0, 5, 6), dtype=torch.bool)) == []


@pytest.mark.parametrize("seed", range(60))
def test_encoding_of_a_crop_equals_that_of_the_plane(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 25, size=2))
    size = [int(rng.integers(1, s + 1)) for s in shape]
    if seed % 3 == 0:
        size[0] = shape[0]  # runs go on from column to column
    if seed % 6 == 0:
        size[1] = shape[1]
    origin = [int(rng.integers(0, s - k + 1)) for s, k in zip(shape, size)]
    for density in (0.1, 0.5, 0.95, 1.1, -1):
        mask = rng.random(size) < density
        plane = np.zeros(shape, dtype=bool)
        plane[origin[0]:origin[0] + size[0], origin[1]:origin[1] + size[1]] = mask
        counts = rle.encode_in_plane(mask, origin, shape)
        assert counts.tolist() == amg.mask_to_rle_pytorch(torch.from_numpy(plane[None]))[0]["counts"]
        assert rle.area(counts) == mask.sum()


def test_encoding_of_an_empty_crop():
    counts = rle.encode_in_plane(np.zeros((0, 0), dtype=bool), (3, 4), (7, 9))
    assert counts.tolist() == [63]
    assert rle.area(counts) == 0
    assert not rle.decode(counts, (7, 9)).any()


def test_cost_of_a_crop_is_that_of_the_crop():
    counts = rle.encode_in_plane(np.ones((2, 1), dtype=bool), (5, 10 ** 6), (10 ** 7, 10 ** 8))
    assert counts.tolist() == [10 ** 13 + 5, 2, 10 ** 15 - 10 ** 13 - 7]


def disk():
    y, x = np.indices((97, 113))
    return (y - 40) ** 2 + (x - 60) ** 2 < 900


def steps():
    """Runs of 1000 and more pixels, that grow and shrink: differences of both signs."""
    position, mask = 0, np.zeros(300 * 40, dtype=bool)
    for k, length in enumerate((5, 1200, 33, 2500, 1, 40, 3000, 7, 15, 1024, 16, 31, 32)):
        mask[position:position + length] = k % 2
        position += length
    return mask.reshape(40, 300).T


def grating():
    y, x = np.indices((9, 11))
    return (3 * x + y * y) % 5 < 2


@pytest.mark.parametrize(("mask", "expected"), [
    (
        disk(),
        "Po2?_26J6L2M4M2M4M2N2N2N2O0O2N2O0O2N2O000O2O000O2O0000000000000000000000000001N10001N10001N2N101N2N1"
        "01N2N2N2N3L3N3L3N4J6JiT2"
    ),
    (steps(), "5`U1Q1dX1POTcMgm2oNgRMio01oPO`P4"),
    (grating(), "02219NF10O010O10O031O2OO9NF10O010O10O031O2OO0"),
    (np.ones((5, 7), dtype=bool), "0S1"),
    (np.zeros((50, 70), dtype=bool), "\\]3"),
])
def test_strings_equal_those_of_pycocotools(mask, expected):
    assert rle.compress(rle.encode(mask)) == expected
    assert rle.compress(rle.encode(mask).tolist()) == expected


def test_unknown_implementation():
    with pytest.raises(InvalidInputError, match="must be one of .*'numba'.* but is 'nifty'"):
        mask_to_rle_pytorch(torch.zeros((1, 3, 4), dtype=torch.bool), rle_implementation="nifty")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_boxes_need_bool(dtype):
    with pytest.raises(InvalidTypeError, match=f"must be bool tensors, but got {dtype}"):
        batched_mask_to_box(torch.zeros((1, 3, 4), dtype=dtype))


def test_run_lengths_of_tensors_that_are_not_bool():
    with pytest.raises(TypeError, match="Masks must be bool"):
        mask_to_rle_pytorch(torch.zeros(1, 2, 2))
