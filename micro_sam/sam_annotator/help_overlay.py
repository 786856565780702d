"""The list of keys, shown over the canvas."""

import html
from typing import Any

from qtpy.QtCore import QEvent, QObject, Qt
from qtpy.QtWidgets import QFrame, QLabel, QPushButton, QVBoxLayout, QWidget

from .form import button
from .keys import describe_keys

_MARGIN = 12
_STYLE = """
#micro_sam_help { background: rgba(30, 33, 39, 235); border: 1px solid rgba(255, 255, 255, 60); border-radius: 6px; }
#micro_sam_help QLabel { background: transparent; color: #f0f1f2; }
"""


def keys_as_html(mode: str, *, series: bool = False) -> str:
    """Return the keys of a mode as a table."""
    rows = "".join(
        f"<tr><td style='padding: 2px 16px 2px 0; font-weight: bold'>{html.escape(key)}</td>"
        f"<td style='padding: 2px 0'>{html.escape(text)}</td></tr>"
        for key, text in describe_keys(mode, series=series)
    )
    return f"<table cellspacing='0'>{rows}</table>"


class HelpOverlay(QFrame):
    """The keys of a mode in the upper right corner of another widget; a click hides it.

    Args:
        parent: The widget to lie over: see `canvas_of`.
        mode: `2d`, `3d` or `tracking`.
        series: Whether there is a series of images.
    """

    def __init__(self, parent: QWidget, mode: str, *, series: bool = False):
        super().__init__(parent)
        self.setObjectName("micro_sam_help")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.setStyleSheet(_STYLE)
        self.label = QLabel()
        self.label.setTextFormat(Qt.TextFormat.RichText)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(14, 10, 14, 10)
        layout.addWidget(self.label)
        self.set_mode(mode, series=series)
        parent.installEventFilter(self)
        self.hide()

    def set_mode(self, mode: str, *, series: bool = False) -> None:
        """Show the keys of another mode."""
        self.label.setText(f"<b>Keys</b>{keys_as_html(mode, series=series)}")
        self._place()

    def toggle(self) -> None:
        """Show or hide the list."""
        self.setVisible(self.isHidden())
        if not self.isHidden():
            self._place()
            self.raise_()

    def _place(self) -> None:
        """Lie in the corner; on a narrow canvas the lines are wrapped."""
        room = self.parentWidget().width() - 2 * _MARGIN
        self.label.setWordWrap(False)
        size = self.sizeHint()
        if size.width() > room > 0:
            self.label.setWordWrap(True)
            size.setWidth(room)
            size.setHeight(self.layout().totalHeightForWidth(room))
        self.resize(size)
        self.move(max(self.parentWidget().width() - size.width() - _MARGIN, 0), _MARGIN)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Resize:
            self._place()
        return False

    def mousePressEvent(self, event: Any) -> None:
        self.hide()


def canvas_of(viewer: Any) -> QWidget:
    """Return the widget in the middle of the window of a napari viewer."""
    return viewer.window._qt_window.centralWidget()


def help_button(overlay: HelpOverlay) -> QPushButton:
    """Make the button that shows and hides the keys."""
    widget = button("?", tooltip="Show or hide the keys [H]")
    widget.setAccessibleName("Keys")
    widget.setFixedWidth(28)
    widget.clicked.connect(overlay.toggle)
    return widget
