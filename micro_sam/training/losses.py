"""The losses of training: Dice, the regression of the IoU, and the loss of the instance decoder."""

import torch
from torch import Tensor, nn

EPSILON = 1e-7


def dice_per_object(prediction: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss of each object and mask (Milletari et al. 2016, 10.1109/3DV.2016.79).

    Args:
        prediction: Probabilities (N, M, H, W).
        target: Truth (N, 1, H, W) in 0…1.

    Returns:
        1 - 2 sum(p t) / (sum(p²) + sum(t²)) for each, (N, M).
    """
    overlap = torch.einsum("nmhw,nkhw->nm", prediction, target)
    total = prediction.square().sum((-2, -1)) + target.square().sum((-2, -1))
    return 1 - 2 * overlap / total.clamp(min=EPSILON)


def dice(prediction: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss over all pixels of a batch, a scalar."""
    overlap = (prediction * target).sum()
    total = prediction.square().sum() + target.square().sum()
    return 1 - 2 * overlap / total.clamp(min=EPSILON)


@torch.no_grad()
def iou_per_object(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union (N, M) of the masks p > 0.5, (N, M, H, W), with the truth (N, 1, H, W)."""
    predicted, truth = prediction > 0.5, target > 0.5
    overlap = (predicted & truth).sum((-2, -1), dtype=torch.float32)
    union = (predicted | truth).sum((-2, -1), dtype=torch.float32)
    return overlap / (union + EPSILON)


class DecoderLoss(nn.Module):
    """Loss of the instance decoder: the Dice losses of foreground, centre distance and boundary distance, summed.

    Distances count inside of objects only. The range is 0…3; a batch without any object has the loss 3 (Archit et al.
    2025, 10.1038/s41592-024-02580-4).
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of maps (B, 3, H, W): foreground, centre distance, boundary distance, each in 0…1."""
        foreground = target[:, :1]
        terms = [dice(prediction[:, :1], foreground)]
        for channel in (1, 2):
            terms.append(dice(prediction[:, channel:channel + 1] * foreground,
                              target[:, channel:channel + 1] * foreground))
        return sum(terms)
