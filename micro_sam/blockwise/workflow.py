"""From an image of any size to labels in a zarr array: segment blocks, join them, merge slices."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..core.errors import InvalidInputError
from ..core.output import is_done, label_record, prepare_folder, writing
from ..core.progress import Step, Steps, drain
from ..core.settings import get_precision
from ..embeddings.normalization import PERCENTILES, measure_range
from ..embeddings.signature import compute_data_signature
from ..segmentation.settings import full_options
from ..segmentation.workflow import model_settings, plan_image, resolve_model
from ..volume.images import split_options
from ..volume.merge import check_merge_options, merge_steps
from .blocks import BlockGrid
from .engine import Engine, LocalEngine, work_steps
from .stitch import joined_ids
from .store import WorkFolder, one_at_a_time
from .tasks import ImageSource, MatchBlock, ModelSource, PaintBlock, SegmentBlock, SegmentPixels

logger = logging.getLogger(__name__)

BLOCK_SHAPE = (2048, 2048)
HALO = (128, 128)
_CHUNK_SIDE = 1024
_TILES = ("tile_shape", "halo", "embedding_options")  # follow from the shape of a block


def segment_blockwise(
    image: Any,
    output_path: str | os.PathLike,
    model: str | None = None,
    mode: str = "auto",
    *,
    block_shape: Sequence[int] = BLOCK_SHAPE,
    halo: Sequence[int] = HALO,
    checkpoint: str | os.PathLike | None = None,
    device: str | None = None,
    precision: str | None = None,
    engine: Engine | None = None,
    merge: bool = True,
    retries: int = 2,
    overwrite: bool = False,
    verbose: bool = True,
    image_options: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> zarr.Array:
    """Segment an image or a volume of any size into a zarr array, block by block.

    Memory is that of one block. Finished blocks are kept in `<output_path>.blocks` until the output is complete, so a
    run that was interrupted, also by a kill, goes on where it stopped. Objects at the borders of blocks are joined by
    what both blocks see of them; planes of volumes are merged by `merge_instance_segmentation_3d`. A block that fails
    is tried again, and reported in the end: nothing is filled with zeros.

    Args:
        image: A path, see `core.image.open_image`, or a lazy array (Y, X[, C]) or (Z, Y, X[, C]).
        output_path: The zarr array to write, with the suffix `.zarr`.
        model: Name of the model, see `micro_sam.segment`.
        mode: `ais`, `apg`, `amg` or `auto`.
        block_shape: Shape (y, x) of a block in pixels. Larger blocks need more memory and have fewer borders.
        halo: By how many pixels (y, x) a block sees more on each side; half of a large object is enough.
        checkpoint: A checkpoint of your own, instead of a published model.
        device: The device; None chooses it.
        precision: `float32` or `auto`, see `get_sam_model`; None takes what the user has chosen here, also for
            workers on other machines.
        engine: Who works; None for this process, see `micro_sam.distributed` for others.
        merge: Whether the planes of a stack are merged to objects in 3D. If not, each plane counts its objects from 1.
        retries: How often a failing block is tried again.
        overwrite: Whether to replace an output, or unfinished work, that was made with other settings.
        verbose: Whether to show progress.
        image_options: More options of `open_image`, for example `{"channel": 0}`.
        generate_kwargs: Options of the mode, for volumes also those of `automatic_3d_segmentation`.

    Returns:
        The labels (Y, X) or (Z, Y, X), a zarr array; ids are consecutive from 1.

    Raises:
        BlockError: If blocks failed each time; what is finished is kept.
        OutputExistsError: If there is an output, or unfinished work, made with other settings.
        InvalidInputError: If arguments do not fit.
    """
    model = resolve_model(model, checkpoint)
    source = ImageSource(image, dict(image_options or {}))
    model_source = ModelSource(
        model, None if checkpoint is None else str(checkpoint), device, mode, get_precision(precision)
    )
    steps = blockwise_steps(
        source, output_path, model_source, block_shape, halo, engine, merge=merge, retries=retries,
        overwrite=overwrite, **generate_kwargs,
    )
    return drain(steps, verbose=verbose)


def blockwise_steps(
    source: ImageSource,
    output_path: str | os.PathLike,
    model: ModelSource,
    block_shape: Sequence[int] = BLOCK_SHAPE,
    halo: Sequence[int] = HALO,
    engine: Engine | None = None,
    *,
    merge: bool = True,
    retries: int = 2,
    overwrite: bool = False,
    **generate_kwargs: Any,
) -> Steps[zarr.Array]:
    """Generator behind `segment_blockwise`. Closing it cancels the work; finished blocks are kept."""
    output_path = check_output_path(output_path)
    image = source.open()
    grid = BlockGrid.create(image.shape, block_shape, halo)
    volume_options, options = split_options(generate_kwargs, image.ndim)
    check_merge_options(
        volume_options.get("beta", 0.5), volume_options.get("gap_closing"), volume_options.get("min_z_extent"),
        volume_options.get("neck_penalty", 0.0),
    )
    if volume_options and not merge:
        raise InvalidInputError(f"{', '.join(volume_options)} are for merging planes. Leave them out, or merge.")
    loaded = model.load()
    if (mask_with_background := volume_options.pop("mask_with_background", None)) is not None:
        if loaded.mode != "amg":
            raise InvalidInputError(f"mask_with_background is an option of the mode 'amg', not of {loaded.mode!r}.")
        options["with_background"] = bool(mask_with_background)
    name = None if model.checkpoint else model.model_type
    plan = plan_image(loaded, grid.tiling[0].outer_shape, "auto", None, options, name)  # also checks the options
    value_range = measure_range(image.data, image.has_channels, PERCENTILES)
    settings = json.loads(json.dumps({
        "mode": loaded.mode,
        **model_settings(plan.model.predictor, loaded.decoder),
        "image": compute_data_signature(image.data),
        "range": value_range,
        "block_shape": grid.tiling.tile_shape,
        "halo": grid.tiling.halo,
        "merge": bool(merge) and image.ndim == 3,
        "options": full_options(plan.segmenter.generate, {k: v for k, v in plan.work.items() if k not in _TILES}),
        "given": full_options(lambda: None, {**options, **volume_options}),
    }))
    segment = SegmentPixels(model, value_range, options)
    return (yield from segment_steps(
        source, grid, segment, output_path, settings, engine, volume_options if settings["merge"] else None,
        retries=retries, overwrite=overwrite,
    ))


def check_output_path(path: str | os.PathLike) -> Path:
    """Return the path of the output.

    Raises:
        InvalidInputError: If it is not that of a plain zarr array.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".zarr" or path.name.lower().endswith(".ome.zarr"):
        raise InvalidInputError(
            f"Blocks are written to a zarr array, whose name ends in .zarr, but the output is {path.name}. Choose such "
            "a name (--output_format zarr for several images), and convert it afterwards with micro_sam.convert."
        )
    return path


def segment_steps(
    source: ImageSource,
    grid: BlockGrid,
    segment: Callable[[np.ndarray], np.ndarray],
    output_path: Path,
    settings: dict[str, Any],
    engine: Engine | None = None,
    merge_options: Mapping[str, Any] | None = None,
    *,
    retries: int = 2,
    overwrite: bool = False,
) -> Steps[zarr.Array]:
    """Run any segmentation over the blocks of a grid, see `segment_blockwise`.

    Args:
        source: The image.
        grid: Its blocks.
        segment: Maps pixels (Y, X[, C]) to labels (Y, X); picklable if the engine leaves this process.
        output_path: The zarr array to write.
        settings: What decides the result.
        engine: Who works.
        merge_options: Options of `merge_instance_segmentation_3d`; None leaves planes as they are.
        retries: How often a failing block is tried again.
        overwrite: Whether to replace what was made with other settings.
    """
    engine = LocalEngine() if engine is None else engine
    prepare_folder(output_path)
    with one_at_a_time(output_path):
        if is_done(output_path, settings, overwrite):
            logger.info("%s exists and was made with the same settings.", output_path)
            yield Step(len(grid), len(grid), "Segment blocks")
            return zarr.open_array(str(output_path), mode="r")
        return (yield from _block_steps(
            source, grid, segment, output_path, settings, engine, merge_options, retries, overwrite
        ))


def _block_steps(
    source: ImageSource, grid: BlockGrid, segment: Callable, output_path: Path, settings: dict[str, Any],
    engine: Engine, merge_options: Mapping[str, Any] | None, retries: int, overwrite: bool,
) -> Steps[zarr.Array]:
    work = WorkFolder(output_path.with_name(f"{output_path.name}.blocks"), settings, overwrite)
    folder = str(work.path)

    missing = [block.id for block in grid if block.id not in work.done]
    if len(missing) < len(grid):
        logger.info("%i of %i blocks were finished before.", len(grid) - len(missing), len(grid))
    yield from work_steps(
        engine, SegmentBlock(source, grid, folder, segment), missing, len(grid), "Segment blocks", work.note, retries
    )
    counts = np.array([work.done[k]["n_objects"] for k in range(len(grid))])
    finals = yield from _final_ids(engine, grid, folder, counts, retries)

    painted = work.path / "labels.zarr"
    _create(painted, grid, max((int(final.max()) for final in finals), default=0))
    items = list(enumerate(finals))
    paint = PaintBlock(grid, folder, str(painted))
    yield from work_steps(engine, paint, items, len(items), "Write labels", lambda item, result: None, retries)
    if merge_options is not None:
        slices, merged = zarr.open_array(str(painted), mode="r"), work.path / "merged.zarr"
        target = _create(merged, grid, int(counts.sum()))
        yield from merge_steps(slices, output=target, ids_per_slice=True, **merge_options)
        painted = merged
    return _publish(painted, output_path, settings, work)


def _final_ids(
    engine: Engine, grid: BlockGrid, folder: str, counts: np.ndarray, retries: int
) -> Steps[list[np.ndarray]]:
    """The final ids of each block; those of each plane of a stack count from 1."""
    neighbours: dict[int, list[int]] = {}
    for a, b in grid.neighbours():
        neighbours.setdefault(a, []).append(b)
    items = [(k, [ids[b] for b in neighbours.get(k - ids[0], [])]) for ids in grid.planes() for k in ids]
    found: dict[int, tuple] = {}
    yield from work_steps(
        engine, MatchBlock(grid, folder), items, len(items), "Join objects of blocks",
        lambda item, result: found.__setitem__(item[0], result), retries,
    )
    finals: list[np.ndarray] = []
    for ids in grid.planes():
        matches = [(a - ids[0], b - ids[0], pairs) for k in ids for a, b, pairs in found[k][1]]
        finals += joined_ids(counts[ids.start:ids.stop], [found[k][0] for k in ids], matches)
    return finals


def _create(path: Path, grid: BlockGrid, n_ids: int) -> zarr.Array:
    """A zarr array whose chunks lie within blocks."""
    dtype = next(t for t in ("uint16", "uint32", "uint64") if n_ids <= np.iinfo(t).max)
    chunks = tuple(_chunk_side(side) for side in grid.tiling.tile_shape)
    with writing(path):
        return zarr.create_array(
            str(path), shape=grid.shape, dtype=dtype, chunks=(*[1] * (len(grid.shape) - 2), *chunks), overwrite=True
        )


def _chunk_side(block: int) -> int:
    """The largest divisor of a side of blocks up to 1024; the side itself if that is tiny."""
    side = next(block // k for k in range(math.ceil(block / _CHUNK_SIDE), block + 1) if block % k == 0)
    return side if side >= 64 else block


def _publish(labels: Path, output_path: Path, settings: dict[str, Any], work: WorkFolder) -> zarr.Array:
    """Move finished labels to their place."""
    array = zarr.open_array(str(labels), mode="r+")
    array.attrs.update(label_record(_highest_id(array), settings))
    with writing(output_path):
        if output_path.exists():  # a folder cannot replace a folder in one step
            os.replace(output_path, work.path / "replaced.zarr")
        os.replace(labels, output_path)
    work.remove()
    return zarr.open_array(str(output_path), mode="r")


def _highest_id(array: zarr.Array) -> int:
    return max((int(array.blocks[index].max()) for index in np.ndindex(*array.cdata_shape)), default=0)
