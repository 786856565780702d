"""The one reader and the one writer of embeddings on disk (zarr format 2 and 3).

The layout is that of earlier versions of the tool: root attributes with the signature, `features` as an array or,
for tiles, as a group of arrays named by tile id. A cache is complete if and only if the root has `input_size`,
which is written with one atomic update at the end. Until then `.micro_sam/progress` in the cache lists the items
whose chunks are on disk, one line per batch; `.micro_sam/lock` is held by the process that writes.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ContainsGroupError

from ..core.errors import EmbeddingCacheError, OutputWriteError
from ..models.build_sam import PATCH_SIZE
from .features import ImageEmbeddings, read_error
from .lock import locked
from .memory import feature_shape, tiling_attrs
from .plan import EmbeddingPlan, Item, encoder_sizes
from .signature import Signature
from .stored import StoredArray, open_node, stored_tiles

FORMAT_VERSION = 1
DTYPES = ("float32", "float16")
_WORK = ".micro_sam"
_METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
# States of the segmenters live in the same folder and belong to its embeddings.
_OWN = (*_METADATA, "features", _WORK, "amg_state", "amg_state.pickle", "is_state.h5")
# Under such names zarr writes metadata; a process that was killed leaves them.
_TORN = re.compile(r"^(zarr|\.zgroup|\.zattrs)\..*\bpartial$")


# Reading

def check_path(path: Path) -> bool:
    """Whether there is the metadata of a cache at `path`; False if the folder is missing, empty or only begun.

    Raises:
        EmbeddingCacheError: If something else is at that path, or it cannot be read.
    """
    try:
        if not path.exists():
            return False
        if not path.is_dir():
            raise EmbeddingCacheError(f"{path} is a file, not an embedding cache. Choose the path of a zarr folder.")
        names = set(os.listdir(path))
    except PermissionError as error:
        raise read_error(error, f"The embedding cache {path}") from error
    has_metadata = not names.isdisjoint(_METADATA)
    foreign = sorted(name for name in names - set(_OWN) if not _TORN.match(name))
    if foreign and not (_has_signature(path) if has_metadata else _WORK in names):
        raise EmbeddingCacheError(
            f"{path} is a folder with other content ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}) "
            "and not an embedding cache. Choose a new path, for example one that ends in .zarr beside it."
        )
    return has_metadata


def _has_signature(path: Path) -> bool:
    """Whether the root attributes are those of an embedding cache, and not of some other zarr data."""
    for name in ("zarr.json", ".zattrs"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            attrs = json.loads((path / name).read_text())
            if "data_signature" in attrs.get("attributes", attrs):
                return True
    return False


def open_cache(path: Path) -> zarr.Group | None:
    """Open an existing cache for reading; None if there is none.

    Raises:
        EmbeddingCacheError: If something else is at that path, or the metadata are damaged.
    """
    if not check_path(path):
        return None
    try:
        return zarr.open_group(path, mode="r", use_consolidated=False)
    except Exception as error:
        raise read_error(error, f"The metadata of the embedding cache {path}") from error


def is_complete(group: zarr.Group) -> bool:
    """Whether all embeddings of a cache were computed."""
    return "input_size" in group.attrs


def load_embeddings(path: str | os.PathLike, lazy_loading: bool = False) -> ImageEmbeddings:
    """Read a complete cache as it is, without checking that it belongs to some image.

    Args:
        path: The zarr folder.
        lazy_loading: Whether the features of a stack are read from disk when they are used, plane by plane,
            and not at once into memory. Tiles are always read when they are used.

    Returns:
        The embeddings, as `precompute_image_embeddings` returns them.

    Raises:
        EmbeddingCacheError: If there is no complete cache or it is damaged.
    """
    path = Path(path).expanduser()
    group = open_cache(path)
    if group is None or not is_complete(group):
        raise EmbeddingCacheError(
            f"There are no complete embeddings in {path}. Compute them with precompute_image_embeddings."
        )
    return read_group(group, path, lazy_loading)


def read_group(group: zarr.Group, path: Path, lazy_loading: bool) -> ImageEmbeddings:
    """Read a complete cache that is open already, see `load_embeddings`."""
    attrs, features = dict(group.attrs), open_node(group, "features", path)
    if features is None:
        raise EmbeddingCacheError(f"{path} has no features although it is marked as complete. Compute them again.")
    if isinstance(features, zarr.Group):
        return {"features": stored_tiles(features, path), "input_size": None, "original_size": None}
    array = StoredArray(features, name=f"{path}/features")
    if array.ndim == 4 or not lazy_loading:
        array = array.read_all()
    return {"features": array, **{k: tuple(attrs[k]) for k in ("input_size", "original_size")}}


def describe_layout(group: zarr.Group, path: Path) -> dict[str, Any]:
    """What the arrays of a cache say about the input, for the check of the signature."""
    attrs, features = dict(group.attrs), open_node(group, "features", path)
    layout = {"ndim": attrs.get("ndim")}
    if features is None:
        return layout
    if isinstance(features, zarr.Group):
        in_mask = features.attrs.get("tiles_in_mask")
        layout |= {"plane_shape": features.attrs.get("shape"), "tiles_in_mask": in_mask}
        first = in_mask[0] if isinstance(in_mask, list) and in_mask else 0
        if isinstance(in_mask, dict):
            first = next((tiles[0] for tiles in in_mask.values() if tiles), None)
        array = None if first is None or in_mask == [] else open_node(features, str(first), path)
    else:
        array = features
        layout["plane_shape"] = attrs.get("original_size")
    if array is not None:
        layout["ndim"] = layout["ndim"] or array.ndim - 2
        layout["feature_shape"] = list(array.shape[-3:])
        layout["depth"] = array.shape[0] if array.ndim == 5 else None
    return layout


def stored_canvas(path: Path) -> int | None:
    """Side in pixels of the canvas on which the embeddings at a path were computed; None if there are none.

    Raises:
        EmbeddingCacheError: If something else is at that path, or the metadata are damaged.
    """
    group = open_cache(path)
    shape = None if group is None else describe_layout(group, path).get("feature_shape")
    return None if shape is None else PATCH_SIZE * shape[-1]


# Writing

@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into errors that tell what to do."""
    try:
        yield
    except OutputWriteError:
        raise
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full. Free some space (float16 embeddings need half of it)",
            errno.EDQUOT: "the disk quota is used up. Free some space (float16 embeddings need half of it)",
            errno.EACCES: "there is no write permission. Choose another path or change the permissions",
            errno.EPERM: "there is no write permission. Choose another path or change the permissions",
            errno.EROFS: "the file system is read-only. Choose another path",
        }.get(error.errno, f"{error}. Check the path")
        raise OutputWriteError(
            f"The embeddings cannot be written to {path}: {reason}, then run again: finished parts are kept."
        ) from error


@contextlib.contextmanager
def write_lock(path: Path, timeout: float) -> Iterator[None]:
    """Create the folder of a cache if need be, and hold its lock.

    Raises:
        EmbeddingCacheError: If another process still holds it after `timeout` seconds.
        OutputWriteError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _write_errors(path):
            while True:
                (path / _WORK).mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(locked(lock_path(path), timeout))
                    break
                except FileNotFoundError:  # a process that finished removed the folder in between
                    continue
        try:
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):  # it stays while it holds the progress of an unfinished run
                (path / _WORK).rmdir()
                path.rmdir()


def lock_path(path: Path) -> Path:
    return path / _WORK / "lock"


def remove_cache(path: Path) -> None:
    """Delete what this format keeps in a folder, and nothing else; the lock stays."""
    with _write_errors(path):
        for name in _OWN:
            target = path / name
            if name == _WORK:
                (target / "progress").unlink(missing_ok=True)
            elif target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


class StoreSink:
    """Writes features into a cache, resuming what is there. The lock of the folder must be held.

    Args:
        path: The folder.
        predictor: The predictor, for the sizes of features and images.
        plan: What is encoded.
        signature: What the cache is signed with.
        dtype: `float32` or `float16`; None keeps that of a cache that is resumed, else `float32`.
        zarr_format: 2 or 3, for a new cache.
    """

    def __init__(
        self,
        path: Path,
        predictor,
        plan: EmbeddingPlan,
        signature: Signature,
        dtype: str | None = None,
        zarr_format: int = 3,
    ):
        self.path = path
        self._plan = plan
        self._sizes = {t: encoder_sizes(predictor, plan, t) for t in (plan.tile_ids if plan.tiling else [None])}
        shape = (1, *feature_shape(predictor))
        self._shape = shape if plan.depth is None else (plan.depth, *shape)
        self._chunks = (1,) * (len(self._shape) - 3) + self._shape[-3:]
        self._log = path / _WORK / "progress"
        with _write_errors(path):
            self._remove_torn_files()
            self._done = self._read_log()
            self._dtype = dtype or "float32"
            self._root = self._open_root(signature, zarr_format)
            self._dtype = self._root.attrs["dtype"]
            self._arrays = self._open_arrays()

    def _read_log(self) -> set[Item]:
        """Read the finished items; a line that was cut off by the end of the process is dropped."""
        if not self._log.exists():
            return set()
        lines = self._log.read_bytes().split(b"\n")
        items, whole = set(), []
        for line in lines[:-1]:
            try:
                items.update(Item(*pair) for pair in json.loads(line))
                whole.append(line + b"\n")
            except (ValueError, TypeError):
                continue
        if lines[-1] or len(whole) < len(lines) - 1:
            rewritten = self._log.with_suffix(".new")
            rewritten.write_bytes(b"".join(whole))
            rewritten.replace(self._log)
        return items

    def _remove_torn_files(self) -> None:
        """Remove files of which the writing was cut off, under their temporary names."""
        torn = [self.path / name for name in os.listdir(self.path) if _TORN.match(name)]
        for file in [*torn, *(self.path / "features").rglob("*.partial")]:
            file.unlink(missing_ok=True)

    def _open_root(self, signature: Signature, zarr_format: int) -> zarr.Group:
        if open_cache(self.path) is not None:
            root = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            if "complete" in root.attrs:
                return root
        # Nothing here, or only an empty group: start anew.
        self._done.clear()
        remove_cache(self.path)
        attrs = {**signature.to_attributes(), "dtype": self._dtype, "micro_sam_format": FORMAT_VERSION}
        attrs["complete"] = False
        try:
            return zarr.create_group(self.path, zarr_format=zarr_format, attributes=attrs, overwrite=False)
        except ContainsGroupError:
            # zarr writes the two files of a group of format 2 at once. If one fails, it does not wait for the other,
            # which may then land here: the folder is locked and was empty, so nothing else can have come into it.
            root = zarr.open_group(self.path, mode="r+", zarr_format=zarr_format, use_consolidated=False)
            root.attrs.put(attrs)
            return root

    def _open_arrays(self) -> dict[int | None, zarr.Array]:
        plan = self._plan
        if plan.tiling is None:
            return {None: self._open_array(self._root, "features", {}, None)}
        wanted = tiling_attrs(plan)
        group = open_node(self._root, "features", self.path)
        if group is None or dict(group.attrs) != wanted:
            self._done.clear()
            self._log.unlink(missing_ok=True)
            group = self._root.create_group("features", attributes=wanted, overwrite=True)
        return {tile: self._open_array(group, str(tile), self._sizes[tile], tile) for tile in self._sizes}

    def _open_array(self, group: zarr.Group, name: str, attrs: dict, tile: int | None) -> zarr.Array:
        attrs = {key: list(value) for key, value in attrs.items()}
        if (array := open_node(group, name, self.path)) is not None:
            found = (tuple(array.shape), tuple(array.chunks), str(array.dtype), dict(array.attrs))
            if found == (self._shape, self._chunks, self._dtype, attrs):
                return array
        self._done = {item for item in self._done if item.tile != tile}
        return group.create_array(
            name, shape=self._shape, chunks=self._chunks, dtype=self._dtype, fill_value=0, attributes=attrs,
            overwrite=True, **_compression(group.metadata.zarr_format, self._dtype),
        )

    def is_done(self, item: Item) -> bool:
        return item in self._done

    def write(self, items: list[Item], features: np.ndarray) -> None:
        """Write a batch, then note it."""
        with _write_errors(self.path):
            _write_chunks(self._arrays, self._dtype, items, features)
        self.note(items)

    def note(self, items: list[Item]) -> None:
        """Note a batch whose chunks are on disk: as a whole, so that a resumed run forms the same batches."""
        with _write_errors(self.path), open(self._log, "ab", buffering=0) as log:
            log.write(json.dumps([list(item) for item in items]).encode() + b"\n")
        self._done.update(items)

    def finish(self) -> None:
        """Mark the cache as complete."""
        plan = self._plan
        sizes = self._sizes[None] if plan.tiling is None else {"original_size": None, "input_size": None}
        sizes = {k: None if v is None else list(v) for k, v in sizes.items()}
        attrs = {**self._root.attrs, "complete": True}
        with _write_errors(self.path):
            self._root.attrs.put({**attrs, "original_size": sizes["original_size"], "input_size": sizes["input_size"]})
            self._log.unlink(missing_ok=True)


def _write_chunks(arrays, dtype: str, items: list[Item], features: np.ndarray) -> None:
    features = features.astype(dtype, copy=False)
    if dtype == "float16" and not np.isfinite(features).all():
        raise EmbeddingCacheError(
            f"The features of {items[0]} exceed the range of float16. Pass dtype='float32' and overwrite=True."
        )
    for item, values in zip(items, features, strict=True):
        arrays[item.tile][0 if item.z is None else item.z] = values if item.z is None else values[None]


def write_features(path: Path, items: list[Item], features: np.ndarray) -> None:
    """Write features (N, 256, h, w) into the arrays of an unfinished cache, from any process.

    Each item has chunks of its own. The process that holds the lock notes them as done (`StoreSink.note`).
    """
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    stored = root["features"]
    arrays = {item.tile: stored if item.tile is None else stored[str(item.tile)] for item in items}
    with _write_errors(path):
        _write_chunks(arrays, root.attrs["dtype"], items, features)


def _compression(zarr_format: int, dtype: str) -> dict[str, Any]:
    """Compressors with a checksum: a flipped bit on disk is noticed when the chunk is read.

    Shuffled bits make float features about a fifth smaller at 500 MB/s; plain zstd saves under a tenth.
    """
    if zarr_format == 3:
        return {"compressors": [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]}
    from numcodecs import Shuffle, Zstd
    return {"filters": [Shuffle(np.dtype(dtype).itemsize)], "compressors": Zstd(level=3, checksum=True)}
