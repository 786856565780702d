"""The image of an annotation: which axes it has, what is read of it, and where its voxels are in the world."""

import subprocess
import sys
from collections.abc import Sequence

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from micro_sam.annotation.geometry import AnnotationImage, Transform, normalise_tiling
from micro_sam.core.errors import InvalidInputError, InvalidTypeError
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.embeddings.signature import compute_data_signature


class Watched:
    """An array that notes what is read of it."""

    def __init__(self, array, chunks=None):
        self._array, self.chunks = array, chunks
        self.shape, self.dtype, self.n_read = array.shape, array.dtype, 0

    def __getitem__(self, key):
        values = self._array[key]
        self.n_read += values.size
        return values


def numbers(*shape):
    return np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)


@pytest.mark.parametrize(("shape", "mode", "rgb", "index"), [
    ((40, 50), "2d", None, np.s_[:]),
    ((40, 50), "2d", False, np.s_[:]),
    ((1, 40, 50), "2d", None, np.s_[0]),
    ((40, 50, 1), "2d", None, np.s_[..., 0]),
    ((40, 50, 1), "2d", True, np.s_[..., 0]),
    ((1, 1, 40, 50), "2d", False, np.s_[0, 0]),
    ((40, 50, 2), "2d", None, np.s_[:]),
    ((40, 50, 3), "2d", None, np.s_[:]),
    ((40, 50, 3), "2d", True, np.s_[:]),
    ((40, 50, 4), "2d", None, np.s_[..., :3]),
    ((1, 40, 50, 4), "2d", True, np.s_[0, ..., :3]),
    ((5, 40, 50), "3d", None, np.s_[:]),
    ((1, 40, 50), "3d", None, np.s_[:]),
    ((1, 1, 40, 50), "3d", None, np.s_[0]),
    ((5, 1, 40, 50), "3d", None, np.s_[:, 0]),
    ((1, 5, 40, 50), "tracking", None, np.s_[0]),
    ((1, 5, 1, 40, 50), "tracking", None, np.s_[0, :, 0]),
    ((5, 40, 50, 3), "3d", None, np.s_[:]),
    ((1, 40, 50, 3), "3d", None, np.s_[:]),
    ((5, 1, 40, 50, 4), "tracking", None, np.s_[:, 0, ..., :3]),
    ((40, 50, 3), "3d", False, np.s_[:]),
])
@pytest.mark.parametrize("kind", ["numpy", "dask", "zarr", "watched", "multiscale"])
def test_axes(shape, mode, rgb, index, kind):
    array = numbers(*shape)
    source = {
        "numpy": lambda: array, "dask": lambda: da.from_array(array, chunks=16), "zarr": lambda: zarr.array(array),
        "watched": lambda: Watched(array), "multiscale": lambda: (array, array[..., ::2, :]),
    }[kind]()
    image = AnnotationImage.create(source, mode=mode, rgb=rgb, name="cells")
    expected, ndim = array[index], 2 if mode == "2d" else 3
    if kind == "watched":
        assert source.n_read == 0
    assert image.ndim == ndim
    assert image.array.shape == expected.shape
    assert image.shape == expected.shape[:ndim]
    assert image.plane_shape == image.shape[-2:]
    assert image.n_planes == (None if ndim == 2 else expected.shape[0])
    assert image.has_channels == (expected.ndim > ndim)
    assert image.dtype == np.uint8
    assert image.name == "cells"
    np.testing.assert_array_equal(np.asarray(image.array[...]), expected)
    for i in (None,) if ndim == 2 else (0, expected.shape[0] - 1):
        np.testing.assert_array_equal(image.plane(i), expected if i is None else expected[i])
    assert image.signature() == compute_data_signature(expected)


@pytest.mark.parametrize(("shape", "mode", "rgb", "message"), [
    ((5, 40, 50), "2d", None, "3D annotator for a volume and the tracking annotator"),
    ((5, 40, 50, 3), "2d", None, "besides its channels.*3D annotator"),
    ((40, 50, 7), "2d", None, "at most four channels"),
    ((40, 50, 7), "2d", True, "1 to 4 channels"),
    ((40, 50, 3), "2d", False, "3D annotator"),
    ((40, 50), "3d", None, r"needs \(Z, Y, X\).*2D annotator"),
    ((40, 50), "tracking", None, r"needs \(T, Y, X\).*2D annotator"),
    ((40, 50, 3), "3d", None, "looks like a colour image.*2D annotator.*rgb=False"),
    ((40, 50, 3), "3d", True, "2D annotator"),
    ((2, 5, 40, 50), "3d", None, "Choose a channel, a plane or a time point"),
    ((2, 5, 40, 50, 3), "tracking", None, "Choose"),
    ((40,), "2d", None, "has 1 axes"),
    ((0, 40, 50), "3d", None, "empty"),
    ((40, 50), "4d", None, "mode must be one of 2d, 3d, tracking"),
])
def test_wrong_dimensions_are_refused_before_anything_is_read(shape, mode, rgb, message):
    source = Watched(np.zeros(shape, np.uint8))
    with pytest.raises(InvalidInputError, match=message):
        AnnotationImage.create(source, mode=mode, rgb=rgb)
    assert source.n_read == 0


def test_pixels_must_be_numbers():
    with pytest.raises(InvalidTypeError, match="complex"):
        AnnotationImage.create(np.zeros((4, 4), complex), mode="2d")


def test_one_plane_is_read_at_a_time():
    array = numbers(6, 1, 40, 50, 4)
    source = Watched(array, chunks=(1, 1, 40, 50, 4))
    image = AnnotationImage.create(source, mode="3d")
    np.testing.assert_array_equal(image.plane(3), array[3, 0, ..., :3])
    assert source.n_read == 40 * 50 * 3

    computed = []
    blocks = da.map_blocks(
        lambda block_info=None: computed.append(block_info[None]["chunk-location"][0]) or np.ones((1, 8, 9)),
        chunks=((1,) * 5, (8,), (9,)), dtype=float, meta=np.empty((0, 0, 0)),
    )
    image = AnnotationImage.create(blocks, mode="3d")
    assert image.plane(2).shape == (8, 9)
    assert computed == [2]

    for i in (None, -1, 5):
        with pytest.raises(InvalidInputError, match=f"no plane {i}: the image has the planes 0 to 4"):
            image.plane(i)
    with pytest.raises(InvalidInputError, match="leave i out"):
        AnnotationImage.create(numbers(4, 5), mode="2d").plane(0)


def test_signature_is_taken_once():
    source = Watched(numbers(5, 8, 9))
    image = AnnotationImage.create(source, mode="3d")
    assert image.signature() == image.signature() == compute_data_signature(numbers(5, 8, 9))
    assert source.n_read == 5 * 8 * 9


class Levels(Sequence):
    """As napari holds the levels: a sequence that looks like the first one, and as an array is the last one."""

    def __init__(self, levels):
        self._levels, self.shape, self.dtype = levels, levels[0].shape, levels[0].dtype

    def __getitem__(self, key):
        return self._levels[key]

    def __len__(self):
        return len(self._levels)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._levels[-1])


def test_levels_of_a_multiscale_image():
    levels = [numbers(5, 40, 50), numbers(5, 20, 25)]
    assert AnnotationImage.create(Levels(levels), mode="3d").array is levels[0]
    assert AnnotationImage.create(levels[:1], mode="3d").array is levels[0]
    with pytest.raises(InvalidInputError, match=r"numpy\.stack"):  # planes, not levels
        AnnotationImage.create([numbers(40, 50)] * 3, mode="3d")
    assert AnnotationImage.create([[1, 2, 3], [4, 5, 6]], mode="2d").shape == (2, 3)


@pytest.mark.parametrize(("shape", "mode"), [
    ((150, 160, 4), "2d"), ((1, 150, 160), "2d"), ((2, 1, 150, 160, 2), "3d"), ((1, 150, 160), "tracking"),
])
def test_array_is_what_embeddings_take(tiny_predictor, shape, mode):
    image = AnnotationImage.create(da.from_array(numbers(*shape), chunks=64), mode=mode)
    embeddings = precompute_image_embeddings(
        tiny_predictor, image.array, ndim=image.ndim, tile_shape=(100, 100), halo=(8, 8), verbose=False
    )
    assert tuple(embeddings["features"].attrs["shape"]) == image.plane_shape
    assert embeddings["features"]["0"].shape[0] == (image.n_planes or 1)


def test_scale_follows_the_axes():
    image = AnnotationImage.create(
        numbers(1, 5, 1, 40, 50, 3), mode="3d", scale=(9, 4, 8, 2, 0.5), translate=[0, 10, 0, 20, 30],
        units=("s", "um", "px", "um", "um"),
    )
    assert image.scale == (4, 2, 0.5)
    assert image.translate == (10, 20, 30)
    assert image.units == ("um", "um", "um")
    # World axes of a viewer that has one more in front: (extra, T, Z, C, Y, X).
    assert image.transform.world_to_voxel([7, 0, 18, 8, 24, 31]).tolist() == [2, 2, 2]
    assert AnnotationImage.create(numbers(1, 4, 5), mode="2d", scale=(2, 3)).scale == (2, 3)
    # A viewer that shows the channels as one more axis.
    image = AnnotationImage.create(numbers(5, 1, 40, 50, 2), mode="3d", scale=(3, 9, 2, 0.5, 1), translate=[0] * 5)
    assert image.scale == (3, 2, 0.5)
    assert image.axes == (-5, -3, -2)
    assert image.transform.world_to_voxel([12, 0, 8, 3, 1]).tolist() == [4, 4, 6]
    assert AnnotationImage.create(numbers(40, 50, 3), mode="2d", scale=(2, 3)).axes == (-2, -1)
    plain = AnnotationImage.create(numbers(4, 5), mode="2d")
    assert (plain.scale, plain.translate, plain.units) == (None, None, None)
    assert plain.transform.world_to_voxel((3, 4)).tolist() == [3, 4]


@pytest.mark.parametrize("wrong", [
    {"scale": (1, 2, 3, 4)}, {"scale": (1, np.nan)}, {"translate": (1, np.inf)}, {"units": ("um",)},
])
def test_wrong_scales(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        AnnotationImage.create(numbers(4, 5), mode="2d", **wrong)


sizes = st.one_of(st.floats(0.01, 100), st.floats(-100, -0.01))
places = st.floats(-1e4, 1e4)


@given(
    st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.tuples(*[values] * n) for values in (sizes, places, places)])),
    st.lists(places, max_size=3),
)
def test_transform_round_trip(values, extra):
    scale, translate, voxel = values
    transform = Transform(scale, translate)
    world = transform.voxel_to_world(voxel)
    np.testing.assert_allclose(transform.world_to_voxel([*extra, *world]), voxel, atol=1e-5)
    many = np.stack([voxel, np.add(voxel, 1)])
    np.testing.assert_allclose(transform.world_to_voxel(transform.voxel_to_world(many)), many, atol=1e-5)
    plane = transform.plane_index([*extra, *world], 7)
    assert plane == min(max(np.rint(transform.world_to_voxel(world)[0]), 0), 6)


@pytest.mark.parametrize(("world", "plane"), [
    (0, 0), (5, 0), (10, 0), (10.9, 0), (11.1, 1), (12, 1), (13, 2), (15, 2), (17, 4), (18.9, 4), (400, 4),
])
def test_plane_index(world, plane):  # W15: slices of a thickness other than 1, and an origin
    transform = Transform((2, 0.5, 0.5), (10, -3, 4))
    assert transform.plane_index((99, world, 0, 0), 5) == plane  # 13 and 15 are planes 1.5 and 2.5
    assert isinstance(transform.plane_index(np.array([world, 0, 0]), 5), int)


def test_transform_refuses():
    for scale, translate, axes in [
        ((0, 1), (0, 0), None), ((1, 1), (0,), None), ((np.nan, 1), (0, 0), None), ((1, 1), (0, 0), (0, 1)),
        ((1, 1), (0, 0), (-1,)),
    ]:
        with pytest.raises(InvalidInputError):
            Transform(scale, translate, axes)
    transform = Transform((1, 1, 1), (0, 0, 0))
    with pytest.raises(InvalidInputError, match="at least 3 coordinates"):
        transform.world_to_voxel([1, 2])
    with pytest.raises(InvalidInputError, match="3 coordinates"):
        transform.voxel_to_world([1, 2, 3, 4])
    with pytest.raises(InvalidInputError, match="no plane"):
        transform.plane_index([np.nan, 1, 1], 4)


@pytest.mark.parametrize(("form", "expected"), [
    ((0, 0, 0, 0), (None, None)),
    ((None, None, None, None), (None, None)),
    ((0, 0, 32, 32), (None, None)),
    ((512, 0, 0, 0), ((512, 512), (0, 0))),
    ((None, 512, 64, 64), ((512, 512), (64, 64))),
    ((0, 16, 0, 0), ((256, 256), (0, 0))),
    ((384, 512, 64, 32), ((384, 512), (64, 32))),
    ((100, 512, 0, 32), ((256, 512), (0, 32))),
    ((np.int64(512), 300, 8, None), ((512, 300), (8, 0))),
])
def test_tiling(form, expected):  # W16: (y, x), and unequal halos stay
    assert normalise_tiling(*form) == expected


@pytest.mark.parametrize(("form", "name"), [
    ((-1, 0, 0, 0), "tile_y"), ((0, 1.5, 0, 0), "tile_x"), ((512, 512, -3, 0), "halo_y"), ((0, 0, 0, "8"), "halo_x"),
])
def test_wrong_tiling(form, name):
    with pytest.raises(InvalidInputError, match=name):
        normalise_tiling(*form)


def test_no_torch():
    code = "import sys, micro_sam.annotation.prompts; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
