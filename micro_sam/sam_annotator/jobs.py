"""Runs tasks in threads; results are taken over in the thread of the user interface, which never waits.

The threads touch no Qt object: they leave steps and results with their job, and a timer looks for them there.
"""

import atexit
import contextlib
import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

from qtpy.QtCore import QCoreApplication, QEventLoop, QObject, Qt, QTimer, Signal

from ..annotation.task import Task
from ..core.progress import Cancelled, Step

logger = logging.getLogger(__name__)

POLL_MS = 15
REPORT_SECONDS = 0.05  # between two reports of the progress of one job
CLOSE_SECONDS = 3.0
EXIT_SECONDS = 30.0
# How long a thread may keep Python's lock. The window asks for it at each event of Qt, many times for one repaint;
# with Python's 5 ms these waits add up to a stop that is felt, beside a thread that runs Python code.
SWITCH_SECONDS = 0.0005
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()
_owners: set[QObject] = set()


@atexit.register
def _wait_for_threads() -> None:
    """A thread that is inside torch when the interpreter ends would abort the program."""
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(end - time.monotonic(), 0))


class _ShortTurns:
    """While it is entered, by any number of threads, threads take turns often."""

    def __init__(self):
        self._lock = threading.Lock()
        self._users, self._usual = 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_SECONDS)
            self._users += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                sys.setswitchinterval(self._usual)


_short_turns = _ShortTurns()


class _Stopped(Exception):
    """Ends the work of a job in its thread."""


class RateMeter:
    """Estimates the time left from the last steps of the present phase."""

    def __init__(self, window: int = 32):
        self._seen: deque[tuple[float, int]] = deque(maxlen=window)
        self._text: str | None = None
        self._left = 0

    def add(self, step: Step, now: float) -> None:
        """Note a step that was done at a time in seconds. Each new text starts a new phase."""
        if step.text != self._text:
            self._text = step.text
            self._seen.clear()
        self._left = max(step.total - step.done, 0)
        self._seen.append((now, step.done))

    def skip(self, seconds: float) -> None:
        """Leave out time in which nothing could be done."""
        self._seen = deque(((t + seconds, done) for t, done in self._seen), maxlen=self._seen.maxlen)

    @property
    def seconds_left(self) -> float | None:
        """The estimate; None while it is too early for one."""
        if len(self._seen) < 2:
            return None
        (t0, done0), (t1, done1) = self._seen[0], self._seen[-1]
        return self._left * (t1 - t0) / (done1 - done0) if done1 > done0 else None


class _Gate:
    """Lets one step at a time use the model; those of background jobs only while there is no foreground job."""

    def __init__(self):
        self._condition = threading.Condition()
        self._tickets = count()
        self._waiting: list[tuple[bool, int]] = []
        self._taken = False
        self._n_foreground = 0

    def wake(self) -> None:
        """Let jobs notice that they were cancelled."""
        with self._condition:
            self._condition.notify_all()

    @contextlib.contextmanager
    def member(self, job: "Job") -> Iterator[None]:
        """For all the time in which a job uses the model now and then."""
        weight = 0 if job.background else 1
        with self._condition:
            self._n_foreground += weight
        try:
            yield
        finally:
            with self._condition:
                self._n_foreground -= weight
                self._condition.notify_all()

    @contextlib.contextmanager
    def turn(self, job: "Job") -> Iterator[None]:
        """For one step."""
        ticket = (job.background, next(self._tickets))

        def may_go():
            is_next = not self._taken and min(self._waiting) == ticket
            return job.is_cancelled or (is_next and not (job.background and self._n_foreground))

        start = time.monotonic()
        with self._condition:
            self._waiting.append(ticket)
            job.is_paused = not may_go()
            self._condition.wait_for(may_go)
            job.is_paused = False
            self._waiting.remove(ticket)
            if job.is_cancelled:
                self._condition.notify_all()
                raise _Stopped
            self._taken = True
        job.note_pause(time.monotonic() - start)
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()


class Job:
    """A task on its way.

    `state` is `running`, `cancelling`, `finished`, `failed` or `cancelled`; it changes in the thread of the user
    interface. `is_paused` tells that the job waits for the model.
    """

    def __init__(self, task: Task, key: str | None, background: bool, gate: _Gate, after: tuple["Job", ...]):
        self.task, self.key, self.background = task, key, background
        self.state = "running"
        self.is_paused = False
        self.ended = threading.Event()
        self.outcome: tuple[str, Any] = ("cancelled", None)
        self._gate, self._after = gate, after
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._meter, self._step = RateMeter(), None

    @property
    def text(self) -> str:
        """What is done, for people."""
        return self.task.text

    @property
    def is_cancelled(self) -> bool:
        return self._stop.is_set()

    @property
    def progress(self) -> tuple[Step | None, float | None]:
        """The last step, and the estimated seconds left in its phase."""
        with self._lock:
            return self._step, self._meter.seconds_left

    def cancel(self) -> None:
        """Ask the job to stop at its next step; returns at once."""
        if not self.ended.is_set() and self.state == "running":
            self.state = "cancelling"
        self._stop.set()
        self._gate.wake()

    def note_pause(self, seconds: float) -> None:
        with self._lock:
            self._meter.skip(seconds)

    def work(self) -> None:
        """Do the work and keep its outcome; runs in the thread of the job."""
        try:
            with _short_turns:
                self.outcome = ("finished", self._drain())
        except (_Stopped, Cancelled):
            self.outcome = ("cancelled", None)
        except BaseException as error:  # whatever it is, the user has to learn of it
            self.outcome = ("failed", error)
        finally:
            self._after = ()
            self.ended.set()

    def _drain(self) -> Any:
        for older in self._after:  # it may still hold the files that this job needs
            while not older.ended.wait(0.05):
                if self.is_cancelled:
                    raise _Stopped
        needs_turn = self.task.uses_model
        with self._gate.member(self) if needs_turn else contextlib.nullcontext():
            steps = self.task.steps()
            try:
                while not self.is_cancelled:
                    with self._gate.turn(self) if needs_turn else contextlib.nullcontext():
                        try:
                            step = next(steps)
                        except StopIteration as end:
                            return end.value
                    with self._lock:
                        self._step = step
                        self._meter.add(step, time.monotonic())
                raise _Stopped
            finally:
                steps.close()


def _abandon(jobs: list[Job], *_: Any) -> None:
    for job in jobs:
        job.cancel()


class JobRunner(QObject):
    """Runs the tasks of one viewer.

    A task whose key is that of an older one replaces it: the older one is cancelled and its result dropped, and the
    newer one begins when the older has let go. Steps that use the model run one at a time; a background job pauses
    while a foreground job uses the model. Results are applied in the thread that this object lives in.

    Two jobs may take turns with the model between their steps, so each task has to bring its own `SamPredictor`
    (`copy.copy` shares the network), because that remembers the image it was set to.

    Example:
        runner = JobRunner(window)
        runner.failed.connect(lambda job, error: notices.show_error(error))
        runner.start(session.segment_task(), key="segment")
    """

    started = Signal(object)
    progressed = Signal(object, object, object)
    finished = Signal(object, object)
    failed = Signal(object, object)
    cancelled = Signal(object)

    def __init__(self, parent: QObject | None = None):
        super().__init__(parent)
        if parent is not None:
            # Qt has to delete a dock with a runner: Python's garbage collector crashes on it.
            _owners.add(parent)
            parent.destroyed.connect(lambda *_, owner=parent: _owners.discard(owner))
        self._jobs: list[Job] = []
        self._callbacks: dict[Job, tuple[Callable | None, Callable | None]] = {}
        self._reported: dict[Job, tuple[float, Step | None]] = {}
        self._gate = _Gate()
        self._is_closed = False
        self._timer = QTimer(self)
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.setInterval(POLL_MS)
        self._timer.timeout.connect(self._poll)
        self.destroyed.connect(partial(_abandon, self._jobs))
        if (app := QCoreApplication.instance()) is not None:
            app.aboutToQuit.connect(self.close)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs whose outcome is still to come, oldest first; also those that are being cancelled."""
        return tuple(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether there is any job."""
        return bool(self._jobs)

    def start(
        self,
        task: Task,
        *,
        key: str | None = None,
        background: bool = False,
        on_done: Callable[[Any], None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> Job:
        """Start a task.

        Args:
            task: The task.
            key: Names what the task is for; an older task of the same key is replaced.
            background: Whether it gives way to all other tasks that need the model.
            on_done: Called with what `task.apply` returned.
            on_error: Called with what was raised by the steps, by `task.apply` or by `on_done`.
        """
        assert not self._is_closed, "the runner was closed"
        after = tuple(job for job in self._jobs if key is not None and job.key == key)
        for older in after:
            older.cancel()
        job = Job(task, key, background, self._gate, after)
        self._jobs.append(job)
        self._callbacks[job] = (on_done, on_error)
        self._reported[job] = (0.0, None)
        # Daemons, so that a step that never returns cannot keep the program from ending.
        thread = threading.Thread(target=job.work, name=f"micro_sam: {task.text}", daemon=True)
        _threads.add(thread)
        thread.start()
        self._timer.start()
        self.started.emit(job)
        return job

    def cancel_all(self, *, background: bool = True) -> None:
        """Cancel all jobs, or all but those in the background."""
        for job in self._jobs:
            if background or not job.background:
                job.cancel()

    def wait(self, timeout: float = 30.0) -> bool:
        """Run the event loop until there is no job; returns whether that came in time. For tests and scripts."""
        end = time.monotonic() + timeout
        while self._jobs and time.monotonic() < end:
            QCoreApplication.processEvents(QEventLoop.ProcessEventsFlag.AllEvents, 10)
            time.sleep(0.002)
        return not self._jobs

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Cancel all jobs and wait for them, but not for ever; nothing is applied or reported any more.

        Returns:
            Whether all of them have ended.
        """
        self._is_closed = True
        with contextlib.suppress(RuntimeError):  # Qt has deleted the timer together with the window
            self._timer.stop()
        self.cancel_all()
        end = time.monotonic() + timeout
        ended = [job.ended.wait(max(end - time.monotonic(), 0)) for job in self._jobs]
        if not all(ended):
            logger.warning("%d jobs did not stop within %.0f s and are left alone", ended.count(False), timeout)
        self._jobs.clear()
        self._callbacks.clear()
        self._reported.clear()
        return all(ended)

    def _poll(self) -> None:
        now = time.monotonic()
        for job in tuple(self._jobs):
            if job not in self._callbacks:  # closed by what one of the others has called
                return
            has_ended = job.ended.is_set()
            last, shown = self._reported[job]
            step, seconds = job.progress
            if step is not shown and (has_ended or now - last >= REPORT_SECONDS) and not job.is_cancelled:
                self._reported[job] = (now, step)
                self.progressed.emit(job, step, seconds)
            if has_ended and job in self._callbacks:
                self._jobs.remove(job)
                del self._reported[job]
                self._deliver(job, *self._callbacks.pop(job))
        if not self._jobs:
            self._timer.stop()

    def _deliver(self, job: Job, on_done: Callable | None, on_error: Callable | None) -> None:
        kind, value = job.outcome
        job.outcome = (kind, None)  # results can be large
        if job.is_cancelled or kind == "cancelled":
            if kind == "failed":
                logger.debug("%s failed after it was cancelled", job.text, exc_info=value)
            job.state = "cancelled"
            self.cancelled.emit(job)
            return
        try:
            if kind == "failed":
                raise value
            result = job.task.apply(value)
            if on_done is not None:
                on_done(result)
        except BaseException as error:
            job.state = "failed"
            if on_error is not None:
                on_error(error)
            self.failed.emit(job, error)
        else:
            job.state = "finished"
            self.finished.emit(job, result)


class Watchdog:
    """Measures how long the event loop was blocked at most, in seconds; a context manager for tests.

    `worst` is wall time; `worst_cpu` the longest block in CPU time of this process, which is what `worst` would be with
    one core and nothing else on the machine.

    Example:
        with Watchdog() as watchdog:
            runner.wait()
        assert watchdog.worst < 0.1
    """

    INTERVAL_MS = 10

    def __init__(self):
        self.worst = self.worst_cpu = 0.0
        self._last = self._last_cpu = 0.0
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.setInterval(self.INTERVAL_MS)
        self._timer.timeout.connect(self._tick)

    def __enter__(self) -> "Watchdog":
        self.worst = self.worst_cpu = 0.0
        self._last, self._last_cpu = time.monotonic(), time.process_time()
        self._timer.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._timer.stop()
        self._tick()

    def _tick(self) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.worst = max(self.worst, now - self._last - self.INTERVAL_MS / 1000)
        self.worst_cpu = max(self.worst_cpu, cpu - self._last_cpu - self.INTERVAL_MS / 1000)
        self._last, self._last_cpu = now, cpu
