"""Take the pictures of the documentation from the real annotators, with the images and the model of the package.

    python doc/make_screenshots.py                      all pictures, on a screen
    python doc/make_screenshots.py 2d tracking          some of them
    xvfb-run -s "-screen 0 1400x1000x24 +extension GLX" python doc/make_screenshots.py

They are written to doc/images/annotator_<name>.png, or to the folder of --output. Settings, caches and journals of the
user are left alone.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZE = (1300, 900)
MAX_BYTES = 300_000
MODEL = "vit_t_lite"
PAUSE = 1.0  # a factor for all waiting times
SCENES: dict[str, Callable[["Stage"], Any]] = {}


@dataclass
class Stage:
    """What a scene needs.

    Args:
        folder: A folder for the files of scenes.
        images: `nuclei`, `volume`, `movie`, and `cells` with its labels `cells_labels`.
        loader: Loads a model; None loads that of the package.
        timeout: How long to wait for a job, in seconds.
    """

    folder: Path
    images: dict[str, np.ndarray]
    loader: Callable[..., Any] | None = None
    timeout: float = 900.0

    def viewer(self) -> Any:
        """Open an empty viewer."""
        import napari

        viewer = napari.Viewer()
        viewer.window._qt_window.resize(*SIZE)
        spin(0.2)
        return viewer

    def annotator(self, kind: type, image: str) -> Any:
        """Open an annotator in a viewer of its own, with the embeddings of an image."""
        from micro_sam.annotation.model_choice import EmbeddingRequest
        from micro_sam.sam_annotator.launch import add_dock

        viewer = self.viewer()
        layer = viewer.add_image(self.images[image], name="image")
        dock = add_dock(viewer, kind, layer=layer, model_loader=self.loader)
        request = EmbeddingRequest(image=layer, model=MODEL)
        dock.embedding_panel.set_values(image=layer, model=MODEL)
        dock.compute_embeddings(request)
        self.wait(dock)
        viewer.reset_view()
        return dock

    def wait(self, dock: Any) -> None:
        """Wait until a dock has nothing to do."""
        spin(0.2)  # what follows a prompt starts a moment later
        assert dock.runner.wait(self.timeout), f"{[job.text for job in dock.runner.jobs]} took too long"
        spin(0.3)


def scene(function: Callable[[Stage], Any]) -> Callable[[Stage], Any]:
    """Add a scene; it returns the dock whose window is to be shown."""
    SCENES[function.__name__.removeprefix("show_")] = function
    return function


def spin(seconds: float) -> None:
    """Let the windows do what they have to do."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + PAUSE * seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.005)


@scene
def show_start(stage: Stage) -> Any:
    """The annotator as it opens from the menu, with the settings of the embeddings."""
    from micro_sam.sam_annotator.annotator_2d import Annotator2d
    from micro_sam.sam_annotator.launch import add_dock

    viewer = stage.viewer()
    layer = viewer.add_image(stage.images["nuclei"], name="nuclei")
    dock = add_dock(viewer, Annotator2d, layer=layer, model_loader=stage.loader)
    dock.embedding_panel.set_model(MODEL)
    dock.embedding_panel.section.expand(animate=False)
    spin(0.2)
    viewer.reset_view()
    return dock


@scene
def show_2d(stage: Stage) -> Any:
    """Some committed objects, and the next one from a point inside and a point outside of it."""
    from micro_sam.sam_annotator.annotator_2d import Annotator2d

    dock = stage.annotator(Annotator2d, "nuclei")
    nuclei = free_objects(stage.images["nuclei"])
    places = sorted((middle(nuclei == i) for i in by_size(nuclei)[-16:]), key=lambda yx: yx[1])[:6]
    for place in places[:-1]:
        click(dock, place)
        stage.wait(dock)
        dock.commit()
    click(dock, places[-1])
    click(dock, np.add(places[-1], (0, 34)), positive=False)
    stage.wait(dock)
    dock.prompt_panel.toggle()
    height, width = stage.images["nuclei"].shape
    dock.viewer.camera.center = (0, height / 2, width / 4)
    dock.viewer.camera.zoom *= 2
    return dock


@scene
def show_objects(stage: Stage) -> Any:
    """All objects found automatically; the most doubtful one is being corrected."""
    from micro_sam.sam_annotator.annotator_2d import Annotator2d

    dock = stage.annotator(Annotator2d, "nuclei")
    dock.auto_segment()
    stage.wait(dock)
    dock.commit()
    dock.objects_panel.next_worst()
    stage.wait(dock)
    dock.objects_panel.correct()
    scroll_to(dock, dock.objects_panel)
    return dock


@scene
def show_3d(stage: Stage) -> Any:
    """Several objects of a volume from a point each, in all slices, with the confidence of each slice."""
    from micro_sam.sam_annotator.annotator_3d import Annotator3d

    dock = stage.annotator(Annotator3d, "volume")
    plane = 2 * len(stage.images["volume"]) // 3
    dock.viewer.dims.set_current_step(0, plane)
    dock.segment_panel.batched.setChecked(True)
    dock.views["point_prompts"].current_size = 4
    for place in bright_spots(stage.images["volume"][plane]):
        click(dock, place, plane)
    stage.wait(dock)
    dock.segment_all()
    stage.wait(dock)
    dock.commit_panel.layer.setCurrentText("current_object")
    scroll_to(dock, dock.commit_panel)
    return dock


@scene
def show_tracking(stage: Stage) -> Any:
    """Tracks found automatically, with their lineage."""
    from micro_sam.sam_annotator.annotator_tracking import AnnotatorTracking

    dock = stage.annotator(AnnotatorTracking, "movie")
    dock.auto_panel.whole.setChecked(True)
    dock.auto_panel.controls["min_size"].setValue(150)
    dock.auto_segment()
    stage.wait(dock)
    dock.commit()
    spin(0.3)
    dock.viewer.dims.set_current_step(0, len(stage.images["movie"]) // 2)
    scroll_to(dock, dock.tracks_panel)
    return dock


@scene
def show_series(stage: Stage) -> Any:
    """A folder of images; one is done, the next one is being annotated."""
    import tifffile

    from micro_sam.annotation.model_choice import EmbeddingRequest
    from micro_sam.annotation.series import plan_series
    from micro_sam.sam_annotator.image_series_annotator import open_series

    folder = stage.folder / "images"
    folder.mkdir()
    image = stage.images["nuclei"]
    height, width = (n // 2 for n in image.shape)
    for k, name in enumerate(("control_1", "control_2", "treated_1", "treated_2")):
        y, x = k // 2 * height, k % 2 * width
        tifffile.imwrite(folder / f"{name}.tif", image[y:y + height, x:x + width])
    series = plan_series(folder, stage.folder / "labels", pattern="*.tif")
    request = EmbeddingRequest(image=None, model=MODEL)
    dock = open_series(stage.viewer(), series, request, model_loader=stage.loader)
    for _ in range(2):
        stage.wait(dock.annotator)
        dock.annotator.auto_segment()
        stage.wait(dock.annotator)
        if dock.entry.index == 0:
            dock.annotator.commit()
            dock.go_on()
    assert dock._reader.wait(stage.timeout)
    return dock.annotator


@scene
def show_classifier(stage: Stage) -> Any:
    """Two classes, painted on a few objects each, and the class of all others."""
    from micro_sam.annotation.model_choice import EmbeddingRequest
    from micro_sam.sam_annotator.classifier_dock import ObjectClassifier

    viewer = stage.viewer()
    image = viewer.add_image(stage.images["cells"], name="cells")
    labels = stage.images["cells_labels"]
    viewer.add_labels(labels, name="objects")
    dock = ObjectClassifier(viewer, model_loader=stage.loader)
    viewer.window.add_dock_widget(dock, name=dock.title, area="right")
    spin(0.2)
    viewer.reset_view()
    dock.embedding_panel.set_values(image=image, model=MODEL)
    dock.compute_embeddings(EmbeddingRequest(image=image, model=MODEL))
    stage.wait(dock)
    ids = by_size(labels)
    for class_id, name, chosen in ((1, "small", ids[2:5]), (2, "large", ids[-4:-1])):
        dock.session.rename_class(class_id, name)
        dock.paint_with(class_id)
        for i in chosen:
            y, x = middle(labels == i)
            for k in range(-2, 3):
                dock.layers["annotations"].paint((y, x + k), class_id)
    dock.train_and_predict()
    stage.wait(dock)
    return dock


@scene
def show_finetuning(stage: Stage) -> Any:
    """The report on data that can be trained on."""
    import tifffile

    from micro_sam.annotation.model_choice import get_entry
    from micro_sam.sam_annotator.form import select
    from micro_sam.sam_annotator.training_ui import TrainingWidget

    viewer = stage.viewer()
    cells, labels = stage.images["cells"], stage.images["cells_labels"]
    viewer.add_image(cells, name="cells_0")
    viewer.add_labels(labels, name="labels_0")
    for name, array in (("images", cells), ("labels", labels)):
        (stage.folder / name).mkdir()
        for k in range(4):
            tifffile.imwrite(stage.folder / name / f"cells_{k}.tif", np.rot90(array, k))
    dock = TrainingWidget()
    viewer.window.add_dock_widget(dock, name=dock.title, area="right")
    stage.wait(dock)
    os.chdir(stage.folder)  # paths that tell something
    dock.fields.images.path, dock.fields.labels.path = "images", "labels"
    dock.fields.image_key.setText("*.tif")
    dock.fields.label_key.setText("*.tif")
    dock.fields.name.setText("my_cells")
    select(dock.fields.family, get_entry(MODEL).family)
    dock.fields.family.currentIndexChanged.emit(dock.fields.family.currentIndex())
    dock.fields.patch.value = (128, 128)
    dock.fields.n_epochs.setValue(10)
    viewer.reset_view()
    dock.check_data()
    stage.wait(dock)
    os.chdir(ROOT)
    return dock


@scene
def show_settings(stage: Stage) -> Any:
    """The settings."""
    from micro_sam.sam_annotator.settings_widget import settings_widget

    viewer = stage.viewer()
    hidden = os.environ.pop("MICROSAM_CACHEDIR", None)  # what it says could not be changed in the panel
    try:
        dock = settings_widget()
        viewer.window.add_dock_widget(dock, name="Settings", area="right")
        stage.wait(dock)
    finally:
        if hidden is not None:
            os.environ["MICROSAM_CACHEDIR"] = hidden
    dock.folder.path = "~/.cache/micro_sam"
    dock.folder.line.home(False)
    return dock


@scene
def show_help(stage: Stage) -> Any:
    """The list of keys over the image."""
    from micro_sam.sam_annotator.annotator_3d import Annotator3d
    from micro_sam.sam_annotator.launch import add_dock

    viewer = stage.viewer()
    layer = viewer.add_image(stage.images["volume"], name="image")
    dock = add_dock(viewer, Annotator3d, layer=layer, model_loader=stage.loader)
    dock.embedding_panel.set_model(MODEL)
    spin(0.6)
    viewer.reset_view()
    dock.help.toggle()
    return dock


# Parts of scenes


def click(dock: Any, place: Sequence[float], plane: int | None = None, *, positive: bool = True) -> None:
    """Place a point, as a click does."""
    if dock.prompt_panel.positive != positive:
        dock.prompt_panel.toggle()
    dock.views["point_prompts"].add([*(() if plane is None else (plane,)), *(float(x) for x in place)])


def free_objects(image: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """The bright objects of an image that touch neither its border nor, by their shape, each other."""
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops
    from skimage.segmentation import clear_border

    smooth = gaussian_filter(np.asarray(image, dtype=float), sigma)
    labels = clear_border(label(smooth > threshold_otsu(smooth)))
    odd = [region.label for region in regionprops(labels) if region.solidity < 0.93 or region.area < 30]
    labels[np.isin(labels, odd)] = 0
    return labels


def bright_spots(image: np.ndarray) -> list[tuple[float, ...]]:
    """The middles of the bright objects of a blurred image."""
    from scipy.ndimage import gaussian_filter
    from skimage.feature import peak_local_max

    smooth = gaussian_filter(image.astype(float), 3)
    return [tuple(yx) for yx in peak_local_max(smooth, min_distance=14, threshold_rel=0.55, exclude_border=12)]


def by_size(labels: np.ndarray) -> list[int]:
    """The ids of the objects of a label image, the smallest first."""
    ids, sizes = np.unique(labels[labels > 0], return_counts=True)
    return [int(i) for i in ids[np.argsort(sizes, kind="stable")]]


def middle(mask: np.ndarray) -> tuple[float, ...]:
    """The pixel of a mask that is farthest from its boundary."""
    from scipy.ndimage import distance_transform_edt

    return tuple(float(x) for x in np.unravel_index(distance_transform_edt(mask).argmax(), mask.shape))


def scroll_to(dock: Any, widget: Any) -> None:
    """Scroll the panels of an annotator until one of them is seen in full."""
    spin(0.2)
    bar = dock._scroll.verticalScrollBar()
    bar.setValue(max(widget.geometry().bottom() + 8 - dock._scroll.viewport().height(), 0))


# Pictures


def load_images() -> dict[str, np.ndarray]:
    """Read the images that scenes show."""
    import imageio.v3 as imageio
    import tifffile

    data = ROOT / "micro_sam" / "data"
    return {
        "nuclei": tifffile.imread(data / "nuclei.tif"),
        "volume": smoothed(tifffile.imread(data / "nuclei_3d.tif")),
        "movie": tifffile.imread(data / "cells_tracking.tif"),
        "cells": imageio.imread(ROOT / "test" / "data" / "nuclei.png"),
        "cells_labels": tifffile.imread(ROOT / "test" / "data" / "nuclei_labels.tif"),
    }


def smoothed(volume: np.ndarray) -> np.ndarray:
    """A volume with less noise, as the small model of the package needs it."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(volume.astype("float32"), (0.7, 1.5, 1.5))
    return (smooth / smooth.max() * 255).astype("uint8")


def take(name: str, stage: Stage, path: Path | None) -> np.ndarray:
    """Show a scene, close it, and return its picture (Y, X, RGB); written to a file if there is a path."""
    import napari

    dock = SCENES[name](stage)
    viewer = napari.current_viewer()
    spin(0.6)
    picture = np.asarray(viewer.screenshot(canvas_only=False, flash=False))[..., :3]
    if hasattr(dock, "shut_down"):
        dock.shut_down()
    dock.close()
    viewer.close()
    if path is not None:
        write(picture, path)
    return picture


def write(picture: np.ndarray, path: Path) -> None:
    """Write a png that is as small as it can be; with a palette if it were too large otherwise."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.shape[1]} x {picture.shape[0]}, {path.stat().st_size // 1000} kB")


def main(argv: Sequence[str] | None = None) -> None:
    """Take the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which pictures, of {', '.join(SCENES)}; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "doc" / "images", help="where they are written")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(SCENES):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}")
    args.output.mkdir(parents=True, exist_ok=True)
    images = load_images()
    for name in args.names or SCENES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MICROSAM_CACHEDIR"] = str(Path(folder) / "cache")  # work of other scenes is not offered again
            take(name, Stage(Path(folder), images), args.output / f"annotator_{name}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_CACHE_HOME"] = home
        os.environ["NAPARI_CONFIG"] = str(Path(home) / "napari.yaml")
        sys.exit(main())
