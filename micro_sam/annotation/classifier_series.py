"""The object classifier on a series of images: what was annotated in earlier ones helps with later ones.

The results of an image are written when it is finished, so that a series can be left and gone on with:
`features.npy` and `labels.npy` (all annotated objects, image after image), `rf.joblib` and `rf.npz` (the classifier;
the latter runs no code when it is loaded and holds the names of the classes), and per image the strokes and the
predicted classes. `series.json` says which rows belong to which image.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, OutputExistsError
from ..core.output import prepare_folder, read_labels, temporary_path, write_json, write_labels
from ..core.progress import Step, Steps
from ..embeddings.features import ImageEmbeddings
from ..embeddings.signature import compute_data_signature
from ..object_classification import save_object_classifier
from .classifier import ClassifierSession, Learned
from .classifier_objects import Examples, Prediction
from .task import Task

_FORMAT = {"format": "micro_sam.classifier_series", "version": 1}
_RECORD = "series.json"


@dataclass(frozen=True)
class SeriesImage:
    """An image of a series: what it is called, and where its results go."""

    name: str
    image: Any
    segmentation: Any
    embeddings: str | os.PathLike | ImageEmbeddings | None
    prediction_path: Path
    annotation_path: Path


def plan_images(
    images: Sequence[Any], segmentations: Sequence[Any], output_folder: str | os.PathLike,
    embedding_paths: Sequence[Any] | None = None,
) -> list[SeriesImage]:
    """List the images of a series with their outputs: `prediction_<i>.tif`, for files `<stem>_prediction.tif`.

    Raises:
        InvalidInputError: If there are none, the numbers differ, or two files would have the same outputs.
    """
    if not len(images):
        raise InvalidInputError("There are no images. Pass at least one.")
    for name, others in (("segmentations", segmentations), ("embedding_paths", embedding_paths)):
        if others is not None and len(others) != len(images):
            raise InvalidInputError(
                f"There are {len(images)} images, but {len(others)} {name}. Pass one for each image."
            )
    folder, planned = Path(output_folder).expanduser(), []
    for i, (image, segmentation) in enumerate(zip(images, segmentations)):
        is_file = isinstance(image, str | os.PathLike)
        stem = Path(image).stem if is_file else None
        names = [f"{stem}_{kind}.tif" if is_file else f"{kind}_{i}.tif" for kind in ("prediction", "annotations")]
        embeddings = None if embedding_paths is None else embedding_paths[i]
        paths = (folder / name for name in names)
        planned.append(SeriesImage(stem or f"image {i + 1}", image, segmentation, embeddings, *paths))
    outputs = [item.prediction_path for item in planned]
    twice = next((path for path in outputs if outputs.count(path) > 1), None)
    if twice is not None:
        raise InvalidInputError(f"Two images would be written to {twice}. Rename one of them, so that names differ.")
    return planned


class ClassifierSeries:
    """Goes through the images of a series with a session, forwards and back.

    Args:
        session: The session.
        images: Arrays or paths, see `ClassifierSession.set_image`.
        segmentations: Their label images, in the same order.
        output_folder: Where results are written. A series that was begun there goes on.
        embedding_paths: Per image where embeddings are kept, or ready embeddings.
        ndim: 2 or 3, channels not counted; None is that of each segmentation.

    Raises:
        InvalidInputError: See `plan_images`.
        OutputExistsError: If the folder has results of other images.
        OutputWriteError: If nothing can be written there.
    """

    def __init__(
        self,
        session: ClassifierSession,
        images: Sequence[Any],
        segmentations: Sequence[Any],
        output_folder: str | os.PathLike,
        embedding_paths: Sequence[Any] | None = None,
        *,
        ndim: int | None = None,
    ):
        self.session, self._ndim = session, ndim
        self.images = plan_images(images, segmentations, output_folder, embedding_paths)
        self.folder = Path(output_folder).expanduser()
        prepare_folder(self.folder / _RECORD)
        self.index = 0
        self._finished: dict[int, str] = {}
        self._resume()

    # Going through the images

    @property
    def current(self) -> SeriesImage:
        return self.images[self.index]

    @property
    def is_last(self) -> bool:
        return self.index == len(self.images) - 1

    @property
    def finished(self) -> set[int]:
        """The indices of the images whose results are written."""
        return set(self._finished)

    def open(self, index: int | None = None) -> SeriesImage:
        """Show an image, with the strokes that were saved for it; None is the first that is not finished yet.

        Raises:
            InvalidInputError: If there is no such image, or image and segmentation do not fit each other.
        """
        if index is None:
            index = next((i for i in range(len(self.images)) if i not in self._finished), 0)
        if not 0 <= index < len(self.images):
            raise InvalidInputError(f"There are {len(self.images)} images, so there is none at {index}.")
        item = self.images[index]
        strokes = read_labels(item.annotation_path) if index in self._finished else None
        self.session.set_image(item.image, item.segmentation, item.name, ndim=self._ndim, annotations=strokes)
        if isinstance(item.embeddings, dict):
            self.session.set_embeddings(item.embeddings)
        self.index = index
        return item

    def finish_task(self) -> Task[Learned | None, Prediction | None]:
        """The task to classify the objects of this image and to write all results.

        With strokes a classifier is trained with them and those of earlier images; without, the present classifier is
        used; without one there is nothing but the (empty) strokes to write.
        """
        session, index, item = self.session, self.index, self.current
        work = None
        if session.has_strokes:
            work = session.train_task()
        elif session.classifier is not None and session.embeddings is not None:
            work = session.predict_task()
        strokes, segmentation = session.annotations.copy(), session.segmentation
        examples, names = dict(session.examples), {c.id: c.name for c in session.classes()}

        def steps() -> Steps[tuple[Learned | None, str]]:
            learned = (yield from work.steps()) if work is not None else None
            yield Step(0, 1, "Save the results")
            write_labels(item.annotation_path, strokes)
            if learned is not None:
                write_labels(item.prediction_path, learned.prediction.image)
            new = {} if learned is None or learned.examples is None else {item.name: learned.examples}
            kept = {name: e for name, e in examples.items() if name != item.name} | new
            signature = compute_data_signature(segmentation)
            self._write(kept, learned, names, {**self._finished, index: signature})
            return learned, signature

        def apply(result: tuple[Learned | None, str]) -> Prediction | None:
            learned, self._finished[index] = result
            if not strokes.any():
                session.examples.pop(item.name, None)
            return None if work is None else work.apply(learned)

        return Task("Save and continue", steps, apply, uses_model=False)

    # Files

    def _write(
        self, examples: dict[str, Examples], learned: Learned | None, names: dict[int, str], finished: dict[int, str]
    ) -> None:
        """Write what belongs to the whole series; the record comes last, for it is what a resumed series reads."""
        order = [(i, examples[self.images[i].name]) for i in sorted(finished) if self.images[i].name in examples]
        if order:
            _save_array(self.folder / "features.npy", np.concatenate([e.features for _, e in order]))
            _save_array(self.folder / "labels.npy", np.concatenate([e.classes for _, e in order]))
        if learned is not None and learned.forest is not None:
            import joblib
            with temporary_path(self.folder / "rf.joblib", is_folder=False) as new:
                joblib.dump(learned.forest, new)
            names = {int(i): names[int(i)] for i in learned.classifier.classes_}
            save_object_classifier(learned.classifier, self.folder / "rf.npz", class_names=names, overwrite=True)
        rows = {i: len(e.classes) for i, e in order}
        models = {e.model for _, e in order}
        write_json(self.folder / _RECORD, {
            **_FORMAT, "model": models.pop() if len(models) == 1 else None,
            "images": [
                {"index": i, "name": self.images[i].name, "signature": finished[i], "n_objects": rows.get(i, 0)}
                for i in sorted(finished)
            ],
        })

    def _resume(self) -> None:
        """Take over what an earlier run has left in the folder."""
        if not (self.folder / _RECORD).is_file():
            return
        try:
            finished, examples = self._read()
            is_ours = all(self._is_same(i, signature) for i, signature in finished.items())
        except (OSError, ValueError, KeyError, TypeError, IndexError):  # it was changed by hand, or is of another kind
            is_ours = False
        if not is_ours:
            raise OutputExistsError(
                f"{self.folder} has the results of another series. Choose another output folder, or remove {_RECORD} "
                "there to start anew."
            )
        self._finished = finished
        self.session.examples.update(examples)
        if (self.folder / "rf.npz").is_file():
            self.session.load(self.folder / "rf.npz")

    def _read(self) -> tuple[dict[int, str], dict[str, Examples]]:
        record = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        if any(record[name] != value for name, value in _FORMAT.items()):
            raise ValueError("another format")
        finished, examples, start = {}, {}, 0
        for entry in record["images"]:
            i, stop = int(entry["index"]), start + int(entry["n_objects"])
            finished[i] = entry["signature"]
            if stop > start:
                arrays = (np.load(self.folder / f"{name}.npy", allow_pickle=False) for name in ("features", "labels"))
                features, classes = (array[start:stop] for array in arrays)
                examples[self.images[i].name] = Examples(features, classes, record["model"])
            start = stop
        return finished, examples

    def _is_same(self, index: int, signature: str) -> bool:
        if index >= len(self.images) or not self.images[index].annotation_path.is_file():
            return False
        segmentation = self.images[index].segmentation
        if isinstance(segmentation, str | os.PathLike):
            from ..core.image import open_image
            segmentation = open_image(segmentation).read()
        return compute_data_signature(segmentation) == signature


def _save_array(path: Path, array: np.ndarray) -> None:
    with temporary_path(path, is_folder=False) as new, open(new, "wb") as file:
        np.save(file, array, allow_pickle=False)
