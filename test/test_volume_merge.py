"""Merging slices to objects in 3D: against brute force and scipy, and the weaknesses of the original."""

import itertools
import tracemalloc

import dask.array as da
import numpy as np
import pytest
import zarr
from scipy import ndimage

from micro_sam.core.errors import InvalidInputError, InvalidTypeError
from micro_sam.volume.merge import merge_instance_segmentation_3d, merge_steps


def merge(slices, **kwargs):
    return merge_instance_segmentation_3d(slices, verbose=False, **kwargs)


def unique_per_slice(labels, seed=0):
    """Give every object of every slice an id of its own, in random order."""
    out = np.zeros(labels.shape, dtype=np.uint32)
    keys = [(z, i) for z in range(len(labels)) for i in np.unique(labels[z]) if i > 0]
    for new, k in enumerate(np.random.default_rng(seed).permutation(len(keys)), 1):
        z, i = keys[k]
        out[z][labels[z] == i] = new
    return out


def same_partition(a, b):
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.uint64), axis=1)
    zeros_agree = ((a == 0) == (b == 0)).all()
    return bool(zeros_agree) and all(len(np.unique(p)) == pairs.shape[1] for p in pairs)


def balls(shape=(14, 60, 70)):
    """Ellipsoids that differ in size and start; two of them touch in x."""
    zyx = np.indices(shape)
    labels = np.zeros(shape, dtype=np.uint16)
    centers = [((5, 15, 15), 12), ((8, 40, 20), 15), ((6, 15, 45), 10), ((7, 45, 50), 13)]
    for k, (center, radius) in enumerate(centers, 1):
        distances = [(x - c) * (radius / 5 if axis == 0 else 1) for axis, (x, c) in enumerate(zip(zyx, center))]
        labels[np.sqrt(sum(d**2 for d in distances)) < radius] = 10 * k
    return labels


def columns(*rows):
    """A volume (Z, 1, X) from one string for each slice; a dot is background and letters are ids."""
    return np.array([[[0 if c == "." else ord(c) for c in row]] for row in rows], dtype=np.uint16)


def test_recovers_objects_and_leaves_the_input():
    truth = balls()
    slices = unique_per_slice(truth)
    slices.flags.writeable = False
    before = slices.copy()
    labels = merge(slices)
    assert labels.dtype == np.uint64
    assert same_partition(labels, truth)
    assert np.unique(labels).tolist() == [0, 1, 2, 3, 4]
    starts = [int((labels == k).any(axis=(1, 2)).argmax()) for k in (1, 2, 3, 4)]
    assert starts == sorted(starts)
    np.testing.assert_array_equal(merge(slices), labels)
    np.testing.assert_array_equal(slices, before)


def reference_weights(slices, beta):
    """Weights by looking at each pixel: {(object below, object above): weight}."""
    weights = {}
    for below, above in itertools.pairwise(slices):
        for u, v in itertools.product(np.unique(below[below > 0]), np.unique(above[above > 0])):
            overlap = np.sum((below == u) & (above == v)) / np.sum(below == u)
            if overlap > 0:
                p = 0.998 * overlap + 0.001
                weights[u, v] = 1 - np.log((1 - p) / p) - np.log((1 - beta) / beta)
    return weights


def partitions(items):
    if not items:
        yield {}
        return
    for rest in partitions(items[1:]):
        n = max(rest.values(), default=-1) + 1
        for k in range(n + 1):
            yield {**rest, items[0]: k}


@pytest.mark.parametrize("seed", range(6))
def test_is_the_best_of_all_partitions(seed):
    rng = np.random.default_rng(seed)
    slices = np.zeros((3, 1, 30), dtype=np.int64)
    for z in range(3):  # three objects in each slice, without background for odd seeds
        cuts = np.sort(rng.choice(np.arange(1, 30), 2, replace=False))
        slices[z, 0] = np.searchsorted(cuts, np.arange(30)) + 4 * z + int(seed % 2)
    objects = np.unique(slices[slices > 0]).tolist()
    every_partition = list(partitions(objects))
    for beta in (0.5, 0.2, 0.8):
        weights = reference_weights(slices, beta)
        best = max(
            sum(w for (u, v), w in weights.items() if clusters[u] == clusters[v]) for clusters in every_partition
        )
        labels = merge(slices, beta=beta, neck_penalty=0)
        found = {i: int(labels[slices == i][0]) for i in objects}
        assert all((labels[slices == i] == found[i]).all() for i in objects)
        assert sum(w for (u, v), w in weights.items() if found[u] == found[v]) == pytest.approx(best)


def test_beta_moves_the_break_even():  # 02-W23
    def n_objects(overlap, beta):
        slices = np.zeros((2, 1, 10_000), dtype=np.uint8)
        slices[0], slices[1, 0, :overlap] = 1, 2
        return int(merge(slices, beta=beta).max())

    assert [n_objects(o, 0.5) for o in (2680, 2700)] == [2, 1]
    # By the formula: 1 - ln((1 - p) / p) - ln((1 - beta) / beta) = 0.
    for beta in (0.01, 0.3, 0.7, 0.99):
        p = 1 / (1 + np.exp(1 - np.log((1 - beta) / beta)))
        overlap = (p - 0.001) / 0.998 * 10_000
        assert [n_objects(max(1, int(overlap + d)), beta) for d in (-5, 5)] == [2, 1]
    for beta in (0, 1, -0.1, float("nan")):
        with pytest.raises(InvalidInputError, match="beta"):
            n_objects(5, beta)


def test_background_as_object():  # 02-W23
    slices = columns("..aa", "..bb")
    np.testing.assert_array_equal(merge(slices)[:, 0], [[0, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(merge(slices, with_background=False)[:, 0], [[1, 1, 2, 2]] * 2)
    np.testing.assert_array_equal(merge(np.zeros((3, 2, 2), np.uint8), with_background=False), np.ones((3, 2, 2)))


def test_slice_without_background():  # 02-W27
    np.testing.assert_array_equal(merge(columns("ab", "cd"))[:, 0], [[1, 2], [1, 2]])


@pytest.mark.parametrize("slices", [columns("aa...", "..b..", "...cc", "....d"), columns("....."), columns("a", "a")])
def test_same_treatment_without_overlaps(slices):  # 02-W28
    slices, calls = slices.astype(np.int16), []
    labels = merge_instance_segmentation_3d(
        slices, min_z_extent=2, ids_per_slice=True, pbar_init=lambda *a: calls.append(a),
        pbar_update=lambda n: calls.append(n),
    )
    assert labels.dtype == np.uint64
    is_long = (slices == ord("c")) | (slices == ord("d")) if slices.shape[2] == 5 and len(slices) > 1 else slices > 0
    np.testing.assert_array_equal(labels, is_long)
    assert calls[0][0] == sum(calls[1:]) == 2 * len(slices)


def test_min_z_extent_counts_slices():
    slices = columns("aa.cc", "dd.ee", "ff..g")
    assert merge(slices).max() == 2
    np.testing.assert_array_equal(merge(slices, min_z_extent=3)[:, 0], [[1, 1, 0, 2, 2]] * 2 + [[1, 1, 0, 0, 2]])
    slices[2, 0, 4] = 0
    np.testing.assert_array_equal(merge(slices, min_z_extent=3)[:, 0], [[1, 1, 0, 0, 0]] * 3)
    assert not merge(slices, min_z_extent=4).any()
    np.testing.assert_array_equal(merge(slices, min_z_extent=0), merge(slices))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("gone", [(6,), (3, 6), (5, 6), (4, 8, 9), (0, 13, 7)])
def test_gap_closing_closes_each_object(n, gone):
    truth = balls()
    slices = unique_per_slice(truth)
    slices[list(gone)] = 0
    expected = np.zeros_like(truth)
    for i in np.unique(truth)[1:]:
        padded = np.pad((truth == i) & (slices > 0), [(2 * n, 2 * n), (0, 0), (0, 0)])
        closed = ndimage.binary_closing(padded, np.ones((3, 1, 1)), iterations=n)[2 * n:-2 * n]
        expected[closed & (expected == 0)] = i
    labels = merge(slices, gap_closing=n)
    assert labels.dtype == np.uint64
    assert (expected > 0).sum() > (slices > 0).sum()
    assert same_partition(labels, expected)


def test_gap_closing_after_an_empty_slice():  # 02-W29
    slices = columns("aa...", ".....", "...bb", ".....", "...cc")
    labels = merge(slices, gap_closing=1)
    np.testing.assert_array_equal(labels[:, 0], [[1, 1, 0, 0, 0], [0] * 5] + [[0, 0, 0, 2, 2]] * 3)
    np.testing.assert_array_equal(merge(slices, gap_closing=0), merge(slices))
    assert merge(slices).max() == 3


def test_gap_closing_keeps_touching_objects_apart():  # 02-W30
    slices = columns("aabb", "ccdd", "....", "eeff", "gghh")
    np.testing.assert_array_equal(merge(slices, gap_closing=1)[:, 0], [[1, 1, 2, 2]] * 5)
    # The seam moves: only what lies in one object on both sides is filled.
    slices = columns("aaaabb", "......", "cccddd")
    np.testing.assert_array_equal(merge(slices, gap_closing=1)[:, 0, :3], [[1] * 3] * 3)
    assert merge(slices, gap_closing=1)[1, 0].tolist() == [1, 1, 1, 0, 2, 2]


def test_gaps_do_not_pull_neighbours_apart():
    # The rim of the large object sees a small part of the next but one slice past the small object between them.
    slices = np.zeros((3, 20, 20), dtype=np.uint8)
    slices[0, 2:18, 2:18], slices[1, 3:12, 3:12], slices[2, 3:13, 3:13] = 1, 2, 3
    assert merge(slices).max() == 1
    assert merge(slices, gap_closing=2).max() == 1


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "int64", "uint64", ">u4"])
def test_dtypes_and_orders(dtype):
    slices = columns("AA..BB", "CC...D", "E.E..F") - 60
    slices[slices > 1000] = 0
    wanted = merge(slices)
    slices = np.asfortranarray(slices.astype(dtype))
    np.testing.assert_array_equal(merge(slices), wanted)
    if dtype == "uint64":
        large = np.where(slices > 0, slices + np.uint64(2**64 - 1000), 0)
        np.testing.assert_array_equal(merge(large), wanted)
    np.testing.assert_array_equal(merge(slices.tolist()), wanted)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (1, 1, 1), (4, 3, 3)])
@pytest.mark.parametrize("gap_closing", [None, 1])
def test_nothing_to_merge(shape, gap_closing):
    labels = merge(np.zeros(shape, np.uint32), gap_closing=gap_closing, min_z_extent=1)
    assert labels.shape == shape
    assert labels.dtype == np.uint64
    assert not labels.any()


def test_one_slice_is_numbered_from_one():
    np.testing.assert_array_equal(merge(columns("c.aab"))[:, 0], [[3, 0, 1, 1, 2]])


def test_invalid_input():
    slices = columns("aa.b", "cc.d", "ee.b")
    with pytest.raises(InvalidInputError, match=r"id 98 occurs in the slices 0 and 2.*ids_per_slice"):
        merge(slices)
    assert merge(slices, ids_per_slice=True).max() == 2
    with pytest.raises(InvalidInputError, match=r"\(4, 4\)"):
        merge(np.zeros((4, 4), int))
    for dtype in (float, bool):
        with pytest.raises(InvalidTypeError, match="integers"):
            merge(np.zeros((2, 4, 4), dtype))
    with pytest.raises(InvalidInputError, match="Slice 1 has the negative id -3"):
        merge(np.array([[[1, 2]], [[0, -3]]]))
    for options in ({"gap_closing": -1}, {"min_z_extent": 1.5}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            merge(slices, ids_per_slice=True, **options)
    for output in (np.zeros((2, 1, 4), int), np.zeros((3, 1, 4)), np.broadcast_to(0, (3, 1, 4))):
        with pytest.raises(InvalidInputError, match="output"):
            merge(slices, ids_per_slice=True, output=output)
    many = np.arange(1, 301).reshape(1, 1, 300)
    with pytest.raises(InvalidInputError, match="300.*uint8"):
        merge(many, output=np.zeros(many.shape, np.uint8))


@pytest.mark.parametrize("options", [{}, {"gap_closing": 1, "min_z_extent": 3}])
def test_lazy_input_and_output_in_place(tmp_path, options):
    slices = unique_per_slice(balls())
    slices[6] = 0
    wanted = merge(slices, **options)
    lazy = da.from_array(slices, chunks=(3, 20, 20))
    np.testing.assert_array_equal(merge(lazy, **options), wanted)
    array = zarr.create_array(tmp_path / "a.zarr", shape=slices.shape, chunks=(1, 32, 32), dtype="uint32")
    array[...] = slices
    for source in (slices.copy(), array):
        assert merge(source, output=source, **options) is source
        np.testing.assert_array_equal(source[...], wanted)


class Slices:
    """A volume whose slices are made when they are read; notes which."""

    dtype = np.dtype(np.uint32)

    def __init__(self, depth):
        self.shape, self.reads = (depth, 256, 256), []
        self.plane = np.kron(np.arange(1, 65).reshape(8, 8), np.ones((32, 32))).astype(np.uint32)

    def __getitem__(self, z):
        self.reads.append(z)
        return self.plane + np.uint32(64 * z)


def test_memory_does_not_grow_with_depth(tmp_path):
    def peak(depth):
        output = zarr.create_array(
            tmp_path / f"{depth}.zarr", shape=(depth, 256, 256), chunks=(1, 256, 256), dtype="uint16"
        )
        volume = Slices(depth)
        tracemalloc.start()
        merge(volume, output=output, gap_closing=1)
        _, bytes_ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert output[depth - 1].max() == 64
        assert volume.reads == 2 * list(range(depth))
        return bytes_

    peak(4)
    plane = 256 * 256 * 8
    # The graph of 56 x 64 more objects may take as much as one plane of the 56 that are more.
    assert peak(64) - peak(8) < plane


def test_can_be_cancelled():
    volume = Slices(20)
    output = np.zeros(volume.shape, np.uint32)
    steps = merge_steps(volume, output=output)
    for _ in range(5):
        step = next(steps)
    steps.close()
    assert (step.done, step.total) == (4, 40)
    assert volume.reads == [0, 1, 2, 3]
    assert not output.any()


def test_noise_is_merged_like_brute_force():
    # Runs as short as pixels, many objects: the tables of overlaps against a loop over pairs.
    rng = np.random.default_rng(0)
    truth = ndimage.zoom(rng.integers(0, 12, (4, 8, 8)), (2, 3, 3), order=0)
    noisy = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 12, truth.shape), truth)
    slices = unique_per_slice(noisy)
    labels = merge(slices, neck_penalty=0)
    weights = reference_weights(slices, 0.5)
    found = dict(zip(slices.ravel().tolist(), labels.ravel().tolist()))
    assert all((labels[slices == i] == found[i]).all() for i in found)
    # No single object is better off alone or with a neighbour.
    for node in found:
        gains = {}
        for (u, v), w in weights.items():
            if node in (u, v):
                other = found[v if u == node else u]
                gains[other] = gains.get(other, 0) + w
        assert gains.get(found[node], 0) >= max(0, *gains.values()) - 1e-9 if gains else True


def test_necks_separate_objects_on_top_of_each_other():
    z, y, x = np.indices((12, 21, 21))
    radii = [2.5, 3.2, 4, 4, 3.2, 2.5] * 2
    discs = [np.hypot(y[k] - 10, x[k] - (8.7 if k < 6 else 11.3)) < radius for k, radius in enumerate(radii)]
    truth = np.array(discs) * np.where(z < 6, 1, 2).astype(np.uint16)
    slices = unique_per_slice(truth)
    assert same_partition(merge(slices), truth)
    assert np.unique(merge(slices, neck_penalty=0)).tolist() == [0, 1]
    # Where sizes only fall, no penalty is too large.
    cone = (np.hypot(y - 10, x - 10) < 9 - z / 2).astype(np.uint16)
    assert same_partition(merge(unique_per_slice(cone), neck_penalty=1000.0), cone)
    with pytest.raises(InvalidInputError, match="neck_penalty"):
        merge(slices, neck_penalty=-1)
