"""Interactive segmentation of volumes: masks of some slices are carried through the others.

An object is known in some slices, its anchors. From there it is followed slice by slice: the mask of the last slice
gives the prompts for the next one. Between two anchors it is followed from both of them and the two meet in the
middle; beyond the outermost ones it is followed until it ends. Many objects are followed together: all that go up
are swept through the slices in one pass and all that go down in another one, so that each slice is loaded once per
pass and all objects in it go through the mask decoder together.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, require_positive_int
from ..core.masks import BoxedMask, crop_mask, intersection
from ..core.progress import Step, Steps, drain
from ..embeddings.encode import ImageEmbeddings
from .propagation_prompts import (
    PROJECTION_MODES,
    Confidence,
    Projection,
    SliceDecoder,
    SlicePrompts,
    centroid,
    read_prompts,
    union,
)

__all__ = [
    "PROJECTION_MODES", "STOP_REASONS", "Confidence", "Projection", "PropagatedObject",
    "SlicePrompts", "propagate_objects", "propagate_objects_steps",
    "segment_mask_in_volume", "segment_mask_in_volume_steps",
]

# Why an object was not followed further: it met its criterion, nothing was found, or the way ends there.
STOP_REASONS = ("iou", "area", "drift", "empty", "stop_slice", "z_range", "volume")

_EMPTY = BoxedMask(0, 0, np.zeros((0, 0), dtype=bool), 0)


@dataclass(frozen=True, eq=False)
class PropagatedObject:
    """An object in a volume.

    Attributes:
        id: The id of the object.
        masks: The mask in each slice where it is not empty, by ascending slice, cropped.
        confidence: Predicted IoU and stability of the masks that the model made; those of users have none.
        anchors: The slices in which prompts of the user gave the mask.
        stopped_lower: Why it was not followed further down, one of `STOP_REASONS`.
        stopped_upper: The same further up.
    """

    id: int
    masks: Mapping[int, BoxedMask]
    confidence: Mapping[int, Confidence]
    anchors: tuple[int, ...]
    stopped_lower: str
    stopped_upper: str

    @property
    def z_range(self) -> tuple[int, int] | None:
        """First and last slice of the object; None if it is empty."""
        return (min(self.masks), max(self.masks)) if self.masks else None


@dataclass(frozen=True)
class _Criteria:
    """When an object is not followed any further; see `propagate_objects`."""

    iou_threshold: float
    max_area_change: float | None
    max_drift: float | None

    def __post_init__(self):
        for name, value, lowest, highest in (
            ("iou_threshold", self.iou_threshold, 0, 1), ("max_area_change", self.max_area_change, 1, math.inf),
            ("max_drift", self.max_drift, 0, math.inf),
        ):
            if value is not None and not lowest <= value <= highest:
                raise InvalidInputError(f"{name} must be a number from {lowest} to {highest}, but is {value!r}.")

    def reason(self, previous: BoxedMask, mask: BoxedMask) -> str | None:
        """Why a mask does not continue that of the previous slice, or None if it does."""
        if mask.area == 0 or previous.area == 0:
            return "empty"
        common = intersection(previous, mask)
        if common / (previous.area + mask.area - common) < self.iou_threshold:
            return "iou"
        ratio = max(previous.area, mask.area) / min(previous.area, mask.area)
        if self.max_area_change is not None and ratio > self.max_area_change:
            return "area"
        if self.max_drift is not None:
            diameter = math.sqrt(4 * previous.area / math.pi)
            if np.linalg.norm(centroid(mask) - centroid(previous)) > self.max_drift * diameter:
                return "drift"
        return None


@dataclass(frozen=True)
class _Run:
    """Following an object from the slice `source` in steps of +1 or -1 to the slice `last`, both included."""

    source: int
    step: int
    last: int

    @property
    def slices(self) -> range:
        return range(self.source + self.step, self.last + self.step, self.step)


def _plan(
    marks: Mapping[int, bool], follow: tuple[bool, bool], limits: tuple[int, int]
) -> tuple[list[_Run], list[int]]:
    """Plan how the slices around and between marks are filled.

    Args:
        marks: The marked slices, and whether the object is followed from there into the gaps next to it.
        follow: Whether it is followed beyond the lowest and the highest mark.
        limits: The lowest and the highest slice.

    Returns:
        The runs, and the slices in which two runs meet: they get what both neighbours project.
    """
    slices, runs, meetings = sorted(marks), [], []
    for a, b in pairwise(slices):
        middle, is_even = (a + b) // 2, (b - a) % 2 == 0
        if marks[a] and marks[b]:
            runs += [_Run(a, 1, middle - is_even), _Run(b, -1, middle + 1)]
            meetings += [middle] * is_even
        elif marks[a]:
            runs.append(_Run(a, 1, b - 1))
        elif marks[b]:
            runs.append(_Run(b, -1, a + 1))
    if follow[0]:
        runs.append(_Run(slices[0], -1, limits[0]))
    if follow[1]:
        runs.append(_Run(slices[-1], 1, limits[1]))
    return [run for run in runs if len(run.slices)], meetings


@dataclass(eq=False)
class _Track:
    """One object while it is followed. Criteria do not apply from slice `sure[0]` to `sure[1]`."""

    runs: list[_Run]
    meetings: list[int]
    sure: tuple[int, int]
    masks: dict[int, BoxedMask]
    stopped: dict[int, str]
    prompts: dict[int, SlicePrompts] = field(default_factory=dict)
    refinements: dict[int, SlicePrompts] = field(default_factory=dict)
    confidence: dict[int, Confidence] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Visit:
    """Slice `z` is done, and `kept` are the tracks that got a mask there; the first visit of a phase is of no slice."""

    z: int | None
    kept: list[_Track]
    step: Step


class _Propagation:
    """Follows tracks; each phase is a generator whose visits are one slice each, apart from the first one."""

    def __init__(self, decoder: SliceDecoder, criteria: _Criteria, tracks: list[_Track]):
        self._decoder, self._criteria, self._tracks = decoder, criteria, tracks
        self._done, self._total, self._text = 0, 0, ""

    def segment_prompts(self) -> Iterator[_Visit]:
        """Segment the slices with prompts that stand on their own."""
        by_slice = defaultdict(list)
        for track in self._tracks:
            for z in track.prompts:
                by_slice[z].append(track)
        yield self._start(sum(map(len, by_slice.values())), "Segment prompts")
        for z, tracks in sorted(by_slice.items()):
            decoded = self._decoder.decode(z, [self._decoder.prompted(track.prompts[z]) for track in tracks])
            for track, result in zip(tracks, decoded):
                self._keep(track, z, *result)
            yield self._visit(z, tracks, len(tracks))

    def follow(self) -> Iterator[_Visit]:
        """Fill the slices around and between the anchors."""
        for track in self._tracks:
            for run in track.runs:
                if track.masks[run.source].area == 0 and not self._is_sure(track, run.slices[0]):
                    track.stopped[run.step] = "empty"
                    track.runs = [r for r in track.runs if r is not run]
        total = sum(len(t.meetings) + sum(len(run.slices) for run in t.runs) for t in self._tracks)
        yield self._start(total, "Propagate objects")
        for step in (-1, 1):
            yield from self._sweep(step)
        meetings = defaultdict(list)
        for track in self._tracks:
            for z in track.meetings:
                meetings[z].append(track)
        for z, tracks in sorted(meetings.items()):
            masks = self._project(z, [(track, union(track.masks[z - 1], track.masks[z + 1])) for track in tracks])
            for track, result in zip(tracks, masks):
                self._keep(track, z, *result)
            yield self._visit(z, tracks, len(tracks))

    def _sweep(self, step: int) -> Iterator[_Visit]:
        """All runs of one direction, slice by slice."""
        starting = defaultdict(list)
        for track in self._tracks:
            for run in track.runs:
                if run.step == step:
                    starting[run.slices[0]].append((track, run))
        active: list[tuple[_Track, _Run]] = []
        for z in sorted({z for s in starting.values() for _, run in s for z in run.slices}, reverse=step < 0):
            active += starting.pop(z, [])
            if not active:
                continue
            results = self._project(z, [(track, track.masks[z - step]) for track, _ in active])
            kept, ended, going_on = [], 0, []
            for (track, run), (mask, confidence) in zip(active, results):
                reason = None if self._is_sure(track, z) else self._criteria.reason(track.masks[z - step], mask)
                if reason is None:
                    self._keep(track, z, mask, confidence)
                    kept.append(track)
                    going_on += [(track, run)] * (z != run.last)
                else:
                    track.stopped[step] = reason
                    ended += abs(run.last - z)
            n_active, active = len(active), going_on
            yield self._visit(z, kept, n_active + ended)

    def _project(
        self, z: int, sources: list[tuple[_Track, BoxedMask]]
    ) -> list[tuple[BoxedMask, Confidence | None]]:
        """Segment slice `z` from neighbouring masks; without any prompt the result is empty."""
        requests = [self._decoder.projected(mask, track.refinements.get(z)) for track, mask in sources]
        decoded = iter(self._decoder.decode(z, [request for request in requests if request is not None]))
        return [(_EMPTY, None) if request is None else next(decoded) for request in requests]

    @staticmethod
    def _is_sure(track: _Track, z: int) -> bool:
        return track.sure[0] <= z <= track.sure[1]

    @staticmethod
    def _keep(track: _Track, z: int, mask: BoxedMask, confidence: Confidence | None) -> None:
        track.masks[z] = mask
        if mask.area and confidence is not None:
            track.confidence[z] = confidence

    def _start(self, total: int, text: str) -> _Visit:
        self._done, self._total, self._text = 0, total, text
        return self._visit(None, [], 0)

    def _visit(self, z: int | None, kept: list[_Track], n: int) -> _Visit:
        self._done += n
        return _Visit(z, kept, Step(self._done, self._total, self._text))


def propagate_objects_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    objects: Mapping[int, Mapping[int, np.ndarray | BoxedMask | SlicePrompts]],
    projection: str | Mapping[str, bool] | Projection = "mask",
    *,
    box_extension: float = 0.05,
    iou_threshold: float = 0.5,
    max_area_change: float | None = 1.75,
    max_drift: float | None = 0.5,
    z_range: tuple[int, int] | None = None,
    stop_slices: Mapping[int, Iterable[int]] | None = None,
    batch_size: int = 16,
) -> Steps[dict[int, PropagatedObject]]:
    """Generator behind `propagate_objects`: yields `Step` per slice and pass, returns the objects."""
    decoder = SliceDecoder(predictor, image_embeddings, projection, box_extension, batch_size)
    criteria = _Criteria(iou_threshold, max_area_change, max_drift)
    limits = _limits(z_range, decoder.n_slices)
    ends = {int(id_): {int(z) for z in slices} for id_, slices in (stop_slices or {}).items()}
    if not set(ends) <= {int(id_) for id_ in objects}:
        raise InvalidInputError(f"stop_slices has the ids {sorted(ends)}, but the objects are {sorted(objects)}.")
    tracks = {}
    for id_, prompts in objects.items():
        require_positive_int("The id of an object", id_)
        tracks[int(id_)] = _make_track(int(id_), prompts, ends.get(int(id_), set()), limits, decoder)
    anchors = {id_: tuple(sorted({*track.masks, *track.prompts})) for id_, track in tracks.items()}
    propagation = _Propagation(decoder, criteria, list(tracks.values()))
    for visit in chain(propagation.segment_prompts(), propagation.follow()):
        yield visit.step
    return {
        id_: PropagatedObject(
            id_, {z: track.masks[z] for z in sorted(track.masks) if track.masks[z].area},
            dict(sorted(track.confidence.items())), anchors[id_], track.stopped[-1], track.stopped[1],
        ) for id_, track in tracks.items()
    }


def propagate_objects(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    objects: Mapping[int, Mapping[int, np.ndarray | BoxedMask | SlicePrompts]],
    projection: str | Mapping[str, bool] | Projection = "mask",
    *,
    box_extension: float = 0.05,
    iou_threshold: float = 0.5,
    max_area_change: float | None = 1.75,
    max_drift: float | None = 0.5,
    z_range: tuple[int, int] | None = None,
    stop_slices: Mapping[int, Iterable[int]] | None = None,
    batch_size: int = 16,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> dict[int, PropagatedObject]:
    """Follow objects through a volume (or a time series) from masks or prompts in some slices.

    Objects do not influence each other: each is the same as if it were alone, and they may overlap. Between slices in
    which the user says that an object is there, all slices are filled; beyond them it is followed until a criterion
    stops it.

    Args:
        predictor: The predictor; the embeddings of one of the slices stay set in it.
        image_embeddings: Embeddings of the volume, plain or tiled, in memory or lazy; a slice is read when it is used.
        objects: For each id (positive) the slices in which something is known: a mask (Y, X), a cropped mask, or
            `SlicePrompts`. Each object needs a slice with a mask, a box or a positive point that stands on its own.
        projection: How the mask of a slice prompts the next one: one of `PROJECTION_MODES` or a dictionary with
            use_box, use_mask and use_points.
        box_extension: How far projected boxes grow: below 1 a fraction of the side length, else pixels.
        iou_threshold: Stop if the IoU with the mask of the previous slice is smaller.
        max_area_change: Stop if the area becomes larger or smaller than that of the previous slice by more than this
            factor (at least 1). None for no limit.
        max_drift: Stop if the centroid moves by more than this fraction of the diameter of the object (of a disc of
            the same area in the previous slice). None for no limit.
        z_range: First slice, and the one after the last slice, into which objects are followed.
        stop_slices: For some ids the slices in which the object has ended: it is filled up to them, without looking
            at the criteria.
        batch_size: Number of objects per call of the mask decoder.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Returns:
        The objects by id; `paint_objects` writes them into a label volume.

    Raises:
        InvalidInputError: For malformed prompts, slices out of range or options, naming object and slice.
        PromptTileError: If the prompts of an object in a slice belong to different tiles.

    Example:
        >>> objects = propagate_objects(  # doctest: +SKIP
        ...     predictor, embeddings, {1: {10: mask}, 2: {4: SlicePrompts(box=[10, 20, 60, 50])}}
        ... )
    """
    steps = propagate_objects_steps(
        predictor, image_embeddings, objects, projection, box_extension=box_extension, iou_threshold=iou_threshold,
        max_area_change=max_area_change, max_drift=max_drift, z_range=z_range, stop_slices=stop_slices,
        batch_size=batch_size,
    )
    return drain(steps, verbose, pbar_init, pbar_update)


def _limits(z_range: tuple[int, int] | None, n_slices: int) -> tuple[int, int]:
    """First and last slice that may be filled."""
    start, stop = (0, n_slices) if z_range is None else z_range
    if not 0 <= start < stop <= n_slices:
        raise InvalidInputError(
            f"z_range must be (start, stop) with 0 <= start < stop <= {n_slices} (the number of slices), but is "
            f"{z_range!r}."
        )
    return int(start), int(stop) - 1


def _make_track(
    id_: int, prompts: Mapping[int, Any], ends: set[int], limits: tuple[int, int], decoder: SliceDecoder
) -> _Track:
    """Check the prompts of an object and plan how it is followed."""
    read = {}
    for z, value in prompts.items():
        read[int(z)] = read_prompts(value, decoder.shape, f"Object {id_}, slice {z}")
    outside = [z for z in (*read, *ends) if not limits[0] <= z <= limits[1]]
    both = sorted(ends & set(read))
    anchors = {z for z, p in read.items() if p.is_anchor}
    if outside or both or not anchors:
        what = (
            f"slice {outside[0]} is not among the slices {limits[0]} to {limits[1]}" if outside else
            f"slice {both[0]} has prompts and is a stop slice" if both else
            "there is no slice with a mask, or with a box or positive point that does not only refine"
        )
        raise InvalidInputError(f"Object {id_}: {what}. Change its prompts.")
    marks = {**dict.fromkeys(anchors, True), **dict.fromkeys(ends, False)}
    follow = (marks[min(marks)], marks[max(marks)])
    runs, meetings = _plan(marks, follow, limits)
    refinements = {z: p for z, p in read.items() if z not in anchors}
    unreachable = set(refinements) - {z for run in runs for z in run.slices} - set(meetings)
    if unreachable:
        raise InvalidInputError(
            f"Object {id_}: the prompts in slice {min(unreachable)} refine, but a stop slice ends the object before. "
            "Remove the stop slice or the prompts."
        )
    sure = [*marks, *(z for z, p in refinements.items() if p.is_positive)]
    whole = (0, decoder.n_slices - 1)
    stopped = {
        step: "stop_slice" if not followed else "volume" if limit == end else "z_range"
        for step, followed, limit, end in zip((-1, 1), follow, limits, whole)
    }
    return _Track(
        runs, meetings, (min(sure), max(sure)), {z: read[z].mask for z in anchors if read[z].mask is not None}, stopped,
        {z: read[z] for z in anchors if read[z].mask is None}, refinements,
    )


def segment_mask_in_volume_steps(
    segmentation: np.ndarray,
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    segmented_slices: np.ndarray,
    stop_lower: bool,
    stop_upper: bool,
    iou_threshold: float,
    projection: str | Mapping[str, bool] | Projection,
    box_extension: float = 0.0,
    *,
    max_area_change: float | None = None,
    max_drift: float | None = None,
) -> Steps[tuple[np.ndarray, tuple[int, int]]]:
    """Generator behind `segment_mask_in_volume`: yields one `Step` per slice that is done."""
    decoder = SliceDecoder(predictor, image_embeddings, projection, box_extension, batch_size=1)
    criteria = _Criteria(iou_threshold, max_area_change, max_drift)
    slices = _check_volume(segmentation, segmented_slices, decoder)
    marks = dict.fromkeys(slices, True)
    if len(slices) > 1:
        marks[slices[0]], marks[slices[-1]] = not stop_lower, not stop_upper
    runs, meetings = _plan(marks, (not stop_lower, not stop_upper), (0, decoder.n_slices - 1))
    masks = {z: crop_mask(np.asarray(segmentation[z]) != 0) for z in slices}
    track = _Track(runs, meetings, (slices[0], slices[-1]), masks, {})

    for visit in _Propagation(decoder, criteria, [track]).follow():
        if visit.kept:
            mask, plane = track.masks[visit.z], np.zeros(decoder.shape, dtype=segmentation.dtype)
            y0, x0, y1, x1 = mask.box
            plane[y0:y1, x0:x1] = mask.mask
            segmentation[visit.z] = plane
        yield visit.step
    return segmentation, (min(track.masks), max(track.masks))


def segment_mask_in_volume(
    segmentation: np.ndarray,
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    segmented_slices: np.ndarray,
    stop_lower: bool,
    stop_upper: bool,
    iou_threshold: float,
    projection: str | Mapping[str, bool] | Projection,
    update_progress: Callable[[int], None] | None = None,
    box_extension: float = 0.0,
    verbose: bool = False,
    *,
    max_area_change: float | None = None,
    max_drift: float | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Segment an object in a volume from its masks in some slices.

    Slices between two annotated ones are filled from both sides, without looking at the criteria. Beyond the
    outermost annotated slices the object is followed until a criterion stops it or nothing is found.

    Args:
        segmentation: The object (Z, Y, X) with the values 0 and 1, numpy or zarr. It is changed in place: slices that
            are segmented are replaced.
        predictor: The predictor; the embeddings of one of the slices stay set in it.
        image_embeddings: Embeddings of the volume, plain or tiled, in memory or lazy.
        segmented_slices: Indices of the annotated slices, at least one, in any order.
        stop_lower: Whether the lowest annotated slice is an (empty) mark that the object has ended there.
        stop_upper: The same for the highest annotated slice.
        iou_threshold: Stop if the IoU of the masks of neighbouring slices is smaller.
        projection: How the mask of a slice prompts the next one, see `propagate_objects`.
        update_progress: Called with 1 whenever a slice is done; replaces the progress bar.
        box_extension: How far projected boxes grow: below 1 a fraction of the side length, else pixels.
        verbose: Whether to show a progress bar.
        max_area_change: See `propagate_objects`, also for the following; by default without limit.
        max_drift: .

    Returns:
        The segmentation, and the first and last slice that were segmented or annotated.

    Raises:
        InvalidInputError: For other values than 0 and 1, shapes that do not fit the embeddings, slices out of range,
            or wrong options.
    """
    steps = segment_mask_in_volume_steps(
        segmentation, predictor, image_embeddings, segmented_slices, stop_lower, stop_upper, iou_threshold, projection,
        box_extension, max_area_change=max_area_change, max_drift=max_drift,
    )
    if update_progress is None:
        return drain(steps, verbose)
    # A step that stops the object completes the slices beyond as well, but those are not done.
    return drain(steps, pbar_init=lambda total, text: None, pbar_update=lambda n: update_progress(1))


def _check_volume(segmentation: np.ndarray, segmented_slices: np.ndarray, decoder: SliceDecoder) -> list[int]:
    """Return the annotated slices, sorted, or raise `InvalidInputError`."""
    expected = (decoder.n_slices, *decoder.shape)
    if tuple(segmentation.shape) != expected:
        raise InvalidInputError(
            f"The segmentation must have the shape {expected} of the embeddings, but has {tuple(segmentation.shape)}."
        )
    slices = np.unique(np.asarray(segmented_slices))
    if slices.size == 0 or slices.dtype.kind not in "ui" or slices[0] < 0 or slices[-1] >= decoder.n_slices:
        raise InvalidInputError(
            f"segmented_slices must be at least one index from 0 to {decoder.n_slices - 1}, but are "
            f"{np.asarray(segmented_slices).tolist()!r}."
        )
    # Of an array on disk only the slices are read that are used.
    for z in range(decoder.n_slices) if isinstance(segmentation, np.ndarray) else slices.tolist():
        plane = np.asarray(segmentation[z])
        if plane.dtype != bool and np.count_nonzero(plane) != np.count_nonzero(plane == 1):
            raise InvalidInputError(
                f"The segmentation must hold only 0 and 1, but slice {z} has the values "
                f"{np.unique(plane)[:5].tolist()}. Pass the mask of one object, `labels == id`."
            )
    return slices.tolist()
