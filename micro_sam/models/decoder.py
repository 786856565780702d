"""The UNETR decoder for automatic instance segmentation.

It maps an image embedding to three channels at full resolution: foreground probability, distance to the object's
centre (small at the centre) and inverted distance to its boundary (small deep inside), each in 0…1. The network is
torch-em's UNETR without skip connections to the encoder (Archit et al. 2025, 10.1038/s41592-024-02580-4).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import CheckpointError, InvalidInputError
from ..core.settings import get_device
from .decoder_cpu import decode_sample
from .precision import autocast

Normalization = Literal["instance", "running"]
OUT_CHANNELS = 3
DEFAULT_FEATURES = 64


def _is_transposed(decoder_state: Mapping[str, torch.Tensor]) -> bool:
    return any(key.startswith("decoder.samplers") and ".block." in key for key in decoder_state)


def _load(unetr: nn.Module, decoder_state: Mapping[str, torch.Tensor], flexible: bool) -> None:
    """Copy the decoder's part of the state; keys of the state that the network does not have are ignored."""
    own = {key: value for key, value in unetr.state_dict().items() if not key.startswith("encoder.")}
    missing = [key for key in own if key not in decoder_state]
    wrong = [
        f"{key} ({tuple(decoder_state[key].shape)} instead of {tuple(value.shape)})"
        for key, value in own.items() if key in decoder_state and decoder_state[key].shape != value.shape
    ]
    if missing or wrong:
        parts = ((f"{len(missing)} missing", missing), (f"{len(wrong)} of another shape", wrong))
        problem = "; ".join(
            f"{text}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for text, names in parts if names
        )
        if not flexible:
            raise CheckpointError(
                f"The decoder state does not fit the UNETR decoder ({problem}). Pass the 'decoder_state' of a "
                "micro_sam checkpoint, or flexible_load_checkpoint=True to keep what fits."
            )
        warnings.warn(f"These decoder parameters keep their initial values ({problem}).", stacklevel=3)
    skip = {name.split(" ")[0] for name in wrong}
    state = {key: decoder_state[key].float() for key in own if key in decoder_state and key not in skip}
    unetr.load_state_dict(state, strict=False)


def get_unetr(
    image_encoder: nn.Module,
    decoder_state: Mapping[str, torch.Tensor] | None = None,
    device: str | torch.device | None = None,
    out_channels: int = OUT_CHANNELS,
    flexible_load_checkpoint: bool = False,
    final_activation: str | None = "Sigmoid",
    *,
    initial_features: int | None = None,
) -> nn.Module:
    """Build torch-em's UNETR around a SAM image encoder.

    Args:
        image_encoder: The encoder; it is shared, not copied.
        decoder_state: Decoder weights to load. They also decide whether upsampling is by interpolation or by
            transposed convolutions, and the number of features.
        device: Where to put the whole network, including the encoder.
        out_channels: Number of output channels.
        flexible_load_checkpoint: Whether to warn about missing or unfitting weights instead of raising.
        final_activation: Name of a torch activation, or None.
        initial_features: Number of features of the finest level. By default that of the state, or 64.

    Returns:
        The UNETR in evaluation mode.

    Raises:
        CheckpointError: If the state lacks weights or has weights of another shape.
    """
    from torch_em.model import UNETR

    state = {} if decoder_state is None else decoder_state
    if initial_features is None:
        weight = state.get("out_conv.weight")
        initial_features = DEFAULT_FEATURES if weight is None else weight.shape[1]
    unetr = UNETR(
        backbone="sam", encoder=image_encoder, out_channels=out_channels, use_sam_stats=True,
        final_activation=final_activation, use_skip_connection=False, resize_input=True,
        use_conv_transpose=_is_transposed(state), initial_features=initial_features,
    )
    if decoder_state is not None:
        _load(unetr, state, flexible_load_checkpoint)
    return unetr.to(get_device(device)).eval()


def _upsample(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Upsample by two. The 1x1 convolution commutes with the interpolation and is cheaper before it."""
    if hasattr(module, "conv"):
        x = module.conv(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return module(x)


class DecoderAdapter(nn.Module):
    """The decoder of a UNETR, for inference on precomputed image embeddings.

    The result for one embedding does not depend on the others in its batch. With `normalization="instance"` the
    BatchNorm layers use the statistics of each sample: that is how the published decoders have always been run
    (with one sample at a time), and their thresholds were tuned for it. With `normalization="running"` they use the
    statistics collected in training; decoders that were trained and validated this way say so in their checkpoint.

    Args:
        unetr: The network whose decoder layers to use; they are shared, not copied.
        normalization: `instance` or `running`.
        dtype: What to compute in; None for single precision. Maps are always float32.
    """

    def __init__(
        self, unetr: nn.Module, *, normalization: Normalization = "instance", dtype: torch.dtype | None = None
    ):
        super().__init__()
        if normalization not in ("instance", "running"):
            raise InvalidInputError(f"normalization must be 'instance' or 'running', but got {normalization!r}.")
        self.normalization, self.inference_dtype = normalization, dtype
        self.img_size = unetr.encoder.img_size
        self.base = unetr.base
        self.out_conv = unetr.out_conv
        self.deconv_out = unetr.deconv_out
        self.decoder_head = unetr.decoder_head
        self.final_activation = unetr.final_activation
        self.decoder = unetr.decoder
        self.deconv1, self.deconv2 = unetr.deconv1, unetr.deconv2
        self.deconv3, self.deconv4 = unetr.deconv3, unetr.deconv4
        self.eval()

    def train(self, mode: bool = True) -> "DecoderAdapter":
        """Stay in evaluation mode: inference must never change the statistics."""
        return super().train(False)

    @property
    def out_channels(self) -> int:
        return self.out_conv.out_channels

    def _normalize(self, norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        if self.normalization == "running":
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)

    def _deconv(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        upsample, conv, norm, _ = module.block
        return F.relu(self._normalize(norm, conv(_upsample(upsample, x))))

    @torch.no_grad()
    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` computes before post-processing: maps (B, 3, 16 h, 16 w)."""
        with autocast(self.inference_dtype, x.device):
            if x.device.type == "cpu":
                x = torch.cat([decode_sample(self, sample[None], _upsample) for sample in x])
            else:
                x = self._layers(x)
        return self._activate(x.float())

    @torch.no_grad()
    def layer_by_layer(self, x: torch.Tensor) -> torch.Tensor:
        """The same as one network of plain layers, for export; in the precision of the input."""
        return self._activate(self._layers(x))

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.final_activation is None else self.final_activation(x)

    def _layers(self, x: torch.Tensor) -> torch.Tensor:
        # Both paths advance together, so that no map is kept longer than the next level needs it.
        skip, x = x, self.base(x)
        levels = zip((self.deconv1, self.deconv2, self.deconv3), self.decoder.samplers, self.decoder.blocks)
        for deconv, sampler, block in levels:
            skip = self._deconv(deconv, skip)
            x = _upsample(sampler, x)
            # The skips have twice the channels; the network was defined, and trained, on their central half.
            start = (skip.shape[1] - x.shape[1]) // 2
            x = block(torch.cat([x, skip[:, start:start + x.shape[1]]], dim=1))
        x = torch.cat([_upsample(self.deconv_out, x), self._deconv(self.deconv4, skip)], dim=1)
        return self.out_conv(self.decoder_head(x))

    def postprocess_masks(
        self, masks: torch.Tensor, input_size: Sequence[int], original_size: Sequence[int]
    ) -> torch.Tensor:
        """Map network output to the image: resize to the canvas, cut off the padding, resize to the image.

        Args:
            masks: Network output (B, C, h, w).
            input_size: Shape (height, width) of the resized image on the canvas, without padding.
            original_size: Shape (H, W) of the image.

        Returns:
            The maps (B, C, H, W).
        """
        canvas, original_size = (self.img_size, self.img_size), tuple(original_size)
        if tuple(masks.shape[-2:]) != canvas:
            masks = F.interpolate(masks, canvas, mode="bilinear", align_corners=False)
        masks = masks[..., :input_size[0], :input_size[1]]
        if tuple(masks.shape[-2:]) != original_size:
            masks = F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
        return masks

    @torch.no_grad()
    def forward(
        self, input_: torch.Tensor, input_shape: Sequence[int], original_shape: Sequence[int]
    ) -> torch.Tensor:
        """Decode image embeddings.

        Args:
            input_: Embeddings (B, 256, h, w) of images of one shape.
            input_shape: Shape (height, width) of the resized images, without padding.
            original_shape: Shape (H, W) of the images.

        Returns:
            Float maps (B, 3, H, W): foreground, centre distance, inverted boundary distance.
        """
        return self.postprocess_masks(self._forward_impl(input_), input_shape, original_shape)


def get_decoder(
    image_encoder: nn.Module,
    decoder_state: Mapping[str, torch.Tensor],
    device: str | torch.device | None = None,
    *,
    normalization: Normalization = "instance",
    dtype: torch.dtype | None = None,
) -> DecoderAdapter:
    """Build the decoder for inference from its weights.

    Args:
        image_encoder: The encoder of the model; only its image size and embedding width matter.
        decoder_state: The decoder weights.
        device: Where to put the decoder.
        normalization: How BatchNorm layers normalise, see `DecoderAdapter`.
        dtype: What to compute in, for example that of the predictor; None for single precision.

    Returns:
        The decoder.
    """
    unetr = get_unetr(image_encoder, decoder_state, device)
    return DecoderAdapter(unetr, normalization=normalization, dtype=dtype)
