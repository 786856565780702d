"""From objects to features, their area and mean image embedding, and from predictions back to pixels.

By definition, embedding and labels are both resized to a common grid, and each channel is averaged over each object
there. Resizing is linear, so that the mean is the embedding, at its own resolution, weighted by the object resized
back: one sparse matrix for all objects of a plane, and no resized embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse
from skimage.transform import resize

from .core.errors import InvalidInputError, InvalidTypeError, require_positive_int
from .core.progress import Step, Steps, drain
from .core.tiling import Tile, TileSpec
from .embeddings.features import ImageEmbeddings

__all__ = [
    "FeatureSums", "compute_object_features", "object_feature_steps", "project_prediction_to_segmentation",
]


@dataclass(frozen=True)
class _Layout:
    """What embeddings consist of. An image without tiles has one tile; `n_planes` is None for a single plane."""

    tiling: TileSpec
    tiled: bool
    n_planes: int | None
    n_channels: int

    def items(self) -> Iterator[tuple[int | None, Tile]]:
        planes = (None,) if self.n_planes is None else range(self.n_planes)
        return ((z, tile) for z in planes for tile in self.tiling)

    def __len__(self) -> int:
        return (self.n_planes or 1) * len(self.tiling)


class FeatureSums:
    """Adds up areas and embeddings over objects; planes of a stack may be added in several parts.

    Args:
        resize_embedding_shape: Largest shape (y, x) of the common grid, see `compute_object_features`.
    """

    def __init__(self, resize_embedding_shape: Sequence[int] = (256, 256)):
        if len(resize_embedding_shape) != 2:
            raise InvalidInputError(f"resize_embedding_shape must be (y, x), but is {resize_embedding_shape!r}.")
        for size in resize_embedding_shape:
            require_positive_int("resize_embedding_shape", size)
        self._grid_shape = tuple(int(s) for s in resize_embedding_shape)
        self._rows: dict[int, int] = {}
        self._sums = np.zeros((0, 1))
        self._is_plain = True

    def add_steps(self, image_embeddings: ImageEmbeddings, segmentation: np.ndarray) -> Steps[None]:
        """Generator that adds an image, or the next planes of a stack, tile by tile.

        Args:
            image_embeddings: The embeddings.
            segmentation: Label image (Y, X) or (Z, Y, X) of the same part of the image, may be lazy.
        """
        layout = _check(image_embeddings, segmentation)
        self._is_plain = layout.n_planes is None and not layout.tiled
        if self._sums.shape[1] == 1:
            self._sums = np.zeros((0, 1 + layout.n_channels))
        text = "Compute object features"
        yield Step(0, len(layout), text)
        for done, (z, tile) in enumerate(layout.items(), 1):
            block = _read_labels(segmentation, z, tile)
            if block.any():
                embedding = _read_embedding(image_embeddings, layout, z, tile)
                self._add(block, embedding, layout, tile)
            yield Step(done, len(layout), text)

    def _add(self, block: np.ndarray, embedding: np.ndarray | None, layout: _Layout, tile: Tile) -> None:
        side = max(tile.outer_shape)  # the encoder sees the tile padded to a square
        grid_shape = tuple(min(s, side) for s in self._grid_shape)
        if not self._is_plain:
            self._index(np.unique(block))
        if embedding is None:
            return
        bounds = tuple((s.start, s.stop) for s in tile.inner_local)
        rows, columns, weights = _sampling(side, grid_shape, embedding.shape[-2:], bounds)
        labels = block[np.ix_(rows, columns)].ravel()
        foreground = np.flatnonzero(labels)
        if len(foreground) == 0:
            return
        ids, inverse = np.unique(labels[foreground], return_inverse=True)
        members = sparse.csr_array((np.ones(len(foreground)), (inverse.ravel(), np.arange(len(foreground)))))
        pixels = embedding.reshape(layout.n_channels, -1).T.astype(np.float64, order="C")
        index = self._index(ids)
        scale = side * side / (grid_shape[0] * grid_shape[1]) if layout.tiled else 1.0
        self._sums[index, 0] += scale * np.bincount(inverse.ravel())
        self._sums[index, 1:] += scale * ((members @ weights[foreground]) @ pixels)

    def _index(self, ids: np.ndarray) -> list[int]:
        """The rows of ids, with new rows for new ones."""
        index = [self._rows.setdefault(i, len(self._rows)) for i in ids[ids != 0].tolist()]
        missing = len(self._rows) - len(self._sums)
        if missing > 0:
            n_new = max(missing, len(self._sums))  # doubling keeps the number of copies small
            self._sums = np.concatenate([self._sums, np.zeros((n_new, self._sums.shape[1]))])
        return index

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, ascending, and the features, see `compute_object_features`."""
        ids = np.array(sorted(self._rows), dtype=np.int64)
        features = self._sums[[self._rows[i] for i in ids.tolist()]]
        features[:, 1:] /= np.maximum(features[:, :1], 1e-12)
        return ids, features if self._is_plain else features.astype(np.float32)


def compute_object_features(
    image_embeddings: ImageEmbeddings,
    segmentation: np.ndarray,
    resize_embedding_shape: tuple[int, int] = (256, 256),
    verbose: bool = True,
    *,
    pbar_init: Callable[[int, str], None] | None = None,
    pbar_update: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the area and the mean embedding of each object.

    The labels of a plane are padded to a square, as SAM pads images. They (nearest neighbour) and the embedding
    (linear) are resized to a common grid, of the side of the square, but not more than `resize_embedding_shape`; the
    embedding is averaged over the objects there. In a stack, areas add up over the planes, and means are weighted by
    them. With tiles the same is done for each tile and its embedding, but only for the pixels of the tile without
    its halo, so that each pixel counts once.

    Args:
        image_embeddings: Embeddings of an image, a stack or their tiles, may be lazy: they are read plane by plane
            and tile by tile. Tiles that a mask left out add nothing.
        segmentation: Label image (Y, X) or (Z, Y, X) of the same image, any integer dtype, 0 is background; may be
            lazy as well.
        resize_embedding_shape: Largest shape (y, x) of the common grid.
        verbose: Whether to show a progress bar.
        pbar_init: Callback `pbar_init(total, description)`, in place of the progress bar.
        pbar_update: Callback `pbar_update(n)`.

    Returns:
        The ids (N,), int64, ascending, and the features (N, 1 + C): first the area, then the mean of each of the C
        (256) channels. For a plane without tiles, objects that vanish in resizing are left out, and features are
        float64; otherwise such objects are there, with zeros, and features are float32. Without tiles, the unit of
        the area is a pixel of the common grid; with tiles, it is a pixel of the image, whatever the tiles.

    Raises:
        InvalidInputError: If segmentation and embeddings do not fit, or ids are negative.
        InvalidTypeError: If the segmentation has no integer dtype.
    """
    steps = object_feature_steps(image_embeddings, segmentation, resize_embedding_shape)
    return drain(steps, verbose, pbar_init, pbar_update)


def object_feature_steps(
    image_embeddings: ImageEmbeddings, segmentation: np.ndarray, resize_embedding_shape: Sequence[int] = (256, 256)
) -> Steps[tuple[np.ndarray, np.ndarray]]:
    """Generator behind `compute_object_features`: yields a `Step` per plane and tile."""
    sums = FeatureSums(resize_embedding_shape)
    yield from sums.add_steps(image_embeddings, segmentation)
    return sums.result()


def _check(image_embeddings: ImageEmbeddings, segmentation: Any) -> _Layout:
    features, tiled = image_embeddings["features"], image_embeddings["input_size"] is None
    if tiled:
        attrs = features.attrs
        tiling = TileSpec.create(attrs["shape"], attrs["tile_shape"], attrs["halo"])
        first = next(iter(features), None)
        if first is None:
            raise InvalidInputError("The embeddings have no tile: their mask was empty. Compute them without a mask.")
        shape = tuple(features[first].shape)
    else:
        size = image_embeddings["original_size"]
        tiling, shape = TileSpec.create(size, size, (0, 0)), tuple(features.shape)
    n_planes = int(shape[0]) if len(shape) == 5 else None
    expected = tiling.shape if n_planes is None else (n_planes, *tiling.shape)
    if tuple(segmentation.shape) != expected:
        raise InvalidInputError(
            f"The segmentation has the shape {tuple(segmentation.shape)}, but the embeddings are of an image of shape "
            f"{expected}. Pass the segmentation and the embeddings of the same image."
        )
    if np.dtype(segmentation.dtype).kind not in "bui":
        raise InvalidTypeError(f"A segmentation must have an integer dtype, but has {segmentation.dtype}.")
    return _Layout(tiling, tiled, n_planes, int(shape[-3]))


def _read_labels(segmentation: Any, z: int | None, tile: Tile) -> np.ndarray:
    block = np.asarray(segmentation[tile.inner if z is None else (z, *tile.inner)])
    if block.astype(np.int64, copy=False).min() < 0:  # also what does not fit
        raise InvalidInputError("The ids of a segmentation must be from 0 (background) to 2**63 - 1.")
    return block


def _read_embedding(image_embeddings: ImageEmbeddings, layout: _Layout, z: int | None, tile: Tile) -> np.ndarray | None:
    """The embedding (1, C, h, w) of a tile, or None if it was left out by a mask."""
    features = image_embeddings["features"]
    if layout.tiled:
        in_mask = features.attrs.get("tiles_in_mask")
        if isinstance(in_mask, Mapping):
            in_mask = in_mask.get(str(z), [])
        if in_mask is not None and tile.id not in in_mask:
            return None
        features = features[str(tile.id)]
    plane = features if z is None else features[z]
    return np.asarray(plane.cpu() if hasattr(plane, "cpu") else plane)


@lru_cache(maxsize=16)  # tiles differ only at the borders of the image
def _sampling(
    side: int, grid_shape: tuple[int, int], embedding_shape: tuple[int, int], bounds: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray, sparse.csr_array]:
    """How a square of pixels and its embedding are sampled by the common grid, within the inner block of a tile.

    Args:
        side: Side of the square in pixels.
        grid_shape: Shape (y, x) of the grid.
        embedding_shape: Shape (h, w) of the embedding.
        bounds: First pixel, and the one after the last, of the inner block, per axis.

    Returns:
        Rows and columns, in the inner block, of the pixels whose labels the grid has, and the weights
        (number of these pixels, h * w) that interpolate the embedding there.
    """
    positions, matrices = [], []
    for size, n, (start, stop) in zip(grid_shape, embedding_shape, bounds):
        nearest = resize(np.arange(side, dtype=float), (size,), order=0, anti_aliasing=False, preserve_range=True)
        nearest = nearest.astype(np.int64)
        inside = (nearest >= start) & (nearest < stop)
        # The resized unit vectors are the matrix of resizing.
        matrix = resize(np.eye(n), (size, n), order=1, mode="reflect", anti_aliasing=size < n, preserve_range=True)
        positions.append(nearest[inside] - start)
        matrices.append(sparse.csr_array(matrix[inside]))
    return *positions, sparse.kron(*matrices, format="csr")


def project_prediction_to_segmentation(
    segmentation: np.ndarray, object_prediction: np.ndarray, seg_ids: np.ndarray
) -> np.ndarray:
    """Paint the class of each object over its pixels.

    Args:
        segmentation: Label image (Y, X) or (Z, Y, X), any integer dtype; a stack may be lazy and is read plane by
            plane.
        object_prediction: Class (N,) of each object, non-negative integers.
        seg_ids: Id (N,) of each object, in any order.

    Returns:
        The classes, in the shape of the segmentation and its dtype, or a larger one if the classes need it. Pixels of
        other ids and of the background are 0.

    Raises:
        InvalidInputError: If there are not as many predictions as ids, ids occur twice, or a value is negative.
        InvalidTypeError: If a dtype is not integer.
    """
    classes, ids = np.asarray(object_prediction), np.asarray(seg_ids)
    if classes.ndim != 1 or classes.shape != ids.shape:
        raise InvalidInputError(
            f"There must be one class per id, but the classes have the shape {classes.shape} and the ids {ids.shape}."
        )
    if len(ids) == 0:
        classes, ids = classes.astype(np.int64), ids.astype(np.int64)
    for name, values in (("segmentation", segmentation), ("object_prediction", classes), ("seg_ids", ids)):
        if np.dtype(values.dtype).kind not in "bui":
            raise InvalidTypeError(f"{name} must have an integer dtype, but has {values.dtype}.")
    if len(ids) and (classes.min() < 0 or ids.min() < 0 or len(np.unique(ids)) < len(ids)):
        raise InvalidInputError("Classes and ids must not be negative, and each id may occur only once.")
    order = np.argsort(ids)
    ids, classes = ids[order].astype(np.int64), classes[order]
    dtype = np.promote_types(segmentation.dtype, np.min_scalar_type(int(classes.max(initial=0))))
    classes = classes.astype(dtype)
    if len(segmentation.shape) < 3:
        return _look_up(np.asarray(segmentation), ids, classes)
    out = np.empty(segmentation.shape, dtype=dtype)
    for z in range(len(out)):
        out[z] = _look_up(np.asarray(segmentation[z]), ids, classes)
    return out


def _look_up(labels: np.ndarray, ids: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Replace ids (ascending) by their classes, and all else by 0."""
    labels = labels.astype(np.int64, copy=False)
    n = int(ids[-1]) + 1 if len(ids) else 0
    if n <= max(4 * labels.size, 2**16):
        table = np.zeros(n + 1, dtype=classes.dtype)
        table[ids] = classes
        table[0] = 0
        return np.take(table, labels, mode="clip")  # what is too large becomes the last entry, which is 0
    position = np.minimum(np.searchsorted(ids, labels), len(ids) - 1)
    return np.where((ids[position] == labels) & (labels != 0), classes[position], 0).astype(classes.dtype)
