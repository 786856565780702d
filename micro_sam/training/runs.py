"""What the ways of finetuning share: checks before anything is loaded, optimizer and scheduler, the fit itself."""

import contextlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from segment_anything.modeling import Sam
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..core.errors import InvalidInputError, InvalidTypeError, nearest_names
from ..models.peft_sam import peft_settings
from .base_trainer import BaseTrainer
from .model_setup import check_freeze
from .verify import verify_loader

logger = logging.getLogger(__name__)

MODEL_OPTIONS = ("image_size", "num_multimask_outputs", "flexible_load_checkpoint")
_PLATEAU = {"mode": "min", "factor": 0.9, "patience": 3}


@contextlib.contextmanager
def quiet_libraries(ignore_warnings: bool) -> Iterator[None]:
    """Leave out the warnings of other packages; our own, on normalisation and decoder weights, are always shown."""
    with warnings.catch_warnings():
        if ignore_warnings:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="micro_sam")
        yield


def parameter_names(function: Callable) -> list[str]:
    """The names of the arguments of a function, without `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]


def check_model_options(function: Callable, options: Mapping[str, Any]) -> None:
    """Raise `InvalidTypeError`, with the nearest names, if `**model_kwargs` has what no model takes."""
    for name in options:
        if name not in MODEL_OPTIONS:
            known = [*parameter_names(function), *MODEL_OPTIONS]
            raise InvalidTypeError(
                f"{function.__name__} got the unknown argument {name!r}. {nearest_names(name, known)}"
            )


def check_options(freeze: Any, peft_kwargs: Mapping[str, Any] | None, lr: float, pbar_signals: Any, progress: Any,
                  n_epochs: int | None, n_iterations: int | None) -> None:
    """Refuse what cannot be trained, before loaders are inspected and weights are downloaded.

    Raises:
        InvalidInputError, InvalidTypeError, PeftError: With what to do.
    """
    check_freeze(freeze, peft_kwargs)
    peft_settings(peft_kwargs)
    if not lr > 0:
        raise InvalidInputError(f"The learning rate lr must be positive, but is {lr!r}.")
    if pbar_signals is not None and progress is not None:
        raise InvalidInputError("pbar_signals and progress both show the progress. Pass one of them.")
    if n_epochs is None and n_iterations is None:
        raise InvalidInputError("Neither n_epochs nor n_iterations was given. Pass one of them.")


def verify_loaders(loaders: Mapping[str, Iterable], n_batches: int | None, verbose: bool, **kinds: bool) -> None:
    """Check the first batches of loaders, see `verify_loader`; None checks nothing."""
    if n_batches is not None:
        for name, loader in loaders.items():
            verify_loader(loader, n_batches, name=f"the loader for {name}", verbose=verbose, **kinds)


@dataclass(frozen=True)
class Optimization:
    """An optimizer for some parameters, and its scheduler."""

    optimizer: Optimizer
    scheduler: Any

    @classmethod
    def create(
        cls, networks: Iterable[nn.Module], lr: float, optimizer_class: Callable, scheduler_class: Callable | None,
        scheduler_kwargs: Mapping[str, Any] | None,
    ) -> "Optimization":
        """Make both for those parameters of some networks that are not frozen; shared ones are taken once.

        Raises:
            InvalidInputError: If everything is frozen.
            InvalidTypeError: If the scheduler needs other arguments.
        """
        shared = {id(p): p for network in networks for p in network.parameters() if p.requires_grad}
        if not shared:
            raise InvalidInputError("All parameters are frozen, so there is nothing to train. Freeze fewer parts.")
        optimizer = optimizer_class(list(shared.values()), lr=lr)
        if scheduler_class is None:
            if scheduler_kwargs:
                raise InvalidInputError("scheduler_kwargs were given without scheduler_class. Pass both or none.")
            return cls(optimizer, None)
        if scheduler_kwargs is None:
            scheduler_kwargs = _PLATEAU if scheduler_class is ReduceLROnPlateau else {}
        try:
            return cls(optimizer, scheduler_class(optimizer, **scheduler_kwargs))
        except TypeError as error:
            raise InvalidTypeError(
                f"The scheduler {scheduler_class.__name__} cannot be made with scheduler_kwargs="
                f"{dict(scheduler_kwargs)}: {error}. Pass the arguments that it needs."
            ) from error


def describe_run(model_type: str, checkpoint_path: Any, sam: Sam, freeze: Any, extra: Mapping[str, Any] | None) -> dict:
    """What checkpoints say about where the model comes from."""
    return {
        "base_model": model_type, "base_checkpoint": None if checkpoint_path is None else str(checkpoint_path),
        "peft": getattr(sam, "peft_settings", None) or None, "freeze": list(check_freeze(freeze)), **(extra or {}),
    }


def fit(
    trainer: BaseTrainer, n_epochs: int | None, n_iterations: int | None, *, resume: bool, overwrite_training: bool,
    pbar_signals: Any, progress: Any, **options: Any,
) -> None:
    """Run a trainer and report the time; `n_iterations` overrides `n_epochs`."""
    start = time.perf_counter()
    trainer.fit(
        iterations=n_iterations, epochs=n_epochs if n_iterations is None else None,
        overwrite_training=overwrite_training and not resume,
        progress=progress if pbar_signals is None else pbar_signals, **options,
    )
    logger.info("Training took %s (hours:minutes:seconds).", timedelta(seconds=round(time.perf_counter() - start)))
