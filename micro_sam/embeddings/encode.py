"""Computing image embeddings: one generator for images, stacks and tiles, in memory and on disk."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError
from ..core.normalize import to_image
from ..core.progress import Step, Steps, drain
from .features import ImageEmbeddings
from .memory import MemorySink
from .plan import EmbeddingPlan, Item, make_plan

__all__ = [
    "ImageEmbeddings", "compute_embeddings_batched", "embedding_steps", "precompute_image_embeddings",
    "set_precomputed", "to_image",
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
    return model.image_encoder(batch)


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
    tensors, original_sizes, input_sizes = zip(*(_load(predictor, image) for image in batched_images))
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
) -> Steps[ImageEmbeddings]:
    """Generator behind `precompute_image_embeddings`: yields `Step`, returns the embeddings.

    Closing it cancels the work.
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InvalidInputError(f"batch_size must be a positive integer, but got {batch_size!r}.")
    plan = make_plan(input_, ndim, tile_shape, halo, mask, predictor.transform.target_length)
    sink = MemorySink(predictor, plan)
    yield from _fill(predictor, plan, sink, lambda item: to_image(plan.read(input_, item)), batch_size)
    embeddings = sink.finish()
    if plan.ndim == 2 and plan.tiling is None:
        set_precomputed(predictor, embeddings)
    return embeddings


def _fill(
    predictor: SamPredictor, plan: EmbeddingPlan, sink, read: Callable[[Item], np.ndarray], batch_size: int
) -> Steps[None]:
    """Encode the items that the sink lacks. The next batch is read, and the last one written, meanwhile."""
    missing = [item for item in plan.items if not sink.is_done(item)]
    total, done = len(plan.items), len(plan.items) - len(missing)
    text = f"Compute image embeddings{' for tiles' if plan.tiling else ''}"
    yield Step(0, total, text)
    if done:
        yield Step(done, total, text)
    batches = [missing[i:i + batch_size] for i in range(0, len(missing), batch_size)]

    def load(batch):
        return [_load(predictor, read(item))[0] for item in batch]

    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        ahead = reader.submit(load, batches[0]) if batches else None
        written, n_written = None, 0
        for k, batch in enumerate(batches):
            tensors = ahead.result()
            if k + 1 < len(batches):
                ahead = reader.submit(load, batches[k + 1])
            features = _encode(predictor, tensors).cpu().numpy()
            if written is not None:
                written.result()
                done += n_written
                yield Step(done, total, text)
            written, n_written = writer.submit(sink.write, batch, features), len(batch)
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
    **options: Any,
) -> ImageEmbeddings:
    """Compute the embeddings of an image, a stack or their tiles."""
    steps = embedding_steps(
        predictor, input_, save_path, lazy_loading, ndim, tile_shape, halo, batch_size, mask, **options
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
    if len(shape) not in (4, 5):
        raise InvalidInputError(f"Features must have the shape (1, C, h, w) or (Z, 1, C, h, w), but have {shape}.")
    if len(shape) == 5 and i is None:
        raise InvalidInputError(f"The embeddings are of a stack of {shape[0]} planes: pass i to choose the plane.")
    if len(shape) == 4 and i is not None:
        raise InvalidInputError(f"The embeddings are of a single plane, but i={i} was given. Leave it out.")
    if i is not None and not 0 <= i < shape[0]:
        raise InvalidInputError(f"There is no plane {i}: the embeddings have planes 0 to {shape[0] - 1}.")
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
