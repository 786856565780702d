"""The command micro_sam.automatic_segmentation: files, options, reports, exit codes."""

import json
import os
import signal
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import zarr
from test_image import ome_zarr

from micro_sam.cli import _common
from micro_sam.cli.automatic_segmentation import main
from micro_sam.core.output import read_record
from micro_sam.segmentation import workflow

LOOSE = [
    "--center_distance_threshold", "0.485", "--boundary_distance_threshold=0.54", "--foreground-threshold", "0.4",
]


@pytest.fixture
def run(tiny_checkpoint, capsys):
    """Run the command with the tiny model; gives (exit code, stdout, stderr)."""
    def run(*args, model=True):
        model_args = ["-c", str(tiny_checkpoint), "-m", "vit_t", "-d", "cpu"] if model else []
        code = main([*map(str, args), *model_args])
        return (code, *capsys.readouterr())
    return run


@pytest.fixture
def image(tmp_path, cells_image):
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, cells_image)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a model is loaded."""
    monkeypatch.setattr(workflow, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))


def test_one_image(run, image, tmp_path, cells_image, tiny_checkpoint):
    code, out, _ = run("-i", image, "-o", tmp_path / "out" / "exp.1.result", *LOOSE, "--min_size", "20")
    output = tmp_path / "out" / "exp.1.result.tif"
    labels = tifffile.imread(output)
    assert code == 0
    assert f"{labels.max()} objects -> {output}" in out
    assert labels.shape == cells_image.shape
    assert np.bincount(labels.ravel())[1:].min() >= 20
    assert os.listdir(tmp_path / "out") == ["exp.1.result.tif"], "nothing else is made"
    options = read_record(output)["settings"]["options"]
    assert (options["min_size"], options["foreground_threshold"]) == (20, 0.4)


def test_again_other_settings_and_overwrite(run, image, tmp_path):
    arguments = ["-i", image, "-o", tmp_path / "o.tif"]
    assert run(*arguments)[0] == 0
    before = (tmp_path / "o.tif").stat().st_mtime_ns
    code, out, _ = run(*arguments)
    assert (code, "same settings" in out) == (0, True)
    code, _, err = run(*arguments, "--min_size", "30")
    assert code == 1
    assert "min_size: 0 there, 30 now" in err
    assert "--overwrite" in err
    assert (tmp_path / "o.tif").stat().st_mtime_ns == before
    assert run(*arguments, "--min_size", "30", "--overwrite")[0] == 0
    assert read_record(tmp_path / "o.tif")["settings"]["options"]["min_size"] == 30


def test_folder_report_and_failures(run, tmp_path, cells_image):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    imageio.imwrite(folder / "b.png", cells_image)
    tifffile.imwrite(folder / "a.tif", cells_image[:100])
    (folder / "broken.tif").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    imageio.imwrite(folder / "sub" / "b.png", cells_image)
    arguments = ["-i", folder, "-o", tmp_path / "out", "-e", tmp_path / "emb", "--recursive"]
    code, out, err = run(*arguments, "--json", tmp_path / "report.json")
    assert code == 1
    assert "broken.tif" in err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"] == {"done": 3, "skipped": 0, "failed": 1, "not started": 0}
    assert report["exit_code"] == 1
    assert [os.path.basename(f["input"]) for f in report["files"]] == ["a.tif", "b.png", "broken.tif", "b.png"]
    assert {f["error_type"] for f in report["files"]} == {None, "ImageReadError"}
    for name in ("a", "b", "sub/b"):
        assert (tmp_path / "out" / f"{name}.tif").exists()
        assert (tmp_path / "emb" / f"{name}.zarr").exists()

    (folder / "broken.tif").unlink()
    code, out, err = run(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["summary"]["skipped"] == 3, "the standard output is nothing but the report"
    assert "nothing to do" in err


def test_pattern_is_sorted_and_collisions_are_found(run, tmp_path, cells_image, no_model):
    for name in ("x2.tif", "x10.tif", "x1.png", "y.png"):
        imageio.imwrite(tmp_path / name, cells_image)
    code, _, err = run("-i", tmp_path, "--pattern", "*.jpg", "-o", tmp_path / "out")
    assert (code, "*.jpg" in err) == (2, True)
    imageio.imwrite(tmp_path / "x1.tif", cells_image)
    code, _, err = run("-i", f"{tmp_path}/x*", "-o", tmp_path / "out")
    assert code == 2
    assert "would both be written to" in err


def test_an_image_is_never_replaced_by_its_labels(run, tmp_path, image, no_model):
    before = image.read_bytes()
    for output in (image, image.with_suffix(""), tmp_path, f"{tmp_path}/"):
        code, _, err = run("-i", image, "-o", output, "--overwrite")
        assert (code, "would replace" in err) == (2, True)
    code, _, err = run("-i", tmp_path, "-o", tmp_path, "--overwrite")
    assert (code, "would replace" in err) == (2, True)
    assert image.read_bytes() == before


def test_several_files_and_formats(run, tmp_path, cells_image, image):
    imageio.imwrite(tmp_path / "b.png", cells_image)
    assert run("-i", image, tmp_path / "b.png", "-o", tmp_path / "out", "--output_format", "zarr")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["b.zarr", "cells.zarr"]
    assert zarr.open(tmp_path / "out" / "b.zarr", mode="r").shape == cells_image.shape


def test_labels_into_an_ome_zarr_image(run, tmp_path, cells_image):
    path = ome_zarr(tmp_path / "a.ome.zarr", np.stack([cells_image, cells_image[::-1]]), "cyx")
    code, _, err = run("-i", path, "-o", path, "--channel", "1", "--label_name", "nuclei")
    assert code == 0, err
    assert zarr.open(path / "labels" / "nuclei" / "0", mode="r").shape == cells_image.shape


def test_tiles_and_embeddings_are_reused(run, image, tmp_path):
    arguments = ["-i", image, "-e", tmp_path / "e.zarr", "--tile_shape", "64", "80", "--halo", "16", "16", *LOOSE]
    assert run(*arguments, "-o", tmp_path / "a.tif")[0] == 0
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "e.zarr").rglob("*") if p.is_file()}
    assert run(*arguments, "-o", tmp_path / "b.tif")[0] == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "e.zarr").rglob("*") if p.is_file()}
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), tifffile.imread(tmp_path / "b.tif"))
    other = ["-i", image, "-e", tmp_path / "e.zarr", "-o", tmp_path / "c.tif", *LOOSE]
    code, _, err = run(*other)
    assert code == 1
    assert "tile_shape=[64, 80]" in err
    assert run(*other, "--overwrite")[0] == 0


def test_apg_and_text_option(run, image, tmp_path):
    code, _, err = run("-i", image, "-o", tmp_path / "o.tif", "--mode", "apg", "--mask_threshold", "auto", *LOOSE)
    assert code == 0, err
    assert read_record(tmp_path / "o.tif")["settings"]["options"]["mask_threshold"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min_siz", "3"], "no option --min_siz. Did you mean '--min_size'"),
        (["--min_size"], "needs a value"),
        (["--min_size", "3.5"], "takes an integer, but got '3.5'"),
        (["--min_size", "3", "4"], "takes an integer, but got '3 4'"),
        (["--min_size", "3", "--min_size=4"], "twice"),
        (["--mode", "apg", "--prompt_function", "f"], "only be used from Python"),
        (["--mode", "amg", "--min_size", "3"], "no option --min_size"),
        (["--tile_shap", "3", "3"], "'--tile_shape'"),
        (["--tile_shape", "3"], "two positive integers"),
        (["--tile_shape", "none", "--halo", "3", "3"], "belongs to tiles"),
        (["--halo", "3", "3"], "belongs to tiles"),
        (["--batch_size", "0"], "positive integer"),
        (["--annotate", "--tracking"], "imports them"),
        (["--tracking", "--min_z_extent", "2"], "--min_z_extent is for volumes"),
        (["--min_time_extent", "2"], "--min_time_extent is for tracking"),
        (["-q"], "no option -q"),
        (["-m", "vit_b_ml"], "Did you mean 'vit_b_lm'"),
        (["-m", "vit_b", "--mode", "ais"], "was trained for amg"),
        (["--pattern", "*.tif"], "is none"),
    ],
)
def test_mistakes_end_the_command_before_the_model_is_loaded(run, image, tmp_path, no_model, arguments, message):
    model = "-m" not in arguments
    code, out, err = run("-i", image, "-o", tmp_path / "o.tif", *arguments, model=model)
    assert code in (2, 3)
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1, "one paragraph"


def test_warning_of_too_little_memory(run, image, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 400_000})())
    tiles = ["--tile_shape", "64", "64"]
    code, _, err = run("-i", image, "-o", tmp_path / "o.tif", *tiles)
    assert code == 0
    assert "needs about 0.0 GB of memory" in err
    assert "(-e)" in err
    # 128 x 160 pixels of 28 bytes, and 6 tiles of 256 x 16 x 16 float32
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 573_440 + 6 * 262_144})())
    assert run("-i", image, "-o", tmp_path / "o2.tif", *tiles)[2] == ""


def test_traceback_only_on_request(run, tmp_path, monkeypatch):
    assert "Traceback" not in run("-i", tmp_path / "no.tif", "-o", tmp_path / "o.tif")[2]
    assert "Traceback" in run("-i", tmp_path / "no.tif", "-o", tmp_path / "o.tif", "-v")[2]
    monkeypatch.setenv("MICROSAM_DEBUG", "1")
    assert "Traceback" in run("-i", tmp_path / "no.tif", "-o", tmp_path / "o.tif")[2]


def test_bad_checkpoint_is_exit_code_3(run, image, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    code, _, err = run("-i", image, "-o", tmp_path / "o.tif", "-c", tmp_path / "bad.pt", "-m", "vit_t", model=False)
    assert code == 3
    assert "not a checkpoint" in err


def test_ctrl_c_leaves_what_goes_on(tmp_path, cells_image, tiny_checkpoint):
    """A real process gets the signal; the same command then finishes the rest."""
    for n in range(4):
        tifffile.imwrite(tmp_path / f"i{n}.tif", np.roll(cells_image, 10 * n))
    command = [
        sys.executable, "-m", "micro_sam.cli.automatic_segmentation", "-i", f"{tmp_path}/i*.tif", "-o",
        str(tmp_path / "out"), "-e", str(tmp_path / "emb"), "-c", str(tiny_checkpoint), "-m", "vit_t", "-d", "cpu",
        "--tile_shape", "40", "40", "--json", str(tmp_path / "report.json"),
    ]
    # Shells make what they start in the background ignore Ctrl-C, and with it all that this starts in turn.
    heeding = {} if os.name == "nt" else {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeding)
    line = ""
    while not line.startswith("[1/4]"):
        line = process.stdout.readline()
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "goes on from here" in out
    assert "Traceback" not in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"]
    assert report["summary"]["done"] >= 1
    finished = report["summary"]["done"]

    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"]["skipped"] >= finished
    assert report["summary"]["skipped"] + report["summary"]["done"] == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_progress_tells_the_time_left(capsys, monkeypatch):
    results = [_common.Result(str(n), "o") for n in range(3)]
    times = iter(range(0, 1000, 30))
    monkeypatch.setattr(_common.time, "perf_counter", lambda: float(next(times)))
    parser = _common.Parser("x")
    _common.add_run_options(parser)
    console = _common.Console(parser.parse_args([]))
    code = _common.run_files(results, lambda n, r: f"image {n}", _common.Report("x", {}), console)
    out = capsys.readouterr().out
    assert code == 0
    assert "[1/3] image 0, about" in out
    assert out.splitlines()[-1] == "[3/3] image 2"


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (9000, "2.5 h")])
def test_duration(seconds, text):
    assert _common.duration(seconds) == text
