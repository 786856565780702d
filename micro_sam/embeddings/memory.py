"""The sink for embeddings that stay in memory: plain arrays on the host."""

import numpy as np

from .features import FeatureArray, ImageEmbeddings, TiledFeatures
from .plan import EmbeddingPlan, Item, encoder_sizes


def feature_shape(predictor) -> tuple[int, int, int]:
    """Shape (C, h, w) of what the encoder gives for one image."""
    prompt_encoder = predictor.model.prompt_encoder
    return (prompt_encoder.embed_dim, *prompt_encoder.image_embedding_size)


class MemorySink:
    """Collects features in preallocated arrays."""

    def __init__(self, predictor, plan: EmbeddingPlan):
        self._plan = plan
        shape = (1, *feature_shape(predictor))
        self._shape = shape if plan.depth is None else (plan.depth, *shape)
        self._sizes = {t: encoder_sizes(predictor, plan, t) for t in (plan.tile_ids if plan.tiling else [None])}
        self._arrays = {t: np.zeros(self._shape, np.float32) for t in self._sizes}

    def is_done(self, item: Item) -> bool:
        return False

    def write(self, items: list[Item], features: np.ndarray) -> None:
        for item, values in zip(items, features, strict=True):
            array = self._arrays[item.tile]
            array[0 if item.z is None else (item.z, 0)] = values

    def finish(self) -> ImageEmbeddings:
        plan = self._plan
        if plan.tiling is None:
            return {"features": self._arrays[None], **self._sizes[None]}
        attrs = tiling_attrs(plan)
        arrays = {
            str(t): FeatureArray(array, self._sizes[t], f"features/{t}", plan.computed_planes(t))
            for t, array in self._arrays.items()
        }
        return {"features": TiledFeatures(arrays, attrs, len(plan.tiling)), "input_size": None, "original_size": None}


def tiling_attrs(plan: EmbeddingPlan) -> dict:
    """Attributes of the group of tiled features."""
    attrs = {name: list(getattr(plan.tiling, name)) for name in ("shape", "tile_shape", "halo")}
    if plan.tiles_in_mask is not None:
        attrs["tiles_in_mask"] = plan.tiles_in_mask
    return attrs
