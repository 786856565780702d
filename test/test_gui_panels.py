"""Panels, keys, messages and settings of the annotators in a real viewer."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from micro_sam.core.errors import InvalidInputError
from micro_sam.embeddings.cache import auto_cache_directory, auto_cache_limit
from micro_sam.models import registry

pytest.importorskip("napari")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

MODES = ("2d", "3d", "tracking")


@pytest.fixture(scope="module")
def app():
    from qtpy.QtWidgets import QApplication
    return QApplication.instance() or QApplication([])


@pytest.fixture(scope="module")
def window():
    import napari
    viewer = napari.Viewer(show=True)
    yield viewer
    viewer.close()


@pytest.fixture
def viewer(window):
    window.layers.clear()
    yield window
    window.layers.clear()


def _spin(until, timeout=10.0):
    from qtpy.QtCore import QCoreApplication
    end = time.monotonic() + timeout
    while not until():
        assert time.monotonic() < end, "the condition never came true"
        QCoreApplication.processEvents()
        time.sleep(0.002)


def _press(viewer, key):
    """Send a key to the canvas, as the window system would."""
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest
    modifiers = Qt.KeyboardModifier.NoModifier
    *names, letter = key.split("-")
    for name in names:
        modifiers |= getattr(Qt.KeyboardModifier, f"{name}Modifier")
    QTest.keyClick(viewer.window._qt_viewer.canvas.native, getattr(Qt.Key, f"Key_{letter}"), modifiers)


def _layer(viewer, kind, ndim=2):
    shape = (40, 50) if ndim == 2 else (4, 40, 50)
    if kind in ("image", "labels"):
        return getattr(viewer, f"add_{kind}")(np.zeros(shape, "uint8"), name=kind)
    if kind == "tracks":
        return viewer.add_tracks(np.array([[1, 0, 5, 5], [1, 1, 6, 6]]), name=kind)
    return getattr(viewer, f"add_{kind}")(ndim=ndim, name=kind)


KINDS = ("image", "labels", "points", "shapes", "tracks")


# Keys


@pytest.fixture
def calls():
    return []


@pytest.fixture
def bind(viewer, calls):
    """Binds all actions of a mode, which note that they were called."""
    from micro_sam.sam_annotator import keys
    bound = []

    def bind(layers, mode="3d"):
        actions = {name: lambda name=name: calls.append(name) for name in keys.key_map(mode, series=True)}
        bound.append(keys.bind(viewer, layers, actions, mode=mode, series=True))
        return bound[-1]

    yield bind
    for bindings in bound:
        bindings.unbind()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_key_works_whatever_layer_is_active(viewer, bind, calls, kind, mode):
    from micro_sam.sam_annotator.keys import key_map

    layer = _layer(viewer, kind, 3)
    bind([layer], mode)
    viewer.layers.selection.active = layer
    for action, key in key_map(mode, series=True).items():
        calls.clear()
        _press(viewer, key)
        assert calls == [action], f"{key} on {kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_shadowed_keys_are_those_that_napari_takes(viewer, bind, calls, kind):
    from micro_sam.sam_annotator.keys import key_map, shadowed_keys

    layer = _layer(viewer, kind, 3)
    bind([])
    viewer.layers.selection.active = layer
    taken = []
    for action, key in key_map("3d", series=True).items():
        calls.clear()
        _press(viewer, key)
        if calls != [action]:
            taken.append(key)
    assert taken == shadowed_keys(type(layer), key_map("3d", series=True).values())
    expected = {"image": {"C"}, "points": {"S"}, "shapes": {"S", "T", "Escape"}, "tracks": set()}
    # Older versions of napari take fewer keys.
    assert expected.get(kind, {"Control-Z", "Control-Shift-Z", "Escape"}) >= set(taken)


def test_our_keys_are_no_shortcuts_of_the_window(viewer):
    from qtpy.QtGui import QKeySequence

    from micro_sam.sam_annotator.keys import key_map

    found = set(_shortcuts(viewer.window._qt_window.menuBar().actions()))
    ours = {QKeySequence(key.replace("Control", "Ctrl").replace("-", "+")).toString()
            for mode in MODES for key in key_map(mode, series=True).values()}
    assert "Ctrl+O" in found
    assert not found & ours


def _shortcuts(actions):
    """The shortcuts of menus and all menus in them."""
    for action in actions:
        yield action.shortcut().toString()
        if action.menu() is not None:
            action.menu().aboutToShow.emit()  # fills it
            yield from _shortcuts(action.menu().actions())


def test_layers_get_their_own_keys_back_and_new_layers_get_ours(viewer, bind, calls):
    points, shapes = _layer(viewer, "points"), _layer(viewer, "shapes")
    bindings = bind([points, shapes])
    viewer.layers.remove(points)
    bindings.remove_layer(points)
    points = _layer(viewer, "points")
    bindings.add_layer(points)
    bindings.add_layer(points)
    viewer.layers.selection.active = points
    _press(viewer, "S")
    assert calls == ["segment"]
    assert str(points.mode) == "pan_zoom"
    bindings.unbind()
    _press(viewer, "S")
    assert calls == ["segment"]
    assert str(points.mode) == "select"
    viewer.layers.selection.active = shapes
    _press(viewer, "T")
    assert str(shapes.mode) == "add_path"


def test_what_was_bound_before_comes_back(viewer, bind, calls):
    points = _layer(viewer, "points")
    points.bind_key("S", lambda layer: calls.append("own"))
    bindings = bind([points])
    viewer.layers.selection.active = points
    _press(viewer, "S")
    bindings.unbind()
    _press(viewer, "S")
    assert calls == ["segment", "own"]


def test_escape_first_ends_a_polygon(viewer, bind, calls):
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest

    viewer.add_image(np.zeros((40, 50), "uint8"))
    shapes = _layer(viewer, "shapes")
    bind([shapes])
    viewer.layers.selection.active = shapes
    viewer.reset_view()
    shapes.mode = "add_polygon"
    canvas = viewer.window._qt_viewer.canvas.native
    middle = canvas.rect().center()
    for corner in (QPoint(-60, -60), QPoint(60, -60), QPoint(60, 60), QPoint(-60, 60)):
        QTest.mouseClick(canvas, Qt.MouseButton.LeftButton, pos=middle + corner)
        QTest.mouseMove(canvas, middle + corner + QPoint(3, 3))
    assert shapes._is_creating
    _press(viewer, "Escape")
    assert calls == []
    assert not shapes._is_creating
    assert shapes.shape_type == ["polygon"]
    _press(viewer, "Escape")
    assert calls == ["cancel"]


def test_key_maps_fit_their_mode():
    from micro_sam.sam_annotator.keys import describe_keys, key_map

    assert "segment_all" not in key_map("2d")
    assert key_map("tracking")["segment_all"] == "Shift-S"
    assert "next_image" not in key_map("3d")
    assert key_map("2d", series=True)["next_image"] == "N"
    for mode in MODES:
        keys = list(key_map(mode, series=True).values())
        assert len(keys) == len(set(keys)) == len(describe_keys(mode, series=True))
    assert ("Ctrl + Shift + Z", "Redo") in describe_keys("2d")


# Help


def test_keys_are_shown_and_hidden(viewer):
    from micro_sam.sam_annotator import keys
    from micro_sam.sam_annotator.help_overlay import HelpOverlay, canvas_of, help_button

    overlay = HelpOverlay(canvas_of(viewer), "tracking", series=True)
    button = help_button(overlay)
    bindings = keys.bind(viewer, [], {"help": overlay.toggle}, mode="tracking")
    try:
        assert not overlay.isVisible()
        _press(viewer, "H")
        assert overlay.isVisible()
        for key, text in keys.describe_keys("tracking", series=True):
            assert key in overlay.label.text()
            assert text in overlay.label.text()
        assert canvas_of(viewer).rect().contains(overlay.geometry())
        button.click()
        assert not overlay.isVisible()
    finally:
        bindings.unbind()
        overlay.deleteLater()


def test_keys_fit_into_a_narrow_canvas(app):
    from qtpy.QtWidgets import QWidget

    from micro_sam.sam_annotator.help_overlay import HelpOverlay

    canvas = QWidget()
    canvas.resize(800, 600)
    overlay = HelpOverlay(canvas, "tracking", series=True)
    overlay.toggle()
    wide = overlay.size()
    assert wide.width() > 320
    canvas.resize(320, 600)
    overlay.toggle()
    overlay.toggle()
    assert canvas.rect().contains(overlay.geometry())
    assert overlay.height() > wide.height()  # wrapped, not cut
    canvas.resize(800, 600)
    overlay.toggle()
    overlay.toggle()
    assert overlay.size() == wide
    canvas.deleteLater()


# Embedding panel


@pytest.fixture
def panel(app):
    from napari.components import ViewerModel  # the viewer without its window, which takes seconds

    from micro_sam.sam_annotator.model_panel import EmbeddingPanel
    viewer = ViewerModel()
    viewer.add_image(np.zeros((64, 64), "uint8"), name="first")
    viewer.add_image(np.zeros((900, 1500), "uint8"), name="second")
    panel = EmbeddingPanel(viewer, "2d")
    panel.resize(460, 500)
    panel.show()
    _spin(lambda: panel.device.count() > 1)
    yield panel
    panel.close()


def _texts(combo):
    return [combo.itemText(i) for i in range(combo.count())]


def test_the_panel_starts_with_what_works_offline(panel):
    assert panel.model_name == "vit_t_lite"
    assert panel.family.currentText() == "Included (offline)"
    assert panel.size.currentText() == "tiny – on disk"
    assert "works offline" in panel.purpose.text()
    assert not panel.section.isExpanded()
    assert panel.problem.isHidden()
    request = panel.values()
    assert request.image is panel.viewer.layers["first"]
    assert (request.model, request.device, request.save_path, request.tile_shape, request.mode) == (
        "vit_t_lite", "auto", None, None, "auto"
    )


def test_the_panel_shows_every_model_it_is_given(panel):
    from micro_sam.annotation.model_choice import get_entry

    for name in registry.list_models():
        panel.set_values(model=name)
        entry = get_entry(name)
        assert panel.model_name == panel.values().model == name
        assert panel.family.currentText() == entry.family
        assert panel.size.currentText().startswith(entry.size)
        assert entry.purpose in panel.purpose.text()
        assert ("downloaded once" in panel.purpose.text()) is not entry.on_disk


def test_a_family_offers_its_sizes_and_keeps_the_chosen_one(panel):
    from micro_sam.sam_annotator.form import select

    panel.set_model("vit_l")
    assert [text.split(" – ")[0] for text in _texts(panel.size)] == ["tiny", "base", "large", "huge"]
    assert _texts(panel.size)[1] == "base – download 375 MB"
    select(panel.family, "Light Microscopy")
    assert panel.model_name == "vit_l_lm"
    select(panel.family, "Medical Imaging")
    assert panel.model_name == "vit_b_medical_imaging"


def test_own_models_are_offered_by_their_name(panel, tiny_checkpoint):
    from micro_sam.sam_annotator.form import select

    assert "My models" not in _texts(panel.family)
    registry.register_local_model("my_nuclei", tiny_checkpoint, "nuclei of our microscope")
    try:
        panel.refresh_models()
        assert panel.model_name == "vit_t_lite"
        assert select(panel.family, "My models")
        assert panel.values().model == "my_nuclei"
        assert "nuclei of our microscope" in panel.purpose.text()
    finally:
        registry.get_local_models_file().unlink()


def test_images_follow_the_viewer(panel):
    viewer = panel.viewer
    second = viewer.layers["second"]
    panel.set_values(image=second)
    viewer.add_labels(np.zeros((64, 64), int), name="labels")
    viewer.add_image(np.zeros((8, 8)), name="third")
    second.name = "renamed"
    assert set(_texts(panel.image)) == {"first", "renamed", "third"}
    assert panel.values().image is second
    viewer.layers.remove(second)
    assert set(_texts(panel.image)) == {"first", "third"}
    assert panel.values().image is viewer.layers["first"]
    viewer.layers.clear()
    assert panel.values().image is None
    assert panel.request() is None
    assert "no image" in panel.problem.text()


def test_a_closed_panel_does_not_disturb_the_viewer(viewer):
    from qtpy.QtCore import QCoreApplication, QEvent

    from micro_sam.sam_annotator.model_panel import EmbeddingPanel

    panel = EmbeddingPanel(viewer)
    panel.deleteLater()
    QCoreApplication.sendPostedEvents(panel, QEvent.Type.DeferredDelete)
    viewer.add_image(np.zeros((8, 8)))


def test_values_round_trip(panel, tiny_checkpoint, tmp_path):
    values = {
        "image": panel.viewer.layers["second"], "model": "vit_b_lm", "checkpoint": None, "device": "cpu",
        "save_path": tmp_path / "new.zarr", "tile_shape": (512, 384), "halo": (64, 32), "mode": "ais",
    }
    panel.set_values(**values)
    request = panel.values()
    assert {name: getattr(request, name) for name in values} == values
    panel.set_values(checkpoint=tiny_checkpoint)
    request = panel.values()
    assert (request.model, request.checkpoint, request.save_path, request.tile_shape) == (
        None, tiny_checkpoint, None, None
    )
    assert not panel.family.isEnabled()
    assert not panel.size.isEnabled()
    assert "read from the custom weights" in panel.purpose.text()
    panel.checkpoint.path = None
    assert panel.values().model == "vit_b_lm"
    assert panel.family.isEnabled()


def test_y_is_y_and_what_is_shown_of_tiles_is_what_is_used(panel):
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    y, x = panel.tile.spins
    assert y.text() == "off"
    assert not panel.halo.isEnabled()
    y.setFocus()
    y.selectAll()
    QTest.keyClicks(y, "384")
    QTest.keyClick(y, Qt.Key.Key_Return)
    assert panel.tile.value == (384, 384)
    assert panel.halo.value == (48, 48)
    assert panel.halo.isEnabled()
    x.setValue(100)
    panel._tidy_tiles()
    assert panel.values().tile_shape == panel.tile.value == (384, 256)
    panel.halo.spins[0].setValue(20)
    assert panel.values().halo == (20, 48)
    y.setValue(0)
    x.setValue(0)
    panel._tidy_tiles()
    assert panel.values().tile_shape is panel.values().halo is None
    assert panel.halo.value == (0, 0)


def test_large_images_get_the_advice_to_use_tiles(panel):
    assert panel.advice.isHidden()
    panel.set_values(image=panel.viewer.layers["second"])
    assert panel.advice.isVisible()
    assert "900 × 1500" in panel.advice.text()
    panel.use_tiles.click()
    assert panel.values().tile_shape == (384, 384)
    assert panel.values().halo == (64, 64)
    _spin(lambda: not panel.advice.isVisible())
    assert not panel.use_tiles.isVisible()


def test_the_button_asks_only_for_what_can_work(panel, tmp_path):
    asked = []
    panel.requested.connect(asked.append)
    panel.set_values(mode="ais", model="vit_b")
    panel.compute.click()
    assert asked == []
    assert panel.problem.isVisible()
    assert "vit_b cannot do decoder (ais)" in panel.problem.text()
    panel.set_values(save_path=tmp_path / "new")
    panel.compute.click()
    assert asked == [panel.values()]
    assert not panel.problem.isVisible()
    panel.set_busy(True)
    panel.compute.click()
    assert panel.request() is None
    assert len(asked) == 1


def test_a_volume_is_refused_by_the_2d_panel_before_any_work(panel):
    layer = panel.viewer.add_image(np.zeros((5, 20, 20), "uint8"), name="volume")
    panel.set_values(image=layer)
    assert panel.request() is None
    assert "3D annotator" in panel.problem.text()
    colour = panel.viewer.add_image(np.zeros((20, 20, 3), "uint8"), name="colour", rgb=True)
    panel.set_values(image=colour)
    assert panel.request() is not None


def test_the_series_panel_has_no_image(app):
    from micro_sam.sam_annotator.model_panel import EmbeddingPanel

    panel = EmbeddingPanel(mode="3d", show_image=False)
    request = panel.request()
    assert request.image is None
    assert request.model == "vit_t_lite"


# Fields


@pytest.mark.parametrize(("value", "text"), [
    (0.5, "0.5"), (0.025, "0.025"), (0.0025, "0.0025"), (1, "1.0"), (0, "0.0")
])
def test_numbers_show_all_their_decimals(app, value, text):
    from micro_sam.sam_annotator.form import number

    spin = number(value)
    assert spin.value() == value
    assert spin.text() == text


def test_the_wheel_changes_a_field_only_when_it_was_clicked(app):
    from qtpy.QtCore import QPoint, QPointF, Qt
    from qtpy.QtGui import QWheelEvent
    from qtpy.QtWidgets import QApplication

    from micro_sam.sam_annotator.form import choice, integer

    for widget in (integer(5), choice(["a", "b"])):
        event = QWheelEvent(
            QPointF(2, 2), QPointF(2, 2), QPoint(0, 0), QPoint(0, -120), Qt.MouseButton.NoButton,
            Qt.KeyboardModifier.NoModifier, Qt.ScrollPhase.NoScrollPhase, False,
        )
        QApplication.sendEvent(widget, event)
        assert not event.isAccepted()
        assert (widget.value() == 5) if hasattr(widget, "value") else widget.currentText() == "a"


def test_paths_expand_and_can_be_chosen(app, monkeypatch, tmp_path):
    from qtpy.QtWidgets import QFileDialog

    from micro_sam.sam_annotator.form import PathRow

    row, changes = PathRow("folder", "automatic"), []
    row.changed.connect(lambda: changes.append(row.path))
    assert row.path is None
    monkeypatch.setenv("HOME", str(tmp_path))
    row.line.setText("  ~/a ")
    assert row.path == tmp_path / "a"
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *args: str(tmp_path))
    row.browse.click()
    assert row.path == changes[-1] == tmp_path
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *args: "")
    row.browse.click()
    assert row.path == tmp_path, "cancelling the dialog changes nothing"


# Messages


@pytest.fixture
def notices(app):
    from micro_sam.sam_annotator.notices import NoticeLine
    line = NoticeLine()
    line.resize(240, 30)
    line.show()
    yield line
    line.close()


def test_expected_errors_say_what_to_do_and_others_are_logged(notices, monkeypatch):
    from micro_sam.sam_annotator import notices as module

    seen = []
    monkeypatch.setattr(module, "notify", lambda level, text: seen.append((level, text)))
    expected = InvalidInputError("The tile is too small. Use at least 256 pixels.")
    notice = notices.show_error(expected)
    assert notice.text == str(expected)
    assert seen == []
    assert not module.log_file().exists()
    try:
        raise KeyError("slip") from ValueError("the cause")
    except KeyError as error:
        notice = notices.show_error(error)
    assert notice.text.startswith("Unexpected error: KeyError")
    assert str(module.log_file()) in notice.text
    assert "the cause" in notice.details
    assert "the cause" in module.log_file().read_text()
    assert seen == [("error", notice.text)]
    assert "Use tiles" in module.describe_error(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "Use tiles" in module.describe_error(MemoryError())


def test_the_line_is_elided_and_details_tell_all(notices):
    from qtpy.QtWidgets import QTextBrowser

    notices.warning("a message that has no room in one line")
    assert not notices.label.is_elided
    long = "a long message <with> signs " * 40
    for i in range(30):
        notices.info(f"message {i}")
    notices.warning(long, details="line 1\nline 2")
    assert notices.label.is_elided
    assert notices.label.text().endswith("…")
    assert len(notices.history) == 20
    dialog = notices.open_details()
    text = dialog.findChild(QTextBrowser).toPlainText()
    assert text.startswith("warning")
    assert "a long message <with> signs" in text
    assert "line 2" in text
    assert "message 29" in text
    assert "message 10\n" not in text
    dialog.close()
    notices.clear()
    assert notices.label.text() == ""
    assert notices.details.isVisible(), "what was said before can still be read"


def test_important_messages_are_notifications_of_napari(notices):
    from napari.utils.notifications import notification_manager

    before = len(notification_manager.records)
    notices.info("routine")
    notices.warning("your work is not saved", important=True)
    assert [record.message for record in notification_manager.records[before:]] == ["your work is not saved"]


# Settings


@pytest.fixture
def own_settings(monkeypatch, tmp_path):
    """Settings of a user who has none."""
    from micro_sam.core import settings
    monkeypatch.setattr(settings, "user_settings_file", lambda: tmp_path / "config" / "settings.json")
    return settings


@pytest.fixture
def settings(app, own_settings, monkeypatch, tmp_path):
    from micro_sam.sam_annotator.settings_widget import settings_widget
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    widget = settings_widget()
    widget.show()
    assert widget.runner.wait()
    yield widget
    widget.runner.close()
    widget.close()


def test_settings_are_kept_for_the_next_start(settings, own_settings, tmp_path):
    assert not settings.folder.isEnabled(), "the environment variable decides"
    assert "MICROSAM_CACHEDIR" in settings.folder_hint.text()
    settings.cap.setValue(7.5)
    settings.update_button.click()
    settings.runner.wait()
    assert json.loads(own_settings.user_settings_file().read_text()) == {"embedding_cache_gb": 7.5}
    assert auto_cache_limit() == int(7.5e9)
    assert settings.precision.currentText() == "exact"
    for text, kept in (("half, where it is faster", {"precision": "auto"}), ("exact", {})):
        settings.precision.setCurrentText(text)
        settings.update_button.click()
        settings.runner.wait()
        assert own_settings.read_user_settings() == {"embedding_cache_gb": 7.5, **kept}
        assert settings.precision.currentText() == text
    own_settings.write_user_settings(cache_directory="/data")
    assert own_settings.read_user_settings() == {"embedding_cache_gb": 7.5, "cache_directory": "/data"}
    own_settings.write_user_settings(cache_directory=None)
    assert own_settings.read_user_settings() == {"embedding_cache_gb": 7.5}
    own_settings.user_settings_file().write_text("{ damaged")
    assert own_settings.read_user_settings() == {}


def test_a_folder_that_cannot_be_used_is_refused(app, own_settings, monkeypatch, tmp_path):
    from micro_sam.core.settings import get_cache_directory
    from micro_sam.sam_annotator.settings_widget import settings_widget

    monkeypatch.delenv("MICROSAM_CACHEDIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    widget = settings_widget()
    assert widget.folder.isEnabled()
    assert widget.folder.path == tmp_path / "micro_sam"
    file = tmp_path / "file"
    file.write_text("")
    widget.folder.path = file
    assert not widget.update_settings()
    assert "is a file" in widget.notice.history[-1].text
    assert own_settings.read_user_settings() == {}
    widget.folder.path = tmp_path / "new"
    assert widget.update_settings()
    assert own_settings.read_user_settings()["cache_directory"] == str(tmp_path / "new")
    assert get_cache_directory() == widget.folder.path == tmp_path / "new"
    assert "stay in" in widget.notice.history[-1].text
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "environment"))
    assert get_cache_directory() == tmp_path / "environment"
    widget.runner.close()


def test_the_cache_can_be_cleared_after_a_question(settings):
    folder = auto_cache_directory()
    for name in ("0" * 32, "f" * 32):
        (folder / f"{name}.zarr").mkdir(parents=True)
        (folder / f"{name}.zarr" / "data").write_bytes(bytes(2_000_000))
    (folder / "mine.txt").write_text("kept")
    settings.refresh()
    assert settings.runner.wait()
    assert settings.size.text() == "Embeddings of 2 images: 4 MB"
    settings.clear_button.click()
    assert settings.really_button.isVisible()
    settings.keep_button.click()
    assert not settings.really_button.isVisible()
    assert len(list(folder.glob("*.zarr"))) == 2
    settings.clear_button.click()
    settings.really_button.click()
    assert settings.runner.wait()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert "2 images were deleted" in settings.notice.history[-1].text
    assert settings.size.text() == "No embeddings are kept."
    assert not settings.clear_button.isEnabled()


# Package


def test_tooltips():
    from micro_sam.sam_annotator.tooltips import get_tooltip

    assert "device" in get_tooltip("embedding", "device").lower() or get_tooltip("embedding", "device")
    assert get_tooltip("embedding", "nothing") is None
    assert get_tooltip("nothing", "device") is None


def test_every_field_of_the_panel_has_a_tooltip(panel):
    for field in (panel.image, panel.family, panel.size, panel.device, panel.save_path.line, panel.checkpoint.line,
                  *panel.tile.spins, *panel.halo.spins, panel.segmentation, panel.compute):
        assert field.toolTip()


def test_functions_are_not_hidden_by_the_modules_of_their_name():
    code = """
import importlib.util, sys, types
import micro_sam.sam_annotator as package
assert not [m for m in ("napari", "qtpy", "torch") if m in sys.modules]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "micro_sam.sam_annotator.annotator_2d":
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module): module.annotator_2d = lambda: "function"
sys.meta_path.insert(0, Finder())
import micro_sam.sam_annotator.annotator_2d
from micro_sam.sam_annotator.annotator_2d import annotator_2d as direct
from micro_sam.sam_annotator import annotator_2d
assert annotator_2d() == "function" and annotator_2d is direct is package.annotator_2d
assert isinstance(sys.modules["micro_sam.sam_annotator.annotator_2d"], types.ModuleType)
try:
    package.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
