"""Linking with trackastra, a transformer that was trained on many kinds of cells, if it and its model are here.

See Gallusser and Weigert 2024, ECCV, arXiv:2405.15700. Models are never downloaded from here.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ModelError, UnsupportedError
from ..core.progress import Step, Steps
from ..core.settings import get_device
from .lineage import Link
from .objects import Scan, read_frame

TRACKASTRA_MODELS = ("general_2d", "ctc", "general_2d_w_SAM2_features")
_FILES = ("config.yaml", "train_config.yaml", "model.pt")
_NEEDS = {"general_2d_w_SAM2_features": ("trackastra_pretrained_feats", "trackastra-pretrained-feats")}


def find_trackastra_model(model: str | os.PathLike, mode: str) -> Path:
    """Return the folder of a model of trackastra, after checking that all that it needs is here.

    Args:
        model: One of `TRACKASTRA_MODELS`, or a folder with `config.yaml`, `train_config.yaml` and `model.pt`.
        mode: How to link; `ilp` needs the package motile.

    Raises:
        UnsupportedError: If a package is not installed.
        ModelError: If the model is missing or incomplete; says where it belongs and how to get it.
    """
    needed = [("trackastra", "trackastra"), *([("motile", "motile")] if mode == "ilp" else [])]
    needed += [_NEEDS[model]] if model in _NEEDS else []
    for module, package in needed:
        if find_spec(module) is None:
            raise UnsupportedError(
                f"Tracking with the model {str(model)!r} and mode {mode!r} needs the package {package}, which is not "
                f"installed. Install it (pip install {package}), or choose a linker that needs no model: "
                "tracking_model='motile'."
            )
    if model not in TRACKASTRA_MODELS:
        folder, advice = Path(model).expanduser(), "Pass the folder of a model"
    else:
        from platformdirs import user_data_dir  # like trackastra itself

        folder = Path(user_data_dir("trackastra")) / "models" / model
        advice = (
            f"It is not downloaded automatically. Run trackastra.model.Trackastra.from_pretrained({model!r}) once on a "
            f"computer with network, or unpack {model}.zip of the trackastra models, so that the files lie in {folder}"
        )
    bad = [name for name in _FILES if not (folder / name).is_file() or (folder / name).stat().st_size == 0]
    if bad:
        raise ModelError(
            f"The tracking model {str(model)!r} is not complete: {', '.join(bad)} missing or empty in {folder}. "
            f"{advice}, or choose a linker that needs no model: tracking_model='motile'."
        )
    return folder


class TrackastraLinker:
    """Links with trackastra.

    Args:
        model: One of `TRACKASTRA_MODELS`, or the folder of a model.
        mode: `greedy`, `greedy_nodiv` or `ilp`.
        device: The device; None chooses it.

    Raises:
        UnsupportedError, ModelError: See `find_trackastra_model`.
    """

    name = "trackastra"

    def __init__(self, model: str | os.PathLike, mode: str, device: Any = None):
        self.folder = find_trackastra_model(model, mode)
        self.mode = mode
        self.device = str(get_device(device)).partition(":")[0]  # it knows no indices

    def link_steps(self, timeseries: np.ndarray, segmentation: np.ndarray, scan: Scan) -> Steps[list[Link]]:
        """Link objects, see `Linker`. Images are averaged over channels."""
        yield Step(0, 1, "Link objects with trackastra")
        links: list[Link] = []
        if segmentation.shape[0] > 1:
            links = self._link(timeseries, segmentation, scan)
        yield Step(1, 1, "Link objects with trackastra")
        return links

    def _link(self, timeseries, segmentation, scan: Scan) -> list[Link]:
        from tqdm import tqdm

        with _same_logging():
            from trackastra.model import Trackastra
        # It uses dtypes that torch knows; positions in the table of objects are small whatever the labels are.
        labels = np.zeros(segmentation.shape, dtype=np.int32)
        images = np.zeros(segmentation.shape, dtype=np.float32)
        for t, objects in enumerate(scan.objects):
            frame, image = read_frame(segmentation, t), np.asarray(timeseries[t])
            inside = frame != 0
            labels[t][inside] = 1 + np.searchsorted(objects.labels, frame[inside].astype(np.int64))
            images[t] = image if image.ndim == 2 else image.mean(axis=-1)
        model = Trackastra.from_folder(self.folder, device=self.device)
        graph, _ = model.track(images, labels, mode=self.mode, progbar_class=partial(tqdm, disable=True))

        def node(key) -> tuple[int, int]:
            t, position = int(graph.nodes[key]["time"]), int(graph.nodes[key]["label"])
            return t, int(scan.objects[t].labels[position - 1])

        return [(node(source), node(target)) for source, target in graph.edges]


@contextmanager
def _same_logging() -> Iterator[None]:
    """Keep the logging of the application as it is: importing trackastra sets it up anew."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
