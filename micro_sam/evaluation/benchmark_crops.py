"""The parts of images and volumes that a benchmark looks at: those with the most objects."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from ..core.image import LazyImage, open_image
from ..core.output import is_same, temporary_path, write_json, write_labels
from ..core.progress import Step, Steps
from .benchmark_catalogue import BenchmarkDataset
from .errors import UnfitInputsError

CROP_SHAPES = {2: (512, 512), 3: (32, 512, 512)}
N_CROPS = 10

Window = tuple[slice, ...]


@dataclass(frozen=True)
class CropFiles:
    """The crops of a dataset: images and their labels, in files of the same names."""

    images: list[Path]
    labels: list[Path]


def tile_windows(shape: Sequence[int], tile_shape: Sequence[int]) -> Iterator[Window]:
    """Cut an image into tiles that do not overlap, in raster order.

    Only whole tiles are taken: what is left over at the upper ends of the axes is not. Along an axis that is shorter
    than the tile, the tile is as long as the axis.
    """
    tile = [min(size, wanted) for size, wanted in zip(shape, tile_shape, strict=True)]
    starts = [range(0, size - side + 1, side) for size, side in zip(shape, tile)]
    for corner in product(*starts):
        yield tuple(slice(start, start + side) for start, side in zip(corner, tile))


def plane_windows(shape: Sequence[int], tile_shape: Sequence[int], n_planes: int) -> Iterator[Window]:
    """Cut some planes of a volume (Z, Y, X), evenly spaced, into tiles; each window is one plane thick."""
    depth = int(shape[0])
    for z in np.unique(np.linspace(0, depth - 1, min(depth, n_planes)).round().astype(int)).tolist():
        for window in tile_windows(shape[1:], tile_shape):
            yield slice(z, z + 1), *window


def rank_windows(labels: Any, windows: Sequence[Window], n: int) -> list[Window]:
    """Return the windows with the most objects, the fullest first; windows without objects are left out.

    Args:
        labels: Label image, may be lazy: only the windows are read, one at a time.
        windows: The windows; earlier ones come first among equals.
        n: The number of windows, at most.
    """
    counts = [_count_objects(labels[window]) for window in windows]
    order = sorted((k for k, count in enumerate(counts) if count), key=lambda k: -counts[k])
    return [windows[k] for k in order[:n]]


def _count_objects(labels: Any) -> int:
    ids = np.unique(np.asarray(labels))
    return int(np.count_nonzero(ids > 0))


def describe_files(paths: Sequence[Path]) -> list[list]:
    """Name, size and time of change of files: tells whether they are still the same, without reading them."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def crop_steps(
    row: BenchmarkDataset, pairs: Sequence[tuple[Path, Path]], folder: Path, ndim: int, n_crops: int = N_CROPS,
    overwrite: bool = False,
) -> Steps[CropFiles]:
    """Write the crops of a dataset. Yields `Step`, returns their files; those that are there already are kept.

    They are `<folder>/inputs/<dataset>_<number>.tif` and the same in `labels`. From each image come up to `n_crops`
    tiles of 512 x 512 pixels, or of 32 x 512 x 512 voxels; for crops of two dimensions of a volume these tiles are
    taken from `n_crops` of its planes.

    Args:
        row: The dataset.
        pairs: Its image and label files.
        folder: Where to write.
        ndim: Dimensions of the crops; 2 or 3 for volumes.
        n_crops: The number of crops per file, at most.
        overwrite: Whether to replace crops that were made from other files.

    Raises:
        UnfitInputsError: If an image and its labels have different shapes.
        OutputExistsError: If there are crops that were made from other files.
    """
    record = folder / "crops.json"
    settings = {
        "dataset": row.name, "n_crops": n_crops, "crop_shape": list(CROP_SHAPES[ndim]),
        "files": describe_files([path for pair in pairs for path in pair]),
    }
    text = f"Crop {row.name} ({ndim}D)"
    if not overwrite and is_same(record, settings):
        return _existing(folder, json.loads(record.read_text(encoding="utf-8"))["micro_sam"]["n_found"])
    yield Step(0, len(pairs), text)
    n_found = 0
    for n, (image_path, label_path) in enumerate(pairs):
        image, labels = _open_pair(row, image_path, label_path)
        if ndim == row.ndim:
            windows = list(tile_windows(labels.shape, CROP_SHAPES[ndim]))
        else:
            windows = list(plane_windows(labels.shape, CROP_SHAPES[ndim], n_crops))
        for window in rank_windows(labels.data, windows, n_crops):
            _write_crop(folder, f"{row.name}_{n_found:05}.tif", image, labels, window, ndim, row.split_components)
            n_found += 1
        yield Step(n + 1, len(pairs), text)
    # Last, so that crops without it are incomplete.
    write_json(record, {"micro_sam": {"settings": settings, "n_found": n_found}})
    return _existing(folder, n_found)


def _existing(folder: Path, n: int) -> CropFiles:
    files = CropFiles(*(sorted((folder / kind).glob("*.tif"))[:n] for kind in ("inputs", "labels")))
    if not len(files.images) == len(files.labels) == n:
        raise InvalidInputError(
            f"There should be {n} crops in {folder}, but some of the files are missing. Delete this folder."
        )
    return files


def _open_pair(row: BenchmarkDataset, image_path: Path, label_path: Path) -> tuple[LazyImage, LazyImage]:
    keys = row.image_key if isinstance(row.image_key, tuple) else (row.image_key,)
    channels = [open_image(image_path, key, ndim=row.ndim, axes=row.image_axes) for key in keys]
    image = channels[0]
    if len(channels) > 1:
        image = LazyImage(np.stack([channel.read() for channel in channels], axis=-1), f"{image.axes}C", image.name)
    labels = open_image(label_path, row.label_key, ndim=row.ndim)
    if image.shape != labels.shape or labels.has_channels:
        raise UnfitInputsError(
            f"{image_path} has the shape {image.shape}, but its labels {label_path} have {tuple(labels.data.shape)}. "
            "Check that they belong together."
        )
    return image, labels


def _write_crop(
    folder: Path, name: str, image: LazyImage, labels: LazyImage, window: Window, ndim: int, split_components: bool
) -> None:
    ids = _as_ids(np.asarray(labels.data[window]))
    pixels = np.asarray(image.data[window])
    if ndim < labels.ndim:
        ids, pixels = ids[0], pixels[0]
    if split_components:
        from skimage.measure import label
        ids = label(ids)
    write_labels(folder / "labels" / name, ids)
    _write_image(folder / "inputs" / name, pixels, ndim)


def _as_ids(labels: np.ndarray) -> np.ndarray:
    """Ids as unsigned integers; regions to ignore (negative ids) become background."""
    if labels.dtype.kind == "f":
        labels = labels.round().astype(np.int64)
    return np.maximum(labels, 0).astype(np.uint64) if labels.dtype.kind == "i" else labels.astype(np.uint64)


def _write_image(path: Path, pixels: np.ndarray, ndim: int) -> None:
    import tifffile

    is_rgb = pixels.ndim > ndim and pixels.shape[-1] == 3
    axes = "ZYX"[-ndim:] + ("S" if is_rgb else "C" if pixels.ndim > ndim else "")
    with temporary_path(path, is_folder=False) as new:
        tifffile.imwrite(
            new, pixels.astype(np.uint8) if pixels.dtype == bool else pixels, compression="zlib",
            photometric="rgb" if is_rgb else "minisblack", metadata={"axes": axes},
        )


def remove_folders(folders: Sequence[str | os.PathLike]) -> None:
    """Remove folders of intermediate results, those that exist."""
    import shutil

    for folder in folders:
        if Path(folder).exists():
            shutil.rmtree(folder)
