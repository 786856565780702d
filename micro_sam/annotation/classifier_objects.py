"""Objects and their classes as plain data: strokes, features and predictions, joined by the ids of the objects."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError
from ..core.progress import Step, Steps
from ..embeddings.features import ImageEmbeddings
from ..embeddings.signature import compute_data_signature
from ..object_classification import ForestClassifier
from ..object_features import object_feature_steps, project_prediction_to_segmentation


@dataclass(frozen=True)
class ObjectFeatures:
    """Features (N, F), float32, of the objects `ids` (N,), ascending.

    `missing` are the ids of objects without features: they are so small that they vanish in the embedding, or lie
    where nothing was embedded.
    """

    ids: np.ndarray
    values: np.ndarray
    missing: np.ndarray

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ids have features (a mask), and the rows of those that have."""
        if not len(self.ids):
            return np.zeros(len(ids), dtype=bool), np.zeros(0, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        known = self.ids[at] == ids
        return known, at[known]


@dataclass(frozen=True)
class Examples:
    """Features (N, F) and classes (N,) of the annotated objects of an image, and what identifies the model."""

    features: np.ndarray
    classes: np.ndarray
    model: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The classes of the objects of an image.

    `ids`, `classes` and `confidence` (probability of the class, 0…1) are (N,); `missing` are the ids of objects that
    could not be classified, which are 0 in `image`, the classes in the shape of the segmentation. `labelled` maps the
    annotated objects to their classes; those in `missing` could not be learned from. `warnings` say what is worth a
    look.
    """

    ids: np.ndarray
    classes: np.ndarray
    confidence: np.ndarray
    missing: np.ndarray
    image: np.ndarray = field(repr=False)
    labelled: Mapping[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def count(self, class_id: int) -> int:
        """Number of objects of a class."""
        return int(np.count_nonzero(self.classes == class_id))


def accumulate_labels(segmentation: np.ndarray, annotations: np.ndarray) -> dict[int, int]:
    """Give each object that was painted on the class that most of its painted pixels have.

    Args:
        segmentation: Label image, 0 is background.
        annotations: Classes in the same shape, 0 where nothing is painted.

    Returns:
        The class of each such object, by ascending id. Of equally frequent classes the smallest is taken.

    Raises:
        InvalidInputError: If the shapes differ.

    Example:
        >>> accumulate_labels(np.array([[5, 5, 5, 0, 7]]), np.array([[2, 2, 1, 1, 0]]))
        {5: 2}
    """
    check_same_shape(segmentation, annotations)
    painted = np.nonzero(np.asarray(annotations))
    return _majority(_values_at(segmentation, painted), np.asarray(annotations)[painted])


def _values_at(labels: Any, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """Values of a label image at some pixels; a lazy stack is read only in the planes that are needed."""
    if isinstance(labels, np.ndarray) or len(labels.shape) < 3:
        return np.asarray(labels)[index]
    out = np.zeros(len(index[0]), dtype=labels.dtype)
    for z in np.unique(index[0]).tolist():
        here = index[0] == z
        out[here] = np.asarray(labels[z])[tuple(axis[here] for axis in index[1:])]
    return out


def _majority(ids: np.ndarray, classes: np.ndarray) -> dict[int, int]:
    inside = ids != 0
    pairs = np.stack([ids[inside].astype(np.int64), classes[inside].astype(np.int64)])
    (ids, classes), counts = np.unique(pairs, axis=1, return_counts=True)
    order = np.lexsort((classes, -counts, ids))
    ids, first = np.unique(ids[order], return_index=True)
    return dict(zip(ids.tolist(), classes[order][first].tolist()))


def check_same_shape(segmentation: Any, annotations: Any) -> None:
    """Raise `InvalidInputError` unless strokes have the shape of the segmentation."""
    if tuple(segmentation.shape) != tuple(annotations.shape):
        raise InvalidInputError(
            f"The annotations have the shape {tuple(annotations.shape)}, but the segmentation has "
            f"{tuple(segmentation.shape)}. Paint on a layer of the shape of the segmentation."
        )


def object_table_steps(image_embeddings: ImageEmbeddings, segmentation: np.ndarray) -> Steps[ObjectFeatures]:
    """Generator of the features of all objects, with those that have none by name. Yields `Step`."""
    ids, values = yield from object_feature_steps(image_embeddings, segmentation)
    usable = values[:, 0] > 0
    planes = [segmentation] if len(segmentation.shape) == 2 else segmentation
    present = np.unique(np.concatenate([np.unique(np.asarray(plane)).astype(np.int64) for plane in planes]))
    missing = np.setdiff1d(present[present != 0], ids[usable])
    return ObjectFeatures(ids[usable], values[usable].astype(np.float32), missing)


class TableSteps:
    """Makes the generator of the features of a segmentation: from the cache, or computed. Runs in any thread."""

    def __init__(
        self, image_embeddings: ImageEmbeddings, embedding_key: str, segmentation: Any,
        tables: Mapping[tuple[str, str], ObjectFeatures],
    ):
        self.segmentation = segmentation
        self._embeddings, self._embedding_key, self._tables = image_embeddings, embedding_key, tables

    def __call__(self) -> Steps[tuple[tuple[str, str], ObjectFeatures]]:
        yield Step(0, 1, "Identify the segmentation")
        key = self._embedding_key, compute_data_signature(self.segmentation)
        table = self._tables.get(key)
        if table is None:
            table = yield from object_table_steps(self._embeddings, self.segmentation)
        if not len(table.ids):
            raise InvalidInputError("The segmentation has no object that could be classified. Choose another one.")
        return key, table


def check_integers(labels: Any) -> None:
    """Raise `InvalidTypeError` unless a label image holds integers."""
    if np.dtype(labels.dtype).kind not in "bui":
        raise InvalidTypeError(f"A segmentation must have an integer dtype, but has {labels.dtype}. Convert it first.")


def join_by_id(
    table: ObjectFeatures, labelled: Mapping[int, int], model: str | None = None
) -> tuple[Examples, list[int]]:
    """The annotated objects that have features, and the ids of those that have none."""
    ids = np.fromiter(labelled.keys(), dtype=np.int64, count=len(labelled))
    classes = np.fromiter(labelled.values(), dtype=np.int64, count=len(labelled))
    known, rows = table.rows(ids)
    return Examples(table.values[rows], classes[known], model), ids[~known].tolist()


def predict_objects(
    classifier: ForestClassifier, table: ObjectFeatures, segmentation: Any, labelled: Mapping[int, int],
    warnings: Sequence[str],
) -> Prediction:
    """Classify all objects that have features, and paint their classes over their pixels."""
    probabilities = classifier.predict_proba(table.values)
    classes = classifier.classes_[probabilities.argmax(axis=1)]
    image = project_prediction_to_segmentation(segmentation, classes, table.ids)
    return Prediction(
        table.ids, classes, probabilities.max(axis=1), table.missing, image, dict(labelled), tuple(warnings)
    )


def warnings_about(
    table: ObjectFeatures, unusable: Collection[int] = (), trained: ForestClassifier | None = None
) -> list[str]:
    """What is worth a look: objects without features, annotated ones among them, and a training with one class."""
    warnings = []
    if trained is not None and len(trained.classes_) == 1:
        warnings.append("Only one class is annotated, so all objects get it. Annotate objects of a second class.")
    if unusable:
        warnings.append(f"{len(unusable)} annotated objects are too small for the embedding and were not learned from.")
    if len(table.missing):
        warnings.append(
            f"{len(table.missing)} objects are too small for the embedding and have no class; smaller tiles help."
        )
    return warnings
