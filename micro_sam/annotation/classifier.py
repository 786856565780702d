"""The session of the object classifier: strokes on some objects, and from them a class for each object.

Whatever is said about objects is joined by their ids: features, labels and predictions. There is no Qt in here.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from psygnal import Signal

from ..core.errors import CheckpointError, InvalidInputError, NotInitializedError
from ..core.image import LazyImage, open_image
from ..core.progress import Step, Steps
from ..embeddings.encode import embedding_steps
from ..embeddings.features import ImageEmbeddings
from ..embeddings.signature import compute_data_signature, model_identity
from ..object_classification import (
    ForestClassifier,
    load_object_classifier,
    save_object_classifier,
    train_object_classifier,
)
from .classifier_objects import (
    Examples,
    ObjectFeatures,
    Prediction,
    TableSteps,
    accumulate_labels,
    check_integers,
    check_same_shape,
    join_by_id,
    predict_objects,
    warnings_about,
)
from .task import Task

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

_N_TABLES = 4  # features of so many segmentations are kept, so that going back to one is quick
_FIRST_CLASSES = (1, 2)


class NoAnnotationsError(InvalidInputError):
    """There is no stroke on an object, so there is nothing to learn from."""


class UntrainedError(NotInitializedError):
    """A classifier is needed, but none was trained or loaded yet."""


@dataclass(frozen=True)
class ObjectClass:
    """A class as a list shows it: annotated objects here and in other images, and objects predicted here."""

    id: int
    name: str
    n_labelled: int = 0
    n_earlier: int = 0
    n_predicted: int = 0


class ClassifierEvents:
    """What views listen to."""

    image = Signal()
    embeddings = Signal()
    classes = Signal()
    prediction = Signal()


@dataclass(frozen=True)
class Learned:
    """What the steps of a task bring back."""

    prediction: Prediction
    tables: dict[tuple[str, str], ObjectFeatures]
    examples: Examples | None = None
    forest: Any = None
    classifier: ForestClassifier | None = None


class ClassifierSession:
    """The classification of the objects of an image, or of a series of images.

    The strokes are in `annotations`, an array in the shape of the segmentation that views paint into.

    Args:
        seed: Seed of the training: the same strokes give the same classes.

    Example:
        >>> session = ClassifierSession()
        >>> session.set_image(np.zeros((8, 9), "uint8"), np.eye(8, 9, dtype="uint8"))
        >>> session.annotations[2, 2] = 2
        >>> [(c.name, c.n_labelled) for c in session.classes()]
        [('class 1', 0), ('class 2', 1)]
    """

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        self.events = ClassifierEvents()
        self.image: LazyImage | None = None
        self.segmentation: Any = None
        self.annotations: np.ndarray | None = None
        self.name = ""
        self.embeddings: ImageEmbeddings | None = None
        self.prediction: Prediction | None = None
        self.classifier: ForestClassifier | None = None
        self.forest: RandomForestClassifier | None = None
        self.examples: dict[str, Examples] = {}
        self._embedding_key, self._model = "", None
        self._loaded: tuple[Any, Any] | None = None
        self._tables: OrderedDict[tuple[str, str], ObjectFeatures] = OrderedDict()
        self._class_names: dict[int, str] = {}
        self._listed = set(_FIRST_CLASSES)
        self._n_given = 0

    # The image

    def set_image(
        self,
        image: Any,
        segmentation: Any,
        name: str = "image",
        *,
        ndim: int | None = None,
        annotations: np.ndarray | None = None,
    ) -> None:
        """Go to an image. Classes, their names, the classifier and what was learned from other images stay.

        Args:
            image: Image (Y, X[, C]) or stack (Z, Y, X[, C]): an array, lazy or not, or a path.
            segmentation: Its label image without channels. It is read, never written.
            name: Stands for the image; annotations that were made for this name before are replaced.
            ndim: 2 or 3, channels not counted; None is that of the segmentation.
            annotations: Strokes to start with; None starts without any. They are copied.

        Raises:
            InvalidInputError: If image, segmentation and annotations do not fit each other.
        """
        labels = open_image(segmentation, ndim=ndim)
        image = open_image(image, ndim=labels.ndim)
        if labels.has_channels or labels.shape != image.shape:
            raise InvalidInputError(
                f"The image has the shape {image.shape}, but its segmentation has {tuple(labels.data.shape)}. Choose "
                "the segmentation of this image."
            )
        check_integers(labels.data)
        pixels = labels.read() if isinstance(segmentation, str | os.PathLike) else labels.data
        strokes = np.zeros(labels.shape, dtype=np.uint32)
        if annotations is not None:
            check_same_shape(labels.data, annotations)
            strokes[...] = annotations
        self.image, self.segmentation, self.annotations, self.name = image, pixels, strokes, name
        self.embeddings = self.prediction = self._model = None
        self._embedding_key = ""
        self._listed |= set(self._painted())
        self.events.image.emit()
        self.events.classes.emit()

    def set_segmentation(self, segmentation: Any) -> None:
        """Use another segmentation of the same image; the strokes and the embeddings stay.

        Raises:
            InvalidInputError: If it has another shape.
        """
        image = self._require_image()
        if tuple(segmentation.shape) != image.shape:
            raise InvalidInputError(
                f"The segmentation has the shape {tuple(segmentation.shape)}, but the image has {image.shape}. Choose "
                "the segmentation of this image."
            )
        check_integers(segmentation)
        self.segmentation, self.prediction = segmentation, None
        self.events.prediction.emit()

    def _require_image(self) -> LazyImage:
        if self.image is None:
            raise NotInitializedError("There is no image yet. Choose an image and its segmentation.")
        return self.image

    # Embeddings

    def set_embeddings(
        self, image_embeddings: ImageEmbeddings, key: str | None = None, *, model: str | None = None
    ) -> None:
        """Use embeddings of the image.

        Args:
            image_embeddings: The embeddings.
            key: Identifies image, model and tiling; features are kept for it. None stands for other ones each time.
            model: Identifies the model; objects of images that were embedded with different ones are not mixed. None
                if it is not known.
        """
        self._require_image()
        self._n_given += 1
        self.embeddings, self._model = image_embeddings, model
        self._embedding_key = key or f"given {self._n_given}"
        self.prediction = None
        self.events.embeddings.emit()
        self.events.prediction.emit()

    def embed_task(
        self,
        model_type: str | None = None,
        *,
        checkpoint: str | os.PathLike | None = None,
        device: str | None = None,
        save_path: str | os.PathLike | None = None,
        tile_shape: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        load: Callable[..., Any] | None = None,
    ) -> Task[Any, None]:
        """The task to load a model and to compute or load the embeddings of the image.

        Args:
            model_type: Name of the model; None takes that of the checkpoint, or a default that needs no download.
            checkpoint: Weights instead of the published ones.
            device: Compute device; None chooses it.
            save_path: A zarr folder; `auto` for the automatic cache; None for memory.
            tile_shape: Tile (y, x) in pixels; None for none.
            halo: Halo (y, x) in pixels.
            load: Loads the model, by default `segmentation.workflow.load_model`.

        Raises:
            NotInitializedError: If there is no image.
            UnknownModelError: If there is no such model.
        """
        from ..segmentation.workflow import default_model, load_model, resolve_model

        image = self._require_image()
        name = resolve_model(model_type, checkpoint) if model_type or checkpoint else default_model()
        wanted, loaded = (name, str(checkpoint), device), self._loaded

        def steps() -> Steps[Any]:
            model = loaded[1] if loaded is not None and loaded[0] == wanted else None
            if model is None:
                yield Step(0, 1, f"Load model {name or checkpoint}")
                model = (load or load_model)(name, checkpoint, device)
            predictor = model.for_prompts(image.shape[-2:], tile_shape, halo, save_path).predictor
            embeddings = yield from embedding_steps(
                predictor, image.data, save_path, lazy_loading=save_path is not None, ndim=image.ndim,
                tile_shape=tile_shape, halo=halo,
            )
            yield Step(0, 1, "Identify the image")
            identity = str(sorted(model_identity(predictor).items()))
            return model, embeddings, f"{compute_data_signature(image.data)} {identity} {tile_shape} {halo}", identity

        def apply(found: Any) -> None:
            model, embeddings, key, identity = found
            self._loaded = wanted, model
            self.set_embeddings(embeddings, key, model=identity)

        return Task("Compute embeddings", steps, apply)

    # Classes

    def classes(self) -> list[ObjectClass]:
        """The classes in use, with how many objects were annotated with them.

        Counting reads the pixels that are painted on; for huge annotations ask rarely.
        """
        labelled = [] if self.segmentation is None else [*self._labelled().values()]
        earlier = np.concatenate([np.zeros(0, np.int64), *(e.classes for e in self._other_examples())])
        predicted = np.zeros(0, np.int64) if self.prediction is None else self.prediction.classes
        known = {*self._listed, *labelled, *earlier.tolist(), *predicted.tolist(), *self._painted()}
        if self.classifier is not None:
            known |= set(self.classifier.classes_.tolist())
        return [
            ObjectClass(
                i, self.class_name(i), labelled.count(i), int((earlier == i).sum()), int((predicted == i).sum())
            ) for i in sorted(known)
        ]

    def _painted(self) -> list[int]:
        return [] if self.annotations is None else np.unique(self.annotations[self.annotations != 0]).tolist()

    def class_name(self, class_id: int) -> str:
        """The name of a class; `class 3` if it was given none."""
        return self._class_names.get(class_id, f"class {class_id}")

    def rename_class(self, class_id: int, name: str) -> None:
        """Give a class a name; an empty one takes its name away. Classifiers are exported with the names."""
        name = name.strip()
        taken = [i for i, other in self._class_names.items() if other == name and i != class_id]
        if taken:
            raise InvalidInputError(f"Class {taken[0]} has the name {name!r} already. Choose another name.")
        if name and name != f"class {class_id}":
            self._class_names[class_id] = name
        else:
            self._class_names.pop(class_id, None)
        self.events.classes.emit()

    def add_class(self, name: str = "") -> int:
        """Add a class and return its id, the smallest that is free."""
        used = {c.id for c in self.classes()}
        class_id = next(i for i in range(1, len(used) + 2) if i not in used)
        self._listed.add(class_id)
        self.rename_class(class_id, name)
        return class_id

    def _names(self, class_ids: Iterable[int]) -> dict[int, str]:
        return {int(i): self.class_name(int(i)) for i in class_ids}

    # Training and prediction

    @property
    def has_strokes(self) -> bool:
        """Whether anything is painted."""
        return self.annotations is not None and bool(self.annotations.any())

    def _labelled(self) -> dict[int, int]:
        return accumulate_labels(self.segmentation, self.annotations)

    def _other_examples(self) -> list[Examples]:
        return [examples for name, examples in self.examples.items() if name != self.name]

    def _require_embeddings(self) -> ImageEmbeddings:
        self._require_image()
        if self.embeddings is None:
            raise NotInitializedError(
                "There are no image embeddings yet. Choose a model and press 'Compute Embeddings'."
            )
        return self.embeddings

    def train_task(self) -> Task[Learned, Prediction]:
        """The task to train a classifier with the strokes here and in earlier images, and to classify all objects.

        Raises:
            NotInitializedError: If there is no image, or there are no embeddings.
            NoAnnotationsError: If no object is painted on, here or in earlier images.
        """
        self._require_embeddings()
        labelled, earlier = self._labelled(), self._other_examples()
        if not labelled and not earlier:
            where = "The strokes touch no object of the segmentation" if self.has_strokes else "No object is annotated"
            raise NoAnnotationsError(
                f"{where}. Paint on some objects in the layer 'annotations', with another label for each class."
            )
        if any(None not in (e.model, self._model) and e.model != self._model for e in earlier):
            raise InvalidInputError(
                "The objects that were annotated in other images were embedded with another model. Choose that model "
                "and press 'Compute Embeddings'."
            )
        seed, model, table_steps = self.seed, self._model, self._table_steps()
        segmentation = table_steps.segmentation

        def steps() -> Steps[Learned]:
            key, table = yield from table_steps()
            examples, unusable = join_by_id(table, labelled, model)
            features, classes = (
                np.concatenate([getattr(e, part) for e in (*earlier, examples)]) for part in ("features", "classes")
            )
            if not len(classes):
                raise NoAnnotationsError(
                    f"The {len(labelled)} annotated objects are too small for the embedding. Annotate larger ones, or "
                    "compute the embeddings with smaller tiles."
                )
            text = f"Train with {len(classes)} objects"
            yield Step(0, 2, text)
            forest = train_object_classifier(features, classes, seed=seed)
            classifier = ForestClassifier.from_sklearn(forest)
            yield Step(1, 2, text)
            warnings = warnings_about(table, unusable, classifier)
            prediction = predict_objects(classifier, table, segmentation, labelled, warnings)
            return Learned(prediction, {key: table}, examples, forest, classifier)

        return Task("Train and predict", steps, self._take_over, uses_model=False)

    def predict_task(self) -> Task[Learned, Prediction]:
        """The task to classify all objects with the classifier that was trained or loaded.

        Raises:
            NotInitializedError: If there is no image, or there are no embeddings.
            UntrainedError: If there is no classifier.
        """
        self._require_embeddings()
        if self.classifier is None:
            raise UntrainedError("There is no classifier yet. Press 'Train and predict', or load one.")
        classifier, table_steps, labelled = self.classifier, self._table_steps(), self._labelled()
        segmentation = table_steps.segmentation

        def steps() -> Steps[Learned]:
            key, table = yield from table_steps()
            yield Step(0, 1, "Classify objects")
            prediction = predict_objects(classifier, table, segmentation, labelled, warnings_about(table))
            return Learned(prediction, {key: table})

        return Task("Predict", steps, self._take_over, uses_model=False)

    def _table_steps(self) -> "TableSteps":
        # The user may go on editing the segmentation, so the work is done on a copy.
        segmentation = self.segmentation.copy() if isinstance(self.segmentation, np.ndarray) else self.segmentation
        return TableSteps(self.embeddings, self._embedding_key, segmentation, dict(self._tables))

    def _take_over(self, learned: Learned) -> Prediction:
        for key, table in learned.tables.items():
            self._tables[key] = table
            self._tables.move_to_end(key)
        while len(self._tables) > _N_TABLES:
            self._tables.popitem(last=False)
        self.prediction = learned.prediction
        if learned.classifier is not None:
            self.forest, self.classifier = learned.forest, learned.classifier
            self._listed |= set(learned.classifier.classes_.tolist())
            self.examples[self.name] = learned.examples
        self.events.classes.emit()
        self.events.prediction.emit()
        return learned.prediction

    # The classifier

    def named_classifier(self) -> ForestClassifier:
        """The classifier, with the names of its classes as they are now.

        Raises:
            UntrainedError: If there is none.
        """
        if self.classifier is None:
            raise UntrainedError("There is no classifier yet. Press 'Train and predict' first.")
        arrays = {name: getattr(self.classifier, name) for name in self.classifier.__dataclass_fields__}
        return ForestClassifier(**arrays | {"class_names": self._names(self.classifier.classes_)})

    def export(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Store the classifier with the names of its classes, see `save_object_classifier`, and return the path.

        Raises:
            UntrainedError: If there is none.
            OutputExistsError: If the file exists and `overwrite` is not set.
        """
        return save_object_classifier(self.named_classifier(), path, overwrite=overwrite)

    def load(self, path: str | os.PathLike, *, trusted: bool = False) -> ForestClassifier:
        """Use a classifier from a file, and the names of its classes, see `load_object_classifier`.

        Raises:
            MissingFileError, CheckpointError, UnsafeCheckpointError: If it cannot be loaded.
        """
        classifier = load_object_classifier(path, trusted=trusted)
        if not isinstance(classifier, ForestClassifier):
            raise CheckpointError(f"{path} holds {type(classifier).__name__}, but a random forest is needed.")
        self.classifier, self.forest = classifier, None
        self._listed |= set(classifier.classes_.tolist())
        self._class_names |= {i: name for i, name in classifier.class_names.items() if name != f"class {i}"}
        self.events.classes.emit()
        return classifier


