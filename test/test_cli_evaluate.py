"""The command micro_sam.evaluate: predictions and models, its report files, refusals, and going on after Ctrl-C."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from micro_sam.cli.evaluate import get_parser, main
from micro_sam.evaluation import model_tasks
from micro_sam.evaluation.metrics import segmentation_scores

COLUMNS = ["mSA", "SA50", "SA75", "Precision", "Recall", "F1 Score"]


def call(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path, cells_image, cells_labels):
    """Two images of two kinds, labels, and predictions that lack some objects."""
    labels = np.where(cells_labels <= np.unique(cells_labels)[6], cells_labels, 0)
    found = np.where(labels == np.unique(labels)[1], 0, labels)
    for n, name in enumerate(("em_1", "lm_1")):
        for folder, array in (("images", cells_image), ("labels", labels), ("found", (labels, found)[n])):
            (tmp_path / folder).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / folder / f"{name}.tif", array)
    return tmp_path, segmentation_scores(found, labels)


def test_predictions_give_a_file_or_a_report(data, tmp_path, capsys):
    folder, scores = data
    arguments = ("--labels", folder / "labels", "--predictions", folder / "found")
    path = tmp_path / "new.csv"
    for _ in range(2):  # nothing stands in the way of a second run
        assert call(*arguments, "-o", path) == 0
    assert path.is_file()
    table = pd.read_csv(path)
    assert list(table) == COLUMNS
    assert table["SA50"].item() == pytest.approx((1 + scores["SA50"]) / 2, abs=1e-9)
    capsys.readouterr()

    assert call(*arguments, "-o", tmp_path / "report", "--group-by", "prefix", "--json") == 0
    output = capsys.readouterr()
    content = json.loads(output.out)
    rows = {row["modality"]: row for row in content["summary"]}
    assert rows["lm"]["mSA"] == pytest.approx(scores["mSA"], abs=1e-9)
    assert rows["em"]["mSA"] == 1
    assert rows["all"]["images"] == 2
    assert f"| lm | 1 | {scores['mSA']:.3f} |" in output.err
    assert {"report.md", "results.csv", "scores.png"} <= {p.name for p in (tmp_path / "report").iterdir()}
    assert list(pd.read_csv(tmp_path / "report" / "results.csv"))[:2] == ["modality", "image"]

    assert call(*arguments, "--threshold", 0.5, 0.6, "--json", tmp_path / "a.json") == 0
    summary = json.loads((tmp_path / "a.json").read_text())["summary"][0]
    assert "SA50" not in summary
    assert summary["images"] == 2


def test_keys_and_patterns(data, tmp_path, capsys):
    folder, scores = data
    for name in ("labels", "found"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["seg/ids"] = tifffile.imread(folder / name / "lm_1.tif")
            file["other"] = np.zeros((3, 3), dtype=int)
    keys = ("--label_key", "seg/ids", "--prediction_key", "seg/ids", "--json", tmp_path / "a.json")
    assert call("--labels", tmp_path / "labels.h5", "--predictions", tmp_path / "found.h5", *keys) == 0
    assert json.loads((tmp_path / "a.json").read_text())["summary"][0]["mSA"] == pytest.approx(scores["mSA"], abs=1e-9)
    keys = ("--label_key", "l*.tif", "--prediction_key", "l*.tif", "--json", tmp_path / "b.json")
    assert call("--labels", folder / "labels", "--predictions", folder / "found", *keys) == 0
    assert [r["image"] for r in json.loads((tmp_path / "b.json").read_text())["results"]] == ["lm_1"]


def test_stray_files_are_named(data, capsys):
    folder, _ = data
    tifffile.imwrite(folder / "found" / "aa.tif", np.ones((3, 3), dtype=np.uint8))
    assert call("--labels", folder / "labels", "--predictions", folder / "found") == 2
    assert "Without partner: aa" in capsys.readouterr().err


def test_model_is_evaluated_and_goes_on_after_ctrl_c(data, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    folder, _ = data
    arguments = (
        "--images", folder / "images", "--labels", folder / "labels", "-c", tiny_checkpoint, "-o", tmp_path / "out",
        "--modes", "ais", "--prompts", "box", "--iterations", 2, "--objects", 3, "--group-by", "prefix", "-d", "cpu",
        "--min_size", 5,
    )
    calls, whole = [], model_tasks.iterate_prompts

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(model_tasks, "iterate_prompts", interrupted)
    assert call(*arguments) == 130
    assert "goes on from here" in capsys.readouterr().out
    assert call(*arguments, "--json", tmp_path / "a.json") == 0
    assert len(calls) == 3
    output = capsys.readouterr().out
    assert "2 images ->" in output
    content = json.loads((tmp_path / "a.json").read_text())
    assert {row["modality"] for row in content["summary"]} == {"em", "lm", "all"}
    assert len(content["results"]) == 2 * (1 + 2)
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["micro_sam"]["settings"]
    assert settings["options"] == {"min_size": 5}
    assert {"report.md", "scores.png", "iterations.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    # Another model, or other settings, do not replace it.
    assert call(*arguments[:-1], 6) == 2
    assert "min_size: 5 there, 6 now" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (("--labels", "a"), "either --predictions"),
    (("--labels", "a", "--predictions", "b", "--images", "c"), "either --predictions"),
    (("--labels", "a", "--predictions", "b", "--model", "vit_t_lite"), "--model_type does not go with --predictions"),
    (("--labels", "a", "--predictions", "b", "--min_size", "3"), "no option --min_size"),
    (("--labels", "a", "--images", "b", "-o", "c", "--threshold", "0.5"), "--threshold does not go with --images"),
    (("--labels", "a", "--images", "b"), "--output_path"),
    (("--labels", "a", "--images", "b", "-o", "c.csv"), "to a folder"),
    (("--labels", "a", "--images", "b", "-o", "c", "--prompts", "none", "box"), "none alone"),
    (("--labels", "a", "--images", "b", "-o", "c", "--prompts", "none", "--modes", "none"), "nothing to score"),
    (("--labels", "a", "--images", "b", "-o", "c", "--halo", "8", "8"), "--halo belongs to tiles"),
    (("--labels", "a", "--images", "b", "-o", "c", "--min_sise", "8"), "--min_size"),
    (("--labels", "a", "--images", "b", "-o", "c"), "no file or folder b"),
    (("--labels", "a", "--predictions", "b"), "no file or folder a"),
])
def test_what_cannot_work_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_and_options(capsys):
    code = "import sys; from micro_sam.cli.evaluate import get_parser; get_parser().format_help(); " \
           "sys.exit(bool({'torch', 'napari', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
    args = get_parser().parse_args(
        ["--labels", "a", "--images", "b", "--model", "vit_b", "--group_by", "folder", "--objects", "4"]
    )
    assert (args.model_type, args.group_by, args.objects) == ("vit_b", "folder", 4)


def test_the_old_entry_point_is_the_command():
    from micro_sam.evaluation.evaluation import main as old

    with pytest.raises(SystemExit, match="0"):
        old(["--version"])
