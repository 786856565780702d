"""What is done with a block: picklable functions that any process can run, given the work folder."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..core.image import LazyImage, open_image
from ..core.labels import relabel_consecutive
from ..core.progress import drain
from ..segmentation.workflow import LoadedModel, load_model, plan_image, segmentation_steps
from .blocks import BlockGrid, shared_pixels
from .stitch import matching_objects
from .store import load_block, save_block


@dataclass(frozen=True)
class ImageSource:
    """An image that each process opens for itself: a path, or a lazy array that can be pickled.

    `options` are those of `core.image.open_image`.
    """

    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> LazyImage:
        """Open the image."""
        return open_image(self.source, **self.options)


@dataclass(frozen=True)
class ModelSource:
    """A model that each process loads once, see `segmentation.workflow.load_model`.

    With the precision None, a process takes what is chosen where it runs.
    """

    model_type: str | None
    checkpoint: str | None = None
    device: str | None = None
    mode: str | None = None
    precision: str | None = None

    def load(self) -> LoadedModel:
        """Load the model, or take the one of the last call."""
        return _load(self)


@lru_cache(maxsize=1)
def _load(source: ModelSource) -> LoadedModel:
    return load_model(source.model_type, source.checkpoint, source.device, source.mode, source.precision)


@dataclass(frozen=True)
class SegmentPixels:
    """Segments an image (Y, X[, C]) like `micro_sam.segment`, with a range of values that is fixed for all blocks."""

    model: ModelSource
    value_range: tuple[list[float], list[float]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return labels (Y, X)."""
        name = None if self.model.checkpoint else self.model.model_type
        plan = plan_image(self.model.load(), image.shape[:2], "auto", None, self.options, name)
        work = {**plan.work, "embedding_options": {"normalization": self.value_range}}
        return drain(segmentation_steps(plan.model.predictor, plan.segmenter, image, **work), verbose=False)[0]


@dataclass(frozen=True)
class SegmentBlock:
    """Segments a block with its halo and keeps the labels in the work folder.

    `segment` maps pixels (Y, X[, C]) to labels (Y, X).
    """

    image: ImageSource
    grid: BlockGrid
    folder: str
    segment: Callable[[np.ndarray], np.ndarray]

    def __call__(self, block_id: int) -> dict[str, Any]:
        """Return the entry of the log."""
        start = time.perf_counter()
        block = self.grid[block_id]
        index = block.tile.outer if block.z is None else (block.z, *block.tile.outer)
        labels = self.segment(np.asarray(self.image.open().data[index]))
        labels = relabel_consecutive(labels)  # so that ids can be numbered over blocks
        save_block(self.folder, block_id, labels)
        return {"n_objects": int(labels.max(initial=0)), "seconds": round(time.perf_counter() - start, 3)}


@dataclass(frozen=True)
class MatchBlock:
    """Finds the objects of a block that are the same in the blocks that come after it and see the same pixels."""

    grid: BlockGrid
    folder: str

    def __call__(self, work: tuple[int, list[int]]) -> tuple[np.ndarray, list[tuple[int, int, np.ndarray]]]:
        """Match block `work[0]` with the blocks `work[1]`.

        Returns:
            The ids that reach into the inner part of the block; and blocks with pairs of ids (N, 2).
        """
        a, others = work
        labels, matches = load_block(self.folder, a), []
        inner = np.unique(labels[self.grid[a].tile.inner_local])
        for b in others:
            here, there = shared_pixels(self.grid[a].tile, self.grid[b].tile)
            pairs = matching_objects(labels[here], load_block(self.folder, b)[there])
            if len(pairs):
                matches.append((a, b, pairs))
        return inner[inner > 0].astype(np.int64), matches


@dataclass(frozen=True)
class PaintBlock:
    """Writes the inner part of a block, with final ids, to a zarr array whose chunks no other block touches."""

    grid: BlockGrid
    folder: str
    array: str

    def __call__(self, work: tuple[int, np.ndarray]) -> None:
        """Paint block `work[0]`; `work[1]` are the final ids of its ids."""
        import zarr

        block_id, final = work
        block = self.grid[block_id]
        labels = final[load_block(self.folder, block_id)[block.tile.inner_local]]
        index = block.tile.inner if block.z is None else (block.z, *block.tile.inner)
        zarr.open_array(self.array, mode="r+")[index] = labels
