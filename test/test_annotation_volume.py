"""Objects through volumes from prompts: what each prompt means, where objects end, and what the user is told."""

import numpy as np
import pytest
from annotation_scene import IOU, Scene, box, full, iou, point, prompts

from micro_sam.annotation.prompts import PromptRefusal, Prompts
from micro_sam.annotation.volume import STOP_TEXTS, VolumeSettings, propagate_steps
from micro_sam.core.errors import InvalidInputError
from micro_sam.core.progress import Step, drain
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.volume.propagate import STOP_REASONS

SHAPE = (12, 96, 128)


@pytest.fixture
def scene(monkeypatch):
    """Object 1 in planes 2 to 8, object 2 in all planes."""
    scene = Scene(SHAPE, monkeypatch)
    scene.disc(range(2, 9), 1, (40, 50), 16)
    scene.disc(range(12), 2, (60, 100), 14)
    return scene


@pytest.fixture
def run(scene, tiny_predictor):
    def run(what, shape=SHAPE, **options):
        settings = VolumeSettings(**{k: v for k, v in options.items() if k != "object_id"})
        rest = {k: v for k, v in options.items() if k == "object_id"}
        return drain(propagate_steps(tiny_predictor, scene.embeddings, shape, what, settings, **rest), verbose=False)
    return run


def planes(result, object_id=1):
    return list(result.masks[object_id])


@pytest.mark.parametrize("prompt", [
    point(4, 40, 50), point(4.4, 40, 50), point(3.6, 40, 50), box(4, 24, 34, 57, 67), box(4.3, 24, 34, 57, 67),
    box(4, 24, 34, 57, 67, kind="ellipse"), box(4, 24, 34, 57, 67, kind="polygon"), box(4, 38, 40, 42, 60, kind="path"),
])
def test_one_prompt_gives_the_whole_object(run, scene, prompt):
    result = run(prompts(prompt))
    assert planes(result) == list(range(2, 9))
    assert result.anchors[1] == (4,)
    assert result.stopped[1] == ("empty", "empty")
    for plane, mask in result.masks[1].items():
        assert iou(mask, scene.labels[plane] == 1) > 0.85
    assert set(result.confidence[1]) == set(range(2, 9))
    assert all(s.predicted_iou == pytest.approx(IOU) for s in result.confidence[1].values())
    assert all(0 < s.stability <= 1 for s in result.confidence[1].values())
    assert result.scores[1].predicted_iou == pytest.approx(IOU)
    assert result.notes == (
        "It is in planes 2 to 8; below, the model finds nothing there; above, the model finds nothing there.",
    )


def test_stops_end_the_object(run):
    result = run(prompts(point(5, 40, 50), point(3, 40, 50, False), point(7, 10, 10, False)))
    assert planes(result) == [4, 5, 6]
    assert result.stopped[1] == ("stop_slice", "stop_slice")
    assert "you have set a stop" in result.notes[-1]
    result = run(prompts(point(5, 40, 50), point(7.4, 40, 50, False)))
    assert planes(result) == [2, 3, 4, 5, 6]


def test_a_negative_point_beside_other_prompts_is_no_stop(run):
    parts = point(5, 40, 50), point(7, 40, 50, False), box(7, 24, 34, 57, 67)
    assert planes(run(prompts(*parts))) == list(range(2, 9))


def test_a_stop_between_prompts_is_ignored_and_said(run):
    result = run(prompts(point(3, 40, 50), point(5, 40, 50, False), point(7, 40, 50)))
    assert planes(result) == list(range(2, 9))
    assert "plane 5 is no stop" in result.notes[0]


def test_negative_points_correct_what_is_carried_into_their_plane(run, scene):
    result = run(prompts(point(5, 40, 50), point(7, 30, 44, False), point(7, 30, 56, False)))
    assert planes(result) == list(range(2, 9))
    assert not full(result.masks[1][7], SHAPE[1:])[30, 44]
    assert full(result.masks[1][6], SHAPE[1:])[30, 44]
    late = run(prompts(point(5, 40, 50), point(10, 30, 44, False), point(10, 30, 56, False)))
    assert "plane 10 have no effect" in late.notes[0]


def test_several_objects(run, scene):
    several = {7: prompts(point(4, 40, 50)), 3: prompts(point(4, 60, 100), point(8, 60, 100, False))}
    scene.asked.clear()
    result = run(several)
    assert (planes(result, 7), planes(result, 3)) == (list(range(2, 9)), list(range(8)))
    assert result.stopped == {7: ("empty", "empty"), 3: ("volume", "stop_slice")}
    assert scene.asked[0] == (4, 2)  # both in one call
    assert all(note.startswith(("Object 7: ", "Object 3: ")) for note in result.notes)
    alone = run(several[7], object_id=7)
    for plane, mask in alone.masks[7].items():
        assert np.array_equal(full(mask, SHAPE[1:]), full(result.masks[7][plane], SHAPE[1:]))


@pytest.mark.parametrize(("parts", "code"), [
    ((), "none"), ((point(4, 40, 50, False),), "stop"),
    ((point(4, 40, 50, False), point(4, 41, 50, False)), "only_negative"),
    ((box(4, 10, 10, 20, 20), box(4, 30, 30, 40, 40)), "several_shapes"), ((point(20, 40, 50),), "none"),
])
def test_what_does_not_say_where_the_object_is_is_refused(run, parts, code):
    with pytest.raises(PromptRefusal) as error:
        run(prompts(*parts))
    assert error.value.code == code
    with pytest.raises(PromptRefusal, match="^Object 2: ") as error:
        run({1: prompts(point(4, 40, 50)), 2: prompts(*parts)})
    assert error.value.code == code


def test_nothing_there(run):
    result = run(prompts(point(4, 5, 5)))
    assert (result.masks, result.confidence, result.scores) == ({1: {}}, {1: {}}, {})
    assert "nothing at the prompts in plane 4" in result.notes[0]
    # One empty prompt does not spoil the others.
    result = run(prompts(point(4, 40, 50), point(11, 5, 5)))
    assert planes(result) == list(range(2, 9))
    assert result.anchors[1] == (4,)
    with pytest.raises(PromptRefusal):
        run({})
    with pytest.raises(PromptRefusal):
        run(Prompts())


def test_settings_act(run, scene):
    scene.labels[scene.labels == 2] = 0
    scene.disc(range(6, 9), 1, (40, 56), 25)  # a leak
    assert planes(run(prompts(point(4, 40, 50)), iou_threshold=0.1)) == [2, 3, 4, 5]
    assert planes(run(prompts(point(4, 40, 50)), iou_threshold=0.1, max_area_change=None)) == list(range(2, 9))
    assert planes(run(prompts(point(4, 40, 50)), iou_threshold=0.9, max_area_change=None)) == [2, 3, 4, 5]
    result = run(prompts(point(4, 40, 50)), iou_threshold=0.1, max_area_change=None, max_drift=0.1)
    assert result.stopped[1] == ("empty", "drift")
    with pytest.raises(InvalidInputError, match="projection"):
        run(prompts(point(4, 40, 50)), projection="sphere")
    assert set(STOP_TEXTS) == set(STOP_REASONS)


def test_a_volume_of_one_plane(monkeypatch, tiny_predictor):
    scene = Scene((1, *SHAPE[1:]), monkeypatch)
    scene.disc([0], 1, (40, 50), 16)
    result = drain(propagate_steps(tiny_predictor, scene.embeddings, (1, *SHAPE[1:]), prompts(point(0, 40, 50))), False)
    assert planes(result) == [0]
    assert result.stopped[1] == ("volume", "volume")
    assert result.notes == ()


@pytest.mark.parametrize("tiles", [{}, {"tile_shape": (64, 64), "halo": (16, 16)}], ids=["plain", "tiled"])
def test_cancel_anywhere_and_run_again_with_a_model(tiny_predictor, cells_image, tiles):
    volume = np.stack([cells_image] * 4)
    embeddings = precompute_image_embeddings(tiny_predictor, volume, ndim=3, verbose=False, **tiles)
    what = prompts(box(1, 20, 20, 50, 60), point(3, 35, 40, False))
    settings = VolumeSettings("box", iou_threshold=0.0, max_area_change=None, max_drift=None)

    def start():
        return propagate_steps(tiny_predictor, embeddings, volume.shape, what, settings)

    n_steps = len(list(start()))
    assert n_steps > 4
    for n in range(1, n_steps):
        steps = start()
        assert all(isinstance(next(steps), Step) for _ in range(n))
        steps.close()
    first, second = drain(start(), verbose=False), drain(start(), verbose=False)
    assert set(first.masks[1]) <= {0, 1, 2}
    assert 1 in first.masks[1]
    for plane, mask in first.masks[1].items():
        assert np.array_equal(full(mask, volume.shape[1:]), full(second.masks[1][plane], volume.shape[1:]))
