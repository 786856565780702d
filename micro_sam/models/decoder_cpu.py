"""The layers of the instance decoder on a CPU: the same maps in less than half of the memory, and as fast.

Maps stay in the memory format of channels last, in which a strip of rows is one piece of memory. Normalising them needs
two numbers per channel of the whole map, but then each row of the result only three rows of the input: so what follows
the statistics runs in strips of rows, and neither concatenated nor normalised maps are ever kept as a whole.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VALUES_PER_STRIP = 2**22  # 16 MiB


def _strips(x: Tensor, n_channels: int | None = None) -> Iterator[tuple[int, int]]:
    """Half-open intervals of rows of maps (1, C, H, W)."""
    height, width = x.shape[-2:]
    step = max(1, _VALUES_PER_STRIP // (width * (n_channels or x.shape[1])))
    return ((start, min(start + step, height)) for start in range(0, height, step))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C) of each channel of maps (1, C, H, W): those of strips, combined in double precision."""
    count, mean, squares = 0, 0.0, 0.0
    for start, stop in _strips(x):
        strip = x[:, :, start:stop].to(torch.promote_types(x.dtype, torch.float32))
        n = strip.shape[2] * strip.shape[3]
        own_mean = strip.mean((2, 3), keepdim=True)
        own_squares = (strip - own_mean).square_().sum((0, 2, 3)).double()
        difference = own_mean.flatten().double() - mean
        squares = squares + own_squares + difference.square() * (count * n / (count + n))
        mean = mean + difference * (n / (count + n))
        count += n
    return mean, squares / count


def _affine(x: Tensor, norm: nn.Module, running: bool) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, C, 1, 1) with which a normalisation layer changes maps.

    InstanceNorm always uses the statistics of the sample, BatchNorm the stored ones if `running`.
    """
    if running and isinstance(norm, nn.BatchNorm2d):
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    else:
        mean, variance = _moments(x)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return scale.to(dtype).view(1, -1, 1, 1), shift.to(dtype).view(1, -1, 1, 1)


def _normalized_convolution(
    parts: Sequence[Tensor], norm: nn.Module, conv: nn.Conv2d, then: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Normalise maps as if they were concatenated, convolve them (3 x 3 pixels), ReLU, and what comes `then`."""
    affine = [_affine(part, norm, running=False) for part in parts]
    height, width = parts[0].shape[-2:]
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    result = None
    for start, stop in _strips(parts[0], conv.in_channels):
        top, bottom = max(start - 1, 0), min(stop + 1, height)
        # With a row above and one below, which are zero outside of the map.
        strip = parts[0].new_empty((1, stop - start + 2, width, conv.in_channels)).permute(0, 3, 1, 2)
        if top == start:
            strip[:, :, 0] = 0
        if bottom == stop:
            strip[:, :, -1] = 0
        inside = strip[:, :, top - start + 1:bottom - start + 1]
        for piece, part, (scale, shift) in zip(inside.split([p.shape[1] for p in parts], dim=1), parts, affine):
            torch.addcmul(shift, part[:, :, top:bottom], scale, out=piece)
        out = F.conv2d(strip, weight, conv.bias, padding=(0, 1)).relu_()
        if then is not None:
            out = then(out)
        if result is None:
            result = out.new_empty((1, height, width, out.shape[1])).permute(0, 3, 1, 2)
        result[:, :, start:stop] = out
    return result


def _conv_block(block: nn.Module, parts: list[Tensor], then: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """torch-em's ConvBlock2d, twice normalisation, convolution and ReLU; empties the list of its inputs."""
    first_norm, first_conv, _, second_norm, second_conv, _ = block.block
    x = _normalized_convolution(parts, first_norm, first_conv)
    parts.clear()
    return _normalized_convolution([x], second_norm, second_conv, then)


def decode_sample(decoder: nn.Module, x: Tensor, upsample: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Decode one embedding (1, 256, h, w) into maps (1, 3, 16 h, 16 w) before the final activation.

    Args:
        decoder: A `DecoderAdapter`.
        x: The embedding.
        upsample: Applies one of its upsampling layers.
    """
    running = decoder.normalization == "running"

    def deconv(module: nn.Module, x: Tensor) -> Tensor:
        sampler, conv, norm, _ = module.block
        x = conv(upsample(sampler, x))
        scale, shift = _affine(x, norm, running)
        return torch.addcmul(shift, x, scale, out=x).relu_()

    x = x.contiguous(memory_format=torch.channels_last)
    # Both paths advance together, so that no map is kept longer than the next level needs it.
    skip, x = x, _conv_block(decoder.base, [x])
    levels = zip((decoder.deconv1, decoder.deconv2, decoder.deconv3), decoder.decoder.samplers, decoder.decoder.blocks)
    for module, sampler, block in levels:
        skip = deconv(module, skip)
        x = upsample(sampler, x)
        # The skips have twice the channels; the network was defined, and trained, on their central half.
        start = (skip.shape[1] - x.shape[1]) // 2
        parts = [x, skip[:, start:start + x.shape[1]]]
        del x
        x = _conv_block(block, parts)
    skip = deconv(decoder.deconv4, skip)
    parts = [upsample(decoder.deconv_out, x), skip]
    del x, skip
    return _conv_block(decoder.decoder_head, parts, then=decoder.out_conv)
