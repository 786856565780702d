"""The layers of the annotators in a real viewer: what users do to them reaches the right voxels and is never lost."""

import time

import dask.array as da
import numpy as np
import pytest

from micro_sam.segmentation.workflow import LoadedModel

pytest.importorskip("napari")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

FIVE = ("current_object", "auto_segmentation", "committed_objects", "point_prompts", "prompts")
LABELS = FIVE[:3]


def _spin(until=None, seconds=None):
    """Run the event loop until something is true, or for a moment."""
    from qtpy.QtWidgets import QApplication
    end = time.monotonic() + (seconds or (0.1 if until is None else 10.0))
    while until is None or not until():
        if time.monotonic() > end:
            assert until is None, "the condition never came true"
            return
        QApplication.processEvents()
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _own_journals(monkeypatch, tmp_path):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))


@pytest.fixture
def new_viewer():
    import napari
    viewers = []

    def new_viewer(show=False):
        viewers.append(napari.Viewer(show=show))
        return viewers[-1]

    yield new_viewer
    for viewer in viewers:
        if hasattr(viewer.window, "_qt_window"):
            viewer.close()


@pytest.fixture
def viewer(new_viewer):
    return new_viewer()


@pytest.fixture
def annotate(tiny_predictor, tiny_decoder):
    """Opens an annotator, as a dock, for a layer."""
    from micro_sam.sam_annotator.annotator_2d import Annotator2d
    from micro_sam.sam_annotator.annotator_3d import Annotator3d
    from micro_sam.sam_annotator.annotator_tracking import AnnotatorTracking
    from micro_sam.sam_annotator.launch import add_dock
    kinds, opened = {"2d": Annotator2d, "3d": Annotator3d, "tracking": AnnotatorTracking}, []

    def annotate(viewer, layer=None, mode="2d"):
        opened.append(add_dock(
            viewer, kinds[mode], layer=layer,
            model_loader=lambda *a, **k: LoadedModel(tiny_predictor, tiny_decoder, "ais"),
        ))
        return opened[-1]

    yield annotate
    for annotator in opened:
        annotator.shut_down()


def _embed(annotator):
    from micro_sam.annotation import tasks
    annotator.session.run(tasks.open_model(
        annotator.session, load=annotator.model_loader, save_path=None, plane=annotator.views.plane
    ))


def _canvas_position(viewer, world):
    """Where a world position (of the displayed axes) is on the canvas, in pixels (x, y)."""
    canvas = viewer.window._qt_viewer.canvas
    shown = list(viewer.dims.displayed)
    at = [np.array(canvas._map_canvas2world(p, canvas.view))[shown] for p in ((0, 0), (100, 0), (0, 100))]
    steps = np.stack([(at[1] - at[0]) / 100, (at[2] - at[0]) / 100], axis=1)
    return np.linalg.solve(steps, np.asarray(world) - at[0])


def _mouse(viewer, *positions):
    """Press the left button at the first world position, drag to the others, release it at the last."""
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest
    native = viewer.window._qt_viewer.canvas.native
    left, none = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    for _ in range(2):  # what the status bar says of the first position may move the canvas
        points = [QPoint(*np.rint(_canvas_position(viewer, p)).astype(int).tolist()) for p in positions]
        QTest.mouseMove(native, points[0])
        _spin()
    QTest.mousePress(native, left, none, points[0])
    for point in points[1:]:
        QTest.mouseMove(native, point)
        _spin()
    QTest.mouseRelease(native, left, none, points[-1])
    _spin()


def _disk(shape, center, radius):
    y, x = np.ogrid[:shape[0], :shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius ** 2


# A user's prompts and strokes reach the right voxels


def test_clicks_and_strokes_on_the_canvas(new_viewer, annotate, cells_image):
    viewer = new_viewer(show=True)
    viewer.window._qt_window.resize(1200, 900)
    layer = viewer.add_image(cells_image, name="cells", scale=(0.5, 0.25), translate=(10, -7))
    annotator = annotate(viewer, layer)
    viewer.reset_view()
    _spin(seconds=0.5)
    session, points = annotator.session, annotator.views["point_prompts"]

    def world(y, x):
        return 10 + 0.5 * y, -7 + 0.25 * x

    assert viewer.layers.selection.active is points
    assert points.mode == "add"
    _mouse(viewer, world(40, 60))
    annotator.prompt_panel.toggle()
    _mouse(viewer, world(100, 20))
    np.testing.assert_allclose([p.position for p in session.prompts.points], [(40, 60), (100, 20)], atol=1.5)
    assert [p.positive for p in session.prompts.points] == [True, False]

    labels = annotator.views["committed_objects"]
    viewer.layers.selection.active = labels
    labels.mode, labels.brush_size, labels.selected_label = "paint", 5, 3
    _mouse(viewer, world(64, 80), world(64, 100), world(64, 120))
    painted = session.labels["committed_objects"] == 3
    rows, columns = np.nonzero(painted)
    assert abs(rows.mean() - 64) < 1
    assert abs(columns.min() - 78) <= 2
    assert abs(columns.max() - 122) <= 2
    assert session.objects.ids == [3]
    assert session.next_undo == "paint"
    before = session.labels["committed_objects"].copy()
    labels.mode, labels.selected_label = "fill", 9
    _mouse(viewer, world(5, 5))
    assert (session.labels["committed_objects"] == np.where(before == 0, 9, before)).all()
    annotator.undo()
    np.testing.assert_array_equal(session.labels["committed_objects"], before)
    annotator.undo()
    assert not session.labels["committed_objects"].any()
    annotator.redo()
    np.testing.assert_array_equal(labels.data, before)
    assert session.objects.ids == [3]


IMAGES = {  # mode, shape of the layer, its options, and where voxel (1, 20, 30) of the image is in it
    "scaled": ("2d", (64, 80), {"scale": (3, 0.5), "translate": (-4, 100)}, (20, 30)),
    "rgb": ("2d", (64, 80, 3), {"rgb": True, "scale": (2, 2), "translate": (5, 6)}, (20, 30)),
    "two channels": ("2d", (64, 80, 2), {"scale": (2, 3, 1)}, (20, 30, 0)),
    "dask": ("2d", (64, 80), {"scale": (2, 2)}, (20, 30)),
    "multiscale": ("2d", (64, 80), {"multiscale": True, "scale": (0.3, 0.3), "translate": (1, 2)}, (20, 30)),
    "singleton in front": ("2d", (1, 64, 80), {"scale": (7, 2, 3)}, (20, 30)),
    "rotated": ("2d", (64, 80), {"rotate": 30, "scale": (2, 1), "translate": (9, 1)}, (20, 30)),
    "volume": ("3d", (5, 64, 80), {"scale": (4, 0.5, 0.25), "translate": (-8, 3, 2)}, (1, 20, 30)),
    "singleton inside": ("3d", (5, 1, 64, 80), {"scale": (4, 1, 0.5, 0.25), "translate": (2, 0, 3, 2)}, (1, 0, 20, 30)),
    "affine": ("3d", (5, 64, 80), {"affine": np.diag([3, 0.5, 0.5, 1.0]) + np.eye(4, k=3) * 7}, (1, 20, 30)),
    "series": ("tracking", (5, 64, 80), {"scale": (2, 1, 1)}, (1, 20, 30)),
    "lazy volume": ("3d", (5, 64, 80), {"scale": (2, 1, 1)}, (1, 20, 30)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image(viewer, annotate, kind):
    mode, shape, options, voxel = IMAGES[kind]
    pixels = np.random.default_rng(0).integers(0, 255, shape).astype("uint8")
    data = da.from_array(pixels, chunks=32) if kind in ("dask", "lazy volume") else pixels
    data = [pixels, pixels[::2, ::2], pixels[::4, ::4]] if kind == "multiscale" else data
    layer = viewer.add_image(data, name="image", **options)
    annotator = annotate(viewer, layer, mode)
    session, views = annotator.session, annotator.views
    assert session.image.shape == tuple(n for n, c in zip(shape, (*shape[1:], 0)) if n > 3)
    index = tuple(v for v, n in zip((1, 20, 30)[-session.image.ndim:], session.image.shape))

    # The layers lie where the image lies, and the annotator works in the plane that is shown.
    world = views["point_prompts"].data_to_world(voxel)
    expected = layer.data_to_world((0,) * (layer.ndim - len(voxel)) + tuple(voxel))[-len(voxel):]
    for name in FIVE:
        np.testing.assert_allclose(views[name].data_to_world(voxel), expected)
        assert views[name].ndim == len(voxel)
    front = (0,) * (viewer.dims.ndim - len(world))
    viewer.dims.point = (*front, *world)
    assert views.plane == (None if mode == "2d" else 1)
    shown = set(viewer.dims.displayed)
    assert shown == {viewer.dims.ndim + axis for axis in session.image.axes[-2:]}

    # Points and shapes
    views["point_prompts"].add(np.array(voxel, float) + 0.25 * (np.array(voxel) > 0))
    np.testing.assert_allclose(session.prompts.points[0].position, np.array(index) + 0.25)
    corners = np.array([voxel] * 4, float)
    last = [n for n in range(len(voxel)) if voxel[n] in (20, 30)]
    corners[1:3, last[0]] += 8
    corners[2:, last[1]] += 6
    views["prompts"].add_rectangles(corners)
    np.testing.assert_allclose(np.ptp(session.prompts.shapes[0].vertices, axis=0)[-2:], (8, 6))
    assert session.prompts.shapes[0].vertices[0] == index
    for _ in range(2):
        annotator.undo()
    assert session.prompts.is_empty
    assert len(views["point_prompts"].data) == len(views["prompts"].data) == 0
    for _ in range(2):
        annotator.redo()
    np.testing.assert_allclose(views["point_prompts"].data[0][last], (20.25, 30.25))
    np.testing.assert_allclose(views["prompts"].data[0], corners)

    # The brush, a script, and the bucket
    for name in LABELS:
        labels, array = views[name], session.labels[name]
        labels.brush_size, labels.selected_label = 7, 2
        with labels.block_history():  # as the mouse does
            labels.paint(voxel, 2)
        plane = array if array.ndim == 2 else array[1]
        assert plane[20, 30] == 2
        assert (array == 2).sum() == (plane == 2).sum() > 9
        center = np.argwhere(plane == 2).mean(axis=0)
        np.testing.assert_allclose(center, (20, 30), atol=0.51)
        labels.data_setitem(tuple(np.array([v, v]) for v in voxel), 5)
        assert plane[20, 30] == 5
        assert session.next_undo == "paint"
        painted = array.copy()
        labels.fill(voxel, 8)
        assert plane[20, 30] == 8
        annotator.undo()
        np.testing.assert_array_equal(array, painted)
        annotator.undo()
        assert set(np.unique(array)) == {0, 2}
        annotator.undo()
        assert not array.any()
        assert not np.asarray(labels.data).any()
        annotator.redo()
        assert np.asarray(labels.data)[voxel] == 2
    session.objects.check()
