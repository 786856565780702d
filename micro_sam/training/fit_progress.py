"""Where the progress of a training is shown: a tqdm bar, an object like one, or signals of a widget."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..core.errors import InvalidTypeError
from ..core.progress import Steps

if TYPE_CHECKING:
    import torch

_SIGNALS = ("pbar_total", "pbar_update", "pbar_description")
_SECONDS_BETWEEN_ESTIMATES = 5.0


class SignalProgress:
    """A progress bar like tqdm's that emits signals. Its description ends with an estimate of the remaining time.

    Args:
        signals: Has the signals `pbar_total(int)`, `pbar_update(int)` and `pbar_description(str)`.
    """

    def __init__(self, signals: Any):
        self._signals = signals
        self._total, self._done, self._text = 0, 0, ""
        self._start = self._shown = time.monotonic()

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total, self._start = value, time.monotonic()
        self._signals.pbar_total.emit(value)

    def update(self, n: int = 1) -> None:
        self._done += n
        self._signals.pbar_update.emit(n)
        if time.monotonic() - self._shown > _SECONDS_BETWEEN_ESTIMATES:
            self.set_description(self._text)

    def set_description(self, description: str, **kwargs) -> None:
        self._text, self._shown = description, time.monotonic()
        if 0 < self._done < self._total:
            seconds = (self._shown - self._start) / self._done * (self._total - self._done)
            description = f"{description}, {remaining_text(seconds)} left"
        self._signals.pbar_description.emit(description)


def as_progress(progress: Any) -> Any:
    """Return something like a tqdm bar: the object itself, or one that emits its signals.

    Raises:
        InvalidTypeError: If it is neither.
    """
    if all(hasattr(progress, name) for name in _SIGNALS):
        return SignalProgress(progress)
    if hasattr(progress, "update") and hasattr(progress, "set_description"):
        return progress
    raise InvalidTypeError(
        f"progress must be like a tqdm bar (total, update, set_description) or have the signals {', '.join(_SIGNALS)}, "
        f"but is {type(progress).__name__}."
    )


def remaining_text(seconds: float) -> str:
    """A duration as `5 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def follow(steps: Steps[None], progress: Any = None, verbose: bool = True) -> None:
    """Run a training to its end and show its progress.

    Args:
        steps: The training; the texts of its steps become the description of the bar.
        progress: See `as_progress`. None shows a tqdm bar.
        verbose: Whether to show that bar.
    """
    own = progress is None
    if own:
        from tqdm.auto import tqdm
        progress = tqdm(disable=not verbose)
    else:
        progress = as_progress(progress)
    done, text = None, None
    try:
        for step in steps:
            if done is None:
                # What an earlier run did is no progress of this one, so that the estimate of the time is right.
                done = step.done
                progress.total = step.total - done
                if own:
                    progress.refresh()
            if step.text != text:
                text = step.text
                progress.set_description(text)
            if step.done > done:
                progress.update(step.done - done)
                done = step.done
    finally:
        steps.close()
        if own:
            progress.close()


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; a second Ctrl-C interrupts at once.

    Outside of the main thread Ctrl-C never arrives.
    """
    previous, pressed = signal.getsignal(signal.SIGINT), []
    # A handler that was not installed from Python could not be put back.
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield lambda: False
        return

    def remember(number, frame):
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


class Interruption(KeyboardInterrupt):
    """Ends a training in the middle of an iteration, as Ctrl-C does."""


@contextlib.contextmanager
def stop_within_iterations(networks: "Iterable[torch.nn.Module]", should_stop: Callable[[], bool]) -> Iterator[None]:
    """Let networks ask in each layer whether to stop, in forward and backward passes, and raise `Interruption` if so.

    An iteration of a large encoder takes many seconds on a CPU, a layer of it a fraction of one.

    Args:
        networks: The networks that are trained.
        should_stop: Says whether to stop; quick.
    """

    def check(*_: Any) -> None:
        if should_stop():
            raise Interruption

    def check_backward(module: Any, inputs: Any, output: Any) -> None:
        if getattr(output, "requires_grad", False):
            output.register_hook(check)

    modules = dict.fromkeys(module for network in networks for module in network.modules())
    hooks = [hook for module in modules
             for hook in (module.register_forward_pre_hook(check), module.register_forward_hook(check_backward))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
