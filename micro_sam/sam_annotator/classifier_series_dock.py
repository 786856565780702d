"""The object classifier on a series of images: Next and Back, and results in files."""

from typing import Any

import numpy as np
from qtpy.QtWidgets import QHBoxLayout, QWidget

from ..annotation.classifier_series import ClassifierSeries, SeriesImage
from ..annotation.model_choice import EmbeddingRequest
from ..annotation.task import Task
from .classifier_dock import IMAGE, SEGMENTATION, ObjectClassifier, is_rgb
from .form import button, group, hint
from .keys import KeyBindings, bind


class SeriesClassifier(ObjectClassifier):
    """The dock of the object classifier for a series.

    Args:
        viewer: The napari viewer.
        series: The series; its session is used.
        options: More arguments of `ObjectClassifier`.
    """

    def __init__(self, viewer: Any, series: ClassifierSeries, **options: Any):
        self.series = series
        self._shown: list[Any] = []
        self._bindings: KeyBindings | None = None
        super().__init__(viewer, session=series.session, **options)

    def _begin_first(self) -> None:
        """Images are shown by `begin_series`."""

    def _boxes(self) -> list[QWidget]:
        return [self._series_box(), self._image_box(show_image=False), self._class_box(), self._classifier_box()]

    def _series_box(self) -> QWidget:
        box, rows = group("Series")
        self.position = hint()
        rows.addRow(self.position)
        self.back = button("Back", tooltip="Classify the objects, save, and go back one image [Shift + N]")
        self.next = button("Next Image [N]", tooltip="Classify the objects, save, and go to the next image")
        self.back.clicked.connect(lambda: self.go(-1))
        self.next.clicked.connect(lambda: self.go(1))
        row = QHBoxLayout()
        row.addWidget(self.back)
        row.addWidget(self.next, 1)
        rows.addRow(row)
        return box

    def begin_series(self, request: EmbeddingRequest | None = None) -> None:
        """Show the first image that is not finished.

        Args:
            request: How embeddings are computed, which then begins at once; None waits for the button.
        """
        if request is not None:
            self.embedding_panel.set_values(
                model=request.model, checkpoint=request.checkpoint, device=request.device,
                tile_shape=request.tile_shape, halo=request.halo,
            )
        self._open(None, embed=request is not None)

    def go(self, step: int) -> None:
        """Classify and save this image, then go to another one; after the last one say where the results are."""
        index = self.series.index + step
        if index < 0 or self.runner.busy:
            return
        self._take_strokes()
        self._start(self.series.finish_task, "classify", lambda _: self._go_on(index))

    def _go_on(self, index: int) -> None:
        if index < len(self.series.images):
            self._open(index, embed=True)
            return
        self._show_position()
        self.ask(
            f"All {len(self.series.images)} images are done. The results are in {self.series.folder}.",
            {"Close napari": self.viewer.close, "Stay": lambda: None},
        )

    def _open(self, index: int | None, *, embed: bool) -> None:
        item = self.attempt(self.series.open, index)
        if item is None:
            return
        self._remove_layers()
        for layer in self._shown:
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
        session = self.session
        image = self.viewer.add_image(session.image.data, name=IMAGE, rgb=is_rgb(session.image))
        labels = self.viewer.add_labels(np.asarray(session.segmentation), name=SEGMENTATION)
        self._shown = [image, labels]
        self._make_layers(image, labels)
        if self._bindings is not None:
            self._bindings.unbind()
        actions = {"next_image": lambda: self.go(1), "previous_image": lambda: self.go(-1)}
        self._bindings = bind(self.viewer, list(self.viewer.layers), actions, mode="2d", series=True)
        self._show_position()
        if session.embeddings is not None:
            self._embedded()
        elif embed:
            self._start(lambda: self._series_embed_task(item), "embed", lambda _: self._embedded())

    def embed_task(self, request: EmbeddingRequest) -> Task:
        """The task to load the model and to compute the embeddings of the image that is shown."""
        return self._series_embed_task(self.series.current)

    def _series_embed_task(self, item: SeriesImage) -> Task:
        options = {n: v for n, v in self.embedding_panel.values().options.items() if n not in ("mode", "save_path")}
        path = "auto" if item.embeddings is None or isinstance(item.embeddings, dict) else item.embeddings
        return self.session.embed_task(**options, save_path=path, load=self.model_loader)

    def _show_position(self) -> None:
        series = self.series
        self.position.setText(
            f"{series.current.name}: {series.index + 1} of {len(series.images)}, {len(series.finished)} finished"
        )
        self.back.setEnabled(series.index > 0)
        self.next.setText("Save and Finish [N]" if series.is_last else "Next Image [N]")
