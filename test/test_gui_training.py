"""The finetuning panel in a real window: form, report, live training, stop and go on, the model in the menus."""

import os
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile

QApplication = pytest.importorskip("qtpy.QtWidgets").QApplication
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore")]
DATA = Path(__file__).parent / "data"


@pytest.fixture
def viewer():
    import napari
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1300, 960)
    yield viewer
    viewer.close()


def shot(viewer, name):
    """A picture of the window, for people; only if a folder is given."""
    QApplication.processEvents()
    if folder := os.environ.get("MICROSAM_SHOTS"):
        imageio.imwrite(f"{folder}/{name}.png", viewer.screenshot(canvas_only=False, flash=False))


def settle(seconds=0.5):
    """Let layouts and animations come to their end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()


def wait(widget, seconds=300):
    assert widget.runner.wait(seconds)


@pytest.fixture
def announced(monkeypatch):
    """The texts of the notifications of napari."""
    from micro_sam.sam_annotator import training_ui

    texts = []
    monkeypatch.setattr(training_ui, "notify", lambda level, text: texts.append(text))
    return texts


@pytest.fixture
def widget(viewer, tmp_path, monkeypatch, tiny_checkpoint):
    """The panel, filled in for a short training with prompts only."""
    from micro_sam.sam_annotator.training_ui import TrainingWidget
    from micro_sam.training import job

    monkeypatch.setattr(job, "MAX_IMAGES", 2)
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    image, labels = imageio.imread(DATA / "nuclei.png"), imageio.imread(DATA / "nuclei_labels.tif")
    for n, turn in enumerate((np.array, np.flipud)):
        for name, array in (("images", image), ("labels", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name / f"{n}.tif", turn(array))
    widget = TrainingWidget()
    viewer.window.add_dock_widget(widget, area="right")
    wait(widget)
    fields = widget.fields
    fields.images.path, fields.labels.path = tmp_path / "images", tmp_path / "labels"
    fields.checkpoint.path, fields.save_root.path = tiny_checkpoint, tmp_path / "run"
    fields.configuration.setCurrentIndex(fields.configuration.findText("Minimal"))
    fields.patch.value = (96, 96)
    fields.name.setText("mine")
    fields.with_decoder.setChecked(False)
    fields.n_iterations.setValue(2)
    fields.promote_worse.setChecked(True)
    return widget


def test_the_form_shows_and_gives_all_values(viewer, widget, tmp_path):
    fields = widget.fields
    form = fields.values()
    assert (form.images, form.name, form.patch_shape) == (str(tmp_path / "images"), "mine", (96, 96))
    assert (form.model_type, form.configuration, form.n_iterations, form.device) == (None, "Minimal", 2, None)
    assert form.checkpoint_encoder is None
    fields.checkpoint_encoder.setChecked(True)
    assert fields.values().checkpoint_encoder
    assert fields.configuration.itemText(0).startswith("auto (")
    assert fields.device.findText("cpu") > 0
    fields.checkpoint.path = None
    assert fields.values().model_type is None, "that of the configuration"
    assert "vit_t" in fields.family.itemText(0)
    fields.family.setCurrentIndex(fields.family.findText("Light Microscopy"))
    fields.size.setCurrentIndex(fields.size.findText("base"))
    assert fields.values().model_type == "vit_b_lm"
    fields.family.setCurrentIndex(fields.family.findText("Histopathology"))
    assert fields.values().model_type == "vit_b_histopathology", "the size stays"
    shot(viewer, "training_form")
    fields.open_advanced()
    settle()
    shot(viewer, "training_advanced")
    widget.column.verticalScrollBar().setValue(10_000)
    shot(viewer, "training_advanced_end")


def test_without_a_gpu_the_smallest_model_is_proposed(viewer):
    from micro_sam.sam_annotator.training_form import TrainingFields

    fields = TrainingFields()
    fields.show_hardware("CPU", ["cpu"])
    assert fields.values().model_type == "vit_t_lite"
    fields.family.setCurrentIndex(0)
    fields.show_hardware("CPU", ["cpu"])
    assert fields.values().model_type is None, "what is chosen then stays"
    fields = TrainingFields()
    fields.show_hardware("A100", ["cuda", "cpu"])
    assert fields.values().model_type is None


def test_the_plot_shows_what_it_is_given(viewer):
    from micro_sam.sam_annotator.loss_plot import LOSS, METRIC, LossPlot

    plot = LossPlot()
    plot.resize(400, 170)
    assert not plot.has_points
    for n in range(1, 3001):
        plot.add(n, 1 / n, None if n < 1000 else 0.25)
    plot.add(3000, 0.5, float("nan"))
    assert (plot.metric.x, plot.metric.y, plot.loss.y[-1]) == ([1000], [0.25], 0.5)
    x, y = plot.loss.binned(300)
    assert len(x) <= 300
    assert y[0] == pytest.approx(np.mean([1 / n for n in range(1, 3000) if int((n - 1) / 2999 * 299) == 0]))
    picture = plot.grab().toImage()
    colours = {picture.pixelColor(i, j).name() for i in range(400) for j in range(170)}
    assert {LOSS, METRIC} <= colours
    plot.clear()
    assert not plot.has_points


def test_wrong_fields_are_marked_and_problems_of_the_data_shown(viewer, widget, tmp_path):
    fields = widget.fields
    fields.labels.path = tmp_path / "nowhere"
    widget.start.click()
    assert not any(job.key == "train" for job in widget.runner.jobs)
    assert "does not exist" in widget.problem.text()
    assert fields.labels.line.styleSheet()
    shot(viewer, "training_problem")
    fields.labels.path = tmp_path / "labels"
    assert not fields.labels.line.styleSheet()
    for name in ("0.tif", "1.tif"):
        tifffile.imwrite(tmp_path / "labels" / name, np.zeros((128, 160), "uint8"))
    widget.start.click()
    wait(widget)
    assert "has an object" in widget.report.text()
    assert widget.start.isEnabled()
    assert not (tmp_path / "run").exists(), "nothing is trained with such data"
    shot(viewer, "training_report_problems")


def test_the_button_to_press_next_is_coloured(widget):
    def coloured():
        return [button.text() for button in (widget.check, widget.start) if button.styleSheet()]

    assert coloured() == ["Check Data"]
    widget.check.click()
    wait(widget)
    assert coloured() == ["Start Training"]
    widget.fields.patch.value = (64, 64)
    assert coloured() == ["Check Data"], "these fields were not checked"
    widget.fields.patch.value = (96, 96)
    assert coloured() == ["Start Training"]


def test_from_data_to_a_model_in_the_menus(viewer, widget, announced, tmp_path):
    from micro_sam.models.registry import find_spec
    from micro_sam.sam_annotator.model_panel import EmbeddingPanel

    panel = EmbeddingPanel(viewer)
    viewer.window.add_dock_widget(panel, area="left")
    assert panel.family.findText("My models") < 0
    widget.check.click()
    assert not widget.start.isEnabled()
    wait(widget)
    assert "Training: 1 image (" in widget.report.text()
    assert "per iteration" in widget.report.text()
    seen = []
    widget.runner.progressed.connect(lambda job, step, seconds: seen.append(step.text))
    widget.start.click()
    assert "Check data" not in {job.text for job in widget.runner.jobs}, "the data were checked with these fields"
    wait(widget, 500)
    assert "Train" in seen
    assert "before" in widget.result.text.text()
    assert find_spec("mine").path == str(tmp_path / "cache" / "models" / "finetuned" / "mine.pt")
    assert panel.family.findText("My models") >= 0
    panel.set_model("mine")
    assert panel.values().model == "mine"
    settle(1.5)
    assert widget.fields.isEnabled()
    assert widget.result.picture.isVisibleTo(widget)
    assert len(announced) == 1
    assert "The model is 'mine' in the menus" in announced[0]
    shot(viewer, "training_done")

    widget.start.click()
    wait(widget, 500)
    assert "go on with" in widget.problem.text()
    assert widget.fields.existing.styleSheet()


def test_cancel_and_go_on(viewer, widget, announced, tmp_path):
    import torch

    from micro_sam.models.checkpoints import read_checkpoint
    from micro_sam.sam_annotator.jobs import Watchdog
    from micro_sam.training.plan import TrainingStep

    widget.fields.n_iterations.setValue(300)
    done = []

    def stop_soon(job, step, seconds):
        if isinstance(step, TrainingStep):
            done.append(step.done)
        if done and done[-1] >= 2:
            shot(viewer, "training_live")
            job.cancel()

    widget.runner.progressed.connect(stop_soon)
    widget.start.click()
    with Watchdog() as watchdog:
        wait(widget, 500)
    assert watchdog.worst < 5, "the window stays alive; loose, as the machine may be busy"
    latest = tmp_path / "run" / "checkpoints" / "mine" / "latest.pt"
    assert "Press 'Start Training' to go on" in widget.notices.history[-1].text
    assert read_checkpoint(latest).architecture == "vit_t", "the checkpoint can be used"
    n = torch.load(latest, weights_only=True)["iteration"]
    assert 2 <= n < 300
    assert widget.fields.existing_choice == "resume"

    widget.runner.progressed.disconnect(stop_soon)
    widget.fields.n_iterations.setValue(n + 1)
    widget.start.click()
    wait(widget, 500)
    assert torch.load(latest, weights_only=True)["iteration"] == n + 1
    assert "before" in widget.result.text.text()
    widget.start.click()
    assert not widget.start.isEnabled()
    wait(widget, 500)
    settle(1.5)
    assert announced == [], "who goes on at once has seen the result"
