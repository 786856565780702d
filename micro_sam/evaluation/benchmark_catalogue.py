"""The datasets of the benchmark: one row each, and where their files are.

Files are found by the functions `get_<dataset>_paths` of torch-em, which also download and unpack; own folders of
images and labels are rows like all others. Importing this module is quick: torch-em is loaded when a row is used.
"""

import contextlib
import glob
import importlib
import inspect
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInputError, MissingFileError, nearest_names

_LM, _EM = "light_microscopy", "electron_microscopy"


class DatasetMissingError(MissingFileError, RuntimeError):
    """A dataset is not there and could not be downloaded; the message says what to place where."""


@dataclass(frozen=True)
class BenchmarkDataset:
    """A row of the catalogue.

    Attributes:
        name: The name; torch-em's files are in `<input folder>/<name>`.
        ndim: 2 for images, 3 for volumes.
        function: `<module>:<function>` in `torch_em.data.datasets`; empty for own files.
        arguments: One mapping per call of the function: all results are taken.
        image_key: The name of the image in hdf5 or zarr containers; several names are the channels.
        label_key: The name of the labels.
        image_axes: Axes of the image where the file does not tell, see `core.image.open_image`.
        layout: Patterns in the folder of the dataset; all of them match a file if it is there.
        archives: Files in that folder that torch-em unpacks; one of them is enough.
        downloads: Whether torch-em can download it. If not, it has to be placed by hand.
        split_components: Whether the labels are a foreground, whose connected components are the objects.
        source: Where it comes from, if torch-em does not tell.
        images: Own image files.
        labels: Own label files, in the same order.
    """

    name: str
    ndim: int
    function: str = ""
    arguments: tuple[Mapping[str, Any], ...] = ({},)
    image_key: str | tuple[str, ...] | None = None
    label_key: str | None = None
    image_axes: str | None = None
    layout: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    downloads: bool = True
    split_components: bool = False
    source: str = ""
    images: tuple[Path, ...] = field(default=(), repr=False)
    labels: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def is_own(self) -> bool:
        """Whether the files are the user's and not torch-em's."""
        return not self.function


def _lm(name: str, ndim: int, function: str, *arguments: Mapping[str, Any], **options: Any) -> BenchmarkDataset:
    return BenchmarkDataset(name, ndim, f"{_LM}.{function}", arguments or ({},), **options)


def _em(name: str, ndim: int, function: str, *arguments: Mapping[str, Any], **options: Any) -> BenchmarkDataset:
    return BenchmarkDataset(name, ndim, f"{_EM}.{function}", arguments or ({},), **options)


_TEST, _RAW = {"split": "test"}, {"image_key": "raw", "label_key": "labels"}
_EMPIAR = "https://www.ebi.ac.uk/empiar/EMPIAR-10982/"
_VOLUMES = {"image_key": "volumes/raw", "label_key": "volumes/labels/segmentation"}

# Splits are those for testing, or for validation where the labels of the test split are not published.
DATASETS: tuple[BenchmarkDataset, ...] = (
    _lm("livecell", 2, "livecell:get_livecell_paths", _TEST,
        layout=("images/livecell_test_images/**/*.tif", "test.json"), archives=("livecell.zip",)),
    _lm("deepbacs", 2, "deepbacs:get_deepbacs_paths", {"bac_type": "mixed", **_TEST},
        layout=("mixed/test/source/*.tif", "mixed/test/target/*.tif"), archives=("mixed.zip",)),
    _lm("tissuenet", 2, "tissuenet:get_tissuenet_paths", _TEST, image_key="raw/rgb", label_key="labels/cell",
        image_axes="CYX", layout=("test/*.zarr", "train", "val"), archives=("tissuenet_v1.1.zip",), downloads=False),
    _lm("neurips_cellseg", 2, "neurips_cell_seg:get_neurips_cellseg_paths", _TEST,
        layout=("Testing/Public/images/*", "Testing/Public/labels/*"), archives=("Testing.zip",)),
    _lm("cellpose", 2, "cellpose:get_cellpose_paths", {"choice": "cyto", **_TEST},
        layout=("cyto/test/*_img.png", "cyto/test/*_masks.png"), archives=("test.zip",), downloads=False),
    _lm("dynamicnuclearnet", 2, "dynamicnuclearnet:get_dynamicnuclearnet_paths", _TEST, **_RAW,
        layout=("test/*.zarr", "train", "val"), archives=("DynamicNuclearNet-segmentation-v1_0.zip",),
        downloads=False),
    _lm("orgasegment", 2, "orgasegment:get_orgasegment_paths", {"split": "eval"},
        layout=("eval/*_img.jpg", "eval/*_masks_organoid.png"), archives=("OrganoidBasic_v20211206.zip",)),
    _lm("yeaz", 2, "yeaz:get_yeaz_paths", {"choice": "bf", **_TEST}, {"choice": "phc", **_TEST},
        layout=("gold-standard-BF-V-1/*_im.tif", "gold-standard-PhC-plus-2/*_im.tif"),
        archives=("gold-standard-BF-V-1.tar.gz", "gold-standard-PhC-plus-2.tar.gz"), downloads=False),
    _lm("arvidsson", 2, "arvidsson:get_arvidsson_paths", _TEST,
        layout=("test_nuclei/images/*.png", "test_nuclei/annotations/*"), archives=("test_nuclei.zip",)),
    _lm("bitdepth_nucseg", 2, "bitdepth_nucseg:get_bitdepth_nucseg_paths",
        layout=("data/*/images_16bit/*.tif", "data/*/label masks/*.tif")),
    _lm("cellbindb", 2, "cellbindb:get_cellbindb_paths",
        layout=("Other/*/*/*-img.tif", "Other/*/*/*-instancemask.tif")),
    _lm("covid_if", 2, "covid_if:get_covid_if_paths", image_key="raw/serum_IgG/s0", label_key="labels/cells/s0",
        layout=("*.h5",)),
    _lm("deepseas", 2, "deepseas:get_deepseas_paths", _TEST,
        layout=("segmentation_dataset/test/images/*.png", "segmentation_dataset/test/masks/*.png"),
        archives=("*.zip",), downloads=False),
    _lm("hpa", 2, "hpa:get_hpa_segmentation_paths", {"split": "val"},
        image_key=("raw/microtubules", "raw/er", "raw/nuclei"), label_key="labels",
        layout=("train/*.h5", "val/*.h5", "test/*.h5")),
    _lm("ifnuclei", 2, "ifnuclei:get_ifnuclei_paths", _TEST, layout=("rawimages/*.tif", "groundtruth/*.tif"),
        archives=("dataset.zip",)),
    BenchmarkDataset("lizard", 2, "histopathology.lizard:get_lizard_paths", (_TEST,), "image", "labels/segmentation",
                     "CYX", ("test/*.h5",), source="https://www.kaggle.com/datasets/aadimator/lizard-dataset"),
    _lm("organoidnet", 2, "organoidnet:get_organoidnet_paths", {"split": "Test"},
        layout=("Test/Images/*.tif", "Test/Masks/*.tif"), archives=("OrganoIDNetData.zip",)),
    _lm("toiam", 2, "toiam:get_toiam_paths", layout=("data/0*/*.tif", "data/0*_GT/SEG/man_*.tif"),
        archives=("ctc_format.zip",)),
    _lm("vicar", 2, "vicar:get_vicar_paths", layout=("labelled/*/*_img.tif", "labelled/*/*_mask.png"),
        archives=("labelled.zip",)),
    _lm("plantseg_root", 3, "plantseg:get_plantseg_paths", {"name": "root", **_TEST}, image_key="raw",
        label_key="label", layout=("root_test/*.h5",), archives=("root_test.zip",)),
    _lm("plantseg_ovules", 3, "plantseg:get_plantseg_paths", {"name": "ovules", **_TEST}, image_key="raw",
        label_key="label", layout=("ovules_test/*.h5",), archives=("ovules_test.zip",)),
    _lm("gonuclear", 3, "gonuclear:get_gonuclear_paths", image_key="raw/nuclei", label_key="labels/nuclei",
        layout=("gonuclear_datasets/*.h5",), archives=("gonuclear.zip",)),
    _lm("mouse_embryo", 3, "mouse_embryo:get_mouse_embryo_paths", {"name": "nuclei", "split": "val"},
        image_key="raw", label_key="label", layout=("Nuclei/test/*.h5",)),
    _lm("cellseg_3d", 3, "cellseg_3d:get_cellseg_3d_paths",
        layout=("DATASET_WITH_GT/*.tif", "DATASET_WITH_GT/labels/*.tif"), archives=("cellseg3d.zip",)),
    _em("mitolab_tem", 2, "cem:get_benchmark_paths", {"dataset_id": 7},
        layout=("10982/data/tem_benchmark/images/*.tiff", "10982/data/tem_benchmark/masks/*.tiff"), source=_EMPIAR),
    _em("lucchi", 3, "lucchi:get_lucchi_paths", _TEST, **_RAW, layout=("lucchi_test.h5",), archives=("lucchi.zip",),
        split_components=True),
    _em("mitolab_3d", 3, "cem:get_benchmark_paths", *({"dataset_id": n} for n in range(1, 7)),
        layout=("10982/data/mito_benchmarks/*/*_em.tif", "10982/data/mito_benchmarks/*/*_mito.tif"), source=_EMPIAR),
    _em("uro_cell", 3, "uro_cell:get_uro_cell_paths", {"target": "mito"}, image_key="raw", label_key="labels/mito",
        layout=("*.h5",)),
    _em("vnc", 3, "vnc:get_vnc_mito_paths", image_key="raw", label_key="labels/mitochondria",
        layout=("vnc_train.h5", "vnc_test.h5"), archives=("vnc.zip",)),
    _em("sponge_em", 3, "sponge_em:get_sponge_em_paths", {"sample_ids": None}, image_key="volumes/raw",
        label_key="volumes/labels/instances", layout=("train_data_0*.h5",), archives=("data.zip",)),
    _em("nuc_mm_mouse", 3, "nuc_mm:get_nuc_mm_paths", {"sample": "mouse", "split": "val"}, **_RAW,
        layout=("mouse/val/*.h5",)),
    _em("nuc_mm_zebrafish", 3, "nuc_mm:get_nuc_mm_paths", {"sample": "zebrafish", "split": "val"}, **_RAW,
        layout=("zebrafish/val/*.h5",)),
    _em("asem_mito", 3, "asem:get_asem_paths", {"volume_ids": ["61"], "organelles": "mito"},
        image_key="volumes/raw_mito", label_key="volumes/labels/mito", layout=("61/61.zarr/volumes",),
        split_components=True),
    _em("platynereis_cilia", 3, "platynereis:get_platynereis_paths", {"sample_ids": None, "name": "cilia"},
        **_VOLUMES, layout=("cilia/train_data_cilia_*.h5",), archives=("data-cilia.zip",)),
)


def own_dataset(
    name: str,
    images: Sequence[str | os.PathLike] | str | os.PathLike,
    labels: Sequence[str | os.PathLike] | str | os.PathLike,
    ndim: int | None = None,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
) -> BenchmarkDataset:
    """Return a row for own images and labels.

    Args:
        name: The name, in results and in names of files.
        images: Image files, folders or patterns.
        labels: Their labels, paired by file name, or else by order.
        ndim: 2 for images, 3 for volumes; None looks at the first one.
        image_key: The name of the image in hdf5 or zarr files.
        label_key: The name of the labels.

    Raises:
        InvalidInputError: If the name is taken or is no name for a folder, or images and labels do not fit.
        MissingFileError: If a path does not exist.
    """
    from ..core.image import open_image
    from .pairing import pair_paths

    if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or name in dataset_names():
        raise InvalidInputError(
            f"{name!r} cannot be the name of an own dataset: it must be made of letters, digits, '_', '-' and '.', "
            "and must not be in the catalogue. Choose another name."
        )
    both = [[paths] if isinstance(paths, str | os.PathLike) else list(paths) for paths in (images, labels)]
    pairs = pair_paths(*both, ("images", "labels"))
    if ndim is None:
        ndim = open_image(pairs[0][0], image_key).ndim
    return BenchmarkDataset(
        name, ndim, image_key=image_key, label_key=label_key, images=tuple(image for image, _ in pairs),
        labels=tuple(label for _, label in pairs),
    )


def dataset_names(own: Sequence[BenchmarkDataset] = ()) -> list[str]:
    """Return all names, those of own datasets last."""
    return [row.name for row in (*DATASETS, *own)]


def choose_datasets(
    names: str | Sequence[str] | None, own: Sequence[BenchmarkDataset] = ()
) -> list[BenchmarkDataset]:
    """Return the rows of these names; None takes all own ones, or else all of the catalogue.

    Raises:
        InvalidInputError: For unknown names, with the nearest ones, or if own ones have the same name.
    """
    known = {row.name: row for row in (*DATASETS, *own)}
    if len(known) != len(DATASETS) + len(own):
        raise InvalidInputError(f"Each dataset needs a name of its own, but there are {dataset_names(own)[-len(own):]}")
    if names is None:
        return list(own or DATASETS)
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            raise InvalidInputError(f"There is no dataset {name!r}. {nearest_names(name, known)}")
    return [known[name] for name in dict.fromkeys(names)]


def find_status(row: BenchmarkDataset, input_folder: str | os.PathLike) -> str:
    """Look, without touching anything, whether a dataset is there.

    Returns:
        `there`; `archive` if it will be unpacked; `download` if it will be downloaded; `missing` if it has to be
        placed by hand.
    """
    if row.is_own:
        return "there" if all(path.exists() for path in (*row.images, *row.labels)) else "missing"
    folder = Path(input_folder).expanduser() / row.name
    if all(_matches(folder, pattern) for pattern in row.layout):
        return "there"
    if any(_matches(folder, pattern) for pattern in row.archives):
        return "archive"
    return "download" if row.downloads else "missing"


def _matches(folder: Path, pattern: str) -> bool:
    return next(glob.iglob(str(Path(glob.escape(str(folder))) / pattern), recursive=True), None) is not None


def describe_source(row: BenchmarkDataset, input_folder: str | os.PathLike) -> str:
    """Say where a dataset of torch-em comes from, and what has to be placed where."""
    folder = Path(input_folder).expanduser() / row.name
    layout = ", ".join(str(folder / pattern) for pattern in row.layout)
    archives = f" or the archive as {' or '.join(str(folder / name) for name in row.archives)}" if row.archives else ""
    return f"It comes from {' and '.join(find_urls(row))}. Place its files so that there are {layout}{archives}."


def find_urls(row: BenchmarkDataset) -> list[str]:
    """Return the addresses that torch-em downloads from; or, if it downloads nothing, those that it names."""
    if row.source:
        return [row.source]
    module = _module(row)
    constants = [value for name, value in vars(module).items() if "URL" in name.upper() or name == "BUCKET"]
    words = {"images", "labelled", *(str(v) for arguments in row.arguments for v in arguments.values())}
    urls = [url for constant in constants for url in _flatten(constant, words)]
    if not urls:
        found = re.findall(r"https?://[^\s\"'`<>)]+[^\s\"'`<>).,]", inspect.getsource(module))
        urls = [url for url in found if "//doi.org/" not in url] or found
    return list(dict.fromkeys(urls))


def _flatten(value: Any, words: set[str]) -> Iterator[str]:
    """Addresses in nested dictionaries; where a key is one of the words, only what is below it."""
    if isinstance(value, str):
        if re.match(r"(https?|s3|ftp)://", value):
            yield value
    elif isinstance(value, Mapping):
        keys = [key for key in value if str(key) in words] or [*value]
        for key in keys:
            yield from _flatten(value[key], words)


def _module(row: BenchmarkDataset) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the packages that it imports have to say about each other
        return importlib.import_module(f"torch_em.data.datasets.{row.function.partition(':')[0]}")


def _function(row: BenchmarkDataset) -> Any:
    return getattr(_module(row), row.function.partition(":")[2])


def find_files_of(
    row: BenchmarkDataset, input_folder: str | os.PathLike, download: bool = True
) -> list[tuple[Path, Path]]:
    """Return the image and label files of a dataset, which is downloaded and unpacked if needed.

    Args:
        row: The dataset.
        input_folder: The folder of all datasets.
        download: Whether to download it if it is not there.

    Raises:
        DatasetMissingError: If it is not there and could not be downloaded or unpacked.
    """
    if row.is_own:
        return list(zip(row.images, row.labels))
    folder = Path(input_folder).expanduser() / row.name
    status = find_status(row, input_folder)
    if status == "missing" or (status == "download" and not download):
        raise DatasetMissingError(f"The dataset {row.name!r} is not there. {describe_source(row, input_folder)}")
    # torch-em takes folders that it made before a download failed for complete ones.
    _remove_empty(folder)
    # Some of its functions refuse an archive that was placed by hand if they may download.
    try:
        found = [
            pair for arguments in row.arguments
            for pair in _pairs(_function(row)(str(folder), **arguments, download=download and row.downloads))
        ]
        _check_pairs(found)
    except Exception as error:  # anything: it runs the code of others, on files of others
        _remove_empty(folder)
        reason = textwrap.shorten(str(error) or "no reason given", 200, placeholder=" ...").rstrip(".")
        what = {"there": "read", "archive": "unpacked"}.get(status, "downloaded")
        raise DatasetMissingError(
            f"The dataset {row.name!r} could not be {what}: {reason} ({type(error).__name__}). "
            f"{describe_source(row, input_folder)}"
        ) from error
    return found


def _pairs(found: Any) -> Iterator[tuple[Path, Path]]:
    """Pairs of files out of what the functions return: lists, folders, or one file for both; perhaps with keys."""
    images, labels, pattern = (*found[:2], found[2]) if isinstance(found, tuple) and len(found) == 5 else (
        (*found, None) if isinstance(found, tuple) else (found, found, None)
    )
    yield from zip(_files(images, pattern), _files(labels, pattern), strict=True)


def _files(found: Any, pattern: str | None) -> list[Path]:
    from ..core.readers import is_zarr
    from .pairing import natural_key

    if not isinstance(found, str | os.PathLike):
        return [Path(path) for path in found]
    path = Path(found)
    if path.is_dir() and not is_zarr(path):
        return sorted(path.glob(pattern or "*.tif"), key=natural_key)
    return [path]


def _check_pairs(pairs: Sequence[tuple[Path, Path]]) -> None:
    if not pairs:
        raise FileNotFoundError("there are no files in it")
    missing = next((path for pair in pairs for path in pair if not path.exists()), None)
    if missing is not None:
        raise FileNotFoundError(f"there is no {missing}")


def _remove_empty(folder: Path) -> None:
    """Remove folders without files."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(parent)
