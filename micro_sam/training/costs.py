"""Estimates of memory and time of a training, from operations counted per part of the network.

One encoder pass per image is assumed, a backward pass that costs twice the forward pass, and activations of one round
of prompts at a time. All images are scaled to the canvas of the model, so the patch shape does not matter.
"""

import time
from dataclasses import dataclass

from ..core.errors import UnknownModelError, nearest_names

# Forward pass in GFLOP (two per multiply-add) at 1024 x 1024 pixels.
_ENCODER = {"vit_t": 78.0, "vit_b": 972.0, "vit_l": 2986.0, "vit_h": 5950.0}
_MASK_DECODER_PER_OBJECT = 3.7
_INSTANCE_DECODER = 822.0
_BACKWARD = 2.0

# Memory in 10**9 bytes, fitted to the 35 (encoder frozen) to 49 GB reported for vit_b with two images, 25 objects
# and 8 rounds of prompts; other encoders in proportion to depth x width.
_PARAMETERS = {"vit_t": 10e6, "vit_b": 94e6, "vit_l": 312e6, "vit_h": 641e6}
_ENCODER_MEMORY = {"vit_t": 2.0, "vit_b": 6.3, "vit_l": 16.8, "vit_h": 28.0}
_MEMORY_PER_PROMPT = 0.075
_INSTANCE_DECODER_MEMORY = 2.5
_INSTANCE_DECODER_PARAMETERS = 9.6e6
# Share of the activations of encoder and decoder that are kept if the others are computed again: 8.2 instead of 13.6 GB
# were measured for vit_b with one image.
_KEPT_ACTIVATIONS = 0.4
_BYTES_PER_PARAMETER = 16  # weight, gradient and two moments of Adam in float32

_PROBE_SIZE = 1024
_PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Costs:
    """Estimated costs of a training: bytes, forward GFLOP per image; for decoder-only training no prompts count.

    `repeated_gflop` are those that are computed a second time in the backward pass, to need less memory.
    """

    memory_bytes: float
    forward_gflop: float
    repeated_gflop: float = 0.0

    @property
    def training_gflop(self) -> float:
        """Forward and backward pass of one image."""
        return self.forward_gflop * (1 + _BACKWARD) + self.repeated_gflop


def estimate_costs(
    model_type: str,
    batch_size: int = 1,
    n_objects_per_batch: int | None = 25,
    n_sub_iteration: int = 8,
    with_segmentation_decoder: bool = True,
    train_instance_segmentation_only: bool = False,
    *,
    image_size: int = 1024,
    decoder_features: int = 64,
    checkpoint_encoder: bool = False,
) -> Costs:
    """Estimate memory and operations of a training.

    Args:
        model_type: Name of a model; its first five characters are the architecture.
        batch_size: Images per batch.
        n_objects_per_batch: Objects per image; None counts as 25.
        n_sub_iteration: Rounds of prompts per image.
        with_segmentation_decoder: Whether the instance decoder is trained.
        train_instance_segmentation_only: Whether only it and the encoder are trained.
        image_size: Side of the canvas of the model in pixels.
        decoder_features: Features of the finest level of the instance decoder.
        checkpoint_encoder: Whether encoder and instance decoder are computed twice, to need less memory.

    Returns:
        The estimate.

    Raises:
        UnknownModelError: For an unknown architecture.
    """
    architecture = model_type[:5]
    if architecture not in _ENCODER:
        hint = nearest_names(model_type, _ENCODER)
        raise UnknownModelError(f"The costs of the model {model_type!r} are not known. {hint}")
    n_objects = 0 if train_instance_segmentation_only else n_objects_per_batch or 25
    with_decoder = with_segmentation_decoder or train_instance_segmentation_only
    area, width = (image_size / 1024) ** 2, with_decoder * decoder_features / 64
    networks = area * (_ENCODER[architecture] + width**2 * _INSTANCE_DECODER)
    prompts = area * n_objects * n_sub_iteration * _MASK_DECODER_PER_OBJECT
    parameters = _PARAMETERS[architecture] + width**2 * _INSTANCE_DECODER_PARAMETERS
    kept = _KEPT_ACTIVATIONS if checkpoint_encoder else 1.0
    per_image = area * (
        kept * (_ENCODER_MEMORY[architecture] + width * _INSTANCE_DECODER_MEMORY) + n_objects * _MEMORY_PER_PROMPT
    )
    return Costs(
        parameters * _BYTES_PER_PARAMETER + batch_size * per_image * 1e9, networks + prompts,
        networks if checkpoint_encoder else 0.0,
    )


def computes_twice(checkpoint_encoder: bool | None, model_type: str, device) -> bool:
    """What `checkpoint_encoder=None` stands for.

    That is True on a CPU for encoders larger than ViT-T: other programs need its memory, too, and a ViT-B with the
    decoder takes 8 GB instead of 13 for an eighth more time.
    """
    if checkpoint_encoder is not None:
        return checkpoint_encoder
    import torch

    return torch.device(device).type == "cpu" and not model_type.startswith("vit_t")


def measure_speed(device) -> float:
    """Measure the speed of a device in GFLOP per second, by matrix products for a fraction of a second."""
    import torch

    x = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device) / _PROBE_SIZE

    def multiply() -> None:
        (x @ x).sum().item()  # waits for the device

    multiply()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < _PROBE_SECONDS:
        multiply()
        n += 1
    elapsed = time.perf_counter() - start
    return n * 2 * _PROBE_SIZE**3 / elapsed / 1e9


def available_memory(device) -> int:
    """Free memory of a device in bytes."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
