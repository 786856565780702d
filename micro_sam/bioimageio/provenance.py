"""What a package says about a model: licence, citations, tags, documentation, environment and cover picture."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from skimage.segmentation import find_boundaries

from .._version import __version__
from ..core.errors import InvalidInputError, MissingFileError
from ..core.normalize import percentile_range, to_image
from ..models.specs import SHIPPED_MODEL, ModelSpec

_SAM = {"text": "Kirillov et al. 2023, Segment Anything", "doi": "10.48550/arXiv.2304.02643"}
_MICRO_SAM = {
    "text": "Archit et al. 2025, Segment Anything for Microscopy, Nature Methods",
    "doi": "10.1038/s41592-024-02580-4",
}
_MOBILE_SAM = {
    "text": "Zhang et al. 2023, Faster Segment Anything: Towards Lightweight SAM for Mobile Applications",
    "doi": "10.48550/arXiv.2306.14289",
}
_SHIPPED_DATA = (
    {"text": "Caicedo et al. 2019, Nucleus segmentation across imaging experiments, Nature Methods (training data)",
     "doi": "10.1038/s41592-019-0612-7"},
    {"text": "Tsai et al. 2019, Usiigaci, SoftwareX (training data)", "doi": "10.1016/j.softx.2019.02.007"},
)
_TAGS = ("segment-anything", "instance-segmentation", "2d", "pytorch")
_PANEL = 512  # pixels
_OUTLINE, _BOX = (255, 220, 0), (0, 200, 255)


def citations(architecture: str, spec: ModelSpec | None) -> list[dict[str, str]]:
    """The works that a model builds on: entries with `text` and `doi`."""
    entries = [_SAM, _MICRO_SAM] + ([_MOBILE_SAM] if architecture == "vit_t" else [])
    return entries + (list(_SHIPPED_DATA) if spec is not None and spec.name == SHIPPED_MODEL else [])


def default_tags(spec: ModelSpec | None) -> list[str]:
    """Tags that are true of each model, and those of the family of a published one."""
    families = {
        "_lm": ("fluorescence-light-microscopy", "cells", "nuclei"),
        "_em_organelles": ("electron-microscopy", "mitochondria"),
        "_histopathology": ("whole-slide-imaging", "nuclei", "tissue"),
        "_lite": ("fluorescence-light-microscopy", "nuclei"),
    }
    return [*_TAGS, *(families.get(spec.name[5:], ()) if spec is not None else ())]


def default_authors(spec: ModelSpec | None) -> list[dict[str, str]]:
    """The authors of the model that ships; nobody is named for the models of others."""
    return [{"name": "The micro_sam developers"}] if spec is not None and spec.name == SHIPPED_MODEL else []


def environment() -> dict[str, Any]:
    """A conda environment in which the package was tested; versions are fixed as far as results depend on them."""
    def installed(package: str) -> str:
        return metadata.version(package).partition("+")[0]

    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "name": "sam", "channels": ["conda-forge", "nodefaults"],
        "dependencies": [
            f"python =={python}.*", f"pytorch =={installed('torch')}", f"torchvision =={installed('torchvision')}",
            f"numpy =={installed('numpy')}", f"micro_sam >={__version__}",
        ],
    }


def documentation(
    text: str | None, name: str, description: str, spec: ModelSpec | None, facts: Mapping[str, Any]
) -> str:
    """The text of `documentation.md`: what is given, the card of the model that ships, or what is known.

    Args:
        text: What is given.
        name: The name of the package.
        description: What the model is for.
        spec: The row of a published or shipped model.
        facts: What the network is, by name.
    """
    if text is None:
        card = None if spec is None or spec.local_path is None else spec.local_path.with_suffix(".md")
        if card is not None and spec.resource is not None:
            # Pictures are not part of the package.
            text = re.sub(r"(?m)^!\[[^\]]*\]\([^)]*\)\n?", "", card.read_text(encoding="utf-8"))
        else:
            text = f"# {name}\n\n{description}\n"
    parts = [text.rstrip(), _usage(facts)]
    if not re.search("#.*[vV]alidation", text):
        parts.append(_VALIDATION)
    return "\n\n".join(parts) + "\n"


def given_text(given: str | os.PathLike | None) -> str | None:
    """Return a text that is passed as such, or as the path of a file (`.md`).

    Raises:
        MissingFileError: If it names a file that does not exist.
    """
    if given is None:
        return None
    if isinstance(given, str) and ("\n" in given or not given.endswith(".md")):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Pass the documentation as text, or the path of a .md file.")
    return path.read_text(encoding="utf-8")


def _usage(facts: Mapping[str, Any]) -> str:
    known = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return (
        f"## The package\n\n{known}\n\n"
        "Inputs besides the image are optional. Boxes, points (with labels) and masks can be combined and are for the "
        "same objects; coordinates are pixels of the image in the order x, y. Without them "
        + ("all objects of the image are segmented." if facts.get("automatic segmentation") == "yes"
           else "one mask is predicted, of whatever the model holds for an object.")
        + "\n\nWith micro_sam, `micro_sam.bioimageio.import_model(path)` makes the model available by name in the "
        "annotation tools, on the command line and in Python."
    )


_VALIDATION = (
    "## Validation\n\nCompare the segmentation of images that were not used for training with labels of all their "
    "objects, for example by the mean segmentation accuracy: `micro_sam.evaluate --labels FOLDER --predictions FOLDER`."
    " Look at images of each kind that the model is to be used for."
)


def check_covers(covers: Sequence[str | os.PathLike] | str | os.PathLike | None) -> list[Path] | None:
    """Return the paths of pictures, or None if there are none.

    Raises:
        MissingFileError: If one does not exist.
        InvalidInputError: If one has a suffix that bioimage.io does not take.
    """
    if covers is None:
        return None
    paths = [Path(c).expanduser() for c in ([covers] if isinstance(covers, str | os.PathLike) else covers)]
    for path in paths:
        if not path.is_file():
            raise MissingFileError(f"There is no cover picture {path}. Check the path.")
        if path.suffix.lower() not in (".gif", ".jpeg", ".jpg", ".png", ".svg"):
            raise InvalidInputError(f"Covers must be gif, jpeg, png or svg files, but {path} is not.")
    return paths


def cover_picture(
    image: np.ndarray, mask: np.ndarray, box: Sequence[int], instances: np.ndarray | None = None
) -> Image.Image:
    """A picture of what the model does: the first object with its box; and beside it all objects, if they are known.

    Args:
        image: Image (Y, X, 3), uint8.
        mask: The object (Y, X).
        box: Its box x0, y0, x1, y1.
        instances: Labels (Y, X) of all objects.

    Returns:
        A square picture of 512 pixels, or two beside each other, of the part of the image around the object.
    """
    lo, hi = percentile_range([image], image[..., 0].size, channels=True)
    enhanced = to_image(image, (lo, hi))
    x0, y0, x1, y1 = (int(v) for v in box)
    side = min(image.shape[:2])
    top, left = (
        int(np.clip((start + stop - side) // 2, 0, size - side))
        for start, stop, size in ((y0, y1, image.shape[0]), (x0, x1, image.shape[1]))
    )
    window, scale = (slice(top, top + side), slice(left, left + side)), _PANEL / side
    panels = [_panel(enhanced[window], mask[window])]
    corners = [(v - o) * scale for v, o in zip((x0, y0, x1, y1), (left, top, left, top))]
    ImageDraw.Draw(panels[0]).rectangle(corners, outline=_BOX, width=3)
    if instances is not None and instances.any():
        panels.append(_panel(enhanced[window], instances[window]))
    picture = Image.new("RGB", (_PANEL * len(panels), _PANEL))
    for k, panel in enumerate(panels):
        picture.paste(panel, (k * _PANEL, 0))
    return picture


def _panel(image: np.ndarray, labels: np.ndarray) -> Image.Image:
    """The image at the size of a panel with the outlines of objects."""
    size = (_PANEL, _PANEL)
    picture = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    enlarged = np.array(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    picture[find_boundaries(enlarged, mode="thick")] = _OUTLINE
    return Image.fromarray(picture)
