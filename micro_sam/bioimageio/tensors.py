"""The tensors of a package: their axes and types, and examples made from an image with labelled objects."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, NoObjectsError
from ..core.labels import check_labels, get_centers_and_bounding_boxes
from ..core.normalize import to_image
from ..core.prompts import logits_from_mask
from ..prompt_generators import PointAndBoxPromptGenerator

_N_OBJECTS, _N_NEGATIVE, _DILATION = 2, 2, 2
_EMBEDDING_CHANNELS = 256


@dataclass(frozen=True)
class TensorRow:
    """A tensor as bioimage.io sees it.

    `file` holds the example, `picture` shows it to people, where it can be seen; `axes` are rows of the description.
    """

    name: str
    file: str
    dtype: str
    description: str
    axes: tuple[dict[str, Any], ...]
    optional: bool = False
    picture: str = ""


def _channels(*names: str) -> dict[str, Any]:
    return {"type": "channel", "channel_names": list(names)}


def _space(size: Any) -> tuple[dict[str, Any], ...]:
    """The axes y and x; of a fixed size, of at least one pixel (None), or as large as those of the image."""
    sizes = {
        axis: {"min": 1, "step": 1} if size is None else {"tensor_id": "image", "axis_id": axis} if size == "image"
        else size for axis in "yx"
    }
    return tuple({"type": "space", "id": axis, "size": sizes[axis]} for axis in "yx")


_BATCH = {"type": "batch", "size": 1}
_OBJECTS, _POINTS = ({"type": "index", "id": axis, "size": {"min": 1, "step": 1}} for axis in ("object", "point"))
_FOUND = {"type": "index", "id": "object", "size": {"min": 1}}  # a size that is only known afterwards


def tensor_rows(mask_size: int, embedding_size: int) -> tuple[tuple[TensorRow, ...], tuple[TensorRow, ...]]:
    """Return the inputs and outputs, in the order in which `PredictorAdaptor` takes and gives them.

    Args:
        mask_size: Side of the model's mask input in pixels.
        embedding_size: Side of its embedding in pixels.
    """
    embedding = TensorRow(
        "embeddings", "embeddings.npy", "float32", "embedding of the image, saves computing it again",
        (_BATCH, _channels(*(f"c{k}" for k in range(_EMBEDDING_CHANNELS))), *_space(embedding_size)), optional=True,
    )
    inputs = (
        TensorRow("image", "input.npy", "uint8", "the image, values from 0 to 255",
                  (_BATCH, _channels("R", "G", "B"), *_space(None)), picture="sample_image.png"),
        TensorRow("box_prompts", "box_prompts.npy", "int64", "one box around each object, in pixels, ends exclusive",
                  (_BATCH, _OBJECTS, _channels("x_min", "y_min", "x_max", "y_max")), optional=True),
        TensorRow("point_prompts", "point_prompts.npy", "int64", "points in and around each object, in pixels",
                  (_BATCH, _OBJECTS, _POINTS, _channels("x", "y")), optional=True),
        TensorRow("point_labels", "point_labels.npy", "int64", "1: point in the object, 0: outside of it, -1: unused",
                  (_BATCH, _OBJECTS, _POINTS), optional=True),
        TensorRow("mask_prompts", "mask_prompts.npy", "float32", "rough mask of each object, logits",
                  (_BATCH, _OBJECTS, _channels("channel"), *_space(mask_size)), optional=True),
        embedding,
    )
    outputs = (
        TensorRow("masks", "mask.npy", "uint8", "one binary mask for each object",
                  (_BATCH, _FOUND, _channels("mask"), *_space("image")), picture="sample_mask.png"),
        TensorRow("scores", "scores.npy", "float32", "predicted quality of each mask (IoU)",
                  (_BATCH, _FOUND, _channels("mask"))),
        embedding,
    )
    return inputs, outputs


def picture_of(tensor: np.ndarray) -> np.ndarray:
    """A picture (Y, X[, 3]), uint8, of an image (1, 3, Y, X) or of masks (1, O, 1, Y, X), each in a grey of its own."""
    if tensor.ndim == 4:
        return np.moveaxis(tensor[0], 0, -1)
    greys = np.linspace(0, 255, len(tensor[0]) + 1)[1:, None, None]
    return (tensor[0, :, 0] * greys).max(axis=0).astype("uint8")


def example_inputs(image: np.ndarray, label_image: np.ndarray, mask_size: int) -> dict[str, np.ndarray]:
    """Make the input tensors, but for the embeddings, from an image and the objects in it.

    Args:
        image: Image (Y, X) or (Y, X, C); each channel is stretched to 0 to 255.
        label_image: The objects (Y, X), 0 is background. Those with the ids 1 and 2 are taken, or else the first ones.
        mask_size: Side of the model's mask input in pixels.

    Returns:
        The tensors by name. Each object has its box, a point inside and two outside, and its mask as logits. They are
        the same in each call.

    Raises:
        InvalidInputError: If image and labels do not fit, or the image is constant.
        NoObjectsError: If there are no objects.
    """
    pixels, labels = to_image(image), check_labels(label_image)
    if labels.shape != pixels.shape[:2]:
        raise InvalidInputError(
            f"image and label_image must have the same shape (Y, X), but have {pixels.shape[:2]} and {labels.shape}."
        )
    if not pixels.any():
        raise InvalidInputError("The image is constant, so nothing can be tested with it. Pass an image with objects.")
    centers, boxes = get_centers_and_bounding_boxes(labels)
    if not boxes:
        raise NoObjectsError("label_image has no object. Pass labels with at least one, its pixels set to its id.")
    ids = sorted(boxes, key=lambda i: (i not in (1, 2), i))[:_N_OBJECTS]
    objects = np.stack([labels == i for i in ids])[:, None]
    generator = PointAndBoxPromptGenerator(1, _N_NEGATIVE, _DILATION, get_box_prompts=True, rng=0)
    points, point_labels, box_prompts, _ = generator(objects, [boxes[i] for i in ids], [centers[i] for i in ids])
    return {
        "image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]),
        "box_prompts": box_prompts.numpy().astype(np.int64)[None],
        "point_prompts": points.numpy()[None],
        "point_labels": point_labels.numpy()[None],
        "mask_prompts": np.stack([logits_from_mask(mask, mask_size) for mask in objects[:, 0]])[None],
    }
