"""Which models a menu offers, and what a form asks for when embeddings are to be computed. No Qt, no torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import MicroSamError, UnknownModelError, nearest_names
from ..models import registry
from ..models.specs import DEFAULT_MODEL, FAMILY_LABELS, LOCAL_FAMILY, SHIPPED_MODEL, SIZE_LABELS, ModelSpec
from .geometry import AnnotationImage

# Size of the weights (float32) in 10^6 bytes; downloads are within one percent of it.
_MEGABYTES = {"vit_t": 41, "vit_b": 375, "vit_l": 1250, "vit_h": 2564}
_DECODER_MEGABYTES = 38

_SIZES = tuple(SIZE_LABELS.values())
# How menus call the families whose names mean little to people.
_MENU_LABELS = {FAMILY_LABELS["_lite"]: "Included (offline)", LOCAL_FAMILY: "My models"}
_MODE_NAMES = {"amg": "automatic masks (amg)", "ais": "decoder (ais)", "apg": "automatic prompts (apg)"}

AUTO = "auto"
MODES = (AUTO, "amg", "ais", "apg")


@dataclass(frozen=True)
class ModelEntry:
    """A model as a menu shows it.

    `size` is `tiny` to `huge`, and the name for an own model; `megabytes` is what is on disk or has to be downloaded;
    `modes` are the automatic segmentations that it can do in an annotator.
    """

    name: str
    family: str
    size: str
    megabytes: float | None
    purpose: str
    on_disk: bool
    has_decoder: bool
    modes: tuple[str, ...]
    licence: str | None


def _file_megabytes(*paths: Path) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def _files(spec: ModelSpec) -> list[Path]:
    if spec.files:
        folder = registry.get_models_directory()
        return [folder / name for name in spec.files]
    return [Path(path) for path in (spec.local_path, spec.decoder_path) if path is not None]


def _entry(spec: ModelSpec) -> ModelEntry:
    files = _files(spec)
    on_disk = all(path.is_file() for path in files)
    has_decoder = spec.has_decoder and spec.decoder_in_gui
    if on_disk:
        megabytes = _file_megabytes(*files)
    elif spec.architecture is None:
        megabytes = None
    else:
        megabytes = _MEGABYTES[spec.architecture] + (_DECODER_MEGABYTES if spec.has_decoder else 0)
    return ModelEntry(
        name=spec.name, family=_MENU_LABELS.get(spec.family, spec.family), size=spec.size or spec.name,
        megabytes=megabytes, purpose=spec.purpose, on_disk=on_disk, has_decoder=has_decoder,
        modes=spec.modes if has_decoder else tuple(m for m in spec.modes if m == "amg"), licence=spec.licence,
    )


def _size_order(entry: ModelEntry) -> int:
    return _SIZES.index(entry.size) if entry.size in _SIZES else len(_SIZES)


def model_entries() -> list[ModelEntry]:
    """Return all models in the order of menus: by family, then by size. Looks at the disk, not at the network.

    Own models are left out while their file has a mistake, see `local_models_problem`.
    """
    specs = list(registry.MODELS)
    try:
        specs += registry.local_models().values()
    except MicroSamError:
        pass  # the other models can be used all the same; the problem is shown by itself
    entries = [_entry(spec) for spec in specs]
    order = families()
    return sorted(entries, key=lambda entry: (order.index(entry.family), _size_order(entry)))


def local_models_problem() -> str | None:
    """Return what is wrong with the file of own models, or None."""
    try:
        registry.local_models()
    except MicroSamError as error:
        return str(error)
    return None


def families() -> list[str]:
    """Return the families in the order of menus, that of own models last; some may have no model."""
    return [_MENU_LABELS.get(label, label) for label in (*FAMILY_LABELS.values(), LOCAL_FAMILY)]


def get_entry(name: str) -> ModelEntry:
    """Return the entry of a model: the inverse of `resolve` is its `family` and `size`.

    Raises:
        UnknownModelError: If there is no such model.
    """
    return _entry(registry.find_spec(name))


def resolve(family: str, size: str) -> str:
    """Return the name of the model of a family and size; the size of an own model is its name.

    Raises:
        UnknownModelError: If there is none.
    """
    entries = model_entries()
    for entry in entries:
        if (entry.family, entry.size) == (family, size):
            return entry.name
    sizes = [entry.size for entry in entries if entry.family == family]
    if sizes:
        raise UnknownModelError(f"The family {family!r} has no model of size {size!r}, but: {', '.join(sizes)}.")
    raise UnknownModelError(f"There is no family {family!r}. {nearest_names(family, families())}")


def default_entry() -> ModelEntry:
    """Return the model that menus start with: that of `segmentation.workflow.default_model`."""
    published = get_entry(DEFAULT_MODEL)
    return published if published.on_disk else get_entry(SHIPPED_MODEL)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a field of a form. One that is not an error is advice."""

    field: str
    message: str
    is_error: bool = True


@dataclass(frozen=True)
class EmbeddingRequest:
    """What a user asks for.

    Args:
        image: The image, as its layer or anything with the attributes `data`, `name` and maybe `rgb`.
        model: Name of the model; None if `checkpoint` is to tell.
        checkpoint: Custom weights.
        device: `auto` or the name of a device.
        save_path: Where the embeddings are kept; None for the automatic cache.
        tile_shape: Tile (y, x) in pixels; None for no tiles.
        halo: Overlap of the tiles (y, x) in pixels.
        mode: Automatic segmentation: one of `MODES`.
    """

    image: Any
    model: str | None
    checkpoint: Path | None = None
    device: str = AUTO
    save_path: Path | None = None
    tile_shape: tuple[int, int] | None = None
    halo: tuple[int, int] | None = None
    mode: str = AUTO

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `annotation.tasks.open_model`."""
        return {
            "model_type": self.model,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "device": self.device,
            "mode": self.mode,
            "save_path": AUTO if self.save_path is None else str(self.save_path),
            "tile_shape": self.tile_shape,
            "halo": self.halo,
        }


LARGE_PIXELS = 1024  # side above which networks see a shrunk image


def check_request(request: EmbeddingRequest, annotation_mode: str | None = None) -> list[Problem]:
    """Return what is wrong with a request, before any work is done.

    Args:
        request: The request.
        annotation_mode: `2d`, `3d` or `tracking`, to check the axes of the image.
    """
    return [
        *_check_image(request, annotation_mode),
        *_check_model(request),
        *_check_save_path(request.save_path),
    ]


def _check_image(request: EmbeddingRequest, annotation_mode: str | None) -> list[Problem]:
    layer = request.image
    if layer is None:
        return [Problem("image", "There is no image. Drop one into the viewer, or open one with File > Open.")]
    if annotation_mode is None:
        return []
    data = layer.data
    levels = list(data) if getattr(layer, "multiscale", False) else data
    try:
        image = AnnotationImage.create(levels, mode=annotation_mode, rgb=_rgb(layer), name=layer.name)
    except MicroSamError as error:
        return [Problem("image", str(error))]
    return _check_tiles(request, image.plane_shape)


def _rgb(layer: Any) -> bool | None:
    rgb = getattr(layer, "rgb", None)
    # A layer that shows channels as an axis may still have them: only the annotator's mode can tell.
    return True if rgb else None


def _check_tiles(request: EmbeddingRequest, shape: Sequence[int]) -> list[Problem]:
    tile, halo = request.tile_shape, request.halo
    if tile is None:
        if max(shape) <= LARGE_PIXELS:
            return []
        size = " × ".join(map(str, shape))
        text = f"The image is large ({size}): small objects are found better with tiles."
        return [Problem("tile_shape", text, is_error=False)]
    if all(t >= s for t, s in zip(tile, shape)):
        text = "One tile holds the whole image, so tiles have no effect here."
        return [Problem("tile_shape", text, is_error=False)]
    if halo is not None and any(h >= t for h, t in zip(halo, tile)):
        return [Problem("halo", f"The halo {halo} must be smaller than the tile {tile}.")]
    return []


def _check_model(request: EmbeddingRequest) -> list[Problem]:
    if request.mode not in MODES:
        return [Problem("mode", f"There is no mode {request.mode!r}. {nearest_names(request.mode, MODES)}")]
    if request.checkpoint is not None:
        path = request.checkpoint
        if path.is_dir():
            return [Problem("checkpoint", f"{path} is a folder. Choose a file with weights, often best.pt in it.")]
        return [] if path.is_file() else [Problem("checkpoint", f"There is no file {path}.")]
    if request.model is None:
        return [Problem("model", "Choose a model, or custom weights.")]
    try:
        entry = get_entry(request.model)
    except MicroSamError as error:
        return [Problem("model", str(error))]
    if request.mode not in (AUTO, *entry.modes):
        names = " or ".join(_MODE_NAMES[m] for m in entry.modes) or "no automatic segmentation"
        return [Problem("mode", f"{entry.name} cannot do {_MODE_NAMES[request.mode]}. It can do {names}.")]
    return []


def _check_save_path(path: Path | None) -> list[Problem]:
    if path is None:
        return []
    if path.is_file():
        return [Problem("save_path", f"{path} is a file. Choose a folder; it need not exist yet.")]
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in (".zgroup", "zarr.json")):
        text = f"{path} holds other files. Choose an empty or new folder, such as embeddings.zarr."
        return [Problem("save_path", text)]
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
    if existing is None or not os.access(existing, os.W_OK):
        return [Problem("save_path", f"{path} cannot be written. Choose a folder of your own.")]
    return []
