"""The dock of the object classifier: paint on some objects, and get a class for each of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QSizePolicy, QVBoxLayout, QWidget

from ..annotation.classifier import ClassifierSession
from ..annotation.classifier_objects import Prediction
from ..annotation.model_choice import EmbeddingRequest
from ..annotation.task import Task
from ..core.errors import MicroSamError, UnsafeCheckpointError
from .class_list import ClassList, class_colormap
from .form import SPACING, add_row, button, choice, delayed, group, hint, set_options
from .jobs import JobRunner
from .layer_events import follow_layers
from .model_panel import EmbeddingPanel
from .notices import NoticeLine
from .panels import Question
from .progress_view import ProgressView
from .scroll_column import ScrollColumn

if TYPE_CHECKING:
    import napari

IMAGE, SEGMENTATION, ANNOTATIONS, PREDICTION = "image", "segmentation", "annotations", "prediction"
_COUNT_AFTER_MS = 250
_MAX_COUNTED = 2**26  # pixels up to which annotated objects are counted while the user paints
_FILES = "Classifier (*.npz);;Classifier of an older version (*.joblib);;All files (*)"


class ObjectClassifier(QWidget):
    """The dock of the object classifier.

    Args:
        viewer: The napari viewer.
        session: The session; None makes one.
        model_loader: Loads a model, by default `segmentation.workflow.load_model`.
    """

    title = "Object Classifier"

    def __init__(
        self,
        viewer: "napari.viewer.Viewer",
        *,
        session: ClassifierSession | None = None,
        model_loader: Callable[..., Any] | None = None,
    ):
        super().__init__()
        self.viewer, self.model_loader = viewer, model_loader
        self.session = session or ClassifierSession()
        self.layers: dict[str, Any] = {}
        self._image_layer: Any = None
        self._is_making = False  # layers that are made here are no news
        self._kept: dict[Any, np.ndarray] = {}  # the strokes on other images, by layer
        self.runner = JobRunner(self)
        self.runner.failed.connect(lambda job, error: self.notices.show_error(error))
        for signal in (self.runner.started, self.runner.finished, self.runner.failed, self.runner.cancelled):
            signal.connect(self._show_busy)
        self._build()
        self._count_timer = delayed(self, _COUNT_AFTER_MS, self._recount)
        self._restore_timer = delayed(self, 0, self._restore)
        self.session.events.classes.connect(self._show_classes)
        self.session.events.prediction.connect(self._show_prediction)
        self.session.events.embeddings.connect(self._show_state)
        viewer.layers.events.removed.connect(self._restore_later)
        self._begin_first()

    def _begin_first(self) -> None:
        follow_layers(self.viewer, self._refresh_segmentations)
        self.embedding_panel.image.currentIndexChanged.connect(self.begin)
        self.segmentation.currentIndexChanged.connect(self.begin)
        self._refresh_segmentations()
        self.begin()

    # Layout

    def _build(self) -> None:
        column = ScrollColumn()
        layout = column.body
        self.question = QVBoxLayout()
        layout.addLayout(self.question)
        for box in self._boxes():
            layout.addWidget(box)
        layout.addStretch()
        self.notices, self.progress = NoticeLine(), ProgressView(self.runner)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        for widget in (column, self.progress, self.notices):
            outer.addWidget(widget)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Expanding)

    def _boxes(self) -> list[QWidget]:
        return [self._image_box(), self._class_box(), self._classifier_box()]

    def _image_box(self, show_image: bool = True) -> QWidget:
        box, rows = group("Image and Model")
        self.embedding_panel = EmbeddingPanel(self.viewer, None, show_image=show_image)
        self.segmentation = choice(tooltip="The objects to classify: a layer with one label per object")
        if show_image:
            add_row(self.embedding_panel.layout().itemAt(0).layout(), "Segmentation:", self.segmentation)
        # How objects would be found is of no interest here: they are there.
        automatic = self.embedding_panel.segmentation
        automatic.parentWidget().layout().setRowVisible(automatic, False)
        rows.addRow(self.embedding_panel)
        self.embedding_panel.requested.connect(self.compute_embeddings)
        return box

    def _class_box(self) -> QWidget:
        box, rows = group("Classes")
        rows.addRow(hint("Choose a class, and paint on some of its objects in the layer 'annotations'."))
        self.classes = ClassList()
        self.classes.chosen.connect(self.paint_with)
        self.classes.renamed.connect(lambda i, name: self.attempt(self.session.rename_class, i, name))
        self.classes.added.connect(self._add_class)
        rows.addRow(self.classes)
        self.train = button(
            "Train and Predict", tooltip="Learn from the objects that are painted on, and classify all objects"
        )
        self.train.clicked.connect(self.train_and_predict)
        rows.addRow(self.train)
        return box

    def _classifier_box(self) -> QWidget:
        box, rows = group("Classifier")
        self.classifier_state = hint()
        rows.addRow(self.classifier_state)
        self.predict = button("Predict", tooltip="Classify all objects with the classifier as it is")
        self.export = button("Export Classifier…", tooltip="Store the classifier with the names of its classes")
        self.load = button("Load Classifier…", tooltip="Use a classifier that was exported before")
        self.predict.clicked.connect(self.predict_objects)
        self.export.clicked.connect(self._ask_export)
        self.load.clicked.connect(self._ask_load)
        files = QHBoxLayout()
        files.setSpacing(SPACING)
        files.addWidget(self.export)
        files.addWidget(self.load)
        rows.addRow(self.predict)
        rows.addRow(files)
        return box

    # The image

    def _refresh_segmentations(self, *_: Any) -> None:
        if self._is_making:
            return
        from napari.layers import Labels
        own = [id(layer) for layer in self.layers.values()]
        found = [layer for layer in self.viewer.layers if isinstance(layer, Labels) and id(layer) not in own]
        before = self.segmentation.currentData()
        set_options(self.segmentation, [(layer.name, layer) for layer in found], before)
        if self.segmentation.currentData() is not before:
            self.begin()

    def begin(self, *_: Any) -> None:
        """Classify the objects of the chosen layers. Strokes on another image are kept for when one comes back."""
        image, labels = self.embedding_panel.image.currentData(), self.segmentation.currentData()
        if self._is_making:
            return
        if image is None or labels is None:
            self.notices.info("Open an image and its segmentation (a labels layer).")
            return
        self.runner.cancel_all()
        pixels = labels.data[0] if labels.multiscale else labels.data
        if image is self._image_layer:
            self.attempt(self.session.set_segmentation, pixels)
            labels.contour = labels.contour or 1
            return
        if self._image_layer is not None:
            self._kept[self._image_layer] = self.session.annotations
        strokes = self._kept.get(image)
        if strokes is not None and strokes.shape != pixels.shape:
            strokes = None
        try:
            self.session.set_image(
                image.data[0] if image.multiscale else image.data, pixels, image.name, annotations=strokes
            )
        except MicroSamError as error:
            self.notices.warning(str(error))
            return
        self.notices.clear()
        self._make_layers(image, labels)

    def _make_layers(self, image: Any, labels: Any) -> None:
        """Show the strokes and the prediction of the session, where the image is, and the objects as outlines."""
        self._image_layer = image
        self._is_making = True
        try:
            self._remove_layers()
            ndim, shape = self.session.annotations.ndim, self.session.annotations.shape
            place = {"scale": image.scale[-ndim:], "translate": image.translate[-ndim:]}
            place["colormap"] = class_colormap()
            self.layers[PREDICTION] = self.viewer.add_labels(
                np.zeros(shape, np.uint8), name=PREDICTION, opacity=0.5, **place
            )
            self.layers[ANNOTATIONS] = self.viewer.add_labels(
                self.session.annotations, name=ANNOTATIONS, opacity=1.0, **place
            )
        finally:
            self._is_making = False
        labels.contour = labels.contour or 1  # their colours would hide those of the classes
        self._arrange_annotations()
        self._refresh_segmentations()
        self._show_classes()

    def _remove_layers(self) -> None:
        old, self.layers = self.layers, {}
        for layer in old.values():
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)

    def _arrange_annotations(self) -> None:
        layer = self.layers[ANNOTATIONS]
        layer.brush_size = 3
        layer.selected_label = 1
        layer.mode = "paint"
        layer.events.selected_label.connect(lambda _: self.classes.choose(layer.selected_label))
        for event in (layer.events.paint, layer.events.labels_update, layer.events.data):
            event.connect(self._count_later)
        self.viewer.layers.selection.active = layer

    def _restore_later(self, event: Any) -> None:
        # Not at once: a viewer that is closed or cleared removes layers until there are none.
        if any(layer is event.value for layer in self.layers.values()):
            self._restore_timer.start()

    def _restore(self) -> None:
        """The strokes belong to the session: a layer that is deleted comes back, unless the image is gone too."""
        if self._image_layer not in self.viewer.layers:
            return
        for name in [name for name, layer in self.layers.items() if layer not in self.viewer.layers]:
            layer = self.layers[name]
            self._is_making = True
            try:
                self.viewer.add_layer(layer)
            finally:
                self._is_making = False
            if name == ANNOTATIONS:
                self.viewer.layers.selection.active = layer
                self.notices.info("The annotations are needed. Erase strokes with the eraser of the layer.")

    # Buttons

    def compute_embeddings(self, request: EmbeddingRequest) -> None:
        """Load the model and compute the embeddings of the image."""
        self._start(lambda: self.embed_task(request), "embed", lambda _: self._embedded())

    def embed_task(self, request: EmbeddingRequest) -> Task:
        """The task to load the model and to compute the embeddings of the image."""
        options = {name: value for name, value in request.options.items() if name != "mode"}
        return self.session.embed_task(**options, load=self.model_loader)

    def _embedded(self) -> None:
        if self.session.classifier is not None and not self.session.has_strokes:
            self.predict_objects()
        else:
            self.notices.info("Ready: paint on some objects of each class, then press 'Train and Predict'.")

    def train_and_predict(self) -> None:
        """Learn from the strokes and classify all objects."""
        self._take_strokes()
        self._start(self.session.train_task, "classify", self._predicted)

    def predict_objects(self) -> None:
        """Classify all objects with the present classifier."""
        self._take_strokes()
        self._start(self.session.predict_task, "classify", self._predicted)

    def _predicted(self, prediction: Prediction) -> None:
        parts = [f"{c.n_predicted} {c.name}" for c in self.session.classes() if c.n_predicted]
        text = f"{len(prediction.ids)} objects: {', '.join(parts)}."
        if prediction.warnings:
            self.notices.warning(f"{text} {' '.join(prediction.warnings)}")
        else:
            self.notices.success(text)

    def paint_with(self, class_id: int) -> None:
        """Make the brush paint with a class."""
        if ANNOTATIONS in self.layers:
            layer = self.layers[ANNOTATIONS]
            layer.selected_label, layer.mode = class_id, "paint"
            self.viewer.layers.selection.active = layer

    def _add_class(self) -> None:
        class_id = self.session.add_class()
        self.paint_with(class_id)
        self._show_classes()

    def export_to(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path | None:
        """Store the classifier in a file."""
        written = self.attempt(self.session.export, path, overwrite=overwrite)
        if written is not None:
            self.notices.success(f"The classifier is in {written}.")
        return written

    def load_from(self, path: str | os.PathLike, *, trusted: bool = False) -> None:
        """Use a classifier from a file; one that could run code is loaded only after a question."""
        try:
            self.session.load(path, trusted=trusted)
        except UnsafeCheckpointError:
            self.ask(
                f"{path} was written by an older version. Loading such a file can run any code. Load it only if you "
                "know where it comes from.",
                {"Load": lambda: self.load_from(path, trusted=True), "Cancel": lambda: None},
            )
            return
        except MicroSamError as error:
            self.notices.show_error(error)
            return
        self.notices.success(f"Loaded {path}.")
        self._show_state()
        if self.session.embeddings is not None:
            self.predict_objects()

    def _ask_export(self) -> None:
        if self.session.classifier is None:
            self.attempt(self.session.named_classifier)
            return
        path, _ = QFileDialog.getSaveFileName(self, "Export the classifier", "classifier.npz", _FILES.split(";;")[0])
        if path:
            self.export_to(path, overwrite=True)  # the dialog has asked

    def _ask_load(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Load a classifier", "", _FILES)
        if path:
            self.load_from(path)

    def ask(self, text: str, answers: dict[str, Callable[[], None]]) -> Question:
        """Ask a question in the dock; each answer does something."""
        question = Question(text, list(answers))

        def answer(chosen: str) -> None:
            question.setParent(None)
            answers[chosen]()

        question.answered.connect(answer)
        self.question.addWidget(question)
        return question

    # Showing

    def _count_later(self, *_: Any) -> None:
        if self.session.annotations.size <= _MAX_COUNTED:
            self._count_timer.start()

    def _recount(self) -> None:
        self._take_strokes()
        self._show_classes()

    def _show_classes(self, *_: Any) -> None:
        if self.session.annotations is None:
            return
        layer = self.layers.get(ANNOTATIONS)
        self.classes.show_classes(self.session.classes(), 1 if layer is None else layer.selected_label)
        self._show_state()

    def _show_prediction(self) -> None:
        layer, prediction = self.layers.get(PREDICTION), self.session.prediction
        if layer is not None:
            shape = self.session.annotations.shape
            layer.data = np.zeros(shape, np.uint8) if prediction is None else prediction.image

    def _show_busy(self, *_: Any) -> None:
        self.embedding_panel.set_busy(any(job.key == "embed" for job in self.runner.jobs))

    def _show_state(self) -> None:
        session = self.session
        self.embedding_panel.set_state("" if session.embeddings is None else "Embeddings are ready.")
        self.train.setEnabled(session.embeddings is not None)
        self.predict.setEnabled(session.classifier is not None and session.embeddings is not None)
        self.export.setEnabled(session.classifier is not None)
        if session.classifier is None:
            self.classifier_state.setText("Not trained yet.")
            return
        names = [session.class_name(int(i)) for i in session.classifier.classes_]
        self.classifier_state.setText(f"Tells apart: {', '.join(names)}.")

    # Helpers

    def _take_strokes(self) -> None:
        """The layer normally shows the session's own array; another one may have been put into it."""
        layer = self.layers.get(ANNOTATIONS)
        if layer is not None and layer.data is not self.session.annotations:
            if layer.data.shape == self.session.annotations.shape:
                self.session.annotations = layer.data

    def _start(self, make: Callable[[], Task], key: str, on_done: Callable[[Any], None]) -> None:
        task = self.attempt(make)
        if task is not None:
            self.runner.start(task, key=key, on_done=on_done)

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function; errors are shown to the user instead of raised, and give None."""
        try:
            return function(*args, **kwargs)
        except MicroSamError as error:
            self.notices.show_error(error)
            return None

    def closeEvent(self, event: Any) -> None:
        """Stop all work."""
        self.runner.close()
        super().closeEvent(event)


def is_rgb(image: Any) -> bool:
    """Whether napari can show the channels of an image as colours."""
    return image.has_channels and image.data.shape[-1] == 3


def embedding_request(
    model_type: str, checkpoint_path: Any, device: Any, tile_shape: Any, halo: Any, save_path: Any = None
) -> EmbeddingRequest:
    """What a launch function asks for."""
    return EmbeddingRequest(
        image=None, model=model_type if checkpoint_path is None else None,
        checkpoint=None if checkpoint_path is None else Path(checkpoint_path),
        device="auto" if device is None else str(device), save_path=None if save_path is None else Path(save_path),
        tile_shape=tile_shape, halo=halo,
    )
