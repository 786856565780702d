"""Curves and images of a training for TensorBoard, which is imported only when a training starts."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_em.trainer.logger_base import TorchEmLogger
from torchvision.utils import make_grid

logger = logging.getLogger(__name__)

_PER_ROW = 4


def normalized(image: Tensor) -> Tensor:
    """A copy (C, H, W) with values in 0…1; a constant image becomes 0."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else torch.zeros_like(image)


def colored(labels: Tensor) -> Tensor:
    """A label image (1, H, W) as grey values in 0…1, in which neighbouring ids differ; other maps are normalised."""
    labels = labels.detach().float().cpu()
    if labels.max() <= 1:
        return normalized(labels)
    # Multiples of the golden ratio spread consecutive ids.
    return torch.where(labels > 0, 0.3 + 0.7 * torch.frac(labels * 0.618034), 0.0)


class _TensorBoardLogger(TorchEmLogger):
    """Writes to `<save_root>/logs/<name>`; without TensorBoard nothing is written.

    Args:
        trainer: The trainer.
        save_root: The folder of checkpoints and logs. None is the current one.
        unused_kwargs: For other loggers.
    """

    def __init__(self, trainer: Any, save_root: str | None, **unused_kwargs: Any) -> None:
        super().__init__(trainer, save_root)
        self.log_dir = os.path.join(save_root or ".", "logs", trainer.name)
        self.log_image_interval = trainer.log_image_interval
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.tb = None
            logger.warning("TensorBoard is not installed, so that nothing is logged. pip install tensorboard")
            return
        # What an interrupted run wrote after its last checkpoint is replaced.
        self.tb = SummaryWriter(self.log_dir, purge_step=trainer.iteration or None)

    def _scalars(self, kind: str, step: int, **values: Any) -> None:
        if self.tb is not None:
            for name, value in values.items():
                self.tb.add_scalar(f"{kind}/{name}", float(value), step)

    def _is_due(self, step: int) -> bool:
        return self.tb is not None and step % self.log_image_interval == 0

    def add_image(self, x: Tensor, y: Tensor, samples: Sequence[Tensor] | Tensor, name: str, step: int) -> None:
        """Write input and target of the first image of a batch, and predictions (C, H, W) of its images, as a grid."""
        if self.tb is None:
            return
        self.tb.add_image(f"{name}/input", normalized(x[0]), step)
        self.tb.add_image(f"{name}/target", make_grid([colored(c[None]) for c in y[0]], nrow=_PER_ROW), step)
        shown = [normalized(c[None]) for sample in samples for c in sample]
        if shown:
            self.tb.add_image(f"{name}/samples", make_grid(shown, nrow=_PER_ROW), step)


class PredictionLogger(_TensorBoardLogger):
    """Logs loss, metric and predicted maps."""

    def log_train(self, step, loss, lr, x, y, prediction, log_gradients=False):
        """Write loss and learning rate, and images at some iterations."""
        self._scalars("train", step, loss=loss, learning_rate=lr)
        if self._is_due(step):
            self.add_image(x, y, prediction, "train", step)

    def log_validation(self, step, metric, loss, x, y, prediction):
        """Write loss, metric and images of a validation."""
        self._scalars("validation", step, loss=loss, metric=metric)
        self.add_image(x, y, prediction, "validation", step)


class SamLogger(_TensorBoardLogger):
    """Logs the losses of interactive training, and masks of the first object of each image."""

    def log_train(self, step, loss, lr, x, y, samples, mask_loss, iou_regression_loss, model_iou):
        """Write the losses of an iteration, and images at some iterations."""
        self._train(step, loss, lr, x, y, samples, mask_loss, iou_regression_loss, model_iou)

    def _train(self, step, loss, lr, x, y, samples, mask_loss, iou_regression_loss, model_iou, **more):
        self._scalars("train", step, loss=loss, mask_loss=mask_loss, iou_loss=iou_regression_loss,
                      model_iou=model_iou, learning_rate=lr, **more)
        if self._is_due(step):
            self.add_image(x, y, samples, "train", step)

    def log_validation(self, step, metric, loss, x, y, samples, mask_loss, iou_regression_loss, model_iou):
        """Write the losses of a validation, and images."""
        self._validation(step, metric, loss, x, y, samples, mask_loss, iou_regression_loss, model_iou)

    def _validation(self, step, metric, loss, x, y, samples, mask_loss, iou_regression_loss, model_iou, **more):
        self._scalars("validation", step, loss=loss, mask_loss=mask_loss, iou_loss=iou_regression_loss,
                      model_iou=model_iou, metric=metric, **more)
        self.add_image(x, y, samples, "validation", step)


class JointSamLogger(SamLogger):
    """Logs in addition the loss of the decoder; `loss` is the interactive loss alone."""

    def log_train(self, step, loss, lr, x, y, samples, mask_loss, iou_regression_loss, model_iou, instance_loss):
        """Write the losses of an iteration, and images at some iterations."""
        self._train(
            step, loss, lr, x, y, samples, mask_loss, iou_regression_loss, model_iou, instance_loss=instance_loss
        )

    def log_validation(
        self, step, metric, loss, x, y, samples, mask_loss, iou_regression_loss, model_iou, instance_loss
    ):
        """Write the losses of a validation, and images."""
        self._validation(
            step, metric, loss, x, y, samples, mask_loss, iou_regression_loss, model_iou, instance_loss=instance_loss
        )
