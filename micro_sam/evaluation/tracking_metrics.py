"""Scores of tracks against their ground truth, those of the Cell Tracking Challenge and of single links."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from ..tracking.ctc import read_ctc
from ..tracking.lineage import Lineages, Track, TrackForest, forest_from_lineages, track_extents
from ..tracking.objects import FrameObjects, check_series, find_objects, find_overlaps, read_frame
from .errors import UnfitInputsError

_CTC_SCORES = ("TRA", "DET", "LNK", "SEG", "CT", "TF", "BC(0)", "BC(1)")
_EDGE_SCORES = ("Edge Precision", "Edge Recall", "Edge F1")
# An object is found if more than this part of it is covered by one object of the result.
_COVERED = 0.5


def tracking_scores(
    tracks: np.ndarray | str | os.PathLike,
    truth: np.ndarray | str | os.PathLike,
    lineages: Lineages | TrackForest | None = None,
    truth_lineages: Lineages | TrackForest | None = None,
) -> dict[str, float]:
    """Score tracks by the measures of the Cell Tracking Challenge (py-ctcmetrics) and by their links.

    An object of the truth is found by the object of the result that covers more than half of it. A track that is
    missing in some frames is cut there, into a parent and a child, which is the rule of the challenge. Frames and
    ids are taken from the label images; lineages add who descends from whom.

    Args:
        tracks: The result: label images (T, Y, X) whose ids are those of the tracks, or a folder with files of the
            challenge (`res_track.txt` or `man_track.txt`).
        truth: The ground truth, likewise.
        lineages: The lineages of the result, as the tracking functions return them, if label images are given. None
            means no divisions.
        truth_lineages: The same for the truth.

    Returns:
        `TRA` (tracking), `DET` (detection), `LNK` (linking), `SEG` (mean IoU of the objects; those not found count as
        0), `CT` (complete tracks), `TF` (track fractions), `BC(0)` and `BC(1)` (F1 of divisions that are right within
        0 and 1 frames); `Edge Precision`, `Edge Recall` and `Edge F1` of the links between objects. All are in 0...1,
        1 is best. `BC` is NaN if the truth has no divisions, `LNK` and the edge scores if it has no links.

    Raises:
        UnfitInputsError: If the shapes differ, or lineages are given together with a folder.
        InvalidInputError: If there are less than two frames, or lineages do not fit to the label images.
        MissingFileError, ImageReadError: If a folder cannot be read.

    References:
        Matula et al. 2015, doi:10.1371/journal.pone.0144959 (TRA, DET, LNK); Ulman et al. 2017,
        doi:10.1038/nmeth.4473 (SEG, CT, TF, BC); Maska et al. 2023, doi:10.1038/s41592-023-01879-y.
    """
    tracks, lineages = _open(tracks, lineages, "lineages")
    truth, truth_lineages = _open(truth, truth_lineages, "truth_lineages")
    if tuple(tracks.shape) != tuple(truth.shape):
        raise UnfitInputsError(
            f"Result and truth must have the same shape (T, Y, X), but have {tuple(tracks.shape)} and "
            f"{tuple(truth.shape)}."
        )
    if len(truth) < 2:
        raise InvalidInputError(f"Tracking needs at least two frames, but there are {len(truth)}.")
    objects = [[find_objects(read_frame(series, t)) for t in range(len(series))] for series in (truth, tracks)]
    graphs = [_Graph(found, chosen) for found, chosen in zip(objects, (truth_lineages, lineages))]
    n_found = [sum(len(frame) for frame in found) for found in objects]
    if 0 in n_found:
        return dict.fromkeys((*_CTC_SCORES, *_EDGE_SCORES), float(n_found[0] == n_found[1]))
    return _scores(*graphs, _match(truth, tracks, *objects))


def _open(tracks: Any, lineages: Any, name: str) -> tuple[np.ndarray, Lineages | TrackForest]:
    if isinstance(tracks, str | os.PathLike):
        if lineages is not None:
            raise UnfitInputsError(f"{Path(tracks)} holds lineages already. Leave out {name}.")
        return read_ctc(tracks)
    check_series(tracks)
    return tracks, [] if lineages is None else lineages


class _Graph:
    """Tracks without gaps: their table (id, first, last, parent), and of each frame the track of each object."""

    def __init__(self, objects: Sequence[FrameObjects], lineages: Lineages | TrackForest):
        lineages = lineages.lineages() if isinstance(lineages, TrackForest) else lineages
        forest = forest_from_lineages(lineages, track_extents(objects))
        frames: dict[int, list[int]] = {i: [] for i in forest}
        for t, frame in enumerate(objects):
            for label in frame.labels.tolist():
                frames[label].append(t)
        pieces: list[Track] = []
        self.tracks: list[dict[int, int]] = [{} for _ in objects]
        last_piece: dict[int, int] = {}
        for track in sorted(forest.values(), key=lambda track: track.first):  # parents come before their children
            parent = last_piece.get(track.parent, 0)
            present = np.array(frames[track.id])
            for part in np.split(present, np.flatnonzero(np.diff(present) > 1) + 1):
                pieces.append(Track(len(pieces) + 1, int(part[0]), int(part[-1]), parent))
                parent = len(pieces)
                for t in part.tolist():
                    self.tracks[t][track.id] = parent
            last_piece[track.id] = parent
        self.table = TrackForest(pieces).table()

    @property
    def labels(self) -> list[list[int]]:
        """The tracks of each frame, in the order of the labels."""
        return [list(frame.values()) for frame in self.tracks]

    @property
    def n_edges(self) -> int:
        """Links between the objects of consecutive frames, and from parents to children."""
        return int((self.table[:, 2] - self.table[:, 1]).sum() + np.count_nonzero(self.table[:, 3]))


def _match(truth, tracks, truth_objects, objects) -> list[tuple[list[int], list[int], list[float]]]:
    """Of each frame the labels of the objects that were found, those of the objects that found them, and their IoU."""
    matches = []
    for t, (expected, found) in enumerate(zip(truth_objects, objects)):
        i, j, common = find_overlaps(read_frame(truth, t), read_frame(tracks, t), expected, found)
        is_found = common > _COVERED * expected.areas[i]
        i, j, common = i[is_found], j[is_found], common[is_found]
        iou = common / (expected.areas[i] + found.areas[j] - common)
        matches.append((expected.labels[i].tolist(), found.labels[j].tolist(), iou.tolist()))
    return matches


def _scores(truth: _Graph, result: _Graph, matches: list[tuple[list[int], list[int], list[float]]]) -> dict[str, float]:
    from ctc_metrics.scripts.evaluate import calculate_metrics

    matched = {
        "labels_ref": truth.labels, "labels_comp": result.labels,
        "mapped_ref": [[truth.tracks[t][i] for i in ids] for t, (ids, _, _) in enumerate(matches)],
        "mapped_comp": [[result.tracks[t][i] for i in ids] for t, (_, ids, _) in enumerate(matches)],
        "ious": [iou for _, _, iou in matches],
    }
    wanted = ["TRA", "DET", "SEG", "CT", "TF", "BC"]
    if truth.n_edges:
        wanted.append("LNK")
    values = calculate_metrics(result.table, truth.table, matched, matched, wanted, is_valid=True)
    right = truth.n_edges - values["AOGM_EA"]
    if truth.n_edges:
        values |= {
            "Edge Precision": right / result.n_edges if result.n_edges else 0.0, "Edge Recall": right / truth.n_edges,
            "Edge F1": 2 * right / (truth.n_edges + result.n_edges),
        }
    return {
        name: float(np.nan if values.get(name) is None else values[name]) for name in (*_CTC_SCORES, *_EDGE_SCORES)
    }
