"""Parts of forms that look and behave alike in all panels."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qtpy.QtCore import QEvent, QObject, QSignalBlocker, Qt, QTimer, Signal
from qtpy.QtGui import QIcon
from qtpy.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QGroupBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QSpinBox,
    QWidget,
)
from superqt import QCollapsible

SPACING = 6
QUIET = "#80868f"  # can be read on light and dark
ACCENT = "#2f6fde"
_SPIN_WIDTH = 62


def delayed(owner: QObject, milliseconds: int, do: Callable[[], Any]) -> QTimer:
    """A timer that does something once, some time after its last start, unless its owner has ended before."""
    timer = QTimer(owner)
    timer.setSingleShot(True)
    timer.setInterval(milliseconds)
    timer.timeout.connect(do)
    return timer


class _WheelGuard(QObject):
    """Keeps the mouse wheel from changing a value while the user scrolls the panel."""

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Wheel and not watched.hasFocus():
            event.ignore()
            return True
        return False


def _calm(widget: QWidget) -> QWidget:
    widget.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
    widget.installEventFilter(_WheelGuard(widget))
    return widget


class NumberSpin(QDoubleSpinBox):
    """A number with as many decimals as it needs: 0.5, 0.025, 0.0025."""

    def textFromValue(self, value: float) -> str:
        text = super().textFromValue(value)
        point = self.locale().decimalPoint()
        if point not in text:
            return text
        whole, decimals = text.split(point)
        return f"{whole}{point}{decimals.rstrip('0').ljust(1, '0')}"


def number(
    value: float,
    minimum: float = 0.0,
    maximum: float = 1.0,
    *,
    step: float = 0.01,
    decimals: int = 4,
    tooltip: str | None = None,
) -> NumberSpin:
    """Make a field for a number."""
    spin = NumberSpin()
    spin.setDecimals(decimals)
    spin.setRange(minimum, maximum)
    spin.setSingleStep(step)
    spin.setValue(value)
    spin.setToolTip(tooltip or "")
    return _calm(spin)


def integer(
    value: int,
    minimum: int = 0,
    maximum: int = 10000,
    *,
    step: int = 1,
    suffix: str = "",
    special: str | None = None,
    tooltip: str | None = None,
) -> QSpinBox:
    """Make a field for an integer; `special` is shown instead of the minimum."""
    spin = QSpinBox()
    spin.setRange(minimum, maximum)
    spin.setSingleStep(step)
    spin.setSuffix(suffix)
    spin.setSpecialValueText(special or "")
    spin.setValue(value)
    spin.setToolTip(tooltip or "")
    return _calm(spin)


def choice(
    options: Iterable[str | tuple[str, Any]] = (), value: Any = None, *, tooltip: str | None = None
) -> QComboBox:
    """Make a menu of texts, or of pairs of text and value; `value` is the one that is chosen."""
    combo = QComboBox()
    combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    combo.setMinimumContentsLength(10)
    combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
    set_options(combo, options, value)
    combo.setToolTip(tooltip or "")
    return _calm(combo)


def set_options(combo: QComboBox, options: Iterable[str | tuple[str, Any]], value: Any = None) -> None:
    """Replace the entries of a menu without signals, and choose the one with that value, else the first."""
    with QSignalBlocker(combo):
        combo.clear()
        for option in options:
            text, data = (option, option) if isinstance(option, str) else option
            combo.addItem(text, data)
        select(combo, value)


def select(combo: QComboBox, value: Any) -> bool:
    """Choose the entry of a menu with that value; returns whether there is one, else the first is chosen."""
    # Not with findData, which compares what Qt makes of the values.
    found = next((i for i in range(combo.count()) if combo.itemData(i) == value), -1)
    combo.setCurrentIndex(max(found, 0))
    return found >= 0


def button(text: str, *, tooltip: str | None = None) -> QPushButton:
    """Make a button. A click leaves the keyboard to the canvas, so that keys go on working."""
    widget = QPushButton(text)
    widget.setFocusPolicy(Qt.FocusPolicy.TabFocus)
    widget.setToolTip(tooltip or "")
    return widget


def accent(widget: QPushButton, on: bool) -> None:
    """Show whether a button is the next one to press."""
    style = f"QPushButton:enabled {{ background-color: {ACCENT}; color: white; font-weight: bold; }}"
    restyle(widget, style if on else "")


def restyle(widget: QWidget, style: str) -> None:
    """Set a style sheet if it is another one: Qt lays out and paints anew even if it is not."""
    if widget.styleSheet() != style:
        widget.setStyleSheet(style)


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 object`, `3 objects`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class PathRow(QWidget):
    """A path that can be typed, dropped or chosen.

    Args:
        kind: `file`, `folder` or `save`: what is asked for.
        placeholder: Shown while there is no path.
        file_filter: What the file dialog offers.
    """

    changed = Signal()

    def __init__(self, kind: str, placeholder: str = "", *, file_filter: str = "", tooltip: str | None = None):
        super().__init__()
        assert kind in ("file", "folder", "save")
        self.kind, self._filter = kind, file_filter
        self.line = QLineEdit()
        self.line.setPlaceholderText(placeholder)
        self.line.setClearButtonEnabled(True)
        self._tooltip = tooltip or ""
        self.line.setToolTip(self._tooltip)
        self.line.textChanged.connect(self._show_tooltip)
        self.line.textChanged.connect(self.changed)
        self.browse = button("Browse…", tooltip="Choose a folder" if kind == "folder" else "Choose a file")
        self.browse.clicked.connect(self._browse)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(SPACING)
        row.addWidget(self.line, 1)
        row.addWidget(self.browse)

    @property
    def path(self) -> Path | None:
        """The path with `~` expanded; None if there is none."""
        text = self.line.text().strip()
        return Path(os.path.expanduser(text)) if text else None

    @path.setter
    def path(self, value: str | os.PathLike | None) -> None:
        self.line.setText("" if value is None else os.fspath(value))

    def _show_tooltip(self, text: str) -> None:
        """Paths are often longer than the field."""
        self.line.setToolTip("\n".join(part for part in (text, self._tooltip) if part))

    def changeEvent(self, event: QEvent) -> None:
        if event.type() == QEvent.Type.EnabledChange:
            self.line.setClearButtonEnabled(self.isEnabled())
        super().changeEvent(event)

    def _browse(self) -> None:
        start = str(self.path or "")
        if self.kind == "folder":
            chosen = QFileDialog.getExistingDirectory(self, "Choose a folder", start)
        elif self.kind == "file":
            chosen, _ = QFileDialog.getOpenFileName(self, "Choose a file", start, self._filter)
        else:
            chosen, _ = QFileDialog.getSaveFileName(self, "Save as", start, self._filter)
        if chosen:
            self.path = chosen


class PairRow(QWidget):
    """Two integers in the order (y, x), each with its letter."""

    changed = Signal()

    def __init__(self, value: Sequence[int], minimum: int = 0, maximum: int = 2048, **options: Any):
        super().__init__()
        self.spins = tuple(integer(v, minimum, maximum, **options) for v in value)
        for spin in self.spins:
            spin.setMinimumWidth(_SPIN_WIDTH)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(SPACING)
        for letter, spin in zip("YX", self.spins):
            label = QLabel(letter)
            label.setBuddy(spin)
            row.addWidget(label)
            row.addWidget(spin, 1)
            spin.valueChanged.connect(self.changed)

    @property
    def value(self) -> tuple[int, int]:
        return tuple(spin.value() for spin in self.spins)

    @value.setter
    def value(self, value: Sequence[int]) -> None:
        for spin, v in zip(self.spins, value, strict=True):
            spin.setValue(v)


def form() -> QFormLayout:
    """Make the layout of a form."""
    layout = QFormLayout()
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setHorizontalSpacing(10)
    layout.setVerticalSpacing(SPACING)
    layout.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    layout.setLabelAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
    return layout


def add_row(layout: QFormLayout, text: str, widget: QWidget) -> QWidget:
    """Add a field with its label to a form; the label gets the tooltip of the field."""
    label = QLabel(text)
    source = widget.line if isinstance(widget, PathRow) else widget
    label.setToolTip(source.toolTip())
    layout.addRow(label, widget)
    return widget


def group(title: str) -> tuple[QGroupBox, QFormLayout]:
    """Make a box with a title and a form in it."""
    box = QGroupBox(title)
    layout = form()
    layout.setContentsMargins(9, 9, 9, 9)
    box.setLayout(layout)
    return box, layout


class Section(QCollapsible):
    """A part of a panel that opens when its title is clicked; looks like a heading, not like a pressed button."""

    def __init__(self, title: str):
        # Empty icons: those of superqt are drawn before the colours of the theme are known.
        super().__init__(title, expandedIcon=QIcon(), collapsedIcon=QIcon())
        self._title = title
        self.setDuration(100)
        self.layout().setContentsMargins(0, 0, 0, 0)
        self.content().layout().setContentsMargins(0, 0, 0, 0)
        toggle = self.toggleButton()
        toggle.setFocusPolicy(Qt.FocusPolicy.TabFocus)
        toggle.setStyleSheet(
            "QPushButton { text-align: left; border: none; background: transparent; padding: 4px 2px; }"
            "QPushButton:hover { background: rgba(128, 128, 128, 60); }"
            "QPushButton:focus { border: 1px solid rgba(128, 128, 128, 160); }"
        )
        toggle.toggled.connect(self._show_title)
        self.toggled.connect(self._show_title)
        self._show_title()

    def _show_title(self, *_: Any) -> None:
        self.setText(f"{'▾' if self.isExpanded() else '▸'}  {self._title}")


def collapsible(title: str) -> tuple[Section, QFormLayout]:
    """Make a section with a form in it; it is closed at first."""
    section, content = Section(title), QWidget()
    layout = form()
    layout.setContentsMargins(12, 0, 0, 0)
    content.setLayout(layout)
    section.addWidget(content)
    return section, layout


def quiet(label: QLabel) -> QLabel:
    """Make a text less prominent."""
    label.setStyleSheet(f"color: {QUIET}")
    return label


def hint(text: str = "") -> QLabel:
    """Make a small text that explains; it is as wide as the panel."""
    label = quiet(QLabel(text))
    label.setWordWrap(True)
    policy = QSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
    policy.setHeightForWidth(True)
    label.setSizePolicy(policy)
    return label


def readable_size(megabytes: float) -> str:
    """Return a size such as `22 MB` or `1.3 GB`."""
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
