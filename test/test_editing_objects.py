"""Corrections of label images: random edits against a plain copy, single edits against brute force, and prompts."""

import json
import random

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from segment_anything import SamPredictor

from micro_sam.core.errors import InvalidInputError, InvalidTypeError, PromptTileError
from micro_sam.core.progress import Step
from micro_sam.editing.history import Delta, EditConflictError, index_steps
from micro_sam.editing.objects import ObjectEditor, refine_mask
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.prompt_based_segmentation import segment_from_mask

SHAPES = [(9, 8), (3, 6, 7)]
EDITS = [
    "replace", "add", "remove", "merge", "fill", "components", "line", "seeds", "commit",
]
NAMES = st.lists(st.sampled_from(EDITS), min_size=1, max_size=10)
PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow], database=None
)


class Counting:
    """An array in chunks that counts the pixels that are read: at once, in all, and written."""

    def __init__(self, array, chunks):
        self.array, self.chunks, self.largest, self.total, self.written = array, chunks, 0, 0, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key):
        block = self.array[key]
        self.largest, self.total = max(self.largest, block.size), self.total + block.size
        return block.copy()

    def __setitem__(self, key, values):
        self.written += np.size(values)
        self.array[key] = values


@st.composite
def start_labels(draw):
    """A label image of rectangles that overlap each other."""
    shape = draw(st.sampled_from(SHAPES))
    labels = np.zeros(shape, dtype=draw(st.sampled_from([np.uint8, np.uint16, np.int32, np.uint64])))
    for i in draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)):
        corners = [sorted((draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1)))) for n in shape]
        labels[tuple(slice(a, b + 1) for a, b in corners)] = i
    return labels


def random_mask(pick, shape):
    a, b = (sorted((pick.randrange(n), pick.randrange(n))) for n in shape)
    mask = np.zeros(shape, dtype=bool)
    mask[a[0]:a[1] + 1, b[0]:b[1] + 1] = True
    mask[pick.randrange(shape[0])] ^= pick.random() < 0.5
    return mask


def random_edit(name, pick, editor):
    """Do an edit with random arguments; return its delta, or None if it was refused."""
    shape = editor.labels.shape
    plane = None if len(shape) == 2 else pick.randrange(shape[0])
    some = pick.choice([None, plane])
    mask, preserve = random_mask(pick, shape[-2:]), pick.choice(["pixels", "none"])
    ids = editor.ids
    i, j = (pick.choice(ids or [1]) for _ in range(2))
    pixels = np.argwhere(np.asarray(editor.labels[...]) == i)
    seeds = pixels[[pick.randrange(len(pixels)) for _ in range(2)]] if ids else [[0, 0]]
    line = [[pick.randrange(-1, n + 1) for n in shape[-2:]] for _ in range(2)]
    candidate = mask.astype(np.uint16) * 3 + random_mask(pick, shape[-2:])
    edits = {
        "replace": lambda: editor.replace(i, mask, plane, preserve=preserve),
        "add": lambda: editor.add(mask, plane, preserve=preserve),
        "remove": lambda: editor.remove(i, some),
        "merge": lambda: editor.merge([i, j]),
        "fill": lambda: editor.fill_holes(i, some),
        "components": lambda: editor.split_components(i, some),
        "line": lambda: editor.split_line(i, line, some),
        "seeds": lambda: editor.split_seeds(i, seeds),
        "commit": lambda: editor.commit(candidate, plane, preserve=pick.choice(["objects", "pixels", "none"])).delta,
    }
    try:
        return edits[name]()
    except InvalidInputError:
        return None


@PROPERTY
@given(NAMES, st.integers(0, 2**32 - 1), start_labels(), st.booleans())
def test_random_edits_keep_labels_and_ids_consistent_and_undo_exactly(names, seed, labels, chunked):
    start = labels.copy()
    stored = Counting(labels.astype(np.uint32), (2, 4, 3)[-labels.ndim:])
    editor = ObjectEditor(stored, in_place=True) if chunked else ObjectEditor(labels)
    pick = random.Random(seed)
    states, deltas, seen = [start.astype(np.uint32)], [], set(np.unique(start).tolist())
    for name in names:
        delta = random_edit(name, pick, editor)
        now = np.array(editor.labels[...])
        editor.check()
        if delta is None or delta.is_empty:
            np.testing.assert_array_equal(now, states[-1])
            continue
        before, after = (set(np.unique(s).tolist()) - {0} for s in (states[-1], now))
        assert set(delta.created) == after - before
        assert set(delta.removed) == before - after
        assert not set(delta.created) & seen
        changed = {i for i in before & after if not np.array_equal(states[-1] == i, now == i)}
        assert set(delta.changed) == changed
        where = np.argwhere(states[-1] != now)
        box = np.stack([where.min(axis=0), where.max(axis=0) + 1], axis=1).tolist()
        assert [list(b) for b in delta.box][-now.ndim:] == box
        seen |= after
        states.append(now)
        deltas.append(delta)

    for state in states[-2::-1]:
        assert editor.undo() is not None
        np.testing.assert_array_equal(editor.labels[...], state)
    assert editor.undo() is None
    editor.check()
    for state in states[1:]:
        assert editor.redo() is not None
        np.testing.assert_array_equal(editor.labels[...], state)
    assert editor.redo() is None
    np.testing.assert_array_equal(labels, start)

    other = ObjectEditor(start)  # the journal repeats it all, without the editor that wrote it
    for delta in deltas:
        other.apply(Delta.from_json(json.loads(json.dumps(delta.to_json()))))
    np.testing.assert_array_equal(other.labels, states[-1])
    assert other.ids == editor.ids
    fresh = np.zeros(start.shape[-2:], dtype=bool)
    fresh[0, 0] = True
    created = other.add(fresh, None if start.ndim == 2 else 0, preserve="none").created
    assert not set(created) & seen


def squares():
    labels = np.zeros((12, 20), dtype=np.uint8)
    labels[1:9, 2:10], labels[4:11, 12:18] = 3, 7
    return labels


def test_replace_in_place_with_both_preserve_modes():
    labels, mask = squares(), np.zeros((12, 20), dtype=bool)
    mask[2:6, 8:14] = True
    kept, taken = labels.copy(), labels.copy()
    kept[labels == 3] = 0
    kept[mask & (kept == 0)] = 3
    taken[labels == 3] = 0
    taken[mask] = 3
    for preserve, expected in (("pixels", kept), ("none", taken)):
        editor = ObjectEditor(labels)
        delta = editor.replace(3, mask, preserve=preserve)
        np.testing.assert_array_equal(editor.labels, expected)
        assert (delta.created, delta.removed) == ((), ())
    assert editor.labels.dtype == np.uint32
    with pytest.raises(InvalidInputError, match="belong to other objects"):
        editor.replace(7, editor.labels == 3)
    with pytest.raises(InvalidInputError, match="is empty"):
        editor.replace(3, np.zeros((12, 20), dtype=bool))
    np.testing.assert_array_equal(editor.labels, taken)


def test_masks_of_several_planes_and_forms():
    labels = np.zeros((4, 6, 6), dtype=np.uint16)
    labels[:, :2, :2] = 1
    mask = np.zeros((2, 6, 6), dtype=bool)
    mask[:, 3:5, 3:6] = True
    expected = labels.copy()
    expected[1:3] = 0
    expected[1:3][mask] = 1
    editor = ObjectEditor(labels)
    editor.replace(1, mask, 1)
    np.testing.assert_array_equal(editor.labels, expected)
    editor.undo()
    editor.replace(1, {1: mask[0], 2: mask[1]})
    np.testing.assert_array_equal(editor.labels, expected)
    crop, origin = editor.crop(1)
    grown = np.zeros_like(expected, dtype=bool)
    grown[tuple(slice(o, o + n) for o, n in zip(origin, crop.shape))] = crop
    np.testing.assert_array_equal(grown, expected == 1)
    assert editor.planes(1) == [0, 1, 2, 3]
    assert editor.area(1) == (expected == 1).sum()
    with pytest.raises(InvalidInputError, match="do not fit into the 4 planes"):
        editor.replace(1, mask, 3)
    with pytest.raises(InvalidInputError, match="plane must be an integer from 0 to 3"):
        editor.replace(1, mask[0])


@pytest.mark.parametrize("covered", [0, 50, 74, 75, 99, 100])
@pytest.mark.parametrize("preserve", ["objects", "pixels", "none"])
def test_commit_gives_way_by_the_covered_fraction(covered, preserve):  # 04-W1
    labels = np.zeros((30, 30), dtype=np.uint16)
    labels[5:15, 5:15] = 4  # 100 pixels
    candidate = np.zeros_like(labels)
    candidate[20:29, 20:29] = 9
    window = np.zeros(100, dtype=bool)
    window[:covered] = True
    candidate[5:15, 5:15][window.reshape(10, 10)] = 2
    candidate[0:4, 5:15] = 2
    before = candidate.copy()
    editor = ObjectEditor(labels)
    result = editor.commit(candidate, preserve=preserve)
    expected, rejected = labels.astype(np.uint32), preserve == "objects" and covered >= 75
    new = candidate.astype(np.uint32)
    if rejected:
        new[new == 2] = 0
    if preserve == "pixels":
        new[labels > 0] = 0
    for i, value in enumerate(sorted(set(np.unique(new).tolist()) - {0})):
        expected[new == value] = 5 + i
    np.testing.assert_array_equal(editor.labels, expected)
    assert result.rejected == ((2,) if rejected else ())
    assert result.shrunk == ((4,) if covered and preserve != "pixels" and not rejected else ())
    assert result.ids == ({9: 5} if rejected else {2: 5, 9: 6})
    np.testing.assert_array_equal(candidate, before)
    editor.undo()
    np.testing.assert_array_equal(editor.labels, labels)


def test_commit_takes_everything_wherever_it_is():  # 04-W2, empty input
    editor = ObjectEditor(np.zeros((3, 5, 5), dtype=np.uint8))
    plane = np.eye(5, dtype=np.int64) * 400
    assert editor.commit(plane, 2).ids == {400: 1}
    volume = np.zeros((3, 5, 5), dtype=np.uint8)
    volume[[0, 2]] = 8
    assert editor.commit(volume, preserve="pixels").ids == {8: 2}
    np.testing.assert_array_equal(editor.labels[2], np.where(np.eye(5), 1, 2))
    assert editor.labels[1].max() == 0
    result = editor.commit(np.zeros((5, 5), dtype=bool), 0)
    assert result.delta.is_empty
    assert result.ids == {}
    editor.undo()
    assert editor.ids == [1]  # the edit that changed nothing is not one to undo
    with pytest.raises(InvalidInputError, match="Planes have the shape"):
        editor.commit(np.zeros((4, 5), dtype=bool), 0)


def test_ids_are_never_used_again():  # 04-W35, users row 5
    editor = ObjectEditor(squares())
    one = np.zeros((12, 20), dtype=bool)
    one[0, 0] = True
    assert editor.add(one).created == (8,)
    editor.undo()
    assert editor.add(one).created == (9,)
    editor.remove(9)
    assert editor.reserve_ids(2) == [10, 11]
    assert editor.add(one).created == (12,)
    assert editor.add(~one, object_id=11).created == (11,)
    for wrong in (11, 9, 50):
        with pytest.raises(InvalidInputError, match="cannot be given"):
            editor.add(one, object_id=wrong)


def test_splits():
    labels = np.zeros((3, 10, 14), dtype=np.uint16)
    labels[:, 1:9, 1:13] = 2
    labels[:, 9, 13] = 2  # touches the rest only at a corner
    editor = ObjectEditor(labels)
    with pytest.raises(InvalidInputError, match="in one piece"):
        editor.split_components(2)
    with pytest.raises(InvalidInputError, match="does not split"):
        editor.split_line(2, [[0, 5], [5, 5]])
    assert editor.split_line(2, [[-2, 4], [20, 9]]).created == (3,)
    sides = editor.labels.copy()
    assert set(np.unique(sides)) == {0, 2, 3}
    np.testing.assert_array_equal(sides > 0, labels > 0)
    assert (sides[:, 1:9, 1] == 3).all()  # the smaller part gets the new id
    assert (sides[:, 9, 13] == 2).all()
    for i in (2, 3):
        assert ndimage.label(sides == i, np.ones((3, 3, 3)))[1] == 1
    editor.undo()
    assert editor.split_line(2, [[5, 0], [5, 13]], plane=1).created == (4,)
    np.testing.assert_array_equal(editor.labels[[0, 2]], labels[[0, 2]])
    editor.undo()

    editor.remove(2, 1)
    assert editor.split_components(2).created == (5,)
    assert [editor.planes(i) for i in (2, 5)] == [[0], [2]]
    editor.undo(), editor.undo()
    np.testing.assert_array_equal(editor.labels, labels)


def test_a_line_leaves_parts_that_it_does_not_touch():
    labels = np.zeros((10, 20), dtype=np.uint16)
    labels[1:9, 1:13], labels[1:9, 14:20] = 2, 2
    editor = ObjectEditor(labels)
    editor.split_line(2, [[-1, 10], [10, 10]])  # the smaller half lies next to the untouched part
    assert set(np.unique(editor.labels[1:9, 1:9])) == {2}
    assert set(np.unique(editor.labels[1:9, 11:13])) == {3}
    assert set(np.unique(editor.labels[1:9, 14:20])) == {2}


def test_split_by_seeds_follows_the_neck():
    y, x = np.ogrid[:20, :44]
    left, right = ((y - 10) ** 2 + (x - c) ** 2 <= 81 for c in (12, 29))
    labels = (left | right).astype(np.int32) * 6
    editor = ObjectEditor(labels)
    assert editor.split_seeds(6, [[10, 28], [9.4, 13.2]]).created == (7,)
    np.testing.assert_array_equal(editor.labels > 0, labels > 0)
    nearer = np.broadcast_to(np.abs(x - 29) < np.abs(x - 12), labels.shape)[labels > 0]
    assert ((editor.labels[labels > 0] == 6) == nearer).mean() > 0.97  # the first seed keeps the id
    for seeds, text in (([[10, 28], [0, 0]], r"\[\[0.0, 0.0\]\]"), ([[10, 28], [10.2, 28]], "the same pixel"),
                        ([[10, 28]], "two or more")):
        with pytest.raises(InvalidInputError, match=text):
            editor.split_seeds(6, seeds)


def test_fill_holes_leaves_other_objects():
    labels = squares()
    labels[3:6, 4:8] = 0
    labels[4, 5] = 9
    editor = ObjectEditor(labels)
    assert editor.fill_holes(3).changed == (3,)
    expected = np.where(ndimage.binary_fill_holes(labels == 3) & (labels == 0), 3, labels)
    np.testing.assert_array_equal(editor.labels, expected)
    assert editor.object_at((3.4, 4.6)) == 3
    assert editor.object_at((4, 5)) == 9
    with pytest.raises(InvalidInputError, match="outside of the labels"):
        editor.object_at((12, 0))


def test_volumes_are_read_in_blocks_and_changes_are_sparse():  # users rows 4 and 6
    volume = np.zeros((24, 64, 2100), dtype=np.uint32)
    volume[2:22, 5:30, 100:130] = 1
    volume[3:20, 5:30, 500:540] = 2
    start = volume.copy()
    lazy = Counting(volume, (4, 32, 32))
    steps = index_steps(lazy)
    shown = []
    while True:
        try:
            shown.append(next(steps))
        except StopIteration as stop:
            index = stop.value
            break
    assert shown[0] == Step(0, 18, "Find objects")
    assert shown[-1].done == 18
    assert lazy.largest <= 4 * 1024 * 1024
    assert lazy.total == volume.size
    editor = ObjectEditor(lazy, in_place=True, index=index)
    assert editor.labels is lazy
    for edit in (
        lambda: editor.remove(1), lambda: editor.merge([2, 1]), lambda: editor.split_line(2, [[0, 520], [40, 520]]),
    ):
        lazy.total = lazy.largest = lazy.written = 0
        delta = edit()
        assert delta.runs.nbytes < 4000
        assert len(json.dumps(delta.to_json())) < 6000
        assert lazy.largest <= 4 * 25 * 440
        assert lazy.written <= 24 * 25 * 440
        editor.undo()
        np.testing.assert_array_equal(volume, start)
    steps = index_steps(lazy)
    next(steps)
    steps.close()  # cancel


def test_zarr_is_edited_in_place():
    labels = np.stack([squares()] * 5)
    stored = zarr.create_array({}, shape=labels.shape, chunks=(2, 8, 8), dtype="uint16")
    stored[...] = labels
    editor, other = ObjectEditor(stored, in_place=True), ObjectEditor(labels)
    for e in (editor, other):
        e.replace(3, np.roll(squares() == 3, 5, axis=1), 2, preserve="none")
        e.split_line(7, [[0, 15], [20, 15]])
        e.merge([8, 3])
        e.check()
    np.testing.assert_array_equal(stored[...], other.labels)
    while editor.undo() is not None:
        pass
    np.testing.assert_array_equal(stored[...], labels)


def test_dtypes_and_shapes():
    for dtype in (bool, np.uint8, np.int64, np.uint64):
        labels = squares().astype(dtype)
        before = labels.copy()
        editor = ObjectEditor(labels)
        editor.remove(editor.ids[0])
        np.testing.assert_array_equal(labels, before)
        assert editor.labels.dtype == np.uint32
    large = np.array([[2**40, 0]], dtype=np.int64)
    editor = ObjectEditor(large)
    assert editor.labels.dtype == np.uint64
    assert editor.add(np.array([[False, True]])).created == (2**40 + 1,)
    assert editor.labels.tolist() == [[2**40, 2**40 + 1]]
    full = np.full((2, 3), 255, dtype=np.uint8)  # 04-W18
    editor = ObjectEditor(full, in_place=True)
    with pytest.raises(InvalidInputError, match="does not fit into labels of dtype uint8"):
        editor.add(np.ones((2, 3), dtype=bool), preserve="none")
    assert (full == 255).all()
    for labels, error in (
        (np.zeros((2, 2)), InvalidTypeError), (np.array([[-1, 2]]), InvalidInputError),
        (np.zeros(3, dtype=int), InvalidInputError), (np.zeros((0, 4), dtype=int), InvalidInputError),
        (zarr.create_array({}, shape=(4, 4), dtype="uint8"), InvalidInputError),
    ):
        with pytest.raises(error):
            ObjectEditor(labels)


def test_conflicts_are_found_and_change_nothing():
    labels = squares().astype(np.uint32)
    editor = ObjectEditor(labels, in_place=True, max_undo=1)
    first, second = editor.remove(3), editor.remove(7)
    labels[5, 13] = 1
    state = labels.copy()
    with pytest.raises(EditConflictError, match=r"1 pixels .*\(5, 13\)"):
        editor.undo()
    with pytest.raises(EditConflictError, match=r"\[1\]"):
        editor.check()
    np.testing.assert_array_equal(labels, state)
    labels[5, 13] = 0
    assert editor.undo().created == (7,)
    assert editor.undo() is None  # max_undo
    assert editor.ids == [7]
    with pytest.raises(EditConflictError):
        editor.apply(first)
    editor.apply(second)
    assert editor.ids == []
    with pytest.raises(InvalidInputError, match="other shape|labels of shape"):
        ObjectEditor(np.zeros((3, 3), dtype=int)).apply(first)
    good = first.to_json()
    for damage in ({"format": 2}, {"runs": ["AAAA"]}, {"runs": 3}, {"shape": [1, 2, 3]}, {"links": [[1]]}):
        with pytest.raises(InvalidInputError, match="change of a label image"):
            Delta.from_json({**good, **damage})


SHAPE = (60, 180)


@pytest.fixture(scope="module")
def embeddings(tiny_sam):
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((2, *SHAPE)), (0, 3, 3)).astype(np.float32)
    predictor, tiling = SamPredictor(tiny_sam), {"tile_shape": (60, 90), "halo": (12, 16)}
    return {
        "plain": precompute_image_embeddings(predictor, image[0], verbose=False),
        "tiled": precompute_image_embeddings(predictor, image[0], verbose=False, **tiling),
        "stack": precompute_image_embeddings(predictor, image, ndim=3, verbose=False),
        "stack_tiled": precompute_image_embeddings(predictor, image, ndim=3, verbose=False, **tiling),
    }


def disc(center, radius=14):
    y, x = np.ogrid[:SHAPE[0], :SHAPE[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def test_correction_starts_from_the_object(tiny_predictor, embeddings):  # users row 12
    mask, points, labels = disc((40, 60)), np.array([[40, 85.0], [30, 50]]), np.array([1, 0])
    grown = [26, 46, 55, 86]  # the box of the mask, with the positive point
    expected = segment_from_mask(
        tiny_predictor, mask, embeddings["plain"], box=grown, points=points, labels=labels, return_all=True
    )
    found, score = refine_mask(tiny_predictor, mask, embeddings["plain"], points=points, labels=labels)
    np.testing.assert_array_equal(found, expected[0][0])
    assert score == pytest.approx(float(expected[1][0]), abs=1e-6)
    scribbled, _ = refine_mask(
        tiny_predictor, mask, embeddings["plain"], scribbles=[points[:1]], scribble_labels=[1], points=points[1:],
        labels=labels[1:],
    )
    np.testing.assert_array_equal(
        scribbled, segment_from_mask(
            tiny_predictor, mask, embeddings["plain"], box=grown, points=points[::-1], labels=labels[::-1]
        )[0]
    )
    box = [20, 40, 58, 100]
    boxed, _ = refine_mask(tiny_predictor, mask, embeddings["plain"], box=box)
    np.testing.assert_array_equal(boxed, segment_from_mask(tiny_predictor, mask, embeddings["plain"], box=box)[0])

    image = mask.astype(np.uint8) * 5
    image[disc((40, 100))] = 6
    editor = ObjectEditor(image)
    delta = editor.correct(5, tiny_predictor, embeddings["plain"], points=points, labels=labels)
    np.testing.assert_array_equal(editor.labels == 5, found & (image != 6))
    np.testing.assert_array_equal(editor.labels == 6, image == 6)
    assert delta.changed == (5,)
    editor.undo()
    volume = ObjectEditor(np.stack([np.zeros_like(image), image]))
    volume.correct(5, tiny_predictor, embeddings["stack"], 1, points=points, labels=labels)
    expected, _ = refine_mask(tiny_predictor, mask, embeddings["stack"], 1, points=points, labels=labels)
    np.testing.assert_array_equal(volume.labels[1] == 5, expected & (image != 6))
    assert not volume.labels[0].any()
    with pytest.raises(InvalidInputError, match="nothing to start from"):
        refine_mask(tiny_predictor, np.zeros(SHAPE, dtype=bool), embeddings["plain"], points=[[1, 1]], labels=[0])


def test_correction_with_tiles_keeps_what_the_tile_does_not_see(tiny_predictor, embeddings):
    mask = disc((40, 85), 30)  # in two tiles, and wider than the halo
    for kind, i in (("tiled", None), ("stack_tiled", 1)):
        found, _ = refine_mask(
            tiny_predictor, mask, embeddings[kind], i, points=[[40, 110], [45, 108]], labels=[1, 0]
        )
        tile = np.zeros(SHAPE, dtype=bool)
        tile[:, 74:] = True  # the second tile with its halo, where the points are
        np.testing.assert_array_equal(found[~tile], mask[~tile])
        assert (found[tile] != mask[tile]).any()
    with pytest.raises(PromptTileError, match="No tile sees all 2 points"):
        refine_mask(tiny_predictor, mask, embeddings["tiled"], points=[[5, 5], [50, 170]], labels=[1, 1])


def test_a_correction_without_result_leaves_the_object(tiny_predictor, embeddings, monkeypatch):
    editor = ObjectEditor(disc((40, 60)).astype(np.uint8))
    monkeypatch.setattr(
        "micro_sam.editing.refine.segment_from_mask",
        lambda *_, **__: (np.zeros((1, *SHAPE), dtype=bool), np.zeros(1), None),
    )
    with pytest.raises(InvalidInputError, match="finds nothing"):
        editor.correct(1, tiny_predictor, embeddings["plain"])
    np.testing.assert_array_equal(editor.labels, disc((40, 60)))
    assert editor.undo() is None
