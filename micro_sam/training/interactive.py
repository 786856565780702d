"""One iteration of interactive training: initial prompts, then corrections where the prediction is wrong.

The scheme is that of SAM's training (Kirillov et al. 2023, 10.1109/ICCV51070.2023.00371, appendix A) as used for
microscopy by Archit et al. 2025 (10.1038/s41592-024-02580-4). All functions are plain; the trainers call them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prompt_generators import IterativePromptGenerator
from .convert import ConvertToSamInputs, object_ids, one_hot
from .losses import dice_per_object, iou_per_object
from .trainable_sam import TrainableSAM

PADDING_LABEL = -1


@dataclass(frozen=True)
class PromptChoice:
    """The initial prompts of an iteration, and whether SAM answers with several masks."""

    n_pos: int
    n_neg: int
    box: bool
    multimask: bool


ONE_POINT = PromptChoice(1, 0, box=False, multimask=True)
ONE_BOX = PromptChoice(0, 0, box=True, multimask=False)


def training_choice(iteration: int) -> PromptChoice:
    """Even iterations start from a point, odd ones from a box."""
    return ONE_BOX if iteration % 2 else ONE_POINT


def validation_choice(index: int, rng: np.random.Generator) -> PromptChoice:
    """By batch, in turn: a point; a box; several points; a box and several points."""
    kind = index % 4
    if kind < 2:
        return training_choice(kind)
    n_pos, with_box = int(rng.integers(1, 5)), kind == 3
    # A single positive point alone would be the first kind.
    n_neg = int(rng.integers(0 if with_box or n_pos > 1 else 1, 5))
    return PromptChoice(n_pos, n_neg, box=with_box, multimask=False)


@dataclass(frozen=True)
class PromptBatch:
    """Records with prompts, float targets (B, N, 1, H, W), and which images of the batch they belong to.

    Images without objects are left out; all others have the same number N of objects.
    """

    inputs: list[dict[str, Any]]
    targets: Tensor
    images: list[int]


def prompt_batch(
    convert_inputs: ConvertToSamInputs, x: Tensor, y: Tensor, choice: PromptChoice, n_objects: int | None
) -> PromptBatch | None:
    """Sample objects and make their initial prompts.

    Args:
        convert_inputs: Makes the prompts.
        x: Images (B, C, H, W), 0…255.
        y: Instance labels (B, 1, H, W).
        choice: Which prompts.
        n_objects: Objects per image, at most; None takes all.

    Returns:
        The prompts, or None if no image has an object.
    """
    images = [k for k in range(len(y)) if bool((y[k] != 0).any())]
    if not images:
        return None
    x, y = x[images], y[images]
    counts = [len(object_ids(labels.cpu())) for labels in y]
    n_objects = min(counts) if n_objects is None else min(*counts, n_objects)
    records, ids = convert_inputs(
        x, y, n_pos=choice.n_pos, n_neg=choice.n_neg, get_boxes=choice.box, n_samples=n_objects
    )
    targets = torch.stack([one_hot(labels[0], chosen).float() for labels, chosen in zip(y, ids)])
    return PromptBatch(records, targets, images)


@dataclass
class Losses:
    """Losses of an iteration (0-d tensors), the mean predicted IoU, and for logging one mask (1, H, W) per image."""

    loss: Tensor
    mask_loss: Tensor
    iou_loss: Tensor
    model_iou: float
    samples: list[Tensor] = field(default_factory=list)


def mask_and_iou_loss(
    outputs: Sequence[dict[str, Tensor]],
    targets: Tensor,
    mask_loss: Callable[[Tensor, Tensor], Tensor] = dice_per_object,
    mse_loss: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.mse_loss,
) -> tuple[Tensor, Tensor]:
    """Losses of predicted masks and of predicted IoUs, means over the images of a batch.

    For each object the best of its masks counts; the IoU is learned for all of them.

    Args:
        outputs: What `TrainableSAM` returns.
        targets: Truth (B, N, 1, H, W).
        mask_loss: Loss (N, M) of probabilities (N, M, H, W) and truth (N, 1, H, W).
        mse_loss: Loss of predicted and true IoUs.

    Returns:
        The two losses.
    """
    mask_losses, iou_losses = [], []
    for output, target in zip(outputs, targets, strict=True):
        probabilities = torch.sigmoid(output["masks"].float())
        mask_losses.append(mask_loss(probabilities, target).amin(dim=1).mean())
        true_iou = iou_per_object(probabilities, target)
        iou_losses.append(mse_loss(output["iou_predictions"].float(), true_iou))
    return torch.stack(mask_losses).mean(), torch.stack(iou_losses).mean()


def single_pass_losses(
    model: TrainableSAM,
    inputs: Sequence[dict[str, Any]],
    targets: Tensor,
    embeddings: Tensor,
    *,
    multimask: bool,
    mask_loss: Callable = dice_per_object,
    mse_loss: Callable = torch.nn.functional.mse_loss,
) -> Losses:
    """Losses of the masks for the initial prompts; arguments as for `interactive_losses`."""
    outputs = model(inputs, embeddings, multimask_output=multimask)
    masks, iou = mask_and_iou_loss(outputs, targets, mask_loss, mse_loss)
    model_iou = float(np.mean([float(out["iou_predictions"].detach().mean()) for out in outputs]))
    return Losses(masks + iou, masks, iou, model_iou, [_first_object(out) for out in outputs])


def interactive_losses(
    model: TrainableSAM,
    inputs: Sequence[dict[str, Any]],
    targets: Tensor,
    embeddings: Tensor,
    *,
    n_sub_iteration: int,
    multimask: bool,
    mask_prob: float,
    prompt_generator: IterativePromptGenerator,
    rng: np.random.Generator,
    mask_loss: Callable = dice_per_object,
    mse_loss: Callable = torch.nn.functional.mse_loss,
    accumulate: Callable[[Tensor], None] | None = None,
) -> Losses:
    """Losses of a sequence of predictions, each corrected by a positive and a negative point for the next.

    Args:
        model: The model.
        inputs: Records with the initial prompts and `input_size`. They are not changed.
        targets: Truth (B, N, 1, H, W).
        embeddings: Image embeddings (B, 256, h, w).
        n_sub_iteration: Number of predictions.
        multimask: Whether the first prediction has three masks for each object.
        mask_prob: Probability, for each image and prediction, that the last mask is a prompt for the next.
        prompt_generator: Chooses the points from truth and prediction.
        rng: Draws the mask prompts.
        mask_loss: See `mask_and_iou_loss`.
        mse_loss: See `mask_and_iou_loss`.
        accumulate: Called with each prediction's share of the loss, typically to run its backward pass: then the
            activations of one prediction are kept at a time, and the returned losses have no gradients. The gradients
            are the same, as corrections are chosen without gradients.

    Returns:
        The losses, means over the predictions.
    """
    records, parts, samples = [dict(record) for record in inputs], [], []
    for k in range(n_sub_iteration):
        outputs = model(records, embeddings, multimask_output=multimask and k == 0)
        losses = mask_and_iou_loss(outputs, targets, mask_loss, mse_loss)
        model_iou = float(np.mean([float(out["iou_predictions"].detach().mean()) for out in outputs]))
        if accumulate is not None:
            accumulate(sum(losses) / n_sub_iteration)
            losses = tuple(loss.detach() for loss in losses)
        parts.append((*losses, model_iou))
        if k == n_sub_iteration - 1:
            samples = [_first_object(out) for out in outputs]
        else:
            records = [
                _correct(model, record, out, target, prompt_generator, rng.random() < mask_prob)
                for record, out, target in zip(records, outputs, targets)
            ]
    masks, iou = (sum(part[i] for part in parts) / n_sub_iteration for i in (0, 1))
    return Losses(masks + iou, masks, iou, float(np.mean([part[2] for part in parts])), samples)


def _best(output: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each object the mask of the highest predicted IoU: logits (N, 1, H, W), and low-resolution logits."""
    best = output["iou_predictions"].argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return output["masks"][rows, best][:, None].detach(), output["low_res_masks"][rows, best][:, None].detach()


def _first_object(output: dict[str, Tensor]) -> Tensor:
    return (_best({k: v[:1] for k, v in output.items()})[0][0] > 0).float()


@torch.no_grad()
def _correct(
    model: TrainableSAM, record: dict[str, Any], output: dict[str, Tensor], target: Tensor,
    prompt_generator: IterativePromptGenerator, with_mask: bool,
) -> dict[str, Any]:
    """The record with two more points per object, and with or without a mask prompt."""
    masks, low_res = _best(output)
    points, labels = correction_points(prompt_generator, target, masks > 0)
    points = model.transform.apply_coords_torch(points, record["original_size"])
    if "point_coords" in record:
        points = torch.cat([record["point_coords"], points], dim=1)
        labels = torch.cat([record["point_labels"], labels], dim=1)
    record = record | {"point_coords": points, "point_labels": labels}
    record.pop("mask_inputs", None)
    return record | {"mask_inputs": low_res.float()} if with_mask else record


def correction_points(
    prompt_generator: IterativePromptGenerator, target: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """A positive and a negative point for each object (N, 1, H, W): coordinates (N, 2, 2) as (x, y), and labels.

    An object that fills the whole image leaves no room for a negative point and gets padding instead.
    """
    full = target.flatten(1).bool().all(dim=1)
    if full.any():
        target = target.clone()
        target[full, :, 0, 0] = 0  # the only candidate for the negative point, which becomes padding
    points, labels, _, _ = prompt_generator(target, prediction.float())
    labels[full, 1] = PADDING_LABEL
    return points, labels
