"""Correcting what was segmented automatically, before it is written: the option `annotate` of library and command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..annotation import tasks
from ..annotation.geometry import AnnotationImage
from ..annotation.session import COMMITTED
from ..segmentation.workflow import LoadedModel
from .annotator_2d import Annotator2d
from .annotator_3d import Annotator3d
from .launch import add_dock
from .layers import IMAGE


def correct_labels(
    image: Any,
    labels: np.ndarray,
    model: LoadedModel,
    write: Callable[[np.ndarray], Path | None],
    *,
    has_channels: bool = False,
    name: str = IMAGE,
    image_embeddings: dict | None = None,
    run: Callable[[], None] | None = None,
) -> np.ndarray:
    """Open an annotator with labels as committed objects; go on when its window is closed.

    Args:
        image: Image (Y, X[, C]) or volume (Z, Y, X[, C]).
        labels: Labels (Y, X) or (Z, Y, X).
        model: The model for prompts.
        write: Writes the labels as they are in the end. If that fails, or the program dies before, the annotator
            offers to recover the corrections when the image is opened again.
        has_channels: Whether the last axis of the image holds channels.
        name: What the image is called.
        image_embeddings: Embeddings of the image; None computes them.
        run: Runs the event loop until the window is closed; None is napari's.

    Returns:
        The corrected labels.
    """
    import napari

    annotator = Annotator2d if labels.ndim == 2 else Annotator3d
    checked = AnnotationImage.create(image, mode=annotator.mode, rgb=has_channels, name=name)
    viewer = napari.Viewer()
    layer = viewer.add_image(checked.array, rgb=has_channels and checked.array.shape[-1] == 3, name=name)
    widget = add_dock(viewer, annotator, begin=False, model_loader=lambda *args, **kwargs: model)
    widget.begin(layer, labels)
    widget.open_model(tasks.open_model(
        widget.session, model.predictor.model_name, plane=widget.views.plane, load=widget.model_loader,
        embeddings=image_embeddings,
    ))
    session = widget.hand_over(layer)
    (run or napari.run)()
    corrected = session.labels[COMMITTED].copy()
    path = write(corrected)
    if path is not None:
        session.note_saved(path)
    session.close()
    widget.shut_down()
    return corrected
