"""Which files are meant by paths, folders and patterns, and what their outputs are called."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidInputError, MissingFileError
from .output import label_stem
from .readers import SUFFIXES, is_zarr, suffix_of


@dataclass(frozen=True)
class InputFile:
    """An image file (or zarr folder), and its folder relative to the folder that was asked for."""

    path: Path
    folder: Path = Path()


def has_pattern(text: str) -> bool:
    """Whether a text has wildcards."""
    return any(c in text for c in "*?[")


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    """Files and zarr folders, not the inside of zarr folders and no hidden files."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() or is_zarr(entry):
            yield entry
        elif recursive and entry.is_dir():
            yield from _walk(entry, recursive)


def _in_folder(folder: Path, pattern: str | None, recursive: bool) -> list[Path]:
    if pattern is None:
        return [p for p in _walk(folder, recursive) if is_zarr(p) or suffix_of(p) in SUFFIXES]
    if recursive:
        return [p for p in _walk(folder, True) if p.match(pattern)]
    matches = (Path(p) for p in glob.glob(str(folder / pattern), recursive=True))
    return sorted(p for p in matches if p.is_file() or is_zarr(p))


def find_inputs(
    paths: str | os.PathLike | Sequence[str | os.PathLike], pattern: str | None = None, recursive: bool = False
) -> list[InputFile]:
    """List the images that are meant.

    Args:
        paths: Files, zarr folders, folders, or patterns such as `data/*.tif`.
        pattern: Which files of the folders to take; None takes all with the suffix of an image format.
        recursive: Whether to look into subfolders as well.

    Returns:
        The images, each once; those of a folder or pattern sorted by name.

    Raises:
        MissingFileError: If a path does not exist, or nothing matches.
        InvalidInputError: If a pattern was given, but no folder.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: dict[Path, InputFile] = {}
    n_folders = 0
    for path in (Path(p).expanduser() for p in paths):
        if path.is_dir() and not is_zarr(path):
            n_folders += 1
            matches = _in_folder(path, pattern, recursive)
            what = "with the suffix of an image format" if pattern is None else f"that matches {pattern!r}"
            if not matches:
                raise MissingFileError(f"There is no file {what} in the folder {path}. Check folder and pattern.")
            new = [InputFile(p, p.parent.relative_to(path)) for p in matches]
        elif path.exists():
            new = [InputFile(path)]
        elif has_pattern(str(path)):
            new = [InputFile(Path(p)) for p in sorted(glob.glob(str(path), recursive=True))]
            if not new:
                raise MissingFileError(f"No file matches the pattern {str(path)!r}. Check it.")
        else:
            raise MissingFileError(f"There is no file or folder {path}. Check the path.")
        for file in new:
            found.setdefault(file.path.resolve(), file)
    if pattern is not None and not n_folders:
        raise InvalidInputError(f"The pattern {pattern!r} selects files of a folder, but no folder was given.")
    return list(found.values())


def name_outputs(inputs: Sequence[InputFile], folder: Path, suffix: str) -> list[Path]:
    """Return `<folder>/<subfolder>/<stem of the input><suffix>` for each input.

    Raises:
        InvalidInputError: If two inputs would have the same output.
    """
    outputs: dict[Path, InputFile] = {}
    for file in inputs:
        output = folder / file.folder / f"{label_stem(file.path)}{suffix}"
        if output in outputs:
            raise InvalidInputError(
                f"{outputs[output].path} and {file.path} would both be written to {output}. Rename one of them, or "
                "process them one after the other with different outputs."
            )
        outputs[output] = file
    return list(outputs)
