"""Prompts of many objects on one slice: from users, or projected from the mask of a neighbouring slice.

Masks are crops (`BoxedMask`) and all that is derived from them costs the size of the object, not that of the slice.
Coordinates are (y, x) in pixels of the slice, boxes half-open [y0, x0, y1, x1]. With tiled embeddings each object is
segmented in one tile, chosen as in `prompt_based_segmentation`, and its mask ends there.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor

from .._tiled_prompting import embedding_tiling
from ..core.errors import InvalidInputError, PromptTileError, nearest_names, require_positive_int
from ..core.masks import BoxedMask, crop_mask
from ..core.prompts import (
    MASK_LOGIT,
    BatchedPrompts,
    binary_mask,
    check_points,
    extend_box,
    points_from_mask,
)
from ..core.tiling import Tile, TileSpec, box_yx_to_xyxy, yx_to_xy
from ..embeddings.encode import ImageEmbeddings, set_precomputed
from ..models.mask_upsampling import MaskUpsampler
from ..models.prompting import decode_prompts
from ..prompt_based_segmentation import image_shape

# A projected point this close (in pixels) to a point of the user with the other label is left out.
_CONTRADICTION = 5.0


@dataclass(frozen=True)
class Projection:
    """Which prompts the mask of one slice gives in the next one; a single point takes precedence over points."""

    use_box: bool
    use_mask: bool
    use_points: bool
    use_single_point: bool = False

    @classmethod
    def create(cls, projection: "str | Mapping[str, bool] | Projection") -> "Projection":
        """Return a projection from one of `PROJECTION_MODES` or a mapping of use_box, use_mask and use_points.

        Raises:
            InvalidInputError: For an unknown name, other keys, or nothing that is used.
        """
        if isinstance(projection, cls):
            return projection
        if isinstance(projection, str):
            if projection not in _MODES:
                raise InvalidInputError(
                    f"projection {projection!r} is unknown. {nearest_names(projection, PROJECTION_MODES)}"
                )
            return _MODES[projection]
        keys = ("use_box", "use_mask", "use_points")
        if not isinstance(projection, Mapping) or set(projection) != set(keys):
            raise InvalidInputError(
                f"projection must be one of {', '.join(PROJECTION_MODES)}, or a dictionary with exactly the keys "
                f"{', '.join(keys)}, but is {projection!r}."
            )
        if not any(projection.values()):
            raise InvalidInputError("projection uses neither box, mask nor points: switch on at least one of them.")
        return cls(*(bool(projection[key]) for key in keys))


_MODES = {
    "box": Projection(True, False, False),
    "mask": Projection(True, True, False),
    "points": Projection(False, False, True),
    "points_and_mask": Projection(False, True, True),
    "single_point": Projection(False, False, False, True),
}
PROJECTION_MODES = tuple(_MODES)


@dataclass(frozen=True, eq=False)
class SlicePrompts:
    """What a user says about one object in one slice: its mask, or points and / or a box.

    Attributes:
        mask: The mask (Y, X) or a crop of it; it is taken as it is. An empty mask says that the object is not there.
        points: Points (N, 2) in the order (y, x).
        labels: Labels (N,) of the points: 1 for the object, 0 for background.
        box: Box [y0, x0, y1, x1], half-open.
        refine: Whether points and box correct what propagation projects into the slice, instead of segmenting the
            object there on their own. Negative points alone always do.
    """

    mask: np.ndarray | BoxedMask | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    box: Sequence[float] | None = None
    refine: bool = False

    @property
    def is_positive(self) -> bool:
        """Whether they say that the object is in the slice."""
        return self.mask is not None or self.box is not None or bool((np.asarray(self.labels) == 1).any())

    @property
    def is_anchor(self) -> bool:
        """Whether they give a mask on their own."""
        return self.mask is not None or (self.is_positive and not self.refine)


def read_prompts(value: np.ndarray | BoxedMask | SlicePrompts, shape: tuple[int, int], where: str) -> SlicePrompts:
    """Check the prompts of a slice of shape (Y, X); masks become crops, points and boxes arrays.

    Raises:
        InvalidInputError: For prompts that are malformed or do not belong to the slice; it starts with `where`.
    """
    prompts = value if isinstance(value, SlicePrompts) else SlicePrompts(mask=value)
    try:
        if prompts.mask is not None:
            if prompts.points is not None or prompts.labels is not None or prompts.box is not None or prompts.refine:
                raise InvalidInputError("A mask is taken as it is: pass either a mask, or points and a box.")
            return SlicePrompts(_read_mask(prompts.mask, shape))
        if (prompts.points is None) != (prompts.labels is None):
            raise InvalidInputError("points and labels belong together: pass both or none.")
        if prompts.points is None and prompts.box is None:
            raise InvalidInputError("There are no prompts: pass a mask, points with labels, or a box.")
        points, labels = prompts.points, prompts.labels
        if points is not None:
            points, labels = check_points(points, labels)
        box = None if prompts.box is None else extend_box(prompts.box, shape)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from error
    return SlicePrompts(None, points, labels, box, prompts.refine)


def _read_mask(mask: np.ndarray | BoxedMask, shape: tuple[int, int]) -> BoxedMask:
    if isinstance(mask, BoxedMask):
        y0, x0, y1, x1 = mask.box
        if y0 < 0 or x0 < 0 or y1 > shape[0] or x1 > shape[1]:
            raise InvalidInputError(f"The box {mask.box} of the mask lies outside of the slice of shape {shape}.")
        return mask
    mask = binary_mask(mask)
    if mask.shape != shape:
        raise InvalidInputError(f"The mask has the shape {mask.shape}, but the slices have {shape}.")
    return crop_mask(mask)


def centroid(mask: BoxedMask) -> np.ndarray:
    """Mean (y, x) of the pixels of a mask that is not empty."""
    sums = (np.count_nonzero(mask.mask, axis=axis) for axis in (1, 0))
    return np.array([
        (line @ np.arange(len(line)) + start * mask.area) / mask.area for line, start in zip(sums, (mask.y0, mask.x0))
    ])


def union(a: BoxedMask, b: BoxedMask) -> BoxedMask:
    """The pixels that are in either of two masks."""
    if a.area == 0 or b.area == 0:
        return b if a.area == 0 else a
    y0, x0 = min(a.y0, b.y0), min(a.x0, b.x0)
    y1, x1 = max(a.box[2], b.box[2]), max(a.box[3], b.box[3])
    both = np.zeros((y1 - y0, x1 - x0), dtype=bool)
    for m in (a, b):
        both[m.y0 - y0:m.box[2] - y0, m.x0 - x0:m.box[3] - x0] |= m.mask
    return BoxedMask(y0, x0, both, int(np.count_nonzero(both)))


def cut_out(mask: BoxedMask, y: slice, x: slice) -> np.ndarray:
    """The mask in a window that contains its box, bool."""
    window = np.zeros((y.stop - y.start, x.stop - x.start), dtype=bool)
    y0, x0, y1, x1 = mask.box
    window[y0 - y.start:y1 - y.start, x0 - x.start:x1 - x.start] = mask.mask
    return window


def _in_window(mask: BoxedMask, y: slice, x: slice) -> BoxedMask:
    """The part of a mask that is in a window, in coordinates of the window."""
    y0, x0, y1, x1 = mask.box
    top, left, bottom, right = max(y0, y.start), max(x0, x.start), min(y1, y.stop), min(x1, x.stop)
    part = mask.mask[top - y0:max(bottom, top) - y0, left - x0:max(right, left) - x0]
    return crop_mask(part, (top - y.start, left - x.start))


def points_from_boxed_mask(
    mask: BoxedMask, shape: tuple[int, int], box_extension: float, single: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """What `points_from_mask` gives for the mask in an image of shape (Y, X), from a window around it."""
    if mask.area == 0:
        return None
    window = []
    for start, length, size in zip((mask.y0, mask.x0), mask.mask.shape, shape):
        margin = length * box_extension if box_extension < 1 else box_extension
        # Halves are rounded to even numbers: a window from an even pixel rounds them like the image.
        first = max(math.floor(start - margin) // 2 * 2, 0)
        window.append(slice(first, min(math.ceil(start + length + margin) + 1, size)))
    points, labels = points_from_mask(cut_out(mask, *window), box_extension, single)
    return points + (window[0].start, window[1].start), labels


def logits_from_boxed_mask(mask: BoxedMask, shape: tuple[int, int], size: int) -> np.ndarray:
    """What `logits_from_mask` gives for the mask in an image of shape (Y, X), from a window around it."""
    logits = np.full((1, size, size), -MASK_LOGIT, dtype=np.float32)
    if mask.area == 0:
        return logits
    source, target, region = [], [], []
    for start, length, full in zip((mask.y0, mask.x0), mask.mask.shape, shape):
        scaled = max(int(full * (size / max(shape)) + 0.5), 1)
        step = full / scaled
        reach = max(step, 1.0) + 1  # the filter is this wide, and one pixel for rounding
        first, last = max(int((start - reach) / step), 0), min(math.ceil((start + length + reach) / step), scaled)
        low = max(int(first * step - reach), 0)
        source.append(slice(low, min(math.ceil(last * step + reach), full)))
        target.append(slice(first, last))
        region.append((first * step - low, last * step - low))
    values = Image.fromarray(cut_out(mask, *source).astype(np.float32))
    (y0, y1), (x0, x1) = region
    out = tuple(t.stop - t.start for t in target)
    box = (x0, y0, min(x1, values.size[0]), min(y1, values.size[1]))
    foreground = np.asarray(values.resize(out[::-1], Image.Resampling.BILINEAR, box=box)) > 0.5
    logits[0][tuple(target)][foreground] = MASK_LOGIT
    return logits


@dataclass(frozen=True, eq=False)
class Request:
    """Prompts of one object for the decoder, (y, x) in pixels of the tile with its halo, or of the slice."""

    tile: Tile | None
    points: np.ndarray | None
    labels: np.ndarray | None
    box: np.ndarray | None
    logits: np.ndarray | None
    best_of_three: bool = False

    @property
    def kind(self) -> tuple:
        """Requests of one kind can be decoded together."""
        n_points = 0 if self.points is None else len(self.points)
        tile_id = -1 if self.tile is None else self.tile.id
        return tile_id, n_points, self.box is not None, self.logits is not None, self.best_of_three


@dataclass(frozen=True)
class Confidence:
    """How sure the model is of a mask: the IoU that it predicts, and the stability under a shift of the threshold."""

    predicted_iou: float
    stability: float


class SliceDecoder:
    """Segments objects on the slices of a stack; reads the embeddings of a slice when it is used.

    Args:
        predictor: The predictor; the embeddings of the last slice stay set in it.
        image_embeddings: Embeddings of a stack, plain or tiled, in memory or lazy.
        projection: How the mask of a neighbouring slice is used.
        box_extension: How far derived boxes grow, see `segment_from_box`.
        batch_size: Number of objects per call of the decoder.

    Raises:
        InvalidInputError: If the embeddings are not of a stack, or for a wrong option.
    """

    def __init__(
        self,
        predictor: SamPredictor,
        image_embeddings: ImageEmbeddings,
        projection: str | Mapping[str, bool],
        box_extension: float,
        batch_size: int,
    ):
        require_positive_int("batch_size", batch_size)
        if not box_extension >= 0:
            raise InvalidInputError(
                f"box_extension must be a fraction of the box, or pixels from 1 on, but is {box_extension!r}."
            )
        self.projection = Projection.create(projection)
        self._predictor, self._embeddings, self._batch_size = predictor, image_embeddings, batch_size
        self._box_extension = box_extension
        self.shape = image_shape(predictor, image_embeddings)
        features = image_embeddings["features"]
        self._tiling: TileSpec | None = None
        if image_embeddings["input_size"] is None:
            self._tiling = embedding_tiling(image_embeddings)
            if len(features) == 0:
                raise InvalidInputError("The embeddings have no tiles: the mask they were computed with is empty.")
            features = features[next(iter(features))]
        if len(features.shape) != 5:
            raise InvalidInputError(
                f"The embeddings must be of a stack, (Z, 1, C, h, w), but have the shape {tuple(features.shape)}. "
                "Compute them from the volume with ndim=3."
            )
        self.n_slices = int(features.shape[0])
        self._mask_size = predictor.model.prompt_encoder.mask_input_size[0]
        self._upsamplers: dict[tuple, MaskUpsampler] = {}

    def prompted(self, prompts: SlicePrompts) -> Request:
        """The request of prompts that stand on their own (`is_anchor`, without a mask)."""
        tile = self._tile(self._user_positions(prompts))
        points, labels = self._local_points(prompts, tile)
        best_of_three = prompts.box is None and len(prompts.points) == 1
        return Request(tile, points, labels, self._local_box(prompts.box, tile), None, best_of_three)

    def projected(self, mask: BoxedMask, user: SlicePrompts | None = None) -> Request | None:
        """The request of the mask of a neighbouring slice, corrected by prompts of the user in this slice.

        The user's box replaces the projected one, points are combined; None if there is nothing to prompt with.
        """
        positions = {} if user is None else self._user_positions(user)
        if mask.area == 0:
            return None if not positions else self.prompted(user)
        tile = self._tile(positions or {"mask": centroid(mask)})
        y, x = (slice(0, n) for n in self.shape) if tile is None else tile.outer
        shape = (y.stop - y.start, x.stop - x.start)
        local = mask if tile is None else _in_window(mask, y, x)
        use, box, points, labels, logits = self.projection, None, None, None, None
        if user is not None and user.box is not None:
            box = self._local_box(user.box, tile)
        elif use.use_box:
            box = self._local_box(extend_box(mask.box, self.shape, self._box_extension), tile)
        if use.use_points or use.use_single_point:
            derived = points_from_boxed_mask(local, shape, self._box_extension, use.use_single_point)
            points, labels = (None, None) if derived is None else derived
        if user is not None and user.points is not None:
            points, labels = _combine((points, labels), self._local_points(user, tile))
        if use.use_mask:
            logits = logits_from_boxed_mask(local, shape, self._mask_size)
        if points is None and box is None and logits is None:
            return None
        return Request(tile, points, labels, box, logits)

    def _user_positions(self, prompts: SlicePrompts) -> dict[str, np.ndarray]:
        positions = {}
        if prompts.box is not None:
            positions["box"] = (prompts.box[:2] + prompts.box[2:]) / 2
        if prompts.points is not None and (prompts.labels == 1).any():
            positions["points"] = prompts.points[prompts.labels == 1].mean(axis=0)
        return positions

    def _tile(self, positions: dict[str, np.ndarray]) -> Tile | None:
        if self._tiling is None:
            return None
        tiles = {name: self._tiling.tile_at(*position) for name, position in positions.items()}
        if len({tile.id for tile in tiles.values()}) > 1:
            raise PromptTileError(
                f"The prompts of an object in a slice belong to different tiles: the box to {tiles['box'].id}, the "
                f"points to {tiles['points'].id}. Place them closer to each other, or compute the embeddings with "
                "larger tiles."
            )
        return next(iter(tiles.values()))

    def _local_points(self, prompts: SlicePrompts, tile: Tile | None):
        """Points in the tile. Negative ones outside of it say nothing new, since the mask ends there."""
        if prompts.points is None or tile is None:
            return prompts.points, prompts.labels
        local = prompts.points - np.array(tile.origin, dtype=float)
        inside = ((local >= 0) & (local <= tile.outer_shape)).all(axis=1)
        positive = prompts.labels == 1
        if positive.any() and not (positive & inside).any():
            raise PromptTileError(
                f"No positive point of the object lies in tile {tile.id} with its halo. Place the points of one object "
                "closer to each other, or compute the embeddings with larger tiles."
            )
        if (positive & ~inside).any():
            warnings.warn(
                f"{int((positive & ~inside).sum())} of {int(positive.sum())} positive points lie outside of tile "
                f"{tile.id} with its halo and are left out.", stacklevel=2,
            )
        if not inside.any():
            return None, None
        return local[inside], prompts.labels[inside]

    @staticmethod
    def _local_box(box: np.ndarray | None, tile: Tile | None) -> np.ndarray | None:
        if box is None or tile is None:
            return box
        return np.clip(box - np.tile(tile.origin, 2), 0, np.tile(tile.outer_shape, 2))

    def decode(self, z: int, requests: Sequence[Request]) -> list[tuple[BoxedMask, Confidence]]:
        """Segment objects on slice `z`; returns mask and confidence of each request."""
        groups = defaultdict(list)
        for k, request in enumerate(requests):
            groups[request.kind].append(k)
        results: list = [None] * len(requests)
        current = None
        for kind in sorted(groups):
            if kind[0] != current:
                current = kind[0]
                set_precomputed(
                    self._predictor, self._embeddings, i=z, tile_id=None if self._tiling is None else current
                )
            for start in range(0, len(groups[kind]), self._batch_size):
                batch = groups[kind][start:start + self._batch_size]
                for k, result in zip(batch, self._decode_batch([requests[k] for k in batch])):
                    results[k] = result
        return results

    def _decode_batch(self, requests: list[Request]) -> list[tuple[BoxedMask, Confidence]]:
        first = requests[0]

        def stacked(name, convert=np.asarray):
            return None if getattr(first, name) is None else np.stack([convert(getattr(r, name)) for r in requests])

        prompts = BatchedPrompts(
            stacked("box", lambda box: box_yx_to_xyxy(box).astype(float)),
            stacked("points", lambda points: yx_to_xy(points).astype(float)), stacked("labels"), stacked("logits"),
        )
        logits, ious = decode_prompts(self._predictor, prompts, first.best_of_three)
        rows, best = torch.arange(len(ious), device=ious.device), ious.argmax(dim=1)
        logits, ious = logits[rows, best], ious[rows, best]
        threshold = float(self._predictor.model.mask_threshold)
        masks = self._upsampler(logits).masks(logits, logits.new_full((len(logits),), threshold))
        y, x = (0, 0) if first.tile is None else first.tile.origin
        return [
            (BoxedMask(m.origin[0] + y, m.origin[1] + x, m.mask, m.area), Confidence(iou, m.stability))
            for m, iou in zip(masks, ious.tolist())
        ]

    def _upsampler(self, logits: torch.Tensor) -> MaskUpsampler:
        predictor = self._predictor
        key = (tuple(predictor.input_size), tuple(predictor.original_size))
        if key not in self._upsamplers:
            canvas = predictor.model.image_encoder.img_size
            self._upsamplers[key] = MaskUpsampler(logits.shape[-1], canvas, *key, logits.device)
        return self._upsamplers[key]


def _combine(projected, user):
    """Points of the user and projected ones, without those that contradict the user."""
    if user[0] is None or projected[0] is None:
        return user if projected[0] is None else projected
    distance = np.linalg.norm(projected[0][:, None] - user[0], axis=-1)
    keep = ~((distance < _CONTRADICTION) & (projected[1][:, None] != user[1])).any(axis=1)
    return np.concatenate([user[0], projected[0][keep]]), np.concatenate([user[1], projected[1][keep]])
