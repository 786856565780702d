"""Opening the object classifier from Python, for one image or for a series of them."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..annotation.classifier import ClassifierSession
from ..annotation.classifier_series import ClassifierSeries
from .classifier_dock import IMAGE, SEGMENTATION, ObjectClassifier, embedding_request, is_rgb
from .classifier_series_dock import SeriesClassifier
from .form import select

if TYPE_CHECKING:
    import napari

__all__ = ["ObjectClassifier", "image_series_object_classifier", "object_classifier"]


def object_classifier(
    image: np.ndarray,
    segmentation: np.ndarray,
    embedding_path: str | os.PathLike | dict | None = None,
    model_type: str = "vit_b_lm",
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_viewer: bool = False,
    viewer: "napari.viewer.Viewer | None" = None,
    checkpoint_path: str | os.PathLike | None = None,
    device: Any = None,
    ndim: int | None = None,
) -> "napari.viewer.Viewer | None":
    """Open napari to classify the objects of an image.

    Args:
        image: Image (Y, X[, C]) or stack (Z, Y, X[, C]).
        segmentation: Its label image, one id per object.
        embedding_path: Zarr folder of the embeddings, or embeddings that were computed before; None uses the
            automatic cache.
        model_type: Name of the model.
        tile_shape: Tile (y, x) in pixels, for large images.
        halo: Overlap (y, x) of the tiles in pixels.
        return_viewer: Whether to return the viewer, with embeddings, instead of running napari's event loop.
        viewer: The viewer to use; None opens a new one.
        checkpoint_path: Weights of the model; None uses the published ones.
        device: Compute device; None chooses it.
        ndim: 2 or 3, channels not counted; None is that of the segmentation.

    Returns:
        The viewer if `return_viewer` is set, else None.

    Raises:
        InvalidInputError: If image and segmentation do not fit each other.
    """
    import napari

    # What cannot be classified is refused before a window opens.
    checked = ClassifierSession()
    checked.set_image(image, segmentation, ndim=ndim)
    viewer = viewer or napari.Viewer()
    layer = viewer.add_image(checked.image.data, name=IMAGE, rgb=is_rgb(checked.image))
    labels = viewer.add_labels(checked.segmentation, name=SEGMENTATION)
    widget = ObjectClassifier(viewer)
    viewer.window.add_dock_widget(widget, name=ObjectClassifier.title, area="right")
    select(widget.segmentation, labels)
    is_ready = isinstance(embedding_path, dict)
    save_path = None if is_ready else embedding_path
    request = embedding_request(model_type, checkpoint_path, device, tile_shape, halo, save_path)
    widget.embedding_panel.set_values(
        image=layer, model=request.model, checkpoint=request.checkpoint, device=request.device,
        save_path=request.save_path, tile_shape=tile_shape, halo=halo,
    )
    if is_ready:
        widget.session.set_embeddings(embedding_path)
    elif return_viewer:
        widget.embed_task(request).run()
    else:
        widget.compute_embeddings(request)
    if return_viewer:
        return viewer
    napari.run()
    return None


def image_series_object_classifier(
    images: Sequence[Any],
    segmentations: Sequence[Any],
    output_folder: str | os.PathLike,
    embedding_paths: Sequence[str | os.PathLike | dict] | None = None,
    model_type: str = "vit_b_lm",
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    device: Any = None,
    ndim: int | None = None,
    *,
    viewer: "napari.viewer.Viewer | None" = None,
    return_viewer: bool = False,
) -> "napari.viewer.Viewer | None":
    """Open napari to classify the objects of images, one after the other.

    What is annotated in one image helps with the next ones. `output_folder` receives `features.npy` and `labels.npy`
    (all annotated objects), `rf.joblib` and `rf.npz` (the classifier) and `prediction_<i>.tif` (for files
    `<stem>_prediction.tif`). A series that was left goes on when it is opened again with the same folder.

    Args:
        images: Images (Y, X[, C]) or stacks (Z, Y, X[, C]): arrays or paths.
        segmentations: Their label images, in the same order.
        output_folder: Where the results are written.
        embedding_paths: Per image the zarr folder of its embeddings, or ready embeddings; None uses the automatic
            cache.
        model_type: Name of the model.
        tile_shape: Tile (y, x) in pixels, for large images.
        halo: Overlap (y, x) of the tiles in pixels.
        checkpoint_path: Weights of the model; None uses the published ones.
        device: Compute device; None chooses it.
        ndim: 2 or 3, channels not counted; None is that of each segmentation.
        viewer: The viewer to use; None opens a new one.
        return_viewer: Whether to return the viewer instead of running napari's event loop.

    Returns:
        The viewer if `return_viewer` is set, else None.

    Raises:
        InvalidInputError, OutputExistsError: If images and segmentations do not fit each other or the folder.
    """
    import napari

    series = ClassifierSeries(
        ClassifierSession(), images, segmentations, output_folder, embedding_paths, ndim=ndim
    )
    viewer = viewer or napari.Viewer()
    widget = SeriesClassifier(viewer, series)
    viewer.window.add_dock_widget(widget, name=ObjectClassifier.title, area="right")
    request = embedding_request(model_type, checkpoint_path, device, tile_shape, halo)
    widget.begin_series(request)
    if return_viewer:
        return viewer
    napari.run()
    return None
