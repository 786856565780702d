"""Pictures of a report: bars of the scores per modality and mode, and curves over the iterations. Needs no screen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.output import temporary_path

# Okabe and Ito 2008: told apart with any kind of colour vision.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
_MAX_BAR_PANELS = 3
_MAX_CURVE_PANELS = 12


def draw_report(
    table: pd.DataFrame, summary: pd.DataFrame, scores: Sequence[str], group: str | None, folder: Path
) -> list[str]:
    """Draw `scores.png` for rows without iteration, and `iterations.png` for those with it.

    Args:
        table: The scores per image, see `report.write_report`.
        summary: Their means, see `report.summarise`.
        scores: The names of the scores.
        group: The column with modalities or datasets; None if there is none.
        folder: Where to write the pictures.

    Returns:
        The names of the files.
    """
    table, summary = (
        part.assign(
            _group=part[group] if group else "all images",
            _iteration=part["iteration"] if "iteration" in part else np.nan,
        ) for part in (table, summary)
    )
    pictures = []
    for name, has_iterations, draw in (("scores", False, _bars), ("iterations", True, _curves)):
        dots, means = (part[part["_iteration"].notna() == has_iterations] for part in (table, summary))
        varying = _varying(means)
        dots, means = (part.assign(_series=_series(part, varying)) for part in (dots, means))
        shown = [score for score in scores if means[score].notna().any()]
        if shown:
            pictures.append(_save(draw(dots, means, shown), folder / f"{name}.png"))
    return pictures


def _varying(means: pd.DataFrame) -> list[str]:
    """The columns that tell apart what is compared within a group."""
    names = [name for name in ("model", "mode", "prompt") if name in means and means[name].nunique() > 1]
    return names or [name for name in ("prompt", "mode", "model") if name in means and means[name].notna().any()][:1]


def _series(part: pd.DataFrame, varying: Sequence[str]) -> list[str]:
    return [", ".join(str(v) for v in row if pd.notna(v)) or "mean" for row in part[varying].to_numpy()]


def _save(figure, path: Path) -> str:
    with temporary_path(path, is_folder=False) as new:
        figure.savefig(new, format="png", dpi=120)
    return path.name


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _names(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values))


def _bars(dots: pd.DataFrame, means: pd.DataFrame, scores: Sequence[str]):
    """A panel per score: bars of the means with their intervals of confidence, and a dot per image."""
    scores, groups, series = scores[:_MAX_BAR_PANELS], _names(means["_group"]), _names(means["_series"])
    width = 0.8 / len(series)
    figure = _figure(max(5.0, 1.5 + 0.45 * len(groups) * (len(series) + 1)), 3.2 * len(scores))
    axes = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
    for axis, score in zip(axes, scores):
        for n, name in enumerate(series):
            rows = means[means["_series"] == name].set_index("_group").reindex(groups)
            x = np.arange(len(groups)) + (n - (len(series) - 1) / 2) * width
            margins = np.abs(rows[[f"{score} low", f"{score} high"]].to_numpy().T - rows[score].to_numpy())
            axis.bar(x, rows[score], 0.92 * width, color=_color(n), alpha=0.75, label=name)
            axis.errorbar(x, rows[score], margins, fmt="none", color="black", capsize=3, linewidth=1)
            of_series = dots[dots["_series"] == name]
            for group, position in zip(groups, x):
                values = of_series.loc[of_series["_group"] == group, score].to_numpy()
                spread = np.linspace(-0.25, 0.25, len(values)) * width if len(values) > 1 else np.zeros(len(values))
                axis.plot(position + spread, values, ".", color="black", alpha=0.35, markersize=3)
        _finish(axis, dots[score], score)
    axes[-1].set_xticks(np.arange(len(groups)), groups, rotation=30 if len(groups) > 3 else 0)
    axes[0].set_title("means, 95 % intervals of the means, and single images", fontsize="small")
    _legend(figure, axes[0], len(series))
    return figure


def _curves(dots: pd.DataFrame, means: pd.DataFrame, scores: Sequence[str]):
    """Means over the iterations with their intervals of confidence: a row of panels per score, a column per group."""
    scores = [score for score in ("IoU", "mSA") if score in scores] or scores[:1]
    groups, series = _names(means["_group"]), _names(means["_series"])
    groups = [*groups[-1:], *groups[:-1]][:_MAX_CURVE_PANELS]  # the last one is that of all images
    figure = _figure(max(5.0, 3.2 * len(groups)), 3.0 * len(scores) + 0.5)
    axes = figure.subplots(len(scores), len(groups), squeeze=False, sharex=True, sharey="row")
    for row, score in zip(axes, scores):
        for axis, group in zip(row, groups):
            for n, name in enumerate(series):
                rows = means[(means["_series"] == name) & (means["_group"] == group)].sort_values("_iteration")
                x, low, high = (rows[column].to_numpy() for column in ("_iteration", f"{score} low", f"{score} high"))
                axis.plot(x, rows[score], "o-", color=_color(n), markersize=3, label=name)
                axis.fill_between(x, low, high, color=_color(n), alpha=0.12, linewidth=0)
            _finish(axis, dots[score], score if axis is row[0] else "")
    for axis, group in zip(axes[0], groups):
        n_images = int(means.loc[means["_group"] == group, "images"].max())
        axis.set_title(f"{group} ({n_images} image{'s' if n_images > 1 else ''})", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("corrections")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes[0, 0], len(series))
    return figure


def _color(n: int) -> str:
    return _COLORS[n % len(_COLORS)]


def _finish(axis, values: pd.Series, label: str) -> None:
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if values.min() >= 0 and values.max() <= 1:
        axis.set_ylim(0, 1.02)


def _legend(figure, axis, n_series: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(n_series, 4), fontsize="small", frameon=False)
