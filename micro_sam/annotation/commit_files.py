"""Commits of a session in a record on disk: which prompts made which object, and what an undo takes out again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .action_log import COMMITTED
from .commit_record import revert_commit, write_commit
from .journal import Entry
from .prompt_data import Prompts

if TYPE_CHECKING:
    from .session import AnnotationSession


def record_commit(session: "AnnotationSession", entry: Entry, settings: Mapping[str, Any]) -> None:
    """Write a commit that the session has just carried out; see `commit_record.write_commit` for errors."""
    args, delta = entry.args, entry.deltas[COMMITTED]
    prompts = entry.prompts[0] if entry.prompts else Prompts()
    write_commit(
        args["path"], shape=session.image.shape, labels=session.objects.labels, box=delta.box,
        object_ids=_ids(entry).values(), layer=args["layer"], settings=settings,
        prompts_by_object=prompts_by_object(
            session.mode, _ids(entry), prompts, len(_ids(entry)) + len(args.get("rejected", ()))
        ), attributes=_attributes(session),
        lineages=_lineages(session), corrects="corrected" in args,
    )


def take_out(session: "AnnotationSession", entry: Entry) -> None:
    """Take a commit out of the record, because it was undone."""
    revert_commit(
        entry.args["path"], labels=session.objects.labels, box=entry.deltas[COMMITTED].box,
        object_ids=_ids(entry).values(), lineages=_lineages(session),
    )


def _ids(entry: Entry) -> dict[int, int]:
    """The committed id of each candidate."""
    if "corrected" in entry.args:
        return {1: entry.args["corrected"]}
    return {int(old): int(new) for old, new in entry.args["ids"]}


def prompts_by_object(
    mode: str, ids: Mapping[int, int], prompts: Prompts, n_candidates: int
) -> dict[int, Prompts]:
    """Which prompts made which committed object, from the ids of the candidates.

    Candidates of one image are numbered in the order of `Prompts.split`; those of a time series are tracks.
    """
    if prompts.is_empty:
        return {}
    if mode == "tracking":
        found = {new: prompts.of_track(old) for old, new in ids.items()}
    elif n_candidates == 1:
        found = dict.fromkeys(ids.values(), prompts)
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
