"""Going through a series of images: the list with status and thumbnails, back and forth, results written on the way."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from qtpy.QtCore import QSize, Qt
from qtpy.QtGui import QIcon, QImage, QPixmap
from qtpy.QtWidgets import QHBoxLayout, QLabel, QListWidget, QListWidgetItem, QVBoxLayout, QWidget

from ..annotation import tasks
from ..annotation.embedding_source import EmbeddingSource
from ..annotation.geometry import AnnotationImage
from ..annotation.series import Series, SeriesEntry
from ..annotation.session import COMMITTED
from ..annotation.task import Task
from ..annotation.thumbnails import thumbnail
from ..core.errors import MicroSamError
from ..core.progress import Step
from . import form as forms
from .annotator import Annotator
from .jobs import JobRunner
from .layers import IMAGE
from .panels import Question
from .tooltips import get_tooltip

THUMBNAIL = 48
_MARKS = {"todo": "○", "in progress": "◐", "done": "●", "unreadable": "✕"}


class SeriesDock(QWidget):
    """The images of a series, beside an annotator that shows one of them.

    Args:
        annotator: The annotator; it shares its runner, so that one model serves all images.
        series: The images.
        model: What to load, the arguments of `tasks.open_model`.
        prepare_automatic: Whether to prepare the automatic segmentation of each image, too.
    """

    def __init__(
        self, annotator: Annotator, series: Series, model: Mapping[str, Any], *, prepare_automatic: bool = False
    ):
        super().__init__()
        self.annotator, self.series, self._model = annotator, series, dict(model)
        self._model["prepare_automatic"] = prepare_automatic
        self._reader = JobRunner(self)
        self._loaded: Any = None
        self._question: Question | None = None
        self.entry: SeriesEntry | None = None
        layout = QVBoxLayout(self)
        self.state = QLabel()
        layout.addWidget(self.state)
        self.list = QListWidget()
        self.list.setIconSize(QSize(THUMBNAIL, THUMBNAIL))
        self.list.setMinimumHeight(3 * (THUMBNAIL + 4))
        self.list.setToolTip("Double-click an image to save this one and go there.")
        self.list.itemActivated.connect(lambda item: self.jump(self.list.row(item)))
        layout.addWidget(self.list, 1)
        self._place = QVBoxLayout()
        layout.addLayout(self._place)
        row = QHBoxLayout()
        self.back = forms.button("Previous", tooltip=get_tooltip("image_series_annotator", "previous"))
        self.next = forms.button("Next Image [N]", tooltip=get_tooltip("image_series_annotator", "next"))
        self.back.clicked.connect(self.go_back)
        self.next.clicked.connect(self.go_on)
        row.addWidget(self.back)
        row.addWidget(self.next)
        layout.addLayout(row)
        for entry in series:
            self.list.addItem(QListWidgetItem(entry.name))
        self._refresh()
        self._load_thumbnails()

    # Going through the images

    def start(self) -> bool:
        """Show the first image that is not done; returns whether there is one."""
        first = self.series.first_open()
        if first is None:
            self.annotator.notices.info("All images are done.")
            return False
        return self.open(first)

    def go_on(self) -> None:
        """Save the image and show the next one."""
        self._leave(lambda: self.series.next(self.entry.index))

    def go_back(self) -> None:
        """Save the image and show the one before, done or not."""
        self._leave(lambda: self.series.previous(self.entry.index))

    def jump(self, index: int) -> None:
        """Save the image and show another one."""
        if self.entry is None or index != self.entry.index:
            self._leave(lambda: self.series.jump(index))

    def open(self, entry: SeriesEntry) -> bool:
        """Show an image. One that cannot be read is passed over; returns whether any could be shown."""
        while entry is not None:
            try:
                self._show(entry)
                return True
            except MicroSamError as error:
                self.annotator.notices.warning(f"{entry.name} is passed over: {error}")
                self.series.mark_unreadable(entry, str(error))
                self._refresh()
                entry = self.series.next(entry.index)
        self.annotator.notices.info("This was the last image.")
        return False

    def save(self, then: Callable[[], None] = lambda: None, *, overwrite: bool = False) -> None:
        """Write the committed objects of this image in the background, then do something else."""
        entry, session = self.entry, self.annotator.session
        labels = session.labels[COMMITTED].copy()

        def steps():
            yield Step(0, 1, f"Save {entry.name}")
            done = self.series.finish(entry, labels, overwrite=overwrite)
            yield Step(1, 1, f"Save {entry.name}")
            return done

        def apply(done: SeriesEntry) -> None:
            session.note_saved(done.output)
            self.entry = done
            self._refresh()
            then()

        self.annotator.runner.start(Task("Save", steps, apply, uses_model=False), key="save")

    # Parts

    def _leave(self, find: Callable[[], SeriesEntry | None]) -> None:
        """Save if there is something to save, and go to another image."""
        if self.entry is None or self._question is not None:
            return
        session = self.annotator.session
        questions = {q.code: q.text for q in self.series.questions(self.entry, session.labels[COMMITTED])}
        if "replace" in questions:
            self._ask(questions["replace"], "Replace it", find)
        elif "empty" not in questions or self.entry.status == "done":
            self.save(partial(self._go, find))
        else:
            more = any(session.layer_editor(layer).ids for layer in ("current_object", "auto_segmentation"))
            text = " What is segmented was not committed." if more else ""
            self._ask(questions["empty"] + text, "Save as empty", find)

    def _ask(self, text: str, save: str, find: Callable[[], SeriesEntry | None]) -> None:
        question = self._question = Question(text, (save, "Skip", "Stay"))

        def answer(choice: str) -> None:
            question.setParent(None)
            self._question = None
            if choice == save:
                self.save(partial(self._go, find), overwrite=True)
            elif choice == "Skip":
                self._go(find)

        question.answered.connect(answer)
        self._place.addWidget(question)

    def _go(self, find: Callable[[], SeriesEntry | None]) -> None:
        entry = self.annotator.attempt(find)
        if entry is None:
            left = len(self.series.remaining())
            self.annotator.notices.info(f"This was the last image; {left} are not done." if left else "All are done.")
            return
        self.open(entry)

    def _show(self, entry: SeriesEntry) -> None:
        annotator, viewer = self.annotator, self.annotator.viewer
        found = self.series.open(entry)
        image = AnnotationImage.create(
            found.data, mode=annotator.mode, rgb=found.has_channels or None, name=entry.name, scale=found.scale
        )
        labels = self.series.load_result(entry, image.shape)
        if labels is None:
            labels = self.series.load_initial(entry, image.shape)
        old = None if annotator.views is None else annotator.views.image_layer
        annotator.runner.cancel_all()
        layer = viewer.add_image(
            image.array, name=entry.name, rgb=image.has_channels and image.array.shape[-1] == 3,
            **({} if image.scale is None else {"scale": image.scale}),
        )
        annotator.begin(layer, labels, recover=True)
        if old is not None:
            annotator.forget(old)
            if old in viewer.layers:
                viewer.layers.remove(old)
        layer.name = IMAGE
        viewer.layers.move(viewer.layers.index(layer), 0)
        viewer.reset_view()
        self.entry = entry
        self._refresh()
        options = {**self._model, "save_path": str(entry.embedding_path) if entry.embedding_path else "auto"}
        annotator.open_model(tasks.open_model(
            annotator.session, **options, plane=annotator.views.plane, load=self._load_once
        ), then=self._embed_next)

    def _load_once(self, *args: Any, **kwargs: Any) -> Any:
        if self._loaded is None:
            from ..segmentation.workflow import load_model
            self._loaded = (self.annotator.model_loader or load_model)(*args, **kwargs)
        return self._loaded

    def _embed_next(self) -> None:
        """Compute the embeddings of the next image in the background, into its cache."""
        following = self.series.next(self.entry.index)
        if following is None or self._loaded is None:
            return
        save_path = following.embedding_path or "auto"
        tiling = {name: self._model.get(name) for name in ("tile_shape", "halo")}
        loaded, mode, series = self._loaded, self.annotator.mode, self.series

        def steps():
            found = series.open(following)
            image = AnnotationImage.create(found.data, mode=mode, rgb=found.has_channels or None, name=following.name)
            model = loaded.for_prompts(image.plane_shape, **tiling, store=save_path)
            yield from EmbeddingSource(model, image, save_path=save_path, **tiling).prepare_steps()

        # An image that cannot be read says so when it is shown.
        self.annotator.runner.start(
            Task(f"Prepare {following.name}", steps, lambda _: None), key="prepare", background=True,
        )

    def _refresh(self) -> None:
        counts = self.series.counts()
        self.state.setText(f"{counts['done']} of {len(self.series)} done")
        for row, entry in enumerate(self.series):
            item = self.list.item(row)
            item.setText(f"{_MARKS[entry.status]}  {entry.name}")
            item.setToolTip(entry.note or entry.status)
            font = item.font()
            font.setBold(self.entry is not None and entry.index == self.entry.index)
            item.setFont(font)
        if self.entry is not None:
            self.list.setCurrentRow(self.entry.index)
            self.list.scrollToItem(self.list.item(self.entry.index))
            self.back.setEnabled(self.entry.index > 0)

    def _load_thumbnails(self) -> None:
        entries = list(self.series)

        def steps():
            pictures = []
            yield Step(0, len(entries), "Read thumbnails")
            for k, entry in enumerate(entries, 1):
                try:
                    pictures.append(thumbnail(entry.source, THUMBNAIL))
                except MicroSamError:
                    pictures.append(None)
                yield Step(k, len(entries), "Read thumbnails")
            return pictures

        def apply(pictures: list[np.ndarray | None]) -> None:
            for row, picture in enumerate(pictures):
                if picture is not None:
                    self.list.item(row).setIcon(_icon(picture))

        # A runner of its own: going to another image cancels the jobs of the annotator.
        self._reader.start(Task("Read thumbnails", steps, apply, uses_model=False))


def _icon(picture: np.ndarray) -> QIcon:
    height, width = picture.shape[:2]
    data = np.ascontiguousarray(picture)
    image = QImage(data.data, width, height, 3 * width, QImage.Format.Format_RGB888).copy()
    pixmap = QPixmap.fromImage(image).scaled(
        THUMBNAIL, THUMBNAIL, Qt.AspectRatioMode.KeepAspectRatio, Qt.TransformationMode.SmoothTransformation
    )
    icon = QIcon(pixmap)
    icon.addPixmap(pixmap, QIcon.Mode.Selected)  # Qt would tint that of the chosen row
    return icon

