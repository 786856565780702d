"""The files of a series: which images, where the results go, and which label image belongs to which image."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInputError, InvalidTypeError, MissingFileError
from ..core.inputs import find_inputs
from ..core.output import label_stem, read_record
from ..core.readers import SUFFIXES, is_zarr, suffix_of


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def find_sources(images: Any, pattern: str, output_folder: Path) -> tuple[list[Any], list[str]]:
    """Return the images, either all paths or all arrays, and notes on what was left out."""
    if isinstance(images, str | os.PathLike):
        return _folder_images(Path(images).expanduser(), pattern, output_folder)
    if _is_array(images):
        raise InvalidTypeError("A series is a list of images, but one array was given. Pass a list of arrays.")
    images = list(images)
    if not images:
        raise InvalidInputError("The list of images is empty. Pass a folder, or at least one path or array.")
    if all(_is_array(image) for image in images):
        return images, []
    if not all(isinstance(image, str | os.PathLike) for image in images):
        kinds = ", ".join(sorted({type(image).__name__ for image in images}))
        raise InvalidTypeError(f"A series is a list of paths or a list of arrays, but this one has: {kinds}.")
    paths = [Path(image).expanduser() for image in images]
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise MissingFileError(f"There is no file {_listed(missing)}. Check the paths.")
    resolved = [p.resolve() for p in paths]
    twice = sorted({str(p) for p, r in zip(paths, resolved) if resolved.count(r) > 1})
    if twice:
        raise InvalidInputError(f"The series has an image more than once: {_listed(twice)}. Name each image once.")
    return paths, []


def _folder_images(folder: Path, pattern: str, output_folder: Path | None = None) -> tuple[list[Path], list[str]]:
    if folder.exists() and (not folder.is_dir() or is_zarr(folder)):
        raise InvalidInputError(f"{folder} is one image, not a folder. Pass a folder with images, or a list of paths.")
    found = [file.path for file in find_inputs(folder, pattern)]
    images, results, others = [], [], []
    for path in found:
        # In a common folder the results of an earlier run match the pattern as well.
        in_output = output_folder is not None and path.parent.resolve() == output_folder.resolve()
        if not is_zarr(path) and suffix_of(path) not in SUFFIXES:
            others.append(path.name)
        elif in_output and mark_of(path) is not None:
            results.append(path.name)
        else:
            images.append(path)
    notes = [f"{len(others)} files are no images and were left out: {_listed(others)}."] if others else []
    if results:
        notes.append(f"{len(results)} files are results of this series: {_listed(results)}.")
    if not images:
        raise MissingFileError(
            f"There is no image that matches {pattern!r} in the folder {folder}. {' '.join(notes)} Check folder and "
            "pattern."
        )
    return images, notes


def _listed(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def mark_of(path: Path) -> dict[str, Any] | None:
    """Return what `Series.finish` wrote into a result, None for other files."""
    record = read_record(path)
    return None if record is None else (record.get("settings") or {}).get("series")


def output_paths(sources: Sequence[Path], names: Sequence[str], folder: Path) -> list[Path]:
    """Return where the results go; those of an earlier run keep their places, though names collide now."""
    outputs = []
    for source, name in zip(sources, names):
        plain, older = folder / f"{label_stem(source)}.tif", folder / f"{source.stem}.tif"
        chosen = folder / f"{name}.tif"
        if chosen != plain and ((mark_of(plain) if plain.exists() else None) or {}).get("source") == source.name:
            chosen = plain
        elif chosen == plain != older and older.exists() and not plain.exists():
            chosen = older  # other versions keep the `.ome` of `a.ome.tif`
        outputs.append(chosen if chosen not in outputs else folder / f"{name}.tif")
    return outputs


def refuse_overlap(inputs: Sequence[Any], outputs: Sequence[Path | None], what: str, option: str) -> None:
    """Raise `InvalidInputError` if an output would replace an input; inputs that are no paths do not count."""
    files = {p.resolve() for p in inputs if isinstance(p, Path)}
    same = [str(p) for p in outputs if p is not None and p.resolve() in files]
    if same:
        raise InvalidInputError(f"The series would replace the {what} {_listed(same)}. Choose another {option}.")


def find_initial(sources: Sequence[Any], segmentations: Any, folder: Any, pattern: str) -> list[Any]:
    """Return the labels to start from for each image, as path or array, or None."""
    if segmentations is None and folder is None:
        return [None] * len(sources)
    if segmentations is not None and folder is not None:
        raise InvalidInputError("Pass either a list of initial segmentations or a folder with them, not both.")
    if folder is not None:
        if not isinstance(sources[0], Path):
            raise InvalidInputError(
                "Initial segmentations in a folder are paired with images by name, but arrays have none. Pass a list "
                "of segmentations in the order of the images."
            )
        found, _ = _folder_images(Path(folder).expanduser(), pattern)
        return pair_by_name(sources, found)
    segmentations = [Path(s).expanduser() if isinstance(s, str | os.PathLike) else s for s in segmentations]
    if len(segmentations) != len(sources):
        raise InvalidInputError(
            f"{len(segmentations)} initial segmentations were given for {len(sources)} images. Pass one for each."
        )
    paths = [s for s in segmentations if isinstance(s, Path)]
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise MissingFileError(f"There is no initial segmentation {_listed(missing)}. Check the paths.")
    if isinstance(sources[0], Path) and len(paths) == len(sources):
        return pair_by_name(sources, paths, is_ordered=True)
    return segmentations


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name without suffix for each image: that of its file, with what differs where names collide.

    `a.tif` and `a.png` become `a_tif` and `a_png`, `x/a.tif` and `y/a.tif` become `x_a` and `y_a`. Names that differ
    only in case collide too, as some file systems do not tell them apart.
    """
    stems = [label_stem(p) for p in paths]
    suffixes = [p.name[len(stem):].replace(".", "_") for p, stem in zip(paths, stems)]
    folders = [p.absolute().parent.name for p in paths]
    names = stems
    # Each variant is for those names that the variants before it did not make distinct.
    for variant in (
        [f"{stem}{suffix}" for stem, suffix in zip(stems, suffixes)],
        [f"{folder}_{stem}" for folder, stem in zip(folders, stems)],
        [f"{folder}_{stem}{suffix}" for folder, stem, suffix in zip(folders, stems, suffixes)],
        [f"{folder}_{stem}{suffix}_{n}" for n, (folder, stem, suffix) in enumerate(zip(folders, stems, suffixes))],
    ):
        counts = Counter(name.casefold() for name in names)
        names = [v if counts[name.casefold()] > 1 else name for name, v in zip(names, variant)]
    return names


def pair_by_name(images: Sequence[Path], labels: Sequence[Path], *, is_ordered: bool = False) -> list[Path]:
    """Return the label image for each image: that of the same name, or with the same text before or after each name.

    Args:
        images: The images.
        labels: The label images, for example `a_mask.tif` for `a.tif`.
        is_ordered: Whether the lists belong together as they are, if no name fits.

    Raises:
        InvalidInputError: If there is not exactly one label image for each image; names those that do not match.
    """
    stems = [label_stem(p) for p in images]
    by_name = {label_stem(p): p for p in labels}
    if is_ordered and (len(by_name) < len(labels) or len(set(stems)) < len(stems)):
        return list(labels)
    best: dict[str, Path] = {}
    for before, after in [("", ""), *sorted(_additions(stems, list(by_name)))]:
        found = {stem: by_name[f"{before}{stem}{after}"] for stem in stems if f"{before}{stem}{after}" in by_name}
        if len(found) > len(best):
            best = found
    if len(best) == len(stems) == len(labels):
        return [best[stem] for stem in stems]
    if is_ordered and not best:
        return list(labels)
    lonely = [p.name for p, stem in zip(images, stems) if stem not in best]
    unused = [p.name for p in labels if p not in set(best.values())]
    parts = [
        f"{what}: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
        for what, names in (("images without one", lonely), ("segmentations without image", unused)) if names
    ] or ["images in different folders have the same name"]
    raise InvalidInputError(
        f"The initial segmentations do not fit the images by their names ({'; '.join(parts)}). Name each like its "
        "image, or with the same text before or after the name, or choose the files with a pattern."
    )


def _additions(stems: Sequence[str], names: Sequence[str]) -> set[tuple[str, str]]:
    """What label images may have before and after the names of their images, to judge by a few images."""
    return {
        (name[:match.start()], name[match.end():])
        for stem in stems[:5] for name in names for match in re.finditer(re.escape(stem), name)
    }
