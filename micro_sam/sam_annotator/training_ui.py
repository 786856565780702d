"""The finetuning panel: choose data, check them, train, and see whether the model became better."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtGui import QImage
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QVBoxLayout, QWidget

from ..annotation.task import Task
from ..core.errors import InvalidInputError, MicroSamError, OutputExistsError
from ..core.progress import Step, Steps, drain
from ..training.plan import (
    CheckedJob,
    FormError,
    TrainingForm,
    TrainingStep,
    check_form,
    check_steps,
    finetune_steps,
    plan_training,
    register_result,
)
from .form import accent, button, delayed
from .jobs import Job, JobRunner
from .loss_plot import LossPlot
from .model_panel import EmbeddingPanel
from .notices import COLOURS, NoticeLine, notify
from .progress_view import ProgressView, readable_time
from .scroll_column import ScrollColumn
from .torch_loading import load_module, load_torch
from .training_form import TrainingFields
from .training_results import ResultBox, RichText, report_html

if TYPE_CHECKING:
    from ..training.job import FinetuneJob, FinetuneResult

# A result and a press change much in the window. What can wait for a moment does, so that all is drawn in short turns.
_DISABLE_AFTER_MS, _SCROLL_AFTER_MS, _CHECK_AFTER_SECONDS = 30, 60, 0.15
# The notification of napari is for those who look elsewhere, not for those who go on in the panel before this time.
_ANNOUNCE_AFTER_MS = 1000
# A window that is drawn for the first time loads libraries, too, and would wait until those of torch are loaded.
_LOAD_AFTER_SECONDS = 1.0
# What checking the data and training need, in the order in which they need each other.
_MODULES = ("micro_sam.segmentation.workflow", "micro_sam.training.training", "micro_sam.training.job")


class TrainingWidget(QWidget):
    """The dock of the finetuning.

    Args:
        parent: The widget that it lies in.
    """

    title = "Finetuning"

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.runner = JobRunner(self)
        self._checked: tuple[TrainingForm, CheckedJob] | None = None
        self._training: CheckedJob | None = None
        self._scroll_target: QWidget | None = None
        self._announcement: tuple[str, str] | None = None
        self._scroll_timer = delayed(self, _SCROLL_AFTER_MS, self._scroll)
        self._announce_timer = delayed(self, _ANNOUNCE_AFTER_MS, lambda: notify(*self._announcement))
        self._busy_timer = delayed(self, _DISABLE_AFTER_MS, lambda: self.fields.setEnabled(not self._is_busy))
        self._build()
        self.runner.progressed.connect(self._show_step)
        self.runner.failed.connect(self._failed)
        self.runner.cancelled.connect(self._cancelled)
        for signal in (self.runner.started, self.runner.finished, self.runner.failed, self.runner.cancelled):
            signal.connect(self._show_busy)
        self.runner.started.connect(lambda *_: self._announce_timer.stop())
        self.fields.device.currentIndexChanged.connect(self.find_configuration)
        self._show_next()
        self.find_configuration()

    def _build(self) -> None:
        column = self.column = ScrollColumn()
        layout = column.body
        self.fields = TrainingFields()
        for show in (self._forget_problems, self._show_next):
            self.fields.changed.connect(show)
        self.problem = QLabel()
        self.problem.setWordWrap(True)
        self.problem.setStyleSheet(f"color: {COLOURS['error']}")
        self.problem.hide()
        self.check = button("Check Data", tooltip="Read the images and labels, and say what is wrong with them")
        self.start = button("Start Training", tooltip="Check the data, train, and compare the model with the start")
        self.check.clicked.connect(self.check_data)
        self.start.clicked.connect(self.start_training)
        buttons = QHBoxLayout()
        buttons.addWidget(self.check)
        buttons.addWidget(self.start, 1)
        self.report, self.plot, self.result = RichText(), LossPlot(), ResultBox()
        self.status = RichText()
        self.plot.hide()
        layout.addWidget(self.fields)
        layout.addWidget(self.problem)
        layout.addLayout(buttons)
        for widget in (self.report, self.plot, self.status, self.result):
            layout.addWidget(widget)
        layout.addStretch()
        self.notices, self.progress = NoticeLine(), ProgressView(self.runner)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        for widget in (column, self.progress, self.notices):
            outer.addWidget(widget)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Expanding)

    # What buttons do

    def find_configuration(self, *_: Any) -> None:
        """Find out in the background, as it loads torch, which devices there are and which preset suits the one."""
        device = self.fields.values().device

        def steps() -> Steps[tuple[str, list[str]]]:
            yield Step(0, 1, "Look at the hardware")
            time.sleep(_LOAD_AFTER_SECONDS)
            load_torch()
            from ..core.settings import available_devices
            from ..training.configurations import choose_configuration
            return choose_configuration(device), available_devices()

        def done(found: tuple[str, list[str]]) -> None:
            self.fields.show_hardware(*found)
            self._load_training()

        task = Task("Look at the hardware", steps, lambda found: found, uses_model=False)
        self.runner.start(task, key="configuration", background=True, on_done=done)

    def _load_training(self) -> None:
        """Load in the background what the buttons need, so that the first press does not wait for it."""

        def steps() -> Steps[None]:
            for done, name in enumerate(_MODULES):
                yield Step(done, len(_MODULES), "Load the training")
                load_module(name)

        task = Task("Load the training", steps, lambda _: None, uses_model=False)
        self.runner.start(task, key="configuration", background=True)

    def check_data(self) -> None:
        """Check fields and data, and show the report."""
        self._check(lambda checked: None)

    def start_training(self) -> None:
        """Check, unless that was done with the same fields, and train if there are no problems."""
        form = self.fields.values()
        if self._checked is not None and self._checked[0] == form:
            self._train(self._checked[1])
        else:
            self._check(self._train)

    def _check(self, then: Callable[[CheckedJob], None]) -> None:
        form = self.fields.values()
        self._forget_problems()
        problems = check_form(form)
        if problems:
            self._show_problems(problems)
            return

        def done(checked: CheckedJob) -> None:
            self._checked = form, checked
            self._show_next()
            self.report.show_html(report_html(checked.report, f"Data: {checked.job.data.description}"))
            self._scroll_to(self.report)
            if checked.report.ok:
                self.notices.success("The data are fine." if not checked.report.warnings else "The data can be used.")
                then(checked)
            else:
                self.notices.show_notice("error", "The data have problems, see the report.")

        def steps() -> Steps[CheckedJob]:
            time.sleep(_CHECK_AFTER_SECONDS)
            return (yield from check_steps(form))

        task = Task("Check data", steps, lambda checked: checked, uses_model=False)
        self.runner.start(task, key="train", on_done=done)

    def _train(self, checked: CheckedJob) -> None:
        if not checked.report.ok:
            self.notices.show_notice("error", "The data have problems, see the report.")
            return
        self._training = checked
        self.report.show_html("")
        self.plot.clear()
        self.plot.hide()
        self.result.clear()
        self.status.show_html("")
        picture = checked.job.folder / "outcome.png"

        def steps() -> Steps[tuple["FinetuneResult", QImage]]:
            result = yield from finetune_steps(checked.job)
            return result, QImage(str(picture))  # read here, as the window would wait for it

        task = Task("Finetune", steps, lambda found: found, uses_model=False)
        self.runner.start(task, key="train", on_done=lambda found: self._trained(checked.job, picture, *found))

    def _trained(self, job: "FinetuneJob", picture: Path, result: "FinetuneResult", image: QImage) -> None:
        self.status.show_html("")
        try:
            spec, note = register_result(job, result), ""
        except MicroSamError as error:
            spec, note = None, f"The model is in {result.output}, but could not be added to the menus: {error}"
        if spec is not None:
            note = f"The model is '{spec.name}' in the menus ('My models') and in {result.output}."
            self._refresh_menus()
        elif result.output is None:
            note = (
                f"It became worse, so it is not in the menus; it is kept in {result.checkpoint}. Check the labels, or "
                "train longer. To use it anyway, choose so in the advanced settings, and go on with this training."
            )
        self.result.show_outcome(result.report, image, picture, note)
        self._scroll_to(self.result)
        self.fields.existing_choice = "refuse"
        level = {"better": "success", "same": "info", "worse": "warning"}[result.report["verdict"]]
        notice = self.notices.show_notice(level, f"Finetuning is done. {note}", result.report["text"])
        self._announcement = notice.level, notice.text
        self._announce_timer.start()

    def _refresh_menus(self) -> None:
        """Menus of models in this window offer the finetuned one."""
        self.fields.refresh_models()
        for panel in self.window().findChildren(EmbeddingPanel):
            panel.refresh_models()

    def __call__(self, skip_validate: bool = False) -> "FinetuneResult":
        """Train with what is entered, and wait for the end, with a progress bar in the terminal.

        Args:
            skip_validate: Whether to leave out the check of the data.

        Returns:
            What came out; the model is in the menus, unless it became worse.

        Raises:
            InvalidInputError: If fields or data are wrong.
        """
        form = self.fields.values()
        if skip_validate:
            job = plan_training(form)
        else:
            checked = drain(check_steps(form))
            if not checked.report.ok:
                raise InvalidInputError("\n".join(checked.report.problems))
            job = checked.job
        result = drain(finetune_steps(job))
        register_result(job, result)
        self._refresh_menus()
        return result

    # Showing

    def _show_step(self, job: Job, step: Step, seconds: float | None) -> None:
        if job.key != "train" or not isinstance(step, TrainingStep):
            return
        self.plot.add(step.done, step.loss, step.metric)
        self.plot.setVisible(self.plot.has_points)
        parts = [f"Epoch {step.epoch}, iteration {step.done} of {step.total}"]
        if step.metric is not None:
            parts.append(f"validation {step.metric:.4f} (lower is better)")
        if step.seconds_left is not None:
            parts.append(f"about {readable_time(step.seconds_left)} left")
        self.status.show_html(" · ".join(parts))

    def _scroll_to(self, widget: QWidget) -> None:
        """Show a widget that has just got its content, as soon as that has its place."""
        self._scroll_target = widget
        self._scroll_timer.start()

    def _scroll(self) -> None:
        self.column.ensureWidgetVisible(self._scroll_target, 0, 20)

    @property
    def _is_busy(self) -> bool:
        return any(job.key == "train" for job in self.runner.jobs)

    def _show_busy(self, *_: Any) -> None:
        busy = self._is_busy
        for widget in (self.check, self.start):
            widget.setEnabled(not busy)
        self._busy_timer.start()

    def _show_next(self) -> None:
        """Colour the button to press next: that of the training once the data, as they are entered, were found fine."""
        checked = self._checked
        can_train = checked is not None and checked[1].report.ok and checked[0] == self.fields.values()
        accent(self.check, not can_train)
        accent(self.start, can_train)

    def _failed(self, job: Job, error: BaseException) -> None:
        if isinstance(error, FormError):
            self._show_problems(error.fields)
        elif isinstance(error, OutputExistsError):
            self.fields.open_advanced()
            self._show_problems({"existing": (
                f"There is a training of the name {self.fields.values().name!r} already. Choose whether to go on with "
                "it or to start anew, or choose another name."
            )})
        elif job.key != "configuration":  # what is wrong with the device is said when it is used
            self.notices.show_error(error)

    def _cancelled(self, job: Job) -> None:
        if job.key != "train" or job.text != "Finetune":
            return
        folder = self._training.job.folder
        if not (folder / "latest.pt").is_file():
            self.notices.info("Stopped before the training began.")
            return
        self.fields.existing_choice = "resume"
        self.status.show_html("")
        self.notices.info(
            f"Stopped. Press 'Start Training' to go on. The model as it is now is {folder / 'latest.pt'}."
        )

    def _show_problems(self, problems: dict[str, str]) -> None:
        self.problem.setText("\n".join(problems.values()))
        self.problem.show()
        self.fields.mark(problems)
        self.notices.show_notice("error", next(iter(problems.values())))

    def _forget_problems(self) -> None:
        self.problem.hide()
        self.fields.mark({})

    def closeEvent(self, event: Any) -> None:
        """Stop the training; it can be gone on with."""
        self.runner.close()
        super().closeEvent(event)
