"""What happened, said in a line in the panel; napari's own notifications are only for what must not be overlooked."""

import bisect
import html
import logging
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from napari.utils.notifications import show_error, show_info, show_warning
from qtpy.QtCore import QRect, Qt, Signal
from qtpy.QtWidgets import (
    QDialog,
    QDialogButtonBox,
    QHBoxLayout,
    QLabel,
    QSizePolicy,
    QTextBrowser,
    QVBoxLayout,
    QWidget,
)

from ..core.errors import MicroSamError
from ..core.settings import get_cache_directory
from .form import SPACING, button

logger = logging.getLogger(__name__)

COLOURS = {"info": "#80868f", "success": "#4caf50", "warning": "#ffb300", "error": "#e5484d"}
_NOTIFY = {"info": show_info, "success": show_info, "warning": show_warning, "error": show_error}
HISTORY = 20
LINES = 3  # of a message in the panel
_LOG_BYTES = 1_000_000


@dataclass(frozen=True)
class Notice:
    """A message: `level` is `info`, `success`, `warning` or `error`; `details` is for those who want to know more."""

    level: str
    text: str
    details: str = ""
    time: float = field(default_factory=time.time)


def log_file() -> Path:
    """Return the file with the tracebacks of unexpected errors; it need not exist."""
    return get_cache_directory() / "logs" / "annotator.log"


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error, with those of its causes."""
    return "".join(traceback.format_exception(error))


def log_error(error: BaseException) -> Path | None:
    """Append a traceback to the log; returns the file, or None if it cannot be written."""
    text = traceback_of(error)
    logger.error("%s", text)
    path = log_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        with open(path, "a", encoding="utf-8") as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")
    except OSError:
        logger.warning("%s cannot be written", path, exc_info=True)
        return None
    return path


def describe_error(error: BaseException) -> str:
    """Say what went wrong. The message of an expected error says what to do; others are written to the log.

    Args:
        error: What was raised.

    Returns:
        A sentence or two for the user.
    """
    if isinstance(error, MicroSamError):
        return str(error)
    path = log_error(error)
    where = "" if path is None else f" The details are in {path}."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"There is not enough memory. Use tiles, a smaller model, or another device.{where}"
    lines = str(error).strip().splitlines()
    return f"Unexpected error: {type(error).__name__}{f': {lines[0]}' if lines else ''}.{where}".replace("..", ".")


def notify(level: str, text: str) -> None:
    """Show a notification of napari, over everything else."""
    _NOTIFY[level](text)


class _Line(QLabel):
    """A few lines; what has no room in them ends with an ellipsis."""

    clicked = Signal()

    def __init__(self):
        super().__init__()
        self._full = ""
        self.setWordWrap(True)
        policy = QSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)

    def set_full_text(self, text: str) -> None:
        self._full = " ".join(text.split())
        self.setToolTip(f"<span>{html.escape(text)}</span>")  # rich text is wrapped
        self._elide()

    @property
    def is_elided(self) -> bool:
        return self.text() != self._full

    def _fits(self, text: str) -> bool:
        metrics, room = self.fontMetrics(), QRect(0, 0, max(self.width(), 1), 10_000)
        height = metrics.boundingRect(room, Qt.TextFlag.TextWordWrap, text).height()
        return height <= LINES * metrics.lineSpacing()

    def _elide(self) -> None:
        words = self._full.split(" ")
        n = bisect.bisect_left(range(1, len(words)), True, key=lambda k: not self._fits(" ".join(words[:k]) + " …"))
        self.setText(self._full if self._fits(self._full) else " ".join(words[:max(n, 1)]) + " …")

    def resizeEvent(self, event) -> None:
        super().resizeEvent(event)
        self._elide()


class NoticeLine(QWidget):
    """The last message, in a few lines; `Details` shows it in full and the ones before it."""

    shown = Signal(object)

    def __init__(self):
        super().__init__()
        self.history: deque[Notice] = deque(maxlen=HISTORY)
        self._dot, self.label = QLabel("●"), _Line()
        self.details = button("Details", tooltip="Show the last messages in full")
        self.details.clicked.connect(self.open_details)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(SPACING)
        layout.addWidget(self._dot)
        layout.addWidget(self.label, 1)
        layout.addWidget(self.details)
        self._dialog: QDialog | None = None
        self.clear()

    def show_notice(self, level: str, text: str, details: str = "", *, important: bool = False) -> Notice:
        """Show a message.

        Args:
            level: `info`, `success`, `warning` or `error`.
            text: The message.
            details: More, for the dialog.
            important: Whether napari shall also show it as a notification.
        """
        notice = Notice(level, text, details)
        self.history.append(notice)
        self._dot.setStyleSheet(f"color: {COLOURS[level]}")
        self._dot.show()
        self.label.set_full_text(text)
        self.details.show()
        if important:
            notify(level, text)
        self.shown.emit(notice)
        return notice

    def info(self, text: str, details: str = "") -> Notice:
        return self.show_notice("info", text, details)

    def success(self, text: str, details: str = "") -> Notice:
        return self.show_notice("success", text, details)

    def warning(self, text: str, details: str = "", *, important: bool = False) -> Notice:
        return self.show_notice("warning", text, details, important=important)

    def show_error(self, error: BaseException) -> Notice:
        """Show an error. An unexpected one also becomes a notification of napari and is logged."""
        is_expected = isinstance(error, MicroSamError)
        details = "" if is_expected else traceback_of(error)
        return self.show_notice("error", describe_error(error), details, important=not is_expected)

    def clear(self) -> None:
        """Show no message; the history stays."""
        self.label.set_full_text("")
        self._dot.hide()
        self.details.setVisible(bool(self.history))

    def as_html(self) -> str:
        """Return the last messages, the newest first."""
        parts = []
        for notice in reversed(self.history):
            clock = time.strftime("%H:%M:%S", time.localtime(notice.time))
            details = f"<pre style='white-space: pre-wrap'>{html.escape(notice.details)}</pre>"
            parts.append(
                f"<p><b style='color:{COLOURS[notice.level]}'>{notice.level}</b> {clock}<br>"
                f"{html.escape(notice.text)}</p>{details if notice.details else ''}"
            )
        return "".join(parts)

    def open_details(self) -> QDialog:
        """Open a window with the last messages; it does not block."""
        dialog = QDialog(self)
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.setWindowTitle("Messages")
        dialog.resize(640, 360)
        text = QTextBrowser()
        text.setHtml(self.as_html())
        buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Close)
        buttons.rejected.connect(dialog.close)
        layout = QVBoxLayout(dialog)
        layout.addWidget(text)
        layout.addWidget(buttons)
        dialog.show()
        return dialog
