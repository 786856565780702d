"""Check of loaders before a training: do they yield what the networks need?"""

from collections.abc import Iterable
from itertools import islice

import torch

from ..core.errors import InvalidInputError, require_positive_int
from ..core.progress import Step, Steps, drain

__all__ = ["verify_loader", "verify_loader_steps"]

_N_CHANNELS = {(False, False): 1, (True, False): 4, (True, True): 3}


def verify_loader_steps(
    loader: Iterable,
    n_batches: int,
    with_segmentation_decoder: bool,
    train_instance_segmentation_only: bool = False,
    name: str = "the loader",
) -> Steps[int]:
    """The steps of `verify_loader`."""
    require_positive_int("The number of batches to verify", n_batches)
    n_channels = _N_CHANNELS[with_segmentation_decoder or train_instance_segmentation_only,
                             train_instance_segmentation_only]
    total = min(n_batches, len(loader)) if hasattr(loader, "__len__") else n_batches
    text, n_seen, maximum = f"Verify {name}", 0, -float("inf")
    yield Step(0, total, text)
    for n, batch in enumerate(islice(iter(loader), n_batches)):
        where = f"Batch {n} of {name}"
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InvalidInputError(f"{where} must be a pair (x, y) of images and targets, but is {type(batch)}.")
        x, y = batch
        _check_shapes(x, y, n_channels, where)
        _check_images(x, where)
        _check_targets(y, train_instance_segmentation_only, where)
        n_seen, maximum = n + 1, max(maximum, float(x.max()))
        yield Step(n_seen, total, text)
    if n_seen == 0:
        raise InvalidInputError(f"{name} yields no batches. Give it more data, or a smaller batch size.")
    if maximum <= 1:
        raise InvalidInputError(
            f"The images of {name} have values up to {maximum:.4g} only, but 0 to 255 is expected. Multiply them by "
            "255, or choose raw_transform=None, which does it."
        )
    return n_seen


def verify_loader(
    loader: Iterable,
    n_batches: int = 50,
    *,
    with_segmentation_decoder: bool,
    train_instance_segmentation_only: bool = False,
    name: str = "the loader",
    verbose: bool = True,
) -> int:
    """Check the first batches of a loader.

    Args:
        loader: Yields x (B, C, Y, X) and y (B, 1, Y, X), (B, 4, Y, X) with decoder, (B, 3, Y, X) for it alone.
        n_batches: How many batches to look at, at most.
        with_segmentation_decoder: Whether the decoder is trained.
        train_instance_segmentation_only: Whether nothing but the decoder and the encoder is trained.
        name: What messages call the loader.
        verbose: Whether to show a progress bar.

    Returns:
        The number of batches that were inspected.

    Raises:
        InvalidInputError: If images do not have one or three channels with finite values from 0 to 255, ids are not
            whole, negative or missing, or other targets are not from 0 to 1.
    """
    steps = verify_loader_steps(loader, n_batches, with_segmentation_decoder, train_instance_segmentation_only, name)
    return drain(steps, verbose=verbose)


def _check_shapes(x: torch.Tensor, y: torch.Tensor, n_channels: int, where: str) -> None:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InvalidInputError(
            f"{where} has images of shape {tuple(x.shape)}, but (B, 1, Y, X) or (B, 3, Y, X) is expected."
        )
    expected = (len(x), n_channels, *x.shape[-2:])
    if tuple(y.shape) != expected:
        raise InvalidInputError(
            f"{where} has targets of shape {tuple(y.shape)}, but {expected} is expected: 1 channel with the ids, 4 "
            "with decoder, 3 for the decoder alone. Use the same options for the loader and for the training."
        )


def _check_images(x: torch.Tensor, where: str) -> None:
    low, high = float(x.min()), float(x.max())
    if not (torch.isfinite(x).all() and low >= 0 and high <= 255):
        raise InvalidInputError(
            f"{where} has images with values from {low:.4g} to {high:.4g}, but finite values from 0 to 255 are "
            "expected. Leave raw_transform out, or choose get_raw_transform('normalize_image')."
        )


def _check_targets(y: torch.Tensor, decoder_only: bool, where: str) -> None:
    maps = y if decoder_only else y[:, 1:]
    if not decoder_only:
        ids = y[:, 0]
        if not torch.isfinite(ids).all() or ids.min() < 0 or (ids - ids.round()).abs().max() > 1e-7:
            raise InvalidInputError(
                f"{where} has ids that are negative or no whole numbers. The first channel must hold instance ids; 0 "
                "is background."
            )
        empty = [n for n, sample in enumerate(ids) if not sample.any()]
        if empty:
            raise InvalidInputError(
                f"{where} has no object in sample {empty[0]}. Leave out images without objects, or use "
                "default_sam_loader, which draws patches with objects."
            )
    if maps.numel() and not (torch.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1):
        raise InvalidInputError(
            f"{where} has targets for the decoder with values from {float(maps.min()):.4g} to {float(maps.max()):.4g}, "
            "but 0 to 1 is expected: foreground, distance to the centre, distance to the boundary."
        )
