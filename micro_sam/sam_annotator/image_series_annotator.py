"""The annotator of a series of images, or of a folder."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from qtpy.QtWidgets import QCheckBox, QLineEdit, QVBoxLayout, QWidget

from ..annotation.model_choice import EmbeddingRequest
from ..annotation.series import Series, plan_series
from ..core.errors import InvalidInputError, MicroSamError
from . import form as forms
from .annotator_2d import Annotator2d
from .annotator_3d import Annotator3d
from .launch import add_dock, run_command
from .model_panel import EmbeddingPanel
from .notices import NoticeLine
from .series_dock import SeriesDock
from .tooltips import get_tooltip

SERIES_TITLE = "Image Series"


def _tip(name: str) -> str | None:
    return get_tooltip("image_series_annotator", name)


class ImageSeriesAnnotator(QWidget):
    """Asks for the folders and the model, and opens the annotator of the series."""

    def __init__(self, viewer: "napari.viewer.Viewer", parent: QWidget | None = None):  # noqa: F821
        super().__init__(parent)
        self.viewer = viewer
        layout = QVBoxLayout(self)
        box, form = forms.group("Images")
        self.input_folder = forms.PathRow("folder", "images", tooltip=_tip("folder"))
        self.output_folder = forms.PathRow("folder", "results", tooltip=_tip("output_folder"))
        self.pattern, self.volumes, self.skip = QLineEdit("*"), QCheckBox(), QCheckBox()
        self.skip.setChecked(True)
        for field, name in (
            (self.pattern, "pattern"), (self.volumes, "is_volumetric"), (self.skip, "skip_segmented")
        ):
            field.setToolTip(_tip(name))
        self.embedding_folder = forms.PathRow("folder", "automatic cache", tooltip=_tip("embedding_folder"))
        self.initial_folder = forms.PathRow("folder", "none", tooltip=_tip("initial_folder"))
        forms.add_row(form, "Input folder:", self.input_folder)
        forms.add_row(form, "Output folder:", self.output_folder)
        section, more = forms.collapsible("Advanced Settings")
        for text, field in (
            ("Pattern:", self.pattern), ("Images are volumes:", self.volumes),
            ("Skip images that are done:", self.skip), ("Embeddings folder:", self.embedding_folder),
            ("Initial segmentations:", self.initial_folder),
        ):
            forms.add_row(more, text, field)
        form.addRow(section)
        layout.addWidget(box)
        self.model_panel = EmbeddingPanel(viewer, "2d", show_image=False)
        self.model_panel.compute.setText("Annotate Images")
        self.model_panel.compute.setToolTip(_tip("run_button"))
        self.model_panel.requested.connect(self._start)
        layout.addWidget(self.model_panel)
        self.notices = NoticeLine()
        layout.addWidget(self.notices)
        layout.addStretch()

    def __call__(self, skip_validate: bool = False) -> None:
        """Open the annotator of the series, as the button does.

        Args:
            skip_validate: Whether to leave out the check of what is entered; what cannot be used is shown all the same.
        """
        if skip_validate:
            self._start(self.model_panel.values())
        else:
            self.model_panel.request()

    def _start(self, request: EmbeddingRequest) -> None:
        try:
            if self.input_folder.path is None or self.output_folder.path is None:
                raise InvalidInputError("Choose the folder of the images, and a folder for the results.")
            series = plan_series(
                self.input_folder.path, self.output_folder.path, pattern=self.pattern.text() or "*",
                is_volumetric=self.volumes.isChecked(), skip_segmented=self.skip.isChecked(),
                initial_folder=self.initial_folder.path, embedding_folder=self.embedding_folder.path,
            )
            dock = open_series(self.viewer, series, request)
        except MicroSamError as error:
            self.notices.show_error(error)
            return
        if dock is None:
            self.notices.info("All images of this folder are done. Switch off 'skip' to look at them again.")
            return
        for note in series.notes:
            dock.annotator.notices.info(note)


def open_series(
    viewer: Any, series: Series, request: EmbeddingRequest, *, prepare_automatic: bool = False, **options: Any
) -> SeriesDock | None:
    """Open annotator and list for a series; None if all of its images are done."""
    if series.first_open() is None:
        return None
    annotator = add_dock(viewer, Annotator3d if series.is_volumetric else Annotator2d, begin=False, **options)
    annotator.embedding_panel.hide()
    dock = SeriesDock(annotator, series, request.options, prepare_automatic=prepare_automatic)
    viewer.window.add_dock_widget(dock, name=SERIES_TITLE, area="left")
    annotator.add_actions({"next_image": dock.go_on, "previous_image": dock.go_back})
    dock.start()
    return dock


def image_series_annotator(
    images: Sequence[str | os.PathLike] | Sequence[np.ndarray],
    output_folder: str | os.PathLike,
    model_type: str = "vit_b_lm",
    embedding_path: str | os.PathLike | None = None,
    initial_segmentations: Sequence[str | os.PathLike] | Sequence[np.ndarray] | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    viewer: "napari.viewer.Viewer | None" = None,  # noqa: F821
    return_viewer: bool = False,
    precompute_amg_state: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    is_volumetric: bool = False,
    device: str | None = None,
    prefer_decoder: bool = True,
    skip_segmented: bool = True,
) -> "napari.viewer.Viewer | None":  # noqa: F821
    """Open napari to annotate images one after the other; each result is written when one goes on.

    The embeddings of the next image are computed while one annotates.

    Args:
        images: Paths or arrays, (Y, X[, C]), or (Z, Y, X[, C]) for volumes.
        output_folder: Where the results go, as tif; with those that are there, the work goes on.
        model_type: Name of the model.
        embedding_path: Folder for the embeddings; None uses the automatic cache.
        initial_segmentations: Labels to start from, one for each image.
        tile_shape: Tile (y, x) for large images.
        halo: Overlap (y, x) of the tiles.
        viewer: The viewer to use; None opens a new one.
        return_viewer: Whether to return the viewer instead of running napari's event loop.
        precompute_amg_state: Whether to prepare the automatic segmentation of each image, too.
        checkpoint_path: Weights of the model; None uses the published ones.
        is_volumetric: Whether the images are volumes.
        device: Compute device; None chooses it.
        prefer_decoder: Whether to segment automatically with the decoder, if the model has one.
        skip_segmented: Whether images that are done are passed over.

    Returns:
        The viewer if `return_viewer` is set and there is an image to annotate, else None.
    """
    series = plan_series(
        images, output_folder, is_volumetric=is_volumetric, initial_segmentations=initial_segmentations,
        embedding_folder=embedding_path, skip_segmented=skip_segmented,
    )
    return _launch(
        series, model_type, tile_shape, halo, viewer, return_viewer, precompute_amg_state, checkpoint_path, device,
        prefer_decoder,
    )


def image_folder_annotator(
    input_folder: str | os.PathLike,
    output_folder: str | os.PathLike,
    pattern: str = "*",
    initial_segmentation_folder: str | os.PathLike | None = None,
    initial_segmentation_pattern: str = "*",
    viewer: "napari.viewer.Viewer | None" = None,  # noqa: F821
    return_viewer: bool = False,
    model_type: str = "vit_b_lm",
    embedding_path: str | os.PathLike | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    precompute_amg_state: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    is_volumetric: bool = False,
    device: str | None = None,
    prefer_decoder: bool = True,
    skip_segmented: bool = True,
) -> "napari.viewer.Viewer | None":  # noqa: F821
    """Open napari to annotate the images of a folder, see `image_series_annotator`.

    Args:
        input_folder: The folder of the images.
        output_folder: Where the results go.
        pattern: Which files to take.
        initial_segmentation_folder: A folder with labels to start from, paired by name.
        initial_segmentation_pattern: Which files of that folder to take.
        viewer: The viewer to use; None opens a new one.
        return_viewer: Whether to return the viewer instead of running napari's event loop.
        model_type: See `image_series_annotator`, also for the other arguments.
    """
    series = plan_series(
        input_folder, output_folder, pattern=pattern, is_volumetric=is_volumetric,
        initial_folder=initial_segmentation_folder, initial_pattern=initial_segmentation_pattern or "*",
        embedding_folder=embedding_path, skip_segmented=skip_segmented,
    )
    return _launch(
        series, model_type, tile_shape, halo, viewer, return_viewer, precompute_amg_state, checkpoint_path, device,
        prefer_decoder,
    )


def _launch(
    series, model_type, tile_shape, halo, viewer, return_viewer, precompute_amg_state, checkpoint_path, device,
    prefer_decoder,
):
    import napari

    request = EmbeddingRequest(
        image=None, model=model_type, checkpoint=checkpoint_path, device=device or "auto", tile_shape=tile_shape,
        halo=halo, mode="auto" if prefer_decoder else "amg",
    )
    if series.first_open() is None:
        print("All images are done: pass skip_segmented=False to look at them again.")
        return None
    viewer = viewer or napari.Viewer()
    dock = open_series(viewer, series, request, prepare_automatic=precompute_amg_state)
    if return_viewer:
        dock.annotator.runner.wait(600)
        return viewer
    napari.run()
    return None


def main() -> int:
    """The command `micro_sam.image_series_annotator`, with the arguments of the command line."""
    return run_command("main_series")
