"""The commands that open napari: what they check before, and what they hand over. napari itself is replaced."""

import inspect
import subprocess
import sys
import types

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import zarr

import micro_sam
from micro_sam.cli import annotators
from micro_sam.cli.annotators import main_2d, main_3d, main_series, main_tracking
from micro_sam.core.output import write_labels
from micro_sam.core.settings import PRECISION_VARIABLE, get_precision
from micro_sam.models.specs import SHIPPED_MODEL

MAINS = {"2d": main_2d, "3d": main_3d, "tracking": main_tracking, "series": main_series}


def annotator_2d(
    image, embedding_path=None, segmentation_result=None, model_type="vit_b_lm", tile_shape=None, halo=None,
    return_viewer=False, viewer=None, precompute_amg_state=False, checkpoint_path=None, decoder_path=None, device=None,
    prefer_decoder=True,
):
    """The documented signature; also that of `annotator_3d`."""


def annotator_tracking(
    image, embedding_path=None, model_type="vit_b_lm", tile_shape=None, halo=None, return_viewer=False, viewer=None,
    precompute_amg_state=False, checkpoint_path=None, decoder_path=None, device=None,
):
    """The documented signature."""


def image_folder_annotator(
    input_folder, output_folder, pattern="*", initial_segmentation_folder=None, initial_segmentation_pattern="*",
    viewer=None, return_viewer=False, *, model_type="vit_b_lm", embedding_path=None, tile_shape=None, halo=None,
    precompute_amg_state=False, checkpoint_path=None, is_volumetric=False, device=None, prefer_decoder=True,
    skip_segmented=True,
):
    """The documented signature, with the arguments of `image_series_annotator` that it passes on."""


@pytest.fixture
def launched(monkeypatch):
    """What the launch functions were called with: name -> all their arguments."""
    calls = {}

    def record(name, function):
        def launch(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            calls[name] = bound.arguments
        return launch

    module = types.ModuleType("micro_sam.sam_annotator")
    module.annotator_2d, module.annotator_3d = record("2d", annotator_2d), record("3d", annotator_2d)
    module.annotator_tracking = record("tracking", annotator_tracking)
    module.image_folder_annotator = record("series", image_folder_annotator)
    monkeypatch.setitem(sys.modules, "micro_sam.sam_annotator", module)
    monkeypatch.setattr(micro_sam, "sam_annotator", module, raising=False)
    monkeypatch.setenv("DISPLAY", ":99")
    monkeypatch.setattr(annotators.importlib.util, "find_spec", lambda name: True)
    return calls


@pytest.fixture
def run(capsys):
    def run(command, *args):
        code = MAINS[command]([*map(str, args), "-d", "cpu"])
        return (code, *capsys.readouterr())
    return run


@pytest.fixture
def files(tmp_path, cells_image, cells_labels, rgb_image):
    folder = tmp_path / "in"
    folder.mkdir()
    tifffile.imwrite(folder / "plane.tif", cells_image)
    imageio.imwrite(folder / "colour.png", rgb_image)
    tifffile.imwrite(folder / "stack.tif", np.stack([cells_image] * 5), photometric="minisblack")
    group = zarr.create_group(str(folder / "box.zarr"))
    for name, array in (("raw", np.stack([cells_image] * 4)), ("labels", np.stack([cells_labels] * 4))):
        group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(1, 64, 64))[:] = array
    write_labels(tmp_path / "labels.tif", cells_labels)
    return folder


def test_2d(run, launched, files, tmp_path, cells_image, cells_labels):
    code, out, err = run("2d", "-i", files / "plane.tif", "-s", tmp_path / "labels.tif")
    assert code == 0, err
    call = launched["2d"]
    np.testing.assert_array_equal(call["image"], cells_image)
    np.testing.assert_array_equal(call["segmentation_result"], cells_labels)
    assert call["model_type"] == SHIPPED_MODEL
    assert SHIPPED_MODEL in out, "the default is named"
    assert call["device"] == "cpu"
    assert (call["prefer_decoder"], call["return_viewer"], call["embedding_path"]) == (True, False, None)

    code, _, err = run(
        "2d", "-i", files / "colour.png", "--tile-shape", "64", "80", "--halo", "8", "16", "-e", tmp_path / "e" / "x",
        "--no_decoder", "-m", "vit_b", "--precompute_amg_state",
    )
    assert code == 0, err
    call = launched["2d"]
    assert call["image"].shape == (128, 160, 3)
    assert (call["tile_shape"], call["halo"], call["model_type"]) == ((64, 80), (8, 16), "vit_b")
    assert (call["prefer_decoder"], call["precompute_amg_state"]) == (False, True)
    assert call["embedding_path"] == str(tmp_path / "e" / "x.zarr"), "as precompute_embeddings names it"


@pytest.mark.parametrize("command", MAINS)
def test_precision_holds_for_all_models_of_the_session(run, launched, files, tmp_path, monkeypatch, command):
    monkeypatch.setenv(PRECISION_VARIABLE, "float32")
    image = {"2d": "plane.tif", "series": "."}.get(command, "stack.tif")
    output = ["-o", tmp_path / "out"] if command == "series" else []
    code, _, err = run(command, "-i", files / image, *output, "--precision", "bfloat16")
    assert (code, get_precision()) == (0, "bfloat16"), err


def test_checkpoint_tells_its_architecture(run, launched, files, tiny_checkpoint):
    code, _, err = run("2d", "-i", files / "plane.tif", "-c", tiny_checkpoint, "--decoder_path", tiny_checkpoint)
    assert code == 0, err
    assert launched["2d"]["model_type"] == "vit_t"
    assert launched["2d"]["checkpoint_path"] == launched["2d"]["decoder_path"] == str(tiny_checkpoint)


def test_stacks_are_not_read(run, launched, files, monkeypatch):
    from micro_sam.core.lazy_array import LazyArray
    code, _, err = run("3d", "-i", files / "box.zarr", "-k", "raw", "-s", files / "box.zarr", "-sk", "labels")
    assert code == 0, err
    image = launched["3d"]["image"]
    assert isinstance(image, LazyArray)
    assert image.shape == (4, 128, 160)
    assert launched["3d"]["segmentation_result"].shape == (4, 128, 160)
    for n in range(3):
        tifffile.imwrite(files / f"t{n}.tif", np.full((40, 50), n, "uint8"))
    assert run("tracking", "-i", files, "-k", "t?.tif")[0] == 0
    assert np.asarray(launched["tracking"]["image"])[:, 0, 0].tolist() == [0, 1, 2]


def test_series(run, launched, files, tmp_path, cells_labels):
    out = tmp_path / "out"
    (files / "empty.tif").write_bytes(b"")
    (files / "notes.txt").write_text("x")
    code, text, err = run("series", "-i", files, "-o", out, "-e", tmp_path / "emb")
    assert code == 0, err
    call = launched["series"]
    assert (call["input_folder"], call["output_folder"], call["pattern"]) == (str(files), str(out), "*")
    assert (call["skip_segmented"], call["is_volumetric"]) == (True, False)
    assert call["embedding_path"] == str(tmp_path / "emb")
    assert "5 images, 0 of them done" in text
    assert "notes.txt" in text
    assert "empty.tif is left out" in err

    launched.clear()
    from micro_sam.annotation.series import plan_series
    series = plan_series(files, out, pattern="plane.*")
    series.finish(series[0], cells_labels)
    code, text, _ = run("series", "-i", files, "-o", out, "-p", "plane.*")
    assert (code, launched) == (0, {})
    assert "Nothing is left to do" in text
    code, _, err = run("series", "-i", files, "-o", out, "-p", "plane.*", "--no_skip")
    assert (code, err) == (0, "")
    assert launched["series"]["skip_segmented"] is False


def test_older_names_keep_their_meaning_with_a_warning(run, launched, files, tmp_path):
    code, _, err = run("2d", "-i", files / "plane.tif", "--prefer_decoder")
    assert code == 0
    assert launched["2d"]["prefer_decoder"] is False
    assert "--no_decoder" in err
    code, _, err = run("series", "-i", files, "-o", tmp_path / "o", "--skip_segmented", "--prefer_decoder")
    assert code == 0
    assert (launched["series"]["skip_segmented"], launched["series"]["prefer_decoder"]) == (False, False)
    assert "--no_skip" in err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("2d", ["-i", "nowhere.tif"], "no file or folder nowhere.tif"),
        ("2d", ["-i", "in/stack.tif"], "has 3 dimensions"),
        ("3d", ["-i", "in/plane.tif"], "ndim=3"),
        ("tracking", ["-i", "in/plane.tif"], "ndim=3"),
        ("3d", ["-i", "in/box.zarr"], "Pass the key of one of them: 'labels', 'raw'"),
        ("2d", ["-i", "in/plane.tif", "--channel", "3"], "no channel axis"),
        ("2d", ["-i", "in/plane.tif", "--tile_shape", "64"], "two positive integers"),
        ("2d", ["-i", "in/plane.tif", "--tile_shape", "64", "64", "--halo", "8"], "two integers of at least 0"),
        ("2d", ["-i", "in/plane.tif", "--tile_shape", "64", "64", "--halo", "a", "8"], "two integers of at least 0"),
        ("2d", ["-i", "in/plane.tif", "--halo", "8", "8"], "belongs to tiles"),
        ("3d", ["-i", "in/stack.tif", "-s", "labels.tif"], "ndim=3"),
        ("2d", ["-i", "in/plane.tif", "-s", "in/colour.png"], "one integer per pixel"),
        ("2d", ["-i", "in/plane.tif", "--channel", "0", "-s", "nowhere.tif"], "no channel axis"),
        ("2d", ["-i", "in/plane.tif", "-sk", "x"], "belongs to --segmentation_result"),
        ("2d", ["-i", "in/plane.tif", "--precompute_amg_state"], "Pass --embedding_path as well"),
        ("2d", ["-i", "in/plane.tif", "-e", "e.zarr"], "e.zarr is a file"),
        ("2d", ["-i", "in/plane.tif", "-m", "vit_b_ml"], "Did you mean 'vit_b_lm'"),
        ("2d", ["-i", "in/plane.tif", "-c", "none.pt"], "Check --checkpoint"),
        ("series", ["-i", "in", "-o", "in"], "would replace the image"),
        ("series", ["-i", "in", "-o", "out", "-p", "*.xyz"], "matches '*.xyz'"),
        ("series", ["-i", "in", "-o", "out", "--initial_segmentation_folder", "in/.."], "do not fit the images"),
        ("series", ["-i", "in", "-o", "out", "-p", "empty.*"], "can be read"),
    ],
)
def test_mistakes_are_found_before_napari_is_loaded(run, launched, files, monkeypatch, command, arguments, message):
    monkeypatch.chdir(files.parent)
    (files.parent / "e.zarr").write_text("x")
    (files / "empty.png").write_bytes(b"")
    code, _, err = run(command, *arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert launched == {}


def test_labels_of_another_shape_are_refused(run, launched, files, tmp_path, cells_labels):
    write_labels(tmp_path / "small.tif", cells_labels[:50])
    code, _, err = run("2d", "-i", files / "plane.tif", "-s", tmp_path / "small.tif")
    assert code == 2
    assert "(50, 160), but the image has (128, 160)" in err


def test_device_that_is_not_there(launched, files, capsys):
    assert main_2d(["-i", str(files / "plane.tif"), "-d", "cuda:77"]) == 3
    assert "cuda:77" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="screens are found by other means")
def test_no_screen_or_no_napari(run, launched, files, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("QT_QPA_PLATFORM", raising=False)
    code, _, err = run("2d", "-i", files / "plane.tif")
    assert (code, launched) == (2, {})
    assert "neither DISPLAY nor WAYLAND_DISPLAY is set" in err
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    assert run("2d", "-i", files / "plane.tif")[0] == 0

    launched.clear()
    monkeypatch.setattr(annotators.importlib.util, "find_spec", lambda name: None if name == "napari" else True)
    code, _, err = run("series", "-i", files, "-o", files / "out")
    assert (code, launched) == (2, {})
    assert 'need napari, which is not installed. Install it with: pip install "micro_sam[gui]"' in err


@pytest.mark.parametrize("name", MAINS)
def test_help_is_light(name):
    code = (
        f"import sys, contextlib, io\nfrom micro_sam.cli.annotators import main_{name} as main\nout = io.StringIO()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out): main(['--help'])\n"
        "assert 'exit codes' in out.getvalue()\n"
        "assert not set(sys.modules) & {'torch', 'napari', 'qtpy', 'numpy', 'zarr'}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_nothing_heavy_before_the_window_opens(files, tmp_path):
    """With real modules: a mistake in the input is reported without loading napari or Qt."""
    code = (
        "import sys, os\nos.environ['DISPLAY'] = ':99'\nfrom micro_sam.cli.annotators import main_2d\n"
        f"assert main_2d(['-i', {str(files / 'stack.tif')!r}, '-d', 'cpu']) == 2\n"
        "assert not set(sys.modules) & {'napari', 'qtpy', 'PyQt6', 'torch'}"
    )
    environment = {"PATH": "", "MICROSAM_CACHEDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment,
    )
    assert result.returncode == 0, result.stderr
