"""Several objects at once in a volume: each keeps what belongs to it when prompts come, move and go; no screen."""

import json

import numpy as np
import pytest
from annotation_scene import Scene, box, point, prompts

from micro_sam.annotation import tasks
from micro_sam.annotation.batches import split_objects
from micro_sam.annotation.geometry import AnnotationImage
from micro_sam.annotation.prompts import PromptRefusal
from micro_sam.annotation.session import CURRENT, AnnotationSession
from micro_sam.segmentation.workflow import LoadedModel

SHAPE = (8, 96, 128)
A, B, C = (40, 50), (60, 100), (20, 100)


@pytest.fixture
def scene(monkeypatch):
    scene = Scene(SHAPE, monkeypatch)
    for label, (center, planes) in enumerate([(A, range(1, 7)), (B, range(8)), (C, range(2, 5))], 1):
        scene.disc(planes, label, center, 12)
    return scene


@pytest.fixture
def session(scene, tiny_predictor):
    image = AnnotationImage.create(scene.labels, mode="3d")
    session = AnnotationSession(image, mode="3d")
    model = LoadedModel(tiny_predictor, None, "amg")
    session.run(tasks.open_model(session, "vit_t", load=lambda *_, **__: model, embeddings=scene.embeddings))
    return session


def shown(session, scene):
    """Which object of the scene each current object is, and in which planes."""
    found = {}
    for i in session.layer_editor(CURRENT).ids:
        where = session.labels[CURRENT] == i
        values, counts = np.unique(scene.labels[where], return_counts=True)
        found[i] = int(values[counts.argmax()]), session.layer_editor(CURRENT).planes(i)
    return found


def segment(session, plane, *parts):
    session.set_prompts(prompts(*parts))
    session.run(tasks.segment(session, plane, batched=True))


def test_an_object_has_the_same_id_in_a_plane_and_in_the_volume(session, scene):
    a, b, c = point(2, *A), point(5, *B), box(3, 8, 88, 33, 113)
    segment(session, 5, a, b, c)
    assert shown(session, scene) == {2: (2, [5])}
    segment(session, 2, a, b, c)
    segment(session, 3, a, b, c)
    assert shown(session, scene) == {1: (1, [2]), 2: (2, [5]), 3: (3, [3])}
    assert set(session.scores(CURRENT)) == {1, 2, 3}
    session.run(tasks.segment_volume(session, batched=True))
    everywhere = {1: (1, [*range(1, 7)]), 2: (2, [*range(8)]), 3: (3, [2, 3, 4])}
    assert shown(session, scene) == everywhere
    segment(session, 5, a, b, c)
    assert shown(session, scene) == everywhere, "what a plane does not ask for stays"
    assert set(session.confidence(3)) == {2, 3, 4}
    assert session.confidence()[0] == session.confidence(2)[0]
    assert json.loads(json.dumps(session._state, allow_nan=False)) == session._state
    assert len(session.commit().ids) == 3
    assert session.confidence() == {}


def test_ids_follow_their_prompts(session, scene):
    c = box(3, 8, 88, 33, 113)
    segment(session, 3, c)
    assert shown(session, scene) == {1: (3, [3])}
    before = session.labels[CURRENT].copy()
    segment(session, 5, point(5, *B), c)  # the number of the box becomes 2
    assert shown(session, scene) == {1: (2, [5]), 2: (3, [3])}
    assert set(session.confidence(2)) == {3}
    session.undo()
    np.testing.assert_array_equal(session.labels[CURRENT], before)
    session.redo()
    segment(session, 3, c)  # the point is gone, and its object with it
    assert shown(session, scene) == {1: (3, [3])}
    segment(session, 3, box(3, 9, 89, 33, 113))
    segment(session, 2, box(3, 9, 89, 33, 113), point(2, *A), point(2, *B))
    assert shown(session, scene) == {1: (1, [2]), 2: (2, [2]), 3: (3, [3])}
    assert set(session.scores(CURRENT)) == {1, 2, 3}


def test_a_moved_prompt_keeps_the_rest_of_its_object(session, scene):
    segment(session, 2, point(2, *A), point(5, *B))
    session.run(tasks.segment_volume(session, batched=True))
    segment(session, 2, point(2, A[0] + 2, A[1]), point(5, *B))
    assert shown(session, scene) == {1: (1, [*range(1, 7)]), 2: (2, [*range(8)])}
    segment(session, 4, point(4, *C), point(5, *B))
    assert shown(session, scene) == {1: (3, [4]), 2: (2, [*range(8)])}, "a prompt in another plane is another object"


def test_one_object_becomes_a_batch(session, scene):
    session.set_prompts(prompts(point(2, *A)))
    session.run(tasks.segment(session, 2))
    segment(session, 5, point(2, *A), point(5, *B))
    assert shown(session, scene) == {1: (1, [2]), 2: (2, [5])}
    session.set_prompts(prompts(point(2, *A), point(5, *B)))
    session.run(tasks.segment_volume(session))  # both prompts mean one object
    segment(session, 5, point(2, *A), point(5, *B))
    assert shown(session, scene) == {2: (2, [5])}


def test_negative_points_and_stops_of_a_batch(session, scene):
    parts = split_objects(prompts(point(2, *A), point(2, 3, 3, False), point(5, *B), point(6, 3, 3, False)))
    assert [p.planes() for p in parts.values()] == [[2, 6], [5, 6]]
    assert len(parts[1].points) == 3
    segment(session, 2, point(2, *A), point(2, *C), point(5, 3, 3, False))
    session.run(tasks.segment_volume(session, batched=True))
    assert shown(session, scene) == {1: (1, [1, 2, 3, 4]), 2: (3, [2, 3, 4])}
    with pytest.raises(PromptRefusal, match="no positive"):
        split_objects(prompts(point(5, 3, 3, False)))
    session.commit()
    session.start_correction(1)
    session.set_prompts(prompts(point(2, *A)))
    for make in (lambda: tasks.segment(session, 2, batched=True), lambda: tasks.segment_volume(session, batched=True)):
        with pytest.raises(PromptRefusal, match="being corrected"):
            make()
