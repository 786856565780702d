"""From a batch of images with labels to the prompts that SAM is trained with."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from ..core.errors import InvalidInputError, NoObjectsError
from ..core.labels import boxes_of_labels
from ..prompt_generators import PointAndBoxPromptGenerator


def object_ids(labels: Tensor | np.ndarray) -> np.ndarray:
    """The ids of the objects of a label image, sorted; 0 is background."""
    ids = np.unique(np.asarray(labels))
    return ids[ids != 0]


def one_hot(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """The masks (N, 1, H, W), bool, of objects of a label image (H, W)."""
    ids = torch.as_tensor(np.asarray(ids, dtype="int64"), device=labels.device)
    return (labels.long()[None] == ids[:, None, None])[:, None]


class ConvertToSamInputs:
    """Samples objects and makes point and box prompts for them, as the training of SAM needs them.

    Args:
        transform: Resizes prompts to the frame that SAM sees. None keeps them in pixels of the image.
        dilation_strength: Distance in pixels that negative points keep from their object.
        box_distortion_factor: Each side of a box moves outwards by up to this share of the box's length, at random.
        rng: Generator or seed of the random choices. None uses numpy's global state.
    """

    def __init__(
        self,
        transform: ResizeLongestSide | None,
        dilation_strength: int = 10,
        box_distortion_factor: float | None = None,
        *,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        if box_distortion_factor is not None and not 0 <= box_distortion_factor < math.inf:
            raise InvalidInputError(f"box_distortion_factor must not be negative, but is {box_distortion_factor}.")
        self.transform = transform
        self.dilation_strength = dilation_strength
        self.box_distortion_factor = box_distortion_factor
        self.rng = np.random if rng is None else np.random.default_rng(rng)

    def __call__(
        self, x: Tensor, y: Tensor, n_pos: int, n_neg: int, get_boxes: bool = False, n_samples: int | None = None
    ) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        """Make the prompts of a batch.

        Args:
            x: Images (B, C, H, W).
            y: Labels (B, 1, H, W), 0 is background.
            n_pos: Number of positive points for each object.
            n_neg: Number of negative points for each object.
            get_boxes: Whether to make boxes.
            n_samples: Number of objects per image, at most; None takes all.

        Returns:
            One record per image: `image`, `original_size`, and as asked for `point_coords` (N, n_pos + n_neg, 2) as
            (x, y), `point_labels`, `boxes` (N, 4) as (x0, y0, x1, y1) with the maxima exclusive; and the ids of the
            sampled objects of each image, sorted.

        Raises:
            NoObjectsError: If an image has no object. It is also a RuntimeError.
            InvalidInputError: If no prompt is asked for, or shapes do not fit.
        """
        if y.ndim != 4 or y.shape[1] != 1 or x.ndim != 4 or x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
            raise InvalidInputError(
                "Images must be (B, C, H, W) with labels (B, 1, H, W), but have the shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}."
            )
        if not (n_pos + n_neg or get_boxes):
            raise InvalidInputError("No prompt is asked for. Set n_pos, n_neg or get_boxes.")
        records, sampled = [], []
        for image, labels in zip(x, y[:, 0].long()):
            record, ids = self._convert(image, labels, n_pos, n_neg, get_boxes, n_samples)
            records.append(record)
            sampled.append(ids)
        return records, sampled

    def _convert(self, image, labels, n_pos, n_neg, get_boxes, n_samples) -> tuple[dict[str, Any], np.ndarray]:
        ids, _, slices = boxes_of_labels(labels.cpu().numpy())
        if len(ids) == 0:
            raise NoObjectsError("An image of the batch has no object, so there is nothing to train prompts with. "
                                 "Use a sampler that rejects empty patches, such as that of default_sam_dataset.")
        chosen = np.arange(len(ids))
        if n_samples is not None and n_samples < len(ids):
            chosen = np.sort(self.rng.choice(len(ids), size=n_samples, replace=False))
        boxes = np.array([[s.start for s in slices[k]] + [s.stop for s in slices[k]] for k in chosen])
        shape = tuple(int(s) for s in image.shape[-2:])
        record = {"image": image, "original_size": shape}
        if n_pos + n_neg:
            generator = PointAndBoxPromptGenerator(n_pos, n_neg, self.dilation_strength, rng=self.rng)
            points, point_labels, _, _ = generator(one_hot(labels, ids[chosen]), [tuple(box) for box in boxes])
            if self.transform is not None:
                points = self.transform.apply_coords_torch(points, shape)
            record |= {"point_coords": points, "point_labels": point_labels}
        if get_boxes:
            boxes = torch.from_numpy(self._distort(boxes, shape)[:, [1, 0, 3, 2]].copy()).to(image.device)
            if self.transform is not None:
                boxes = self.transform.apply_boxes_torch(boxes, shape)
            record["boxes"] = boxes
        return record, ids[chosen]

    def _distort(self, boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Move the sides of boxes (N, 4) as (y0, x0, y1, x1) outwards, within the image."""
        if not self.box_distortion_factor:
            return boxes
        lengths = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        shift = np.round(self.rng.uniform(0, self.box_distortion_factor, size=boxes.shape) * lengths).astype(int)
        moved = boxes + shift * np.array([-1, -1, 1, 1])
        return np.clip(moved, 0, [*shape, *shape])


class ConvertToSemanticSamInputs:
    """Makes the records of a batch without any prompt, for semantic segmentation."""

    def __call__(self, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
        """Return `image` and `original_size` of each image of x (B, C, H, W); the labels y are not used."""
        return [{"image": image, "original_size": tuple(int(s) for s in image.shape[-2:])} for image in x]
