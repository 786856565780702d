"""The list of committed objects: confidence and measurements, linked with the viewer both ways; edits of objects."""

from typing import Any

import numpy as np
import pandas as pd
from qtpy.QtCore import QAbstractTableModel, QModelIndex, QSortFilterProxyModel, Qt
from qtpy.QtWidgets import QAbstractItemView, QFileDialog, QGridLayout, QTableView

from ..annotation import review
from ..annotation.session import COMMITTED
from ..measurements import write_table
from . import form as forms
from .navigation import go_to
from .panels import Panel
from .tooltips import get_tooltip

REFRESH_MS = 150
_NUMBER = Qt.ItemDataRole.UserRole


class TableModel(QAbstractTableModel):
    """Shows a data frame; sorting takes the numbers themselves."""

    def __init__(self):
        super().__init__()
        self.table = pd.DataFrame({"id": [], "size": [], "confidence": []})

    def set_table(self, table: pd.DataFrame) -> None:
        self.beginResetModel()
        self.table = table
        self.endResetModel()

    def rowCount(self, parent: QModelIndex = QModelIndex()) -> int:  # noqa: B008 - Qt's signature
        return len(self.table)

    def columnCount(self, parent: QModelIndex = QModelIndex()) -> int:  # noqa: B008 - Qt's signature
        return len(self.table.columns)

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        if role not in (Qt.ItemDataRole.DisplayRole, _NUMBER):
            return None
        value = self.table.iat[index.row(), index.column()]
        if role == _NUMBER:
            return float("inf") if pd.isna(value) else value.item() if hasattr(value, "item") else value
        if pd.isna(value):
            return "–"
        if self.table.columns[index.column()] == "confidence":
            return f"{value:.2f}"
        return f"{value:.3g}" if isinstance(value, float | np.floating) and value != int(value) else f"{value:.0f}" \
            if isinstance(value, float | np.floating) else str(value)

    def headerData(self, section: int, orientation: Any, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role == Qt.ItemDataRole.DisplayRole and orientation == Qt.Orientation.Horizontal:
            return str(self.table.columns[section])
        if role == Qt.ItemDataRole.ToolTipRole and orientation == Qt.Orientation.Horizontal:
            return get_tooltip("objects", str(self.table.columns[section]))
        return None


class ObjectsPanel(Panel):
    """Committed objects as a table; a selected row shows the object, and an object picked in the viewer selects it."""

    kind = "objects"

    def __init__(self, annotator: Any):
        super().__init__("Objects")
        self.annotator = annotator
        self.model, self.sorted = TableModel(), QSortFilterProxyModel()
        self.sorted.setSourceModel(self.model)
        self.sorted.setSortRole(_NUMBER)
        self.view = QTableView()
        self.view.setModel(self.sorted)
        self.view.setSortingEnabled(True)
        self.view.sortByColumn(0, Qt.SortOrder.AscendingOrder)
        self.view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.view.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.view.verticalHeader().hide()
        self.view.horizontalHeader().setStretchLastSection(True)
        self.view.setMinimumHeight(140)
        self.view.selectionModel().selectionChanged.connect(self._row_selected)
        self.body.addWidget(self.view)
        grid = QGridLayout()
        for k, (text, name, slot) in enumerate((
            ("Next Worst", "next_worst", self.next_worst), ("Correct", "correct", self.correct),
            ("Delete", "delete", self.delete), ("Merge", "merge", self.merge),
            ("Measure", "measure", self.measure), ("Export Table…", "export", self.export),
        )):
            button = forms.button(text, tooltip=get_tooltip(self.kind, name))
            button.clicked.connect(slot)
            grid.addWidget(button, k // 2, k % 2)
        self.body.addLayout(grid)
        self._measured: pd.DataFrame | None = None
        self._seen: set[int] = set()
        self._busy = False
        self._watched: Any = None
        self._timer = forms.delayed(self, REFRESH_MS, self.refresh)

    @property
    def selected(self) -> list[int]:
        """The ids of the selected rows, in their order."""
        rows = sorted({index.row() for index in self.view.selectionModel().selectedRows()})
        return [int(self.sorted.data(self.sorted.index(row, 0), _NUMBER)) for row in rows]

    def refresh_later(self, layer: str = COMMITTED, box: Any = None) -> None:
        """Refresh soon, once for many changes."""
        if layer == COMMITTED:
            self._timer.start()

    def refresh(self) -> None:
        """Show the committed objects as they are now."""
        session, selected = self.annotator.session, self.selected
        if session is None:
            return
        self._watch_picks()
        scores, objects = session.scores(), session.objects
        ids = objects.ids
        table = pd.DataFrame({
            "id": np.array(ids, dtype=np.int64), "size": np.array([objects.area(i) for i in ids], dtype=np.int64),
            "confidence": np.array([_confidence(scores.get(i)) for i in ids], dtype=float),
        })
        if self._measured is not None:
            table = table.merge(self._measured, on="id", how="left")
        self._busy = True
        self.model.set_table(table)
        self._busy = False
        self.select(selected)

    def select(self, ids: list[int]) -> None:
        """Select the rows of some objects."""
        self._busy = True
        self.view.clearSelection()
        wanted = set(ids)
        for row in range(self.sorted.rowCount()):
            if self.sorted.data(self.sorted.index(row, 0), _NUMBER) in wanted:
                self.view.selectRow(row)
                self.view.scrollTo(self.sorted.index(row, 0))
        self._busy = False

    def show(self, object_id: int) -> None:
        """Move the viewer to an object and select its id in the layer."""
        annotator, objects = self.annotator, self.annotator.session.objects
        planes = objects.planes(object_id)
        plane = None if annotator.mode == "2d" else planes[len(planes) // 2]
        go_to(annotator, plane, np.argwhere(objects.mask(object_id, plane)).mean(axis=0))
        annotator.views[COMMITTED].selected_label = object_id

    def next_worst(self) -> None:
        """Go to the object with the lowest confidence among those not looked at yet."""
        session = self.annotator.session
        if session is None or not session.objects.ids:
            return
        if set(session.objects.ids) - set(session.scores()) and session.embeddings is not None:
            self.annotator.score(lambda _: self._go_to_worst())
        else:
            self._go_to_worst()

    def _go_to_worst(self) -> None:
        session = self.annotator.session
        scores = {i: review.Score(*s) for i, s in session.scores().items()}
        ranked = review.rank(scores, session.objects.ids)
        left = [i for i in ranked if i not in self._seen]
        if not left:
            self._seen.clear()
            left = ranked
        self._seen.add(left[0])
        self.select([left[0]])
        self.show(left[0])

    def correct(self) -> None:
        """Begin to correct the selected object."""
        ids = self.selected
        if len(ids) != 1:
            self.annotator.notices.warning("Select one object in the table to correct it.")
            return
        self.show(ids[0])
        self.annotator.attempt(self._start_correction, ids[0])

    def _start_correction(self, object_id: int) -> None:
        self.annotator.session.start_correction(object_id)
        self.annotator.notices.info(f"Correcting object {object_id}: give prompts or paint it; Commit replaces it.")

    def delete(self) -> None:
        for object_id in self.selected:
            self.annotator.attempt(lambda i=object_id: self.annotator.session.edit("remove", i))

    def merge(self) -> None:
        overlap = {"overlap": True} if self.annotator.mode == "tracking" else {}
        self.annotator.attempt(lambda: self.annotator.session.edit("merge", self.selected, **overlap))

    def measure(self) -> None:
        """Measure all objects in the background."""
        def done(table: pd.DataFrame) -> None:
            if table["id"].duplicated().any():  # tracks: the mean over their frames
                table = table.groupby("id").mean(numeric_only=True).reset_index()
            self._measured = table.drop(columns=["size", "n_pixels", "confidence"], errors="ignore")
            self.refresh()

        self.annotator.measure(done)

    def export(self) -> None:
        """Ask for a file and write the table to it."""
        path, _ = QFileDialog.getSaveFileName(self, "Export table", "objects.csv", "Tables (*.csv *.parquet *.xlsx)")
        if path:
            self.annotator.attempt(lambda: write_table(self.model.table, path, overwrite=True))

    def _watch_picks(self) -> None:
        """Follow the picker of the layer, also of one that replaces a deleted one."""
        layer = self.annotator.views[COMMITTED]
        if layer is not self._watched:
            layer.events.selected_label.connect(self._picked)
            self._watched = layer

    def _picked(self, event: Any) -> None:
        """An object was picked in the viewer."""
        if not self._busy and self._watched is self.annotator.views[COMMITTED]:
            self.select([self._watched.selected_label])

    def _row_selected(self, *_: Any) -> None:
        if self._busy:
            return
        ids = self.selected
        if len(ids) == 1:
            self._busy = True
            try:
                self.show(ids[0])
            finally:
                self._busy = False


def _confidence(score: tuple[float | None, float | None] | None) -> float:
    confidence = None if score is None else review.Score(*score).confidence
    return float("nan") if confidence is None else confidence
