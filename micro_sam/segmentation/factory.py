"""Choosing a segmenter by name."""

from typing import Literal

import torch
from segment_anything import SamPredictor

from ..core.errors import DecoderMissingError, InvalidInputError, nearest_names
from .ais import InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder
from .amg import AMGBase, AutomaticMaskGenerator, TiledAutomaticMaskGenerator
from .apg import AutomaticPromptGenerator, TiledAutomaticPromptGenerator

DEFAULT_SEGMENTATION_MODE_WITH_DECODER = "ais"

# Mode -> (class without tiles, class with tiles).
SEGMENTER_CLASSES = {
    "amg": (AutomaticMaskGenerator, TiledAutomaticMaskGenerator),
    "ais": (InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder),
    "apg": (AutomaticPromptGenerator, TiledAutomaticPromptGenerator),
}


def get_segmentation_mode(segmentation_mode: str | None, has_decoder: bool) -> str:
    """Return the mode in lower case; None or `auto` chooses it by whether there is a decoder.

    Raises:
        InvalidInputError: If the mode is unknown.
        DecoderMissingError: If the mode needs a decoder and there is none.
    """
    mode = "auto" if segmentation_mode is None else str(segmentation_mode).lower()
    if mode == "auto":
        return DEFAULT_SEGMENTATION_MODE_WITH_DECODER if has_decoder else "amg"
    if mode not in SEGMENTER_CLASSES:
        raise InvalidInputError(
            f"Unknown segmentation mode {segmentation_mode!r}. {nearest_names(mode, [*SEGMENTER_CLASSES, 'auto'])}"
        )
    if mode != "amg" and not has_decoder:
        raise DecoderMissingError(
            f"The mode {mode!r} needs a model with a segmentation decoder, and this one has none. "
            "Choose a model with decoder, or the mode 'amg'."
        )
    return mode


def get_instance_segmentation_generator(
    predictor: SamPredictor,
    is_tiled: bool,
    decoder: torch.nn.Module | None = None,
    segmentation_mode: Literal["amg", "ais", "apg"] | None = None,
    **kwargs,
) -> AMGBase | InstanceSegmentationWithDecoder:
    """Create the segmenter for a mode.

    Args:
        predictor: The predictor.
        is_tiled: Whether the embeddings are tiled.
        decoder: The segmentation decoder of the model, if it has one.
        segmentation_mode: `amg`, `ais` or `apg`, in any case. None (or `auto`) takes `ais` with a decoder, else `amg`.
        kwargs: Arguments of the class, for example `points_per_side` for `amg`.

    Returns:
        The segmenter, not initialized yet.

    Raises:
        InvalidInputError: If the mode is unknown.
        DecoderMissingError: If the mode needs a decoder and there is none.
    """
    mode = get_segmentation_mode(segmentation_mode, decoder is not None)
    segmenter_class = SEGMENTER_CLASSES[mode][bool(is_tiled)]
    if mode == "amg":
        return segmenter_class(predictor, **kwargs)
    return segmenter_class(predictor, decoder, **kwargs)
