"""The loop over epochs: training, validation, and what follows them."""

import logging
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidInputError
from ..core.progress import Step, Steps
from . import processes
from .saving import CheckpointedTrainer
from .seeding import Purpose, seed_everything

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch: its loss, its metric (validation), and what a logger is given."""

    loss: Tensor
    metric: float | None = None
    samples: Any = None
    logged: tuple = ()


class EpochLoop(CheckpointedTrainer):
    """The part of `BaseTrainer` that goes through epochs and batches."""

    def _run(self) -> Steps[None]:
        self._start_time = self._last_save = time.time()
        self._last_loss = None
        self._earlier_time = self.train_time
        try:
            yield self._step_report()
            while not self._is_complete():
                yield from self._train_epoch_steps()
                metric = yield from self._validate_steps()
                self._finish_epoch(metric)
                yield self._step_report()  # with the metric, also after the last epoch
        except KeyboardInterrupt:
            self._save_boundary()
            raise self._cancelled() from None
        except GeneratorExit:
            self._save_boundary()
            raise
        finally:
            self.train_time = self._elapsed()
        logger.info("Finished after %d epochs and %d iterations; best metric %.4f in epoch %d.",
                    self._epoch, self._iteration, self.best_metric, self._best_epoch + 1)

    def _elapsed(self) -> float:
        return self._earlier_time + time.time() - self._start_time

    def _step_report(self) -> Step:
        text = f"Epoch {min(self._epoch + 1, self.max_epoch)}/{self.max_epoch}"
        if self._last_loss is not None:
            text += f", loss {self._last_loss:.4f}"
        if math.isfinite(self.best_metric):
            text += f", metric {self.current_metric:.4f} (best {self.best_metric:.4f})"
        return Step(self._iteration, self.max_iteration, text)

    def _to_device(self, batch: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _check_range(self, x: Tensor) -> None:
        low, high = float(x.min()), float(x.max())
        if low < 0 or high < 1:
            warnings.warn(
                f"The images of a batch have values in [{low:.4g}, {high:.4g}], but should be in [0, 255]. Scale them, "
                "for example with raw_transform=require_8bit.", stacklevel=3,
            )

    def _train_epoch_steps(self) -> Steps[None]:
        """Train until the end of the epoch, or of the training."""
        self._set_mode(True)
        self.optimizer.zero_grad()
        n_batches, contributed, is_first = self._n_batches, 0, True
        if self._iteration >= self.max_iteration:
            return
        for batch in self._train_batches.batches(self._epoch, self._position):
            x, y = self._to_device(batch)
            if is_first:
                self._check_range(x)
                is_first = False
            seed_everything(self.seed, Purpose.TRAINING, self._iteration, processes.rank())
            result = self._train_batch(x, y)
            contributed += result is not None
            self._n_skipped += result is None
            if result is not None:
                self._last_loss = float(result.loss)
                self._log_train(x, y, result)
            self._iteration += 1
            self._position += 1
            is_end = self._position == n_batches or self._iteration >= self.max_iteration
            if is_end or self._position % self.gradient_accumulation_steps == 0:
                self._optimizer_step(contributed)
                contributed = 0
                self._mark_boundary()
                self._save_or_stop()
            yield self._step_report()
            if is_end:
                break
        self._report_skipped(self._n_skipped, self._position, "training")

    def _report_skipped(self, n_skipped: int, n_batches: int, kind: str) -> None:
        if not n_skipped:
            return
        text = f"{n_skipped} of {n_batches} {kind} batches of epoch {self._epoch + 1} had no object"
        if n_skipped == n_batches:
            raise InvalidInputError(
                f"{text}. Check that the labels belong to the images and hold objects; use larger patches or a sampler "
                "that rejects empty ones."
            )
        logger.warning("%s and were skipped.", text)

    def _log_train(self, x: Tensor, y: Tensor, result: BatchResult) -> None:
        if self.logger is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.logger.log_train(self._iteration, result.loss, rate, x, y, result.samples, *result.logged)

    @torch.no_grad()
    def _validate_steps(self) -> Steps[float]:
        """Validate, and return the mean metric of all batches."""
        self._set_mode(False)
        processes.average_statistics(self._networks())
        sums, n_skipped, n_batches, last = None, 0, 0, None
        for k, batch in enumerate(self._val_batches.batches(0)):
            if not processes.is_active() and self._should_stop():
                self._save_boundary()
                raise self._cancelled()
            x, y = self._to_device(batch)
            if k == 0:
                self._check_range(x)
            index = k * processes.world_size() + processes.rank()
            seed_everything(self.seed, Purpose.VALIDATION, index)
            result = self._validate_batch(x, y, index)
            n_batches += 1
            if result is None:
                n_skipped += 1
                continue
            values = [1.0, result.metric, float(result.loss), *(float(v) for v in result.logged)]
            sums, last = [a + b for a, b in zip(sums or [0.0] * len(values), values)], (x, y, result.samples)
        count, metric, n_skipped, n_batches = processes.add_up(
            [*(sums or [0.0, 0.0])[:2], n_skipped, n_batches], self.device
        )
        self._report_skipped(int(n_skipped), int(n_batches), "validation")
        if self.logger is not None and sums is not None:
            means = [value / sums[0] for value in sums[2:]]
            x, y, samples = last
            self.logger.log_validation(self._iteration, metric / count, means[0], x, y, samples, *means[1:])
        return metric / count
        yield  # a generator, as it is part of one

    def _finish_epoch(self, metric: float) -> None:
        """Scheduler, checkpoints and early stopping after an epoch."""
        self._consistent = False
        if self.lr_scheduler is not None:
            takes = list(signature(self.lr_scheduler.step).parameters)
            self.lr_scheduler.step(*[metric] if takes and takes[0] in ("metric", "metrics") else [])
        self.current_metric, epoch = metric, self._epoch
        is_best = metric < self.best_metric
        if is_best:
            self.best_metric, self._best_epoch = metric, epoch
        self.stopped_early = self.early_stopping is not None and epoch - self._best_epoch >= self.early_stopping
        self._epoch, self._position, self._n_skipped = epoch + 1, 0, 0
        self._mark_boundary()
        keeps = self._save_every_kth_epoch is not None and self._epoch % self._save_every_kth_epoch == 0
        for name in ["best"] * is_best + ["latest"] + [f"epoch-{self._epoch}"] * keeps:
            self.save_checkpoint(name, metric, self.best_metric, train_time=self._elapsed())
        self._last_save = time.time()
        logger.info("Epoch %d: metric %.4f (best %.4f in epoch %d)%s.", self._epoch, metric, self.best_metric,
                    self._best_epoch + 1, self._explain(metric))
        if self.stopped_early:
            logger.info("Stopped early: no better metric in %d epochs.", self.early_stopping)

    def _set_mode(self, training: bool) -> None:
        """Training or evaluation mode; frozen modules are always in evaluation mode."""
        for network in self._networks():
            network.train(training)
            for module in network.modules():
                own = list(module.parameters())
                if own and not any(p.requires_grad for p in own):
                    module.eval()
