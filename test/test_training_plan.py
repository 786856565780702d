"""The form of a finetuning, and a training that is followed and stopped from another thread."""

import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile

from micro_sam.core.errors import InvalidInputError, OutputExistsError
from micro_sam.core.progress import Cancelled, drain
from micro_sam.models.checkpoints import read_checkpoint
from micro_sam.models.registry import find_spec, register_local_model
from micro_sam.training.configurations import CONFIGURATIONS
from micro_sam.training.plan import (
    FormError,
    TrainingForm,
    TrainingStep,
    check_form,
    check_steps,
    finetune_steps,
    parse_description,
    plan_training,
    register_result,
)

DATA = Path(__file__).parent / "data"


@pytest.fixture
def form(tmp_path, tiny_checkpoint, monkeypatch):
    """A small training with prompts only, which is the quickest."""
    from micro_sam.training import job
    monkeypatch.setattr(job, "MAX_IMAGES", 2)
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    image, labels = imageio.imread(DATA / "nuclei.png"), imageio.imread(DATA / "nuclei_labels.tif")
    for n, turn in enumerate((np.array, np.flipud)):
        for name, array in (("images", image), ("labels", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name / f"{n}.tif", turn(array))
    return TrainingForm(
        images=str(tmp_path / "images"), labels=str(tmp_path / "labels"), checkpoint=str(tiny_checkpoint),
        configuration="Minimal", patch_shape=(96, 96), n_iterations=2, with_segmentation_decoder=False, device="cpu",
        name="mine", save_root=str(tmp_path / "run"), promote_worse=True,
    )


def test_empty_texts_are_not_given(tmp_path):  # 04-W42
    form = TrainingForm(image_key=" ", checkpoint="", val_images="", output_path="")
    assert (form.image_key, form.checkpoint, form.val_images, form.output_path) == (None,) * 4
    assert form.output.is_absolute()


@pytest.mark.parametrize(("changes", "field"), [
    ({"images": ""}, "images"), ({"labels": "/nowhere"}, "labels"), ({"val_images": "/nowhere"}, "val_images"),
    ({"checkpoint": "/no.pt"}, "checkpoint"), ({"patch_shape": (0, 96)}, "patch_shape"), ({"name": "a/b"}, "name"),
    ({"name": ""}, "name"), ({"name": "vit_b_lm"}, "name"), ({"output_path": "model.zip"}, "output_path"),
])
def test_wrong_fields_are_named(form, changes, field):
    assert check_form(form) == {}
    wrong = replace(form, **changes)
    assert field in check_form(wrong)
    with pytest.raises(FormError) as caught:
        plan_training(wrong)
    assert field in caught.value.fields


def test_validation_needs_both(form):
    assert "val_labels" in check_form(replace(form, val_images=form.images))
    assert check_form(replace(form, val_images=form.images, val_labels=form.labels)) == {}


def test_a_name_that_belongs_to_another_model_is_refused(form, tiny_checkpoint):
    register_local_model("mine", tiny_checkpoint, replace=True)
    assert "already" in check_form(form)["name"]
    assert check_form(replace(form, output_path=str(tiny_checkpoint))) == {}


def test_the_model_that_was_chosen_is_started_from(form):  # 04-W42
    before = {name: dict(options) for name, options in CONFIGURATIONS.items()}
    chosen = replace(form, checkpoint=None, configuration="CPU", model_type="vit_b_lm")
    assert [plan_training(chosen).model_type for _ in range(2)] == ["vit_b_lm"] * 2
    assert plan_training(replace(chosen, model_type=None)).model_type == "vit_b"
    assert plan_training(form).model_type == "vit_t"
    assert {name: dict(options) for name, options in CONFIGURATIONS.items()} == before


def test_arguments_of_the_job(form):
    job = plan_training(replace(form, existing="resume", n_iterations=None, n_epochs=7))
    assert (job.resume, job.overwrite, job.mode, job.num_workers) == (True, False, "none", 0)
    assert (job.options["n_epochs"], job.options["device"], job.options["n_sub_iteration"]) == (7, "cpu", 4)
    assert "n_iterations" not in job.options
    assert [plan_training(replace(form, checkpoint_encoder=c)).options["checkpoint_encoder"] for c in (0, 1)] == [0, 1]
    assert "checkpoint_encoder" not in job.options, "the training chooses"
    assert len(job.data.val.raw_paths) == 1
    assert Path(plan_training(replace(form, save_root=None)).folder).is_absolute()


def test_data_with_problems_are_reported(form, tmp_path):
    for name in ("0.tif", "1.tif"):
        tifffile.imwrite(tmp_path / "labels" / name, np.zeros((128, 160), "uint8"))
    report = drain(check_steps(form), verbose=False).report
    assert not report.ok
    assert "has an object" in report.problems[0]
    tifffile.imwrite(tmp_path / "labels" / "0.tif", np.zeros((50, 60), "uint8"))
    with pytest.raises(InvalidInputError, match="shape"):
        drain(check_steps(form), verbose=False)


@pytest.mark.parametrize(("text", "expected"), [
    ("Epoch 1/3", (1, None, None)), ("Epoch 2/inf, metric 0.1250 (best 0.1200)", (2, None, 0.125)),
    ("Epoch 2/9, loss 1.5000, metric 0.1250 (best 0.1200)", (2, 1.5, 0.125)), ("Epoch 1/3, loss 0.5", (1, 0.5, None)),
    ("Score model", None),
])
def test_descriptions_are_understood(text, expected):
    assert parse_description(text) == expected


def test_from_a_form_to_a_model_in_the_menus(form):
    job = drain(check_steps(form), verbose=False).job
    seen = []

    def follow():
        result = yield from finetune_steps(job)
        return result

    steps = follow()
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            result = end.value
            break
    texts = list(dict.fromkeys(step.text for step in seen))
    assert texts == ["Prepare the training", "Score the starting model", "Train", "Score the finetuned model"]
    training = [step for step in seen if isinstance(step, TrainingStep)]
    assert (training[-1].done, training[-1].total, training[-1].epoch) == (2, 2, 1)
    assert result.output == form.output
    spec = register_result(job, result)
    assert find_spec("mine") == spec
    assert (spec.path, spec.modes) == (str(form.output), ("amg",))
    assert "finetuned from vit_t" in spec.purpose
    assert check_form(form) == {}, "the name is that of this training"
    register_result(job, result)
    with pytest.raises(OutputExistsError):
        drain(finetune_steps(job), verbose=False)
    assert drain(finetune_steps(replace(job, resume=True)), verbose=False).output == form.output


def test_closing_leaves_a_checkpoint_that_can_be_used_and_gone_on_with(form):
    job = plan_training(replace(form, n_iterations=50))
    steps = finetune_steps(job)
    gc.disable()  # memory must be free without waiting for it
    try:
        for step in steps:
            if isinstance(step, TrainingStep) and step.done:
                break
        steps.close()
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ in ("SamTrainer", "TrainableSAM")]
    finally:
        gc.enable()
    assert not [t for t in threading.enumerate() if t.name == "micro_sam finetuning"]
    checkpoint = read_checkpoint(job.folder / "latest.pt")
    assert checkpoint.architecture == "vit_t"
    import torch
    done = torch.load(job.folder / "latest.pt", weights_only=True)["iteration"]
    assert 1 <= done < 50
    again = plan_training(replace(form, n_iterations=done + 1, existing="resume"))
    result = drain(finetune_steps(again), verbose=False)
    assert torch.load(job.folder / "latest.pt", weights_only=True)["iteration"] == done + 1
    assert result.output.is_file()


def test_it_can_be_stopped_before_the_training_begins(form):
    job = plan_training(form)
    steps = finetune_steps(job)
    for step in steps:
        if step.text == "Score the starting model":
            break
    steps.close()
    assert not (job.folder / "latest.pt").exists()


def test_errors_come_through(form, monkeypatch):
    from micro_sam.training.job import FinetuneJob

    def fail(self, **kwargs):
        raise InvalidInputError("no luck")

    monkeypatch.setattr(FinetuneJob, "train", fail)
    with pytest.raises(InvalidInputError, match="no luck"):
        drain(finetune_steps(plan_training(form)), verbose=False)

    def stop(self, **kwargs):
        raise Cancelled("stopped")

    monkeypatch.setattr(FinetuneJob, "train", stop)
    with pytest.raises(Cancelled):
        drain(finetune_steps(plan_training(form)), verbose=False)


def test_the_form_loads_no_torch():
    code = "import sys, micro_sam.training.plan as p; p.check_form(p.TrainingForm()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
