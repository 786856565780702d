"""One function per file format: each opens an image without reading its pixels, and says what its axes are.

Axes are letters: T time, Z plane, C channel, Y, X, and S for the samples of a colour pixel. They are None
where the format does not tell. `core.image` makes an image out of what comes from here.
"""

import contextlib
import glob
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageReadError, InvalidInputError, MicroSamError, MissingFileError, UnsupportedError, nearest_names
from .lazy_array import LazyArray, from_array, stack

TIF = (".tif", ".tiff", ".btf", ".tf8", ".lsm", ".stk", ".svs", ".ndpi", ".qptiff", ".scn")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm")
HDF5 = (".h5", ".hdf5", ".hdf", ".ims")
ZARR = (".zarr", ".zr")
MRC = (".mrc", ".rec", ".map", ".st", ".ali")
NIFTI = (".nii", ".nii.gz")
OTHERS = (".czi", ".npy")
SUFFIXES = (*TIF, *PICTURES, *HDF5, *ZARR, *MRC, *NIFTI, *OTHERS)

# Compressed tif files above this size are read page by page or tile by tile.
LAZY_TIF_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """An image as it lies in its file: `data` is an array, `scale` the pixel size per axis of `axes`, if known."""

    data: Any
    axes: str | None = None
    scale: dict[str, float] | None = None


def suffix_of(path: Path) -> str:
    """The suffix in lower case; `.nii.gz` counts as one."""
    name = path.name.lower()
    return next((s for s in NIFTI if name.endswith(s)), path.suffix.lower())


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr array or group (of format 2 or 3)."""
    return path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zattrs"))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a format library raises into an error that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MicroSamError, MemoryError):
        raise
    except PermissionError as error:
        raise ImageReadError(f"No permission to read {path}. Change its permissions, or copy it.") from error
    except Exception as error:
        raise ImageReadError(
            f"Could not read an image from {path}: {_first_line(error)}. The file is damaged, incomplete, "
            "or not of the format that its name says; try to open it elsewhere and save it again."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def open_source(path: Path, key: str | None = None, level: int | None = None, series: int | None = None) -> Source:
    """Open a file, container or folder by its kind. See `core.image.open_image` for the arguments."""
    if not path.exists():
        inside = next((p for p in path.parents if suffix_of(p) in HDF5 and p.is_file()), None)
        hint = f" To read from inside {inside}, pass it as the path and the rest as key." if inside else ""
        raise MissingFileError(f"There is no file or folder {path}. Check the path.{hint}")
    suffix = suffix_of(path)
    if suffix == ".n5":
        raise UnsupportedError(f"{path} is in the format N5, which is not supported. Convert it to zarr or OME-Zarr.")
    if is_zarr(path) or (path.is_dir() and suffix in ZARR):
        return _open_zarr(path, key, level, series)
    if path.is_dir():
        return _open_folder(path, key)
    if path.stat().st_size == 0:
        raise ImageReadError(f"{path} is an empty file. It was probably not copied completely.")
    if suffix in HDF5:
        _refuse(path, level=level, series=series)
        return _open_hdf5(path, key)
    if suffix in MRC and key in (None, "data"):  # readers of other tools call it by this key
        key = None
    _refuse(path, key=key)
    if suffix in TIF:
        return _open_tif(path, level, series)
    _refuse(path, level=level, series=series)
    if suffix in PICTURES:
        return _open_picture(path)
    if suffix in MRC:
        return _open_mrc(path)
    if suffix == ".czi":
        from .czi import open_czi
        with _reading(path):
            return Source(*open_czi(path))
    if suffix == ".npy":
        with _reading(path):
            return Source(np.load(path, mmap_mode="r", allow_pickle=False))
    if suffix in NIFTI:
        return _open_nifti(path)
    raise ImageReadError(
        f"{path} has the suffix {suffix!r}, which is not among the supported ones: {', '.join(SUFFIXES)}. "
        "Save the image as OME-TIFF or OME-Zarr."
    )


def _refuse(path: Path, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InvalidInputError(f"{path} has no {name} to choose, but {name}={value!r} was given. Leave it out.")


def _choose(path: Path, what: str, index: int | None, n: int) -> int:
    index = 0 if index is None else index
    if not 0 <= index < n:
        raise InvalidInputError(f"{path} has no {what} {index}: there are {n}, numbered from 0.")
    return index


def _open_tif(path: Path, level: int | None, series: int | None) -> Source:
    import tifffile

    with _reading(path):
        file = tifffile.TiffFile(path)
        stays_open = False
        try:
            if not file.series:
                raise ImageReadError(f"{path} holds no image.")
            chosen = file.series[_choose(path, "series", series, len(file.series))]
            n_level = _choose(path, "level", level, len(chosen.levels))
            page = chosen.levels[n_level]
            scale = _tif_scale(file)
            # Q and I are axes without meaning: a plain sequence of planes.
            axes = page.axes.replace("Q", "Z").replace("I", "Z")
            axes = axes if len(set(axes)) == len(axes) else None
            if page.dataoffset is not None and page.size > 0:  # uncompressed, contiguous
                dtype = np.dtype(page.dtype).newbyteorder(">" if file.byteorder == ">" else "<")
                data = np.memmap(path, dtype, "r", page.dataoffset, tuple(page.shape))
            elif page.nbytes <= LAZY_TIF_BYTES:
                data = page.asarray()
            else:
                import zarr
                data = from_array(zarr.open(chosen.aszarr(level=n_level), mode="r"), str(path), file)
                stays_open = True
        finally:
            if not stays_open:
                file.close()
    if n_level:
        scale = None  # metadata describes the full resolution
    return Source(data, axes, scale)


def _tif_scale(file) -> dict[str, float] | None:
    import tifffile

    if file.is_ome:
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"].get("Image", {})
        pixels = pixels[0] if isinstance(pixels, list) else pixels
        pixels = pixels.get("Pixels", {})
        scale = {a: float(pixels[f"PhysicalSize{a}"]) for a in "ZYX" if f"PhysicalSize{a}" in pixels}
        return scale or None
    if file.is_imagej and "XResolution" in file.pages[0].tags:
        tags, meta = file.pages[0].tags, file.imagej_metadata or {}
        scale = {}
        for a in "YX":
            numerator, denominator = tags[f"{a}Resolution"].value
            if numerator:
                scale[a] = denominator / numerator
        if meta.get("spacing"):
            scale["Z"] = float(meta["spacing"])
        return scale or None
    return None


def _open_picture(path: Path) -> Source:
    import imageio.v3 as imageio

    with _reading(path):
        data = np.asarray(imageio.imread(path, plugin="pillow"))
    if data.ndim == 3 and data.shape[-1] == 2:  # grey and alpha
        data = data[..., 0]
    return Source(data, {2: "YX", 3: "YXS", 4: "TYXS"}.get(data.ndim))


def _open_mrc(path: Path) -> Source:
    import mrcfile

    with _reading(path):
        header = np.fromfile(path, "<i4", 24)
        if len(header) < 24 or all(header.view(order)[23] > path.stat().st_size for order in ("<u4", ">u4")):
            raise ValueError("its header gives impossible sizes")
        with mrcfile.mmap(path, mode="r", permissive=True) as file:
            if file.data is None:
                raise ValueError("it holds no data")
            size = {a: float(file.voxel_size[a.lower()]) for a in "ZYX"}
            data = np.memmap(path, file.data.dtype, "r", file.data.offset, file.data.shape)
        return Source(data, {2: "YX", 3: "ZYX"}.get(data.ndim), size if all(size.values()) else None)


def _open_nifti(path: Path) -> Source:
    try:
        import nibabel
    except ModuleNotFoundError:
        raise UnsupportedError(f"To read the NIfTI file {path}, install nibabel: pip install nibabel") from None
    with _reading(path):
        image = nibabel.load(path)
        array = LazyArray(lambda key: np.asarray(image.dataobj[key]), image.shape, image.get_data_dtype(), str(path))
        return Source(array, "XYZTC"[:len(image.shape)])


def _open_folder(path: Path, key: str | None) -> Source:
    if key is None:
        raise ImageReadError(
            f"{path} is a folder. Pass a pattern as key (for example '*.tif') to read its files as a stack."
        )
    paths = sorted(glob.glob(str(path / key)))
    if not paths:
        raise MissingFileError(f"No file in {path} matches the pattern {key!r}.")
    data = stack(paths, lambda p: open_source(Path(p)).data, str(path / key))
    axes = open_source(Path(paths[0])).axes
    return Source(data, f"Z{axes}" if axes and "Z" not in axes else None)


def _open_hdf5(path: Path, key: str | None) -> Source:
    import h5py

    with _reading(path):
        file = h5py.File(path, "r")
    keys: list[str] = []
    file.visititems(lambda name, node: keys.append(name) if isinstance(node, h5py.Dataset) and node.ndim > 1 else None)
    key = _choose_key(path, key, keys)
    with _reading(path):
        dataset = file[key]
        return Source(from_array(dataset, f"{path}, key {key}", file))


def _choose_key(path: Path, key: str | None, keys: list[str]) -> str:
    listed = ", ".join(repr(k) for k in sorted(keys)[:20]) + (", …" if len(keys) > 20 else "")
    if key is not None:
        if key.strip("/") not in keys:
            near = f" {nearest_names(key, keys)}" if keys else ""
            raise ImageReadError(f"There is no image with the key {key!r} in {path}. It has: {listed or 'none'}.{near}")
        return key.strip("/")
    if len(keys) != 1:
        raise ImageReadError(
            f"{path} holds {len(keys)} images. Pass the key of one of them: {listed}." if keys
            else f"{path} holds no image (no dataset with two axes or more)."
        )
    return keys[0]


def _open_zarr(path: Path, key: str | None, level: int | None, series: int | None) -> Source:
    import zarr

    with _reading(path):
        node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        _refuse(path, key=key, level=level, series=series)
        return _zarr_source(node, path, _array_axes(node))
    multiscales = _multiscales(node)
    if key is None and multiscales is None:
        images = [name for name, group in sorted(node.groups()) if _multiscales(group) is not None]
        if images and (series is not None or len(images) == 1):
            node = node[images[_choose(path, "series", series, len(images))]]
            multiscales = _multiscales(node)
        elif images:
            raise ImageReadError(f"{path} holds {len(images)} images: {', '.join(images)}. Choose one with series.")
    elif multiscales is not None and key is None:
        _refuse(path, series=series)
    if key is None and multiscales is not None:
        datasets = multiscales["datasets"]
        dataset = datasets[_choose(path, "level", level, len(datasets))]
        axes, scale = _ome_axes(multiscales, dataset)
        with _reading(path):
            return _zarr_source(node[dataset["path"]], path, axes, scale)
    if key is not None and isinstance(node.get(key.strip("/")), zarr.Group) and _multiscales(node[key.strip("/")]):
        return _open_zarr(path / key.strip("/"), None, level, series)
    _refuse(path, level=level, series=series)
    keys = [name for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array) and member.ndim > 1]
    key = _choose_key(path, key, keys)
    return _zarr_source(node[key], path / key, _array_axes(node[key]))


def _multiscales(group) -> dict[str, Any] | None:
    """The OME-Zarr metadata of a group, of version 0.5 (under `ome`) or older."""
    attrs = dict(group.attrs)
    found = (attrs.get("ome") or attrs).get("multiscales")
    return found[0] if found else None


def _ome_axes(multiscales: dict[str, Any], dataset: dict[str, Any]) -> tuple[str | None, dict[str, float] | None]:
    axes = multiscales.get("axes")
    if axes is None:  # versions 0.1 and 0.2 are always five-dimensional
        return "TCZYX", None
    axes = "".join((a if isinstance(a, str) else a["name"])[:1].upper() for a in axes)
    scales = [np.ones(len(axes))]
    for transforms in (dataset.get("coordinateTransformations"), multiscales.get("coordinateTransformations")):
        scales += [np.asarray(t["scale"], float) for t in transforms or () if t.get("type") == "scale"]
    scale = np.prod(scales, axis=0) if all(len(s) == len(axes) for s in scales) and len(scales) > 1 else None
    return axes, None if scale is None else dict(zip(axes, scale.tolist()))


def _array_axes(array) -> str | None:
    """Axes that an array names itself, as zarr 3 or xarray write them."""
    names = getattr(array.metadata, "dimension_names", None) or dict(array.attrs).get("_ARRAY_DIMENSIONS")
    axes = "".join(str(n)[:1].upper() for n in names or ())
    return axes if len(axes) == array.ndim and len(set(axes)) == array.ndim and set(axes) <= set("TCZYXS") else None


def _zarr_source(array, path: Path, axes: str | None, scale: dict[str, float] | None = None) -> Source:
    return Source(from_array(array, str(path)), axes, scale)
