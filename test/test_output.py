"""Label images in files: formats, records, atomic writing."""

import errno
import json
import os

import numpy as np
import pytest
import tifffile
import zarr
from test_image import ome_zarr

from micro_sam.core.errors import InvalidInputError, OutputExistsError, OutputWriteError
from micro_sam.core.image import open_image
from micro_sam.core.output import is_done, label_path, label_stem, prepare_folder, read_record, write_json, write_labels

LABELS = np.arange(40 * 56, dtype=np.uint64).reshape(40, 56) // 100
SETTINGS = {"model": "vit_t_lite", "min_size": 10, "tile_shape": (64, 64)}


@pytest.mark.parametrize("name", ["a.tif", "a.zarr", "a.ome.zarr"])
@pytest.mark.parametrize("labels", [LABELS, np.stack([LABELS + 70_000] * 3)], ids=["plane", "stack"])
def test_round_trip_and_record(tmp_path, name, labels):
    path = tmp_path / "new folder" / name
    assert not is_done(path, SETTINGS)
    assert write_labels(path, labels, SETTINGS) == path
    image = open_image(path)
    assert image.dtype == (np.uint16 if labels.ndim == 2 else np.uint32)
    np.testing.assert_array_equal(image.read(), labels)
    assert read_record(path)["n_objects"] == len(np.unique(labels[labels > 0]))
    assert is_done(path, SETTINGS)
    with pytest.raises(OutputExistsError, match="min_size: 10 there, 20 now.*--overwrite"):
        is_done(path, {**SETTINGS, "min_size": 20})
    assert not is_done(path, {**SETTINGS, "min_size": 20}, overwrite=True)
    write_labels(path, labels[..., :30], {"min_size": 20})
    np.testing.assert_array_equal(open_image(path).read(), labels[..., :30])
    assert os.listdir(path.parent) == [name], "temporary files are left"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_in_an_ome_zarr_image(tmp_path, version):
    path = ome_zarr(tmp_path / "a.ome.zarr", LABELS.astype(np.uint8), "yx", version)
    assert not is_done(path, SETTINGS, name="nuclei")
    target = write_labels(path, LABELS, SETTINGS, name="nuclei", scale=(0.5, 0.25))
    assert target == path / "labels" / "nuclei"
    write_labels(path, LABELS, SETTINGS, name="cells")
    write_labels(path, LABELS, SETTINGS, name="nuclei", scale=(0.5, 0.25))
    attrs = dict(zarr.open_group(path / "labels", mode="r").attrs)
    assert sorted((attrs if version == "0.4" else attrs["ome"])["labels"]) == ["cells", "nuclei"]
    group = zarr.open_group(target, mode="r")
    metadata = dict(group.attrs) if version == "0.4" else group.attrs["ome"]
    assert metadata["image-label"]["source"] == {"image": "../../"}
    assert group.metadata.zarr_format == (2 if version == "0.4" else 3)
    image = open_image(target)
    assert image.scale == (0.5, 0.25)
    np.testing.assert_array_equal(image.read(), LABELS)
    assert is_done(path, SETTINGS, name="nuclei")
    assert open_image(path).dtype == np.uint8, "the image itself is unchanged"


def test_large_labels_get_a_pyramid_that_keeps_ids(tmp_path):
    labels = np.zeros((2100, 30), np.uint32)
    labels[:, 4:] = 9
    path = write_labels(tmp_path / "a.ome.zarr", labels)
    assert set(zarr.open_group(path, mode="r").array_keys()) == {"0", "1", "2"}
    small = open_image(path, level=2)
    assert small.shape == (525, 8)
    assert small.scale == (4.0, 4.0)
    assert set(np.unique(small.read())) == {0, 9}


def test_names():
    assert label_path("exp.1.result").name == "exp.1.result.tif"
    assert label_path("a.ome.zarr").name == "a.ome.zarr"
    assert label_stem("x/a.ome.tif") == "a"
    assert label_stem("x/a.1.png") == "a.1"
    with pytest.raises(InvalidInputError, match=".png"):
        label_path("a.png")


def test_foreign_file_is_not_replaced(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", LABELS.astype(np.uint16))
    with pytest.raises(OutputExistsError, match="not written by this tool"):
        is_done(tmp_path / "a.tif", SETTINGS)


@pytest.mark.parametrize("name", ["a.tif", "a.zarr", "a.ome.zarr"])
def test_failure_keeps_the_old_output(tmp_path, monkeypatch, name):
    path = write_labels(tmp_path / name, LABELS, SETTINGS)

    replace = os.replace

    def no_space(*args, **kwargs):
        if args[1] == path and args[0].name != "old":  # the last step, when the new output is complete
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", no_space)
        with pytest.raises(OutputWriteError, match=r"no space left"):
            write_labels(path, LABELS + 1, SETTINGS)
    np.testing.assert_array_equal(open_image(path).read(), LABELS)
    assert os.listdir(tmp_path) == [name]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OutputWriteError, match="a file is where a folder is needed"):
        prepare_folder(tmp_path / "a" / "b.tif")


def test_json(tmp_path):
    write_json(tmp_path / "report.json", {"a": 1})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
