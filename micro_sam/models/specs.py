"""One row per published model. Menus, command line, downloads and documentation read these rows.

Loads no torch. `python -m micro_sam.models.specs` prints the table of `doc/models.md`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core.errors import UnknownModelError, nearest_names

DEFAULT_MODEL = "vit_b_lm"
SHIPPED_MODEL = "vit_t_lite"
SIZE_LABELS = MappingProxyType({"t": "tiny", "b": "base", "l": "large", "h": "huge"})
FAMILY_LABELS = MappingProxyType({
    "": "Natural Images (SAM)",
    "_lm": "Light Microscopy",
    "_em_organelles": "Electron Microscopy",
    "_medical_imaging": "Medical Imaging",
    "_histopathology": "Histopathology",
    "_lite": "Shipped",
})
LOCAL_FAMILY = "Local"

_S3 = "https://uk1s3.embassy.ebi.ac.uk/public-datasets/bioimage.io/"
_OWNCLOUD = "https://owncloud.gwdg.de/index.php/s/"
_FACEBOOK = "https://dl.fbaipublicfiles.com/segment_anything/"

_PROMPTS, _DECODER = ("amg",), ("ais", "apg", "amg")


@dataclass(frozen=True)
class ModelSettings:
    """Thresholds that suit a model; menus start with them.

    `center_distance_thresh` and `boundary_distance_thresh` (0…1), `distance_smoothing` (pixels) and `min_size`
    (pixels) belong to AIS; `pred_iou_thresh`, `stability_score_thresh` (0…1) and `min_object_size` (pixels) to AMG;
    `projection_mode`, `iou_threshold` (0…1) and `box_extension` (fraction of the box) to the propagation of a
    segmentation along z or time. What is None has no value that suits the model in particular.
    """

    center_distance_thresh: float
    boundary_distance_thresh: float
    distance_smoothing: float
    pred_iou_thresh: float | None = None
    stability_score_thresh: float | None = None
    projection_mode: str | None = None
    iou_threshold: float | None = None
    box_extension: float | None = 0.025
    min_size: int | None = 100
    min_object_size: int | None = 100

    def _pick(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def ais(self) -> dict[str, Any]:
        return self._pick("center_distance_thresh", "boundary_distance_thresh", "distance_smoothing", "min_size")

    @property
    def amg(self) -> dict[str, Any]:
        return self._pick("pred_iou_thresh", "stability_score_thresh", "min_object_size")

    @property
    def nd(self) -> dict[str, Any]:
        return self._pick("projection_mode", "iou_threshold", "box_extension")


# The two huge models are not published, but users have weights of that name.
MODEL_SETTINGS: Mapping[str, ModelSettings] = MappingProxyType({
    "vit_t_lm": ModelSettings(0.5, 0.5, 2.0, 0.6, 0.65, "box", 0.8),
    "vit_b_lm": ModelSettings(0.4, 0.5, 2.0, 0.65, 0.7, "box", 0.8),
    "vit_l_lm": ModelSettings(0.4, 0.4, 1.6, 0.65, 0.73, "box", 0.8),
    "vit_h_lm": ModelSettings(0.5, 0.5, 1.4, 0.65, 0.7, "box", 0.8),
    "vit_t_em_organelles": ModelSettings(0.4, 0.5, 1.2, 0.75, 0.75, "single_point", 0.6),
    "vit_b_em_organelles": ModelSettings(0.3, 0.4, 1.2, 0.75, 0.75, "single_point", 0.6),
    "vit_l_em_organelles": ModelSettings(0.3, 0.4, 1.2, 0.8, 0.8, "single_point", 0.6),
    "vit_h_em_organelles": ModelSettings(0.3, 0.4, 1.2, 0.8, 0.8, "single_point", 0.6),
    # Chosen on held-out images of the train split, see the model card; the projection as its masks fill any box.
    "vit_t_lite": ModelSettings(
        0.6, 0.6, 1.0, 0.7, 0.8, "points", box_extension=None, min_size=25, min_object_size=None
    ),
})


@dataclass(frozen=True)
class ModelSpec:
    """What a model is and where its weights are.

    Published models have `url` and `hash` (`xxh128:<hex>`), and `decoder_url` and `decoder_hash` if a file with a
    segmentation decoder belongs to them; the shipped model has `resource`, a path inside the package; a local model
    has `path` and maybe `decoder_path`. `modes` are the segmentation modes that the model was trained for, the best
    one first; a model without `amg` has no trained prompts. `image_size` is the side of the canvas in pixels, None
    if only the file knows. `architecture` is None if it is detected from the weights.
    """

    name: str
    family: str
    purpose: str
    architecture: str | None = None
    modes: tuple[str, ...] = _PROMPTS
    url: str | None = None
    hash: str | None = None
    decoder_url: str | None = None
    decoder_hash: str | None = None
    resource: str | None = None
    path: str | None = None
    decoder_path: str | None = None
    licence: str | None = None
    nickname: str | None = None
    image_size: int | None = 1024
    decoder_in_gui: bool = True

    @property
    def local_path(self) -> Path | None:
        """The file of a model that comes with the package or is the user's own; None for one that is downloaded."""
        if self.path is not None:
            return Path(self.path)
        return None if self.resource is None else Path(__file__).parent.parent / self.resource

    @property
    def size(self) -> str | None:
        """Label of the size: `tiny`, `base`, `large` or `huge`; None if only the file knows."""
        return None if self.architecture is None else SIZE_LABELS[self.architecture[-1]]

    @property
    def has_decoder(self) -> bool:
        """Whether a decoder for automatic instance segmentation belongs to the model."""
        return "ais" in self.modes

    @property
    def has_prompts(self) -> bool:
        """Whether the model was trained to segment from points and boxes."""
        return "amg" in self.modes

    @property
    def settings(self) -> ModelSettings | None:
        """Thresholds that suit the model, if there are any."""
        return MODEL_SETTINGS.get(self.name)

    @property
    def version(self) -> str | None:
        """Label of the published version: `v1` to `v4`, None for models that were published by others."""
        if self.url is None or self.name == "vit_t":
            return None
        match = re.search(r"/1(?:\.(\d))?/files/", self.url)
        if match:
            return f"v{2 + int(match.group(1) or 0)}"
        return "v1" if self.url.startswith(_OWNCLOUD) else None

    @property
    def files(self) -> dict[str, tuple[str, str]]:
        """The files to download: name in the cache -> (url, hash). A decoder's name is `<model>_decoder`."""
        files = {self.name: (self.url, self.hash), f"{self.name}_decoder": (self.decoder_url, self.decoder_hash)}
        return {name: value for name, value in files.items() if value[0] is not None}


def _published(
    name: str, url: str, digest: str, purpose: str, decoder: tuple[str, str] | None = None, **kwargs: Any
) -> ModelSpec:
    decoder_url, decoder_digest = decoder or (None, None)
    return ModelSpec(
        name=name, family=FAMILY_LABELS[name[5:]], purpose=purpose, architecture=name[:5], url=url,
        hash=f"xxh128:{digest}", modes=_DECODER if decoder else _PROMPTS, decoder_url=decoder_url,
        decoder_hash=f"xxh128:{decoder_digest}" if decoder else None, **kwargs,
    )


def _zoo(name: str, nickname: str, version: str, digest: str, decoder_digest: str, purpose: str) -> ModelSpec:
    """A model of the bioimage.io model zoo."""
    base = f"{_S3}{nickname}/{version}/files/{name[:5]}"
    return _published(
        name, f"{base}.pt", digest, purpose, (f"{base}_decoder.pt", decoder_digest), nickname=nickname,
        licence="CC-BY-4.0",
    )


def _owncloud(name: str, url: str, digest: str, decoder_url: str, decoder_digest: str, purpose: str, **kwargs):
    decoder = f"{_OWNCLOUD}{decoder_url}/download", decoder_digest
    return _published(name, f"{_OWNCLOUD}{url}/download", digest, purpose, decoder, **kwargs)


_NATURAL = "everyday photographs; a start for finetuning, or for images that no other model fits"
_LM = "cells, nuclei and other objects in fluorescence, phase contrast and other light microscopy"
_EM = "mitochondria, nuclei and other round organelles in electron microscopy"
_HISTO = "nuclei in stained tissue sections"

MODELS: tuple[ModelSpec, ...] = (
    _published("vit_l", f"{_FACEBOOK}sam_vit_l_0b3195.pth", "a82beb3c660661e3dd38d999cc860e9a", _NATURAL,
               licence="Apache-2.0"),
    _published("vit_h", f"{_FACEBOOK}sam_vit_h_4b8939.pth", "97698fac30bd929c2e6d8d8cc15933c2", _NATURAL,
               licence="Apache-2.0"),
    _published("vit_b", f"{_FACEBOOK}sam_vit_b_01ec64.pth", "6923c33df3637b6a922d7682bfc9a86b", _NATURAL,
               licence="Apache-2.0"),
    _published("vit_t", f"{_OWNCLOUD}TuDzuwVDHd1ZDnQ/download", "8eadbc88aeb9d8c7e0b4b60c3db48bd0", _NATURAL,
               licence="Apache-2.0"),
    _zoo("vit_l_lm", "idealistic-rat", "1.2",
         "017f20677997d628426dec80a8018f9d", "2faeafa03819dfe03e7c46a44aaac64a", _LM),
    _zoo("vit_b_lm", "diplomatic-bug", "1.2",
         "fe9252a29f3f4ea53c15a06de471e186", "708b15ac620e235f90bb38612c4929ba", _LM),
    _zoo("vit_t_lm", "faithful-chicken", "1.1",
         "72ec5074774761a6e5c05a08942f981e", "3e914a5f397b0312cdd36813031f8823", _LM),
    _zoo("vit_l_em_organelles", "humorous-crab", "1.2",
         "810b084b6e51acdbf760a993d8619f2d", "334877640bfdaaabce533e3252a17294", _EM),
    _zoo("vit_b_em_organelles", "noisy-ox", "1.2",
         "f3bf2ed83d691456bae2c3f9a05fb438", "bb6398956a6b0132c26b631c14f95ce2", _EM),
    _zoo("vit_t_em_organelles", "greedy-whale", "1",
         "253474720c497cce605e57c9b1d18fd9", "8f897c7bb93174a4d1638827c4dd6f44", _EM),
    _owncloud("vit_b_histopathology", "sBB4H8CTmIoBZsQ", "ffd1a2cd84570458b257bd95fdd8f974",
              "KO9AWqynI7SFOBj", "6a66194dcb6e36199cbee2214ecf7213", _HISTO),
    _owncloud("vit_l_histopathology", "IZgnn1cpBq2PHod", "b591833c89754271023e901281dee3f2",
              "oIs6VSmkOp7XrKF", "46aab7765d4400e039772d5a50b55c04", _HISTO),
    _owncloud("vit_h_histopathology", "L7AcvVz7DoWJ2RZ", "bd1856dafc156a43fb3aa705f1a6e92e",
              "1qAKxy5H0jgwZvM", "3ed9f87e46ad5e16935bd8d722c8dc47", _HISTO),
    # Annotation tools use only the prompts of this model, as they always have; its decoder is for the command line.
    _owncloud("vit_b_medical_imaging", "f5Ol4FrjPQWfjUF", "40169f1e3c03a4b67bff58249c176d92",
              "ahd3ZhZl2e0RIwz", "9e498b12f526f119b96c88be76e3b2ed",
              "radiology and other medical images", decoder_in_gui=False),
    ModelSpec(
        name=SHIPPED_MODEL, family=FAMILY_LABELS["_lite"], architecture="vit_t", modes=_DECODER,
        image_size=640,
        purpose="nuclei in fluorescence and stained tissue, cells in phase contrast; comes with the package, works "
        "offline",
        resource="models/weights/vit_t_lite.pt", licence="MIT",
    ),
)

_BY_NAME = MappingProxyType({spec.name: spec for spec in MODELS})


def list_models() -> list[str]:
    """Return the exact names of the published models and the shipped one, see `registry.list_models` for all."""
    return list(_BY_NAME)


def get_spec(name: str) -> ModelSpec:
    """Return the row of a published model or the shipped one, see `registry.find_spec` for all.

    Raises:
        UnknownModelError: If there is no such model; names the nearest ones.
    """
    if name not in _BY_NAME:
        raise UnknownModelError(f"There is no model {name!r}. {nearest_names(name, _BY_NAME)}")
    return _BY_NAME[name]


def markdown_table() -> str:
    """Return the table of all models for the documentation."""
    lines = ["| name | family | size | version | modes | licence | bioimage.io | for |", "|" + "---|" * 8]
    for spec in MODELS:
        cells = (
            f"`{spec.name}`", spec.family, spec.size, spec.version, ", ".join(spec.modes), spec.licence,
            spec.nickname, spec.purpose,
        )
        lines.append("| " + " | ".join(cell or "–" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
