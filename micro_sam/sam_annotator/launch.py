"""Opening an annotator from Python or from the command line: viewer, image, dock, model."""

import importlib
import os
from typing import Any

import numpy as np

from ..annotation import tasks
from ..annotation.model_choice import EmbeddingRequest
from .annotator import Annotator
from .layers import IMAGE


def launch(
    annotator: type[Annotator],
    image: Any,
    embedding_path: str | os.PathLike | dict | None,
    segmentation_result: np.ndarray | None,
    model_type: str,
    tile_shape: tuple[int, int] | None,
    halo: tuple[int, int] | None,
    return_viewer: bool,
    viewer: Any,
    precompute_amg_state: bool,
    checkpoint_path: str | os.PathLike | None,
    decoder_path: str | os.PathLike | None,
    device: str | None,
    prefer_decoder: bool,
) -> Any:
    """Open an annotator, see `annotator_2d`. Embeddings are ready when the viewer is returned."""
    import napari

    from ..annotation.geometry import AnnotationImage

    # What cannot be annotated is refused before a window opens.
    checked = image if isinstance(image, AnnotationImage) else AnnotationImage.create(image, mode=annotator.mode)
    viewer = viewer or napari.Viewer()
    layer = viewer.add_image(
        checked.array, rgb=checked.has_channels and checked.array.shape[-1] == 3, name=IMAGE,
        **{k: v for k, v in (("scale", checked.scale), ("translate", checked.translate)) if v is not None},
    )
    widget = add_dock(viewer, annotator, layer=layer)
    if segmentation_result is not None:
        widget.begin(layer, segmentation_result)
    request = EmbeddingRequest(
        image=layer, model=model_type, checkpoint=checkpoint_path, device=device or "auto",
        save_path=None if isinstance(embedding_path, dict) else embedding_path, tile_shape=tile_shape, halo=halo,
        mode="auto" if prefer_decoder else "amg",
    )
    widget.embedding_panel.set_values(**vars(request))
    task = tasks.open_model(
        widget.session, **request.options, plane=widget.views.plane, load=widget.model_loader,
        embeddings=embedding_path if isinstance(embedding_path, dict) else None, decoder_path=decoder_path,
        prepare_automatic=precompute_amg_state,
    )
    if return_viewer:
        task.run()
        return viewer
    widget.open_model(task)
    napari.run()
    return None


def add_dock(viewer: Any, annotator: type[Annotator], **options: Any) -> Annotator:
    """Add an annotator to the docks of a viewer; it shuts down with the viewer."""
    widget = annotator(viewer, **options)
    viewer.window.add_dock_widget(widget, name=annotator.title, area="right")
    return widget



def run_command(name: str) -> int:
    """Run a function of `micro_sam.cli.annotators` and return its exit code."""
    # Looked up when it is called: commands lie above the annotators, and import them.
    return getattr(importlib.import_module("micro_sam.cli.annotators"), name)()
