"""Automatic instance segmentation: the public names, which live in `segmentation` and `models`."""

from .core.labels import mask_data_to_segmentation
from .models.decoder import DecoderAdapter, get_decoder, get_unetr
from .models.loading import get_predictor_and_decoder
from .segmentation.ais import InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder
from .segmentation.amg import AMGBase, AutomaticMaskGenerator, TiledAutomaticMaskGenerator
from .segmentation.apg import AutomaticPromptGenerator, TiledAutomaticPromptGenerator
from .segmentation.factory import (
    DEFAULT_SEGMENTATION_MODE_WITH_DECODER,
    get_instance_segmentation_generator,
)
from .segmentation.watershed import watershed_from_center_and_boundary_distances

__all__ = [
    "AMGBase", "AutomaticMaskGenerator", "AutomaticPromptGenerator", "DEFAULT_SEGMENTATION_MODE_WITH_DECODER",
    "DecoderAdapter", "InstanceSegmentationWithDecoder", "TiledAutomaticMaskGenerator",
    "TiledAutomaticPromptGenerator", "TiledInstanceSegmentationWithDecoder", "get_decoder",
    "get_instance_segmentation_generator", "get_predictor_and_decoder", "get_unetr", "mask_data_to_segmentation",
    "watershed_from_center_and_boundary_distances",
]
