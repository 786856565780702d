"""Model repositories for the BioEngine, that is NVIDIA Triton: image encoder and mask decoder as two models.

A model is a folder with a `config.pbtxt` and a folder `1` for its first version. The encoder is TorchScript, the
mask decoder ONNX, see `micro_sam.bioimageio.onnx_export`.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..core.errors import InvalidInputError, ModelError
from ..models.build_sam import EMBED_DIM, PATCH_SIZE
from .onnx_export import (
    LOWEST_OPSET,
    TOLERANCE,
    check_folder,
    check_opset,
    load_parts,
    new_folder,
    open_session,
    quantize_onnx,
    quantized_name,
    require_packages,
    write_onnx,
)
from .onnx_graphs import ENCODER, MASK_DECODER, MaskDecoderOptions, mask_decoder_graph

CONFIG = "config.pbtxt"
_TORCHSCRIPT, _ONNX = "1/model.pt", "1/model.onnx"
_ENCODER_FILES = (CONFIG, _TORCHSCRIPT)
_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
_Tensors = Mapping[str, tuple[str, Sequence[int]]]


def _folder(root: str | os.PathLike, name: str, part: str) -> Path:
    if not name or Path(name).name != name:
        raise InvalidInputError(f"export_name becomes a part of a folder's name, but is {name!r}. Leave out slashes.")
    return Path(root).expanduser() / f"sam-{name}-{part}"


def _tensors(kind: str, tensors: _Tensors) -> str:
    entries = ",\n".join(
        f'  {{\n    name: "{name}"\n    data_type: {dtype}\n    dims: [ {", ".join(map(str, dims))} ]\n  }}'
        for name, (dtype, dims) in tensors.items()
    )
    return f"{kind} [\n{entries}\n]\n"


def _write_config(folder: Path, name: str, backend: str, platform: str, batch: int, inputs: _Tensors,
                  outputs: _Tensors, extra: str) -> None:
    head = f'name: "{name}"\nbackend: "{backend}"\nplatform: "{platform}"\nmax_batch_size: {batch}\n'
    text = head + _tensors("input", inputs) + _tensors("output", outputs) + extra
    (folder / CONFIG).write_text(text, encoding="utf-8")


@torch.no_grad()
def _trace(encoder: torch.nn.Module, path: Path) -> None:
    """Write the encoder as TorchScript for its canvas, and compare it with the network on another image."""
    image, other = torch.randn(2, 1, 3, encoder.img_size, encoder.img_size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # torch announces the end of TorchScript, which this format needs, and that sizes are taken as constants.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(encoder, image, check_trace=False), path)
        found = torch.jit.load(path, map_location="cpu")(other)
    difference = float((found - encoder(other)).abs().max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"The traced encoder differs from the network by {difference:.2g} (allowed: {TOLERANCE:g}), so it was not "
            "kept. Try another version of torch."
        )


def export_image_encoder(
    model_type: str,
    output_root: str | os.PathLike,
    export_name: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Export the image encoder for the BioEngine: `sam-<name>-encoder/config.pbtxt` and `1/model.pt`.

    Its input is the image as the network takes it: resized so that the longer side is the canvas, normalised with the
    mean and standard deviation of SAM, and padded with zeros to the canvas (1, 3, S, S). The output is the embedding
    (1, 256, S / 16, S / 16). For an encoder that does the rest itself, see `export_onnx`.

    Args:
        model_type: The name of a model, or the architecture of the checkpoint.
        output_root: The model repository, a folder.
        export_name: The name in the repository; by default `model_type`.
        checkpoint_path: A checkpoint to export instead of a published model.
        overwrite: Whether to replace an earlier export.

    Raises:
        OutputExistsError: If there is such an export already.
        ModelError: If the traced encoder gives other results than the network.
        InvalidInputError: For an unknown model, or a name with slashes.
    """
    folder = _folder(output_root, export_name or model_type, ENCODER)
    with new_folder(folder, _ENCODER_FILES, overwrite) as new:
        model, _ = load_parts(model_type, checkpoint_path, (ENCODER,))
        encoder = model.predictor.model.image_encoder
        (new / "1").mkdir()
        _trace(encoder, new / _TORCHSCRIPT)
        grid = encoder.img_size // PATCH_SIZE
        _write_config(
            new, folder.name, "pytorch", "pytorch_libtorch", 1,
            {"input0__0": ("TYPE_FP32", (3, -1, -1))}, {"output0__0": ("TYPE_FP32", (EMBED_DIM, grid, grid))},
            'parameters {\n  key: "INFERENCE_MODE"\n  value { string_value: "true" }\n}\n',
        )


def _declare(tensors: Sequence) -> dict[str, tuple[str, list[int]]]:
    """Types and dimensions of the tensors of an ONNX file; -1 for those that may change."""
    return {t.name: (_TYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape]) for t in tensors}


def export_onnx_model(
    model_type: str,
    output_root: str | os.PathLike,
    opset: int = 17,
    export_name: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    return_single_mask: bool = True,
    gelu_approximate: bool = False,
    use_stability_score: bool = False,
    return_extra_metrics: bool = False,
    quantize_model: bool = False,
    *,
    overwrite: bool = False,
) -> None:
    """Export prompt encoder and mask decoder for the BioEngine: `sam-<name>-decoder/config.pbtxt`, `1/model.onnx`.

    Inputs and outputs are those of `mask_decoder.onnx` in `export_onnx`.

    Args:
        model_type: The name of a model, or the architecture of the checkpoint.
        output_root: The model repository, a folder.
        opset: Version of ONNX's operators, at least 12. Those below 18 are written by torch's former exporter.
        export_name: The name in the repository; by default `model_type`.
        checkpoint_path: A checkpoint to export instead of a published model.
        return_single_mask: See `export_onnx`, also for the next three.
        gelu_approximate: Whether to approximate GELU with tanh.
        use_stability_score: Whether to rate masks by their stability.
        return_extra_metrics: Whether to return stability scores and areas, too.
        quantize_model: Whether to write a copy with 8 bit weights, too: `1/model_quantized.onnx`.
        overwrite: Whether to replace an earlier export.

    Raises:
        MissingPackageError: If the packages for ONNX are not installed.
        OutputExistsError: If there is such an export already.
        CheckpointError: If the checkpoint has no weights for prompts.
        ModelError: If torch cannot export it with this opset, or the file gives other results than the network.
        InvalidInputError: For an unknown model or opset, or a name with slashes.
    """
    require_packages()
    check_opset(opset, LOWEST_OPSET)
    folder = _folder(output_root, export_name or model_type, "decoder")
    options = MaskDecoderOptions(return_single_mask, use_stability_score, return_extra_metrics, gelu_approximate)
    with new_folder(folder, (CONFIG, _ONNX, quantized_name(_ONNX)), overwrite) as new:
        model, _ = load_parts(model_type, checkpoint_path, (MASK_DECODER,))
        path = new / _ONNX
        path.parent.mkdir()
        write_onnx(mask_decoder_graph(model.predictor.model, options), path, opset)
        if quantize_model:
            quantize_onnx(MASK_DECODER, path, new / quantized_name(_ONNX))
        session = open_session(path)
        _write_config(
            new, folder.name, "onnxruntime", "onnxruntime_onnx", 0,
            _declare(session.get_inputs()), _declare(session.get_outputs()),
            "instance_group [\n  {\n    count: 1\n    kind: KIND_CPU\n  }\n]\n",
        )


def export_bioengine_model(
    model_type: str,
    output_root: str | os.PathLike,
    opset: int,
    export_name: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    return_single_mask: bool = True,
    gelu_approximate: bool = False,
    use_stability_score: bool = False,
    return_extra_metrics: bool = False,
    *,
    overwrite: bool = False,
) -> None:
    """Export image encoder and mask decoder for the BioEngine, see `export_image_encoder` and `export_onnx_model`."""
    check_folder(_folder(output_root, export_name or model_type, ENCODER), _ENCODER_FILES, overwrite)
    export_onnx_model(
        model_type, output_root, opset, export_name, checkpoint_path, return_single_mask, gelu_approximate,
        use_stability_score, return_extra_metrics, overwrite=overwrite,
    )
    export_image_encoder(model_type, output_root, export_name, checkpoint_path, overwrite=overwrite)
