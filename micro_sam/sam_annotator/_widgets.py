"""Widgets under the names that other code knows them by; what they do is done elsewhere in this package."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtWidgets import QHBoxLayout, QLabel, QLineEdit, QVBoxLayout, QWidget

from ..annotation.model_choice import AUTO, check_request
from ..core.errors import InvalidInputError
from ._state import AnnotatorState
from .form import PathRow, select
from .model_panel import EmbeddingPanel
from .settings_widget import settings_widget

__all__ = ["EmbeddingWidget", "settings_widget"]


class _WidgetBase(QWidget):
    """A form whose fields are attributes of the widget, always with the value that is entered."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.setLayout(QVBoxLayout())

    def run_button(self) -> None:
        """Do what the form is for."""
        self()

    def _add_string_param(
        self,
        name: str,
        value: str | None,
        title: str | None = None,
        placeholder: str | None = None,
        layout: Any = None,
        tooltip: str | None = None,
    ) -> tuple[QLineEdit, Any]:
        """Make a field for a text, which is the attribute `name`: empty text if it is cleared.

        Args:
            name: The attribute.
            value: Its value at first.
            title: Label of the field; None takes the name.
            placeholder: What an empty field shows.
            layout: Where to put the field; None makes a layout.
            tooltip: What the field is for.

        Returns:
            The field and its layout.
        """
        field = QLineEdit()
        if placeholder is not None:
            field.setPlaceholderText(placeholder)
        field.textChanged.connect(lambda text: setattr(self, name, text))
        setattr(self, name, value)
        if value is not None:
            field.setText(value)
        return field, self._in_row(field, title or name, layout, tooltip)

    def _add_path_param(
        self,
        name: str,
        value: str | os.PathLike | None,
        select_type: str,
        title: str | None = None,
        placeholder: str | None = None,
        tooltip: str | None = None,
    ) -> tuple[QLineEdit, Any]:
        """Make a field for a path, which is the attribute `name`: None if it is cleared.

        Args:
            name: The attribute.
            value: Its value at first.
            select_type: `file` or `directory`, or `both`.
            title: Label of the field; None takes the name.
            placeholder: What an empty field shows.
            tooltip: What the field is for.

        Returns:
            The field and its layout.

        Raises:
            InvalidInputError: For another `select_type`.
        """
        kinds = {"file": "file", "directory": "folder", "both": "folder"}
        if select_type not in kinds:
            raise InvalidInputError(f"select_type must be file, directory or both, but is {select_type!r}.")
        row = PathRow(kinds[select_type], placeholder or "")
        row.changed.connect(lambda: setattr(self, name, None if row.path is None else str(row.path)))
        setattr(self, name, None)
        row.path = value
        return row.line, self._in_row(row, title or name, None, tooltip)

    @staticmethod
    def _in_row(field: QWidget, title: str, layout: Any, tooltip: str | None) -> Any:
        layout = QHBoxLayout() if layout is None else layout
        label = QLabel(title)
        for widget in (label, field):
            if tooltip is not None:
                widget.setToolTip(tooltip)
            layout.addWidget(widget)
        return layout


class EmbeddingWidget(_WidgetBase):
    """The embedding panel on its own: computes the embeddings of an image for `AnnotatorState`, and waits for them.

    The fields of the panel are attributes that scripts can set. Annotators do the same without waiting.

    Attributes:
        image: A napari layer, or an array.
    """

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.image: Any = None
        self.panel = EmbeddingPanel(None, None, show_image=False)
        self.panel.requested.connect(lambda request: self(skip_validate=True))
        self.layout().addWidget(self.panel)

    @property
    def model_type(self) -> str | None:
        """The name of the model."""
        return self.panel.model_name

    @model_type.setter
    def model_type(self, name: str) -> None:
        self.panel.set_model(name)

    @property
    def device(self) -> str:
        """The compute device, or `auto`."""
        return self.panel.device.currentData()

    @device.setter
    def device(self, name: str) -> None:
        if not select(self.panel.device, name):  # devices are looked for in the background
            self.panel.device.addItem(name, name)
            select(self.panel.device, name)

    @property
    def embeddings_save_path(self) -> Path | None:
        """The zarr folder of the embeddings; None for the automatic cache."""
        return self.panel.save_path.path

    @embeddings_save_path.setter
    def embeddings_save_path(self, path: str | os.PathLike | None) -> None:
        self.panel.save_path.path = path

    @property
    def custom_weights(self) -> Path | None:
        """Weights instead of those of the model."""
        return self.panel.checkpoint.path

    @custom_weights.setter
    def custom_weights(self, path: str | os.PathLike | None) -> None:
        self.panel.checkpoint.path = path

    def __call__(self, skip_validate: bool = False) -> None:
        """Compute the embeddings.

        Args:
            skip_validate: Whether to leave out the check of what is entered; what cannot be used raises all the same.

        Raises:
            InvalidInputError: If something that is entered cannot be used.
        """
        request = replace(self.panel.values(), image=self.image)
        mistakes = [] if skip_validate else [p.message for p in check_request(request) if p.is_error]
        if mistakes or self.image is None:
            raise InvalidInputError("\n".join(mistakes) or "There is no image: set the attribute image to a layer.")
        data = getattr(self.image, "data", self.image) if hasattr(self.image, "rgb") else np.asarray(self.image)
        ndim = getattr(self.image, "ndim", None) if hasattr(self.image, "rgb") else data.ndim - (data.shape[-1] == 3)
        AnnotatorState().initialize_predictor(
            data, request.model or self.model_type, ndim, request.save_path or AUTO,
            device=None if request.device == AUTO else request.device, checkpoint_path=request.checkpoint,
            tile_shape=request.tile_shape, halo=request.halo, prefer_decoder=request.mode != "amg",
        )
