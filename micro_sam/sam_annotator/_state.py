"""`AnnotatorState`, under which scripts find what an annotator knows: a view of the session of the active annotator.

Data of an annotator are in its session and nowhere else. Only what a script makes while no annotator is open, as in a
notebook without a viewer, is kept here: such scripts call `AnnotatorState()` again and again and expect the same state.
No Qt is loaded here; without it there can be no annotator.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..annotation import tasks
from ..annotation.geometry import AnnotationImage
from ..annotation.session import CURRENT, AnnotationSession
from ..annotation.task import Task
from ..core.errors import EmbeddingCacheError, InvalidInputError, NotInitializedError
from ..core.progress import drain
from ..embeddings.signature import compute_legacy_data_signature
from ..models import registry
from ..segmentation.amg import AMGBase
from ..segmentation.factory import get_segmentation_mode
from ..segmentation.workflow import LoadedModel, load_model

_MODES = {2: "2d", 3: "3d"}
_PANELS = {
    "embeddings": "embedding_panel", "prompts": "prompt_panel", "segment": "segment_panel",
    "autosegment": "auto_panel", "commit": "commit_panel", "clear": "clear_panel",
}
_INTERACTIVE = ("image_embeddings", "predictor", "image_shape")
_TRACKING = ("current_track_id", "lineage", "committed_lineages")


class AnnotatorState:
    """What the active annotator knows. It is looked up at each access, so that one instance may be kept.

    Attributes can be set freely while no annotator is open; otherwise only `current_track_id` can.

    Attributes:
        predictor: The predictor; None before embeddings are computed.
        decoder: The decoder for automatic segmentation; None if there is none, or if it is not to be used.
        image_embeddings: The embeddings; None until those of all planes are there.
        image_shape: Shape (Y, X), (Z, Y, X) or (T, Y, X) of the image.
        image_scale: Size of a voxel per axis.
        image_name: Name of the image.
        embedding_path: The folder of the embeddings; None if they are in memory.
        data_signature: SHA-1 of the image, which is read for it.
        amg: Segmenter with what it computed for the image; None before that, and for volumes and time series.
        amg_state: For volumes and time series what automatic segmentation has computed, by plane.
        current_track_id: The track that new prompts belong to; None unless tracks are annotated. Likewise:
        lineage: The tracks that are being annotated, with their daughters.
        committed_lineages: The same of the committed tracks, for each ancestor.
        z_range: First and last plane of the current object; None if there is none.
        widgets: The panels.
        annotator: The active annotator.

    Example:
        >>> AnnotatorState().initialized_for_interactive_segmentation()
        False
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"AnnotatorState has no attribute {name!r}, but: {', '.join(_ATTRIBUTES)}.")
        annotator = _active()
        if annotator is not None and name in _OF_ANNOTATOR:
            return _OF_ANNOTATOR[name](annotator)
        if annotator is None and name in _ALONE.values:
            return _ALONE.values[name]
        session = _ALONE.session if annotator is None else annotator.session
        known = _OF_MODEL if annotator is None else _OF_SESSION
        return known[name](session) if session is not None and name in known else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"AnnotatorState has no attribute {name!r}, but: {', '.join(_ATTRIBUTES)}.")
        annotator = _active()
        if annotator is None:
            _ALONE.values[name] = value
        elif name == "current_track_id" and annotator.session is not None:
            annotator.session.select_track(int(value))
        else:
            raise AttributeError(f"{name!r} belongs to the annotator that is open, and cannot be set from outside.")

    def initialize_predictor(
        self,
        image_data: Any,
        model_type: str,
        ndim: int,
        save_path: str | os.PathLike | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        predictor: Any = None,
        decoder: torch.nn.Module | None = None,
        checkpoint_path: str | os.PathLike | None = None,
        decoder_path: str | os.PathLike | None = None,
        tile_shape: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        precompute_amg_state: bool = False,
        prefer_decoder: bool = True,
        pbar_init: Callable[[int, str], None] | None = None,
        pbar_update: Callable[[int], None] | None = None,
        skip_load: bool = True,
        use_cli: bool = False,
    ) -> None:
        """Load a model and compute the embeddings of an image, for the annotator that is open if there is one.

        Args:
            image_data: The image (Y, X[, C]) or volume (Z, Y, X[, C]); that of the annotator if one is open.
            model_type: Name of the model.
            ndim: 2 or 3.
            save_path: Zarr folder of the embeddings; None keeps them in memory. Or embeddings that are ready.
            device: Compute device; None chooses it.
            predictor: The predictor; None loads it.
            decoder: The decoder that belongs to the given predictor.
            checkpoint_path: Weights; None uses the published ones.
            decoder_path: Weights of the decoder alone.
            tile_shape: Tile (y, x) for large images.
            halo: Overlap (y, x) of the tiles.
            precompute_amg_state: Whether to prepare automatic segmentation; it is kept beside the embeddings.
            prefer_decoder: Whether to segment automatically with the decoder, if there is one.
            pbar_init: Called as `pbar_init(total, description)` when a phase starts.
            pbar_update: Called as `pbar_update(n)` when `n` more units are done.
            skip_load: For older scripts; what was prepared before is always read when it is needed, plane by plane.
            use_cli: For older scripts; nothing is ever asked.

        Raises:
            InvalidInputError: If `ndim` is not 2 or 3, or the image is not that of the annotator.
            EmbeddingCacheError: If automatic segmentation is to be prepared without a folder.
        """
        if ndim not in _MODES:
            raise InvalidInputError(f"ndim must be 2 or 3, but is {ndim!r}. Channels do not count.")
        is_ready = isinstance(save_path, Mapping)
        if precompute_amg_state and (save_path is None or is_ready):
            raise EmbeddingCacheError("What is prepared for automatic segmentation needs a folder: pass save_path.")
        annotator = _active()
        session = _session_for(image_data, ndim)
        if annotator is not None:
            annotator.runner.cancel_all()
        mode = "auto" if prefer_decoder and _may_use_decoder(model_type) else "amg"
        task = tasks.open_model(
            session, model_type, checkpoint=None if checkpoint_path is None else str(checkpoint_path),
            device=None if device is None else str(device), mode=mode,
            save_path=None if save_path is None or is_ready else str(save_path), tile_shape=tile_shape, halo=halo,
            load=None if predictor is None else _loader(predictor, decoder),
            embeddings=save_path if is_ready else None, decoder_path=decoder_path,
            prepare_automatic=precompute_amg_state,
        )
        _run(task, pbar_init, pbar_update)
        _run(tasks.embed_rest(session), pbar_init, pbar_update)
        if annotator is None:
            _ALONE.session = session
            for name in _OF_MODEL:
                _ALONE.values.pop(name, None)

    def initialized_for_interactive_segmentation(self) -> bool:
        """Whether objects can be segmented from prompts.

        Raises:
            NotInitializedError: If only a part of what it takes is there.
        """
        return self._is_complete(_INTERACTIVE, "interactive segmentation")

    def initialized_for_tracking(self) -> bool:
        """Whether tracks can be annotated.

        Raises:
            NotInitializedError: If only a part of what it takes is there.
        """
        widgets = {"widgets['tracking']": (self.widgets or {}).get("tracking")}
        return self._is_complete(_TRACKING, "tracking", widgets)

    def reset_state(self) -> None:
        """Forget model and embeddings. The annotation of an annotator that is open stays as it is."""
        annotator = _active()
        if annotator is None:
            widgets = _ALONE.values.get("widgets")
            _ALONE.clear()
            if widgets is not None:
                _ALONE.values["widgets"] = widgets
            return
        annotator.runner.cancel_all()
        if annotator.session is not None and annotator.session.model is not None:
            annotator.session.set_model(None, None, None, {})

    def get_image_name(self, viewer: Any) -> str:
        """Return the name of the image, or that of the first image layer of a viewer.

        Raises:
            NotInitializedError: If there is no image.
        """
        if self.image_name is not None:
            return self.image_name
        for layer in viewer.layers:
            if type(layer).__name__ == "Image":
                return layer.name
        raise NotInitializedError("There is no image in the viewer. Open one first.")

    def _is_complete(self, names: Sequence[str], purpose: str, more: Mapping[str, Any] | None = None) -> bool:
        values = {name: getattr(self, name) for name in names} | dict(more or {})
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise NotInitializedError(
                f"The state is not complete for {purpose}: {', '.join(missing)} missing. Use initialize_predictor, or "
                "reset_state to begin anew."
            )
        return not missing


class _Alone:
    """What there is without an annotator: a session that is written to no journal, and what a script has set."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.session: AnnotationSession | None = None
        self.values: dict[str, Any] = {}


_ALONE = _Alone()


def _active() -> Any:
    """The active annotator. There is none where its module was not imported, and it shall not be because of this."""
    module = sys.modules.get(f"{__package__}.annotator")
    return None if module is None else module.active_annotator()


def _session_for(image_data: Any, ndim: int) -> AnnotationSession:
    """The session of the active annotator, if that is its image; a new one without an annotator."""
    annotator, mode = _active(), _MODES[ndim]
    if annotator is None:
        image = image_data if isinstance(image_data, AnnotationImage) else AnnotationImage.create(image_data, mode=mode)
        return AnnotationSession(image, mode=mode)
    session = annotator.session
    if session is None:
        raise NotInitializedError("The annotator that is open has no image yet. Choose one in it, or close it.")
    shape = AnnotationImage.create(image_data, mode=session.mode).shape
    if ndim != session.image.ndim or shape != session.image.shape:
        raise InvalidInputError(
            f"The annotator that is open shows an image of shape {session.image.shape}, but the one that was given has "
            f"{shape} and ndim={ndim}. Choose it in the annotator, or close it."
        )
    return session


def _run(task: Task, pbar_init: Callable | None, pbar_update: Callable | None) -> None:
    task.apply(drain(task.steps(), pbar_init=pbar_init, pbar_update=pbar_update))


def _loader(predictor: Any, decoder: torch.nn.Module | None) -> Callable[..., LoadedModel]:
    """Gives a predictor that is there, where a model would be loaded."""
    def load(name: str | None, checkpoint: Any, device: Any, mode: str | None, **options: Any) -> LoadedModel:
        if options.get("decoder_path") is not None:
            loaded = load_model(name, checkpoint, device, mode, **options)
            return LoadedModel(predictor, loaded.decoder, loaded.mode)
        return LoadedModel(predictor, decoder, get_segmentation_mode(mode, decoder is not None))

    return load


def _may_use_decoder(model_type: str) -> bool:
    """Some published decoders are for other objects than those that are annotated."""
    spec = {spec.name: spec for spec in registry.MODELS}.get(model_type)
    return spec is None or spec.decoder_in_gui


# What a session says of each attribute


def _embeddings(session: AnnotationSession) -> Any:
    source = session.embeddings
    if source is None or not source.complete:
        return None
    return drain(source.plane_steps(None if session.n_planes is None else 0), verbose=False)[0]


def _decoder(session: AnnotationSession) -> Any:
    return None if session.model is None or session.model.mode == "amg" else session.model.decoder


def _segmenter(session: AnnotationSession) -> Any:
    if session.n_planes is not None:
        return None
    state = _plane_states(session).get(None)
    if state is None or isinstance(state, AMGBase):
        return state
    segmenter = session.model.segmenter(bool(session.embeddings.tiling))
    # Only the segmenter that prompts the model looks at the embeddings.
    segmenter.set_state({**state, "image_embeddings": _embeddings(session), "i": None}
                        if session.model.mode == "apg" else state)
    return segmenter


def _plane_states(session: AnnotationSession) -> dict[int | None, Any]:
    if session.automatic is None:
        return {}
    return {key[-1]: state for key, (state, _) in session.automatic._states.items()}


def _lineage(session: AnnotationSession) -> dict[int, list[int]] | None:
    return session.lineage if session.mode == "tracking" else None


def _committed_lineages(session: AnnotationSession) -> list[dict[int, list[int]]] | None:
    if session.mode != "tracking":
        return None
    parents, lineages = session.objects.parents, {}
    for track in session.objects.ids:
        root = track
        while root in parents:
            root = parents[root]
        lineages.setdefault(root, {})[track] = session.objects.children(track)
    return list(lineages.values())


def _z_range(session: AnnotationSession) -> tuple[int, int] | None:
    editor = session.layer_editor(CURRENT)
    planes = [plane for i in editor.ids for plane in editor.planes(i)] if session.n_planes is not None else []
    return (min(planes), max(planes)) if planes else None


def _widgets(annotator: Any) -> dict[str, Any]:
    names = dict(_PANELS)
    if annotator.mode != "2d":
        names["segment_nd"] = "segment_panel"
    if annotator.mode == "tracking":
        names["tracking"] = "prompt_panel"
    return {name: getattr(annotator, panel) for name, panel in names.items()}


_OF_MODEL: dict[str, Callable[[AnnotationSession], Any]] = {
    "predictor": lambda session: None if session.model is None else session.model.predictor,
    "decoder": _decoder,
    "image_embeddings": _embeddings,
    "image_shape": lambda session: session.image.shape,
    "image_scale": lambda session: session.image.transform.scale,
    "embedding_path": lambda session: (
        None if session.embeddings is None or session.embeddings.path is None else str(session.embeddings.path)
    ),
    "data_signature": lambda session: compute_legacy_data_signature(session.image.array),
    "amg": _segmenter,
    "amg_state": lambda session: None if session.n_planes is None else _plane_states(session),
}
_OF_SESSION: dict[str, Callable[[AnnotationSession], Any]] = {
    **_OF_MODEL,
    "image_name": lambda session: session.image.name,
    "current_track_id": lambda session: session.track_id if session.mode == "tracking" else None,
    "lineage": _lineage,
    "committed_lineages": _committed_lineages,
    "z_range": _z_range,
}
_OF_ANNOTATOR: dict[str, Callable[[Any], Any]] = {"annotator": lambda annotator: annotator, "widgets": _widgets}
_ATTRIBUTES = (*_OF_SESSION, *_OF_ANNOTATOR)
