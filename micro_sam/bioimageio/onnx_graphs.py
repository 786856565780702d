"""The parts of a model as networks of tensors only, for export: image encoder, mask decoder and instance decoder.

What depends on the size of the image is computed inside the graph from `orig_im_size`, without control flow, so that
nothing of the example that an exporter sees is frozen into it. The mask decoder has the interface of
segment_anything's ONNX models, extended to many objects at once.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from torch import Tensor, nn

from ..models.build_sam import EMBED_DIM, PATCH_SIZE
from ..models.decoder import DecoderAdapter
from ..models.prompt_maps import MapPromptEncoder

ENCODER, MASK_DECODER, INSTANCE_DECODER = "encoder", "mask_decoder", "instance_decoder"
_MULTI_MASK_BONUS = 1000.0  # makes the single-mask output win for more than two points, as in SAM's own ONNX models


@dataclass(frozen=True)
class Graph:
    """A network with what an exporter must know about it.

    `dynamic` names the axes of inputs that may change, as `{input: {axis: name}}`. The first of the `examples`, each
    `{input: tensor}`, is traced; the others have other sizes, and test the result. `limits` are the lengths that named
    axes may have at most. Outputs that are `counted` in pixels depend on which side of a threshold the last bit falls.
    """

    name: str
    module: nn.Module
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    examples: tuple[Mapping[str, Tensor], ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    counted: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.examples[0])


@dataclass(frozen=True)
class MaskDecoderOptions:
    """How masks are selected and described, see `micro_sam.bioimageio.onnx_export.export_onnx`."""

    return_single_mask: bool = True
    use_stability_score: bool = False
    return_extra_metrics: bool = False
    gelu_approximate: bool = False


class _ToImage(nn.Module):
    """Resizes maps of the canvas (..., side, side) to the image: to the canvas, without its padding, to the image.

    SAM resizes bilinearly twice. Both steps are linear and separable: they are one matrix per axis, which is computed
    from the size of the image. Positions are clipped to the part of the canvas that the image covers, so the padding
    needs no cutting off.
    """

    def __init__(self, side: int, canvas: int):
        super().__init__()
        self.canvas = canvas
        to_canvas = F.interpolate(torch.eye(side)[None], canvas, mode="linear", align_corners=False)[0].T
        self.register_buffer("to_canvas", to_canvas.contiguous(), persistent=False)
        self.register_buffer("pixels", torch.arange(canvas, dtype=torch.float32), persistent=False)

    def _matrix(self, inner: Tensor, outer: Tensor) -> Tensor:
        """Matrix (outer, side); `inner` is the number of pixels that the image covers on the canvas."""
        n_pixels = outer.to(torch.int64)
        if not torch.jit.is_tracing():
            n_pixels = n_pixels.item()
            torch._check(n_pixels >= 1)
        source = (torch.arange(n_pixels, dtype=torch.float32) + 0.5) * (inner / outer) - 0.5
        source = torch.minimum(source.clamp(min=0), inner - 1)
        weights = (1 - (source[:, None] - self.pixels).abs()).clamp(min=0)
        return weights @ self.to_canvas

    def forward(self, maps: Tensor, orig_im_size: Tensor) -> Tensor:
        size = orig_im_size.to(torch.float32)
        inner = torch.floor(self.canvas / size.max() * size + 0.5)
        return self._matrix(inner[0], size[0]) @ maps @ self._matrix(inner[1], size[1]).T


class _Encoder(nn.Module):
    """Normalises, pads and encodes images (B, 3, h, w) with values from 0 to 255 that fit the canvas."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.sam = sam

    def forward(self, image: Tensor) -> Tensor:
        return self.sam.image_encoder(self.sam.preprocess(image))


class _MaskDecoder(SamOnnxModel):
    """Prompt encoder, mask decoder and resizing. The embedding of prompts is that of segment_anything's own class."""

    def __init__(self, sam: Sam, options: MaskDecoderOptions):
        super().__init__(
            sam, options.return_single_mask, options.use_stability_score, options.return_extra_metrics
        )
        self.to_image = _ToImage(sam.prompt_encoder.mask_input_size[0], self.img_size)

    def _stability(self, masks: Tensor) -> Tensor:
        """Ratio of the areas at thresholds one above and one below that of masks; 0 if there is nothing at either."""
        threshold, offset = self.model.mask_threshold, self.stability_score_offset
        small, large = ((masks > t).sum((-2, -1)).float() for t in (threshold + offset, threshold - offset))
        return small / large.clamp(min=1)

    def _select(self, masks: Tensor, scores: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        n_points = torch.ones_like(point_labels[0]).sum()
        bonus = F.pad(torch.full((1,), _MULTI_MASK_BONUS), (0, self.mask_decoder.num_mask_tokens - 1))
        best = (scores + (n_points - 2.5) * bonus).argmax(1, keepdim=True)
        chosen = best[:, :, None, None].expand(-1, -1, *masks.shape[-2:])
        return masks.gather(1, chosen), scores.gather(1, best)

    def forward(
        self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor,
        has_mask_input: Tensor, orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        encoder = self.model.prompt_encoder
        dense = self._embed_masks(mask_input, has_mask_input)
        if isinstance(encoder, MapPromptEncoder):
            dense = dense + encoder.embed_maps(point_coords, point_labels)
        masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings, image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels), dense_prompt_embeddings=dense,
        )
        if self.use_stability_score:
            scores = self._stability(masks)
        if self.return_single_mask:
            masks, scores = self._select(masks, scores, point_labels)
        resized = self.to_image(masks, orig_im_size)
        if not self.return_extra_metrics:
            return resized, scores, masks
        areas = (resized > self.model.mask_threshold).sum((-2, -1))
        return resized, scores, self._stability(resized), areas, masks


class _InstanceDecoder(nn.Module):
    """The three maps of the instance decoder, each (B, H, W)."""

    def __init__(self, decoder: DecoderAdapter):
        super().__init__()
        self.decoder = decoder
        self.to_image = _ToImage(decoder.img_size, decoder.img_size)

    def forward(self, image_embeddings: Tensor, orig_im_size: Tensor) -> tuple[Tensor, ...]:
        return self.to_image(self.decoder.layer_by_layer(image_embeddings), orig_im_size).unbind(1)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoder_graph(sam: Sam) -> Graph:
    """Input `image` (B, 3, h, w), longer side at most the canvas; output `image_embeddings` (B, 256, g, g)."""
    canvas = sam.image_encoder.img_size
    shapes = ((2, 3, canvas - 48, canvas - 96), (1, 3, canvas // 2 + 3, canvas))
    examples = tuple({"image": torch.rand(shape, generator=_random(k)) * 255} for k, shape in enumerate(shapes))
    dynamic = {"image": {0: "batch", 2: "height", 3: "width"}}
    limits = {"height": canvas, "width": canvas}
    return Graph(ENCODER, _Encoder(sam).eval(), ("image_embeddings",), dynamic, examples, limits)


def _prompts(sam: Sam, n_objects: int, n_points: int, has_mask: bool, size: tuple[int, int]) -> dict[str, Tensor]:
    encoder, generator = sam.prompt_encoder, _random(n_objects)
    canvas, side = encoder.input_image_size[0], encoder.mask_input_size[0]
    return {
        "image_embeddings": torch.randn(1, encoder.embed_dim, *encoder.image_embedding_size, generator=generator),
        "point_coords": torch.rand(n_objects, n_points, 2, generator=generator) * canvas,
        "point_labels": torch.randint(-1, 4, (n_objects, n_points), generator=generator).float(),
        "mask_input": torch.randn(n_objects, 1, side, side, generator=generator),
        "has_mask_input": torch.tensor([float(has_mask)]),
        "orig_im_size": torch.tensor([float(s) for s in size]),
    }


def mask_decoder_graph(sam: Sam, options: MaskDecoderOptions) -> Graph:
    """Inputs and outputs are those of segment_anything's ONNX models, with N objects of P points instead of one.

    Inputs: `image_embeddings` (1, 256, g, g), `point_coords` (N, P, 2) as x, y in pixels of the canvas, `point_labels`
    (N, P), `mask_input` (N, 1, 4g, 4g), `has_mask_input` (1), `orig_im_size` (2) as H, W. Outputs: `masks` (N, M, H, W)
    logits, `iou_predictions` (N, M), `low_res_masks` (N, M, 4g, 4g); for extra metrics also `stability_scores` and
    `areas` (N, M).
    """
    if options.gelu_approximate:
        sam = copy.deepcopy(sam)
        for part in (sam.prompt_encoder, sam.mask_decoder):
            for module in part.modules():
                if isinstance(module, nn.GELU):
                    module.approximate = "tanh"
    metrics = ("stability_scores", "areas") if options.return_extra_metrics else ()
    outputs = ("masks", "iou_predictions", *metrics, "low_res_masks")
    dynamic = {name: {0: "objects", 1: "points"} for name in ("point_coords", "point_labels")}
    dynamic["mask_input"] = {0: "objects"}
    examples = (
        _prompts(sam, 3, 4, True, (100, 75)), _prompts(sam, 1, 1, False, (60, 131)), _prompts(sam, 2, 2, True, (64, 64))
    )
    counted = (*metrics, "iou_predictions") if options.use_stability_score else metrics
    return Graph(MASK_DECODER, _MaskDecoder(sam, options).eval(), outputs, dynamic, examples, counted=counted)


def instance_decoder_graph(decoder: DecoderAdapter) -> Graph:
    """Inputs `image_embeddings` (B, 256, g, g) and `orig_im_size` (2) as H, W; outputs of shape (B, H, W)."""
    side = decoder.img_size // PATCH_SIZE
    examples = tuple(
        {"image_embeddings": torch.randn(n, EMBED_DIM, side, side, generator=_random(n)),
         "orig_im_size": torch.tensor(size)}
        for n, size in ((2, (100.0, 75.0)), (1, (60.0, 131.0)))
    )
    outputs = ("foreground", "center_distances", "boundary_distances")
    dynamic = {"image_embeddings": {0: "batch"}}
    return Graph(INSTANCE_DECODER, _InstanceDecoder(decoder).eval(), outputs, dynamic, examples)
