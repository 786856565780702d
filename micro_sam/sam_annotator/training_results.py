"""What the finetuning panel shows: the report on the data, and scores before and after."""

import dataclasses
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Qt, QUrl
from qtpy.QtGui import QDesktopServices, QImage, QPixmap
from qtpy.QtWidgets import QLabel, QSizePolicy, QVBoxLayout, QWidget

from .notices import COLOURS

if TYPE_CHECKING:
    from ..training.preflight_report import PreflightReport

_VERDICTS = {"better": ("success", "Better than before"), "same": ("info", "Like before"),
             "worse": ("error", "Worse than before")}
_MAX_MESSAGES = 8


def _coloured(level: str, text: str) -> str:
    return f"<b style='color:{COLOURS[level]}'>{html.escape(text)}</b>"


def report_html(report: "PreflightReport", description: str) -> str:
    """The report on training data as text with colours: what was found, what is wrong, what the training costs."""
    facts = dataclasses.replace(report, problems=(), warnings=()).summary().splitlines()
    facts = [line for line in facts if line != "No problems were found."]
    level, title = ("success", "The data are fine.") if report.ok else ("error", "The data have problems.")
    if report.ok and report.warnings:
        level, title = "warning", "The data can be used, but look at the warnings."
    parts = [_coloured(level, title), html.escape(description), *(html.escape(line) for line in facts)]
    text = "".join(f"<p style='margin:2px 0'>{part}</p>" for part in parts)
    for level, messages in (("error", report.problems), ("warning", report.warnings)):
        more = [f"… and {len(messages) - _MAX_MESSAGES} more"] if len(messages) > _MAX_MESSAGES else []
        for message in (*messages[:_MAX_MESSAGES], *more):
            text += f"<p style='margin:2px 0'>{_coloured(level, '●')} {html.escape(message)}</p>"
    return text


def outcome_html(report: dict[str, Any]) -> str:
    """The scores before and after as a table."""
    from ..training.outcome import TASKS

    level, title = _VERDICTS[report["verdict"]]
    rows = "".join(
        f"<tr><td>{html.escape(TASKS[task])}</td><td align='right'>{found['before']:.3f}</td>"
        f"<td align='right'>{found['after']:.3f}</td><td align='right'>{_change(found)}</td></tr>"
        for task, found in report["tasks"].items()
    )
    count = len(report["held_out"])
    return (
        f"<p>{_coloured(level, title)}, on {count} held-out image{'s' if count > 1 else ''}.</p>"
        "<table cellspacing='0' cellpadding='3' width='100%'><tr><td></td><td align='right'>before</td>"
        f"<td align='right'>after</td><td align='right'>change</td></tr>{rows}</table>"
    )


def _change(found: dict[str, Any]) -> str:
    from ..training.outcome import TOLERANCE

    change = found["after"] - found["before"]
    level = "info" if abs(change) < TOLERANCE else "success" if change > 0 else "error"
    return _coloured(level, f"{round(change, 3) + 0.0:+.3f}")


class RichText(QLabel):
    """A text with colours that is as wide as the panel, and can be copied."""

    def __init__(self):
        super().__init__()
        self.setTextFormat(Qt.TextFormat.RichText)
        self.setWordWrap(True)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.hide()

    def show_html(self, text: str) -> None:
        self.setText(text)
        self.setVisible(bool(text))


class Picture(QLabel):
    """A picture as wide as the panel; a click opens it in the program of the system."""

    def __init__(self):
        super().__init__()
        self.path: Path | None = None
        self._pixmap, self._fitted = QPixmap(), 0
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setToolTip("Click to open the picture in full size")
        self.hide()

    def show_image(self, image: QImage, path: Path | None) -> None:
        """Show an image that was read from a file; an empty one hides the picture."""
        self.path, self._pixmap, self._fitted = path, QPixmap.fromImage(image), 0
        self.setVisible(not image.isNull())
        self._fit()

    def _fit(self) -> None:
        width = max(self.width(), 100)
        if not self._pixmap.isNull() and width != self._fitted:
            self._fitted = width
            self.setPixmap(self._pixmap.scaledToWidth(width, Qt.TransformationMode.SmoothTransformation))
            self.setFixedHeight(round(width * self._pixmap.height() / self._pixmap.width()))

    def resizeEvent(self, event) -> None:
        super().resizeEvent(event)
        self._fit()

    def mousePressEvent(self, event) -> None:
        if self.path is not None:
            QDesktopServices.openUrl(QUrl.fromLocalFile(str(self.path)))


class ResultBox(QWidget):
    """Scores and picture of a finetuning that has ended."""

    def __init__(self):
        super().__init__()
        self.text, self.note, self.picture = RichText(), RichText(), Picture()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for widget in (self.text, self.picture, self.note):
            layout.addWidget(widget)

    def show_outcome(self, report: dict[str, Any], image: QImage, path: Path, note: str) -> None:
        self.text.show_html(outcome_html(report))
        self.picture.show_image(image, path)
        self.note.show_html(html.escape(note))

    def clear(self) -> None:
        self.text.show_html("")
        self.note.show_html("")
        self.picture.show_image(QImage(), None)
