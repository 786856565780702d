"""What the annotators of images, volumes and time series share: the panels, and what pressing a button does.

A widget reads its controls, calls the session, and shows the result; decisions about data are made in
`micro_sam.annotation`.
"""

import weakref
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from napari.layers import Image, Labels
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, Qt, QTimer
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QScrollArea, QSizePolicy, QVBoxLayout, QWidget

from ..annotation import opening, tasks
from ..annotation.defaults import panel_defaults
from ..annotation.journal import discard, summary
from ..annotation.prompts import PromptRefusal
from ..annotation.session import COMMITTED, AnnotationSession
from ..annotation.task import Task
from ..annotation.tracks import TrackSettings
from ..annotation.volume import VolumeSettings
from ..core.errors import MicroSamError
from . import form as forms
from .confidence_strip import ConfidenceView
from .help_overlay import HelpOverlay, canvas_of
from .jobs import JobRunner
from .keys import KeyBindings, bind
from .layers import POINTS, LayerViews, image_from_layer, is_left_behind
from .model_panel import EmbeddingPanel, EmbeddingRequest
from .notices import NoticeLine
from .objects_panel import ObjectsPanel
from .panels import AutoPanel, ClearPanel, CommitPanel, PromptPanel, Question, SegmentPanel
from .progress_view import ProgressView
from .torch_loading import keep_collection_short
from .tracks_panel import TracksPanel

LIVE_DELAY_MS = 30
FIT_DELAY_MS = 150  # until docks and canvas have their sizes
_ACTIVE: list["Annotator"] = []


def active_annotator() -> "Annotator | None":
    """The annotator that was made last and is still open."""
    return _ACTIVE[-1] if _ACTIVE else None


def _release(sessions: dict[Any, AnnotationSession], annotator: "weakref.ref[Annotator]", *_: Any) -> None:
    """Close the journals of an annotator that is gone, so that others may go on with them."""
    for session in sessions.values():
        session.close()
    if annotator() in _ACTIVE:
        _ACTIVE.remove(annotator())


class Annotator(QWidget):
    """The dock of an annotator.

    Args:
        viewer: The napari viewer.
        layer: The image to annotate; None takes the first one in the viewer that fits.
        begin: Whether to begin with an image at once.
        model_loader: Loads a model, by default `segmentation.workflow.load_model`.
    """

    mode = "2d"
    title = "Annotator 2d"
    _was_docked = _was_shown = False

    def __init__(
        self,
        viewer: Any,
        *,
        layer: Image | None = None,
        begin: bool = True,
        model_loader: Callable[..., Any] | None = None,
    ):
        super().__init__()
        keep_collection_short()
        # A viewer has one set of layers and keys: this annotator goes on with what another one has begun.
        for other in [annotator for annotator in _ACTIVE if annotator.viewer is viewer]:
            other.leave()
        self.viewer, self.model_loader = viewer, model_loader
        self.session: AnnotationSession | None = None
        self.views: LayerViews | None = None
        self._kept: dict[Any, AnnotationSession] = {}
        self.runner = JobRunner(self)
        self._keys: KeyBindings | None = None
        self._more_actions: dict[str, Callable[[], None]] = {}
        self._build()
        self.runner.failed.connect(lambda job, error: self.report(error))
        self._live_timer = forms.delayed(self, LIVE_DELAY_MS, self._follow_prompt)
        _ACTIVE.append(self)
        # A window that is closed deletes its docks without closing them.
        self.destroyed.connect(partial(_release, self._kept, weakref.ref(self)))
        viewer.window._qt_window.installEventFilter(self)
        if layer is not None:
            self.begin(layer)
        elif begin:
            self._begin_with_first_image()

    # Layout

    def _build(self) -> None:
        content = QWidget()
        layout = QVBoxLayout(content)
        layout.setContentsMargins(6, 6, 6, 6)
        self.question = QVBoxLayout()
        layout.addLayout(self.question)
        for panel in self._panels():
            layout.addWidget(panel)
        layout.addStretch()
        scroll = QScrollArea()
        scroll.setWidgetResizable(True)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setWidget(content)
        self._scroll = scroll
        self.notices, self.progress = NoticeLine(), ProgressView(self.runner)
        self.help = HelpOverlay(canvas_of(self.viewer), self.mode)
        footer = QHBoxLayout()
        footer.addWidget(self.notices, 1)
        button = forms.button("?", tooltip="Show the keys [H]")
        button.setFixedWidth(26)
        button.clicked.connect(self.help.toggle)
        footer.addWidget(button)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        outer.addWidget(scroll, 1)
        outer.addWidget(self.progress)
        outer.addLayout(footer)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Expanding)

    def _panels(self) -> list[QWidget]:
        self.embedding_panel = EmbeddingPanel(self.viewer, self.mode)
        self.embedding_panel.requested.connect(self.compute_embeddings)
        self.prompt_panel = PromptPanel(self.mode == "tracking")
        self.prompt_panel.label_changed.connect(lambda positive: self.views and self.views.choose_label(positive))
        self.segment_panel = SegmentPanel(self.mode)
        self.segment_panel.segment.clicked.connect(self.segment)
        self.auto_panel = AutoPanel(self.mode)
        self.auto_panel.start.clicked.connect(self.auto_segment)
        self.commit_panel = CommitPanel()
        self.commit_panel.commit.clicked.connect(self.commit)
        self.clear_panel = ClearPanel(self.mode)
        self.clear_panel.clear.clicked.connect(self.clear)
        self.clear_panel.undo.clicked.connect(self.undo)
        self.clear_panel.redo.clicked.connect(self.redo)
        self.clear_panel.save.clicked.connect(self.save)
        self.objects_panel = ObjectsPanel(self)
        self.followers: list[QWidget] = []
        if self.mode != "2d":
            self.confidence = ConfidenceView(self)
            self.segment_panel.body.addWidget(self.confidence)
            self.followers.append(self.confidence)
            self.segment_panel.segment_all.clicked.connect(self.segment_all)
        if self.mode == "tracking":
            self.tracks_panel = TracksPanel(self)
            self.followers.append(self.tracks_panel)
            self.prompt_panel.state_changed.connect(lambda state: self.views and self.views.choose_state(state))
            self.prompt_panel.track_changed.connect(
                lambda track: self.attempt(lambda: self.session.select_track(track))
            )
        return [
            self.embedding_panel, self.prompt_panel, self.segment_panel, self.auto_panel, self.commit_panel,
            self.clear_panel, *([self.tracks_panel] if self.mode == "tracking" else []), self.objects_panel,
        ]

    @property
    def actions(self) -> dict[str, Callable[[], None]]:
        """What keys do, by the names of `keys.key_map`."""
        actions = {
            "segment": self.segment, "commit": self.commit, "toggle_label": self.prompt_panel.toggle,
            "clear": self.clear, "undo": self.undo, "redo": self.redo, "cancel": self.cancel, "help": self.help.toggle,
        }
        return actions if self.mode == "2d" else actions | {"segment_all": self.segment_all}

    # The image

    def begin(
        self,
        layer: Image,
        segmentation: Any = None,
        parents: Mapping[int, int] | None = None,
        *,
        recover: bool = False,
    ) -> None:
        """Annotate the image of a layer. The annotation of another image is kept and shown again when one goes back.

        Args:
            layer: The layer.
            segmentation: Labels to begin with, as committed objects.
            parents: For tracks, the parent of each that has one.
            recover: Whether to go on with an unfinished annotation without asking; `segmentation` is not used then.
        """
        if self.views is not None and self.views.image_layer is layer:
            if segmentation is not None:
                self.session.set_labels(COMMITTED, segmentation, parents=parents)
            return
        image = image_from_layer(layer, self.mode)
        found = [] if segmentation is not None else self._labels_of_user(image.shape)
        recover |= any(is_left_behind(labels) for labels in found)
        session = self._kept.get(layer)
        if session is None:
            unfinished = opening.unfinished(image, self.mode)
            if recover and unfinished:
                session, segmentation, found = opening.recover(image, self.mode, unfinished[0]), None, []
                self.notices.info("Your last work on this image is here again.")
            else:
                session = opening.start(image, self.mode)
                if unfinished:
                    self._offer_recovery(layer, image, unfinished[0])
            self._kept[layer] = session
        self._show(layer, session)
        if segmentation is not None:
            session.set_labels(COMMITTED, segmentation, parents=parents)
        elif found and self.attempt(session.set_labels, COMMITTED, found[0].data) is not None:
            if found[0] in self.viewer.layers:  # what an annotator has left is gone already
                self.viewer.layers.remove(found[0])

    def forget(self, layer: Image) -> None:
        """Close the annotation of an image that is not shown any more; its journal stays."""
        session = self._kept.pop(layer, None)
        if session is not None:
            session.close()

    def hand_over(self, layer: Image) -> AnnotationSession:
        """Give the session of an image to the caller, who closes it: it stays open when the window is closed."""
        return self._kept.pop(layer)

    def add_actions(self, actions: Mapping[str, Callable[[], None]]) -> None:
        """Bind the keys of more actions, those of a series of images."""
        self._more_actions = dict(actions)
        self.help.set_mode(self.mode, series=True)
        if self.views is not None:
            self._bind_keys()

    def _bind_keys(self) -> None:
        if self._keys is not None:
            self._keys.unbind()
        self._keys = bind(
            self.viewer, [self.views.image_layer, *self.views], self.actions | self._more_actions, mode=self.mode,
            series=bool(self._more_actions),
        )

    def _show(self, layer: Image, session: AnnotationSession) -> None:
        self.runner.cancel_all()
        if self.views is not None:
            self.views.close(remove=True)
        self.session = session
        self.views = LayerViews(self.viewer, session, layer, self._prompted, self._layer_created)
        self._bind_keys()
        self.views.choose_label(self.prompt_panel.positive)
        session.events.message.connect(self._show_notice)
        session.events.model.connect(self._show_model)
        session.events.history.connect(self._show_history)
        session.events.state.connect(self._show_state)
        session.events.labels.connect(self.objects_panel.refresh_later)
        for widget in self.followers:
            widget.follow(session)
        self.viewer.layers.selection.active = self.views[POINTS]
        if self.mode == "tracking":
            self.viewer.dims.set_current_step(0, 0)
        self._show_model()
        self._show_history()
        self._show_state()
        self.objects_panel.refresh_later()

    def _begin_with_first_image(self) -> None:
        for layer in [layer for layer in self.viewer.layers if isinstance(layer, Image)]:
            self.attempt(self.begin, layer, needs_image=False)
            return
        self.notices.info("Open an image, choose a model, and press 'Compute Embeddings'.")

    def _labels_of_user(self, shape: tuple[int, ...]) -> list[Labels]:
        """A layer of the user that is named like the committed objects is what they want to go on with."""
        ours = set() if self.views is None else {id(self.views[COMMITTED])}
        return [
            layer for layer in self.viewer.layers
            if isinstance(layer, Labels) and layer.name == COMMITTED and id(layer) not in ours
            and np.shape(layer.data) == tuple(shape)
        ]

    def _offer_recovery(self, layer: Image, image: Any, path: Path) -> None:
        known = summary(path)
        moment = known.last_change
        when = "" if moment is None else f", last change {datetime.fromtimestamp(moment):%d %b %H:%M}"
        question = Question(
            f"An annotation of '{image.name}' was not saved: {forms.counted(known.n_objects, 'object')}, "
            f"{forms.counted(known.n_actions, 'action')}{when}.", ("Recover", "Discard"),
        )

        def answer(text: str) -> None:
            question.setParent(None)
            if text == "Discard":
                discard(path)
                return
            empty = self._kept.get(layer)
            session = opening.recover(image, self.mode, path)
            self._kept[layer] = session
            if empty is not None:
                empty.close()
            self._show(layer, session)
            self.notices.info(f"Recovered {forms.counted(known.n_actions, 'action')}.")

        question.answered.connect(lambda text: self.attempt(answer, text))
        self.question.addWidget(question)

    # Buttons and keys

    def compute_embeddings(self, request: EmbeddingRequest) -> None:
        """Load the model and compute the embeddings of the chosen image."""
        self.attempt(self._compute_embeddings, request, needs_image=False)

    def _compute_embeddings(self, request: EmbeddingRequest) -> None:
        self.begin(request.image)
        self.open_model(tasks.open_model(
            self.session, **request.options, plane=self.views.plane, load=self.model_loader,
        ))

    def open_model(self, task: Task, then: Callable[[], None] = lambda: None) -> None:
        """Run a task of `tasks.open_model`, then compute the other embeddings in the background."""
        self._run(task, key="embed", on_done=lambda _: (self._embed_rest(), then()))

    def _embed_rest(self) -> None:
        self.notices.info("Ready: click on an object.")
        if self.session.n_planes is not None and not self.session.embeddings.complete:
            self._run(tasks.embed_rest(self.session), key="embed_rest", background=True)

    def segment(self) -> None:
        """Segment the object from its prompts in the plane that is shown."""
        self._start(self._segment_task, "segment")

    def _segment_task(self, live: bool = False) -> Task:
        return tasks.segment(
            self.session, self.views.plane, batched=self._batched(), live=live,
            drop_specks=self.segment_panel.drop_specks.isChecked(),
        )

    def segment_all(self) -> None:
        """Segment the object in all slices or frames."""
        settings = self.segment_panel.settings()

        def make():
            if self.mode == "tracking":
                return tasks.segment_track(self.session, TrackSettings(**settings))
            return tasks.segment_volume(self.session, VolumeSettings(**settings), batched=self._batched())

        self._start(make, "segment_all")

    def auto_segment(self) -> None:
        """Segment all objects in the plane that is shown, or everywhere."""
        settings = self.auto_panel.settings()
        whole = self.auto_panel.whole is not None and self.auto_panel.whole.isChecked()

        def make():
            if whole and self.mode == "tracking":
                return tasks.auto_track(self.session, settings)
            return tasks.auto_segment(self.session, settings, None if whole else self.views.plane)

        def done(n_objects: int) -> None:
            if n_objects:
                self.notices.info(f"Found {forms.counted(n_objects, 'object')}. Check what was found, then commit.")
                self.commit_panel.layer.setCurrentText("auto_segmentation")

        self._start(make, "auto", done)

    def commit(self) -> None:
        """Commit the chosen layer."""
        panel = self.commit_panel
        layer = panel.layer.currentText()
        result = self.attempt(lambda: self.session.commit(
            layer, panel.preserve.currentText(), panel.threshold.value(), panel.path.path
        ))
        if result is not None:
            more = f"; {len(result.rejected)} rejected, as they cover committed objects" if result.rejected else ""
            self.notices.info(f"Committed {forms.counted(len(result.ids), 'object')}{more}.")
            self.commit_panel.layer.setCurrentText("current_object")

    def clear(self) -> None:
        """Remove prompts and current object, everywhere or in the plane that is shown."""
        box = self.clear_panel.everywhere
        self.attempt(lambda: self.session.clear(None if box is None or box.isChecked() else self.views.plane))

    def undo(self) -> None:
        self._travel(lambda: self.session.undo(), "Undone", "There is nothing to undo.")

    def redo(self) -> None:
        self._travel(lambda: self.session.redo(), "Repeated", "There is nothing to repeat.")

    def cancel(self) -> None:
        """Cancel what is running in the foreground, or else everything."""
        self.runner.cancel_all(background=not any(not job.background for job in self.runner.jobs))

    def save(self) -> None:
        """Ask for a file and write the committed objects to it."""
        path, _ = QFileDialog.getSaveFileName(self, "Save committed objects", "labels.tif", "Labels (*.tif *.zarr)")
        if path:
            self.save_to(path)

    def save_to(self, path: str | Path) -> None:
        """Write the committed objects to a file."""
        written = self.attempt(lambda: self.session.save(path))
        if written is not None:
            self.notices.info(f"Saved {written}.")

    def measure(self, on_done: Callable[[Any], None]) -> None:
        """Measure the committed objects in the background."""
        self._start(lambda: tasks.measure(self.session), "measure", on_done)

    def score(self, on_done: Callable[[Any], None]) -> None:
        """Ask the model how sure it is of the objects that have no score yet."""
        self._start(lambda: tasks.score(self.session), "score", on_done)

    def report(self, error: BaseException) -> None:
        """Show an error: what is wrong and what to do."""
        if isinstance(error, PromptRefusal):
            self.notices.warning(str(error))
        else:
            self.notices.show_error(error)

    def showEvent(self, event: Any) -> None:
        """A dock that is narrower than its content would hide the ends of all fields."""
        super().showEvent(event)
        bar = self._scroll.verticalScrollBar().sizeHint().width()
        self._scroll.setMinimumWidth(self._scroll.widget().minimumSizeHint().width() + bar + 4)
        if not self._was_shown:
            self._was_shown = True
            QTimer.singleShot(FIT_DELAY_MS, self._fit_view)

    def _fit_view(self) -> None:
        """The dock has taken room from the canvas: show the whole image in what is left."""
        if self in _ACTIVE and isalive(self):
            self.viewer.reset_view()

    def closeEvent(self, event: Any) -> None:
        """Stop all work; what was done is in the journals."""
        self.shut_down()
        super().closeEvent(event)

    def event(self, event: Any) -> bool:
        """The x of its dock takes an annotator out of the window without closing it."""
        if event.type() == QEvent.Type.ParentChange:
            if self._was_docked and self.parent() is None:
                self.shut_down()
            self._was_docked = self.parent() is not None
        return super().event(event)

    def eventFilter(self, watched: Any, event: Any) -> bool:
        """Shut down with the window, unless the user does not confirm that it is to be closed."""
        if event.type() == QEvent.Type.Close:
            QTimer.singleShot(0, lambda: self._follow_window(watched))
        return super().eventFilter(watched, event)

    def _follow_window(self, window: Any) -> None:
        if not isalive(window) or not window.isVisible():
            self.shut_down()

    def leave(self) -> None:
        """Shut down and go out of the window; the layers stay until another annotator takes over."""
        self.shut_down()
        try:
            self.viewer.window.remove_dock_widget(self)
        except LookupError:  # it is in no dock
            self.close()

    def shut_down(self) -> None:
        """Stop all work, close the journals, give keys back."""
        if self not in _ACTIVE:
            return
        _ACTIVE.remove(self)
        if self._keys is not None:
            self._keys.unbind()
        if self.views is not None:
            self.views.close()
        if isalive(self.runner):
            self.runner.close()
        for session in self._kept.values():
            session.close()

    # Helpers

    def _layer_created(self, layer: Any) -> None:
        if self._keys is not None:
            self._keys.add_layer(layer)

    def _batched(self) -> bool:
        return self.segment_panel.batched is not None and self.segment_panel.batched.isChecked()

    def _prompted(self) -> None:
        self.commit_panel.layer.setCurrentText("current_object")
        if self.segment_panel.live.isChecked() and self.session.embeddings is not None:
            self._live_timer.start()

    def _follow_prompt(self) -> None:
        try:
            task = self._segment_task(live=True)
        except PromptRefusal:
            return  # half a set of prompts is no mistake while the user is still placing them
        self._run(task, key="segment")

    def _start(self, make: Callable[[], Task], key: str, on_done: Callable[[Any], None] | None = None) -> None:
        task = self.attempt(make)
        if task is not None:
            self._run(task, key=key, on_done=on_done)

    def _run(self, task: Task, **options: Any) -> None:
        self.runner.start(task, **options)

    def _travel(self, move: Callable[[], str | None], done: str, nothing: str) -> None:
        self.runner.cancel_all(background=False)
        name = self.attempt(move)
        self.notices.info(nothing if name is None else f"{done}: {name}.")

    def attempt(self, function: Callable, *args: Any, needs_image: bool = True) -> Any:
        """Call a function; errors are shown to the user instead of raised, and give None."""
        if needs_image and self.session is None:
            self.notices.warning("Open an image first.")
            return None
        try:
            return function(*args)
        except MicroSamError as error:
            self.report(error)
            return None

    def _show_notice(self, level: str, text: str) -> None:
        self.notices.show_notice(level, text, important=level == "error")

    def _show_model(self) -> None:
        model = self.session.model
        self.embedding_panel.set_next(model is None)
        if model is None:
            return
        name = self.session.embeddings.describe()["model_name"]
        if self.mode != "2d" and name != self.auto_panel.model:
            self.segment_panel.set_settings(panel_defaults(name).nd)
        self.auto_panel.show_mode(model.mode, name)

    def _show_history(self) -> None:
        self.clear_panel.undo.setEnabled(self.session.can_undo)
        self.clear_panel.redo.setEnabled(self.session.can_redo)
        name = self.session.next_undo
        self.clear_panel.undo.setToolTip(f"Undo: {name} [Ctrl+Z]" if name else "Ctrl+Z")

    def _show_state(self) -> None:
        correcting = self.session.correcting
        text = "Commit [C]" if correcting is None else f"Replace object {correcting} [C]"
        self.commit_panel.commit.setText(text)
        if self.mode == "tracking":
            self.prompt_panel.set_tracks(sorted(self.session.lineage), self.session.track_id)

