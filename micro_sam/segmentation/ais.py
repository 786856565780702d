"""Automatic instance segmentation (AIS): a decoder predicts three maps, a watershed finds the instances in them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects
from segment_anything import SamPredictor

from .._tiled_prompting import embedding_tiling
from ..core.errors import DecoderMissingError, InvalidInputError, ModelError, NotInitializedError, require_positive_int
from ..core.progress import Step, Steps, drain
from ..core.tiling import Tile
from ..embeddings.encode import ImageEmbeddings, embedding_steps, set_precomputed
from .planes import check_plane, check_tiled_plane_index, is_blank, select_plane, tiles_to_process
from .watershed import (
    WatershedOptions,
    block_watershed,
    check_output,
    check_output_holds,
    watershed_from_center_and_boundary_distances,
)

Record = dict[str, Any]
MAP_NAMES = ("foreground", "center_distances", "boundary_distances")
OUTPUT_MODES = ("instance_segmentation", "binary_mask")


def check_output_mode(output_mode: str) -> None:
    """Raise `InvalidInputError` for an unknown output mode."""
    if output_mode not in OUTPUT_MODES:
        raise InvalidInputError(f"output_mode must be one of {OUTPUT_MODES}, but is {output_mode!r}.")


def labels_to_records(segmentation: np.ndarray) -> list[Record]:
    """Convert a label image to one record per object, ordered by id.

    Args:
        segmentation: Labels (Y, X) or (Z, Y, X).

    Returns:
        Records with `segmentation` (bool, of the shape of the labels), `area` in pixels, `bbox` [x, y, w, h] or
        [x, y, z, w, h, d] with half-open extents, `crop_box` (the whole image in the same order) and `seg_id`.
    """
    ids, consecutive = np.unique(segmentation, return_inverse=True)
    consecutive = consecutive.reshape(segmentation.shape) + int(len(ids) > 0 and ids[0] != 0)
    crop_box = [0] * segmentation.ndim + list(segmentation.shape[::-1])
    records = []
    for k, (id_, box) in enumerate(zip(ids[ids != 0], find_objects(consecutive)), 1):
        mask = np.zeros(segmentation.shape, dtype=bool)
        mask[box] = consecutive[box] == k
        start, extent = [s.start for s in box[::-1]], [s.stop - s.start for s in box[::-1]]
        records.append({
            "segmentation": mask, "area": int(mask[box].sum()), "bbox": start + extent,
            "crop_box": list(crop_box), "seg_id": int(id_),
        })
    return records


class InstanceSegmentationWithDecoder:
    """Segments instances from the maps of a segmentation decoder.

    `initialize` runs the decoder and remembers its maps; `generate` is cheap and may be called repeatedly with
    different settings. It never changes what is remembered.

    Args:
        predictor: The predictor.
        decoder: The decoder, see `get_predictor_and_decoder`.

    Example:
        >>> segmenter = InstanceSegmentationWithDecoder(predictor, decoder)  # doctest: +SKIP
        >>> segmenter.initialize(image)  # doctest: +SKIP
        >>> labels = segmenter.generate(min_size=50)  # doctest: +SKIP
    """

    def __init__(self, predictor: SamPredictor, decoder: torch.nn.Module) -> None:
        if decoder is None:
            raise DecoderMissingError(
                "This segmentation needs a decoder, but got None. Load a model that has one with "
                "get_predictor_and_decoder, or use the automatic mask generator (mode 'amg')."
            )
        self._predictor = predictor
        self._decoder = decoder
        self.clear_state()

    @property
    def is_initialized(self) -> bool:
        """Whether there is something to generate from."""
        return self._foreground is not None

    def initialize(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        verbose: bool = False,
        pbar_init: Callable[[int, str], None] | None = None,
        pbar_update: Callable[[int], None] | None = None,
        ndim: int = 2,
    ) -> None:
        """Run the decoder on an image.

        Args:
            image: Image (Y, X[, C]). With `i` also the stack is accepted. A constant image is background.
            image_embeddings: Its embeddings; computed by default.
            i: The plane, for embeddings of a stack.
            verbose: Whether to show progress.
            pbar_init: Callback `(total, description)` for progress.
            pbar_update: Callback `(n)` for progress.
            ndim: 3 says that `image` is a stack, if its shape leaves that open.

        Raises:
            InvalidInputError: If image and embeddings do not fit.
        """
        steps = self.initialize_steps(image, image_embeddings, i, ndim=ndim)
        drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)

    def initialize_steps(
        self, image: np.ndarray, image_embeddings: ImageEmbeddings | None = None, i: int | None = None, *, ndim: int = 2
    ) -> Steps[None]:
        """Generator behind `initialize`. Nothing is remembered until it is finished."""
        if image_embeddings is None:
            image, i = select_plane(image, i, None, ndim), None
            image_embeddings = yield from embedding_steps(self._predictor, image, ndim=2)
        elif image_embeddings["input_size"] is None:
            raise InvalidInputError(
                f"The embeddings are tiled: use the tiled class instead of {type(self).__name__}."
            )
        set_precomputed(self._predictor, image_embeddings, i=i)
        shape = tuple(self._predictor.original_size)
        image = check_plane(image, i, shape, ndim)
        yield Step(0, 1, "Run decoder")
        if image is not None and is_blank(image):
            maps = np.zeros((3, *shape), dtype=np.float32)
        else:
            maps = self._decode(self._predictor.features, self._predictor.input_size, shape)[0]
        self._remember(dict(zip(MAP_NAMES, maps)), image_embeddings, i)
        yield Step(1, 1, "Run decoder")

    @torch.no_grad()
    def _decode(self, features: torch.Tensor, input_size, original_size) -> np.ndarray:
        maps = self._decoder(features, tuple(input_size), tuple(original_size)).float().cpu().numpy()
        if maps.shape[1] != 3:
            raise ModelError(
                f"The decoder must give 3 maps (foreground, centre distance, boundary distance), but gives "
                f"{maps.shape[1]}. Use the decoder of an instance segmentation model."
            )
        return maps

    def _remember(self, maps: Mapping[str, np.ndarray], image_embeddings: ImageEmbeddings | None, i: int | None):
        self._foreground = maps["foreground"]
        self._center_distances = maps["center_distances"]
        self._boundary_distances = maps["boundary_distances"]
        self._image_embeddings, self._i = image_embeddings, i

    def _check_initialized(self) -> None:
        if not self.is_initialized:
            raise NotInitializedError(f"{type(self).__name__} is not initialized. Call initialize(image) first.")

    def generate(
        self,
        center_distance_threshold: float = 0.5,
        boundary_distance_threshold: float = 0.5,
        foreground_threshold: float = 0.5,
        foreground_smoothing: float = 1.0,
        distance_smoothing: float = 1.6,
        min_size: int = 0,
        output_mode: str = "instance_segmentation",
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        n_threads: int | None = None,
        optimize_memory: bool = False,
        segmentation: np.ndarray | None = None,
    ) -> list[Record] | np.ndarray:
        """Segment instances with the maps of the decoder.

        Args:
            center_distance_threshold: Seeds are where the distance to the centre is below this.
            boundary_distance_threshold: Seeds are where the inverted distance to the boundary is below this.
            foreground_threshold: Objects are where the foreground probability is above this.
            foreground_smoothing: Sigma in pixels for smoothing the foreground; 0 for none.
            distance_smoothing: Sigma in pixels for smoothing the distances; 0 for none.
            min_size: Smallest object in pixels; 0 keeps all.
            output_mode: `instance_segmentation` for labels, `binary_mask` for records.
            tile_shape: Work in parallel blocks of this shape in pixels; None for all at once.
            halo: How far blocks look beyond themselves, needed with `tile_shape`.
            n_threads: Number of threads for the blocks; None for all cores. It does not change the result.
            optimize_memory: Whether to keep the seeds in a temporary file; needs `tile_shape`.
            segmentation: Array or zarr array to write the labels to; None for a new one.

        Returns:
            Labels uint64 (Y, X) with 0 for background; or records, see `labels_to_records`.

        Raises:
            NotInitializedError: If `initialize` was not called.
            InvalidInputError: For an unknown mode or unfitting arguments.
        """
        self._check_initialized()
        check_output_mode(output_mode)
        options = WatershedOptions(
            center_distance_threshold, boundary_distance_threshold, foreground_threshold,
            foreground_smoothing, distance_smoothing, min_size,
        )
        maps = (self._center_distances, self._boundary_distances, self._foreground)
        if tile_shape is not None:
            labels = block_watershed(*maps, options, tile_shape, halo, n_threads, optimize_memory, segmentation)
        elif optimize_memory:
            raise InvalidInputError("optimize_memory works in blocks: pass tile_shape and halo as well.")
        else:
            if segmentation is not None:
                check_output(segmentation, self._foreground.shape)
            labels = watershed_from_center_and_boundary_distances(*maps, **vars(options))
            if segmentation is not None:
                check_output_holds(segmentation, int(labels.max(initial=0)))
                segmentation[...] = labels.astype(segmentation.dtype, copy=False)
                labels = segmentation
        return labels_to_records(np.asarray(labels[...])) if output_mode == "binary_mask" else labels

    def get_state(self) -> dict[str, Any]:
        """Return what `initialize` computed: float32 maps `foreground`, `center_distances`, `boundary_distances`.

        Raises:
            NotInitializedError: If `initialize` was not called.
        """
        self._check_initialized()
        return {name: getattr(self, f"_{name}") for name in MAP_NAMES}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, so that `generate` can be called.

        Args:
            state: What `get_state` returned; other keys are ignored.

        Raises:
            InvalidInputError: If a map is missing, or shapes differ.
        """
        missing = [name for name in MAP_NAMES if name not in state]
        if missing:
            raise InvalidInputError(f"The state lacks {missing}: it must hold {list(MAP_NAMES)}.")
        maps = {name: np.asarray(state[name], dtype=np.float32) for name in MAP_NAMES}
        shapes = {name: array.shape for name, array in maps.items()}
        if len(set(shapes.values())) != 1:
            raise InvalidInputError(f"The maps of the state must have one shape, but have {shapes}.")
        self._remember(maps, state.get("image_embeddings"), state.get("i"))

    def clear_state(self) -> None:
        """Forget what `initialize` computed."""
        self._remember(dict.fromkeys(MAP_NAMES), None, None)


class TiledInstanceSegmentationWithDecoder(InstanceSegmentationWithDecoder):
    """Like `InstanceSegmentationWithDecoder`, with tiled embeddings.

    Each tile is decoded with its halo, and its inner part is taken. Tiles without image content (all values equal)
    are not decoded and stay background.
    """

    def initialize(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        verbose: bool = False,
        pbar_init: Callable[[int, str], None] | None = None,
        pbar_update: Callable[[int], None] | None = None,
        batch_size: int = 1,
        mask: np.typing.ArrayLike | None = None,
    ) -> None:
        """Run the decoder on the tiles of an image.

        Args:
            image: Image (Y, X[, C]), may be lazy. With `i` also the stack is accepted.
            image_embeddings: Its tiled embeddings; computed by default.
            i: The plane, for embeddings of a stack.
            tile_shape: Tile shape (y, x) in pixels; by default that of the embeddings.
            halo: Halo (y, x) in pixels; by default that of the embeddings.
            verbose: Whether to show progress.
            pbar_init: Callback `(total, description)` for progress.
            pbar_update: Callback `(n)` for progress.
            batch_size: Number of tiles to process together. It does not change the result.
            mask: Array (Y, X): only tiles that, with their halo, touch a non-zero pixel are processed.

        Raises:
            InvalidInputError: If image, embeddings and tiling do not fit.
        """
        steps = self.initialize_steps(
            image, image_embeddings, i, tile_shape=tile_shape, halo=halo, batch_size=batch_size, mask=mask
        )
        drain(steps, verbose=verbose, pbar_init=pbar_init, pbar_update=pbar_update)

    def initialize_steps(
        self,
        image: np.ndarray,
        image_embeddings: ImageEmbeddings | None = None,
        i: int | None = None,
        *,
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        batch_size: int = 1,
        mask: np.typing.ArrayLike | None = None,
    ) -> Steps[None]:
        """Generator behind `initialize`. Nothing is remembered until it is finished."""
        if image_embeddings is None:
            if tile_shape is None:
                raise InvalidInputError("Pass tiled image_embeddings, or tile_shape (and halo) to compute them.")
            image, i = select_plane(image, i, None), None
            image_embeddings = yield from embedding_steps(
                self._predictor, image, ndim=2, tile_shape=tile_shape, halo=halo, batch_size=batch_size, mask=mask
            )
        require_positive_int("batch_size", batch_size)
        tiling = embedding_tiling(image_embeddings, tile_shape, halo)
        check_tiled_plane_index(image_embeddings, i)
        image = check_plane(image, i, tiling.shape)
        tiles = [
            tile for tile in tiles_to_process(image_embeddings, tiling, i, mask)
            if image is None or not is_blank(image[tile.outer])
        ]
        maps = np.zeros((3, *tiling.shape), dtype=np.float32)
        done = 0
        yield Step(0, len(tiles), "Run decoder for tiles")
        for batch in _batches(image_embeddings, tiles, batch_size):
            features = [_tile_features(image_embeddings, tile, i) for tile in batch]
            sizes = image_embeddings["features"][str(batch[0].id)].attrs
            features = torch.from_numpy(np.concatenate(features)).to(self._predictor.device)
            decoded = self._decode(features, sizes["input_size"], sizes["original_size"])
            for tile, result in zip(batch, decoded):
                maps[(slice(None), *tile.inner)] = result[(slice(None), *tile.inner_local)]
            done += len(batch)
            yield Step(done, len(tiles), "Run decoder for tiles")
        self._remember(dict(zip(MAP_NAMES, maps)), image_embeddings, i)


def _batches(image_embeddings, tiles: list[Tile], batch_size: int) -> Iterator[list[Tile]]:
    """Batches of tiles of equal shape: one decoder call maps all its results to the same size."""
    groups: dict[tuple, list[Tile]] = {}
    for tile in tiles:
        attrs = image_embeddings["features"][str(tile.id)].attrs
        groups.setdefault((tuple(attrs["input_size"]), tuple(attrs["original_size"])), []).append(tile)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start:start + batch_size]


def _tile_features(image_embeddings, tile: Tile, i: int | None) -> np.ndarray:
    features = image_embeddings["features"][str(tile.id)]
    return np.asarray(features[...] if i is None else features[i], dtype=np.float32)
