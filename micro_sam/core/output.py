"""Label images in files: tif, zarr or OME-Zarr, complete or not there at all, never replaced silently.

Each output carries a record of how it was made: as JSON in the description of a tif, or in the attributes
(`micro_sam`) of a zarr. It tells a repeated run that it has nothing to do, and another run that it must not overwrite.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from .errors import InvalidInputError, MicroSamError, OutputExistsError, OutputWriteError

_TIF, _ZARR = (".tif", ".tiff"), (".zarr",)
_OME_ZARR = ".ome.zarr"
LABEL_SUFFIXES = (*_TIF, *_ZARR, _OME_ZARR)
_PYRAMID_SIDE = 1024


def label_path(path: str | os.PathLike) -> Path:
    """Return the path of a label image; `.tif` is appended if the name has no suffix of a label format.

    A name with other dots keeps them: `exp.1.result` becomes `exp.1.result.tif`.

    Raises:
        InvalidInputError: If the suffix is that of a format which cannot hold labels.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".h5", ".hdf5", ".n5", ".mrc", ".czi"):
        raise InvalidInputError(
            f"Label images are written as {', '.join(LABEL_SUFFIXES)}, not as {path.suffix!r} ({path})."
        )
    return path if path.suffix.lower() in LABEL_SUFFIXES else path.with_name(f"{path.name}.tif")


def label_stem(path: str | os.PathLike) -> str:
    """Name without the suffix of its format; `a.ome.tif` and `a.ome.zarr` become `a`, `a.b.png` becomes `a.b`."""
    name = Path(path).name
    for suffix in (".ome.tif", ".ome.tiff", _OME_ZARR, ".nii.gz"):
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return Path(name).stem


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into an error that names the output and the remedy."""
    try:
        yield
    except MicroSamError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text = "there is no space left there (disk full, or a quota). Free some space, or choose another output."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = "no permission to write there. Change the permissions, or choose another output."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            text = "a file is where a folder is needed. Choose another output."
        else:
            text = f"{error}. Choose another output."
        raise OutputWriteError(f"Could not write {path}: {text}") from error


def prepare_folder(path: Path) -> None:
    """Create the folder of an output and try whether it can be written, before any work is done.

    Raises:
        OutputWriteError: If it cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"x")
            file.flush()


@contextlib.contextmanager
def temporary_path(path: Path, is_folder: bool) -> Iterator[Path]:
    """Give a path next to the output; afterwards it replaces the output, or vanishes in case of an error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            new = folder / path.name
            yield new
            if not (is_folder and path.exists()):
                os.replace(new, path)
                return
            old = folder / "old"  # a folder cannot replace a folder in one step
            os.replace(path, old)
            try:
                os.replace(new, path)
            except OSError:
                os.replace(old, path)
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    with temporary_path(Path(path), is_folder=False) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _ome_attrs(group) -> dict[str, Any]:
    attrs = dict(group.attrs)
    return attrs.get("ome") or attrs


def _is_ome_image(path: Path) -> bool:
    import zarr

    try:
        group = zarr.open_group(str(path), mode="r")
    except (OSError, ValueError, KeyError):
        return False
    attrs = _ome_attrs(group)
    return "multiscales" in attrs and "image-label" not in attrs


def _target(path: Path, name: str) -> Path:
    """Where the label image lies: inside an existing OME-Zarr image, else at the path itself."""
    if path.name.lower().endswith(_OME_ZARR) and path.is_dir() and _is_ome_image(path):
        return path / "labels" / name
    return path


def read_record(path: str | os.PathLike, name: str = "segmentation") -> dict[str, Any] | None:
    """Return the record that `write_labels` stored, or None if the file was not written by it.

    Args:
        path: The label image.
        name: The name of the labels in an OME-Zarr image.
    """
    path = _target(Path(path), name)
    try:
        if path.suffix.lower() in _TIF:
            import tifffile
            with tifffile.TiffFile(path) as file:
                record = json.loads(file.pages[0].description)
        else:
            import zarr
            record = dict(zarr.open(str(path), mode="r").attrs)
        return record.get("micro_sam")
    except Exception:  # any file may lie there; then it has no record
        return None


def is_done(
    path: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False, name: str = "segmentation"
) -> bool:
    """Whether the output exists already and was made with the same settings.

    Args:
        path: The label image.
        settings: How it is to be made; values must be fit for JSON.
        overwrite: Whether an existing output is replaced anyway.
        name: The name of the labels in an OME-Zarr image.

    Returns:
        True if there is nothing to do, False if the output has to be computed.

    Raises:
        OutputExistsError: If there is an output made with other settings, and `overwrite` is not set.
    """
    target = _target(Path(path), name)
    if overwrite or not target.exists():
        return False
    record = read_record(path, name)
    if record is None:
        raise OutputExistsError(
            f"{target} exists and was not written by this tool. Pass overwrite (--overwrite) to replace it, or choose "
            "another output."
        )
    _compare(target, record, settings)
    return True


def is_same(record_path: Path, settings: dict[str, Any]) -> bool:
    """Whether there is a record in a JSON file, of an output that is made of several files; see `is_done`.

    Raises:
        OutputExistsError: If it is of other settings.
    """
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))["micro_sam"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none that is ours
        return False
    _compare(record_path.parent, record, settings)
    return True


def _compare(target: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    found, wanted = _flatten(record.get("settings", {})), _flatten(json.loads(json.dumps(settings)))
    different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if not different:
        return
    changes = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in different)
    raise OutputExistsError(
        f"{target} exists and was computed with other settings ({changes}). Pass overwrite (--overwrite) to replace "
        "it, choose another output, or use the same settings."
    )


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one level: the options are named like the settings."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def label_record(n_objects: int, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of a label image, see `is_done`."""
    return {"micro_sam": {"version": __version__, "n_objects": n_objects, "settings": settings or {}}}


def smallest_dtype(labels: np.ndarray) -> np.dtype:
    """uint16, uint32 or uint64: the smallest that holds all ids."""
    highest = int(labels.max()) if labels.size else 0
    return next(np.dtype(t) for t in ("uint16", "uint32", "uint64") if highest <= np.iinfo(t).max)


def write_labels(
    path: str | os.PathLike,
    labels: np.ndarray,
    settings: dict[str, Any] | None = None,
    *,
    scale: Sequence[float] | None = None,
    name: str = "segmentation",
) -> Path:
    """Write a label image; an existing one is replaced (ask `is_done` before).

    Args:
        path: Name with `.tif` (zlib), `.zarr` (one array) or `.ome.zarr`. If an OME-Zarr image lies there, the
            labels are added to it as `labels/<name>`; otherwise a label image of its own is written.
        labels: Labels (Y, X) or (Z, Y, X). They are stored as uint16, or larger if needed.
        settings: How they were made, for `is_done`.
        scale: Pixel size per axis.
        name: The name of the labels in an OME-Zarr image.

    Returns:
        Where the labels are.

    Raises:
        OutputWriteError: If they could not be written; then nothing of them is left.
    """
    path = label_path(path)
    target = _target(path, name)
    labels = labels.astype(smallest_dtype(labels), copy=False)
    record = label_record(int((np.unique(labels) != 0).sum()), settings)
    if path.suffix.lower() in _TIF:
        import tifffile
        with temporary_path(path, is_folder=False) as new:
            tifffile.imwrite(
                new, labels, compression="zlib", photometric="minisblack", description=json.dumps(record),
                metadata=None, software=f"micro_sam {__version__}",
            )
    elif not path.name.lower().endswith(_OME_ZARR):
        import zarr
        with temporary_path(path, is_folder=True) as new:
            array = zarr.create_array(str(new), shape=labels.shape, dtype=labels.dtype, chunks=_chunks(labels.shape))
            _fill(array, labels)
            array.attrs.update(record)
    else:
        _write_ome_zarr(path, target, labels, record, scale)
    return target


def _chunks(shape: Sequence[int]) -> tuple[int, ...]:
    return (*[1] * (len(shape) - 2), *(min(512, s) for s in shape[-2:]))


def _fill(array, labels: np.ndarray) -> None:
    """Write chunk by chunk: zarr writes many at once in threads, which go on after one has failed."""
    grid = [range(0, size, chunk) for size, chunk in zip(labels.shape, array.chunks)]
    for start in itertools.product(*grid):
        chunk = tuple(slice(a, a + c) for a, c in zip(start, array.chunks))
        array[chunk] = labels[chunk]


def _write_ome_zarr(path: Path, target: Path, labels: np.ndarray, record: dict[str, Any], scale) -> None:
    import zarr

    inside = target != path
    old = inside and "ome" not in zarr.open_group(str(path), mode="r").attrs  # version 0.4 in zarr format 2
    with temporary_path(target, is_folder=True) as new:
        group = zarr.create_group(str(new), zarr_format=2 if old else 3)
        axes = "zyx"[-labels.ndim:]
        datasets, factor = [], 1
        while True:
            level = str(len(datasets))
            separator = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if old else {}
            array = group.create_array(
                level, shape=labels.shape, dtype=labels.dtype, chunks=_chunks(labels.shape), **separator
            )
            _fill(array, labels)
            size = [s * (factor if a != "z" else 1) for a, s in zip(axes, scale or [1.0] * len(axes))]
            datasets.append({"path": level, "coordinateTransformations": [{"type": "scale", "scale": size}]})
            if max(labels.shape[-2:]) <= _PYRAMID_SIDE:
                break
            labels, factor = labels[..., ::2, ::2], factor * 2  # ids must not be averaged
        attrs: dict[str, Any] = {
            "multiscales": [{
                "name": target.name, "axes": [{"name": a, "type": "space"} for a in axes], "datasets": datasets,
            }],
            "image-label": {"source": {"image": "../../"}} if inside else {},
        }
        if old:
            attrs["multiscales"][0]["version"] = attrs["image-label"]["version"] = "0.4"
            group.attrs.update({**attrs, **record})
        else:
            group.attrs.update({"ome": {"version": "0.5", **attrs}, **record})
        if inside:
            _register(path / "labels", target.name, old)


def _register(folder: Path, name: str, old: bool) -> None:
    """Add a name to the list of labels of an OME-Zarr image."""
    import zarr

    group = zarr.open_group(str(folder), mode="a", zarr_format=2 if old else 3)
    names = [*(n for n in _ome_attrs(group).get("labels", []) if n != name), name]
    group.attrs.update({"labels": names} if old else {"ome": {"version": "0.5", "labels": names}})


def read_labels(path: str | os.PathLike, name: str = "segmentation") -> np.ndarray:
    """Read labels that `write_labels` wrote, see there for the arguments."""
    from .image import load_image_data

    return load_image_data(_target(label_path(path), name))
