"""Pictures of single objects that several models segmented; and how images and masks are shown in them."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import binary_dilation

from ..core.errors import InvalidInputError
from ..models.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .model_comparison import ComparedObject

# The colours can be told apart on grey images, and by people who do not see red or green.
TRUTH, SEGMENTATION, PROMPT, NEGATIVE = "#ffd400", "#22a7f0", "#ffffff", "#e4572e"
# Side in pixels to which small objects are enlarged, so that outlines stay thin.
_PANEL = 600
_MARGIN, _LEAST = 0.6, 24


def _enhance_image(im: np.ndarray, do_norm: bool = True) -> np.ndarray:
    """Make the structures of an image visible, also where it is dark.

    Args:
        im: Image (Y, X) or (Y, X, 3), of any numeric dtype.
        do_norm: Whether to stretch it from its minimum to its maximum first.

    Returns:
        A new image uint8 after adaptive histogram equalisation (CLAHE; Pizer et al. 1987,
        doi:10.1016/S0734-189X(87)80186-X).
    """
    from skimage.exposure import equalize_adapthist

    image = np.asarray(im)
    if image.ndim not in (2, 3):
        raise InvalidInputError(f"An image must have the shape (Y, X) or (Y, X, 3), but has {image.shape}.")
    dtype, image = image.dtype, image.astype(np.float64)
    if do_norm:
        image = image - image.min()
        image = image / max(image.max(), np.finfo(np.float64).tiny)
    elif dtype.kind in "ui" and dtype.itemsize <= 2:
        image = image / np.iinfo(dtype).max
    elif (largest := max(abs(image.min()), image.max())) > 1:
        image = image / max(largest, 255)  # the values are those of 8 bit, whatever the dtype is
    if image.min() == image.max():
        return np.full(image.shape, np.clip(255 * image.flat[0], 0, 255).round(), dtype=np.uint8)
    return (255 * equalize_adapthist(image)).round().astype(np.uint8)


def _to_rgb(im: np.ndarray) -> np.ndarray:
    """A copy as colours uint8; images that are not 8 bit are stretched."""
    from ..core.normalize import to_image

    image = np.asarray(im)
    return image.copy() if image.dtype == np.uint8 and image.ndim == 3 else to_image(image).copy()


def _rgb_of(color: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return 255 * np.array(to_rgb(color))


def _overlay_outline(im: np.ndarray, mask: np.ndarray, outline_dilation: int = 0, *, color: str = TRUTH) -> np.ndarray:
    """Draw the outlines of objects into an image.

    Args:
        im: Image (Y, X) or (Y, X, 3).
        mask: A mask or labels (Y, X).
        outline_dilation: By how many pixels the lines are widened to each side.
        color: The colour of the lines.

    Returns:
        A new image (Y, X, 3), uint8.
    """
    from skimage.segmentation import find_boundaries

    image, mask = _to_rgb(im), np.asarray(mask)
    lines = find_boundaries(mask.astype(np.uint8) if mask.dtype == bool else mask, mode="inner")
    if outline_dilation > 0:
        lines = binary_dilation(lines, iterations=outline_dilation)
    image[lines] = _rgb_of(color).round()
    return image


def _overlay_mask(im: np.ndarray, mask: np.ndarray, alpha: float = 0.4, *, color: str = SEGMENTATION) -> np.ndarray:
    """Tint the pixels of a mask.

    Args:
        im: Image (Y, X) or (Y, X, 3).
        mask: A mask or labels (Y, X); all but 0 is tinted.
        alpha: How opaque the tint is, from 0 to 1.
        color: The colour of the tint.

    Returns:
        A new image (Y, X, 3), uint8.
    """
    image, inside = _to_rgb(im), np.asarray(mask) != 0
    image[inside] = ((1 - alpha) * image[inside] + alpha * _rgb_of(color)).round()
    return image


def window_of(item: "ComparedObject", prompt: str) -> tuple[slice, slice]:
    """The part of the image to show, a square if it fits: the object, all masks of it, and some surroundings."""
    shape = item.truth.shape
    y0, x0, y1, x1 = item.box
    center, side = ((y0 + y1) / 2, (x0 + x1) / 2), max(y1 - y0, x1 - x0)
    for mask in item.masks[prompt]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            reach = max(abs(v - c) for found, c in zip((rows, columns), center) for v in found[[0, -1]])
            side = max(side, min(2 * reach, 4 * max(y1 - y0, x1 - x0)))
    side = int(max(side * (1 + _MARGIN), _LEAST))
    starts = [int(np.clip(round(c - side / 2), 0, max(n - side, 0))) for c, n in zip(center, shape)]
    return slice(starts[0], min(starts[0] + side, shape[0])), slice(starts[1], min(starts[1] + side, shape[1]))


def _draw_prompt(axis: Any, item: "ComparedObject", prompt: str, window: Sequence[slice], k: int, radius: int) -> None:
    from matplotlib.patches import Rectangle

    (top, left), edge = (s.start for s in window), "black"
    if prompt == "box":
        y0, x0, y1, x1 = (k * (v - o) - 0.5 for v, o in zip(item.box, (top, left, top, left)))
        for color, width, style in ((edge, 3.0, "-"), (PROMPT, 1.5, (0, (4, 3)))):
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=width, ls=style))
        return
    for positive, color in ((1, PROMPT), (0, NEGATIVE)):
        points = k * (item.points[item.point_labels == positive] + 0.5 - (top, left)) - 0.5
        axis.scatter(points[:, 1], points[:, 0], s=(2 * radius) ** 2, color=color, edgecolors=edge, linewidths=1.2)


def draw_object(
    figure: "Figure",
    image: np.ndarray,
    item: "ComparedObject",
    prompt: str,
    model_names: Sequence[str],
    *,
    point_radius: int = 4,
    outline_dilation: int = 0,
) -> None:
    """Draw one object: the image, and beside it what each model made of the prompt.

    Args:
        figure: An empty figure.
        image: Image (Y, X[, 3]).
        item: The object.
        prompt: `box` or `points`.
        model_names: The names of the models that are shown.
        point_radius: Radius of points, in points of the figure.
        outline_dilation: By how many pixels of the enlarged picture outlines are widened.
    """
    window = window_of(item, prompt)
    k = max(1, _PANEL // max(s.stop - s.start for s in window))

    def enlarged(array: np.ndarray) -> np.ndarray:
        return array[window].repeat(k, axis=0).repeat(k, axis=1)

    shown, truth = _to_rgb(enlarged(image)), enlarged(item.truth)
    axes = figure.subplots(1, 1 + len(model_names), squeeze=False)[0]
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(shown)
    axes[0].set_title(f"object {item.id}", fontsize=11)
    _draw_prompt(axes[0], item, prompt, window, k, point_radius)
    best = max(item.ious[prompt][:len(model_names)])
    for axis, mask, iou, name in zip(axes[1:], item.masks[prompt], item.ious[prompt], model_names):
        axis.imshow(_overlay_outline(_overlay_mask(shown, enlarged(mask)), truth, 1 + outline_dilation))
        axis.set_title(f"{name}\nIoU {iou:.2f}", fontsize=11, fontweight="bold" if iou == best else "normal")
    _add_legend(figure, prompt)


def _add_legend(figure: "Figure", prompt: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    style = {"ls": (0, (2, 1.5)), "lw": 2} if prompt == "box" else {"ls": "", "marker": "o", "mec": "black"}
    handles = [
        Line2D([], [], color="#999999" if prompt == "box" else PROMPT, label="prompt", **style),
        Line2D([], [], color=TRUTH, lw=2.5, label="ground truth"),
        Patch(color=SEGMENTATION, alpha=0.6, label="segmentation"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def figure_size(n_models: int) -> tuple[float, float]:
    """Size in inches of the picture of one object."""
    return 3.1 * (1 + n_models), 4.1


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure as SVG, completely or not at all."""
    with replacing(path) as new:
        figure.savefig(new, format="svg")
