"""What scripts and other people's tests know of the annotators: `AnnotatorState` and a few widgets."""

import os
import subprocess
import sys

import numpy as np
import pytest
import zarr

from micro_sam._test_util import check_layer_initialization
from micro_sam.core.errors import EmbeddingCacheError, InvalidInputError, NotInitializedError
from micro_sam.sam_annotator._state import AnnotatorState
from micro_sam.segmentation.workflow import LoadedModel

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    AnnotatorState().reset_state()
    yield
    AnnotatorState().reset_state()


@pytest.fixture
def initialize(tiny_predictor, tiny_decoder):
    """Calls `initialize_predictor` with the tiny model, which has no published name."""
    def initialize(image, ndim=2, **options):
        options = {"predictor": tiny_predictor, "decoder": tiny_decoder} | options
        AnnotatorState().initialize_predictor(image, "vit_t", ndim, **options)
        return AnnotatorState()
    return initialize


# Without an annotator


def test_state_without_an_annotator(initialize, cells_image, tiny_predictor, tiny_decoder):
    state = AnnotatorState()
    assert state.initialized_for_interactive_segmentation() is False
    state.image_shape = cells_image.shape
    with pytest.raises(RuntimeError, match="image_embeddings, predictor missing"):
        state.initialized_for_interactive_segmentation()
    initialize(cells_image)
    assert state.initialized_for_interactive_segmentation() is True
    assert state.image_shape == cells_image.shape
    assert state.predictor.model is tiny_predictor.model
    assert state.decoder is tiny_decoder
    assert state.image_embeddings["features"].shape == (1, 256, 16, 16)
    assert set(state.image_embeddings) >= {"features", "input_size", "original_size"}
    assert state.embedding_path is state.amg is state.z_range is state.annotator is None
    assert state.data_signature

    assert state.initialized_for_tracking() is False
    state.current_track_id = 1
    with pytest.raises(RuntimeError, match="lineage, committed_lineages, widgets"):
        state.initialized_for_tracking()
    state.lineage, state.committed_lineages, state.widgets = {1: {}}, [], {"tracking": object()}
    assert AnnotatorState().initialized_for_tracking() is True

    state.reset_state()
    assert state.initialized_for_interactive_segmentation() is False
    assert state.current_track_id is state.predictor is state.image_shape is None


def test_embeddings_and_prepared_segmentation_on_disk(initialize, tmp_path, cells_image):
    volume, path = np.stack([cells_image, cells_image[::-1]]), tmp_path / "embeddings.zarr"
    calls = []
    state = initialize(volume, 3, save_path=path, precompute_amg_state=True,
                       pbar_init=lambda total, text: calls.append(text), pbar_update=lambda n: calls.append(n))
    assert state.embedding_path == str(path)
    assert sorted(state.amg_state) == [0, 1]
    assert state.image_embeddings["features"].shape == (2, 1, 256, 16, 16)
    assert any("embeddings" in c for c in calls if isinstance(c, str))
    assert 1 in calls
    assert (path / "is_state.h5").exists()
    # Embeddings that are ready are taken as they are.
    ready = state.image_embeddings
    state = initialize(volume, 3, save_path=ready)
    assert state.image_embeddings is ready
    assert state.embedding_path is None


def test_segmenter_is_there_once_it_is_prepared(initialize, tmp_path, cells_image):
    state = initialize(cells_image, save_path=tmp_path / "e.zarr", precompute_amg_state=True)
    labels = state.amg.generate(min_size=0, foreground_threshold=0.3)
    assert labels.shape == cells_image.shape
    assert labels.any()
    initialize(cells_image, prefer_decoder=False)
    assert state.decoder is None


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"ndim": 4}, InvalidInputError, "ndim must be 2 or 3"),
    ({"precompute_amg_state": True}, EmbeddingCacheError, "save_path"),
    ({"ndim": 3}, InvalidInputError, "3d"),
])
def test_mistakes_are_named_before_work(initialize, cells_image, options, error, text):
    with pytest.raises(error, match=text):
        initialize(cells_image, **options)
    assert AnnotatorState().predictor is None


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="image_emb"):
        AnnotatorState().image_emb  # noqa: B018 - the access is what is tested
    with pytest.raises(AttributeError, match="image_emb"):
        AnnotatorState().image_emb = 3


def test_no_qt_is_loaded():
    code = (
        "import sys; from micro_sam.sam_annotator._state import AnnotatorState;"
        "assert AnnotatorState().predictor is None;"
        "assert not {'napari', 'qtpy', 'magicgui'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# With annotators


@pytest.fixture
def viewer():
    import napari
    viewer = napari.Viewer(show=False)
    yield viewer
    viewer.close()


@pytest.fixture
def open_annotator(viewer, tiny_predictor, tiny_decoder):
    from micro_sam.sam_annotator.annotator_2d import Annotator2d
    from micro_sam.sam_annotator.annotator_3d import Annotator3d
    from micro_sam.sam_annotator.annotator_tracking import AnnotatorTracking
    kinds, opened = {"2d": Annotator2d, "3d": Annotator3d, "tracking": AnnotatorTracking}, []

    def open_annotator(mode, image, **options):
        layer = viewer.add_image(image, name="image", **options)
        annotator = kinds[mode](
            viewer, layer=layer, model_loader=lambda *a, **k: LoadedModel(tiny_predictor, tiny_decoder, "ais")
        )
        opened.append(annotator)
        return annotator

    yield open_annotator
    for annotator in opened:
        annotator.shut_down()


@pytest.mark.gui
def test_state_follows_the_annotator(open_annotator, initialize, cells_image):
    alone = initialize(cells_image[:40])
    annotator = open_annotator("2d", cells_image, scale=(2, 3))
    state = AnnotatorState()
    check_layer_initialization(annotator.viewer, cells_image.shape)
    assert state.annotator is annotator
    assert state.predictor is None, "what a script made before is not that of the annotator"
    assert (state.image_shape, state.image_scale, state.image_name) == (cells_image.shape, (2, 3), "image")
    assert state.initialized_for_tracking() is False
    assert set(state.widgets) == {"embeddings", "prompts", "segment", "autosegment", "commit", "clear"}
    with pytest.raises(InvalidInputError, match=r"\(128, 160\).*\(128, 159\)"):
        initialize(cells_image[:, :-1])

    initialize(cells_image)
    assert annotator.session.model.predictor is state.predictor
    annotator.auto_segment()
    assert annotator.runner.wait(60)
    assert state.amg.generate(min_size=0).shape == cells_image.shape
    with pytest.raises(AttributeError, match="belongs to the annotator"):
        state.image_shape = (3, 4)
    annotator.session.set_labels("committed_objects", np.ones(cells_image.shape, int))
    state.reset_state()
    assert state.predictor is state.image_embeddings is None
    assert annotator.session.labels["committed_objects"].all(), "resetting loses no work"
    with pytest.raises(NotInitializedError, match="Compute Embeddings"):
        annotator.session.require_model()

    annotator.shut_down()
    assert alone.predictor is not None
    assert alone.image_shape == (40, 160)


@pytest.mark.gui
def test_state_of_tracks(open_annotator, cells_image):
    annotator = open_annotator("tracking", np.stack([cells_image] * 3))
    state = AnnotatorState()
    assert state.initialized_for_tracking() is True
    assert (state.current_track_id, state.lineage, state.committed_lineages) == (1, {1: []}, [])
    tracks = np.zeros((3, 128, 160), int)
    tracks[0, :9, :9], tracks[1:, :4, :9], tracks[1:, 5:9, :9], tracks[1:, 50:60, :9] = 1, 2, 3, 7
    annotator.session.set_labels("committed_objects", tracks, parents={2: 1, 3: 1})
    assert state.committed_lineages == [{1: [2, 3], 2: [], 3: []}, {7: []}]
    annotator.session.set_labels("current_object", np.where(tracks == 2, 1, 0))
    assert state.z_range == (1, 2)
    with pytest.raises(InvalidInputError, match="no track 4"):
        state.current_track_id = 4


@pytest.mark.gui
def test_name_of_the_image(viewer):
    with pytest.raises(RuntimeError, match="no image"):
        AnnotatorState().get_image_name(viewer)
    viewer.add_labels(np.zeros((4, 4), int), name="labels")
    viewer.add_image(np.zeros((4, 4)), name="nuclei")
    assert AnnotatorState().get_image_name(viewer) == "nuclei"


# Widgets


@pytest.mark.gui
def test_fields_are_attributes(qapp):
    from micro_sam.sam_annotator._widgets import _WidgetBase

    class Form(_WidgetBase):
        pass

    form = Form()
    text, row = form._add_string_param("name", "cells", title="Name", tooltip="What it is called")
    path, _ = form._add_path_param("folder", "/tmp/x", "directory")
    form.layout().addLayout(row)
    assert (form.name, form.folder, text.toolTip()) == ("cells", "/tmp/x", "What it is called")
    text.setText("nuclei")
    path.setText("/tmp/y")
    assert (form.name, form.folder) == ("nuclei", "/tmp/y")
    text.clear()
    path.clear()
    assert form.name == ""
    assert form.folder is None
    with pytest.raises(InvalidInputError, match="select_type"):
        form._add_path_param("folder", None, "socket")


@pytest.fixture
def qapp():
    from napari.qt import get_qapp
    return get_qapp()


@pytest.mark.gui
def test_embedding_widget(qapp, tmp_path, cells_image, tiny_checkpoint):
    from napari.layers import Image

    from micro_sam.sam_annotator._widgets import EmbeddingWidget
    widget, path = EmbeddingWidget(), tmp_path / "embeddings"
    with pytest.raises(InvalidInputError, match="image"):
        widget(skip_validate=True)
    widget.image, widget.model_type, widget.device = Image(cells_image), "vit_t", "cpu"
    widget.embeddings_save_path, widget.custom_weights = str(path), tiny_checkpoint
    assert (widget.model_type, widget.device, widget.embeddings_save_path) == ("vit_t", "cpu", path)
    widget(skip_validate=True)
    state = AnnotatorState()
    assert state.predictor is not None
    assert set(state.image_embeddings) >= {"features", "input_size", "original_size"}
    assert {"zarr.json", "features"} <= set(os.listdir(path))
    stored = zarr.open_group(path, mode="r")
    assert stored["features"].shape == (1, 256, 16, 16)
    assert tuple(stored.attrs["original_size"]) == cells_image.shape
    assert stored.attrs["data_signature"] == state.data_signature
    widget.embeddings_save_path = path / "zarr.json"
    with pytest.raises(InvalidInputError, match="is a file"):
        widget()


@pytest.mark.gui
def test_settings_widget_has_the_name_of_the_manifest(qapp):
    from micro_sam.sam_annotator._widgets import settings_widget
    assert settings_widget().update_button.text() == "Update Settings"
