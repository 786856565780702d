"""The list of classes of the object classifier: colour, name, number of objects; a click chooses what to paint."""

from collections.abc import Callable, Sequence
from typing import Any

from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import QButtonGroup, QGridLayout, QLabel, QLineEdit, QPushButton, QToolButton, QVBoxLayout, QWidget

from ..annotation.classifier import ObjectClass
from .form import SPACING, button

_SWATCH = 20


class ClassList(QWidget):
    """Shows classes; `chosen` gives the id of the class to paint with, `renamed` an id and its new name.

    Args:
        color_of: Gives the colour of a class as `#rrggbb`.
    """

    chosen = Signal(int)
    renamed = Signal(int, str)
    added = Signal()

    def __init__(self, color_of: Callable[[int], str]):
        super().__init__()
        self._color_of = color_of
        self.names: dict[int, QLineEdit] = {}
        self.counts: dict[int, QLabel] = {}
        self.swatches: dict[int, QToolButton] = {}
        self._group = QButtonGroup(self)
        self._grid = QGridLayout()
        self._grid.setHorizontalSpacing(SPACING)
        self._grid.setVerticalSpacing(SPACING)
        self._grid.setColumnStretch(1, 1)
        self.add: QPushButton = button("Add Class", tooltip="Add a class, to paint with its label")
        self.add.clicked.connect(self.added)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(self._grid)
        layout.addWidget(self.add)

    def show_classes(self, classes: Sequence[ObjectClass], current: int) -> None:
        """Show classes, and which of them is painted with. A name that is being typed is left alone."""
        if list(self.names) != [c.id for c in classes]:
            self._rebuild([c.id for c in classes])
        for c in classes:
            line = self.names[c.id]
            if not line.hasFocus() and line.text() != c.name:
                with QSignalBlocker(line):
                    line.setText(c.name)
            elsewhere = f" + {c.n_earlier}" if c.n_earlier else ""
            predicted = f" → {c.n_predicted}" if c.n_predicted else ""
            self.counts[c.id].setText(f"{c.n_labelled}{elsewhere}{predicted}")
            self.counts[c.id].setToolTip(
                f"{c.n_labelled} objects annotated here, {c.n_earlier} in other images; {c.n_predicted} predicted here"
            )
        self.choose(current)

    def choose(self, class_id: int) -> None:
        """Mark a class as the one to paint with; none of them if it is not in the list."""
        self._group.setExclusive(False)
        for i, swatch in self.swatches.items():
            swatch.setChecked(i == class_id)
        self._group.setExclusive(True)

    def _rebuild(self, ids: Sequence[int]) -> None:
        while self._grid.count():
            self._grid.takeAt(0).widget().deleteLater()
        self.names, self.counts, self.swatches = {}, {}, {}
        for row, i in enumerate(ids):
            swatch, name, count = QToolButton(), QLineEdit(), QLabel()
            swatch.setCheckable(True)
            swatch.setFixedSize(_SWATCH, _SWATCH)
            swatch.setToolTip(f"Paint with this class (label {i})")
            swatch.setAccessibleName(f"Paint with class {i}")
            swatch.setStyleSheet(
                f"QToolButton {{ background: {self._color_of(i)}; border: 2px solid transparent; border-radius: 4px; }}"
                "QToolButton:checked { border-color: white; }"
            )
            name.setPlaceholderText(f"class {i}")
            name.setToolTip("The name of the class; it is saved with the classifier")
            count.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
            swatch.clicked.connect(lambda _, i=i: self.chosen.emit(i))
            name.editingFinished.connect(lambda i=i, line=name: self.renamed.emit(i, line.text()))
            self._group.addButton(swatch)
            for column, widget in enumerate((swatch, name, count)):
                self._grid.addWidget(widget, row, column)
            self.swatches[i], self.names[i], self.counts[i] = swatch, name, count


def css_color(rgba: Any) -> str:
    """Return a colour (red, green, blue[, alpha]) with values in 0…1 as `#rrggbb`."""
    return "#" + "".join(f"{round(float(value) * 255):02x}" for value in list(rgba)[:3])
