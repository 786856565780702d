"""Segmenting an opened image, whatever its number of dimensions: planes for themselves, stacks merged to 3D objects."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError
from ..core.image import LazyImage
from ..core.progress import Steps
from ..embeddings.encode import ImageEmbeddings
from ..segmentation.settings import full_options
from ..segmentation.workflow import Segmenter, output_settings, segmentation_steps
from .automatic import volume_steps

# Options of `automatic_3d_segmentation` beside those of `generate`. For a stack `with_background` means its own.
VOLUME_OPTIONS = ("gap_closing", "min_z_extent", "beta", "neck_penalty", "mask_with_background")


def split_options(options: Mapping[str, Any], ndim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those for stacks and those of the segmenter.

    Args:
        options: Options by name.
        ndim: Dimensions of the image, 2 or 3.

    Raises:
        InvalidInputError: If an option for stacks was given for a plane.
    """
    names = (*VOLUME_OPTIONS, "with_background") if ndim == 3 else VOLUME_OPTIONS
    of_volume = {name: value for name, value in options.items() if name in names}
    if ndim == 2 and of_volume:
        raise InvalidInputError(
            f"{', '.join(of_volume)} are for volumes, but the image has two dimensions. Leave them out."
        )
    return of_volume, {name: value for name, value in options.items() if name not in of_volume}


def image_settings(
    predictor: SamPredictor,
    segmenter: Segmenter,
    image: LazyImage,
    volume_options: Mapping[str, Any],
    work: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the result, see `segmentation.workflow.output_settings`."""
    settings = output_settings(predictor, segmenter, image.data, **work)
    if image.ndim == 3:
        parameters = inspect.signature(volume_steps).parameters
        defaults = {name: parameters[name].default for name in (*VOLUME_OPTIONS, "with_background")}
        settings["volume"] = full_options(lambda: None, {**defaults, **volume_options})
    return settings


def image_steps(
    predictor: SamPredictor,
    segmenter: Segmenter,
    image: LazyImage,
    volume_options: Mapping[str, Any],
    work: Mapping[str, Any],
    *,
    embedding_path: str | os.PathLike | None = None,
    return_embeddings: bool = False,
    batch_size: int = 1,
) -> Steps[tuple[np.ndarray, ImageEmbeddings | None]]:
    """Segment a plane or a stack. Yields `Step`; returns labels (Y, X) or (Z, Y, X), and embeddings.

    Args:
        predictor: The predictor.
        segmenter: The segmenter.
        image: The image. A stack, and an image in tiles, are read piece by piece.
        volume_options: Options for stacks, see `split_options`.
        work: `tile_shape`, `halo`, `mask`, `embedding_options` and the options of `generate`.
        embedding_path: Where to keep the embeddings; None keeps them in memory, those of a stack only if asked for.
        return_embeddings: Whether the embeddings of a stack are needed.
        batch_size: Planes or tiles per call of the networks.
    """
    if image.ndim == 2:
        data = image.data if work.get("tile_shape") is not None else image.read()
        return (yield from segmentation_steps(
            predictor, segmenter, data, embedding_path=embedding_path, batch_size=batch_size, **work
        ))
    return (yield from volume_steps(
        image.data, predictor, segmenter, embedding_path, return_embeddings=return_embeddings, batch_size=batch_size,
        **volume_options, **work,
    ))
