"""The list of classes of the object classifier: colour, name, number of objects; a click chooses what to paint."""

from collections.abc import Sequence

from napari.utils.colormaps import DirectLabelColormap
from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import QButtonGroup, QGridLayout, QLabel, QLineEdit, QPushButton, QToolButton, QVBoxLayout, QWidget

from ..annotation.classifier import ObjectClass
from .form import SPACING, button

_SWATCH = 20
# Colours that also people with colour-blindness tell apart (Okabe and Ito 2008), and some more.
_COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#b3de69", "#bc80bd", "#fb8072")
_N_COLORED = 256
_RIGHT = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter


def class_color(class_id: int) -> str:
    """The colour of a class, as `#rrggbb`."""
    return _COLORS[(class_id - 1) % len(_COLORS)]


def class_colormap() -> DirectLabelColormap:
    """The colours of classes for a layer of labels."""
    colors = {i: class_color(i) for i in range(1, _N_COLORED)}
    return DirectLabelColormap(color_dict={None: "#999999", 0: "transparent", **colors})


class ClassList(QWidget):
    """Shows classes; `chosen` gives the id of the class to paint with, `renamed` an id and its new name."""

    chosen = Signal(int)
    renamed = Signal(int, str)
    added = Signal()

    def __init__(self):
        super().__init__()
        self.names: dict[int, QLineEdit] = {}
        self.counts: dict[int, tuple[QLabel, QLabel]] = {}
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
            painted, found = self.counts[c.id]
            painted.setText(f"{c.n_labelled} + {c.n_earlier}" if c.n_earlier else str(c.n_labelled))
            painted.setToolTip(f"{c.n_labelled} objects are painted on here, and {c.n_earlier} in other images")
            found.setText(str(c.n_predicted) if c.n_predicted else "–")
            found.setToolTip(f"{c.n_predicted} objects were classified as this here")
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
        for column, text in ((1, "class"), (2, "painted"), (3, "predicted")):
            head = QLabel(text)
            head.setEnabled(False)
            self._grid.addWidget(head, 0, column, Qt.AlignmentFlag.AlignLeft if column == 1 else _RIGHT)
        for row, i in enumerate(ids, 1):
            swatch, name, painted, found = QToolButton(), QLineEdit(), QLabel(), QLabel()
            swatch.setCheckable(True)
            swatch.setFixedSize(_SWATCH, _SWATCH)
            swatch.setToolTip(f"Paint with this class (label {i})")
            swatch.setAccessibleName(f"Paint with class {i}")
            swatch.setStyleSheet(
                f"QToolButton {{ background: {class_color(i)}; border: 2px solid transparent; border-radius: 4px; }}"
                "QToolButton:checked { border-color: white; }"
            )
            name.setPlaceholderText(f"class {i}")
            name.setToolTip("The name of the class; it is saved with the classifier")
            swatch.clicked.connect(lambda _, i=i: self.chosen.emit(i))
            name.editingFinished.connect(lambda i=i, line=name: self.renamed.emit(i, line.text()))
            self._group.addButton(swatch)
            self._grid.addWidget(swatch, row, 0)
            self._grid.addWidget(name, row, 1)
            for column, label in enumerate((painted, found), 2):
                self._grid.addWidget(label, row, column, _RIGHT)
            self.swatches[i], self.names[i], self.counts[i] = swatch, name, (painted, found)
