"""The fields of the finetuning panel."""

from collections.abc import Collection
from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QFormLayout, QLineEdit, QVBoxLayout, QWidget

from ..annotation.model_choice import ModelEntry, get_entry, model_entries, resolve
from ..models.specs import SHIPPED_MODEL
from ..training.configurations import CONFIGURATIONS
from ..training.plan import TrainingForm, default_save_root
from .form import PairRow, PathRow, add_row, button, choice, collapsible, group, integer, restyle, select, set_options
from .notices import COLOURS

_EXISTING = (("ask", "refuse"), ("go on with it", "resume"), ("start anew", "overwrite"))
_WEIGHTS = "Weights (*.pt *.pth *.ckpt);;All files (*)"
_PRESET = "From the configuration"


class DataRow(PathRow):
    """A file or a folder."""

    def __init__(self, placeholder: str = "", *, tooltip: str | None = None):
        super().__init__("file", placeholder, tooltip=tooltip)
        self.browse.setText("File…")
        self.folder = button("Folder…", tooltip="Choose a folder")
        self.folder.clicked.connect(self._browse_folder)
        self.layout().addWidget(self.folder)

    def _browse_folder(self) -> None:
        self.kind = "folder"
        try:
            self._browse()
        finally:
            self.kind = "file"


def _text(placeholder: str, tooltip: str, value: str = "") -> QLineEdit:
    line = QLineEdit(value)
    line.setPlaceholderText(placeholder)
    line.setToolTip(tooltip)
    return line


class TrainingFields(QWidget):
    """Gives a `TrainingForm`; `changed` says that a field has another value."""

    changed = Signal()

    def __init__(self):
        super().__init__()
        self._entries: list[ModelEntry] = []
        self._preset_name: str | None = None
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._data_box())
        layout.addWidget(self._model_box())
        self.section = self._advanced()
        layout.addWidget(self.section)
        self.refresh_models()
        self._connect()

    def _data_box(self) -> QWidget:
        box, rows = group("Data")
        tip = "A file, or a folder with all files. Images and labels belong together in the order of their names."
        self.images = add_row(rows, "Path to images:", DataRow("file or folder", tooltip=tip))
        key = "For folders which files to take, for example *.tif; for hdf5 and zarr files the name of the data."
        self.image_key = add_row(rows, "Image data key:", _text("*.tif", key))
        self.labels = add_row(rows, "Path to labels:", DataRow("file or folder", tooltip=tip))
        self.label_key = add_row(rows, "Label data key:", _text("*.tif", key))
        return box

    def _model_box(self) -> QWidget:
        box, rows = group("Training")
        self.name = add_row(rows, "Name of trained model:", _text(
            "sam_model", "How the model is called in the menus.", "sam_model"
        ))
        self.configuration = add_row(rows, "Configuration:", choice(
            [("auto", None), *((name, name) for name in CONFIGURATIONS)],
            tooltip="What the hardware can do: which model, and how many objects per image. auto looks at the device.",
        ))
        self.family = add_row(rows, "Model:", choice(
            tooltip="The model to begin with. One that was trained for images like yours needs less training."
        ))
        self.size = add_row(rows, "Model size:", choice(
            tooltip="Larger models are more accurate, slower, and need more memory."
        ))
        self.with_decoder = QCheckBox("With segmentation decoder")
        self.with_decoder.setChecked(True)
        self.with_decoder.setToolTip(
            "Also train automatic segmentation. All objects must be labelled for it; else switch it off."
        )
        rows.addRow(self.with_decoder)
        self.n_epochs = add_row(rows, "Number of epochs:", integer(
            100, 1, 1000, tooltip="At most so many passes over the data; training stops earlier if it no longer helps."
        ))
        return box

    def _advanced(self) -> QWidget:
        section, rows = collapsible("Advanced Settings")
        rows.setRowWrapPolicy(QFormLayout.RowWrapPolicy.WrapLongRows)
        self.device = add_row(rows, "Device:", choice(["auto"], tooltip="auto takes a GPU if there is one."))
        self.patch = add_row(rows, "Patch size:", PairRow((512, 512), 0, 2048, step=32))
        self.patch.setToolTip("Size of the parts of images that are trained on, in pixels. Check Data suggests one.")
        tip = "Images that are not trained on, to see whether the model becomes better. Empty holds a tenth back."
        self.val_images = add_row(rows, "Path to validation images:", DataRow("a tenth of the images", tooltip=tip))
        self.val_labels = add_row(rows, "Path to validation labels:", DataRow("a tenth of the labels", tooltip=tip))
        self.checkpoint = add_row(rows, "Custom weights:", PathRow(
            "file", "weights of the chosen model", file_filter=_WEIGHTS,
            tooltip="A checkpoint to begin with; its type of model is read from it.",
        ))
        self.output_path = add_row(rows, "Output path:", PathRow(
            "save", "folder of the models", file_filter="Weights (*.pt)", tooltip="Where the model is written (.pt)."
        ))
        self.save_root = add_row(rows, "Folder for checkpoints:", PathRow(
            "folder", str(default_save_root()), tooltip="Where checkpoints and logs are kept while it trains."
        ))
        self.existing = add_row(rows, "If it was trained before:", choice(
            _EXISTING, tooltip="What to do if there is a training of this name."
        ))
        self.n_iterations = add_row(rows, "Iterations:", integer(
            0, 0, 1_000_000, special="by epochs", tooltip="Train for so many steps, instead of a number of epochs."
        ))
        self.checkpoint_encoder = QCheckBox("Take longer, to need less memory (checkpoint_encoder)")
        self.checkpoint_encoder.setToolTip(
            "Compute twice what would take memory. The result is the same. Without a GPU, models larger than tiny "
            "do so anyway."
        )
        rows.addRow(self.checkpoint_encoder)
        self.promote_worse = QCheckBox("Keep the model even if it became worse")
        rows.addRow(self.promote_worse)
        return section

    def _connect(self) -> None:
        self.family.currentIndexChanged.connect(self._fill_sizes)
        self.configuration.currentIndexChanged.connect(self._show_preset)
        for row in self._rows().values():
            if isinstance(row, PathRow | PairRow):
                row.changed.connect(self.changed)
            elif isinstance(row, QLineEdit):
                row.textChanged.connect(self.changed)
            elif isinstance(row, QCheckBox):
                row.toggled.connect(self.changed)
            else:
                (row.currentIndexChanged if hasattr(row, "currentIndexChanged") else row.valueChanged).connect(
                    lambda *_: self.changed.emit()
                )
        self.checkpoint.changed.connect(self._show_model)

    def _rows(self) -> dict[str, QWidget]:
        """The controls by the names of the fields of `TrainingForm`."""
        return {
            "images": self.images, "labels": self.labels, "image_key": self.image_key, "label_key": self.label_key,
            "val_images": self.val_images, "val_labels": self.val_labels, "configuration": self.configuration,
            "with_segmentation_decoder": self.with_decoder, "model_type": self.family, "size": self.size,
            "checkpoint": self.checkpoint, "device": self.device, "patch_shape": self.patch, "n_epochs": self.n_epochs,
            "n_iterations": self.n_iterations, "checkpoint_encoder": self.checkpoint_encoder, "name": self.name,
            "save_root": self.save_root, "output_path": self.output_path, "existing": self.existing,
            "promote_worse": self.promote_worse,
        }

    # Models and presets

    def refresh_models(self) -> None:
        """Look again at which models there are."""
        self._entries = model_entries()
        families = list(dict.fromkeys(entry.family for entry in self._entries))
        set_options(self.family, [(_PRESET, None), *((name, name) for name in families)], self.family.currentData())
        self._show_preset()
        self._fill_sizes()

    def _preset_model(self) -> str:
        return CONFIGURATIONS[self.configuration.currentData() or self._preset_name]["model_type"]

    def show_hardware(self, preset: str, devices: Collection[str]) -> None:
        """Say which preset was found for the device, and offer the devices that there are."""
        is_first, self._preset_name = self._preset_name is None, preset
        self.configuration.setItemText(0, f"auto ({preset})")
        set_options(self.device, ["auto", *devices], self.device.currentData())
        if is_first and set(devices) <= {"cpu"} and self.family.currentData() is None and self.checkpoint.path is None:
            # Larger models take days without a GPU.
            select(self.family, get_entry(SHIPPED_MODEL).family)
            self._fill_sizes()
        self._show_preset()

    def _show_preset(self, *_: Any) -> None:
        text = _PRESET
        if self.checkpoint.path is not None:
            text = "That of the custom weights"
        elif self.configuration.currentData() or self._preset_name:
            text = f"{_PRESET} ({self._preset_model()})"
        self.family.setItemText(0, text)

    def _fill_sizes(self, *_: Any) -> None:
        family = self.family.currentData()
        entries = [entry for entry in self._entries if entry.family == family]
        options = [(entry.size, entry.size) for entry in entries] or [("–", None)]
        set_options(self.size, options, self.size.currentData())  # the size stays if the family has it
        self._show_model()

    def _show_model(self) -> None:
        custom = self.checkpoint.path is not None
        if custom:
            select(self.family, None)
        self._show_preset()
        self.family.setEnabled(not custom)
        self.size.setEnabled(self.family.currentData() is not None)

    # Values

    def values(self) -> TrainingForm:
        """What is chosen now."""
        def path(row: PathRow) -> str:
            return "" if row.path is None else str(row.path)

        size, device = self.size.currentData(), self.device.currentData()
        return TrainingForm(
            images=path(self.images), labels=path(self.labels), image_key=self.image_key.text(),
            label_key=self.label_key.text(), val_images=path(self.val_images), val_labels=path(self.val_labels),
            configuration=self.configuration.currentData(), with_segmentation_decoder=self.with_decoder.isChecked(),
            model_type=None if size is None else resolve(self.family.currentData(), size),
            checkpoint=path(self.checkpoint), device=None if device == "auto" else device,
            patch_shape=self.patch.value, n_epochs=self.n_epochs.value(),
            n_iterations=self.n_iterations.value() or None,
            checkpoint_encoder=self.checkpoint_encoder.isChecked() or None,
            name=self.name.text().strip(), save_root=path(self.save_root), output_path=path(self.output_path),
            existing=self.existing_choice, promote_worse=self.promote_worse.isChecked(),
        )

    @property
    def existing_choice(self) -> str:
        """What to do if there is a training of this name: `refuse`, `resume` or `overwrite`."""
        return self.existing.currentData()

    @existing_choice.setter
    def existing_choice(self, value: str) -> None:
        select(self.existing, value)

    def open_advanced(self) -> None:
        """Show the advanced settings."""
        self.section.expand(animate=False)

    def mark(self, fields: Collection[str]) -> None:
        """Mark fields that are wrong, and no others."""
        for name, row in self._rows().items():
            target = row.line if isinstance(row, PathRow) else row
            restyle(target, f"border: 1px solid {COLOURS['error']};" if name in fields else "")
        if set(fields) & {"val_images", "val_labels", "checkpoint", "output_path", "patch_shape", "existing"}:
            self.open_advanced()
