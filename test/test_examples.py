"""Every script in examples/ and every notebook runs on the model and the images that come with the package.

Both folders are listed here anew each time, so that a new script or notebook cannot be forgotten.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDS_SCREEN = re.compile(r"^from micro_sam.sam_annotator import", re.MULTILINE)
# Less than by default, so that the tests take two minutes and not ten. {} is a folder for results.
ARGUMENTS = {
    "demo.py": [str(ROOT / "examples/data/fluorescence_small.png"), "-o", "{}"],
    "automatic_segmentation.py": ["-o", "{}"],
    "prompts.py": ["-o", "{}"],
    "segment_volume.py": ["--planes", "5", "-o", "{}"],
    "track_cells.py": ["--frames", "4", "-o", "{}"],
    "finetune.py": ["--iterations", "2", "-o", "{}"],
    "annotate_image.py": [],
    "annotate_volume.py": ["--planes", "3"],
    "annotate_tracking.py": ["--frames", "3"],
    "annotate_series.py": ["-o", "{}"],
}
# What each writes, as a pattern, and how many of it.
RESULTS = {
    "demo.py": {"*_labels.tif": 1, "*_overlay.png": 1, "overview.png": 1},
    "automatic_segmentation.py": {"*.tif": 4},
    "prompts.py": {"from_boxes.tif": 1, "embeddings.zarr": 1},
    "segment_volume.py": {"all.tif": 1, "one.tif": 1},
    "track_cells.py": {"ctc/*.tif": 4, "tracks.zarr": 1, "tracks.csv": 1},
    "finetune.py": {"tissue.pt": 1, "checkpoints/tissue/best.pt": 1},
}


def run(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def scripts(needs_screen: bool) -> list:
    """Those that open napari, or the others, as parameters."""
    chosen = [s for s in SCRIPTS if bool(NEEDS_SCREEN.search(s.read_text(encoding="utf-8"))) == needs_screen]
    return [pytest.param(script, id=script.stem) for script in chosen]


def test_lists_are_complete():
    assert {script.name for script in SCRIPTS} == set(ARGUMENTS)
    assert {param.values[0].name for param in scripts(needs_screen=False)} == set(RESULTS)
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    names = [path.relative_to(ROOT).as_posix() for path in (*SCRIPTS, *NOTEBOOKS)]
    assert [name for name in names if name not in listed] == []


@pytest.mark.parametrize("script", scripts(needs_screen=False))
def test_script_says_what_it_does(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(script, ["--help"], monkeypatch)
    assert end.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script", scripts(needs_screen=False))
def test_script_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # what a script writes must go where it was told to
    output = tmp_path / "output"
    run(script, [argument.format(output) for argument in ARGUMENTS[script.name]], monkeypatch)
    assert capsys.readouterr().out
    assert {pattern: len(list(output.glob(pattern))) for pattern in RESULTS[script.name]} == RESULTS[script.name]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.gui
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", scripts(needs_screen=True))
def test_annotator_opens(script, tmp_path, monkeypatch):
    import napari

    from micro_sam.sam_annotator.annotator import active_annotator

    seen = []

    def user() -> None:
        annotator = active_annotator()
        assert annotator.runner.wait(120)
        seen.append(annotator.session.embeddings is not None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(napari, "run", user)
    try:
        run(script, [argument.format(tmp_path / "output") for argument in ARGUMENTS[script.name]], monkeypatch)
    finally:
        while active_annotator() is not None:
            active_annotator().shut_down()
        napari.Viewer.close_all()
    assert seen == [True]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_notebook_is_clean(path):
    """No outputs, no counters, nothing of the computer on which it was written."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source[:40] for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()  # raises the error of a cell
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert "Warning" not in said
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
