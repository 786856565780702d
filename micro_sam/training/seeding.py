"""Random numbers that depend on the seed of a run and on what they are for, and on nothing else.

Instead of storing the states of generators in checkpoints, the training seeds them from (seed, purpose, iteration).
So an interrupted run continues with the numbers of an uninterrupted one, whatever happened before.
"""

import contextlib
import random
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for."""

    ORDER = 0
    ITEM = 1
    TRAINING = 2
    VALIDATION = 3


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on a key of non-negative integers."""
    return np.random.default_rng([int(k) for k in key])


def seed_everything(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices) from a key of non-negative integers."""
    for_python, for_numpy, for_torch = np.random.SeedSequence([int(k) for k in key]).generate_state(3)
    random.seed(int(for_python))
    np.random.seed(int(for_numpy))
    torch.manual_seed(int(for_torch))


def new_seed() -> int:
    """A seed from the operating system."""
    return int(np.random.SeedSequence().generate_state(1)[0])


@contextlib.contextmanager
def preserved_random_states() -> Iterator[None]:
    """Give the global generators back as they were, so that a training does not influence the program around it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
