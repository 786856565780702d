"""Bad input and bad surroundings: each gives a typed error with what came and what to do, and a readable command.

Most cases go through the Python interface and through the command, which must print one paragraph without traceback.
"""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from micro_sam.automatic_segmentation import segment
from micro_sam.cli.automatic_segmentation import main
from micro_sam.core.errors import (
    EmbeddingCacheError,
    EmbeddingMismatchError,
    ImageReadError,
    InvalidInputError,
    MissingFileError,
    OutputWriteError,
    UnknownModelError,
)
from micro_sam.core.output import prepare_folder, write_labels


@pytest.fixture
def command(tiny_checkpoint, capsys, tmp_path):
    """Run the command on an image; gives (exit code, standard error)."""
    def run(path, *args):
        arguments = ["-i", path, "-o", tmp_path / "labels.tif", "-c", tiny_checkpoint, "-d", "cpu", *args]
        code = main([str(a) for a in arguments])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, err
    return run


def check(command, tiny_checkpoint, path, error, message, args=(), code=1, **options):
    """The same error and message from Python and from the command."""
    with pytest.raises(error, match=message) as caught:
        segment(path, checkpoint=tiny_checkpoint, device="cpu", **options)
    found, err = command(path, *args)
    assert found == code
    assert str(caught.value) in err
    assert str(path) in err
    assert err.count("\n") == 1


def test_missing_file(command, tiny_checkpoint, tmp_path):
    message = "There is no file or folder .*nuclei.tif. Check the path."
    check(command, tiny_checkpoint, tmp_path / "nuclei.tif", MissingFileError, message, code=2)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.h5", "a.mrc", "a.czi", "a.npy"])
@pytest.mark.parametrize("content", [b"", b"this is no image, but some text" * 50], ids=["empty", "text"])
def test_unreadable_image(command, tiny_checkpoint, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = "is an empty file" if not content else "Could not read an image from .*is damaged, incomplete"
    check(command, tiny_checkpoint, tmp_path / name, ImageReadError, message)


def test_truncated_image(command, tiny_checkpoint, tmp_path, cells_image):
    for name, compression in [("zlib.tif", "zlib"), ("raw.tif", None)]:
        tifffile.imwrite(tmp_path / name, cells_image, compression=compression)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
        check(command, tiny_checkpoint, tmp_path / name, ImageReadError, "Could not read")


def test_five_dimensional_image(command, tiny_checkpoint, tmp_path):
    data = np.zeros((2, 3, 4, 32, 32), np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata={"axes": "TZCYX"}, ome=True)
    message = r"has the axes TZCYX \(T=2, Z=3, C=4, Y=32, X=32\).*Choose an index with time and channel"
    check(command, tiny_checkpoint, tmp_path / "a.ome.tif", InvalidInputError, message)
    np.save(tmp_path / "a.npy", data)
    message = r"has 5 axes of shape \(2, 3, 4, 32, 32\).*axes='TCZYX'"
    check(command, tiny_checkpoint, tmp_path / "a.npy", InvalidInputError, message)


def test_empty_image(command, tiny_checkpoint, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = np.zeros((0, 64), np.uint8)
    check(command, tiny_checkpoint, tmp_path / "a.h5", ImageReadError, r"is empty: its shape is \(0, 64\)")


def test_wrong_key(command, tiny_checkpoint, tmp_path, cells_image):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"] = cells_image
        file["volumes/labels"] = cells_image
    message = "no image with the key 'volumes/rw'.*It has: 'volumes/labels', 'volumes/raw'.*Did you mean 'volumes/raw'"
    key = "volumes/rw"
    check(command, tiny_checkpoint, tmp_path / "a.h5", ImageReadError, message, args=["-k", key], key=key)


@pytest.mark.parametrize("tiles", [False, True])
def test_constant_image_gives_no_objects(command, tiny_checkpoint, tmp_path, tiles):
    image = np.full((100, 120), 7, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image)
    options = {"tile_shape": (64, 64), "halo": (8, 8)} if tiles else {}
    labels = segment(image, checkpoint=tiny_checkpoint, device="cpu", **options)
    assert labels.shape == image.shape
    assert labels.max() == 0
    code, err = command(tmp_path / "a.tif", *(["--tile_shape", "64", "64"] if tiles else []))
    assert (code, err) == (0, "")
    assert tifffile.imread(tmp_path / "labels.tif").max() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_values(command, tiny_checkpoint, tmp_path, cells_image, value):
    image = cells_image.astype(np.float32)
    image[3, 4:6] = value
    with pytest.raises(InvalidInputError, match="has 2 NaN or infinite values of 20480. Replace them first"):
        segment(image, checkpoint=tiny_checkpoint, device="cpu")
    tifffile.imwrite(tmp_path / "a.tif", image)
    code, err = command(tmp_path / "a.tif")
    assert code == 1
    assert f"{tmp_path / 'a.tif'}: The image has 2 NaN or infinite values" in err
    assert not (tmp_path / "labels.tif").exists()


def unwritable_folder(tmp_path) -> Path:
    """A folder that nobody may write to; root may write everywhere but to the kernel's own file system."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    return Path("/sys/kernel") if os.access(folder, os.W_OK) else folder


def test_no_write_permission(command, tmp_path, cells_image, monkeypatch):
    folder = unwritable_folder(tmp_path)
    message = "Could not write .*labels.tif: no permission to write there. Change the permissions, or choose another"
    with pytest.raises(OutputWriteError, match=message):
        prepare_folder(folder / "labels.tif")
    with pytest.raises(OutputWriteError, match=message):
        write_labels(folder / "labels.tif", cells_image)
    tifffile.imwrite(tmp_path / "a.tif", cells_image)
    monkeypatch.setattr(
        "micro_sam.segmentation.workflow.load_model", lambda *a, **k: pytest.fail("this is known before the work")
    )
    code, err = command(tmp_path / "a.tif", "-o", folder / "labels.tif")
    assert code == 1
    assert "no permission to write there" in err
    (tmp_path / "file").write_text("x")
    code, err = command(tmp_path / "a.tif", "-o", tmp_path / "file" / "labels.tif")
    assert code == 1
    assert "a file is where a folder is needed" in err


def test_full_disk(tmp_path, cells_image, tiny_checkpoint):
    """On a tiny file system of its own; where mounting is not allowed, with a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tifffile.imwrite(tmp_path / "a.tif", cells_image)
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    script = textwrap.dedent(f"""
        import sys
        import numpy as np
        from micro_sam.cli.automatic_segmentation import main
        from micro_sam.core.errors import OutputWriteError
        from micro_sam.core.output import write_labels

        noise = np.random.default_rng(0).integers(0, 60_000, (700, 700))
        for name in ("noise.tif", "noise.zarr", "noise.ome.zarr"):
            try:
                write_labels({str(disk)!r} + "/" + name, noise)
            except OutputWriteError as error:
                print(error)
        sys.exit(main([
            "-i", {str(tmp_path / "a.tif")!r}, "-o", {str(disk / "o.tif")!r}, "-e", {str(disk / "e.zarr")!r},
            "-c", {str(tiny_checkpoint)!r}, "-d", "cpu",
        ]))
    """)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (160 * 1024,) * 2)

    try:
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=None if mounted else limit
        )
        left = {p.name for p in disk.iterdir()}
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    assert result.stdout.count("there is no space left there") == 3, result.stdout + result.stderr
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert ("the disk is full. Free some space" if mounted else "too large") in result.stderr
    assert left <= {"e.zarr", ".e.zarr.lock", "e.zarr.lock"}, "labels are complete or not there"


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_corrupt_cache_chunk(command, tiny_checkpoint, tmp_path, cells_image, damage):
    tifffile.imwrite(tmp_path / "a.tif", cells_image)
    options = {"checkpoint": tiny_checkpoint, "device": "cpu", "embedding_path": tmp_path / "e.zarr"}
    segment(tmp_path / "a.tif", **options)
    chunk = max((p for p in (tmp_path / "e.zarr").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = chunk.read_bytes()
    chunk.write_bytes(content[:1000] if damage == "truncated" else bytes(len(content)))
    with pytest.raises(EmbeddingCacheError, match="e.zarr") as caught:
        segment(tmp_path / "a.tif", **options)
    assert "overwrite" in str(caught.value)
    code, err = command(tmp_path / "a.tif", "-e", tmp_path / "e.zarr")
    assert code == 1
    assert str(caught.value) in err
    assert not (tmp_path / "labels.tif").exists()


def test_mismatching_tile_shape(command, tiny_checkpoint, tmp_path, cells_image):
    tifffile.imwrite(tmp_path / "a.tif", cells_image)
    options = {"checkpoint": tiny_checkpoint, "device": "cpu", "embedding_path": tmp_path / "e.zarr", "halo": (8, 8)}
    segment(tmp_path / "a.tif", tile_shape=(64, 64), **options)
    message = r"tile_shape=\[64, 64\], but tile_shape=\[64, 80\] was asked for. Pass tile_shape=\[64, 64\]"
    with pytest.raises(EmbeddingMismatchError, match=message):
        segment(tmp_path / "a.tif", tile_shape=(64, 80), **options)
    code, err = command(tmp_path / "a.tif", "-e", tmp_path / "e.zarr", "--tile_shape", "64", "80", "--halo", "8", "8")
    assert code == 1
    assert "Pass tile_shape=[64, 64]" in err


def test_unknown_model(capsys, tmp_path, cells_image):
    with pytest.raises(UnknownModelError, match="There is no model 'vit_b_lmm'. Did you mean 'vit_b_lm'"):
        segment(cells_image, "vit_b_lmm")
    tifffile.imwrite(tmp_path / "a.tif", cells_image)
    assert main(["-i", str(tmp_path / "a.tif"), "-o", str(tmp_path / "o.tif"), "-m", "vit_b_lmm"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no model 'vit_b_lmm'. Did you mean 'vit_b_lm'")
