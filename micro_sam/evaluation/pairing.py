"""Which prediction belongs to which ground truth: by the names of the files, or else by their order."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, MissingFileError
from ..core.image import load_image_data
from ..core.inputs import InputFile, find_inputs
from ..core.output import label_stem
from ..core.readers import is_zarr
from .errors import MissingInputError, UnfitInputsError

LabelImage = np.ndarray | str | os.PathLike

FOLDER, PREFIX = "folder", "prefix"


def natural_key(path: str | os.PathLike) -> list[tuple[int, int, str]]:
    """Sorts names with numbers as people do: image2 before image10."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def find_files(
    paths: Sequence[str | os.PathLike], pattern: str | None = None, recursive: bool = False
) -> list[InputFile]:
    """List image files: files as they are given, those of folders and patterns in natural order.

    Args:
        paths: Files, folders, or patterns such as `data/*.tif`.
        pattern: Which files of the folders to take; None takes all with the suffix of an image format.
        recursive: Whether to look into sub-folders as well.

    Raises:
        MissingInputError: If a path does not exist, or nothing matches.
    """
    found: list[InputFile] = []
    for path in paths:
        try:
            files = find_inputs(path, pattern if is_folder(path) else None, recursive)
        except MissingFileError as error:
            raise MissingInputError(str(error)) from error
        found += sorted(files, key=lambda file: natural_key(file.path))
    return found


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of files, not a zarr container."""
    path = Path(path).expanduser()
    return path.is_dir() and not is_zarr(path)


def pair_paths(
    first: Sequence[str | os.PathLike],
    second: Sequence[str | os.PathLike],
    what: tuple[str, str],
    patterns: tuple[str | None, str | None] = (None, None),
    recursive: bool = False,
) -> list[tuple[Path, Path]]:
    """Pair the files that are meant by two lists of files, folders or patterns; see `find_files` and `pair_files`.

    The files of equally many folders are paired folder by folder.
    """
    folders = [is_folder(path) for path in (*first, *second)]
    groups = zip(first, second) if len(first) == len(second) and all(folders) else [(first, second)]
    pairs = []
    for group in groups:
        files = [
            find_files([paths] if isinstance(paths, str | os.PathLike) else paths, pattern, recursive)
            for paths, pattern in zip(group, patterns)
        ]
        pairs += [(a.path, b.path) for a, b in pair_files(*files, what)]
    return pairs


def pair_files(first: Sequence[Any], second: Sequence[Any], what: tuple[str, str]) -> list[tuple[Any, Any]]:
    """Pair two lists of files or arrays.

    Files are paired by their names without suffix, if these are unique and the same in both lists. If no name is in
    both, or names occur twice, or there are arrays, the order decides.

    Args:
        first: Paths, files with sub-folders, or arrays.
        second: Likewise.
        what: What both are, for messages, for example ("ground truths", "predictions").

    Raises:
        UnfitInputsError: If a list is empty, their lengths differ, or just some of the names are in both.
    """
    names = [[_name(item) for item in items] for items in (first, second)]
    by_name = [dict(zip(of_list, items)) for of_list, items in zip(names, (first, second))]
    common = {*by_name[0]} & {*by_name[1]} - {None}
    lonely = sorted(str(name) for name in {*by_name[0]} ^ {*by_name[1]}) if common else []
    if not first or len(first) != len(second) or lonely:
        hint = f" Without partner: {', '.join(lonely[:5])}{' ...' if len(lonely) > 5 else ''}." if lonely else ""
        raise UnfitInputsError(
            f"There are {len(first)} {what[0]} and {len(second)} {what[1]}, which do not fit to each other.{hint} "
            "Give one for each, with the same names or in the same order."
        )
    if len(common) == len(first):
        return [(item, by_name[1][name]) for name, item in by_name[0].items()]
    return list(zip(first, second))


def _name(item: Any) -> str | None:
    """The name of a file without its suffix, within the folder that was searched; None for arrays."""
    if isinstance(item, InputFile):
        return (item.folder / label_stem(item.path)).as_posix()
    return label_stem(item) if isinstance(item, str | os.PathLike) else None


def image_name(item: Any, position: int) -> str:
    """Name of an image in tables: the file's, or `image <n>` for arrays."""
    return _name(item) or f"image {position + 1}"


def group_names(paths: Sequence[Path], group_by: str | None) -> list[str]:
    """Name the group (modality, kind of cell) that each image belongs to.

    Args:
        paths: The image files.
        group_by: `folder` for the name of the folder in which they differ first; `prefix` for the file name up to its
            last underscore; or a regular expression that is matched with the beginning of the file name, and of which
            the first group (or all of it) names the group. None puts all into one group, `all`.

    Raises:
        InvalidInputError: If the expression is wrong or does not match a name.
    """
    if group_by is None:
        return ["all"] * len(paths)
    if group_by == FOLDER:
        folders = [path.resolve().parent for path in paths]
        root = Path(os.path.commonpath(folders))
        return [(*folder.relative_to(root).parts, root.name)[0] for folder in folders]
    stems = [label_stem(path) for path in paths]
    if group_by == PREFIX:
        return [stem.rpartition("_")[0] or stem for stem in stems]
    try:
        expression = re.compile(group_by)
    except re.error as error:
        raise InvalidInputError(
            f"group_by must be 'folder', 'prefix' or a regular expression, but {group_by!r} is none: {error}."
        ) from error
    names = []
    for stem in stems:
        match = expression.match(stem)
        name = match and (match[1] if expression.groups else match[0])
        if not name:
            raise InvalidInputError(f"group_by={group_by!r} does not match the name {stem!r}. Change the expression.")
        names.append(name)
    return names


def read_label_image(item: LabelImage, key: str | None = None) -> np.ndarray:
    """Read a label image; leading axes of length one are dropped. Arrays pass through.

    Raises:
        MissingInputError: If the file does not exist.
        ImageReadError: If it cannot be read.
    """
    if not isinstance(item, str | os.PathLike):
        return np.asarray(item)
    if not Path(item).expanduser().exists():
        raise MissingInputError(f"There is no file {item}. Check the path.")
    labels = load_image_data(item, key)
    return labels.reshape(labels.shape[next((k for k, n in enumerate(labels.shape[:-2]) if n != 1), -2):])
