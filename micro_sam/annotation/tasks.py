"""The long work of a session: embedding, segmentation from prompts, automatic segmentation, tracking.

Each function takes a snapshot of the session and returns a `Task`: its steps compute, in any thread, and `apply` makes
one action of the result. What can be refused is refused at once, before any work.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError
from ..core.masks import crop_mask
from ..core.progress import Step, Steps
from ..editing.refine import refine_mask
from ..tracking.lineage import TrackForest
from .automatic import AutomaticSource, AutoSettings, advice
from .batches import batch_state, confidence_state, confidence_with, show_in_plane, split_objects
from .embedding_source import EmbeddingSource
from .prompts import PromptRefusal, Prompts, plan_prompts
from .review import mean_score, measure_steps, score_labels_steps
from .segment import ObjectResult, segment_plane_steps
from .session import AUTO, COMMITTED, CURRENT, AnnotationSession
from .task import Task
from .tracks import TrackSettings, divide, track_object_steps
from .volume import VolumeSettings, propagate_steps


def open_model(
    session: AnnotationSession,
    model_type: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    mode: str | None = None,
    save_path: str | None = "auto",
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    plane: int | None = None,
    load: Callable[..., Any] | None = None,
    embeddings: Mapping[str, Any] | None = None,
    decoder_path: str | os.PathLike | None = None,
    prepare_automatic: bool = False,
) -> Task[Any, None]:
    """Load a model and compute the embeddings of the image, or of one plane of a stack: the rest is `embed_rest`.

    Args:
        session: The session.
        model_type: Name of the model; None chooses a default that needs no download.
        checkpoint: Weights instead of the published ones.
        device: Compute device; None or `auto` chooses it.
        mode: Automatic segmentation: `amg`, `ais`, `apg`; None or `auto` chooses it.
        save_path: A zarr folder; `auto` for the automatic cache; None for memory.
        tile_shape: Tile (y, x); None for none.
        halo: Halo (y, x).
        plane: For stacks, the plane to begin with.
        load: Loads the model, by default `segmentation.workflow.load_model`.
        embeddings: Embeddings that were computed before, instead of computing them.
        decoder_path: Weights of the segmentation decoder alone.
        prepare_automatic: Whether to compute the embeddings of all planes now, and to prepare automatic segmentation.
    """
    device = None if device == "auto" else device
    text = f"Load model {model_type or Path(checkpoint or 'by default').name}"
    options = {} if decoder_path is None else {"decoder_path": decoder_path}

    def steps() -> Steps[Any]:
        yield Step(0, 1, text)
        # Imported here, as it loads torch, which takes a while.
        from ..segmentation.workflow import default_model, load_model, resolve_model
        name = resolve_model(model_type, checkpoint) if model_type or checkpoint else default_model()
        model = (load or load_model)(name, checkpoint, device, mode, **options)
        yield Step(1, 1, text)
        if embeddings is not None:
            source = EmbeddingSource.from_embeddings(model, session.image, embeddings)
        else:
            model = model.for_prompts(session.image.plane_shape, tile_shape, halo, save_path)
            # One contrast for all tiles leaves no seams; stores of other commands have one for each tile.
            normalization = "image" if tile_shape is not None and save_path == "auto" else "tile"
            source = EmbeddingSource(
                model, session.image, save_path=save_path, tile_shape=tile_shape, halo=halo,
                normalization=normalization,
            )
        if session.n_planes is None or prepare_automatic:
            yield from source.prepare_steps()
        else:
            yield from source.plane_steps(plane or 0)
        automatic = AutomaticSource(model, session.image, source)
        if prepare_automatic:
            yield from automatic.prepare_steps()
        return model, source, automatic

    def apply(found) -> None:
        model, source, automatic = found
        session.set_model(model, source, automatic, source.describe())

    return Task("Compute embeddings", steps, apply)


def embed_rest(session: AnnotationSession) -> Task[None, None]:
    """Compute the embeddings of all planes that are missing, for example in the background."""
    session.require_model()
    return Task("Compute embeddings", session.embeddings.prepare_steps, lambda _: session.events.model.emit())


def segment(
    session: AnnotationSession,
    plane: int | None = None,
    *,
    batched: bool = False,
    live: bool = False,
    drop_specks: bool = False,
) -> Task[list[ObjectResult], int]:
    """Segment the current object from the prompts in the image, or in one plane; `apply` gives the number of objects.

    While an object is being corrected, the model starts from its mask, or from an ellipse or polygon that is drawn.

    Args:
        session: The session.
        plane: The slice or frame; None for an image.
        batched: Whether each positive point and each box is an object of its own; in a volume with the same id in all
            planes.
        live: Whether it follows a prompt by itself, and is undone together with it.
        drop_specks: Whether to leave out parts of masks that no prompt points at; not of an object that is corrected.

    Raises:
        PromptRefusal: If there is nothing to segment, or the prompts do not fit together.
    """
    session.require_model()
    tracking = session.mode == "tracking"
    track_id = session.track_id if tracking else None
    shape = session.image.shape[-2:]
    sets = plan_prompts(
        session.prompts, shape, plane=plane, track_id=track_id, batched=batched, mode=session.mode,
        first_id=track_id or 1, correcting=session.correcting is not None,
    )
    source, predictor, prompts = session.embeddings, own_predictor(session), session.prompts
    start = None
    if session.correcting is not None and sets[0].mask is not None:
        start = sets[0].mask
    elif session.correcting is not None:
        editor = session.layer_editor(CURRENT)
        start = np.zeros(shape, dtype=bool)
        for i in editor.ids:
            start |= editor.mask(i, plane)

    def steps() -> Steps[list[ObjectResult]]:
        image_embeddings, i = yield from source.plane_steps(plane)
        if start is None:
            return (yield from segment_plane_steps(
                predictor, image_embeddings, i, sets, shape, drop_specks=drop_specks
            ))
        mask, score = refine_mask(
            predictor, start, image_embeddings, i, points=sets[0].points if len(sets[0].points) else None,
            labels=sets[0].labels if len(sets[0].points) else None, box=sets[0].box,
        )
        return [ObjectResult(sets[0].object_id, crop_mask(mask), score, 1.0)]

    def apply(results: list[ObjectResult]) -> int:
        found = [r for r in results if r.mask.area]
        if not found:
            session.events.message.emit("warning", "The model finds nothing here. Move a point, or draw a box.")
        args = {"plane": plane, "batched": batched, "live": live, "drop_specks": drop_specks}
        if batched and plane is not None:
            show_in_plane(session, prompts, plane, [s.object_id for s in sets], found, args)
            return len(found)
        scores, state = {r.object_id: (r.predicted_iou, r.stability) for r in found}, {}
        if plane is not None:
            state["confidence"] = confidence_with(session, {i: {plane: score} for i, score in scores.items()})
            state["batch"] = None if tracking else _batch_of_one(prompts)
        session.show_objects(
            "segment", {r.object_id: {plane or 0: r.mask} for r in found},
            planes=None if plane is None else [plane], ids=[track_id] if tracking else None,
            scores={**_other_tracks(session, track_id), **scores}, state=state, args=args,
        )
        return len(found)

    return Task("Segment object", steps, apply)


def segment_volume(
    session: AnnotationSession, settings: VolumeSettings | None = None, *, batched: bool = False
) -> Task[Any, Any]:
    """Segment the current object in all slices, from the prompts in some; `apply` gives what was found.

    Args:
        session: The session.
        settings: How masks are carried from slice to slice.
        batched: Whether each positive point and each shape is an object of its own.
    """
    session.require_model()
    prompts = session.prompts
    objects = split_objects(prompts, session.correcting is not None) if batched else {1: prompts}
    source, predictor, shape = session.embeddings, own_predictor(session), session.image.shape
    settings = settings or VolumeSettings()

    def steps():
        yield from source.prepare_steps()
        image_embeddings, _ = yield from source.plane_steps(0)
        return (yield from propagate_steps(predictor, image_embeddings, shape, objects, settings))

    def apply(result):
        for note in result.notes:
            session.events.message.emit("info", note)
        session.show_objects(
            "segment volume", result.masks, scores=result.scores,
            state={
                "confidence": confidence_state(result.confidence),
                "batch": batch_state(prompts) if batched else _batch_of_one(prompts),
            },
            args={"batched": batched, **vars(settings)},
        )
        return result

    return Task("Segment volume", steps, apply)


def segment_track(session: AnnotationSession, settings: TrackSettings | None = None) -> Task[Any, Any]:
    """Follow the current track through the time series; at a division its daughters get ids."""
    session.require_model()
    source, predictor, shape = session.embeddings, own_predictor(session), session.image.shape
    prompts, track_id, lineage = session.prompts, session.track_id, session.lineage
    settings = settings or TrackSettings()
    if not prompts.of_track(track_id).planes():
        raise PromptRefusal(f"Track {track_id} has no prompts. Place a point or a box on the object.", code="none")

    def steps():
        yield from source.prepare_steps()
        image_embeddings, _ = yield from source.plane_steps(0)
        return (yield from track_object_steps(predictor, image_embeddings, shape, prompts, track_id, settings))

    def apply(result):
        known = {**confidence_with(session, {}), **confidence_state({track_id: result.scores})}
        state, score = {"confidence": known}, mean_score(result.scores.values())
        if result.division_frame is not None and not lineage.get(track_id):
            used = set(session.layer_editor(CURRENT).ids) | set(lineage)
            working, daughters = divide(session.lineage, track_id, used)
            state["lineage"] = {str(t): d for t, d in working.items()}
            session.events.message.emit(
                "info", f"Track {track_id} divides in frame {result.division_frame} into {daughters[0]} and "
                f"{daughters[1]}: select one of them, place prompts, and track it."
            )
        for note in result.notes:
            session.events.message.emit("info", note)
        session.show_objects(
            "segment track", {track_id: result.masks}, ids=[track_id], state=state,
            scores={**_other_tracks(session, track_id), **({} if score is None else {track_id: score})},
            args={"track_id": track_id, **vars(settings)},
        )
        return result

    return Task("Track object", steps, apply)


def auto_segment(
    session: AnnotationSession, settings: AutoSettings, plane: int | None = None
) -> Task[Any, int]:
    """Segment all objects of the image, of one plane, or (plane None) of the whole volume."""
    session.require_model()
    source, editor = session.automatic, session.layer_editor(AUTO)
    if session.mode == "tracking" and plane is None:
        raise InvalidInputError("Use auto_track for all frames of a time series.")
    whole = plane is None and session.mode == "3d"

    def steps():
        work = source.segment_volume_steps(settings) if whole else source.segment_plane_steps(plane, settings)
        labels = yield from work
        if plane is not None:
            labels = _beside_other_planes(editor, labels, plane)
        return (yield from editor.compare_steps(labels, plane))

    def apply(runs) -> int:
        return _show_automatic(session, runs, "automatic segmentation", settings, {"plane": plane}, {})

    return Task("Segment all objects", steps, apply)


def auto_track(session: AnnotationSession, settings: AutoSettings) -> Task[Any, int]:
    """Segment and track all objects of a time series, with their lineage."""
    session.require_model()
    source, editor = session.automatic, session.layer_editor(AUTO)

    def steps():
        labels, forest = yield from source.track_steps(settings)
        runs = yield from editor.compare_steps(labels)
        return runs, {str(t.id): t.parent for t in forest.values() if t.parent}

    def apply(found) -> int:
        runs, parents = found
        return _show_automatic(session, runs, "automatic tracking", settings, {}, {"auto_parents": parents})

    return Task("Track all objects", steps, apply)


def score(session: AnnotationSession) -> Task[dict[int, Any], int]:
    """Ask the model how sure it is of the committed objects that have no score, each in its middle plane."""
    session.require_model()
    objects, source, predictor = session.objects, session.embeddings, own_predictor(session)
    unknown = sorted(set(objects.ids) - set(session.scores()))
    by_plane: dict[int | None, list[int]] = {}
    for i in unknown:
        planes = objects.planes(i)
        by_plane.setdefault(None if session.n_planes is None else planes[len(planes) // 2], []).append(i)
    labels = session.labels[COMMITTED]

    def steps() -> Steps[dict[int, Any]]:
        found = {}
        for plane, ids in sorted(by_plane.items(), key=lambda item: item[0] or 0):
            image_embeddings, i = yield from source.plane_steps(plane)
            here = labels if plane is None else labels[plane]
            found |= yield from score_labels_steps(predictor, image_embeddings, here, i, ids=ids)
        return found

    def apply(found: dict[int, Any]) -> int:
        session.note_scores({i: tuple(s) for i, s in found.items()})
        return len(found)

    return Task("Score objects", steps, apply)


def measure(session: AnnotationSession) -> Task[Any, Any]:
    """Measure size, shape and intensity of the committed objects.

    Gives a table with the column `id`, one row for each object, or for each track and frame; in the unit of the image
    if it has one, else in pixels.
    """
    labels, image = session.labels[COMMITTED], session.image
    tracks = session.objects.tracks.values() if session.mode == "tracking" else None
    units = set((image.units or ())[-2:]) if tracks is not None else set(image.units or ())
    unit = units.pop() if len(units) == 1 else "pixel"
    known = {} if unit == "pixel" or image.scale is None else {"scale": image.scale, "unit": unit}

    def steps():
        lineages = None if tracks is None else TrackForest(tracks).lineages()
        table = yield from measure_steps(labels, image.array, lineages=lineages, **known)
        return table.reset_index().rename(columns={"label": "id", "track": "id"})

    return Task("Measure objects", steps, lambda table: table, uses_model=False)


def _show_automatic(session, runs, name, settings, args, state: Mapping[str, Any]) -> int:
    editor = session.layer_editor(AUTO)
    delta = editor.take_over(name, runs)
    session.take_over(name, AUTO, delta, {**args, **vars(settings)}, {f"scores/{AUTO}": None, **state})
    n_objects = len(editor.ids)
    if not n_objects:
        session.events.message.emit("warning", advice(settings, session.mode))
    return n_objects


def _beside_other_planes(editor, labels: np.ndarray, plane: int) -> np.ndarray:
    """Shift the ids of a plane behind those of the others, so that no two objects share one."""
    others = [i for i in editor.ids if editor.planes(i) != [plane]]
    labels = labels.astype(np.uint32)
    labels[labels != 0] += np.uint32(max(others, default=0))
    return labels


def own_predictor(session: AnnotationSession) -> SamPredictor:
    """A predictor of its own for each task: it remembers the image that it was set to, and tasks take turns."""
    return copy.copy(session.model.predictor)


def _batch_of_one(prompts: Prompts) -> dict[str, Any] | None:
    """A single positive prompt makes the same object in a batch; of several an object of a batch has only one."""
    return batch_state(prompts) if len(prompts.split()) == 1 else None


def _other_tracks(session: AnnotationSession, track_id: int | None) -> dict[int, tuple[float, float]]:
    """The scores of the tracks that stay as they are."""
    return {} if track_id is None else {i: s for i, s in session.scores(CURRENT).items() if i != track_id}
