"""Shows what a `JobRunner` is doing, with the time left and a button to cancel."""

from qtpy.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QSizePolicy, QVBoxLayout, QWidget

from ..core.progress import Step
from .form import SPACING, button, delayed, quiet
from .jobs import Job, JobRunner

SHOW_AFTER_MS = 250  # shorter work shows nothing, so that the panels do not jump at each click


def readable_time(seconds: float) -> str:
    """Return a rough duration such as `40 s`, `3 min` or `1 h 20 min`."""
    if seconds < 55:
        return f"{max(round(seconds / 5) * 5, 5) if seconds > 7 else max(round(seconds), 1)} s"
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def describe_step(job: Job, step: Step | None, seconds: float | None) -> tuple[str, str]:
    """Return what a job is doing, and how far it is."""
    text = job.text if step is None or step.text in ("", job.text) else f"{job.text}: {step.text}"
    if job.state == "cancelling":
        return text, "stopping …"
    if job.background and job.is_paused:
        return text, "paused"
    if step is None or step.total <= 1:
        return text, ""
    left = "" if seconds is None or step.done >= step.total else f"  ·  {readable_time(seconds)} left"
    return text, f"{step.done} / {step.total}{left}"


class _Row(QWidget):
    """One job."""

    def __init__(self, small: bool):
        super().__init__()
        self.job: Job | None = None
        self.text, self.state, self.bar = QLabel(), QLabel(), QProgressBar()
        self.cancel = button("Cancel", tooltip="Stop after the present step; what is stored so far is kept")
        self.text.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(4 if small else 8)
        if small:
            quiet(self.text)
            quiet(self.state)
            self.cancel.setText("✕")
            self.cancel.setFixedWidth(24)
            self.cancel.setAccessibleName("Cancel")
        self.cancel.clicked.connect(self._cancel)
        top = QHBoxLayout()
        top.setSpacing(SPACING)
        top.addWidget(self.text, 1)
        top.addWidget(self.state)
        top.addWidget(self.cancel)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addLayout(top)
        layout.addWidget(self.bar)
        self.hide()

    def _cancel(self) -> None:
        if self.job is not None:
            self.job.cancel()
            self.show_job(self.job)

    def show_job(self, job: Job) -> None:
        self.job = job
        step, seconds = job.progress
        text, state = describe_step(job, step, seconds)
        self.text.setText(text)
        self.text.setToolTip(text)
        self.state.setText(state)
        if step is not None and step.total > 1:
            self.bar.setRange(0, step.total)
            self.bar.setValue(step.done)
        else:  # a step of one unit says nothing about how far it is: the bar only moves, unless the job waits
            self.bar.setRange(0, 1 if job.background and job.is_paused else 0)
            self.bar.setValue(0)
        self.cancel.setEnabled(job.state == "running")
        self.show()


class ProgressView(QWidget):
    """The present foreground job, and smaller below it the one in the background; hidden while there is none."""

    def __init__(self, runner: JobRunner):
        super().__init__()
        self._runner = runner
        self.foreground, self.background = _Row(small=False), _Row(small=True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(SPACING)
        layout.addWidget(self.foreground)
        layout.addWidget(self.background)
        self._delay = delayed(self, SHOW_AFTER_MS, self._refresh)
        runner.started.connect(self._on_start)
        runner.progressed.connect(self._on_progress)
        for signal in (runner.finished, runner.failed, runner.cancelled):
            signal.connect(self._refresh)
        self.hide()

    def _on_start(self, job: Job) -> None:
        if not self._delay.isActive():
            self._delay.start()

    def _on_progress(self, job: Job, step: Step, seconds: float | None) -> None:
        if not self._delay.isActive():
            self._refresh()

    def _refresh(self, *_) -> None:
        if self._delay.isActive():  # what ended within the delay was never shown
            if self._runner.busy:
                return
            self._delay.stop()
        for row, background in ((self.foreground, False), (self.background, True)):
            jobs = [job for job in self._runner.jobs if job.background is background]
            # The newest that is not on its way out.
            jobs.sort(key=lambda job: job.state == "running")
            if jobs:
                row.show_job(jobs[-1])
            else:
                row.job = None
                row.hide()
        self.setVisible(self._runner.busy)
