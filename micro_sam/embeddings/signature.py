"""Fingerprints of images and models, and their comparison with what a cache says it holds.

Two hashes of the pixels are taken in one pass, in pieces of bounded size: xxh3 including shape and dtype, which
is what we compare, and the SHA-1 of the bytes, because older versions of the tool accept only that.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from .._version import __version__
from ..core.errors import EmbeddingMismatchError
from ..core.settings import PRECISIONS
from .plan import EmbeddingPlan

logger = logging.getLogger(__name__)

SCHEME = "xxh3_128-v1"
_SLAB_BYTES = 32 * 2**20
_ALIGNED_SLAB_BYTES = 256 * 2**20


def iter_slabs(array, max_bytes: int = _SLAB_BYTES) -> Iterator[np.ndarray]:
    """Read an array, lazy or not, in C order, in pieces of about `max_bytes`.

    Pieces follow the chunks of the first axis where these are not much larger, so that no chunk is read twice.
    """
    shape = tuple(array.shape)
    if not shape or 0 in shape:
        yield np.asarray(array[...])
        return
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(array.dtype).itemsize
    chunk = _first_chunk(array)
    step = max(1, max_bytes // max(row_bytes, 1))
    if step >= chunk:
        step -= step % chunk
    elif chunk * row_bytes <= max(_ALIGNED_SLAB_BYTES, max_bytes):
        step = chunk
    if row_bytes > max_bytes and step == 1 and len(shape) > 1:
        for index in range(shape[0]):
            yield from iter_slabs(LazyView(array, index), max_bytes)
        return
    for start in range(0, shape[0], step):
        yield np.asarray(array[start:start + step])


class LazyView:
    """`array[index]` of a lazy array, without reading it."""

    def __init__(self, array, index: int):
        self._array, self._index = array, index
        self.shape, self.dtype = tuple(array.shape[1:]), array.dtype
        chunks = getattr(array, "chunks", None)
        self.chunks = chunks[1:] if chunks else None

    def __getitem__(self, key):
        return self._array[(self._index, *(key if isinstance(key, tuple) else (key,)))]


def _first_chunk(array) -> int:
    chunks = getattr(array, "chunks", None)
    if not chunks:
        return 1
    first = chunks[0]
    return max(1, int(first[0] if isinstance(first, tuple) else first))  # dask gives tuples of sizes


class DataSignature:
    """Hashes of an image, computed when first asked for.

    Args:
        input_: The image; may be lazy.
        given: A signature that the caller vouches for, in place of hashing.
    """

    def __init__(self, input_, given: str | None = None):
        self._input = input_
        self.given = given
        self._legacy: str | None = given
        self._fast: str | None = given

    def compute(self, legacy: bool = True, fast: bool = True) -> None:
        """Take the hashes that are still missing, in one pass over the data."""
        legacy, fast = legacy and self._legacy is None, fast and self._fast is None
        if not (legacy or fast):
            return
        array = self._input if hasattr(self._input, "shape") else np.asarray(self._input)
        sha1, xxh3 = hashlib.sha1(usedforsecurity=False), xxhash.xxh3_128()
        xxh3.update(json.dumps([SCHEME, list(array.shape), np.dtype(array.dtype).name]).encode())
        for slab in iter_slabs(array):
            slab = np.ascontiguousarray(slab)
            data = slab.reshape(-1).view(np.uint8) if slab.dtype != object else slab
            if legacy:
                sha1.update(data)
            if fast:
                if slab.dtype.byteorder == ">":
                    data = slab.astype(slab.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
                xxh3.update(data)
        if legacy:
            self._legacy = sha1.hexdigest()
        if fast:
            self._fast = f"{SCHEME}:{xxh3.hexdigest()}"

    @property
    def legacy(self) -> str:
        """SHA-1 hex digest of the bytes in C order; says nothing of shape and dtype."""
        self.compute(fast=False)
        return self._legacy

    @property
    def fast(self) -> str:
        """xxh3 digest of scheme, shape, dtype and bytes."""
        self.compute(legacy=False)
        return self._fast


def compute_data_signature(input_) -> str:
    """Return the signature of an image that may be passed as `data_signature`; reads the image in pieces."""
    return DataSignature(input_).fast


def compute_legacy_data_signature(input_) -> str:
    """Return the SHA-1 hex digest of an image's bytes, as older caches hold it; reads the image in pieces."""
    return DataSignature(input_).legacy


def model_identity(predictor) -> dict[str, Any]:
    """`model_type`, `model_name` and `model_hash` of a predictor, and its `precision` if that is not float32.

    A predictor that was not made by `get_sam_model` has no hash; then the encoder's weights are hashed.
    """
    model_hash = getattr(predictor, "_hash", None)
    if model_hash is None:
        xxh3 = xxhash.xxh3_128()
        for name, tensor in sorted(predictor.model.image_encoder.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            xxh3.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
            xxh3.update(values.flatten().float().numpy())
        model_hash = f"encoder-xxh3_128:{xxh3.hexdigest()}"
    model_type = getattr(predictor, "model_type", None)
    from ..models.precision import precision_of  # loads torch, which signatures of images do without

    dtype = precision_of(predictor)
    return {
        "model_type": model_type,
        "model_name": getattr(predictor, "model_name", model_type),
        "model_hash": model_hash,
        **({} if dtype is None else {"precision": str(dtype).removeprefix("torch.")}),
    }


@dataclass(frozen=True)
class Signature:
    """What a cache must agree with: data, model, tiling, mask and normalisation."""

    plan: EmbeddingPlan
    model: dict[str, Any]
    data: DataSignature
    normalization: Any
    feature_shape: tuple[int, int, int]

    def tiling(self) -> dict[str, list[int] | None]:
        tiling = self.plan.tiling
        return {name: None if tiling is None else list(getattr(tiling, name)) for name in ("tile_shape", "halo")}

    @property
    def precision(self) -> str:
        return self.model.get("precision", "float32")

    def check_precision(self, attrs: dict[str, Any], is_complete: bool, path) -> None:
        """Compare the precision with that of an existing cache.

        Features in another precision are used, as they differ little, but never mixed.

        Raises:
            EmbeddingMismatchError: If the cache is not complete and was begun in another precision.
        """
        found = attrs.get("precision", "float32")
        if not is_complete:
            # float16 cannot be asked for: it is what `auto` is on GPUs without bfloat16.
            chosen, where = (found, "") if found in PRECISIONS else ("auto", " on such a GPU as it was begun on")
            self._compare(path, "precision", found, self.precision, f"Pass precision={chosen!r}{where} to go on")
        elif found != self.precision == "float32":
            logger.warning(
                "Embeddings in %s were computed in %s, so that masks differ a little from those in float32. Compute "
                "them again with overwrite=True if that matters.", path, found,
            )

    def mask_signature(self) -> str | None:
        """Hash of the tiles that the mask selects (the features depend on nothing else of it)."""
        if self.plan.tiles_in_mask is None:
            return None
        tiles = json.dumps(self.plan.tiles_in_mask, sort_keys=True).encode()
        return f"{SCHEME}:{xxhash.xxh3_128_hexdigest(tiles)}"

    def to_attributes(self) -> dict[str, Any]:
        """Root attributes of a new cache, in the order of the layout; the first seven are the older signature."""
        self.data.compute()
        return {
            "data_signature": self.data.legacy,
            **self.tiling(),
            "model_type": self.model["model_type"],
            "model_name": self.model["model_name"],
            "micro_sam_version": __version__,
            "model_hash": self.model["model_hash"],
            "data_hash": self.data.fast,
            "ndim": self.plan.ndim,
            "input_shape": list(self.plan.shape),
            "normalization": self.normalization,
            "mask_signature": self.mask_signature(),
            **({} if self.precision == "float32" else {"precision": self.precision}),
        }

    def check(self, attrs: dict[str, Any], found_layout: dict[str, Any], path) -> None:
        """Compare with the attributes of an existing cache; the pixels are hashed only if all else agrees.

        Args:
            attrs: Root attributes.
            found_layout: What the arrays say: `ndim`, `plane_shape`, `depth`, `feature_shape`, `tiles_in_mask`;
                None where they do not tell.
            path: The path, for messages.

        Raises:
            EmbeddingMismatchError: Naming the values found and wanted.
        """
        plan = self.plan
        for name, wanted in self.tiling().items():
            self._compare(path, name, attrs.get(name), wanted, f"Pass {name}={attrs.get(name)}")
        self._compare_model(path, attrs)
        layout = {
            "ndim": plan.ndim, "plane_shape": list(plan.plane_shape), "depth": plan.depth,
            "feature_shape": list(self.feature_shape),
        }
        for name, wanted in layout.items():
            found = found_layout.get(name)
            if found is not None:
                self._compare(path, name, found, wanted, "Pass the image that belongs to the cache")
        found_tiles = found_layout.get("tiles_in_mask")
        if "mask_signature" in attrs:
            same_tiles = attrs["mask_signature"] == self.mask_signature()
        else:
            same_tiles = found_tiles == plan.tiles_in_mask
        if not same_tiles:
            self._raise_tiles(path, found_tiles)
        found = attrs.get("normalization", "tile")
        if _settings(found) != _settings(self.normalization):
            self._compare(path, "normalization", found, self.normalization, "Pass the normalization of the cache")
        self._compare_data(path, attrs)
        if attrs.get("micro_sam_version") not in (None, __version__):
            logger.info("Embeddings in %s come from micro_sam %s", path, attrs["micro_sam_version"])

    @staticmethod
    def _compare(path, name: str, found, wanted, remedy: str) -> None:
        if found != wanted:
            raise EmbeddingMismatchError(
                f"Embeddings in {path} were computed with {name}={found}, but {name}={wanted} was asked for. "
                f"{remedy}, choose another path, or compute them again with overwrite=True."
            )

    def _compare_model(self, path, attrs: dict[str, Any]) -> None:
        remedy = "Use that model"
        self._compare(path, "model_type", attrs.get("model_type"), self.model["model_type"], remedy)
        found, wanted = attrs.get("model_hash"), self.model["model_hash"]
        # Hashes of different kinds cannot be compared; then the name has to do.
        comparable = found is not None and wanted is not None and _kind(found) == _kind(wanted)
        name = "model_hash" if comparable else "model_name"
        if name == "model_hash" and found != wanted:
            known, asked = attrs.get("model_name"), self.model["model_name"]
            self._compare(path, "model (name, hash)", f"({known}, {found})", f"({asked}, {wanted})", remedy)
        self._compare(path, name, attrs.get(name), self.model[name], remedy)

    def _raise_tiles(self, path, found) -> None:
        wanted = self.plan.tiles_in_mask

        def text(tiles):
            if tiles is None:
                return "all tiles"
            return f"{sum(map(len, tiles.values())) if isinstance(tiles, dict) else len(tiles)} tiles in a mask"

        raise EmbeddingMismatchError(
            f"Embeddings in {path} were computed for {text(found)}, but {text(wanted)} "
            f"{'(another mask) ' if None not in (found, wanted) else ''}were asked for. "
            "Pass the same mask, choose another path, or compute them again with overwrite=True."
        )

    def _compare_data(self, path, attrs: dict[str, Any]) -> None:
        fast, legacy = attrs.get("data_hash"), attrs.get("data_signature")
        if self.data.given is not None and self.data.given in (fast, legacy):
            return
        name, found = ("data_signature", legacy) if fast is None else ("data_hash", fast)
        wanted = self.data.legacy if fast is None else self.data.fast
        self._compare(path, name, found, wanted, "Pass the image (values, shape and dtype) that was embedded")


def _kind(model_hash: str) -> str:
    return model_hash.split(":")[0] if ":" in model_hash else ""


def _settings(normalization) -> Any:
    """A normalisation without the range that was measured with it."""
    if isinstance(normalization, dict):
        return {k: v for k, v in normalization.items() if k != "measured"}
    return normalization
