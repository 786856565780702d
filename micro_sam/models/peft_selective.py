"""Parameter-efficient finetuning without new layers: some parameters of a block are trained, the others are not."""

from collections.abc import Sequence

import torch
from torch import nn

from ..core.errors import PeftError

__all__ = ["AttentionSurgery", "BiasSurgery", "ClassicalSurgery", "LayerNormSurgery", "SelectiveSurgery"]


class SelectiveSurgery(nn.Module):
    """Base of the methods that select parameters of a block by their names.

    Args:
        block: The transformer block. `PEFT_Sam` has frozen all of its parameters before.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def allow_gradient_update_for_parameters(
        self, prefix: Sequence[str] | None = None, suffix: Sequence[str] | None = None,
        infix: Sequence[str] | None = None,
    ) -> None:
        """Let the parameters be trained whose names, relative to the block, match in any way.

        Args:
            prefix: What the names start with.
            suffix: What the names end with.
            infix: What the names contain.

        Raises:
            PeftError: If no parameter matches.
        """
        prefix, suffix, infix = tuple(prefix or ()), tuple(suffix or ()), tuple(infix or ())
        matching = [
            value for name, value in self.block.named_parameters()
            if name.startswith(prefix) or name.endswith(suffix) or any(part in name for part in infix)
        ]
        if not matching:
            raise PeftError(
                f"{type(self).__name__} found no parameter to train in {type(self.block).__name__} (names that start "
                f"with {list(prefix)}, end with {list(suffix)} or contain {list(infix)}). Pass a transformer block."
            )
        for value in matching:
            value.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return self.block(x)


class AttentionSurgery(SelectiveSurgery):
    """Trains the attention: all parameters whose names start with `attn`.

    Touvron et al. 2022, "Three things everyone should know about Vision Transformers" (arXiv:2203.09795).
    """

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.allow_gradient_update_for_parameters(prefix=["attn"])


class BiasSurgery(SelectiveSurgery):
    """Trains the biases: all parameters whose names end with `bias`.

    Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models" (arXiv:2106.10199).
    """

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.allow_gradient_update_for_parameters(suffix=["bias"])


class LayerNormSurgery(SelectiveSurgery):
    """Trains the layer normalisations: `norm1` and `norm2` of ViT, `attn.norm` and `mlp.norm` of TinyViT.

    Basu et al. 2023, "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning" (arXiv:2304.01917).
    """

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.allow_gradient_update_for_parameters(prefix=["attn.norm.", "mlp.norm."], infix=["norm1", "norm2"])


class ClassicalSurgery(SelectiveSurgery):
    """Trains everything in the block: finetuning of the chosen blocks only."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.allow_gradient_update_for_parameters(prefix=[""])
