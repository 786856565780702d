"""The groups of controls of an annotator. They show and give values; what happens is decided by the annotator."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QGroupBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from ..annotation.automatic import AutoSettings
from . import form as forms
from .tooltips import get_tooltip

PROJECTIONS = ("box", "mask", "points", "points_and_mask", "single_point")


class Panel(QGroupBox):
    """A titled group of controls; `kind` is the key of its tooltips."""

    kind = ""

    def __init__(self, title: str):
        super().__init__(title)
        self.body = QVBoxLayout(self)
        self.body.setContentsMargins(8, 6, 8, 8)
        self.body.setSpacing(6)

    def button(self, text: str, name: str, kind: str | None = None) -> QPushButton:
        button = forms.button(text, tooltip=get_tooltip(kind or self.kind, name))
        self.body.addWidget(button)
        return button

    def check(self, text: str, name: str, checked: bool = False) -> QCheckBox:
        box = QCheckBox(text)
        box.setChecked(checked)
        box.setToolTip(get_tooltip(self.kind, name) or "")
        self.body.addWidget(box)
        return box

    def form(
        self, rows: Mapping[str, tuple[str, QWidget]], layout: QFormLayout | None = None, kind: str | None = None
    ) -> None:
        """Rows of a label and a control, by name; in the panel, or in the form of a section."""
        if layout is None:
            layout = forms.form()
            self.body.addLayout(layout)
        for name, (label, control) in rows.items():
            field = control.line if isinstance(control, forms.PathRow) else control
            field.setToolTip(get_tooltip(kind or self.kind, name) or "")
            forms.add_row(layout, label, control)


class PromptPanel(Panel):
    """Which label the next point gets; for tracking also its state and track."""

    kind = "prompts"
    label_changed = Signal(bool)
    state_changed = Signal(str)
    track_changed = Signal(int)

    def __init__(self, tracking: bool = False):
        super().__init__("Prompts")
        self.label = forms.choice(["positive", "negative"])
        rows = {"label": ("Next point [T]:", self.label)}
        if tracking:
            self.state, self.track = forms.choice(["track", "division"]), forms.choice(["1"])
            rows |= {"track_state": ("Track state:", self.state), "track_id": ("Track id:", self.track)}
            self.state.currentTextChanged.connect(self.state_changed)
            self.track.currentTextChanged.connect(lambda text: text and self.track_changed.emit(int(text)))
        self.form(rows)
        self.label.currentTextChanged.connect(lambda text: self.label_changed.emit(text == "positive"))

    @property
    def positive(self) -> bool:
        return self.label.currentText() == "positive"

    def toggle(self) -> None:
        self.label.setCurrentText("negative" if self.positive else "positive")

    def set_tracks(self, ids: Sequence[int], current: int) -> None:
        """Show the tracks that can be chosen."""
        self.track.blockSignals(True)
        self.track.clear()
        self.track.addItems([str(i) for i in ids])
        self.track.setCurrentText(str(current))
        self.track.blockSignals(False)


class SegmentPanel(Panel):
    """Segmentation from prompts: in the plane that is shown, and in all planes."""

    kind = "segment"

    def __init__(self, mode: str):
        super().__init__("Interactive Segmentation")
        what = {"2d": "Object", "3d": "Slice", "tracking": "Frame"}[mode]
        self.live = self.check("Segment after each prompt", "live", True)
        self.batched = self.check("One object per prompt (batched)", "batched") if mode != "tracking" else None
        self.drop_specks = self.check("Without specks", "drop_specks", True)
        self.segment = self.button(f"Segment {what} [S]", "run_button")
        if mode == "2d":
            return
        self.segment_all = self.button(
            "Segment All Slices [Shift + S]" if mode == "3d" else "Segment All Frames [Shift + S]", "run_button",
            kind="segment_nd",
        )
        self.projection = forms.choice(PROJECTIONS, "single_point")
        self.iou_threshold, self.box_extension = forms.number(0.5), forms.number(0.05)
        rows = {
            "projection": ("Projection:", self.projection), "iou_threshold": ("IoU threshold:", self.iou_threshold),
            "box_extension": ("Box extension:", self.box_extension),
        }
        if mode == "tracking":
            self.motion_smoothing = forms.number(0.5)
            rows["motion_smoothing"] = ("Motion smoothing:", self.motion_smoothing)
        self.rows = {name: control for name, (_, control) in rows.items()}
        section, content = forms.collapsible("Segmentation Settings")
        self.form(rows, content, kind="segment_nd")
        self.body.addWidget(section)

    def settings(self) -> dict[str, Any]:
        """The settings for all planes."""
        return {name: read(control) for name, control in self.rows.items()} | {
            "drop_specks": self.drop_specks.isChecked()
        }

    def set_settings(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in self.rows:
                write(self.rows[name], value)


class AutoPanel(Panel):
    """Automatic segmentation with the parameters of a mode; each one that is shown acts."""

    kind = "autosegment"
    LABELS = {
        "center_distance_threshold": "Center distance threshold",
        "boundary_distance_threshold": "Boundary distance threshold",
        "foreground_threshold": "Foreground threshold",
        "distance_smoothing": "Distance smoothing",
        "nms_threshold": "Overlap threshold",
        "pred_iou_thresh": "Predicted IoU threshold",
        "stability_score_thresh": "Stability threshold",
        "box_nms_thresh": "Box NMS threshold",
        "points_per_side": "Points per side",
        "min_size": "Minimum object size",
        "gap_closing": "Gap closing",
        "min_z_extent": "Minimum extent",
        "beta": "Merging of slices",
    }
    MODES = {"ais": "decoder (AIS)", "apg": "prompts from the decoder (APG)", "amg": "grid of points (AMG)"}

    def __init__(self, mode: str):
        super().__init__("Automatic Segmentation")
        self.annotator_mode, self.mode, self.model = mode, "ais", None
        self.whole = None
        if mode != "2d":
            text, name = ("Apply to volume", "apply_to_volume") if mode == "3d" else (
                "Track time series", "track_timeseries"
            )
            self.whole = self.check(text, name)
        self.section, self.content = forms.collapsible("Automatic Segmentation Settings")
        self.controls: dict[str, QWidget] = {}
        self.body.addWidget(self.section)
        self.start = self.button("Automatic Tracking" if mode == "tracking" else "Automatic Segmentation", "run_button")
        self.show_mode("ais", None)

    def show_mode(self, mode: str, model: str | None) -> None:
        """Show the parameters of `amg`, `ais` or `apg`, with the defaults of a model; those in use stay."""
        if self.controls and (mode, model) == (self.mode, self.model):
            return
        self.mode, self.model = mode, model
        defaults = AutoSettings.for_model(model, mode)
        rows = {}
        for name in AutoSettings.controls(mode, self.annotator_mode):
            if name in self.LABELS:
                value = getattr(defaults, name)
                is_size = isinstance(value, int)
                largest = 10_000 if name == "min_size" else 128 if name == "points_per_side" else 10
                control = forms.integer(value, 0, largest) if is_size else forms.number(
                    value, maximum=20 if name == "distance_smoothing" else 1
                )
                rows[name] = (f"{self.LABELS[name]}:", control)
        self.controls = {name: control for name, (_, control) in rows.items()}
        while self.content.rowCount():
            self.content.removeRow(0)
        self.form({"mode": ("Mode:", QLabel(self.MODES[mode])), **rows}, self.content)

    def settings(self) -> AutoSettings:
        defaults = AutoSettings.for_model(self.model, self.mode)
        return replace(defaults, **{name: read(control) for name, control in self.controls.items()})


class CommitPanel(Panel):
    """What to commit, and what happens where it overlaps with committed objects."""

    kind = "commit"

    def __init__(self):
        super().__init__("Commit")
        self.layer = forms.choice(["current_object", "auto_segmentation"])
        self.preserve = forms.choice(["objects", "pixels", "none"])
        self.threshold = forms.number(0.75)
        self.path = forms.PathRow("folder", "no record in a file")
        self.form({"layer": ("Layer:", self.layer)})
        section, content = forms.collapsible("Overlaps and Record")
        self.form({
            "preserve_mode": ("Preserve mode:", self.preserve),
            "preservation_threshold": ("Threshold:", self.threshold),
            "commit_path": ("Commit path:", self.path),
        }, content)
        self.body.addWidget(section)
        self.commit = self.button("Commit [C]", "run_button")


class ClearPanel(Panel):
    """Remove prompts and current object; undo and redo; save."""

    kind = "clear"
    PLANES = {"3d": ("Clear all slices", "all_slices"), "tracking": ("Clear all frames", "all_frames")}

    def __init__(self, mode: str):
        super().__init__("Edit")
        self.everywhere = self.check(*self.PLANES[mode], True) if mode in self.PLANES else None
        self.clear = self.button("Clear Annotations [Shift + C]", "run_button")
        row = QHBoxLayout()
        self.undo = forms.button("Undo", tooltip=get_tooltip(self.kind, "undo"))
        self.redo = forms.button("Redo", tooltip=get_tooltip(self.kind, "redo"))
        self.save = forms.button("Save…", tooltip=get_tooltip(self.kind, "save"))
        for button in (self.undo, self.redo, self.save):
            row.addWidget(button)
        self.body.addLayout(row)


class Question(QWidget):
    """A question in place, with one button for each answer; it does not block anything."""

    answered = Signal(str)

    def __init__(self, text: str, answers: Sequence[str]):
        super().__init__()
        layout = QVBoxLayout(self)
        label = QLabel(text)
        label.setWordWrap(True)
        label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout.addWidget(label)
        row = QHBoxLayout()
        for answer in answers:
            button = forms.button(answer)
            button.clicked.connect(lambda _, text=answer: self.answered.emit(text))
            row.addWidget(button)
        layout.addLayout(row)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Maximum)


def read(control: QWidget) -> Any:
    return control.currentText() if isinstance(control, QComboBox) else control.value()


def write(control: QWidget, value: Any) -> None:
    if isinstance(control, QComboBox):
        control.setCurrentText(str(value))
    else:
        control.setValue(value)

