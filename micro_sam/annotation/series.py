"""A series of images to annotate: which ones, in which order, where their results lie, and which are done.

`plan_series` finds all of that before any work. The results are files that carry a mark, so that the same folders,
opened again, go on where the work ended.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.errors import InvalidInputError, MicroSamError, OutputExistsError
from ..core.image import LazyImage, open_image
from ..core.labels import check_labels
from ..core.output import prepare_folder, read_record, write_labels
from ..core.readers import SUFFIXES, is_zarr, suffix_of
from .series_files import distinct_names, find_initial, find_sources, mark_of, output_paths, refuse_overlap

Status = Literal["todo", "in progress", "done", "unreadable"]


@dataclass(frozen=True, eq=False)
class SeriesEntry:
    """One image of a series.

    `source` is its path or array, `output` the label image, `embedding_path` the zarr folder of its embeddings,
    `initial` the labels to start from (path or array), `note` why it is unreadable.
    """

    index: int
    name: str
    source: Any
    output: Path
    embedding_path: Path | None = None
    initial: Any = None
    status: Status = "todo"
    note: str = ""


@dataclass(frozen=True)
class Question:
    """What the user has to confirm before a result is written: `code` is `empty` or `replace`."""

    code: Literal["empty", "replace"]
    text: str


def confirm_empty(labels: np.ndarray) -> Question | None:
    """Return the question to ask if nothing is annotated, else None."""
    if np.any(labels):
        return None
    return Question("empty", "Nothing is annotated in this image. Save it as an image without objects?")


class Series:
    """The images of a series with their status. Made by `plan_series`.

    Args:
        entries: The images in order.
        is_volumetric: Whether they are volumes.
        skip_segmented: Whether `first_open` and `next` pass over images that are done.
        has_journal: Whether there is unfinished work for an image.
        notes: What was left out and why.
        image_options: More arguments of `open_image`, for all images.
    """

    def __init__(
        self,
        entries: Sequence[SeriesEntry],
        *,
        is_volumetric: bool = False,
        skip_segmented: bool = True,
        has_journal: Callable[[SeriesEntry], bool] | None = None,
        notes: Sequence[str] = (),
        image_options: Mapping[str, Any] | None = None,
    ):
        self.is_volumetric, self.skip_segmented, self.notes = is_volumetric, skip_segmented, tuple(notes)
        self._has_journal = has_journal
        self._image_options = dict(image_options or {})
        self._entries = list(entries)
        self.refresh_status()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SeriesEntry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> SeriesEntry:
        return self._entries[index]

    def counts(self) -> dict[Status, int]:
        """Return how many images have each status."""
        counts: dict[Status, int] = dict.fromkeys(("todo", "in progress", "done", "unreadable"), 0)
        for entry in self._entries:
            counts[entry.status] += 1
        return counts

    def remaining(self) -> list[SeriesEntry]:
        """Return the images that are still to be annotated."""
        return [e for e in self._entries if e.status in ("todo", "in progress")]

    def _is_wanted(self, entry: SeriesEntry) -> bool:
        return entry.status != "unreadable" and not (self.skip_segmented and entry.status == "done")

    def first_open(self) -> SeriesEntry | None:
        """Return the image to begin with, or None if there is nothing left to do."""
        return next((e for e in self._entries if self._is_wanted(e)), None)

    def next(self, index: int) -> SeriesEntry | None:
        """Return the image to annotate after the one with this index, or None if the series is at its end.

        While images that are done are skipped, it goes on with those before it that were left open.
        """
        later = self._entries[self.jump(index).index + 1:]
        earlier = self._entries[:index] if self.skip_segmented else []
        return next((e for e in [*later, *earlier] if self._is_wanted(e)), None)

    def previous(self, index: int) -> SeriesEntry | None:
        """Return the image before the one with this index, done or not, or None if it is the first."""
        return next((e for e in reversed(self._entries[:self.jump(index).index]) if e.status != "unreadable"), None)

    def jump(self, index: int) -> SeriesEntry:
        """Return the image with this index.

        Raises:
            InvalidInputError: If there is none.
        """
        if not 0 <= index < len(self._entries):
            raise InvalidInputError(
                f"There is no image {index} in this series: it has {len(self._entries)}, numbered from 0."
            )
        return self._entries[index]

    def refresh_status(self) -> None:
        """Look at the files again: which results are there, and which images are empty or gone."""
        self._entries = [self._with_status(e) for e in self._entries]

    def _with_status(self, entry: SeriesEntry) -> SeriesEntry:
        note = _problem_of(entry.source)
        if note:
            return replace(entry, status="unreadable", note=note)
        if entry.output.exists():
            return replace(entry, status="done", note="")
        has_journal = self._has_journal is not None and self._has_journal(entry)
        return replace(entry, status="in progress" if has_journal else "todo", note="")

    def _replace(self, entry: SeriesEntry, **changes: Any) -> SeriesEntry:
        self._entries[entry.index] = replace(self._entries[entry.index], **changes)
        return self._entries[entry.index]

    def mark_unreadable(self, entry: SeriesEntry, reason: str) -> SeriesEntry:
        """Note that an image cannot be used, so that it is passed over. Returns the new entry."""
        return self._replace(entry, status="unreadable", note=reason)

    def open(self, entry: SeriesEntry) -> LazyImage:
        """Open an image.

        Raises:
            InvalidInputError: If it cannot be read, or is no volume though the series is of volumes, or the other way
                round. The entry is unreadable then.
        """
        try:
            return open_image(entry.source, ndim=3 if self.is_volumetric else 2, **self._image_options)
        except MicroSamError as error:
            self.mark_unreadable(entry, str(error))
            raise

    def load_result(self, entry: SeriesEntry, shape: Sequence[int] | None = None) -> np.ndarray | None:
        """Return the labels that were written for an image, or None if there are none yet.

        Args:
            entry: The image.
            shape: Its shape without channels, to check the labels.

        Raises:
            InvalidInputError: If the file holds no labels, or labels of another shape.
        """
        return self._load(entry.output, entry, shape) if entry.output.exists() else None

    def load_initial(self, entry: SeriesEntry, shape: Sequence[int] | None = None) -> np.ndarray | None:
        """Return a copy of the labels to start from, or None if there are none; see `load_result`."""
        return None if entry.initial is None else self._load(entry.initial, entry, shape)

    def _load(self, source: Any, entry: SeriesEntry, shape: Sequence[int] | None) -> np.ndarray:
        return read_label_image(source, 3 if self.is_volumetric else 2, shape, f"the labels of {entry.name}")

    def questions(self, entry: SeriesEntry, labels: np.ndarray) -> list[Question]:
        """Return what the user has to confirm before `finish` writes these labels."""
        questions = [confirm_empty(labels)]
        if entry.output.exists() and mark_of(entry.output) is None:
            text = f"{entry.output} was not written by this annotator. Replace it?"
            questions.append(Question("replace", text))
        return [q for q in questions if q is not None]

    def finish(self, entry: SeriesEntry, labels: np.ndarray, *, overwrite: bool = False) -> SeriesEntry:
        """Write the labels of an image, completely or not at all; an earlier result of the series is replaced.

        Args:
            entry: The image.
            labels: Its labels (Y, X) or (Z, Y, X); 0 is background.
            overwrite: Whether to replace a file that was not written by this annotator, too.

        Returns:
            The entry with its new status.

        Raises:
            OutputExistsError: If there is a file of another program, and `overwrite` is not set.
            OutputWriteError: If the file cannot be written.
            InvalidInputError: If these are no labels.
        """
        labels, ndim = check_labels(labels), 3 if self.is_volumetric else 2
        if labels.ndim != ndim:
            raise InvalidInputError(f"The labels of {entry.name} must have {ndim} axes, but have {labels.ndim}.")
        if not overwrite and entry.output.exists() and mark_of(entry.output) is None:
            raise OutputExistsError(
                f"{entry.output} was not written by this annotator. Pass overwrite=True to replace it, or choose "
                "another output folder."
            )
        write_labels(entry.output, labels, {"series": {"source": entry.name}})
        return self._replace(entry, status="done", note="")


def read_label_image(
    source: Any, ndim: int, shape: Sequence[int] | None, what: str, *, key: str | None = None
) -> np.ndarray:
    """Read a label image and check it against its image.

    Args:
        source: Path or array.
        ndim: 2 or 3.
        shape: Shape of the image without channels; None does not check it.
        what: How errors call it.
        key: Its name in a container.

    Returns:
        A new array, so that editing it does not change what was passed.

    Raises:
        InvalidInputError: If these are no labels, or they do not fit the image.
    """
    image = open_image(source, key, ndim=ndim)
    where = f" ({image.name})" if isinstance(source, str | os.PathLike) else ""
    if image.dtype.kind not in "bui" or image.has_channels:
        raise InvalidInputError(
            f"{what[0].upper()}{what[1:]}{where} must be a label image with one integer per pixel, but have axes "
            f"{image.axes} and dtype {image.dtype}. Choose another file."
        )
    if shape is not None and image.shape != tuple(shape):
        raise InvalidInputError(
            f"{what[0].upper()}{what[1:]}{where} have the shape {image.shape}, but the image has {tuple(shape)}. "
            "Choose the labels of this image."
        )
    return np.array(check_labels(image.read()))


def plan_series(
    images: str | os.PathLike | Sequence[Any],
    output_folder: str | os.PathLike,
    *,
    pattern: str = "*",
    is_volumetric: bool = False,
    initial_segmentations: Sequence[Any] | None = None,
    initial_folder: str | os.PathLike | None = None,
    initial_pattern: str = "*",
    embedding_folder: str | os.PathLike | None = None,
    skip_segmented: bool = True,
    has_journal: Callable[[SeriesEntry], bool] | None = None,
    image_options: Mapping[str, Any] | None = None,
) -> Series:
    """Plan the annotation of a series of images; nothing but the empty output folder is written.

    Results are `<name of the image>.tif`, embeddings `<name of the image>.zarr`; for arrays `seg_<index>.tif` and
    `embedding_<index>.zarr`. Where names collide, something that differs is appended.

    Args:
        images: A folder, or a list of paths, or a list of arrays.
        output_folder: Where the results go; with those that are there already, the work goes on.
        pattern: Which files of the folder to take; other files than images are left out.
        is_volumetric: Whether the images are volumes.
        initial_segmentations: Labels to start from, paths or arrays, for each image. Paths whose names fit the images
            are paired by name, otherwise the lists belong together as they are.
        initial_folder: A folder with labels to start from, paired with the images by name.
        initial_pattern: Which files of that folder to take.
        embedding_folder: Where embeddings are kept.
        skip_segmented: Whether images that are done are passed over.
        has_journal: Tells whether there is unfinished work for an image.
        image_options: More arguments of `open_image`, such as `channel` or `key`, for all images.

    Raises:
        MissingFileError: If a file or folder does not exist, or no image matches.
        InvalidInputError: If results or embeddings would replace images, or initial segmentations do not fit.
        OutputExistsError: If the place of a result is taken by something else.
        OutputWriteError: If the output folder cannot be written.
    """
    folder = Path(output_folder).expanduser()
    sources, notes = find_sources(images, pattern, folder)
    are_paths = isinstance(sources[0], Path)
    if are_paths:
        names = distinct_names(sources)
        outputs = output_paths(sources, names, folder)
    else:
        names = [f"embedding_{i:05}" for i in range(len(sources))]
        outputs = [folder / f"seg_{i:05}.tif" for i in range(len(sources))]
    embeddings: list[Path | None] = [None] * len(sources)
    if embedding_folder is not None:
        embeddings = [Path(embedding_folder).expanduser() / f"{name}.zarr" for name in names]
    initial = find_initial(sources, initial_segmentations, initial_folder, initial_pattern)
    refuse_overlap(sources, outputs, "image", "output folder")
    refuse_overlap(initial, outputs, "initial segmentation", "output folder")
    refuse_overlap(sources, embeddings, "image", "embedding folder")
    entries = [
        SeriesEntry(i, sources[i].name if are_paths else f"image {i}", sources[i], outputs[i], embeddings[i], start)
        for i, start in enumerate(initial)
    ]
    series = Series(
        entries, is_volumetric=is_volumetric, skip_segmented=skip_segmented, has_journal=has_journal, notes=notes,
        image_options=image_options,
    )
    for entry in series:
        _check_result(entry, 3 if is_volumetric else 2)
    prepare_folder(outputs[0])
    return series


def _problem_of(source: Any) -> str:
    """Why an image cannot be opened, as far as it is seen without opening it; an empty text if nothing is wrong."""
    if not isinstance(source, Path):
        return "" if 0 not in source.shape else f"its shape is {tuple(source.shape)}"
    if not source.exists():
        return f"{source} does not exist any more"
    if source.is_file() and source.stat().st_size == 0:
        return f"{source} is an empty file"
    if not is_zarr(source) and suffix_of(source) not in SUFFIXES:
        return f"{source} has none of the suffixes of images that can be read: {', '.join(SUFFIXES)}"
    return ""


def _check_result(entry: SeriesEntry, ndim: int) -> None:
    """Refuse an existing file in the place of a result that is none, before somebody works for it in vain."""
    if entry.status != "done" or mark_of(entry.output) is not None:
        return
    if read_record(entry.output) is not None:
        raise OutputExistsError(
            f"{entry.output} is a result of the automatic segmentation. Pass its folder as the one with the initial "
            "segmentations, and choose another output folder."
        )
    if not _may_hold_labels(entry.output, ndim):
        raise OutputExistsError(
            f"{entry.output} exists and is not a label image with {ndim} axes, so it is no result for {entry.name}. "
            "Choose another output folder."
        )


def _may_hold_labels(path: Path, ndim: int) -> bool:
    """Whether the header of a tif fits a label image; other versions leave no mark in their results."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            image = file.series[0]
            return np.dtype(image.dtype).kind in "bui" and sum(size > 1 for size in image.shape) <= ndim
    except Exception:  # tifffile has many errors for damaged files
        return False
