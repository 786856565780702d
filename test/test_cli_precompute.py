"""The command micro_sam.precompute_embeddings: images, stacks, tiles, states, resuming."""

import json
import os

import h5py
import numpy as np
import pytest
import tifffile
import zarr

from micro_sam.cli.precompute_embeddings import main
from micro_sam.segmentation import workflow


@pytest.fixture
def run(tiny_checkpoint, capsys):
    def run(*args, model=True):
        code = main([*map(str, args), *(["-c", str(tiny_checkpoint), "-d", "cpu"] if model else [])])
        return (code, *capsys.readouterr())
    return run


@pytest.fixture
def files(tmp_path, cells_image):
    folder = tmp_path / "in"
    folder.mkdir()
    tifffile.imwrite(folder / "plane.tif", cells_image)
    stack = np.stack([cells_image, cells_image[::-1], np.roll(cells_image, 9)])
    tifffile.imwrite(folder / "stack.tif", stack, photometric="minisblack")
    return folder


def test_image(run, files, tmp_path):
    code, out, err = run("-i", files / "plane.tif", "-e", tmp_path / "v1.2")
    assert code == 0, err
    group = zarr.open_group(tmp_path / "v1.2.zarr", mode="r")
    assert group["features"].shape == (1, 256, 16, 16)
    assert "v1.2.zarr" in out


@pytest.mark.parametrize("tiles", [[], ["--tile_shape", "64", "80", "--halo", "8", "8"]], ids=["plain", "tiled"])
def test_stack_with_states(run, files, tmp_path, tiles):
    arguments = ["-i", files / "stack.tif", "-e", tmp_path / "e.zarr", "-n", "3", "-p", *tiles]
    code, _, err = run(*arguments, "--json", tmp_path / "r.json", "--batch_size", "2")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["files"][0]["shape"] == [3, 128, 160]
    with h5py.File(tmp_path / "e.zarr" / "is_state.h5") as file:
        assert {name: file[name]["foreground"].shape for name in file} == {f"state-{z}": (128, 160) for z in range(3)}
    features = zarr.open_group(tmp_path / "e.zarr", mode="r")["features"]
    assert (features["3"] if tiles else features).shape == (3, 1, 256, 16, 16)


def test_second_run_computes_nothing(run, files, tmp_path, monkeypatch):
    arguments = ["-i", files / "stack.tif", "-e", tmp_path / "e.zarr", "-p"]
    assert run(*arguments)[0] == 0
    from micro_sam.models.decoder import DecoderAdapter
    from micro_sam.models.tiny_vit import TinyViT
    monkeypatch.setattr(TinyViT, "forward", lambda *a: pytest.fail("encoded again"))
    monkeypatch.setattr(DecoderAdapter, "forward", lambda *a: pytest.fail("decoded again"))
    assert run(*arguments)[0] == 0


def test_folder_and_stack_of_a_folder(run, files, tmp_path, cells_image):
    (files / "broken.tif").write_bytes(b"x")
    code, _, err = run("-i", files, "-e", tmp_path / "out", "--pattern", "*.tif")
    assert code == 1
    assert "broken.tif" in err
    assert sorted(os.listdir(tmp_path / "out")) == ["plane.zarr", "stack.zarr"]
    tifffile.imwrite(files / "plane2.tif", cells_image)
    assert run("-i", files, "-e", tmp_path / "s.zarr", "-k", "plane*.tif")[0] == 0
    assert zarr.open_group(tmp_path / "s.zarr", mode="r")["features"].shape[0] == 2


def test_other_settings_and_overwrite(run, files, tmp_path):
    arguments = ["-i", files / "plane.tif", "-e", tmp_path / "e.zarr"]
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, "--tile-shape", "64", "64")
    assert code == 1
    assert "tile_shape=None" in err
    assert "tile_shape=[64, 64]" in err
    assert run(*arguments, "--tile-shape", "64", "64", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile_shape", "3"], "two positive integers"),
        (["--tile_shape", "auto"], "is for segmentation"),
        (["--halo", "3", "3"], "belongs to tiles"),
        (["--batch_size", "-1"], "positive integer"),
        (["-m", "vit_b_ml"], "Did you mean 'vit_b_lm'"),
        (["-k", "raw"], "has no key"),
        (["--pattern", "*"], "no folder"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(run, files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(workflow, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    code, _, err = run("-i", files / "plane.tif", "-e", tmp_path / "e", *arguments, model="-m" not in arguments)
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
