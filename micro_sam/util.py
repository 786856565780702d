"""The public names of the library's core, gathered under the path that scripts import them from.

Each name lives in `core`, `models` or `embeddings` and is loaded when first used, so that
`import micro_sam.util` is light.
"""

import importlib
from typing import Any

from .core.progress import handle_pbar
from .core.settings import get_cache_directory, get_device

_DEFAULT_MODEL = "vit_b_lm"
_MODEL_TYPES = ("vit_l", "vit_b", "vit_h", "vit_t")
VIT_T_SUPPORT = True
microsam_cachedir = get_cache_directory

# Public name -> module and the name it has there.
_HOMES = {
    "ImageEmbeddings": ("embeddings.features", "ImageEmbeddings"),
    "SamPredictor": ("models.build_sam", "SamPredictor"),
    "_compute_data_signature": ("embeddings.signature", "compute_legacy_data_signature"),
    "_compute_embeddings_batched": ("embeddings.encode", "compute_embeddings_batched"),
    "_download_sam_model": ("models.registry", "download_sam_model"),
    "_load_checkpoint": ("models.checkpoints", "load_checkpoint"),
    "_to_image": ("core.normalize", "to_image"),
    "apply_nms": ("core.labels", "apply_nms"),
    "compute_iou": ("core.labels", "compute_iou"),
    "export_custom_qlora_model": ("models.export", "export_custom_qlora_model"),
    "export_custom_sam_model": ("models.export", "export_custom_sam_model"),
    "get_block_shape": ("core.labels", "get_block_shape"),
    "get_centers_and_bounding_boxes": ("core.labels", "get_centers_and_bounding_boxes"),
    "get_model_names": ("models.registry", "get_model_names"),
    "get_sam_model": ("models.loading", "get_sam_model"),
    "load_image_data": ("core.image", "load_image_data"),
    "mask_data_to_segmentation": ("core.labels", "mask_data_to_segmentation"),
    "models": ("models.registry", "models"),
    "precompute_image_embeddings": ("embeddings.encode", "precompute_image_embeddings"),
    "segmentation_to_one_hot": ("core.labels", "segmentation_to_one_hot"),
    "set_precomputed": ("embeddings.encode", "set_precomputed"),
}

__all__ = [
    "VIT_T_SUPPORT", "get_cache_directory", "get_device", "handle_pbar", "micro_sam_info", "microsam_cachedir",
    *(name for name in _HOMES if not name.startswith("_")),
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f".{module}", __package__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def micro_sam_info() -> None:
    """Print what the command `micro_sam.info` prints: versions, devices, cache and models."""
    from .models.doctor import collect_info, format_info
    print(format_info(collect_info()))
