"""Models compared in napari: side by side what each of them made of the same prompts, and a table of the objects."""

from collections.abc import Sequence
from pathlib import Path

import napari
import numpy as np
from napari.utils import DirectLabelColormap
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QFormLayout,
    QHeaderView,
    QLabel,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from ..evaluation.comparison_figures import TRUTH, window_of
from ..evaluation.model_comparison import PROMPTS, ComparedObject, ComparedSample, read_sample

_PROMPT_NAMES = {"points": "a point", "box": "a box"}
_GAP = 0.06  # between the panels, of the width of the image
_WIDTH = 340


class _Number(QTableWidgetItem):
    """A cell that is sorted by its value."""

    def __init__(self, value: float):
        super().__init__(str(value) if isinstance(value, int) else f"{value:.2f}")
        self.value = value

    def __lt__(self, other: "_Number") -> bool:
        return self.value < other.value


class ComparisonView(QWidget):
    """The dock: which sample, which kind of prompt, and which object to look at.

    Args:
        viewer: The viewer; its layers are replaced.
        paths: The samples.
        prompt: `points` or `box`, what to show first.
    """

    def __init__(self, viewer: napari.Viewer, paths: Sequence[Path], prompt: str):
        super().__init__()
        self._viewer, self._paths = viewer, list(paths)
        self.sample: ComparedSample = read_sample(self._paths[0])
        self._samples, self._prompts = QComboBox(), QComboBox()
        self._samples.addItems([path.stem for path in self._paths])
        for name in PROMPTS:
            self._prompts.addItem(_PROMPT_NAMES[name], name)
        self._prompts.setCurrentIndex(PROMPTS.index(prompt))
        self.table = QTableWidget()
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.verticalHeader().hide()
        self.table.horizontalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Stretch)
        self.setMinimumWidth(_WIDTH)
        self._all = QPushButton("Show all objects")

        form, layout = QFormLayout(), QVBoxLayout(self)
        form.addRow("Image", self._samples)
        form.addRow("Segmented from", self._prompts)
        layout.addLayout(form)
        note = QLabel("IoU with the ground truth (yellow outlines). Choose a row to look at its object.")
        note.setWordWrap(True)
        layout.addWidget(note)
        layout.addWidget(self.table)
        layout.addWidget(self._all)
        self._samples.currentIndexChanged.connect(self._open)
        self._prompts.currentIndexChanged.connect(self._fill)
        self.table.itemSelectionChanged.connect(self._show)
        self._all.clicked.connect(self.table.clearSelection)
        self._open(0)

    @property
    def prompt(self) -> str:
        """`points` or `box`."""
        return self._prompts.currentData()

    @property
    def chosen(self) -> ComparedObject | None:
        """The object of the row that is selected."""
        rows = self.table.selectionModel().selectedRows()
        id_ = self.table.item(rows[0].row(), 0).value if rows else None
        return next((item for item in self.sample.objects if item.id == id_), None)

    def _open(self, index: int) -> None:
        self.sample = read_sample(self._paths[index])
        self._viewer.layers.clear()
        self._image = image = self.sample.image
        is_rgb = image.ndim == 3
        if is_rgb and image.dtype != np.uint8:
            self._image = image = np.clip(image, 0, 255).astype(np.uint8)
        empty = np.zeros(image.shape[:2], dtype=np.int32)
        one_colour = DirectLabelColormap(color_dict={None: TRUTH, 0: "transparent"})
        for name in self.sample.model_names:
            self._viewer.add_image(image, name=f"image ({name})", rgb=is_rgb)
            self._viewer.add_labels(empty, name=name, opacity=0.45)
            self._viewer.add_labels(empty, name=f"ground truth ({name})", colormap=one_colour).contour = 1
        text = {"string": "{name}", "size": 12, "color": "white", "anchor": "center"}
        names = {"name": self.sample.model_names}
        self._viewer.add_points(
            np.zeros((len(names["name"]), 2)), name="models", features=names, text=text, face_color="transparent",
            border_color="transparent",
        )
        self._viewer.add_points(
            np.zeros((0, 2)), name="points", size=9, face_color="white", border_color="black",
        )
        self._viewer.add_shapes(name="boxes", face_color="transparent", edge_color="white")
        self._fill()

    def _fill(self) -> None:
        """The table: objects by how much the first two models differ."""
        names, prompt = self.sample.model_names, self.prompt
        self.table.blockSignals(True)
        self.table.setSortingEnabled(False)
        self.table.clearContents()
        self.table.setColumnCount(2 + len(names))
        self.table.setHorizontalHeaderLabels(["object", *names, "lead"])
        self.table.setRowCount(len(self.sample.objects))
        for row, item in enumerate(self.sample.objects):
            ious = item.ious[prompt]
            for column, value in enumerate([item.id, *ious, ious[0] - ious[1]]):
                self.table.setItem(row, column, _Number(value))
        self.table.setSortingEnabled(True)
        self.table.sortItems(self.table.columnCount() - 1, Qt.SortOrder.DescendingOrder)
        self.table.clearSelection()
        self.table.blockSignals(False)
        self._show()

    def _show(self) -> None:
        """Show all objects, or the one that is chosen with its surroundings."""
        chosen = self.chosen
        items = self.sample.objects if chosen is None else [chosen]
        window = (slice(None), slice(None)) if chosen is None else window_of(chosen, self.prompt)
        shown = self._image[window]
        origin = np.array([s.start or 0 for s in window])
        shifts = [np.array([0, k * shown.shape[1] * (1 + _GAP)]) for k in range(len(self.sample.model_names))]
        truth = self._painted(items, [item.truth for item in items])[window]
        for k, (name, shift) in enumerate(zip(self.sample.model_names, shifts)):
            masks = self._painted(items, [item.masks[self.prompt][k] for item in items])[window]
            for layer, data in ((f"image ({name})", shown), (name, masks), (f"ground truth ({name})", truth)):
                self._viewer.layers[layer].data = data
                self._viewer.layers[layer].translate = shift
            if shown.ndim == 2:
                self._viewer.layers[f"image ({name})"].reset_contrast_limits()
        above = (-0.05 * shown.shape[0], shown.shape[1] / 2)
        self._viewer.layers["models"].data = np.array([shift + above for shift in shifts])
        self._show_prompts(items, [shift - origin for shift in shifts], max(shown.shape[:2]) / 60)
        self._all.setEnabled(chosen is not None)
        self._viewer.reset_view()

    def _painted(self, items: Sequence[ComparedObject], masks: Sequence[np.ndarray]) -> np.ndarray:
        """A label image with the ids of the objects; small ones on top."""
        labels = np.zeros(self._image.shape[:2], dtype=np.int32)
        for item, mask in sorted(zip(items, masks), key=lambda pair: -np.count_nonzero(pair[1])):
            labels[mask] = item.id
        return labels

    def _show_prompts(self, items: Sequence[ComparedObject], shifts: Sequence[np.ndarray], size: float) -> None:
        points = np.array([point + shift for shift in shifts for item in items for point in item.points])
        corners = np.array([(0, 1), (0, 3), (2, 3), (2, 1)])
        boxes = [np.array(item.box)[corners] - 0.5 + shift for shift in shifts for item in items]
        is_points = self.prompt == "points"
        layer = self._viewer.layers["points"]
        layer.data = points if is_points else np.zeros((0, 2))
        layer.size = size
        layer = self._viewer.layers["boxes"]
        layer.data = []
        if not is_points:
            layer.add_rectangles(boxes, edge_width=size / 6, edge_color="white", face_color="transparent")


def show_comparison(paths: Sequence[Path], prompt: str, viewer: napari.Viewer | None = None) -> ComparisonView:
    """Open samples in napari; without a viewer of the caller it returns when the window is closed.

    Args:
        paths: The samples, at least one.
        prompt: `points` or `box`, what to show first.
        viewer: A viewer that is open already.
    """
    window = viewer or napari.Viewer(title="Comparison of models")
    view = ComparisonView(window, paths, prompt)
    window.window.add_dock_widget(view, name="Comparison", area="right")
    window.reset_view()  # the dock took some of the room
    if viewer is None:
        napari.run()
    return view
