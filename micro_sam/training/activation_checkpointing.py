"""Less memory for training, for more time.

The activations inside of each block of the networks are computed again in the backward pass instead of being kept
(Chen et al. 2016, arXiv:1604.06174).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import InvalidInputError


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an image encoder: of a ViT, or of each stage of a TinyViT."""
    stages = [encoder] if hasattr(encoder, "blocks") else list(getattr(encoder, "layers", ()))
    return [block for stage in stages for block in getattr(stage, "blocks", ())]


def _decoder_blocks(unetr: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder, as far as known: at the finest level their maps are the largest of all."""
    children = dict(unetr.named_children())
    names = ("deconv1", "deconv2", "deconv3", "deconv4", "decoder_head")
    return [*getattr(children.get("decoder"), "blocks", ()), *(children[name] for name in names if name in children)]


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers leave their running statistics alone: they were updated in the forward pass."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, n_batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, n_batches


@contextlib.contextmanager
def checkpointed(encoder: nn.Module, unetr: nn.Module | None = None) -> Iterator[None]:
    """Keep only the inputs of blocks in forward passes with gradients.

    Args:
        encoder: The image encoder.
        unetr: The network with the segmentation decoder, if there is one.

    Raises:
        InvalidInputError: If the encoder has no blocks that are known.
    """
    blocks = _blocks(encoder)
    if not blocks:
        raise InvalidInputError(
            f"checkpoint_encoder needs an encoder made of blocks, but {type(encoder).__name__} has none. Leave it out."
        )
    if unetr is not None:
        blocks += _decoder_blocks(unetr)
    originals = [block.forward for block in blocks]

    def saving(block, forward):
        def run(*inputs):
            if not torch.is_grad_enabled():
                return forward(*inputs)
            return checkpoint(
                forward, *inputs, use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(block)),
            )
        return run

    for block, forward in zip(blocks, originals):
        block.forward = saving(block, forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
