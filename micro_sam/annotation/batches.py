"""Several objects at once in a volume, and how sure one may be of the current objects in each plane.

In a batch each positive prompt is an object, and its id is the number of its prompt among those of all planes. These
numbers change when prompts come or go; the objects that are there already are then renumbered, so that an object never
gets parts of another one.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..core.masks import crop_mask
from .prompt_data import PointPrompt, Prompts, ShapePrompt
from .prompts import PromptRefusal, check_batched
from .segment import ObjectResult
from .session import CURRENT, AnnotationSession

Scores = Mapping[int, Mapping[int, Sequence[float | None]]]  # predicted IoU and stability by object and plane


def split_objects(prompts: Prompts, correcting: bool = False) -> dict[int, Prompts]:
    """Each positive point and each shape of a volume as an object of its own, with all negative points.

    Args:
        prompts: The prompts of all planes.
        correcting: Whether an object is being corrected; then it is refused.

    Returns:
        The prompts by object. A negative point beside prompts of other objects is no stop.
    """
    check_batched("3d", correcting)
    parts = prompts.split()
    if not parts:
        raise PromptRefusal("There are no positive points and no shapes to start from.", code="only_negative")
    no_stops = [plane for plane in prompts.planes() if not prompts.is_stop(plane)]
    return {k: _without_stops(part, no_stops) for k, part in enumerate(parts, 1)}


def _without_stops(prompts: Prompts, planes: Collection[int]) -> Prompts:
    for plane in planes:
        if prompts.is_stop(plane):
            prompts = prompts.without_plane(plane)
    return prompts


def show_in_plane(
    session: AnnotationSession,
    prompts: Prompts,
    plane: int,
    ids: Collection[int],
    results: Sequence[ObjectResult],
    args: Mapping[str, Any],
) -> None:
    """Show the objects of a batch that have prompts in a plane; in other planes the objects stay.

    Objects whose prompt is not there any more are removed.

    Args:
        session: The session, in the mode `3d`.
        prompts: The prompts of all planes that the batch was made of.
        plane: The plane.
        ids: The objects with prompts in the plane.
        results: What was found of them.
        args: What the action was asked for.
    """
    editor, moved = session.layer_editor(CURRENT), _new_ids(session, prompts)
    changed = {old for old, new in moved.items() if new != old}
    masks: dict[int, dict] = {}
    for old, new in sorted(moved.items(), key=lambda ids: ids[1] or 0):
        if new is not None and (old in changed or new in ids):
            others = [z for z in editor.planes(old) if z != plane or new not in ids]
            masks[new] = {z: crop_mask(editor.mask(old, z)) for z in others}
    for result in results:
        masks.setdefault(result.object_id, {})[plane] = result.mask
    scores = {moved[i]: score for i, score in session.scores(CURRENT).items() if moved[i] is not None}
    confidence = {new: session.confidence(old) for old, new in moved.items() if new is not None}
    for result in results:
        scores[result.object_id] = score = (result.predicted_iou, result.stability)
        confidence[result.object_id] = {**confidence.get(result.object_id, {}), plane: score}
    session.show_objects(
        "segment", dict(sorted(masks.items())), ids=sorted(changed | set(ids)), scores=scores,
        state={"confidence": confidence_state(confidence), "batch": batch_state(prompts)}, args=args,
    )


def batch_state(prompts: Prompts) -> dict[str, Any]:
    """What the session remembers of a batch: the prompt of each object, in their order."""
    return Prompts([p for p in prompts.points if p.positive], [s for s in prompts.shapes if s.positive]).to_json()


def confidence_state(scores: Scores) -> dict[str, dict[str, list[float | None]]]:
    """Scores by object and plane, as the session keeps them."""
    return {str(i): {str(z): _rounded(score) for z, score in planes.items()} for i, planes in scores.items()}


def confidence_with(session: AnnotationSession, scores: Scores) -> dict[str, dict[str, list[float | None]]]:
    """The confidence that the session has to keep when some planes of some objects get other masks."""
    known = {i: session.confidence(i) for i in session.layer_editor(CURRENT).ids}
    return confidence_state({**known, **{i: {**known.get(i, {}), **planes} for i, planes in scores.items()}})


def _rounded(score: Sequence[float | None]) -> list[float | None]:
    return [None if v is None or math.isnan(v) else round(float(v), 4) for v in score]


def _new_ids(session: AnnotationSession, prompts: Prompts) -> dict[int, int | None]:
    """The id that each object that is there gets in a new batch; None if it has no prompt in it."""
    before = _in_order(Prompts.from_json(session._state.get("batch") or Prompts().to_json()))
    now = _in_order(Prompts.from_json(batch_state(prompts)))
    places: dict[PointPrompt | ShapePrompt, list[int]] = {}
    for k, prompt in enumerate(now, 1):
        places.setdefault(prompt, []).append(k)
    found = {k: places[prompt].pop(0) for k, prompt in enumerate(before, 1) if places.get(prompt)}
    taken = set(found.values())
    moved: dict[int, int | None] = {}
    for i in session.layer_editor(CURRENT).ids:
        moved[i] = found.get(i)
        if i > len(now) and i > len(before):
            moved[i] = i  # no object of a batch
        elif i not in found and i <= min(len(now), len(before)) and i not in taken:
            was, is_now = before[i - 1], now[i - 1]
            if type(was) is type(is_now) and was.plane == is_now.plane:
                moved[i] = i  # its prompt was moved
    return moved


def _in_order(prompts: Prompts) -> list[PointPrompt | ShapePrompt]:
    return [*prompts.points, *prompts.shapes]
