"""ONNX files of a model, for programs without torch: image encoder, mask decoder and instance decoder.

Each file is compared with the network on inputs of several sizes before anything appears under its name.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..core.errors import (
    CheckpointError,
    DecoderMissingError,
    InvalidInputError,
    MissingPackageError,
    ModelError,
    OutputExistsError,
    nearest_names,
)
from ..core.output import prepare_folder, temporary_path, write_json
from ..core.progress import Step, Steps, drain
from ..models.checkpoints import read_checkpoint
from ..models.registry import list_models
from ..segmentation.workflow import LoadedModel, load_model
from .onnx_graphs import (
    ENCODER,
    INSTANCE_DECODER,
    MASK_DECODER,
    Graph,
    MaskDecoderOptions,
    encoder_graph,
    instance_decoder_graph,
    mask_decoder_graph,
)

PARTS = (ENCODER, MASK_DECODER, INSTANCE_DECODER)
DESCRIPTION = "model.json"
DEFAULT_OPSET = 18
TOLERANCE = 1e-3  # of embeddings, logits and maps
_EXPORTER_OPSET = 18  # the lowest that torch's current exporter writes; those below need its predecessor
LOWEST_OPSET = 12  # of what `write_onnx` can write
_FILE_LIMIT = 1_900_000_000  # bytes; larger weights (ViT-H) get a file of their own, since protobuf ends at 2 GB
# Signed weights are quicker; unsigned ones are more exact in the mask decoder. The instance decoder consists of
# convolutions, which get slower.
_WEIGHT_TYPES = {ENCODER: "QInt8", MASK_DECODER: "QUInt8"}
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def require_packages() -> None:
    """Raise `MissingPackageError` unless all packages for ONNX are installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"ONNX export needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            "pip install \"micro_sam[export]\"."
        )


def check_opset(opset: int, lowest: int) -> None:
    """Raise `InvalidInputError` if the installed packages cannot write a version of the operator set."""
    from onnx.defs import onnx_opset_version

    if not isinstance(opset, int) or not lowest <= opset <= onnx_opset_version():
        raise InvalidInputError(f"opset must be an integer from {lowest} to {onnx_opset_version()}, but is {opset!r}.")


def check_folder(folder: Path, known: Sequence[str], overwrite: bool) -> None:
    """Raise `OutputExistsError` if a folder cannot become that of an export, see `new_folder`."""
    found = [folder] if folder.is_file() else [p for p in sorted(folder.rglob("*")) if not p.is_dir()]
    foreign = [p for p in found if p == folder or p.relative_to(folder).as_posix() not in known]
    if foreign:
        raise OutputExistsError(
            f"{foreign[0]} exists and is not part of an export, so {folder} is not replaced. Choose another folder."
        )
    if found and not overwrite:
        raise OutputExistsError(f"{folder} has an export already. Pass overwrite=True, or choose another folder.")


@contextmanager
def new_folder(folder: str | os.PathLike, known: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """Give a folder to write to, which becomes `folder` when everything is in it.

    Args:
        folder: The folder to make. An empty one may exist.
        known: Relative paths of the files that an earlier export may have left there.
        overwrite: Whether to replace such an export, as a whole.

    Raises:
        OutputExistsError: If the folder has files, and `overwrite` is not set or they are not those of an export.
        OutputWriteError: If it cannot be written.
    """
    folder = Path(folder).expanduser()
    check_folder(folder, known, overwrite)
    prepare_folder(folder)
    with temporary_path(folder, is_folder=True) as new:
        new.mkdir()
        yield new


def _with_current_exporter(graph: Graph, path: Path, opset: int) -> None:
    axes = {name for of_input in graph.dynamic.values() for name in of_input.values()}
    dims = {name: torch.export.Dim(name, max=graph.limits.get(name)) for name in axes}
    shapes = {
        name: {axis: dims[label] for axis, label in graph.dynamic.get(name, {}).items()} for name in graph.inputs
    }
    program = torch.onnx.export(
        graph.module, kwargs=dict(graph.examples[0]), dynamo=True, opset_version=opset, dynamic_shapes=shapes,
        input_names=graph.inputs, output_names=graph.outputs, verbose=False,
    )
    size = sum(weight.nbytes for weight in graph.module.state_dict().values())
    program.save(path, external_data=size > _FILE_LIMIT)


def _with_former_exporter(graph: Graph, path: Path, opset: int) -> None:
    torch.onnx.export(
        graph.module, tuple(graph.examples[0].values()), path, dynamo=False, opset_version=opset,
        dynamic_axes=graph.dynamic, input_names=graph.inputs, output_names=graph.outputs, verbose=False,
    )


def _check_version(path: Path, opset: int) -> None:
    """Raise if the exporter could not convert to the version that was asked for: it only logs that."""
    import onnx

    file = onnx.load(path, load_external_data=False)
    found = next(entry.version for entry in file.opset_import if entry.domain == "")
    if found != opset:
        raise ModelError(f"it writes version {found}")


def write_onnx(graph: Graph, path: Path, opset: int) -> dict[str, float]:
    """Write a part of a model as ONNX file and compare it with the network.

    Returns:
        The largest difference for each output.

    Raises:
        ModelError: If it cannot be exported, or gives other results than the network.
    """
    export = _with_current_exporter if opset >= _EXPORTER_OPSET else _with_former_exporter
    # The exporters warn about what they had to assume; whether that holds is what the comparison tells.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            export(graph, path, opset)
            _check_version(path, opset)
            session = open_session(path)
        except OSError:
            raise
        except Exception as error:  # exporters and onnxruntime raise errors of many kinds
            reason = str(error).strip().splitlines()
            raise ModelError(
                f"The {graph.name} cannot be exported with opset {opset} by torch {torch.__version__}: "
                f"{reason[0] if reason else type(error).__name__}. Try opset={DEFAULT_OPSET}."
            ) from error
    differences = compare(graph, session)
    for name, difference in differences.items():
        if name not in graph.counted and not difference <= TOLERANCE:
            raise ModelError(
                f"The exported {graph.name} differs from the network by {difference:.2g} in {name!r} (allowed: "
                f"{TOLERANCE:g}), so it was not kept. Try opset={DEFAULT_OPSET} or another version of torch."
            )
    return differences


def open_session(path: str | os.PathLike):
    """Open an ONNX file with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def compare(graph: Graph, session) -> dict[str, float]:
    """Run network and file on the examples that were not traced; return the largest difference for each output."""
    differences = dict.fromkeys(graph.outputs, 0.0)
    for example in graph.examples[1:]:
        expected = graph.module(**example)
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(list(graph.outputs), {name: value.numpy() for name, value in example.items()})
        for name, ours, theirs in zip(graph.outputs, expected, found, strict=True):
            if tuple(ours.shape) != theirs.shape:
                raise ModelError(f"{name!r} of the exported {graph.name} has the shape {theirs.shape}, not "
                                 f"{tuple(ours.shape)}. Export it with another version of torch.")
            difference = np.abs(ours.numpy().astype(np.float64) - theirs)
            differences[name] = float(np.maximum(differences[name], difference.max()))  # NaN stays
    return differences


def quantize_onnx(part: str, path: Path, target: Path) -> None:
    """Write a copy with the weights of linear layers as 8 bit integers, and activations quantised when it runs.

    Of the ways that onnxruntime offers, this one changes masks least: quantised convolutions, channels quantised one
    by one, and static ranges of activations are all worse, and hardly smaller or faster (see doc/onnx.md).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def is_news(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()  # the exporter has done that

    logging.getLogger().addFilter(is_news)
    try:
        quantize_dynamic(
            path, target, weight_type=QuantType[_WEIGHT_TYPES[part]], op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=weights_file(path).exists(),
        )
    finally:
        logging.getLogger().removeFilter(is_news)


def weights_file(path: Path) -> Path:
    """Where the weights of an ONNX file are that is too small for them."""
    return path.with_name(f"{path.name}.data")


def quantized_name(name: str) -> str:
    """`encoder.onnx` -> `encoder_quantized.onnx`."""
    return name.removesuffix(".onnx") + "_quantized.onnx"


def load_parts(
    model_type: str | None, checkpoint_path: str | os.PathLike | None, parts: Sequence[str] | None
) -> tuple[LoadedModel, tuple[str, ...]]:
    """Load a model on the CPU, and say which parts of it to export.

    Raises:
        InvalidInputError: For an unknown part, or none.
        DecoderMissingError: If the instance decoder is asked for, and the model has none.
        CheckpointError: If the mask decoder is asked for, and the checkpoint has none.
    """
    for part in parts or ():
        if part not in PARTS:
            raise InvalidInputError(f"Unknown part {part!r}. {nearest_names(part, PARTS)}")
    if parts is not None and not parts:
        raise InvalidInputError(f"There is no part to export. Pass some of {', '.join(PARTS)}, or None for all.")
    model = load_model(model_type, checkpoint_path, "cpu")
    model.predictor.model.requires_grad_(False)
    source = model.predictor.checkpoint_path
    has_prompts = read_checkpoint(source, mmap=True).is_complete
    if parts is None:
        present = {ENCODER: True, MASK_DECODER: has_prompts, INSTANCE_DECODER: model.decoder is not None}
        return model, tuple(part for part in PARTS if present[part])
    if INSTANCE_DECODER in parts and model.decoder is None:
        raise DecoderMissingError(f"{source} has no instance decoder. Leave {INSTANCE_DECODER!r} out of parts.")
    if MASK_DECODER in parts and not has_prompts:
        raise CheckpointError(f"{source} has no weights for prompts. Leave {MASK_DECODER!r} out of parts.")
    return model, tuple(part for part in PARTS if part in parts)


def make_graph(model: LoadedModel, part: str, options: MaskDecoderOptions) -> Graph:
    """Return one part of a model as a network to export."""
    if part == ENCODER:
        return encoder_graph(model.predictor.model)
    if part == MASK_DECODER:
        return mask_decoder_graph(model.predictor.model, options)
    return instance_decoder_graph(model.decoder)


def _name_or_file(model: str | os.PathLike) -> tuple[str | None, Path | None]:
    """Tell the name of a model from the path of a checkpoint."""
    path = Path(model).expanduser()
    if os.fspath(model) not in list_models() and (path.suffix or path.parent != Path(".") or path.exists()):
        return None, path
    return os.fspath(model), None


def _describe_tensors(path: Path) -> dict[str, Any]:
    session = open_session(path)
    return {
        kind: {tensor.name: {"type": tensor.type.removeprefix("tensor(").removesuffix(")"), "shape": tensor.shape}
               for tensor in tensors}
        for kind, tensors in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }


def _describe_model(model: LoadedModel, opset: int) -> dict[str, Any]:
    sam = model.predictor.model
    return {
        "micro_sam": __version__,
        "model": model.predictor.model_name,
        "architecture": model.predictor.model_type,
        "hash": model.predictor._hash,
        "canvas": sam.image_encoder.img_size,
        "mask_threshold": sam.mask_threshold,
        "opset": opset,
    }


def export_steps(
    model_type_or_checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    parts: Sequence[str] | None = None,
    quantize: bool = False,
    opset: int = DEFAULT_OPSET,
    options: MaskDecoderOptions | None = None,
    overwrite: bool = False,
) -> Steps[dict[str, Path]]:
    """Generator behind `export_onnx`: yields `Step`, returns the files. Closing it leaves nothing behind."""
    require_packages()
    check_opset(opset, _EXPORTER_OPSET)
    names = [f"{part}.onnx" for part in PARTS]
    names += [quantized_name(name) for name in names]
    with new_folder(folder, [DESCRIPTION, *names, *(f"{name}.data" for name in names)], overwrite) as new:
        model, parts = load_parts(*_name_or_file(model_type_or_checkpoint), parts)
        total = len(parts) + (sum(part in _WEIGHT_TYPES for part in parts) if quantize else 0)
        yield Step(0, total, "Export to ONNX")
        written: dict[str, str] = {}
        description: dict[str, Any] = {}
        for part in parts:
            name = f"{part}.onnx"
            graph = make_graph(model, part, options or MaskDecoderOptions())
            differences = write_onnx(graph, new / name, opset)
            description[part] = {"file": name, **_describe_tensors(new / name), "difference_from_torch": differences}
            written[part] = name
            yield Step(len(written), total, "Export to ONNX")
            if quantize and part in _WEIGHT_TYPES:
                quantize_onnx(part, new / name, new / quantized_name(name))
                description[part]["quantized_file"] = written[f"{part}_quantized"] = quantized_name(name)
                yield Step(len(written), total, "Export to ONNX")
        write_json(new / DESCRIPTION, {**_describe_model(model, opset), "parts": description})
    return {key: Path(folder).expanduser() / name for key, name in written.items()}


def export_onnx(
    model_type_or_checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    parts: Sequence[str] | None = None,
    quantize: bool = False,
    opset: int = DEFAULT_OPSET,
    return_single_mask: bool = True,
    use_stability_score: bool = False,
    return_extra_metrics: bool = False,
    gelu_approximate: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
) -> Mapping[str, Path]:
    """Export a model as ONNX files, which run with onnxruntime and without torch.

    The parts, and their inputs and outputs (float32; g is a sixteenth of the canvas, 64 for a canvas of 1024):

    - `encoder.onnx`: `image` (B, 3, h, w), RGB with values from 0 to 255, resized so that the longer side is the
      canvas -> `image_embeddings` (B, 256, g, g). Normalisation and padding are part of it.
    - `mask_decoder.onnx`, with the interface of segment_anything's ONNX models but for N objects: `image_embeddings`
      (1, 256, g, g), `point_coords` (N, P, 2) as (x, y) in pixels of the resized image, `point_labels` (N, P) (1
      object, 0 background, 2 and 3 the corners of a box, -1 padding, which is needed where there is no box),
      `mask_input` (N, 1, 4g, 4g) logits, `has_mask_input` (1), `orig_im_size` (2) as (H, W) -> `masks` (N, M, H, W)
      logits, `iou_predictions` (N, M), `low_res_masks` (N, M, 4g, 4g).
    - `instance_decoder.onnx`: `image_embeddings` (B, 256, g, g), `orig_im_size` (2) -> `foreground`,
      `center_distances` and `boundary_distances` (B, H, W), see `micro_sam.models.decoder`.

    `model.json` beside them says where they come from, the canvas in pixels, and all inputs and outputs.

    Args:
        model_type_or_checkpoint: The name of a model, or the path of a checkpoint.
        folder: The folder to write. It appears when everything in it is complete.
        parts: Some of `encoder`, `mask_decoder` and `instance_decoder`. None exports all that the model has.
        quantize: Whether to write smaller copies with 8 bit weights, too: `encoder_quantized.onnx` and
            `mask_decoder_quantized.onnx`. They are a little less exact.
        opset: Version of ONNX's operators, at least 18.
        return_single_mask: Whether to return the best mask per object (M = 1) instead of all four. Up to two points,
            padding included, it is the best of the three for ambiguous prompts by the predicted IoU.
        use_stability_score: Whether to rate masks by their stability (the IoU of the masks at logits -1 and +1)
            instead of the predicted IoU.
        return_extra_metrics: Whether the mask decoder also returns `stability_scores` and `areas` (N, M) at full
            resolution, the latter in pixels.
        gelu_approximate: Whether to replace GELU in the mask decoder by its approximation with tanh, which some
            accelerators need.
        overwrite: Whether to replace an earlier export in this folder.
        verbose: Whether to show a progress bar.

    Returns:
        The files by part, for example `{"encoder": …, "encoder_quantized": …}`.

    Raises:
        MissingPackageError: If the packages for ONNX are not installed.
        OutputExistsError: If the folder has files already.
        OutputWriteError: If it cannot be written.
        InvalidInputError: For an unknown part, model or opset.
        DecoderMissingError: If the instance decoder is asked for and the model has none.
        CheckpointError: If the checkpoint is damaged or lacks a part.
        ModelError: If torch cannot export a part, or the file gives other results than the network.
    """
    options = MaskDecoderOptions(return_single_mask, use_stability_score, return_extra_metrics, gelu_approximate)
    steps = export_steps(
        model_type_or_checkpoint, folder, parts=parts, quantize=quantize, opset=opset, options=options,
        overwrite=overwrite,
    )
    return drain(steps, verbose=verbose)
