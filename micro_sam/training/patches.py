"""Datasets of random patches with at least one object.

An item is a function of (seed, epoch, index), so that a run that continues sees what an uninterrupted one sees.
The classes are torch-em's datasets as far as other code asks for their kind; reading and sampling are our own,
because torch-em accepts patches before it transforms their labels and never draws the last position.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch_em.data import ConcatDataset, ImageCollectionDataset, SegmentationDataset, TensorDataset
from torch_em.util import ensure_tensor_with_channels

from ..core.errors import InvalidInputError, NoObjectsError
from .pairs import OpenPairs, Pair
from .raw_transforms import Limits, limits_for, require_8bit, rescale
from .seeding import generator, preserved_random_states, seed_everything
from .targets import DecoderTarget, InstanceTarget, label_instances

_ATTEMPTS_PER_IMAGE = 50
_MIN_TRAIN_LENGTH, _MIN_VAL_LENGTH = 100, 5


@dataclass(frozen=True)
class PatchSettings:
    """How patches are drawn and transformed; see `default_sam_dataset`."""

    patch_shape: tuple[int, int] | None
    target: InstanceTarget | DecoderTarget
    raw_transform: Callable
    label_transform: Callable | None = None
    pre_label_transform: Callable | None = None
    label_transform2: Callable | None = None
    transform: Callable | None = None
    sampler: Callable | None = None
    is_multi_tensor: bool = True
    needs_object: bool = True
    is_train: bool = True
    max_attempts: int = 500
    allow_empty: bool = False
    with_padding: bool = True
    seed: int | None = None
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.float32

    @property
    def uses_global_generators(self) -> bool:
        """Whether there is foreign code that may draw from the generators of numpy and torch."""
        foreign = (self.label_transform, self.pre_label_transform, self.label_transform2, self.transform, self.sampler)
        return any(f is not None for f in foreign) or limits_for(self.raw_transform) is None


@dataclass
class _Found:
    """What was found in patches that were not taken."""

    n_blank: int = 0
    n_small: int = 0
    n_refused: int = 0
    largest: int = 0
    names: dict[str, None] = field(default_factory=dict)

    def describe(self, settings: PatchSettings) -> str:
        n, min_size = self.n_blank + self.n_small + self.n_refused, settings.target.min_size
        parts = [f"{self.n_blank} without any label"] if self.n_blank else []
        if self.n_small:
            parts.append(f"{self.n_small} with parts of less than min_size={min_size} pixels (at most {self.largest})")
        if self.n_refused:
            parts.append(f"{self.n_refused} with objects that the sampler refused")
        names = ", ".join(list(self.names)[:3]) + (" ..." if len(self.names) > 3 else "")
        return (
            f"No patch of shape {settings.patch_shape or 'of the image'} with an object was found in {n} attempts, in "
            f"{names}: {', '.join(parts)}. Leave out images without objects, choose a larger patch_shape or a smaller "
            "min_size, raise max_sampling_attempts, or pass allow_empty=True."
        )


@dataclass(frozen=True)
class _Patch:
    pair: int
    plane: int
    raw: np.ndarray
    instances: np.ndarray


class PatchDataset(torch.utils.data.Dataset):
    """Random patches of images and their targets.

    Args:
        pairs: Images and labels.
        settings: How patches are drawn.
        n_samples: The length; None takes the natural one, but at least 100 (5 for validation).
    """

    by_area = False
    """Whether the natural length is the number of patches that cover the images, not the number of images."""

    _ndim = 2

    def __init__(self, pairs: Sequence[Pair], settings: PatchSettings, n_samples: int | None = None):
        # The constructors of torch-em read the files; nothing of what they set up is used here.
        self.pairs, self.settings = tuple(pairs), settings
        self.patch_shape = settings.patch_shape
        self.epoch = 0
        self._open = OpenPairs(self.pairs)
        self._limits: dict[tuple[int, int | None], Limits | None] = {}
        channels = {pair.geometry.n_channels for pair in self.pairs}
        self._repeat_grey = len(channels) > 1
        self._cumulative = np.cumsum([self._natural_length(pair) for pair in self.pairs])
        natural, least = int(self._cumulative[-1]), _MIN_TRAIN_LENGTH if settings.is_train else _MIN_VAL_LENGTH
        self._is_natural = n_samples is None and natural >= least
        self._len = int(n_samples) if n_samples is not None else max(natural, least)

    def _natural_length(self, pair: Pair) -> int:
        if not self.by_area or self.patch_shape is None:
            return pair.n_planes if self.by_area else 1
        return math.ceil(pair.n_planes * math.prod(n / p for n, p in zip(pair.shape[-2:], self.patch_shape)))

    @property
    def ndim(self) -> int:
        """2: training is on planes."""
        return self._ndim

    def __len__(self) -> int:
        return self._len

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch it is; with a seed, each epoch of the training has other patches. Validation stays."""
        self.epoch = int(epoch)

    # torch-em's own versions read the files again.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < self._len:
            raise IndexError(f"Item {index} of a dataset of length {self._len}.")
        settings, states = self.settings, nullcontext()
        if settings.seed is None:
            rng = generator(int(torch.randint(2**62, ())))
        else:
            key = (settings.seed, self.epoch if settings.is_train else 0, index)
            rng = generator(*key)
            states = preserved_random_states() if settings.uses_global_generators else states
        with states:
            if settings.seed is not None and settings.uses_global_generators:
                seed_everything(*key)
            patch = self._find(rng, index)
            raw, target = self._transform_raw(patch), settings.target.from_instances(patch.instances)
            raw, target = self._augment(raw, target, rng)
        raw = ensure_tensor_with_channels(raw, ndim=2, dtype=settings.dtype)
        return raw, ensure_tensor_with_channels(target, ndim=2, dtype=settings.label_dtype)

    def _choose(self, rng: np.random.Generator, index: int) -> int:
        if self._is_natural:
            return int(np.searchsorted(self._cumulative, index, side="right"))
        if self.settings.seed is None:
            return int(rng.integers(len(self.pairs)))
        # All images in turn, over the epochs too.
        epoch = self.epoch if self.settings.is_train else 0
        return (index + epoch * self._len) % len(self.pairs)

    def _find(self, rng: np.random.Generator, index: int) -> _Patch:
        found, n_pair = _Found(), self._choose(rng, index)
        for attempt in range(self.settings.max_attempts):
            if attempt and attempt % _ATTEMPTS_PER_IMAGE == 0:
                n_pair = int(rng.integers(len(self.pairs)))
            patch = self._cut(rng, n_pair, found)
            if patch is not None:
                return patch
        if self.settings.allow_empty:
            return self._cut(rng, n_pair, None)
        raise NoObjectsError(found.describe(self.settings))

    def _cut(self, rng: np.random.Generator, n_pair: int, found: _Found | None) -> _Patch | None:
        """Cut a random patch; None if it is not acceptable. Without `found` every patch is."""
        pair, files, settings = self.pairs[n_pair], self._open[n_pair], self.settings
        plane = int(rng.integers(pair.n_planes))
        shape = pair.shape[-2:]
        size = [min(n, p) for n, p in zip(shape, settings.patch_shape or shape)]
        starts = [int(rng.integers(n - p + 1)) for n, p in zip(shape, size)]
        raw, labels = files.read(plane, *(slice(a, a + p) for a, p in zip(starts, size)))
        try:
            if settings.pre_label_transform is not None:
                labels = settings.pre_label_transform(labels)
            labels = self._pad(labels)
            if settings.label_transform is not None:
                labels = settings.label_transform(labels)
                if isinstance(labels, tuple | list) and settings.is_multi_tensor:
                    (labels,) = labels
            instances = label_instances(labels, settings.target.min_size)
        except InvalidInputError as error:
            raise type(error)(f"{error} This is in {pair.label_name}.") from error
        if found is None or self._accepts(raw, labels, instances, found):
            return _Patch(n_pair, plane, raw, instances)
        found.names[pair.label_name] = None
        return None

    def _accepts(self, raw: np.ndarray, labels: np.ndarray, instances: np.ndarray, found: _Found) -> bool:
        if self.settings.needs_object and not instances.any():
            parts = np.bincount(label_instances(labels).reshape(-1))[1:]
            found.largest = max(found.largest, int(parts.max(initial=0)))
            found.n_small += bool(len(parts))
            found.n_blank += not len(parts)
            return False
        if self.settings.sampler is not None and not self.settings.sampler(self._plain(raw), instances):
            found.n_refused += 1
            return False
        return True

    @staticmethod
    def _plain(raw: np.ndarray) -> np.ndarray:
        return raw[0] if len(raw) == 1 else raw

    def _pad(self, patch: np.ndarray) -> np.ndarray:
        if self.patch_shape is None or not self.settings.with_padding:
            return patch
        missing = [max(p - n, 0) for n, p in zip(patch.shape[-2:], self.patch_shape)]
        return np.pad(patch, [(0, 0)] * (patch.ndim - 2) + [(0, n) for n in missing]) if any(missing) else patch

    def _transform_raw(self, patch: _Patch) -> Any:
        transform, n_channels = self.settings.raw_transform, self.pairs[patch.pair].geometry.n_channels
        if limits_for(transform) is None:
            raw = transform(self._plain(self._pad(patch.raw)))
        else:
            try:
                raw = self._pad(rescale(patch.raw, self._measure(patch)))
            except InvalidInputError as error:
                raise type(error)(f"{error} This is in {self.pairs[patch.pair].name}.") from error
        if raw.ndim == 2:
            raw = raw[None]
        if len(raw) == 1 and n_channels == 1 and self._repeat_grey:
            raw = np.repeat(np.asarray(raw), 3, axis=0)
        elif len(raw) == 2:  # as inference does
            raw = np.concatenate([np.asarray(raw), np.zeros_like(np.asarray(raw[:1]))])
        if len(raw) not in (1, 3):
            raise InvalidInputError(
                f"{self.pairs[patch.pair].name} has {len(raw)} channels, but the networks take one or three. Pass a "
                "raw_transform that selects channels, or save the image with three channels at most."
            )
        return raw

    def _measure(self, patch: _Patch) -> Limits | None:
        """The limits of the transform for the image that the patch is from."""
        measure, files = limits_for(self.settings.raw_transform), self._open[patch.pair]
        if self.settings.raw_transform is require_8bit and np.dtype(files.raw.dtype) == np.uint8:
            return None
        key = (patch.pair, None if measure.per_file else patch.plane)
        if key not in self._limits:
            image = files.representative() if measure.per_file else files.whole_plane(patch.plane)
            self._limits[key] = measure.find(image)
        return self._limits[key]

    def _augment(self, raw: Any, target: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
        settings = self.settings
        if settings.transform is not None:
            raw, target = settings.transform(raw, target)
        elif settings.is_train:
            axes = [axis for axis in (-2, -1) if rng.random() < 0.5]
            raw, target = np.flip(np.asarray(raw), axes).copy(), np.flip(target, axes).copy()
        if settings.label_transform2 is not None:
            target = settings.label_transform2(np.asarray(target))
        return raw, target


class ContainerDataset(PatchDataset, SegmentationDataset):
    """Patches of one array: a file, a container, or a folder as a stack."""

    by_area = True


class ContainerListDataset(PatchDataset, ConcatDataset):
    """Patches of several arrays."""

    by_area = True

    @property
    def datasets(self) -> list[ContainerDataset]:
        """One dataset per array, each of its natural length."""
        return [ContainerDataset([pair], self.settings) for pair in self.pairs]


class CollectionDataset(PatchDataset, ImageCollectionDataset):
    """Patches of image files of any shape."""


class ArrayDataset(PatchDataset, TensorDataset):
    """Patches of images in memory."""
