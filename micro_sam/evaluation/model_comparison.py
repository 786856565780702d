"""Models compared object by object: the same prompts for two or three of them, and pictures where they differ most.

`generate_data_for_model_comparison` writes one HDF5 file `sample_<n>.h5` per image. It holds the dataset `image`, the
attribute `model_names`, and a group per object, named by its id, with the attributes `point_coords`, `point_labels`
and `box` (all in the order y, x), the dataset `gt_mask`, and `box/mask<k>` and `points/mask<k>` for each model.
"""

import importlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from segment_anything import SamPredictor

from ..core.errors import (
    ImageReadError,
    InvalidInputError,
    MissingFileError,
    MissingPackageError,
    NoObjectsError,
    OutputExistsError,
    require_positive_int,
)
from ..core.labels import compute_iou, get_centers_and_bounding_boxes
from ..core.output import temporary_path
from ..core.progress import Step, Steps, drain
from ..embeddings.encode import precompute_image_embeddings
from ..inference import batched_inference
from ..models.loading import get_sam_model
from ..segmentation.settings import model_settings
from .comparison_figures import (
    _enhance_image,
    _overlay_mask,
    _overlay_outline,
    draw_object,
    figure_size,
    save_figure,
)

if TYPE_CHECKING:
    import h5py
    from torch.utils.data import DataLoader

__all__ = [
    "PROMPTS", "ComparedObject", "ComparedSample", "_enhance_image", "_overlay_mask", "_overlay_outline",
    "generate_data_for_model_comparison", "model_comparison", "model_comparison_with_napari", "rank_objects",
    "read_sample", "sample_paths",
]

PROMPTS = ("points", "box")


@dataclass(frozen=True, eq=False)
class ComparedObject:
    """An object of the ground truth and what each model made of its prompts.

    Attributes:
        id: The id in the ground truth.
        box: Bounding box (y0, x0, y1, x1), half-open.
        points: Points (P, 2), in the order y, x.
        point_labels: Labels (P,): 1 for the object, 0 for background.
        truth: Mask (Y, X), bool.
        masks: For each of `PROMPTS` one mask (Y, X), bool, per model.
        ious: The IoU of each of these with the truth.
    """

    id: int
    box: tuple[int, int, int, int]
    points: np.ndarray
    point_labels: np.ndarray
    truth: np.ndarray
    masks: dict[str, list[np.ndarray]]
    ious: dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class ComparedSample:
    """An image (Y, X[, 3]) with its objects and the names of the models."""

    name: str
    image: np.ndarray
    objects: list[ComparedObject]
    model_names: list[str]


def generate_data_for_model_comparison(
    loader: "DataLoader",
    output_folder: str | os.PathLike,
    model_type1: str,
    model_type2: str,
    n_samples: int,
    model_type3: str | None = None,
    checkpoint1: str | os.PathLike | None = None,
    checkpoint2: str | os.PathLike | None = None,
    checkpoint3: str | os.PathLike | None = None,
    peft_kwargs1: dict[str, Any] | None = None,
    peft_kwargs2: dict[str, Any] | None = None,
    peft_kwargs3: dict[str, Any] | None = None,
    *,
    model_names: Sequence[str] | None = None,
    device: str | None = None,
    batch_size: int = 32,
    verbose: bool = True,
    overwrite: bool = False,
) -> None:
    """Segment all objects of some images with two or three models, from one point and from a box each.

    Samples of the same models that are in the folder already are kept, so that an interrupted run goes on.

    Args:
        loader: Yields images (B, C, Y, X) with one or three channels, and labels (B, 1 or more, Y, X), whose first
            channel has the ids, 0 for background; for example from `training.default_sam_loader`.
        output_folder: Where to write `sample_0.h5`, `sample_1.h5`, ...
        model_type1: The first model.
        model_type2: The second model.
        n_samples: The number of images. Images without objects do not count.
        model_type3: The third model.
        checkpoint1: A checkpoint for the first model.
        checkpoint2: A checkpoint for the second model.
        checkpoint3: A checkpoint for the third model.
        peft_kwargs1: Options of parameter-efficient finetuning of the first model, see `util.get_sam_model`.
        peft_kwargs2: The same of the second model.
        peft_kwargs3: The same of the third model.
        model_names: What the models are called in pictures; by default by their checkpoint or model type.
        device: The device; None chooses it.
        batch_size: Objects per call of the mask decoder.
        verbose: Whether to show progress.
        overwrite: Whether to replace samples of other models in the folder.

    Raises:
        InvalidInputError: If arguments do not fit.
        NoObjectsError: If the loader has fewer images with objects than asked for.
        OutputExistsError: If the folder has samples of other models, and `overwrite` is not set.
    """
    require_positive_int("n_samples", n_samples)
    chosen = [
        (model_type1, checkpoint1, peft_kwargs1), (model_type2, checkpoint2, peft_kwargs2),
        (model_type3, checkpoint3, peft_kwargs3),
    ]
    if model_type3 is None:
        if checkpoint3 is not None or peft_kwargs3 is not None:
            raise InvalidInputError("checkpoint3 and peft_kwargs3 belong to model_type3. Pass it as well.")
        chosen = chosen[:2]
    names = list(model_names or _default_names(chosen))
    if len(names) != len(chosen):
        raise InvalidInputError(f"There are {len(chosen)} models, but {len(names)} model_names.")
    predictors = [
        get_sam_model(model_type, device=device, checkpoint_path=checkpoint, peft_kwargs=peft)
        for model_type, checkpoint, peft in chosen
    ]
    drain(_generate_steps(loader, Path(output_folder), predictors, names, n_samples, batch_size, overwrite), verbose)


def _default_names(chosen: Sequence[tuple]) -> list[str]:
    """Model types; with a checkpoint the name of its file, or of its folder if files of all models are called alike."""
    names = [model if path is None else Path(path).stem for model, path, _ in chosen]
    if len(set(names)) == len(names):
        return names
    names = [model if path is None else f"{Path(path).parent.name}/{Path(path).stem}" for model, path, _ in chosen]
    return names if len(set(names)) == len(names) else [f"{name} ({k})" for k, name in enumerate(names, 1)]


def _generate_steps(
    loader, folder: Path, predictors: list[SamPredictor], names: list[str], n_samples: int, batch_size: int,
    overwrite: bool,
) -> Steps[None]:
    settings = [model_settings(predictor) for predictor in predictors]
    done, text = 0, "Compare models"
    yield Step(0, n_samples, text)
    for image, labels in itertools.islice(_with_objects(loader), n_samples):
        path = folder / f"sample_{done}.h5"
        if overwrite or not _is_done(path, settings):
            with temporary_path(path, is_folder=False) as new:
                _write_sample(new, image, labels, predictors, names, settings, batch_size)
        done += 1
        yield Step(done, n_samples, text)
    if done < n_samples:
        raise NoObjectsError(
            f"The loader has {done} images with objects, but n_samples is {n_samples}. Pass {done} or less, or a "
            "loader with more images."
        )


def _with_objects(loader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (Y, X[, 3]) and labels (Y, X) of a loader, those with objects only."""
    for x, y in loader:
        for image, labels in zip(np.asarray(x), np.asarray(y)):
            labels = labels[0] if labels.ndim == 3 else labels
            ids = labels.round().astype(np.int64)
            if image.ndim != 3 or len(image) not in (1, 3) or ids.shape != image.shape[1:]:
                raise InvalidInputError(
                    "The loader must yield images (B, 1 or 3, Y, X) and labels (B, C, Y, X), but an image has the "
                    f"shape {image.shape} and its labels have {labels.shape}."
                )
            if ids.max() > 0:
                yield (image[0] if len(image) == 1 else image.transpose(1, 2, 0)), ids


def _is_done(path: Path, settings: list[dict]) -> bool:
    if not path.exists():
        return False
    with _open(path) as file:
        found = json.loads(file.attrs.get("models", "null"))
    if found != settings:
        raise OutputExistsError(
            f"{path} was made with other models. Choose another output_folder, or pass overwrite to replace it."
        )
    return True


def _write_sample(path: Path, image, labels, predictors, names, settings, batch_size: int) -> None:
    import h5py

    centers, boxes = get_centers_and_bounding_boxes(labels)
    points = np.array([centers[id_][::-1] for id_ in boxes], dtype=float)[:, None]
    prompts = {
        "points": {"points": points, "point_labels": np.ones(points.shape[:2], dtype=int), "multimasking": True},
        "box": {"boxes": np.array([(x0, y0, x1, y1) for y0, x0, y1, x1 in boxes.values()])},
    }
    options = {"compression": "gzip"}
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image, **options)
        file.attrs["model_names"], file.attrs["models"] = names, json.dumps(settings)
        for id_, box in boxes.items():
            group = file.create_group(str(id_))
            group.attrs["box"] = box
            group.attrs["point_coords"], group.attrs["point_labels"] = np.array([centers[id_]]), np.array([1])
            group.create_dataset("gt_mask", data=(labels == id_).astype("uint8"), **options)
        for k, predictor in enumerate(predictors, 1):
            precompute_image_embeddings(predictor, image, ndim=2, verbose=False)
            for name, prompt in prompts.items():
                records = batched_inference(predictor, None, batch_size, return_instance_segmentation=False, **prompt)
                for id_, record in zip(boxes, records, strict=True):
                    mask = torch.as_tensor(record["segmentation"]).cpu().numpy().astype("uint8")
                    file[str(id_)].create_dataset(f"{name}/mask{k}", data=mask, **options)


def _open(path: Path) -> "h5py.File":
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ImageReadError(f"{path} cannot be read: {error}. Delete it, and generate it anew.") from error


def sample_paths(output_folder: str | os.PathLike) -> list[Path]:
    """Return the samples in a folder, by their number.

    Raises:
        MissingFileError: If there are none.
    """
    folder = Path(output_folder)
    paths = sorted(folder.glob("sample_*.h5"), key=lambda path: (len(path.stem), path.stem))
    if not paths:
        raise MissingFileError(
            f"There is no sample_0.h5 or the like in {folder}. Write them with generate_data_for_model_comparison."
        )
    return paths


def read_sample(path: str | os.PathLike) -> ComparedSample:
    """Read a sample; the IoUs are computed.

    Raises:
        ImageReadError: If the file is damaged or no sample.
    """
    path = Path(path)
    with _open(path) as file:
        if "image" not in file:
            raise ImageReadError(f"{path} is no sample of a comparison: it has no image. Choose another folder.")
        objects = [_read_object(int(name), group) for name, group in file.items() if name != "image"]
        n_models = max((len(item.masks["box"]) for item in objects), default=0)
        names = [str(name) for name in file.attrs.get("model_names", [f"model {k + 1}" for k in range(n_models)])]
        image = file["image"][...]
    return ComparedSample(path.stem, image, sorted(objects, key=lambda item: item.id), names)


def _read_object(id_: int, group: "h5py.Group") -> ComparedObject:
    truth = group["gt_mask"][...] > 0
    masks = {
        prompt: [group[f"{prompt}/mask{k}"][...] > 0 for k in range(1, 1 + len(group[prompt]))] for prompt in PROMPTS
    }
    ious = {prompt: [compute_iou(truth, mask) for mask in found] for prompt, found in masks.items()}
    points, labels = np.atleast_2d(group.attrs["point_coords"]), np.atleast_1d(group.attrs["point_labels"])
    return ComparedObject(id_, tuple(int(v) for v in group.attrs["box"]), points, labels, truth, masks, ious)


def rank_objects(objects: Sequence[ComparedObject], prompt: str, model: int, min_size: int = 0) -> list[ComparedObject]:
    """Return the objects that one of the first two models segments better than the other, the largest lead first.

    Args:
        objects: The objects.
        prompt: `box` or `points`.
        model: 1 or 2.
        min_size: Objects with fewer pixels in the ground truth are left out.
    """
    def lead(item: ComparedObject) -> float:
        first, second = item.ious[prompt][:2]
        return first - second if model == 1 else second - first

    found = [item for item in objects if np.count_nonzero(item.truth) >= min_size and lead(item) > 0]
    return sorted(found, key=lambda item: (-lead(item), item.id))


def model_comparison(
    output_folder: str | os.PathLike,
    n_images_per_sample: int,
    min_size: int,
    plot_folder: str | os.PathLike | None = None,
    point_radius: int = 4,
    outline_dilation: int = 0,
    have_model3: bool = False,
    enhance_image: bool = True,
    *,
    model_names: Sequence[str] | None = None,
) -> None:
    """Draw the objects in which the first two models differ most.

    Args:
        output_folder: The folder that `generate_data_for_model_comparison` wrote.
        n_images_per_sample: Number of objects per sample, kind of prompt and model.
        min_size: Objects with fewer pixels are left out.
        plot_folder: Where to write `<points or box>/advantage<1 or 2>/<sample>_<k>.svg`, replacing those that are
            there; None shows the pictures instead.
        point_radius: Radius of points, in points of the figure.
        outline_dilation: By how many pixels outlines are widened.
        have_model3: Whether to show a third model as well.
        enhance_image: Whether to equalise the histograms of the images.
        model_names: What the models are called; by default what is in the files.

    Raises:
        MissingFileError, ImageReadError: If there are no samples, or they cannot be read.
        InvalidInputError: If there is no third model, or numbers do not fit.
    """
    require_positive_int("n_images_per_sample", n_images_per_sample)
    for path in sample_paths(output_folder):
        sample = read_sample(path)
        names = _shown_names(sample, model_names, have_model3)
        image = _enhance_image(sample.image) if enhance_image else sample.image
        for prompt, model in itertools.product(PROMPTS, (1, 2)):
            ranked = rank_objects(sample.objects, prompt, model, min_size)[:n_images_per_sample]
            for k, item in enumerate(ranked):
                figure = _new_figure(figure_size(len(names)), on_screen=plot_folder is None)
                draw_object(
                    figure, image, item, prompt, names, point_radius=point_radius, outline_dilation=outline_dilation
                )
                if plot_folder is not None:
                    name = f"{sample.name}_{k}.svg"
                    save_figure(figure, Path(plot_folder) / prompt / f"advantage{model}" / name)
        if plot_folder is None:
            import matplotlib.pyplot as plt
            plt.show()
            plt.close("all")


def _shown_names(sample: ComparedSample, model_names: Sequence[str] | None, have_model3: bool) -> list[str]:
    n_shown = 3 if have_model3 else 2
    if len(sample.model_names) < n_shown:
        raise InvalidInputError(
            f"{sample.name} was made with {len(sample.model_names)} models, but have_model3 is set. Leave it out, or "
            "generate the data with model_type3."
        )
    names = list(sample.model_names if model_names is None else model_names)
    if len(names) < n_shown:
        raise InvalidInputError(f"{n_shown} models are shown, but there are {len(names)} model_names.")
    return names[:n_shown]


def _new_figure(size: tuple[float, float], on_screen: bool):
    if on_screen:
        import matplotlib.pyplot as plt
        return plt.figure(figsize=size, layout="constrained")
    from matplotlib.figure import Figure
    return Figure(figsize=size, layout="constrained")


def model_comparison_with_napari(output_folder: str | os.PathLike, show_points: bool = True) -> None:
    """Look at all samples in napari: the objects by how much the models differ, and what each model made of them.

    Args:
        output_folder: The folder that `generate_data_for_model_comparison` wrote.
        show_points: Whether to show what was segmented from points; else from boxes. It can be changed in the viewer.

    Raises:
        MissingFileError, ImageReadError: If there are no samples, or they cannot be read.
        MissingPackageError: If napari is not installed.
    """
    paths = sample_paths(output_folder)
    try:
        # Looked up by name: what shows things in napari is built on this module.
        view = importlib.import_module("micro_sam.sam_annotator.comparison_view")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Comparing models in napari needs napari, and {error.name} is not installed: pip install "
            "\"micro_sam[gui]\"."
        ) from error
    view.show_comparison(paths, "points" if show_points else "box")
