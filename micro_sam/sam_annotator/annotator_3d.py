"""The annotator of volumes."""

import os
from typing import Any

import numpy as np

from ..annotation.geometry import AnnotationImage
from ..core.errors import UnsupportedError
from .annotator import Annotator
from .launch import launch, run_command


class Annotator3d(Annotator):
    """Annotate the objects of a volume (Z, Y, X) or (Z, Y, X, C)."""

    mode, title = "3d", "Annotator 3d"

    def __init__(self, viewer: "napari.viewer.Viewer", reset_state: bool = True, **options: Any):  # noqa: F821
        if not reset_state:
            raise UnsupportedError("Each annotator has a session of its own: leave out reset_state=False.")
        super().__init__(viewer, **options)


def annotator_3d(
    image: np.ndarray | AnnotationImage,
    embedding_path: str | os.PathLike | dict | None = None,
    segmentation_result: np.ndarray | None = None,
    model_type: str = "vit_b_lm",
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_viewer: bool = False,
    viewer: "napari.viewer.Viewer | None" = None,  # noqa: F821
    precompute_amg_state: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    decoder_path: str | os.PathLike | None = None,
    device: str | None = None,
    prefer_decoder: bool = True,
) -> "napari.viewer.Viewer | None":  # noqa: F821
    """Open napari to annotate the objects of a volume.

    Args:
        image: The volume (Z, Y, X) or (Z, Y, X, C).
        embedding_path: Zarr folder of the embeddings, or embeddings that were computed before; None uses the
            automatic cache.
        segmentation_result: Labels (Z, Y, X) to begin with; they are copied.
        model_type: Name of the model.
        tile_shape: Tile (y, x) for large images.
        halo: Overlap (y, x) of the tiles.
        return_viewer: Whether to return the viewer, with its first embeddings, instead of running napari's event loop.
        viewer: The viewer to use; None opens a new one.
        precompute_amg_state: Whether to prepare the automatic segmentation of all slices, too.
        checkpoint_path: Weights of the model; None uses the published ones.
        decoder_path: Weights of the segmentation decoder alone.
        device: Compute device; None chooses it.
        prefer_decoder: Whether to segment automatically with the decoder, if the model has one.

    Returns:
        The viewer if `return_viewer` is set, else None.
    """
    return launch(
        Annotator3d, image, embedding_path, segmentation_result, model_type, tile_shape, halo, return_viewer, viewer,
        precompute_amg_state, checkpoint_path, decoder_path, device, prefer_decoder,
    )


def main() -> int:
    """The command `micro_sam.annotator_3d`, with the arguments of the command line."""
    return run_command("main_3d")
