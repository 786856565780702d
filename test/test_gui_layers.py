"""The layers of the annotators in a real viewer: what users do to them reaches the right voxels and is never lost."""

import time
from contextlib import contextmanager

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
    native, camera = viewer.window._qt_viewer.canvas.native, viewer.camera
    middle = np.array([native.height(), native.width()]) / 2
    return (middle + (np.asarray(world) - camera.center[-2:]) * camera.zoom)[::-1]


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


def _key(viewer, key):
    """Press keys such as `Control-Z` on the canvas."""
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest
    *names, letter = key.split("-")
    modifiers = Qt.KeyboardModifier.NoModifier
    for name in names:
        modifiers |= getattr(Qt.KeyboardModifier, f"{name}Modifier")
    QTest.keyClick(viewer.window._qt_viewer.canvas.native, getattr(Qt.Key, f"Key_{letter}"), modifiers)


@contextmanager
def _nothing():
    yield


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


def test_annotations_are_shown_with_each_channel(new_viewer, annotate, cells_image):
    viewer = new_viewer(show=True)
    layer = viewer.add_image(np.stack([cells_image] * 4, axis=-1), rgb=False, scale=(2, 2, 1), name="channels")
    annotator = annotate(viewer, layer)
    session, views = annotator.session, annotator.views
    assert session.image.shape == cells_image.shape
    viewer.window._qt_window.resize(1200, 900)
    _spin(seconds=0.5)
    viewer.reset_view()
    for channel in (1, 2):
        viewer.dims.set_current_step(2, channel)
        _spin()
        _mouse(viewer, (100 + 40 * channel, 120))
        labels = views["committed_objects"]
        viewer.layers.selection.active = labels
        labels.mode, labels.brush_size, labels.selected_label = "paint", 9, channel
        _mouse(viewer, (100 + 40 * channel, 200))
        viewer.layers.selection.active = views["point_prompts"]
    views["prompts"].add_rectangles([[20, 20, 0], [20, 30, 0], [30, 30, 0], [30, 20, 0]])
    np.testing.assert_allclose([p.position for p in session.prompts.points], [(70, 60), (90, 60)], atol=1)
    assert [session.labels["committed_objects"][y, 100] for y in (70, 90)] == [1, 2]
    annotator.undo()
    annotator.redo()  # the layers are filled anew
    assert viewer.dims.range[2].stop == 3
    for channel in range(4):
        viewer.dims.set_current_step(2, channel)
        _spin()
        assert views["committed_objects"].get_value((180, 200, channel), world=True) == 2
        assert views["point_prompts"].get_value((180, 120, channel), world=True) == 1
        red, green, blue = np.moveaxis(viewer.screenshot(canvas_only=True, flash=False)[..., :3].astype(int), -1, 0)
        is_point = (red < 20) & (blue < 20) & (green > 240)
        assert 30 < is_point.sum() < 2000, "points of 10 to 24 pixels"
        assert ((red < 20) & (blue < 20) & (green > 60) & (green < 140)).sum() > 200, "the box is shown"


def test_tracks_with_an_axis_of_length_one(viewer, annotate, cells_image):
    series = np.stack([cells_image] * 3)[:, None]
    annotator = annotate(viewer, viewer.add_image(series, scale=(2, 1, 3, 3)), "tracking")
    tracks = np.zeros((3, 128, 160), int)
    tracks[:, 4:9, 4:9] = 1
    annotator.session.set_labels("committed_objects", tracks)
    layer = viewer.layers["tracks"]
    np.testing.assert_allclose(layer.data, [[1, t, 0, 6, 6] for t in range(3)])
    np.testing.assert_allclose(layer.scale, (2, 1, 3, 3))


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
        np.testing.assert_allclose(views[name].data_to_world(voxel), expected, atol=1e-12)
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
        assert (array == 2).sum() == (plane == 2).sum() > 3
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


# What users do to layers


@pytest.fixture
def annotator(viewer, annotate, cells_image):
    """An annotator of an image in which something of each kind is there."""
    annotator = annotate(viewer, viewer.add_image(cells_image, name="cells", scale=(2, 2)))
    for n, name in enumerate(LABELS):
        annotator.session.set_labels(name, np.where(_disk(cells_image.shape, (20 + 30 * n, 50), 9), n + 1, 0))
    annotator.views["point_prompts"].add([[20, 50], [60, 60]])
    annotator.views["prompts"].add_rectangles([[10, 10], [10, 30], [30, 30], [30, 10]])
    annotator.prompt_panel.toggle()
    return annotator


def _content(annotator):
    session = annotator.session
    return session.prompts, {name: labels.copy() for name, labels in session.labels.items()}


def _assert_content(annotator, content):
    """Session and layers both have a content."""
    session, views = annotator.session, annotator.views
    assert session.prompts == content[0]
    np.testing.assert_allclose(views["point_prompts"].data, [p.position for p in content[0].points])
    assert len(views["prompts"].data) == len(content[0].shapes)
    for name, labels in content[1].items():
        np.testing.assert_array_equal(session.labels[name], labels)
        np.testing.assert_array_equal(views[name].data, labels)


@pytest.mark.parametrize("names", [*((name,) for name in FIVE), FIVE], ids=lambda names: "+".join(names))
def test_deleted_layers_come_back(viewer, annotator, names):
    from micro_sam.sam_annotator.keys import coerce_keybinding
    content, order = _content(annotator), [layer.name for layer in viewer.layers]
    viewer.layers.selection = {viewer.layers[name] for name in names}
    viewer.layers.remove_selected()
    _spin(lambda: len(viewer.layers) == 6)
    assert [layer.name for layer in viewer.layers] == order
    _assert_content(annotator, content)
    session, views = annotator.session, annotator.views
    for name in names:
        assert viewer.layers[name] is views[name]
        np.testing.assert_allclose(views[name].scale, (2, 2))
        assert coerce_keybinding("S") in views[name].keymap
        assert coerce_keybinding("Control-Z") in views[name].keymap
        assert name in annotator.notices.as_html()
    # They work as before.
    views["point_prompts"].add([[5, 6]])
    assert session.prompts.points[-1].position == (5, 6)
    assert not session.prompts.points[-1].positive, "the next point stays what was chosen"
    views["committed_objects"].data_setitem((np.array([0]), np.array([1])), 9)
    assert session.labels["committed_objects"][0, 1] == 9
    assert session.objects.ids == [3, 9]
    annotator.undo()
    annotator.undo()
    _assert_content(annotator, content)


def test_deleted_tracks_are_shown_again(viewer, annotate, cells_image):
    annotator = annotate(viewer, viewer.add_image(np.stack([cells_image] * 3), scale=(3, 2, 2)), "tracking")
    tracks = np.zeros((3, 128, 160), int)
    tracks[:, 5:9, 5:9] = 1
    annotator.session.set_labels("committed_objects", tracks)
    assert "tracks" in viewer.layers
    np.testing.assert_allclose(viewer.layers["tracks"].scale[-3:], (3, 2, 2))
    viewer.layers.remove("tracks")
    _spin()
    annotator.session.edit("remove", 1)
    assert "tracks" not in viewer.layers
    annotator.undo()
    assert len(viewer.layers["tracks"].data) == 3


def test_renamed_and_reordered_layers_stay_connected(viewer, annotator):
    content, session = _content(annotator), annotator.session
    for name in FIVE:
        viewer.layers[name].name = f"my {name}"
    viewer.layers.reverse()
    viewer.layers.move(0, 4)
    viewer.layers["my point_prompts"].add([[7, 8]])
    assert session.prompts.points[-1].position == (7, 8)
    with viewer.layers["my current_object"].block_history():
        viewer.layers["my current_object"].paint((100, 100), 4)
    assert session.labels["current_object"][100, 100] == 4
    annotator.undo()
    annotator.undo()
    _assert_content(annotator, content)
    annotator.commit()
    assert len(session.objects.ids) == 2
    assert not np.asarray(viewer.layers["my current_object"].data).any()
    assert sorted(layer.name for layer in viewer.layers) == sorted(["cells", *(f"my {name}" for name in FIVE)])


def test_layers_of_the_user_with_our_names(viewer, annotate, cells_image, cells_labels):
    image = viewer.add_image(cells_image, name="cells")
    mine = {
        "point_prompts": viewer.add_points([[1.0, 2.0]], name="point_prompts"),
        "prompts": viewer.add_image(np.ones((3, 3)), name="prompts"),
        "current_object": viewer.add_labels(np.ones((5, 5), int), name="current_object"),
    }
    viewer.add_labels(cells_labels, name="committed_objects")
    original = cells_labels.copy()
    annotator = annotate(viewer, image)
    views, session = annotator.views, annotator.session
    np.testing.assert_array_equal(session.labels["committed_objects"], cells_labels)
    assert [layer.name for layer in viewer.layers if "committed" in layer.name] == ["committed_objects"]
    for name, layer in mine.items():
        assert layer in viewer.layers
        assert layer.name == f"{name} (yours)"
        assert views[name].name == name
    np.testing.assert_allclose(mine["point_prompts"].data, [[1, 2]])
    assert session.prompts.is_empty
    views["committed_objects"].data_setitem((np.array([0]), np.array([0])), 999)
    np.testing.assert_array_equal(cells_labels, original)
    mine["point_prompts"].add([[3, 3]])
    assert session.prompts.is_empty


@pytest.mark.parametrize("labels", [np.ones((7, 7), int), np.full((128, 160), 2**40)], ids=["shape", "ids"])
def test_labels_that_do_not_fit_are_left_to_the_user(viewer, annotate, cells_image, labels):
    image = viewer.add_image(cells_image, name="cells")
    mine = viewer.add_labels(labels, name="committed_objects")
    annotator = annotate(viewer, image)
    assert mine in viewer.layers
    assert mine.name == "committed_objects (yours)"
    np.testing.assert_array_equal(mine.data, labels)
    assert not annotator.session.labels["committed_objects"].any()


def test_what_scripts_put_into_layers(viewer, annotator, cells_labels):
    session, views = annotator.session, annotator.views
    content, original = _content(annotator), cells_labels.copy()
    viewer.layers["committed_objects"].data = cells_labels
    np.testing.assert_array_equal(session.labels["committed_objects"], cells_labels)
    views["committed_objects"].data_setitem((np.array([0]), np.array([0])), 999)
    assert session.labels["committed_objects"][0, 0] == 999
    np.testing.assert_array_equal(cells_labels, original)
    annotator.undo()
    annotator.undo()
    _assert_content(annotator, content)
    viewer.layers["current_object"].data = np.ones((4, 4), int)
    assert "(128, 160)" in annotator.notices.as_html()
    _assert_content(annotator, content)

    views["point_prompts"].features = {"label": ["positive", "nonsense"]}
    assert "nonsense" in annotator.notices.as_html()
    views["point_prompts"].features = {"colour": ["red", "green"]}
    _assert_content(annotator, content)
    views["point_prompts"].add([[5, 6]])
    assert [p.positive for p in session.prompts.points] == [True, True, False]
    annotator.undo()

    # There is one history: that of the session.
    views["current_object"].data_setitem((np.array([0]), np.array([0])), 7)
    views["current_object"].undo()
    assert session.labels["current_object"][0, 0] == 7
    annotator.undo()
    _assert_content(annotator, content)


def test_the_next_point_gets_what_was_chosen(viewer, annotator):
    session, points = annotator.session, annotator.views["point_prompts"]
    assert not annotator.prompt_panel.positive
    points.add([[5, 6]])
    points.mode = "select"
    points.selected_data = {0}
    assert points.selected_data == {0}
    points.mode = "add"
    points.add([[7, 8]])
    annotator.prompt_panel.toggle()
    points.add([[9, 10]])
    assert [p.positive for p in session.prompts.points] == [True, True, False, False, True]
    annotator.clear()
    points.add([[9, 10]])
    assert [p.positive for p in session.prompts.points] == [True]


def test_axes_get_names_and_points_a_size(viewer, annotate, cells_image):
    layer = viewer.add_image(np.stack([cells_image] * 3))
    annotator = annotate(viewer, layer, "3d")
    assert tuple(viewer.dims.axis_labels) == ("z", "y", "x")
    assert annotator.views["point_prompts"].current_size == pytest.approx(160 / 48, abs=0.5)
    annotator.shut_down()
    viewer.dims.axis_labels = ("depth", "y", "x")
    annotate(viewer, layer, "3d")
    assert tuple(viewer.dims.axis_labels) == ("depth", "y", "x"), "names of the user stay"


def test_layers_follow_the_image(viewer, annotator):
    image, views = annotator.views.image_layer, annotator.views
    image.scale, image.translate, image.rotate = (3, 4), (5, 6), 20
    for name in FIVE:
        np.testing.assert_allclose(views[name].data_to_world((7, 8)), image.data_to_world((7, 8)))


def test_a_stroke_that_is_refused_is_taken_back(viewer, annotate, cells_image):
    annotator = annotate(viewer, viewer.add_image(np.stack([cells_image] * 3)), "tracking")
    tracks = np.zeros((3, 128, 160), int)
    tracks[0, 5:9, 5:9], tracks[1:, 5:9, 5:9] = 1, 2
    annotator.session.set_labels("committed_objects", tracks, parents={2: 1})
    labels = annotator.views["committed_objects"]
    for group in (labels.block_history, lambda: _nothing()):
        with group():
            labels.paint((2, 50, 50), 1)  # the mother would live on beside her daughter
        _spin()
        assert "taken back" in annotator.notices.as_html()
        np.testing.assert_array_equal(annotator.session.labels["committed_objects"], tracks)
        annotator.session.objects.check()


# Several annotators, images and viewers


def test_two_viewers_do_not_touch_each_other(new_viewer, annotate, cells_image):
    from micro_sam.sam_annotator._state import AnnotatorState
    first_viewer, second_viewer = new_viewer(), new_viewer()
    first = annotate(first_viewer, first_viewer.add_image(cells_image, name="one"))
    second = annotate(second_viewer, second_viewer.add_image(np.stack([cells_image] * 3), name="two"), "3d")
    _embed(first)
    assert second.session.embeddings is None
    assert AnnotatorState().annotator is second
    assert AnnotatorState().predictor is None
    first.views["point_prompts"].add([[1, 2]])
    second.views["point_prompts"].add([[1, 3, 4]])
    first.prompt_panel.toggle()
    assert second.prompt_panel.positive
    first.views["committed_objects"].data_setitem((np.array([0]), np.array([0])), 7)
    assert [p.position for p in first.session.prompts.points] == [(1, 2)]
    assert [p.position for p in second.session.prompts.points] == [(1, 3, 4)]
    assert not second.session.labels["committed_objects"].any()
    second.undo()
    assert second.session.prompts.is_empty
    assert first.session.labels["committed_objects"][0, 0] == 7
    _key(first_viewer, "Control-Z")
    assert not first.session.labels["committed_objects"].any()
    second.redo()

    # Closing the window of one ends it and leaves the other as it is.
    second_viewer.close()
    _spin(lambda: AnnotatorState().annotator is first)
    assert AnnotatorState().predictor is first.session.model.predictor
    first.views["point_prompts"].add([[9, 9]])
    first.segment()
    assert first.runner.wait(60)
    assert first.session.next_undo == "segment"
    assert "point_prompts" in first_viewer.layers
    first_viewer.close()
    _spin(lambda: AnnotatorState().annotator is None)
    assert first.views.closed


def test_launched_twice_in_one_viewer(viewer, annotate, cells_image, monkeypatch):
    from micro_sam._test_util import check_layer_initialization
    image = viewer.add_image(cells_image, name="image")
    first = annotate(viewer, image)
    first.views["point_prompts"].add([[1, 2]])
    first.session.set_labels("committed_objects", np.where(_disk(cells_image.shape, (50, 50), 9), 4, 0))
    labels = first.session.labels["committed_objects"].copy()
    second = annotate(viewer, image)
    assert sorted(layer.name for layer in viewer.layers) == sorted(["image", *FIVE])
    assert second.views["point_prompts"] in viewer.layers
    np.testing.assert_array_equal(second.session.labels["committed_objects"], labels)
    assert [p.position for p in second.session.prompts.points] == [(1, 2)]
    assert first.views.closed
    second.undo()
    second.undo()
    check_layer_initialization(viewer, cells_image.shape)
    second.views["point_prompts"].add([[3, 4]])
    _key(viewer, "Control-Z")
    assert second.session.prompts.is_empty


def test_closed_dock_and_opened_again(new_viewer, annotate, cells_image):
    from qtpy.QtWidgets import QDockWidget
    viewer = new_viewer(show=True)
    image = viewer.add_image(cells_image, name="image")
    first = annotate(viewer, image)
    first.views["point_prompts"].add([[1, 2]])
    first.session.set_labels("current_object", np.where(_disk(cells_image.shape, (50, 50), 9), 1, 0))
    content = _content(first)
    dock = next(d for d in viewer.window._qt_window.findChildren(QDockWidget) if d.widget() is first)
    dock.title.close_button.click()
    _spin()
    assert first.views.closed
    viewer.layers.remove("prompts")  # nothing holds on to the layers any more
    _spin()
    assert "prompts" not in viewer.layers
    viewer.layers["point_prompts"].add([[5, 5]])
    second = annotate(viewer, image)
    assert sorted(layer.name for layer in viewer.layers) == sorted(["image", *FIVE])
    _assert_content(second, content)
    second.undo()
    assert not second.session.labels["current_object"].any()


def test_images_keep_their_annotations(viewer, annotate, cells_image, rgb_image):
    one = viewer.add_image(cells_image, name="one", scale=(2, 2))
    two = viewer.add_image(rgb_image[:100], name="two", rgb=True, translate=(5, 5))
    annotator = annotate(viewer, one)
    for layer, point in ((one, (1, 2)), (two, (3, 4)), (one, (5, 6)), (two, (7, 8))):
        annotator.begin(layer)
        assert sorted(x.name for x in viewer.layers) == sorted(["one", "two", *FIVE])
        np.testing.assert_allclose(annotator.views["current_object"].scale, layer.scale)
        annotator.views["point_prompts"].add([point])
        with annotator.views["committed_objects"].block_history():
            annotator.views["committed_objects"].paint(point, 3)
    for layer, points, shape in ((one, [(1, 2), (5, 6)], (128, 160)), (two, [(3, 4), (7, 8)], (100, 160))):
        annotator.begin(layer)
        np.testing.assert_allclose(annotator.views["point_prompts"].data, points)
        labels = annotator.session.labels["committed_objects"]
        assert labels.shape == annotator.views["committed_objects"].data.shape == shape
        assert all(labels[p] == 3 for p in points)
    annotator.undo()
    assert annotator.session.labels["committed_objects"][7, 8] == 0
    annotator.begin(one)
    assert annotator.session.labels["committed_objects"][5, 6] == 3


@pytest.mark.parametrize("answer", ["Recover", "Discard"])
def test_after_a_crash(new_viewer, annotate, cells_image, answer):
    from qtpy.QtWidgets import QPushButton

    from micro_sam.annotation.journal import find_journals
    crashed = annotate(new_viewer(), None)
    crashed.begin(crashed.viewer.add_image(cells_image, name="cells"))
    crashed.views["point_prompts"].add([[20, 50]])
    with crashed.views["committed_objects"].block_history():
        crashed.views["committed_objects"].paint((50, 60), 4)
    crashed.views["prompts"].add_ellipses([[10, 10], [10, 30], [30, 30], [30, 10]])
    content = _content(crashed)
    crashed.shut_down()  # what was not saved is left in the journal, as after the end of the process
    assert len(find_journals()) == 1

    viewer = new_viewer(show=True)
    annotator = annotate(viewer, viewer.add_image(cells_image, name="cells"))
    _spin()
    assert annotator.session.prompts.is_empty
    buttons = {b.text(): b for b in annotator.findChildren(QPushButton) if b.text() in ("Recover", "Discard")}
    assert set(buttons) == {"Recover", "Discard"}
    buttons[answer].click()
    _spin()
    assert not [b for b in annotator.findChildren(QPushButton) if b.text() == "Recover"]
    if answer == "Discard":
        assert annotator.session.prompts.is_empty
        assert len(find_journals()) == 0
        return
    _assert_content(annotator, content)
    assert sorted(layer.name for layer in viewer.layers) == sorted(["cells", *FIVE])
    annotator.undo()
    assert len(annotator.session.prompts.shapes) == 0
    annotator.undo()
    assert not annotator.session.labels["committed_objects"].any()
    annotator.views["point_prompts"].add([[1, 1]])
    assert len(annotator.session.prompts.points) == 2
