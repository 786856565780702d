"""What the networks learn: instance ids, and foreground and distances per object for the decoder.

The distances are those of Archit et al. 2025, 10.1038/s41592-024-02580-4, computed by torch-em, with two repairs
for objects that have nothing but rim and for an object that fills the patch.
"""

from collections.abc import Sequence

import numpy as np
from bioimage_cpp.segmentation import label as label_components
from skimage.segmentation import find_boundaries
from torch_em.transform.label import PerObjectDistanceTransform

from ..core.errors import InvalidInputError
from ..core.labels import check_labels

__all__ = ["DecoderTarget", "InstanceTarget", "decoder_channels", "label_instances", "pad_target"]

_to_distances = PerObjectDistanceTransform(
    distances=True, boundary_distances=True, directed_distances=False, foreground=True, apply_label=False
)


def to_integer_labels(labels: np.ndarray) -> np.ndarray:
    """Return labels with an integer dtype; whole numbers stored as floats are fine.

    Raises:
        InvalidInputError: For fractions, NaN, or negative ids.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all() or (labels != np.round(labels)).any():
            raise InvalidInputError(
                f"A label image must hold whole numbers (0 is background, 1, 2, ... are objects), but its values of "
                f"dtype {labels.dtype} have fractions or are not finite. Are images and labels interchanged?"
            )
        labels = labels.astype(np.int64)
    return check_labels(labels)


def label_instances(labels: np.ndarray, min_size: int = 0) -> np.ndarray:
    """Number the connected components of a label image.

    Args:
        labels: Label image (Y, X), 0 is background. Parts of equal id that do not touch become objects of their own.
        min_size: Components with fewer pixels become background.

    Returns:
        New uint32 array (Y, X) with the ids 0, 1, 2, ... Pixels that touch at a corner belong together.

    Raises:
        InvalidInputError: If the array is not two-dimensional, or holds fractions or negative ids.
    """
    labels = to_integer_labels(labels)
    if labels.ndim != 2:
        raise InvalidInputError(
            f"Training is on planes: labels must have the shape (Y, X), but have {labels.shape}. Labels with channels "
            "(colours) must be converted to one id per pixel."
        )
    # Bytes of int8 and int16 are not accepted by the library.
    components = label_components(labels.astype(np.int64) if labels.dtype.kind == "i" else labels).view(np.int64)
    is_kept = np.bincount(components.reshape(-1)) >= min_size
    is_kept[0] = False
    return np.where(is_kept, np.cumsum(is_kept), 0).astype(np.uint32)[components]


def decoder_channels(instances: np.ndarray) -> np.ndarray:
    """Compute what the decoder predicts.

    Args:
        instances: Instance ids (Y, X), as from `label_instances`.

    Returns:
        float32 array (3, Y, X): foreground (0 or 1), distance to the centre of the object, distance to its boundary.
        Both distances are per object in [0, 1] with 1 on the rim, and 1 in the background. The edge of the patch
        is no rim. An object with nothing but rim pixels has boundary distance 1; in a patch that one object fills
        nothing of its rim is seen, and its boundary distance is 0.
    """
    channels = _to_distances(instances).astype(np.float32, copy=False)
    n_objects = int(instances.max(initial=0))
    if n_objects == 0:
        return channels
    inside = ~find_boundaries(instances, mode="inner")
    if inside.all():
        channels[2] = 0.0
        return channels
    n_inside = np.bincount(instances[inside], minlength=n_objects + 1)
    is_rim_only = n_inside == 0
    is_rim_only[0] = False
    channels[2][is_rim_only[instances]] = 1.0
    return channels


class InstanceTarget:
    """Label transform for training without decoder: (Y, X) labels to (Y, X) float32 ids 0, 1, 2, ...

    Args:
        min_size: Components with fewer pixels become background.
    """

    def __init__(self, min_size: int = 25):
        self.min_size = min_size

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        return self.from_instances(label_instances(labels, self.min_size))

    def from_instances(self, instances: np.ndarray) -> np.ndarray:
        """The target for ids that `label_instances` made."""
        return instances.astype(np.float32)


class DecoderTarget:
    """Label transform for training with decoder: (Y, X) labels to the channels of `decoder_channels`.

    Args:
        min_size: Components with fewer pixels become background.
        instances: Whether the instance ids come first, as channel 0 of (4, Y, X); else the result is (3, Y, X).
    """

    def __init__(self, min_size: int = 25, instances: bool = True):
        self.min_size, self.instances = min_size, instances

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        return self.from_instances(label_instances(labels, self.min_size))

    def from_instances(self, instances: np.ndarray) -> np.ndarray:
        """The target for ids that `label_instances` made."""
        channels = decoder_channels(instances)
        return np.concatenate([instances[None].astype(np.float32), channels]) if self.instances else channels


def pad_target(target: np.ndarray, pad_width: Sequence[tuple[int, int]], mode: str = "constant") -> np.ndarray:
    """Pad the four channels of `DecoderTarget` in Y and X; constant padding is background, with distances 1."""
    widths = [(0, 0), *pad_width]
    if mode != "constant":
        return np.pad(target, widths, mode=mode)
    padded = np.pad(target, widths)
    is_padding = np.pad(np.zeros(target.shape[1:], bool), pad_width, constant_values=True)
    padded[-2:, is_padding] = 1.0
    return padded
