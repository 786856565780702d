"""Automatic segmentation of test images, with the settings that are best on validation images, mode by mode."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..segmentation.workflow import load_model
from .grid_results import MODE_NAMES
from .grid_values import (
    GridSearchValues,
    default_grid_search_values_amg,
    default_grid_search_values_apg,
    default_grid_search_values_instance_segmentation_with_decoder,
)
from .instance_segmentation import (
    TilingParams,
    check_tiling,
    run_instance_segmentation_grid_search_and_inference,
)


def _run_automatic(
    mode: str,
    grid_search_values: GridSearchValues,
    checkpoint: str | os.PathLike | None,
    model_type: str,
    experiment_folder: str | os.PathLike,
    val_image_paths: Sequence[str | os.PathLike],
    val_gt_paths: Sequence[str | os.PathLike],
    test_image_paths: Sequence[str | os.PathLike],
    peft_kwargs: dict[str, Any] | None,
    cache_embeddings: bool,
    tiling_window_params: TilingParams | None,
    *,
    image_size: int | None,
    device: str | None,
    verbose: bool,
    **options: Any,
) -> str:
    tiling = check_tiling(tiling_window_params)
    model = load_model(model_type, checkpoint, device, mode, peft_kwargs=peft_kwargs, image_size=image_size)
    experiment = Path(experiment_folder)
    folder = experiment / MODE_NAMES[mode]
    prediction_dir = folder / "inference"
    run_instance_segmentation_grid_search_and_inference(
        model.segmenter(bool(tiling)), grid_search_values, list(val_image_paths), list(val_gt_paths),
        list(test_image_paths), experiment / "embeddings" if cache_embeddings else None, prediction_dir, experiment,
        folder / "grid_search", verbose_gs=verbose, tiling_window_params=tiling_window_params, **options,
    )
    return str(prediction_dir)


def run_amg(
    checkpoint: str | os.PathLike | None,
    model_type: str,
    experiment_folder: str | os.PathLike,
    val_image_paths: list[str | os.PathLike],
    val_gt_paths: list[str | os.PathLike],
    test_image_paths: list[str | os.PathLike],
    iou_thresh_values: list[float] | None = None,
    stability_score_values: list[float] | None = None,
    peft_kwargs: dict[str, Any] | None = None,
    cache_embeddings: bool = False,
    tiling_window_params: TilingParams | None = None,
    *,
    grid_search_values: GridSearchValues | None = None,
    image_size: int | None = None,
    device: str | None = None,
    n_workers: int | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Find the best settings of automatic mask generation (AMG) on validation images, and segment test images.

    The results of the search are in `<experiment>/amg/grid_search`, the best settings in
    `<experiment>/results/grid_search_params_amg.csv`, embeddings in `<experiment>/embeddings`.

    Args:
        checkpoint: A checkpoint; None takes the published model.
        model_type: The name of the model, or the architecture of the checkpoint.
        experiment_folder: Where to write all results.
        val_image_paths: The images for the search.
        val_gt_paths: Their label images.
        test_image_paths: The images to segment.
        iou_thresh_values: See `default_grid_search_values_amg`.
        stability_score_values: Likewise.
        peft_kwargs: Options of parameter-efficient finetuning, see `util.get_sam_model`.
        cache_embeddings: Whether to keep the embeddings.
        tiling_window_params: `tile_shape` and `halo` (y, x) in pixels, to work in tiles.
        grid_search_values: Another grid, in place of the default one.
        image_size: Canvas of the model in pixels; None takes its own.
        device: The device; None chooses it.
        n_workers: Number of threads of the search.
        overwrite: Whether to replace results that were made with other settings.
        verbose: Whether to show progress.

    Returns:
        The folder with the labels of the test images, `<experiment>/amg/inference`.

    Raises:
        TilingParamsError: If `tiling_window_params` is wrong.
        OutputExistsError: If there are results of other settings, and `overwrite` is not set.
        ModelError, InvalidInputError: If model or images are wrong.
    """
    grid = grid_search_values or default_grid_search_values_amg(iou_thresh_values, stability_score_values)
    return _run_automatic(
        "amg", grid, checkpoint, model_type, experiment_folder, val_image_paths, val_gt_paths, test_image_paths,
        peft_kwargs, cache_embeddings, tiling_window_params, image_size=image_size, device=device, verbose=verbose,
        n_workers=n_workers, overwrite=overwrite,
    )


def run_apg(
    checkpoint: str | os.PathLike | None,
    model_type: str,
    experiment_folder: str | os.PathLike,
    val_image_paths: list[str | os.PathLike],
    val_gt_paths: list[str | os.PathLike],
    test_image_paths: list[str | os.PathLike],
    peft_kwargs: dict[str, Any] | None = None,
    cache_embeddings: bool = False,
    tiling_window_params: TilingParams | None = None,
    *,
    grid_search_values: GridSearchValues | None = None,
    image_size: int | None = None,
    device: str | None = None,
    n_workers: int | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Find the best settings of automatic prompt generation (APG) on validation images, and segment test images.

    See `run_amg` for files, arguments and errors. Tiles are supported.

    Returns:
        The folder with the labels of the test images, `<experiment>/apg/inference`.
    """
    return _run_automatic(
        "apg", grid_search_values or default_grid_search_values_apg(), checkpoint, model_type, experiment_folder,
        val_image_paths, val_gt_paths, test_image_paths, peft_kwargs, cache_embeddings, tiling_window_params,
        image_size=image_size, device=device, verbose=verbose, n_workers=n_workers, overwrite=overwrite,
    )


def run_instance_segmentation_with_decoder(
    checkpoint: str | os.PathLike | None,
    model_type: str,
    experiment_folder: str | os.PathLike,
    val_image_paths: list[str | os.PathLike],
    val_gt_paths: list[str | os.PathLike],
    test_image_paths: list[str | os.PathLike],
    peft_kwargs: dict[str, Any] | None = None,
    cache_embeddings: bool = False,
    tiling_window_params: TilingParams | None = None,
    *,
    grid_search_values: GridSearchValues | None = None,
    image_size: int | None = None,
    device: str | None = None,
    n_workers: int | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Find the best settings of segmentation with the decoder (AIS) on validation images, and segment test images.

    See `run_amg` for files, arguments and errors.

    Returns:
        The folder with the labels of the test images, `<experiment>/instance_segmentation_with_decoder/inference`.
    """
    return _run_automatic(
        "ais", grid_search_values or default_grid_search_values_instance_segmentation_with_decoder(), checkpoint,
        model_type, experiment_folder, val_image_paths, val_gt_paths, test_image_paths, peft_kwargs, cache_embeddings,
        tiling_window_params, image_size=image_size, device=device, verbose=verbose, n_workers=n_workers,
        overwrite=overwrite,
    )
