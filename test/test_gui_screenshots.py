"""The documentation of the annotators says what they show: controls, keys, snippets, pictures; needs a screen."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore")]

DOC = Path(__file__).parent.parent / "doc"
# What explains itself; and Undo, which says what it would take back.
_OBVIOUS = {
    "Browse…", "File…", "Folder…", "Cancel", "✕", "Details", "?", "Keep", "Delete", "Undo", "Use tiles of 384 pixels",
    "Keep the model even if it became worse",
}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(DOC))
    import make_screenshots
    yield make_screenshots
    sys.path.remove(str(DOC))


@pytest.fixture
def small_stage(script, tiny_predictor, tiny_decoder, cells_image, cells_labels, tmp_path, monkeypatch):
    """Small images, a tiny model, and no more patience than necessary."""
    from micro_sam.segmentation.workflow import LoadedModel

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "PAUSE", 0.3)
    stack = np.stack([cells_image[:96, 32:128]] * 3)
    images = {
        "nuclei": cells_image, "volume": stack, "movie": stack, "cells": cells_image, "cells_labels": cells_labels,
    }
    folder = tmp_path / "files"
    folder.mkdir()
    return script.Stage(folder, images, lambda *given, **more: LoadedModel(tiny_predictor, tiny_decoder, "ais"))


def text_of_page():
    return (DOC / "annotators.md").read_text(encoding="utf-8")


def controls(widget):
    """The controls of a dock, as pairs of what is written on or beside them and their tooltip."""
    from qtpy.QtWidgets import QAbstractButton, QFormLayout

    found = []
    for layout in widget.findChildren(QFormLayout):
        for row in range(layout.rowCount()):
            label, field = (layout.itemAt(row, role) for role in (
                QFormLayout.ItemRole.LabelRole, QFormLayout.ItemRole.FieldRole
            ))
            if label is not None and label.widget() is not None:
                tips = [label.widget().toolTip(), field.widget().toolTip()]
                tips += [part.toolTip() for part in getattr(field.widget(), "spins", ())]
                found.append((label.widget().text(), next(filter(None, tips), "")))
    found += [(button.text(), button.toolTip()) for button in widget.findChildren(QAbstractButton)]
    return [
        (text.removesuffix(":"), tip) for text, tip in found if text and text not in _OBVIOUS and text[0] not in "▸▾"
    ]


def docks(stage):
    """All docks; those of the annotators with the controls of each mode of automatic segmentation."""
    import napari

    from micro_sam.sam_annotator.annotator_2d import Annotator2d
    from micro_sam.sam_annotator.annotator_3d import Annotator3d
    from micro_sam.sam_annotator.annotator_tracking import AnnotatorTracking
    from micro_sam.sam_annotator.image_series_annotator import ImageSeriesAnnotator
    from micro_sam.sam_annotator.launch import add_dock
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier
    from micro_sam.sam_annotator.settings_widget import SettingsWidget
    from micro_sam.sam_annotator.training_ui import TrainingWidget

    viewer = napari.Viewer(show=False)
    try:
        for kind, image in ((Annotator2d, "nuclei"), (Annotator3d, "volume"), (AnnotatorTracking, "movie")):
            viewer.layers.clear()
            dock = add_dock(viewer, kind, layer=viewer.add_image(stage.images[image]))
            for mode in ("amg", "apg", "ais"):
                dock.auto_panel.show_mode(mode, None)
                yield dock
            dock.shut_down()
        for kind in (ImageSeriesAnnotator, ObjectClassifier, TrainingWidget, SettingsWidget):
            dock = kind() if kind in (SettingsWidget, TrainingWidget) else kind(viewer)
            viewer.window.add_dock_widget(dock)
            yield dock
    finally:
        viewer.close()


def test_every_control_is_explained_and_documented(small_stage):
    page = text_of_page().splitlines()
    missing = {}
    for dock in docks(small_stage):
        for text, tip in controls(dock):
            assert tip, f"{type(dock).__name__}: {text!r} has no tooltip"
            if f"| {text} | {tip} |" not in page:
                missing[f"| {text} | {tip} |"] = type(dock).__name__
    assert not missing, "\n".join(missing)


def test_every_tooltip_is_documented():
    from micro_sam.sam_annotator.tooltips import _TOOLTIPS

    page = text_of_page()
    assert [(kind, name) for kind, tips in _TOOLTIPS.items() for name, tip in tips.items() if tip not in page] == []


def test_every_key_is_documented():
    from micro_sam.sam_annotator.keys import KEYS, readable_key

    page = text_of_page()
    for key in KEYS:
        assert re.search(rf"^\| `{re.escape(readable_key(key.key))}` \| {re.escape(key.text)}", page, re.MULTILINE), key


def test_every_scene_has_its_picture_and_is_shown(script):
    from PIL import Image

    page = text_of_page()
    for name in script.SCENES:
        path = DOC / "images" / f"annotator_{name}.png"
        assert f"](images/{path.name})" in page
        assert path.stat().st_size <= script.MAX_BYTES
        with Image.open(path) as picture:
            assert picture.size == script.SIZE


QUICK = ("2d", "tracking", "classifier")
REST = ("start", "objects", "3d", "series", "finetuning", "settings", "help")


def test_list_of_scenes_is_complete(script):
    assert set(script.SCENES) == {*QUICK, *REST}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_scenes_run(script, small_stage, name, tmp_path):
    picture = script.take(name, small_stage, tmp_path / "picture.png")
    assert picture.shape[2] == 3
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_snippets_run(small_stage, tmp_path, monkeypatch):
    import napari

    from micro_sam.sam_annotator import annotator
    from micro_sam.segmentation import workflow

    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro_sam").symlink_to(DOC.parent / "micro_sam")
    monkeypatch.setattr(napari, "run", lambda: annotator.active_annotator().runner.wait(60))
    monkeypatch.setattr(workflow, "load_model", small_stage.loader)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", text_of_page(), re.DOTALL)
    assert len(blocks) > 3
    try:
        for block in blocks:
            exec(compile(block, "doc/annotators.md", "exec"), names)
    finally:
        while annotator.active_annotator() is not None:
            annotator.active_annotator().shut_down()
        napari.Viewer.close_all()
