"""Who does the work on blocks: this process, or workers somewhere else (`micro_sam.distributed`)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ..core.errors import BlockError, MicroSamError
from ..core.progress import Step, Steps

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Engine(Protocol):
    """Maps a function over items, in any order."""

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Yield each item with the result of the function, or with the exception that it raised.

        Function, items and results must be picklable if the engine leaves this process.
        """


class LocalEngine:
    """Works in this process, one item after the other."""

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """See `Engine.map`."""
        for item in items:
            try:
                result = function(item)
            except Exception as error:  # the caller decides what to try again
                result = error
            yield item, result


def work_steps(
    engine: Engine,
    function: Callable[[T], Any],
    items: Sequence[T],
    total: int,
    text: str,
    done: Callable[[T, Any], None],
    retries: int = 2,
) -> Steps[None]:
    """Map a function over items; what fails is tried again after the others.

    Args:
        engine: Who works.
        function: What to do with an item.
        items: The items that are left to do.
        total: Number of all items, with those that are done.
        text: What is done, for the progress.
        done: Called in this process with each finished item and its result.
        retries: How often an item is tried again.

    Raises:
        MicroSamError: At once, if an item fails for a reason that trying again does not mend.
        BlockError: If items failed each time.
    """
    finished = total - len(items)
    yield Step(finished, total, text)
    for attempt in range(retries + 1):
        failed: list[tuple[T, Exception]] = []
        for item, result in engine.map(function, items):
            if isinstance(result, MicroSamError):
                raise result
            if isinstance(result, Exception):
                logger.warning("%s: %s failed (attempt %i): %r", text, item, attempt + 1, result)
                failed.append((item, result))
                continue
            done(item, result)
            finished += 1
            yield Step(finished, total, text)
        if not failed:
            return
        items = [item for item, _ in failed]
    item, error = failed[0]
    raise BlockError(
        f"{text}: {len(failed)} of {total} pieces failed {retries + 1} times, the first one ({item}) with {error!r}. "
        "What is finished is kept: remove the cause and run again, it goes on from there."
    ) from error
