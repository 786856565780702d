"""The picture of an outcome: bars of the scores before and after, and examples. Needs no screen."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.normalize import to_image
from ..models.files import replacing

if TYPE_CHECKING:
    from .outcome import HeldOut, Outcome

_BEFORE, _AFTER, _TRUTH = "#d55e00", "#1f77b4", "#e6b800"
_LABELS = {"automatic": "automatic\n(mSA)", "point": "one point\n(IoU)", "box": "box\n(IoU)"}


def draw_outcome(outcome: "Outcome", held_out: Sequence["HeldOut"], path: str | os.PathLike) -> None:
    """Write a picture of the scores and, per example, the outlines of truth and of both models' objects.

    Args:
        outcome: The comparison.
        held_out: The images, in the order that they were scored in.
        path: The file (.png) to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    examples = list(zip(held_out, outcome.before.labels, outcome.after.labels))
    n_rows = max(len(examples), 1)
    figure = Figure(figsize=(12 if examples else 5, 3.4 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    bars, *rest = figure.subfigures(1, 2, width_ratios=(1, 2)) if examples else (figure,)
    _draw_bars(bars.subplots(), outcome)
    if examples:
        axes = rest[0].subplots(n_rows, 3, squeeze=False)
        for row, (image, before, after) in zip(axes, examples):
            for axis, labels, color in zip(row, (image.labels, before, after), (_TRUTH, _BEFORE, _AFTER)):
                axis.imshow(_outlined(image.image, labels, color))
                axis.set_axis_off()
        for axis, title in zip(axes[0], ("labels", "before", "after")):
            axis.set_title(title)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=100)


def _draw_bars(axis, outcome: "Outcome") -> None:
    tasks = list(outcome.changes())
    positions = np.arange(len(tasks))
    both = ((-0.2, outcome.before, _BEFORE, "before"), (0.2, outcome.after, _AFTER, "after"))
    for offset, scores, color, name in both:
        values = [scores.mean(task) for task in tasks]
        axis.bar_label(axis.bar(positions + offset, values, 0.38, color=color, label=name), fmt="%.2f")
        for position, task in zip(positions, tasks):
            points = [value for value in scores.tasks[task] if value is not None]
            axis.plot([position + offset] * len(points), points, ".", color="black", alpha=0.4, markersize=4)
    axis.set_xticks(positions, [_LABELS[task] for task in tasks])
    axis.set_ylim(0, 1.08)
    axis.set_ylabel("score on held-out images (dots: single images)")
    axis.set_title(f"finetuning: {outcome.verdict}")
    axis.legend(loc="upper left", fontsize="small")


def _outlined(image: np.ndarray, labels: np.ndarray, color: str) -> np.ndarray:
    from matplotlib.colors import to_rgb
    from skimage.segmentation import mark_boundaries

    return mark_boundaries(to_image(image), np.asarray(labels).astype("int64"), color=to_rgb(color), mode="inner")
