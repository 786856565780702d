"""Work over blocks on a cluster: segmentation, tracking and embeddings on `dask.distributed`.

Everything here takes a `distributed.Client`; `connect` starts or reaches a scheduler. Workers load a model once, write
to files that all of them share, and may die: their blocks are computed again by others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clusters import connect
    from .engine import DaskEngine
    from .workflow import precompute_embeddings, segment, track

_HOMES = {
    "connect": "clusters", "DaskEngine": "engine",
    "precompute_embeddings": "workflow", "segment": "workflow", "track": "workflow",
}
__all__ = ["DaskEngine", "connect", "precompute_embeddings", "segment", "track"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
