"""The label images of a segmenter for all combinations of its settings, and their scores.

What does not depend on a setting is computed once: the smoothed maps of the decoder for all thresholds, one watershed
for all minimal sizes (AIS); the prompts and their masks for all ways of merging (APG); the upsampled masks (AMG). The
labels are those of `generate`, up to the numbering of the objects.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import xxhash
from joblib import cpu_count

from ..core.errors import InvalidInputError
from ..core.progress import Step, Steps
from ..core.prompts import BatchedPrompts
from ..segmentation.apg import point_prompts_from_maps
from ..segmentation.factory import SEGMENTER_CLASSES
from ..segmentation.settings import check_options, generate_options, is_tiled, mode_of
from ..segmentation.watershed import watershed_from_center_and_boundary_distances
from ..segmentation.workflow import Segmenter
from .metrics import segmentation_scores

Options = dict[str, Any]
# One piece of work for a thread: yields positions of combinations with their labels.
Job = Callable[[], Iterable[tuple[int, np.ndarray]]]

_SMOOTHING = ("foreground_threshold", "foreground_smoothing", "distance_smoothing")
_WATERSHED = ("center_distance_threshold", "boundary_distance_threshold", *_SMOOTHING)
_PROMPTING = (
    "center_distance_threshold", "boundary_distance_threshold", "foreground_threshold", "multimasking", "batch_size",
    "mask_threshold", "refine_with_box_prompts", "prompt_function",
)


class GridError(InvalidInputError):
    """The values of a grid search do not fit to each other or to the segmenter."""


def combinations(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], segmenter: Segmenter) -> list[Options]:
    """Return the options of `generate` for each combination; the last setting varies fastest.

    Raises:
        GridError: If a setting is both searched and fixed, or has no values.
        InvalidInputError: If `generate` has no such option.
    """
    both = sorted({*grid} & {*fixed})
    if both:
        raise GridError(f"{both[0]!r} is both searched and fixed. Take it out of the grid or of fixed_generate_kwargs.")
    empty = [name for name, values in grid.items() if isinstance(values, str) or len(values) == 0]
    if empty or not grid:
        raise GridError(f"Each setting of the grid needs a list of values, but got {dict(grid)!r}.")
    check_names({**fixed, **grid}, segmenter)
    return [{**fixed, **dict(zip(grid, values))} for values in product(*grid.values())]


def check_names(options: Mapping[str, Any], segmenter: Segmenter) -> None:
    """Raise `InvalidInputError` if `generate` of the segmenter lacks an option."""
    mode = mode_of(segmenter)
    check_options(options, generate_options(mode, is_tiled(segmenter)), f"the segmentation mode {mode!r}")


def score_steps(
    segmenter: Segmenter, options: Sequence[Options], truth: np.ndarray, n_workers: int | None = None
) -> Steps[list[dict[str, float]]]:
    """Score an initialised segmenter for each combination of options.

    Args:
        segmenter: The segmenter; its state stays as it is.
        options: Options of `generate`.
        truth: Labels (Y, X).
        n_workers: Number of threads; None takes as many as there are cores. It does not change the result.

    Yields:
        `Step` after each combination.

    Returns:
        The scores of `metrics.segmentation_scores`, in the order of the options.
    """
    scores: list[dict[str, float] | None] = [None] * len(options)
    known: dict[bytes, dict[str, float]] = {}

    def run(job: Job) -> list[tuple[int, dict[str, float]]]:
        return [(position, _score(labels, truth, known)) for position, labels in job()]

    done, text = 0, "Score settings"
    yield Step(0, len(options), text)
    pool = ThreadPoolExecutor(n_workers or cpu_count())
    try:
        for jobs in _job_groups(segmenter, options):
            for results in pool.map(run, jobs):
                for position, score in results:
                    scores[position] = score
                done += len(results)
                yield Step(done, len(options), text)
    finally:
        pool.shutdown(cancel_futures=True)
    return scores


def _score(labels: np.ndarray, truth: np.ndarray, known: dict[bytes, dict[str, float]]) -> dict[str, float]:
    """Score labels once: neighbouring settings often give the same."""
    key = xxhash.xxh3_128_digest(np.ascontiguousarray(labels))
    if key not in known:
        known[key] = segmentation_scores(labels, truth)
    return known[key]


def _job_groups(segmenter: Segmenter, options: Sequence[Options]) -> Iterator[list[Job]]:
    """Jobs that may run at the same time, group after group."""
    mode = mode_of(segmenter)
    if type(segmenter) not in SEGMENTER_CLASSES[mode]:  # of a subclass it is not known what depends on what
        return ([_generate(segmenter, k, chosen)] for k, chosen in enumerate(options))
    if mode == "ais" and all(name in (*_WATERSHED, "min_size") for chosen in options for name in chosen):
        return _watershed_jobs(segmenter, options)
    if mode == "apg":
        return _prompt_jobs(segmenter, options)
    return _mask_jobs(segmenter, options) if mode == "amg" else iter([
        [_generate(segmenter, k, chosen) for k, chosen in enumerate(options)]
    ])


def _generate(segmenter: Segmenter, position: int, options: Options) -> Job:
    return lambda: [(position, segmenter.generate(**options))]


def _grouped(
    segmenter: Segmenter, options: Sequence[Options], names: Sequence[str]
) -> list[tuple[Options, list[tuple[int, Options]]]]:
    """Group options by the values of some of them: for each group all values, and the members with their positions."""
    defaults = {name: p.default for name, p in generate_options(mode_of(segmenter), is_tiled(segmenter)).items()}
    groups: dict[Hashable, tuple[Options, list[tuple[int, Options]]]] = {}
    for position, chosen in enumerate(options):
        full = {**defaults, **chosen}
        groups.setdefault(tuple(full[name] for name in names), (full, []))[1].append((position, full))
    return list(groups.values())


def _watershed_jobs(segmenter: Segmenter, options: Sequence[Options]) -> Iterator[list[Job]]:
    """AIS: maps are smoothed once for all thresholds of seeds, and flooded once for all sizes."""
    maps = segmenter.get_state()
    for full, members in _grouped(segmenter, options, _SMOOTHING):
        # No seed is below -1, so that nothing but smoothing takes time here.
        _, smoothed = watershed_from_center_and_boundary_distances(
            maps["center_distances"], maps["boundary_distances"], maps["foreground"], -1, -1, debug=True,
            **{name: full[name] for name in _SMOOTHING},
        )
        positions = [position for position, _ in members]
        jobs = _grouped(segmenter, [chosen for _, chosen in members], _WATERSHED)
        yield [
            _flood(smoothed, job, [(positions[k], chosen["min_size"]) for k, chosen in of_job]) for job, of_job in jobs
        ]


def _flood(smoothed: Mapping[str, np.ndarray], options: Options, sizes: Sequence[tuple[int, int]]) -> Job:
    def job() -> Iterator[tuple[int, np.ndarray]]:
        labels = watershed_from_center_and_boundary_distances(
            smoothed["center_distances"], smoothed["boundary_distances"], smoothed["foreground_mask"],
            options["center_distance_threshold"], options["boundary_distance_threshold"], distance_smoothing=0,
        )
        n_pixels = np.bincount(labels.ravel())  # ids are consecutive
        for position, min_size in sizes:
            yield position, np.where(n_pixels >= min_size, np.arange(len(n_pixels)), 0)[labels]
    return job


def _mask_jobs(segmenter: Segmenter, options: Sequence[Options]) -> Iterator[list[Job]]:
    """AMG: a mask is upsampled when it first passes the threshold of the predicted IoU; the lowest one goes first."""
    jobs = [_generate(segmenter, k, chosen) for k, chosen in enumerate(options)]
    default = generate_options("amg", is_tiled(segmenter))["pred_iou_thresh"].default
    first = min(range(len(options)), key=lambda k: options[k].get("pred_iou_thresh", default))
    yield [jobs[first]]
    yield [*jobs[:first], *jobs[first + 1:]]


class _RememberPredictions:
    """Mixin of a prompt generator: prompts that were predicted before are not predicted again."""

    def remember_nothing(self) -> None:
        self._predictions: dict[Hashable, list[dict[str, Any]]] = {}

    def _predict(self, prompts: BatchedPrompts, options: dict) -> Steps[list[dict[str, Any]]]:
        arrays = (prompts.boxes, prompts.points, prompts.labels, prompts.logits)
        key = tuple(a if a is None else np.asarray(a).tobytes() for a in arrays), tuple(options.items())
        if key not in self._predictions:
            self._predictions[key] = yield from super()._predict(prompts, options)
        return self._predictions[key]


def _remembering_function() -> Callable[..., dict[str, np.ndarray] | None]:
    known: dict[Hashable, dict[str, np.ndarray] | None] = {}

    def point_prompts(foreground, center_distances, boundary_distances, **thresholds):
        key = tuple(thresholds.items())
        if key not in known:
            known[key] = point_prompts_from_maps(foreground, center_distances, boundary_distances, **thresholds)
        return known[key]
    return point_prompts


def _prompt_jobs(segmenter: Segmenter, options: Sequence[Options]) -> Iterator[list[Job]]:
    """APG: the first of those with the same prompts runs alone, the others only merge what it predicted."""
    twin = type(segmenter.__class__.__name__, (_RememberPredictions, type(segmenter)), {})(
        segmenter._predictor, segmenter._decoder
    )
    twin.set_state(segmenter.get_state())
    prompt_function = _remembering_function()
    merges_in_tiles = any(chosen.get("optimize_memory") for chosen in options)
    for _, members in _grouped(segmenter, options, _PROMPTING):
        twin.remember_nothing()
        jobs = [
            _generate(twin, k, {**chosen, "prompt_function": chosen["prompt_function"] or prompt_function})
            for k, chosen in members
        ]
        # Merging tile by tile predicts anew each time, with the one predictor.
        yield from ([[job] for job in jobs] if merges_in_tiles else [jobs[:1], jobs[1:]])
