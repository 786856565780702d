"""The committed tracks as a tree of mothers and daughters, linked with the viewer both ways; edits, import, export."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import QSignalBlocker, Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QGridLayout,
    QHeaderView,
    QMenu,
    QTreeWidget,
    QTreeWidgetItem,
    QTreeWidgetItemIterator,
)

from ..annotation import track_files
from ..annotation.session import COMMITTED
from ..tracking.lineage import Track
from . import form as forms
from .navigation import go_to
from .panels import Panel, Question

REFRESH_MS = 150
_ID = Qt.ItemDataRole.UserRole
_SWATCH = 10


class TracksPanel(Panel):
    """The committed tracks. A selected one is shown; the buttons edit the selected ones at the frame that is shown.

    Args:
        annotator: The annotator of a time series.
    """

    kind = "tracks"

    def __init__(self, annotator: Any):
        super().__init__("Tracks")
        self.annotator = annotator
        self.tree = QTreeWidget()
        self.tree.setColumnCount(2)
        self.tree.setHeaderLabels(["track", "frames"])
        self.tree.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.tree.setUniformRowHeights(True)
        self.tree.setMinimumHeight(150)
        self.tree.header().setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        self.tree.header().setSectionResizeMode(1, QHeaderView.ResizeMode.ResizeToContents)
        self.tree.header().setStretchLastSection(False)
        self.tree.headerItem().setTextAlignment(1, Qt.AlignmentFlag.AlignRight)
        self.tree.itemSelectionChanged.connect(self._row_selected)
        self.tree.itemDoubleClicked.connect(lambda item, _: self.show_track(item.data(0, _ID), at_start=True))
        self.empty = forms.hint("No committed tracks yet: track objects and commit them, or import a tracking result.")
        self.body.addWidget(self.empty)
        self.body.addWidget(self.tree)
        self.body.addLayout(self._buttons())
        self._watched: Any = None
        self._timer = forms.delayed(self, REFRESH_MS, self.refresh)
        self.tree.hide()

    def _buttons(self) -> QGridLayout:
        grid = QGridLayout()
        grid.setHorizontalSpacing(6)
        grid.setVerticalSpacing(6)
        self.buttons = {}
        for k, (text, tip, slot) in enumerate((
            ("Link", "Make daughters of the selected tracks, of the one that begins first", self.link),
            ("Unlink", "Take the selected tracks from their mothers", self.unlink),
            ("Merge", "Make one track of the selected ones", self.merge),
            ("Divide Here", "The selected track that begins first divides into the others in this frame; what it has "
             "itself from this frame on becomes a daughter, too", self.divide),
            ("Split Here", "Cut the selected track in two: from this frame on it is a new one", self.split),
            ("Swap From Here", "Exchange the two selected tracks from this frame on", self.swap),
            ("Delete", "Remove the selected tracks", self.delete),
            ("Import…", "Read tracks to correct: a CTC folder, or a GEFF graph with label images", self._ask_import),
        )):
            self.buttons[text] = forms.button(text, tooltip=tip)
            self.buttons[text].clicked.connect(slot)
            grid.addWidget(self.buttons[text], k // 3, k % 3)
        export = self.buttons["Export"] = forms.button("Export", tooltip="Write the committed tracks and their lineage")
        menu = QMenu(export)
        menu.addAction("Export CTC…").triggered.connect(self._ask_ctc)
        menu.addAction("Export GEFF…").triggered.connect(self._ask_geff)
        export.setMenu(menu)
        grid.addWidget(export, 2, 2)
        return grid

    # What is shown

    @property
    def selected(self) -> list[int]:
        """The selected tracks, in the order in which they begin."""
        ids = [item.data(0, _ID) for item in self.tree.selectedItems()]
        tracks = {} if self.annotator.session is None else self.annotator.session.objects.tracks
        return sorted((i for i in ids if i in tracks), key=lambda i: (tracks[i].first, i))

    def follow(self, session: Any) -> None:
        """Show the tracks of a session from now on."""
        session.events.tracks.connect(self.refresh_later)
        self.refresh_later()

    def refresh_later(self) -> None:
        """Refresh soon, once for many changes."""
        self._timer.start()

    def refresh(self) -> None:
        """Show the committed tracks as they are now."""
        session = self.annotator.session
        if session is None or self.annotator.views is None:
            return
        self._timer.stop()
        self._watch_picks()
        selected, closed = self.selected, {i.data(0, _ID) for i in self._items() if not i.isExpanded()}
        tracks = session.objects.tracks
        with QSignalBlocker(self.tree):
            self.tree.clear()
            items = {i: self._item(track) for i, track in tracks.items()}
            roots = [item for i, item in items.items() if not tracks[i].parent]
            for i, item in items.items():
                if tracks[i].parent:
                    items[tracks[i].parent].addChild(item)
            self.tree.addTopLevelItems(roots)
            for i, item in items.items():
                item.setExpanded(i not in closed or not item.childCount())
        self.select(selected)
        self.tree.setVisible(bool(tracks))
        self.empty.setVisible(not tracks)

    def select(self, ids: Iterable[int]) -> None:
        """Select the rows of some tracks; the viewer stays where it is."""
        wanted = set(ids)
        with QSignalBlocker(self.tree):
            self.tree.clearSelection()
            for item in self._items():
                if item.data(0, _ID) in wanted:
                    item.setSelected(True)
                    self.tree.scrollToItem(item)

    def show_track(self, track_id: int, *, at_start: bool = False) -> None:
        """Select the id of a track in the layer and go to its first frame.

        Args:
            track_id: The track.
            at_start: Whether to go there even if the track is in the frame that is shown.
        """
        objects, frame = self.annotator.session.objects, self.annotator.views.plane
        frames = objects.frames(track_id)
        if at_start or frame not in frames:
            frame = frames[0]
        go_to(self.annotator, frame, np.argwhere(objects.mask(track_id, frame)).mean(axis=0))
        layer = self.annotator.views[COMMITTED]
        with layer.events.selected_label.blocker(self._picked):
            layer.selected_label = track_id

    # Edits

    def link(self) -> None:
        """Make the selected tracks daughters of the one that begins first."""
        ids = self._chosen(2, None, "Select the mother and its daughters (Ctrl + click).")
        for daughter in ids[1:]:
            self._edit(f"Track {daughter} is a daughter of track {ids[0]}.", "link", ids[0], daughter)

    def unlink(self) -> None:
        """Take the selected tracks from their mothers."""
        for track in self._chosen(1, None, "Select the daughters that are to have no mother."):
            self._edit(f"Track {track} has no mother any more.", "unlink", track)

    def divide(self) -> None:
        """Let the selected track that begins first divide into the others, in the frame that is shown."""
        advice = "Select the mother and at least one daughter (Ctrl + click), in the first frame of the daughters."
        ids, frame = self._chosen(2, None, advice), self._frame()
        if ids:
            self._edit(f"Track {ids[0]} divides in frame {frame}.", "divide", ids[0], frame, ids[1:])

    def split(self) -> None:
        """Cut the selected track in two at the frame that is shown."""
        ids = self._chosen(1, 1, "Select one track, and go to the first frame of its second part.")
        if not ids:
            return
        frame, new = self._frame(), self.annotator.session.objects.next_id
        if self._edit(f"Track {ids[0]} is track {new} from frame {frame} on.", "split", ids[0], frame) is not None:
            self.select([ids[0], new])

    def swap(self) -> None:
        """Exchange the two selected tracks from the frame that is shown on."""
        ids = self._chosen(2, 2, "Select two tracks, and go to the first frame in which they are exchanged.")
        if ids:
            frame = self._frame()
            self._edit(f"Tracks {ids[0]} and {ids[1]} are exchanged from frame {frame} on.", "swap", *ids, frame)

    def merge(self) -> None:
        """Make one track of the selected ones; where they share frames, one object of both."""
        ids = self._chosen(2, None, "Select two or more tracks (Ctrl + click).")
        if not ids:
            return
        frames = [f for i in ids for f in self.annotator.session.objects.frames(i)]
        shared = len(frames) - len(set(frames))
        more = f" They shared {forms.counted(shared, 'frame')}: there it is one object." if shared else ""
        joined = ", ".join(map(str, ids))
        self._edit(f"The tracks {joined} are track {ids[0]} now.{more}", "merge", ids, overlap=True)

    def delete(self) -> None:
        """Remove the selected tracks."""
        for track in self._chosen(1, None, "Select the tracks to remove."):
            self._edit(f"Track {track} is removed.", "remove", track)

    # Files

    def export_ctc(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the committed tracks to a folder of the Cell Tracking Challenge, in the background."""
        self._start(lambda: track_files.export_ctc(self.annotator.session, path, overwrite=overwrite), _exported)

    def export_geff(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the committed tracks to a zarr folder with a GEFF graph, in the background."""
        self._start(lambda: track_files.export_geff(self.annotator.session, path, overwrite=overwrite), _exported)

    def import_tracks(self, path: str | Path) -> None:
        """Put a tracking result (a CTC folder or GEFF) in the place of the committed tracks, in the background."""
        had_tracks = bool(self.annotator.session and self.annotator.session.objects.ids)
        more = " They are in the place of the earlier ones; undo brings these back." if had_tracks else ""
        self._start(
            lambda: track_files.import_tracks(self.annotator.session, path),
            lambda forest: f"Imported {len(forest)} tracks.{more}",
        )

    def _ask_import(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Import tracks: a CTC folder or GEFF")
        if path:
            self.import_tracks(path)

    def _ask_ctc(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Export CTC: an empty folder")
        if path:
            self._ask_replace(Path(path), any(Path(path).glob("man_track*")), self.export_ctc)

    def _ask_geff(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Export GEFF", "tracks.zarr", "GEFF (*.zarr)")
        if path:
            path = Path(path) if path.endswith(".zarr") else Path(f"{path}.zarr")
            self._ask_replace(path, (path / "tracks.geff").is_dir(), self.export_geff)

    def _ask_replace(self, path: Path, has_tracks: bool, export: Callable[..., None]) -> None:
        if not has_tracks:
            export(path)
            return
        question = Question(f"There are tracks in {path} already.", ("Replace", "Cancel"))

        def answer(text: str) -> None:
            question.setParent(None)
            if text == "Replace":
                export(path, overwrite=True)

        question.answered.connect(answer)
        self.body.addWidget(question)

    # Helpers

    def _start(self, make: Callable[[], Any], text: Callable[[Any], str]) -> None:
        task = self.annotator.attempt(make)
        if task is not None:
            self.annotator.runner.start(
                task, key="track files", on_done=lambda done: self.annotator.notices.success(text(done))
            )

    def _edit(self, text: str, operation: str, *args: Any, **kwargs: Any) -> Any:
        delta = self.annotator.attempt(lambda: self.annotator.session.edit(operation, *args, **kwargs))
        if delta is not None:
            self.refresh()
            self.annotator.notices.info(text)
        return delta

    def _chosen(self, minimum: int, maximum: int | None, advice: str) -> list[int]:
        """The selected tracks; none, with a notice, if they are too few or too many."""
        ids = self.selected
        if len(ids) < minimum or maximum is not None and len(ids) > maximum:
            self.annotator.notices.warning(advice)
            return []
        return ids

    def _frame(self) -> int | None:
        return None if self.annotator.views is None else self.annotator.views.plane

    def _items(self) -> Iterator[QTreeWidgetItem]:
        found = QTreeWidgetItemIterator(self.tree)
        while found.value() is not None:
            yield found.value()
            found += 1

    def _item(self, track: Track) -> QTreeWidgetItem:
        frames = f"{track.first} – {track.last}" if track.last > track.first else str(track.first)
        item = QTreeWidgetItem([str(track.id), frames])
        item.setData(0, _ID, track.id)
        item.setTextAlignment(1, Qt.AlignmentFlag.AlignRight)
        colour = self.annotator.views[COMMITTED].get_color(track.id)
        if colour is not None:
            swatch = QPixmap(_SWATCH, _SWATCH)
            swatch.fill(QColor.fromRgbF(*(float(c) for c in colour[:3])))
            item.setIcon(0, QIcon(swatch))
        return item

    def _row_selected(self) -> None:
        ids = self.selected
        if len(ids) == 1:
            self.show_track(ids[0])

    def _watch_picks(self) -> None:
        """Follow the picker of the layer, also of one that replaces a deleted one."""
        layer = self.annotator.views[COMMITTED]
        if layer is not self._watched:
            layer.events.selected_label.connect(self._picked)
            self._watched = layer

    def _picked(self, event: Any) -> None:
        """A track was picked in the viewer."""
        if self._watched is self.annotator.views[COMMITTED]:
            self.select([self._watched.selected_label])


def _exported(path: Path) -> str:
    return f"Exported the tracks to {path}."
