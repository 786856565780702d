"""Measures what users of the annotators feel: latency of a click, the longest block of the event loop, memory.

    python test/measure_annotators.py latency|blocks|training|memory

Needs a screen, or a virtual one with OpenGL. Run it with nothing else on the machine; the figures are in
doc/performance.md. `latency` is the time from a click on the canvas to the mask in the layer that is drawn; `blocks`
the longest time in which the event loop did not run, during each kind of work; `training` the part of it about
finetuning, and how long cancelling takes.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import psutil
import tifffile

import micro_sam

SHIPPED = Path(micro_sam.__file__).parent / "data"
DATA = Path(__file__).parent / "data"


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
        print(f"{name}: {time.monotonic() - begin:.1f} s, {_block(watchdog)}", flush=True)

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
    measure_training()


def measure_training(n_iterations=6):
    """Finetune the shipped model on two images of nuclei, and cancel it at any time of an iteration."""
    import napari

    from micro_sam.sam_annotator.jobs import Watchdog
    from micro_sam.sam_annotator.training_ui import TrainingWidget
    from micro_sam.training.plan import TrainingStep

    viewer = napari.Viewer()
    viewer.window.resize(1400, 1000)
    widget = TrainingWidget()
    viewer.window.add_dock_widget(widget, area="right")
    with Watchdog() as watchdog:
        widget.runner.wait(300)
    print(f"look at the hardware: {_block(watchdog)}", flush=True)
    folder = Path(os.environ["MICROSAM_CACHEDIR"]) / "measured"
    _write_pairs(folder)
    fields = widget.fields
    fields.images.path, fields.labels.path = folder / "images", folder / "labels"
    fields.save_root.path = folder / "run"
    fields.family.setCurrentIndex(fields.family.findText("Included (offline)"))
    fields.patch.value = (256, 256)
    fields.existing_choice = "overwrite"
    steps = []
    widget.runner.progressed.connect(lambda job, step, seconds: steps.append((time.monotonic(), step)))

    def is_training():
        return any(isinstance(step, TrainingStep) and step.done for _, step in steps)

    def measure(name, start, until=lambda: not widget.runner.busy):
        begin = time.monotonic()
        with Watchdog() as watchdog:
            start()
            _pump(until)
        print(f"{name}: {time.monotonic() - begin:.1f} s, {_block(watchdog)}", flush=True)

    measure("check data", widget.check.click)
    fields.n_iterations.setValue(n_iterations)
    measure(f"finetune with {n_iterations} iterations, scores and export", widget.start.click)
    fields.n_iterations.setValue(1000)
    for delay in (0.0, 0.7, 1.5, 2.5, 4.0):
        fields.existing_choice = "overwrite"
        steps.clear()
        measure("until the second iteration", widget.start.click, is_training)
        end = time.monotonic() + delay
        _pump(lambda end=end: time.monotonic() > end)
        start = time.monotonic()
        with Watchdog() as watchdog:
            widget.runner.cancel_all()
            widget.runner.wait()
        print(f"cancel {delay} s after an iteration: {time.monotonic() - start:.2f} s, {_block(watchdog)}; "
              f"{widget.notices.history[-1].text}", flush=True)
    fields.n_iterations.setValue(n_iterations)
    fields.existing_choice = "overwrite"
    widget.start.click()
    _pump(lambda: not widget.runner.busy)
    end = time.monotonic() + 2
    with Watchdog() as watchdog:
        _pump(lambda: time.monotonic() > end)
    print(f"two seconds after the result of a finetuning, with its notification: {_block(watchdog)}", flush=True)
    viewer.close()


def _write_pairs(folder):
    """Two images of 384 x 480 pixels with labels, each nine copies of a field of nuclei."""
    image, labels = imageio.imread(DATA / "nuclei.png"), tifffile.imread(DATA / "nuclei_labels.tif")
    copies = np.kron(np.arange(9).reshape(3, 3), np.ones(labels.shape, int)) * labels.max()
    labels = np.tile(labels, (3, 3))
    labels = np.where(labels > 0, labels + copies, 0).astype("uint16")
    for name, array in (("images", np.tile(image, (3, 3))), ("labels", labels)):
        (folder / name).mkdir(parents=True)
        for n, turn in enumerate((np.array, np.flipud)):
            tifffile.imwrite(folder / name / f"{n}.tif", turn(array))


def _block(watchdog):
    return f"longest block {watchdog.worst * 1000:.0f} ms ({watchdog.worst_cpu * 1000:.0f} ms of CPU time)"


def _pump(until):
    from qtpy.QtWidgets import QApplication

    while not until():
        QApplication.processEvents()
        time.sleep(0.001)


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
    parser.add_argument("what", choices=("latency", "blocks", "training", "memory"))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MICROSAM_CACHEDIR"] = cache
        {"latency": measure_latency, "blocks": measure_blocks, "training": measure_training,
         "memory": measure_memory}[parser.parse_args().what]()
    sys.exit()
