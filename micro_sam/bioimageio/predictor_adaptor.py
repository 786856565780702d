"""A Segment Anything model as bioimage.io runs it: tensors in, tensors out, for one image at a time.

This is the architecture of every exported package. Axes and meaning of the tensors are those that
`micro_sam.bioimageio.description` declares.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from torch import nn

from ..core.errors import CheckpointError, InvalidInputError, NotInitializedError, nearest_names
from ..embeddings.encode import compute_embeddings_batched, set_precomputed
from ..models.build_sam import ARCHITECTURES
from ..models.checkpoints import Checkpoint
from ..models.decoder import get_decoder
from ..models.loading import _build as build_network
from ..models.mask_decoder import predict_low_res
from ..segmentation.ais import InstanceSegmentationWithDecoder

# Objects whose masks are enlarged together: bounds the memory for the maps of the size of the canvas.
_BATCH = 32
SEGMENTATION_OPTIONS = "automatic_segmentation"


class PromptError(InvalidInputError, AssertionError):
    """The tensors with prompts do not fit together."""


def checkpoint_of(state: Mapping[str, Any]) -> Checkpoint:
    """What a weight file holds: the weights of SAM, or these and a decoder, see `PredictorAdaptor.load_state_dict`."""
    combined = "model_state" in state
    weights = state["model_state"] if combined else state
    parts = {key: dict(state.get(key) or {}) for key in ("settings", "decoder_settings") if combined}
    return Checkpoint(
        path=Path("the weights of the package"), state=state, model_state=dict(weights),
        decoder_state=state.get("decoder_state") if combined else None, settings=parts.get("settings", {}),
        decoder_settings=parts.get("decoder_settings", {}), refused=(),
        is_complete=any(key.startswith("mask_decoder.") for key in weights),
    )


class PredictorAdaptor(nn.Module):
    """Segments objects from prompts, or all objects of an image if there are none.

    Args:
        model_type: The architecture: `vit_t`, `vit_b`, `vit_l` or `vit_h`, or a name that starts with it.

    Raises:
        InvalidInputError: If the architecture is unknown.

    Example:
        >>> adaptor = PredictorAdaptor("vit_b")  # doctest: +SKIP
        >>> adaptor.load_state_dict(torch.load("vit_b.pt", weights_only=True))  # doctest: +SKIP
        >>> masks, scores, embeddings = adaptor(image, box_prompts=boxes)  # doctest: +SKIP
    """

    def __init__(self, model_type: str) -> None:
        super().__init__()
        if model_type[:5] not in ARCHITECTURES:
            raise InvalidInputError(
                f"Unknown architecture {model_type!r}. {nearest_names(model_type, ARCHITECTURES)}"
            )
        self.model_type = model_type[:5]
        # Runners choose the device before they load the weights, so something has to remember it.
        self.register_buffer("_device", torch.empty(0), persistent=False)
        self._predictor: SamPredictor | None = None
        self._options: dict[str, Any] = {}
        self._image: np.ndarray | None = None  # the last image, (H, W, 3)
        self._embedding_is_own = False

    @property
    def has_decoder(self) -> bool:
        """Whether an image without prompts is segmented automatically."""
        return hasattr(self, "decoder")

    def load_state_dict(self, state: Mapping[str, Any], **kwargs: Any):
        """Build the network for the weights and load them.

        Args:
            state: Weights under SAM's own names; or a dict with these as `model_state` and, all optional,
                `decoder_state` (the segmentation decoder), `settings` (`image_size`, the side of the canvas in
                pixels, and others of `micro_sam.models`) and `decoder_settings`.
            kwargs: `strict=True` and `assign=False`, which runners pass. Nothing else is supported: weights must
                always fit.

        Returns:
            The keys that are missing and unexpected: always none.

        Raises:
            CheckpointError: If the weights are of another architecture or do not fit.
            InvalidInputError: For other keyword arguments.
        """
        wrong = {k: v for k, v in kwargs.items() if (k, v) not in (("strict", True), ("assign", False))}
        if wrong:
            raise InvalidInputError(f"The weights must fit exactly, so {wrong} is not supported. Leave it out.")
        checkpoint = checkpoint_of(state)
        if checkpoint.architecture != self.model_type:
            raise CheckpointError(
                f"The weights are those of a {checkpoint.architecture}, but model_type is {self.model_type!r}. "
                f"Pass {checkpoint.architecture!r}."
            )
        self.sam = build_network(self.model_type, checkpoint, None, False, None, {}).to(self._device.device)
        self._predictor, self._embedding_is_own = SamPredictor(self.sam), False
        if hasattr(self, "decoder"):
            del self.decoder
        if checkpoint.decoder_state is not None:
            self.decoder = get_decoder(
                self.sam.image_encoder, checkpoint.decoder_state, self._device.device,
                normalization=checkpoint.normalization,
            )
        self._options = dict(checkpoint.settings.get(SEGMENTATION_OPTIONS) or {})
        return nn.Module().load_state_dict({})

    def train(self, mode: bool = True) -> "PredictorAdaptor":
        """Stay in evaluation mode: the statistics of the network must never change."""
        return super().train(False)

    def _apply(self, *args, **kwargs):
        self._embedding_is_own = False  # the embedding of the last image does not move along to another device
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        image: torch.Tensor,
        box_prompts: torch.Tensor | None = None,
        point_prompts: torch.Tensor | None = None,
        point_labels: torch.Tensor | None = None,
        mask_prompts: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segment an image. All prompts are in pixels of the image and for the same O objects.

        Args:
            image: The image (1, 3, H, W), RGB with values 0 to 255, which are used as they are.
            box_prompts: Boxes (1, O, 4) as x0, y0, x1, y1, the ends exclusive.
            point_prompts: Points (1, O, P, 2) as x, y.
            point_labels: Their labels (1, O, P): 1 for the object, 0 for the background, -1 to ignore the point.
            mask_prompts: Logits (1, O, 1, S, S) at the resolution of the model's mask input; the object is above 0.
            embeddings: The embeddings of the image, from an earlier call. Otherwise they are computed, unless the
                image is that of the last call.

        Returns:
            Masks (1, O, 1, H, W), uint8, 0 or 1; scores (1, O, 1), the predicted IoU; embeddings (1, 256, E, E).
            Without prompts a model with decoder returns one mask for each object that it finds, maybe none, with
            scores of 1; a model without decoder returns one mask of whatever it holds for an object.

        Raises:
            NotInitializedError: If no weights were loaded.
            InvalidInputError: If the image is not one RGB image of values 0 to 255, or embeddings do not fit.
            PromptError: If prompts have wrong shapes, numbers of objects differ, or points have no labels.
        """
        prompts = _check_prompts(box_prompts, point_prompts, point_labels, mask_prompts)
        self._set_image(image, embeddings)
        if prompts:
            masks, scores = self._segment_prompts(**prompts)
        elif self.has_decoder:
            labels = self._labels()
            ids = np.unique(labels)
            masks = torch.from_numpy(labels == ids[ids > 0][:, None, None])[:, None].to(self.sam.device)
            scores = torch.ones(masks.shape[:2], device=masks.device)
        else:
            masks, scores, _ = self._predictor.predict_torch(None, None, multimask_output=False)
        return masks.to(torch.uint8)[None], scores[None], self._predictor.features.clone()

    def instance_labels(self, image: torch.Tensor, embeddings: torch.Tensor | None = None) -> np.ndarray:
        """Segment all objects of an image into labels (Y, X), in place of a mask of image size for each of them.

        Args:
            image: See `forward`.
            embeddings: See `forward`.

        Raises:
            DecoderMissingError: If the model has no decoder.
            NotInitializedError, InvalidInputError: See `forward`.
        """
        self._set_image(image, embeddings)
        return self._labels()

    def _labels(self) -> np.ndarray:
        """Labels (Y, X) of all objects in the image that is set."""
        predictor = self._predictor
        segmenter = InstanceSegmentationWithDecoder(predictor, getattr(self, "decoder", None))
        embeddings = {name: getattr(predictor, name) for name in ("features", "input_size", "original_size")}
        segmenter.initialize(self._image, embeddings)
        return segmenter.generate(**self._options)

    def _set_image(self, image: torch.Tensor, embeddings: torch.Tensor | None) -> None:
        """Give the predictor embeddings: those passed, those of the last image if it is the same, or new ones."""
        if self._predictor is None:
            raise NotInitializedError("The adaptor has no weights yet. Call load_state_dict first.")
        pixels = _to_array(image)
        if embeddings is None and self._embedding_is_own and np.array_equal(pixels, self._image):
            return
        # Whatever fails from here on, nothing is taken for the embedding of an image to which it does not belong.
        self._image, self._embedding_is_own = pixels, False
        size, transform = pixels.shape[:2], self._predictor.transform
        if embeddings is None:
            features, _, (input_size,) = compute_embeddings_batched(self._predictor, [pixels])
        else:
            _check_single("embeddings", embeddings)
            features, input_size = embeddings.float(), transform.get_preprocess_shape(*size, transform.target_length)
        set_precomputed(self._predictor, {"features": features, "original_size": size, "input_size": input_size})
        self._embedding_is_own = embeddings is None

    def _segment_prompts(
        self, boxes: torch.Tensor | None, points: torch.Tensor | None, labels: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (O, 1, H, W), bool, and scores (O, 1)."""
        predictor, transform = self._predictor, self._predictor.transform
        size, device = predictor.original_size, predictor.device
        if boxes is not None:
            boxes = transform.apply_boxes_torch(boxes.to(device), size)
        if points is not None:
            points, labels = transform.apply_coords_torch(points.to(device), size), labels.to(device, torch.int)
        if masks is not None:
            side = self.sam.prompt_encoder.mask_input_size[0]
            if tuple(masks.shape[1:]) != (1, side, side):
                raise PromptError(
                    f"mask_prompts must have the shape (1, O, 1, {side}, {side}), but have {(1, *masks.shape)}."
                )
            masks = masks.to(device, torch.float32)
        n_objects = next(len(p) for p in (boxes, points, masks) if p is not None)
        found = []
        for start in range(0, n_objects, _BATCH):
            parts = [p if p is None else p[start:start + _BATCH] for p in (points, labels, boxes, masks)]
            logits, ious = predict_low_res(predictor, *parts[:3], multimask_output=False, masks=parts[3])
            logits = predictor.model.postprocess_masks(logits, predictor.input_size, size)
            found.append((logits > predictor.model.mask_threshold, ious))
        return torch.cat([m for m, _ in found]), torch.cat([s for _, s in found])


def _check_single(name: str, tensor: torch.Tensor) -> None:
    if len(tensor) != 1:
        raise InvalidInputError(f"The batch size must be 1, but {name} has {len(tensor)}. Pass one image at a time.")


def _to_array(image: torch.Tensor) -> np.ndarray:
    """An image (1, 3, H, W) as uint8 array (H, W, 3)."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise InvalidInputError(f"The image must have the shape (1, 3, H, W), but has {tuple(image.shape)}.")
    _check_single("image", image)
    values = image[0].permute(1, 2, 0).cpu().numpy()
    if values.dtype != np.uint8:
        lowest, highest = values.min(initial=0), values.max(initial=0)
        is_scaled = values.dtype.kind == "f" and 0 < highest <= 1  # to 0…1, as other programs do
        if is_scaled or not (lowest >= 0 and highest <= 255):
            raise InvalidInputError(
                f"The pixels must have values from 0 to 255, but have {lowest} to {highest}. Scale them."
            )
        values = values.round().astype(np.uint8)
    return np.array(values, order="C")


def _check_prompts(boxes, points, labels, masks) -> dict[str, torch.Tensor | None]:
    """The prompts without their batch axis; empty if there are none."""
    if (points is None) != (labels is None):
        raise PromptError("point_prompts and point_labels belong together. Pass both or none.")
    axes = {"box_prompts": (boxes, "O4"), "point_prompts": (points, "OP2"), "point_labels": (labels, "OP"),
            "mask_prompts": (masks, "O1SS")}
    given = {name: tensor for name, (tensor, _) in axes.items() if tensor is not None}
    for name, tensor in given.items():
        _check_single(name, tensor)
        expected = axes[name][1]
        fits = tensor.ndim == 1 + len(expected) and all(
            letter.isalpha() or size == int(letter) for size, letter in zip(tensor.shape[1:], expected)
        )
        if not fits or tensor.shape[1] == 0:
            raise PromptError(
                f"{name} must have the shape (1, {', '.join(expected)}) for O >= 1 objects, "
                f"but have {tuple(tensor.shape)}."
            )
    if len({tensor.shape[1] for tensor in given.values()}) > 1 or (
        points is not None and points.shape[:3] != labels.shape
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        raise PromptError(f"All prompts must be for the same objects and points, but have the shapes {shapes}.")
    if not given:
        return {}
    return {
        name: None if tensor is None else tensor[0]
        for name, tensor in (("boxes", boxes), ("points", points), ("labels", labels), ("masks", masks))
    }
