"""Masks to label images, and the small things people ask of label images. Loads no torch unless it is asked for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from bioimage_cpp.distance import distance_transform
from bioimage_cpp.segmentation import label as label_components
from scipy.ndimage import find_objects

from .errors import InvalidInputError, InvalidTypeError
from .masks import BoxedMask, paint_masks, read_record, suppress_masks, to_float

if TYPE_CHECKING:
    import torch

__all__ = [
    "apply_nms", "compute_iou", "get_block_shape", "get_centers_and_bounding_boxes", "mask_data_to_segmentation",
    "relabel_consecutive", "remove_small_labels", "segmentation_to_one_hot",
]


def compute_iou(mask1: np.ndarray, mask2: np.ndarray) -> float:
    """Compute the intersection over union of two binary masks.

    Args:
        mask1: First mask: bool, or numbers with the values 0 and 1.
        mask2: Second mask of the same shape.

    Returns:
        The intersection over union; 0 for two empty masks.

    Raises:
        InvalidInputError: If the shapes differ or there are other values than 0 and 1.

    Example:
        >>> compute_iou(np.array([1, 1, 0]), np.array([0, 1, 1]))  # doctest: +ELLIPSIS
        0.333...
    """
    mask1, mask2 = _binary(mask1, "mask1"), _binary(mask2, "mask2")
    if mask1.shape != mask2.shape:
        raise InvalidInputError(f"The masks must have the same shape, but got {mask1.shape} and {mask2.shape}.")
    overlap = np.count_nonzero(mask1 & mask2)
    union = np.count_nonzero(mask1 | mask2)
    return float(overlap / (union + 1e-7))


def _binary(mask: np.ndarray, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype == bool:
        return mask
    out = mask == 1
    if np.count_nonzero(out) != np.count_nonzero(mask):
        raise InvalidInputError(
            f"{name} must hold only 0 and 1, but has other values. Pass a comparison such as {name} > 0 or == some id."
        )
    return out


def check_labels(segmentation: np.ndarray) -> np.ndarray:
    segmentation = np.asarray(segmentation)
    if segmentation.dtype == bool:
        segmentation = segmentation.view(np.uint8)
    if segmentation.dtype.kind not in "ui":
        raise InvalidTypeError(f"A label image must have an integer dtype, but got {segmentation.dtype}.")
    if segmentation.dtype.kind == "i" and segmentation.size and segmentation.min() < 0:
        raise InvalidInputError("A label image must not have negative ids; 0 is background.")
    return segmentation


def boxes_of_labels(segmentation: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[slice, ...]]]:
    """Return the ids, a label image with consecutive ids (position in ids + 1) and the slices of each id."""
    if segmentation.size == 0 or segmentation.max() == 0:
        return np.zeros(0, dtype=segmentation.dtype), segmentation, []
    # find_objects makes a list up to the largest id: relabel first if ids are sparse.
    if int(segmentation.max()) > max(4 * segmentation.size, 1024):
        ids, consecutive = np.unique(segmentation, return_inverse=True)
        consecutive = consecutive.reshape(segmentation.shape) + int(ids[0] != 0)
        ids = ids[ids != 0]
        return ids, consecutive, find_objects(consecutive)
    objects = find_objects(segmentation)
    present = [(i, box) for i, box in enumerate(objects, 1) if box is not None]
    if len(present) == len(objects):
        return np.arange(1, len(objects) + 1), segmentation, objects
    lookup = np.zeros(len(objects) + 1, dtype=np.int64)
    lookup[[i for i, _ in present]] = np.arange(1, len(present) + 1)
    return np.array([i for i, _ in present]), lookup[segmentation], [box for _, box in present]


def get_centers_and_bounding_boxes(
    segmentation: np.ndarray, mode: str = "v"
) -> tuple[dict[int, tuple], dict[int, tuple[int, ...]]]:
    """Compute a centre and the bounding box of each object of a label image.

    Args:
        segmentation: Label image (Y, X) or (Z, Y, X), 0 is background.
        mode: `v` takes the pixel that lies deepest inside the object (the first one in raster order), which is
            always part of it; `p` takes the centroid, which may lie outside.

    Returns:
        The centres by id: pixel indices (`v`, int) or coordinates (`p`, float), in the order of the axes.
        The bounding boxes by id: (y0, x0, y1, x1) or (z0, y0, x0, z1, y1, x1), half-open.

    Raises:
        InvalidInputError: For an unknown mode, another number of axes, or negative ids.
        InvalidTypeError: If the dtype is no integer.
    """
    segmentation = check_labels(segmentation)
    if segmentation.ndim not in (2, 3):
        raise InvalidInputError(
            f"A label image must have the shape (Y, X) or (Z, Y, X), but got {segmentation.shape}."
        )
    if mode not in ("v", "p"):
        raise InvalidInputError(f"mode must be 'v' (deepest pixel) or 'p' (centroid), but got {mode!r}.")
    ids, labels, slices = boxes_of_labels(segmentation)
    boxes = {
        int(i): tuple(s.start for s in box) + tuple(s.stop for s in box) for i, box in zip(ids, slices)
    }
    centers = {}
    if mode == "p":
        for n, (i, box) in enumerate(zip(ids, slices), 1):
            coordinates = np.nonzero(labels[box] == n)
            centers[int(i)] = tuple(float(c.mean() + s.start) for c, s in zip(coordinates, box))
        return centers, boxes

    for n, (i, box) in enumerate(zip(ids, slices), 1):
        centers[int(i)] = _deepest_pixel(labels[box] == n, box)
    return centers, boxes


def _deepest_pixel(mask: np.ndarray, box: tuple[slice, ...]) -> tuple[int, ...]:
    """The pixel of `mask` farthest from the mask's inner boundary (its pixels with an axis neighbour outside)."""
    # Distance to the inner boundary = distance to the outside of the mask eroded by one: the outside is never nearer
    # than the boundary. The other objects play no role, so that each object needs only its own box.
    interior = mask.copy()
    for axis in range(mask.ndim):
        head = [slice(None)] * mask.ndim
        tail = list(head)
        head[axis], tail[axis] = slice(None, -1), slice(1, None)
        interior[tuple(head)] &= mask[tuple(tail)]
        interior[tuple(tail)] &= mask[tuple(head)]
        for edge in (0, -1):
            head[axis] = edge
            interior[tuple(head)] = False
    # An object without interior has the distance 0 everywhere: its first pixel is taken.
    depth = distance_transform(interior) if interior.any() else mask
    index = np.unravel_index(int(depth.argmax()), mask.shape)
    return tuple(int(k) + s.start for k, s in zip(index, box))


def segmentation_to_one_hot(
    segmentation: np.ndarray, segmentation_ids: Sequence[int] | np.ndarray | None = None
) -> "torch.Tensor":
    """Convert a label image to one binary mask per object.

    Args:
        segmentation: Label image (H, W) of any integer dtype, 0 is background.
        segmentation_ids: The ids to convert; the channels are in ascending order of these. None takes
            all from 1 to the largest id; ids that are absent give empty channels.

    Returns:
        Float32 tensor (N, 1, H, W) with the values 0 and 1.

    Raises:
        InvalidInputError: If the ids are empty or contain 0, or the shape is not (H, W).
    """
    import torch

    segmentation = check_labels(segmentation)
    if segmentation.ndim != 2:
        raise InvalidInputError(f"A label image must have the shape (H, W), but got {segmentation.shape}.")
    if segmentation_ids is None:
        ids = np.arange(1, (int(segmentation.max()) if segmentation.size else 0) + 1)
    else:
        ids = np.unique(np.asarray(segmentation_ids))
        if ids.size == 0 or ids.min() <= 0:
            raise OneHotIdError(f"segmentation_ids must be positive ids, at least one, but got {segmentation_ids!r}.")
    one_hot = torch.zeros((len(ids), 1) + segmentation.shape, dtype=torch.float32)
    for channel, i in enumerate(ids):
        one_hot[channel, 0][torch.from_numpy(segmentation == i)] = 1
    return one_hot


class OneHotIdError(InvalidInputError, RuntimeError):
    """Ids for the one-hot encoding are missing or contain the background."""


def get_block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a block shape for block-wise processing of an image: at most 1024 x 1024, or 32 x 256 x 256.

    Raises:
        InvalidInputError: If the shape is neither 2D nor 3D.
    """
    largest = {2: (1024, 1024), 3: (32, 256, 256)}.get(len(shape))
    if largest is None:
        raise InvalidInputError(f"Only 2D and 3D shapes are supported, but got {tuple(shape)}.")
    return tuple(min(int(s), m) for s, m in zip(shape, largest))


def relabel_consecutive(segmentation: np.ndarray) -> np.ndarray:
    """Renumber a label image to 1, 2, ... in the order of the ids, as a new uint32 array; 0 stays background."""
    segmentation = check_labels(segmentation)
    ids, consecutive = np.unique(segmentation, return_inverse=True)
    offset = 0 if ids.size and ids[0] == 0 else 1
    return (consecutive.reshape(segmentation.shape) + offset).astype(np.uint32)


def remove_small_labels(segmentation: np.ndarray, min_size: int) -> np.ndarray:
    """Set labels with fewer than `min_size` pixels to 0, without renumbering, in a new array."""
    segmentation = check_labels(segmentation)
    if min_size <= 0 or segmentation.size == 0:
        return segmentation.copy()
    ids, inverse, counts = np.unique(segmentation, return_inverse=True, return_counts=True)
    return np.where(counts >= min_size, ids, 0).astype(segmentation.dtype)[inverse].reshape(segmentation.shape)


def _background_label(labels: np.ndarray, sizes: np.ndarray) -> int:
    """The label that is the unlabelled surroundings in disguise, or 0.

    It is the largest one, if it is larger than the empty area and reaches from one image border to the opposite one.
    """
    largest = int(sizes[1:].argmax()) + 1 if len(sizes) > 1 else 0
    if largest == 0 or sizes[largest] <= sizes[0]:
        return 0
    is_largest = labels == largest
    top, bottom, left, right = (is_largest[edge].any() for edge in (0, -1, (slice(None), 0), (slice(None), -1)))
    return largest if (top and bottom) or (left and right) else 0


def _merge(
    masks: Sequence[BoxedMask],
    areas: Sequence[float],
    ids: Sequence[int | None],
    shape: tuple[int, int],
    min_object_size: int = 0,
    max_object_size: int | None = None,
    label_masks: bool = True,
    with_background: bool = False,
    merge_exclusively: bool = True,
    keep_ids: bool = False,
) -> np.ndarray:
    chosen = [
        k for k in np.argsort(-np.asarray(areas, dtype=np.float64), kind="stable").tolist()
        if areas[k] >= (min_object_size or 0) and (max_object_size is None or areas[k] <= max_object_size)
    ]
    # Painted values: position in `final` (0 is background); `final` maps them to the ids that come out.
    final, counter = [0], 0
    for k in chosen:
        counter = counter + 1 if ids[k] is None else int(ids[k])
        final.append(counter)
    if keep_ids:
        used = {i for k in chosen if (i := ids[k]) is not None}
        free = (i for i in range(1, len(chosen) + len(used) + 1) if i not in used)
        final = [0] + [next(free) if ids[k] is None else int(ids[k]) for k in chosen]
    painted = paint_masks(shape, [masks[k] for k in chosen], range(1, len(final)), merge_exclusively)
    final = np.array(final, dtype=np.uint32)

    if label_masks:
        parts = label_components(painted, connectivity=1).view(np.int64) if painted.size else painted
        n_parts = int(parts.max()) + 1 if parts.size else 1
        source = np.zeros(n_parts, dtype=np.int64)
        if keep_ids:
            source[parts.ravel()] = painted.ravel()
    else:
        # Records of the same id are one object.
        _, merged = np.unique(final, return_inverse=True)
        parts = merged[painted]
        n_parts = int(merged.max()) + 1
        source = np.zeros(n_parts, dtype=np.int64)
        source[merged] = np.arange(len(final))
    sizes = np.bincount(parts.ravel(), minlength=n_parts)
    keep = sizes >= max(min_object_size or 0, 1)
    keep[0] = False
    if with_background:
        keep[_background_label(parts, sizes)] = False
    numbers = final[source] if keep_ids else np.cumsum(keep)
    return np.where(keep, numbers, 0).astype(np.uint32)[parts]


def _read_records(
    records: Sequence[Mapping[str, Any]], shape: Sequence[int] | None
) -> tuple[list[BoxedMask], tuple[int, int]]:
    masks, ends = [], []
    for record in records:
        mask, end = read_record(record)
        masks.append(mask)
        ends.append(end)
    if shape is None:
        shape = tuple(max(e[k] for e in ends) for k in (0, 1)) if ends else (0, 0)
    shape = tuple(int(s) for s in shape)
    if len(shape) != 2:
        raise InvalidInputError(f"shape must be (H, W), but got {shape}.")
    for record, end in zip(records, ends):
        if record.get("global_bbox") is None and end != shape:
            raise InvalidInputError(
                f"A mask has the shape {end}, but the segmentation has {shape}. Masks of tiles need 'global_bbox'."
            )
    return masks, shape


def mask_data_to_segmentation(
    masks: Sequence[Mapping[str, Any]],
    shape: tuple[int, int] | None = None,
    min_object_size: int = 0,
    max_object_size: int | None = None,
    label_masks: bool = True,
    with_background: bool = False,
    merge_exclusively: bool = True,
    *,
    keep_ids: bool = False,
) -> np.ndarray:
    """Paint masks into a label image, the largest first.

    Args:
        masks: SAM-style records with `segmentation` (bool (H, W), array or tensor) and optionally `area` (else it is
            counted) and `seg_id`. With `global_bbox` and `bbox` (XYWH) a mask belongs to a tile or crop, whose place
            in the image is `global_bbox[:2] - bbox[:2]`; the whole mask is painted there.
        shape: Shape (H, W) of the result. None takes that of the masks, or the extent of all tiles.
        min_object_size: Masks, and pieces of masks after merging, with fewer pixels are left out.
        max_object_size: Masks with more pixels are left out.
        label_masks: Whether parts of a mask that are not connected (along the axes) become separate objects.
        with_background: Whether to remove the largest object if it is the background, segmented like an object: if
            it is larger than the empty area and reaches from one image border to the opposite one.
        merge_exclusively: Whether a pixel belongs to the largest of its masks, otherwise to the smallest.
        keep_ids: Whether objects get the `seg_id` of their records. Parts of a mask then share their id, and records
            without one get free ids. Otherwise ids are 1, 2, ... in raster order (or, with `label_masks=False`, in
            the order of `seg_id` or else of painting).

    Returns:
        Label image uint32 (H, W), 0 is background. Zeros if there are no masks ((0, 0) without a shape).

    Raises:
        InvalidInputError: If shapes do not fit.

    Example:
        >>> mask = np.zeros((2, 4), dtype=bool)
        >>> mask[:, :2] = True
        >>> mask_data_to_segmentation([dict(segmentation=mask, area=4)])
        array([[1, 1, 0, 0],
               [1, 1, 0, 0]], dtype=uint32)
    """
    boxed, shape = _read_records(masks, shape)
    areas = [float(r["area"]) if r.get("area") is not None else float(m.area) for r, m in zip(masks, boxed)]
    return _merge(
        boxed, areas, _ids(masks), shape, min_object_size, max_object_size, label_masks, with_background,
        merge_exclusively, keep_ids,
    )


def _ids(records: Sequence[Mapping[str, Any]]) -> list[int | None]:
    ids = [None if r.get("seg_id") is None else int(r["seg_id"]) for r in records]
    bad = [i for i in ids if i is not None and not 0 < i < 2**32]
    if bad:
        raise InvalidInputError(f"seg_id must be from 1 to 2**32 - 1 (0 is background), but got {bad[0]}.")
    return ids


def apply_nms(
    predictions: Sequence[Mapping[str, Any]],
    min_size: int,
    shape: tuple[int, int] | None = None,
    perform_box_nms: bool = False,
    nms_thresh: float = 0.9,
    max_size: int | None = None,
    intersection_over_min: bool = False,
    *,
    keep_ids: bool = False,
) -> np.ndarray:
    """Remove duplicate masks by non-maximum suppression and merge the rest into a label image.

    Masks are visited by descending `predicted_iou * stability_score` (ties in their order). A mask is dropped if its
    overlap with one that was kept is larger than `nms_thresh`. Only crops of overlapping masks are compared, with
    exact pixel counts; areas and boxes are measured on the masks.

    Args:
        predictions: Records as for `mask_data_to_segmentation`, with `predicted_iou` and `stability_score` in addition.
        min_size: Smallest area in pixels (inclusive), of masks and of their pieces after merging; 0 keeps all.
        shape: Shape (H, W) of the result. None takes that of the masks, or the extent of all tiles.
        perform_box_nms: Compare bounding boxes instead of pixels.
        nms_thresh: Largest overlap of two kept masks, within 0 to 1.
        max_size: Largest area in pixels (inclusive).
        intersection_over_min: Measure overlap relative to the smaller mask, which also removes masks within others,
            instead of by intersection over union.
        keep_ids: Whether objects get the `seg_id` of their records.

    Returns:
        Label image uint32 (H, W), 0 is background. Zeros if nothing is left ((0, 0) without predictions and shape).

    Raises:
        InvalidInputError: If `perform_box_nms` and `intersection_over_min` are combined, or shapes do not fit.
    """
    if perform_box_nms and intersection_over_min:
        raise InvalidInputError("perform_box_nms cannot be combined with intersection_over_min. Choose one of them.")
    masks, shape = _read_records(predictions, shape)
    ids = _ids(predictions)
    chosen = [
        k for k, m in enumerate(masks)
        if m.area and m.area >= (min_size or 0) and (max_size is None or m.area <= max_size)
    ]
    scores = [
        to_float(predictions[k].get("predicted_iou")) * to_float(predictions[k].get("stability_score")) for k in chosen
    ]
    kept = suppress_masks(
        [masks[k] for k in chosen], scores, nms_thresh, intersection_over_min=intersection_over_min,
        use_boxes=perform_box_nms,
    )
    kept = [chosen[k] for k in kept]
    return _merge(
        [masks[k] for k in kept], [masks[k].area for k in kept], [ids[k] for k in kept], shape,
        min_object_size=min_size, keep_ids=keep_ids,
    )
