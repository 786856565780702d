"""Embeddings of the image of a session: usable for one plane within seconds, while the others are still computed."""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, require_positive_int
from ..core.progress import Step, Steps
from ..embeddings.encode import compute_embeddings_batched, embedding_steps, resolve_path
from ..embeddings.features import ImageEmbeddings
from ..embeddings.memory import MemorySink, feature_shape
from ..embeddings.normalization import ItemReader, check_normalization
from ..embeddings.plan import Item, make_plan
from ..embeddings.signature import DataSignature, Signature, compute_data_signature, model_identity
from ..embeddings.store import is_complete, open_cache
from ..segmentation.workflow import LoadedModel
from .geometry import AnnotationImage

# How many planes are kept that were computed ahead of the store.
N_KEPT_PLANES = 8
# Images up to this size are hashed before the first plane is computed, to find what is in the automatic cache.
_QUICK_HASH_BYTES = 2**30


def image_array(image: Any, ndim: int | None = None) -> tuple[Any, int]:
    """The array of an `AnnotationImage`, or of an image that is one, and its number of axes without channels."""
    if isinstance(image, AnnotationImage):
        return image.array, image.ndim
    if ndim is None:
        raise InvalidInputError("Pass ndim, the number of axes without channels (2 or 3), with an array as image.")
    return image if hasattr(image, "shape") else np.asarray(image), ndim


class EmbeddingSource:
    """Embeddings of one image with one model, in memory or in a zarr store.

    `prepare_steps` computes all of them; until it is finished, `plane_steps` gives those of single planes. Both may be
    run in different threads; whoever runs them lets only one use the model at a time, step by step.

    Args:
        model: The model.
        image: An `AnnotationImage`, or an array (Y, X[, C]) or (Z, Y, X[, C]), may be lazy.
        ndim: 2 or 3, channels not counted; only for an array.
        save_path: A zarr folder, `auto` for the automatic cache, or None for memory.
        tile_shape: Tile shape (y, x) in pixels; None for no tiles.
        halo: Overlap (y, x) of the tiles in pixels; None gives an eighth of the tile shape.
        normalization: See `precompute_image_embeddings`, also for the following.
        dtype: .
        batch_size: .
        overwrite: Whether to replace what is in the store.
        data_signature: .

    Raises:
        InvalidInputError: If the arguments do not fit the image or each other.
    """

    def __init__(
        self,
        model: LoadedModel,
        image: Any,
        *,
        ndim: int | None = None,
        save_path: str | os.PathLike | None = None,
        tile_shape: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        normalization: str | tuple = "tile",
        dtype: str | None = None,
        batch_size: int = 1,
        overwrite: bool = False,
        data_signature: str | None = None,
    ):
        require_positive_int("batch_size", batch_size)
        self.model = model
        self.image, self.ndim = image_array(image, ndim)
        predictor = model.predictor
        self._plan = make_plan(self.image, self.ndim, tile_shape, halo, None, predictor.transform.target_length)
        self._save_path = save_path if save_path in (None, "auto") else Path(save_path).expanduser()
        self._options = {"normalization": normalization, "dtype": dtype, "batch_size": batch_size}
        self._normalization = check_normalization(normalization)
        self._overwrite = overwrite
        self._given_signature = data_signature
        self._hash = image.signature if isinstance(image, AnnotationImage) else cache(self._compute_hash)

        self._full: ImageEmbeddings | None = None
        self._work: Steps[ImageEmbeddings] | None = None  # shared by all who wait for it
        self._n_waiting = 0
        self._looked_into_store = save_path is None
        self._resolved = None if save_path in (None, "auto") else self._save_path
        self._planes: OrderedDict[int, ImageEmbeddings] = OrderedDict()
        self._reader = ItemReader(self.image, self._plan, self._normalization)
        self._sink = MemorySink(predictor, self._plan) if save_path is None else None
        self._done: set[Item] = set()
        # Held while a step is computed, while something is read, and for a moment to look at what is there.
        self._working, self._reading, self._looking = threading.Lock(), threading.Lock(), threading.Lock()

    @classmethod
    def from_embeddings(
        cls, model: LoadedModel, image: Any, image_embeddings: ImageEmbeddings, *, ndim: int | None = None
    ) -> "EmbeddingSource":
        """Use embeddings that were computed before and are complete.

        Raises:
            InvalidInputError: If they are of an image of another shape.
        """
        features, tiling = image_embeddings["features"], {}
        shape = image_embeddings["original_size"]
        if image_embeddings["input_size"] is None:
            tiling = {name: tuple(features.attrs[name]) for name in ("tile_shape", "halo")}
            shape, features = features.attrs["shape"], next(iter(features.values()))
        source = cls(model, image, ndim=ndim, **tiling)
        found = (features.shape[0] if len(features.shape) == 5 else None, tuple(shape))
        if found != (source.n_planes, source.plane_shape):
            raise InvalidInputError(
                f"The embeddings are of {found[0] or 1} planes of shape {found[1]}, but the image has "
                f"{source.n_planes or 1} of shape {source.plane_shape}. Pass the embeddings of this image."
            )
        source._full, source._sink = image_embeddings, None
        return source

    @property
    def n_planes(self) -> int | None:
        """Number of planes; None for a 2D image."""
        return self._plan.depth

    @property
    def plane_shape(self) -> tuple[int, int]:
        """Shape (Y, X) of a plane."""
        return tuple(self._plan.plane_shape)

    @property
    def tiling(self) -> dict[str, tuple[int, int]]:
        """`tile_shape` and `halo` (y, x) in pixels; empty without tiles."""
        tiling = self._plan.tiling
        return {} if tiling is None else {"tile_shape": tiling.tile_shape, "halo": tiling.halo}

    @property
    def path(self) -> Path | None:
        """The folder of the store; None in memory, or if the automatic one is not known yet."""
        return self._resolved

    @property
    def complete(self) -> bool:
        """Whether the embeddings of all planes are there."""
        return self._full is not None

    def ready(self, plane: int | None = None) -> bool:
        """Whether a plane can be prompted without computing its embeddings."""
        with self._looking:
            if self._full is not None or plane in self._planes:
                return True
            items = self._items(plane)
            return self._sink is not None and len(items) > 0 and all(item in self._done for item in items)

    def describe(self) -> dict[str, Any]:
        """What the embeddings are: model, tiling and path, as values for JSON."""
        tiling = self._plan.tiling
        return {
            **model_identity(self.model.predictor),
            "tile_shape": None if tiling is None else list(tiling.tile_shape),
            "halo": None if tiling is None else list(tiling.halo),
            "normalization": self._normalization,
            "path": None if self._save_path is None else str(self._resolved or self._save_path),
        }

    def prepare_steps(self) -> Steps[ImageEmbeddings]:
        """Compute the embeddings of all planes, or load them. Closing it keeps what is finished.

        If this is run more than once at a time, the runs do the work together.

        Raises:
            EmbeddingMismatchError, EmbeddingCacheError, OutputWriteError: See `precompute_image_embeddings`.
        """
        with self._looking:
            self._n_waiting += 1
        try:
            while (step := self._advance()) is not None:
                yield step
            return self._full
        finally:
            with self._looking:
                self._n_waiting -= 1
                is_last = self._n_waiting == 0
            if is_last:
                self._stop()

    def _advance(self) -> Step | None:
        """Compute the next step; None if there is nothing left to do."""
        with self._working:
            if self._full is not None:
                return None
            if self._work is None:
                self._work = self._work_steps()
            try:
                return next(self._work)
            except StopIteration as stop:
                with self._looking:
                    self._full, self._work = stop.value, None
                    self._planes.clear()
                return None
            except BaseException:
                self._work = None
                raise

    def _stop(self) -> None:
        with self._working:
            if self._n_waiting == 0 and self._work is not None:
                self._work.close()
                self._work = None

    def _work_steps(self) -> Steps[ImageEmbeddings]:
        if self._sink is not None:
            yield from self._encode_steps(self._plan.items, self._sink, self._done, "Compute image embeddings")
            return self._sink.finish()
        yield Step(0, 1, "Look for embeddings")
        signature = self._given_signature
        if self._save_path == "auto":
            signature = self._resolve()
        predictor = copy.copy(self.model.predictor)  # in which nothing is set: another task may be using it
        steps = embedding_steps(
            predictor, self.image, self._save_path, lazy_loading=True, ndim=self.ndim, **self.tiling,
            **self._options, overwrite=self._overwrite, data_signature=signature,
        )
        try:
            yield next(steps)
            self._overwrite = False  # what the store holds from here on is new
            return (yield from steps)
        finally:
            steps.close()

    def _compute_hash(self) -> str:
        return compute_data_signature(self.image)

    def _resolve(self) -> str:
        """Find the automatic cache of the image and return the signature of the image, for which it is read once."""
        predictor, hashed = self.model.predictor, self._given_signature or self._hash()
        signature = Signature(
            self._plan, model_identity(predictor), DataSignature(self.image, hashed), self._normalization,
            feature_shape(predictor),
        )
        self._resolved, _ = resolve_path("auto", signature, self._options["dtype"])
        return hashed

    def plane_steps(self, plane: int | None = None) -> Steps[tuple[ImageEmbeddings, int | None]]:
        """Give embeddings for a plane, and its index in them; those of the plane are computed first if need be.

        Args:
            plane: The plane; None for a 2D image.

        Raises:
            InvalidInputError: If there is no such plane.
            EmbeddingMismatchError, EmbeddingCacheError: If the store holds something else.
        """
        self._check_plane(plane)
        if not self.complete and (plane is None or self._is_in_store()):
            yield from self.prepare_steps()
        with self._looking:
            if self._full is not None:
                return self._full, plane
            if plane in self._planes:
                self._planes.move_to_end(plane)
                return self._planes[plane], 0
        text = f"Compute image embeddings of plane {plane}"
        if self._sink is not None:
            yield from self._encode_steps(self._items(plane), self._sink, self._done, text)
            return self._sink.finish(), plane
        tiles = [item.tile for item in self._items(plane)]
        plan = replace(self._plan, shape=(1, *self._plan.shape[1:]), items=tuple(Item(0, t) for t in tiles))
        sink = MemorySink(self.model.predictor, plan)
        yield from self._encode_steps(self._items(plane), sink, set(), text, z=0)
        embeddings = sink.finish()
        with self._looking:
            self._planes[plane] = embeddings
            while len(self._planes) > N_KEPT_PLANES:
                self._planes.popitem(last=False)
        return embeddings, 0

    def _check_plane(self, plane: int | None) -> None:
        n_planes = self.n_planes
        if (plane is None) != (n_planes is None) or (plane is not None and not 0 <= plane < n_planes):
            expected = "a single image: pass None" if n_planes is None else f"planes 0 to {n_planes - 1}"
            raise InvalidInputError(f"There is no plane {plane!r}: the image has {expected}.")

    def _is_in_store(self) -> bool:
        """Whether there is a complete store, as far as that can be seen quickly; looks only once."""
        if self._looked_into_store:
            return False
        self._looked_into_store = True
        if self._overwrite:
            return False
        if self._resolved is None:
            n_bytes = np.dtype(self.image.dtype).itemsize * int(np.prod(self.image.shape, dtype=np.int64))
            if self._given_signature is None and n_bytes > _QUICK_HASH_BYTES:
                return False
            self._resolve()
        group = open_cache(self._resolved)
        return group is not None and is_complete(group)

    def _items(self, plane: int | None) -> tuple[Item, ...]:
        n_tiles = 1 if self._plan.tiling is None else len(self._plan.tiling)
        start = (plane or 0) * n_tiles
        return self._plan.items[start:start + n_tiles]

    def _encode_steps(
        self, items: Sequence[Item], sink: MemorySink, done: set[Item], text: str, z: int | None = None
    ) -> Steps[None]:
        """Encode the items that are not done; `z` is the plane that the sink has for them, None for their own."""
        waiting = [item for item in items if item not in done]
        yield Step(0, len(items), text)
        if len(waiting) < len(items):
            yield Step(len(items) - len(waiting), len(items), text)
        size = self._options["batch_size"]
        while waiting:
            batch, waiting = waiting[:size], waiting[size:]
            batch = [item for item in batch if item not in done]  # another thread may have been here
            if batch:
                with self._reading:
                    images = [self._reader(item) for item in batch]
                features = compute_embeddings_batched(self.model.predictor, images)[0].float().cpu().numpy()
                if self._options["dtype"] == "float16":  # as the store will give them
                    features = features.astype(np.float16).astype(np.float32)
                sink.write([item if z is None else item._replace(z=z) for item in batch], features)
                with self._looking:
                    done.update(batch)
            yield Step(len(items) - len(waiting), len(items), text)
