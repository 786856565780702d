"""Segment objects in all planes of a volume, from prompts in some of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from segment_anything import SamPredictor

from ..core.masks import BoxedMask
from ..core.progress import Step, Steps, during
from ..embeddings.features import ImageEmbeddings
from ..volume.propagate import PropagatedObject, propagate_objects_steps
from ..volume.propagation_prompts import SlicePrompts
from .prompts import PromptedPlanes, PromptRefusal, Prompts, PromptSet, plan_prompts, prompted_planes
from .review import Score, mean_score
from .segment import segment_plane_steps

# Why an object was not followed further, for people.
STOP_TEXTS = {
    "iou": "its mask differs from that of the plane before", "area": "its area changes suddenly",
    "drift": "it moves too far", "empty": "the model finds nothing there", "stop_slice": "you have set a stop",
    "z_range": "the range ends", "volume": "the volume ends",
}


@dataclass(frozen=True)
class VolumeSettings:
    """How masks are carried from plane to plane; see `volume.propagate.propagate_objects`.

    Attributes:
        projection: How the mask of a plane prompts the next one: one of `PROJECTION_MODES`.
        iou_threshold: An object ends where the IoU with the plane before is smaller.
        box_extension: How far projected boxes grow: below 1 a fraction of the side length, else pixels.
        max_area_change: It ends where its area changes by more than this factor; None for no limit.
        max_drift: It ends where it moves by more than this fraction of its diameter; None for no limit.
        drop_specks: Whether masks of prompted planes leave out the parts that no prompt points at.
    """

    projection: str = "single_point"
    iou_threshold: float = 0.5
    box_extension: float = 0.05
    max_area_change: float | None = 1.75
    max_drift: float | None = 0.5
    drop_specks: bool = False


@dataclass(frozen=True, eq=False)
class VolumeResult:
    """Objects in a volume, each by its id.

    Attributes:
        masks: The masks by plane. An object of which the model finds nothing has none.
        confidence: The scores of the masks by plane.
        anchors: The planes in which the user's prompts gave the mask.
        stopped: Why it was not followed further down and further up, each one of `STOP_TEXTS`.
        notes: What the user should know: prompts that were left out, and where objects end.
    """

    masks: dict[int, dict[int, BoxedMask]]
    confidence: dict[int, dict[int, Score]]
    anchors: dict[int, tuple[int, ...]]
    stopped: dict[int, tuple[str, str]]
    notes: tuple[str, ...]

    @property
    def scores(self) -> dict[int, Score]:
        """The mean score of each object over its planes."""
        means = {object_id: mean_score(scores.values()) for object_id, scores in self.confidence.items()}
        return {object_id: score for object_id, score in means.items() if score is not None}


@dataclass(eq=False)
class _Object:
    """What is known of an object before it is followed."""

    planes: PromptedPlanes
    sets: dict[int, PromptSet]
    refinements: dict[int, SlicePrompts]
    anchors: dict[int, BoxedMask] = field(default_factory=dict)
    scores: dict[int, Score] = field(default_factory=dict)


def propagate_steps(
    predictor: SamPredictor,
    image_embeddings: ImageEmbeddings,
    image_shape: Sequence[int],
    prompts: Prompts | Mapping[int, Prompts],
    settings: VolumeSettings | None = None,
    object_id: int = 1,
) -> Steps[VolumeResult]:
    """Segment objects in the planes with prompts, and carry their masks through the others.

    Where a plane has only negative points, two or more, they correct what is carried into it; a single one is a stop.

    Args:
        predictor: The predictor.
        image_embeddings: The embeddings of the volume, plain or tiled.
        image_shape: Shape (Z, Y, X).
        prompts: The prompts of one object, or those of several by their ids. Objects may overlap.
        settings: How masks are carried.
        object_id: The id of a single object.

    Raises:
        PromptRefusal: If the prompts of an object do not fit together, or do not say where it is.
        InvalidInputError, PromptTileError: See `propagate_objects`.
    """
    settings = settings or VolumeSettings()
    several = prompts if isinstance(prompts, Mapping) else {object_id: prompts}
    if not several:
        raise PromptRefusal("There are no prompts. Place a point on an object, or draw a box around it.", code="none")
    objects = {}
    for id_, own in several.items():
        try:
            objects[int(id_)] = _plan(own, image_shape, int(id_))
        except PromptRefusal as error:
            if len(several) == 1:
                raise
            raise PromptRefusal(f"Object {id_}: {error}", code=error.code) from error
    notes = [f"{_name(id_, objects)}{text}" for id_, o in objects.items() for text in o.planes.ignored]
    notes += yield from _segment_steps(
        predictor, image_embeddings, image_shape[-2:], objects, settings.drop_specks
    )
    followed = {id_: {**o.anchors, **o.refinements} for id_, o in objects.items() if o.anchors}
    found: dict[int, PropagatedObject] = {}
    if followed:
        found = yield from propagate_objects_steps(
            predictor, image_embeddings, followed, settings.projection, box_extension=settings.box_extension,
            iou_threshold=settings.iou_threshold, max_area_change=settings.max_area_change,
            max_drift=settings.max_drift,
            stop_slices={id_: objects[id_].planes.stops for id_ in followed if objects[id_].planes.stops},
        )
    for id_, result in found.items():
        notes += _outcome(_name(id_, objects), result, objects[id_])
    return _collect(objects, found, notes)


def _plan(prompts: Prompts, image_shape: Sequence[int], object_id: int) -> _Object:
    """Find out what the prompts of each plane say."""
    planes = prompted_planes(prompts, image_shape[0])
    sets, refinements = {}, {}
    for plane in planes.planes:
        options = {"plane": plane, "mode": "3d", "first_id": object_id}
        try:
            sets[plane] = plan_prompts(prompts, image_shape[-2:], **options)[0]
        except PromptRefusal as error:
            if error.code != "only_negative":
                raise
            negative = plan_prompts(prompts, image_shape[-2:], **options, correcting=True)[0]
            refinements[plane] = SlicePrompts(points=negative.points, labels=negative.labels, refine=True)
    if not sets:
        raise PromptRefusal(
            "There are only negative prompts. Place a positive point or a box in a plane with the object.",
            code="only_negative",
        )
    return _Object(planes, sets, refinements)


def _segment_steps(
    predictor, image_embeddings, plane_shape: Sequence[int], objects: dict[int, _Object], drop_specks: bool
) -> Steps[list[str]]:
    """Segment the planes with prompts, all objects of a plane together; returns notes."""
    by_plane = defaultdict(list)
    for o in objects.values():
        for plane, prompt_set in o.sets.items():
            by_plane[plane].append(prompt_set)
    notes, done, text = [], 0, "Segment planes with prompts"
    yield Step(0, len(by_plane), text)
    for plane, sets in sorted(by_plane.items()):
        steps = segment_plane_steps(
            predictor, image_embeddings, plane, sets, plane_shape, drop_specks=drop_specks
        )
        for result in (yield from during(steps, Step(done, len(by_plane), text))):
            if result.mask.area:
                objects[result.object_id].anchors[plane] = result.mask
                objects[result.object_id].scores[plane] = Score(result.predicted_iou, result.stability)
            else:
                name = _name(result.object_id, objects)
                notes.append(f"{name}The model finds nothing at the prompts in plane {plane}: they are left out.")
        done += 1
        yield Step(done, len(by_plane), text)
    return notes


def _name(object_id: int, objects: Mapping[int, _Object]) -> str:
    """The beginning of a note on an object, if there are several."""
    return f"Object {object_id}: " if len(objects) > 1 else ""


def _outcome(name: str, result: PropagatedObject, planned: _Object) -> list[str]:
    """What to say of an object that was followed."""
    first, last = result.z_range
    notes = [
        f"{name}The negative points in plane {plane} have no effect, since the object ends before."
        for plane in planned.refinements if not first <= plane <= last
    ]
    ends = [f"{where}, {STOP_TEXTS[reason]}" for where, reason in (
        ("below", result.stopped_lower), ("above", result.stopped_upper)) if reason not in ("volume", "z_range")]
    where = f"It is in plane {first}" if first == last else f"It is in planes {first} to {last}"
    return [*notes, f"{name}{'; '.join([where, *ends])}."] if ends else notes


def _collect(
    objects: Mapping[int, _Object], found: Mapping[int, PropagatedObject], notes: Sequence[str]
) -> VolumeResult:
    masks, confidence, anchors, stopped = {}, {}, {}, {}
    for id_, o in objects.items():
        result = found.get(id_)
        masks[id_] = {} if result is None else dict(result.masks)
        carried = {} if result is None else result.confidence
        scores = {z: Score(c.predicted_iou, c.stability) for z, c in carried.items()}
        confidence[id_] = dict(sorted({**scores, **o.scores}.items()))
        anchors[id_] = tuple(sorted(o.anchors))
        stopped[id_] = ("empty", "empty") if result is None else (result.stopped_lower, result.stopped_upper)
    return VolumeResult(masks, confidence, anchors, stopped, tuple(notes))
