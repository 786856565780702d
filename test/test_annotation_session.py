"""Sessions: what actions do, that all of them can be undone, and that a journal brings everything back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops

from micro_sam.annotation import opening, tasks
from micro_sam.annotation.geometry import AnnotationImage
from micro_sam.annotation.prompt_data import PointPrompt, Prompts, ShapePrompt
from micro_sam.annotation.prompts import PromptRefusal, plan_prompts
from micro_sam.annotation.replay import replay
from micro_sam.annotation.segment import without_specks
from micro_sam.annotation.session import AUTO, COMMITTED, CURRENT, LAYERS, AnnotationSession
from micro_sam.core.errors import InvalidInputError, MicroSamError, NotInitializedError
from micro_sam.core.image import LazyImage
from micro_sam.core.masks import crop_mask
from micro_sam.core.output import read_labels
from micro_sam.core.progress import drain
from micro_sam.editing.refine import refine_mask
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.embeddings.store import stored_canvas
from micro_sam.evaluation.metrics import mask_iou
from micro_sam.models.specs import SHIPPED_MODEL
from micro_sam.precompute_state import precompute_steps
from micro_sam.segmentation.workflow import LoadedModel, load_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    return tmp_path


def make_image(mode="2d"):
    shape = (48, 64) if mode == "2d" else (5, 48, 64)
    return AnnotationImage.create(np.random.default_rng(0).integers(0, 255, shape).astype("uint8"), mode=mode)


def square(session, y, x, size=8, plane=0):
    labels = np.zeros(session.image.shape, dtype=int)
    (labels if labels.ndim == 2 else labels[plane])[y:y + size, x:x + size] = 1
    return labels


def snapshot(session):
    parents = session.objects.parents if session.mode == "tracking" else {}
    state = {k: v for k, v in session._state.items() if k != "settings"}
    return {k: v.copy() for k, v in session.labels.items()}, session.prompts, state, parents


def assert_same(first, second):
    for layer in LAYERS:
        np.testing.assert_array_equal(first[0][layer], second[0][layer], err_msg=layer)
    assert first[1:] == second[1:]


def act(session, rng):
    """A random action, as a user might do it; refusals are allowed to leave everything as it was."""
    kind = int(rng.integers(11))
    y, x, plane = (int(rng.integers(n)) for n in (40, 56, 5))
    ids = session.objects.ids
    try:
        if kind < 3:
            session.set_labels(CURRENT, square(session, y, x, plane=plane))
        elif kind < 6:
            session.commit(preserve=("objects", "pixels", "none")[kind - 3])
        elif kind == 6:
            position = (y, x) if session.mode == "2d" else (plane, y, x)
            session.set_prompts(Prompts((*session.prompts.points, PointPrompt(position, bool(rng.integers(2))))))
        elif kind == 7:
            session.clear(None if session.mode == "2d" or rng.integers(2) else plane)
        elif kind == 8 and ids:
            session.edit("remove", ids[int(rng.integers(len(ids)))])
        elif kind == 9 and len(ids) > 1:
            session.edit("merge", ids[-2:])
        elif kind == 10 and ids:
            session.start_correction(ids[0])
    except InvalidInputError:
        pass


def test_a_commit_clears_the_object_and_its_prompts_and_undo_brings_all_back():
    session = AnnotationSession(make_image(), mode="2d")
    session.set_prompts(Prompts((PointPrompt((5.0, 5.0), True),)))
    session.set_labels(CURRENT, square(session, 2, 2))
    before = snapshot(session)
    assert session.commit().ids == {1: 1}
    assert session.prompts.is_empty
    assert not session.labels[CURRENT].any()
    assert session.objects.area(1) == 64
    assert session.undo() == "commit"
    assert_same(snapshot(session), before)
    assert session.redo() == "commit"
    assert session.objects.ids == [1]
    session.set_labels(CURRENT, square(session, 30, 30))
    assert session.commit().ids == {1: 2}, "ids are never used twice"


def test_a_volume_commits_all_that_was_segmented_wherever_it_is():
    session = AnnotationSession(make_image("3d"), mode="3d")
    session.set_labels(CURRENT, square(session, 2, 2, plane=1) + square(session, 2, 2, plane=2))
    session.commit()
    session.set_labels(CURRENT, square(session, 20, 20, plane=4))
    session.commit()
    assert {i: session.objects.planes(i) for i in session.objects.ids} == {1: [1, 2], 2: [4]}


def test_a_commit_without_an_object_or_with_a_rejected_one_changes_nothing_and_says_why():
    session = AnnotationSession(make_image(), mode="2d")
    with pytest.raises(InvalidInputError, match="layer 'current_object' is empty"):
        session.commit()
    session.set_labels(COMMITTED, square(session, 10, 10))
    session.set_labels(CURRENT, square(session, 8, 8, size=20))
    before = snapshot(session)
    with pytest.raises(InvalidInputError, match="preserve mode"):
        session.commit()
    assert_same(snapshot(session), before)
    assert session.commit(preserve="pixels").ids == {1: 2}
    assert session.objects.area(1) == 64


def test_labels_of_another_program_are_copied_keep_their_ids_and_can_be_corrected_in_place():
    session = AnnotationSession(make_image("3d"), mode="3d")
    given_labels = (square(session, 5, 5, plane=1) * 40 + square(session, 5, 5, plane=2) * 40).astype("uint8")
    session.set_labels(COMMITTED, given_labels)
    session.start_correction(40)
    assert session.correcting == 40
    assert session.layer_editor(CURRENT).planes(1) == [1, 2]
    session.show_objects("segment", {1: {1: _boxed(5, 5, 10)}}, planes=[1])
    session.commit()
    assert session.objects.ids == [40]
    assert session.objects.area(40) == 100 + 64
    assert session.correcting is None
    assert given_labels.sum() == 40 * 128, "the array of the caller is not changed"
    with pytest.raises(InvalidInputError, match="shape of the image"):
        session.set_labels(COMMITTED, np.zeros((3, 3), int))
    with pytest.raises(InvalidInputError, match="integers"):
        session.set_labels(COMMITTED, np.zeros((5, 48, 64)))


def test_painted_strokes_are_actions_even_if_they_overlap():
    session = AnnotationSession(make_image(), mode="2d")
    labels = session.labels[COMMITTED]
    strokes = []
    for value, (y, x) in ((3, (4, 4)), (9, (6, 6)), (3, (8, 2))):
        where = tuple(a.ravel() for a in np.mgrid[y:y + 6, x:x + 6])
        strokes.append((where, labels[where].copy(), value))
        labels[where] = value
    painted = labels.copy()
    session.paint(COMMITTED, strokes)
    np.testing.assert_array_equal(labels, painted)
    assert session.objects.ids == [3, 9]
    assert session.objects.next_id == 10
    session.undo()
    assert not labels.any()
    session.redo()
    np.testing.assert_array_equal(labels, painted)
    session.objects.check()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(["2d", "3d"]))
def test_random_actions_can_be_undone_to_the_start_and_repeated_to_the_end(seed, mode):
    session, rng = AnnotationSession(make_image(mode), mode=mode), np.random.default_rng(seed)
    states = [snapshot(session)]
    for _ in range(15):
        n = len(session._done)
        act(session, rng)
        if len(session._done) > n:
            states.append(snapshot(session))
    for state in reversed(states[:-1]):
        assert session.undo() is not None
        assert_same(snapshot(session), state)
    assert session.undo() is None
    for state in states[1:]:
        session.redo()
        assert_same(snapshot(session), state)
    session.objects.check()


@pytest.mark.parametrize("mode", ["2d", "3d"])
def test_a_journal_recovers_and_replays_everything_also_what_was_undone(cache, mode):
    image, rng = make_image(mode), np.random.default_rng(3)
    session = opening.start(image, mode)
    for k in range(60):
        act(session, rng)
        if k % 7 == 3:
            session.undo()
        if k % 11 == 5:
            session.redo()
    expected, n_done = snapshot(session), len(session._done)
    session.close()
    (path,) = opening.unfinished(image, mode)
    assert_same(snapshot(session), expected)
    replayed = replay(path)
    for layer in LAYERS:
        np.testing.assert_array_equal(replayed.labels[layer], expected[0][layer])
    recovered = opening.recover(image, mode, path)
    assert_same(snapshot(recovered), expected)
    assert len(recovered._done) == n_done
    while recovered.undo():
        pass
    assert not any(a.any() for a in recovered.labels.values())
    recovered.close()


def test_a_saved_annotation_is_not_offered_again_until_it_is_changed(cache):
    image = make_image()
    session = opening.start(image, "2d")
    session.set_labels(CURRENT, square(session, 4, 4))
    session.commit()
    path = session.save(cache / "labels.tif")
    np.testing.assert_array_equal(read_labels(path), session.labels[COMMITTED])
    session.close()
    assert opening.unfinished(image, "2d") == []
    other = AnnotationImage.create(make_image().array + 1, mode="2d")
    assert opening.quick_signature(other) != opening.quick_signature(image)


# One process imports everything and forks the victims; each writes what it has done to a file before it goes on.
_VICTIMS = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from test_annotation_session import act, make_image
from micro_sam.annotation import opening
rng = np.random.default_rng(0)
for seed in range(20):
    os.environ["MICROSAM_CACHEDIR"] = "{folder}/cache" + str(seed)
    pid = os.fork()
    if pid == 0:
        session, moves = opening.start(make_image("3d"), "3d"), np.random.default_rng(seed)
        with open("{folder}/said" + str(seed), "w") as said:
            while True:
                act(session, moves)
                print(len(session._done), file=said, flush=True)
    time.sleep(float(rng.uniform(0.02, 0.4)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing_but_the_action_in_flight(tmp_path, monkeypatch):
    """20 processes are killed; each recovered state is that of a prefix of the same actions, with all that was said."""
    image, n_actions = make_image("3d"), []
    code = _VICTIMS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for seed in range(20):
        monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / f"cache{seed}"))
        said = tmp_path / f"said{seed}"
        n_said = len(said.read_text().splitlines()) if said.exists() else 0
        again, moves = AnnotationSession(image, mode="3d"), np.random.default_rng(seed)
        for _ in range(n_said):
            act(again, moves)
        unfinished = opening.unfinished(image, "3d")
        if not unfinished:
            assert not again.can_undo
            continue
        recovered = opening.recover(image, "3d", unfinished[0])
        if snapshot_key(again) != snapshot_key(recovered):
            act(again, moves)  # the action in flight, if it was written before it was said
        assert_same(snapshot(recovered), snapshot(again))
        n_actions.append(n_said)
        recovered.close()
    assert len(n_actions) >= 10
    assert max(n_actions) > 20


def snapshot_key(session):
    return [len(session._done), *(a.tobytes() for a in session.labels.values())], session.prompts


def test_tracks_divide_get_fresh_ids_and_keep_their_lineage_when_they_are_committed():
    session = AnnotationSession(make_image("tracking"), mode="tracking")
    boxes = {0: {1: _boxed(10, 10, 6)}, 1: {1: _boxed(10, 12, 6)}}
    session.show_objects("segment track", {1: {f: m[1] for f, m in boxes.items()}}, ids=[1],
                         state={"lineage": {"1": [2, 3], "2": [], "3": []}})
    session.select_track(2)
    assert session.track_id == 2
    session.show_objects("segment track", {2: {2: _boxed(6, 10, 5), 3: _boxed(6, 10, 5)}}, ids=[2])
    session.select_track(3)
    session.show_objects("segment track", {3: {2: _boxed(16, 10, 5)}}, ids=[3])
    session.commit()
    assert session.objects.parents == {2: 1, 3: 1}
    assert session.lineage == {1: []}
    assert session.track_id == 1
    session.show_objects("segment track", {1: {0: _boxed(30, 30, 6)}}, ids=[1])
    assert session.commit().ids == {1: 4}
    session.edit("unlink", 3)
    assert session.objects.parents == {2: 1}
    session.undo()
    assert session.objects.parents == {2: 1, 3: 1}
    with pytest.raises(InvalidInputError, match="no track 9"):
        session.select_track(9)


def test_without_a_model_nothing_is_segmented_and_without_prompts_neither(tiny_predictor):
    session = AnnotationSession(make_image(), mode="2d")
    with pytest.raises(NotInitializedError, match="Compute Embeddings"):
        tasks.segment(session)
    session.run(_open(session, tiny_predictor))
    with pytest.raises(PromptRefusal, match="Place a point"):
        tasks.segment(session)


@pytest.mark.parametrize("mode", ["2d", "3d"])
def test_prompts_to_saved_labels_without_a_screen(cache, tiny_predictor, mode):
    image = make_image(mode)
    session = opening.start(image, mode)
    plane = None if mode == "2d" else 2
    session.run(_open(session, tiny_predictor, plane))
    corner, far = ((5.0, 5.0), (30.0, 40.0)) if mode == "2d" else ((2.0, 5.0, 5.0), (2.0, 30.0, 40.0))
    session.set_prompts(Prompts((), (_rectangle(corner, far),)))
    session.run(tasks.segment(session, plane, live=True))
    first = snapshot(session)
    session.undo()
    assert session.prompts.is_empty, "a mask that followed a prompt is undone together with it"
    session.redo()
    assert_same(snapshot(session), first)
    if mode == "3d":
        session.run(tasks.embed_rest(session))
        result = session.run(tasks.segment_volume(session))
        assert 2 in result.masks[1]
    if session.layer_editor(CURRENT).ids:
        session.commit()
        session.save(cache / "labels.tif")
        assert read_labels(cache / "labels.tif").any()
    session.close()


def test_specks_stay_away_and_replay_needs_no_option(cache, tiny_predictor):
    image = make_image()
    session = opening.start(image, "2d")
    session.run(_open(session, tiny_predictor))
    prompts = Prompts((PointPrompt((20.0, 30.0), True),))
    masks = {}
    for drop in (False, True):
        session.set_prompts(prompts)
        session.run(tasks.segment(session, drop_specks=drop))
        masks[drop] = session.labels[CURRENT] > 0
        session.commit(CURRENT, "none")
        session.clear()
    wanted = plan_prompts(prompts, image.shape)[0]
    clean = without_specks(crop_mask(masks[False]), wanted)
    assert clean.area < masks[False].sum(), "the random model makes specks"
    np.testing.assert_array_equal(masks[True][clean.box[0]:clean.box[2], clean.box[1]:clean.box[3]], clean.mask)
    assert masks[True].sum() == clean.area
    path = session._journal.path
    session.close()
    np.testing.assert_array_equal(replay(path).labels[COMMITTED], session.labels[COMMITTED])


def test_a_polygon_corrects_an_object(tiny_predictor):
    session = AnnotationSession(make_image(), mode="2d")
    session.run(_open(session, tiny_predictor))
    session.set_labels(COMMITTED, square(session, 4, 4))
    session.start_correction(1)
    corners = ((20.0, 30.0), (20.0, 50.0), (40.0, 50.0), (40.0, 30.0))
    session.set_prompts(Prompts((), (ShapePrompt("polygon", corners),)))
    wanted = plan_prompts(session.prompts, session.image.shape)[0]
    session.run(tasks.segment(session))
    expected, _ = refine_mask(
        tiny_predictor, wanted.mask, drain(session.embeddings.plane_steps(None), verbose=False)[0], box=wanted.box,
    )
    np.testing.assert_array_equal(session.labels[CURRENT] > 0, expected)


def test_automatic_segmentation_of_one_plane_keeps_that_of_the_others(cache, tiny_predictor):
    session = AnnotationSession(make_image("3d"), mode="3d")
    session.run(_open(session, tiny_predictor, 0))
    first, second = square(session, 5, 5, plane=1), square(session, 20, 5, plane=3)

    class Automatic:
        def segment_plane_steps(self, plane, settings):
            return (first if plane == 1 else second)[plane]
            yield

    session.automatic = Automatic()
    session.run(tasks.auto_segment(session, tasks.AutoSettings(), 1))
    session.run(tasks.auto_segment(session, tasks.AutoSettings(), 3))
    session.run(tasks.auto_segment(session, tasks.AutoSettings(), 3))
    editor = session.layer_editor(AUTO)
    assert {i: editor.planes(i) for i in editor.ids} == {1: [1], 2: [3]}
    assert len(session.commit(AUTO).ids) == 2
    assert not session.labels[AUTO].any()


def test_the_shipped_model_looks_at_small_images_on_a_canvas_that_suits_them(tmp_path, cells_image, cells_labels):
    """But embeddings that are there already are used as they are."""
    own, ious = load_model(SHIPPED_MODEL, device="cpu"), ([], [], [], [])
    for y, x in ((0, 0), (0, 64), (32, 0), (32, 64)):  # the four corners, which cover the image
        image, labels = (np.ascontiguousarray(a[y:y + 96, x:x + 96]) for a in (cells_image, cells_labels))
        names = ("new", "of_the_command", "of_python", "of_training")
        stores = [tmp_path / f"{y}_{x}" / f"{name}.zarr" for name in names]
        stores[0].parent.mkdir()
        drain(precompute_steps(own, LazyImage(image, "YX"), stores[1]))
        for store, model in zip(stores[2:], (own, own.at_canvas(512))):
            precompute_image_embeddings(model.predictor, image, store, ndim=2, verbose=False)
        for store, canvas, found in zip(stores, (256, 256, 640, 512), ious):
            session = AnnotationSession(AnnotationImage.create(image, mode="2d"), mode="2d")
            session.run(tasks.open_model(session, SHIPPED_MODEL, device="cpu", save_path=str(store)))
            assert (session.model.canvas, stored_canvas(store)) == (canvas, canvas)
            assert session.model.decoder is not None
            for region in regionprops(labels):
                if region.area >= 100:
                    session.set_prompts(Prompts((PointPrompt(region.centroid, True),)))
                    session.run(tasks.segment(session))
                    found.append(mask_iou(session.labels[CURRENT] > 0, labels == region.label))
    assert ious[0] == ious[1]
    assert np.mean(ious[0]) > max(0.6, np.mean(ious[2]) + 0.05, np.mean(ious[3]))


def _open(session, predictor, plane=None):
    return tasks.open_model(
        session, "vit_t", save_path=None, plane=plane, load=lambda *_, **__: LoadedModel(predictor, None, "amg")
    )


def _rectangle(low, high):
    start, stop = np.array(low), np.array(high)
    corners = [(a, b) for a, b in ((start[-2], start[-1]), (start[-2], stop[-1]), (stop[-2], stop[-1]),
                                   (stop[-2], start[-1]))]
    return ShapePrompt("rectangle", tuple((*low[:-2], *c) for c in corners))


def _boxed(y, x, size):
    from micro_sam.core.masks import BoxedMask
    return BoxedMask(y, x, np.ones((size, size), dtype=bool), size * size)


def test_the_record_of_commits_follows_undo_and_redo_also_after_a_restart(cache):
    from micro_sam.annotation.commit_record import read_commit_record

    image, path = make_image(), cache / "record.zarr"
    session = opening.start(image, "2d")
    session.set_prompts(Prompts((PointPrompt((5.0, 5.0), True),)))
    session.set_labels(CURRENT, square(session, 4, 4))
    session.commit(path=path)
    session.set_labels(CURRENT, square(session, 30, 30))
    session.commit(path=path)
    record = read_commit_record(path)
    assert [entry.object_ids for entry in record.history] == [(1,), (2,)]
    assert record.prompts == {1: Prompts((PointPrompt((5.0, 5.0), True),))}
    np.testing.assert_array_equal(record.labels[:], session.labels[COMMITTED])
    session.undo()
    assert [entry.object_ids for entry in read_commit_record(path).history] == [(1,)]
    session.redo()
    session.start_correction(2)
    session.show_objects("segment", {1: {0: _boxed(30, 30, 12)}})
    session.commit(path=path)
    np.testing.assert_array_equal(read_commit_record(path).labels[:], session.labels[COMMITTED])
    session.close()
    recovered = opening.recover(image, "2d", opening.unfinished(image, "2d")[0])
    for _ in range(4):
        recovered.undo()
    assert recovered.objects.ids == [1]
    record = read_commit_record(path)
    assert [entry.object_ids for entry in record.history] == [(1,)]
    np.testing.assert_array_equal(record.labels[:], recovered.labels[COMMITTED])
    recovered.close()


def test_a_commit_that_cannot_be_recorded_is_taken_back(cache):
    from micro_sam.annotation.commit_record import read_commit_record

    path = cache / "record.zarr"
    other = AnnotationSession(AnnotationImage.create(make_image().array + 1, mode="2d"), mode="2d")
    other.set_labels(CURRENT, square(other, 20, 20))
    other.commit(path=path)
    session = AnnotationSession(make_image(), mode="2d")
    session.set_labels(CURRENT, square(session, 4, 4))
    before = snapshot(session)
    with pytest.raises(MicroSamError, match="record"):
        session.commit(path=path)
    assert_same(snapshot(session), before)
    np.testing.assert_array_equal(read_commit_record(path).labels[:], other.labels[COMMITTED])


@pytest.mark.parametrize("mode", ["2d", "3d", "tracking"])
def test_objects_are_measured_in_the_unit_of_the_image_or_in_pixels(mode):
    shape = (48, 64) if mode == "2d" else (5, 48, 64)
    column = "volume" if mode == "3d" else "area"
    for units, expected in (("pixel", 64), ("micrometer", 8 if mode == "3d" else 16)):
        image = AnnotationImage.create(
            np.zeros(shape, "uint8"), mode=mode, scale=(0.5,) * len(shape), units=(units,) * len(shape)
        )
        session = AnnotationSession(image, mode=mode)
        session.set_labels(CURRENT, square(session, 4, 4))
        session.commit()
        table = session.run(tasks.measure(session))
        assert table["id"].tolist() == [1]
        assert table[column].iloc[0] == expected
