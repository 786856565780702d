"""Segmenting images with prompts from their ground truth, for evaluation.

Results are written to one label image per image, `<image>.tif`, with a record of model, images and settings. What was
made before with the same ones is kept, so that a run that was interrupted goes on.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, require_positive_int
from ..core.image import open_image
from ..core.labels import relabel_consecutive
from ..core.output import is_done, prepare_folder, write_labels
from ..core.progress import Step, Steps, drain, during
from ..embeddings.encode import embedding_steps, set_precomputed
from ..embeddings.signature import compute_data_signature
from ..inference import batched_inference
from ..segmentation.settings import model_settings
from .automatic import run_amg, run_apg, run_instance_segmentation_with_decoder
from .experiments import check_setting
from .instance_segmentation import embedding_path, named_outputs
from .iterative import iterative_segmentations
from .pairing import pair_files, read_label_image
from .prompt_files import (
    check_boxes,
    check_points,
    object_boxes,
    prompt_paths,
    read_prompt_file,
    sample_points,
    write_prompt_file,
)

__all__ = [
    "precompute_all_embeddings", "precompute_all_prompts", "run_amg", "run_apg",
    "run_inference_with_iterative_prompting", "run_inference_with_prompts", "run_instance_segmentation_with_decoder",
]


def precompute_all_embeddings(
    predictor: SamPredictor,
    image_paths: list[str | os.PathLike],
    embedding_dir: str | os.PathLike,
    *,
    verbose: bool = True,
) -> None:
    """Compute the embeddings of images and keep them as `<embedding_dir>/<image>.zarr`.

    Args:
        predictor: The predictor.
        image_paths: The images.
        embedding_dir: The folder.
        verbose: Whether to show progress.

    Raises:
        InvalidInputError: If there are no images, or two have the same name.
        EmbeddingMismatchError: If there are embeddings of another image or model.
    """
    def steps() -> Steps[None]:
        stores = named_outputs(image_paths, embedding_dir, ".zarr")
        for n, (path, store) in enumerate(zip(image_paths, stores)):
            here = Step(n, len(stores), "Compute embeddings of images")
            yield here
            yield from during(embedding_steps(predictor, open_image(path, ndim=2).read(), store, ndim=2), here)
        yield Step(len(stores), len(stores), "Compute embeddings of images")

    drain(steps(), verbose=verbose)


def _read_truth(path: str | os.PathLike) -> np.ndarray:
    truth = relabel_consecutive(read_label_image(path))
    if truth.ndim != 2:
        raise InvalidInputError(f"The labels in {path} must have the shape (Y, X), but have {truth.shape}.")
    return truth


def precompute_all_prompts(
    gt_paths: list[str | os.PathLike],
    prompt_save_dir: str | os.PathLike,
    prompt_settings: list[dict[str, Any]],
    *,
    dilation: int = 5,
    seed: int = 0,
    verbose: bool = True,
) -> None:
    """Derive prompts from label images and keep them, see `prompt_files` for the format.

    Prompts that are in the files already are kept; those of other label images are added.

    Args:
        gt_paths: The label images. Their file names must differ.
        prompt_save_dir: The folder.
        prompt_settings: Which prompts, see `experiments`.
        dilation: Distance in pixels that negative points keep from their object.
        seed: Seed of the random choices.
        verbose: Whether to show progress.

    Raises:
        InvalidInputError: If settings or label images are wrong.
        PromptFileError: If a file cannot be read.
    """
    settings = [check_setting(setting) for setting in prompt_settings]
    names = [Path(path).name for path in gt_paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"Prompts are kept by the name of the label file, but two are named {twice[0]}.")

    jobs = []
    for setting in settings:
        points_path, boxes_path = prompt_paths(prompt_save_dir, setting)
        if points_path is not None:
            numbers = {name: setting[name] for name in ("n_positives", "n_negatives")}
            jobs.append((points_path, partial(sample_points, **numbers, dilation=dilation, seed=seed)))
        if boxes_path is not None:
            jobs.append((boxes_path, object_boxes))

    def steps() -> Steps[None]:
        for n, (path, derive) in enumerate(jobs):
            content = read_prompt_file(path)
            missing = [gt_path for gt_path in gt_paths if Path(gt_path).name not in content]
            for gt_path in missing:
                yield Step(n, len(jobs), "Compute prompts")
                content[Path(gt_path).name] = derive(_read_truth(gt_path))
            if missing:
                write_prompt_file(path, content)
        yield Step(len(jobs), len(jobs), "Compute prompts")

    drain(steps(), verbose=verbose)


def _image_and_truth(image_path, gt_path) -> tuple[np.ndarray, np.ndarray]:
    image, truth = open_image(image_path, ndim=2).read(), _read_truth(gt_path)
    if image.shape[:2] != truth.shape:
        raise InvalidInputError(
            f"{image_path} has the shape {image.shape[:2]}, but its truth {gt_path} has {truth.shape}. Check that they "
            "belong together."
        )
    return image, truth


def run_inference_with_prompts(
    predictor: SamPredictor,
    image_paths: list[str | os.PathLike],
    gt_paths: list[str | os.PathLike],
    embedding_dir: str | os.PathLike | None,
    prediction_dir: str | os.PathLike,
    use_points: bool,
    use_boxes: bool,
    n_positives: int,
    n_negatives: int,
    dilation: int = 5,
    prompt_save_dir: str | os.PathLike | None = None,
    batch_size: int = 512,
    *,
    seed: int = 0,
    overwrite: bool = False,
    verbose: bool = True,
) -> None:
    """Segment all objects of images from points or boxes that are derived from their ground truth.

    The first positive point is the pixel that lies deepest inside the object. For a single positive point without box
    three masks are predicted, of which the one with the highest predicted IoU is taken. The masks of an image are
    merged as in `micro_sam.inference.batched_inference`.

    Args:
        predictor: The predictor.
        image_paths: The images.
        gt_paths: Their label images; files are paired by name, or in their order if no names are the same.
        embedding_dir: Where to keep the embeddings, `<image>.zarr` each; None keeps them in memory.
        prediction_dir: Where to write the labels.
        use_points: Whether to use points.
        use_boxes: Whether to use the bounding boxes of the objects.
        n_positives: Positive points per object; without effect for boxes alone.
        n_negatives: Negative points per object; likewise.
        dilation: Distance in pixels that negative points keep from their object.
        prompt_save_dir: Where prompts are kept, see `precompute_all_prompts`; None derives them anew.
        batch_size: Number of objects that go through the mask decoder together.
        seed: Seed of the random choices.
        overwrite: Whether to replace labels that were made with other settings.
        verbose: Whether to show progress.

    Raises:
        UnfitInputsError: If images and truth do not fit to each other.
        InvalidInputError: If neither points nor boxes are asked for, or other arguments are wrong.
        PromptFileError: If prompts that were kept are not those of the truth.
        OutputExistsError: If there are labels of other settings, and `overwrite` is not set.
    """
    setting = check_setting({
        "use_points": use_points, "use_boxes": use_boxes, "n_positives": n_positives, "n_negatives": n_negatives,
    })
    require_positive_int("batch_size", batch_size)
    pairs = pair_files(list(image_paths), list(gt_paths), ("images", "ground truths"))
    if prompt_save_dir is not None:
        precompute_all_prompts(
            [gt_path for _, gt_path in pairs], prompt_save_dir, [setting], dilation=dilation, seed=seed, verbose=verbose
        )
    kept = _kept_prompts(prompt_save_dir, setting)
    multimasking = not use_boxes and (setting["n_positives"], setting["n_negatives"]) == (1, 0)

    def steps() -> Steps[None]:
        outputs = named_outputs([image for image, _ in pairs], prediction_dir, ".tif")
        prepare_folder(outputs[0])
        for n, ((image_path, gt_path), output) in enumerate(zip(pairs, outputs)):
            here = Step(n, len(pairs), "Segment images from prompts")
            yield here
            image, truth = _image_and_truth(image_path, gt_path)
            prompts = _prompts_for(truth, setting, dilation, seed, kept, Path(gt_path).name)
            settings = {
                **_settings(predictor, image), **setting,
                "prompts": {name: compute_data_signature(values) for name, values in prompts.items()},
            }
            if is_done(output, settings, overwrite):
                continue
            embeddings = yield from during(
                embedding_steps(predictor, image, embedding_path(embedding_dir, image_path), ndim=2), here
            )
            set_precomputed(predictor, embeddings)
            labels = batched_inference(predictor, None, batch_size, multimasking=multimasking, **prompts)
            write_labels(output, labels, settings)
        yield Step(len(pairs), len(pairs), "Segment images from prompts")

    drain(steps(), verbose=verbose)


def _kept_prompts(folder: str | os.PathLike | None, setting: Mapping[str, Any]) -> tuple[dict, dict] | None:
    """The contents of the files with points and with boxes."""
    if folder is None:
        return None
    return tuple({} if path is None else read_prompt_file(path) for path in prompt_paths(folder, setting))


def _prompts_for(
    truth: np.ndarray, setting: Mapping[str, Any], dilation: int, seed: int, kept: tuple[dict, dict] | None, name: str
) -> dict[str, np.ndarray]:
    """Prompts as arguments of `batched_inference`, from what was kept or derived anew."""
    prompts: dict[str, np.ndarray] = {}
    if setting["use_points"]:
        prompts["points"], prompts["point_labels"] = (
            sample_points(truth, setting["n_positives"], setting["n_negatives"], dilation, seed) if kept is None
            else check_points(kept[0][name], truth, name)
        )
    if setting["use_boxes"]:
        prompts["boxes"] = object_boxes(truth) if kept is None else check_boxes(kept[1][name], truth, name)
    return prompts


def _settings(predictor: SamPredictor, image: np.ndarray) -> dict[str, Any]:
    return {
        **model_settings(predictor), "canvas": predictor.model.image_encoder.img_size,
        "image": compute_data_signature(image),
    }


def run_inference_with_iterative_prompting(
    predictor: SamPredictor,
    image_paths: list[str | os.PathLike],
    gt_paths: list[str | os.PathLike],
    embedding_dir: str | os.PathLike | None,
    prediction_dir: str | os.PathLike,
    start_with_box_prompt: bool = True,
    dilation: int = 5,
    batch_size: int = 32,
    n_iterations: int = 8,
    use_masks: bool = False,
    *,
    seed: int = 0,
    overwrite: bool = False,
    verbose: bool = True,
) -> None:
    """Segment all objects of images from a first prompt, then from corrections where masks and truth differ.

    See `iterative.iterate_prompts`. The labels are written to `<prediction_dir>/iteration<two digits>/<image>.tif`. An
    image is skipped when all its iterations are there.

    Args:
        predictor: The predictor.
        image_paths: The images.
        gt_paths: Their label images; files are paired by name, or in their order if no names are the same.
        embedding_dir: Where to keep the embeddings, `<image>.zarr` each; None keeps them in memory.
        prediction_dir: Where to write the labels.
        start_with_box_prompt: Whether the first prompt is a box, else a point.
        dilation: See `iterative.iterate_prompts`.
        batch_size: Number of objects that go through the mask decoder together.
        n_iterations: Number of predictions per object: one for the first prompt, the others for corrections.
        use_masks: Whether the logits of the last prediction are a prompt for the next, too.
        seed: Seed of the corrections.
        overwrite: Whether to replace labels that were made with other settings.
        verbose: Whether to show progress.

    Raises:
        UnfitInputsError: If images and truth do not fit to each other.
        OutputExistsError: If there are labels of other settings, and `overwrite` is not set.
        InvalidInputError: If other arguments are wrong.
    """
    require_positive_int("n_iterations", n_iterations)
    pairs = pair_files(list(image_paths), list(gt_paths), ("images", "ground truths"))
    start = "box" if start_with_box_prompt else "point"

    def steps() -> Steps[None]:
        folders = [Path(prediction_dir) / f"iteration{k:02}" for k in range(n_iterations)]
        outputs = list(zip(*(named_outputs([image for image, _ in pairs], folder, ".tif") for folder in folders)))
        prepare_folder(outputs[0][0])
        for n, ((image_path, gt_path), of_image) in enumerate(zip(pairs, outputs)):
            here = Step(n, len(pairs), f"Segment images from a {start} and corrections")
            yield here
            image, truth = _image_and_truth(image_path, gt_path)
            settings = {
                **_settings(predictor, image), "truth": compute_data_signature(truth), "start": start,
                "use_masks": bool(use_masks), "seed": seed,
            }
            done = [is_done(output, settings, overwrite) for output in of_image]
            if all(done):
                continue
            embeddings = yield from during(
                embedding_steps(predictor, image, embedding_path(embedding_dir, image_path), ndim=2), here
            )
            segmentations = iterative_segmentations(
                predictor, embeddings, truth, start=start, n_iterations=n_iterations, use_masks=use_masks,
                dilation=dilation, batch_size=batch_size, rng=seed,
            )
            for output, labels in zip(of_image, segmentations):
                write_labels(output, labels, settings)
        yield Step(len(pairs), len(pairs), f"Segment images from a {start} and corrections")

    drain(steps(), verbose=verbose)
