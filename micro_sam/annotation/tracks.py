"""Follow an object through a time series from prompts, and the bookkeeping of who descends from whom.

A *working lineage* has the tracks that are being annotated: track id -> ids of its daughters, `{1: []}` at the start.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from segment_anything import SamPredictor

from ..core.masks import BoxedMask
from ..core.progress import Step, Steps
from ..editing.follow import propagate_track_steps
from ..editing.tracks import LineageError, lineage_problems
from ..embeddings.features import ImageEmbeddings
from ..tracking.objects import FrameObjects
from ..tracking.workflow import get_napari_track_data
from .prompts import PromptedPlanes, PromptRefusal, Prompts, PromptSet, plan_prompts, prompted_planes
from .review import Score
from .segment import ObjectResult, segment_prompt_set

Lineage = Mapping[int, Sequence[int]]

# Why a track ends, for people.
END_TEXTS = {
    "iou": "the mask does not fit the motion", "area": "its area changes suddenly",
    "lost": "the model finds nothing in the next frame", "division": "it divides", "stop": "you have set a stop",
    "end": "the time series ends",
}


@dataclass(frozen=True)
class TrackSettings:
    """How an object is followed; see `editing.follow.propagate_track`.

    Attributes:
        projection: How the mask of a frame prompts the next one: one of `PROJECTION_MODES`.
        iou_threshold: The track ends where the IoU of the new mask and the moved one is smaller.
        motion_smoothing: Weight, 0 to 1, of the motion so far against that of the last frame.
        box_extension: How far projected boxes grow: below 1 a fraction of the side length, else pixels.
        max_area_ratio: The track ends where its area changes by more than this factor; None for no limit.
        drop_specks: Whether masks of prompted frames leave out the parts that no prompt points at.
    """

    projection: str = "single_point"
    iou_threshold: float = 0.5
    motion_smoothing: float = 0.5
    box_extension: float = 0.05
    max_area_ratio: float | None = 2.0
    drop_specks: bool = False


@dataclass(frozen=True, eq=False)
class TrackResult:
    """A track.

    Attributes:
        track_id: Its id.
        masks: Its mask by frame; none if the model found nothing.
        scores: The score of the mask by frame; the stability is only known of prompted frames.
        last: Its last frame; None if it is empty.
        reason: Why it ends there, one of `END_TEXTS`.
        division_frame: The frame in which it divides, which is its last one; None if it does not.
        notes: What the user should know.
    """

    track_id: int
    masks: dict[int, BoxedMask]
    scores: dict[int, Score]
    last: int | None
    reason: str
    division_frame: int | None
    notes: tuple[str, ...]


def track_object_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    image_shape: Sequence[int],
    prompts: Prompts,
    track_id: int,
    settings: TrackSettings | None = None,
) -> Steps[TrackResult]:
    """Segment an object in the frames with prompts of its track, and follow it from the first of these forwards.

    It ends at a division point of the track, before a stop behind the last prompted frame, or where it is lost.

    Args:
        predictor: The predictor.
        image_embeddings: The embeddings of the time series, plain or tiled.
        image_shape: Shape (T, Y, X).
        prompts: All prompts; only those of the track count.
        track_id: The track.
        settings: How it is followed.

    Raises:
        PromptRefusal: If the track has no prompts that say where it is, or they do not fit together.
        InvalidInputError, PromptTileError: See `propagate_track`.
    """
    settings, own = settings or TrackSettings(), prompts.of_track(track_id)
    frames = prompted_planes(own, image_shape[0])
    sets, notes = _plan(own, frames, image_shape[-2:], track_id)
    divisions = _divisions(own, frames, sets, track_id)
    results = yield from _segment_steps(predictor, image_embeddings, image_shape[-2:], sets, settings.drop_specks)
    empty = [frame for frame, result in results.items() if not result.mask.area]
    notes += [f"The model finds nothing at the prompts in frame {frame}: they are left out." for frame in empty]
    masks = {frame: _paste(r.mask, image_shape[-2:]) for frame, r in results.items() if r.mask.area}
    scores = {frame: Score(results[frame].predicted_iou, results[frame].stability) for frame in masks}
    if not masks:
        return TrackResult(track_id, {}, {}, None, "lost", None, tuple(notes))
    if min(masks) == image_shape[0] - 1:
        notes.append(f"Track {track_id} begins in the last frame: there is nothing to follow.")
    found = yield from propagate_track_steps(
        predictor, image_embeddings, masks, division_frames=divisions, projection=settings.projection,
        stop_frame=min((stop for stop in frames.stops if stop > max(masks)), default=None),
        iou_threshold=settings.iou_threshold, motion_smoothing=settings.motion_smoothing,
        box_extension=settings.box_extension, max_area_ratio=settings.max_area_ratio,
    )
    if found.reason in ("iou", "area", "lost"):
        notes.append(f"Track {track_id} ends in frame {found.last}: {END_TEXTS[found.reason]}.")
    scores |= {frame: Score(score) for frame, score in found.scores.items() if frame in found.masks}
    division = found.last if found.reason == "division" else None
    return TrackResult(
        track_id, dict(found.masks), dict(sorted(scores.items())), found.last, found.reason, division, tuple(notes)
    )


def _plan(
    own: Prompts, frames: PromptedPlanes, shape: Sequence[int], track_id: int
) -> tuple[dict[int, PromptSet], list[str]]:
    """What to ask of the model in each frame, and notes on what is left out."""
    sets, notes = {}, list(frames.ignored)
    for frame in frames.planes:
        try:
            sets[frame] = plan_prompts(own, shape, plane=frame, mode="tracking", first_id=track_id)[0]
        except PromptRefusal as error:
            if error.code != "only_negative":
                raise
            notes.append(f"There are only negative prompts in frame {frame}: they are left out.")
    if not sets:
        raise PromptRefusal(
            f"Track {track_id} has only negative prompts. Place a positive point or a box on the object.",
            code="only_negative",
        )
    if frames.stop_lower:
        notes.append("The stop before the first prompted frame has no effect: tracks are followed forwards only.")
    return sets, notes


def _divisions(own: Prompts, frames: PromptedPlanes, sets: Mapping[int, PromptSet], track_id: int) -> list[int]:
    """The frames with division points; nothing of the track may come behind the first one."""
    divisions = sorted({p.plane for p in own.points if p.division and p.plane in frames.planes})
    late = [frame for frame in sets if divisions and frame > divisions[0]]
    if late:
        raise PromptRefusal(
            f"Track {track_id} divides in frame {divisions[0]}, but it has prompts in frame {late[0]}. Give these to a "
            "daughter, or delete the division.", code="after_division",
        )
    return divisions


def _segment_steps(
    predictor, image_embeddings, shape: Sequence[int], sets: Mapping[int, PromptSet], drop_specks: bool
) -> Steps[dict[int, ObjectResult]]:
    results, text = {}, "Segment frames with prompts"
    yield Step(0, len(sets), text)
    for frame, prompt_set in sets.items():
        results[frame] = segment_prompt_set(
            predictor, image_embeddings, frame, prompt_set, shape, drop_specks=drop_specks
        )
        yield Step(len(results), len(sets), text)
    return results


def _paste(mask: BoxedMask, shape: Sequence[int]) -> np.ndarray:
    plane = np.zeros(tuple(shape), dtype=bool)
    y0, x0, y1, x1 = mask.box
    plane[y0:y1, x0:x1] = mask.mask
    return plane


# Lineage


def divide(lineage: Lineage, mother: int, used_ids: Iterable[int] = ()) -> tuple[dict[int, list[int]], tuple[int, int]]:
    """Let a track of a working lineage divide.

    Args:
        lineage: The working lineage; it is not changed.
        mother: The track.
        used_ids: Ids that are taken elsewhere, for example in labels and prompts.

    Returns:
        The new lineage, and the ids of the two daughters: the next that are free.

    Raises:
        LineageError: If there is no such track, or it has divided already.

    Example:
        >>> divide({1: [2, 3], 2: [], 3: []}, 2)
        ({1: [2, 3], 2: [4, 5], 3: [], 4: [], 5: []}, (4, 5))
    """
    tree = _copy(lineage)
    if mother not in tree:
        raise LineageError(f"There is no track {mother} that could divide, only {sorted(tree)}.")
    if tree[mother]:
        raise LineageError(f"Track {mother} has divided already, into {tree[mother]}. Select one of these.")
    first = max([*tree, *map(int, used_ids)]) + 1
    daughters = (first, first + 1)
    return {**tree, mother: list(daughters), first: [], first + 1: []}, daughters


def parents_of(lineage: Lineage) -> dict[int, int]:
    """The parent of each track that has one.

    Raises:
        LineageError: If a track has two.
    """
    parents: dict[int, int] = {}
    for mother, daughters in lineage.items():
        for daughter in map(int, daughters):
            if parents.setdefault(daughter, int(mother)) != int(mother):
                raise LineageError(f"Track {daughter} has two parents, {parents[daughter]} and {mother}.")
    return parents


def commit_lineage(lineage: Lineage, id_map: Mapping[int, int], present_ids: Iterable[int]) -> dict[int, list[int]]:
    """Translate a working lineage to committed ids; tracks that do not exist there are left out.

    Args:
        lineage: The working lineage.
        id_map: The committed id of each track that was committed.
        present_ids: The committed ids that have pixels.

    Returns:
        The lineage of the tracks that are there. Daughters of those that are not are roots.

    Example:
        >>> commit_lineage({1: [2, 3], 2: [], 3: []}, {1: 11, 3: 12}, [11, 12])
        {11: [12], 12: []}
    """
    tree, present = _copy(lineage), {int(i) for i in present_ids}
    known = {track: int(id_map[track]) for track in tree if id_map.get(track) in present}
    return {
        known[track]: [known[d] for d in daughters if d in known] for track, daughters in tree.items() if track in known
    }


def validate(lineage: Lineage, extents: Mapping[int, tuple[int, int]]) -> list[str]:
    """Say what is wrong with a lineage, one sentence for each problem.

    Args:
        lineage: Daughters by track.
        extents: First and last frame of each track that has pixels.

    Returns:
        Nothing if it is right; else tracks with two parents, without pixels, with daughters that begin before they
        end, and such that are their own ancestors.
    """
    tree, problems = _copy(lineage), []
    parents: dict[int, int] = {}
    for mother, daughters in tree.items():
        for daughter in daughters:
            if parents.setdefault(daughter, mother) != mother:
                problems.append(f"Track {daughter} has two parents, {parents[daughter]} and {mother}.")
    linked = {*parents, *parents.values()}
    problems += [f"Track {track} has no pixels." for track in tree if track not in extents and track not in linked]
    return problems + lineage_problems(extents, parents)


def tracks_layer_data(
    labels: np.ndarray | Sequence[FrameObjects], parents: Mapping[int, int]
) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Compute the data of a napari tracks layer.

    Args:
        labels: Labels (T, Y, X) with the ids of tracks; or the objects of each frame, if they are known.
        parents: The parent of each track that has one.

    Returns:
        Rows (track, t, y, x) with the centroids, (N, 4) float64, ordered by track and time; and for each track with a
        parent a list with that. Tracks without pixels are in neither. Both are empty if there are no tracks.
    """
    daughters: dict[int, list[int]] = {}
    for track, parent in parents.items():
        if parent:
            daughters.setdefault(int(parent), []).append(int(track))
    if hasattr(labels, "shape"):
        return get_napari_track_data(labels, [daughters])
    rows = [np.column_stack([o.labels, np.full(len(o), t), o.centroids]) for t, o in enumerate(labels)]
    data = np.concatenate([np.zeros((0, 4)), *rows])
    present = set(data[:, 0].astype(np.int64).tolist())
    graph = {int(t): [int(p)] for t, p in sorted(parents.items()) if t in present and p in present}
    return data[np.lexsort((data[:, 1], data[:, 0]))], graph


def _copy(lineage: Lineage) -> dict[int, list[int]]:
    """A lineage of its own, in which each daughter has an entry."""
    tree = {int(track): [int(d) for d in daughters] for track, daughters in lineage.items()}
    for daughter in [d for daughters in tree.values() for d in daughters]:
        tree.setdefault(daughter, [])
    return tree
