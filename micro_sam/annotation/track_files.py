"""Committed tracks as files of other programs: folders of the Cell Tracking Challenge, and GEFF."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, MissingFileError
from ..core.output import smallest_dtype
from ..core.progress import Step, Steps
from ..tracking.ctc import check_ctc_folder, read_ctc, write_ctc_steps
from ..tracking.geff import read_geff, write_geff_steps
from ..tracking.lineage import TrackForest
from .session import COMMITTED, AnnotationSession, check_label_image
from .task import Task


def export_ctc(session: AnnotationSession, path: str | os.PathLike, *, overwrite: bool = False) -> Task[Path, Path]:
    """Write the committed tracks to a folder of the Cell Tracking Challenge; see `tracking.ctc.write_ctc`."""
    return _export(session, "CTC", write_ctc_steps, check_ctc_folder(path, overwrite), overwrite)


def export_geff(session: AnnotationSession, path: str | os.PathLike, *, overwrite: bool = False) -> Task[Path, Path]:
    """Write the committed tracks to a zarr folder with a GEFF graph; see `tracking.geff.write_geff`."""
    return _export(session, "GEFF", write_geff_steps, Path(path), overwrite)


def import_tracks(session: AnnotationSession, path: str | os.PathLike) -> Task[Any, TrackForest]:
    """Read a tracking result of another program, CTC or GEFF, and put it in the place of the committed tracks.

    Args:
        session: The session, in the mode `tracking`.
        path: A folder of the Cell Tracking Challenge, or a zarr folder with a GEFF graph.

    Returns:
        A task whose `apply` gives the tracks.

    Raises:
        MissingFileError: If the folder holds neither.
    """
    path = Path(path).expanduser()
    editor = session.objects
    is_ctc = any((path / name).is_file() for name in ("man_track.txt", "res_track.txt"))
    if not is_ctc and not (path / "nodes").is_dir() and not any(path.glob("*.geff")):
        raise MissingFileError(
            f"{path} holds no tracks. Choose a folder with man_track.txt or res_track.txt (CTC), or one with a graph "
            "*.geff (GEFF)."
        )

    def steps() -> Steps[Any]:
        yield Step(0, 1, "Read tracks")
        labels, forest = read_ctc(path) if is_ctc else read_geff(path)
        if labels is None:
            raise InvalidInputError(f"{path} has a graph, but no label images: there are no masks to correct.")
        labels = check_label_image(labels, session.image.shape)
        yield Step(1, 1, "Read tracks")
        return (yield from editor.compare_steps(labels)), forest

    def apply(found) -> TrackForest:
        runs, forest = found
        links = dict.fromkeys(editor.ids, 0) | {t.id: t.parent for t in forest.values()}
        delta = editor.take_over("load", runs, links)
        if not delta.is_empty:
            scores = dict.fromkeys((f"score/{i}" for i in session.scores()), None)
            session.take_over("load", COMMITTED, delta, {"path": str(path)}, scores)
        return forest

    return Task("Import tracks", steps, apply, uses_model=False)


def _export(
    session: AnnotationSession, name: str, write: Callable[..., Steps[Path]], path: Path, overwrite: bool
) -> Task[Path, Path]:
    forest = TrackForest(session.objects.tracks.values())
    if not forest:
        raise InvalidInputError("There are no committed tracks to export. Commit some first.")
    # A copy, since the user may go on with editing while the files are written.
    labels = session.labels[COMMITTED].astype(smallest_dtype(np.array(max(forest))))

    def apply(written: Path) -> Path:
        session._write(lambda journal: journal.mark_saved({"path": str(written), "layer": COMMITTED}))
        return written

    return Task(f"Export {name}", lambda: write(path, labels, forest, overwrite), apply, uses_model=False)
