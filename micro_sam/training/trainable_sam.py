"""SAM with gradients: encode a batch once, decode prompts of each of its images."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from ..core.errors import InvalidInputError
from ..models.mask_decoder import MAX_TOKENS, predict_masks_shared, shared_part, supports_sharing
from ..models.mask_upsampling import resize_matrix

Record = dict[str, Any]


class TrainableSAM(nn.Module):
    """A SAM whose forward pass takes a batch of images with their prompts and keeps gradients.

    Args:
        sam: The network. It is shared, not copied.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)

    def preprocess(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bring images to the encoder's canvas.

        Args:
            x: Images (B, C, H, W) with 1 or 3 channels, values in 0…255.

        Returns:
            Normalised images (B, 3, S, S), resized so that the longest side is S and padded with zeros at the
            bottom and right; and the shape (h, w) of the resized image without the padding.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InvalidInputError(f"Images must have the shape (B, 1 or 3, H, W), but have {tuple(x.shape)}.")
        # ResizeLongestSide.apply_image_torch takes batch and channels for the shape of the image.
        side = self.sam.image_encoder.img_size
        input_size = self.transform.get_preprocess_shape(*x.shape[-2:], side)
        x = F.interpolate(x, input_size, mode="bilinear", align_corners=False, antialias=True)
        x = (x - self.sam.pixel_mean) / self.sam.pixel_std
        return F.pad(x, (0, side - input_size[1], 0, side - input_size[0])), input_size

    def image_embeddings_oft(self, batched_inputs: Sequence[Record]) -> tuple[Tensor, list[Record]]:
        """Encode the images of a batch, with gradients.

        Args:
            batched_inputs: Records with the entry `image` (C, H, W), all of one shape.

        Returns:
            Embeddings (B, 256, S / 16, S / 16), and the records with the entry `input_size` added. The records are
            also changed in place, as callers of the older API expect.
        """
        shapes = {tuple(record["image"].shape) for record in batched_inputs}
        if len(shapes) != 1:
            raise InvalidInputError(
                f"All images of a batch must have one shape, but there are {sorted(shapes) or 'none'}. "
                "Use one patch shape, or a batch size of 1."
            )
        device = self.sam.pixel_mean.device
        images, input_size = self.preprocess(torch.stack([record["image"] for record in batched_inputs]).to(device))
        for record in batched_inputs:
            record["input_size"] = input_size
        return self.sam.image_encoder(images), list(batched_inputs)

    def forward(
        self, batched_inputs: Sequence[Mapping[str, Any]], image_embeddings: Tensor, multimask_output: bool = False
    ) -> list[dict[str, Tensor]]:
        """Decode the prompts of each image.

        Args:
            batched_inputs: One record per image, with `input_size` and `original_size`; prompts, in the frame of the
                resized image, are `point_coords` (N, P, 2) as (x, y) with `point_labels` (N, P), `boxes` (N, 4) as
                (x0, y0, x1, y1), and `mask_inputs` (N, 1, S / 4, S / 4), logits. Without any prompt there is one mask.
            image_embeddings: Embeddings (B, 256, h, w).
            multimask_output: Whether to predict M = 3 masks for each prompt instead of M = 1.

        Returns:
            For each image `low_res_masks` (N, M, S / 4, S / 4) and `masks` (N, M, H, W), both logits, and
            `iou_predictions` (N, M).
        """
        outputs = []
        for record, embedding in zip(batched_inputs, image_embeddings, strict=True):
            low_res_masks, iou_predictions = self._decode(record, embedding[None], multimask_output)
            masks = self._upsample(low_res_masks, record["input_size"], record["original_size"])
            outputs.append({"low_res_masks": low_res_masks, "masks": masks, "iou_predictions": iou_predictions})
        return outputs

    def _decode(self, record: Mapping[str, Any], embedding: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        points = record.get("point_coords")
        sparse, dense = self.sam.prompt_encoder(
            points=None if points is None else (points, record["point_labels"]),
            boxes=record.get("boxes"), masks=record.get("mask_inputs"),
        )
        decoder, pe = self.sam.mask_decoder, self.sam.prompt_encoder.get_dense_pe()
        n_tokens = 1 + getattr(decoder, "num_mask_tokens", MAX_TOKENS) + sparse.shape[1]
        if n_tokens > MAX_TOKENS or not supports_sharing(decoder):
            return decoder(
                image_embeddings=embedding, image_pe=pe, sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense, multimask_output=multimask,
            )
        return predict_masks_shared(decoder, embedding, pe, sparse, shared_part(dense), multimask)

    def _upsample(self, logits: Tensor, input_size: Sequence[int], original_size: Sequence[int]) -> Tensor:
        """What `Sam.postprocess_masks` computes, as one step: both of its resizings are linear and separable."""
        canvas, (height, width) = self.sam.image_encoder.img_size, original_size
        plans = [
            _resize_plan(logits.shape[-1], canvas, int(inner), int(outer))
            for inner, outer in zip(input_size, original_size)
        ]
        if all(matrix is None for matrix in plans):
            return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        rows, columns = (
            resize_matrix(logits.shape[-1], canvas, int(inner), int(outer)) if plan is None else plan
            for plan, inner, outer in zip(plans, input_size, original_size)
        )
        return rows.to(logits) @ logits @ columns.T.to(logits)


@lru_cache(maxsize=64)
def _resize_plan(low_res: int, canvas: int, inner: int, outer: int) -> Tensor | None:
    """The matrix (outer, low_res) of the resizing along one axis; None if one plain resizing is the same."""
    matrix = resize_matrix(low_res, canvas, inner, outer)
    direct = F.interpolate(torch.eye(low_res)[None], outer, mode="linear", align_corners=False)[0].T
    return None if torch.allclose(matrix, direct, rtol=0, atol=1e-6) else matrix
