"""The settings panel: where models and embeddings are kept, how much of them, and how exactly models compute."""

import os
from pathlib import Path

from qtpy.QtWidgets import QHBoxLayout, QVBoxLayout, QWidget

from ..annotation.task import Task
from ..core.errors import MicroSamError, OutputWriteError
from ..core.progress import Step, Steps
from ..core.settings import PRECISION_VARIABLE, get_cache_directory, get_precision, write_user_settings
from ..embeddings.cache import SIZE_VARIABLE, auto_cache_directory, auto_cache_limit, evict, folder_size
from .form import PathRow, add_row, button, choice, form, hint, number, readable_size, select
from .jobs import JobRunner
from .notices import NoticeLine
from .tooltips import get_tooltip

CACHE_VARIABLE = "MICROSAM_CACHEDIR"
_PRECISIONS = (("exact", "float32"), ("half, where it is faster", "auto"), ("half", "bfloat16"))


def _tip(name: str) -> str | None:
    return get_tooltip("settings", name)


def _measure() -> Task[tuple[int, int], tuple[int, int]]:
    """The number of automatic caches and their size in bytes."""
    folder = auto_cache_directory()

    def steps() -> Steps[tuple[int, int]]:
        yield Step(0, 1, "Look at the cache")
        n = len(list(folder.glob("*.zarr"))) if folder.is_dir() else 0
        return n, folder_size(folder)

    return Task("Look at the cache", steps, lambda found: found, uses_model=False)


def _clear() -> Task[int, int]:
    """Delete the automatic caches that nobody writes; gives their number."""
    def steps() -> Steps[int]:
        yield Step(0, 1, "Delete embeddings")
        return len(evict(limit=0))

    return Task("Delete embeddings", steps, lambda n: n, uses_model=False)


class SettingsWidget(QWidget):
    """Shows and keeps the settings. What an environment variable says has precedence and cannot be changed here."""

    def __init__(self):
        super().__init__()
        self.runner = JobRunner(self)
        self.runner.failed.connect(lambda job, error: self.notice.show_error(error))
        self._build()
        self.update_button.clicked.connect(self.update_settings)
        self.clear_button.clicked.connect(self._ask)
        self.really_button.clicked.connect(self.clear_cache)
        self.keep_button.clicked.connect(lambda: self._show_question(False))
        self.refresh()

    def _build(self) -> None:
        self.folder = PathRow("folder", tooltip=_tip("cache_directory"))
        self.folder_hint = hint()
        self.cap = number(20, 0, 100000, step=5, decimals=1, tooltip=_tip("cache_size"))
        self.cap.setSuffix(" GB")
        self.cap_hint = hint()
        self.precision = choice(_PRECISIONS, tooltip=_tip("precision"))
        self.precision_hint = hint()
        self.update_button = button("Update Settings", tooltip=_tip("run_button"))
        self.size = hint("…")
        self.clear_button = button("Clear…", tooltip=_tip("clear_cache"))
        self.really_button, self.keep_button = button("Delete"), button("Keep")
        self.notice = NoticeLine()

        fields = form()
        add_row(fields, "Cache directory:", self.folder)
        fields.addRow(self.folder_hint)
        add_row(fields, "Keep embeddings up to:", self.cap)
        fields.addRow(self.cap_hint)
        add_row(fields, "Precision:", self.precision)
        fields.addRow(self.precision_hint)
        cache = QHBoxLayout()
        cache.addWidget(self.size, 1)
        for widget in (self.clear_button, self.really_button, self.keep_button):
            cache.addWidget(widget)
        layout = QVBoxLayout(self)
        layout.addLayout(fields)
        layout.addWidget(self.update_button)
        layout.addLayout(cache)
        layout.addWidget(self.notice)
        layout.addStretch(1)
        self._show_question(False)

    def refresh(self) -> None:
        """Show what holds now."""
        self.folder.path = get_cache_directory()
        try:
            self.cap.setValue(auto_cache_limit() / 1e9)
            select(self.precision, get_precision())
        except MicroSamError as error:
            self.notice.show_error(error)
        for variable, field, label in (
            (CACHE_VARIABLE, self.folder, self.folder_hint), (SIZE_VARIABLE, self.cap, self.cap_hint),
            (PRECISION_VARIABLE, self.precision, self.precision_hint),
        ):
            is_fixed = bool(os.environ.get(variable))
            field.setEnabled(not is_fixed)
            label.setText(f"Set by the environment variable {variable}." if is_fixed else "")
            label.setVisible(is_fixed)
        self.update_button.setEnabled(any(f.isEnabled() for f in (self.folder, self.cap, self.precision)))
        self.runner.start(_measure(), key="size", on_done=self._show_size)

    def _show_size(self, found: tuple[int, int]) -> None:
        n, size = found
        images = "1 image" if n == 1 else f"{n} images"
        self.size.setText(f"Embeddings of {images}: {readable_size(size / 1e6)}" if n else "No embeddings are kept.")
        self.clear_button.setEnabled(n > 0)

    def update_settings(self) -> bool:
        """Keep what is entered; returns whether that worked."""
        before, chosen = get_cache_directory(), self.folder.path
        try:
            if self.folder.isEnabled():
                _check_folder(chosen)
                write_user_settings(cache_directory=None if chosen is None else str(chosen.absolute()))
            if self.cap.isEnabled():
                write_user_settings(embedding_cache_gb=self.cap.value())
            if self.precision.isEnabled():
                chosen_precision = self.precision.currentData()
                write_user_settings(precision=None if chosen_precision == "float32" else chosen_precision)
        except MicroSamError as error:
            self.notice.show_error(error)
            return False
        if get_cache_directory() == before:
            self.notice.success("The settings are kept.")
        else:
            self.notice.success(f"The settings are kept. Models that were downloaded before stay in {before}.")
        self.refresh()
        return True

    def _show_question(self, ask: bool) -> None:
        self.clear_button.setVisible(not ask)
        self.really_button.setVisible(ask)
        self.keep_button.setVisible(ask)

    def _ask(self) -> None:
        self._show_question(True)

    def clear_cache(self) -> None:
        """Delete all automatic embeddings."""
        self._show_question(False)
        self.clear_button.setEnabled(False)
        self.runner.start(_clear(), key="clear", on_done=self._on_cleared)

    def _on_cleared(self, n: int) -> None:
        self.notice.success("The embeddings of 1 image were deleted." if n == 1 else
                            f"The embeddings of {n} images were deleted.")
        self.refresh()


def _check_folder(path: Path | None) -> None:
    if path is None:
        return
    if path.is_file():
        raise OutputWriteError(f"{path} is a file. Choose a folder.")
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
    if existing is None or not os.access(existing, os.W_OK):
        raise OutputWriteError(f"{path} cannot be written. Choose a folder of your own.")


def settings_widget() -> SettingsWidget:
    """Make the settings panel."""
    return SettingsWidget()
