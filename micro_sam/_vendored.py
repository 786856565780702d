"""Helpers for masks as tensors, under the path of the older API."""

from typing import Any

import numpy as np
import torch

from .core import rle
from .core.errors import InvalidInputError, InvalidTypeError

_RLE_IMPLEMENTATIONS = ("default", "numpy", "numba", "bioimage_cpp")


def _check_bool(masks: torch.Tensor) -> None:
    if masks.dtype != torch.bool:
        raise InvalidTypeError(f"Masks must be bool tensors, but got {masks.dtype}. Threshold them first.")


def batched_mask_to_box(masks: torch.Tensor) -> torch.Tensor:
    """Compute the bounding boxes of masks.

    Args:
        masks: Bool tensor (..., H, W).

    Returns:
        Int tensor (..., 4): x0, y0, x1, y1 of the outermost pixels (inclusive); zeros for an empty mask.

    Raises:
        InvalidTypeError: If the masks are not bool.
    """
    _check_bool(masks)
    if masks.numel() == 0:
        return torch.zeros(*masks.shape[:-2], 4, dtype=torch.int, device=masks.device)
    sides = []
    for axis in (-2, -1):  # columns give x, rows give y
        line = masks.any(dim=axis).int()
        sides.append((line.argmax(-1), line.shape[-1] - 1 - line.flip(-1).argmax(-1)))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack([x0, y0, x1, y1], dim=-1).int()
    return boxes * masks.flatten(-2).any(-1)[..., None]


def mask_to_rle_pytorch(tensor: torch.Tensor, rle_implementation: str = "default") -> list[dict[str, Any]]:
    """Encode masks as uncompressed run lengths, see `core.rle`.

    Args:
        tensor: Bool tensor (B, H, W).
        rle_implementation: One of the names of the older API; there is one implementation now.

    Returns:
        For each mask `size` [H, W] and `counts`, a list of integers.

    Raises:
        InvalidInputError: For an unknown implementation.
        InvalidTypeError: If the masks are not bool.
    """
    _check_bool(tensor)
    if rle_implementation not in _RLE_IMPLEMENTATIONS:
        raise InvalidInputError(
            f"rle_implementation must be one of {_RLE_IMPLEMENTATIONS}, but is {rle_implementation!r}."
        )
    masks = np.asarray(tensor.detach().cpu())
    return [{"size": list(mask.shape), "counts": rle.encode(mask).tolist()} for mask in masks]
