"""Measures what users of the annotators feel: latency of a click, the longest block of the event loop, memory.

    python test/measure_annotators.py latency|blocks|memory

Needs a screen, or a virtual one with OpenGL. Run it with nothing else on the machine; the figures are in
doc/performance.md. `latency` is the time from a click on the canvas to the mask in the layer that is drawn; `blocks`
the longest time in which the event loop did not run, during each kind of work.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import tifffile

import micro_sam

SHIPPED = Path(micro_sam.__file__).parent / "data"


def spin(annotator, seconds=0.2):
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while annotator.runner.busy or time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.001)


def open_annotator(launch, image):
    from micro_sam.sam_annotator.annotator import active_annotator

    viewer = launch(image, model_type="vit_t_lite", return_viewer=True)
    viewer.window._qt_window.resize(1400, 1000)
    annotator = active_annotator()
    spin(annotator, 1)
    return annotator


def measure_latency(n_clicks=60):
    """Clicks on an image of 1000 x 1000 pixels: four copies of a field of nuclei."""
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest
    from qtpy.QtWidgets import QApplication

    from micro_sam.sam_annotator import annotator_2d

    field = tifffile.imread(SHIPPED / "nuclei.tif")
    image = np.tile(field, (-(-1000 // field.shape[0]), -(-1000 // field.shape[1])))[:1000, :1000]
    annotator = open_annotator(annotator_2d, image)
    canvas, viewer = annotator.viewer.window._qt_viewer.canvas.native, annotator.viewer
    rng, seconds = np.random.default_rng(0), []
    drawn = []
    annotator.session.events.labels.connect(lambda layer, box: drawn.append(layer))
    bright = np.argwhere(image > np.quantile(image, 0.9))
    for y, x in bright[rng.choice(len(bright), n_clicks, replace=False)]:
        annotator.clear()
        spin(annotator, 0.05)
        drawn.clear()
        zoom, (_, cy, cx) = viewer.camera.zoom, viewer.camera.center
        position = QPoint(int(canvas.width() / 2 + (x - cx) * zoom), int(canvas.height() / 2 + (y - cy) * zoom))
        start = time.perf_counter()
        QTest.mouseClick(canvas, Qt.MouseButton.LeftButton, pos=position)
        while "current_object" not in drawn and time.perf_counter() - start < 10:
            QApplication.processEvents()
        QApplication.processEvents()  # the repaint that the change asked for
        seconds.append(time.perf_counter() - start)
    print(f"latency of {n_clicks} clicks on {image.shape}: median {np.median(seconds):.3f} s, "
          f"p95 {np.quantile(seconds, 0.95):.3f} s, largest {max(seconds):.3f} s")
    annotator.shut_down()
    viewer.close()


def measure_blocks():
    """All kinds of work on a volume of nuclei."""
    from micro_sam.sam_annotator import annotator_3d
    from micro_sam.sam_annotator.jobs import Watchdog

    annotator = open_annotator(annotator_3d, tifffile.imread(SHIPPED / "nuclei_3d.tif"))
    session = annotator.session

    def measure(name, start):
        begin = time.monotonic()
        with Watchdog() as watchdog:
            start()
            spin(annotator)
        print(f"{name}: {time.monotonic() - begin:.1f} s, longest block {watchdog.worst * 1000:.0f} ms", flush=True)

    measure("embeddings of 36 slices", annotator._embed_rest)
    annotator.auto_panel.whole.setChecked(True)
    annotator.auto_segment()
    annotator.runner.wait(1)
    start = time.monotonic()
    annotator.cancel()
    spin(annotator, 0)
    print(f"cancel: {time.monotonic() - start:.2f} s")
    measure("automatic segmentation of the volume", annotator.auto_segment)
    labels = session.labels["auto_segmentation"]
    plane = int((labels > 0).sum((1, 2)).argmax())
    labels = labels[plane]
    where = np.argwhere(labels == np.bincount(labels[labels > 0]).argmax())
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    annotator.viewer.dims.set_current_step(0, plane)
    box = [[plane, y0, x0], [plane, y0, x1], [plane, y1, x1], [plane, y1, x0]]
    measure("segment a slice from a box", lambda: annotator.views["prompts"].add_rectangles([box]))
    measure("segment the volume from a slice", annotator.segment_all)
    measure("commit", annotator.commit)
    annotator.commit_panel.layer.setCurrentText("auto_segmentation")
    measure("commit all", annotator.commit)
    measure("undo", annotator.undo)
    annotator.shut_down()
    annotator.viewer.close()


def measure_memory(n_objects=50):
    """A stack of 200 x 1000 x 1000 pixels, and objects on many slices."""
    from micro_sam.sam_annotator import annotator_3d

    field = tifffile.imread(SHIPPED / "nuclei.tif")
    plane = np.tile(field, (3, 3))[:1000, :1000]
    plane = (plane / plane.max() * 255).astype("uint8")
    stack = np.broadcast_to(plane, (200, 1000, 1000)).copy()
    annotator = open_annotator(annotator_3d, stack)
    start = psutil.Process().memory_info().rss
    rng = np.random.default_rng(0)
    for _ in range(n_objects):
        z, y, x = (int(rng.integers(n)) for n in (196, 960, 960))
        labels = {0: {p: _disc(y, x) for p in range(z, z + 5)}}
        annotator.session.show_objects("segment", {1: labels[0]})
        annotator.commit()
        annotator.viewer.dims.set_current_step(0, z)
        spin(annotator, 0.05)
    process = psutil.Process()
    journal = sum(p.stat().st_size for p in Path(os.environ["MICROSAM_CACHEDIR"]).rglob("*.jsonl"))
    print(
        f"{len(annotator.session.objects.ids)} objects: {process.memory_info().rss / 2**20:.0f} MiB resident, "
        f"{(process.memory_info().rss - start) / 2**20:.0f} MiB more than after opening, peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB; one label volume has 763 MiB; "
        f"journal {journal / 2**20:.2f} MiB"
    )
    annotator.shut_down()
    annotator.viewer.close()


def _disc(y, x, radius=20):
    from micro_sam.core.masks import crop_mask

    disc = np.hypot(*np.mgrid[-radius:radius + 1, -radius:radius + 1]) <= radius
    return crop_mask(disc, (y, x))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "blocks", "memory"))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MICROSAM_CACHEDIR"] = cache
        {"latency": measure_latency, "blocks": measure_blocks, "memory": measure_memory}[parser.parse_args().what]()
    sys.exit()
