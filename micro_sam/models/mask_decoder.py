"""SAM's mask decoder for many prompts on one image: the same masks, with less than half of the arithmetic.

The decoder of segment_anything repeats the image embedding for every prompt. Here

- what does not depend on the prompt (the projections of the image in the first attention layer) is computed once;
- afterwards the few prompt tokens are multiplied into the projection weights instead of projecting the many image
  tokens (`(x W) k = x (W k)`), which is exact in real numbers and costs half as much or less for up to 16 tokens;
- the upscaling (transposed convolutions of stride = kernel) runs as matrix products on the token layout, without
  permuting the image.

`predict_low_res` is the entry point: prompts in, low-resolution logits and predicted IoUs out. Results agree with
`SamPredictor.predict_torch` to float32 rounding. Decoders of another structure, and prompts of more than 16 tokens,
go through the model's own code.
"""

import math
import weakref

import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling.mask_decoder import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn

from ..core.allocator import reusing_memory
from ..core.errors import InvalidInputError, NotInitializedError
from .precision import autocast, precision_of

MAX_TOKENS = 16  # beyond it, folding the tokens into the weights costs more than it saves
_grids = weakref.WeakKeyDictionary()  # prompt encoder -> (what it depends on, its positional encoding of the image)
# Prompts that are computed together on the CPU, so that their activations stay near the caches; fewer if each has an
# image of its own, because masks or maps of the prompts are added to it.
_CPU_CHUNK, _CPU_IMAGES = 8, 4


def shared_part(dense_embeddings: Tensor) -> Tensor:
    """Dense embeddings of prompts (B, C, h, w) as (1, C, h, w) if they are one that is repeated."""
    return dense_embeddings[:1] if dense_embeddings.stride(0) == 0 else dense_embeddings


def supports_sharing(decoder: nn.Module) -> bool:
    """Whether `decoder` has the structure that `predict_masks_shared` computes."""
    if type(decoder) is not MaskDecoder or type(decoder.transformer) is not TwoWayTransformer:
        return False
    if any(type(layer) is not TwoWayAttentionBlock for layer in decoder.transformer.layers):
        return False
    attentions = [m for m in decoder.transformer.modules() if isinstance(m, Attention)]
    linears = [getattr(a, name) for a in attentions for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    upscaling = decoder.output_upscaling
    convs = [m for m in upscaling if isinstance(m, nn.ConvTranspose2d)]
    return (
        all(type(m) is nn.Linear for m in linears)
        and len(upscaling) == 5
        and len(convs) == 2
        and all(conv.kernel_size == conv.stride == (2, 2) and conv.padding == (0, 0) for conv in convs)
    )


def _heads(weight: Tensor, attention: Attention) -> Tensor:
    """Split the output dimension of a projection by head: (H * c, C) -> (H, c, C)."""
    return weight.reshape(attention.num_heads, -1, *weight.shape[1:])


def _split(x: Tensor, attention: Attention) -> Tensor:
    """(B, T, H * c) -> (B, H, T, c)."""
    return x.reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)


def _tokens_to_image(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of tokens (B, T, C) to the image; `keys` and `values` (B or 1, N, C) are not projected yet."""
    b, t, _ = tokens.shape
    q = _split(attention.q_proj(tokens), attention) / math.sqrt(attention.internal_dim // attention.num_heads)
    # The bias of k_proj adds the same number to all logits of a token: the softmax does not see it.
    folded = q @ _heads(attention.k_proj.weight, attention)
    if keys.shape[0] == 1:
        logits = folded.reshape(-1, folded.shape[-1]) @ keys[0].T
        mixed = logits.softmax(-1) @ values[0]
    else:
        logits = torch.bmm(folded.reshape(b, -1, folded.shape[-1]), keys.transpose(1, 2))
        mixed = torch.bmm(logits.softmax(-1), values)
    mixed = mixed.reshape(b, attention.num_heads, t, -1)
    out = mixed @ _heads(attention.v_proj.weight, attention).transpose(1, 2)
    out = out.transpose(1, 2).reshape(b, t, -1) + attention.v_proj.bias
    return attention.out_proj(out)


def _image_to_tokens(attention: Attention, image: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Attention of the image (B or 1, N, C), not projected yet, to tokens (B, T, C); returns (B, N, C)."""
    b, t, _ = tokens.shape
    n = image.shape[1]
    k = _split(attention.k_proj(tokens), attention) / math.sqrt(attention.internal_dim // attention.num_heads)
    folded = k @ _heads(attention.q_proj.weight, attention)
    bias = k @ _heads(attention.q_proj.bias, attention)[..., None]
    # Logits have the image last, so that the softmax over the few tokens is computed along contiguous memory.
    if image.shape[0] == 1:
        logits = (folded.reshape(-1, folded.shape[-1]) @ image[0].T).reshape(b, attention.num_heads, t, n)
    else:
        logits = torch.bmm(folded.reshape(b, -1, folded.shape[-1]), image.transpose(1, 2))
        logits = logits.reshape(b, attention.num_heads, t, n)
    weights = logits.add_(bias).softmax(2).reshape(b, -1, n)
    v = _split(attention.v_proj(values), attention)
    out_weight = _heads(attention.out_proj.weight.T, attention)
    mixed = (v @ out_weight).reshape(b, -1, out_weight.shape[-1])
    return torch.bmm(weights.transpose(1, 2), mixed).add_(attention.out_proj.bias)


def _block(
    layer: TwoWayAttentionBlock, queries: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
) -> tuple[Tensor, Tensor]:
    if layer.skip_first_layer_pe:
        queries = layer.self_attn(q=queries, k=queries, v=queries)
    else:
        q = queries + token_pe
        queries = queries + layer.self_attn(q=q, k=q, v=queries)
    queries = layer.norm1(queries)

    keys = image + image_pe
    queries = queries + _tokens_to_image(layer.cross_attn_token_to_image, queries + token_pe, keys, image)
    queries = layer.norm2(queries)
    queries = layer.norm3(queries + layer.mlp(queries))
    update = _image_to_tokens(layer.cross_attn_image_to_token, keys, queries + token_pe, queries)
    return queries, layer.norm4(update.add_(image))


def _upscale(upscaling: nn.Sequential, image: Tensor) -> Tensor:
    """Apply the upscaling to tokens (B, N, C): (B, N, 2 * 2, 2 * 2, c), the last two pairs being (y, x) offsets."""
    first, norm, activation, second, last_activation = upscaling

    def unfold(conv, x):
        # weight (C, c, ky, kx) -> (ky, kx, c) outputs per token
        weight = conv.weight.permute(2, 3, 1, 0).reshape(-1, conv.in_channels)
        # The bias is added in place, as `linear` would first copy it into the whole result.
        return F.linear(x, weight).add_(conv.bias.repeat(4)).reshape(*x.shape[:-1], 4, conv.out_channels)

    x = unfold(first, image)
    x = activation(F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps))
    return last_activation(unfold(second, x))


def predict_masks_shared(
    decoder: MaskDecoder,
    image_embedding: Tensor,
    image_pe: Tensor,
    sparse_embeddings: Tensor,
    dense_embedding: Tensor,
    multimask_output: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what `decoder(...)` computes for B prompts.

    Args:
        decoder: A mask decoder for which `supports_sharing` holds.
        image_embedding: (1, C, h, w).
        image_pe: Positional encoding (1, C, h, w).
        sparse_embeddings: Embedded points and boxes (B, P, C).
        dense_embedding: The embedded masks (B, C, h, w), or what is the same for all prompts, as what stands for "no
            mask" is: (1, C, h or 1, w or 1).
        multimask_output: Whether to return the multi-mask outputs or the single-mask output.

    Returns:
        Logits (B, M, 4 * h, 4 * w) and predicted IoUs (B, M).
    """
    h, w = image_embedding.shape[-2:]
    transformer = decoder.transformer
    image = (image_embedding + dense_embedding).flatten(2).transpose(1, 2).contiguous()
    pe = image_pe.flatten(2).transpose(1, 2).contiguous()

    b = sparse_embeddings.shape[0]
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens[None].expand(b, -1, -1), sparse_embeddings], dim=1)

    queries = tokens
    for layer in transformer.layers:
        queries, image = _block(layer, queries, image, tokens, pe)
    attended = _tokens_to_image(transformer.final_attn_token_to_image, queries + tokens, image + pe, image)
    queries = transformer.norm_final_attn(queries + attended)

    selected = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
    hyper = torch.stack([decoder.output_hypernetworks_mlps[m](queries[:, 1 + m]) for m in selected], dim=1)
    upscaled = _upscale(decoder.output_upscaling, image)
    masks = torch.bmm(hyper, upscaled.reshape(b, -1, upscaled.shape[-1]).transpose(1, 2))
    # (h, w, y1, x1, y2, x2) -> (h, y1, y2, w, x1, x2)
    masks = masks.reshape(b, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, -1, 4 * h, 4 * w)
    ious = decoder.iou_prediction_head(queries[:, 0])[:, selected.start:selected.stop]
    return masks, ious


def _positional_encoding(encoder: nn.Module) -> Tensor:
    """`encoder.get_dense_pe()`, computed once for as long as its random matrix and its grid stay as they are."""
    matrix = encoder.pe_layer.positional_encoding_gaussian_matrix
    version = None if matrix.is_inference() else matrix._version
    state = (matrix.data_ptr(), version, matrix.device, matrix.dtype, encoder.image_embedding_size)
    known = _grids.get(encoder)
    if known is None or known[0] != state:
        known = _grids[encoder] = (state, encoder.get_dense_pe())
    return known[1]


@torch.no_grad()
@reusing_memory()
def predict_low_res(
    predictor: SamPredictor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    multimask_output: bool = True,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict low-resolution masks for prompts on the image that is set in the predictor.

    The batched equivalent of `predictor.predict_torch(...)` before its upsampling; use
    `predictor.model.postprocess_masks(logits, predictor.input_size, predictor.original_size)` to get full masks.

    Args:
        predictor: Predictor with an image set.
        points: Points (B, P, 2), XY in the frame of the resized image (see `predictor.transform`), or None.
        labels: Labels (B, P) of the points: 1 positive, 0 negative, -1 padding.
        boxes: Boxes (B, 4), XYXY in the frame of the resized image, or None.
        multimask_output: Whether to return three masks per prompt instead of one.
        masks: Mask prompts, logits (B, 1, h, w) of the model's mask input size, or None.

    Returns:
        Float32 logits (B, M, 256, 256) (a quarter of the model's image size) and predicted IoUs (B, M), on the
        predictor's device.

    Raises:
        NotInitializedError: If no image is set.
        InvalidInputError: If there are neither points nor boxes, or points without labels.
    """
    if not predictor.is_image_set:
        raise NotInitializedError("No image is set in the predictor. Call set_precomputed or set_image first.")
    if (points is None) != (labels is None) or (points is None and boxes is None and masks is None):
        raise InvalidInputError("Prompts are points with labels, boxes or both, but got "
                                f"points={points is not None}, labels={labels is not None}, boxes={boxes is not None}.")
    model, precision = predictor.model, precision_of(predictor)
    decoder, pe = model.mask_decoder, _positional_encoding(model.prompt_encoder)
    given = [points, labels, boxes, masks]
    n_prompts = next(len(values) for values in given if values is not None)
    device = pe.device
    size = _CPU_CHUNK if device.type == "cpu" else max(n_prompts, 1)
    parts = []
    for start in range(0, max(n_prompts, 1), size):
        point, label, box, mask = (None if v is None else v[start:start + size] for v in given)
        sparse, dense = model.prompt_encoder(points=None if point is None else (point, label), boxes=box, masks=mask)
        n_tokens = 1 + getattr(decoder, "num_mask_tokens", MAX_TOKENS) + sparse.shape[1]
        with autocast(precision, device):
            if n_tokens > MAX_TOKENS or not supports_sharing(decoder):
                parts.append(decoder(
                    image_embeddings=predictor.features, image_pe=pe, sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense, multimask_output=multimask_output,
                ))
                continue
            dense = shared_part(dense)
            step = _CPU_IMAGES if device.type == "cpu" and len(dense) > 1 else size
            for tokens, image in zip(sparse.split(step), dense.split(step), strict=True):
                parts.append(predict_masks_shared(decoder, predictor.features, pe, tokens, image, multimask_output))
    return torch.cat([p[0] for p in parts]).float(), torch.cat([p[1] for p in parts]).float()
