"""Evaluation of one model on images with labels: all of its automatic modes, and prompts with corrections."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..core.errors import InvalidInputError, NoObjectsError, nearest_names, require_positive_int
from ..core.output import is_same, prepare_folder, write_json
from ..core.progress import Step, Steps, drain, during
from ..segmentation.factory import SEGMENTER_CLASSES
from ..segmentation.workflow import find_model, load_model, resolve_model
from .model_tasks import PROMPTS, LabelledImage, ModelTasks, check_known, models_by_mode
from .pairing import group_names, pair_paths
from .report import IDENTIFIERS, check_report_folder, write_report

PROMPT_MODE = "prompts"
RECORD_NAME, CACHE_NAME = "evaluation.json", "cache"
_TEXT = "Evaluate model"


def evaluate_model(
    images: Sequence[str | os.PathLike],
    labels: Sequence[str | os.PathLike],
    output_folder: str | os.PathLike,
    model_type: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    *,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Score what users do with a model: segment automatically, and prompt objects and correct them.

    Each image is segmented with each automatic mode of the model, and its objects are prompted with a point or a box
    that come from the truth; then each is corrected again and again by a positive and a negative point where its mask
    is wrong. What was computed for an image is kept in `<output_folder>/cache`, so that an interrupted or extended
    evaluation goes on from there. The report is written to the folder by `report.write_report`.

    Args:
        images: Image files, folders, or patterns.
        labels: Their labels, 0 is background; paired by file name, or else by order.
        output_folder: Where to write the report.
        model_type: The model, or the architecture of the checkpoint. None takes `vit_b_lm` if it was downloaded
            before, else `vit_t_lite`.
        checkpoint_path: A checkpoint instead of a published model.
        verbose: Whether to show a progress bar.
        pbar_init: See `core.progress.drain`.
        pbar_update: See `core.progress.drain`.
        options: See `model_evaluation_steps`.

    Returns:
        One row per image and mode; of prompts one row per image, prompt and iteration. `IoU` is the mean over the
        objects that were prompted; the other scores are those of `metrics.segmentation_scores`, for prompts of the
        label image of all masks.

    Raises:
        UnfitInputsError: If images and labels do not fit to each other.
        InvalidInputError: For unknown modes, prompts or options, and for prompts in volumes.
        ModelError: If the model cannot do what is asked.
        OutputExistsError: If the folder holds an evaluation of another model, or with other settings.
    """
    steps = model_evaluation_steps(images, labels, output_folder, model_type, checkpoint_path, **options)
    return drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)


def model_evaluation_steps(
    images: Sequence[str | os.PathLike],
    labels: Sequence[str | os.PathLike],
    output_folder: str | os.PathLike,
    model_type: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    *,
    modes: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    n_iterations: int = 8,
    n_objects: int | None = None,
    group_by: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    patterns: tuple[str | None, str | None] = (None, None),
    recursive: bool = False,
    tile_shape: Sequence[int] | str | None = "default",
    halo: Sequence[int] | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    precision: str | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Steps[pd.DataFrame]:
    """Generator behind `evaluate_model`: yields `Step`, returns the table. Closing it keeps what is complete.

    Args:
        images: See `evaluate_model`.
        labels: See `evaluate_model`.
        output_folder: See `evaluate_model`.
        model_type: See `evaluate_model`.
        checkpoint_path: See `evaluate_model`.
        modes: Automatic modes out of `ais`, `apg` and `amg`; None takes all that the model has.
        prompts: Out of `point`, `box`, `point_masks` and `box_masks` (with the last mask as a further prompt); None
            takes all, but for volumes none.
        n_iterations: Number of predictions per object: one for the first prompt, the others after corrections.
        n_objects: How many objects to prompt per image, at most, evenly spaced by their ids; None takes all.
        group_by: How to form modalities, see `pairing.group_names`.
        image_key: Name of the image in hdf5 or zarr files.
        label_key: The same for the labels.
        patterns: Which files of the folders of images, and of those of labels, to take.
        recursive: Whether to look into sub-folders.
        tile_shape: Tiles (y, x) of automatic segmentation in pixels, None for none, or `auto`. By default as
            `micro_sam.automatic_segmentation` does it: chosen for the model that comes with the package, else none.
            Prompts see the whole image.
        halo: Overlap (y, x) of the tiles in pixels.
        batch_size: Tiles or planes per call of the network.
        device: The device; None chooses it.
        precision: `float32` or `auto`, see `get_sam_model`; None takes what the user has chosen.
        options: Options of the segmenters, for example `min_size`; each is used by the modes that have it.
        overwrite: Whether to replace an evaluation of another model, or with other settings.
    """
    _check_arguments(modes, prompts, n_iterations, n_objects, options or {})
    output_folder = Path(output_folder).expanduser()
    check_report_folder(output_folder)
    pairs = _find_pairs(images, labels, patterns, recursive, (image_key, label_key), group_by)
    if prompts and any(pair.ndim == 3 for pair in pairs):
        raise InvalidInputError(
            "Prompts are for planes, but there are volumes. Leave out the prompts, or evaluate prompts in volumes with "
            "segment_slices_from_ground_truth."
        )

    name = resolve_model(model_type, checkpoint_path)
    spec = None
    for mode in modes or (None,):
        spec = find_model(name, checkpoint_path, mode)
    if tile_shape == "default":
        tile_shape = "auto" if spec is not None and spec.resource is not None else None
    prepare_folder(output_folder / RECORD_NAME)
    yield Step(0, 1, "Load model")
    model = load_model(name, checkpoint_path, device, precision=precision)
    yield Step(1, 1, "Load model")
    trained_for = ("ais", "apg", "amg") if spec is None else spec.modes
    run = ModelTasks(
        name if checkpoint_path is None else str(checkpoint_path), model, models_by_mode(model, modes, trained_for),
        tuple(PROMPTS if prompts is None else prompts), None if spec is None else spec.name, dict(options or {}),
        tile_shape, halo, batch_size, n_iterations, n_objects, output_folder / CACHE_NAME,
    )
    check_known(run.options, run.models)
    settings = run.settings()
    if overwrite or not is_same(output_folder / RECORD_NAME, settings):
        write_json(output_folder / RECORD_NAME, {"micro_sam": {"settings": settings}})

    table = yield from _table_steps(run, pairs, group_by is not None)
    notes = list(_notes(run, pairs, table))
    write_report(table, output_folder, title=f"Evaluation of {run.name}", notes=notes, settings=settings)
    return table


def _check_arguments(
    modes: Sequence[str] | None, prompts: Sequence[str] | None, n_iterations: int, n_objects: int | None,
    options: Mapping[str, Any],
) -> None:
    require_positive_int("n_iterations", n_iterations)
    if n_objects is not None:
        require_positive_int("n_objects", n_objects)
    for what, names, known in (("prompt", prompts, PROMPTS), ("mode", modes, SEGMENTER_CLASSES)):
        for name in names or ():
            if name not in known:
                raise InvalidInputError(f"There is no {what} {name!r}. {nearest_names(name, known)}")
    check_known(options, SEGMENTER_CLASSES if modes is None else modes)


def _find_pairs(images, labels, patterns, recursive, keys, group_by) -> list[LabelledImage]:
    """Pair all files and compare their shapes, before anything is computed."""
    paths = pair_paths(images, labels, ("images", "labels"), patterns, recursive)
    groups = group_names([image for image, _ in paths], group_by)
    root = Path(os.path.commonpath([image.resolve().parent for image, _ in paths]))
    names = [image.resolve().relative_to(root).with_suffix("").as_posix() for image, _ in paths]
    return [
        LabelledImage.create(name, group, image, truth, keys)
        for name, group, (image, truth) in zip(names, groups, paths)
    ]


def _table_steps(run: ModelTasks, pairs: Sequence[LabelledImage], is_grouped: bool) -> Steps[pd.DataFrame]:
    """All rows as one table. Yields `Step`: one per image and task."""
    total, done, rows = sum(len(run.tasks(pair)) for pair in pairs), 0, []
    yield Step(0, total, _TEXT)
    for pair in pairs:
        with tempfile.TemporaryDirectory(prefix="micro_sam_evaluation_") as folder:
            for task in run.tasks(pair):
                found = yield from during(run.image_steps(pair, task, Path(folder)), Step(done, total, _TEXT))
                rows += [{**_identify(run, pair, task), **row} for row in found]
                done += 1
                yield Step(done, total, _TEXT)
    if not rows:
        raise NoObjectsError("None of the images has labelled objects to prompt. Check the labels.")
    table = pd.DataFrame(rows)
    if not is_grouped:
        table = table.drop(columns="modality")
    order = [name for name in (*IDENTIFIERS, "IoU") if name in table]
    return table[[*order, *(name for name in table if name not in order)]]


def _identify(run: ModelTasks, pair: LabelledImage, task: str) -> dict[str, Any]:
    names = {"model": run.name, "modality": pair.group, "image": pair.name}
    return {**names, "mode": task} if task in run.models else {**names, "mode": PROMPT_MODE, "prompt": task}


def _notes(run: ModelTasks, pairs: Sequence[LabelledImage], table: pd.DataFrame) -> Iterator[str]:
    yield f"{len(pairs)} images; automatic modes: {', '.join(run.models) or 'none'}; scores of whole label images"
    if (table["mode"] == PROMPT_MODE).any():
        limit = "all objects" if run.n_objects is None else f"up to {run.n_objects} objects per image"
        yield (
            f"prompts: {limit}, the others do not count; each correction adds a positive and a negative point where "
            "the mask is wrong; with _masks the last mask is a prompt, too; IoU is the mean over the objects"
        )
    n_volumes = sum(pair.ndim == 3 for pair in pairs)
    if n_volumes and run.prompts:
        yield f"prompts were left out for {n_volumes} volumes"
