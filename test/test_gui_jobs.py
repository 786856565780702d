"""Tasks in threads: results and errors arrive in the thread of the user interface, which never waits."""

import sys
import threading
import time

import numpy as np
import pytest

from micro_sam.annotation.task import Task
from micro_sam.core.errors import InvalidInputError
from micro_sam.core.progress import Cancelled, Step

pytest.importorskip("qtpy")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

MAIN = threading.main_thread()


@pytest.fixture(scope="module")
def app():
    from qtpy.QtWidgets import QApplication
    return QApplication.instance() or QApplication([])


@pytest.fixture
def runner(app):
    from micro_sam.sam_annotator.jobs import JobRunner
    runner = JobRunner()
    runner.log = []
    runner.started.connect(lambda job: runner.log.append(("started", job.text)))
    runner.finished.connect(lambda job, result: runner.log.append(("finished", job.text, result)))
    runner.failed.connect(lambda job, error: runner.log.append(("failed", job.text, error)))
    runner.cancelled.connect(lambda job: runner.log.append(("cancelled", job.text)))
    yield runner
    assert runner.close()


def _spin(runner, until, timeout=20.0):
    """Run the event loop until a condition holds."""
    from qtpy.QtCore import QCoreApplication
    end = time.monotonic() + timeout
    while not until():
        assert time.monotonic() < end, "the condition never came true"
        QCoreApplication.processEvents()
        time.sleep(0.002)


def _count(n, seconds=0.0, trace=None, text="work"):
    """Steps that note what they do."""
    trace = [] if trace is None else trace

    def steps():
        try:
            yield Step(0, n, text)
            for i in range(n):
                trace.append(("in", text))
                time.sleep(seconds)
                trace.append(("out", text))
                yield Step(i + 1, n, text)
            return n
        finally:
            trace.append(("closed", text, threading.current_thread()))

    return steps


def test_the_work_runs_in_a_thread_and_its_result_is_applied_in_ours(runner):
    threads = {}

    def steps():
        threads["steps"] = threading.current_thread()
        yield Step(0, 1, "work")
        return 20

    def apply(value):
        threads["apply"] = threading.current_thread()
        return value + 1

    def on_done(result):
        threads["done"] = threading.current_thread()
        assert result == 21

    job = runner.start(Task("answer", steps, apply), on_done=on_done)
    assert runner.busy
    assert runner.jobs == (job,)
    assert runner.wait()
    assert threads["steps"] is not MAIN
    assert threads["apply"] is threads["done"] is MAIN
    assert runner.log == [("started", "answer"), ("finished", "answer", 21)]
    assert job.state == "finished"
    assert not runner.busy


def _fails(error):
    def steps():
        yield Step(0, 2, "work")
        raise error
    return Task("broken", steps, lambda value: value)


def _fails_at_once(error):
    def make():
        raise error
    return Task("broken", make, lambda value: value)


def _fails_to_apply(error):
    def apply(value):
        raise error
    return Task("broken", _count(1), apply)


@pytest.mark.parametrize("error", [
    RuntimeError("in a generator"), InvalidInputError("what to do"), ValueError("plain"), MemoryError(),
    KeyboardInterrupt(), SystemExit(1), AssertionError("slip"),
], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("make", [_fails, _fails_at_once, _fails_to_apply])
def test_every_error_arrives(runner, make, error):
    threads, seen = [], []
    runner.failed.connect(lambda job, error: threads.append(threading.current_thread()))
    job = runner.start(make(error), on_error=seen.append)
    assert runner.wait()
    assert runner.log[1:] == [("failed", "broken", error)]
    assert seen == [error]
    assert threads == [MAIN]
    assert job.state == "failed"
    # The runner goes on.
    runner.start(Task("next", _count(1), lambda value: value))
    assert runner.wait()
    assert runner.log[-1] == ("finished", "next", 1)


def test_an_error_of_the_callback_arrives_too(runner):
    runner.start(Task("work", _count(1), lambda value: value), on_done=lambda value: 1 / 0)
    assert runner.wait()
    assert [entry[0] for entry in runner.log] == ["started", "failed"]


def test_stop_iteration_inside_the_steps_is_an_error_and_not_a_result(runner):
    def steps():
        yield Step(0, 1, "work")
        next(iter(()))
    runner.start(Task("broken", steps, lambda value: value))
    assert runner.wait()
    assert runner.log[-1][0] == "failed"
    assert isinstance(runner.log[-1][2], RuntimeError)


def test_cancel_closes_the_steps_in_their_thread_and_applies_nothing(runner):
    trace, applied = [], []
    job = runner.start(Task("long", _count(10000, 0.005, trace), applied.append))
    _spin(runner, lambda: len(trace) > 4)
    start = time.monotonic()
    job.cancel()
    assert time.monotonic() - start < 0.05
    assert job.state == "cancelling"
    assert runner.wait(5)
    assert trace[-1][0] == "closed"
    assert trace[-1][2] is not MAIN
    assert applied == []
    assert runner.log == [("started", "long"), ("cancelled", "long")]
    assert job.state == "cancelled"


def test_what_comes_after_cancelling_is_dropped(runner):
    applied, hold = [], threading.Event()

    def steps():
        yield Step(0, 1, "work")
        hold.wait(10)
        return "late"

    def breaks():
        yield Step(0, 1, "work")
        hold.wait(10)
        raise ValueError("late")

    for make in (steps, breaks):
        hold.clear()
        job = runner.start(Task("long", make, applied.append))
        _spin(runner, lambda job=job: job.progress[0] is not None)
        job.cancel()
        hold.set()
        assert runner.wait(5)
    assert applied == []
    assert [entry[0] for entry in runner.log] == ["started", "cancelled"] * 2


def test_work_that_cancels_itself_is_cancelled(runner):
    runner.start(_fails(Cancelled("stopped by a callback")))
    assert runner.wait()
    assert runner.log[-1] == ("cancelled", "broken")


def test_the_same_key_replaces_and_begins_when_the_older_has_let_go(runner):
    trace, applied = [], []
    runner.start(Task("old", _count(1000, 0.01, trace, "old"), applied.append), key="segment")
    runner.start(Task("other", _count(3, 0.0, text="other"), applied.append), key="commit")
    _spin(runner, lambda: ("in", "old") in trace)
    runner.start(Task("new", _count(5, 0.0, trace, "new"), applied.append), key="segment")
    assert runner.wait()
    assert sorted(applied) == [3, 5]
    order = [entry[:2] for entry in trace]
    assert order.index(("closed", "old")) < order.index(("in", "new"))
    assert ("cancelled", "old") in runner.log
    # A third one that replaces one which never began.
    for text in ("a", "b", "c"):
        runner.start(Task(text, _count(2, 0.01, trace, text), applied.append), key="segment")
    assert runner.wait()
    assert applied[2:] == [2]


def test_one_step_at_a_time_uses_the_model_and_the_background_gives_way(runner):
    trace = []
    background = Task("embed", _count(60, 0.005, trace, "embed"), lambda value: value)
    runner.start(background, background=True)
    _spin(runner, lambda: trace.count(("out", "embed")) >= 3)
    for text in ("click", "auto"):
        runner.start(Task(text, _count(10, 0.005, trace, text), lambda value: value))
    _spin(runner, lambda: any(entry[:2] == ("in", "click") for entry in trace))
    assert runner.wait()
    steps = [entry for entry in trace if entry[0] != "closed"]
    assert [kind for kind, _ in steps] == ["in", "out"] * 80, "two steps at once"
    names = [name for kind, name in steps if kind == "in"]
    between = names[min(names.index("click"), names.index("auto")) + 1:]
    last = max(n for n, name in enumerate(between) if name != "embed")
    # One step of the background may slip in before the second foreground job has begun.
    assert between[:last].count("embed") <= 1, "the background did not pause"
    # Foreground jobs take turns: a click need not wait for the end of long work.
    assert abs(between[:last].index("click") - between[:last].index("auto")) <= 3
    assert len(runner.log) == 6


def test_work_without_the_model_does_not_wait(runner):
    hold = threading.Event()

    def steps():
        yield Step(0, 1, "model")
        hold.wait(10)

    runner.start(Task("model", steps, lambda value: value))
    time.sleep(0.05)
    runner.start(Task("free", _count(3), lambda value: value, uses_model=False))
    _spin(runner, lambda: ("finished", "free", 3) in runner.log)
    assert runner.busy
    hold.set()
    assert runner.wait()


def test_progress_is_throttled_and_ends_with_the_last_step(runner):
    seen = []
    runner.progressed.connect(lambda job, step, seconds: seen.append((time.monotonic(), step, seconds)))
    start = time.monotonic()
    runner.start(Task("fast", _count(3000, 0.0001), lambda value: value))
    assert runner.wait()
    seconds = time.monotonic() - start
    assert 1 <= len(seen) <= 20 * seconds + 2
    assert seen[-1][1] == Step(3000, 3000, "work")
    assert seen[-1][2] == 0


def test_the_time_left_comes_from_the_present_phase():
    from micro_sam.sam_annotator.jobs import RateMeter

    meter = RateMeter()
    assert meter.seconds_left is None
    meter.add(Step(0, 10, "load"), 100.0)
    assert meter.seconds_left is None
    meter.add(Step(2, 10, "load"), 104.0)
    assert meter.seconds_left == 16
    meter.skip(1000.0)  # waited for the model
    meter.add(Step(3, 10, "load"), 1106.0)
    assert meter.seconds_left == 14
    meter.add(Step(40, 50, "resumed"), 1200.0)
    assert meter.seconds_left is None
    meter.add(Step(41, 50, "resumed"), 1203.0)
    assert meter.seconds_left == 27


def test_closing_ends_the_work_and_applies_nothing(app):
    from micro_sam.sam_annotator.jobs import JobRunner

    runner, trace, applied = JobRunner(), [], []
    runner.finished.connect(lambda *args: applied.append(args))
    runner.cancelled.connect(lambda *args: applied.append(args))
    for i in range(3):
        runner.start(Task("long", _count(1000, 0.01, trace), applied.append), background=i == 1)
    _spin(runner, lambda: len(trace) > 2)
    assert runner.close()
    assert sum(entry[0] == "closed" for entry in trace) >= 2
    assert not runner.busy
    _spin_for(0.1)
    assert applied == []
    for thread in [t for t in threading.enumerate() if t.name == "micro_sam: long"]:
        thread.join(2)
        assert not thread.is_alive()


def _spin_for(seconds):
    end = time.monotonic() + seconds
    _spin(None, lambda: time.monotonic() > end)


def test_closing_does_not_wait_for_a_step_that_never_ends(app):
    from micro_sam.sam_annotator.jobs import JobRunner

    hold, runner = threading.Event(), JobRunner()

    def steps():
        yield Step(0, 1, "work")
        hold.wait(30)

    job = runner.start(Task("stuck", steps, lambda value: value))
    _spin(runner, lambda: job.progress[0] is not None)
    start = time.monotonic()
    assert not runner.close(timeout=0.2)
    assert time.monotonic() - start < 2
    hold.set()
    assert job.ended.wait(5)


def test_jobs_stop_when_the_window_is_destroyed(app):
    from qtpy.QtCore import QCoreApplication, QEvent
    from qtpy.QtWidgets import QWidget

    from micro_sam.sam_annotator.jobs import JobRunner

    window, trace = QWidget(), []
    runner = JobRunner(window)
    job = runner.start(Task("long", _count(10000, 0.005, trace), lambda value: value))
    _spin(runner, lambda: len(trace) > 2)
    window.deleteLater()
    QCoreApplication.sendPostedEvents(window, QEvent.Type.DeferredDelete)
    _spin(None, job.ended.is_set, 5)
    assert trace[-1][0] == "closed"


def test_the_event_loop_is_never_blocked_for_long(runner):
    from micro_sam.sam_annotator.jobs import Watchdog

    def heavy():
        yield Step(0, 60, "compute")
        for i in range(60):
            sum(j * j for j in range(60000))  # holds the interpreter
            a = np.random.default_rng(i).random((300, 300))
            a @ a
            yield Step(i + 1, 60, "compute")

    with Watchdog() as watchdog:
        runner.start(Task("heavy", heavy, lambda value: value))
        runner.start(Task("heavy too", heavy, lambda value: value, uses_model=False), background=True)
        assert runner.wait()
    assert watchdog.worst < 0.1
    with Watchdog() as watchdog:
        _spin_for(0.05)
        time.sleep(0.3)
        _spin_for(0.05)
    assert 0.25 < watchdog.worst < 0.6


def test_threads_take_short_turns_while_any_job_works(runner):
    usual, go_on, seen = sys.getswitchinterval(), threading.Event(), []

    def steps():
        seen.append(sys.getswitchinterval())
        yield Step(0, 1, "work")
        assert go_on.wait(20)
        seen.append(sys.getswitchinterval())

    runner.start(Task("quick", _count(1), lambda _: None, uses_model=False))
    runner.start(Task("long", steps, lambda _: None, uses_model=False))
    _spin(runner, lambda: ("finished", "quick", None) in runner.log)
    go_on.set()
    assert runner.wait()
    assert len(seen) == 2
    assert max(seen) < usual / 2
    _spin(runner, lambda: sys.getswitchinterval() == usual)


def test_embeddings_can_be_cancelled_and_go_on_where_they_stopped(runner, tiny_predictor, cells_image, tmp_path):
    from micro_sam.embeddings.encode import embedding_steps

    volume, path, encoded = np.stack([cells_image] * 8), tmp_path / "volume.zarr", []

    def task():
        return Task(
            "embed", lambda: embedding_steps(tiny_predictor, volume, str(path), ndim=3, lazy_loading=True), lambda e: e
        )

    hook = tiny_predictor.model.image_encoder.register_forward_hook(lambda *args: encoded.append(1))
    try:
        job = runner.start(task(), key="embed", background=True)
        _spin(runner, lambda: job.progress[0] is not None and job.progress[0].done >= 3)
        runner.start(task(), key="embed", background=True)  # finds the files that the older one has let go
        assert runner.wait(60)
    finally:
        hook.remove()
    assert ("cancelled", "embed") in runner.log
    assert runner.log[-1][0] == "finished"
    assert runner.log[-1][2]["features"].shape[0] == 8
    assert len(encoded) <= 9, "what was finished was computed again"


# The view


@pytest.fixture
def view(runner):
    from micro_sam.sam_annotator.progress_view import ProgressView
    view = ProgressView(runner)
    view.setMinimumWidth(400)
    yield view
    view.close()


def test_progress_is_shown_with_the_time_left_and_a_click_cancels(runner, view):
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    assert view.isHidden()
    job = runner.start(Task("Segment volume", _count(1000, 0.01, text="slices"), lambda value: value))
    runner.start(Task("Compute embeddings", _count(100, 0.01), lambda value: value), background=True)
    _spin(runner, lambda: not view.isHidden() and view.foreground.bar.value() > 5)
    assert view.foreground.text.text() == "Segment volume: slices"
    assert view.foreground.bar.maximum() == 1000
    assert "/ 1000" in view.foreground.state.text()
    assert "left" in view.foreground.state.text()
    assert view.background.text.text() == "Compute embeddings"
    assert view.background.state.text() == "paused"
    QTest.mouseClick(view.foreground.cancel, Qt.MouseButton.LeftButton)
    assert view.foreground.state.text() == "stopping …"
    assert not view.foreground.cancel.isEnabled()
    _spin(runner, lambda: job.state == "cancelled")
    assert view.foreground.isHidden()
    assert not view.background.isHidden()
    _spin(runner, lambda: view.background.state.text() != "paused")
    assert runner.wait()
    assert view.isHidden()


def test_short_work_does_not_make_the_panel_jump(runner, view):
    shown = []
    view.foreground.show_job = shown.append
    for _ in range(3):
        runner.start(Task("click", _count(2, 0.005), lambda value: value), key="click")
        assert runner.wait()
        _spin_for(0.05)
    _spin_for(0.4)
    assert shown == []
    assert view.isHidden()


@pytest.mark.parametrize(("seconds", "text"), [
    (0.2, "1 s"), (4, "4 s"), (12, "10 s"), (41, "40 s"), (58, "1 min"), (170, "3 min"), (4000, "1 h 7 min"),
])
def test_durations_are_rough(seconds, text):
    from micro_sam.sam_annotator.progress_view import readable_time
    assert readable_time(seconds) == text
