"""What the library, the one-liner and the commands share: which model, which tiles, and the steps for one image."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from segment_anything import SamPredictor

from ..core.errors import DecoderMissingError, InvalidInputError, ModelError
from ..core.progress import Step, Steps
from ..core.tiling import TileSpec
from ..embeddings.encode import ImageEmbeddings, embedding_steps
from ..embeddings.signature import compute_data_signature
from ..embeddings.store import stored_canvas
from ..models import registry
from ..models.decoder import get_decoder
from ..models.precision import precision_of
from ..models.specs import DEFAULT_MODEL, SHIPPED_MODEL, ModelSpec
from .ais import InstanceSegmentationWithDecoder
from .amg import AMGBase
from .factory import get_instance_segmentation_generator, get_segmentation_mode
from .settings import (
    check_options,
    full_options,
    generate_options,
    init_options,
    is_tiled,
    mode_of,
    model_settings,
)

Segmenter = AMGBase | InstanceSegmentationWithDecoder

# Planes above this size are split for the watershed, which then runs in parallel and in little memory.
BLOCK_WATERSHED_PIXELS = 4096**2

# Of `vit_t_lite`. Its training mostly enlarged images less than 2.7 fold.
_ENLARGEMENT, _SMALLEST_CANVAS, _CANVAS_STEP = 2.5, 128, 64
_LARGE_IMAGE, _LARGE_CANVAS = 512, 1024  # longer sides in pixels: above the first, the second instead of its own


@dataclass(frozen=True)
class Strategy:
    """How an image is shown to the encoder: `canvas` is the side in pixels of what it sees at once (None for the
    model's own), `tile_shape` and `halo` (y, x) are in pixels, None for no tiles; `normalization` is that of tiles."""

    canvas: int | None = None
    tile_shape: tuple[int, int] | None = None
    halo: tuple[int, int] | None = None
    normalization: str = "tile"


def default_model() -> str:
    """Return `vit_b_lm` if its files were downloaded before, else `vit_t_lite`, which comes with the package."""
    spec = registry.find_spec(DEFAULT_MODEL)
    folder = registry.get_models_directory()
    return DEFAULT_MODEL if all((folder / name).is_file() for name in spec.files) else SHIPPED_MODEL


def choose_strategy(
    model_name: str | None,
    canvas: int,
    shape: Sequence[int],
    tile_shape: Sequence[int] | Literal["auto"] | None = "auto",
    halo: Sequence[int] | None = None,
) -> Strategy:
    """Choose canvas and tiles for an image.

    `vit_t_lite` sees images up to 512 x 512 on its own canvas of 640 pixels and larger ones on 1024; still larger ones
    are cut into tiles, which are all normalised alike. In held-out images of more than 512 pixels masks from a box have
    an IoU of 0.88 with 1024 and 0.81 with 512; the decoder's accuracy (mSA) in those of 520 x 696 is 0.66 with 1024,
    0.48 with 512, and 0.57 with tiles of 384 pixels seen at full resolution. It does not know objects as large as those
    in small images that fill its canvas, so these get one of 2.5 times their size: of 2, 2.5 and 3.25, that has
    the best masks in pieces of 64 to 180 pixels of held-out images.
    Other models keep their canvas; they were trained with shrunk images, so tiles start at twice the canvas.

    Args:
        model_name: The model; None for a checkpoint.
        canvas: The canvas of the model in pixels.
        shape: Shape (Y, X) of the image.
        tile_shape: Tile shape (y, x) in pixels, None for no tiles, or `auto` to choose.
        halo: Overlap (y, x) of the tiles in pixels; None chooses it.

    Raises:
        InvalidInputError: If tile shape or halo are not two integers.
    """
    is_lite, own = model_name == SHIPPED_MODEL, canvas
    if is_lite:
        canvas = _LARGE_CANVAS
    if isinstance(tile_shape, str):
        if tile_shape != "auto":
            raise InvalidInputError(f"tile_shape must be two integers (y, x), None or 'auto', but is {tile_shape!r}.")
        margin = canvas // 8
        tile_shape = (canvas - 2 * margin,) * 2 if max(shape) > (canvas if is_lite else 2 * canvas) else None
        halo = (margin, margin) if halo is None else halo
    tiling = None if tile_shape is None else TileSpec.create(shape, tile_shape, halo)
    if not is_lite:
        return Strategy(None, tiling and tiling.tile_shape, tiling and tiling.halo)
    seen = max(shape) if tiling is None else max(max(tile.outer_shape) for tile in tiling)
    if seen <= _LARGE_IMAGE:
        steps = int(_ENLARGEMENT * seen / _CANVAS_STEP + 0.5)
        canvas = min(own, max(_SMALLEST_CANVAS, _CANVAS_STEP * steps))
    return Strategy(canvas, tiling and tiling.tile_shape, tiling and tiling.halo, "image")


def default_options(model_name: str | None, mode: str) -> dict[str, Any]:
    """Return the options of `generate` that `segment` and the command use, where they differ from the library's.

    Only `vit_t_lite` has its own; published models keep the defaults of the library.
    """
    if model_name != SHIPPED_MODEL or mode not in ("ais", "amg"):
        return {}
    settings = registry.find_spec(SHIPPED_MODEL).settings
    if mode == "amg":
        return settings.amg
    return {
        "center_distance_threshold": settings.center_distance_thresh,
        "boundary_distance_threshold": settings.boundary_distance_thresh,
        "distance_smoothing": settings.distance_smoothing,
        "min_size": settings.min_size,
    }


def resolve_model(model_type: str | None, checkpoint: str | os.PathLike | None) -> str | None:
    """Return the name of the model to load; None if the checkpoint itself has to tell what it is."""
    if model_type is not None:
        return model_type
    return default_model() if checkpoint is None else None


def find_model(model_type: str | None, checkpoint: str | os.PathLike | None, mode: str | None) -> ModelSpec | None:
    """Check model and mode before anything is loaded.

    Returns:
        The row of the model; None for a checkpoint.

    Raises:
        UnknownModelError: If there is no such model.
        ModelError: If the model was not trained for the mode.
        InvalidInputError: If the mode is unknown.
    """
    mode = get_segmentation_mode(mode, has_decoder=True) if mode not in (None, "auto") else None
    if checkpoint is not None:
        return None
    spec = registry.find_spec(model_type)
    if mode is not None and mode not in spec.modes:
        error = DecoderMissingError if mode != "amg" and not spec.has_decoder else ModelError
        raise error(
            f"The model {spec.name!r} cannot segment in the mode {mode!r}: it was trained for "
            f"{', '.join(spec.modes)}. Choose one of these, or another model."
        )
    return spec


def _canvas_of_store(store: str | os.PathLike | None) -> int | None:
    return None if store in (None, "auto") else stored_canvas(Path(store).expanduser())


@dataclass(frozen=True)
class LoadedModel:
    """A predictor with its decoder and the mode to segment with; gives segmenters for plain and tiled images."""

    predictor: SamPredictor
    decoder: torch.nn.Module | None
    mode: str
    source: Mapping[str, Any] = field(default_factory=dict)
    others: dict[int, "LoadedModel"] = field(default_factory=dict, repr=False)

    @property
    def canvas(self) -> int:
        """Side in pixels of what the encoder sees at once."""
        return self.predictor.model.image_encoder.img_size

    def at_canvas(self, canvas: int | None) -> "LoadedModel":
        """Return the model with another canvas; it is loaded once."""
        if canvas in (None, self.canvas):
            return self
        if canvas not in self.others:
            self.others[canvas] = load_model(**self.source, image_size=canvas)
        return self.others[canvas]

    def for_prompts(
        self,
        shape: Sequence[int],
        tile_shape: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        store: str | os.PathLike | None = None,
    ) -> "LoadedModel":
        """Return the model with the canvas for prompts in an image.

        Args:
            shape: Shape (Y, X) of the image.
            tile_shape: Tile shape (y, x) in pixels; None for no tiles.
            halo: Overlap (y, x) of the tiles in pixels.
            store: Where the embeddings are kept. If there are some, their canvas is taken; not in the automatic cache.
        """
        name = None if self.source.get("checkpoint") is not None else self.source.get("model_type")
        if name != SHIPPED_MODEL:
            return self
        strategy = choose_strategy(name, self.canvas, shape, tile_shape, halo)
        return self.at_canvas(_canvas_of_store(store) or strategy.canvas)

    def segmenter(self, tiled: bool, **kwargs: Any) -> Segmenter:
        """Create a segmenter; `kwargs` are the options of its class."""
        return get_instance_segmentation_generator(
            self.predictor, tiled, None if self.mode == "amg" else self.decoder, self.mode, **kwargs
        )


def load_model(
    model_type: str | None,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    mode: str | None = None,
    precision: str | None = None,
    **model_kwargs: Any,
) -> LoadedModel:
    """Load a model for automatic segmentation.

    Args:
        model_type: The name of the model, or the architecture of the checkpoint; None detects the latter.
        checkpoint: A checkpoint instead of a published model.
        device: The device; None chooses it.
        mode: `amg`, `ais` or `apg`. None or `auto` takes `ais` if the model has a decoder, else `amg`.
        precision: See `get_sam_model`.
        model_kwargs: More arguments of `get_sam_model`, for example `image_size`.

    Raises:
        UnknownModelError, ModelError, InvalidInputError: See `find_model`.
        DecoderMissingError: If the mode needs a decoder and the checkpoint has none.
    """
    from ..models.loading import get_sam_model

    find_model(model_type, checkpoint, mode)
    if model_type is None:
        from ..models.checkpoints import read_checkpoint
        model_type = read_checkpoint(checkpoint, mmap=True).architecture
    predictor, state = get_sam_model(
        model_type, device=device, checkpoint_path=checkpoint, return_state=True, precision=precision, **model_kwargs
    )
    source = {
        "model_type": model_type, "checkpoint": checkpoint, "device": device, "mode": mode, "precision": precision,
        **{name: value for name, value in model_kwargs.items() if name != "image_size"},
    }
    return replace(with_decoder(predictor, state, mode, None), source=source)


def with_decoder(predictor, state: Mapping[str, Any], mode: str | None, device) -> LoadedModel:
    """Build the decoder whose weights are in a state, if there are any."""
    decoder_state = state.get("decoder_state")
    mode = get_segmentation_mode(mode, decoder_state is not None)
    decoder = None
    if decoder_state is not None:
        normalization = (state.get("decoder_settings") or {}).get("normalization", "instance")
        decoder = get_decoder(
            predictor.model.image_encoder, decoder_state, device or predictor.device, normalization=normalization,
            dtype=precision_of(predictor),
        )
    return LoadedModel(predictor, decoder, mode)


@dataclass(frozen=True)
class ImagePlan:
    """Model and segmenter for one image, and the arguments of `segmentation_steps` and `output_settings`."""

    model: LoadedModel
    segmenter: Segmenter
    work: dict[str, Any]


def plan_image(
    model: LoadedModel,
    shape: Sequence[int],
    tile_shape: Sequence[int] | Literal["auto"] | None,
    halo: Sequence[int] | None,
    options: Mapping[str, Any],
    model_name: str | None,
    store: str | os.PathLike | None = None,
) -> ImagePlan:
    """Decide for an image of a shape (Y, X) about tiles, and split options into those of the class and of `generate`.

    Embeddings of the model that ships that are kept in `store` are used with their canvas.

    Raises:
        InvalidInputError: For unknown options, with the nearest names.
    """
    strategy = choose_strategy(model_name, model.canvas, shape, tile_shape, halo)
    kept = _canvas_of_store(store) if model_name == SHIPPED_MODEL else None
    model = model.at_canvas(kept or strategy.canvas)
    tiled = strategy.tile_shape is not None
    of_class, of_generate = init_options(model.mode, tiled), generate_options(model.mode, tiled)
    check_options(options, {**of_class, **of_generate}, f"the segmentation mode {model.mode!r}")
    segmenter = model.segmenter(tiled, **{k: v for k, v in options.items() if k in of_class})
    work = {
        **default_options(model_name, model.mode), **{k: v for k, v in options.items() if k not in of_class},
        "tile_shape": strategy.tile_shape, "halo": strategy.halo,
        "embedding_options": {"normalization": strategy.normalization} if tiled else None,
    }
    return ImagePlan(model, segmenter, work)


def estimate_memory(plan: ImagePlan, shape: Sequence[int], on_disk: bool) -> int:
    """Estimate the memory in bytes that segmenting an image (Y, X) needs beside the model.

    Maps, smoothed maps, seeds and labels were measured to need 25 bytes per pixel (4200 x 4200 pixels, `ais` with
    tiles). Embeddings are counted unless they are kept on disk.
    """
    n_tiles = 1
    if plan.work["tile_shape"] is not None and not on_disk:
        n_tiles = len(TileSpec.create(shape, plan.work["tile_shape"], plan.work["halo"]))
    features = plan.model.predictor.model.prompt_encoder
    n_values = features.embed_dim * int(np.prod(features.image_embedding_size))
    return 28 * int(np.prod(shape, dtype=np.int64)) + 4 * n_values * n_tiles


def segmentation_steps(
    predictor: SamPredictor,
    segmenter: Segmenter,
    image: Any,
    *,
    embedding_path: str | os.PathLike | None = None,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    batch_size: int = 1,
    mask: np.ndarray | None = None,
    embedding_options: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> Steps[tuple[np.ndarray, ImageEmbeddings]]:
    """Segment one image: embed, initialise, generate. Yields `Step`, returns labels (Y, X) and embeddings.

    What was embedded is kept in `embedding_path` when the work is cancelled.

    Args:
        predictor: The predictor.
        segmenter: The segmenter; it keeps its state, so that `generate` may be called again.
        image: Image (Y, X[, C]), may be lazy if it is tiled.
        embedding_path: Where to keep the embeddings; None keeps them in memory.
        tile_shape: Tile shape (y, x) in pixels; needed by the tiled segmenters and for these only.
        halo: Halo (y, x) in pixels.
        batch_size: Tiles per call of the network.
        mask: Array (Y, X): only tiles that touch a non-zero pixel are processed.
        embedding_options: More options of `precompute_image_embeddings`.
        generate_kwargs: Options of `segmenter.generate`.
    """
    tiling = {} if tile_shape is None else {"tile_shape": tuple(tile_shape), "halo": halo and tuple(halo)}
    embeddings = yield from embedding_steps(
        predictor, image, embedding_path, ndim=2, batch_size=batch_size, mask=mask, **tiling,
        **(embedding_options or {}),
    )
    if tiling and tiling["halo"] is None:
        tiling["halo"] = tuple(embeddings["features"].attrs["halo"])
    mode = mode_of(segmenter)
    tiles = {**tiling, "mask": mask} if tiling else {}
    if tiling and mode != "amg":
        tiles["batch_size"] = batch_size
    yield from initialize_steps(segmenter, image, embeddings, **tiles)

    if mode == "ais" and tiling and np.prod(image.shape[:2], dtype=np.int64) > BLOCK_WATERSHED_PIXELS:
        generate_kwargs = {**tiling, **generate_kwargs}
    if hasattr(segmenter, "generate_steps"):
        labels = yield from segmenter.generate_steps(**generate_kwargs)
    else:
        yield Step(0, 1, "Find objects")
        labels = segmenter.generate(**generate_kwargs)
        yield Step(1, 1, "Find objects")
    return labels, embeddings


def initialize_steps(
    segmenter: Segmenter, image: Any, image_embeddings: ImageEmbeddings, i: int | None = None, **kwargs: Any
) -> Steps[None]:
    """Initialise any segmenter, with progress; options that it does not have are left out."""
    if hasattr(segmenter, "initialize_steps"):
        accepted = inspect.signature(segmenter.initialize_steps).parameters
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        yield from segmenter.initialize_steps(image, image_embeddings, i=i, **kwargs)
    else:
        yield Step(0, 1, "Initialize segmentation")
        segmenter.initialize(image, image_embeddings, i=i, **kwargs)
        yield Step(1, 1, "Initialize segmentation")


def output_settings(
    predictor: SamPredictor,
    segmenter: Segmenter,
    image: Any,
    *,
    tile_shape: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    mask: np.ndarray | None = None,
    embedding_options: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Return what decides the result, for the record of an output. Reads the image, in pieces."""
    mode = mode_of(segmenter)
    settings = {
        "mode": mode,
        **model_settings(predictor, getattr(segmenter, "_decoder", None)),
        "image": compute_data_signature(image),
        "canvas": predictor.model.image_encoder.img_size,
        "tile_shape": tile_shape and list(tile_shape),
        "halo": halo and list(halo),
        "options": full_options(segmenter.generate, generate_kwargs),
    }
    own = {name: getattr(segmenter, f"_{name}", None) for name in init_options(mode, is_tiled(segmenter))}
    settings["options"] |= full_options(lambda: None, {k: v for k, v in own.items() if v is not None})
    if mask is not None:
        settings["mask"] = compute_data_signature(mask)
    if embedding_options:
        settings["embedding"] = dict(embedding_options)
    return json.loads(json.dumps(settings))
