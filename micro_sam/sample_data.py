"""Sample images: some come with the package, larger ones are downloaded once, verified and kept.

The functions `sample_data_*` are what napari offers under File > Open Sample.
"""

import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import pooch
import requests

from .core.errors import DownloadError, HashMismatchError, InvalidInputError, OutputWriteError
from .core.image import load_image_data
from .core.output import temporary_path
from .core.settings import get_cache_directory

LayerData = tuple[np.ndarray, dict[str, Any]] | tuple[np.ndarray, dict[str, Any], str]

TIMEOUT = (15, 60)  # seconds to connect, seconds without data
_SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class _Sample:
    """A file to download; of an archive the `members`, which lie in its subfolder `folder`."""

    file: str
    urls: tuple[str, ...]  # the first that works; the hash makes the unencrypted ones safe
    sha256: str
    folder: str = ""
    members: tuple[str, ...] = ()


def _owncloud(share: str) -> tuple[str, ...]:
    return (f"https://owncloud.gwdg.de/index.php/s/{share}/download",)


def _https_or_http(address: str) -> tuple[str, ...]:
    return f"https://{address}", f"http://{address}"


_SAMPLES = {
    "image_series": _Sample(
        "image-series.zip", _owncloud("M1zGnfkulWoAhUG"),
        "92346ca9770bcaf55248efee590718d54c7135b6ebca15d669f3b77b6afc8706",
        "series", tuple(f"im{i}.tif" for i in range(3)),
    ),
    "wholeslide": _Sample(
        "whole-slide-example-image.tif", _owncloud("6ozPtgBmAAJC1di"),
        "3ddb9c9dcc844429932ab951eb0743d5a1af83ee9b0ab54f06ceb2090a606d36",
    ),
    "livecell": _Sample(
        "livecell-2d-image.png", _owncloud("fSaOJIOYjmFBjPM"),
        "4f190983ea672fc333ac26d735d9625d5abb6e4a02bd4d32523127977a31e8fe",
    ),
    "hela_2d": _Sample(
        "hela-2d-image.png", _owncloud("2sr1DHQ34tV7WEb"),
        "908fa00e4b273610aa4e0a9c0f22dfa64a524970852f387908f3fa65238259c7",
    ),
    "lucchi": _Sample(
        "lucchi_pp.zip", _https_or_http("www.casser.io/files/lucchi_pp.zip"),
        "770ce9e98fc6f29c1b1a250c637e6c5125f2b5f1260e5a7687b55a79e2e8844d",
        "Lucchi++/Test_In", tuple(f"mask{i:04}.png" for i in range(165)),
    ),
    "tracking": _Sample(
        "DIC-C2DH-HeLa.zip", _https_or_http("data.celltrackingchallenge.net/training-datasets/DIC-C2DH-HeLa.zip"),
        "832fed2d05bb7488cf9c51a2994b75f8f3f53b3c3098856211f2d39023c34e1a",
        "DIC-C2DH-HeLa/01", tuple(f"t{i:03}.tif" for i in range(84)),
    ),
    "tracking_segmentation": _Sample(
        "hela-ctc-01-gt.zip", _owncloud("AWxQMblxwR99OjC"),
        "c0644d8ebe1390fb60125560ba15aa2342caf44f50ff0667a0318ea0ac6c958b",
        "masks", tuple(f"mask_{i:04}.tif" for i in range(84)),
    ),
    "nucleus_3d": _Sample(
        "3d-nucleus-data.tif", _owncloud("eW0uNCo8gedzWU4"),
        "4946896f747dc1c3fc82fb2e1320226d92f99d22be88ea5f9c37e3ba4e281205",
    ),
    "histopathology": _Sample(
        "whole-slide-histopathology-example-image.svs",
        ("https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1.svs",),
        "00a3d54482cd707abf254fe69dccc8d06b8ff757a1663f1290c23418c480eb30",
    ),
}


def _fetch(name: str, save_directory: str | os.PathLike) -> Path:
    """Download a sample unless it is there, unpack it, and return its file or the folder of its members."""
    sample = _SAMPLES[name]
    path = Path(save_directory).expanduser() / sample.file
    _download(sample, path)
    return _unpack(sample, path) if sample.members else path


def _download(sample: _Sample, path: Path) -> None:
    shows_bar = sys.stderr is not None and sys.stderr.isatty()
    problems: list[Exception] = []
    for url in sample.urls:
        try:
            downloader = pooch.HTTPDownloader(progressbar=shows_bar, timeout=TIMEOUT)
            pooch.retrieve(url, f"sha256:{sample.sha256}", path.name, path.parent, downloader=downloader)
            return
        except (requests.RequestException, ValueError) as error:  # pooch raises ValueError for another hash
            problems.append(error)
        except OSError as error:
            raise OutputWriteError(
                f"The sample data could not be written to {path}: {error}. Free some space, or choose another folder "
                "(for napari with the environment variable MICROSAM_CACHEDIR)."
            ) from error
    error, url = problems[-1], sample.urls[-1]
    by_hand = f"download {url} on another computer and put the file at {path}."
    if isinstance(error, requests.RequestException):
        raise DownloadError(
            f"The sample data {path.name} could not be downloaded from {url}: {error}. Check the network and proxy "
            f"settings and try again, or {by_hand}"
        ) from error
    raise HashMismatchError(
        f"What came from {url} is not {path.name}: its hash is not sha256:{sample.sha256}. A proxy or login page may "
        f"have answered instead: try again from another network, or {by_hand}"
    ) from error


def _unpack(sample: _Sample, path: Path) -> Path:
    """Unpack the members of an archive that are not there yet, or differ from what the archive holds."""
    folder = path.with_name(f"{path.name}.unzip")
    try:
        with ZipFile(path) as archive:
            for member in (f"{sample.folder}/{name}" for name in sample.members):
                info, target = archive.getinfo(member), folder / member
                if target.is_file() and target.stat().st_size == info.file_size and _crc(target) == info.CRC:
                    continue
                with temporary_path(target, is_folder=False) as new:
                    new.write_bytes(archive.read(info))
    except (BadZipFile, KeyError) as error:
        raise DownloadError(f"The archive {path} cannot be unpacked: {error}. Delete it and try again.") from error
    return folder / sample.folder


def _crc(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def fetch_image_series_example_data(save_directory: str | os.PathLike) -> str:
    """Download three images, the last of another size and modality.

    Args:
        save_directory: Where to keep the download; a file that is there and has the right hash is used.

    Returns:
        The folder with the images.

    Raises:
        DownloadError: If the download fails; says where to put the file by hand.
        HashMismatchError: If something else than the file was downloaded.
        OutputWriteError: If the folder cannot be written.
    """
    return str(_fetch("image_series", save_directory))


def fetch_wholeslide_example_data(save_directory: str | os.PathLike) -> str:
    """Download a part of a whole-slide image (NeurIPS CellSeg). See `fetch_image_series_example_data`.

    Returns:
        The image file.
    """
    return str(_fetch("wholeslide", save_directory))


def fetch_livecell_example_data(save_directory: str | os.PathLike) -> str:
    """Download one image of LIVECell. See `fetch_image_series_example_data`.

    Returns:
        The image file.
    """
    return str(_fetch("livecell", save_directory))


def fetch_hela_2d_example_data(save_directory: str | os.PathLike) -> str:
    """Download one image of HeLa cells (Cell Tracking Challenge). See `fetch_image_series_example_data`.

    Returns:
        The image file.
    """
    return str(_fetch("hela_2d", save_directory))


def fetch_3d_example_data(save_directory: str | os.PathLike) -> str:
    """Download the EM volume Lucchi++ with mitochondria. See `fetch_image_series_example_data`.

    Returns:
        The folder with its 165 planes.
    """
    return str(_fetch("lucchi", save_directory))


def fetch_tracking_example_data(save_directory: str | os.PathLike) -> str:
    """Download the time series DIC-C2DH-HeLa (Cell Tracking Challenge). See `fetch_image_series_example_data`.

    Returns:
        The folder with its 84 frames.
    """
    return str(_fetch("tracking", save_directory))


def fetch_tracking_segmentation_data(save_directory: str | os.PathLike) -> str:
    """Download the objects of the tracking example data. See `fetch_image_series_example_data`.

    Returns:
        The folder with the 84 label images.
    """
    return str(_fetch("tracking_segmentation", save_directory))


def fetch_nucleus_3d_example_data(save_directory: str | os.PathLike) -> str:
    """Download a volume with nuclei. See `fetch_image_series_example_data`.

    Returns:
        The image file.
    """
    return str(_fetch("nucleus_3d", save_directory))


def fetch_wholeslide_histopathology_example_data(save_directory: str | os.PathLike) -> str:
    """Download an Aperio slide (CC0) of OpenSlide's test data. See `fetch_image_series_example_data`.

    Returns:
        The image file.
    """
    return str(_fetch("histopathology", save_directory))


def _read(name: str) -> np.ndarray | list[np.ndarray]:
    """An image, or the images of a folder, from the cache directory."""
    path = _fetch(name, get_cache_directory() / "sample_data")
    members = _SAMPLES[name].members
    return [load_image_data(path / member) for member in members] if members else load_image_data(path)


def sample_data_image_series() -> list[LayerData]:
    """Three images, `img-0` to `img-2`. napari does not offer them: the series annotator reads from a folder."""
    return [(image, {"name": f"img-{i}"}) for i, image in enumerate(_read("image_series"))]


def sample_data_wholeslide() -> list[LayerData]:
    """The layer `wholeslide`: a part of a whole-slide image."""
    return [(_read("wholeslide"), {"name": "wholeslide"})]


def sample_data_livecell() -> list[LayerData]:
    """The layer `livecell`: cells in phase contrast."""
    return [(_read("livecell"), {"name": "livecell"})]


def sample_data_hela_2d() -> list[LayerData]:
    """The layer `hela_2d`: HeLa cells."""
    return [(_read("hela_2d"), {"name": "hela_2d"})]


def sample_data_3d() -> list[LayerData]:
    """The layer `lucchi++`: an EM volume (Z, Y, X) with mitochondria."""
    return [(np.stack(_read("lucchi")), {"name": "lucchi++"})]


def sample_data_tracking() -> list[LayerData]:
    """The layer `tracking`: a time series (T, Y, X) of HeLa cells."""
    return [(np.stack(_read("tracking")), {"name": "tracking"})]


def sample_data_segmentation() -> list[LayerData]:
    """The labels layer `segmentation`: the objects (T, Y, X) of the tracking sample."""
    return [(np.stack(_read("tracking_segmentation")), {"name": "segmentation"}, "labels")]


def sample_data_nuclei() -> list[LayerData]:
    """The layer `nuclei`: fluorescence nuclei (Y, X), 16 bit. It comes with the package."""
    return [(load_image_data(_SHIPPED / "nuclei.tif"), {"name": "nuclei"})]


def sample_data_nuclei_3d() -> list[LayerData]:
    """The layer `nuclei_3d`: fluorescence nuclei (Z, Y, X), with the voxel size. It comes with the package."""
    return [(load_image_data(_SHIPPED / "nuclei_3d.tif"), {"name": "nuclei_3d", "scale": (0.284, 0.127, 0.127)})]


def sample_data_cells_tracking() -> list[LayerData]:
    """The layer `cells_tracking`: a time series (T, Y, X) of migrating cells. It comes with the package."""
    return [(load_image_data(_SHIPPED / "cells_tracking.tif"), {"name": "cells_tracking"})]


def synthetic_data(shape: Sequence[int], seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Make an image of random blobs, for tests.

    Args:
        shape: (Y, X), or (Z, Y, X) for the same blobs in all planes.
        seed: Seed of the random numbers; None for other blobs in each call.

    Returns:
        The image, uint8 with the values 0 and 255, and the labels of its blobs, uint64.

    Raises:
        InvalidInputError: If the shape has neither two nor three axes.
    """
    from skimage.data import binary_blobs
    from skimage.measure import label
    from skimage.transform import resize

    shape = tuple(int(s) for s in shape)
    if len(shape) not in (2, 3):
        raise InvalidInputError(f"Synthetic data have the shape (Y, X) or (Z, Y, X), but {shape} was asked for.")
    blobs = binary_blobs(shape[-2], blob_size_fraction=0.05, volume_fraction=0.15, n_dim=2, rng=seed)
    if blobs.shape != shape[-2:]:
        blobs = resize(blobs, shape[-2:], order=0, anti_aliasing=False, preserve_range=True).astype(bool)
    labels = label(blobs, connectivity=2).astype("uint64")
    image = blobs.astype("uint8") * 255
    if len(shape) == 3:
        image, labels = (np.repeat(a[None], shape[0], axis=0) for a in (image, labels))
    return image, labels
