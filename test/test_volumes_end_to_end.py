"""Volumes and time series from file to file: the library, the one-liner and the command do the same."""

import json

import numpy as np
import pytest
import tifffile
import zarr

from micro_sam import segment
from micro_sam.automatic_segmentation import (
    automatic_instance_segmentation,
    automatic_tracking,
    get_predictor_and_segmenter,
)
from micro_sam.cli.automatic_segmentation import main
from micro_sam.core.errors import OutputExistsError, UnsupportedError
from micro_sam.multi_dimensional_segmentation import automatic_3d_segmentation
from micro_sam.tracking import linking
from micro_sam.tracking.ctc import read_ctc

LOOSE = {"center_distance_threshold": 0.485, "boundary_distance_threshold": 0.54, "foreground_threshold": 0.4}
LINKER = "motile"
LOOSE_ARGS = [f"--{name}={value}" for name, value in LOOSE.items()]


@pytest.fixture
def stack(cells_image):
    return np.stack([np.roll(cells_image, shift, axis=1) for shift in (0, 2, 4)])


@pytest.fixture
def model(tiny_checkpoint):
    return get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu")


@pytest.fixture
def run(tiny_checkpoint, capsys):
    def run(*args):
        code = main([*map(str, args), "-c", str(tiny_checkpoint), "-m", "vit_t", "-d", "cpu", *LOOSE_ARGS])
        return (code, *capsys.readouterr())
    return run


@pytest.fixture
def file(tmp_path, stack):
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def test_library_one_liner_and_command_agree(run, file, tmp_path, stack, model, tiny_checkpoint):
    expected = automatic_3d_segmentation(stack, *model, verbose=False, min_z_extent=2, **LOOSE)
    assert expected.max() > 1
    assert len(np.unique(expected[0])) > 1
    labels = automatic_instance_segmentation(*model, file, tmp_path / "a.tif", verbose=False, min_z_extent=2, **LOOSE)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint64
    options = {"model": "vit_t", "checkpoint": tiny_checkpoint, "device": "cpu", "min_z_extent": 2, **LOOSE}
    np.testing.assert_array_equal(segment(file, **options), expected)

    code, out, _ = run("-i", file, "-o", tmp_path / "c.zarr", "--min_z_extent", "2", "--batch_size", "2")
    assert code == 0
    assert "3 planes are segmented and merged" in out
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "c.zarr", mode="r")[:], expected)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), expected)


def test_again_loads_and_other_settings_are_refused(run, file, tmp_path, model):
    arguments = ("-i", file, "-o", tmp_path / "o.tif", "-e", tmp_path / "e.zarr")
    assert run(*arguments)[0] == 0
    code, out, _ = run(*arguments)
    assert code == 0
    assert "nothing to do" in out
    code, _, err = run(*arguments, "--gap_closing", "1")
    assert code == 1
    assert "gap_closing: None there, 1 now" in err
    assert run(*arguments, "--gap_closing", "1", "--overwrite")[0] == 0

    kwargs = {"verbose": False, "min_z_extent": 2, **LOOSE}
    first = automatic_instance_segmentation(*model, file, tmp_path / "p.tif", tmp_path / "p.zarr", **kwargs)
    again, embeddings = automatic_instance_segmentation(
        *model, file, tmp_path / "p.tif", tmp_path / "p.zarr", return_embeddings=True, **kwargs
    )
    np.testing.assert_array_equal(again, first)
    assert again.dtype == first.dtype
    assert embeddings["features"].shape[0] == 3
    with pytest.raises(OutputExistsError, match="min_z_extent"):
        automatic_instance_segmentation(*model, file, tmp_path / "p.tif", **{**kwargs, "min_z_extent": 3})


def test_folder_as_stack_and_options_for_planes(run, tmp_path, stack):
    for z, plane in enumerate(stack):
        tifffile.imwrite(tmp_path / f"z{z}.tif", plane)
    assert run("-i", tmp_path, "-k", "z*.tif", "-o", tmp_path / "out" / "stack.tif")[0] == 0
    assert tifffile.imread(tmp_path / "out" / "stack.tif").shape == stack.shape
    code, _, err = run("-i", tmp_path / "z0.tif", "-o", tmp_path / "out" / "z0.tif", "--min_z_extent", "2")
    assert code == 1
    assert "for volumes" in err


def test_tiles(stack, tiny_checkpoint):
    tiled = get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu", "ais", is_tiled=True)
    tiles = {"tile_shape": (64, 80), "halo": (16, 16)}
    labels = automatic_instance_segmentation(*tiled, stack[:2], verbose=False, **tiles, **LOOSE)
    np.testing.assert_array_equal(labels, automatic_3d_segmentation(stack[:2], *tiled, verbose=False, **tiles, **LOOSE))
    assert labels.max() > 1


def missing_trackastra(*args):
    raise UnsupportedError("trackastra is not installed")


def test_tracking_from_file_to_files(run, file, tmp_path, stack, model, monkeypatch):
    tracks, lineages = automatic_tracking(
        *model, file, tmp_path / "tracks", verbose=False, tracking_model=LINKER, min_time_extent=2, **LOOSE
    )
    assert tracks.shape == stack.shape
    assert tracks.max() > 1
    assert {i for tree in lineages for i in tree} == set(np.unique(tracks).tolist()) - {0}
    read, forest = read_ctc(tmp_path / "tracks")
    np.testing.assert_array_equal(read, tracks)
    assert sorted(forest) == sorted({i for tree in lineages for i in tree})
    with pytest.raises(OutputExistsError, match="overwrite"):
        automatic_tracking(*model, file, tmp_path / "tracks", verbose=False, tracking_model=LINKER, **LOOSE)

    arguments = (
        "-i", file, "-o", tmp_path / "cli.tif", "--tracking", "--tracking_model", LINKER, "--min_time_extent", "2",
        "--json", tmp_path / "report.json",
    )
    code, out, _ = run(*arguments)
    assert code == 0
    np.testing.assert_array_equal(read_ctc(tmp_path / "cli")[0], tracks)
    assert json.loads((tmp_path / "report.json").read_text())["files"][0]["n_objects"] == len(forest)
    assert "nothing to do" in run(*arguments)[1]
    monkeypatch.setattr(linking, "TrackastraLinker", missing_trackastra)
    assert "nothing to do" in run(*arguments, "--tracking_model", "general_2d")[1], "motile stands in for it"
    code, _, err = run(*arguments, "--tracking_mode", "greedy_nodiv")
    assert code == 1
    assert "tracking_mode" in err
    assert run(*arguments, "--tracking_mode", "greedy_nodiv", "--overwrite")[0] == 0
