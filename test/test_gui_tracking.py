"""The annotator of time series in a real viewer, with a model that finds the objects of a scene; needs a screen."""

import os
import time

import numpy as np
import pytest
from annotation_scene import Scene

from micro_sam.segmentation.workflow import LoadedModel
from micro_sam.tracking.ctc import read_ctc, write_ctc
from micro_sam.tracking.geff import read_geff
from micro_sam.tracking.lineage import Track, TrackForest

pytest.importorskip("napari")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(180)]

SHAPE = (10, 96, 128)
SCALE = (2.0, 0.5, 0.5)
MOTHER, DAUGHTERS = (48, 40), ((28, 60), (68, 60))
BIRTH = 5


def spin(annotator, seconds=0.1):
    """Let delayed work begin, and wait for all jobs."""
    from qtpy.QtWidgets import QApplication
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.002)
    assert annotator.runner.wait(60)
    QApplication.processEvents()


def shot(widget, name):
    """A picture for people; only if a folder is given."""
    if folder := os.environ.get("MICROSAM_SHOTS"):
        widget.grab().save(f"{folder}/{name}.png")


@pytest.fixture
def scene(monkeypatch):
    """Object 1 divides into 2 and 3 in frame 5; object 4 rests in all frames."""
    scene = Scene(SHAPE, monkeypatch)
    scene.disc(range(BIRTH), 1, MOTHER, 13)
    for label, center in enumerate(DAUGHTERS, 2):
        scene.disc(range(BIRTH, 10), label, center, 10)
    scene.disc(range(10), 4, (20, 110), 9)
    return scene


@pytest.fixture
def annotator(scene, tiny_predictor, tiny_decoder, monkeypatch, tmp_path):
    import napari

    from micro_sam.annotation import tasks
    from micro_sam.sam_annotator.annotator_tracking import AnnotatorTracking

    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1300, 900)
    layer = viewer.add_image((scene.labels * 50).astype("uint8"), name="movie", scale=SCALE)
    model = LoadedModel(tiny_predictor, tiny_decoder, "ais")
    annotator = AnnotatorTracking(viewer, layer=layer, model_loader=lambda *_, **__: model)
    viewer.window.add_dock_widget(annotator, area="right", name="annotator")
    annotator.open_model(tasks.open_model(
        annotator.session, "vit_t", load=annotator.model_loader, embeddings=scene.embeddings
    ))
    spin(annotator)
    annotator.segment_panel.live.setChecked(False)
    yield annotator
    annotator.shut_down()
    viewer.close()


def go(annotator, frame):
    annotator.viewer.dims.set_current_step(0, frame)
    spin(annotator, 0.02)
    assert annotator.views.plane == frame


def point(annotator, y, x):
    annotator.views["point_prompts"].add((annotator.views.plane, y, x))
    spin(annotator, 0.02)


def follow(annotator):
    annotator.segment_all()
    spin(annotator)


def choose_track(annotator, track_id):
    annotator.prompt_panel.track.setCurrentText(str(track_id))
    assert annotator.session.track_id == track_id


def annotate_division(annotator):
    """Track the mother up to its division, then both daughters."""
    go(annotator, 0)
    point(annotator, *MOTHER)
    go(annotator, BIRTH - 1)
    annotator.prompt_panel.state.setCurrentText("division")
    point(annotator, *MOTHER)
    annotator.prompt_panel.state.setCurrentText("track")
    follow(annotator)
    for track_id, center in zip(annotator.session.lineage[1], DAUGHTERS):
        choose_track(annotator, track_id)
        go(annotator, BIRTH)
        point(annotator, *center)
        follow(annotator)


def rows(annotator):
    """The tree as nested lists of texts."""
    def read(item):
        return [item.text(0), item.text(1), *[read(item.child(k)) for k in range(item.childCount())]]

    annotator.tracks_panel.refresh()
    tree = annotator.tracks_panel.tree
    return [read(tree.topLevelItem(k)) for k in range(tree.topLevelItemCount())]


def press(annotator, text, *ids, frame=None):
    """Select tracks in the tree and press a button of the panel."""
    panel = annotator.tracks_panel
    panel.refresh()
    panel.select(ids)
    if frame is not None:
        go(annotator, frame)
    panel.buttons[text].click()
    spin(annotator, 0.02)


def tracks(annotator):
    return {t.id: (t.first, t.last, t.parent) for t in annotator.session.objects.tracks.values()}


def overlap(found, truth):
    return (found & truth).sum() / (found | truth).sum()


def test_a_division_is_annotated_committed_and_undone(annotator, scene):
    annotate_division(annotator)
    session = annotator.session
    assert session.lineage == {1: [2, 3], 2: [], 3: []}
    assert any("divides in frame 4 into 2 and 3" in notice.text for notice in annotator.notices.history)
    menu = annotator.prompt_panel.track
    assert [menu.itemText(i) for i in range(menu.count())] == ["1", "2", "3"]
    current = session.labels["current_object"]
    for label in (1, 2, 3):
        assert overlap(current == label, scene.labels == label) > 0.8
    view = annotator.confidence
    assert set(view.strip.scores) == set(range(BIRTH, 10))
    assert (view.strip.prompted, view.strip.text_of(7)) == ({BIRTH}, "Frame 7: predicted IoU 0.90")
    choose_track(annotator, 1)
    spin(annotator)
    assert (set(view.strip.scores), view.strip.prompted) == (set(range(BIRTH)), {0, BIRTH - 1})

    annotator.commit()
    spin(annotator)
    expected = {1: (0, 4, 0), 2: (5, 9, 1), 3: (5, 9, 1)}
    assert tracks(annotator) == expected
    assert session.lineage == {1: []}
    assert set(session.scores()) == {1, 2, 3}
    layer = annotator.viewer.layers["tracks"]
    assert tuple(layer.scale) == SCALE
    assert dict(layer.graph) == {2: [1], 3: [1]}
    assert set(layer.data[:, 0]) == {1, 2, 3}
    assert rows(annotator) == [["1", "0 – 4", ["2", "5 – 9"], ["3", "5 – 9"]]]

    annotator.undo()
    spin(annotator)
    assert tracks(annotator) == {}
    assert session.lineage == {1: [2, 3], 2: [], 3: []}
    assert rows(annotator) == []
    assert "tracks" not in annotator.viewer.layers
    annotator.redo()
    assert tracks(annotator) == expected
    annotate_division(annotator)  # fresh ids, though the working ones are the same
    annotator.commit_panel.preserve.setCurrentText("none")
    annotator.commit()
    assert tracks(annotator) == {4: (0, 4, 0), 5: (5, 9, 4), 6: (5, 9, 4)}


def test_the_tree_shows_tracks_and_is_linked_with_the_viewer(annotator, scene):
    panel, layer = annotator.tracks_panel, annotator.views["committed_objects"]
    spin(annotator, 0.3)
    assert panel.tree.isHidden()
    assert not panel.empty.isHidden()
    annotator.session.set_labels("committed_objects", scene.labels, parents={2: 1, 3: 1})
    spin(annotator, 0.3)
    assert not panel.tree.isHidden()
    assert rows(annotator) == [["1", "0 – 4", ["2", "5 – 9"], ["3", "5 – 9"]], ["4", "0 – 9"]]
    shot(panel, "tracks")
    items = {item.data(0, 0x100): item for item in panel._items()}
    items[3].setSelected(True)
    assert (annotator.views.plane, layer.selected_label) == (5, 3)
    panel.tree.clearSelection()
    go(annotator, 7)
    items[2].setSelected(True)
    assert (annotator.views.plane, layer.selected_label) == (7, 2), "it is in sight: the frame to edit stays"
    panel.tree.itemDoubleClicked.emit(items[2], 0)
    assert annotator.views.plane == 5
    layer.selected_label = 4  # as the picker does
    assert panel.selected == [4]
    assert annotator.views.plane == 5
    items[1].setExpanded(False)
    annotator.session.edit("remove", 3)
    spin(annotator, 0.3)
    assert panel.selected == [4]
    assert not panel.tree.topLevelItem(0).isExpanded()
    annotator.viewer.camera.center = (0, -500, -500)
    spin(annotator)
    panel.show_track(1)
    assert np.allclose(annotator.viewer.camera.center[-2:], np.multiply(MOTHER, 0.5), atol=0.1)


def test_lineage_edits_and_their_undo(annotator, scene):
    session = annotator.session
    session.set_labels("committed_objects", scene.labels)
    before, roots = session.labels["committed_objects"].copy(), tracks(annotator)
    press(annotator, "Link", 2, 1)
    assert tracks(annotator)[2] == (5, 9, 1), "the one that begins first is the mother"
    press(annotator, "Unlink", 2)
    assert tracks(annotator) == roots
    press(annotator, "Divide Here", 3, 1, 2, frame=5)
    assert session.objects.divisions == {1: [2, 3]}
    press(annotator, "Split Here", 4, frame=6)
    assert (tracks(annotator)[4], tracks(annotator)[5]) == ((0, 5, 0), (6, 9, 0))
    assert annotator.tracks_panel.selected == [4, 5]
    press(annotator, "Link", *annotator.tracks_panel.selected)
    assert tracks(annotator)[5] == (6, 9, 4)
    press(annotator, "Swap From Here", 2, 3, frame=7)
    assert scene.labels[7][session.labels["committed_objects"][7] == 2].min() == 3
    press(annotator, "Merge", 4, 5)
    assert tracks(annotator)[4] == (0, 9, 0)
    press(annotator, "Merge", 2, 3)
    assert "shared 5 frame" in annotator.notices.history[-1].text
    assert tracks(annotator)[2] == (5, 9, 1)
    press(annotator, "Delete", 1, 4)
    assert tracks(annotator) == {2: (5, 9, 0)}
    shot(annotator.tracks_panel, "tracks_edited")
    while session.next_undo != "load":
        annotator.undo()
    assert tracks(annotator) == roots
    np.testing.assert_array_equal(session.labels["committed_objects"], before)


def test_what_cannot_be_done_is_said_and_changes_nothing(annotator, scene):
    annotator.session.set_labels("committed_objects", scene.labels)
    before = tracks(annotator)
    for button, ids, frame, message in (
        ("Link", (1,), 0, "Select the mother and its daughters"), ("Link", (1, 4), 0, "must end before"),
        ("Unlink", (), 0, "Select the daughters"), ("Unlink", (4,), 0, "no parent"),
        ("Divide Here", (1,), 5, "first frame of the daughters"), ("Divide Here", (2, 4), 0, "begins in frame"),
        ("Split Here", (1, 2), 3, "Select one track"), ("Split Here", (2,), 5, "cannot be split at frame 5"),
        ("Swap From Here", (1,), 3, "Select two tracks"), ("Merge", (1,), 0, "two or more"),
        ("Delete", (), 0, "to remove"),
    ):
        press(annotator, button, *ids, frame=frame)
        assert message in annotator.notices.history[-1].text
        assert tracks(annotator) == before
        assert annotator.session.next_undo == "load"


def test_automatic_tracks_are_corrected_exported_and_imported(annotator, scene, tmp_path):
    class Automatic:
        """Has lost object 4 in frame 5, and sees no division."""

        def track_steps(self, settings):
            labels = scene.labels.copy()
            labels[5:][labels[5:] == 4] = 9
            yield from ()
            return labels, TrackForest(
                [Track(1, 0, 4), Track(2, 5, 9), Track(3, 5, 9), Track(4, 0, 4), Track(9, 5, 9)]
            )

    session, panel = annotator.session, annotator.tracks_panel
    panel.export_ctc(tmp_path / "none")
    assert "no committed tracks" in annotator.notices.history[-1].text
    session.automatic = Automatic()
    annotator.auto_panel.whole.setChecked(True)
    annotator.auto_segment()
    spin(annotator)
    annotator.commit()
    assert tracks(annotator) == {1: (0, 4, 0), 2: (5, 9, 0), 3: (5, 9, 0), 4: (0, 4, 0), 5: (5, 9, 0)}
    press(annotator, "Merge", 4, 5)
    press(annotator, "Divide Here", 1, 2, 3, frame=5)
    session.start_correction(4)
    assert session.layer_editor("current_object").ids == [1]
    annotator.clear()
    forest = TrackForest(session.objects.tracks.values())

    panel.export_ctc(tmp_path / "ctc")
    spin(annotator)
    panel.export_geff(tmp_path / "tracks")
    session.edit("remove", 4)  # while the files may still be written
    spin(annotator)
    for labels, found in (read_ctc(tmp_path / "ctc"), read_geff(tmp_path / "tracks.zarr")):
        np.testing.assert_array_equal(labels, scene.labels)
        assert found == forest
    panel.export_ctc(tmp_path / "ctc")
    assert "holds tracks already" in annotator.notices.history[-1].text

    for path in (tmp_path / "ctc", tmp_path / "tracks.zarr"):
        session.edit("remove", session.objects.ids[-1])
        before = tracks(annotator)
        panel.import_tracks(path)
        spin(annotator)
        assert TrackForest(session.objects.tracks.values()) == forest
        np.testing.assert_array_equal(session.labels["committed_objects"], scene.labels)
        assert "Imported 4 tracks" in annotator.notices.history[-1].text
        annotator.undo()
        assert tracks(annotator) == before
    panel.import_tracks(tmp_path)
    assert "holds no tracks" in annotator.notices.history[-1].text
    write_ctc(tmp_path / "small", np.ones((2, 5, 5), dtype=np.uint16), [{1: []}])
    panel.import_tracks(tmp_path / "small")
    spin(annotator)
    assert "shape of the image" in annotator.notices.history[-1].text
    assert tracks(annotator) == before


def test_replacing_an_export_is_asked_for(annotator, scene, tmp_path, monkeypatch):
    from micro_sam.sam_annotator.panels import Question
    from micro_sam.sam_annotator.tracks_panel import QFileDialog

    panel = annotator.tracks_panel
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path / "ctc"))
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "t"), ""))
    for ask, read in ((panel._ask_ctc, lambda: read_ctc(tmp_path / "ctc")), (panel._ask_geff, lambda: read_geff(
        tmp_path / "t.zarr"
    ))):
        annotator.session.set_labels("committed_objects", scene.labels)
        ask()
        spin(annotator)
        assert len(read()[1]) == 4
        annotator.session.edit("remove", 1)
        for answer, expected in (("Cancel", 4), ("Replace", 3)):
            ask()
            (question,) = panel.findChildren(Question)
            assert "already" in question.findChildren(type(panel.empty))[0].text()
            question.answered.emit(answer)
            spin(annotator)
            assert not panel.findChildren(Question)
            assert len(read()[1]) == expected
    panel._ask_import()
    spin(annotator)
    assert set(tracks(annotator)) == {2, 3, 4}
