"""The seeded watershed: equal to torch-em's function, and in blocks equal to the whole."""

import warnings

import numpy as np
import pytest
import zarr
from scipy import ndimage

from micro_sam.core.errors import InvalidInputError
from micro_sam.segmentation.watershed import (
    WatershedOptions,
    block_watershed,
    watershed_from_center_and_boundary_distances,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_em.util.segmentation import watershed_from_center_and_boundary_distances as reference


def cell_maps(shape=(300, 340), spacing=26, noise=0.06, seed=0):
    """Maps (centre, boundary, foreground) like a decoder's: touching cells with noise, some of them empty."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(spacing // 2, s, spacing) for s in shape), indexing="ij"), -1)
    grid = grid.reshape(-1, 2)
    centers = grid + rng.uniform(-6, 6, grid.shape)
    yx = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"), -1)
    distances = np.sqrt(((yx[:, :, None] - centers[None, None]) ** 2).sum(-1))
    nearest = distances.argmin(-1)
    center = np.clip(distances.min(-1) / (0.6 * spacing), 0, 1)
    present = rng.random(len(centers)) > 0.2
    foreground = present[nearest] & (distances.min(-1) < 0.65 * spacing)
    edges = foreground & ~(ndimage.minimum_filter(nearest, 3) == ndimage.maximum_filter(nearest, 3))
    inside = ndimage.distance_transform_edt(foreground & ~edges)
    boundary = np.where(foreground, 1 - np.clip(inside / (0.4 * spacing), 0, 1), 1)
    maps = [ndimage.gaussian_filter(np.asarray(m, dtype=float), 1) for m in (center, boundary, foreground)]
    return [np.clip(m + rng.normal(0, noise, shape), 0, 1).astype(np.float32) for m in maps]


def random_maps(shape=(128, 150), seed=1):
    rng = np.random.default_rng(seed)
    maps = [ndimage.gaussian_filter(rng.random(shape), 2.5) for _ in range(3)]
    return [((m - m.min()) / (m.max() - m.min())).astype(np.float32) for m in maps]


def same_partition(a, b):
    """Fraction of pixels that agree when every label of `a` is mapped to the label of `b` that it overlaps most."""
    pairs, counts = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1, return_counts=True)
    return sum(counts[pairs[0] == label].max() for label in np.unique(a)) / a.size


@pytest.mark.parametrize("maps", [cell_maps(), random_maps(), cell_maps((200, 90), noise=0.2, seed=3)])
@pytest.mark.parametrize("options", [
    {}, {"distance_smoothing": 0.0}, {"min_size": 60}, {"distance_smoothing": 3.3, "foreground_threshold": 0.3},
    {"center_distance_threshold": 0.35, "boundary_distance_threshold": 0.7, "min_size": 5},
])
def test_equals_torch_em(maps, options):
    expected = reference(*maps, **options)
    before = [m.copy() for m in maps]
    labels = watershed_from_center_and_boundary_distances(*maps, **options)
    assert labels.dtype == np.uint64
    assert labels.max() > 5
    np.testing.assert_array_equal(labels, expected)
    for map_, copy in zip(maps, before):
        np.testing.assert_array_equal(map_, copy)


def test_debug_and_volume_equal_torch_em():
    rng = np.random.default_rng(0)
    maps = [ndimage.gaussian_filter(rng.random((12, 60, 70)), 2).astype(np.float32) for _ in range(3)]
    kwargs = {
        "center_distance_threshold": 0.49, "boundary_distance_threshold": 0.51, "foreground_threshold": 0.48,
        "distance_smoothing": 1.0, "debug": True,
    }
    expected, expected_parts = reference(*maps, **kwargs)
    labels, parts = watershed_from_center_and_boundary_distances(*maps, **kwargs)
    assert labels.max() > 3
    np.testing.assert_array_equal(labels, expected)
    assert parts.keys() == expected_parts.keys()
    for name, part in parts.items():
        np.testing.assert_array_equal(part, expected_parts[name])


@pytest.mark.parametrize("changes", [
    {}, {"distance_smoothing": 0.0}, {"distance_smoothing": 0.0, "foreground_smoothing": 0.0}, {"min_size": 80},
])
@pytest.mark.parametrize("tile_shape", [(64, 96), (47, 53)])
def test_blocks_equal_whole_for_any_number_of_threads(changes, tile_shape):
    maps = cell_maps()
    options = WatershedOptions(**{"foreground_smoothing": 1.0, **changes})
    expected = watershed_from_center_and_boundary_distances(*maps, **vars(options))
    before = [m.copy() for m in maps]
    results = [
        block_watershed(*maps, options, tile_shape, halo=(60, 60), n_threads=n, optimize_memory=n == 2)
        for n in (1, 2, 7)
    ]
    assert len(np.unique(expected)) > 80
    for result in results:
        np.testing.assert_array_equal(result, results[0])
        assert (result != expected).sum() <= 2  # a tie between two objects
    for map_, copy in zip(maps, before):
        np.testing.assert_array_equal(map_, copy)


def test_small_halo_keeps_objects_whole():
    maps, options = cell_maps(), WatershedOptions(foreground_smoothing=1.0)
    expected = watershed_from_center_and_boundary_distances(*maps, **vars(options))
    labels = block_watershed(*maps, options, (70, 70), halo=(16, 16))
    np.testing.assert_array_equal(np.unique(labels), np.unique(expected))
    assert same_partition(expected, labels) > 0.999
    assert (labels == expected).mean() > 0.999


def test_seeds_touching_diagonally_across_blocks_are_one_object():
    center = np.ones((40, 40), dtype=np.float32)
    for k in range(8, 32):
        center[k, k] = 0  # a diagonal line, cut by the corner of four blocks
    center[2, 37] = 0
    foreground = np.ones_like(center)
    boundary = center.copy()
    options = WatershedOptions(distance_smoothing=0)
    serial = watershed_from_center_and_boundary_distances(center, boundary, foreground, distance_smoothing=0)
    blocks = block_watershed(center, boundary, foreground, options, (20, 20), (20, 20))
    assert serial.max() == 2
    np.testing.assert_array_equal(blocks, serial)


def test_long_object_has_one_id_and_ids_follow_the_raster():
    center = np.ones((60, 200), dtype=np.float32)
    center[30, 5:195] = 0
    center[10:50, 195] = 0
    center[5, 5] = 0
    maps = (center, center, np.ones_like(center))
    serial = watershed_from_center_and_boundary_distances(*maps, distance_smoothing=0)
    blocks = block_watershed(*maps, WatershedOptions(distance_smoothing=0), (16, 16), (8, 8), n_threads=2)
    seeds = center == 0
    np.testing.assert_array_equal(blocks[seeds], serial[seeds])


@pytest.mark.parametrize("layout", [
    {"chunks": (32, 32)}, {"chunks": (16, 16), "shards": (96, 64)}, {"chunks": (50, 30)},
])
def test_writes_into_zarr(tmp_path, layout):
    maps, options = cell_maps(), WatershedOptions(min_size=40)
    expected = watershed_from_center_and_boundary_distances(*maps, min_size=40)
    output = zarr.create_array(tmp_path / "labels.zarr", shape=maps[0].shape, dtype="uint32", **layout)
    returned = block_watershed(*maps, options, (64, 64), (60, 60), n_threads=4, segmentation=output)
    assert returned is output
    assert (output[...] != expected).sum() <= 2


def test_preallocated_numpy_and_empty_result():
    maps = [np.ones((50, 60), dtype=np.float32), np.ones((50, 60), dtype=np.float32), np.zeros((50, 60), np.float32)]
    output = np.full((50, 60), 7, dtype=np.int32)
    returned = block_watershed(*maps, WatershedOptions(min_size=3), (20, 20), (5, 5), segmentation=output)
    assert returned is output
    assert not output.any()
    assert not watershed_from_center_and_boundary_distances(*maps).any()


def test_everything_is_one_object():
    maps = [np.zeros((50, 60), dtype=np.float32), np.zeros((50, 60), dtype=np.float32), np.ones((50, 60), np.float32)]
    np.testing.assert_array_equal(block_watershed(*maps, WatershedOptions(), (20, 20), (5, 5)), 1)
    np.testing.assert_array_equal(watershed_from_center_and_boundary_distances(*maps), 1)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"halo": None}, "needs a halo"),
    ({"tile_shape": (32, 32, 32)}, "tile_shape must be 2 integers"),
    ({"halo": (-1, 3)}, "halo must be 2 integers"),
    ({"segmentation": np.zeros((3, 3), dtype=int)}, "output `segmentation`"),
    ({"segmentation": np.zeros((128, 150))}, "output `segmentation`"),
])
def test_bad_arguments(kwargs, message):
    kwargs = {"tile_shape": (32, 32), "halo": (8, 8), **kwargs}
    with pytest.raises(InvalidInputError, match=message):
        block_watershed(*random_maps(), WatershedOptions(), **kwargs)


def test_maps_of_different_shape():
    center, boundary, foreground = random_maps()
    with pytest.raises(InvalidInputError, match="same shape"):
        watershed_from_center_and_boundary_distances(center, boundary[1:], foreground)
