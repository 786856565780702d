"""From an image file to an instance segmentation: the one-liner `segment`, and the steps behind it."""

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from segment_anything import SamPredictor

from .core.errors import InvalidInputError, MissingPackageError, UnsupportedError
from .core.image import LazyImage, open_image
from .core.output import is_done, label_path, label_stem, prepare_folder, read_labels, write_labels
from .core.progress import drain
from .embeddings.encode import ImageEmbeddings, embedding_steps
from .segmentation.settings import check_options, check_tiled, generate_options, init_options, is_tiled, mode_of
from .segmentation.workflow import (
    LoadedModel,
    Segmenter,
    find_model,
    load_model,
    plan_image,
    resolve_model,
    with_decoder,
)
from .tracking.workflow import automatic_tracking_implementation
from .volume.images import VOLUME_OPTIONS, image_settings, image_steps, split_options

logger = logging.getLogger(__name__)

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


def describe_stack(image: LazyImage) -> str | None:
    """Say how a stack is understood: files often call planes frames, and channels are easily taken for planes."""
    if image.ndim == 2:
        return None
    what = "frames (axis T) are taken for planes," if image.axes[0] == "T" else "planes are"
    return (
        f"{image.name} (axes {image.axes}, shape {tuple(image.data.shape)}): its {image.shape[0]} {what} segmented and "
        "merged to 3D objects. If they are channels, say so with axes (CYX) and choose one with channel; to follow "
        "objects over time use tracking."
    )


def _note_stack(image: LazyImage) -> None:
    if note := describe_stack(image):
        logger.info(note)


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
    """Segment the objects in an image or a volume.

    Args:
        predictor: The predictor.
        segmenter: The segmenter, see `get_predictor_and_segmenter`.
        input_path: The image: a path (see `core.image.open_image` for the formats) or an array (Y, X[, C]) or
            (Z, Y, X[, C]), may be lazy. A volume is segmented plane by plane and merged, see
            `multi_dimensional_segmentation.automatic_3d_segmentation`.
        output_path: Where to write the labels: `.tif` (appended if the name has no such suffix), `.zarr` or
            `.ome.zarr`. If the output exists and was made with the same settings, it is loaded.
        embedding_path: Where to keep the embeddings, a zarr folder; None keeps them in memory.
        mask_path: Path or array ([Z, ]Y, X): only tiles that touch a non-zero pixel are processed. Needs tiles.
        key: Name of the image in a container, see `open_image`.
        mask_key: Name of the mask in a container.
        ndim: 2 or 3, channels not counted, if shape and file leave it open.
        tile_shape: Tile shape (y, x) in pixels, for a tiled segmenter.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        verbose: Whether to show progress.
        return_embeddings: Whether to return the embeddings as well.
        annotate: Whether to correct the labels in an annotator before they are returned and written. What was segmented
            automatically is kept beside the output as `<name>_automatic.tif`. It needs napari and a screen.
        batch_size: Planes or tiles per call of the networks.
        overwrite: Whether to replace an existing output that was made with other settings.
        channel: Which channel to take.
        axes: Names of the axes, if the file does not tell, for example `CYX`.
        time: Which time point to take.
        level: Which level of a pyramid to take.
        series: Which image to take of a file with several ones.
        embedding_options: More options of `precompute_image_embeddings`, for example `normalization`.
        generate_kwargs: Options of `segmenter.generate`; for volumes also `gap_closing`, `min_z_extent`,
            `with_background`, `beta`, `neck_penalty` and `mask_with_background`, see `automatic_3d_segmentation`.

    Returns:
        Labels (Y, X) or (Z, Y, X), uint64 for AIS and volumes and uint32 else, 0 is background; and the embeddings if
        asked for.

    Raises:
        MissingPackageError: For `annotate` without napari.
        OutputExistsError: If the output exists and was made with other settings.
        InvalidInputError: If arguments do not fit, see also `open_image`.
    """
    correct_labels = find_correction() if annotate else None
    mode, tiled = mode_of(segmenter), is_tiled(segmenter)
    known = {**generate_options(mode, tiled), **dict.fromkeys((*VOLUME_OPTIONS, "with_background"))}
    check_options(generate_kwargs, known, f"the segmentation mode {mode!r}")
    check_tiled(segmenter, tile_shape)
    choice = {"axes": axes, "channel": channel, "time": time, "level": level, "series": series}
    image = open_image(input_path, key, ndim=ndim, **choice)
    _note_stack(image)
    volume_options, generate_kwargs = split_options(generate_kwargs, image.ndim)
    check_options(generate_kwargs, generate_options(mode, tiled), f"the segmentation mode {mode!r}")
    mask = None
    if mask_path is not None:
        if not tiled:
            raise InvalidInputError("A mask selects tiles: pass tile_shape and a tiled segmenter, or leave it out.")
        mask = open_image(mask_path, mask_key).read()
    work = {
        "tile_shape": tile_shape, "halo": halo, "mask": mask, "embedding_options": embedding_options,
        **generate_kwargs,
    }
    settings = None
    if output_path is not None:
        output_path = label_path(output_path)
        settings = image_settings(predictor, segmenter, image, volume_options, work)
        if is_done(output_path, settings, overwrite):
            logger.info("%s exists and was made with the same settings; it is loaded.", output_path)
            return _load_done(predictor, image, output_path, mode, return_embeddings, embedding_path, batch_size, work)
        prepare_folder(output_path)
    steps = image_steps(
        predictor, segmenter, image, volume_options, work, embedding_path=embedding_path,
        return_embeddings=return_embeddings or annotate, batch_size=batch_size,
    )
    labels, embeddings = drain(steps, verbose=verbose)

    def write(final: np.ndarray) -> Path | None:
        return None if output_path is None else write_labels(output_path, final, settings, scale=image.scale)

    if correct_labels is None:
        write(labels)
    else:
        if output_path is not None:
            write_labels(automatic_path(output_path), labels, settings, scale=image.scale)
        model = LoadedModel(predictor, getattr(segmenter, "_decoder", None), mode)
        labels = correct_labels(
            image.data, labels, model, write, has_channels=image.has_channels, name=image.name,
            image_embeddings=embeddings,
        )
    return (labels, embeddings) if return_embeddings else labels


def automatic_path(output_path: Path) -> Path:
    """Where labels are kept that were corrected afterwards."""
    return output_path.with_name(f"{label_stem(output_path)}_automatic.tif")


def find_correction() -> Callable[..., np.ndarray]:
    """Return `sam_annotator.correction.correct_labels`; looked up by name, as the annotators are built on this module.

    Raises:
        MissingPackageError: If napari is not installed.
    """
    try:
        return importlib.import_module(".sam_annotator.correction", __package__).correct_labels
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Correcting labels needs napari, and {error.name} is not installed: pip install \"micro_sam[gui]\"."
        ) from error


def _load_done(
    predictor, image: LazyImage, output_path: Path, mode: str, return_embeddings, embedding_path, batch_size, work
):
    is_long = mode == "ais" or image.ndim == 3
    labels = read_labels(output_path).astype(np.uint64 if is_long else np.uint32)
    if not return_embeddings:
        return labels
    steps = embedding_steps(
        predictor, image.data, embedding_path, lazy_loading=True, ndim=image.ndim, tile_shape=work["tile_shape"],
        halo=work["halo"], batch_size=batch_size, mask=work["mask"], **(work["embedding_options"] or {}),
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
    tracking_model: str | os.PathLike = "general_2d",
    *,
    overwrite: bool = False,
    channel: int | None = None,
    axes: str | None = None,
    level: int | None = None,
    series: int | None = None,
    embedding_options: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> tuple[np.ndarray, list[dict]] | tuple[np.ndarray, list[dict], ImageEmbeddings]:
    """Segment each frame of a time series and track the objects.

    Args:
        predictor: The predictor.
        segmenter: The segmenter, see `get_predictor_and_segmenter`.
        input_path: The time series: a path or an array (T, Y, X[, C]), may be lazy.
        output_path: A folder for the tracks in the format of the Cell Tracking Challenge, see `tracking.ctc`.
        embedding_path: Where to keep the embeddings, a zarr folder.
        key: Name of the time series in a container, or a pattern for a folder whose files are the frames.
        tile_shape: Tile shape (y, x) in pixels, for a tiled segmenter.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        verbose: Whether to show progress.
        return_embeddings: Whether to return the embeddings as well.
        annotate: Not supported: open the tracks with `sam_annotator.annotator_tracking`, which imports CTC folders.
        batch_size: Frames or tiles per call of the networks.
        mode: `greedy` with divisions, `greedy_nodiv` without, or `ilp`, see `track_across_frames`.
        tracking_model: Who links, see `track_across_frames`.
        overwrite: Whether to replace tracks in the output folder.
        channel: Which channel to take.
        axes: Names of the axes, if the file does not tell, for example `TYX`.
        level: Which level of a pyramid to take.
        series: Which image to take of a file with several ones.
        embedding_options: More options of `precompute_image_embeddings`, for example `normalization`.
        generate_kwargs: Options of `segmenter.generate`, and `gap_closing` and `min_time_extent`, see
            `track_across_frames`.

    Returns:
        Tracks (T, Y, X), uint32, and lineages, see `track_across_frames`; and the embeddings if asked for.

    Raises:
        UnsupportedError: For `annotate`, or if the linker is not installed or does not have the mode.
        OutputExistsError: If the output folder holds something.
        InvalidInputError: If arguments do not fit, see also `open_image`.
    """
    if annotate:
        raise UnsupportedError(
            "Tracks are corrected in the annotator: leave out annotate, write the tracks to output_path, and import "
            "that folder in micro_sam.annotator_tracking."
        )
    image = open_image(input_path, key, ndim=3, axes=axes, channel=channel, level=level, series=series)
    return automatic_tracking_implementation(
        image.data, predictor, segmenter, embedding_path, mode=mode, tracking_model=tracking_model,
        tile_shape=tile_shape, halo=halo, verbose=verbose, return_embeddings=return_embeddings, batch_size=batch_size,
        output_folder=output_path, overwrite=overwrite, embedding_options=embedding_options, **generate_kwargs,
    )


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
    precision: str | None = None,
    embedding_path: str | os.PathLike | None = None,
    batch_size: int = 1,
    verbose: bool = False,
    **generate_kwargs: Any,
) -> np.ndarray:
    """Segment the objects in an image or a volume, in one line.

    Args:
        image: A path (tif, png, jpg, OME-Zarr, zarr, hdf5, mrc, czi …) or an array (Y, X[, C]) or (Z, Y, X[, C]), may
            be lazy.
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
        precision: `float32` or `auto`, see `get_sam_model`; None takes what the user has chosen.
        embedding_path: Where to keep the embeddings; None keeps them in memory.
        batch_size: Planes or tiles per call of the networks.
        verbose: Whether to show progress.
        generate_kwargs: Options of the mode, for example `min_size=50`, or `points_per_side=16` for `amg`; for volumes
            also those of `automatic_3d_segmentation`, for example `min_z_extent=3`.

    Returns:
        Labels (Y, X) or (Z, Y, X), 0 is background, uint64 for `ais` and volumes and uint32 else. All zero if nothing
        was found.

    Raises:
        MissingFileError, ImageReadError, InvalidInputError: If the image cannot be read or used.
        UnknownModelError: If there is no such model.

    Example:
        >>> import micro_sam
        >>> labels = micro_sam.segment("cells.tif")  # doctest: +SKIP
    """
    model = resolve_model(model, checkpoint)
    find_model(model, checkpoint, mode)
    opened = open_image(image, key, axes=axes, channel=channel, time=time, level=level, series=series)
    _note_stack(opened)
    volume_options, generate_kwargs = split_options(generate_kwargs, opened.ndim)
    loaded = load_model(model, checkpoint, device, mode, precision)
    name = None if checkpoint else model
    plan = plan_image(loaded, opened.shape[-2:], tile_shape, halo, generate_kwargs, name, embedding_path)
    steps = image_steps(
        plan.model.predictor, plan.segmenter, opened, volume_options, plan.work, embedding_path=embedding_path,
        batch_size=batch_size,
    )
    return drain(steps, verbose=verbose)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.automatic_segmentation`."""
    from importlib import import_module

    # The commands are a layer above this one; only this old entry point looks up.
    return import_module("micro_sam.cli.automatic_segmentation").main(argv)
