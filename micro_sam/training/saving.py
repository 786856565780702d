"""Checkpoints of a running training: where it can be continued exactly, writing them, and going back to them."""

import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..core.errors import CheckpointError, InvalidTypeError, UnsupportedError
from ..core.progress import Cancelled
from ..models.export import save_checkpoint
from . import checkpoint as checkpoints
from . import processes


class CheckpointedTrainer:
    """The part of `BaseTrainer` that writes and reads its checkpoints."""

    def _mark_boundary(self) -> None:
        """Remember where the weights belong: an interruption before the next step of the optimizer returns here."""
        self._boundary = (self._iteration, self._epoch, self._position, self._n_skipped)
        self._states = checkpoints.random_states(self._random_owners())
        self._consistent = True

    def _save_boundary(self) -> None:
        if self._consistent:
            self._iteration, self._epoch, self._position, self._n_skipped = self._boundary
            self._save_latest()

    def _save_latest(self) -> None:
        self.save_checkpoint("latest", self.current_metric, self.best_metric, train_time=self._elapsed())
        self._last_save = time.time()

    def _save_or_stop(self) -> None:
        n_iterations, minutes = self._save_interval
        due = minutes is not None and time.time() - self._last_save > 60 * minutes
        if n_iterations is not None:
            due = due or self._iteration // n_iterations > (
                max(self._iteration - self.gradient_accumulation_steps, 0) // n_iterations
            )
        stop, save = processes.any_process([self._should_stop(), due], self.device)
        if stop or save:
            processes.average_statistics(self._networks())
            self._save_latest()
        if stop:
            raise self._cancelled()

    def _cancelled(self) -> Cancelled:
        path = checkpoints.path_of(self.checkpoint_folder, "latest")
        return Cancelled(f"The training was cancelled in iteration {self._iteration}. Continue it from {path}.")

    def save_checkpoint(
        self, name: str, current_metric: float, best_metric: float, train_time: float = 0.0, **extra_save_dict: Any
    ) -> None:
        """Write a checkpoint of tensors and plain values to `<checkpoint_folder>/<name>.pt`.

        Args:
            name: The name, such as `best` or `latest`.
            current_metric: The metric of the last validation.
            best_metric: The best metric so far.
            train_time: Seconds of training so far.
            extra_save_dict: More entries. `init` is merged with the settings of the training.
        """
        if processes.rank() != 0:
            return
        content = {
            "iteration": self._iteration, "epoch": self._epoch - 1, "epoch_position": self._position,
            "n_batches_per_epoch": self._n_batches, "n_skipped": self._n_skipped,
            "best_epoch": self._best_epoch, "best_metric": best_metric, "current_metric": current_metric,
            "stopped_early": self.stopped_early, "completed": self._is_complete(),
            "train_time": train_time, "timestamp": datetime.now().strftime("%d-%m-%Y (%H:%M:%S)"),
            "model_state": checkpoints.unwrapped(self.model.state_dict()),
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": {} if self.scaler is None else self.scaler.state_dict(),
            "scheduler_state": {} if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "random_states": self._states, **self._model_description(),
            "init": {**self._build_init(), **extra_save_dict.pop("init", {})}, **extra_save_dict,
        }
        save_checkpoint(dict(checkpoints.plain(content)), checkpoints.path_of(self.checkpoint_folder, name))

    def load_checkpoint(self, checkpoint: str | os.PathLike | Mapping[str, Any] = "best") -> Mapping[str, Any]:
        """Restore the state of a training.

        Args:
            checkpoint: A name in the checkpoint folder, a path, or the content of a checkpoint.

        Returns:
            The content.

        Raises:
            MissingFileError: If there is no such file.
            CheckpointError: If it does not fit.
        """
        if isinstance(checkpoint, Mapping):
            content, path = checkpoint, "the checkpoint"
        elif isinstance(checkpoint, str | os.PathLike):
            path = checkpoints.path_of(self.checkpoint_folder, checkpoint)
            content = checkpoints.read(path)
        else:
            raise InvalidTypeError(f"checkpoint must be a name, a path or a dict, but is {type(checkpoint).__name__}.")
        try:
            self._restore(content)
        except (KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} does not fit this training: {error} Use the model, optimizer, scheduler and trainer that it "
                "was written with, or start from its weights with checkpoint_path."
            ) from error
        return content

    def _restore(self, content: Mapping[str, Any]) -> None:
        self.model.load_state_dict(checkpoints.unwrapped(content["model_state"]))
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.scaler is not None and content.get("scaler_state"):
            self.scaler.load_state_dict(content["scaler_state"])
        if self.lr_scheduler is not None and content.get("scheduler_state"):
            self.lr_scheduler.load_state_dict(dict(content["scheduler_state"]))
        self._iteration, self._epoch = int(content["iteration"]), int(content["epoch"]) + 1
        self._position = int(content.get("epoch_position", 0))
        self._n_skipped = int(content.get("n_skipped", 0))
        self._loaded_n_batches = content.get("n_batches_per_epoch")
        self._best_epoch = int(content.get("best_epoch", 0))
        self.best_metric = float(content.get("best_metric", math.inf))
        self.current_metric = float(content.get("current_metric", math.nan))
        self.stopped_early = bool(content.get("stopped_early", False))
        self.train_time = float(content.get("train_time", 0.0))
        seed = content["init"].get("seed") if isinstance(content.get("init"), Mapping) else None
        if seed is not None:
            self.seed = int(seed)
        checkpoints.restore_random_states(self._random_owners(), content.get("random_states", {}))

    @classmethod
    def from_checkpoint(cls, checkpoint_folder, name="best", device=None):
        """Not supported: a checkpoint holds settings, but neither data nor code to build the training from.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "A training is not rebuilt from a checkpoint alone. Build the trainer with the arguments that the "
            "checkpoint records as 'init', and call fit(load_from_checkpoint=...)."
        )
