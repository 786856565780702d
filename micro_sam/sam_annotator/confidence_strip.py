"""How sure the model is of the current object in each slice or frame, and the way to the doubtful ones."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from qtpy.QtCore import QPointF, QRectF, Qt, Signal
from qtpy.QtGui import QColor, QPainter, QPen, QPolygonF
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QVBoxLayout, QWidget

from ..annotation.review import Score, rank
from . import form as forms
from .navigation import go_to

# Red to green. The height of a bar tells the same, to those who cannot tell red from green.
COLOURS = ((215, 48, 39), (254, 196, 79), (49, 163, 84))
DOUBTFUL, SURE = 0.5, 0.95  # what is shown quite red and quite green
PROMPTED = "#4fb3ff"
HEIGHT, _MARKS = 24, 6
_MIN_BAR = 3


def colour_of(confidence: float) -> QColor:
    """The colour of a confidence, from 0 to 1."""
    place = np.clip((confidence - DOUBTFUL) / (SURE - DOUBTFUL), 0.0, 1.0)
    channels = [np.interp(place, [0.0, 0.5, 1.0], values) for values in zip(*COLOURS)]
    return QColor(*(round(float(c)) for c in channels))


class ConfidenceStrip(QWidget):
    """A bar for each plane, with marks on those with prompts and on the one that is shown; a click goes to a plane.

    If there are more planes than pixels, a bar shows the lowest confidence of its planes.
    """

    chosen = Signal(int)

    def __init__(self):
        super().__init__()
        self.n_planes, self.shown, self.noun = 1, 0, "slice"
        self.scores: dict[int, Score] = {}
        self.prompted: set[int] = set()
        self.setFixedHeight(HEIGHT)
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.setMouseTracking(True)
        self.setCursor(Qt.CursorShape.PointingHandCursor)

    def show_scores(self, scores: Mapping[int, Sequence[float | None]], prompted: Collection[int]) -> None:
        """Show scores by plane; planes that are missing have no object."""
        self.scores = {z: Score(*score) for z, score in scores.items()}
        self.prompted = set(prompted)
        self.update()

    def show_plane(self, plane: int) -> None:
        """Mark the plane that the viewer shows."""
        self.shown = plane
        self.update()

    def plane_at(self, x: float) -> int:
        """The plane at a place in the widget."""
        return int(np.clip(x * self.n_planes / max(self.width(), 1), 0, self.n_planes - 1))

    def x_range(self, plane: int) -> tuple[float, float]:
        """Where a plane is in the widget."""
        width = self.width() / self.n_planes
        return plane * width, (plane + 1) * width

    def text_of(self, plane: int) -> str:
        """What is known of a plane."""
        score, parts = self.scores.get(plane), []
        if score is None:
            parts = ["no object"]
        else:
            parts += [] if score.predicted_iou is None else [f"predicted IoU {score.predicted_iou:.2f}"]
            parts += [] if score.stability is None else [f"stability {score.stability:.2f}"]
        parts += ["with prompts"] if plane in self.prompted else []
        return f"{self.noun.capitalize()} {plane}: {', '.join(parts) or 'not known'}"

    def paintEvent(self, event: Any) -> None:
        painter = QPainter(self)
        text = self.palette().windowText().color()
        ground = QColor(text)
        ground.setAlpha(28)
        area = QRectF(0, _MARKS, self.width(), self.height() - _MARKS)
        painter.fillRect(area, ground)
        for left, right, confidence in self._bars():
            height = max(_MIN_BAR, min(confidence, 1.0) * area.height())
            painter.fillRect(QRectF(left, self.height() - height, right - left, height), colour_of(confidence))
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(PROMPTED))
        for plane in self.prompted:
            x = sum(self.x_range(plane)) / 2
            painter.drawPolygon(QPolygonF([QPointF(x - 3.5, 0), QPointF(x + 3.5, 0), QPointF(x, _MARKS - 1)]))
        left, right = self.x_range(self.shown)
        painter.setBrush(Qt.BrushStyle.NoBrush)
        painter.setPen(QPen(text, 1.5))
        width = max(right - left, 3.0)
        left = min(max((left + right - width) / 2, 1.0), self.width() - width - 1.0)
        painter.drawRect(QRectF(left, _MARKS, width, area.height() - 1))

    def _bars(self) -> list[tuple[float, float, float]]:
        """Left, right and confidence of what is drawn."""
        known = {z: s.confidence for z, s in self.scores.items() if s.confidence is not None}
        if self.n_planes <= self.width():
            gap = int(self.width() >= 4 * self.n_planes)
            return [(int(self.x_range(z)[0]), int(self.x_range(z)[1]) - gap, c) for z, c in known.items()]
        columns: dict[int, float] = {}
        for z, confidence in known.items():
            x = int(self.x_range(z)[0])
            columns[x] = min(columns.get(x, 1.0), confidence)
        return [(x, x + 1, confidence) for x, confidence in columns.items()]

    def mousePressEvent(self, event: Any) -> None:
        if event.button() == Qt.MouseButton.LeftButton:
            self.chosen.emit(self.plane_at(event.position().x()))

    def mouseMoveEvent(self, event: Any) -> None:
        plane = self.plane_at(event.position().x())
        self.setToolTip(self.text_of(plane))
        if event.buttons() & Qt.MouseButton.LeftButton:
            self.chosen.emit(plane)


class ConfidenceView(QWidget):
    """The strip of the current object with what it says of the plane shown; hidden while nothing is known.

    Args:
        annotator: The annotator of a volume or a time series.
    """

    def __init__(self, annotator: Any):
        super().__init__()
        self.annotator = annotator
        self.noun = "frame" if annotator.mode == "tracking" else "slice"
        self.strip, self.text = ConfidenceStrip(), forms.quiet(QLabel())
        self.strip.noun = self.noun
        self.text.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.worst = forms.button("Next Worst", tooltip=(
            f"Go to the {self.noun} with the lowest confidence that was not looked at yet; those with prompts are left "
            "out"
        ))
        self.strip.chosen.connect(self.go_to)
        self.worst.clicked.connect(self.next_worst)
        row = QHBoxLayout()
        row.addWidget(self.text, 1)
        row.addWidget(self.worst)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(row)
        layout.addWidget(self.strip)
        self._seen: set[int] = set()
        self._timer = forms.delayed(self, 0, self.refresh)
        steps = annotator.viewer.dims.events.current_step
        steps.connect(self._moved)
        self.destroyed.connect(lambda *_, slot=self._moved: steps.disconnect(slot))
        self.hide()

    def follow(self, session: Any) -> None:
        """Show the current object of a session from now on."""
        for signal in (session.events.labels, session.events.state, session.events.prompts):
            signal.connect(self._refresh_later)
        self._seen.clear()
        self._refresh_later()

    def refresh(self) -> None:
        """Show what is known now."""
        session = self.annotator.session
        if session is None or self.annotator.views is None:
            return
        scores, prompts = session.confidence(self._track()), session.prompts
        if self._track() is not None:
            prompts = prompts.of_track(self._track())
        self.strip.n_planes = session.n_planes
        if scores != self.strip.scores:
            self._seen.clear()
        self.strip.show_scores(scores, [z for z in prompts.planes() if 0 <= z < session.n_planes])
        self.setVisible(bool(scores))
        self._moved()

    def go_to(self, plane: int) -> None:
        """Show a plane."""
        go_to(self.annotator, plane)

    def next_worst(self) -> None:
        """Go to the plane with the lowest confidence among those without prompts that were not looked at yet."""
        planes = rank(self.strip.scores, set(self.strip.scores) - self.strip.prompted)
        if not planes:
            self.annotator.notices.info(f"All {self.noun}s of the object have prompts.")
            return
        left = [z for z in planes if z not in self._seen]
        if not left:
            self._seen.clear()
            left = planes
        self._seen.add(left[0])
        self.go_to(left[0])

    def _track(self) -> int | None:
        session = self.annotator.session
        return session.track_id if session.mode == "tracking" else None

    def _refresh_later(self, *_: Any) -> None:
        self._timer.start()

    def _moved(self, *_: Any) -> None:
        if self.annotator.views is None or self.isHidden():
            return
        plane = self.annotator.views.plane
        self.strip.show_plane(plane)
        score = self.strip.scores.get(plane)
        confidence = None if score is None else score.confidence
        here = "no object" if score is None else "not known" if confidence is None else f"{confidence:.2f}"
        self.text.setText(f"Confidence in this {self.noun}: {here}")
        self.text.setToolTip(self.strip.text_of(plane))
