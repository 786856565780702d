"""Classes of segmented objects: features from image embeddings, a random forest, and its file.

A forest is stored as plain arrays. Loading it runs no code from the file, and it does not depend on the version of
scikit-learn. Forests that were stored with joblib are pickles, which can run any code: they are read only on request.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    OutputExistsError,
    UnsafeCheckpointError,
    require_positive_int,
)
from .core.image import LazyImage, open_image
from .core.output import temporary_path
from .core.progress import Step, Steps, drain
from .embeddings.encode import embedding_steps
from .object_features import FeatureSums, compute_object_features, project_prediction_to_segmentation

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

__all__ = [
    "ForestClassifier", "compute_object_features", "load_object_classifier", "object_prediction_steps",
    "project_prediction_to_segmentation", "run_prediction_with_object_classifier", "save_object_classifier",
    "train_object_classifier",
]

_FORMAT = "micro_sam object classifier 1"
_ARRAYS = ("roots", "left", "right", "feature", "threshold", "probabilities", "classes_")
_ROWS_PER_BLOCK = 4096

Image = str | os.PathLike | np.ndarray


def train_object_classifier(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    n_estimators: int = 200,
    max_depth: int | None = 10,
    seed: int = 0,
    n_jobs: int | None = -1,
) -> "RandomForestClassifier":
    """Train a random forest to tell classes of objects from their features.

    Args:
        features: Features (N, F), for example of `compute_object_features`; of several images one after the other.
        labels: Class (N,) of each object, integers from 1; objects with 0 have not been annotated and are left out.
        n_estimators: Number of trees.
        max_depth: Largest depth of the trees; None lets them grow until their leaves are pure.
        seed: Seed of the random choices; the same seed gives the same forest.
        n_jobs: Number of threads; -1 for all cores.

    Returns:
        The forest of scikit-learn. `save_object_classifier` stores it.

    Raises:
        InvalidInputError: If shapes or values do not fit, or no object is annotated.
    """
    from sklearn.ensemble import RandomForestClassifier

    features, labels = np.asarray(features), np.asarray(labels)
    if labels.ndim != 1 or features.ndim != 2 or len(features) != len(labels):
        raise InvalidInputError(
            f"features must be (N, F) and labels (N,), but have the shapes {features.shape} and {labels.shape}."
        )
    if labels.dtype.kind not in "bui" or (labels < 0).any():
        raise InvalidInputError("labels must be integers from 1, or 0 for objects that are not annotated.")
    annotated = labels != 0
    if not annotated.any():
        raise InvalidInputError("No object is annotated: all labels are 0. Give at least one object of each class.")
    _check_finite(features)
    forest = RandomForestClassifier(n_estimators, max_depth=max_depth, random_state=seed, n_jobs=n_jobs)
    return forest.fit(features[annotated], labels[annotated])


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features).all():
        raise InvalidInputError("The features have NaN or infinite values. Leave out such objects.")


@dataclass(frozen=True)
class ForestClassifier:
    """A trained random forest as plain arrays; the nodes of all trees lie one after the other.

    `roots` (T,) are the first nodes of the trees. Per node, `left` and `right` are its children (-1 for a leaf),
    taken if the value of `feature` is at most, or above, `threshold`; `probabilities` (nodes, K) are those of the
    classes. `classes_` (K,) are the classes and `class_names` their names, if they have some. `n_features_in_` is the
    number of features of an object.
    """

    roots: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    probabilities: np.ndarray
    classes_: np.ndarray
    n_features_in_: int
    class_names: dict[int, str]

    @classmethod
    def from_sklearn(cls, forest: Any, class_names: dict[int, str] | None = None) -> "ForestClassifier":
        """Take over a forest of scikit-learn: a RandomForestClassifier or ExtraTreesClassifier with one output."""
        from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

        is_forest = isinstance(forest, RandomForestClassifier | ExtraTreesClassifier) and hasattr(forest, "estimators_")
        if not is_forest or forest.n_outputs_ != 1 or forest.classes_.dtype.kind not in "bui":
            raise InvalidTypeError(
                "The classifier must be a trained forest of scikit-learn whose classes are integers, but is "
                f"{type(forest).__name__}. Use train_object_classifier."
            )
        trees = [estimator.tree_ for estimator in forest.estimators_]
        roots = np.cumsum([0] + [tree.node_count for tree in trees])[:-1]
        left, right = (
            np.concatenate([np.where(c < 0, -1, c + r) for c, r in zip((getattr(t, n) for t in trees), roots)])
            for n in ("children_left", "children_right")
        )
        values = np.concatenate([tree.value[:, 0] for tree in trees])
        return cls(
            roots, left, right, np.concatenate([tree.feature for tree in trees]),
            np.concatenate([tree.threshold for tree in trees]), values / values.sum(1, keepdims=True),
            forest.classes_.astype(np.int64), int(forest.n_features_in_), dict(class_names or {}),
        )

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, K) of the classes for features (N, F)."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.n_features_in_:
            raise InvalidInputError(
                f"The classifier needs features (N, {self.n_features_in_}), but got {features.shape}. Compute them "
                "with the same kind of model as for the training."
            )
        _check_finite(features)
        features = features.astype(np.float32)  # as in training
        out = np.zeros((len(features), len(self.classes_)))
        for start in range(0, len(features), _ROWS_PER_BLOCK):
            rows = slice(start, start + _ROWS_PER_BLOCK)
            out[rows] = self._predict_block(features[rows])
        return out

    def _predict_block(self, features: np.ndarray) -> np.ndarray:
        nodes = np.tile(self.roots, (len(features), 1))
        rows = np.arange(len(features))[:, None]
        while True:
            left = self.left[nodes]
            inner = left >= 0
            if not inner.any():
                return self.probabilities[nodes].mean(axis=1)
            values = features[rows, np.where(inner, self.feature[nodes], 0)]
            children = np.where(values <= self.threshold[nodes], left, self.right[nodes])
            nodes = np.where(inner, children, nodes)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the class (N,) of each object for features (N, F)."""
        return self.classes_[self.predict_proba(features).argmax(axis=1)]


def save_object_classifier(
    classifier: "RandomForestClassifier | ForestClassifier",
    path: str | os.PathLike,
    *,
    class_names: dict[int, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Store a trained forest, completely or not at all.

    Args:
        classifier: The forest.
        path: The file; `.npz` is appended if it has another suffix.
        class_names: Names of classes, to be stored with them.
        overwrite: Whether to replace an existing file.

    Returns:
        The path of the file.

    Raises:
        InvalidTypeError: If it is no trained forest.
        OutputExistsError: If the file exists and `overwrite` is not set.
        OutputWriteError: If it cannot be written.
    """
    if not isinstance(classifier, ForestClassifier):
        classifier = ForestClassifier.from_sklearn(classifier)
    path = Path(path).expanduser()
    if path.suffix.lower() != ".npz":
        path = path.with_name(f"{path.name}.npz")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists. Pass overwrite=True to replace it, or choose another path.")
    names = {int(k): str(v) for k, v in (class_names or classifier.class_names).items()}
    arrays = {name: getattr(classifier, name) for name in _ARRAYS}
    header = {"format": _FORMAT, "n_features": classifier.n_features_in_, "class_names": names}
    with temporary_path(path, is_folder=False) as new, open(new, "wb") as file:
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
    return path


def load_object_classifier(path: str | os.PathLike, *, trusted: bool = False) -> Any:
    """Load a forest that `save_object_classifier` or, if you trust the file, joblib has stored.

    Args:
        path: The file.
        trusted: Whether the file comes from a source that you trust. Files of joblib can run any code when they are
            loaded, and are refused otherwise.

    Returns:
        The `ForestClassifier`; for files of joblib with another kind of classifier, what they hold.

    Raises:
        MissingFileError: If there is no such file.
        UnsafeCheckpointError: If the file is one of joblib, and `trusted` is not set.
        CheckpointError: If it is damaged or holds no classifier.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no file {path} with a classifier. Check the path.")
    if zipfile.is_zipfile(path):
        return _load_arrays(path)
    if not trusted:
        raise UnsafeCheckpointError(
            f"{path} is not a file of save_object_classifier. If it was written by joblib (by an older version), "
            "loading it can run any code. Pass trusted=True if you know where it comes from, and store the classifier "
            "again with save_object_classifier."
        )
    import joblib

    try:
        classifier = joblib.load(path)
    except Exception as error:  # unpickling raises errors of any kind
        raise CheckpointError(
            f"{path} cannot be loaded ({type(error).__name__}: {error}). It is damaged, or was stored with another "
            "version of scikit-learn; train the classifier again."
        ) from error
    if not hasattr(classifier, "predict"):
        raise CheckpointError(f"{path} holds no classifier, but {type(classifier).__name__}.")
    try:
        return ForestClassifier.from_sklearn(classifier)
    except InvalidTypeError:
        return classifier


def _load_arrays(path: Path) -> ForestClassifier:
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in _ARRAYS}
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
        names = {int(k): str(v) for k, v in header["class_names"].items()}
        forest = ForestClassifier(**arrays, n_features_in_=int(header["n_features"]), class_names=names)
        _check_forest(forest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} holds no classifier that can be read here: {error}. Store it again with save_object_classifier."
        ) from error
    return forest


def _check_forest(forest: ForestClassifier) -> None:
    """Raise ValueError unless each path through the trees ends, within the arrays."""
    n_nodes = len(forest.left)
    index = np.arange(n_nodes)
    inner = forest.left >= 0
    children = np.stack([forest.left, forest.right])[:, inner]
    valid = (
        all(len(a) == n_nodes for a in (forest.right, forest.feature, forest.threshold, forest.probabilities))
        and forest.probabilities.shape == (n_nodes, len(forest.classes_)) and len(forest.roots) > 0
        and ((forest.roots >= 0) & (forest.roots < n_nodes)).all()
        and ((children > index[inner]) & (children < n_nodes)).all()
        and ((forest.feature[inner] >= 0) & (forest.feature[inner] < forest.n_features_in_)).all()
    )
    if not valid:
        raise ValueError("its arrays do not fit each other")


def run_prediction_with_object_classifier(
    images: Sequence[Image],
    segmentations: Sequence[Image],
    predictor,
    rf_path: str | os.PathLike,
    image_key: str | None = None,
    segmentation_key: str | None = None,
    project_prediction: bool = True,
    ndim: int | None = None,
    *,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    batch_size: int = 1,
    trusted: bool = False,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Classify the objects of images with a trained classifier.

    Images are processed one after the other, and stacks in batches of planes: no more embeddings are in memory than
    those of one batch.

    Args:
        images: Images (Y, X[, C]) or stacks (Z, Y, X[, C]): paths or arrays.
        segmentations: Their label images (Y, X) or (Z, Y, X): paths or arrays.
        predictor: The predictor, of the same model as in training.
        rf_path: The classifier, see `load_object_classifier`.
        image_key: Name of the image in containers such as hdf5 or zarr, see `core.image.open_image`.
        segmentation_key: Name of the label image in containers.
        project_prediction: Whether to return images of the classes.
        ndim: 2 or 3, channels not counted; None derives it from each image.
        tile_shape: Tile shape (y, x) in pixels, as in training; None for no tiling.
        halo: Halo (y, x) in pixels of the tiles.
        batch_size: Number of planes or tiles per call of the encoder.
        trusted: Whether the classifier may be a file of joblib, see `load_object_classifier`.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Returns:
        Per image: its classes as an image (see `project_prediction_to_segmentation`), or the class (N,) of each
        object, in the order of the ids that `compute_object_features` returns.

    Raises:
        InvalidInputError: If there are not as many segmentations as images, or an image and its segmentation differ
            in shape.
        MissingFileError: If a file does not exist.
        UnsafeCheckpointError: If the classifier is a file of joblib, and `trusted` is not set.
    """
    steps = object_prediction_steps(
        images, segmentations, predictor, rf_path, image_key, segmentation_key, project_prediction, ndim,
        tile_shape=tile_shape, halo=halo, batch_size=batch_size, trusted=trusted,
    )
    return drain(steps, verbose, pbar_init, pbar_update)


def object_prediction_steps(
    images: Sequence[Image],
    segmentations: Sequence[Image],
    predictor,
    rf_path: str | os.PathLike,
    image_key: str | None = None,
    segmentation_key: str | None = None,
    project_prediction: bool = True,
    ndim: int | None = None,
    *,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    batch_size: int = 1,
    trusted: bool = False,
) -> Steps[list[np.ndarray]]:
    """Generator behind `run_prediction_with_object_classifier`: yields a `Step` per image or batch of planes."""
    if len(images) != len(segmentations):
        raise InvalidInputError(
            f"There are {len(images)} images, but {len(segmentations)} segmentations. Pass one for each image."
        )
    require_positive_int("batch_size", batch_size)
    classifier = load_object_classifier(rf_path, trusted=trusted)
    # All are checked before the first is computed; files are opened again then, so that few are open at a time.
    pairs = list(zip(images, segmentations))
    total = sum(_n_planes(_open_pair(*pair, image_key, segmentation_key, ndim)[0]) for pair in pairs)
    done, text, results = 0, "Classify objects", []
    yield Step(0, total, text)
    for pair in pairs:
        image, segmentation = _open_pair(*pair, image_key, segmentation_key, ndim)
        sums = FeatureSums()
        for part, labels in _parts(image, segmentation, batch_size):
            embeddings = drain(embedding_steps(
                predictor, part, ndim=image.ndim, tile_shape=tile_shape, halo=halo, batch_size=batch_size,
            ), verbose=False)
            drain(sums.add_steps(embeddings, labels), verbose=False)
            done += len(part) if image.ndim == 3 else 1
            yield Step(done, total, text)
        ids, features = sums.result()
        classes = classifier.predict(features) if len(ids) else np.zeros(0, dtype=np.int64)
        if project_prediction:
            classes = project_prediction_to_segmentation(segmentation.data, classes, ids)
        results.append(classes)
    return results


def _n_planes(image: LazyImage) -> int:
    return image.shape[0] if image.ndim == 3 else 1


def _parts(image: LazyImage, segmentation: LazyImage, n_planes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if image.ndim == 2:
        yield image.read(), segmentation.read()
        return
    for start in range(0, image.shape[0], n_planes):
        planes = slice(start, start + n_planes)
        yield np.asarray(image.data[planes]), np.asarray(segmentation.data[planes])


def _open_pair(
    image: Image, segmentation: Image, image_key: str | None, segmentation_key: str | None, ndim: int | None
) -> tuple[LazyImage, LazyImage]:
    opened = open_image(image, image_key, ndim=ndim)
    labels = open_image(segmentation, segmentation_key, ndim=opened.ndim)
    if labels.has_channels or labels.shape != opened.shape:
        raise InvalidInputError(
            f"{opened.name} has the shape {opened.shape}, but its segmentation {labels.name} has "
            f"{tuple(labels.data.shape)}. Pass images and segmentations in the same order."
        )
    return opened, labels
