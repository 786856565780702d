"""The object classifier in a real viewer: layers, painting, training in a worker, files, series; needs a screen."""

import os

import numpy as np
import pytest
import tifffile

QApplication = pytest.importorskip("qtpy.QtWidgets").QApplication
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def viewer():
    import napari
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1300, 900)
    yield viewer
    viewer.close()


def shot(viewer, name):
    """A picture of the window, for people; only if a folder is given."""
    QApplication.processEvents()
    if folder := os.environ.get("MICROSAM_SHOTS"):
        import imageio.v3 as imageio
        imageio.imwrite(f"{folder}/{name}.png", viewer.screenshot(canvas_only=False, flash=False))


@pytest.fixture
def loader(tiny_predictor):
    from micro_sam.segmentation.workflow import LoadedModel
    return lambda *given: LoadedModel(tiny_predictor, None, "amg")


def stroke(widget, object_id, class_id):
    """Paint on an object with the layer's own brush."""
    widget.paint_with(class_id)
    layer = widget.layers["annotations"]
    at = np.argwhere(np.asarray(widget.session.segmentation) == object_id)
    layer.paint(tuple(at[len(at) // 2]), class_id)


def embed(widget):
    widget.embedding_panel.compute.click()
    assert widget.runner.wait(200)
    assert widget.session.embeddings is not None, widget.notices.history


def test_from_the_menu_to_classes(viewer, loader, cells_image, cells_labels, tmp_path):
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier

    widget = ObjectClassifier(viewer, model_loader=loader)
    viewer.window.add_dock_widget(widget, area="right")
    assert "Open an image" in widget.notices.history[-1].text
    viewer.add_image(cells_image, name="cells", scale=(0.5, 0.5))
    viewer.add_labels(cells_labels, name="objects", scale=(0.5, 0.5))
    assert [layer.name for layer in viewer.layers] == ["cells", "objects", "prediction", "annotations"]
    annotations, prediction = widget.layers["annotations"], widget.layers["prediction"]
    assert (annotations.mode, annotations.brush_size, annotations.data.dtype) == ("paint", 3, np.uint32)
    assert annotations.data is widget.session.annotations
    assert tuple(annotations.scale) == tuple(prediction.scale) == (0.5, 0.5)
    assert [widget.segmentation.itemText(i) for i in range(widget.segmentation.count())] == ["objects"]
    assert not widget.train.isEnabled()

    embed(widget)
    assert widget.train.isEnabled()
    widget.train.click()
    assert "Paint on some objects" in widget.notices.history[-1].text
    ids = [int(i) for i in np.unique(cells_labels)[1:]]
    stroke(widget, ids[0], 1)
    stroke(widget, ids[-1], 2)
    stroke(widget, ids[1], 2)
    annotations.undo()
    widget._show_classes()
    assert [widget.classes.counts[i][0].text() for i in (1, 2)] == ["1", "1"]
    widget.classes.names[1].setText("round")
    widget.classes.names[1].editingFinished.emit()
    widget.train.click()
    assert widget.runner.wait(100)
    assert set(np.unique(prediction.data)) <= {0, 1, 2}
    np.testing.assert_array_equal(prediction.data > 0, np.isin(cells_labels, widget.session.prediction.ids))
    assert f"{len(ids)} objects: " in widget.notices.history[-1].text
    assert "round" in widget.notices.history[-1].text
    shot(viewer, "classifier")

    path = widget.export_to(tmp_path / "mine.npz")
    assert path.is_file()
    viewer.layers.remove(annotations)
    QApplication.processEvents()
    assert widget.layers["annotations"] in viewer.layers, "the strokes come back"
    assert widget.layers["annotations"].data is widget.session.annotations
    assert widget.session.has_strokes
    viewer.layers.clear()
    QApplication.processEvents()
    assert len(viewer.layers) == 0, "but not when everything is cleared"


def test_another_segmentation_keeps_the_strokes_and_forgets_the_prediction(viewer, loader, cells_image, cells_labels):
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier

    viewer.add_image(cells_image, name="cells")
    viewer.add_labels(cells_labels, name="objects")
    widget = ObjectClassifier(viewer, model_loader=loader)
    embed(widget)
    stroke(widget, int(cells_labels.max()), 1)
    widget.train.click()
    assert widget.runner.wait(100)
    other = viewer.add_labels(np.where(cells_labels > 0, cells_labels.astype(int) + 100, 0), name="others")
    widget.segmentation.setCurrentIndex(widget.segmentation.findText("others"))
    assert widget.session.segmentation is other.data
    assert not widget.layers["prediction"].data.any()
    widget.train.click()
    assert widget.runner.wait(100)
    assert min(widget.session.prediction.ids) > 100
    viewer.add_image(cells_image[:50], name="small")
    widget.embedding_panel.image.setCurrentIndex(widget.embedding_panel.image.findText("small"))
    assert "shape" in widget.notices.history[-1].text
    assert widget.session.has_strokes, "what does not fit changes nothing"


def test_the_menu_of_segmentations_follows_names(viewer, loader, cells_image, cells_labels):
    """Names of layers from before the panel, and of those that come later; the oldest napari tells them differently."""
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier

    viewer.add_image(cells_image, name="cells")
    first = viewer.add_labels(cells_labels, name="objects")
    widget = ObjectClassifier(viewer, model_loader=loader)
    second = viewer.add_labels(cells_labels, name="others")
    first.name, second.name = "nuclei", "cytoplasm"
    names = {widget.segmentation.itemText(i) for i in range(widget.segmentation.count())}
    assert {"nuclei", "cytoplasm"} <= names
    assert not {"objects", "others"} & names


def test_files_that_could_run_code_are_asked_about(viewer, loader, cells_image, cells_labels, tmp_path):
    import joblib
    from qtpy.QtWidgets import QPushButton

    from micro_sam.object_classification import train_object_classifier
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier

    viewer.add_image(cells_image)
    viewer.add_labels(cells_labels)
    widget = ObjectClassifier(viewer, model_loader=loader)
    embed(widget)
    forest = train_object_classifier(np.random.default_rng(0).normal(size=(20, 257)), np.arange(20) % 2 + 4)
    joblib.dump(forest, tmp_path / "rf.joblib")
    widget.load_from(tmp_path / "rf.joblib")
    assert widget.session.classifier is None
    question = widget.question.itemAt(0).widget()
    shot(viewer, "classifier_question")
    next(b for b in question.findChildren(QPushButton) if b.text() == "Load").click()
    assert widget.runner.wait(100)
    assert set(widget.session.prediction.classes) <= {4, 5}
    widget.load_from(tmp_path / "missing.npz")
    assert "no file" in widget.notices.history[-1].text


def test_launch_functions(viewer, cells_image, cells_labels, tiny_checkpoint, rgb_image):
    from micro_sam.core.errors import InvalidInputError
    from micro_sam.sam_annotator.object_classifier import ObjectClassifier, object_classifier

    def dock():
        return viewer.window._qt_window.findChildren(ObjectClassifier)[-1]

    given = object_classifier(
        cells_image, cells_labels, viewer=viewer, return_viewer=True, checkpoint_path=tiny_checkpoint,
        tile_shape=(64, 64), halo=(16, 16), device="cpu",
    )
    assert given is viewer
    assert [layer.name for layer in viewer.layers] == ["image", "segmentation", "prediction", "annotations"]
    assert dock().session.embeddings["input_size"] is None, "tiles"
    assert dock().embedding_panel.checkpoint.path == tiny_checkpoint
    with pytest.raises(InvalidInputError, match="shape"):
        object_classifier(rgb_image, cells_labels[:9], viewer=viewer, return_viewer=True)


def test_a_series_with_keys(viewer, loader, tiny_predictor, cells_image, cells_labels, rgb_image, tmp_path):
    from micro_sam.annotation.classifier import ClassifierSession
    from micro_sam.annotation.classifier_series import ClassifierSeries
    from micro_sam.sam_annotator.classifier_dock import embedding_request
    from micro_sam.sam_annotator.classifier_series_dock import SeriesClassifier

    images, labels = [cells_image, rgb_image], [cells_labels, cells_labels[::-1].copy()]
    series = ClassifierSeries(ClassifierSession(), images, labels, tmp_path)
    widget = SeriesClassifier(viewer, series, model_loader=loader)
    viewer.window.add_dock_widget(widget, area="right")
    widget.begin_series(embedding_request("vit_t_lite", None, "cpu", None, None))
    assert widget.runner.wait(200)
    assert not widget.back.isEnabled()
    ids = [int(i) for i in np.unique(cells_labels)[1:]]
    stroke(widget, ids[0], 1)
    stroke(widget, ids[-1], 2)
    for owner in (viewer, widget.layers["annotations"]):
        assert owner.keymap.get("N") or any(str(key) == "N" for key in owner.keymap), "N works in any layer"
    widget.next.click()
    assert widget.runner.wait(200)
    assert series.index == 1
    assert widget.session.prediction is not None, "the classifier of the first image is used for the second at once"
    assert [layer.name for layer in viewer.layers] == ["image", "segmentation", "prediction", "annotations"]
    assert viewer.layers["image"].rgb
    shot(viewer, "classifier_series")
    widget.next.click()
    assert widget.runner.wait(200)
    assert widget.question.count() == 1
    for i in range(2):
        assert tifffile.imread(tmp_path / f"prediction_{i}.tif").any()
    assert len(np.load(tmp_path / "labels.npy")) == 2
    widget.go(-1)
    assert widget.runner.wait(200)
    assert widget.session.has_strokes
    assert series.index == 0
