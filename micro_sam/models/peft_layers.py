"""The layers of parameter-efficient finetuning, each installed into one transformer block of an image encoder.

They work for the blocks of SAM's ViT and for those of TinyViT. The two differ in three ways: the output of TinyViT's
`qkv` is grouped per head, its linear layers are called `fc1` and `fc2`, and its MLP holds its own normalisation.
Names of parameters and forward formulas are those of files that users already have.

Layers that can be folded into the weights have a method `merged`, which returns the parameters of the layer that they
replaced.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import InvalidInputError, PeftError, UnsupportedError, nearest_names, require_positive_int
from .tiny_vit import WindowAttention

__all__ = [
    "AdaptFormer", "AttentionLoRA", "FacTSurgery", "LoRASurgery", "MLPLoRA", "SSFSurgery", "ScaleShiftLayer",
]

_MATRICES = ("q", "k", "v", "mlp")


def _require_block(block: nn.Module, method: str) -> None:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if attn is None or mlp is None or not hasattr(attn, "qkv"):
        raise PeftError(
            f"{method} changes the attention and the MLP of a transformer block, but {type(block).__name__} has none. "
            "Pass a block of SAM's ViT, or an attention block of TinyViT (its first stage only has convolutions)."
        )
    if not isinstance(attn.qkv, nn.Linear) or not all(isinstance(m, nn.Linear) for m in _linears(mlp) or (None,)):
        raise PeftError(
            f"{method} cannot be added to a block that already has layers of parameter-efficient finetuning. Load "
            "the base model, or merge what was trained with micro_sam.models.adapters.merge_adapter."
        )


def _linears(mlp: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(getattr(mlp, name) for name in ("lin1", "lin2", "fc1", "fc2") if hasattr(mlp, name))


def _heads_of_layout(block: nn.Module) -> int | None:
    """The number of heads if the output of `qkv` is grouped per head (TinyViT), None for [q | k | v] (ViT)."""
    return block.attn.num_heads if isinstance(block.attn, WindowAttention) else None


def add_to_qkv(qkv: torch.Tensor, parts: Mapping[str, torch.Tensor], heads: int | None) -> torch.Tensor:
    """Add to queries, keys or values in place.

    Args:
        qkv: (…, 3C): [q | k | v], or for each head its [q | k | v].
        parts: `q`, `k` or `v` to what is added, (…, C).
        heads: The number of heads if the values are grouped per head.
    """
    grouped = qkv.unflatten(-1, (3, -1) if heads is None else (heads, 3, -1))
    for name, part in parts.items():
        target = grouped[..., "qkv".index(name), :]
        target += part if heads is None else part.unflatten(-1, (heads, -1))
    return qkv


def _like(layer: nn.Module, reference: nn.Linear) -> nn.Module:
    """Move a new layer to where the layer is that it belongs to. Quantised weights have no usable data type."""
    weight = reference.weight
    return layer.to(weight.device, weight.dtype if weight.is_floating_point() else None)


def _product(*factors: nn.Linear) -> torch.Tensor:
    """The matrix of linear layers that are applied one after the other, the last first; in double precision."""
    return torch.linalg.multi_dot([f.weight.detach().double() for f in factors])


def _plain_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    if not all(value.is_floating_point() for value in state.values()):
        raise UnsupportedError(
            "Quantised weights cannot be merged. Restore them with micro_sam.util.export_custom_qlora_model first."
        )
    return state


def _merge_qkv(qkv: nn.Linear, parts: Mapping[str, torch.Tensor], heads: int | None) -> dict[str, torch.Tensor]:
    state = _plain_state(qkv)
    weight = state["weight"]
    # Column by column, the matrix (3C, C) is an output of the layer.
    merged = add_to_qkv(weight.double().T.contiguous(), {name: part.T for name, part in parts.items()}, heads).T
    return state | {"weight": merged.to(weight.dtype).contiguous()}


class AttentionLoRA(nn.Module):
    """Low-rank updates of a block's `attn.qkv`: qkv = W x, plus B A x for queries, keys or values.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685). It starts as the identity.

    Args:
        rank: The rank r of the updates.
        block: The block; it is not changed.
        update_matrices: Which of `q`, `k` and `v` are updated.
    """

    def __init__(self, rank: int, block: nn.Module, update_matrices: Sequence[str] = ("q", "v")):
        super().__init__()
        require_positive_int("rank", rank)
        self.qkv_proj = block.attn.qkv
        self.heads = _heads_of_layout(block)
        self.names = tuple(name for name in "qkv" if name in update_matrices)
        width = self.qkv_proj.in_features
        for name in self.names:
            setattr(self, f"w_a_linear_{name}", _like(nn.Linear(width, rank, bias=False), self.qkv_proj))
            setattr(self, f"w_b_linear_{name}", _like(nn.Linear(rank, width, bias=False), self.qkv_proj))
        self.reset_parameters()

    def _pairs(self) -> dict[str, tuple[nn.Linear, nn.Linear]]:
        return {name: (getattr(self, f"w_a_linear_{name}"), getattr(self, f"w_b_linear_{name}")) for name in self.names}

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero."""
        for a, b in self._pairs().values():
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, C) to (…, 3C)."""
        return add_to_qkv(self.qkv_proj(x), {name: b(a(x)) for name, (a, b) in self._pairs().items()}, self.heads)

    def merged(self) -> dict[str, torch.Tensor]:
        """The weight and bias of one linear layer that does the same."""
        return _merge_qkv(self.qkv_proj, {name: _product(b, a) for name, (a, b) in self._pairs().items()}, self.heads)


def _normalize(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What enters the first linear layer: TinyViT's MLP normalises, ViT's gets its input normalised."""
    return mlp.norm(x) if hasattr(mlp, "norm") else x


def _activate(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.act(x) if hasattr(mlp, "act") else F.gelu(x)


class MLPLoRA(nn.Module):
    """Low-rank updates of both linear layers of an MLP: h = act(lin1(x) + B1 A1 x), then lin2(h) + B2 A2 h.

    Args:
        rank: The rank of the updates.
        mlp_layer: The MLP of a block; it is not changed.
    """

    def __init__(self, rank: int, mlp_layer: nn.Module):
        super().__init__()
        require_positive_int("rank", rank)
        self.mlp_layer = mlp_layer
        for i, linear in enumerate(_linears(mlp_layer), start=1):
            setattr(self, f"w_a_linear_{i}", _like(nn.Linear(linear.in_features, rank, bias=False), linear))
            setattr(self, f"w_b_linear_{i}", _like(nn.Linear(rank, linear.out_features, bias=False), linear))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices A anew and set the matrices B to zero."""
        for i in (1, 2):
            nn.init.kaiming_uniform_(getattr(self, f"w_a_linear_{i}").weight, a=math.sqrt(5))
            nn.init.zeros_(getattr(self, f"w_b_linear_{i}").weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, C) to (…, C)."""
        mlp = self.mlp_layer
        first, second = _linears(mlp)
        x = _normalize(mlp, x)
        x = _activate(mlp, first(x) + self.w_b_linear_1(self.w_a_linear_1(x)))
        return second(x) + self.w_b_linear_2(self.w_a_linear_2(x))

    def merged(self) -> dict[str, torch.Tensor]:
        """The parameters of an MLP without LoRA that does the same."""
        state = _plain_state(self.mlp_layer)
        names = [name for name, module in self.mlp_layer.named_children() if isinstance(module, nn.Linear)]
        for i, name in enumerate(names, start=1):
            weight = state[f"{name}.weight"]
            update = _product(getattr(self, f"w_b_linear_{i}"), getattr(self, f"w_a_linear_{i}"))
            state[f"{name}.weight"] = (weight.double() + update).to(weight.dtype)
        return state


class LoRASurgery(nn.Module):
    """Installs `AttentionLoRA`, and `MLPLoRA` if `mlp` is among the matrices, into a block.

    Args:
        rank: The rank of the updates.
        block: The transformer block; it is changed.
        update_matrices: Some of `q`, `k`, `v` and `mlp`.

    Raises:
        InvalidInputError: For an unknown matrix.
        PeftError: If the block has no attention, or has been changed before.
    """

    def __init__(self, rank: int, block: nn.Module, update_matrices: Sequence[str] = ("q", "v")):
        super().__init__()
        check_update_matrices(update_matrices)
        _require_block(block, "LoRA")
        block.attn.qkv = AttentionLoRA(rank, block, update_matrices)
        if "mlp" in update_matrices:
            block.mlp = MLPLoRA(rank, block.mlp)
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the changed block."""
        return self.block(x)


def check_update_matrices(update_matrices: Any) -> None:
    """Raise `InvalidInputError` unless these are some of q, k, v and mlp."""
    if isinstance(update_matrices, str) or not update_matrices or set(update_matrices) - set(_MATRICES):
        raise InvalidInputError(
            f"update_matrices must be a list with some of {', '.join(_MATRICES)}, but is {update_matrices!r}."
        )


class FacTSurgery(nn.Module):
    """Factorised updates of queries and values that share their outer matrices: V S_q U x and V S_v U x.

    It takes the place of `attn.qkv`. Jie & Deng 2023, "FacT: Factor-Tuning for Lightweight Adaptation on Vision
    Transformer" (AAAI, arXiv:2212.03145). V starts as zero, so that it starts as the identity.

    Args:
        rank: The rank of the updates.
        block: The transformer block; it is changed.
        dropout: Probability of dropout before V, in training. None for no dropout.
    """

    def __init__(self, rank: int, block: nn.Module, dropout: float | None = 0.1):
        super().__init__()
        require_positive_int("rank", rank)
        _require_block(block, "FacT")
        self.qkv_proj = block.attn.qkv
        self.heads = _heads_of_layout(block)
        width = self.qkv_proj.in_features
        self.FacTu = _like(nn.Linear(width, rank, bias=False), self.qkv_proj)
        self.FacTv = _like(nn.Linear(rank, width, bias=False), self.qkv_proj)
        self.q_FacTs = _like(nn.Linear(rank, rank, bias=False), self.qkv_proj)
        self.v_FacTs = _like(nn.Linear(rank, rank, bias=False), self.qkv_proj)
        self.dropout = nn.Dropout(0.0 if dropout is None else dropout)
        nn.init.zeros_(self.FacTv.weight)
        block.attn.qkv = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, C) to (…, 3C)."""
        u = self.FacTu(x)
        parts = {
            "q": self.FacTv(self.dropout(self.q_FacTs(u))), "v": self.FacTv(self.dropout(self.v_FacTs(u))),
        }
        return add_to_qkv(self.qkv_proj(x), parts, self.heads)

    def merged(self) -> dict[str, torch.Tensor]:
        """The weight and bias of one linear layer that does the same."""
        parts = {
            "q": _product(self.FacTv, self.q_FacTs, self.FacTu), "v": _product(self.FacTv, self.v_FacTs, self.FacTu),
        }
        return _merge_qkv(self.qkv_proj, parts, self.heads)


class ScaleShiftLayer(nn.Module):
    """A layer, then a scale and a shift for each of its output channels. It starts as the identity.

    Args:
        layer: The layer.
        dim: Its number of output channels. They are the last axis, or the axis 1 if the last has another length.
    """

    def __init__(self, layer: nn.Module, dim: int):
        super().__init__()
        self.layer = layer
        reference = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        self.scale = nn.Parameter(torch.ones(dim, dtype=reference.dtype, device=reference.device))
        self.shift = nn.Parameter(torch.zeros(dim, dtype=reference.dtype, device=reference.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer; scale and shift its channels."""
        y, dim = self.layer(x), self.scale.numel()
        if y.shape[-1] == dim:
            return y * self.scale + self.shift
        if y.ndim > 1 and y.shape[1] == dim:
            shape = (-1, *[1] * (y.ndim - 2))
            return y * self.scale.view(shape) + self.shift.view(shape)
        raise InvalidInputError(
            f"The layer gave values of shape {tuple(y.shape)}, but {dim} channels were expected on the last axis or "
            "on axis 1."
        )

    def merged(self) -> dict[str, torch.Tensor]:
        """The parameters of the layer, if it is linear or a normalisation, with scale and shift folded in."""
        if not isinstance(self.layer, nn.Linear | nn.LayerNorm) or self.layer.bias is None:
            raise UnsupportedError(f"Scale and shift cannot be merged into {self.layer}: it has no bias of its own.")
        state = _plain_state(self.layer)
        scale, shift = self.scale.detach().double(), self.shift.detach().double()
        weight, bias = state["weight"], state["bias"]
        state["weight"] = (weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        state["bias"] = (bias.double() * scale + shift).to(bias.dtype)
        return state


class SSFSurgery(nn.Module):
    """Scales and shifts the features after each linear and normalisation layer of a block.

    Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning" (NeurIPS,
    arXiv:2210.08823). It starts as the identity. Unlike in the paper, the patch embedding is not adapted: it belongs
    to no block, and training it would keep the activations of all blocks in memory, also of those that are not
    adapted. No file has parameters for it.

    Args:
        rank: Not used by this method.
        block: The transformer block; it is changed.
    """

    def __init__(self, rank: int | None, block: nn.Module):
        super().__init__()
        _require_block(block, "SSF")
        parents = (block, block.attn, block.mlp)
        for parent in parents:
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, ScaleShiftLayer(layer, layer.out_features))
                elif isinstance(layer, nn.LayerNorm):
                    setattr(parent, name, ScaleShiftLayer(layer, layer.normalized_shape[0]))
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the changed block."""
        return self.block(x)


class AdaptFormer(nn.Module):
    """A bottleneck beside the MLP: α Up(drop(ReLU(Down n))) + mlp(x), where n is the normalised input of the MLP.

    It takes the place of `mlp`. Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual
    Recognition" (NeurIPS, arXiv:2205.13535). It starts as the identity, because Up starts as zero. Versions 1 of
    micro_sam added n to the result: `add_input` does that for their files. Other files have the value
    `mlp.input_is_not_added`, so that neither formula can be mistaken for the other.

    Args:
        rank: Not used by this method, see `projection_size`.
        block: The transformer block; it is changed.
        alpha: `learnable_scalar` (starts at 1), or a number.
        dropout: Probability of dropout before Up, in training. None for no dropout.
        projection_size: Width of the bottleneck.
        add_input: Whether to add n, as files of versions 1 need it.
    """

    def __init__(
        self, rank: int | None, block: nn.Module, alpha: str | float = "learnable_scalar",
        dropout: float | None = None, projection_size: int = 64, *, add_input: bool = False,
    ):
        super().__init__()
        require_positive_int("projection_size", projection_size)
        check_alpha(alpha)
        _require_block(block, "AdaptFormer")
        first, _ = _linears(block.mlp)
        self.mlp_proj = block.mlp
        self.down_proj = _like(nn.Linear(first.in_features, projection_size), first)
        self.up_proj = _like(nn.Linear(projection_size, first.in_features), first)
        self.alpha = nn.Parameter(self.up_proj.weight.new_ones(1)) if isinstance(alpha, str) else float(alpha)
        self.dropout = nn.Dropout(0.0 if dropout is None else dropout)
        self.add_input = add_input
        if not add_input:
            self.register_buffer("input_is_not_added", torch.ones(1, dtype=torch.bool, device=first.weight.device))
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for value in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(value)
        block.mlp = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, C) to (…, C)."""
        normalized = _normalize(self.mlp_proj, x)
        beside = self.alpha * self.up_proj(self.dropout(F.relu(self.down_proj(normalized))))
        if self.add_input:
            beside = beside + normalized
        return beside + self.mlp_proj(x)

    def merged(self) -> dict[str, torch.Tensor]:
        """Raise: no MLP of the same size does the same."""
        raise UnsupportedError(
            "AdaptFormer cannot be merged into the weights, because its bottleneck is not linear. Keep the adapter, "
            "or finetune with LoRA, FacT or SSF."
        )


def check_alpha(alpha: Any) -> None:
    """Raise `InvalidInputError` unless this is `learnable_scalar` or a number."""
    if isinstance(alpha, str) and alpha != "learnable_scalar":
        raise InvalidInputError(
            f"alpha must be a number or 'learnable_scalar', but is {alpha!r}. "
            + nearest_names(alpha, ["learnable_scalar"])
        )
    if not isinstance(alpha, str | int | float) or isinstance(alpha, bool):
        raise InvalidInputError(f"alpha must be a number or 'learnable_scalar', but is {alpha!r}.")
