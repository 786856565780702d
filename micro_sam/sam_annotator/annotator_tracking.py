"""The annotator of time series: objects are tracks, with divisions."""

import os
from typing import Any

import numpy as np

from ..annotation.geometry import AnnotationImage
from ..core.errors import UnsupportedError
from .annotator import Annotator
from .launch import launch, run_command
from .tracking_menu import create_tracking_menu

__all__ = ["AnnotatorTracking", "annotator_tracking", "create_tracking_menu", "main"]


class AnnotatorTracking(Annotator):
    """Annotate the tracks of a time series (T, Y, X) or (T, Y, X, C)."""

    mode, title = "tracking", "Annotator Tracking"

    def __init__(self, viewer: "napari.viewer.Viewer", reset_state: bool = True, **options: Any):  # noqa: F821
        if not reset_state:
            raise UnsupportedError("Each annotator has a session of its own: leave out reset_state=False.")
        super().__init__(viewer, **options)


def annotator_tracking(
    image: np.ndarray | AnnotationImage,
    embedding_path: str | os.PathLike | dict | None = None,
    model_type: str = "vit_b_lm",
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_viewer: bool = False,
    viewer: "napari.viewer.Viewer | None" = None,  # noqa: F821
    precompute_amg_state: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    decoder_path: str | os.PathLike | None = None,
    device: str | None = None,
) -> "napari.viewer.Viewer | None":  # noqa: F821
    """Open napari to annotate the tracks of a time series.

    Args:
        image: The time series (T, Y, X) or (T, Y, X, C).
        embedding_path: Zarr folder of the embeddings, or embeddings that were computed before; None uses the
            automatic cache.
        model_type: Name of the model.
        tile_shape: Tile (y, x) for large images.
        halo: Overlap (y, x) of the tiles.
        return_viewer: Whether to return the viewer, with its first embeddings, instead of running napari's event loop.
        viewer: The viewer to use; None opens a new one.
        precompute_amg_state: Whether to prepare the automatic segmentation of all frames, too.
        checkpoint_path: Weights of the model; None uses the published ones.
        decoder_path: Weights of the segmentation decoder alone.
        device: Compute device; None chooses it.

    Returns:
        The viewer if `return_viewer` is set, else None.
    """
    return launch(
        AnnotatorTracking, image, embedding_path, None, model_type, tile_shape, halo, return_viewer, viewer,
        precompute_amg_state, checkpoint_path, decoder_path, device, True,
    )


def main() -> int:
    """The command `micro_sam.annotator_tracking`, with the arguments of the command line."""
    return run_command("main_tracking")
