"""Computing image embeddings: one generator for images, stacks and tiles, in memory and on disk."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr
from segment_anything import SamPredictor

from ..core.errors import EmbeddingCacheError, EmbeddingMismatchError, InvalidInputError, require_positive_int
from ..core.normalize import to_image
from ..core.progress import Step, Steps, drain
from ..models.precision import autocast, precision_of
from .cache import auto_cache_path, evict, touch
from .features import ImageEmbeddings, check_plane_index
from .memory import MemorySink, feature_shape
from .normalization import ItemReader, check_normalization
from .plan import EmbeddingPlan, Item, make_plan
from .signature import DataSignature, Signature, model_identity
from .store import (
    DTYPES,
    StoreSink,
    check_path,
    describe_layout,
    is_complete,
    load_embeddings,
    open_cache,
    read_group,
    remove_cache,
    write_lock,
)

__all__ = [
    "ImageEmbeddings", "compute_embeddings_batched", "embedding_steps", "load_embeddings",
    "precompute_image_embeddings", "set_precomputed", "to_image",
]


def _load(predictor: SamPredictor, image: np.ndarray) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Resize a uint8 image (H, W, 3) for the encoder: uint8 tensor (3, h, w), (H, W), (h, w)."""
    resized = predictor.transform.apply_image(image)
    tensor = torch.from_numpy(resized).permute(2, 0, 1)
    return tensor, tuple(image.shape[:2]), tuple(resized.shape[:2])


@torch.no_grad()
def _encode(predictor: SamPredictor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    model, device = predictor.model, predictor.device
    batch = torch.cat([model.preprocess(tensor[None].to(device)) for tensor in tensors])
    with autocast(precision_of(predictor), device):
        features = model.image_encoder(batch)
    return features.float()


def compute_embeddings_batched(
    predictor: SamPredictor, batched_images: Sequence[np.ndarray]
) -> tuple[torch.Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
    """Encode uint8 images (H, W, 3), which may differ in size, with one call of the encoder.

    The predictor is used, but an image that is set in it stays set.

    Args:
        predictor: The predictor.
        batched_images: The images, at least one.

    Returns:
        Features (B, 256, h, w) on the predictor's device, original sizes (H, W) and encoder input sizes (h, w).

    Raises:
        InvalidInputError: If there is no image or one is not uint8 (H, W, 3).
    """
    if len(batched_images) == 0:
        raise InvalidInputError("There is no image to encode: the batch is empty.")
    for image in batched_images:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise InvalidInputError(
                f"The encoder needs uint8 images (H, W, 3), but got {image.dtype} {image.shape}. Use to_image first."
            )
    tensors, original_sizes, input_sizes = zip(
        *(_load(predictor, image) for image in batched_images), strict=True
    )
    return _encode(predictor, tensors), list(original_sizes), list(input_sizes)


def embedding_steps(
    predictor: SamPredictor,
    input_: np.ndarray,
    save_path: str | os.PathLike | None = None,
    lazy_loading: bool = False,
    ndim: int | None = None,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    batch_size: int = 1,
    mask: np.ndarray | None = None,
    *,
    normalization: str | tuple = "tile",
    dtype: str | None = None,
    zarr_format: int = 3,
    overwrite: bool = False,
    data_signature: str | None = None,
    lock_timeout: float = 0.0,
    fill: Callable[..., Steps[None]] | None = None,
) -> Steps[ImageEmbeddings]:
    """Generator behind `precompute_image_embeddings`: yields `Step`, returns the embeddings.

    Closing it cancels the work; what is on disk by then is kept and the next call goes on from there. `fill` replaces
    the encoding in this process, for caches on disk (see `distributed`).
    """
    require_positive_int("batch_size", batch_size)
    if dtype not in (None, *DTYPES):
        raise InvalidInputError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    if zarr_format not in (2, 3):
        raise InvalidInputError(f"zarr_format must be 2 or 3, but got {zarr_format!r}.")
    plan = make_plan(input_, ndim, tile_shape, halo, mask, predictor.transform.target_length)
    normalization = check_normalization(normalization)
    read = ItemReader(input_, plan, normalization)

    if save_path is None:
        sink = MemorySink(predictor, plan)
        yield from _fill(predictor, plan, sink, read, batch_size)
        embeddings = sink.finish()
    else:
        signature = Signature(
            plan, model_identity(predictor), DataSignature(input_, data_signature), normalization,
            feature_shape(predictor),
        )
        path, is_auto = resolve_path(save_path, signature, dtype)
        cache = _cached(path, signature, dtype, overwrite)
        if cache is not None:
            yield from _report_done(plan)
        else:
            with write_lock(path, lock_timeout):
                # Another process may have finished it before we got the lock.
                cache = _cached(path, signature, dtype, overwrite)
                if overwrite:
                    remove_cache(path)
                if cache is not None:
                    yield from _report_done(plan)
                else:
                    if is_auto:
                        evict(keep=path, reserve=estimate_size(predictor, plan, dtype))
                    sink = StoreSink(path, predictor, plan, signature, dtype, zarr_format)
                    yield from (fill or _fill)(predictor, plan, sink, read, batch_size)
                    sink.finish()
        embeddings = load_embeddings(path, lazy_loading) if cache is None else read_group(cache, path, lazy_loading)
        if is_auto:
            touch(path)
            evict(keep=path)
    if plan.ndim == 2 and plan.tiling is None:
        set_precomputed(predictor, embeddings)
    return embeddings


def resolve_path(save_path: str | os.PathLike, signature: Signature, dtype: str | None) -> tuple[Path, bool]:
    if save_path != "auto":
        return Path(save_path).expanduser(), False
    # The model's name and the version of the package do not matter.
    attrs = signature.to_attributes()
    key = {name: attrs[name] for name in attrs if name not in ("data_signature", "model_name", "micro_sam_version")}
    key |= {"dtype": dtype or "float32", "feature_shape": list(signature.feature_shape)}
    return auto_cache_path(key), True


def _cached(path: Path, signature: Signature, dtype: str | None, overwrite: bool) -> zarr.Group | None:
    """Return the complete cache at `path` that fits, or None; an incomplete one must fit as well."""
    if overwrite:
        check_path(path)
        return None
    group = open_cache(path)
    if group is None:
        return None
    attrs, complete = dict(group.attrs), is_complete(group)
    if not complete and "complete" not in attrs:
        if "features" in group:
            raise EmbeddingCacheError(
                f"The embeddings in {path} were left incomplete by an older version, which does not note for which "
                "image and model. Compute them again with overwrite=True, delete the folder, or choose another path."
            )
        if attrs:
            raise EmbeddingCacheError(
                f"{path} is a zarr group with other content (attributes {', '.join(list(attrs)[:3])}) and not an "
                "embedding cache. Choose a new path."
            )
        return None
    signature.check(attrs, describe_layout(group, path), path)
    signature.check_precision(attrs, complete, path)
    found = attrs.get("dtype", "float32")
    if dtype not in (None, found):
        raise EmbeddingMismatchError(
            f"Embeddings in {path} are stored as {found}, but dtype={dtype} was asked for. "
            f"Leave out dtype, choose another path, or compute them again with overwrite=True."
        )
    return group if complete else None


def _report_done(plan: EmbeddingPlan) -> Steps[None]:
    total = len(plan.items)
    yield Step(0, total, _text(plan))
    if total:
        yield Step(total, total, _text(plan))


def estimate_size(predictor: SamPredictor, plan: EmbeddingPlan, dtype: str | None = None) -> int:
    """Upper bound of the size on disk in bytes."""
    return len(plan.items) * int(np.prod(feature_shape(predictor))) * np.dtype(dtype or "float32").itemsize


def _text(plan: EmbeddingPlan) -> str:
    return f"Compute image embeddings{' of tiles' if plan.tiling else ''}"


def _fill(
    predictor: SamPredictor, plan: EmbeddingPlan, sink, read: Callable[[Item], np.ndarray], batch_size: int
) -> Steps[None]:
    """Encode the items that the sink lacks. The next batch is read, and the last one written, meanwhile."""
    missing = [item for item in plan.items if not sink.is_done(item)]
    total, done = len(plan.items), len(plan.items) - len(missing)
    text = _text(plan)
    yield Step(0, total, text)
    if done:
        yield Step(done, total, text)
    batches = [missing[i:i + batch_size] for i in range(0, len(missing), batch_size)]

    def load(batch):
        return [_load(predictor, read(item))[0] for item in batch]

    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        ahead = reader.submit(load, batches[0]) if batches else None
        written = None
        for k, batch in enumerate(batches):
            tensors = ahead.result()
            if k + 1 < len(batches):
                ahead = reader.submit(load, batches[k + 1])
            features = _encode(predictor, tensors).cpu().numpy()
            if written is not None:
                written.result()
                done += len(batches[k - 1])
            # Handed over before the step: if the caller stops there, this batch is kept as well.
            written = writer.submit(sink.write, batch, features)
            if k > 0:
                yield Step(done, total, text)
        if written is not None:
            written.result()
            yield Step(total, total, text)
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()


def precompute_image_embeddings(
    predictor: SamPredictor,
    input_: np.ndarray,
    save_path: str | os.PathLike | None = None,
    lazy_loading: bool = False,
    ndim: int | None = None,
    tile_shape: tuple[int, int] | None = None,
    halo: tuple[int, int] | None = None,
    verbose: bool = True,
    batch_size: int = 1,
    mask: np.typing.ArrayLike | None = None,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
    *,
    normalization: str | tuple = "tile",
    dtype: str | None = None,
    zarr_format: int = 3,
    overwrite: bool = False,
    data_signature: str | None = None,
    lock_timeout: float = 0.0,
) -> ImageEmbeddings:
    """Compute the embeddings of an image, a stack (volume or time series) or their tiles; or load them.

    With a path, everything finished is kept on disk: an interrupted run goes on where it stopped, and memory
    does not grow with the number of planes or tiles. A lazy input is read item by item. The predictor is left
    ready for prompts for a 2D image without tiles; otherwise what was set in it before stays set.

    Args:
        predictor: The predictor.
        input_: Image (Y, X[, C]) or stack (Z, Y, X[, C]): numpy, dask, zarr, a memory map.
        save_path: Folder of the zarr cache, written or, if complete, checked and read. `auto` chooses a path in
            the cache directory by content, model and settings (see `embeddings.cache` for its size cap).
        lazy_loading: With a path, for stacks without tiles: return features that are read from disk when used,
            plane by plane, instead of an array with all of them. Tiles on disk are always read when used.
        ndim: 2 or 3, channels not counted. None derives it from the shape; a last axis of 3 or 4 counts as
            channels then, with a warning.
        tile_shape: Tile shape (y, x) in pixels; None for no tiling.
        halo: Overlap (y, x) in pixels by which tiles are enlarged on each side; None gives an eighth of the
            tile shape. Unused without `tile_shape`.
        verbose: Whether to show a progress bar.
        batch_size: Number of planes or tiles per call of the encoder.
        mask: Array of the spatial shape, for tiles: those whose outer block has no non-zero pixel are left out.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.
        normalization: How values become 0 to 255. `tile` stretches every plane or tile from its minimum to its
            maximum, `plane` clips every plane, and `image` the whole input, at the percentiles 0.1 and 99.9, so
            that neighbouring tiles agree; (lo, hi) is a fixed range, numbers or one per channel.
        dtype: `float32` (the default for new caches) or `float16` for the features on disk. They are always
            read as float32.
        zarr_format: 3 or 2, for a new cache.
        overwrite: Whether to delete what is in the cache and compute anew.
        data_signature: Signature of the image, to save hashing it: from `signature.compute_data_signature`, or
            any string that the caller uses for the same image each time.
        lock_timeout: Seconds to wait for another process that writes the same cache.

    Returns:
        A dictionary with `features`, `input_size` and `original_size`. 2D: float32 array (1, 256, h, w); stack:
        (Z, 1, 256, h, w); h = w = encoder size / 16. Tiles: a mapping from str(tile id) to such arrays, and both
        sizes are None; else `original_size` is (Y, X) and `input_size` that of the resized plane.

    Raises:
        InvalidInputError: For arguments that do not fit the input or each other, NaN or infinite values.
        EmbeddingMismatchError: If the cache belongs to other data, another model or other settings.
        EmbeddingCacheError: If the cache is damaged or being written by another process.
        OutputWriteError: If the cache cannot be written.
    """
    steps = embedding_steps(
        predictor, input_, save_path, lazy_loading, ndim, tile_shape, halo, batch_size, mask,
        normalization=normalization, dtype=dtype, zarr_format=zarr_format, overwrite=overwrite,
        data_signature=data_signature, lock_timeout=lock_timeout,
    )
    return drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)


def set_precomputed(
    predictor: SamPredictor, image_embeddings: ImageEmbeddings, i: int | None = None, tile_id: int | None = None
) -> SamPredictor:
    """Give a predictor precomputed embeddings, so that it can be prompted.

    Args:
        predictor: The predictor; it is changed and returned.
        image_embeddings: What `precompute_image_embeddings` returned.
        i: The plane, for embeddings of a stack.
        tile_id: The tile, for tiled embeddings.

    Returns:
        The predictor.

    Raises:
        InvalidInputError: If `i` or `tile_id` is missing, superfluous or out of range, or the features do not
            fit the model.
        MissingTileError: If the tile was left out by a mask.
    """
    features, sizes = image_embeddings["features"], image_embeddings
    if tile_id is not None:
        if image_embeddings["input_size"] is not None:
            raise InvalidInputError(f"The embeddings are not tiled, but tile_id={tile_id} was given. Leave it out.")
        features = features[str(tile_id)]
        sizes = features.attrs
    elif image_embeddings["input_size"] is None:
        raise InvalidInputError("The embeddings are tiled: pass tile_id to choose the tile to set.")

    shape = tuple(features.shape)
    check_plane_index(shape, i)
    expected = (predictor.model.prompt_encoder.embed_dim, *predictor.model.prompt_encoder.image_embedding_size)
    if shape[-3:] != tuple(expected):
        raise InvalidInputError(
            f"The features have the shape {shape[-3:]}, but the model needs {tuple(expected)}: they were computed "
            "with another model or image size. Compute the embeddings with this model."
        )

    plane = features if i is None else features[int(i)]
    if not isinstance(plane, torch.Tensor):
        plane = torch.from_numpy(np.array(plane, dtype=np.float32))
    predictor.reset_image()
    predictor.features = plane.to(predictor.device)
    predictor.original_size = tuple(int(s) for s in sizes["original_size"])
    predictor.input_size = tuple(int(s) for s in sizes["input_size"])
    predictor.is_image_set = True
    return predictor
