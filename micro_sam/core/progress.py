"""Progress of long work: generators of `Step`, and the one place that turns them into a progress bar.

A long function is written as a generator that yields `Step` and returns its result. `drain` runs it in a
terminal or notebook (tqdm) or with the callbacks `pbar_init(total, description)` and `pbar_update(n)`;
a widget hands the same generator to a worker. Closing the generator cancels the work.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from .allocator import reusing_memory
from .errors import InvalidInputError, MicroSamError

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """State of a long computation: `done` of `total` units; `text` says what is being done.

    The first step of a phase has `done=0`. A change of `text` starts a new phase (a new bar).
    """

    done: int
    total: int
    text: str


Steps = Generator[Step, None, T]


class Cancelled(MicroSamError, RuntimeError):
    """The user cancelled the work; what was written so far stays resumable."""


def _check_callbacks(pbar_init, pbar_update) -> None:
    if (pbar_init is None) != (pbar_update is None):
        raise InvalidInputError(
            "pbar_init and pbar_update belong together, but only one of them was given. Pass both or none."
        )


class _Sink:
    """Shows steps with tqdm and/or hands them to callbacks; use as a context manager."""

    def __init__(self, verbose: bool, pbar_init: Callable | None, pbar_update: Callable | None):
        _check_callbacks(pbar_init, pbar_update)
        self._verbose = verbose and pbar_init is None
        self._init, self._update = pbar_init, pbar_update
        self._bar, self._text, self._done = None, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._close()

    def _close(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show(self, step: Step) -> None:
        if step.text != self._text:
            self._close()
            self._text, self._done = step.text, 0
            if self._init is not None:
                self._init(step.total, step.text)
            elif self._verbose:
                from tqdm.auto import tqdm
                self._bar = tqdm(total=step.total, desc=step.text)
        n = step.done - self._done
        if n <= 0:
            return
        self._done = step.done
        if self._update is not None:
            self._update(n)
        elif self._bar is not None:
            self._bar.update(n)


def drain(
    steps: Steps[T],
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> T:
    """Run a generator of steps to its end and return its result.

    Args:
        steps: The generator.
        verbose: Whether to show a progress bar. Callbacks fire regardless of it.
        pbar_init: Called as `pbar_init(total, description)` when a phase starts; replaces the own bar.
        pbar_update: Called as `pbar_update(n)` when `n` more units are done.

    Returns:
        What the generator returns.

    Raises:
        InvalidInputError: If only one of the two callbacks is given.
    """
    try:
        with reusing_memory(), _Sink(verbose, pbar_init, pbar_update) as sink:
            while True:
                try:
                    step = next(steps)
                except StopIteration as stop:
                    return stop.value
                sink.show(step)
    finally:
        steps.close()


def during(steps: Steps[T], step: Step) -> Steps[T]:
    """Run other steps to their end, with `step` in place of each of them: one bar over several pieces of work."""
    try:
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value
            yield step
    finally:
        steps.close()


def handle_pbar(verbose: bool, pbar_init: Callable | None, pbar_update: Callable | None):
    """Return `(pbar | None, init, update, close)` for code that reports progress by calling functions.

    Callbacks are honoured whatever `verbose` says. Without callbacks `init` opens a tqdm bar if verbose.
    """
    _check_callbacks(pbar_init, pbar_update)
    if pbar_init is not None:
        return None, pbar_init, pbar_update, lambda: None
    if not verbose:
        return None, lambda total, description: None, lambda n: None, lambda: None

    from tqdm.auto import tqdm
    pbar = tqdm()

    def init(total, description):
        pbar.reset(total=total)
        pbar.set_description(description)

    return pbar, init, pbar.update, pbar.close
