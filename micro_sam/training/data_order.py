"""The order of training data, and the random choices for each item, as a function of (seed, epoch, position).

The batches of an epoch can be had from any position on without loading those before, and several processes share
them such that together they take what one process with a larger batch would take.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..core.errors import InvalidInputError
from . import processes
from .seeding import Purpose, seed_everything

_KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
         "prefetch_factor", "persistent_workers")


def set_epoch(data: Any, epoch: int) -> None:
    """Tell a dataset or sampler, and those that it wraps, which epoch it is, if they want to know."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    for part in (getattr(data, "dataset", None), *(getattr(data, "datasets", None) or ())):
        if part is not None:
            set_epoch(part, epoch)


class _SeededItems(Dataset):
    """A dataset whose items do not depend on which were drawn before, in this process or in a worker."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, Any]) -> Any:
        epoch, position, index = key
        seed_everything(self.seed, Purpose.ITEM, epoch, position)
        set_epoch(self.dataset, epoch)
        return self.dataset[index]


class _Batches:
    """A batch sampler that gives the batches it was told to give."""

    def __init__(self):
        self.batches = []

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class EpochLoader:
    """Gives the batches of any epoch, from any position on.

    Loaders of torch with a dataset that has a length are rebuilt around their batch sampler. From all others, the
    batches before the position are drawn and thrown away; then a run continues exactly only as far as the
    loader's random choices come from the global generators or from `set_epoch`.

    Args:
        loader: The loader, an iterable of (x, y) with a length.
        seed: The seed of the run.
        evenly: Whether several processes get equally many batches, as training needs; some are then given twice.
            Otherwise each batch is given once.
    """

    def __init__(self, loader: Iterable, seed: int, *, evenly: bool = True):
        if not hasattr(loader, "__len__"):
            raise InvalidInputError(f"A loader must have a length, but {type(loader).__name__} has none.")
        if len(loader) == 0:
            raise InvalidInputError("The loader has no batches. Give it more data, or a smaller batch size.")
        self.loader, self.seed, self.evenly = loader, seed, evenly
        self._batches, self._rebuilt = _Batches(), None
        if self._can_be_rebuilt():
            kept = {name: getattr(loader, name) for name in _KEPT}
            self._rebuilt = DataLoader(_SeededItems(loader.dataset, seed), batch_sampler=self._batches, **kept)

    def _can_be_rebuilt(self) -> bool:
        loader = self.loader
        return (
            isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
            and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        )

    @property
    def _n_shares(self) -> int:
        """Among how many processes the batches are shared here; 1 if the loader does it itself."""
        is_shared = isinstance(getattr(self.loader, "sampler", None), DistributedSampler)
        return 1 if is_shared else processes.world_size()

    @property
    def batch_size(self) -> int:
        """Images per batch and process, as far as the loader tells."""
        return getattr(self.loader, "batch_size", None) or 1

    def __len__(self) -> int:
        n_batches, n_shares = len(self.loader), self._n_shares
        if not self.evenly:
            return len(range(processes.rank() if n_shares > 1 else 0, n_batches, n_shares))
        return -(-n_batches // n_shares) if self._rebuilt is not None else max(n_batches // n_shares, 1)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over this process's batches of an epoch, without the first `skip`."""
        if self._rebuilt is None:
            return itertools.islice(self._drawn(epoch), skip, len(self))
        self._batches.batches = self._plan(epoch)[skip:]
        return iter(self._rebuilt)

    def _start(self, epoch: int) -> None:
        sampler = getattr(self.loader, "sampler", None)
        seed_everything(self.seed, Purpose.ORDER, epoch)
        for own in {id(g): g for g in (getattr(sampler, "generator", None), getattr(self.loader, "generator", None))
                    if isinstance(g, torch.Generator)}.values():
            own.manual_seed(torch.initial_seed())
        set_epoch(sampler, epoch)

    def _plan(self, epoch: int) -> list[list[tuple[int, int, Any]]]:
        """The keys of the items of each batch."""
        self._start(epoch)
        position, plan = itertools.count(), []
        for indices in itertools.islice(iter(self.loader.batch_sampler), len(self.loader)):
            plan.append([(epoch, next(position), index) for index in indices])
        n_shares = self._n_shares
        if self.evenly:
            plan = list(itertools.islice(itertools.cycle(plan), len(self) * n_shares))
        return plan[processes.rank()::n_shares] if n_shares > 1 else plan

    def _drawn(self, epoch: int) -> Iterator:
        self._start(epoch)
        set_epoch(getattr(self.loader, "dataset", None), epoch)
        iterator, n_shares = iter(self.loader), self._n_shares
        for k in itertools.count():
            seed_everything(self.seed, Purpose.ITEM, epoch, k)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if n_shares == 1 or k % n_shares == processes.rank():
                yield batch
