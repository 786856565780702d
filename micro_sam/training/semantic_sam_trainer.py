"""Training of SAM without prompts: for semantic segmentation, or for the regression of maps."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_em.loss import DiceLoss

from ..core.errors import InvalidInputError
from . import checkpoint as checkpoints
from .base_trainer import BaseTrainer

logger = logging.getLogger(__name__)


class CustomDiceLoss(nn.Module):
    """Soft Dice loss of class scores and class ids, summed over the classes; in 0…`num_classes`.

    Args:
        num_classes: Number of classes, with the background.
        softmax: Whether to turn the scores into probabilities first.
    """

    def __init__(self, num_classes: int, softmax: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dice_loss = DiceLoss()
        self.softmax = softmax

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            pred: Scores (B, C, H, W).
            target: Class ids (B, 1, H, W).

        Returns:
            The loss, a scalar.

        Raises:
            InvalidInputError: If shapes or ids do not fit the number of classes.
        """
        ids = class_ids(pred, target, self.num_classes)
        one_hot = F.one_hot(ids, self.num_classes).movedim(-1, 1).to(pred.dtype)
        return self.dice_loss(torch.softmax(pred, dim=1) if self.softmax else pred, one_hot)


def class_ids(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The class ids (B, H, W), after checks that they fit the scores (B, C, H, W)."""
    if pred.ndim != 4 or pred.shape[1] != num_classes:
        raise InvalidInputError(
            f"For {num_classes} classes the scores must be (B, {num_classes}, H, W), but are {tuple(pred.shape)}. "
            f"Build the model with num_multimask_outputs={num_classes}."
        )
    if target.shape != (pred.shape[0], 1, *pred.shape[2:]):
        raise InvalidInputError(f"Targets must be (B, 1, H, W), but are {tuple(target.shape)}.")
    ids = target[:, 0].long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_classes:
        raise InvalidInputError(
            f"Class ids must be in 0…{num_classes - 1}, but are in {low}…{high}. Set num_classes, which counts the "
            "background too, or correct the labels."
        )
    return ids


class SemanticSamTrainer(BaseTrainer):
    """Trains SAM without prompts to give the scores of classes, as the masks for an ambiguous prompt.

    The loss is the Dice loss (`CustomDiceLoss`) plus the cross entropy.

    Args:
        convert_inputs: Makes the records, such as `ConvertToSemanticSamInputs`.
        num_classes: Number of classes with the background, at least 2. The model needs as many masks.
        dice_weight: Weight w in w * Dice + (1 - w) * cross entropy. None adds them up.
        kwargs: Arguments of `BaseTrainer`. The `metric`, of scores (B, C, H, W) and ids (B, 1, H, W), is the loss by
            default. A `loss` is accepted for older scripts, but not used: `SemanticMapsSamTrainer` takes one.

    Raises:
        InvalidInputError: If an option is outside its range.
    """

    def __init__(
        self, convert_inputs: Callable, num_classes: int, dice_weight: float | None = None, **kwargs: Any
    ) -> None:
        self._check(num_classes, dice_weight)
        self.dice_weight = dice_weight
        super().__init__(**self._losses(num_classes, kwargs))
        self.convert_inputs = convert_inputs
        self.num_classes = num_classes

    @staticmethod
    def _check(num_classes: int, dice_weight: float | None) -> None:
        if num_classes <= 1:
            raise InvalidInputError(f"num_classes counts the background too and must be at least 2, not {num_classes}.")
        if dice_weight is not None and not 0 <= dice_weight <= 1:
            raise InvalidInputError(f"dice_weight must be in [0, 1] or None, but is {dice_weight!r}.")

    def _losses(self, num_classes: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("loss") is not None:
            logger.warning("SemanticSamTrainer does not use the loss that was passed, but Dice loss and cross entropy.")
        loss = DiceAndCrossEntropy(num_classes, self.dice_weight)
        metric = kwargs.get("metric")
        return {**kwargs, "loss": loss, "metric": loss if metric is None else metric}

    def _configuration(self) -> dict[str, Any]:
        return {
            **super()._configuration(), "num_classes": self.num_classes, "dice_weight": self.dice_weight,
            "convert_inputs": {"class": checkpoints.class_name(self.convert_inputs)},
        }

    def _model_description(self) -> dict[str, Any]:
        description = super()._model_description()
        return {**description, "settings": {**description["settings"], "num_multimask_outputs": self.num_classes}}

    def _encoder(self) -> nn.Module:
        return self.model.sam.image_encoder

    def _predict(self, x: Tensor, y: Tensor) -> Tensor:
        """The scores or maps (B, C, H, W)."""
        records = self.convert_inputs(x, y)
        with self._autocast():
            embeddings, records = self.model.image_embeddings_oft(records)
            outputs = self.model(records, embeddings, multimask_output=True)
        return torch.cat([output["masks"] for output in outputs]).float()


class DiceAndCrossEntropy(nn.Module):
    """Dice loss and cross entropy of class scores, added or weighted; see `SemanticSamTrainer`."""

    def __init__(self, num_classes: int, dice_weight: float | None = None) -> None:
        super().__init__()
        self.dice = CustomDiceLoss(num_classes)
        self.dice_weight = dice_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of scores (B, C, H, W) and ids (B, 1, H, W)."""
        dice = self.dice(pred, target)
        cross_entropy = F.cross_entropy(pred, target[:, 0].long())
        if self.dice_weight is None:
            return dice + cross_entropy
        return self.dice_weight * dice + (1 - self.dice_weight) * cross_entropy


class SemanticMapsSamTrainer(SemanticSamTrainer):
    """Trains SAM without prompts to give maps, with the loss that is passed.

    Args:
        convert_inputs: Makes the records, such as `ConvertToSemanticSamInputs`.
        num_classes: Number of maps. The model needs as many masks.
        kwargs: Arguments of `BaseTrainer`. `loss` takes predicted and true maps, (B, C, H, W) both, in this order;
            `metric` is the loss by default.

    Raises:
        InvalidInputError: If there is no loss, or a `dice_weight`.
    """

    @staticmethod
    def _check(num_classes: int, dice_weight: float | None) -> None:
        if num_classes < 1:
            raise InvalidInputError(f"num_classes, the number of maps, must be at least 1, not {num_classes}.")
        if dice_weight is not None:
            raise InvalidInputError("SemanticMapsSamTrainer uses the loss that is passed. Leave dice_weight out.")

    def _losses(self, num_classes: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("loss") is None:
            raise InvalidInputError("SemanticMapsSamTrainer needs a loss of predicted and true maps.")
        metric = kwargs.get("metric")
        return {**kwargs, "metric": kwargs["loss"] if metric is None else metric}
