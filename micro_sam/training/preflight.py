"""A report on training data and on what the training will cost, before it starts.

All images are read, stacks of many planes at some of them; nothing is trained. Problems stop a training, warnings
are worth a look.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import MicroSamError
from ..core.progress import Step, Steps, drain
from ..core.settings import get_device
from .costs import available_memory, computes_twice, estimate_costs, measure_speed
from .data import default_sam_dataset
from .pairs import OpenPair, Pair, find_pairs, is_array, is_path, probe, problem_of
from .preflight_report import PairReport, PreflightReport
from .raw_transforms import require_8bit
from .splits import duplicate_steps, shared_images
from .targets import label_instances

__all__ = ["PairReport", "PreflightReport", "preflight", "preflight_steps"]

_MAX_PLANES = 64
_MIN_PATCH, _MAX_PATCH, _PATCH_STEP = 256, 1024, 32
# A patch shall hold about eight typical objects side by side, and three of the largest ones.
_OBJECTS_PER_SIDE, _LARGE_PER_SIDE = 8, 3
_LOW_CONTRAST = 64
_IMAGE_LIKE = 0.05  # connected parts per pixel
_PERCENTILES = (5, 50, 95)


def preflight_steps(
    raw_paths: Any,
    raw_key: str | None,
    label_paths: Any,
    label_key: str | None,
    *,
    val_raw_paths: Any = None,
    val_raw_key: str | None = None,
    val_label_paths: Any = None,
    val_label_key: str | None = None,
    rois: Any = None,
    val_rois: Any = None,
    patch_shape: Sequence[int] | None = None,
    model_type: str = "vit_b_lm",
    batch_size: int = 1,
    n_objects_per_batch: int | None = 25,
    n_sub_iteration: int = 8,
    n_samples: int | None = None,
    min_size: int = 25,
    with_segmentation_decoder: bool = True,
    train_instance_segmentation_only: bool = False,
    raw_transform: Any = None,
    device: Any = None,
    image_size: int = 1024,
    decoder_features: int = 64,
    checkpoint_encoder: bool | None = None,
    gflop_per_second: float | None = None,
    available_bytes: float | None = None,
) -> Steps[PreflightReport]:
    """The steps of `preflight`."""
    estimate = partial(
        estimate_costs, model_type, batch_size, n_objects_per_batch, n_sub_iteration, with_segmentation_decoder,
        train_instance_segmentation_only, image_size=image_size, decoder_features=decoder_features,
    )
    device = get_device(device)
    costs = estimate(checkpoint_encoder=computes_twice(checkpoint_encoder, model_type, device))
    problems: list[str] = []
    train = _find(problems, "training", raw_paths, raw_key, label_paths, label_key, rois)
    val = () if val_raw_paths is None else _find(
        problems, "validation", val_raw_paths, val_raw_key, val_label_paths, val_label_key, val_rois
    )
    reports, total, text = [], len(train) + len(val), "Read training data"
    yield Step(0, total, text)
    for split, pairs in (("train", train), ("val", val)):
        for pair in pairs:
            reports.append(_inspect(pair, split, min_size))
            yield Step(len(reports), total, text)
    messages = yield from _compare_splits(train, val, reports)
    warnings = [*messages[1], *_name_warnings(train), *_name_warnings(val)]
    problems += messages[0] + _missing_objects(reports, val_raw_paths is not None)

    if raw_transform is None or raw_transform is require_8bit:
        warnings += _contrast_warnings(reports)
    diameters = _percentiles(reports)
    suggested = _suggest_patch_shape(diameters, reports)
    used = suggested if patch_shape is None else tuple(int(n) for n in patch_shape)[-2:]
    warnings += _patch_warnings(used, diameters, reports)
    if gflop_per_second is None:
        gflop_per_second = measure_speed(device)
    if available_bytes is None:
        available_bytes = available_memory(device)
    least = estimate(checkpoint_encoder=True).memory_bytes
    warnings += _memory_warnings(costs.memory_bytes, least, available_bytes, n_objects_per_batch, batch_size)
    n_train = _length((raw_paths, raw_key, label_paths, label_key), rois, used, n_samples, True)
    n_val = _length((val_raw_paths, val_raw_key, val_label_paths, val_label_key), val_rois, used, None, False)
    seconds = batch_size * costs.training_gflop / gflop_per_second
    n_batches = None if n_train is None else math.ceil(n_train / batch_size)
    validation = (n_val or 0) * costs.forward_gflop / gflop_per_second
    return PreflightReport(
        pairs=tuple(reports),
        problems=(*problems, *(f"{r.name}: {p}" for r in reports for p in r.problems)),
        warnings=(*warnings, *(f"{r.name}: {w}" for r in reports for w in r.warnings)),
        diameters=diameters, patch_shape=used, suggested_patch_shape=suggested, model_type=model_type,
        device=str(device), batch_size=batch_size, n_batches=n_batches, memory_bytes=float(costs.memory_bytes),
        available_bytes=float(available_bytes), gflop_per_second=float(gflop_per_second), seconds_per_iteration=seconds,
        seconds_per_epoch=None if n_batches is None else n_batches * seconds + validation,
    )


def preflight(
    raw_paths: Any,
    raw_key: str | None,
    label_paths: Any,
    label_key: str | None,
    *,
    verbose: bool = True,
    **options: Any,
) -> PreflightReport:
    """Read training data, and report what was found and what the training will cost.

    Problems are reported, not raised: see `PreflightReport.problems` and `raise_if_not_ok`.

    Args:
        raw_paths: Images, as for `default_sam_dataset`.
        raw_key: Name of the image in a container, or pattern for the files of a folder.
        label_paths: Labels.
        label_key: As `raw_key`.
        verbose: Whether to show a progress bar.
        options: `val_raw_paths`, `val_raw_key`, `val_label_paths`, `val_label_key`: the data for validation, if there
            are any. `rois`, `val_rois`: parts of the images. `patch_shape`: None takes the suggested one.
            `model_type`, `batch_size`, `n_objects_per_batch`, `n_sub_iteration`, `n_samples`, `min_size`,
            `with_segmentation_decoder`, `train_instance_segmentation_only`, `raw_transform`, `device`,
            `checkpoint_encoder`: as for the training. `image_size`, `decoder_features`: the canvas in pixels and the
            width of the decoder of the model. `gflop_per_second`: speed of the device; None measures it.
            `available_bytes`: its free memory.

    Returns:
        The report.

    Raises:
        UnknownModelError: If the costs of the model are not known.
    """
    return drain(preflight_steps(raw_paths, raw_key, label_paths, label_key, **options), verbose=verbose)


def _find(problems: list[str], what: str, raw, raw_key, labels, label_key, rois) -> tuple[Pair, ...]:
    try:
        return find_pairs(raw, raw_key, labels, label_key, rois=rois, verify_paths=False, as_stack=False).pairs
    except MicroSamError as error:
        problems.append(f"The {what} data: {error}")
        return ()


# ---------------------------------------------------------------- one image and its labels


def _inspect(pair: Pair, split: str, min_size: int) -> PairReport:
    report = PairReport(pair.name, pair.label_name, split)
    error = problem_of(pair)
    if error is not None:
        return dataclasses.replace(report, problems=(str(error),))
    try:
        files, dtypes = pair.open(), [str(probe(p, k)[1]) for p, k in _sources(pair)]
        return _measure(dataclasses.replace(
            report, shape=pair.shape, n_channels=pair.geometry.n_channels, dtype=dtypes[0], label_dtype=dtypes[1]
        ), pair, files, min_size)
    except MicroSamError as unreadable:
        return dataclasses.replace(report, problems=(str(unreadable),))


def _sources(pair: Pair) -> tuple[tuple[Any, str | None], tuple[Any, str | None]]:
    return (pair.raw, pair.raw_key), (pair.labels, pair.label_key)


def _measure(report: PairReport, pair: Pair, files: OpenPair, min_size: int) -> PairReport:
    planes = np.unique(np.linspace(0, pair.n_planes - 1, min(pair.n_planes, _MAX_PLANES)).astype(int))
    y, x = (slice(0, n) for n in pair.shape[-2:])
    lows, highs, n_bad, sizes, ids = [], [], 0, [], []
    for plane in planes:
        raw, labels = files.read(int(plane), y, x)
        finite = np.isfinite(raw)
        n_bad += int(raw.size - finite.sum())
        if finite.any():
            lows.append(float(raw[finite].min()))
            highs.append(float(raw[finite].max()))
        sizes.append(np.bincount(label_instances(labels).reshape(-1))[1:])
        present = labels[labels != 0]
        ids += [present.min(), present.max()] if present.size else []
    sizes = np.concatenate(sizes)
    large = sizes[sizes >= max(min_size, 1)]
    report = dataclasses.replace(
        report, minimum=min(lows, default=None), maximum=max(highs, default=None), n_planes_read=len(planes),
        n_objects=len(large), n_small=len(sizes) - len(large),
        diameters=tuple(np.sqrt(4 * large / np.pi).round(2).tolist()),
    )
    problems = _image_problems(report, n_bad) + _label_problems(sizes, len(planes) * math.prod(pair.shape[-2:]))
    warnings = [] if problems else _warnings(report, len(set(ids)) == 1, min_size)
    return dataclasses.replace(report, problems=tuple(problems), warnings=tuple(warnings))


def _image_problems(report: PairReport, n_bad: int) -> list[str]:
    problems = []
    if n_bad:
        problems.append(f"The image has {n_bad} NaN or infinite values. Replace them, for example by the background.")
    if report.n_channels > 3:
        problems.append(f"The image has {report.n_channels} channels; at most three are used. Save a selection.")
    return problems


def _label_problems(sizes: np.ndarray, n_pixels: int) -> list[str]:
    if len(sizes) > max(100, n_pixels * _IMAGE_LIKE) and np.median(sizes) <= 2:
        return [
            f"The labels look like an image: {len(sizes)} connected parts with a median of {np.median(sizes):.0f} "
            "pixels. They must hold one id per object; are images and labels interchanged?"
        ]
    return []


def _warnings(report: PairReport, has_one_id: bool, min_size: int) -> list[str]:
    warnings = []
    if report.minimum == report.maximum:
        warnings.append(f"All pixels of the image have the value {report.minimum:g}.")
    if report.n_objects == 0:
        small = f" Its {report.n_small} objects have fewer than min_size={min_size} pixels." if report.n_small else ""
        warnings.append(f"There is no object to learn from.{small}")
    elif report.n_small > report.n_objects:
        warnings.append(f"{report.n_small} objects have fewer than min_size={min_size} pixels and do not count.")
    if has_one_id and report.n_objects > 3:
        warnings.append(
            f"All {report.n_objects} parts have one id. Touching objects are learned as one; give each its own id."
        )
    return warnings


# ---------------------------------------------------------------- all images


def _compare_splits(
    train: Sequence[Pair], val: Sequence[Pair], reports: Sequence[PairReport]
) -> Steps[tuple[list[str], list[str]]]:
    """Problems and warnings about equal images."""
    readable = [n for n, report in enumerate(reports) if report.n_planes_read]
    pairs = [[*train, *val][n] for n in readable]
    n_train = sum(n < len(train) for n in readable)
    duplicates = yield from duplicate_steps(pairs)
    warnings = []
    for group in duplicates:
        for split in (range(n_train), range(n_train, len(pairs))):
            names = [pairs[n].name for n in group if n in split]
            if len(names) > 1:
                warnings.append(f"These images are equal: {', '.join(names)}.")
    return shared_images(pairs[:n_train], pairs[n_train:], duplicates), warnings


def _missing_objects(reports: Sequence[PairReport], has_val: bool) -> list[str]:
    problems = []
    for split, what in (("train", "training"), ("val", "validation")):
        mine = [r for r in reports if r.split == split]
        readable = [r for r in mine if r.n_planes_read]
        if (split == "train" or has_val) and readable and not any(r.n_objects for r in readable):
            problems.append(f"None of the {len(readable)} images for {what} has an object.")
    return problems


def _name_warnings(pairs: Sequence[Pair]) -> list[str]:
    """A file whose labels seem to be at another position."""
    if any(is_array(p.raw) or not is_path(p.labels) for p in pairs):
        return []
    stems = [(Path(p.raw).stem, Path(p.labels).stem) for p in pairs]
    positions = {label: n for n, (_, label) in enumerate(stems)}
    if len(positions) < len(stems):
        return []
    for n, (raw, label) in enumerate(stems):
        if raw != label and positions.get(raw, n) != n:
            return [f"{pairs[n].name} is paired with {pairs[n].label_name}, but there are labels with its own name."]
    return []


def _contrast_warnings(reports: Sequence[PairReport]) -> list[str]:
    """Images that training shows as they are, but inference stretches a lot."""
    dark = [r for r in reports if r.dtype == "uint8" and r.n_planes_read and r.maximum - r.minimum < _LOW_CONTRAST]
    if not dark:
        return []
    return [
        f"{len(dark)} images use few of the grey levels ({dark[0].name}: {dark[0].minimum:g} to {dark[0].maximum:g}). "
        "Inference stretches each image; train with get_raw_transform('normalize_image') to do the same."
    ]


def _percentiles(reports: Sequence[PairReport]) -> tuple[float, float, float] | None:
    diameters = [d for report in reports if not report.problems for d in report.diameters]
    return tuple(np.percentile(diameters, _PERCENTILES).round(1).tolist()) if diameters else None


def _suggest_patch_shape(diameters, reports: Sequence[PairReport]) -> tuple[int, int]:
    """A square that holds several objects and is not much larger than the images, a multiple of 32."""
    wanted = 512.0 if diameters is None else max(_OBJECTS_PER_SIDE * diameters[1], _LARGE_PER_SIDE * diameters[2])
    sides = [min(r.shape[-2:]) for r in reports if r.shape is not None]
    if sides:
        wanted = min(wanted, float(np.median(sides)))
    side = math.ceil(wanted / _PATCH_STEP) * _PATCH_STEP
    side = min(max(side, _MIN_PATCH), _MAX_PATCH)
    return side, side


def _patch_warnings(patch: tuple[int, int], diameters, reports: Sequence[PairReport]) -> list[str]:
    warnings = []
    if diameters is not None and diameters[2] > min(patch):
        warnings.append(f"Large objects ({diameters[2]:g} pixels) do not fit into patches of {patch[0]} x {patch[1]}.")
    shapes = [r.shape[-2:] for r in reports if r.shape is not None]
    n_small = sum(any(2 * n < p for n, p in zip(shape, patch)) for shape in shapes)
    if n_small:
        warnings.append(
            f"{n_small} of {len(shapes)} images are smaller than half a patch of {patch[0]} x {patch[1]}; the rest of "
            "the patch will be empty."
        )
    return warnings


def _memory_warnings(
    needed: float, least: float, available: float, n_objects: int | None, batch_size: int
) -> list[str]:
    """`least` is what would be needed with `checkpoint_encoder`."""
    if needed <= available:
        return []
    batch = f" or a smaller batch than {batch_size}." if batch_size > 1 else " or a larger machine."
    text = (
        f"The training needs about {needed / 1e9:.0f} GB, but {available / 1e9:.0f} GB are free. Use a smaller model, "
        f"fewer than {n_objects or 25} objects per image{batch}"
    )
    if least < needed:
        text += f" With checkpoint_encoder it takes longer and needs about {least / 1e9:.0f} GB."
    return [text]


def _length(
    data: Sequence[Any], rois: Any, patch: tuple[int, int], n_samples: int | None, is_train: bool
) -> int | None:
    """Length of the dataset; None if there is none, or it cannot be made."""
    if data[0] is None:
        return None
    try:
        dataset = default_sam_dataset(*data, patch, False, n_samples=n_samples, is_train=is_train, rois=rois)
    except MicroSamError:
        return None
    return len(dataset)
