"""Long work of a session, split into what can run anywhere and what changes the session."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..core.progress import Steps, drain

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Task(Generic[T, R]):
    """Work on a snapshot of a session, and what to do with its result.

    Args:
        text: What is done, for people.
        steps: Makes a generator of steps. It runs in any thread and reads only what was there when the task was made.
        apply: Takes over the result, in the thread that owns the session, and returns what that did.
        uses_model: Whether the steps need the predictor; only one such task may run a step at a time.
    """

    text: str
    steps: Callable[[], Steps[T]]
    apply: Callable[[T], R]
    uses_model: bool = True

    def run(self, verbose: bool = True) -> R:
        """Do the work here and now, and return what `apply` returns."""
        return self.apply(drain(self.steps(), verbose))
