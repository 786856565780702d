"""The session of the object classifier and its series: joined by object, seeded, resumable; no screen needed."""

import joblib
import numpy as np
import pytest
import tifffile

from micro_sam.annotation.classifier import ClassifierSession, NoAnnotationsError, UntrainedError
from micro_sam.annotation.classifier_objects import accumulate_labels
from micro_sam.annotation.classifier_series import ClassifierSeries
from micro_sam.core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    NotInitializedError,
    OutputExistsError,
    UnsafeCheckpointError,
)
from micro_sam.core.progress import drain
from micro_sam.object_classification import load_object_classifier, run_prediction_with_object_classifier
from micro_sam.segmentation.workflow import LoadedModel

C = 6


def grid(shape=(64, 96), size=12, offset=0):
    """A label image with a grid of squares; ids from 1 in reading order."""
    labels, n = np.zeros(shape, "uint16"), 0
    for y in range(2, shape[0] - size, size + 4):
        for x in range(2 + offset, shape[1] - size, size + 4):
            n += 1
            labels[y:y + size, x:x + size] = n
    return labels


def embeddings_of(labels, seed=0):
    """Embeddings in which the objects in the right half of the image differ from the others."""
    features = np.random.default_rng(seed).normal(size=(1, C, 24, 24)).astype("float32") / 10
    side = max(labels.shape)
    features[..., int(round(24 * labels.shape[1] / side)) // 2:] += 1
    return {"features": features, "input_size": (1, 1), "original_size": labels.shape}


def paint(session, classes):
    """Put one stroke on each of some objects."""
    for object_id, value in classes.items():
        y, x = (int(a.mean()) for a in np.nonzero(session.segmentation == object_id))
        session.annotations[y, x - 1:x + 1] = value


@pytest.fixture
def labels():
    return grid()


@pytest.fixture
def session(labels):
    session = ClassifierSession()
    session.set_image(np.zeros(labels.shape, "uint8"), labels)
    session.set_embeddings(embeddings_of(labels), "a")
    return session


def is_right(labels):
    """Whether each object (ascending id) lies in the right half."""
    return np.array([np.nonzero(labels == i)[1].mean() > labels.shape[1] / 2 for i in np.unique(labels[labels > 0])])


def test_objects_get_the_class_of_most_of_their_painted_pixels():
    segmentation = np.zeros((4, 8), "uint8")
    segmentation[:2, :4], segmentation[2:, :4], segmentation[:, 5:] = 200, 3, 7
    annotations = np.zeros(segmentation.shape, "uint32")
    annotations[0, :3], annotations[1, :1] = 2, 9  # most pixels
    annotations[2, :2], annotations[3, :2] = 5, 4  # equally many: the smaller class
    annotations[:, 4] = 1  # background
    assert accumulate_labels(segmentation, annotations) == {3: 4, 200: 2}
    assert accumulate_labels(segmentation, annotations * 0) == {}
    with pytest.raises(InvalidInputError, match="shape"):
        accumulate_labels(segmentation, annotations[:2])


def test_a_stack_is_read_only_where_it_is_painted():
    labels, reads = np.stack([grid()] * 5), []

    class Lazy:
        shape, dtype = labels.shape, labels.dtype

        def __getitem__(self, z):
            reads.append(z)
            return labels[z]

    annotations = np.zeros(labels.shape, "uint8")
    annotations[[1, 3], 8, 8] = 2, 1
    assert accumulate_labels(Lazy(), annotations) == accumulate_labels(labels, annotations) == {1: 1}
    assert reads == [1, 3]


def test_all_objects_are_classified_from_a_few_strokes(session, labels):
    before = labels.copy()
    paint(session, {1: 1, 7: 1, 6: 2, 12: 2})
    prediction = session.train_task().run(verbose=False)
    assert prediction.ids.tolist() == np.unique(labels)[1:].tolist()
    np.testing.assert_array_equal(prediction.classes, 1 + is_right(labels))
    np.testing.assert_array_equal(prediction.image, np.array([0, *prediction.classes])[labels])
    assert prediction.labelled == {1: 1, 6: 2, 7: 1, 12: 2}
    assert prediction.warnings == ()
    assert prediction.confidence.min() > 0.5
    np.testing.assert_array_equal(labels, before)
    assert [(c.name, c.n_labelled, c.n_predicted) for c in session.classes()] == [
        ("class 1", 2, prediction.count(1)), ("class 2", 2, prediction.count(2))]


def test_the_same_strokes_give_the_same_forest(session):  # 04-W41
    session.set_embeddings(embeddings_of(session.segmentation, seed=3))
    paint(session, {1: 1, 3: 2, 9: 1, 12: 2})
    runs = [session.train_task().run(verbose=False) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].confidence, runs[1].confidence)


def test_vanished_objects_are_named_and_do_not_break_anything():  # 04-W41
    labels = np.zeros((600, 600), "uint16")
    labels[50:90, 20:80], labels[50:90, 500:560], labels[302, 302] = 7, 9, 3
    session = ClassifierSession()
    session.set_image(np.zeros(labels.shape, "uint8"), labels)
    session.set_embeddings(embeddings_of(labels))
    paint(session, {7: 1, 9: 2, 3: 2})
    prediction = session.train_task().run(verbose=False)
    assert (prediction.ids.tolist(), prediction.missing.tolist()) == ([7, 9], [3])
    assert prediction.image[302, 302] == 0
    assert len(prediction.warnings) == 2
    session.annotations[labels != 3] = 0
    with pytest.raises(NoAnnotationsError, match="too small"):
        session.train_task().run(verbose=False)


def test_a_changed_segmentation_is_noticed_and_known_ones_are_quick(session, labels, monkeypatch):  # 04-W41
    from micro_sam.annotation import classifier_objects

    counted, table_steps = [], classifier_objects.object_feature_steps
    monkeypatch.setattr(classifier_objects, "object_feature_steps", lambda *a: counted.append(1) or table_steps(*a))
    paint(session, {1: 1, 6: 2})
    session.train_task().run(verbose=False)
    session.train_task().run(verbose=False)
    assert len(counted) == 1
    other = np.where(labels == 2, 0, labels * 3)
    session.set_segmentation(other)
    assert session.prediction is None
    prediction = session.train_task().run(verbose=False)
    assert prediction.ids.tolist() == np.unique(other)[1:].tolist()
    assert prediction.labelled == {3: 1, 18: 2}
    assert len(counted) == 2
    other[other == 18] = 0  # painted away in place
    assert 18 not in session.train_task().run(verbose=False).ids
    session.set_segmentation(labels)
    session.train_task().run(verbose=False)
    assert len(counted) == 3, "the first segmentation was known"
    session.set_embeddings(embeddings_of(labels, seed=4), "b")
    session.train_task().run(verbose=False)
    assert len(counted) == 4, "other embeddings"
    with pytest.raises(InvalidInputError, match="shape"):
        session.set_segmentation(labels[:10])
    with pytest.raises(InvalidTypeError):
        session.set_segmentation(labels.astype(float))


def test_a_task_works_on_what_was_there_when_it_was_made(session, labels):
    paint(session, {1: 1, 6: 2})
    task = session.train_task()
    steps = task.steps()
    next(steps)
    session.annotations[:] = 0
    labels[:] = 0
    prediction = task.apply(drain(steps, verbose=False))
    assert prediction.ids.tolist() == list(range(1, 25))
    assert prediction.image.any()
    assert prediction.labelled == {1: 1, 6: 2}


def test_refusals_say_what_to_do(session, labels, tmp_path):
    with pytest.raises(NoAnnotationsError, match="Paint on some objects"):
        session.train_task()
    session.annotations[0, :] = 1
    with pytest.raises(NoAnnotationsError, match="touch no object"):
        session.train_task()
    with pytest.raises(UntrainedError, match="Train and predict"):
        session.export(tmp_path / "a.npz")
    with pytest.raises(UntrainedError):
        session.predict_task()
    with pytest.raises(NotInitializedError, match="Choose an image"):
        ClassifierSession().train_task()
    session.set_image(np.zeros(labels.shape), labels)
    with pytest.raises(NotInitializedError, match="Compute Embeddings"):
        session.train_task()
    with pytest.raises(InvalidInputError, match="shape"):
        session.set_image(np.zeros((9, 9)), labels)
    session.set_embeddings(embeddings_of(labels))
    session.set_segmentation(labels * 0)
    session.annotations[:] = 1
    with pytest.raises(NoAnnotationsError):
        session.train_task()


def test_one_class_is_possible_but_warned_about(session):
    paint(session, {1: 3})
    prediction = session.train_task().run(verbose=False)
    assert set(prediction.classes) == {3}
    assert "second class" in prediction.warnings[0]
    assert [c.id for c in session.classes()] == [1, 2, 3]


def test_erasing_a_class_is_no_error(session):  # 04-W41
    paint(session, {1: 1, 6: 2, 7: 3})
    session.train_task().run(verbose=False)
    session.annotations[session.annotations == 3] = 0
    assert set(session.train_task().run(verbose=False).classes) == {1, 2}
    assert {c.id: c.n_labelled for c in session.classes()} == {1: 1, 2: 1, 3: 0}


def test_names_travel_with_the_classifier(session, labels, tmp_path):
    assert session.add_class("debris") == 3
    session.rename_class(1, " round ")
    with pytest.raises(InvalidInputError, match="already"):
        session.rename_class(2, "round")
    paint(session, {1: 1, 6: 3})
    session.train_task().run(verbose=False)
    path = session.export(tmp_path / "mine")
    assert load_object_classifier(path).class_names == {1: "round", 3: "debris"}
    with pytest.raises(OutputExistsError):
        session.export(path)
    session.rename_class(3, "")
    session.export(path, overwrite=True)

    other = ClassifierSession()
    other.set_image(np.zeros(labels.shape), labels)
    other.load(path)
    other.set_embeddings(embeddings_of(labels))
    prediction = other.predict_task().run(verbose=False)
    np.testing.assert_array_equal(prediction.classes, session.prediction.classes)
    assert [c.name for c in other.classes()] == ["round", "class 2", "class 3"]
    joblib.dump(session.forest, tmp_path / "rf.joblib")
    with pytest.raises(UnsafeCheckpointError):
        other.load(tmp_path / "rf.joblib")
    other.load(tmp_path / "rf.joblib", trusted=True)
    joblib.dump(_NoForest(), tmp_path / "other.joblib")
    with pytest.raises(CheckpointError, match="random forest"):
        other.load(tmp_path / "other.joblib", trusted=True)


class _NoForest:
    def predict(self, features):
        return features


def test_with_a_real_model(cells_image, cells_labels, tiny_predictor, tmp_path):
    session = ClassifierSession()
    session.set_image(cells_image, cells_labels)
    loaded = []

    def load(*given):
        loaded.append(given)
        return LoadedModel(tiny_predictor, None, "amg")

    session.embed_task("vit_t", save_path=tmp_path / "e.zarr", load=load).run(verbose=False)
    key = session._embedding_key
    first, last = (int(i) for i in np.unique(cells_labels)[[1, -1]])
    session.annotations[cells_labels == first], session.annotations[cells_labels == last] = 1, 2
    prediction = session.train_task().run(verbose=False)
    by_id = dict(zip(prediction.ids.tolist(), prediction.classes.tolist()))
    assert (by_id[first], by_id[last]) == (1, 2)
    session.export(tmp_path / "rf.npz")
    (found,) = run_prediction_with_object_classifier(
        [cells_image], [cells_labels], tiny_predictor, tmp_path / "rf.npz", verbose=False
    )
    np.testing.assert_array_equal(found, prediction.image)
    session.embed_task("vit_t", tile_shape=(64, 64), halo=(16, 16), load=load).run(verbose=False)
    assert loaded == [("vit_t", None, None)], "the model is loaded once"
    assert session._embedding_key != key
    assert len(session.train_task().run(verbose=False).ids) == len(np.unique(cells_labels)) - 1


def test_models_are_not_mixed(session, labels):
    paint(session, {1: 1, 6: 2})
    session.set_embeddings(embeddings_of(labels), model="m1")
    session.train_task().run(verbose=False)
    session.set_image(np.zeros(labels.shape), labels, "second")
    session.set_embeddings(embeddings_of(labels), model="m2")
    with pytest.raises(InvalidInputError, match="another model"):
        session.train_task()
    session.set_embeddings(embeddings_of(labels), model="m1")
    assert session.train_task().run(verbose=False).labelled == {}, "what was learned in the first image is enough"


@pytest.fixture
def series(tmp_path):
    """Three images, the second with channels, and a function that starts a series with them."""
    segmentations = [grid(), grid((64, 80), 10), grid(offset=3)]
    images = [np.zeros(s.shape + (3,) * (n == 1), "uint8") for n, s in enumerate(segmentations)]

    def start(order=(0, 1, 2), folder=tmp_path / "out"):
        picked = [[items[i] for i in order] for items in (images, segmentations)]
        embeddings = [embeddings_of(s, n) for n, s in enumerate(picked[1])]
        series = ClassifierSeries(ClassifierSession(), *picked, folder, embeddings)
        series.open()
        return series
    return start


def test_a_series_accumulates_and_writes(series, tmp_path):
    run, folder = series(), tmp_path / "out"
    session = run.session
    paint(session, {1: 1, 6: 2})
    session.rename_class(2, "right")
    run.finish_task().run(verbose=False)
    assert not run.is_last
    run.open(1)
    assert session.image.has_channels
    paint(session, {1: 1, 5: 2, 6: 1})
    first = run.finish_task().run(verbose=False)
    assert first.labelled == {1: 1, 5: 2, 6: 1}
    assert [c.n_earlier for c in session.classes()] == [1, 1]
    run.open(2)
    assert run.is_last
    third = run.finish_task().run(verbose=False)  # no stroke: the classifier of the others
    np.testing.assert_array_equal(third.classes, 1 + is_right(grid(offset=3)))

    features, labels = np.load(folder / "features.npy"), np.load(folder / "labels.npy")
    assert features.shape == (5, C + 1)
    assert labels.tolist() == [1, 2, 1, 2, 1]
    np.testing.assert_array_equal(tifffile.imread(folder / "prediction_2.tif"), third.image)
    assert joblib.load(folder / "rf.joblib").predict(features).tolist() == labels.tolist()
    assert load_object_classifier(folder / "rf.npz").class_names == {1: "class 1", 2: "right"}
    assert {p.name for p in folder.iterdir()} == {
        "features.npy", "labels.npy", "rf.joblib", "rf.npz", "series.json",
        *(f"{kind}_{i}.tif" for kind in ("prediction", "annotations") for i in range(3)),
    }


def test_a_series_goes_on_and_goes_back(series, tmp_path):
    run = series()
    paint(run.session, {1: 1, 6: 2})
    run.finish_task().run(verbose=False)

    again = series()
    assert again.index == 1
    assert again.session.class_name(2) == "class 2"
    again.open(0)
    assert again.session.has_strokes, "the strokes of a finished image are shown again"
    again.session.annotations[:] = 0
    paint(again.session, {1: 2, 6: 1, 2: 2})
    again.finish_task().run(verbose=False)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [2, 2, 1], "its objects are replaced, not doubled"
    again.open(0)
    again.session.annotations[:] = 0
    again.finish_task().run(verbose=False)
    assert again.session.examples == {}

    with pytest.raises(OutputExistsError, match="another series"):
        series((1, 0, 2))
    (tmp_path / "out" / "series.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="another series"):
        series()


def test_going_on_without_training_is_fine(series, tmp_path):  # 04-W41
    run = series()
    assert run.finish_task().run(verbose=False) is None
    assert run.finished == {0}
    assert not (tmp_path / "out" / "rf.npz").exists()
    assert series().index == 1
    with pytest.raises(InvalidInputError, match="3 images"):
        run.open(3)


def test_files_give_names_and_stems_must_differ(tmp_path):
    paths = []
    for name in ("a/x", "b/x", "a/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / f"{name}.tif", grid())
        paths.append(tmp_path / f"{name}.tif")
    with pytest.raises(InvalidInputError, match="Two images"):
        ClassifierSeries(ClassifierSession(), paths[:2], paths[:2], tmp_path / "out")
    run = ClassifierSeries(ClassifierSession(), paths[1:], paths[1:], tmp_path / "out")
    assert [item.prediction_path.name for item in run.images] == ["x_prediction.tif", "y_prediction.tif"]
    run.open()
    assert isinstance(run.session.segmentation, np.ndarray)
    for images, segmentations in (([], []), (paths, paths[:1])):
        with pytest.raises(InvalidInputError):
            ClassifierSeries(ClassifierSession(), images, segmentations, tmp_path)
