"""Commits of a session in a record on disk: which prompts made which object, and what an undo takes out again."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..editing.history import Delta
from ..editing.objects import Commit
from .commit_record import revert_commit, write_commit
from .prompt_data import Prompts

if TYPE_CHECKING:
    from .session import AnnotationSession


def record_commit(
    session: "AnnotationSession", path: str | Path, layer: str, commit: Commit, prompts: Prompts, settings: Mapping
) -> None:
    """Write a commit that the session has just carried out; see `commit_record.write_commit` for errors."""
    write_commit(
        path, shape=session.image.shape, labels=session.objects.labels, box=commit.delta.box,
        object_ids=commit.ids.values(), layer=layer, settings=settings,
        prompts_by_object=prompts_by_object(session.mode, commit.ids, prompts), attributes=_attributes(session),
        lineages=_lineages(session), corrects=not commit.delta.created and bool(commit.delta.changed),
    )


def take_out(session: "AnnotationSession", path: str | Path, delta: Delta) -> None:
    """Take a commit out of the record, because it was undone."""
    revert_commit(
        path, labels=session.objects.labels, box=delta.box, object_ids=delta.created, lineages=_lineages(session)
    )


def prompts_by_object(mode: str, ids: Mapping[int, int], prompts: Prompts) -> dict[int, Prompts]:
    """Which prompts made which committed object, from the ids of the candidates.

    Candidates of one image are numbered in the order of `Prompts.split`; those of a time series are tracks.
    """
    if prompts.is_empty:
        return {}
    if mode == "tracking":
        found = {new: prompts.of_track(old) for old, new in ids.items()}
    elif len(ids) == 1:
        found = {new: prompts for new in ids.values()}
    else:
        parts = dict(enumerate(prompts.split(), 1))
        found = {new: parts[old] for old, new in ids.items() if old in parts}
    return {i: p for i, p in found.items() if not p.is_empty}


def _attributes(session: "AnnotationSession") -> dict[str, Any]:
    known = {} if session.embeddings is None else session.embeddings.describe()
    names = ("tile_shape", "halo", "model_type", "model_name", "model_hash")
    return {
        "data_signature": session.image.signature(), "micro_sam_version": __version__,
        **{name: known.get(name) for name in names},
    }


def _lineages(session: "AnnotationSession") -> list[dict[int, list[int]]] | None:
    """All committed lineages, one for each tree."""
    if session.mode != "tracking":
        return None
    from ..tracking.lineage import TrackForest
    return TrackForest(session.objects.tracks.values()).lineages()
