"""The benchmark: a model on public datasets, or on own ones, automatically and with prompts from the ground truth.

For each dataset `<output folder>/<dataset>` gets
- `roi_2d` and `roi_3d`: the parts of the images that are looked at, see `benchmark_crops`;
- `automatic` and `interactive`: what was segmented;
- `results`: tables with the mean scores, and in `results/per_image` those of each crop.

Only results stay, unless more is retained. The report on all datasets is written to the output folder.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd

from ..core.errors import InvalidInputError, nearest_names, require_positive_int
from ..core.output import prepare_folder
from ..core.progress import Step, Steps, drain
from ..segmentation.factory import SEGMENTER_CLASSES
from ..segmentation.workflow import find_model, resolve_model
from .benchmark_catalogue import (
    BenchmarkDataset,
    DatasetMissingError,
    choose_datasets,
    find_files_of,
    own_dataset,
)
from .benchmark_crops import N_CROPS
from .benchmark_run import BenchmarkModel, BenchmarkOptions, DatasetRun
from .report import write_report

__all__ = [
    "EVALUATION_METHODS", "RETAINED", "BenchmarkDataset", "BenchmarkResult", "DatasetMissingError", "benchmark_steps",
    "main", "own_dataset", "run_benchmark_evaluations",
]

RETAINED = ("data", "crops", "automatic", "interactive")
EVALUATION_METHODS = ("all", "automatic", "interactive")
OUTPUT_NAME = "benchmark"


@dataclass
class BenchmarkResult:
    """Scores of each crop as `report.write_report` takes them, and why datasets could not be evaluated."""

    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    failed: dict[str, Exception] = field(default_factory=dict)


def run_benchmark_evaluations(
    input_folder: str | os.PathLike,
    dataset_choice: str | Sequence[str] | None,
    model_type: str = "vit_b_lm",
    output_folder: str | os.PathLike | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    segmentation_mode: Literal["amg", "ais", "apg"] | None = None,
    retain: list[str] | None = None,
    evaluation_methods: Literal["all", "automatic", "interactive"] = "all",
    ignore_warnings: bool = False,
    *,
    own_datasets: Sequence[BenchmarkDataset] = (),
    device: str | None = None,
    n_crops: int = N_CROPS,
    n_iterations: int = 8,
    download: bool = True,
    verbose: bool = True,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Score a model on datasets: automatic segmentation, and prompts that are corrected or followed through volumes.

    Args:
        input_folder: The folder of all datasets. Each is in a folder of its name, as torch-em expects it, or is
            downloaded to there.
        dataset_choice: One or more names, see `benchmark_catalogue.DATASETS`; None takes all.
        model_type: The model.
        output_folder: Where to write; None takes `<input_folder>/benchmark`.
        checkpoint_path: A checkpoint instead of a published model.
        segmentation_mode: A further automatic mode, beside `ais`, or `amg` for models without decoder.
        retain: What else to keep of `data` (what was downloaded by this call; what was there before always stays),
            `crops`, `automatic` and `interactive` (segmentations). None keeps the results only.
        evaluation_methods: `automatic`, `interactive` or `all`.
        ignore_warnings: Whether to hide warnings.
        own_datasets: Own datasets, see `own_dataset`; they can be chosen by their names.
        device: The device; None chooses it.
        n_crops: Number of parts to look at per image or volume, at most.
        n_iterations: Number of predictions per object in images: one for the first prompt, the others for corrections.
        download: Whether to download datasets that are not there.
        verbose: Whether to show progress.
        overwrite: Whether to replace results of another model, or of other data, in the output folder.

    Returns:
        The scores of each crop: one row per mode, prompt and iteration.

    Raises:
        InvalidInputError: If arguments are wrong; names the nearest datasets.
        DatasetMissingError: If a dataset is not there and could not be downloaded, after all others were evaluated.
        OutputExistsError: If there are results of another model, and `overwrite` is not set.

    Example:
        >>> own = own_dataset("mine", "images", "labels")  # doctest: +SKIP
        >>> run_benchmark_evaluations(".", "mine", "vit_t_lite", "out", own_datasets=[own])  # doctest: +SKIP
    """
    steps = benchmark_steps(
        input_folder, dataset_choice, model_type, output_folder, checkpoint_path, segmentation_mode, retain,
        evaluation_methods, own_datasets=own_datasets, device=device, n_crops=n_crops, n_iterations=n_iterations,
        download=download, overwrite=overwrite,
    )
    with warnings.catch_warnings():
        if ignore_warnings:
            warnings.simplefilter("ignore")
        result = drain(steps, verbose=verbose)
    for error in result.failed.values():
        raise error
    return result.table


def benchmark_steps(
    input_folder: str | os.PathLike,
    dataset_choice: str | Sequence[str] | None,
    model_type: str | None = "vit_b_lm",
    output_folder: str | os.PathLike | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    segmentation_mode: str | None = None,
    retain: Sequence[str] | None = None,
    evaluation_methods: str = "all",
    *,
    own_datasets: Sequence[BenchmarkDataset] = (),
    device: str | None = None,
    n_crops: int = N_CROPS,
    n_iterations: int = 8,
    download: bool = True,
    overwrite: bool = False,
) -> Steps[BenchmarkResult]:
    """Generator behind `run_benchmark_evaluations`. Yields `Step`; what is complete is kept when it is closed.

    Datasets that are missing or cannot be read do not stop the others: they are in `failed` of what is returned.
    """
    rows = choose_datasets(dataset_choice, own_datasets)
    options = _check_options(retain, evaluation_methods, n_crops, n_iterations, download, overwrite)
    if segmentation_mode is not None and segmentation_mode not in SEGMENTER_CLASSES:
        raise InvalidInputError(
            f"There is no mode {segmentation_mode!r}. {nearest_names(segmentation_mode, SEGMENTER_CLASSES)}"
        )
    name = resolve_model(model_type, checkpoint_path)
    find_model(name, checkpoint_path, segmentation_mode)
    input_folder = Path(input_folder).expanduser()
    output_folder = input_folder / OUTPUT_NAME if output_folder is None else Path(output_folder).expanduser()
    prepare_folder(output_folder / "results.csv")

    result, model = BenchmarkResult(), None
    for n, row in enumerate(rows):
        here = Step(n, len(rows), "Find datasets")
        yield here
        data_was_there = row.is_own or (input_folder / row.name).exists()
        try:
            # Before the model is loaded: what is missing is said at once. With results it may not be needed.
            pairs = None
            if not (output_folder / row.name / "results").exists():
                pairs = find_files_of(row, input_folder, download)
            if model is None:
                model = BenchmarkModel.load(name, checkpoint_path, device, segmentation_mode)
            run = DatasetRun(row, input_folder, output_folder / row.name, model, options)
            table = yield from run.steps(pairs)
        except InvalidInputError as error:
            result.failed[row.name] = error
            continue
        result.table = pd.concat([result.table, table], ignore_index=True)
        _write_benchmark_report(result, output_folder, model, rows)
        run.clean_up(input_folder / row.name if not data_was_there else None)
    if result.failed and not result.table.empty:  # those that failed last are not in it yet
        _write_benchmark_report(result, output_folder, model, rows)
    yield Step(len(rows), len(rows), "Find datasets")
    return result


def _check_options(
    retain, methods, n_crops: int, n_iterations: int, download: bool, overwrite: bool
) -> BenchmarkOptions:
    for what, names, known in (("thing to retain", retain or (), RETAINED), ("method", [methods], EVALUATION_METHODS)):
        for name in names:
            if name not in known:
                raise InvalidInputError(f"There is no {what} {name!r}. {nearest_names(name, known)}")
    require_positive_int("n_crops", n_crops)
    require_positive_int("n_iterations", n_iterations)
    return BenchmarkOptions(
        frozenset(retain or ()), methods in ("all", "automatic"), methods in ("all", "interactive"), n_crops,
        n_iterations, download, overwrite,
    )


def _write_benchmark_report(
    result: BenchmarkResult, folder: Path, model: "BenchmarkModel", rows: Sequence[BenchmarkDataset]
) -> None:
    done = result.table["dataset"].unique().tolist()
    notes = [
        f"{len(done)} of {len(rows)} datasets: {', '.join(done)}",
        "automatic modes are called by their names; prompts come from the ground truth and are corrected where masks "
        "are wrong (images), or objects are followed from one prompt (modes that end with 3d)",
    ]
    notes += [f"not evaluated: {name} ({error})" for name, error in result.failed.items()]
    write_report(result.table, folder, title=f"Benchmark of {model.name}", notes=notes, settings=model.settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.benchmark_sam`."""
    from importlib import import_module

    # The commands are a layer above this one; only this old entry point looks up.
    return import_module("micro_sam.cli.benchmark_sam").main(argv)
