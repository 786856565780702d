"""Automatic segmentation of volumes: slice by slice, then merged to objects in 3D.

Slices are embedded, decoded and segmented in batches. Embeddings are dropped with their batch unless they are kept on
disk or asked for, so that memory does not grow with the number of slices if the labels go to an array on disk.
"""

import copy
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, require_positive_int
from ..core.progress import Step, Steps, drain, during
from ..core.tiling import TileSpec
from ..embeddings.encode import ImageEmbeddings, embedding_steps, set_precomputed
from ..embeddings.normalization import PERCENTILES, check_normalization, measure_range
from ..segmentation.ais import MAP_NAMES
from ..segmentation.planes import is_blank
from ..segmentation.settings import check_options, check_tiled, generate_options, mode_of
from ..segmentation.workflow import BLOCK_WATERSHED_PIXELS, Segmenter, initialize_steps
from .merge import NECK_PENALTY, check_merge_options, check_output, check_output_holds, merge_steps

_TEXT = "Segment slices"
_EMBEDDING_OPTIONS = ("normalization", "dtype", "zarr_format", "overwrite", "data_signature", "lock_timeout")


def automatic_3d_segmentation(
    volume: np.ndarray,
    predictor: SamPredictor,
    segmentor: Segmenter,
    embedding_path: str | os.PathLike | None = None,
    with_background: bool = True,
    gap_closing: int | None = None,
    min_z_extent: int | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    verbose: bool = True,
    return_embeddings: bool = False,
    batch_size: int = 1,
    *,
    beta: float = 0.5,
    neck_penalty: float = NECK_PENALTY,
    mask_with_background: bool | None = None,
    mask: Any = None,
    output: Any = None,
    embedding_options: Mapping[str, Any] | None = None,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> np.ndarray | tuple[np.ndarray, ImageEmbeddings]:
    """Segment the objects in a volume.

    Args:
        volume: Volume (Z, Y, X[, C]), may be lazy (zarr, dask, a memory map): it is read slice by slice.
        predictor: The predictor.
        segmentor: The segmenter, see `get_predictor_and_segmenter`. Afterwards it holds the state of some slice.
        embedding_path: Where to keep the embeddings of all slices, a zarr folder; an interrupted run goes on there.
            None drops them.
        with_background: Whether pixels without object are background for merging, see
            `merge_instance_segmentation_3d`; not to be confused with `mask_with_background`.
        gap_closing: How many slices to close from either side, see there.
        min_z_extent: Objects that span fewer slices than this are removed.
        tile_shape: Tile shape (y, x) in pixels, for a tiled segmenter.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        verbose: Whether to show progress.
        return_embeddings: Whether to return the embeddings as well; without `embedding_path` all are then in memory.
        batch_size: Slices (or tiles) per call of the encoder and of the decoder. It does not change the result.
        beta: Above 0.5 objects are merged more readily, below less.
        neck_penalty: How strongly necks separate objects that lie on top of each other, see there.
        mask_with_background: The option `with_background` of the mask generator (mode `amg`): whether the largest
            object of a slice is removed if it is the background. None for its default.
        mask: Array (Z, Y, X), may be lazy: only tiles that touch a non-zero pixel are processed. Needs tiles.
        output: Array or zarr array (Z, Y, X) of integers to write the labels to; its content is undefined until the
            end. Chunks of one slice are the fastest.
        embedding_options: More options of `precompute_image_embeddings`, for example `normalization`.
        pbar_init: Callback `(total, description)` for progress.
        pbar_update: Callback `(n)` for progress.
        kwargs: Options of `segmentor.generate`.

    Returns:
        Labels (Z, Y, X), uint64 or `output`, 0 is background; and the embeddings if asked for.

    Raises:
        InvalidInputError: If arguments do not fit the volume, the segmenter or each other.
        EmbeddingMismatchError, EmbeddingCacheError: See `precompute_image_embeddings`.

    Example:
        >>> labels = automatic_3d_segmentation(volume, predictor, segmenter, min_z_extent=3)  # doctest: +SKIP
    """
    steps = volume_steps(
        volume, predictor, segmentor, embedding_path, with_background, gap_closing, min_z_extent, tile_shape, halo,
        return_embeddings, batch_size, beta=beta, neck_penalty=neck_penalty, mask_with_background=mask_with_background,
        mask=mask, output=output, embedding_options=embedding_options, **kwargs,
    )
    labels, embeddings = drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)
    return (labels, embeddings) if return_embeddings else labels


def volume_steps(
    volume: np.ndarray,
    predictor: SamPredictor,
    segmentor: Segmenter,
    embedding_path: str | os.PathLike | None = None,
    with_background: bool = True,
    gap_closing: int | None = None,
    min_z_extent: int | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_embeddings: bool = False,
    batch_size: int = 1,
    *,
    beta: float = 0.5,
    neck_penalty: float = NECK_PENALTY,
    mask_with_background: bool | None = None,
    mask: Any = None,
    output: Any = None,
    embedding_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Steps[tuple[np.ndarray, ImageEmbeddings | None]]:
    """Generator behind `automatic_3d_segmentation`: returns labels, and the embeddings if there are of all slices.

    Closing it cancels the work; embeddings on disk are kept and the next call goes on from there.
    """
    check_merge_options(beta, gap_closing, min_z_extent, neck_penalty)
    labels, embeddings = yield from slices_steps(
        volume, predictor, segmentor, embedding_path, tile_shape, halo, return_embeddings, batch_size,
        mask_with_background=mask_with_background, mask=mask, output=output, embedding_options=embedding_options,
        **kwargs,
    )
    labels = yield from merge_steps(
        labels, beta, with_background, gap_closing, min_z_extent, ids_per_slice=True, output=labels,
        neck_penalty=neck_penalty,
    )
    return labels, embeddings


def slices_steps(
    stack: np.ndarray,
    predictor: SamPredictor,
    segmentor: Segmenter,
    embedding_path: str | os.PathLike | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    return_embeddings: bool = False,
    batch_size: int = 1,
    *,
    mask_with_background: bool | None = None,
    mask: Any = None,
    output: Any = None,
    embedding_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Steps[tuple[np.ndarray, ImageEmbeddings | None]]:
    """Segment each plane of a stack (volume or time series) for itself.

    Args:
        stack: See `volume` of `automatic_3d_segmentation`, also for all others.
        predictor: .
        segmentor: .
        embedding_path: .
        tile_shape: .
        halo: .
        return_embeddings: .
        batch_size: .
        mask_with_background: .
        mask: .
        output: .
        embedding_options: .
        kwargs: .

    Returns:
        Labels (Z, Y, X), uint64 or `output`, where each plane counts its objects for itself; and the embeddings, None
        if they were dropped.
    """
    if not (hasattr(stack, "shape") and hasattr(stack, "dtype")):
        stack = np.asarray(stack)
    if mask is not None and not hasattr(mask, "shape"):
        mask = np.asarray(mask)
    mode, tiling = _check_arguments(stack, segmentor, tile_shape, halo, batch_size, mask)
    options = _check_generate_options(kwargs, mode, bool(tiling), mask_with_background)
    embedding_options = dict(embedding_options or {})
    check_options(embedding_options, dict.fromkeys(_EMBEDDING_OPTIONS), "the embeddings of a stack")
    shape = tuple(int(s) for s in stack.shape[:3])
    if output is None:
        output = np.zeros(shape, dtype=np.uint64)
    check_output(output, shape)
    if mode == "ais" and tiling and np.prod(shape[1:], dtype=np.int64) > BLOCK_WATERSHED_PIXELS:
        options = {**tiling, **options}

    embeddings = None
    if embedding_path is not None or return_embeddings:
        embeddings = yield from embedding_steps(
            predictor, stack, embedding_path, lazy_loading=True, ndim=3, batch_size=batch_size, mask=mask, **tiling,
            **embedding_options,
        )
    else:
        embedding_options = {"normalization": _whole_normalization(stack, embedding_options)}
    work = _SliceWork(stack, predictor, segmentor, mode, tiling, batch_size, mask, embedding_options, options, output)
    yield from work.steps(embeddings)
    return output, embeddings


def _check_arguments(stack, segmenter, tile_shape, halo, batch_size, mask) -> tuple[str, dict]:
    """Check what can be checked before any work; returns the mode, and `tile_shape` and `halo` if there are tiles."""
    shape = tuple(int(s) for s in stack.shape)
    is_color = len(shape) == 4 and shape[-1] <= 4
    if not (is_color or len(shape) == 3 and shape[-1] not in (3, 4)) or 0 in shape:
        raise InvalidInputError(
            f"A volume must have the shape (Z, Y, X), or (Z, Y, X, C) with up to four channels, but has {shape}. "
            "For a single image pass image[None]."
        )
    require_positive_int("batch_size", batch_size)
    mode, tiled = mode_of(segmenter), check_tiled(segmenter, tile_shape)
    if not tiled:
        for name, value in (("halo", halo), ("mask", mask)):
            if value is not None:
                raise InvalidInputError(
                    f"{name} is for tiles: pass tile_shape and a tiled segmenter, or leave {name} out."
                )
        return mode, {}
    if mask is not None and tuple(mask.shape) != shape[:3]:
        raise InvalidInputError(f"The mask must have the shape {shape[:3]} of the volume, but has {tuple(mask.shape)}.")
    tiling = TileSpec.create(shape[1:3], tile_shape, halo)
    return mode, {"tile_shape": tiling.tile_shape, "halo": tiling.halo}


def _check_generate_options(options: dict, mode: str, tiled: bool, mask_with_background: bool | None) -> dict:
    check_options(options, generate_options(mode, tiled), f"the segmentation mode {mode!r}")
    if mask_with_background is None:
        return options
    if mode != "amg":
        raise InvalidInputError(
            f"mask_with_background is an option of the segmentation mode 'amg', but the segmenter is of {mode!r}. "
            "Leave it out."
        )
    return {**options, "with_background": bool(mask_with_background)}


def _whole_normalization(stack, embedding_options: Mapping[str, Any]) -> Any:
    """The normalization for parts of the stack that gives the same as that for the whole."""
    normalization = embedding_options.get("normalization", "tile")
    check_normalization(normalization)
    if isinstance(normalization, str) and normalization == "image":
        return measure_range(stack, stack.ndim == 4, PERCENTILES)
    return normalization


@dataclass(frozen=True)
class _SliceWork:
    """Checked arguments of `slices_steps`."""

    stack: Any
    predictor: SamPredictor
    segmenter: Segmenter
    mode: str
    tiling: dict
    batch_size: int
    mask: Any
    embedding_options: dict
    options: dict
    output: Any

    def steps(self, embeddings: ImageEmbeddings | None) -> Steps[None]:
        """Segment all slices into the output, with the embeddings of the stack or, if None, with those of batches."""
        depth = self.stack.shape[0]
        yield Step(0, depth, _TEXT)
        # AIS: the watershed of a batch runs in threads while the next batch is encoded and decoded.
        n_waiting = self.batch_size if self.mode == "ais" else 0
        waiting: deque[Future] = deque()
        pool = ThreadPoolExecutor(min(self.batch_size, os.cpu_count() or 1))
        written = 0
        try:
            for start in range(0, depth, self.batch_size):
                planes = np.asarray(self.stack[start:start + self.batch_size])
                batch, first = embeddings, start
                if batch is None:
                    batch, first = (yield from during(self._embed(planes, start), Step(written, depth, _TEXT))), 0
                states = self._decode(planes, batch, first)
                for k, plane in enumerate(planes):
                    step = Step(written, depth, _TEXT)
                    if states is not None:
                        self.segmenter.set_state(states[k])
                    else:
                        yield from during(self._initialize(plane, batch, first + k, start + k), step)
                    waiting.append((yield from self._generate(pool, step)))
                    while len(waiting) > n_waiting:
                        self._write(written, waiting.popleft())
                        written += 1
                        yield Step(written, depth, _TEXT)
            for future in waiting:
                self._write(written, future)
                written += 1
                yield Step(written, depth, _TEXT)
        finally:
            pool.shutdown(cancel_futures=True)

    def _embed(self, planes: np.ndarray, start: int) -> Steps[ImageEmbeddings]:
        mask = None if self.mask is None else np.asarray(self.mask[start:start + len(planes)])
        try:
            return (yield from embedding_steps(
                self.predictor, planes, ndim=3, batch_size=self.batch_size, mask=mask, **self.tiling,
                **self.embedding_options,
            ))
        except InvalidInputError as error:
            if start == 0:
                raise
            raise type(error)(f"{error} (Planes are counted from slice {start} here.)") from error

    def _decode(self, planes: np.ndarray, embeddings: ImageEmbeddings, first: int) -> list[dict] | None:
        """The states of a decoder's segmenter for slices without tiles; None for other segmenters.

        Blank slices are not decoded; their maps are 0, as `initialize` makes them.
        """
        if self.mode == "amg" or self.tiling:
            return None
        maps = np.zeros((len(planes), 3, *planes.shape[1:3]), dtype=np.float32)
        seen = [k for k, plane in enumerate(planes) if not is_blank(plane)]
        if seen:
            set_precomputed(self.segmenter._predictor, embeddings, i=first)  # checks that the features fit the model
            features = np.concatenate([np.asarray(embeddings["features"][first + k]) for k in seen])
            features = torch.from_numpy(features).to(self.segmenter._predictor.device)
            sizes = embeddings["input_size"], embeddings["original_size"]
            maps[seen] = self.segmenter._decode(features, *sizes)
        return [
            {**dict(zip(MAP_NAMES, maps[k])), "image_embeddings": embeddings, "i": first + k}
            for k in range(len(planes))
        ]

    def _initialize(self, plane: np.ndarray, embeddings: ImageEmbeddings, i: int, z: int) -> Steps[None]:
        tiles = {}
        if self.tiling:
            mask = None if self.mask is None else np.asarray(self.mask[z])
            tiles = {"batch_size": self.batch_size, "mask": mask}
        return initialize_steps(self.segmenter, plane, embeddings, i, **tiles)

    def _generate(self, pool: ThreadPoolExecutor, step: Step) -> Steps[Future]:
        if self.mode == "ais":
            ready = copy.copy(self.segmenter)  # keeps its maps when the next slice comes
            return pool.submit(ready.generate, **self.options)
        future: Future = Future()
        if hasattr(self.segmenter, "generate_steps"):
            future.set_result((yield from during(self.segmenter.generate_steps(**self.options), step)))
        else:
            future.set_result(self.segmenter.generate(**self.options))
        return future

    def _write(self, z: int, future: Future) -> None:
        labels = future.result()
        check_output_holds(self.output, int(labels.max(initial=0)))
        self.output[z] = labels.astype(self.output.dtype, copy=False)
