"""A very small SAM and reference computations for the tests of embeddings; importable by their subprocesses."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer


@pytest.fixture(autouse=True)
def one_thread():
    """For so small a model several threads mostly wait for each other. Active in the modules that import it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_predictor(size: int = 64, seed: int = 0) -> SamPredictor:
    """A predictor around a random SAM for images of `size`; features are (256, size / 16, size / 16)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageEncoderViT(size, 16, 3, 32, 1, 2, use_rel_pos=True)
        torch.nn.init.normal_(encoder.pos_embed, std=0.5)
        prompts = PromptEncoder(256, (size // 16,) * 2, (size,) * 2, 16)
        decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(1, 256, 4, 64))
        predictor = SamPredictor(Sam(encoder, prompts, decoder).eval().requires_grad_(False))
    predictor.model_type, predictor.model_name, predictor._hash = "vit_b", "small", f"xxh128:{seed:032}"
    return predictor


def reference_image(image: np.ndarray) -> np.ndarray:
    """The normalisation of spec section 6, written down step by step: (Y, X[, C]) to uint8 (Y, X, 3)."""
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if image.shape[-1] == 1:
        image = np.concatenate([image] * 3, axis=-1)
    if image.shape[-1] == 2:
        image = np.concatenate([image, np.zeros_like(image[..., :1])], axis=-1)
    image = image[..., :3].astype("float32")
    image = image - image.min(axis=(0, 1), keepdims=True)
    image = image / (image.max(axis=(0, 1), keepdims=True) + np.float32(1e-7))
    return (image * np.float32(255)).astype("uint8")


def reference_features(predictor: SamPredictor, block: np.ndarray) -> np.ndarray:
    """Features (256, h, w) by SAM's own `set_image`."""
    other = SamPredictor(predictor.model)
    other.set_image(reference_image(block))
    return other.features[0].numpy()


def example(shape, seed: int = 0, dtype="uint8") -> np.ndarray:
    """Smooth random structure over the whole range of an integer dtype."""
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(seed)
    sigma = [0 if s <= 4 else 3 for s in shape]
    values = gaussian_filter(rng.standard_normal(shape), sigma)
    values = (values - values.min()) / (values.max() - values.min())
    return (values * (np.iinfo(dtype).max - 1)).astype(dtype)
