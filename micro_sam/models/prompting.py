"""Prompts in, masks out, for the image that is set in a predictor: many prompts, bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, NotInitializedError, require_positive_int
from ..core.prompts import BatchedPrompts
from .mask_decoder import predict_low_res
from .mask_upsampling import MaskUpsampler, PredictedMask
from .otsu import otsu_thresholds


@dataclass(frozen=True)
class Prediction:
    """One predicted mask. `prompt` is the index of its prompt, `logits` are the low-resolution logits (1, h, w)."""

    prompt: int
    mask: PredictedMask
    iou: float
    logits: torch.Tensor


def check_image_set(predictor: SamPredictor) -> None:
    """Raise `NotInitializedError` if the predictor holds no image."""
    if not predictor.is_image_set:
        raise NotInitializedError(
            "No image is set in the predictor. Pass the image or image_embeddings, or call set_precomputed first."
        )


@torch.no_grad()
def decode_prompts(
    predictor: SamPredictor, prompts: BatchedPrompts, multimask_output: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the mask decoder on prompts in pixels of the image that is set.

    Returns:
        Low-resolution logits (N, M, h, w) and predicted IoUs (N, M) on the predictor's device, with M = 3 masks per
        prompt for `multimask_output`, else 1.

    Raises:
        NotInitializedError: If no image is set.
    """
    check_image_set(predictor)
    size = predictor.original_size

    def tensor(value, dtype=torch.float):
        return torch.as_tensor(value, dtype=dtype, device=predictor.device)

    points = labels = boxes = masks = None
    if prompts.points is not None:
        points = tensor(predictor.transform.apply_coords(prompts.points, size))
        labels = tensor(prompts.labels, torch.int)
    if prompts.boxes is not None:
        boxes = tensor(predictor.transform.apply_boxes(prompts.boxes, size))
    if prompts.logits is not None:
        masks = tensor(prompts.logits)
        expected = tuple(predictor.model.prompt_encoder.mask_input_size)
        if masks.ndim != 4 or tuple(masks.shape[1:]) != (1, *expected):
            raise InvalidInputError(
                f"logits_masks must have the shape (N, 1, {expected[0]}, {expected[1]}) for this model, "
                f"but have {tuple(masks.shape)}."
            )
        return predict_low_res(predictor, points, labels, boxes, multimask_output, masks)
    return predict_low_res(predictor, points, labels, boxes, multimask_output)


def predict_boxed(
    predictor: SamPredictor,
    prompts: BatchedPrompts,
    batch_size: int,
    multimasking: bool = False,
    reduce_multimasking: bool = True,
    mask_threshold: float | str | None = None,
) -> Iterator[list[Prediction]]:
    """Predict masks for prompts on the image that is set, one batch at a time.

    Args:
        predictor: Predictor with an image set.
        prompts: The prompts.
        batch_size: Number of prompts per batch.
        multimasking: Whether to predict three masks per prompt.
        reduce_multimasking: Whether to keep only the one with the highest predicted IoU.
        mask_threshold: Logits above it are foreground. None takes the model's, `auto` one per mask by Otsu's method.

    Yields:
        The predictions of a batch, in the order of the prompts; three in a row per prompt if they are kept.

    Raises:
        InvalidInputError: For a wrong batch size or threshold.
        NotInitializedError: If no image is set.
    """
    require_positive_int("batch_size", batch_size)
    threshold = check_threshold(mask_threshold, predictor.model.mask_threshold)
    check_image_set(predictor)
    upsampler = None
    for start in range(0, len(prompts), batch_size):
        logits, ious = decode_prompts(predictor, prompts.select(slice(start, start + batch_size)), multimasking)
        if multimasking and reduce_multimasking:
            rows, best = torch.arange(len(ious), device=ious.device), ious.argmax(dim=1)
            logits, ious = logits[rows, best][:, None], ious[rows, best][:, None]
        n_masks = ious.shape[1]
        logits = logits.flatten(0, 1)
        if upsampler is None:
            canvas = predictor.model.image_encoder.img_size
            upsampler = MaskUpsampler(
                logits.shape[-1], canvas, predictor.input_size, predictor.original_size, logits.device
            )
        thresholds = otsu_thresholds(logits) if threshold is None else logits.new_full((len(logits),), threshold)
        yield [
            Prediction(start + k // n_masks, mask, iou, low_res[None])
            for k, (mask, iou, low_res) in enumerate(
                zip(upsampler.masks(logits, thresholds), ious.flatten().tolist(), logits)
            )
        ]


def check_threshold(mask_threshold: float | str | None, default: float) -> float | None:
    """Return the threshold as a number, or None for `auto`."""
    if mask_threshold is None:
        return float(default)
    if mask_threshold == "auto":
        return None
    try:
        return float(mask_threshold)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"mask_threshold must be a number, 'auto' or None (the model's), but is {mask_threshold!r}."
        ) from None
