"""The one place that makes reports: tables (CSV, JSON, Markdown) and plots (PNG) out of scores per image."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._version import __version__
from ..core.errors import InvalidInputError, OutputExistsError
from ..core.output import temporary_path, write_json

IDENTIFIERS = ("model", "dataset", "modality", "mode", "prompt", "iteration", "image")
_GROUPS, _ALL = ("modality", "dataset"), "all"
TABLE_NAME, SUMMARY_NAME, CONTENT_NAME, TEXT_NAME = "results.csv", "summary.csv", "results.json", "report.md"
_CONFIDENCE = 0.95
_N_RESAMPLES = 2000


def write_report(
    table: pd.DataFrame,
    folder: str | os.PathLike,
    *,
    title: str = "Evaluation",
    plots: bool = True,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write scores as tables and plots to a folder; a report that was written there before is replaced.

    Written are `results.csv` (the table), `summary.csv` (see `summarise`), `results.json` (both, with the settings),
    `report.md`, and with `plots` the pictures `scores.png` (bars per modality and mode, with the single images) and
    `iterations.png` (curves over the iterations).

    Args:
        table: One row per image, or per image and iteration: columns out of `model`, `dataset` or `modality`, `mode`,
            `prompt`, `iteration` and `image` say of what, all other columns are scores. Missing values are NaN.
        folder: Where to write.
        title: The title.
        plots: Whether to draw.
        notes: Lines of text below the title: how the scores were made.
        settings: How they were made, for the JSON file; values must be fit for JSON.

    Returns:
        The path of `report.md`.

    Raises:
        InvalidInputError: If the table is empty, or has no score or a score that is no number.
        OutputExistsError: If the folder holds files of these names that are no report of ours.
        OutputWriteError: If it cannot be written.
    """
    table, scores = _check(table)
    folder = Path(folder).expanduser()
    check_report_folder(folder)
    summary = summarise(table)
    # First the file that says whose report this is, so that an interrupted one can be replaced.
    write_json(folder / CONTENT_NAME, {"micro_sam": {
        "version": __version__, "title": title, "notes": list(notes), "settings": dict(settings or {}),
        "summary": records(summary), "results": records(table),
    }})
    for name, content in ((TABLE_NAME, table), (SUMMARY_NAME, summary)):
        with temporary_path(folder / name, is_folder=False) as new:
            content.to_csv(new, index=False)
    pictures = []
    if plots:
        from .report_plots import draw_report
        pictures = draw_report(table, summary, scores, _group_column(table), folder)
    with temporary_path(folder / TEXT_NAME, is_folder=False) as new:
        new.write_text(_text(summary, title, notes, pictures), encoding="utf-8")
    return folder / TEXT_NAME


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Average scores over the images of each group, with intervals of confidence.

    A group has all identifying columns but the image in common. If there are several modalities (or datasets), rows
    `all` average over all of their images.

    Args:
        table: See `write_report`.

    Returns:
        One row per group: its identifying columns, `images` (their number), and for each score its mean, and as
        `<score> low` and `<score> high` the 95 % interval of confidence of the mean over images (percentile bootstrap,
        Efron 1979, doi:10.1214/aos/1176344552; NaN for a single image). Images without a score do not count.

    Raises:
        InvalidInputError: See `write_report`.
    """
    table, scores = _check(table)
    by = [name for name in IDENTIFIERS if name in table and name != "image"]
    group = _group_column(table)
    if group is not None and table[group].nunique() > 1:
        table = pd.concat([table, table.assign(**{group: _ALL})])
    groups = table.groupby(by, dropna=False, sort=False) if by else [((), table)]
    rows = []
    for key, part in groups:
        n_images = part["image"].nunique() if "image" in part else len(part)
        rows.append({**dict(zip(by, key)), "images": n_images, **_statistics(part[scores])})
    return pd.DataFrame(rows)


def _statistics(values: pd.DataFrame) -> dict[str, float]:
    """Mean and interval of each column. Columns that have values in the same rows are resampled together."""
    row = dict.fromkeys((f"{score}{suffix}" for score in values for suffix in ("", " low", " high")), np.nan)
    patterns: dict[tuple[bool, ...], list[str]] = {}
    for score in values:
        patterns.setdefault(tuple(values[score].notna()), []).append(score)
    for pattern, scores in patterns.items():
        data = values.loc[list(pattern), scores].to_numpy(dtype=float)
        if len(data):
            row |= dict(zip(scores, data.mean(axis=0)))
        if len(data) > 1:
            for suffix, ends in zip((" low", " high"), intervals(data)):
                row |= dict(zip((f"{score}{suffix}" for score in scores), ends))
    return row


def intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap intervals of confidence (95 %, percentiles) of the means of columns (N, K) with N > 1: low, high."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, axis=0, confidence_level=_CONFIDENCE, n_resamples=_N_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return found.low, found.high


def _group_column(table: pd.DataFrame) -> str | None:
    return next((name for name in _GROUPS if name in table), None)


def _check(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table with the identifying columns first, and the names of its scores."""
    identifiers = [name for name in IDENTIFIERS if name in table]
    scores = [name for name in table.columns if name not in identifiers]
    wrong = [name for name in scores if not pd.api.types.is_numeric_dtype(table[name])]
    if table.empty or not scores or wrong:
        problem = f"the columns {wrong} are no numbers" if wrong else "it has no rows" if scores else "it has no scores"
        raise InvalidInputError(
            f"The table cannot be reported: {problem}. Its columns are {list(table.columns)}; those that are no scores "
            f"are called {', '.join(IDENTIFIERS)}."
        )
    return table[[*identifiers, *scores]].reset_index(drop=True), scores


def check_report_folder(folder: str | os.PathLike) -> None:
    """Check that a report may be written to a folder, before any work is done.

    Raises:
        OutputExistsError: If it holds files that are called like those of a report, but are none.
    """
    folder = Path(folder).expanduser()
    if not any((folder / name).exists() for name in (TABLE_NAME, SUMMARY_NAME, CONTENT_NAME, TEXT_NAME)):
        return
    try:
        is_ours = "micro_sam" in json.loads((folder / CONTENT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise OutputExistsError(
            f"{folder} holds files that are called like those of a report, but are none. Choose another folder."
        )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries; missing values are None, as JSON has no NaN."""
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def _text(summary: pd.DataFrame, title: str, notes: Sequence[str], pictures: Sequence[str]) -> str:
    parts = [f"# {title}", "\n".join(f"- {note}" for note in notes), summary_text(summary)]
    parts.append(f"The intervals of all scores are in {SUMMARY_NAME}, single images in {TABLE_NAME}.")
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_text(summary: pd.DataFrame) -> str:
    """Tables in Markdown of what `summarise` returns; of iterations the first and the last one."""
    scores = [name for name in summary if f"{name} low" in summary]
    parts = []
    for heading, part in _parts(summary):
        shown = [score for score in scores if part[score].notna().any()]
        parts += [heading, _markdown(part, shown)] if shown else []
    parts.append("Means over images; in brackets the 95 % interval of confidence of the mean (bootstrap over images).")
    return "\n\n".join(part for part in parts if part)


def _parts(summary: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows without iterations; and of those with iterations the first and the last ones."""
    if "iteration" not in summary or summary["iteration"].isna().all():
        return [("", summary)]
    is_single = summary["iteration"].isna()
    iterated = summary[~is_single]
    ends = iterated[iterated["iteration"].isin([iterated["iteration"].min(), iterated["iteration"].max()])]
    parts = [("## First and last iteration", ends.astype({"iteration": int}))]
    return [("## Without iterations", summary[is_single]), *parts] if is_single.any() else parts


def _markdown(part: pd.DataFrame, scores: Sequence[str]) -> str:
    names = [name for name in (*IDENTIFIERS, "images") if name in part and part[name].notna().any()]
    lines = ["| " + " | ".join([*names, *scores]) + " |", "|" + "---|" * (len(names) + len(scores))]
    for _, row in part.iterrows():
        cells = [str(row[name]).replace("|", "\\|") if pd.notna(row[name]) else "" for name in names]
        cells += [_number(row[score]) for score in scores]
        if _number(row[f"{scores[0]} low"]):
            low, high = (_number(row[f"{scores[0]} {end}"]) for end in ("low", "high"))
            cells[len(names)] += f" ({low} to {high})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"
