"""Whole images, volumes and time series on a cluster: the workflows of one machine with another engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from ..blockwise.engine import work_steps
from ..blockwise.tasks import ImageSource, ModelSource
from ..blockwise.workflow import segment_blockwise
from ..core.errors import InvalidInputError
from ..core.image import open_image
from ..core.progress import Steps, drain
from ..core.settings import get_precision
from ..embeddings.encode import ImageEmbeddings, compute_embeddings_batched, embedding_steps
from ..embeddings.normalization import PERCENTILES, ItemReader, check_normalization, measure_range
from ..embeddings.plan import EmbeddingPlan, Item
from ..embeddings.store import write_features
from ..tracking.lineage import Lineages
from ..tracking.linking import DEFAULT_TRACKING_MODEL
from ..tracking.workflow import track_across_frames
from .engine import DaskEngine

if TYPE_CHECKING:
    from distributed import Client

_LARGE = 2**24  # bytes; the array goes along with each block


def _check_shareable(image: Any) -> None:
    """Refuse arrays in memory that would be sent to workers again and again.

    Raises:
        InvalidInputError: If the image is one.
    """
    if isinstance(image, np.ndarray) and not isinstance(image, np.memmap) and image.nbytes > _LARGE:
        raise InvalidInputError(
            f"The image is an array of {image.nbytes / 2**20:.0f} MiB in memory, which would be sent with each block. "
            "Pass the path of a file that all workers can read, or a zarr array."
        )


def segment(
    client: "Client", image: Any, output_path: str | os.PathLike, model: str | None = None, mode: str = "auto",
    **options: Any,
) -> zarr.Array:
    """Segment an image or a volume on a cluster.

    The result is that of `blockwise.workflow.segment_blockwise` in one process. A run that was interrupted goes on when
    it is called again with the same arguments, with any number of workers.

    Args:
        client: The client, see `connect`.
        image: A path that all workers can read, or a lazy array.
        output_path: The zarr array to write, on a file system that all workers share.
        model: Name of the model.
        mode: `ais`, `apg`, `amg` or `auto`.
        options: More options of `segment_blockwise`, for example `block_shape`.

    Returns:
        The labels, a zarr array (Y, X) or (Z, Y, X).
    """
    _check_shareable(image)
    return segment_blockwise(image, output_path, model, mode, engine=DaskEngine(client), **options)


def track(
    client: "Client",
    timeseries: Any,
    output_folder: str | os.PathLike,
    model: str | None = None,
    mode: str = "auto",
    *,
    gap_closing: int | None = None,
    min_time_extent: int | None = None,
    tracking_mode: str = "greedy",
    tracking_model: str | os.PathLike = DEFAULT_TRACKING_MODEL,
    image_options: dict[str, Any] | None = None,
    overwrite: bool = False,
    verbose: bool = True,
    **options: Any,
) -> tuple[np.ndarray, Lineages]:
    """Segment the frames of a time series on a cluster, then link the objects in this process.

    Args:
        client: The client, see `connect`.
        timeseries: A path that all workers can read, or a lazy array (T, Y, X[, C]).
        output_folder: Where to write the tracks in the format of the Cell Tracking Challenge. The segmented frames stay
            beside it in `<output_folder>_frames.zarr`, so that linking can be repeated with other options.
        model: Name of the model.
        mode: `ais`, `apg`, `amg` or `auto`.
        gap_closing: See `track_across_frames`.
        min_time_extent: See `track_across_frames`.
        tracking_mode: `greedy`, `greedy_nodiv` or `ilp`, see `track_across_frames`.
        tracking_model: Who links, see `track_across_frames`.
        image_options: More options of `open_image`.
        overwrite: Whether to replace what was made with other settings.
        verbose: Whether to show progress.
        options: More options of `segment_blockwise`.

    Returns:
        Tracks (T, Y, X) and lineages, see `track_across_frames`.
    """
    _check_shareable(timeseries)
    output_folder = Path(output_folder).expanduser()
    image_options = {"ndim": 3, **(image_options or {})}
    frames = segment_blockwise(
        timeseries, output_folder.with_name(f"{output_folder.name}_frames.zarr"), model, mode,
        engine=DaskEngine(client), merge=False, image_options=image_options, overwrite=overwrite, verbose=verbose,
        **options,
    )
    return track_across_frames(
        open_image(timeseries, **image_options).data, frames, gap_closing, min_time_extent, tracking_mode,
        tracking_model, verbose, output_folder=output_folder, overwrite=overwrite,
    )


def precompute_embeddings(
    client: "Client",
    image: Any,
    save_path: str | os.PathLike,
    model: str | None = "vit_b_lm",
    *,
    checkpoint: str | os.PathLike | None = None,
    precision: str | None = None,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    batch_size: int = 1,
    normalization: str | tuple = "tile",
    image_options: dict[str, Any] | None = None,
    retries: int = 2,
    verbose: bool = True,
    **options: Any,
) -> ImageEmbeddings:
    """Compute the embeddings of a stack or of the tiles of an image on a cluster.

    The cache is the one that `precompute_image_embeddings` writes, up to the rounding of other devices.

    Args:
        client: The client, see `connect`.
        image: A path that all workers can read, or a lazy array.
        save_path: The zarr folder, on a file system that all workers share.
        model: Name of the model.
        checkpoint: A checkpoint of your own; `model` is its architecture then, None detects it.
        precision: `float32` or `auto`, see `get_sam_model`; None takes what the user has chosen here.
        tile_shape: Tile shape (y, x) in pixels.
        halo: Overlap (y, x) of the tiles in pixels.
        batch_size: Planes or tiles per call of the encoder.
        normalization: See `precompute_image_embeddings`.
        image_options: More options of `open_image`, for example `{"ndim": 3}`.
        retries: How often a failing batch is tried again.
        verbose: Whether to show progress.
        options: More options of `precompute_image_embeddings`, for example `dtype`.

    Returns:
        The embeddings, read from disk when they are used.
    """
    _check_shareable(image)
    source = ImageSource(image, image_options or {})
    opened = source.open()
    model_source = ModelSource(
        model, None if checkpoint is None else str(checkpoint), mode="amg", precision=get_precision(precision)
    )
    for_items = check_normalization(normalization)
    if isinstance(for_items, dict) and for_items["mode"] == "image":  # measured once, not by each worker
        value_range = measure_range(opened.data, opened.has_channels, PERCENTILES)
        for_items = {"mode": "range", "range": value_range}
    engine = DaskEngine(client)

    def fill(predictor, plan: EmbeddingPlan, sink, read, batch_size: int) -> Steps[None]:
        missing = [item for item in plan.items if not sink.is_done(item)]
        encode = EncodeItems(source, model_source, plan, for_items, str(sink.path))
        # One batch is one piece of work, so pieces are counted, not items.
        batches = [missing[k:k + batch_size] for k in range(0, len(missing), batch_size)]
        yield from work_steps(
            engine, encode, batches, len(batches), "Compute image embeddings", lambda batch, _: sink.note(batch),
            retries,
        )

    steps = embedding_steps(
        model_source.load().predictor, opened.data, save_path, True, opened.ndim, tile_shape, halo, batch_size,
        normalization=normalization, fill=fill, **options,
    )
    return drain(steps, verbose=verbose)


@dataclass(frozen=True)
class EncodeItems:
    """Encodes planes or tiles and writes their chunks into the cache."""

    image: ImageSource
    model: ModelSource
    plan: EmbeddingPlan
    normalization: Any
    path: str

    def __call__(self, items: list[Item]) -> None:
        """Encode and write."""
        read = ItemReader(self.image.open().data, self.plan, self.normalization)
        features, _, _ = compute_embeddings_batched(self.model.load().predictor, [read(item) for item in items])
        write_features(Path(self.path), items, features.cpu().numpy())
