"""Tracks from prompts: what ends them, which prompts count; and the bookkeeping of lineages."""

import numpy as np
import pytest
from annotation_scene import IOU, Scene, box, full, iou, point, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from micro_sam.annotation.prompts import PromptRefusal
from micro_sam.annotation.tracks import (
    END_TEXTS,
    TrackSettings,
    commit_lineage,
    divide,
    parents_of,
    track_object_steps,
    tracks_layer_data,
    validate,
)
from micro_sam.core.progress import drain
from micro_sam.editing.tracks import LineageError
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.tracking.objects import find_objects

SHAPE = (10, 96, 128)


def path(frame):
    return 40, 20 + 3 * frame


@pytest.fixture
def scene(monkeypatch):
    """Object 1 moves to the right in frames 0 to 9; object 2 rests."""
    scene = Scene(SHAPE, monkeypatch)
    scene.disc(range(10), 1, path, 12)
    scene.disc(range(10), 2, (80, 20), 9)
    return scene


@pytest.fixture
def run(scene, tiny_predictor):
    def run(*parts, track_id=1, shape=SHAPE, **options):
        steps = track_object_steps(
            tiny_predictor, scene.embeddings, shape, prompts(*parts), track_id, TrackSettings(**options)
        )
        return drain(steps, verbose=False)
    return run


def at(frame, **options):
    return point(frame, *path(frame), **options)


@pytest.mark.parametrize("projection", ["single_point", "box", "mask", "points_and_mask"])
def test_an_object_is_followed_to_the_end(run, scene, projection):
    result = run(at(1), projection=projection)
    assert list(result.masks) == list(range(1, 10))
    assert (result.last, result.reason, result.division_frame, result.notes) == (9, "end", None, ())
    for frame, mask in result.masks.items():
        assert iou(mask, scene.labels[frame] == 1) > 0.8
    assert [s.predicted_iou for s in result.scores.values()] == [pytest.approx(IOU)] * 9
    assert result.scores[1].stability > 0
    assert result.scores[2].stability is None


def test_only_prompts_of_the_track_count(run, scene):
    other = [point(0, 80, 20, track_id=2, division=True), box(0, 70, 10, 90, 30, track_id=2)]
    result = run(at(0), *other)
    assert result.last == 9
    result = run(at(0), *other, track_id=2)
    assert result.masks.keys() == {0}
    assert iou(result.masks[0], scene.labels[0] == 2) > 0.8


def test_refused_prompts_of_a_track_behind_its_division(run):
    with pytest.raises(PromptRefusal, match="frame 5.*daughter") as error:
        run(at(0), at(3, division=True), at(5))
    assert error.value.code == "after_division"


@pytest.mark.parametrize("frame", [0, 4, 9])
def test_a_division_ends_the_track_in_any_frame(run, frame):
    first = [at(0)] if frame else []
    result = run(*first, at(frame, division=True))
    assert (result.last, result.division_frame, result.reason) == (frame, frame, "division")
    assert list(result.masks) == list(range(frame + 1))


def test_stops(run):
    result = run(at(0), point(4, 5, 5, False))
    assert (result.last, result.reason) == (3, "stop")
    result = run(at(0), point(4, 5, 5, False), at(6))
    assert (result.last, result.reason) == (9, "end")
    assert "frame 4" in result.notes[0].replace("plane", "frame")
    result = run(at(3), point(1, 5, 5, False))
    assert list(result.masks) == list(range(3, 10))
    assert "forwards only" in result.notes[0]
    negative = [point(5, 5, 5, False), point(5, 9, 9, False)]
    assert "frame 5" in run(at(3), *negative).notes[0]


def test_lost_objects(run, scene):
    scene.labels[6][scene.labels[6] == 1] = 0
    result = run(at(0))
    assert (result.last, result.reason) == (5, "lost")
    assert result.notes == (f"Track 1 ends in frame 5: {END_TEXTS['lost']}.",)
    assert set(result.scores) == set(result.masks)
    # A prompt further on says that it is there: the frame between stays empty.
    result = run(at(0), at(7))
    assert list(result.masks) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert set(result.scores) == set(result.masks)


def test_a_prompt_in_the_last_frame_and_one_frame(run, monkeypatch, tiny_predictor):
    result = run(at(9))
    assert (list(result.masks), result.reason) == ([9], "end")
    assert "last frame" in result.notes[0]
    scene = Scene((1, *SHAPE[1:]), monkeypatch)
    scene.disc([0], 1, (40, 50), 12)
    steps = track_object_steps(tiny_predictor, scene.embeddings, (1, *SHAPE[1:]), prompts(point(0, 40, 50)), 1)
    assert list(drain(steps, verbose=False).masks) == [0]


def test_nothing_there(run):
    result = run(point(2, 5, 5))
    assert (result.masks, result.scores, result.last, result.division_frame) == ({}, {}, None, None)
    assert "nothing at the prompts in frame 2" in result.notes[0]
    result = run(point(0, 5, 5), at(2))
    assert min(result.masks) == 2


@pytest.mark.parametrize(("parts", "code"), [
    ((), "none"), ((at(0),), "none"), ((at(3, positive=False, track_id=3),), "stop"),
    ((at(3, positive=False, track_id=3), at(3, positive=False, track_id=3)), "only_negative"),
    ((box(3, 0, 0, 9, 9, track_id=3), box(3, 20, 20, 30, 30, track_id=3)), "several_shapes"),
])
def test_tracks_without_usable_prompts_are_refused(run, parts, code):
    with pytest.raises(PromptRefusal) as error:
        run(*parts, track_id=3)
    assert error.value.code == code


def test_settings_act(run, scene):
    assert run(at(0), iou_threshold=0.9).reason == "iou"
    scene.labels[5:][scene.labels[5:] == 1] = 0
    scene.disc(range(5, 10), 1, path, 18)  # more than twice the area
    assert (run(at(0)).last, run(at(0)).reason) == (4, "area")
    assert run(at(0), max_area_ratio=None, iou_threshold=0.3).last == 9
    assert run(at(0), max_area_ratio=None, iou_threshold=0.6).reason == "iou"


def test_the_motion_is_learnt_from_prompts(run, scene):
    scene.labels[scene.labels == 1] = 0
    scene.disc(range(10), 1, lambda frame: (40, 15 + 9 * frame), 12)
    assert run(point(0, 40, 15)).reason == "iou"  # nothing is known of the motion yet
    assert run(point(0, 40, 15), point(1, 40, 24)).last == 9
    assert run(point(0, 40, 15), point(1, 40, 24), point(2, 40, 33), motion_smoothing=1.0).last == 9
    scene.labels[3:] = 0
    scene.disc(range(3, 10), 1, lambda frame: (40, 33), 12)  # it stands still at once
    start = [point(0, 40, 15), point(1, 40, 24), point(2, 40, 33), point(3, 40, 33)]
    assert run(*start, motion_smoothing=0.0).last == 9
    assert run(*start, motion_smoothing=1.0).last == 3


def test_cancel_anywhere_and_run_again_with_a_model(tiny_predictor, cells_image):
    movie = np.stack([cells_image] * 4)
    embeddings = precompute_image_embeddings(tiny_predictor, movie, ndim=3, verbose=False)

    def start():
        what = prompts(box(0, 20, 20, 50, 60), box(2, 20, 20, 50, 60))
        return track_object_steps(tiny_predictor, embeddings, movie.shape, what, 1, TrackSettings("box"))

    n_steps = len(list(start()))
    for n in range(1, n_steps):
        steps = start()
        for _ in range(n):
            next(steps)
        steps.close()
    first, second = drain(start(), verbose=False), drain(start(), verbose=False)
    assert {0, 2} <= set(first.masks) == set(second.masks)
    for frame, mask in first.masks.items():
        assert np.array_equal(full(mask, movie.shape[1:]), full(second.masks[frame], movie.shape[1:]))


# Lineage


def test_three_generations_of_divisions():
    lineage, daughters = divide({1: []}, 1)
    assert daughters == (2, 3)
    lineage, (a, b) = divide(lineage, 2)
    assert (a, b) == (4, 5)
    lineage, others = divide(lineage, 3, used_ids=[9, 2])
    assert others == (10, 11)
    assert lineage == {1: [2, 3], 2: [4, 5], 3: [10, 11], 4: [], 5: [], 10: [], 11: []}
    assert parents_of(lineage) == {2: 1, 3: 1, 4: 2, 5: 2, 10: 3, 11: 3}
    start = {1: []}
    divide(start, 1)
    assert start == {1: []}
    with pytest.raises(LineageError, match="already, into"):
        divide(lineage, 1)
    with pytest.raises(LineageError, match="no track 8"):
        divide(lineage, 8)
    with pytest.raises(LineageError, match="two parents, 1 and 2"):
        parents_of({1: [3], 2: [3]})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=12), st.sets(st.integers(1, 40)), st.sets(st.integers(1, 60)))
def test_divisions_give_forests_and_commits_keep_links_of_what_is_there(choices, used, hidden):
    lineage = {1: []}
    for choice in choices:
        leaves = [track for track, daughters in lineage.items() if not daughters]
        lineage, new = divide(lineage, leaves[choice % len(leaves)], used)
        assert not {*new} & used
    parents = parents_of(lineage)
    assert len(parents) == len(lineage) - 1
    id_map = {track: track + 100 for track in lineage if track not in hidden}
    committed = commit_lineage(lineage, id_map, set(id_map.values()) - {101})
    assert set(committed) == set(id_map.values()) - {101}
    expected = {t + 100: p + 100 for t, p in parents.items() if t in id_map and p in id_map and p != 1}
    assert parents_of(committed) == expected


def test_commit_of_a_mother_before_its_daughters():
    assert commit_lineage({1: [2, 3]}, {1: 7}, [7, 2]) == {7: []}
    assert commit_lineage({1: [2, 3], 2: [], 3: []}, {2: 8}, [8]) == {8: []}
    assert commit_lineage({1: []}, {}, [1]) == {}


def test_problems_of_lineages():
    extents = {1: (0, 3), 2: (4, 9), 3: (4, 6), 4: (2, 9)}
    assert validate({1: [2, 3], 4: []}, extents) == []
    assert validate({1: []}, {}) == ["Track 1 has no pixels."]
    (early,) = validate({1: [4]}, extents)
    assert "must end before track 4 begins" in early
    (both,) = validate({1: [2], 3: [2]}, {1: (0, 3), 2: (7, 9), 3: (4, 6)})
    assert both == "Track 2 has two parents, 1 and 3."
    assert any("ancestors" in p for p in validate({1: [2], 2: [1]}, {1: (0, 0), 2: (1, 1)}))
    assert any("without pixels: [9]" in p for p in validate({1: [9]}, extents))


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int64"])
def test_data_of_the_tracks_layer(dtype):
    labels = np.zeros((3, 6, 8), dtype=dtype)
    labels[0, 1:3, 1:4] = 5
    labels[1, 0:2, 0:2], labels[1, 4:6, 4:7] = 7, 9
    labels[2, 5, 7] = 9
    parents = {7: 5, 9: 5, 11: 9, 5: 0}
    expected = [[5, 0, 1.5, 2], [7, 1, 0.5, 0.5], [9, 1, 4.5, 5], [9, 2, 5, 7]]
    for given_labels in (labels, [find_objects(frame) for frame in labels]):
        rows, graph = tracks_layer_data(given_labels, parents)
        np.testing.assert_array_equal(rows, expected)
        assert graph == {7: [5], 9: [5]}
    for nothing in (np.zeros_like(labels), [], [find_objects(labels[0] * 0)]):
        rows, graph = tracks_layer_data(nothing, parents)
        assert (rows.shape, graph) == ((0, 4), {})
