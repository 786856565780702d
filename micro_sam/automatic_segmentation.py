"""From an image file to an instance segmentation: the one-liner `segment`, and the steps behind it."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from segment_anything import SamPredictor

from .core.errors import InvalidInputError, UnsupportedError
from .core.image import LazyImage, open_image
from .core.output import is_done, label_path, prepare_folder, read_labels, write_labels
from .core.progress import drain
from .embeddings.encode import ImageEmbeddings, embedding_steps
from .segmentation.settings import check_options, generate_options, init_options, is_tiled, mode_of
from .segmentation.workflow import (
    Segmenter,
    find_model,
    load_model,
    output_settings,
    plan_image,
    resolve_model,
    segmentation_steps,
    with_decoder,
)

logger = logging.getLogger(__name__)

_NOT_YET_3D = (
    "Segmenting volumes and tracking are not part of this version yet. What works: 2D images, one plane of a stack "
    "(pass image[z]), and embeddings of whole stacks (micro_sam.precompute_embeddings -n 3)."
)


def get_predictor_and_segmenter(
    model_type: str,
    checkpoint: str | os.PathLike | None = None,
    device: str | None = None,
    segmentation_mode: Literal["amg", "ais", "apg"] | None = None,
    is_tiled: bool = False,
    predictor: SamPredictor | None = None,
    state: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[SamPredictor, Segmenter]:
    """Load a model and create a segmenter for it.

    Args:
        model_type: The name of the model, see `util.get_model_names`; or the architecture of the checkpoint.
        checkpoint: A checkpoint instead of a published model.
        device: The device; None chooses it. With a predictor its device is used.
        segmentation_mode: `amg`, `ais` or `apg`. None or `auto` takes `ais` if the model has a decoder, else `amg`.
        is_tiled: Whether to segment with tiles.
        predictor: A predictor that is loaded already; needs `state`.
        state: The state that `get_sam_model(..., return_state=True)` gave with the predictor.
        kwargs: Options of the segmenter's class, for example `points_per_side` for `amg`.

    Returns:
        The predictor and the segmenter.

    Raises:
        UnknownModelError: If there is no such model; names the nearest ones.
        ModelError: If the model was not trained for the mode, or has no decoder and needs one.
        InvalidInputError: For unknown modes or options, or a predictor without state.
    """
    if predictor is None:
        if state is not None:
            raise InvalidInputError("state belongs to a predictor: pass both or none of predictor and state.")
        find_model(model_type, checkpoint, segmentation_mode)
        if segmentation_mode not in (None, "auto"):
            mode = segmentation_mode.lower()
            check_options(kwargs, init_options(mode, is_tiled), f"the segmentation mode {mode!r}")
        model = load_model(model_type, checkpoint, device, segmentation_mode)
    else:
        if state is None:
            raise InvalidInputError(
                "A predictor was given without its state. Pass the state that get_sam_model(..., return_state=True) "
                "returns, which holds the decoder."
            )
        model = with_decoder(predictor, state, segmentation_mode, device)
    check_options(kwargs, init_options(model.mode, is_tiled), f"the segmentation mode {model.mode!r}")
    return model.predictor, model.segmenter(is_tiled, **kwargs)


def check_2d(image: LazyImage) -> None:
    """Raise `UnsupportedError` for a stack."""
    if image.ndim == 3:
        raise UnsupportedError(
            f"{image.name} is three-dimensional (axes {image.axes}, shape {tuple(image.data.shape)}). {_NOT_YET_3D} "
            "If the first axis holds channels, say so: axes='CYX' (--axes CYX) and choose one with channel (--channel)."
        )


def automatic_instance_segmentation(
    predictor: SamPredictor,
    segmenter: Segmenter,
    input_path: str | os.PathLike | np.ndarray,
    output_path: str | os.PathLike | None = None,
    embedding_path: str | os.PathLike | None = None,
    mask_path: str | os.PathLike | np.ndarray | None = None,
    key: str | None = None,
    mask_key: str | None = None,
    ndim: int | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    verbose: bool = True,
    return_embeddings: bool = False,
    annotate: bool = False,
    batch_size: int = 1,
    *,
    overwrite: bool = False,
    channel: int | None = None,
    axes: str | None = None,
    time: int | None = None,
    level: int | None = None,
    series: int | None = None,
    embedding_options: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> np.ndarray | tuple[np.ndarray, ImageEmbeddings]:
    """Segment the objects in an image.

    Args:
        predictor: The predictor.
        segmenter: The segmenter, see `get_predictor_and_segmenter`.
        input_path: The image: a path (see `core.image.open_image` for the formats) or an array (Y, X[, C]).
        output_path: Where to write the labels: `.tif` (appended if the name has no such suffix), `.zarr` or
            `.ome.zarr`. If the output exists and was made with the same settings, it is loaded.
        embedding_path: Where to keep the embeddings, a zarr folder; None keeps them in memory.
        mask_path: Path or array (Y, X): only tiles that touch a non-zero pixel are processed. Needs tiles.
        key: Name of the image in a container, see `open_image`.
        mask_key: Name of the mask in a container.
        ndim: 2, to confirm that a third axis holds channels.
        tile_shape: Tile shape (y, x) in pixels, for a tiled segmenter.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        verbose: Whether to show progress.
        return_embeddings: Whether to return the embeddings as well.
        annotate: Not supported yet.
        batch_size: Tiles per call of the network.
        overwrite: Whether to replace an existing output that was made with other settings.
        channel: Which channel to take.
        axes: Names of the axes, if the file does not tell, for example `CYX`.
        time: Which time point to take.
        level: Which level of a pyramid to take.
        series: Which image to take of a file with several ones.
        embedding_options: More options of `precompute_image_embeddings`, for example `normalization`.
        generate_kwargs: Options of `segmenter.generate`.

    Returns:
        Labels (Y, X), uint64 for AIS and uint32 else, 0 is background; and the embeddings if asked for.

    Raises:
        UnsupportedError: For volumes and for `annotate`.
        OutputExistsError: If the output exists and was made with other settings.
        InvalidInputError: If arguments do not fit, see also `open_image`.
    """
    if annotate:
        raise UnsupportedError("annotate needs the annotation tools, which are not part of this version yet.")
    mode, tiled = mode_of(segmenter), is_tiled(segmenter)
    check_options(generate_kwargs, generate_options(mode, tiled), f"the segmentation mode {mode!r}")
    if tiled != (tile_shape is not None):
        raise InvalidInputError(
            f"The segmenter is {type(segmenter).__name__}, but tile_shape is {tile_shape}. "
            f"{'Pass tile_shape' if tiled else 'Leave tile_shape out'}, or create a segmenter with "
            f"is_tiled={not tiled}."
        )
    choice = {"axes": axes, "channel": channel, "time": time, "level": level, "series": series}
    image = open_image(input_path, key, ndim=ndim, **choice)
    check_2d(image)
    mask = None
    if mask_path is not None:
        if not tiled:
            raise InvalidInputError("A mask selects tiles: pass tile_shape and a tiled segmenter, or leave it out.")
        mask = open_image(mask_path, mask_key).read()
    # Tiles are read from the file when needed; a plane is needed as a whole.
    data = image.data if tiled else image.read()

    work = {
        "tile_shape": tile_shape, "halo": halo, "mask": mask, "embedding_options": embedding_options,
        **generate_kwargs,
    }
    settings = None
    if output_path is not None:
        output_path = label_path(output_path)
        settings = output_settings(predictor, segmenter, data, **work)
        if is_done(output_path, settings, overwrite):
            logger.info("%s exists and was made with the same settings; it is loaded.", output_path)
            return _load_done(predictor, data, output_path, mode, return_embeddings, embedding_path, batch_size, work)
        prepare_folder(output_path)
    steps = segmentation_steps(predictor, segmenter, data, embedding_path=embedding_path, batch_size=batch_size, **work)
    labels, embeddings = drain(steps, verbose=verbose)
    if output_path is not None:
        write_labels(output_path, labels, settings, scale=image.scale)
    return (labels, embeddings) if return_embeddings else labels


def _load_done(predictor, image, output_path: Path, mode: str, return_embeddings, embedding_path, batch_size, work):
    labels = read_labels(output_path).astype(np.uint64 if mode == "ais" else np.uint32)
    if not return_embeddings:
        return labels
    steps = embedding_steps(
        predictor, image, embedding_path, ndim=2, tile_shape=work["tile_shape"], halo=work["halo"],
        batch_size=batch_size, mask=work["mask"], **(work["embedding_options"] or {}),
    )
    return labels, drain(steps, verbose=False)


def automatic_tracking(
    predictor: SamPredictor,
    segmenter: Segmenter,
    input_path: str | os.PathLike | np.ndarray,
    output_path: str | os.PathLike | None = None,
    embedding_path: str | os.PathLike | None = None,
    key: str | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    verbose: bool = True,
    return_embeddings: bool = False,
    annotate: bool = False,
    batch_size: int = 1,
    mode: str = "greedy",
    tracking_model: str = "general_2d",
    **generate_kwargs: Any,
) -> tuple[np.ndarray, list[dict]]:
    """Track objects over time. Not part of this version yet.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(_NOT_YET_3D)


def segment(
    image: Any,
    model: str | None = None,
    mode: str = "auto",
    *,
    checkpoint: str | os.PathLike | None = None,
    key: str | None = None,
    axes: str | None = None,
    channel: int | None = None,
    time: int | None = None,
    level: int | None = None,
    series: int | None = None,
    tile_shape: Sequence[int] | Literal["auto"] | None = "auto",
    halo: Sequence[int] | None = None,
    device: str | None = None,
    embedding_path: str | os.PathLike | None = None,
    batch_size: int = 1,
    verbose: bool = False,
    **generate_kwargs: Any,
) -> np.ndarray:
    """Segment the objects in an image, in one line.

    Args:
        image: A path (tif, png, jpg, OME-Zarr, zarr, hdf5, mrc, czi …) or an array (Y, X[, C]), may be lazy.
        model: Name of the model, see `micro_sam.util.get_model_names`. None takes `vit_b_lm` if it was downloaded
            before, else `vit_t_lite`, which comes with the package and segments nuclei.
        mode: `ais`, `apg`, `amg`, or `auto` for the best one that the model has.
        checkpoint: A checkpoint of your own, instead of a published model.
        key: Name of the image in a container.
        axes: Names of the axes, if the file does not tell, for example `CYX`.
        channel: Which channel to take.
        time: Which time point to take.
        level: Which level of a pyramid to take.
        series: Which image to take of a file with several ones.
        tile_shape: Tile shape (y, x) in pixels; None shrinks the image to what the model sees at once; `auto` tiles
            large images, see `segmentation.workflow.choose_strategy`.
        halo: Overlap (y, x) of the tiles in pixels.
        device: The device; None chooses it.
        embedding_path: Where to keep the embeddings; None keeps them in memory.
        batch_size: Tiles per call of the network.
        verbose: Whether to show progress.
        generate_kwargs: Options of the mode, for example `min_size=50`, or `points_per_side=16` for `amg`.

    Returns:
        Labels (Y, X), 0 is background, uint64 for `ais` and uint32 else. All zero if nothing was found.

    Raises:
        MissingFileError, ImageReadError, InvalidInputError: If the image cannot be read or used.
        UnknownModelError: If there is no such model.
        UnsupportedError: For volumes.

    Example:
        >>> import micro_sam
        >>> labels = micro_sam.segment("cells.tif")  # doctest: +SKIP
    """
    model = resolve_model(model, checkpoint)
    find_model(model, checkpoint, mode)
    opened = open_image(image, key, axes=axes, channel=channel, time=time, level=level, series=series)
    check_2d(opened)
    loaded = load_model(model, checkpoint, device, mode)
    plan = plan_image(loaded, opened.shape, tile_shape, halo, generate_kwargs, None if checkpoint else model)
    data = opened.data if plan.work["tile_shape"] is not None else opened.read()
    steps = segmentation_steps(
        plan.model.predictor, plan.segmenter, data, embedding_path=embedding_path, batch_size=batch_size, **plan.work
    )
    return drain(steps, verbose=verbose)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.automatic_segmentation`."""
    from importlib import import_module

    # The commands are a layer above this one; only this old entry point looks up.
    return import_module("micro_sam.cli.automatic_segmentation").main(argv)
