"""The annotator of volumes in a real viewer, with a model that finds the objects of a known scene; needs a screen."""

import os
import time

import numpy as np
import pytest
from annotation_scene import Scene

from micro_sam.segmentation.workflow import LoadedModel

pytest.importorskip("napari")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(180)]

SHAPE = (12, 96, 128)
A, B = (40, 50), (60, 100)
SCALE, TRANSLATE = (3.0, 0.5, 0.5), (10.0, -4.0, 7.0)


def spin(annotator, seconds=0.1):
    """Let delayed work begin, and wait for all jobs."""
    from qtpy.QtWidgets import QApplication
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.002)
    assert annotator.runner.wait(60)
    QApplication.processEvents()


def shot(widget, name):
    """A picture for people; only if a folder is given."""
    if folder := os.environ.get("MICROSAM_SHOTS"):
        widget.grab().save(f"{folder}/{name}.png")


@pytest.fixture
def scene(monkeypatch):
    """Object 1 in planes 2 to 8, object 2 in all planes."""
    scene = Scene(SHAPE, monkeypatch)
    scene.disc(range(2, 9), 1, A, 16)
    scene.disc(range(12), 2, B, 14)
    return scene


@pytest.fixture
def annotator(scene, tiny_predictor, tiny_decoder, monkeypatch, tmp_path):
    import napari

    from micro_sam.annotation import tasks
    from micro_sam.sam_annotator.annotator_3d import Annotator3d

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1300, 900)
    noise = np.random.default_rng(0).integers(0, 60, SHAPE)
    layer = viewer.add_image((scene.labels * 80 + noise).astype("uint8"), name="v", scale=SCALE, translate=TRANSLATE)
    model = LoadedModel(tiny_predictor, tiny_decoder, "ais")
    annotator = Annotator3d(viewer, layer=layer, model_loader=lambda *_, **__: model)
    viewer.window.add_dock_widget(annotator, area="right", name="annotator")
    annotator.open_model(tasks.open_model(
        annotator.session, "vit_t", load=annotator.model_loader, embeddings=scene.embeddings
    ))
    spin(annotator)
    yield annotator
    annotator.shut_down()
    viewer.close()


def click(annotator, y, x, positive=True):
    """Add a point where a click in the plane that is shown would put it: in the world of the viewer."""
    annotator.prompt_panel.label.setCurrentText("positive" if positive else "negative")
    world = (annotator.viewer.dims.point[0], y * SCALE[1] + TRANSLATE[1], x * SCALE[2] + TRANSLATE[2])
    layer = annotator.views["point_prompts"]
    layer.add(layer.world_to_data(world))
    spin(annotator)


def go(annotator, plane):
    annotator.viewer.dims.set_current_step(0, plane)
    spin(annotator, 0.02)
    assert annotator.views.plane == plane


def planes(annotator, layer="current_object", object_id=1):
    return np.flatnonzero((annotator.session.labels[layer] == object_id).any(axis=(1, 2))).tolist()


def overlap(found, truth):
    return (found & truth).sum() / (found | truth).sum()


def test_prompts_on_a_scaled_and_moved_volume_act_in_the_plane_that_is_shown(annotator, scene):
    labels = annotator.session.labels["current_object"]
    for plane in (3, 7, 2):
        go(annotator, plane)
        click(annotator, *A)
        assert overlap(labels[plane] == 1, scene.labels[plane] == 1) > 0.85
    assert planes(annotator) == [2, 3, 7]
    assert [p.plane for p in annotator.session.prompts.points] == [3, 7, 2]
    for layer in annotator.views:
        assert tuple(layer.scale) == SCALE
        assert tuple(layer.translate) == TRANSLATE
    go(annotator, 3)
    annotator.clear_panel.everywhere.setChecked(False)
    annotator.clear()
    assert planes(annotator) == [2, 7]
    assert annotator.session.prompts.planes() == [2, 7]
    assert len(annotator.views["point_prompts"].data) == 2
    annotator.undo()
    assert planes(annotator) == [2, 3, 7]
    assert len(annotator.views["point_prompts"].data) == 3
    annotator.clear_panel.everywhere.setChecked(True)
    annotator.clear()
    assert not labels.any()
    assert annotator.session.prompts.is_empty


def test_one_prompt_and_a_stop_give_an_object_whose_doubtful_planes_can_be_found(annotator, scene, monkeypatch):
    view = annotator.confidence
    assert view.isHidden(), "nothing is known yet"
    go(annotator, 5)
    click(annotator, *A)
    go(annotator, 7)
    annotator.segment_panel.live.setChecked(False)
    click(annotator, 5, 5, positive=False)
    annotator.segment_all()
    spin(annotator)
    assert planes(annotator) == [2, 3, 4, 5, 6], "a single negative point ends the object"
    assert any("set a stop" in notice.text for notice in annotator.notices.history)

    assert not view.isHidden()
    strip = view.strip
    assert (strip.n_planes, set(strip.scores), strip.prompted, strip.shown) == (12, {2, 3, 4, 5, 6}, {5, 7}, 7)
    assert "no object" in view.text.text()
    shot(annotator.segment_panel, "confidence")
    values = {2: 0.55, 3: 0.7, 4: 0.86, 5: 0.95, 6: 0.31}
    monkeypatch.setitem(annotator.session._state, "confidence", {"1": {str(z): [v, None] for z, v in values.items()}})
    view.refresh()
    visited = []
    for _ in range(5):
        view.worst.click()
        spin(annotator, 0.02)
        visited.append(annotator.views.plane)
    assert visited == [6, 2, 3, 4, 6], "worst first, without the plane of the prompt, and again from the start"
    assert view.text.text().endswith("0.31")
    shot(annotator.segment_panel, "confidence_values")

    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest
    left, right = strip.x_range(3)
    QTest.mouseClick(strip, Qt.MouseButton.LeftButton, pos=QPoint(int((left + right) / 2), 12))
    spin(annotator, 0.02)
    assert annotator.views.plane == strip.shown == 3
    assert strip.text_of(3) == "Slice 3: predicted IoU 0.70"
    assert strip.text_of(11) == "Slice 11: no object"

    annotator.commit()
    spin(annotator)
    assert planes(annotator, "committed_objects") == [2, 3, 4, 5, 6]
    assert overlap(annotator.session.labels["committed_objects"][4] == 1, scene.labels[4] == 1) > 0.85
    assert view.isHidden()
    annotator.undo()
    spin(annotator)
    assert not view.isHidden()
    assert not annotator.session.labels["committed_objects"].any()
    annotator.redo()
    assert planes(annotator, "committed_objects") == [2, 3, 4, 5, 6]


def test_the_colours_of_a_strip_and_more_planes_than_pixels(annotator):
    from micro_sam.sam_annotator.confidence_strip import ConfidenceStrip, colour_of
    assert colour_of(0.2).red() > colour_of(0.2).green()
    assert colour_of(1.0).green() > colour_of(1.0).red()
    strip = ConfidenceStrip()
    strip.resize(100, 24)
    strip.n_planes, strip.shown = 1000, 999
    strip.show_scores({z: (0.2 if z == 555 else 0.9, None) for z in range(500, 600)}, [500])
    bars = {x: confidence for x, _, confidence in strip._bars()}
    assert set(bars) == set(range(50, 60))
    assert bars[55] == 0.2, "the worst of ten planes is shown"
    assert [strip.plane_at(x) for x in (0, 55.5, 99.99, 300)] == [0, 555, 999, 999]
    picture = strip.grab().toImage()
    assert picture.pixelColor(52, 20).green() > 120
    assert picture.pixelColor(55, 22).red() > 2 * picture.pixelColor(55, 22).green()


def test_several_objects_at_once(annotator, scene):
    annotator.segment_panel.batched.setChecked(True)
    go(annotator, 4)
    click(annotator, *A)
    click(annotator, *B)
    assert (planes(annotator), planes(annotator, object_id=2)) == ([4], [4])
    go(annotator, 10)
    click(annotator, *B)  # a third object, which is the second one again: a prompt is an object
    assert planes(annotator, object_id=3) == [10]
    annotator.undo()
    spin(annotator)
    assert annotator.session.layer_editor("current_object").ids == [1, 2]
    annotator.segment_all()
    spin(annotator)
    assert (planes(annotator), planes(annotator, object_id=2)) == ([*range(2, 9)], [*range(12)])
    assert set(annotator.confidence.strip.scores) == set(range(12))
    annotator.commit()
    committed = annotator.session.labels["committed_objects"]
    assert annotator.session.objects.ids == [1, 2]
    for i in (1, 2):
        assert overlap(committed == i, scene.labels == i) > 0.85
    assert set(annotator.session.scores()) == {1, 2}
    annotator.undo()
    assert not committed.any()
    assert annotator.session.layer_editor("current_object").ids == [1, 2]
    assert len(annotator.session.prompts.points) == 2
