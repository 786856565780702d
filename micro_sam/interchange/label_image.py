"""Labels and what is known about them, apart from any file format."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..core.errors import InvalidInputError, MissingFileError
from ..core.labels import check_labels
from ..core.output import smallest_dtype

AXES = ("YX", "ZYX", "TYX")


@dataclass(frozen=True)
class LabelImage:
    """A label image and what is known about its objects.

    Args:
        labels: Labels (Y, X), (Z, Y, X) or (T, Y, X), 0 is background; kept as the smallest of uint16, uint32 and
            uint64 that holds the ids.
        axes: `YX`, `ZYX` or `TYX`; by default YX or ZYX.
        names: Id -> name, for the objects that have one.
        classes: Id -> class, for the objects that have one.
        scale: Pixel size per axis, or None; all ones without units count as None.
        units: Unit of the scale per axis, such as micrometer or second, or None.

    Raises:
        InvalidInputError: If something does not fit the labels.
        InvalidTypeError: If the labels are no integers.
    """

    labels: np.ndarray
    axes: str | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    classes: Mapping[int, str] = field(default_factory=dict)
    scale: Sequence[float] | None = None
    units: Sequence[str | None] | None = None

    def __post_init__(self):
        labels = check_labels(self.labels)
        if labels.ndim not in (2, 3) or labels.size == 0:
            raise InvalidInputError(
                f"Labels must have the shape (Y, X), (Z, Y, X) or (T, Y, X), but have {labels.shape}. Convert them "
                "one time point, or channel, at a time."
            )
        axes = self.axes or ("YX" if labels.ndim == 2 else "ZYX")
        if axes not in AXES or len(axes) != labels.ndim:
            raise InvalidInputError(
                f"axes must be one of {', '.join(AXES)} and fit the shape {labels.shape}, but is {axes!r}."
            )
        for name in ("scale", "units"):
            value = getattr(self, name)
            if value is not None and len(value) != labels.ndim:
                raise InvalidInputError(f"{name} must have one entry per axis ({axes}), but is {value!r}.")
        scale = self.scale and tuple(float(s) for s in self.scale)
        if scale and not all(np.isfinite(s) and s > 0 for s in scale):
            raise InvalidInputError(f"scale must be positive numbers, but is {self.scale!r}.")
        units = tuple(self.units) if self.units and any(self.units) else None
        if scale and units is None and set(scale) == {1.0}:
            scale = None  # what formats say that must say something
        object.__setattr__(self, "labels", labels.astype(smallest_dtype(labels), copy=False))
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "scale", scale or None)
        object.__setattr__(self, "units", units)
        if not self.names and not self.classes:
            return
        ids = set(self.ids.tolist())
        for name in ("names", "classes"):
            table = {int(i): str(text) for i, text in getattr(self, name).items()}
            unknown = sorted(set(table) - ids)
            if unknown:
                raise InvalidInputError(
                    f"{name} has entries for {len(unknown)} ids that the labels do not have: "
                    f"{', '.join(map(str, unknown[:10]))}{' …' if len(unknown) > 10 else ''}. Leave them out."
                )
            object.__setattr__(self, name, table)

    @property
    def ids(self) -> np.ndarray:
        """The ids of the objects, sorted."""
        ids = np.unique(self.labels)
        return ids[ids != 0]

    @property
    def planes(self) -> np.ndarray:
        """The labels as a stack (N, Y, X), of one plane for axes YX."""
        return self.labels[None] if self.labels.ndim == 2 else self.labels

    def content(self) -> dict[str, Any]:
        """What the pixels and outlines of a file do not hold, fit for JSON, with a hash of everything."""
        facts = {  # not "shape": tifffile takes a description with that key for its own
            "size": list(self.labels.shape), "axes": self.axes, "scale": self.scale and list(self.scale),
            "units": self.units and list(self.units),
        }
        tables = [sorted(self.names.items()), sorted(self.classes.items())]
        digest = xxhash.xxh3_128(json.dumps([facts, tables]).encode())
        digest.update(np.ascontiguousarray(self.labels))
        return {**facts, "hash": digest.hexdigest()}


def table_from_json(table: Any) -> dict[int, str]:
    """Names or classes by id, whose ids became text in JSON."""
    return {int(i): str(text) for i, text in (table or {}).items()}


def read_table(path: str | os.PathLike) -> tuple[dict[int, str], dict[int, str]]:
    """Read names and classes of objects from a table.

    Args:
        path: A `.csv` with the column `label` and the columns `name`, `class` or both; others are left out.

    Returns:
        Names and classes by id; empty cells count as none.

    Raises:
        MissingFileError: If there is no such file.
        InvalidInputError: If columns are missing or ids are no positive integers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Check the path.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path} could not be read as a table: {error}. Save it as .csv in UTF-8.") from error
    if "label" not in columns or not {"name", "class"} & set(columns):
        raise InvalidInputError(
            f"{path} needs a column label, and a column class or name, but has: {', '.join(columns) or 'none'}."
        )
    bad = [row["label"] for row in rows if not row["label"].isdecimal() or int(row["label"]) == 0]
    if bad:
        raise InvalidInputError(f"In {path} the column label must hold positive integers, but it has {bad[0]!r}.")
    names, classes = ({int(r["label"]): r[column] for r in rows if r.get(column)} for column in ("name", "class"))
    return names, classes
