"""The lazy reader: every format, axes, channels, and how little is read."""

from pathlib import Path

import dask.array
import h5py
import imageio.v3 as imageio
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr

from micro_sam.core import readers
from micro_sam.core.errors import (
    ImageReadError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    UnsupportedError,
)
from micro_sam.core.image import load_image_data, open_image
from micro_sam.core.lazy_array import LazyArray

DATA = Path(__file__).parent / "data"
RNG = np.random.default_rng(0)
PLANE = RNG.integers(0, 255, (40, 56), dtype=np.uint8)
STACK = RNG.integers(0, 60_000, (5, 40, 56), dtype=np.uint16)
RGB = RNG.integers(0, 255, (40, 56, 3), dtype=np.uint8)


class TrackingArray:
    """A lazy array that counts the values read from it."""

    def __init__(self, array):
        self._array, self.n_read, self.blocks = array, 0, []
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key):
        block = self._array[key]
        self.n_read += block.size
        self.blocks.append(block.size)
        return block


def ome_zarr(path, array, axes, version="0.5", levels=1, scale=None):
    """An OME-Zarr image written by hand after the specification."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for level in range(levels):
        step = 2**level
        data = array[..., ::step, ::step]
        group.create_array(str(level), data=np.ascontiguousarray(data), chunks=(*[1] * (data.ndim - 2), 16, 16))
        factors = [1.0 if a not in "yx" else float(step) for a in axes]
        factors = [f * s for f, s in zip(factors, scale or [1.0] * len(axes))]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": factors}]})
    kinds = {"t": "time", "c": "channel"}
    multiscales = [{"axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes], "datasets": datasets}]
    if version == "0.5":
        group.attrs["ome"] = {"version": version, "multiscales": multiscales}
    else:
        group.attrs["multiscales"] = [{**multiscales[0], "version": version}]
    return path


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("array", [PLANE, STACK, RGB], ids=["plane", "stack", "rgb"])
def test_tif(tmp_path, array, compression):
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression, photometric="rgb" if array is RGB else None)
    image = open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.read(), array)
    assert image.axes == {2: "YX", 3: "YXC" if array is RGB else "ZYX"}[array.ndim]
    assert image.ndim == (3 if array is STACK else 2)
    assert isinstance(image.data, np.memmap) == (compression is None)


def test_big_endian_tif_is_mapped(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, byteorder=">")
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif").read(), STACK)


def test_large_compressed_tif_is_read_page_by_page(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib", photometric="minisblack")
    monkeypatch.setattr(readers, "LAZY_TIF_BYTES", 0)
    image = open_image(tmp_path / "a.tif")
    read = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(
        tifffile.FileHandle, "read", lambda self, size=-1, /: read.append(size) or original(self, size)
    )
    assert isinstance(image.data, LazyArray)
    assert image.data.chunks[0] == 1
    np.testing.assert_array_equal(image.data[3], STACK[3])
    assert 0 < sum(read) < 1.5 * STACK[3].nbytes


def test_ome_tif_axes_channel_time_and_scale(tmp_path):
    data = RNG.integers(0, 255, (2, 3, 4, 20, 24), dtype=np.uint8)
    metadata = {"axes": "TCZYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.3, "PhysicalSizeZ": 1.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata=metadata, ome=True)
    with pytest.raises(InvalidInputError, match=r"T=2, C=3, Z=4.*time and channel"):
        open_image(tmp_path / "a.ome.tif")
    image = open_image(tmp_path / "a.ome.tif", channel=2, time=1)
    assert (image.axes, image.scale, image.ndim) == ("ZYX", (1.5, 0.3, 0.2), 3)
    np.testing.assert_array_equal(image.read(), data[1, 2])
    with_channels = open_image(tmp_path / "a.ome.tif", time=0)
    assert with_channels.axes == "ZYXC"
    np.testing.assert_array_equal(with_channels.read(), np.moveaxis(data[0], 0, -1))
    with pytest.raises(InvalidInputError, match="no channel 3: there are 3"):
        open_image(tmp_path / "a.ome.tif", channel=3)


def test_imagej_hyperstack_and_singleton_axes(tmp_path):
    data = RNG.integers(0, 255, (1, 1, 3, 20, 24), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", data, imagej=True, resolution=(5, 4), metadata={"axes": "TZCYX", "spacing": 2.0}
    )
    image = open_image(tmp_path / "a.tif")
    assert (image.axes, image.ndim) == ("YXC", 2)
    assert image.scale == pytest.approx((0.25, 0.2))
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", channel=1).read(), data[0, 0, 1])


def test_pyramid_levels_and_series(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(PLANE, subifds=1, tile=(16, 16))
        file.write(PLANE[::2, ::2], subfiletype=1, tile=(16, 16))
        file.write(STACK[0])
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", level=1).read(), PLANE[::2, ::2])
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", series=1).read(), STACK[0])
    with pytest.raises(InvalidInputError, match="no level 2: there are 2"):
        open_image(tmp_path / "a.tif", level=2)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
@pytest.mark.parametrize("array", [PLANE, RGB], ids=["grey", "rgb"])
def test_pictures(tmp_path, array, suffix):
    path = tmp_path / f"a{suffix}"
    imageio.imwrite(path, array)
    image = open_image(path)
    assert image.axes == ("YX" if array is PLANE else "YXC")
    if suffix == ".jpg":
        assert image.read().shape == array.shape
    else:
        np.testing.assert_array_equal(image.read(), array)


def test_opacity_is_dropped(tmp_path):
    imageio.imwrite(tmp_path / "a.png", np.dstack([RGB, np.full(PLANE.shape, 255, np.uint8)]))
    np.testing.assert_array_equal(open_image(tmp_path / "a.png").read(), RGB)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png", channel=1).read(), RGB[..., 1])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path, version):
    data = RNG.integers(0, 255, (2, 5, 40, 56), dtype=np.uint8)
    path = ome_zarr(tmp_path / "a.ome.zarr", data, "czyx", version, levels=2, scale=[1, 2.0, 0.5, 0.5])
    image = open_image(path, channel=1)
    assert (image.axes, image.scale, image.ndim) == ("ZYX", (2.0, 0.5, 0.5), 3)
    np.testing.assert_array_equal(image.read(), data[1])
    small = open_image(path, channel=1, level=1)
    assert small.scale == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(small.read(), data[1, :, ::2, ::2])
    np.testing.assert_array_equal(open_image(path, key="1", axes="CZYX", channel=0).read(), data[0, :, ::2, ::2])


def test_zarr_containers(tmp_path):
    zarr.create_array(tmp_path / "plain.zarr", data=STACK, chunks=(1, 16, 16))
    image = open_image(tmp_path / "plain.zarr")
    assert isinstance(image.data, LazyArray)
    assert image.data.chunks == (1, 16, 16)
    np.testing.assert_array_equal(image.data[2, 3:20], STACK[2, 3:20])

    group = zarr.create_group(tmp_path / "group.zarr")
    group.create_array("deep/raw", data=PLANE)
    np.testing.assert_array_equal(open_image(tmp_path / "group.zarr").read(), PLANE)
    group.create_array("labels", data=PLANE)
    with pytest.raises(ImageReadError, match="2 images.*'deep/raw', 'labels'"):
        open_image(tmp_path / "group.zarr")
    with pytest.raises(ImageReadError, match="(?s)'deep/row'.*It has: 'deep/raw', 'labels'.*Did you mean 'deep/raw'"):
        open_image(tmp_path / "group.zarr", key="deep/row")


def test_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"] = STACK
        file["note"] = "text"
    image = open_image(tmp_path / "a.h5")
    np.testing.assert_array_equal(image.data[1:3, ::2, 5], STACK[1:3, ::2, 5])
    del image  # closes the file
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["volumes/labels"] = STACK
    with pytest.raises(ImageReadError, match="2 images"):
        open_image(tmp_path / "a.h5")
    np.testing.assert_array_equal(open_image(tmp_path / "a.h5", key="/volumes/raw").read(), STACK)
    with pytest.raises(ImageReadError, match="Did you mean 'volumes/raw'"):
        open_image(tmp_path / "a.h5", key="volumes/rav")
    with pytest.raises(MissingFileError, match="pass it as the path and the rest as key"):
        open_image(tmp_path / "a.h5" / "volumes/raw")


def test_mrc(tmp_path):
    with mrcfile.new(tmp_path / "a.rec", data=STACK.astype(np.int16)) as file:
        file.voxel_size = (2.0, 3.0, 4.0)
    image = open_image(tmp_path / "a.rec")
    assert isinstance(image.data, np.memmap)
    assert image.scale == (4.0, 3.0, 2.0)
    np.testing.assert_array_equal(image.read(), STACK.astype(np.int16))
    np.testing.assert_array_equal(load_image_data(tmp_path / "a.rec", key="data"), STACK.astype(np.int16))


def test_czi_reads_only_the_blocks_it_needs(monkeypatch):
    """The files were written by Zeiss' own library from these formulas."""
    from micro_sam.core import czi

    y, x = np.mgrid[:40, :56]
    decoded = []
    original = czi._decode
    monkeypatch.setattr(czi, "_decode", lambda block: decoded.append(block) or original(block))
    image = open_image(DATA / "stack_zstd.czi", channel=1)
    assert (image.axes, image.shape) == ("ZYX", (3, 40, 56))
    np.testing.assert_array_equal(image.data[2, 5:, :9], ((y * 3 + x * 2 + 180) % 251)[5:, :9])
    assert len(decoded) == 1  # of six planes
    mosaic = open_image(DATA / "mosaic.czi")
    np.testing.assert_array_equal(mosaic.read(), (y * 3 + x * 2) % 251)


def test_folder_as_stack_opens_only_what_is_indexed(tmp_path, monkeypatch):
    for n in (3, 1, 0, 2, 4):
        tifffile.imwrite(tmp_path / f"plane_{n}.tif", STACK[n])
    image = open_image(tmp_path, key="plane_*.tif")
    assert (image.axes, image.shape) == ("ZYX", STACK.shape)
    opened = []
    original = readers.open_source
    monkeypatch.setattr(readers, "open_source", lambda path, *a: opened.append(path.name) or original(path, *a))
    np.testing.assert_array_equal(image.data[3, :7], STACK[3, :7])
    assert opened == ["plane_3.tif"]
    np.testing.assert_array_equal(image.read(), STACK)
    tifffile.imwrite(tmp_path / "plane_9.tif", STACK[0, 1:])
    with pytest.raises(ImageReadError, match=r"plane_9.tif has \(39, 56\)"):
        open_image(tmp_path, key="*.tif").read()
    with pytest.raises(MissingFileError, match="pattern"):
        open_image(tmp_path, key="*.jpg")
    with pytest.raises(ImageReadError, match="is a folder"):
        open_image(tmp_path)


def test_views_read_only_what_is_asked_for():
    array = TrackingArray(RNG.integers(0, 255, (3, 4, 40, 56), dtype=np.uint8))
    image = open_image(array, axes="CZYX", channel=2)
    assert array.n_read == 0
    np.testing.assert_array_equal(image.data[1, 3:8, 10:20], array._array[2, 1, 3:8, 10:20])
    assert array.n_read == 50
    colour = open_image(array, axes="CZYX")
    assert colour.data.shape == (4, 40, 56, 3)
    np.testing.assert_array_equal(colour.data[0, -5:, 3], np.moveaxis(array._array, 0, -1)[0, -5:, 3])
    assert array.n_read == 50 + 5 * 3
    rgba = open_image(TrackingArray(RNG.integers(0, 255, (40, 56, 4))))
    assert rgba.data[..., 1:].shape == (40, 56, 2)


def test_arrays_pass_through():
    assert open_image(PLANE).data is PLANE
    lazy = dask.array.from_array(STACK, chunks=(1, 20, 20))
    image = open_image(lazy[None, None])
    assert isinstance(image.data, dask.array.Array)
    assert image.axes == "ZYX"
    np.testing.assert_array_equal(image.read(), STACK)
    assert open_image(RGB).axes == "YXC"
    assert open_image(RGB, ndim=3).axes == "ZYX"
    assert open_image(PLANE[..., None]).axes == "YX"
    assert open_image(STACK[:1], ndim=3).shape == (1, 40, 56)
    assert open_image(np.zeros((40, 56, 2)), ndim=2).axes == "YXC"


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        (np.zeros((2, 3, 4, 5, 6)), {}, InvalidInputError, "axes='TCZYX'"),
        (np.zeros((0, 5)), {}, ImageReadError, "is empty"),
        (np.zeros((4, 5), complex), {}, InvalidTypeError, "complex"),
        ([[1, 2]], {}, InvalidTypeError, "list"),
        (STACK, {"axes": "YX"}, InvalidInputError, "each of the 3 axes"),
        (STACK, {"ndim": 2, "axes": "ZYX"}, InvalidInputError, "ndim=2"),
        (STACK, {"axes": "CYX"}, InvalidInputError, "5 channels.*channel=0 to channel=4"),
        (PLANE, {"channel": 0}, InvalidInputError, "no channel axis"),
        (PLANE, {"level": 1}, InvalidInputError, "level"),
    ],
)
def test_wrong_arrays(array, options, error, message):
    with pytest.raises(error, match=message):
        open_image(array, **options)


def test_wrong_files(tmp_path):
    (tmp_path / "a.n5").mkdir()
    (tmp_path / "a.nd2").write_bytes(b"x")
    (tmp_path / "a.tif").write_bytes(b"not a tif")
    (tmp_path / "b.tif").write_bytes(b"")
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    for name, error, message in [
        ("a.n5", UnsupportedError, "N5"), ("a.nd2", ImageReadError, r"'.nd2'.*OME-TIFF"),
        ("a.tif", ImageReadError, "damaged"), ("b.tif", ImageReadError, "empty file"),
        ("c.tif", MissingFileError, "no file"), ("a.nii.gz", UnsupportedError, "pip install nibabel"),
    ]:
        with pytest.raises(error, match=message):
            open_image(tmp_path / name)


def test_load_image_data_keeps_the_axes_of_the_file(tmp_path):
    data = RNG.integers(0, 255, (2, 3, 4, 20, 24), dtype=np.uint8)
    zarr.create_array(tmp_path / "a.zarr", data=data)
    np.testing.assert_array_equal(load_image_data(tmp_path / "a.zarr"), data)
    assert isinstance(load_image_data(tmp_path / "a.zarr", lazy_loading=True), LazyArray)
    imageio.imwrite(tmp_path / "a.png", RGB)
    np.testing.assert_array_equal(load_image_data(str(tmp_path / "a.png")), RGB)
