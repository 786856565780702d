"""Walks through the annotators as a user takes them, in a real viewer, with the model that ships, on real images."""

import functools
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile

import micro_sam
from micro_sam.core.labels import compute_iou
from micro_sam.core.output import read_labels
from micro_sam.segmentation.workflow import load_model

pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore")]
DATA, SHIPPED = Path(__file__).parent / "data", Path(micro_sam.__file__).parent / "data"


@pytest.fixture(scope="module")
def load_lite():
    """Loads the model that ships, once for each canvas."""
    return functools.cache(lambda image_size: load_model("vit_t_lite", device="cpu", image_size=image_size))


@pytest.fixture
def open_annotator(monkeypatch, tmp_path, load_lite):
    """Opens annotators in viewers of their own, with a cache of their own, and closes them."""
    import napari

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "micro_sam.segmentation.workflow.load_model", lambda *args, image_size=640, **kwargs: load_lite(image_size)
    )
    opened = []

    def open_one(launch, *args, **kwargs):
        viewer = launch(*args, model_type="vit_t_lite", return_viewer=True, viewer=napari.Viewer(), **kwargs)
        from micro_sam.sam_annotator.annotator import active_annotator
        opened.append((active_annotator(), viewer))
        return opened[-1][0]

    yield open_one
    for annotator, viewer in opened:
        annotator.shut_down()
        viewer.close()


def settle(annotator, seconds=0.2):
    """Let the event loop run until all jobs are done, and a bit longer, so that delayed ones begin."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.005)
    assert annotator.runner.wait(120), "a job does not end"


def press(annotator, key):
    """Press a key on the canvas."""
    from qtpy.QtCore import QEvent, Qt
    from qtpy.QtGui import QKeyEvent
    from qtpy.QtWidgets import QApplication

    modifiers = Qt.KeyboardModifier.NoModifier
    *names, letter = key.split("-")
    for name in names:
        modifiers |= {"Shift": Qt.KeyboardModifier.ShiftModifier, "Control": Qt.KeyboardModifier.ControlModifier}[name]
    code = getattr(Qt.Key, f"Key_{letter}")
    canvas = annotator.viewer.window._qt_viewer.canvas.native
    for kind in (QEvent.Type.KeyPress, QEvent.Type.KeyRelease):
        QApplication.sendEvent(canvas, QKeyEvent(kind, code, modifiers, letter))
    settle(annotator)


def box_of(labels, object_id):
    where = np.argwhere(labels == object_id)
    (y0, x0), (y1, x1) = where.min(0), where.max(0) + 1
    return np.array([[y0, x0], [y0, x1], [y1, x1], [y1, x0]], dtype=float)


def test_2d_from_the_first_click_to_the_saved_file_and_back(open_annotator, tmp_path):
    from micro_sam.sam_annotator import annotator_2d

    image, truth = imageio.imread(DATA / "nuclei.png"), tifffile.imread(DATA / "nuclei_labels.tif")
    annotator = open_annotator(annotator_2d, image)
    session, views = annotator.session, annotator.views
    nucleus = 9
    views["prompts"].add_rectangles(box_of(truth, nucleus))
    settle(annotator)
    live = session.labels["current_object"] == 1
    assert compute_iou(live, truth == nucleus) > 0.5, "the mask follows the box without a key press"
    press(annotator, "S")
    np.testing.assert_array_equal(session.labels["current_object"] == 1, live)
    press(annotator, "C")
    assert session.objects.ids == [1]
    assert len(views["prompts"].data) == 0
    press(annotator, "Control-Z")
    assert session.objects.ids == []
    assert len(views["prompts"].data) == 1, "the prompt is back in its layer"
    np.testing.assert_array_equal(views["current_object"].data, live)
    press(annotator, "Control-Shift-Z")
    np.testing.assert_array_equal(views["committed_objects"].data, live)

    annotator.auto_segment()
    settle(annotator)
    found = views["auto_segmentation"].data.copy()
    assert len(np.unique(found)) > 10
    assert annotator.commit_panel.layer.currentText() == "auto_segmentation"
    press(annotator, "C")
    assert session.objects.ids[0] == 1
    assert len(session.objects.ids) > 10
    expected = session.labels["committed_objects"].copy()
    annotator.save_to(tmp_path / "labels.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.tif"), expected)

    again = open_annotator(annotator_2d, image, segmentation_result=read_labels(tmp_path / "labels.tif"))
    np.testing.assert_array_equal(again.views["committed_objects"].data, expected)
    again.objects_panel.refresh()
    again.objects_panel.select([1])
    again.objects_panel.correct()
    assert again.notices.history[-1].text.startswith("Correcting object 1:")
    views = again.views
    views["prompts"].add_rectangles(box_of(expected, 1))
    settle(again)
    press(again, "C")
    assert 1 in again.session.objects.ids
    assert len(again.session.objects.ids) == len(np.unique(expected)) - 1, "corrected in place, under its id"
    np.testing.assert_array_equal(session.labels["committed_objects"], expected)


def test_points_labels_and_clearing(open_annotator):
    from micro_sam.sam_annotator import annotator_2d

    annotator = open_annotator(annotator_2d, imageio.imread(DATA / "nuclei.png"))
    points = annotator.views["point_prompts"]
    points.add([60, 60])
    press(annotator, "T")
    points.add([10, 10])
    settle(annotator)
    assert list(points.features["label"]) == ["positive", "negative"], "the point that is there keeps its label"
    assert [p.positive for p in annotator.session.prompts.points] == [True, False]
    press(annotator, "Shift-C")
    assert annotator.session.prompts.is_empty
    assert len(points.data) == 0
    assert not annotator.session.labels["current_object"].any()
    press(annotator, "S")
    assert "Place a point" in annotator.notices.history[-1].text
    press(annotator, "C")
    assert "empty" in annotator.notices.history[-1].text


def test_3d_a_slice_then_all_slices_then_the_volume(open_annotator, tmp_path):
    from micro_sam.sam_annotator import annotator_3d

    volume = tifffile.imread(SHIPPED / "nuclei_3d.tif")[10:16]
    annotator = open_annotator(annotator_3d, volume)
    session, views = annotator.session, annotator.views
    annotator.viewer.dims.set_current_step(0, 2)
    annotator.auto_segment()
    settle(annotator)
    slice_labels = session.labels["auto_segmentation"].copy()
    assert slice_labels[2].any()
    assert not np.delete(slice_labels, 2, axis=0).any(), "only the slice that is shown"

    largest = int(np.bincount(slice_labels[2][slice_labels[2] > 0]).argmax())
    corners = box_of(slice_labels[2], largest)
    views["prompts"].add_rectangles(np.insert(corners, 0, 2.0, axis=1))
    settle(annotator)
    assert [int(z) for z in np.unique(np.nonzero(session.labels["current_object"])[0])] == [2]
    press(annotator, "Shift-S")
    planes = session.layer_editor("current_object").planes(1)
    assert 2 in planes
    assert len(planes) > 1
    press(annotator, "C")
    assert session.objects.planes(1) == planes
    press(annotator, "Control-Z")
    press(annotator, "Control-Shift-Z")
    assert session.objects.planes(1) == planes

    annotator.auto_panel.whole.setChecked(True)
    annotator.auto_segment()
    settle(annotator)
    assert len(np.unique(np.nonzero(session.labels["auto_segmentation"])[0])) > 1
    press(annotator, "C")
    assert session.objects.planes(1) == planes, "committed objects are kept"
    assert len(session.objects.ids) > 1
    annotator.save_to(tmp_path / "volume.tif")
    again = open_annotator(annotator_3d, volume, segmentation_result=read_labels(tmp_path / "volume.tif"))
    np.testing.assert_array_equal(again.views["committed_objects"].data, session.labels["committed_objects"])


def test_tracking_automatic_tracks_are_committed_with_their_lineage(open_annotator):
    from micro_sam.sam_annotator import annotator_tracking

    annotator = open_annotator(annotator_tracking, tifffile.imread(SHIPPED / "cells_tracking.tif")[:4])
    session = annotator.session
    assert annotator.views.plane == 0
    annotator.auto_panel.whole.setChecked(True)
    annotator.auto_segment()
    settle(annotator)
    press(annotator, "C")
    assert len(session.objects.ids) > 3
    assert max(t.last for t in session.objects.tracks.values()) == 3
    assert "tracks" in annotator.viewer.layers
    press(annotator, "Control-Z")
    assert session.objects.ids == []
    assert "tracks" not in annotator.viewer.layers


def test_series_goes_through_a_folder_saves_and_resumes(open_annotator, tmp_path):
    from micro_sam.sam_annotator import image_folder_annotator
    from micro_sam.sam_annotator.series_dock import SeriesDock

    image = imageio.imread(DATA / "nuclei.png")
    (tmp_path / "in").mkdir()
    for name, pixels in (("a", image), ("b", image[:90, :100]), ("c", imageio.imread(DATA / "tissue_rgb.png"))):
        imageio.imwrite(tmp_path / "in" / f"{name}.png", pixels)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    annotator = open_annotator(image_folder_annotator, tmp_path / "in", tmp_path / "out")
    dock = next(w for w in annotator.viewer.window._qt_window.findChildren(SeriesDock))
    assert [dock.list.count(), dock.entry.name] == [3, "a.png"]
    annotator.auto_segment()
    settle(annotator)
    press(annotator, "C")
    expected = annotator.session.labels["committed_objects"].copy()
    press(annotator, "N")
    assert dock.entry.name == "b.png"
    np.testing.assert_array_equal(read_labels(tmp_path / "out" / "a.tif"), expected)
    assert annotator.session.image.shape == (90, 100)
    assert not annotator.session.labels["committed_objects"].any(), "nothing of the last image is left"
    annotator.views["prompts"].add_rectangles([[20, 20], [20, 40], [40, 40], [40, 20]])
    settle(annotator)
    press(annotator, "N")
    assert dock.entry.name == "b.png", "it asks before it writes an empty result"
    dock._question.answered.emit("Skip")
    settle(annotator)
    assert dock.entry.name == "c.png"
    assert annotator.session.image.has_channels
    assert not (tmp_path / "out" / "b.tif").exists()
    annotator.shut_down()

    again = open_annotator(image_folder_annotator, tmp_path / "in", tmp_path / "out")
    dock = next(w for w in again.viewer.window._qt_window.findChildren(SeriesDock))
    assert dock.entry.name == "b.png", "the one that is done is passed over"
    assert len(again.session.prompts.shapes) == 1, "what was begun is here again"
    press(again, "Shift-N")
    dock._question.answered.emit("Skip")
    settle(again)
    assert dock.entry.name == "a.png"
    np.testing.assert_array_equal(again.views["committed_objects"].data, expected)


def test_a_cancelled_job_changes_nothing(open_annotator):
    from micro_sam.sam_annotator import annotator_3d

    annotator = open_annotator(annotator_3d, tifffile.imread(SHIPPED / "nuclei_3d.tif"))
    annotator.auto_panel.whole.setChecked(True)
    annotator.auto_segment()
    annotator.runner.wait(1)
    assert annotator.runner.busy
    annotator.cancel()
    settle(annotator)
    assert not annotator.session.labels["auto_segmentation"].any()
    assert not annotator.session.can_undo


def test_labels_are_corrected_before_they_are_written(monkeypatch, tmp_path, tiny_predictor, tiny_decoder):
    """The option `annotate`: the window opens with the labels, and what is there when it closes is written."""
    import napari

    from micro_sam.annotation.journal import find_journals, is_finished
    from micro_sam.automatic_segmentation import automatic_instance_segmentation
    from micro_sam.instance_segmentation import InstanceSegmentationWithDecoder
    from micro_sam.sam_annotator.annotator import active_annotator

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    shown = []

    def user():
        annotator = active_annotator()
        settle(annotator)
        shown.append(annotator.session.labels["committed_objects"].copy())
        corner = np.zeros((128, 160), int)
        corner[:5, :5] = 1
        annotator.session.set_labels("current_object", corner)
        annotator.session.commit(preserve="none")
        annotator.viewer.close()

    monkeypatch.setattr(napari, "run", user)
    labels = automatic_instance_segmentation(
        tiny_predictor, InstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder),
        imageio.imread(DATA / "nuclei.png"), tmp_path / "labels.tif", annotate=True, verbose=False,
    )
    assert labels[2, 2] == labels.max() == shown[0].max() + 1
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.tif"), labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels_automatic.tif"), shown[0])
    assert all(is_finished(path) for path in find_journals())
