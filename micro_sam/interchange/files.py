"""Read and write labels in any of the formats of `formats`.

The module of a format has `read_steps(path, target)`, `write_steps(path, image, name)` and
`read_content(path, name)`, which gives what an earlier `write_steps` noted about the labels.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, MissingFileError, OutputExistsError
from ..core.progress import Steps, drain
from .formats import Format, find_format, format_to_read, output_path
from .label_image import LabelImage
from .pieces import Target


def _module(row: Format) -> Any:
    return import_module(f".{row.module}", __package__)


def read_labels_steps(
    path: str | os.PathLike,
    format: str | None = None,
    shape: Sequence[int] | None = None,
    *,
    axes: str | None = None,
    like: Any = None,
    key: str | None = None,
) -> Steps[LabelImage]:
    """Generator behind `read_labels`: yields a `Step` per plane and returns the labels."""
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingFileError(f"There is no file or folder {path}. Check the path.")
    row = format_to_read(path) if format is None else find_format(format)
    target = _make_target(shape, axes, like, key)
    image = yield from _module(row).read_steps(path, target)
    if target.shape is not None and image.labels.shape != target.shape:
        raise InvalidInputError(
            f"The labels in {path} have the shape {image.labels.shape}, but {target.shape} was asked for. Check that "
            "they belong to this image."
        )
    return image


def _make_target(shape: Sequence[int] | None, axes: str | None, like: Any, key: str | None) -> Target:
    if like is None:
        return Target(None if shape is None else tuple(int(s) for s in shape), axes, key=key)
    if shape is not None:
        raise InvalidInputError("like and shape say the same. Pass one of them.")
    from ..core.image import open_image

    image = open_image(like)
    return Target(image.shape, axes or image.axes.replace("C", ""), image.scale, key=key)


def read_labels(
    path: str | os.PathLike,
    format: str | None = None,
    shape: Sequence[int] | None = None,
    *,
    axes: str | None = None,
    like: Any = None,
    key: str | None = None,
) -> LabelImage:
    """Read labels from a file of any format.

    What a file holds that a label image cannot (overlaps, points, lines) is said in warnings with counts.

    Args:
        path: The file, or zarr folder.
        format: Its format, one of `FORMAT_NAMES`; by default found by name and content.
        shape: Shape (Y, X) or (Z, Y, X) of the image, for files of outlines that do not tell.
        axes: `ZYX` or `TYX`, where the file does not tell whether a stack is over time.
        like: The image that the labels belong to (path or array), instead of `shape`; pixel sizes come from it too.
        key: Which labels, in a file with several: of an OME-Zarr image or hdf5 by name, of COCO by file name.

    Returns:
        The labels, with names, classes and pixel size as far as the file holds them.

    Raises:
        MissingFileError: If there is no such file.
        ImageReadError: If it is damaged or of another format.
        InvalidInputError: If the shape is needed, or does not fit.
    """
    return drain(read_labels_steps(path, format, shape, axes=axes, like=like, key=key), verbose=False)


def write_labels_steps(
    path: str | os.PathLike,
    labels: LabelImage | np.ndarray,
    format: str | None = None,
    *,
    axes: str | None = None,
    names: Mapping[int, str] | None = None,
    classes: Mapping[int, str] | None = None,
    scale: Sequence[float] | None = None,
    units: Sequence[str | None] | None = None,
    name: str = "segmentation",
    overwrite: bool = False,
) -> Steps[Path]:
    """Generator behind `write_labels`: yields a `Step` per plane and returns the path."""
    path, row = output_path(path, format)
    image = labels
    facts = {"axes": axes, "names": names, "classes": classes, "scale": scale, "units": units}
    given = {key: value for key, value in facts.items() if value is not None}
    if not isinstance(image, LabelImage):
        image = LabelImage(labels, **given)
    elif given:
        raise InvalidInputError(f"A LabelImage has its own {', '.join(given)}. Leave them out, or pass an array.")
    if not is_written(path, image, row.name, name=name, overwrite=overwrite):
        yield from _module(row).write_steps(path, image, name)
    return _target(path, row, name)


def _target(path: Path, row: Format, name: str) -> Path:
    """Where the labels are written."""
    return _module(row).labels_path(path, name) if row.name == "ome-zarr" else path


def is_written(
    path: Path, image: LabelImage, format: str, *, name: str = "segmentation", overwrite: bool = False
) -> bool:
    """Whether the same labels are there already, as this package wrote them.

    Args:
        path: The output.
        image: The labels.
        format: The format of the output.
        name: The name of the labels in an OME-Zarr image.
        overwrite: Whether it is replaced anyway.

    Raises:
        OutputExistsError: If something else is there, and `overwrite` is not set.
    """
    row = find_format(format)
    target = _target(path, row, name)
    if overwrite or not target.exists():
        return False
    found = _module(row).read_content(path, name) or {}
    return _check_same(target, found.get("hash") == image.content()["hash"])


def _check_same(path: Path, same: bool) -> bool:
    if not same:
        raise OutputExistsError(
            f"{path} exists and holds something else. Pass overwrite (--overwrite) to replace it, or choose another "
            "output."
        )
    return True


def write_labels(
    path: str | os.PathLike,
    labels: LabelImage | np.ndarray,
    format: str | None = None,
    *,
    axes: str | None = None,
    names: Mapping[int, str] | None = None,
    classes: Mapping[int, str] | None = None,
    scale: Sequence[float] | None = None,
    units: Sequence[str | None] | None = None,
    name: str = "segmentation",
    overwrite: bool = False,
) -> Path:
    """Write labels to a file of any format that can be written, completely or not at all.

    If the same labels are there already, nothing is done.

    Args:
        path: The file. If it is an OME-Zarr image, the labels are added to it as `labels/<name>`.
        labels: The labels, with all that is known about them; or an array, and what follows.
        format: The format, one of `FORMAT_NAMES`; by default found by the suffix.
        axes: `YX`, `ZYX` or `TYX`.
        names: Id -> name.
        classes: Id -> class.
        scale: Pixel size per axis.
        units: Unit of the scale per axis.
        name: The name of the labels in an OME-Zarr image.
        overwrite: Whether to replace an existing file.

    Returns:
        Where the labels are.

    Raises:
        InvalidInputError: If the format is unknown or only read, or something does not fit the labels.
        OutputExistsError: If something else is there, and `overwrite` is not set.
        OutputWriteError: If it could not be written; then nothing of it is left.
    """
    steps = write_labels_steps(
        path, labels, format, axes=axes, names=names, classes=classes, scale=scale, units=units, name=name,
        overwrite=overwrite,
    )
    return drain(steps, verbose=False)


def write_coco_dataset(
    path: str | os.PathLike, images: Iterable[tuple[str, LabelImage | np.ndarray]], *, overwrite: bool = False
) -> Path:
    """Write the labels of several images into one COCO dataset.

    Args:
        path: The JSON file.
        images: Pairs of the file name of an image and its labels. They may come from a generator.
        overwrite: Whether to replace an existing file.

    Returns:
        The path.

    Raises:
        InvalidInputError: If two images have the same name.
        OutputExistsError: If something else is there, and `overwrite` is not set.
    """
    return drain(write_coco_dataset_steps(path, images, overwrite=overwrite), verbose=False)


def write_coco_dataset_steps(
    path: str | os.PathLike, images: Iterable[tuple[str, LabelImage | np.ndarray]], *, overwrite: bool = False
) -> Steps[Path]:
    """Generator behind `write_coco_dataset`: yields a `Step` per plane."""
    from .coco import encode_dataset_steps, read_contents, write_dataset

    path = output_path(path, "coco")[0]
    pairs = ((name, labels if isinstance(labels, LabelImage) else LabelImage(labels)) for name, labels in images)
    dataset = yield from encode_dataset_steps(pairs)
    if overwrite or not path.exists() or not _check_same(path, read_contents(path) == dataset.contents):
        write_dataset(path, dataset)
    return path
