"""Scores of label images against their ground truth: matched objects, overlap, partitions.

All functions map two label images of one shape, (Y, X) or (Z, Y, X), with 0 for background, to numbers. Identical
images have the best score, also if both are empty: an image without objects that was found to be empty is right.
"""

from collections.abc import Sequence

import numpy as np

from ..core.errors import InvalidInputError
from ..core.labels import check_labels
from .errors import UnfitInputsError

# Written as decimals: an IoU of exactly 3/5 reaches 0.6, but not the 0.6000000000000001 that adding steps yields.
DEFAULT_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MATCH_THRESHOLD = 0.5
"""The IoU above which an object counts as found, for precision, recall and F1."""


def check_pair(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both label images as integer arrays.

    Raises:
        UnfitInputsError: If their shapes differ.
        InvalidInputError: If ids are negative, or the images are empty arrays.
        InvalidTypeError: If the dtype is no integer.
    """
    labels, truth = check_labels(labels), check_labels(truth)
    if labels.shape != truth.shape:
        raise UnfitInputsError(
            f"Prediction and truth must have the same shape, but have {labels.shape} and {truth.shape}. Check that "
            "they belong to the same image."
        )
    if labels.size == 0:
        raise InvalidInputError(f"Images without pixels cannot be scored; the shape is {labels.shape}.")
    return labels, truth


def check_thresholds(thresholds: Sequence[float] | None) -> tuple[float, ...]:
    """Return the IoU thresholds as a tuple; None means `DEFAULT_THRESHOLDS`.

    Raises:
        InvalidInputError: If there are none, or one is not in (0, 1].
    """
    if thresholds is None:
        return DEFAULT_THRESHOLDS
    # Thresholds made by adding steps (numpy.arange) are meant as decimals.
    values = tuple(round(float(t), 10) for t in thresholds)
    if not values or not all(0 < t <= 1 for t in values):
        raise InvalidInputError(f"thresholds must be IoU values in (0, 1], but are {list(thresholds)}.")
    return values


def segmentation_scores(
    labels: np.ndarray, truth: np.ndarray, thresholds: Sequence[float] | None = None
) -> dict[str, float]:
    """Score the objects of a label image by one-to-one matches with those of the truth.

    Objects are matched so that as many pairs as possible have an IoU of at least t. With these as true positives (TP),
    the other predicted objects as false positives (FP) and the other true ones as false negatives (FN), the
    segmentation accuracy is SA(t) = TP / (TP + FP + FN). The matches are those of `elf.evaluation`.

    Args:
        labels: The prediction.
        truth: The ground truth. It is taken as it is: parts with the same id are one object.
        thresholds: The IoU thresholds t of which `mSA` is the mean; None takes 0.5, 0.55, ..., 0.95.

    Returns:
        `mSA`, the mean segmentation accuracy; with the default thresholds `SA50` and `SA75`; `Precision`, `Recall`
        and `F1 Score` at t = 0.5. All are in 0...1.

    Raises:
        UnfitInputsError, InvalidInputError, InvalidTypeError: See `check_pair`; also for wrong thresholds.

    References:
        Everingham et al. 2010, doi:10.1007/s11263-009-0275-4; Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7;
        Stringer et al. 2021, doi:10.1038/s41592-020-01018-x.

    Example:
        >>> truth = np.array([[1, 1, 0, 2, 2]])
        >>> segmentation_scores(np.array([[1, 1, 0, 0, 0]]), truth)["SA50"]
        0.5
    """
    from elf.evaluation import matching, mean_segmentation_accuracy

    labels, truth = check_pair(labels, truth)
    wanted = check_thresholds(thresholds)
    names = ["mSA", *(() if thresholds is not None else ("SA50", "SA75")), "Precision", "Recall", "F1 Score"]
    if not labels.any() or not truth.any():
        return dict.fromkeys(names, float(labels.any() == truth.any()))
    mean, accuracies = mean_segmentation_accuracy(labels, truth, thresholds=wanted, return_accuracies=True)
    found = matching(labels, truth, threshold=MATCH_THRESHOLD)
    values = {"mSA": mean, "Precision": found["precision"], "Recall": found["recall"], "F1 Score": found["f1"]}
    if thresholds is None:
        values |= {"SA50": accuracies[wanted.index(0.5)], "SA75": accuracies[wanted.index(0.75)]}
    return {name: float(values[name]) for name in names}


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the intersection over union of two bool masks of one shape, of which one is not empty."""
    return np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth)


def choose_objects(truth: np.ndarray, n_objects: int | None) -> np.ndarray:
    """Return the ids of the objects to prompt: all, or `n_objects` that are evenly spaced in the order of ids."""
    ids = np.unique(truth[truth != 0])
    if n_objects is None or len(ids) <= n_objects:
        return ids
    return ids[np.linspace(0, len(ids) - 1, n_objects).round().astype(int)]


def dice_score(labels: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice coefficient 2 |A ∩ B| / (|A| + |B|) of the foregrounds (Dice 1945, doi:10.2307/1932409).

    Args:
        labels: The prediction; all ids but 0 are foreground.
        truth: The ground truth, likewise.

    Raises:
        UnfitInputsError, InvalidInputError, InvalidTypeError: See `check_pair`.
    """
    labels, truth = check_pair(labels, truth)
    total = np.count_nonzero(labels) + np.count_nonzero(truth)
    return 2 * np.count_nonzero((labels != 0) & (truth != 0)) / total if total else 1.0


def dice_per_class(labels: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Return the Dice coefficient of each id but 0 that occurs in one of the images, in ascending order.

    The ids mean the same in both images: they are classes of a semantic segmentation, or objects that were prompted
    one by one.

    Args:
        labels: The prediction.
        truth: The ground truth.

    Raises:
        UnfitInputsError, InvalidInputError, InvalidTypeError: See `check_pair`.
    """
    labels, truth = check_pair(labels, truth)
    sizes: dict[int, int] = {}
    for image in (labels, truth):
        for i, n in zip(*(values.tolist() for values in np.unique(image, return_counts=True))):
            sizes[i] = sizes.get(i, 0) + n
    common = dict(zip(*(values.tolist() for values in np.unique(labels[labels == truth], return_counts=True))))
    return {i: 2 * common.get(i, 0) / sizes[i] for i in sorted(sizes) if i != 0}


def volume_scores(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score a dense partition by the adapted Rand error and the variation of information (scikit-image).

    Only pixels that are foreground in the truth count, as in the challenges for neurons in electron microscopy; there
    the background of the prediction is one more object. So both scores do not see objects in the background.

    Args:
        labels: The prediction.
        truth: The ground truth.

    Returns:
        `ARE` (0 is best) with `ARE precision` and `ARE recall` (1 is best); `VOI split` and `VOI merge` in bits (0 is
        best): how much is split too far, and how much is merged wrongly. All are NaN if the truth has no objects but
        the prediction has.

    Raises:
        UnfitInputsError, InvalidInputError, InvalidTypeError: See `check_pair`.

    References:
        Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142; Meila 2007, doi:10.1016/j.jmva.2006.11.013.
    """
    from skimage.metrics import adapted_rand_error, variation_of_information

    labels, truth = check_pair(labels, truth)
    inside = truth != 0
    if not inside.any():
        # Without any true object nothing is split or merged, and there is nothing to compare with.
        best = 0.0 if not labels.any() else np.nan
        return {"ARE": best, "ARE precision": 1 - best, "ARE recall": 1 - best, "VOI split": best, "VOI merge": best}
    # scikit-image makes tables up to the largest id.
    labels, truth = (np.unique(image[inside], return_inverse=True)[1] + 1 for image in (labels, truth))
    error, precision, recall = adapted_rand_error(truth, labels, ignore_labels=())
    split, merge = variation_of_information(truth, labels)
    values = {
        "ARE": error, "ARE precision": precision, "ARE recall": recall, "VOI split": split, "VOI merge": merge,
    }
    # Rounding may leave -1e-16 for a perfect result.
    return {name: max(float(value), 0.0) for name, value in values.items()}
