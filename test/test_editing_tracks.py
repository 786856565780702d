"""Corrections of tracks: random edits against networkx and the labels, single edits by hand, following an object."""

import json
import random

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segment_anything import SamPredictor

from micro_sam.core.errors import InvalidInputError
from micro_sam.core.progress import Step
from micro_sam.editing import follow as module
from micro_sam.editing.follow import propagate_track, propagate_track_steps
from micro_sam.editing.history import Delta, EditConflictError
from micro_sam.editing.tracks import (
    LineageError,
    Track,
    TrackEditor,
    lineage_problems,
)
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.prompt_based_segmentation import segment_from_mask

EDITS = [
    "add", "replace", "remove", "merge", "join", "split", "swap", "link", "link at random", "unlink", "divide",
    "divide tracks", "components", "commit",
]
NAMES = st.lists(st.sampled_from(EDITS), min_size=1, max_size=12)
PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow], database=None
)
SHAPE = (8, 5, 6)


class Chunked:
    """What an array on disk looks like, without its cost."""

    def __init__(self, array, chunks):
        self.array, self.chunks, self.shape, self.dtype = array, chunks, array.shape, array.dtype

    def __getitem__(self, key):
        return self.array[key].copy()

    def __setitem__(self, key, values):
        self.array[key] = values


def movie(**rows):
    """A movie in which each track is one row of pixels, from its first to before its last frame."""
    labels = np.zeros((10, 8, 4), dtype=np.uint16)
    for row, (name, (first, stop)) in enumerate(rows.items()):
        labels[first:stop, row] = int(name[1:])
    return labels


def check(editor):
    """Labels and lineage agree, and the lineage is a forest: by networkx, from nothing but the labels."""
    labels = np.asarray(editor.labels[...])
    tracks, ids = editor.tracks, np.unique(labels[labels > 0]).tolist()
    frames = {i: np.flatnonzero((labels == i).any(axis=(1, 2))).tolist() for i in ids}
    assert tracks.keys() == frames.keys()
    graph = nx.DiGraph()
    graph.add_nodes_from(frames)
    for i, track in tracks.items():
        assert (track.id, track.first, track.last) == (i, frames[i][0], frames[i][-1])
        assert editor.frames(i) == frames[i]
        if track.parent:
            graph.add_edge(track.parent, i)
            assert frames[track.parent][-1] < frames[i][0]
    assert set(graph) == set(frames)
    if frames:
        assert nx.is_branching(graph)
    assert editor.divisions == {i: sorted(graph[i]) for i in graph if len(graph[i]) > 1}
    editor.check()
    return labels.copy(), editor.parents


@st.composite
def start_movie(draw):
    """Pairs of pixels that begin and end somewhere, and links between those that follow each other."""
    labels, parents = np.zeros(SHAPE, dtype=np.uint16), {}
    for i in range(1, draw(st.integers(1, 7)) + 1):
        first = draw(st.integers(0, SHAPE[0] - 1))
        last = draw(st.integers(first, min(first + 4, SHAPE[0] - 1)))
        y, x = draw(st.integers(0, SHAPE[1] - 1)), draw(st.integers(0, SHAPE[2] - 2))
        block = labels[first:last + 1, y, x:x + 2]
        block[block == 0] = i
    for parent, i in following(labels):
        if draw(st.booleans()):
            parents[i] = parent
    return labels, parents


def following(labels):
    """All pairs of tracks of which the second begins after the end of the first."""
    frames = {i: np.flatnonzero((labels == i).any(axis=(1, 2))) for i in np.unique(labels[labels > 0]).tolist()}
    return [(i, j) for i in frames for j in frames if frames[i][-1] < frames[j][0]]


def random_edit(name, pick, editor):
    """Do an edit with random arguments; return its delta, or None if it was refused."""
    ids = editor.ids or [1]
    i, j = pick.choice(ids), pick.choice(ids)
    parent, daughter = pick.choice(following(editor.labels[...]) or [(i, j)])
    frame = pick.choice(editor.frames(i)) if editor.ids and pick.random() < 0.8 else pick.randrange(SHAPE[0])
    masks = np.zeros((2, *SHAPE[1:]), dtype=bool)
    for mask in masks:
        y, x = pick.randrange(SHAPE[1]), pick.randrange(SHAPE[2])
        mask[y:y + 2, x:x + 2] = True
    preserve, flag = pick.choice(["pixels", "none"]), pick.random() < 0.5
    candidate = np.stack([masks[0] * 4, masks[1] * 9]).astype(np.uint8)
    edits = {
        "add": lambda: editor.add(masks[0], frame, preserve=preserve, parent=i if flag and editor.ids else 0),
        "replace": lambda: editor.replace(i, masks[0], frame, preserve=preserve),
        "remove": lambda: editor.remove(i, [frame] if flag else None),
        "merge": lambda: editor.merge([parent, daughter] if flag else [i, j], overlap=flag),
        "join": lambda: editor.merge([daughter, parent]),
        "split": lambda: editor.split(i, frame, linked=flag),
        "swap": lambda: editor.swap(i, j, frame),
        "link": lambda: editor.link(parent, daughter),
        "link at random": lambda: editor.link(i, j),
        "unlink": lambda: editor.unlink(pick.choice(sorted(editor.parents) or [i])),
        "divide": lambda: editor.divide(i, min(frame + 1, SHAPE[0] - 1), masks=masks, preserve=preserve),
        "divide tracks": lambda: editor.divide(parent, frame, [daughter]),
        "components": lambda: editor.split_components(i, frame),
        "commit": lambda: editor.commit(candidate, min(frame, SHAPE[0] - 2), parents={9: 4}).delta,
    }
    try:
        return edits[name]()
    except InvalidInputError:
        return None


@PROPERTY
@given(NAMES, st.integers(0, 2**32 - 1), start_movie(), st.booleans())
def test_random_edits_keep_a_forest_and_undo_exactly(names, seed, start, chunked):  # issue 3, acceptance 4
    labels, parents = start
    given_labels, given_parents = labels.copy(), dict(parents)
    stored = Chunked(labels.astype(np.uint32), (3, 4, 4))
    editor = TrackEditor(stored, parents, in_place=True) if chunked else TrackEditor(labels, parents)
    pick = random.Random(seed)
    states, deltas = [check(editor)], []
    seen = set(editor.ids)
    for name in names:
        delta = random_edit(name, pick, editor)
        state = check(editor)
        if delta is None or delta.is_empty:
            np.testing.assert_array_equal(state[0], states[-1][0])
            assert state[1] == states[-1][1]
            continue
        before, after = (set(np.unique(s[0]).tolist()) - {0} for s in (states[-1], state))
        assert (set(delta.created), set(delta.removed)) == (after - before, before - after)
        assert not set(delta.created) & seen  # 04-W6: a new track never gets an id that there was
        links = {t: (states[-1][1].get(t, 0), state[1].get(t, 0)) for t in {*states[-1][1], *state[1]}}
        assert {t: (a, b) for t, a, b in delta.links} == {t: ab for t, ab in links.items() if ab[0] != ab[1]}
        seen |= after
        states.append(state)
        deltas.append(delta)

    for moves, step in ((states[-2::-1], editor.undo), (states[1:], editor.redo)):
        for state in moves:
            assert step() is not None
            now = check(editor)
            np.testing.assert_array_equal(now[0], state[0])
            assert now[1] == state[1]
        assert step() is None
    np.testing.assert_array_equal(labels, given_labels)
    assert parents == given_parents

    other = TrackEditor(labels, parents)
    for delta in deltas:
        other.apply(Delta.from_json(json.loads(json.dumps(delta.to_json()))))
    now = check(other)
    np.testing.assert_array_equal(now[0], states[-1][0])
    assert now[1] == states[-1][1]


def test_nested_divisions_never_share_ids():  # 04-W6
    labels = movie(t1=(0, 2))
    editor = TrackEditor(labels)
    masks = np.zeros((8, 8, 4), dtype=bool)
    masks[np.arange(8), np.arange(8)] = True
    assert editor.divide(1, 2, masks=masks[:2]).created == (2, 3)
    assert editor.divide(2, 3, masks=masks[2:4]).created == (4, 5)
    assert editor.divide(3, 3, masks=masks[4:6]).created == (6, 7)
    assert editor.divide(4, 5, masks=masks[6:8]).created == (8, 9)
    assert editor.parents == {2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 4, 9: 4}
    assert editor.divisions == {1: [2, 3], 2: [4, 5], 3: [6, 7], 4: [8, 9]}
    assert editor.tracks[4] == Track(4, 3, 3, 2)
    with pytest.raises(LineageError, match=r"divided already, into \[2, 3\]"):
        editor.divide(1, 2, masks=masks[:2])
    check(editor)
    editor.remove(2)  # daughters of a removed track are roots
    assert editor.parents == {3: 1, 6: 3, 7: 3, 8: 4, 9: 4}
    check(editor)


def test_division_of_an_automatic_track():  # users row 11
    labels = movie(t1=(0, 9), t2=(5, 9), t3=(9, 10))
    editor = TrackEditor(labels, {3: 1})
    delta = editor.divide(1, 5, [2])
    assert delta.created == (4,)
    assert editor.parents == {2: 1, 3: 4, 4: 1}
    expected = labels.copy()
    expected[5:][labels[5:] == 1] = 4
    np.testing.assert_array_equal(editor.labels, expected)
    editor.undo()
    np.testing.assert_array_equal(editor.labels, labels)
    assert editor.parents == {3: 1}
    for frame, daughters, error, text in (
        (6, [2], LineageError, "begins before frame 6"), (0, [2], InvalidInputError, "cannot divide"),
        (5, [], InvalidInputError, "needs two daughters"), (5, [2, 3], LineageError, "has the parent 1 already"),
    ):
        with pytest.raises(error, match=text):
            editor.divide(1, frame, daughters)
    check(editor)


def test_swap_split_and_merge_move_the_daughters_along():
    labels = movie(t1=(0, 6), t2=(2, 8), t3=(6, 9), t4=(8, 10), t5=(8, 10))
    editor = TrackEditor(labels, {3: 1, 4: 2, 5: 2})
    editor.swap(1, 2, 4)
    expected = labels.copy()
    expected[4:][labels[4:] == 1], expected[4:][labels[4:] == 2] = 2, 1
    np.testing.assert_array_equal(editor.labels, expected)
    assert editor.parents == {3: 2, 4: 1, 5: 1}
    editor.swap(2, 1, 4)
    np.testing.assert_array_equal(editor.labels, labels)
    assert editor.parents == {3: 1, 4: 2, 5: 2}

    assert editor.split(2, 5, linked=True).created == (6,)
    assert editor.parents == {3: 1, 4: 6, 5: 6, 6: 2}
    editor.merge([2, 6])
    np.testing.assert_array_equal(editor.labels, labels)
    assert editor.parents == {3: 1, 4: 2, 5: 2}
    editor.merge([3, 1])
    assert editor.tracks[3] == Track(3, 0, 8, 0)
    check(editor)
    for wrong, text in (
        (lambda: editor.merge([2, 3]), "share frames"),
        (lambda: editor.merge([4, 3], overlap=True), "Parent 2 must end before track 4"),
        (lambda: editor.swap(2, 4, 8), "would be left without frames"),
        (lambda: editor.link(3, 4), "has the parent 2 already"),
        (lambda: editor.link(2, 3), "must end before"),
        (lambda: editor.unlink(2), "has no parent"),
        (lambda: editor.split(4, 8), "cannot be split at frame 8"),
        (lambda: editor.replace(2, np.ones((8, 4)) > 0, 9, preserve="none"), "Parent 2 must end before"),
        (lambda: editor.merge([2, 77]), "There is no object 77"),
    ):
        before = check(editor)
        with pytest.raises(InvalidInputError, match=text):
            wrong()
        after = check(editor)
        np.testing.assert_array_equal(before[0], after[0])
        assert before[1] == after[1]


def test_a_joined_track_has_the_parent_and_daughters_of_all():
    editor = TrackEditor(movie(t1=(0, 2), t2=(2, 4), t3=(4, 6), t4=(6, 8)), {2: 1, 3: 2, 4: 3})
    editor.merge([3, 2])
    assert editor.tracks == {1: Track(1, 0, 1), 3: Track(3, 2, 5, 1), 4: Track(4, 6, 7, 3)}
    editor.undo()
    editor.unlink(3)
    editor.merge([3, 2])
    assert editor.parents == {3: 1, 4: 3}
    editor.split(3, 4)
    with pytest.raises(LineageError, match=r"different parents: \[1, 5\]"):
        editor.merge([3, 4])


def test_commit_brings_its_own_lineage():  # 04-W8, 04-W9, 04-W10
    editor = TrackEditor(movie(t1=(0, 4)))
    assert editor.commit(movie(t9=(0, 0)), parents={5: 9}).ids == {}
    candidate = movie(t0=(0, 0), t1=(0, 3))  # a mother, whose daughters are not there yet
    result = editor.commit(candidate, parents={2: 1, 3: 1})
    assert result.ids == {1: 2}
    assert editor.parents == {}
    family = movie(t0=(0, 0), t00=(0, 0), t1=(4, 6), t2=(6, 9), t3=(7, 9))
    assert editor.commit(family, parents={2: 1, 3: 1}).ids == {1: 3, 2: 4, 3: 5}
    assert editor.parents == {4: 3, 5: 3}
    before = check(editor)
    with pytest.raises(LineageError, match="must end before"):
        editor.commit(np.roll(family, 3, axis=1), preserve="pixels", parents={1: 2})
    np.testing.assert_array_equal(check(editor)[0], before[0])


def test_a_lineage_that_does_not_fit_is_refused():
    labels = movie(t1=(0, 4), t2=(3, 8), t3=(9, 10))
    for parents, text in (({2: 1}, "Parent 1 must end before track 2"), ({3: 7}, r"without pixels: \[7\]"),
                          ({3: 3}, "ancestors of themselves")):
        with pytest.raises(LineageError, match=text):
            TrackEditor(labels, parents)
    cycle = {1: 2, 2: 3, 3: 1}
    assert "ancestors of themselves" in lineage_problems({1: (0, 1), 2: (0, 1), 3: (0, 1)}, cycle)[-1]
    assert lineage_problems({1: (0, 1), 2: (2, 3)}, {2: 1}) == []
    with pytest.raises(InvalidInputError, match=r"\(T, Y, X\)"):
        TrackEditor(labels[0])
    editor = TrackEditor(np.zeros((3, 4, 4), dtype=np.uint8))
    assert editor.tracks == {}
    check(editor)
    one = TrackEditor(labels, {3: 1})
    unlinked = one.unlink(3)
    with pytest.raises(EditConflictError, match="has the parent 0"):
        one.apply(unlinked)


N_FRAMES, PLANE = 8, (60, 90)


def disc(center, radius=8):
    y, x = np.ogrid[:PLANE[0], :PLANE[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def path(speed=3):
    return [(30, 15 + speed * t) for t in range(N_FRAMES)]


@pytest.fixture(scope="module")
def embeddings(tiny_sam):
    image = np.random.default_rng(0).random((4, *PLANE)).astype(np.float32)
    return precompute_image_embeddings(SamPredictor(tiny_sam), image, ndim=3, batch_size=4, verbose=False)


@pytest.fixture
def no_embeddings():
    """What the fake model gets: only the number of frames and the shape count."""
    return {"features": np.zeros((N_FRAMES, 1, 1, 1, 1)), "input_size": PLANE, "original_size": PLANE}


@pytest.fixture
def prompts(monkeypatch):
    """A model that finds the disc of its frame if the prompt touches it; returns what it was asked, by frame."""
    asked, objects = {}, dict(enumerate(disc(c) for c in path()))

    def segment(predictor, mask, image_embeddings, i, **_):
        asked[i] = mask.copy()
        found = objects[i] if (mask & objects[i]).any() else np.zeros(PLANE, dtype=bool)
        return found[None], np.array([0.9]), None

    monkeypatch.setattr(module, "segment_from_mask", segment)
    return asked, objects


def follow(predictor, embeddings, masks, **options):
    return propagate_track(predictor, embeddings, masks, verbose=False, **options)


def centroid_x(mask):
    return np.argwhere(mask)[:, 1].mean()


def test_an_object_is_followed_with_its_motion(tiny_predictor, no_embeddings, prompts):
    asked, objects = prompts
    result = follow(tiny_predictor, no_embeddings, {0: objects[0]})
    assert (result.last, result.reason) == (N_FRAMES - 1, "end")
    assert sorted(result.scores) == list(range(1, N_FRAMES))
    editor = TrackEditor(np.zeros((N_FRAMES, *PLANE), dtype=np.uint8))
    editor.add(result.masks)
    np.testing.assert_array_equal(editor.labels, np.stack(list(objects.values())))
    np.testing.assert_array_equal(asked[1], objects[0])  # no motion is known yet
    for t in range(2, N_FRAMES):
        np.testing.assert_array_equal(asked[t], objects[t])

    objects.update((t, disc((30, 15 + t**2))) for t in range(N_FRAMES))  # accelerated: 1, 3, 5, ...
    for smoothing in (0.0, 0.5, 1.0):
        follow(tiny_predictor, no_embeddings, {0: objects[0]}, motion_smoothing=smoothing, iou_threshold=0)
        motion = 1.0
        for t in range(2, N_FRAMES):
            assert centroid_x(asked[t]) == pytest.approx((t - 1) ** 2 + 15 + round(motion))
            motion = smoothing * motion + (1 - smoothing) * (2 * t - 1)


@pytest.mark.parametrize(
    ("change", "options", "last", "reason"),
    [
        ({}, {"stop_frame": 5}, 4, "stop"),
        ({}, {"division_frames": [3]}, 3, "division"),
        ({}, {"division_frames": [0, 3]}, 0, "division"),  # 04-W7: also in the first frame
        ({4: disc((30, 27), 16)}, {}, 3, "area"),
        ({4: disc((30, 27), 4)}, {}, 3, "area"),
        ({4: disc((30, 27), 16)}, {"max_area_ratio": None}, 3, "iou"),
        ({4: disc((36, 35))}, {}, 3, "iou"),
        ({4: np.zeros(PLANE, dtype=bool)}, {}, 3, "lost"),
    ],
)
def test_where_an_object_ends(tiny_predictor, no_embeddings, prompts, change, options, last, reason):
    objects = prompts[1]
    objects.update(change)
    result = follow(tiny_predictor, no_embeddings, {0: objects[0]}, **options)
    assert (result.last, result.reason) == (last, reason)
    assert sorted(result.masks) == list(range(last + 1))


def test_given_masks_are_kept_and_gaps_are_filled(tiny_predictor, no_embeddings, prompts):
    asked, objects = prompts
    given_mask = disc((20, 70), 5)
    result = follow(tiny_predictor, no_embeddings, {1: objects[1], 5: given_mask})
    assert sorted(result.masks) == [1, 2, 3, 4, 5]  # no IoU stop before the last given mask
    assert 5 not in asked
    assert result.reason in ("iou", "area", "lost")
    assert result.masks[5].area == given_mask.sum()
    objects[3] = np.zeros(PLANE, dtype=bool)
    result = follow(tiny_predictor, no_embeddings, {1: objects[1], 4: objects[4]})
    assert 3 not in result.masks
    result = follow(tiny_predictor, no_embeddings, {N_FRAMES - 1: objects[0]})  # 04-W11: the last frame
    assert (list(result.masks), result.reason) == ([N_FRAMES - 1], "end")
    for masks, options, text in (
        ({}, {}, "at least one frame"), ({0: objects[3]}, {}, "and pixels"), ({8: objects[0]}, {}, "mask in frame 8"),
        ({0: objects[0], 5: objects[5]}, {"division_frames": [4]}, "mask in frame 5"),
        ({0: objects[0]}, {"projection": "line"}, "projection .line. is unknown"),
        ({0: objects[0]}, {"max_area_ratio": 0.5}, "at least 1"),
        ({0: objects[0][:5]}, {}, "must have the shape"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            follow(tiny_predictor, no_embeddings, masks, **options)


def test_cancel_and_the_real_model(tiny_predictor, embeddings):
    mask = disc((30, 40))
    steps = propagate_track_steps(tiny_predictor, embeddings, {0: mask})
    assert next(steps) == Step(0, 4, "Track object")
    steps.close()
    kept = mask.copy()
    result = follow(
        tiny_predictor, embeddings, {2: mask}, projection="single_point", iou_threshold=0, max_area_ratio=None
    )
    expected, scores, _ = segment_from_mask(
        tiny_predictor, mask, embeddings, 3, use_box=False, use_mask=False, use_single_point=True, return_all=True
    )
    assert (3 in result.masks) == expected.any()
    if expected.any():
        np.testing.assert_array_equal(np.argwhere(expected[0]).min(axis=0), result.masks[3].box[:2])
        assert result.masks[3].area == expected.sum()
        assert result.scores[3] == pytest.approx(float(scores[0]), abs=1e-6)
    np.testing.assert_array_equal(mask, kept)
