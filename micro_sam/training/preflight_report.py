"""What a preflight found in training data and expects of a training: as numbers, as JSON and in words."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import InvalidInputError

_MAX_LISTED = 12

@dataclass(frozen=True)
class PairReport:
    """What was found in one image and its labels; sizes of objects are diameters of circles of their area, in pixels.

    `n_planes_read` is smaller than the number of planes if the stack is large. `n_small` objects have fewer pixels
    than `min_size` and are not in `n_objects`.
    """

    name: str
    label_name: str
    split: str
    shape: tuple[int, ...] | None = None
    n_channels: int | None = None
    dtype: str | None = None
    label_dtype: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    n_planes_read: int = 0
    n_objects: int = 0
    n_small: int = 0
    diameters: tuple[float, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreflightReport:
    """What was found in the data, and what training on them costs; times and memory are estimates.

    `diameters` are the percentiles 5, 50 and 95 of the objects in pixels. `memory_bytes` is what the training needs,
    `available_bytes` what is free now. Numbers are None where they could not be known.
    """

    pairs: tuple[PairReport, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    diameters: tuple[float, float, float] | None
    patch_shape: tuple[int, int]
    suggested_patch_shape: tuple[int, int]
    model_type: str
    device: str
    batch_size: int
    n_batches: int | None
    memory_bytes: float
    available_bytes: float
    gflop_per_second: float
    seconds_per_iteration: float
    seconds_per_epoch: float | None

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def count(self, split: str) -> int:
        """Number of images of `train` or `val`."""
        return sum(pair.split == split for pair in self.pairs)

    def n_objects(self, split: str) -> int:
        """Number of objects of `train` or `val`."""
        return sum(pair.n_objects for pair in self.pairs if pair.split == split)

    def to_json(self) -> str:
        """All numbers and messages, as JSON."""
        content = dataclasses.asdict(self)
        for pair in content["pairs"]:
            del pair["diameters"]
        return json.dumps({"ok": self.ok, **content}, indent=2)

    def summary(self) -> str:
        """The report in words."""
        return "\n".join([*_describe_data(self), *_describe_costs(self), *_describe_messages(self)])

    def raise_if_not_ok(self) -> None:
        """Raise `InvalidInputError` with the problems, if there are any."""
        if self.problems:
            raise InvalidInputError("\n".join(["The training data have problems:", *_listed(self.problems)]))


def _listed(messages: Sequence[str]) -> list[str]:
    more = [f"  - and {len(messages) - _MAX_LISTED} more"] if len(messages) > _MAX_LISTED else []
    return [*(f"  - {message}" for message in messages[:_MAX_LISTED]), *more]


def _describe_data(report: PreflightReport) -> list[str]:
    lines = []
    for split, what in (("train", "Training"), ("val", "Validation")):
        pairs = [p for p in report.pairs if p.split == split and p.n_planes_read]
        if not pairs:
            continue
        types = ", ".join(sorted({f"{p.dtype} {'RGB' if p.n_channels == 3 else 'grey'}" for p in pairs}))
        shapes = sorted({p.shape for p in pairs})
        text = " x ".join(map(str, shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes"
        low, high = min(p.minimum for p in pairs), max(p.maximum for p in pairs)
        n = report.count(split)
        lines.append(
            f"{what}: {n} {'image' if n == 1 else 'images'} ({text}, {types}, values {low:g} to {high:g}), "
            f"{report.n_objects(split)} objects, {report.n_objects(split) / len(pairs):.1f} per image"
        )
    if report.diameters is not None:
        lines.append("Diameter of objects: {:g} to {:g} pixels, typically {:g}".format(*(
            report.diameters[n] for n in (0, 2, 1))))
    return lines


def _describe_costs(report: PreflightReport) -> list[str]:
    patch, suggested = (" x ".join(map(str, s)) for s in (report.patch_shape, report.suggested_patch_shape))
    lines = [
        f"Patches: {patch} pixels" + ("" if patch == suggested else f" ({suggested} would suit the objects)"),
        f"Model {report.model_type} on {report.device}: about {report.memory_bytes / 1e9:.0f} GB of memory "
        f"({report.available_bytes / 1e9:.0f} GB free)",
    ]
    if report.seconds_per_epoch is not None:
        lines.append(
            f"Time: about {_duration(report.seconds_per_iteration)} per iteration, "
            f"{_duration(report.seconds_per_epoch)} per epoch of {report.n_batches} iterations"
        )
    return lines


def _describe_messages(report: PreflightReport) -> list[str]:
    lines = ["Problems:", *_listed(report.problems)] if report.problems else []
    if report.warnings:
        lines += ["Warnings:", *_listed(report.warnings)]
    return lines or ["No problems were found."]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
