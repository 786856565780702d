"""Image embeddings as pictures: their principal components, as colours or values, with the scale to the image."""

from collections.abc import Sequence

import numpy as np
from skimage.transform import resize

from .core.errors import InvalidInputError
from .core.tiling import TileSpec
from .embeddings.features import ImageEmbeddings

_MAX_SAMPLES = 20_000


class _Projection:
    """Principal components, fitted to samples (N, C). Signs are fixed, so that equal data get equal colours."""

    def __init__(self, samples: np.ndarray, n_components: int):
        if not 1 <= n_components <= samples.shape[1]:
            raise InvalidInputError(f"n_components must be 1 to {samples.shape[1]}, but is {n_components!r}.")
        samples = samples.astype(np.float64)
        self.mean = samples.mean(axis=0)
        centred = samples - self.mean
        # The covariance is only C x C, however many samples there are.
        _, vectors = np.linalg.eigh(centred.T @ centred)
        axes = vectors[:, ::-1][:, :n_components].T
        largest = np.abs(axes).argmax(axis=1)
        self.axes = axes * np.sign(axes[np.arange(n_components), largest])[:, None]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Project values (..., C) to (..., n)."""
        return ((values - self.mean) @ self.axes.T).astype(np.float32)


def _check(n_components: int, as_rgb: bool) -> None:
    if as_rgb and n_components != 3:
        raise InvalidInputError(f"Colours need n_components=3, but got {n_components}. Or pass as_rgb=False.")


def _to_rgb(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Stretch values (..., 3) to uint8 with one range over everything; what is not `valid` (...) becomes black."""
    known = values if valid is None else values[valid]
    if known.size == 0:
        return np.zeros(values.shape, dtype=np.uint8)
    lo, hi = float(known.min()), float(known.max())
    rgb = np.clip((values - lo) * (255 / max(hi - lo, 1e-12)), 0, 255).astype(np.uint8)
    if valid is not None:
        rgb[~valid] = 0
    return rgb


def _subsample(samples: np.ndarray, max_samples: int = _MAX_SAMPLES) -> np.ndarray:
    """Keep evenly spaced rows of samples (N, C)."""
    return samples[::max(1, -(-len(samples) // max_samples))]


def _channels_last(plane) -> np.ndarray:
    """(1, C, h, w) to (h, w, C)."""
    return np.moveaxis(np.asarray(plane, dtype=np.float32)[0], 0, -1)


def compute_pca(embeddings: np.ndarray, n_components: int = 3, as_rgb: bool = True) -> np.ndarray:
    """Project embeddings on their principal components.

    A stack gets one projection and one colour range, so that colours do not flicker from plane to plane.

    Args:
        embeddings: Features (1, C, h, w), or of a stack (Z, 1, C, h, w), which may be lazy.
        n_components: Number of components; 3 for colours.
        as_rgb: Whether to return colours from 0 to 255.

    Returns:
        Array (h, w, n_components) or (Z, h, w, n_components), uint8 for colours and float32 otherwise.

    Raises:
        InvalidInputError: If the features have another number of axes, or `n_components` does not fit.
    """
    _check(n_components, as_rgb)
    shape = tuple(embeddings.shape)
    if len(shape) not in (4, 5) or shape[-4] != 1:
        raise InvalidInputError(f"Embeddings must have the shape (1, C, h, w) or (Z, 1, C, h, w), but have {shape}.")
    planes = [embeddings] if len(shape) == 4 else embeddings
    samples = _sample_planes([planes[i] for i in _spread(len(planes))])
    project = _Projection(samples, n_components)
    values = np.stack([project(_channels_last(planes[i])) for i in range(len(planes))])
    values = _to_rgb(values) if as_rgb else values
    return values[0] if len(shape) == 4 else values


def _spread(n: int, max_planes: int = 32) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, max_planes)).round().astype(int)).tolist()


def _sample_planes(planes: Sequence) -> np.ndarray:
    samples = [_channels_last(plane).reshape(-1, plane.shape[1]) for plane in planes]
    return np.concatenate([_subsample(s, max(256, _MAX_SAMPLES // len(samples))) for s in samples])


def project_embeddings_for_visualization(
    image_embeddings: ImageEmbeddings, n_components: int = 3, as_rgb: bool = True
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Project embeddings on their principal components, cut or stitched to the shape of the image.

    Args:
        image_embeddings: What `precompute_image_embeddings` returned. Tiles left out by a mask stay black, or
            NaN without `as_rgb`.
        n_components: Number of components; 3 for colours.
        as_rgb: Whether to return colours from 0 to 255.

    Returns:
        Array (h, w, n_components) or (Z, h, w, n_components), and the scale: image pixels per pixel of the array,
        one number per spatial axis (1 for z).

    Raises:
        InvalidInputError: If `n_components` does not fit.
    """
    _check(n_components, as_rgb)
    features = image_embeddings["features"]
    if image_embeddings["input_size"] is None:
        return _project_tiles(features, n_components, as_rgb)
    shape = image_embeddings["original_size"]
    values = compute_pca(features, n_components, as_rgb)
    rows, columns = _unpadded(values.shape[-3:-1], shape)
    values = values[..., :rows, :columns, :]
    return values, _scale(values, shape)


def _unpadded(grid: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a feature map that show the image (H, W); the rest is padding at bottom and right."""
    height, width = shape
    rows = grid[0] if height >= width else max(1, int(height / width * grid[0]))
    columns = grid[1] if width >= height else max(1, int(width / height * grid[1]))
    return rows, columns


def _scale(values: np.ndarray, shape: Sequence[int]) -> tuple[float, ...]:
    scale = tuple(float(s / v) for s, v in zip(shape, values.shape[-3:-1], strict=True))
    return scale if values.ndim == 3 else (1.0, *scale)


def _crop_tile(plane, tile) -> np.ndarray:
    """The part (h, w, C) of a tile's features (1, C, h, w) that shows its inner block."""
    values = _channels_last(plane)
    rows, columns = _unpadded(values.shape[:2], tile.outer_shape)
    values = values[:rows, :columns]
    window = []
    for inner, size, n in zip(tile.inner_local, tile.outer_shape, values.shape[:2], strict=True):
        start = min(int(round(inner.start / size * n)), n - 1)
        window.append(slice(start, max(start + 1, int(round(inner.stop / size * n)))))
    return values[tuple(window)]


def _planes_of(attrs: dict, depth: int | None, tiling: TileSpec) -> list[tuple[int | None, list[int]]]:
    """The computed tiles of each plane."""
    in_mask, tiles = attrs.get("tiles_in_mask"), list(range(len(tiling)))
    if depth is None:
        return [(None, tiles if in_mask is None else list(in_mask))]
    return [(z, tiles if in_mask is None else list(in_mask[str(z)])) for z in range(depth)]


def _project_tiles(features, n_components: int, as_rgb: bool) -> tuple[np.ndarray, tuple[float, ...]]:
    attrs = features.attrs
    tiling = TileSpec(*(tuple(int(v) for v in attrs[name]) for name in ("shape", "tile_shape", "halo")))
    depth, grid = _depth_and_grid(features, attrs)
    planes = _planes_of(attrs, depth, tiling)

    def read(z, tile):
        array = features[str(tile)]
        return _crop_tile(array[...] if z is None else array[z], tiling[tile])

    known = [(z, tile) for z, tiles in planes for tile in tiles]
    heights, widths = _mosaic(tiling, grid)
    shape = (len(planes), sum(heights), sum(widths), n_components)
    values, valid = np.full(shape, np.nan, np.float32), np.zeros(shape[:-1], dtype=bool)
    if known:
        chosen = [known[i] for i in _spread(len(known), 64)]
        samples = [_subsample(read(*item).reshape(-1, features[str(item[1])].shape[-3])) for item in chosen]
        project = _Projection(_subsample(np.concatenate(samples)), n_components)
        tops, lefts = np.cumsum([0, *heights]), np.cumsum([0, *widths])
        for k, (z, tiles) in enumerate(planes):
            for tile in tiles:
                row, column = divmod(tile, tiling.grid[1])
                place = (k, slice(tops[row], tops[row + 1]), slice(lefts[column], lefts[column + 1]))
                wanted = (heights[row], widths[column], n_components)
                values[place] = resize(project(read(z, tile)), wanted, order=1, mode="edge", anti_aliasing=False)
                valid[place] = True
    values = _to_rgb(np.nan_to_num(values), valid) if as_rgb else values
    values = values[0] if depth is None else values
    return values, _scale(values, tiling.shape)


def _depth_and_grid(features, attrs: dict) -> tuple[int | None, tuple[int, int]]:
    """Number of planes (None for an image) and shape of the feature maps, also if a mask left nothing."""
    for tile in features:
        shape = features[tile].shape
        return (shape[0] if len(shape) == 5 else None), tuple(shape[-2:])
    in_mask = attrs.get("tiles_in_mask")
    return (len(in_mask) if isinstance(in_mask, dict) else None), (64, 64)


def _mosaic(tiling: TileSpec, grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Heights of the rows and widths of the columns of tiles, in pixels of the mosaic.

    All tiles share the resolution of an inner tile with halo on both sides, so that nothing is distorted.
    """
    outer = [min(t + 2 * h, s) for t, h, s in zip(tiling.tile_shape, tiling.halo, tiling.shape, strict=True)]
    per_pixel = max(grid) / max(outer)
    sizes = []
    for tile_size, n, size in zip(tiling.tile_shape, tiling.grid, tiling.shape, strict=True):
        edges = [round(min(i * tile_size, size) * per_pixel) for i in range(n + 1)]
        sizes.append([max(1, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    return sizes[0], sizes[1]
