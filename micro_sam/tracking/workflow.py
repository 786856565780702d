"""Tracking from label images, or from images: segment each frame, link, close gaps, filter, write."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from ..core.errors import require_positive_int
from ..core.progress import Step, Steps, drain
from ..embeddings.features import ImageEmbeddings
from ..segmentation.workflow import Segmenter
from ..volume.automatic import slices_steps
from .ctc import check_ctc_folder, write_ctc_steps
from .gaps import fill_gaps, gap_links
from .lineage import Lineages, TrackForest, forest_from_links
from .linking import DEFAULT_TRACKING_MODEL, Linker, get_linker
from .objects import FrameObjects, check_series, find_objects, read_frame, scan_steps

logger = logging.getLogger(__name__)


def track_across_frames(
    timeseries: np.ndarray,
    segmentation: np.ndarray,
    gap_closing: int | None = None,
    min_time_extent: int | None = None,
    mode: str = "greedy",
    tracking_model: str | os.PathLike = DEFAULT_TRACKING_MODEL,
    verbose: bool = True,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    output_folder: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    overwrite: bool = False,
) -> tuple[np.ndarray, Lineages]:
    """Track the objects of a segmented time series.

    Args:
        timeseries: Images (T, Y, X[, C]), may be lazy. Only trackastra looks at them.
        segmentation: Label images (T, Y, X), may be lazy; ids need not be unique across frames.
        gap_closing: Close gaps of up to twice that many frames, like so many iterations of a binary closing in time,
            but object by object: an object that vanishes is linked to a similar one that appears nearby, and is
            painted into the background of the frames between.
        min_time_extent: Leave out tracks with objects in fewer frames. The children of such tracks have no parent then.
        mode: `greedy` with divisions, `greedy_nodiv` without, or `ilp` for the best solution over all frames; not all
            linkers have all modes.
        tracking_model: Who links, see `tracking.linking.get_linker`: a model of trackastra or the folder of one, or a
            linker that needs no model.
        verbose: Whether to show progress.
        pbar_init: Callback to start a progress bar, called with total and description.
        pbar_update: Callback to advance the progress bar.
        output_folder: Where to write the result in the format of the Cell Tracking Challenge, see `ctc.write_ctc`.
        device: The device for trackastra; None chooses it.
        overwrite: Whether to replace tracks in the output folder.

    Returns:
        Label images (T, Y, X), uint32, with the ids of tracks, and the lineages: one dictionary per tree with the id
        of each track and the ids of its children. Ids have gaps where tracks were left out.

    Raises:
        InvalidInputError: If shapes or options do not fit.
        UnsupportedError: If the linker is not installed, or does not have the mode.
        ModelError: If the model of trackastra is missing or incomplete.
        OutputExistsError: If the output folder holds something.
    """
    linker = get_linker(tracking_model, mode, device)
    steps = tracking_steps(
        timeseries, segmentation, linker, gap_closing=gap_closing, min_time_extent=min_time_extent,
        output_folder=output_folder, overwrite=overwrite,
    )
    tracks, forest = drain(steps, verbose, pbar_init, pbar_update)
    return tracks, forest.lineages()


def tracking_steps(
    timeseries: np.ndarray,
    segmentation: np.ndarray,
    linker: Linker,
    *,
    gap_closing: int | None = None,
    min_time_extent: int | None = None,
    output_folder: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Steps[tuple[np.ndarray, TrackForest]]:
    """Generator behind `track_across_frames`: yields `Step`, returns tracks (T, Y, X) and their forest."""
    check_series(segmentation, timeseries)
    _check_options(gap_closing, min_time_extent, output_folder, overwrite)
    scan = yield from scan_steps(segmentation)
    links = []
    if any(len(frame) for frame in scan.objects):
        links = yield from linker.link_steps(timeseries, segmentation, scan)
    else:
        logger.warning("There are no objects to track.")
    if gap_closing:
        links = [*links, *gap_links(scan.objects, links, 2 * gap_closing)]
    forest, lookup = forest_from_links(scan.objects, links)
    tracks = yield from _paint_steps(segmentation, scan.objects, lookup)
    frames: dict[int, list[int]] = {i: [] for i in forest}
    for t, mapping in enumerate(lookup):
        for track_id in mapping.values():
            frames[track_id].append(t)
    if gap_closing:
        fill_gaps(tracks, forest, frames)
    if min_time_extent:
        short = [i for i in forest if len(frames[i]) < min_time_extent]
        forest = forest.without(short)
        for t in sorted({t for i in short for t in frames[i]}):
            tracks[t][np.isin(tracks[t], short)] = 0
    if output_folder is not None:
        yield from write_ctc_steps(output_folder, tracks, forest, overwrite)
    return tracks, forest


def _check_options(gap_closing, min_time_extent, output_folder, overwrite) -> None:
    for name, value in (("gap_closing", gap_closing), ("min_time_extent", min_time_extent)):
        if value not in (None, 0):
            require_positive_int(name, value)
    if output_folder is not None:
        check_ctc_folder(output_folder, overwrite)


def _paint_steps(segmentation, objects: list[FrameObjects], lookup: list[dict[int, int]]) -> Steps[np.ndarray]:
    tracks = np.zeros(segmentation.shape, dtype=np.uint32)
    for t, frame_objects in enumerate(objects):
        yield Step(t, len(objects), "Paint tracks")
        frame = read_frame(segmentation, t)
        ids = np.array([lookup[t][label] for label in frame_objects.labels.tolist()], dtype=np.uint32)
        inside = frame != 0
        tracks[t][inside] = ids[np.searchsorted(frame_objects.labels, frame[inside].astype(np.int64))]
    yield Step(len(objects), len(objects), "Paint tracks")
    return tracks


def automatic_tracking_implementation(
    timeseries: np.ndarray,
    predictor: SamPredictor,
    segmentor: Segmenter,
    embedding_path: str | os.PathLike | None = None,
    gap_closing: int | None = None,
    min_time_extent: int | None = None,
    mode: str = "greedy",
    tracking_model: str | os.PathLike = DEFAULT_TRACKING_MODEL,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    verbose: bool = True,
    return_embeddings: bool = False,
    batch_size: int = 1,
    output_folder: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
    embedding_options: Mapping[str, Any] | None = None,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> tuple[np.ndarray, Lineages] | tuple[np.ndarray, Lineages, ImageEmbeddings]:
    """Segment each frame of a time series, and track the objects.

    Args:
        timeseries: Images (T, Y, X[, C]), may be lazy.
        predictor: The predictor.
        segmentor: The segmenter.
        embedding_path: Where to keep the embeddings; None keeps none.
        gap_closing: See `track_across_frames`.
        min_time_extent: See `track_across_frames`.
        mode: See `track_across_frames`.
        tracking_model: See `track_across_frames`. It is looked up before anything is computed.
        tile_shape: Tile shape (y, x) in pixels, for a tiled segmenter.
        halo: Overlap (y, x) of the tiles in pixels.
        verbose: Whether to show progress.
        return_embeddings: Whether to return the embeddings as well.
        batch_size: Frames or tiles per call of the network.
        output_folder: See `track_across_frames`.
        overwrite: Whether to replace tracks in the output folder.
        embedding_options: More options of `precompute_image_embeddings`.
        pbar_init: Callback to start a progress bar, called with total and description.
        pbar_update: Callback to advance the progress bar.
        kwargs: Options of `segmentor.generate`.

    Returns:
        Tracks and lineages, see `track_across_frames`; and the embeddings if asked for.

    Raises:
        InvalidInputError: If shapes or options do not fit.
        UnsupportedError, ModelError, OutputExistsError: See `track_across_frames`.
    """
    steps = automatic_tracking_steps(
        timeseries, predictor, segmentor, embedding_path=embedding_path, gap_closing=gap_closing,
        min_time_extent=min_time_extent, mode=mode, tracking_model=tracking_model, tile_shape=tile_shape, halo=halo,
        return_embeddings=return_embeddings, batch_size=batch_size, output_folder=output_folder, overwrite=overwrite,
        embedding_options=embedding_options, **kwargs,
    )
    tracks, forest, embeddings = drain(steps, verbose, pbar_init, pbar_update)
    return (tracks, forest.lineages(), embeddings) if return_embeddings else (tracks, forest.lineages())


def automatic_tracking_steps(
    timeseries: np.ndarray,
    predictor: SamPredictor,
    segmentor: Segmenter,
    *,
    embedding_path: str | os.PathLike | None = None,
    gap_closing: int | None = None,
    min_time_extent: int | None = None,
    mode: str = "greedy",
    tracking_model: str | os.PathLike = DEFAULT_TRACKING_MODEL,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_embeddings: bool = False,
    batch_size: int = 1,
    output_folder: str | os.PathLike | None = None,
    overwrite: bool = False,
    embedding_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Steps[tuple[np.ndarray, TrackForest, ImageEmbeddings | None]]:
    """Generator behind `automatic_tracking_implementation`: yields `Step`, returns tracks, forest and embeddings.

    Embeddings are None if they are neither asked for nor kept on disk.
    """
    _check_options(gap_closing, min_time_extent, output_folder, overwrite)
    linker = get_linker(tracking_model, mode, predictor.device)

    segmentation, embeddings = yield from slices_steps(
        timeseries, predictor, segmentor, embedding_path, tile_shape, halo, return_embeddings, batch_size,
        embedding_options=embedding_options, **kwargs,
    )
    tracks, forest = yield from tracking_steps(
        timeseries, segmentation, linker, gap_closing=gap_closing, min_time_extent=min_time_extent,
        output_folder=output_folder, overwrite=overwrite,
    )
    return tracks, forest, embeddings


def get_napari_track_data(
    segmentation: np.ndarray, lineages: Iterable[Mapping[int, list[int]]] | TrackForest, n_threads: int | None = None
) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Compute the data of a napari tracks layer.

    Args:
        segmentation: Label images (T, Y, X) with the ids of tracks, may be lazy.
        lineages: The lineages, as the tracking functions return them.
        n_threads: How many frames are measured in parallel; None chooses it.

    Returns:
        Rows (track, t, y, x) with the centroids of the objects, (M, 4) float64, ordered by track and time; and for
        each track that has a parent a list with that parent. Both are empty if there are no objects. Tracks without
        objects are left out.

    Raises:
        InvalidInputError, InvalidTypeError: If the segmentation has another shape or no integer dtype.
    """
    check_series(segmentation)
    with ThreadPoolExecutor(n_threads) as pool:
        objects = list(pool.map(lambda t: find_objects(read_frame(segmentation, t)), range(segmentation.shape[0])))
    rows = [
        np.column_stack([frame.labels, np.full(len(frame), t), frame.centroids]) for t, frame in enumerate(objects)
    ]
    data = np.concatenate([np.zeros((0, 4)), *rows])
    present = set(data[:, 0].astype(np.int64).tolist())
    graph: dict[int, list[int]] = {}
    for tree in lineages.lineages() if isinstance(lineages, TrackForest) else lineages:
        for parent, child in ((int(p), int(c)) for p, children in tree.items() for c in children):
            if {parent, child} <= present:
                graph.setdefault(child, []).append(parent)
    return data[np.lexsort((data[:, 1], data[:, 0]))], graph
