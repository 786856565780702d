"""A plot of a training that grows while it runs.

It is drawn here rather than by matplotlib, which takes a third of a second for it: in that time the window would stand
still, at each iteration again.
"""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from qtpy.QtCore import QPointF, QRectF, Qt
from qtpy.QtGui import QColor, QPainter, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

LOSS, METRIC = "#5b8def", "#ffb300"
_HEIGHT, _MARGIN, _DOT = 170, 8, 3.5
_Y_TICKS, _X_TICKS = MaxNLocator(3), MaxNLocator(4, integer=True)


class Curve:
    """Points (x, y), with x increasing."""

    def __init__(self, name: str, colour: str):
        self.name, self.colour = name, QColor(colour)
        self.x: list[float] = []
        self.y: list[float] = []

    def set_last(self, x: float, y: float) -> None:
        """Add a point, or give the last one another y."""
        if self.x and self.x[-1] == x:
            self.y[-1] = y
        else:
            self.x.append(x)
            self.y.append(y)

    def binned(self, width: float) -> tuple[np.ndarray, np.ndarray]:
        """The points; where there are more than the plot has columns, their means per column."""
        x, y = np.array(self.x), np.array(self.y)
        if len(x) <= max(width, 2):
            return x, y
        column = ((x - x[0]) / (x[-1] - x[0]) * (int(width) - 1)).astype(int)
        n = np.bincount(column)
        used = n > 0
        return (np.bincount(column, x)[used] / n[used], np.bincount(column, y)[used] / n[used])


class LossPlot(QWidget):
    """Shows the loss of the training and the metric of the validation over iterations; lower is better for both."""

    def __init__(self):
        super().__init__()
        self.setFixedHeight(_HEIGHT)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.clear()

    def clear(self) -> None:
        """Remove all points."""
        self.loss, self.metric = Curve("training loss", LOSS), Curve("validation", METRIC)
        self.update()

    @property
    def has_points(self) -> bool:
        """Whether there is anything to see."""
        return bool(self._curves())

    def add(self, iteration: int, loss: float | None, metric: float | None) -> None:
        """Add what is known after an iteration; a metric that is not new adds no point."""
        if loss is not None and np.isfinite(loss):
            self.loss.set_last(iteration, loss)
        if metric is not None and np.isfinite(metric) and self.metric.y[-1:] != [metric]:
            self.metric.set_last(iteration, metric)
        self.update()

    def _curves(self) -> list[Curve]:
        return [curve for curve in (self.loss, self.metric) if curve.x]

    def paintEvent(self, event: Any) -> None:
        curves = self._curves()
        if not curves:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        font = painter.font()
        font.setPointSizeF(font.pointSizeF() * 0.85)
        painter.setFont(font)
        low, high = min(min(c.y) for c in curves), max(max(c.y) for c in curves)
        room = max((high - low) / 50, 1e-4)
        y_ticks = _Y_TICKS.tick_values(low - room, high + room)
        x_ticks = _X_TICKS.tick_values(0, max(1, *(c.x[-1] for c in curves)))
        metrics = painter.fontMetrics()
        line, labels = metrics.height(), [f"{y:.6g}" for y in y_ticks]
        left = max(map(metrics.horizontalAdvance, labels)) + _MARGIN
        area = QRectF(left, line * 1.4, self.width() - left - _MARGIN, self.height() - line * 3.8)

        def place(x: float, y: float) -> QPointF:
            return QPointF(area.left() + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * area.width(),
                           area.bottom() - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * area.height())

        self._draw_axes(painter, area, line, x_ticks, list(zip(y_ticks, labels)), place)
        self._draw_legend(painter, curves, line)
        for curve in curves:
            xs, ys = curve.binned(area.width())
            points = [place(x, y) for x, y in zip(xs, ys)]
            painter.setPen(QPen(curve.colour, 1.5))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawPolyline(QPolygonF(points))
            if curve is self.metric or len(points) == 1:
                painter.setBrush(curve.colour)
                for point in points:
                    painter.drawEllipse(point, _DOT, _DOT)
        painter.end()

    def _draw_axes(self, painter, area, line, x_ticks, y_ticks, place) -> None:
        ink = self.palette().windowText().color()
        grid = QColor(ink)
        grid.setAlpha(40)
        for y, label in y_ticks:
            height = place(x_ticks[0], y).y()
            painter.setPen(grid)
            painter.drawLine(QPointF(area.left(), height), QPointF(area.right(), height))
            painter.setPen(ink)
            painter.drawText(QRectF(0, height - line / 2, area.left() - _MARGIN / 2, line),
                             Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, label)
        painter.setPen(ink)
        for x in x_ticks:
            at = min(max(place(x, y_ticks[0][0]).x() - 40, 0), self.width() - 80)
            painter.drawText(QRectF(at, area.bottom() + 2, 80, line), Qt.AlignmentFlag.AlignCenter, f"{x:.0f}")
        painter.drawText(QRectF(area.left(), area.bottom() + line, area.width(), line),
                         Qt.AlignmentFlag.AlignCenter, "iteration")

    def _draw_legend(self, painter, curves, line) -> None:
        """The names of the curves in a row, from the right."""
        right = self.width() - _MARGIN
        for curve in reversed(curves):
            width = painter.fontMetrics().horizontalAdvance(curve.name)
            painter.setPen(self.palette().windowText().color())
            painter.drawText(QRectF(right - width, 0, width + 1, line), Qt.AlignmentFlag.AlignVCenter, curve.name)
            painter.setPen(QPen(curve.colour, 3))
            painter.drawLine(QPointF(right - width - 22, line / 2), QPointF(right - width - 6, line / 2))
            right -= width + 22 + 2 * _MARGIN
