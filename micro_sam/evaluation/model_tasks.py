"""The scores of a model on one image: what is computed for each mode and prompt, and remembered."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .._version import __version__
from ..core.image import LazyImage, open_image
from ..core.labels import check_labels, mask_data_to_segmentation
from ..core.masks import crop_mask
from ..core.output import write_json
from ..core.progress import Step, Steps
from ..embeddings.encode import embedding_steps
from ..embeddings.signature import compute_data_signature
from ..segmentation.factory import get_segmentation_mode
from ..segmentation.settings import check_options, generate_options, init_options, model_settings
from ..segmentation.workflow import ImagePlan, LoadedModel, plan_image
from ..volume.images import image_settings, image_steps
from .errors import UnfitInputsError
from .iterative import iterate_prompts
from .metrics import choose_objects, mask_iou, segmentation_scores

# The first prompt, and whether the last mask is a prompt for the next one, too.
PROMPTS = {"point": ("point", False), "box": ("box", False), "point_masks": ("point", True), "box_masks": ("box", True)}
_SEED = 0
_BATCH_SIZE = 32
# Masks of objects that are held in full at a time.
_MAX_MASK_BYTES = 2**27


@dataclass(frozen=True)
class LabelledImage:
    """Files of an image and of its labels, its name and that of the group that it belongs to.

    Files are opened anew for each task: evaluations may have thousands of them.
    """

    name: str
    group: str
    image_path: Path
    label_path: Path
    keys: tuple[str | None, str | None]
    ndim: int

    @classmethod
    def create(
        cls, name: str, group: str, image_path: Path, label_path: Path, keys: tuple[str | None, str | None]
    ) -> "LabelledImage":
        """Look into both files.

        Raises:
            UnfitInputsError: If their shapes differ.
            InvalidInputError, ImageReadError: If one cannot be used.
        """
        image = open_image(image_path, keys[0])
        labels = open_image(label_path, keys[1], ndim=image.ndim)
        if image.shape != labels.shape or labels.has_channels:
            raise UnfitInputsError(
                f"{image_path} has the shape {image.shape}, but its labels {label_path} have "
                f"{tuple(labels.data.shape)}. Check that they belong together."
            )
        return cls(name, group, image_path, label_path, keys, image.ndim)

    def open(self) -> LazyImage:
        """Open the image (Y, X[, C]) or (Z, Y, X[, C])."""
        return open_image(self.image_path, self.keys[0])

    def truth(self) -> np.ndarray:
        """Read the labels (Y, X) or (Z, Y, X)."""
        return check_labels(open_image(self.label_path, self.keys[1], ndim=self.ndim).read())


def known_options(modes: Iterable[str]) -> dict[str, inspect.Parameter]:
    """The options that at least one of the modes has, for images with or without tiles."""
    return {
        name: parameter for mode in modes for tiled in (False, True)
        for name, parameter in {**init_options(mode, tiled), **generate_options(mode, tiled)}.items()
    }


def check_known(options: Mapping[str, Any], modes: Iterable[str]) -> None:
    """Raise `InvalidInputError` with the nearest names if none of the modes has an option."""
    modes = list(modes)
    check_options(options, known_options(modes), f"the modes {', '.join(modes) or 'none'}")


def models_by_mode(
    model: LoadedModel, modes: Sequence[str] | None, trained_for: Sequence[str]
) -> dict[str, LoadedModel]:
    """The model in each of its modes; they share the network, but for other canvases.

    Args:
        model: The model.
        modes: The modes; None takes all that it has.
        trained_for: The modes that it was trained for.

    Raises:
        DecoderMissingError: If a mode needs a decoder and the model has none.
    """
    has_decoder = model.decoder is not None
    if modes is None:
        modes = [mode for mode in trained_for if has_decoder or mode == "amg"]
    return {
        mode: replace(
            model, mode=get_segmentation_mode(mode, has_decoder), source={**model.source, "mode": mode}, others={}
        ) for mode in modes
    }


@dataclass(frozen=True)
class ModelTasks:
    """A model and how it is evaluated: computes or remembers the scores of one image and task.

    Tasks are the automatic modes and the names of `PROMPTS`.
    """

    name: str
    model: LoadedModel
    models: dict[str, LoadedModel]
    prompts: tuple[str, ...]
    model_name: str | None
    options: dict[str, Any]
    tile_shape: Sequence[int] | str | None
    halo: Sequence[int] | None
    batch_size: int
    n_iterations: int
    n_objects: int | None
    cache: Path

    def settings(self) -> dict[str, Any]:
        """What decides the scores beside images, modes and prompts."""
        return json.loads(json.dumps({
            **model_settings(self.model.predictor, self.model.decoder), "options": self.options,
            "tile_shape": self.tile_shape, "halo": self.halo, "n_iterations": self.n_iterations,
            "n_objects": self.n_objects,
        }))

    def tasks(self, pair: LabelledImage) -> list[str]:
        return [*self.models, *(self.prompts if pair.ndim == 2 else ())]

    def plan(self, mode: str, image: LazyImage) -> ImagePlan:
        known = known_options([mode])
        options = {name: value for name, value in self.options.items() if name in known}
        return plan_image(self.models[mode], image.shape[-2:], self.tile_shape, self.halo, options, self.model_name)

    def image_steps(self, pair: LabelledImage, task: str, embeddings: Path) -> Steps[list[dict[str, Any]]]:
        """Rows for an image, from the cache if they are there. Yields `Step`."""
        is_automatic = task in self.models
        image, truth = pair.open(), pair.truth()
        plan = self.plan(task, image) if is_automatic else None
        if is_automatic:
            settings = image_settings(plan.model.predictor, plan.segmenter, image, {}, plan.work)
        else:
            settings = {
                **model_settings(self.model.predictor), "canvas": self._for_prompts(image).canvas, "prompt": task,
                "image": compute_data_signature(image.data), "n_iterations": self.n_iterations,
                "n_objects": self.n_objects, "seed": _SEED,
            }
        settings |= {"truth": compute_data_signature(truth), "version": __version__}
        path = self._cache_path(pair.name, task, settings)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["rows"]
        work = self._automatic(plan, image, truth, embeddings) if is_automatic else (
            self._prompted(task, image, truth, embeddings)
        )
        rows = yield from work
        write_json(path, {"settings": settings, "rows": rows})
        return rows

    def _cache_path(self, name: str, task: str, settings: Mapping[str, Any]) -> Path:
        digest = xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())
        return self.cache / f"{name.replace('/', '_')}-{task}-{digest}.json"

    def _automatic(self, plan: ImagePlan, image: LazyImage, truth: np.ndarray, embeddings: Path) -> Steps[list[dict]]:
        work = plan.work
        strategy = (work["tile_shape"], work["halo"], work["embedding_options"])
        path = _embedding_path(embeddings, plan.model.canvas, strategy)
        steps = image_steps(
            plan.model.predictor, plan.segmenter, image, {}, work, embedding_path=path, batch_size=self.batch_size
        )
        found, _ = yield from steps
        return [segmentation_scores(np.asarray(found), truth)]

    def _for_prompts(self, image: LazyImage) -> LoadedModel:
        return self.model.for_prompts(image.shape[-2:])

    def _prompted(self, task: str, image: LazyImage, truth: np.ndarray, embeddings: Path) -> Steps[list[dict]]:
        ids = choose_objects(truth, self.n_objects)
        if len(ids) == 0:
            return []
        model, (start, use_masks) = self._for_prompts(image), PROMPTS[task]
        predictor, path = model.predictor, _embedding_path(embeddings, model.canvas, (None, None, None))
        computed = yield from embedding_steps(predictor, image.read(), path, ndim=2)
        masks: list[list[dict]] = [[] for _ in range(self.n_iterations)]
        ious: list[list[float]] = [[] for _ in range(self.n_iterations)]
        n_parts = -(-len(ids) * truth.size // _MAX_MASK_BYTES)
        for part in np.array_split(ids, min(n_parts, len(ids))):
            predictions = iterate_prompts(
                predictor, computed, truth, start=start, n_iterations=self.n_iterations, use_masks=use_masks,
                batch_size=_BATCH_SIZE, rng=_SEED, ids=part,
            )
            for k, (of_ids, of_iteration) in enumerate(predictions):
                ious[k] += [mask_iou(mask, truth == i) for i, mask in zip(of_ids, of_iteration)]
                masks[k] += [_record(mask) for mask in of_iteration]
                yield Step(len(ious[k]), len(ids), "Prompt objects")
        prompted = np.where(np.isin(truth, ids), truth, 0)
        return [
            {"iteration": k, "IoU": float(np.mean(ious[k])), **segmentation_scores(
                mask_data_to_segmentation(masks[k], truth.shape), prompted
            )} for k in range(self.n_iterations)
        ]


def _embedding_path(folder: Path, canvas: int, strategy: tuple) -> Path:
    """Where embeddings are kept while an image is evaluated; modes with the same canvas and tiles share them."""
    return folder / f"{canvas}-{xxhash.xxh3_64_hexdigest(repr(strategy).encode())}.zarr"


def _record(mask: np.ndarray) -> dict[str, Any]:
    """A mask (Y, X) as SAM-style record that holds only its bounding box."""
    boxed = crop_mask(mask)
    height, width = boxed.mask.shape
    return {
        "segmentation": boxed.mask, "bbox": [0, 0, width, height], "global_bbox": [boxed.x0, boxed.y0, width, height],
    }
