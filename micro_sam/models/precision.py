"""Inference in half precision, where the hardware is faster in it.

Products and convolutions run in half precision (torch's autocast); weights stay in single precision, and embeddings,
maps, logits and scores are given back in it. Networks do not change: the precision is that of the predictor and of the
decoder that use them. Prompts are always embedded in single precision, as half of it does not tell neighbouring pixels
apart.
"""

import contextlib

import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor

from ..core.settings import get_precision

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86, x86 and ARM, as torch names them


def gains_from_half_precision(device: str | torch.device) -> bool:
    """Whether a device computes faster in half precision: GPUs with CUDA, CPUs with bfloat16 instructions.

    oneDNN also offers bfloat16 to CPUs that have AVX-512 without them, where it is emulated and several times slower
    than single precision. Torch before 2.11 does not tell the instructions, so that it computes in single precision.
    """
    device = torch.device(device)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
        return any(capabilities.get(name) for name in _BFLOAT16_INSTRUCTIONS) and bool(is_supported())
    return device.type == "cuda"


def inference_dtype(precision: str | None, device: str | torch.device) -> torch.dtype | None:
    """Return the type that a device computes in; None for single precision.

    Args:
        precision: `float32`, `bfloat16`, `auto` (half precision where the device gains from it: bfloat16, or float16
            on GPUs without it), or None for the user's choice, see `micro_sam.core.settings.get_precision`.
        device: The device.

    Raises:
        InvalidInputError: For another precision.
    """
    precision = get_precision(precision)
    if precision == "auto" and gains_from_half_precision(device):
        is_old_gpu = torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if is_old_gpu else torch.bfloat16
    return torch.bfloat16 if precision == "bfloat16" else None


def autocast(dtype: torch.dtype | None, device: str | torch.device) -> contextlib.AbstractContextManager:
    """Compute in half precision on a device; with None as always."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)


def precision_of(predictor: SamPredictor) -> torch.dtype | None:
    """The type that a predictor computes in; None for single precision."""
    return getattr(predictor, "inference_dtype", None)


class MixedPrecisionPredictor(SamPredictor):
    """A predictor that computes in half precision; prompts of segment_anything's own methods in single precision.

    Args:
        sam_model: The network.
        dtype: `torch.bfloat16` or `torch.float16`.
    """

    def __init__(self, sam_model: Sam, dtype: torch.dtype):
        super().__init__(sam_model)
        self.inference_dtype = dtype

    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """As in segment_anything; the features are float32."""
        with autocast(self.inference_dtype, self.device):
            super().set_torch_image(transformed_image, original_image_size)
        self.features = self.features.float()
