"""The command micro_sam.train: from files to an exported model, its report, its refusals, and going on."""

import io
import json
import os
import signal
import zipfile

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import torch

from micro_sam.automatic_segmentation import automatic_instance_segmentation, get_predictor_and_segmenter
from micro_sam.bioimageio import model_export
from micro_sam.cli.train import main
from micro_sam.core.errors import OutputWriteError
from micro_sam.training import job, training
from micro_sam.training.convert import ConvertToSamInputs
from micro_sam.training.outcome import Scores

DATA = os.path.join(os.path.dirname(__file__), "data")
QUICK = (
    "--n_sub_iteration", 2, "--n_objects", 2, "--patch-shape", 96, 96, "--num_workers", 0, "-d", "cpu",
    "--configuration", "CPU",
)


def write_data(folder):
    image = imageio.imread(os.path.join(DATA, "nuclei.png"))
    labels = imageio.imread(os.path.join(DATA, "nuclei_labels.tif"))
    for n, turn in enumerate((np.array, np.flipud, np.fliplr)):
        for name, array in (("images", image), ("labels", labels)):
            (folder / name).mkdir(exist_ok=True)
            tifffile.imwrite(folder / name / f"{n}.tif", turn(array))
    return ["--images", folder / "images", "--labels", folder / "labels"]


def call(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(job, "MAX_IMAGES", 2)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints" / "sam_model"


@pytest.fixture
def start(data, tiny_checkpoint, tmp_path):
    """The arguments of a training with prompts only, which is the quickest."""
    return [*data, *QUICK, "-c", tiny_checkpoint, "-s", tmp_path / "run", "--segmentation_decoder", "None"]


@pytest.fixture
def fake_scores(monkeypatch):
    """Let the models have given scores instead of measuring them."""
    def use(before, after):
        given = iter((before, after))

        def score_steps(self, held_out, checkpoint, text):
            value = next(given)
            return Scores("m", ["a"], {task: [value] for task in job.TRAINED_TASKS[self.mode]}, 1, "ais")
            yield

        monkeypatch.setattr(job.FinetuneJob, "score_steps", score_steps)
    return use


def test_from_files_to_a_segmentation(data, tiny_checkpoint, tmp_path, capsys, cells_image, folder):
    output, report_path = tmp_path / "out" / "model.pt", tmp_path / "report.json"
    code = call(
        *data, *QUICK, "-c", tiny_checkpoint, "-s", tmp_path / "run", "-o", output, "--n_iterations", 2,
        "--promote-worse", "--report", report_path,
    )
    text = capsys.readouterr().out
    assert code == 0
    assert f"exported to {output}" in text
    assert "before," in text

    report, outcome = json.loads(report_path.read_text()), json.loads((folder / "outcome.json").read_text())
    assert (report["status"], report["exit_code"], report["output"]) == ("done", 0, str(output))
    assert report["outcome"] == outcome
    assert report["preflight"]["ok"]
    assert set(outcome["tasks"]) == {"automatic", "point", "box"}
    for task in outcome["tasks"].values():
        assert task["before"] == pytest.approx(np.mean(task["per_image_before"]))
    assert (len(outcome["data"]["training"]), outcome["automatic_options"]) == (2, {})
    assert not set(outcome["data"]["training"]) & set(outcome["data"]["validation"])
    assert imageio.imread(folder / "outcome.png").shape[:2] > (200, 200)

    content = torch.load(output, weights_only=True)
    assert set(content) == {"model_state", "decoder_state", "settings", "decoder_settings"}
    settings = content["settings"]
    assert (settings["model_type"], settings["image_size"], settings["preprocess"]) == ("vit_t", 256, "normalize_image")
    assert settings["data"] == outcome["data"]
    assert content["decoder_settings"]["normalization"] == "instance"
    results = []
    for path in (folder / "best.pt", output):
        predictor, segmenter = get_predictor_and_segmenter("vit_t", path, "cpu")
        results.append(automatic_instance_segmentation(predictor, segmenter, cells_image, verbose=False))
    assert results[0].shape == cells_image.shape
    np.testing.assert_array_equal(*results)


def test_package_for_bioimageio(start, tmp_path, monkeypatch, capsys, fake_scores):
    fake_scores(0.5, 0.6)
    output, report_path = tmp_path / "out" / "cells.zip", tmp_path / "report.json"
    arguments = [*start, "-o", output, "--n_iterations", 1, "--report", report_path]
    assert call(*arguments) == 0
    assert json.loads(report_path.read_text())["package"] == str(output)
    with zipfile.ZipFile(output) as package:
        assert {"predictor_adaptor.py", "cover.jpeg"} <= set(package.namelist())
        with package.open("vit_t.pt") as file:
            packaged = torch.load(io.BytesIO(file.read()), weights_only=True)["model_state"]
    weights = torch.load(output.with_suffix(".pt"), weights_only=True)["model_state"]
    assert packaged.keys() == weights.keys()
    assert all(torch.equal(packaged[name], weights[name]) for name in weights)

    assert call(*arguments, "--resume") == 2
    assert f"{output} exists" in capsys.readouterr().err
    output.unlink()
    monkeypatch.setattr(model_export, "write_package", raising(OutputWriteError("no space")))
    fake_scores(0.5, 0.6)
    assert call(*arguments, "--resume") == 1
    printed = capsys.readouterr()
    assert "no space" in printed.err
    assert "micro_sam.export_model" in printed.out
    assert output.with_suffix(".pt").is_file()
    assert not output.exists()


def raising(error):
    def fail(*args, **kwargs):
        raise error
    return fail


def test_ctrl_c_and_going_on(start, folder, tmp_path, monkeypatch, capsys, fake_scores):
    calls, convert = [], ConvertToSamInputs.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(ConvertToSamInputs, "__call__", interrupted)
    fake_scores(0.5, 0.6)
    assert call(*start, "--n_iterations", 3) == 130
    assert "--resume" in capsys.readouterr().out
    # The second iteration was left in the middle: it is done again.
    assert torch.load(folder / "latest.pt", weights_only=True)["iteration"] == 1

    assert call(*start, "--n_iterations", 3) == 2, "neither going on nor starting anew was asked for"
    assert "--overwrite" in capsys.readouterr().err
    assert call(*start, "--n_iterations", 3, "--resume", "--seed", 1) == 2, "another division of the images"
    assert "other images" in capsys.readouterr().err
    fake_scores(0.5, 0.6)
    assert call(*start, "--n_iterations", 3, "--resume", "-o", tmp_path / "out.pt") == 0
    content = torch.load(folder / "latest.pt", weights_only=True)
    assert (content["iteration"], content["completed"]) == (3, True)
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == {"model_state", "settings"}, "no decoder"

    # Worse models are not exported, and failures of the export lose nothing. Nothing is trained again.
    monkeypatch.setattr(ConvertToSamInputs, "__call__", lambda *a, **k: pytest.fail("trained again"))
    again = [*start, "--n_iterations", 3, "--resume", "-o", tmp_path / "worse.pt"]
    fake_scores(0.5, 0.3)
    capsys.readouterr()
    assert call(*again, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["outcome"]["verdict"], report["outcome"]["promoted"], report["output"]) == ("worse", False, None)
    assert "WORSE" in captured.err
    assert not (tmp_path / "worse.pt").exists()
    fake_scores(0.5, 0.3)
    assert call(*again, "--promote_worse") == 0
    assert (tmp_path / "worse.pt").exists()

    def broken(*args, **kwargs):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(job, "export_trained_model", broken)
    fake_scores(0.5, 0.6)
    assert call(*again) == 1
    error = capsys.readouterr().err
    assert "the disk is on fire" in error
    assert str(folder / "best.pt") in error
    assert (folder / "best.pt").exists()


def test_automatic_segmentation_only(data, tiny_checkpoint, tmp_path, fake_scores):
    output = tmp_path / "out.pt"
    options = [option for option in QUICK if option not in ("--n_sub_iteration", "--n_objects", 2)]
    fake_scores(0.5, 0.6)
    assert call(*data, *options, "-c", tiny_checkpoint, "-s", tmp_path, "-o", output, "--n_iterations", 1,
                "--segmentation_decoder", "instances_only", "--freeze", "image_encoder") == 0
    content, begin = (torch.load(path, weights_only=True) for path in (output, tiny_checkpoint))
    assert all(torch.equal(content["model_state"][key], value) for key, value in begin["model_state"].items())
    weights = "out_conv.weight"
    assert not torch.equal(content["decoder_state"][weights], begin["decoder_state"][weights])


def test_dry_run_writes_nothing(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job.FinetuneJob, "run", lambda *a, **k: pytest.fail("it was run"))
    assert call(*start, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "2 images for training, 1 for validation" in text
    assert "nothing was trained" in text
    assert not (tmp_path / "run").exists()
    for path in (tmp_path / "labels").iterdir():
        tifffile.imwrite(path, np.zeros((128, 160), "uint16"))
    assert call(*start, "--dry-run") == 2
    assert "object" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["-m", "vit"], 2, "vit_t"),
    (["--configuration", "00"], 2, "There is no training preset '00'"),
    (["--freeze", "encoder"], 2, "'image_encoder'"),
    (["--peft", "lara:4"], 2, "'lora'"),
    (["--peft", "lora:x"], 2, "METHOD:RANK"),
    (["--peft_layers", "3"], 2, "--peft"),
    (["--peft", "lora:4", "--freeze", "image_encoder"], 2, "adapted layers"),
    (["-o", "model.zip", "--segmentation_decoder", "instances_only"], 2, "bioimage.io"),
    (["-o", "a/folder"], 2, "bioimage.io"),
    (["--learning-rate", "0"], 2, "--learning_rate"),
    (["--early_stopping", "never"], 2, "--early_stopping"),
    (["--n_iterations", "0"], 2, "--n_iterations"),
    (["--patch_shape", "512"], 2, "Y X"),
    (["--val_images", "x"], 2, "--val_labels"),
    (["--resume", "--overwrite"], 2, "one of them"),
    (["--segmentation_decoder", "instances_only", "--n_objects", "4"], 2, "instances_only"),
    (["-c", "missing.pt"], 2, "missing.pt"),
    (["-d", "gpu9"], 3, "gpu9"),
])
def test_what_cannot_work_is_refused_before_data_are_read(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(job, "find_data", lambda *a, **k: pytest.fail("data were read"))
    assert call("--images", "x", "--labels", "y", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_and_unequal_data(start, tmp_path, capsys):
    assert call("--images", tmp_path / "nothing", "--labels", tmp_path / "labels") == 2
    assert "nothing" in capsys.readouterr().err
    (tmp_path / "labels" / "2.tif").unlink()
    assert training.main([*map(str, start)]) == 2, "the old place of the command"
    assert "3 images, but 2 labels" in capsys.readouterr().err


def test_options_of_the_preset_are_kept(monkeypatch, data):
    jobs = []
    monkeypatch.setattr(job.FinetuneJob, "preflight_steps", lambda self: jobs.append(self) or iter(()))
    for arguments in ((), ("--peft", "none"), ("--peft", "lora:4", "--peft_layers", "3", "4", "--n_objects", "2")):
        with pytest.raises(AttributeError):  # there is no report of the check
            call(*data, "--configuration", "gtx3080", *arguments)
    peft = [j.options.get("peft_kwargs") for j in jobs]
    assert peft[0] == {"attention_layers_to_update": [11], "peft_module": "ClassicalSurgery"}
    assert peft[1] == {}
    assert peft[2] == {"attention_layers_to_update": [3, 4], "peft_module": "LoRASurgery", "rank": 4}
    assert [j.options["n_objects_per_batch"] for j in jobs] == [5, 5, 2]
    assert all(j.options["model_type"] == "vit_b" for j in jobs)
