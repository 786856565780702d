"""Points and boxes for objects whose segmentation is known: for training, evaluation and simulated annotators.

Coordinates come out as SAM takes them, (x, y) in pixels; boxes and centres go in as regionprops gives them, (y, x).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .core.errors import InvalidInputError, UnsupportedError

Prompts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

# How far outside of an object's bounding box corrections are looked for, if nothing was segmented wrongly.
_MARGIN = 3


def _sampler(rng: np.random.Generator | int | None):
    """What to sample with: its `choice(n, size, replace)` gives indices. None is numpy's global state."""
    return np.random if rng is None or rng is np.random else np.random.default_rng(rng)


class PromptGeneratorBase:
    """Turns segmented objects into prompts; see the subclasses."""

    def __call__(
        self,
        segmentation: torch.Tensor,
        prediction: torch.Tensor | None = None,
        bbox_coordinates: list[tuple] | None = None,
        center_coordinates: list[np.ndarray] | None = None,
    ) -> Prompts:
        """Return point coordinates, point labels, boxes and masks; None for what is not generated."""
        raise UnsupportedError("PromptGeneratorBase generates no prompts. Use one of its subclasses.")


class PointAndBoxPromptGenerator(PromptGeneratorBase):
    """Samples points in and around objects, and passes on their bounding boxes.

    Args:
        n_positive_points: Number of points inside of each object.
        n_negative_points: Number of points outside of each object, near it.
        dilation_strength: Distance in pixels that negative points keep from the object, and by which the bounding
            box is enlarged to look for them.
        get_point_prompts: Whether to generate points.
        get_box_prompts: Whether to generate boxes.
        rng: Generator or seed of the random choices. None uses numpy's global state (`numpy.random.seed`).

    Raises:
        InvalidInputError: If neither points nor boxes are wanted, or a number is negative.
    """

    def __init__(
        self,
        n_positive_points: int,
        n_negative_points: int,
        dilation_strength: int,
        get_point_prompts: bool = True,
        get_box_prompts: bool = False,
        *,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        numbers = {
            "n_positive_points": n_positive_points, "n_negative_points": n_negative_points,
            "dilation_strength": dilation_strength,
        }
        for name, value in numbers.items():
            if not hasattr(value, "__index__") or value < 0:
                raise InvalidInputError(f"{name} must be a non-negative integer, but is {value!r}.")
        if not (get_point_prompts or get_box_prompts):
            raise InvalidInputError(
                "Neither points nor boxes would be generated. Set get_point_prompts or get_box_prompts."
            )
        self.n_positive_points = n_positive_points
        self.n_negative_points = n_negative_points
        self.dilation_strength = dilation_strength
        self.get_point_prompts = get_point_prompts
        self.get_box_prompts = get_box_prompts
        self._rng = _sampler(rng)

    def __call__(
        self,
        segmentation: torch.Tensor,
        bbox_coordinates: list[tuple],
        center_coordinates: list[np.ndarray] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        """Generate prompts for objects.

        Per object, the positive points are its centre, if given, and random pixels of it (repeated only if it has
        too few). The negative points are random pixels, none twice, of its bounding box enlarged by
        `dilation_strength`, without the object dilated by that many 3 x 3 squares; if these are too few, random
        pixels from anywhere outside of the object are added.

        Args:
            segmentation: Binary masks (N, 1, H, W), on any device.
            bbox_coordinates: Bounding boxes (y0, x0, y1, x1), half-open, one per object.
            center_coordinates: Centres (y, x), one per object; they are truncated to integers.
            kwargs: Unused; lets all generators be called alike.

        Returns:
            Points (N, P, 2) as (x, y), int64, positive ones first, and their labels (N, P), int64, 1 or 0, with
            P = `n_positive_points` + `n_negative_points`; None if points are not wanted.
            Boxes (N, 4) as (x0, y0, x1, y1), half-open; None if they are not wanted.
            None, in place of masks.
            All are on the device of `segmentation`.

        Raises:
            InvalidInputError: If the shapes or numbers of objects do not fit, a centre is given but no positive
                point is wanted, or an object is empty or leaves no pixel for a point that is wanted.
        """
        segmentation = torch.as_tensor(segmentation)
        if segmentation.ndim != 4 or segmentation.shape[1] != 1:
            raise InvalidInputError(f"segmentation must have the shape (N, 1, H, W), but has {_shape(segmentation)}.")
        boxes = _check_boxes(bbox_coordinates, len(segmentation))
        points = labels = None
        if self.get_point_prompts:
            centers = self._check_centers(center_coordinates, len(segmentation))
            foreground = segmentation[:, 0] > 0.5
            points = [self._sample(n, *sample) for n, sample in enumerate(zip(foreground, boxes, centers))]
            n_points = self.n_positive_points + self.n_negative_points
            points = np.array(points, dtype=np.int64).reshape(len(segmentation), n_points, 2)[..., ::-1].copy()
            points = torch.from_numpy(points).to(segmentation.device)
            labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=segmentation.device)
            labels[:, :self.n_positive_points] = 1
        if not self.get_box_prompts:
            return points, labels, None, None
        return points, labels, torch.as_tensor(boxes[:, [1, 0, 3, 2]], device=segmentation.device), None

    def _check_centers(self, centers: Sequence | None, n_objects: int) -> Sequence:
        if centers is None:
            return [None] * n_objects
        if len(centers) != n_objects:
            raise InvalidInputError(f"There are {n_objects} objects, but {len(centers)} center_coordinates.")
        if self.n_positive_points < 1:
            raise InvalidInputError(
                "The centre is a positive point, but n_positive_points is 0. Leave out center_coordinates, or set "
                "n_positive_points to 1 or more."
            )
        return centers

    def _sample(self, n: int, mask: torch.Tensor, box: np.ndarray, center) -> np.ndarray:
        """Sample the points (P, 2) of object `n` as (y, x)."""
        points = [] if center is None else [np.asarray(center).astype(np.int64)[None]]
        n_positive = self.n_positive_points - len(points)
        inside = _indices(mask)
        if len(inside) == 0:
            raise InvalidInputError(f"Object {n} is empty: it has no pixel for a point. Leave it out.")
        if n_positive:
            points.append(self._choose(inside, n_positive, replace=n_positive > len(inside)))
        n_negative = self.n_negative_points
        if n_negative:
            around = _surroundings(mask, box, self.dilation_strength)
            if len(around):
                points.append(self._choose(around, min(n_negative, len(around)), replace=False))
            n_negative -= len(around)
        if n_negative > 0:
            outside = _indices(~mask)
            if len(outside) == 0:
                raise InvalidInputError(
                    f"Object {n} covers the whole image: there is no pixel for a negative point. Leave it out, or set "
                    "n_negative_points to 0."
                )
            points.append(self._choose(outside, n_negative, replace=n_negative > len(outside)))
        return np.concatenate(points) if points else np.zeros((0, 2), dtype=np.int64)

    def _choose(self, candidates: torch.Tensor, n: int, replace: bool) -> np.ndarray:
        chosen = self._rng.choice(len(candidates), size=n, replace=replace)
        return candidates[torch.as_tensor(chosen, device=candidates.device)].cpu().numpy()


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_boxes(boxes: Sequence[tuple], n_objects: int) -> np.ndarray:
    boxes = [tuple(box) for box in boxes]
    if len(boxes) != n_objects or any(len(box) != 4 for box in boxes):
        raise InvalidInputError(
            f"bbox_coordinates must be one (y0, x0, y1, x1) for each of the {n_objects} objects, but are {boxes!r}."
        )
    return np.array(boxes) if boxes else np.zeros((0, 4), dtype=np.int64)


def _surroundings(mask: torch.Tensor, box: np.ndarray, distance: int) -> torch.Tensor:
    """Pixels (K, 2) of the box enlarged by a distance, without the mask dilated by it, in raster order."""
    grown = _grow(box, distance, mask.shape)
    window = _grow(box, 2 * distance, mask.shape)  # all that the dilation can bring into the enlarged box
    dilated = _dilate(mask[window], distance)
    inner = tuple(slice(g.start - w.start, g.stop - w.start) for g, w in zip(grown, window))
    origin = torch.tensor([g.start for g in grown], device=mask.device)
    return _indices(~dilated[inner]) + origin


def _indices(mask: torch.Tensor) -> torch.Tensor:
    """The indices (K, ndim) of the pixels of a mask, in raster order."""
    if mask.device.type != "cpu":
        return torch.nonzero(mask)
    # Several times faster than torch for masks with few pixels.
    indices = np.unravel_index(np.flatnonzero(mask.numpy()), tuple(mask.shape))
    return torch.from_numpy(np.stack(indices, axis=1))


def _count(indices: torch.Tensor, n_masks: int) -> torch.Tensor:
    """The number (N,) of pixels of each mask, given the indices (K, 1 + ndim) of the pixels of all."""
    return torch.bincount(indices[:, 0], minlength=n_masks)


def _grow(box: np.ndarray, distance: int, shape: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a box (starts, stops), enlarged by a distance and clipped to the image."""
    starts, stops = np.floor(box[:len(shape)]) - distance, np.ceil(box[len(shape):]) + distance
    return tuple(slice(*np.clip([start, stop], 0, size).astype(int)) for start, stop, size in zip(starts, stops, shape))


def _dilate(mask: torch.Tensor, distance: int) -> torch.Tensor:
    """Dilate by a square of side 2 * distance + 1: the same as `distance` dilations by 3 x 3."""
    if distance == 0 or mask.numel() == 0:
        return mask
    side = 2 * distance + 1
    values = mask[None, None].float()
    values = F.max_pool2d(values, (side, 1), stride=1, padding=(distance, 0))
    return F.max_pool2d(values, (1, side), stride=1, padding=(0, distance))[0, 0] > 0


class IterativePromptGenerator(PromptGeneratorBase):
    """Samples points where a prediction is wrong, as an annotator would correct it.

    Args:
        rng: Generator or seed of the random choices. None uses numpy's global state (`numpy.random.seed`).
    """

    def __init__(self, *, rng: np.random.Generator | int | None = None) -> None:
        self._rng = _sampler(rng)

    def __call__(
        self, segmentation: torch.Tensor, prediction: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """Generate one positive and one negative point per object.

        The positive point is a random pixel of the object that the prediction lacks; if it lacks none, one that
        both have. The negative point is a random pixel of the prediction outside of the object; if there is none,
        one of the object's bounding box, enlarged by three pixels along each axis, outside of the object.

        Args:
            segmentation: Binary masks (N, 1, H, W) or (N, 1, Z, H, W), on any device.
            prediction: Binary masks of the same shape (values above 0.5 are foreground).
            kwargs: Unused; lets all generators be called alike.

        Returns:
            Points (N, 2, 2) as (x, y) or (N, 2, 3) as (x, y, z), int64; their labels (N, 2), int64, always [1, 0];
            None; None. Points and labels are on the device of `segmentation`.

        Raises:
            InvalidInputError: If the shapes are not equal or not as said, or an object is empty or covers everything.
        """
        segmentation, prediction = torch.as_tensor(segmentation), torch.as_tensor(prediction)
        if segmentation.shape != prediction.shape:
            raise InvalidInputError(
                f"segmentation and prediction must have equal shapes, but have {_shape(segmentation)} and "
                f"{_shape(prediction)}."
            )
        if segmentation.ndim not in (4, 5) or segmentation.shape[1] != 1:
            raise InvalidInputError(
                "segmentation must have the shape (N, 1, H, W) or (N, 1, Z, H, W), but has "
                f"{_shape(segmentation)}."
            )
        objects = segmentation[:, 0] > 0.5
        predicted = prediction[:, 0].to(objects.device) > 0.5
        points = torch.stack([
            self._sample(_missing(objects, predicted), "is empty"),
            self._sample(_superfluous(objects, predicted), "covers everything, so that nothing is outside of it"),
        ], dim=1)
        labels = torch.tensor([[1, 0]], device=points.device).repeat(len(points), 1)
        return points.flip(-1), labels, None, None

    def _sample(self, candidates: torch.Tensor, problem: str) -> torch.Tensor:
        """Choose one pixel of each mask (N, ...): indices (N, ndim)."""
        indices = _indices(candidates)  # ordered by object
        counts = _count(indices, len(candidates)).cpu().numpy()
        if not counts.all():
            raise InvalidInputError(f"Object {int(np.argmin(counts))} {problem}. Leave it out.")
        chosen = np.array([self._rng.choice(count) for count in counts], dtype=np.int64)
        chosen += np.cumsum(counts) - counts
        return indices[torch.as_tensor(chosen, device=indices.device), 1:]


def _missing(objects: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Pixels (N, ...) of the objects that were not predicted; where there are none, those that were."""
    missing = objects & ~predicted
    complete = _count(_indices(missing), len(missing)) == 0
    missing[complete] = objects[complete]
    return missing


def _superfluous(objects: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Pixels (N, ...) that were predicted outside of the objects; where there are none, others near them."""
    superfluous = predicted & ~objects
    exact = _count(_indices(superfluous), len(superfluous)) == 0
    for n in torch.nonzero(exact)[:, 0].tolist():
        inside = _indices(objects[n])
        if len(inside):
            box = torch.cat([inside.amin(0), inside.amax(0) + 1]).cpu().numpy()
            near = _grow(box, _MARGIN, objects.shape[1:])
            superfluous[n][near] = ~objects[n][near]
    return superfluous
