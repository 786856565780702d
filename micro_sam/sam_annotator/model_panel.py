"""The panel in which image and model are chosen and embeddings are computed, the same in all annotators."""

import sys
import threading
from pathlib import Path
from typing import Any

from qtpy.compat import isalive
from qtpy.QtCore import QTimer, Signal
from qtpy.QtWidgets import QHBoxLayout, QLabel, QVBoxLayout, QWidget

from ..annotation.geometry import normalise_tiling
from ..annotation.model_choice import (
    AUTO,
    MODES,
    EmbeddingRequest,
    ModelEntry,
    Problem,
    check_request,
    default_entry,
    get_entry,
    local_models_problem,
    model_entries,
)
from .form import (
    PairRow,
    PathRow,
    accent,
    add_row,
    button,
    choice,
    collapsible,
    delayed,
    form,
    hint,
    readable_size,
    select,
    set_options,
)
from .layer_events import follow_layers
from .notices import COLOURS
from .tooltips import get_tooltip
from .torch_loading import load_torch

_CHECK_AFTER_MS = 150
_TILE, _HALO = (384, 384), (64, 64)
_MODE_LABELS = {
    AUTO: "auto",
    "amg": "amg – grid of points",
    "ais": "ais – decoder",
    "apg": "apg – decoder, then points",
}


def _tip(name: str) -> str | None:
    return get_tooltip("embedding", name)


def describe_entry(entry: ModelEntry) -> str:
    """Say how large a model is and whether it has to be downloaded."""
    if entry.megabytes is None:
        return f"{entry.size} – file is missing"
    size = readable_size(entry.megabytes)
    return f"{entry.size} – on disk" if entry.on_disk else f"{entry.size} – download {size}"


class _DeviceFinder:
    """Looks for devices in a thread, as that loads torch."""

    def __init__(self):
        self.devices: list[str] | None = None
        if "torch" in sys.modules:
            self._find()
        else:
            threading.Thread(target=self._find, daemon=True).start()

    def _find(self) -> None:
        from ..core.settings import available_devices
        try:
            load_torch()
            self.devices = available_devices()
        except Exception:  # a broken torch is reported when it is used
            self.devices = []


class EmbeddingPanel(QWidget):
    """Asks for image, model and how embeddings are computed; `requested` gives what was asked for, without mistakes.

    Args:
        viewer: A napari viewer, whose image layers are offered.
        mode: `2d`, `3d` or `tracking`; None leaves the axes of the image unchecked.
        show_image: Whether the image can be chosen here. The series annotator chooses it itself.
    """

    requested = Signal(object)
    changed = Signal()

    def __init__(self, viewer: Any = None, mode: str | None = "2d", *, show_image: bool = True):
        super().__init__()
        self.viewer, self.mode = viewer, mode
        self._show_image = show_image
        self._entries: list[ModelEntry] = []
        self._busy = False
        self._check_timer = delayed(self, _CHECK_AFTER_MS, self._show_problems)
        self._build()
        self._connect()
        self.refresh_models()
        self.set_model(default_entry().name)
        self.refresh_layers()
        self._follow_viewer()
        self._find_devices()
        self._on_tiles()
        self._show_problems()

    # Construction

    def _build(self) -> None:
        self.image = choice(tooltip=_tip("image"))
        self.family = choice(tooltip=_tip("model"))
        self.purpose = hint()
        self.section, settings = collapsible("Embedding Settings")
        self.size = choice(tooltip=_tip("model_size"))
        self.device = choice([AUTO], tooltip=_tip("device"))
        self.save_path = PathRow("folder", "automatic cache", tooltip=_tip("embeddings_save_path"))
        self.checkpoint = PathRow(
            "file", "weights of the chosen model", file_filter="Weights (*.pt *.pth *.ckpt);;All files (*)",
            tooltip=_tip("custom_weights"),
        )
        self.tile = PairRow((0, 0), 0, 2048, step=16, special="off", tooltip=_tip("tile_shape"))
        self.halo = PairRow((0, 0), 0, 512, tooltip=_tip("halo"))
        self.segmentation = choice([(_MODE_LABELS[m], m) for m in MODES], tooltip=_tip("automatic_segmentation_mode"))
        self.advice = hint()
        self.use_tiles = button(f"Use tiles of {_TILE[0]} pixels")
        self.problem = QLabel()
        self.problem.setWordWrap(True)
        self.problem.setStyleSheet(f"color: {COLOURS['error']}")
        self.state = hint()
        self.compute = button("Compute Embeddings", tooltip=_tip("run_button"))

        top = form()
        if self._show_image:
            add_row(top, "Image Layer:", self.image)
        add_row(top, "Model:", self.family)
        for text, widget in (
            ("Model size:", self.size),
            ("Device:", self.device),
            ("Save path:", self.save_path),
            ("Custom weights:", self.checkpoint),
            ("Tile shape:", self.tile),
            ("Halo:", self.halo),
            ("Segmentation:", self.segmentation),
        ):
            add_row(settings, text, widget)
        advice = QHBoxLayout()
        advice.addWidget(self.advice, 1)
        advice.addWidget(self.use_tiles)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(top)
        layout.addWidget(self.purpose)
        layout.addWidget(self.section)
        layout.addLayout(advice)
        layout.addWidget(self.problem)
        layout.addWidget(self.compute)
        layout.addWidget(self.state)

    def _connect(self) -> None:
        self.family.currentIndexChanged.connect(self._on_family)
        self.compute.clicked.connect(lambda: self.request())
        self.use_tiles.clicked.connect(self._use_tiles)
        for spin in self.tile.spins:
            spin.editingFinished.connect(self._tidy_tiles)
            spin.valueChanged.connect(self._on_tiles)
        for combo in (self.image, self.family, self.size, self.device, self.segmentation):
            combo.currentIndexChanged.connect(self._on_change)
        for row in (self.save_path, self.checkpoint, self.tile, self.halo):
            row.changed.connect(self._on_change)

    def _follow_viewer(self) -> None:
        if self.viewer is not None:
            follow_layers(self.viewer, self.refresh_layers)

    # Images

    def _image_layers(self) -> list[Any]:
        if self.viewer is None:
            return []
        from napari.layers import Image
        return [layer for layer in self.viewer.layers if isinstance(layer, Image)]

    def refresh_layers(self, *_: Any) -> None:
        """Offer the image layers that there are now; the chosen one stays if it is still there."""
        if not isalive(self):  # the viewer outlives its panels
            return
        before = self.image.currentData()
        set_options(self.image, [(layer.name, layer) for layer in self._image_layers()], before)
        self._on_change()

    # Models

    def refresh_models(self) -> None:
        """Look again at which models there are, and which are on disk."""
        chosen = self.model_name
        self._entries = model_entries()
        names = list(dict.fromkeys(entry.family for entry in self._entries))
        set_options(self.family, names, self.family.currentData())
        self._fill_sizes()
        if chosen is not None:
            self.set_model(chosen)
        problem = local_models_problem()
        self.family.setToolTip("\n\n".join(filter(None, (_tip("model"), problem))))

    def _fill_sizes(self) -> None:
        """Offer the sizes of the family; the chosen size stays if it is there, else the first."""
        entries = [entry for entry in self._entries if entry.family == self.family.currentData()]
        set_options(self.size, [(describe_entry(entry), entry.size) for entry in entries], self.size.currentData())

    @property
    def model_name(self) -> str | None:
        """The name of the chosen model; None before there is one."""
        entry = self._entry
        return None if entry is None else entry.name

    @property
    def _entry(self) -> ModelEntry | None:
        chosen = (self.family.currentData(), self.size.currentData())
        return next((entry for entry in self._entries if (entry.family, entry.size) == chosen), None)

    def set_model(self, name: str) -> None:
        """Choose a model by its name.

        Raises:
            UnknownModelError: If there is no such model.
        """
        entry = get_entry(name)
        select(self.family, entry.family)
        self._fill_sizes()
        select(self.size, entry.size)
        self._show_purpose()

    def _on_family(self, *_: Any) -> None:
        self._fill_sizes()

    def _show_purpose(self) -> None:
        custom = self.checkpoint.path is not None
        self.family.setEnabled(not custom)
        self.size.setEnabled(not custom)
        if custom:
            self.purpose.setText("The type of model is read from the custom weights.")
            return
        entry = self._entry
        if entry is None:
            self.purpose.clear()
            return
        parts = [f"For {entry.purpose}." if entry.purpose else ""]
        if not entry.on_disk and entry.megabytes is not None:
            parts.append(f"{readable_size(entry.megabytes)} will be downloaded once.")
        self.purpose.setText(" ".join(filter(None, parts)))
        licence = f"Licence: {entry.licence}" if entry.licence else ""
        facts = (entry.name, licence, f"Automatic segmentation: {', '.join(entry.modes)}")
        self.purpose.setToolTip("\n".join(filter(None, facts)))

    # Devices

    def _find_devices(self) -> None:
        self._finder = _DeviceFinder()
        self._device_timer = QTimer(self)
        self._device_timer.setInterval(100)
        self._device_timer.timeout.connect(self._fill_devices)
        self._device_timer.start()
        self._fill_devices()

    def _fill_devices(self) -> None:
        if self._finder.devices is not None:
            self._device_timer.stop()
            set_options(self.device, [AUTO, *self._finder.devices], self.device.currentData())

    # Tiles

    def _on_tiles(self, *_: Any) -> None:
        has_tiles = any(self.tile.value)
        self.halo.setEnabled(has_tiles)

    def _tidy_tiles(self) -> None:
        """Show what is really used: squares if one side is missing, at least 256 pixels, a halo of an eighth."""
        tile, _ = normalise_tiling(*self.tile.value)
        had_halo = any(self.halo.value)
        self.tile.value = tile or (0, 0)
        if tile is None:
            self.halo.value = (0, 0)
        elif not had_halo:
            self.halo.value = [side // 8 for side in tile]

    def _use_tiles(self) -> None:
        self.section.expand(animate=False)
        self.tile.value, self.halo.value = _TILE, _HALO

    # Values

    def values(self) -> EmbeddingRequest:
        """Return what is asked for now; `problems` says what is wrong with it."""
        checkpoint = self.checkpoint.path
        tile, halo = normalise_tiling(*self.tile.value, *self.halo.value)
        return EmbeddingRequest(
            image=self.image.currentData() if self._show_image else None,
            model=self.model_name if checkpoint is None else None,
            checkpoint=checkpoint, device=self.device.currentData(), save_path=self.save_path.path,
            tile_shape=tile, halo=halo, mode=self.segmentation.currentData(),
        )

    def set_values(
        self,
        *,
        image: Any = None,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        device: str | None = None,
        save_path: str | Path | None = None,
        tile_shape: tuple[int, int] | None = None,
        halo: tuple[int, int] | None = None,
        mode: str | None = None,
    ) -> None:
        """Show what is used; None resets a field, but for `image`, `model` and `device`, which then stay.

        Raises:
            UnknownModelError: If there is no such model.
        """
        if model is not None:
            self.set_model(model)
        if image is not None:
            select(self.image, image)
        if device is not None:
            if not select(self.device, device):
                self.device.addItem(device, device)
                select(self.device, device)
        self.checkpoint.path, self.save_path.path = checkpoint, save_path
        select(self.segmentation, mode or AUTO)
        self.tile.value, self.halo.value = tile_shape or (0, 0), halo or (0, 0)
        if halo is None:
            self._tidy_tiles()
        self._show_problems()

    def problems(self) -> list[Problem]:
        """Return what is wrong with the present values; see also `Problem.is_error`."""
        found = check_request(self.values(), self.mode if self._show_image else None)
        return [p for p in found if self._show_image or p.field != "image"]

    def request(self) -> EmbeddingRequest | None:
        """Emit `requested` if nothing is wrong, as the button does; otherwise show what is, and return None."""
        self._tidy_tiles()
        if self._busy or self._show_problems():
            return None
        request = self.values()
        self.requested.emit(request)
        return request

    # State

    def set_busy(self, busy: bool) -> None:
        """Whether embeddings are being computed, so that they cannot be asked for."""
        self._busy = busy
        self.compute.setEnabled(not busy)

    def set_next(self, is_next: bool) -> None:
        """Whether embeddings are what the user has to ask for now, before anything else."""
        accent(self.compute, is_next)

    def set_state(self, text: str) -> None:
        """Say which embeddings are there, for example `Ready: vit_b_lm, 512 × 512`."""
        self.state.setText(text)
        self.state.setVisible(bool(text))

    def _on_change(self, *_: Any) -> None:
        self._show_purpose()
        self._check_timer.start()
        self.changed.emit()

    def _show_problems(self) -> bool:
        """Show mistakes and advice; returns whether there are mistakes."""
        self._check_timer.stop()
        found = self.problems()
        errors = [p for p in found if p.is_error]
        advice = next((p for p in found if not p.is_error), None)
        self.problem.setText("\n".join(p.message for p in errors))
        self.problem.setVisible(bool(errors))
        self.advice.setText("" if advice is None or errors else advice.message)
        self.advice.setVisible(bool(self.advice.text()))
        self.use_tiles.setVisible(self.advice.isVisibleTo(self) and not any(self.tile.value))
        self.state.setVisible(bool(self.state.text()))
        return bool(errors)
