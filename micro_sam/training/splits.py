"""Training and validation data that share no pixel: by file, or by region if there is one image."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import InvalidInputError, NoObjectsError
from ..core.progress import Step, Steps, drain
from ..embeddings.signature import compute_data_signature
from .pairs import Pair, Roi, find_pairs, is_array, probe
from .seeding import generator

__all__ = ["DataPart", "Split", "check_disjoint", "find_duplicates", "split_data"]

_MIN_REGION = 32
_MIN_PLANES = 10


@dataclass(frozen=True)
class DataPart:
    """Images and labels of the training or of the validation, as `default_sam_loader` takes them."""

    raw_paths: tuple[Any, ...]
    raw_key: str | None
    label_paths: tuple[Any, ...]
    label_key: str | None
    rois: tuple[Roi, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `default_sam_dataset` and `default_sam_loader`."""
        return {
            "raw_paths": list(self.raw_paths), "raw_key": self.raw_key, "label_paths": list(self.label_paths),
            "label_key": self.label_key, "rois": None if self.rois is None else list(self.rois),
        }


@dataclass(frozen=True)
class Split:
    """Data for training and validation; `duplicates` names groups of equal images, which stay on one side."""

    train: DataPart
    val: DataPart
    description: str
    duplicates: tuple[tuple[str, ...], ...] = ()


def _fingerprint_steps(pairs: Sequence[Pair]) -> Steps[list[str | None]]:
    """Hash of each image's pixels; None where no other image has the same shape and type."""
    kinds = defaultdict(list)
    for n, pair in enumerate(pairs):
        kinds[(pair.geometry, probe(pair.raw, pair.raw_key)[1])].append(n)
    candidates = [n for group in kinds.values() if len(group) > 1 for n in group]
    hashes: list[str | None] = [None] * len(pairs)
    for done, n in enumerate(candidates):
        yield Step(done, len(candidates), "Compare images")
        pair = pairs[n]
        whole = Pair(pair.raw, pair.raw_key, pair.labels, pair.label_key, pair.with_channels)
        hashes[n] = compute_data_signature(whole.open().representative())
    if candidates:
        yield Step(len(candidates), len(candidates), "Compare images")
    return hashes


def duplicate_steps(pairs: Sequence[Pair]) -> Steps[list[list[int]]]:
    """The steps of `find_duplicates`."""
    hashes = yield from _fingerprint_steps(pairs)
    groups = defaultdict(list)
    for n, value in enumerate(hashes):
        if value is not None:
            groups[value].append(n)
    return [group for group in groups.values() if len(group) > 1]


def find_duplicates(pairs: Sequence[Pair]) -> list[list[int]]:
    """Find images with equal pixels, under whatever name and in whatever format; of large volumes by some planes.

    Args:
        pairs: Images with their labels.

    Returns:
        Groups of positions in `pairs`.
    """
    return drain(duplicate_steps(pairs), verbose=False)


def _overlap(a: Pair, b: Pair) -> bool:
    return all(s.start < t.stop and t.start < s.stop for s, t in zip(a.box, b.box))


def shared_images(train: Sequence[Pair], val: Sequence[Pair], duplicates: Sequence[Sequence[int]]) -> list[str]:
    """Sentences that name images of the training that are validation images too, where their regions overlap.

    Args:
        train: Pairs for training.
        val: Pairs for validation.
        duplicates: What `find_duplicates` found in both together, those for training first.
    """
    pairs, found = [*train, *val], []
    for group in duplicates:
        for i in (n for n in group if n < len(train)):
            partner = next((j for j in group if j >= len(train) and _overlap(pairs[i], pairs[j])), None)
            if partner is not None:
                found.append(f"{pairs[i].name} is also the validation image {pairs[partner].name}.")
    return found


def check_disjoint(train: Sequence[Pair], val: Sequence[Pair]) -> None:
    """Raise `InvalidInputError`, with names, if an image of the training is in the validation as well."""
    found = shared_images(train, val, find_duplicates([*train, *val]))
    if found:
        raise InvalidInputError(
            f"Training and validation must not share images: {' '.join(found[:5])} Take them out of one of the two."
        )


def split_data(
    raw_paths: Any,
    raw_key: str | None,
    label_paths: Any,
    label_key: str | None,
    *,
    fraction: float = 0.1,
    seed: int = 0,
    patch_shape: Sequence[int] | None = None,
) -> Split:
    """Split images into training and validation.

    Several images are divided by file; equal images, compared by their pixels, stay together. One image is divided
    into two regions that do not overlap: a stack by planes, leaving out one plane between them, a single plane or a
    thin stack by a strip at one of its edges, with objects on both sides.

    Args:
        raw_paths: Images, as for `default_sam_dataset`. The files of a folder are single images here.
        raw_key: Name of the image in a container, or pattern for the files of a folder.
        label_paths: Labels.
        label_key: As `raw_key`.
        fraction: Share for validation, above 0 and below 1; at least one image.
        seed: Seed of the choice.
        patch_shape: Shape of the patches, (Y, X) last: a strip becomes as wide if the image is large enough.

    Returns:
        The split; `default_sam_loader(**split.train.arguments(), ...)`.

    Raises:
        InvalidInputError: If the data cannot be divided.
        NoObjectsError: If only one side of a single image would have objects.
    """
    if not 0 < fraction < 1:
        raise InvalidInputError(f"fraction must be above 0 and below 1, but is {fraction!r}.")
    pairs = find_pairs(raw_paths, raw_key, label_paths, label_key, as_stack=False).pairs
    if len(pairs) == 1:
        train, val, description = _split_regions(pairs[0], fraction, seed, patch_shape)
        return Split(_part([pairs[0]], [train]), _part([pairs[0]], [val]), description)

    duplicates = find_duplicates(pairs)
    groups = [*duplicates, *([n] for n in sorted(set(range(len(pairs))) - {n for g in duplicates for n in g}))]
    if len(groups) == 1:
        raise InvalidInputError(
            f"All {len(pairs)} images are equal, so that none is left for validation. Give other images."
        )
    n_val = max(1, round(fraction * len(pairs)))
    val: list[int] = []
    for g in generator(seed).permutation(len(groups))[:-1]:
        if not val or len(val) + len(groups[g]) <= n_val:
            val += groups[g]
    train = [n for n in range(len(pairs)) if n not in set(val)]
    names = tuple(tuple(pairs[n].name for n in group) for group in duplicates)
    description = f"{len(train)} images for training, {len(val)} for validation, chosen with seed {seed}"
    return Split(_part([pairs[n] for n in train]), _part([pairs[n] for n in sorted(val)]), description, names)


def _part(pairs: Sequence[Pair], rois: Sequence[Roi] | None = None) -> DataPart:
    return DataPart(
        tuple(p.raw if is_array(p.raw) else str(p.raw) for p in pairs), pairs[0].raw_key,
        tuple(p.labels if is_array(p.labels) else str(p.labels) for p in pairs), pairs[0].label_key,
        None if rois is None else tuple(rois),
    )


def _candidates(shape: Sequence[int], fraction: float, patch: Sequence[int], seed: int) -> Iterator[tuple[Roi, Roi]]:
    """Ways to divide a shape into training and validation, in the order of preference."""
    axes = sorted((-2, -1), key=lambda axis: -shape[axis])
    if len(shape) > 2 and shape[0] >= _MIN_PLANES:
        axes.insert(0, -len(shape))
    for axis in axes:
        n = shape[axis]
        is_planes, gap = axis == -len(shape) and len(shape) > 2, 0
        if is_planes:
            n_val, gap = max(1, round(fraction * n)), 1
        else:
            n_val = max(round(fraction * n), min(patch[axis], n // 4))
            if n_val < _MIN_REGION:
                continue
        ends = [(slice(0, n - n_val - gap), slice(n - n_val, n)), (slice(n_val + gap, n), slice(0, n_val))]
        for k in generator(seed, axis + len(shape)).permutation(2):
            yield tuple(
                tuple(part if a == axis + len(shape) else slice(0, m) for a, m in enumerate(shape)) for part in ends[k]
            )


def _has_objects(pair: Pair, roi: Roi) -> bool:
    part = Pair(pair.raw, pair.raw_key, pair.labels, pair.label_key, pair.with_channels, roi)
    files, (height, width) = part.open(), part.shape[-2:]
    return any(files.read_labels(n, slice(0, height), slice(0, width)).any() for n in range(part.n_planes))


def _split_regions(
    pair: Pair, fraction: float, seed: int, patch_shape: Sequence[int] | None
) -> tuple[Roi, Roi, str]:
    shape = pair.geometry.shape
    candidates = list(_candidates(shape, fraction, tuple(patch_shape or (512, 512))[-2:], seed))
    if not candidates:
        raise InvalidInputError(
            f"{pair.name} of shape {shape} is too small to be divided into training and validation. Give more images, "
            "or images for validation."
        )
    for train, val in candidates:
        if _has_objects(pair, train) and _has_objects(pair, val):
            share = math.prod(s.stop - s.start for s in val) / math.prod(shape)
            text = ", ".join(f"{s.start}:{s.stop}" for s in val)
            return train, val, f"one image, of which the region [{text}] ({share:.0%}) is for validation"
    raise NoObjectsError(
        f"{pair.label_name} cannot be divided so that training and validation both have objects. Give more images, or "
        "images for validation."
    )
