"""What to look at first, the model's opinion of objects that it was not prompted for, and tables."""

import json
import math

import numpy as np
import pytest
from embedding_helpers import example, one_thread, small_predictor  # noqa: F401

from micro_sam.annotation.review import Score, mean_score, measure_steps, rank, score_labels_steps
from micro_sam.core.errors import InvalidInputError
from micro_sam.core.progress import drain
from micro_sam.embeddings.encode import precompute_image_embeddings, set_precomputed
from micro_sam.inference import batched_inference

TILES = {"tile_shape": (32, 32), "halo": (8, 8)}


def run(steps):
    return drain(steps, verbose=False)


def test_order_of_a_review():
    scores = {1: Score(0.9, 0.7), 2: (0.5, None), 3: None, 4: Score(0.95, math.nan), 5: [0.7, 0.9], 6: Score(None)}
    assert rank(scores, [7, 6, 5, 4, 3, 2, 1]) == [2, 1, 5, 4, 3, 6, 7]
    assert rank({}, [3, 1]) == [1, 3]
    assert rank(scores, []) == []
    assert (Score(1.2, -0.1).confidence, Score(1.2).confidence, Score(math.nan).confidence) == (0.0, 1.0, None)
    assert Score(*json.loads(json.dumps(Score(0.5)))) == Score(0.5, None)


def test_mean_over_planes():
    assert mean_score([Score(0.8, 0.6), Score(0.6, None)]) == (pytest.approx(0.7), 0.6)
    assert mean_score([Score(0.8), Score(0.6, math.nan)]) == (pytest.approx(0.7), None)
    assert mean_score([]) is None
    assert mean_score([Score(None)]) is None


@pytest.fixture(scope="module")
def predictor():
    return small_predictor()


@pytest.fixture(scope="module")
def stack():
    return example((2, 48, 64))


def labels_of(masks, ids, dtype):
    """Labels in which each mask is an object of its own."""
    labels = np.zeros(masks[0].shape, dtype=dtype)
    for mask, label in zip(masks, ids):
        labels[mask] = label
    return labels


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64"])
def test_objects_that_the_model_would_find_score_high(predictor, stack, dtype):
    embeddings = precompute_image_embeddings(predictor, stack, ndim=3, verbose=False)
    labels = np.zeros((48, 64), dtype=dtype)
    labels[5:20, 8:30], labels[25:40, 30:60] = 200, 3
    found = run(score_labels_steps(predictor, embeddings, labels, 1))
    assert list(found) == [3, 200]

    set_precomputed(predictor, embeddings, i=1)
    boxes = np.array([[30, 25, 60, 40], [8, 5, 30, 20]])
    records = batched_inference(predictor, None, 2, boxes=boxes, return_instance_segmentation=False)
    for record, object_id in zip(records, [3, 200]):
        mask, truth = record["segmentation"].numpy(), labels == object_id
        assert found[object_id].predicted_iou == pytest.approx(float(record["predicted_iou"]), abs=1e-5)
        assert found[object_id].stability == pytest.approx((mask & truth).sum() / (mask | truth).sum())
    assert list(run(score_labels_steps(predictor, embeddings, labels, 1, ids=[200, 17]))) == [200]
    assert run(score_labels_steps(predictor, embeddings, labels, 1, ids=[200]))[200] == pytest.approx(found[200])


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_many_objects_nothing_and_what_is_set_stays(predictor, stack, tiles):
    embeddings = precompute_image_embeddings(predictor, stack[0], ndim=2, verbose=False, **tiles)
    labels = np.kron(np.arange(1, 49).reshape(6, 8), np.ones((8, 8), dtype=int))
    predictor.reset_image()
    scores = run(score_labels_steps(predictor, embeddings, labels))
    assert list(scores) == list(range(1, 49))
    assert all(0 <= s.stability <= 1 for s in scores.values())
    assert not predictor.is_image_set
    assert run(score_labels_steps(predictor, embeddings, np.zeros((48, 64), dtype="uint16"))) == {}
    with pytest.raises(InvalidInputError, match=r"\(48, 64\).*\(48, 63\)"):
        run(score_labels_steps(predictor, embeddings, labels[:, :63]))


def test_a_task_in_between_changes_nothing(predictor, stack):
    embeddings = precompute_image_embeddings(predictor, stack, ndim=3, verbose=False)
    labels = np.kron(np.arange(1, 49).reshape(6, 8), np.ones((8, 8), dtype=int))
    alone = run(score_labels_steps(predictor, embeddings, labels, 0))

    def disturbed():
        steps = score_labels_steps(predictor, embeddings, labels, 0)
        while True:
            try:
                yield next(steps)
            except StopIteration as stop:
                return stop.value
            set_precomputed(predictor, embeddings, i=1)

    assert run(disturbed()) == alone


def test_table_of_objects():
    labels = np.zeros((4, 6, 8), dtype=np.uint16)
    labels[1:3, 1:3, 1:4], labels[0, 5, 5:7] = 9, 2
    image = np.arange(labels.size).reshape(labels.shape)
    scores = {9: Score(0.8, 0.6), 2: (0.4, None)}
    table = run(measure_steps(labels, image, scale=(2, 0.5, 0.5), unit="um", scores=scores))
    assert table.index.tolist() == [2, 9]
    assert table.loc[9, "volume"] == pytest.approx(12 * 0.5)
    assert table.loc[9, "centroid_z"] == pytest.approx(3.0)
    assert table.loc[2, "intensity_mean"] == image[0, 5, 5:7].mean()
    assert table.loc[[9, 2], "confidence"].tolist() == [0.6, 0.4]
    assert math.isnan(table.loc[2, "stability"])
    assert table["unit"].unique() == ["um"]


def test_tables_of_tracks_images_and_nothing():
    labels = np.zeros((3, 6, 8), dtype=np.uint8)
    labels[0, 1:3, 1:3], labels[1, 1:3, 1:3], labels[2, 0, 0], labels[2, 5, 5] = 1, 1, 2, 3
    table = run(measure_steps(labels, lineages=[{1: [2, 3]}], scores={1: Score(0.5, 0.5)}))
    assert table.index.tolist() == [(1, 0), (1, 1), (2, 2), (3, 2)]
    assert table.loc[(3, 2), "parent"] == 1
    assert table["confidence"].tolist()[:2] == [0.5, 0.5]
    assert table["confidence"].isna().tolist() == [False, False, True, True]
    assert run(measure_steps(labels[0])).index.tolist() == [1]
    empty = run(measure_steps(labels * 0, scores={}))
    assert len(empty) == 0
    assert "confidence" in empty
