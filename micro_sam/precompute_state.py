"""Embeddings and segmentation state of images, computed ahead of annotation and kept next to each other."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from .core.errors import InvalidInputError, MicroSamError
from .core.image import LazyImage, open_image
from .core.inputs import InputFile, find_inputs, has_pattern, name_outputs
from .core.output import prepare_folder
from .core.progress import Step, Steps, drain
from .embeddings.encode import ImageEmbeddings, embedding_steps
from .embeddings.signature import compute_data_signature
from .models.specs import DEFAULT_MODEL
from .segmentation.ais import InstanceSegmentationWithDecoder
from .segmentation.amg import AMGBase
from .segmentation.factory import get_instance_segmentation_generator
from .segmentation.planes import select_plane
from .segmentation.settings import check_options, full_options, init_options, model_settings
from .segmentation.state_files import read_amg_state, read_maps, write_amg_state, write_maps
from .segmentation.workflow import LoadedModel, initialize_steps, load_model


def _plane_shape(image_embeddings: ImageEmbeddings) -> tuple[int, int]:
    if image_embeddings["input_size"] is None:
        return tuple(int(s) for s in image_embeddings["features"].attrs["shape"])
    return tuple(int(s) for s in image_embeddings["original_size"])


def _tiling(image_embeddings: ImageEmbeddings) -> dict[str, Any]:
    if image_embeddings["input_size"] is not None:
        return {"tile_shape": None, "halo": None}
    attrs = image_embeddings["features"].attrs
    return {name: [int(v) for v in attrs[name]] for name in ("tile_shape", "halo")}


def _settings(segmenter, predictor, decoder, plane, image_embeddings, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a state must agree with: model, decoder, pixels, tiling, and the options of the class."""
    return {
        **model_settings(predictor, decoder),
        "image": compute_data_signature(plane),
        "shape": list(_plane_shape(image_embeddings)),
        **_tiling(image_embeddings),
        "options": full_options(type(segmenter), kwargs),
    }


def amg_state_steps(
    predictor: SamPredictor,
    raw: np.ndarray,
    image_embeddings: ImageEmbeddings,
    save_path: str | os.PathLike,
    i: int | None = None,
    **kwargs: Any,
) -> Steps[AMGBase]:
    """Generator behind `cache_amg_state`."""
    tiled = image_embeddings["input_size"] is None
    check_options(kwargs, init_options("amg", tiled), "the segmentation mode 'amg'")
    segmenter = get_instance_segmentation_generator(predictor, tiled, segmentation_mode="amg", **kwargs)
    plane = select_plane(raw, i, _plane_shape(image_embeddings))
    settings = _settings(segmenter, predictor, None, plane, image_embeddings, kwargs)
    state = read_amg_state(Path(save_path), i, settings)
    if state is None:
        yield from initialize_steps(segmenter, plane, image_embeddings, i=i)
        write_amg_state(Path(save_path), i, segmenter.get_state(), settings)
    else:
        segmenter.set_state(state)
    return segmenter


def cache_amg_state(
    predictor: SamPredictor,
    raw: np.ndarray,
    image_embeddings: ImageEmbeddings,
    save_path: str | os.PathLike,
    verbose: bool = True,
    i: int | None = None,
    **kwargs: Any,
) -> AMGBase:
    """Compute the state of the automatic mask generator and keep it, or load it.

    Args:
        predictor: The predictor.
        raw: The image (Y, X[, C]), or with `i` its plane; a stack is accepted too.
        image_embeddings: The embeddings, of the image or the stack.
        save_path: The folder of the embeddings. The state is `amg_state.npz`, or `amg_state/state-<i>.npz`.
        verbose: Whether to show progress.
        i: The plane, for embeddings of a stack.
        kwargs: Options of the mask generator, for example `points_per_side`.

    Returns:
        The initialized mask generator; tiled if the embeddings are.

    Raises:
        EmbeddingMismatchError: If the state that is there was computed with another model or other options.
        EmbeddingCacheError: If it is damaged.
        UnsafeCheckpointError: If a state of an older version holds more than arrays.
    """
    return drain(amg_state_steps(predictor, raw, image_embeddings, save_path, i, **kwargs), verbose=verbose)


def is_state_steps(
    predictor: SamPredictor,
    decoder: torch.nn.Module,
    raw: np.ndarray,
    image_embeddings: ImageEmbeddings,
    save_path: str | os.PathLike,
    i: int | None = None,
    skip_load: bool = False,
    **kwargs: Any,
) -> Steps[InstanceSegmentationWithDecoder | None]:
    """Generator behind `cache_is_state`."""
    tiled = image_embeddings["input_size"] is None
    check_options(kwargs, init_options("ais", tiled), "the segmentation mode 'ais'")
    segmenter = get_instance_segmentation_generator(predictor, tiled, decoder, "ais", **kwargs)
    shape = _plane_shape(image_embeddings)
    plane = select_plane(raw, i, shape)
    settings = _settings(segmenter, predictor, decoder, plane, image_embeddings, kwargs)
    maps = read_maps(Path(save_path), i, shape, settings)
    if maps is not None and skip_load:
        return None
    if maps is None:
        yield from initialize_steps(segmenter, plane, image_embeddings, i=i)
        write_maps(Path(save_path), i, segmenter.get_state(), settings)
    else:
        segmenter.set_state({**maps, "image_embeddings": image_embeddings, "i": i})
    return segmenter


def cache_is_state(
    predictor: SamPredictor,
    decoder: torch.nn.Module,
    raw: np.ndarray,
    image_embeddings: ImageEmbeddings,
    save_path: str | os.PathLike,
    verbose: bool = True,
    i: int | None = None,
    skip_load: bool = False,
    **kwargs: Any,
) -> InstanceSegmentationWithDecoder | None:
    """Compute the maps of the segmentation decoder and keep them, or load them.

    Args:
        predictor: The predictor.
        decoder: The decoder.
        raw: The image (Y, X[, C]), or with `i` its plane; a stack is accepted too.
        image_embeddings: The embeddings, of the image or the stack.
        save_path: The folder of the embeddings. The state is the group `state` or `state-<i>` of `is_state.h5`.
        verbose: Whether to show progress.
        i: The plane, for embeddings of a stack.
        skip_load: Whether to return None if the state is there.
        kwargs: Options of the segmenter's class.

    Returns:
        The initialized segmenter; tiled if the embeddings are.

    Raises:
        EmbeddingMismatchError: If the state that is there was computed with another model.
        EmbeddingCacheError: If it is damaged or locked.
    """
    steps = is_state_steps(predictor, decoder, raw, image_embeddings, save_path, i, skip_load, **kwargs)
    return drain(steps, verbose=verbose)


def precompute_steps(
    model: LoadedModel,
    image: LazyImage,
    store: str | os.PathLike,
    *,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    with_state: bool = False,
    batch_size: int = 1,
    overwrite: bool = False,
) -> Steps[ImageEmbeddings]:
    """Compute the embeddings of an image or stack, and the segmentation state of each plane if asked for.

    Yields `Step`; returns the embeddings. What is finished stays when the work is cancelled, and is not repeated.

    Args:
        model: The model.
        image: The image.
        store: The zarr folder.
        tile_shape: Tile shape (y, x) in pixels; None for no tiles.
        halo: Overlap (y, x) of the tiles in pixels.
        with_state: Whether to compute the state: of the decoder if there is one, else of the mask generator.
        batch_size: Planes or tiles per call of the encoder.
        overwrite: Whether to replace what was computed with other settings.
    """
    model = model.for_prompts(image.shape[-2:], tile_shape, halo, None if overwrite else store)
    embeddings = yield from embedding_steps(
        model.predictor, image.data, store, lazy_loading=True, ndim=image.ndim, tile_shape=tile_shape,
        halo=halo if tile_shape is not None else None, batch_size=batch_size, overwrite=overwrite,
    )
    if not with_state:
        return embeddings
    planes = [None] if image.ndim == 2 else range(image.shape[0])
    for done, i in enumerate(planes):
        yield Step(done, len(planes), "Compute segmentation state")
        plane = np.asarray(image.data[...] if i is None else image.data[i])
        if model.decoder is None:
            steps = amg_state_steps(model.predictor, plane, embeddings, store, i)
        else:
            steps = is_state_steps(model.predictor, model.decoder, plane, embeddings, store, i, skip_load=True)
        if len(planes) == 1:
            yield from steps
        else:  # one bar over the planes, none within
            for _ in steps:
                pass
    yield Step(len(planes), len(planes), "Compute segmentation state")
    return embeddings


def store_paths(
    input_path: str | os.PathLike, output_path: str | os.PathLike, pattern: str | None, key: str | None,
    recursive: bool = False,
) -> tuple[list[InputFile], list[Path]]:
    """Return the inputs and their zarr folders.

    One input goes to `<output_path>.zarr` (the suffix `.zarr` is appended if it is missing), those of a folder to
    `<output_path>/<name>.zarr`. A folder with a pattern as `key` is one stack.
    """
    path, output = Path(input_path).expanduser(), Path(output_path).expanduser()
    if pattern is None and path.is_dir() and key is not None and has_pattern(key):
        inputs = [InputFile(path)]
    else:
        inputs = find_inputs([path], pattern, recursive)
    if pattern is None and (len(inputs) == 1 and inputs[0].path == path):
        return inputs, [output if output.suffix == ".zarr" else output.with_name(f"{output.name}.zarr")]
    return inputs, name_outputs(inputs, output, ".zarr")


def precompute_state(
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    pattern: str | None = None,
    model_type: str = DEFAULT_MODEL,
    checkpoint_path: str | os.PathLike | None = None,
    key: str | None = None,
    ndim: int | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    precompute_amg_state: bool = False,
    *,
    channel: int | None = None,
    axes: str | None = None,
    device: str | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
    verbose: bool = True,
) -> None:
    """Compute and keep the embeddings of one or more images, and their segmentation state if asked for.

    Args:
        input_path: An image file, a container with `key`, or a folder.
        output_path: The zarr folder (`.zarr` is appended if missing), or for several images the folder for them.
        pattern: Which files of the folder to take.
        model_type: The name of the model.
        checkpoint_path: A checkpoint instead of a published model.
        key: Name of the image in a container; or a pattern for a folder whose files form one stack.
        ndim: 2 or 3, channels not counted, if the file does not tell.
        tile_shape: Tile shape (y, x) in pixels; None for no tiles.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        precompute_amg_state: Whether to compute the segmentation state as well.
        channel: Which channel to take.
        axes: Names of the axes, if the file does not tell.
        device: The device; None chooses it.
        batch_size: Planes or tiles per call of the encoder.
        overwrite: Whether to replace what was computed with other settings.
        verbose: Whether to show progress.

    Raises:
        MissingFileError: If the input does not exist or no file matches.
        InvalidInputError: If two inputs have the same output, or some images failed; the message says which and why.
    """
    inputs, stores = store_paths(input_path, output_path, pattern, key)
    images: list[LazyImage | MicroSamError] = [_try_open(file.path, key, ndim, channel, axes) for file in inputs]
    if len(images) == 1 and isinstance(images[0], MicroSamError):
        raise images[0]
    model = load_model(model_type, checkpoint_path, device)
    failures = []
    for file, image, store in zip(inputs, images, stores):
        try:
            if isinstance(image, MicroSamError):
                raise image
            prepare_folder(store)
            drain(
                precompute_steps(
                    model, image, store, tile_shape=tile_shape, halo=halo, with_state=precompute_amg_state,
                    batch_size=batch_size, overwrite=overwrite,
                ),
                verbose=verbose,
            )
        except MicroSamError as error:
            if len(inputs) == 1:
                raise
            failures.append(f"{file.path}: {error}")
    if failures:
        raise InvalidInputError(
            f"{len(failures)} of {len(inputs)} images failed, the others are complete.\n" + "\n".join(failures)
        )


def _try_open(path: Path, key, ndim, channel, axes) -> LazyImage | MicroSamError:
    try:
        return open_image(path, key, ndim=ndim, channel=channel, axes=axes)
    except MicroSamError as error:
        return error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.precompute_embeddings`."""
    from importlib import import_module

    # The commands are a layer above this one; only this old entry point looks up.
    return import_module("micro_sam.cli.precompute_embeddings").main(argv)
