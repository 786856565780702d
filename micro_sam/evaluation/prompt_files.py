"""Prompts derived from ground truth, computed once and kept in files, so that models are compared with the same ones.

`points-p<n>-n<m>.pkl` holds {name of the label file: (points (N, P, 2) as (x, y), labels (N, P))}, and `boxes.pkl`
{name of the label file: boxes (N, 4) as (x0, y0, x1, y1), half-open}, in the order of the ids of the N objects.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import InvalidInputError
from ..core.labels import get_centers_and_bounding_boxes
from ..core.output import temporary_path
from ..models.safe_pickle import SafePickle
from ..prompt_generators import PointAndBoxPromptGenerator

Points = tuple[np.ndarray, np.ndarray]


class PromptFileError(InvalidInputError):
    """A file with prompts cannot be read, or its prompts are not those of the truth."""


def sample_points(truth: np.ndarray, n_positives: int, n_negatives: int, dilation: int, seed: int) -> Points:
    """Sample points for each object of a label image.

    The first positive point is the pixel that lies deepest inside the object. The points of an object depend on its
    mask, its id and the seed only.

    Args:
        truth: Labels (Y, X).
        n_positives: Points inside of each object, at least 1.
        n_negatives: Points outside of each object, near it. An object that fills the image has none; they are padded
            with points that the model ignores (label -1).
        dilation: Distance in pixels that negative points keep from the object.
        seed: Seed of the random choices.

    Returns:
        Points (N, P, 2) as (x, y), positive ones first, and labels (N, P).
    """
    centers, boxes = get_centers_and_bounding_boxes(truth)
    n_points = n_positives + n_negatives
    points, labels = np.zeros((len(boxes), n_points, 2), dtype=np.int64), np.full((len(boxes), n_points), -1)
    for k, id_ in enumerate(sorted(boxes)):
        mask = truth == id_
        generator = PointAndBoxPromptGenerator(
            n_positives, 0 if mask.all() else n_negatives, dilation, rng=np.random.default_rng([seed, id_])
        )
        of_object, its_labels, _, _ = generator(torch.from_numpy(mask)[None, None], [boxes[id_]], [centers[id_]])
        n = of_object.shape[1]
        points[k, :n], labels[k, :n] = of_object[0].numpy(), its_labels[0].numpy()
    return points, labels


def object_boxes(truth: np.ndarray) -> np.ndarray:
    """The bounding boxes (N, 4) of the objects of a label image, as (x0, y0, x1, y1), half-open."""
    _, boxes = get_centers_and_bounding_boxes(truth)
    return np.array([boxes[id_] for id_ in sorted(boxes)], dtype=np.int64).reshape(-1, 4)[:, [1, 0, 3, 2]]


def prompt_paths(folder: str | os.PathLike, setting: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The files with the points and the boxes of a setting; None for what it does not have."""
    folder = Path(folder)
    points = folder / f"points-p{setting['n_positives']}-n{setting['n_negatives']}.pkl"
    return points if setting["use_points"] else None, folder / "boxes.pkl" if setting["use_boxes"] else None


def read_prompt_file(path: Path) -> dict[str, Any]:
    """Read a file with prompts, without running code that may be in it; a file that is not there is empty.

    Raises:
        PromptFileError: If it is damaged, or holds something else.
    """
    if not path.exists():
        return {}
    reader = SafePickle()
    try:
        with open(path, "rb") as file:
            content = reader.load(file)
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
        raise PromptFileError(f"{path} cannot be read: {error}. Delete it, then it is made anew.") from error
    if not isinstance(content, dict) or reader.refused:
        raise PromptFileError(
            f"{path} holds no prompts by file name, but {', '.join(sorted(reader.refused)) or type(content).__name__}. "
            "Choose another folder for the prompts."
        )
    return content


def write_prompt_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file with prompts, completely or not at all."""
    with temporary_path(path, is_folder=False) as new:
        new.write_bytes(pickle.dumps(dict(content), protocol=4))


def check_points(points: Any, truth: np.ndarray, name: str) -> Points:
    """Return points from a file as arrays.

    Raises:
        PromptFileError: If there are more or fewer than objects, or the positive ones lie elsewhere.
    """
    coordinates, labels = (np.asarray(values) for values in points)
    ids = np.unique(truth[truth != 0])
    fits = coordinates.shape == (*labels.shape, 2) and len(labels) == len(ids)
    if fits and labels.size:
        x, y = np.moveaxis(coordinates.astype(int), -1, 0)
        inside = (x >= 0) & (y >= 0) & (x < truth.shape[1]) & (y < truth.shape[0])
        found = np.where(inside, truth[np.where(inside, y, 0), np.where(inside, x, 0)], 0)
        fits = bool((found == ids[:, None])[labels == 1].all())
    if not fits:
        raise PromptFileError(
            f"The points that were kept for {name} are not those of its {len(ids)} objects. Delete the file with the "
            "prompts, or choose another folder for them."
        )
    return coordinates, labels


def check_boxes(boxes: Any, truth: np.ndarray, name: str) -> np.ndarray:
    """Return boxes from a file as array.

    Raises:
        PromptFileError: If they are not those of the objects.
    """
    boxes, expected = np.asarray(boxes), object_boxes(truth)
    if boxes.shape != expected.shape or (boxes != expected).any():
        raise PromptFileError(
            f"The boxes that were kept for {name} are not those of its {len(expected)} objects. Delete the file with "
            "the prompts, or choose another folder for them."
        )
    return boxes
