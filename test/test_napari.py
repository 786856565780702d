"""What napari needs from this package, and that it shows our results; needs a screen with OpenGL."""

from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.gui
@pytest.mark.filterwarnings("ignore")  # napari's own dependencies warn at import; our code is not involved
def test_manifest_is_valid_and_found():
    from npe2 import PluginManifest

    (entry,) = (e for e in entry_points(group="napari.manifest") if e.name == "micro_sam")
    assert entry.value == "micro_sam:napari.yaml"
    manifest = PluginManifest.from_distribution("micro_sam")
    assert manifest.name == "micro_sam"
    root = Path(__file__).parents[1]
    assert (root / "napari.yaml").resolve() == (root / "micro_sam" / "napari.yaml").resolve()


@pytest.mark.gui
@pytest.mark.filterwarnings("ignore")
def test_labels_are_shown_in_a_real_viewer():
    import napari

    labels = np.zeros((64, 64), "uint32")
    labels[8:30, 8:30] = 1
    labels[40:60, 30:60] = 2
    viewer = napari.Viewer(show=True)
    try:
        viewer.add_image(np.zeros((64, 64), "uint8"))
        viewer.add_labels(labels, opacity=1.0)
        picture = viewer.screenshot(canvas_only=True, flash=False)
    finally:
        viewer.close()
    colours = {tuple(c) for c in picture[..., :3].reshape(-1, 3)}
    assert len(colours) >= 3, "background and two objects must be visible on the canvas"
