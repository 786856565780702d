"""Who links the objects of one frame to those of the next: the interface, and how a linker is chosen by name."""

import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.errors import InvalidInputError, ModelError, UnsupportedError, nearest_names
from ..core.progress import Steps
from .lineage import Link
from .motile_linker import MotileLinker
from .objects import Scan
from .trackastra_linker import TRACKASTRA_MODELS, TrackastraLinker

logger = logging.getLogger(__name__)

DEFAULT_TRACKING_MODEL = "general_2d"
LINKING_MODES = ("greedy_nodiv", "greedy", "ilp")


class Linker(Protocol):
    """Links the objects of a time series. Whatever it needs is checked when it is created."""

    name: str

    def link_steps(self, timeseries: np.ndarray, segmentation: np.ndarray, scan: Scan) -> Steps[list[Link]]:
        """Link objects. Yields `Step`.

        Args:
            timeseries: Images (T, Y, X[, C]), may be lazy.
            segmentation: Label images (T, Y, X), may be lazy.
            scan: The objects of each frame and their overlaps.

        Returns:
            Pairs of (frame, label) from an object to one of a later frame. No object has more than one predecessor.
        """
        ...


def get_linker(tracking_model: str | os.PathLike, mode: str = "greedy", device: Any = None) -> Linker:
    """Choose a linker and check that all that it needs is here. Nothing is downloaded.

    Args:
        tracking_model: `motile` links without a model. `general_2d`, `ctc` and `general_2d_w_SAM2_features` are models
            of trackastra, and so is a folder that holds one. For `general_2d`, the default, motile is taken if
            trackastra or the model is not here; a line in the log says so.
        mode: `greedy_nodiv`, `greedy` or `ilp`.
        device: The device for trackastra; None chooses it.

    Raises:
        InvalidInputError: For an unknown name or mode.
        UnsupportedError: If a package is not installed.
        ModelError: If the model is missing or incomplete; says where it belongs and how to get it.
    """
    if mode not in LINKING_MODES:
        raise InvalidInputError(f"The mode of tracking must be one of {', '.join(LINKING_MODES)}, but is {mode!r}.")
    if tracking_model == MotileLinker.name:
        return MotileLinker(mode)
    names = [MotileLinker.name, *TRACKASTRA_MODELS]
    if tracking_model not in names and not isinstance(tracking_model, os.PathLike):
        if not isinstance(tracking_model, str) or not Path(tracking_model).expanduser().is_dir():
            raise InvalidInputError(
                f"There is no tracking model or folder {tracking_model!r}. {nearest_names(tracking_model, names)}"
            )
    try:
        return TrackastraLinker(tracking_model, mode, device)
    except (UnsupportedError, ModelError) as error:
        if tracking_model != DEFAULT_TRACKING_MODEL:
            raise
        logger.warning("Objects are linked by motile instead of trackastra. %s", error)
        return MotileLinker(mode)
