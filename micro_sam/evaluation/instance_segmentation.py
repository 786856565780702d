"""Automatic segmentation of many images with the settings that are best on images with known truth."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.errors import InvalidInputError, OutputExistsError, require_positive_int
from ..core.image import open_image
from ..core.inputs import InputFile, name_outputs
from ..core.output import is_done, is_same, label_stem, prepare_folder, write_json, write_labels
from ..core.progress import Step, Steps, drain, during
from ..embeddings.encode import embedding_steps
from ..embeddings.signature import compute_data_signature
from ..segmentation.settings import check_tiled, full_options, mode_of
from ..segmentation.workflow import Segmenter, initialize_steps, output_settings, segmentation_steps
from .evaluation import write_csv
from .grid_results import evaluate_instance_segmentation_grid_search, save_grid_search_best_params
from .grid_search import check_names, combinations, score_steps
from .grid_values import (
    GridSearchValues,
    default_grid_search_values_amg,
    default_grid_search_values_apg,
    default_grid_search_values_instance_segmentation_with_decoder,
)
from .pairing import pair_files, read_label_image

__all__ = [
    "GridSearchValues", "default_grid_search_values_amg", "default_grid_search_values_apg",
    "default_grid_search_values_instance_segmentation_with_decoder", "evaluate_instance_segmentation_grid_search",
    "run_instance_segmentation_grid_search", "run_instance_segmentation_grid_search_and_inference",
    "run_instance_segmentation_inference", "save_grid_search_best_params",
]

logger = logging.getLogger(__name__)

_COLUMNS = {"mSA": "mSA", "SA50": "SA50", "SA75": "SA75", "Precision": "Precision", "Recall": "Recall",
            "F1 Score": "F1"}
TilingParams = dict[str, tuple[int, int]]


class TilingParamsError(InvalidInputError, RuntimeError):
    """`tiling_window_params` does not hold what it has to."""


def check_tiling(tiling_window_params: Mapping[str, Sequence[int]] | None) -> TilingParams:
    """Return `tile_shape` and `halo`, or nothing for None.

    Raises:
        TilingParamsError: If one of the two is missing, or there is something else.
    """
    if tiling_window_params is None:
        return {}
    if not isinstance(tiling_window_params, Mapping) or {*tiling_window_params} != {"tile_shape", "halo"}:
        raise TilingParamsError(
            "tiling_window_params must be a dictionary with tile_shape (y, x) and halo (y, x) in pixels, but is "
            f"{tiling_window_params!r}."
        )
    return {name: tuple(value) for name, value in tiling_window_params.items()}


def embedding_path(embedding_dir: str | os.PathLike | None, image_path: str | os.PathLike) -> Path | None:
    return None if embedding_dir is None else Path(embedding_dir) / f"{label_stem(image_path)}.zarr"


def named_outputs(image_paths: Sequence[str | os.PathLike], folder: str | os.PathLike, suffix: str) -> list[Path]:
    """Return `<folder>/<name of the image><suffix>` for each image.

    Raises:
        InvalidInputError: If there are no images, or two have the same name.
    """
    if len(image_paths) == 0:
        raise InvalidInputError("There are no images: the list of paths is empty.")
    return name_outputs([InputFile(Path(path)) for path in image_paths], Path(folder), suffix)


def run_instance_segmentation_grid_search(
    segmenter: Segmenter,
    grid_search_values: GridSearchValues,
    image_paths: list[str | os.PathLike],
    gt_paths: list[str | os.PathLike],
    result_dir: str | os.PathLike,
    embedding_dir: str | os.PathLike | None,
    fixed_generate_kwargs: dict[str, Any] | None = None,
    verbose_gs: bool = False,
    image_key: str | None = None,
    gt_key: str | None = None,
    rois: tuple[slice, ...] | None = None,
    tiling_window_params: TilingParams | None = None,
    *,
    n_workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Score a segmenter on images for all combinations of settings.

    Each image is initialised once, and intermediate results are shared between combinations, see `grid_search`. Its
    results are written to `<result_dir>/<image>.csv`, with a record of how they were made beside it; a repeated call
    goes on with the first image that has none.

    Args:
        segmenter: The segmenter.
        grid_search_values: For each setting of `segmenter.generate` the values to try.
        image_paths: The images.
        gt_paths: Their label images; files are paired by name, or in their order if no names are the same.
        result_dir: Where to write the results.
        embedding_dir: Where to keep the embeddings, `<image>.zarr` each; None keeps them in memory.
        fixed_generate_kwargs: Other settings of `generate`.
        verbose_gs: Whether to show progress.
        image_key: Name of the image within a container.
        gt_key: Name of the labels within a container.
        rois: The part (y, x) of each image to use.
        tiling_window_params: `tile_shape` and `halo` (y, x) in pixels, for a tiled segmenter.
        n_workers: Number of threads; None takes as many as there are cores. It does not change the result.
        overwrite: Whether to replace results that were made with other settings or images.

    Raises:
        GridError: If a setting is both searched and fixed, or has no values.
        UnfitInputsError: If images and truth do not fit to each other.
        OutputExistsError: If there are results of other settings, and `overwrite` is not set.
        TilingParamsError, InvalidInputError, MissingFileError: If other arguments are wrong.
    """
    steps = grid_search_steps(
        segmenter, grid_search_values, image_paths, gt_paths, result_dir, embedding_dir,
        fixed_generate_kwargs=fixed_generate_kwargs, keys=(image_key, gt_key), rois=rois,
        tiling_window_params=tiling_window_params, n_workers=n_workers, overwrite=overwrite,
    )
    drain(steps, verbose=verbose_gs)


def grid_search_steps(
    segmenter: Segmenter,
    grid_search_values: GridSearchValues,
    image_paths: Sequence[str | os.PathLike],
    gt_paths: Sequence[str | os.PathLike],
    result_dir: str | os.PathLike,
    embedding_dir: str | os.PathLike | None,
    *,
    fixed_generate_kwargs: dict[str, Any] | None = None,
    keys: tuple[str | None, str | None] = (None, None),
    rois: tuple[slice, ...] | None = None,
    tiling_window_params: TilingParams | None = None,
    n_workers: int | None = None,
    overwrite: bool = False,
) -> Steps[None]:
    """Generator behind `run_instance_segmentation_grid_search`; `keys` are those of images and labels."""
    fixed = dict(fixed_generate_kwargs or {})
    options = combinations(grid_search_values, fixed, segmenter)
    tiling = check_tiling(tiling_window_params)
    check_tiled(segmenter, tiling.get("tile_shape"))
    if n_workers is not None:
        require_positive_int("n_workers", n_workers)
    pairs = pair_files(list(image_paths), list(gt_paths), ("images", "ground truths"))
    outputs = named_outputs([image for image, _ in pairs], result_dir, ".csv")
    prepare_folder(outputs[0])
    predictor, roi, text = segmenter._predictor, ... if rois is None else rois, "Grid search"
    for n, ((image_path, gt_path), output) in enumerate(zip(pairs, outputs)):
        here = Step(n * len(options), len(pairs) * len(options), text)
        yield here
        image = open_image(image_path, keys[0], ndim=2).read()[roi]
        truth = read_label_image(gt_path, keys[1])[roi]
        settings = {
            **output_settings(predictor, segmenter, image, **tiling, **fixed), "truth": compute_data_signature(truth),
            "grid": full_options(lambda: None, {name: list(values) for name, values in grid_search_values.items()}),
        }
        if _has_results(output, settings, overwrite):
            continue
        embeddings = yield from during(embedding_steps(
            predictor, image, embedding_path(embedding_dir, image_path), ndim=2, **tiling
        ), here)
        yield from during(initialize_steps(segmenter, image, embeddings, **tiling), here)
        scores = yield from _shifted(score_steps(segmenter, options, truth, n_workers), here)
        rows = [
            {
                "image_name": label_stem(image_path), **{_COLUMNS[name]: value for name, value in of_options.items()},
                **{name: chosen[name] for name in grid_search_values},
            }
            for chosen, of_options in zip(options, scores)
        ]
        # The record goes first: a table is always one that the record describes, or will be computed.
        output.unlink(missing_ok=True)
        write_json(_record_path(output), {"micro_sam": {"settings": settings}})
        write_csv(pd.DataFrame(rows, dtype=object), output, index=False)
    yield Step(len(pairs) * len(options), len(pairs) * len(options), text)


def _shifted(steps: Steps[Any], start: Step) -> Steps[Any]:
    """The steps of a piece of work as part of a longer one."""
    try:
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                return stop.value
            yield Step(start.done + step.done, start.total, start.text)
    finally:
        steps.close()


def _record_path(output: Path) -> Path:
    return output.with_suffix(".json")


def _has_results(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    if overwrite or not output.exists():
        return False
    if not is_same(_record_path(output), settings):
        raise OutputExistsError(
            f"{output} exists, and there is no record of how it was made. Pass overwrite=True to replace it, or choose "
            "another result_dir."
        )
    return True


def run_instance_segmentation_inference(
    segmenter: Segmenter,
    image_paths: list[str | os.PathLike],
    embedding_dir: str | os.PathLike | None,
    prediction_dir: str | os.PathLike,
    generate_kwargs: dict[str, Any] | None = None,
    tiling_window_params: TilingParams | None = None,
    *,
    overwrite: bool = False,
    verbose: bool = True,
) -> None:
    """Segment images and write the labels to `<prediction_dir>/<image>.tif`.

    Labels that were made before from the same image with the same model and settings are kept.

    Args:
        segmenter: The segmenter.
        image_paths: The images.
        embedding_dir: Where to keep the embeddings, `<image>.zarr` each; None keeps them in memory.
        prediction_dir: Where to write the labels.
        generate_kwargs: Settings of `segmenter.generate`.
        tiling_window_params: `tile_shape` and `halo` (y, x) in pixels, for a tiled segmenter.
        overwrite: Whether to replace labels that were made with other settings.
        verbose: Whether to show progress.

    Raises:
        OutputExistsError: If there are labels of other settings, and `overwrite` is not set.
        TilingParamsError, InvalidInputError, MissingFileError: If other arguments are wrong.
    """
    steps = inference_steps(
        segmenter, image_paths, embedding_dir, prediction_dir, generate_kwargs, tiling_window_params, overwrite
    )
    drain(steps, verbose=verbose)


def inference_steps(
    segmenter: Segmenter,
    image_paths: Sequence[str | os.PathLike],
    embedding_dir: str | os.PathLike | None,
    prediction_dir: str | os.PathLike,
    generate_kwargs: Mapping[str, Any] | None = None,
    tiling_window_params: TilingParams | None = None,
    overwrite: bool = False,
) -> Steps[None]:
    """Generator behind `run_instance_segmentation_inference`."""
    tiling, options = check_tiling(tiling_window_params), dict(generate_kwargs or {})
    check_tiled(segmenter, tiling.get("tile_shape"))
    check_names(options, segmenter)
    outputs = named_outputs(image_paths, prediction_dir, ".tif")
    prepare_folder(outputs[0])
    for n, (path, output) in enumerate(zip(image_paths, outputs)):
        here = Step(n, len(outputs), "Segment images")
        yield here
        image = open_image(path, ndim=2).read()
        settings = output_settings(segmenter._predictor, segmenter, image, **tiling, **options)
        if is_done(output, settings, overwrite):
            continue
        labels, _ = yield from during(segmentation_steps(
            segmenter._predictor, segmenter, image, embedding_path=embedding_path(embedding_dir, path), **tiling,
            **options,
        ), here)
        write_labels(output, labels, settings)
    yield Step(len(outputs), len(outputs), "Segment images")


def run_instance_segmentation_grid_search_and_inference(
    segmenter: Segmenter,
    grid_search_values: GridSearchValues,
    val_image_paths: list[str | os.PathLike],
    val_gt_paths: list[str | os.PathLike],
    test_image_paths: list[str | os.PathLike],
    embedding_dir: str | os.PathLike | None,
    prediction_dir: str | os.PathLike,
    experiment_folder: str | os.PathLike,
    result_dir: str | os.PathLike,
    fixed_generate_kwargs: dict[str, Any] | None = None,
    verbose_gs: bool = True,
    tiling_window_params: TilingParams | None = None,
    *,
    n_workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Find the best settings on the validation images, and segment the test images with them.

    Args:
        segmenter: The segmenter.
        grid_search_values: See `run_instance_segmentation_grid_search`.
        val_image_paths: The images for the search.
        val_gt_paths: Their label images.
        test_image_paths: The images to segment.
        embedding_dir: Where to keep the embeddings; None keeps them in memory.
        prediction_dir: Where to write the labels of the test images.
        experiment_folder: Where to write the best settings, see `save_grid_search_best_params`.
        result_dir: Where to write the results of the search.
        fixed_generate_kwargs: Other settings of `generate`, for search and test.
        verbose_gs: Whether to show progress.
        tiling_window_params: `tile_shape` and `halo` (y, x) in pixels, for a tiled segmenter.
        n_workers: Number of threads of the search.
        overwrite: Whether to replace results and labels that were made with other settings.

    Raises:
        InvalidInputError, OutputExistsError: See `run_instance_segmentation_grid_search` and
            `run_instance_segmentation_inference`.
    """
    named_outputs(test_image_paths, prediction_dir, ".tif")  # before the search, which takes long
    run_instance_segmentation_grid_search(
        segmenter, grid_search_values, val_image_paths, val_gt_paths, result_dir, embedding_dir,
        fixed_generate_kwargs=fixed_generate_kwargs, verbose_gs=verbose_gs, tiling_window_params=tiling_window_params,
        n_workers=n_workers, overwrite=overwrite,
    )
    names = [label_stem(path) for path in val_image_paths]
    best, score = evaluate_instance_segmentation_grid_search(result_dir, list(grid_search_values), image_names=names)
    logger.info("Best settings, with a mean mSA of %.3f: %s", score, best)
    save_grid_search_best_params(best, score, experiment_folder, mode=mode_of(segmenter))
    run_instance_segmentation_inference(
        segmenter, test_image_paths, embedding_dir, prediction_dir, {**(fixed_generate_kwargs or {}), **best},
        tiling_window_params, overwrite=overwrite, verbose=verbose_gs,
    )
