"""The engine that maps work over the workers of a `dask.distributed` cluster."""

import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import BlockError

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)
T = TypeVar("T")


class DaskEngine:
    """Maps over workers; see `blockwise.engine.Engine`.

    A worker that dies gives its work back to the scheduler, which passes it on. Only a few items per worker are handed
    to the scheduler at a time, so that it never holds the whole run.

    Args:
        client: The client of the cluster.
        ahead: How many items per worker thread are handed out at a time.
    """

    def __init__(self, client: "Client", ahead: int = 2):
        self.client, self.ahead = client, ahead

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """See `Engine.map`.

        Raises:
            BlockError: If the scheduler is lost.
        """
        from distributed import as_completed

        if not items:
            return
        if not self.client.nthreads():
            logger.warning("Waiting for a worker, such as a job in the queue of a batch system.")
            self.client.wait_for_workers(1)
        waiting = iter(items)
        running: dict[str, T] = {}
        name, count = f"{type(function).__name__}-{uuid.uuid4().hex[:8]}", itertools.count()
        queue = as_completed(with_results=False)

        def submit() -> None:
            for item in waiting:
                future = self.client.submit(function, item, key=f"{name}-{next(count)}")
                running[future.key] = item
                queue.add(future)
                if len(running) >= self._n_ahead():
                    return

        try:
            submit()
            while running:
                future = next(queue)
                item = running.pop(future.key)
                yield item, self._result(future)
                submit()
        finally:
            if running:
                self.client.cancel([f for f in queue.futures if f.key in running], force=True)

    def _n_ahead(self) -> int:
        threads = sum(self.client.nthreads().values())
        return max(1, self.ahead * threads)

    def _result(self, future: Any) -> Any:
        if future.status == "finished":
            return future.result()
        if future.status == "error":
            return future.exception()
        raise BlockError(
            "The scheduler was lost, or the work was cancelled there. What is finished is kept: start the scheduler "
            "again and run again, it goes on from there."
        )
