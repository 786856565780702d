"""A plot of a training that grows while it runs."""

from matplotlib.backends.backend_qtagg import FigureCanvasQTAgg
from matplotlib.figure import Figure
from qtpy.QtGui import QPalette
from qtpy.QtWidgets import QSizePolicy

_LOSS, _METRIC = "#5b8def", "#ffb300"


class LossPlot(FigureCanvasQTAgg):
    """Shows the loss of the training and the metric of the validation over iterations; lower is better for both."""

    def __init__(self):
        self._figure = Figure(figsize=(3, 2), layout="constrained")
        super().__init__(self._figure)
        self.setMinimumHeight(170)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.axes = self._figure.add_subplot()
        self.clear()

    def clear(self) -> None:
        """Remove all points."""
        self.axes.clear()
        self.axes.set_xlabel("iteration")
        (self.loss,) = self.axes.plot([], [], "-", color=_LOSS, linewidth=1, label="training loss")
        (self.metric,) = self.axes.plot([], [], "o-", color=_METRIC, markersize=4, label="validation")
        self._colour()
        self.draw_idle()

    @property
    def has_points(self) -> bool:
        """Whether there is anything to see."""
        return any(len(line.get_xdata()) for line in (self.loss, self.metric))

    def add(self, iteration: int, loss: float | None, metric: float | None) -> None:
        """Add what is known after an iteration; a metric that is not new adds no point."""
        changed = False
        if loss is not None:
            changed |= _append(self.loss, iteration, loss)
        known = self.metric.get_ydata()
        if metric is not None and (not len(known) or known[-1] != metric):
            changed |= _append(self.metric, iteration, metric)
        if changed:
            self.axes.relim()
            self.axes.autoscale_view()
            lines = [line for line in (self.loss, self.metric) if len(line.get_xdata())]
            legend = self.axes.legend(handles=lines, loc="upper right", fontsize="small", frameon=False)
            for text in legend.get_texts():
                text.set_color(self._ink)
            self.draw_idle()

    def _colour(self) -> None:
        """Take the colours of the panel, so that the plot fits dark and light themes."""
        palette = self.palette()
        self._ink = palette.color(QPalette.ColorRole.WindowText).name()
        self._figure.patch.set_facecolor(palette.color(QPalette.ColorRole.Window).name())
        self.axes.set_facecolor("none")
        self.axes.tick_params(colors=self._ink, labelsize="small")
        self.axes.xaxis.label.set_color(self._ink)
        for side, spine in self.axes.spines.items():
            spine.set_color(self._ink)
            spine.set_visible(side in ("left", "bottom"))

    def showEvent(self, event) -> None:
        """Colours are known only now, when the style of the window applies."""
        self._colour()
        super().showEvent(event)


def _append(line, x: float, y: float) -> bool:
    xs, ys = list(line.get_xdata()), list(line.get_ydata())
    if xs and xs[-1] == x:
        if ys[-1] == y:
            return False
        ys[-1] = y
    else:
        xs.append(x)
        ys.append(y)
    line.set_data(xs, ys)
    return True
