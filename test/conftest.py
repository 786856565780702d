"""What the tests share: a tiny random model and small real images. No network and no published weights."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_decoder, get_unetr

DATA = Path(__file__).parent / "data"
TINY_SIZE = 256
TINY_FEATURES = 8

torch.set_num_threads(min(torch.get_num_threads(), 2))


def _randomize(network: torch.nn.Module) -> torch.nn.Module:
    """Give parameters that start as zeros or ones, and running statistics, values that make mistakes visible."""
    for name, value in network.named_parameters():
        if name.endswith(("attention_biases", "bias", "rel_pos_h", "rel_pos_w", "pos_embed")):
            torch.nn.init.normal_(value, std=0.05)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.05)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return network


def _calibrate(encoder: torch.nn.Module) -> torch.nn.Module:
    """Fit running statistics to random images: otherwise each layer shrinks what differs between images to nothing."""
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        encoder.train()(torch.nn.functional.interpolate(torch.randn(4, 3, 32, 32), TINY_SIZE, mode="bilinear"))
    for norm in norms:
        norm.momentum = 0.1
    return encoder.eval()


@pytest.fixture(scope="session")
def tiny_sam():
    """A `vit_t` SAM with seeded random weights for images of 256 x 256: embeddings are (B, 256, 16, 16)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = _randomize(build_sam("vit_t", image_size=TINY_SIZE)).eval().requires_grad_(False)
        _calibrate(sam.image_encoder)
        return sam


@pytest.fixture
def tiny_predictor(tiny_sam):
    """A fresh predictor, with the attributes of `get_sam_model`, around the shared tiny model."""
    predictor = SamPredictor(tiny_sam)
    predictor.model_type = "vit_t"
    predictor.model_name = "tiny"
    predictor._hash = "xxh128:" + "0" * 32
    predictor.checkpoint_path = None
    return predictor


@pytest.fixture(scope="session")
def tiny_decoder_state(tiny_sam):
    """Random weights of a slim decoder that fits `tiny_sam`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unetr = get_unetr(tiny_sam.image_encoder, device="cpu", initial_features=TINY_FEATURES)
        _randomize(torch.nn.ModuleList(m for name, m in unetr.named_children() if name != "encoder"))
    state = unetr.state_dict()
    return {key: value.clone() for key, value in state.items() if not key.startswith("encoder.")}


@pytest.fixture(scope="session")
def tiny_decoder(tiny_sam, tiny_decoder_state):
    """A decoder with random weights that fits `tiny_sam`."""
    return get_decoder(tiny_sam.image_encoder, tiny_decoder_state, "cpu")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_sam, tiny_decoder_state, tmp_path_factory):
    """Path of a file with the `model_state` and `decoder_state` of the tiny model."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    settings = {"model_type": "vit_t", "image_size": TINY_SIZE}
    content = {"model_state": tiny_sam.state_dict(), "decoder_state": tiny_decoder_state, "settings": settings}
    torch.save(content | {"decoder_settings": {"normalization": "instance"}}, path)
    return path


@pytest.fixture
def cells_image() -> np.ndarray:
    """Fluorescence nuclei, (Y, X) 128 x 160, uint8."""
    return imageio.imread(DATA / "nuclei.png")


@pytest.fixture
def cells_labels() -> np.ndarray:
    """The objects of `cells_image`, (Y, X), uint16, 0 is background."""
    return imageio.imread(DATA / "nuclei_labels.tif")


@pytest.fixture
def rgb_image() -> np.ndarray:
    """Stained tissue, (Y, X, RGB) 128 x 160 x 3, uint8."""
    return imageio.imread(DATA / "tissue_rgb.png")


@pytest.fixture(autouse=True)
def _own_cache_directory(tmp_path_factory, monkeypatch):
    """Tests never touch the user's cache directory and settings."""
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path_factory.getbasetemp() / "cache"))
    file = tmp_path_factory.getbasetemp() / "no" / "settings.json"
    monkeypatch.setattr("micro_sam.core.settings.user_settings_file", lambda: file)
    for variable in ("MICROSAM_MODELS", "MICROSAM_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
