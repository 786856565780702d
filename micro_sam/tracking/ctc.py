"""Tracks as files of the Cell Tracking Challenge: one label image per frame and a table of tracks.

`man_track.txt` has a line `id first last parent` per track (parent 0 for none), separated by spaces, without header;
`man_track0000.tif` and so on are the frames. See Maska et al. 2023, Nature Methods, doi:10.1038/s41592-023-01879-y.
"""

import os
import re
from pathlib import Path

import numpy as np
import tifffile

from ..core.errors import ImageReadError, InvalidInputError, MissingFileError, OutputExistsError
from ..core.output import temporary_path
from ..core.progress import Step, Steps, drain
from .lineage import Lineages, Track, TrackForest, as_forest
from .objects import check_series, read_frame

# How the tracks were made, for those who write them.
RECORD_NAME = "man_track.json"
_TABLES = {"man_track.txt": "man_track", "res_track.txt": "mask"}


def check_ctc_folder(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Check that tracks may be written to a folder, before any work is done.

    Raises:
        OutputExistsError: If there is a file of that name, or a folder that is not empty: always if it holds other
            files than tracks, else without `overwrite`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return path
    if not path.is_dir():
        raise OutputExistsError(f"{path} is a file, but tracks are written to a folder. Choose another output.")
    other = sorted(f.name for f in path.iterdir() if not re.fullmatch(r"man_track(\d+\.tif|\.txt|\.json)", f.name))
    if other:
        raise OutputExistsError(
            f"{path} holds other files than tracks, such as {other[0]}, and is not replaced. Choose another output."
        )
    if not overwrite and any(path.iterdir()):
        raise OutputExistsError(
            f"{path} holds tracks already. Pass overwrite to replace them, or choose another output."
        )
    return path


def write_ctc(
    path: str | os.PathLike, tracks: np.ndarray, lineages: Lineages | TrackForest, overwrite: bool = False
) -> Path:
    """Write tracks to a folder, completely or not at all.

    Tracks with gaps are written as they are; the rules of the challenge allow none, and its tools refuse them.

    Args:
        path: The folder, which is created.
        tracks: Label images (T, Y, X) with the ids of the tracks, may be lazy.
        lineages: The lineages, as the tracking functions return them, or the tracks.
        overwrite: Whether to replace tracks in that folder.

    Returns:
        The folder.

    Raises:
        OutputExistsError: See `check_ctc_folder`.
        OutputWriteError: If it cannot be written; then nothing of it is left.
        InvalidInputError: If an object has no track, or ids are too large.
    """
    return drain(write_ctc_steps(path, tracks, lineages, overwrite), verbose=False)


def write_ctc_steps(
    path: str | os.PathLike, tracks: np.ndarray, lineages: Lineages | TrackForest, overwrite: bool = False
) -> Steps[Path]:
    """Generator behind `write_ctc`: yields `Step`, returns the folder."""
    path = check_ctc_folder(path, overwrite)
    check_series(tracks)
    forest = as_forest(lineages, tracks)
    highest = max(forest, default=0)
    dtype = np.dtype(np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32)
    if highest > np.iinfo(np.uint32).max:
        raise InvalidInputError(f"The largest id that fits into these files is {2**32 - 1}, but there is {highest}.")
    ids = np.array([0, *forest])
    with temporary_path(path, is_folder=True) as new:
        new.mkdir()
        np.savetxt(new / "man_track.txt", forest.table(), fmt="%d")
        for t in range(tracks.shape[0]):
            yield Step(t, tracks.shape[0], "Write tracks")
            frame = read_frame(tracks, t)
            _check_ids(frame, ids, f"frame {t}")
            tifffile.imwrite(
                new / f"man_track{t:04}.tif", frame.astype(dtype), compression="zlib", photometric="minisblack",
                metadata=None,
            )
    yield Step(tracks.shape[0], tracks.shape[0], "Write tracks")
    return path


def _check_ids(frame: np.ndarray, ids: np.ndarray, name: str) -> None:
    unknown = np.setdiff1d(frame, ids)
    if len(unknown):
        raise InvalidInputError(f"There are objects without track in {name}, for example {unknown[0]}.")


def read_ctc(path: str | os.PathLike) -> tuple[np.ndarray, TrackForest]:
    """Read tracks from a folder with `man_track.txt` and `man_track*.tif`, or `res_track.txt` and `mask*.tif`.

    Returns:
        Label images (T, Y, X) with the ids of the tracks, in the dtype of the files; and the tracks.

    Raises:
        MissingFileError: If table or images are missing.
        ImageReadError: If table or images cannot be read.
        InvalidInputError: If frames are missing, the table is no forest, or an object is not in the table.
    """
    path = Path(path).expanduser()
    table = next((path / name for name in _TABLES if (path / name).is_file()), None)
    if table is None:
        raise MissingFileError(f"There is no table of tracks in {path}: expected {' or '.join(_TABLES)}.")
    pattern = re.compile(rf"{_TABLES[table.name]}(\d+)\.tiff?")
    files = {int(m[1]): f for f in path.iterdir() if (m := pattern.fullmatch(f.name))}
    if not files:
        raise MissingFileError(f"There are no frames in {path}: expected {_TABLES[table.name]}0000.tif and so on.")
    missing = sorted(set(range(max(files) + 1)) - set(files))
    if missing:
        raise InvalidInputError(f"Frame {missing[0]} is missing in {path}; the last one is {max(files)}.")
    forest = _read_table(table)
    ids, frames = np.array([0, *forest]), []
    for t in range(len(files)):
        frame = _read_frame(files[t])
        if frames and (frame.shape, frame.dtype) != (frames[0].shape, frames[0].dtype):
            raise ImageReadError(
                f"{files[t]} has shape {frame.shape} and dtype {frame.dtype}, but the first frame has "
                f"{frames[0].shape} and {frames[0].dtype}."
            )
        _check_ids(frame, ids, files[t].name)
        frames.append(frame)
    return np.stack(frames), forest


def _read_frame(path: Path) -> np.ndarray:
    try:
        return tifffile.imread(path)
    except Exception as error:  # decoders raise errors of many kinds
        raise ImageReadError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


def _read_table(path: Path) -> TrackForest:
    try:
        rows = [[int(value) for value in line.split()] for line in path.read_text().splitlines() if line.strip()]
        tracks = [Track(track_id, first, last, parent) for track_id, first, last, parent in rows]
    except ValueError as error:
        raise ImageReadError(
            f"{path} is no table of tracks with the columns id, first frame, last frame and parent: {error}."
        ) from error
    return TrackForest(tracks)
