"""The session of an annotator: everything that a user can do with an image, as actions that are journaled and undone.

A session owns three label images: `current_object` (what prompts gave), `auto_segmentation` and `committed_objects`;
viewers show these arrays. Each action changes them by sparse deltas and becomes one entry of an append-only journal, so
that it can be undone, is still there after a crash, and can be replayed without the model. There is no Qt in here.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.errors import InvalidInputError, NotInitializedError
from ..core.masks import BoxedMask, crop_mask
from ..core.output import write_labels
from ..core.progress import drain
from ..editing.editor import Stroke
from ..editing.history import Delta, ObjectIndex
from ..editing.objects import Commit, ObjectEditor
from ..editing.tracks import TrackEditor
from .action_log import AUTO, COMMITTED, CURRENT, LAYERS, ActionLog
from .geometry import AnnotationImage
from .journal import Journal
from .layer_labels import LayerLabels
from .prompt_data import Prompts
from .task import Task

Mode = Literal["2d", "3d", "tracking"]
EDITS = (
    "add", "divide", "fill_holes", "link", "merge", "remove", "replace", "split", "split_components", "split_line",
    "split_seeds", "swap", "unlink",
)
__all__ = ["AUTO", "COMMITTED", "CURRENT", "EDITS", "LAYERS", "AnnotationSession", "Mode", "check_label_image"]
_NO_TRACKS = {"1": []}


class AnnotationSession(ActionLog):
    """The annotation of one image.

    Args:
        image: The image, which decides the shape of all labels.
        mode: `2d`, `3d` (a volume) or `tracking` (a time series).
        journal: Where actions are written; None keeps them in memory only.

    Example:
        >>> from micro_sam.annotation.geometry import AnnotationImage
        >>> session = AnnotationSession(AnnotationImage.create(np.zeros((4, 6), "uint8"), mode="2d"), mode="2d")
        >>> _ = session.set_labels("current_object", np.eye(4, 6, dtype=int))
        >>> session.commit().ids
        {1: 1}
        >>> session.labels["committed_objects"].max(), session.labels["current_object"].max()
        (np.uint32(1), np.uint32(0))
        >>> _ = session.undo()
        >>> session.labels["committed_objects"].max(), session.labels["current_object"].max()
        (np.uint32(0), np.uint32(1))
    """

    def __init__(self, image: AnnotationImage, *, mode: Mode, journal: Journal | None = None):
        self.image, self.mode = image, mode
        committed = TrackEditor if mode == "tracking" else ObjectEditor
        # Pages of these arrays that nothing is written to take no memory.
        editors = {layer: LayerLabels(image.shape) for layer in (CURRENT, AUTO)}
        editors[COMMITTED] = committed(np.zeros(image.shape, np.uint32), in_place=True, index=ObjectIndex(), max_undo=0)
        super().__init__(editors, journal, has_tracks=mode == "tracking")
        self.model = self.embeddings = self.automatic = None

    # What is there

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The label images (Y, X) or (P, Y, X) by layer. They are written in place, and only by the session."""
        return {layer: editor.labels for layer, editor in self._editors.items()}

    @property
    def objects(self) -> ObjectEditor:
        """The committed objects, to ask about them; edit them with `edit`."""
        return self._editors[COMMITTED]

    @property
    def n_planes(self) -> int | None:
        """Number of slices or frames; None for an image."""
        return None if self.mode == "2d" else self.image.shape[0]

    @property
    def lineage(self) -> dict[int, list[int]]:
        """The tracks that are being annotated, with their daughters."""
        return {int(t): list(d) for t, d in self._state.get("lineage", _NO_TRACKS).items()}

    @property
    def track_id(self) -> int:
        """The track that new prompts belong to."""
        return self._state.get("track_id", 1)

    @property
    def correcting(self) -> int | None:
        """The committed object that is being corrected, which the next commit replaces."""
        return self._state.get("correcting")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that belong to the annotation and are kept with it."""
        return dict(self._state.get("settings", {}))

    def scores(self, layer: str = COMMITTED) -> dict[int, tuple[float, float]]:
        """Predicted IoU and stability of the objects that have them."""
        if layer == COMMITTED:
            found = {k.removeprefix("score/"): v for k, v in self._state.items() if k.startswith("score/")}
        else:
            found = self._state.get(f"scores/{layer}", {})
        ids = set(self._editors[layer].ids)
        return {int(i): tuple(s) for i, s in found.items() if int(i) in ids}

    def confidence(self, object_id: int | None = None) -> dict[int, tuple[float | None, float | None]]:
        """Predicted IoU and stability of the current object by plane, where the model gave it.

        Args:
            object_id: The object or track; None takes the one with the lowest confidence in each plane.
        """
        editor, found = self._editors[CURRENT], {}
        for i in editor.ids if object_id is None else {object_id} & set(editor.ids):
            scores = self._state.get("confidence", {}).get(str(i), {})
            for z in set(editor.planes(i)) & {int(z) for z in scores}:
                found.setdefault(z, []).append(tuple(scores[str(z)]))
        return {
            z: min(scores, key=lambda score: min([v for v in score if v is not None] or [1.0]))
            for z, scores in sorted(found.items())
        }

    # What users do

    def set_prompts(self, prompts: Prompts) -> None:
        """Take over all prompts as they are now."""
        if prompts != self.prompts:
            self._act("prompts", prompts=prompts)

    def select_track(self, track_id: int) -> None:
        """Choose the track that new prompts belong to."""
        if track_id not in self.lineage:
            raise InvalidInputError(f"There is no track {track_id}: choose one of {sorted(self.lineage)}.")
        if track_id != self.track_id:
            self._act("select track", state={"track_id": track_id})

    def set_settings(self, **settings: Any) -> None:
        """Keep settings with the annotation; they are not undone on their own."""
        self._state["settings"] = self.settings | settings
        self._write(lambda journal: journal.note({"settings": self._state["settings"]}))

    def set_labels(self, layer: str, labels: Any, *, parents: Mapping[int, int] | None = None) -> Delta:
        """Replace the content of a layer by other labels, for example those of another program, under their ids.

        Args:
            layer: The layer.
            labels: Labels of the shape of the image; they are copied.
            parents: For committed tracks the parent of each track that has one.

        Raises:
            InvalidInputError: For another shape or type, or ids that do not fit.
        """
        labels, editor = check_label_image(labels, self.image.shape), self._editors[layer]
        runs = drain(editor.compare_steps(labels), verbose=False)
        links = {t: (parents or {}).get(t, 0) for t in {*editor.ids, *runs.ids()} - {0}}
        delta = editor.take_over("load", runs, links if layer == COMMITTED else None)
        if not delta.is_empty:
            self._act("load", {"layer": layer}, {layer: delta}, state={f"scores/{layer}": None})
        return delta

    def paint(self, layer: str, strokes: Iterable[Stroke]) -> Delta:
        """Take over what a viewer has painted into a layer, see `LabelEditor.adopt_strokes`."""
        try:
            delta = self._editors[layer].adopt_strokes(strokes)
        except BaseException:
            self.events.labels.emit(layer, None)
            raise
        if not delta.is_empty:
            self._act("paint", {"layer": layer}, {layer: delta})
        return delta

    def commit(
        self,
        layer: str = CURRENT,
        preserve: str = "objects",
        threshold: float = 0.75,
        path: str | Path | None = None,
    ) -> Commit:
        """Add the objects of a layer to the committed ones, under new ids; see `ObjectEditor.commit`.

        The layer and (for the current object) the prompts are empty afterwards. While an object is being corrected,
        its new pixels replace the old ones, and it keeps its id.

        Args:
            layer: `current_object` or `auto_segmentation`.
            preserve: `objects`, `pixels` or `none`, see `ObjectEditor.commit`.
            threshold: Fraction of a committed object that protects it in the mode `objects`.
            path: A zarr folder to record the commit in, too; the commit is taken back if that fails.

        Raises:
            InvalidInputError: If there is nothing to commit, or all new objects are rejected.
        """
        source = self._editors[layer]
        if not source.ids:
            raise InvalidInputError(f"Nothing to commit: the layer '{layer}' is empty. Segment something first.")
        if layer == CURRENT and self.correcting is not None:
            return self._commit_correction(preserve, path)
        planes = [p for i in source.ids for p in source.planes(i)]
        first = None if self.mode == "2d" else min(planes)
        candidate = source.labels if first is None else source.labels[first:max(planes) + 1]
        links = {"parents": self._candidate_parents(layer)} if self.mode == "tracking" else {}
        commit = self.objects.commit(candidate, first, preserve=preserve, threshold=threshold, **links)
        if not commit.ids:
            raise InvalidInputError(
                "Nothing was committed: each new object covers too much of a committed one. Lower the preservation "
                "threshold, or choose the preserve mode 'pixels' or 'none'."
            )
        cleared = source.assign("clear", {})
        scores = self._moved_scores(layer, commit.ids)
        self._act(
            "commit",
            {"layer": layer, "preserve": preserve, "threshold": threshold, "ids": list(commit.ids.items()),
             "rejected": list(commit.rejected),
             "path": None if path is None else str(path)},
            {COMMITTED: commit.delta, layer: cleared},
            Prompts() if layer == CURRENT else None,
            {**scores, **self._fresh_tracks(layer)},
        )
        if path is not None:
            self._record_commit()
        return commit

    def start_correction(self, object_id: int) -> None:
        """Copy a committed object to the current object, to correct it with prompts; `commit` then replaces it."""
        masks = {z: crop_mask(self.objects.mask(object_id, None if self.mode == "2d" else z))
                 for z in self.objects.planes(object_id)}
        delta = self._editors[CURRENT].assign("correct", {self.track_id: masks})
        self._act("correct", {"id": object_id}, {CURRENT: delta}, Prompts(), {"correcting": int(object_id)})

    def clear(self, plane: int | None = None) -> None:
        """Remove all prompts and the current object, in all planes or in one."""
        planes = None if plane is None else [plane]
        delta = self._editors[CURRENT].assign("clear", {}, planes)
        prompts = Prompts() if plane is None else self.prompts.without_plane(plane)
        state = {} if plane is not None else self._fresh_tracks(CURRENT) | {f"scores/{CURRENT}": None}
        if not delta.is_empty or prompts != self.prompts or any(self._state.get(k) != v for k, v in state.items()):
            self._act("clear", {"plane": plane}, {CURRENT: delta}, prompts, state)

    def edit(self, operation: str, *args: Any, **kwargs: Any) -> Delta:
        """Edit committed objects with a method of `ObjectEditor` or `TrackEditor`: one of `EDITS`."""
        if operation not in EDITS or not hasattr(self.objects, operation):
            raise InvalidInputError(f"Objects cannot be edited by {operation!r}, but by: {', '.join(EDITS)}.")
        delta = getattr(self.objects, operation)(*args, **kwargs)
        if not delta.is_empty:
            self._act(operation, {"objects": list(delta.created + delta.removed + delta.changed)}, {COMMITTED: delta})
        return delta

    def save(self, path: str | Path, layer: str = COMMITTED) -> Path:
        """Write the labels of a layer to a file (tif, zarr), completely or not at all."""
        written = write_labels(path, self.labels[layer], scale=self.image.scale)
        self.note_saved(written, layer)
        return written

    def note_saved(self, path: str | Path, layer: str = COMMITTED) -> None:
        """Note that all work so far was written to a file, so that it is not offered for recovery."""
        self._write(lambda journal: journal.mark_saved({"path": str(path), "layer": layer}))

    def run(self, task: Task, verbose: bool = False) -> Any:
        """Do a task of this session here and now."""
        return task.run(verbose)

    # How results come in; used by the tasks in `session_tasks`.

    def show_objects(
        self,
        name: str,
        objects: Mapping[int, Mapping[int, BoxedMask]],
        *,
        planes: Sequence[int] | None = None,
        ids: Sequence[int] | None = None,
        scores: Mapping[int, tuple[float, float]] | None = None,
        state: Mapping[str, Any] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> Delta:
        """Replace the current object (in some planes, with some ids) by new masks, as one action."""
        delta = self._editors[CURRENT].assign(name, objects, planes, ids)
        known = {str(i): list(s) for i, s in (scores or {}).items()}
        self._act(name, args, {CURRENT: delta}, state={**(state or {}), f"scores/{CURRENT}": known})
        return delta

    def layer_editor(self, layer: str) -> LayerLabels:
        """The labels of the current object or the automatic segmentation."""
        return self._editors[layer]

    def take_over(self, name: str, layer: str, delta: Delta, args: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Note a change of a layer as an action."""
        self._act(name, args, {layer: delta}, state=state)

    def set_model(self, model: Any, embeddings: Any, automatic: Any, description: Mapping[str, Any]) -> None:
        """Use a model and its embeddings of the image."""
        self.model, self.embeddings, self.automatic = model, embeddings, automatic
        self._write(lambda journal: journal.note({"model": dict(description)}))
        self.events.model.emit()

    def note_scores(self, scores: Mapping[int, Sequence[float | None]]) -> None:
        """Keep scores of committed objects that the model was asked for; this is no action to be undone."""
        known = set(self.objects.ids)
        added = {f"score/{i}": list(s) for i, s in scores.items() if i in known}
        self._state.update(added)
        self._write(lambda journal: journal.note({"scores": added}))
        self.events.labels.emit(COMMITTED, None)

    def require_model(self) -> None:
        """Raise `NotInitializedError` unless there are a model and embeddings."""
        if self.model is None or self.embeddings is None:
            raise NotInitializedError("There are no embeddings yet. Choose a model and press 'Compute Embeddings'.")

    # Parts of the actions

    def _commit_correction(self, preserve: str, path: str | Path | None) -> Commit:
        object_id, source = self.correcting, self._editors[CURRENT]
        nothing = BoxedMask(0, 0, np.zeros((0, 0), dtype=bool), 0)
        masks = dict.fromkeys(self.objects.planes(object_id), nothing)
        for z in {p for i in source.ids for p in source.planes(i)}:
            plane = source.labels if self.mode == "2d" else source.labels[z]
            masks[z] = crop_mask(plane != 0)
        delta = self.objects.replace(object_id, masks, preserve="none" if preserve == "none" else "pixels")
        cleared = source.assign("clear", {})
        scores = self._moved_scores(CURRENT, dict.fromkeys(source.ids, object_id))
        self._act(
            "commit",
            {"layer": CURRENT, "corrected": object_id, "path": None if path is None else str(path)},
            {COMMITTED: delta, CURRENT: cleared},
            Prompts(),
            {**scores, **self._fresh_tracks(CURRENT)},
        )
        commit = Commit(delta, {1: object_id}, (), tuple(i for i in delta.changed if i != object_id))
        if path is not None:
            self._record_commit()
        return commit

    def _moved_scores(self, layer: str, ids: Mapping[int, int]) -> dict[str, Any]:
        found = self._state.get(f"scores/{layer}", {})
        # One key for each object: an entry of the journal holds the keys that changed.
        moved = {f"score/{new}": found[str(old)] for old, new in ids.items() if str(old) in found}
        return {**moved, f"scores/{layer}": None, **({"confidence": None} if layer == CURRENT else {})}

    def _candidate_parents(self, layer: str) -> dict[int, int]:
        if layer == AUTO:
            return {int(t): p for t, p in self._state.get("auto_parents", {}).items()}
        return {daughter: mother for mother, daughters in self.lineage.items() for daughter in daughters}

    def _fresh_tracks(self, layer: str) -> dict[str, Any]:
        if layer == AUTO:
            return {"auto_parents": None}
        return {"lineage": None, "track_id": None, "correcting": None}



def check_label_image(labels: Any, shape: Sequence[int]) -> np.ndarray:
    """Return labels as an array of integers of a shape, or raise `InvalidInputError`."""
    labels = np.asarray(labels)
    if labels.shape != tuple(shape):
        raise InvalidInputError(
            f"The labels must have the shape of the image, {tuple(shape)}, but have {labels.shape}."
        )
    if labels.dtype.kind not in "biu":
        raise InvalidInputError(f"Labels must be integers, but have the type {labels.dtype}. Convert them first.")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.uint32).max):
        raise InvalidInputError("Ids of objects must be from 0 (background) to 4294967295. Relabel the image first.")
    return labels
