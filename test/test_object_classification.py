"""Object features against the definition (both resized, regionprops), and the random forest and its file."""

import os
import zipfile

import h5py
import joblib
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import regionprops_table
from skimage.transform import resize
from sklearn.ensemble import RandomForestClassifier

from micro_sam.core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    OutputExistsError,
    UnsafeCheckpointError,
)
from micro_sam.core.lazy_array import LazyArray
from micro_sam.core.tiling import TileSpec
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.embeddings.features import FeatureArray, TiledFeatures
from micro_sam.object_classification import (
    compute_object_features,
    load_object_classifier,
    object_prediction_steps,
    project_prediction_to_segmentation,
    run_prediction_with_object_classifier,
    save_object_classifier,
    train_object_classifier,
)
from micro_sam.object_features import object_feature_steps

C = 6


def labels_2d(shape, seed=0):
    blobs = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 4)
    return ndimage.label(blobs > np.quantile(blobs, 0.65))[0].astype("uint32")


def embedding(seed, side=16):
    return np.random.default_rng(seed).normal(size=(1, C, side, side)).astype("float32")


def plain(features, shape):
    return {"features": features, "input_size": (1, 1), "original_size": shape}


def tiled(spec, n_planes=None, in_mask=None):
    shape = (1,) if n_planes is None else (n_planes, 1)
    arrays = {
        str(t): FeatureArray(np.random.default_rng(t).normal(size=(*shape, C, 16, 16)).astype("float32"))
        for t in range(len(spec)) if in_mask is None or t in in_mask
    }
    attrs = {"shape": spec.shape, "tile_shape": spec.tile_shape, "halo": spec.halo}
    if in_mask is not None:
        attrs["tiles_in_mask"] = in_mask
    return {"features": TiledFeatures(arrays, attrs, len(spec)), "input_size": None, "original_size": None}


def definition(embedding, labels, largest=(256, 256)):
    """Section 13 of the specification for one square: {id: (area, means)}."""
    side = max(labels.shape)
    padded = np.zeros((side, side), dtype=labels.dtype)
    padded[:labels.shape[0], :labels.shape[1]] = labels
    shape = tuple(min(n, side) for n in largest)
    image = embedding[0].transpose(1, 2, 0)
    image = resize(
        image.astype("float64"), (*shape, image.shape[-1]), order=1, mode="reflect", preserve_range=True,
        anti_aliasing=any(s < n for s, n in zip(shape, image.shape)),
    )
    small = resize(padded, shape, order=0, anti_aliasing=False, preserve_range=True).astype(int)
    table = regionprops_table(small, image, ("label", "area", "intensity_mean"))
    means = np.stack([table[f"intensity_mean-{c}"] for c in range(image.shape[-1])], axis=1)
    return {i: (a, m) for i, a, m in zip(table["label"], table["area"], means)}


def merged(parts, n_channels=C):
    """Sizes add up, means are weighted by them."""
    total = {}
    for part in parts:
        for i, (area, mean) in part.items():
            before = total.get(i, (0, np.zeros(n_channels)))
            total[i] = before[0] + area, before[1] + area * mean
    return {i: np.concatenate([[a], s / a]) for i, (a, s) in total.items()}


@pytest.mark.parametrize(("shape", "largest", "side"), [
    ((300, 420), (256, 256), 16), ((130, 90), (256, 256), 16), ((40, 30), (256, 256), 64), ((5, 9), (256, 256), 16),
    ((200, 210), (64, 32), 48), ((512, 512), (256, 256), 64),
])
def test_a_plane_equals_the_definition(shape, largest, side):
    labels, features = labels_2d(shape), embedding(1, side)
    before = labels.copy(), features.copy()
    ids, values = compute_object_features(plain(features, shape), labels, largest, verbose=False)
    expected = merged([definition(features, labels, largest)])
    assert ids.tolist() == sorted(expected)
    np.testing.assert_allclose(values, [expected[i] for i in ids.tolist()], rtol=1e-4, atol=1e-5)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(labels, before[0])
    np.testing.assert_array_equal(features, before[1])
    again = compute_object_features(plain(torch.from_numpy(features), shape), labels, largest, verbose=False)
    np.testing.assert_array_equal(again[1], values)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "uint64"])
def test_any_integer_dtype_and_large_ids(dtype):
    labels = np.zeros((20, 30), dtype=dtype)
    labels[2:9, 3:20] = np.iinfo(dtype).max // 2 if dtype != "bool" else True
    ids, values = compute_object_features(plain(embedding(0), (20, 30)), labels, verbose=False)
    assert ids.tolist() == [int(labels.max())]
    assert values[0, 0] == 7 * 17


def test_no_objects():
    ids, values = compute_object_features(plain(embedding(0), (20, 30)), np.zeros((20, 30), int), verbose=False)
    assert ids.shape == (0,)
    assert values.shape == (0, C + 1)


def test_vanished_objects_are_absent_in_2d_and_zero_in_stacks():  # 04-W41
    labels = np.zeros((600, 600), dtype="uint16")
    labels[50:90, 60:80], labels[302, 302] = 7, 3
    assert definition(embedding(0), labels).keys() == {7}
    ids, values = compute_object_features(plain(embedding(0), labels.shape), labels, verbose=False)
    assert ids.tolist() == [7]
    stack = np.stack([embedding(0)])
    ids, values = compute_object_features(plain(stack, labels.shape), labels[None], verbose=False)
    assert ids.tolist() == [3, 7]
    assert values.dtype == np.float32
    assert not values[0].any()
    assert values[1].any()


def test_stack_adds_up_planes_and_is_read_plane_by_plane():
    shape, reads = (4, 70, 280), []
    labels = np.stack([np.roll(labels_2d(shape[1:]), 3 * z, axis=1) for z in range(4)])
    labels[2] = 0
    features = np.stack([embedding(z) for z in range(4)])

    class Recorder:
        shape, dtype = features.shape, features.dtype

        def __getitem__(self, index):
            reads.append(index)
            return features[index]

    lazy = LazyArray(lambda key: labels[key], shape, labels.dtype, "labels")
    ids, values = compute_object_features(plain(FeatureArray(Recorder()), shape[1:]), lazy, verbose=False)
    expected = merged([definition(features[z], labels[z]) for z in (0, 1, 3)])
    assert reads == [0, 1, 3]
    assert ids.tolist() == sorted(expected)
    np.testing.assert_allclose(values, [expected[i] for i in ids.tolist()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_planes", [None, 2])
@pytest.mark.parametrize(("tile_shape", "halo"), [((60, 70), (9, 13)), ((300, 200), (20, 30)), ((64, 64), (0, 0))])
def test_tiles_equal_the_definition_without_halo(n_planes, tile_shape, halo):
    spec = TileSpec.create((320, 410), tile_shape, halo)
    embeddings = tiled(spec, n_planes)
    planes = [labels_2d(spec.shape, z) for z in range(n_planes or 1)]
    parts = []
    for z, labels in enumerate(planes):
        for tile in spec:
            inner = np.zeros(tile.outer_shape, dtype=labels.dtype)
            inner[tile.inner_local] = labels[tile.inner]
            features = embeddings["features"][str(tile.id)]
            features = features[z] if n_planes else features[...]
            cell = (max(inner.shape) / min(max(inner.shape), 256)) ** 2  # pixels per pixel of the grid
            parts.append({i: (a * cell, m) for i, (a, m) in definition(features, inner).items()})
    expected = merged(parts)
    ids, values = compute_object_features(embeddings, np.stack(planes) if n_planes else planes[0], verbose=False)
    kept = np.isin(ids, list(expected))
    assert not values[~kept].any()
    np.testing.assert_allclose(values[kept], [expected[i] for i in ids[kept].tolist()], rtol=1e-4, atol=1e-4)
    assert values.dtype == np.float32


def test_area_with_tiles_is_in_pixels_of_the_image_and_halos_do_not_count():  # 02 section 13, "Weak"
    labels = labels_2d((200, 310))
    for tile_shape, halo in (((64, 64), (20, 20)), ((128, 100), (0, 0)), ((50, 230), (8, 4))):
        embeddings = tiled(TileSpec.create(labels.shape, tile_shape, halo))
        ids, values = compute_object_features(embeddings, labels, verbose=False)
        np.testing.assert_array_equal(values[:, 0], np.bincount(labels.ravel())[ids])
    one = tiled(TileSpec.create(labels.shape, labels.shape, (0, 0)))
    scale = 310**2 / 256**2
    values = compute_object_features(one, labels, verbose=False)[1]
    expected = compute_object_features(plain(one["features"]["0"], labels.shape), labels, verbose=False)[1]
    np.testing.assert_allclose(values[:, 1:][values[:, 0] > 0], expected[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values[:, 0][values[:, 0] > 0], expected[:, 0] * scale, rtol=1e-6)


def test_tiles_that_a_mask_left_out_add_nothing():
    labels = labels_2d((100, 100))
    spec = TileSpec.create(labels.shape, (50, 50), (5, 5))
    ids, values = compute_object_features(tiled(spec, in_mask=[0, 3]), labels, verbose=False)
    kept = labels.copy()
    kept[:50, 50:] = kept[50:, :50] = 0
    np.testing.assert_array_equal(ids, np.unique(labels)[1:])
    np.testing.assert_array_equal(values[:, 0], np.bincount(kept.ravel(), minlength=ids[-1] + 1)[ids])


def test_wrong_inputs_and_cancelling():
    embeddings = plain(embedding(0), (20, 30))
    labels = np.ones((20, 30), dtype=int)
    with pytest.raises(InvalidInputError, match="(30, 20)"):
        compute_object_features(embeddings, labels.T, verbose=False)
    with pytest.raises(InvalidInputError, match="shape"):
        compute_object_features(embeddings, labels[None], verbose=False)
    with pytest.raises(InvalidInputError, match="ids"):
        compute_object_features(embeddings, -labels, verbose=False)
    with pytest.raises(InvalidTypeError):
        compute_object_features(embeddings, labels.astype(float), verbose=False)
    with pytest.raises(InvalidInputError, match="resize_embedding_shape"):
        compute_object_features(embeddings, labels, (256, 0), verbose=False)
    steps = object_feature_steps(embeddings, labels)
    assert [next(steps).done, next(steps).total] == [0, 1]
    steps.close()
    assert next(steps, None) is None


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64"])
def test_projection(dtype):
    segmentation = np.array([[0, 3, 3], [9, 120, 5]], dtype=dtype)
    ids, classes = np.array([9, 3, 120, 50]), np.array([2, 300, 1, 4])
    for stack in (segmentation, np.stack([segmentation, segmentation[::-1]])):
        before = stack.copy()
        out = project_prediction_to_segmentation(stack, classes, ids)
        expected = np.select([stack == i for i in ids], classes, 0)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(stack, before)
    assert project_prediction_to_segmentation(segmentation, classes % 7, ids).dtype == dtype
    assert not project_prediction_to_segmentation(segmentation, [], []).any()
    sparse = segmentation.astype("uint64") * 2**40
    np.testing.assert_array_equal(project_prediction_to_segmentation(sparse, classes, ids * 2**40), expected[0])


def test_projection_refuses_what_does_not_fit():
    segmentation = np.ones((2, 2), dtype=int)
    for classes, ids in (([1, 2], [1]), ([1, 2], [1, 1]), ([-1], [1])):
        with pytest.raises(InvalidInputError):
            project_prediction_to_segmentation(segmentation, classes, ids)
    with pytest.raises(InvalidTypeError):
        project_prediction_to_segmentation(segmentation, [0.5], [1])
    with pytest.raises(InvalidTypeError):
        project_prediction_to_segmentation(segmentation * 1.0, [1], [1])


@pytest.fixture(scope="module")
def training():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(150, 9))
    labels = 2 + (features[:, 0] > 0).astype(int) + 3 * (features[:, 1] > 0.5)
    labels[::4] = 0
    return features, labels


@pytest.fixture(scope="module")
def forest(training):
    return train_object_classifier(*training, n_estimators=20, n_jobs=1)


def test_training_leaves_out_what_is_not_annotated_and_repeats(training, forest):
    features, labels = training
    assert forest.classes_.tolist() == [2, 3, 5, 6]
    other = train_object_classifier(features[labels > 0], labels[labels > 0], n_estimators=20, n_jobs=1)
    np.testing.assert_array_equal(forest.predict_proba(features), other.predict_proba(features))
    assert (forest.predict(features) == labels)[labels > 0].mean() > 0.95
    for f, la in ((features, labels * 0), (features[1:], labels), (features * np.nan, labels), (features, -labels),
                  (features, labels.astype(float))):
        with pytest.raises(InvalidInputError):
            train_object_classifier(f, la)


def test_the_file_gives_the_same_predictions(training, forest, tmp_path):
    path = save_object_classifier(forest, tmp_path / "rf.v1", class_names={2: "live", 3: "dead"})
    assert path.name == "rf.v1.npz"
    loaded = load_object_classifier(path)
    np.testing.assert_allclose(loaded.predict_proba(training[0]), forest.predict_proba(training[0]), atol=1e-12)
    np.testing.assert_array_equal(loaded.predict(training[0]), forest.predict(training[0]))
    assert loaded.class_names == {2: "live", 3: "dead"}
    assert loaded.predict(np.zeros((0, 9))).shape == (0,)
    with pytest.raises(OutputExistsError):
        save_object_classifier(loaded, path)
    again = load_object_classifier(save_object_classifier(loaded, path, overwrite=True))
    np.testing.assert_array_equal(again.predict_proba(training[0]), loaded.predict_proba(training[0]))
    assert again.class_names == loaded.class_names
    assert os.listdir(tmp_path) == ["rf.v1.npz"]
    with pytest.raises(InvalidInputError, match=r"\(N, 9\)"):
        loaded.predict(np.zeros((3, 8)))
    with pytest.raises(InvalidInputError, match="NaN"):
        loaded.predict(np.full((3, 9), np.nan))
    with pytest.raises(InvalidTypeError):
        save_object_classifier(RandomForestClassifier(), tmp_path / "untrained.npz")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_joblib_files_run_only_when_trusted(training, forest, tmp_path):
    joblib.dump(Hostile(tmp_path / "taken"), tmp_path / "evil.joblib")
    with pytest.raises(UnsafeCheckpointError, match="trusted=True"):
        load_object_classifier(tmp_path / "evil.joblib")
    assert not (tmp_path / "taken").exists()
    joblib.dump(forest, tmp_path / "rf.joblib")
    with pytest.raises(UnsafeCheckpointError):
        load_object_classifier(tmp_path / "rf.joblib")
    loaded = load_object_classifier(tmp_path / "rf.joblib", trusted=True)
    np.testing.assert_array_equal(loaded.predict(training[0]), forest.predict(training[0]))
    joblib.dump([1], tmp_path / "list.joblib")
    (tmp_path / "text.joblib").write_text("no pickle")
    for name in ("list.joblib", "text.joblib"):
        with pytest.raises(CheckpointError):
            load_object_classifier(tmp_path / name, trusted=True)
    with pytest.raises(MissingFileError):
        load_object_classifier(tmp_path / "nothing.npz")


def test_damaged_and_hostile_array_files_are_refused(forest, tmp_path):
    path = save_object_classifier(forest, tmp_path / "rf.npz")
    with np.load(path) as file:
        arrays = dict(file)
    inner = np.flatnonzero(arrays["left"] >= 0)
    loop, beyond, feature = arrays["left"].copy(), arrays["right"].copy(), arrays["feature"].copy()
    loop[inner[0]], beyond[inner[0]], feature[inner[0]] = 0, len(beyond), 9
    bad = tmp_path / "bad.npz"
    for change in ({"left": loop}, {"right": beyond}, {"feature": feature}, {"roots": arrays["roots"][:0]},
                   {"threshold": arrays["threshold"][1:]}, {"header": np.array("{}")},
                   {"left": np.array([Hostile(tmp_path / "taken")], dtype=object)}):
        np.savez(bad, **arrays | change)
        with pytest.raises(CheckpointError, match=r"bad\.npz"):
            load_object_classifier(bad, trusted=True)
    assert not (tmp_path / "taken").exists()
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("a", "b")
    with pytest.raises(CheckpointError):
        load_object_classifier(bad)


@pytest.fixture
def trained(tiny_predictor, cells_image, cells_labels, tmp_path):
    """Images, segmentations, features and the path of a forest that was trained on them."""
    embeddings = precompute_image_embeddings(tiny_predictor, cells_image, verbose=False)
    ids, features = compute_object_features(embeddings, cells_labels, verbose=False)
    classes = 1 + (features[:, 0] > np.median(features[:, 0]))
    forest = train_object_classifier(features, classes, n_estimators=10, n_jobs=1)
    return ids, forest.predict(features), save_object_classifier(forest, tmp_path / "rf.npz")


def test_run_on_arrays_and_paths_with_keys(tiny_predictor, cells_image, cells_labels, trained, tmp_path):
    ids, classes, forest = trained
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["raw/a"], file["other"], file["labels/a"] = cells_image, cells_image[:50], cells_labels
    expected = project_prediction_to_segmentation(cells_labels, classes, ids)
    assert len(np.unique(expected)) == 3
    for image, segmentation, keys in (
        (cells_image, cells_labels, ()), (tmp_path / "data.h5", str(tmp_path / "data.h5"), ("raw/a", "labels/a")),
    ):
        out = run_prediction_with_object_classifier(
            [image] * 2, [segmentation] * 2, tiny_predictor, forest, *keys, verbose=False
        )
        assert len(out) == 2
        np.testing.assert_array_equal(out[1], expected)
    out = run_prediction_with_object_classifier(
        [cells_image], [cells_labels], tiny_predictor, forest, project_prediction=False, verbose=False
    )
    np.testing.assert_array_equal(out[0], classes)
    empty = run_prediction_with_object_classifier(
        [cells_image], [cells_labels * 0], tiny_predictor, forest, verbose=False
    )
    assert not empty[0].any()
    assert run_prediction_with_object_classifier([], [], tiny_predictor, forest, verbose=False) == []


def test_run_on_stacks_and_tiles_in_batches(tiny_predictor, cells_image, cells_labels, trained):
    _, _, path = trained
    forest = load_object_classifier(path)
    image, labels = (np.stack([a, a[::-1], a]) for a in (cells_image, cells_labels))
    for options in ({}, {"tile_shape": (128, 90), "halo": (0, 8)}):
        embeddings = precompute_image_embeddings(tiny_predictor, image, ndim=3, verbose=False, **options)
        ids, features = compute_object_features(embeddings, labels, verbose=False)
        expected = project_prediction_to_segmentation(labels, forest.predict(features), ids)
        totals, updates = [], []
        out = run_prediction_with_object_classifier(
            [image], [labels], tiny_predictor, path, ndim=3, batch_size=2, verbose=False,
            pbar_init=lambda total, _, totals=totals: totals.append(total), pbar_update=updates.append, **options,
        )
        np.testing.assert_array_equal(out[0], expected)
        assert (totals, updates) == ([3], [2, 1])


def test_run_checks_all_before_it_computes(tiny_predictor, cells_image, cells_labels, trained, tmp_path):
    path = trained[2]

    def first_step(images, segmentations, rf_path=path, *args, **kwargs):
        steps = object_prediction_steps(images, segmentations, tiny_predictor, rf_path, *args, **kwargs)
        try:
            return next(steps)
        finally:
            steps.close()

    assert first_step([cells_image], [cells_labels]).total == 1
    with pytest.raises(InvalidInputError, match="2 images"):
        first_step([cells_image] * 2, [cells_labels])
    with pytest.raises(InvalidInputError, match="shape"):
        first_step([cells_image] * 2, [cells_labels, cells_labels[1:]])
    with pytest.raises(InvalidInputError, match="key"):
        first_step([cells_image], [cells_labels], path, "raw")
    with pytest.raises(InvalidInputError, match="axes"):
        first_step([cells_image], [cells_labels], ndim=3)
    with pytest.raises(MissingFileError):
        first_step([tmp_path / "no.tif"], [cells_labels])
    with pytest.raises(InvalidInputError, match="batch_size"):
        first_step([cells_image], [cells_labels], batch_size=0)
