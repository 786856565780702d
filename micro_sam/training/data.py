"""Training data: the dataset and the loader for images with instance labels."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..core.errors import InvalidInputError, InvalidTypeError, nearest_names, require_positive_int
from .pairs import Pairs, find_pairs
from .patches import (
    ArrayDataset,
    CollectionDataset,
    ContainerDataset,
    ContainerListDataset,
    PatchDataset,
    PatchSettings,
)
from .raw_transforms import identity, limits_for, require_8bit
from .targets import DecoderTarget, InstanceTarget

__all__ = ["default_sam_dataset", "default_sam_loader"]

_VALIDATION_SEED = 0


@dataclass(frozen=True)
class _Options:
    """What `default_sam_dataset` takes as further keyword arguments, as torch-em's datasets do."""

    is_seg_dataset: bool | None = None
    transform: Callable | None = None
    label_transform: Callable | None = None
    label_transform2: Callable | None = None
    pre_label_transform: Callable | None = None
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.float32
    verify_paths: bool = True
    with_padding: bool = True
    with_label_channels: bool = False
    ndim: int | None = None
    z_ext: int | None = None

    def __post_init__(self):
        if self.ndim not in (None, 2) or self.z_ext is not None or self.with_label_channels:
            raise InvalidInputError(
                "Training is on planes with one label image: ndim must be 2, z_ext None and with_label_channels False, "
                f"but they are {self.ndim}, {self.z_ext} and {self.with_label_channels}. Leave them out."
            )


_OPTION_NAMES = tuple(f.name for f in fields(_Options))


def _refuse_unknown(given: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidTypeError(f"There is no argument {unknown[0]!r}. {nearest_names(unknown[0], known)}")


def _check_patch_shape(patch_shape: Sequence[int] | None) -> tuple[int, int] | None:
    if patch_shape is None:
        return None
    shape = tuple(patch_shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise InvalidInputError(
            f"patch_shape must be (Y, X), or (1, Y, X) for volumes, because training is on planes, but is {shape}."
        )
    for n in shape:
        require_positive_int("Each number of patch_shape", n)
    return tuple(int(n) for n in shape[-2:])


def _check_channels(pairs: Pairs, raw_transform: Callable) -> None:
    if limits_for(raw_transform) is None and raw_transform is not identity:
        return  # it may select channels
    for pair in pairs.pairs:
        if pair.geometry.n_channels > 3:
            raise InvalidInputError(
                f"{pair.name} has {pair.geometry.n_channels} channels, but the networks take at most three. Pass a "
                "raw_transform that selects channels (they come first: (C, Y, X)), or save fewer channels."
            )


def _dataset_class(pairs: Pairs, is_seg_dataset: bool | None) -> type[PatchDataset]:
    if pairs.are_arrays:
        if is_seg_dataset:
            raise InvalidInputError("is_seg_dataset=True is for files, but arrays were given. Leave it out.")
        return ArrayDataset
    if is_seg_dataset is None:
        first = pairs.pairs[0]
        is_seg_dataset = not (pairs.are_folder_files or (first.raw_key is None and first.geometry.is_picture))
    if not is_seg_dataset:
        return CollectionDataset
    return ContainerDataset if pairs.is_single else ContainerListDataset


def default_sam_dataset(
    raw_paths: Any,
    raw_key: str | None,
    label_paths: Any,
    label_key: str | None,
    patch_shape: tuple[int, ...] | None,
    with_segmentation_decoder: bool,
    with_channels: bool | None = None,
    train_instance_segmentation_only: bool = False,
    sampler: Callable[[np.ndarray, np.ndarray], bool] | None = None,
    raw_transform: Callable | None = None,
    n_samples: int | None = None,
    is_train: bool = True,
    min_size: int = 25,
    max_sampling_attempts: int | None = None,
    rois: slice | tuple[slice, ...] | None = None,
    is_multi_tensor: bool = True,
    *,
    seed: int | None = None,
    allow_empty: bool = False,
    **kwargs: Any,
) -> Dataset:
    """Make a dataset of random patches for the finetuning of SAM.

    Items are (x, y). x is float32 (C, Y, X) in the range 0 to 255, with one or three channels. y is float32: instance
    ids (1, Y, X); with decoder (4, Y, X), the ids followed by foreground, distance to the centre and to the boundary
    of the object (see `decoder_channels`); for training of the decoder alone (3, Y, X), without the ids.

    A patch lies at a random position of a plane, and is drawn again if it has no object after the transformation of
    its labels; after 50 attempts another image is tried. Training patches are flipped at random; those of validation
    (`is_train=False`) are not, and are the same in each epoch. Images smaller than the patch are padded with zeros.
    Several containers, and files with an explicit length, are taken in turn.

    Args:
        raw_paths: Images: a path, a list of paths, or a list of arrays. Planes, stacks (training on their planes), or
            either with channels on the first or last axis.
        raw_key: Name of the image in a container, or a pattern such as `*.tif` for the files of a folder, else None.
        label_paths: Labels: integer ids, 0 is background; of the same number and shape as the images.
        label_key: As `raw_key`.
        patch_shape: Shape (Y, X) or (1, Y, X) of the patches; None takes whole planes.
        with_segmentation_decoder: Whether the target has the channels for the decoder.
        with_channels: Whether the first axis of the images holds channels; None finds out by the shape of the labels.
        train_instance_segmentation_only: Whether to leave out the ids, for training of the decoder alone.
        sampler: Called with a patch (Y, X) or (C, Y, X) of the image, and the ids (Y, X) of its objects after the
            transformation of the labels; returns whether to take the patch. Patches without object are not offered.
        raw_transform: Transform of the image (see `micro_sam.training.raw_transforms`, which are measured on whole
            images), or any function of a patch. None is `require_8bit`.
        n_samples: Length of the dataset. None takes the number of images, for arrays in files the number of patches
            that cover them, but at least 100, or 5 for validation.
        is_train: Whether this is for training, not for validation.
        min_size: Parts of labels with fewer pixels become background.
        max_sampling_attempts: How often a patch is drawn before `NoObjectsError`; None is 500.
        rois: Part of the images to use: a slice per axis (without channels), for all or one tuple for each.
        is_multi_tensor: Whether a tuple that `label_transform` returns is unpacked.
        seed: Makes an item a function of seed, epoch (`set_epoch`) and index; without calls of `set_epoch` all
            epochs have the same patches. None draws from the generator of torch; for validation None is 0.
        allow_empty: Whether to return a patch without objects instead of an error.
        kwargs: `transform(x, y)`, replaces the flips, for validation too; `label_transform`, before the target is
            computed; `label_transform2`, after the augmentation; `pre_label_transform`, on the labels as they are
            read; `dtype`, `label_dtype`; `is_seg_dataset`, arrays (True) or image files (False); `verify_paths`;
            `with_padding`.

    Returns:
        The dataset; its kind is one of torch-em's.

    Raises:
        InvalidInputError: If arguments, or shapes of images and labels, do not fit.
        MissingFileError: If a file does not exist.
        NoObjectsError: On access, if no patch with an object is found.

    Example:
        >>> dataset = default_sam_dataset(
        ...     "images", "*.tif", "labels", "*.tif", patch_shape=(512, 512), with_segmentation_decoder=True
        ... )  # doctest: +SKIP
    """
    _refuse_unknown(list(kwargs), _OPTION_NAMES)
    options = _Options(**kwargs)
    if train_instance_segmentation_only and not with_segmentation_decoder:
        raise InvalidInputError(
            "train_instance_segmentation_only=True trains the decoder alone, but with_segmentation_decoder is False. "
            "Set it to True."
        )
    for name, value in (("n_samples", n_samples), ("max_sampling_attempts", max_sampling_attempts)):
        if value is not None:
            require_positive_int(name, value)
    if seed is not None and (not hasattr(seed, "__index__") or seed < 0):
        raise InvalidInputError(f"seed must be an integer of at least 0, or None, but is {seed!r}.")
    patch_shape = _check_patch_shape(patch_shape)
    raw_transform = require_8bit if raw_transform is None else raw_transform
    pairs = find_pairs(
        raw_paths, raw_key, label_paths, label_key, with_channels, rois, options.verify_paths, options.is_seg_dataset
    )
    dataset_class = _dataset_class(pairs, options.is_seg_dataset)
    _check_channels(pairs, raw_transform)
    if with_segmentation_decoder:
        target = DecoderTarget(min_size, instances=not train_instance_segmentation_only)
    else:
        target = InstanceTarget(min_size)
    settings = PatchSettings(
        patch_shape=patch_shape, target=target, raw_transform=raw_transform, label_transform=options.label_transform,
        pre_label_transform=options.pre_label_transform, label_transform2=options.label_transform2,
        transform=options.transform, sampler=sampler, is_multi_tensor=is_multi_tensor,
        needs_object=not train_instance_segmentation_only, is_train=is_train,
        max_attempts=500 if max_sampling_attempts is None else int(max_sampling_attempts), allow_empty=allow_empty,
        with_padding=options.with_padding, seed=_VALIDATION_SEED if seed is None and not is_train else seed,
        dtype=options.dtype, label_dtype=options.label_dtype,
    )
    return dataset_class(pairs.pairs, settings, n_samples)


_DATASET_NAMES = tuple(n for n in inspect.signature(default_sam_dataset).parameters if n != "kwargs") + _OPTION_NAMES
_LOADER_NAMES = tuple(n for n in inspect.signature(DataLoader.__init__).parameters if n not in ("self", "dataset"))


def default_sam_loader(**kwargs: Any) -> DataLoader:
    """Make a loader for the finetuning of SAM: `default_sam_dataset` in a loader of torch.

    Args:
        kwargs: The arguments of `default_sam_dataset`, and `batch_size` (required), `shuffle`, `num_workers` and
            others of `torch.utils.data.DataLoader`. `sampler` goes to the dataset. With `seed` the order of shuffled
            items depends on it; for validation (`is_train=False`) `shuffle` fixes one random order for all epochs.

    Returns:
        The loader, which yields x (B, C, Y, X) and y (B, 1 or 3 or 4, Y, X).

    Raises:
        InvalidTypeError: For unknown or missing arguments.
        InvalidInputError: As `default_sam_dataset`.
    """
    _refuse_unknown(list(kwargs), _DATASET_NAMES + _LOADER_NAMES)
    if "batch_size" not in kwargs:
        raise InvalidTypeError("default_sam_loader needs batch_size. Pass batch_size=1, for example.")
    for_dataset = {name: kwargs.pop(name) for name in _DATASET_NAMES if name in kwargs}
    required = [n for n, p in inspect.signature(default_sam_dataset).parameters.items() if p.default is p.empty]
    missing = [n for n in required if n not in for_dataset and n != "kwargs"]
    if missing:
        raise InvalidTypeError(f"default_sam_loader needs {', '.join(missing)}. See default_sam_dataset.")
    dataset = default_sam_dataset(**for_dataset)
    return _loader(dataset, for_dataset.get("is_train", True), for_dataset.get("seed"), kwargs)


def _loader(dataset: PatchDataset, is_train: bool, seed: int | None, kwargs: dict[str, Any]) -> DataLoader:
    shuffle = bool(kwargs.pop("shuffle", False))
    kwargs.setdefault("pin_memory", torch.accelerator.is_available())
    if shuffle and not is_train:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed or _VALIDATION_SEED))
        loader = DataLoader(dataset, sampler=order.tolist(), **kwargs)
    else:
        if shuffle and seed is not None:
            kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        loader = DataLoader(dataset, shuffle=shuffle, **kwargs)
    loader.shuffle = shuffle  # torch-em's trainers read it
    return loader
