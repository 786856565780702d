"""From the name of a model, or a checkpoint, to a network that is ready."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from ..core.errors import (
    CheckpointError,
    DecoderMissingError,
    HashMismatchError,
    InvalidTypeError,
    MissingFileError,
    UnknownModelError,
    nearest_names,
)
from ..core.settings import get_device
from .build_sam import ARCHITECTURES, build_sam
from .checkpoints import ENCODER, Checkpoint, read_checkpoint, read_decoder
from .decoder import DecoderAdapter, get_decoder
from .export import export_custom_qlora_model, export_custom_sam_model
from .hashing import file_hash
from .peft_description import choose_peft, peft_settings
from .peft_sam import PEFT_Sam
from .precision import MixedPrecisionPredictor, inference_dtype, precision_of
from .prompt_maps import PREFIX
from .registry import download_sam_model, find_spec, get_model_names, list_models
from .specs import DEFAULT_MODEL, MODELS, ModelSpec
from .weight_loading import SkipInit, load_weights, load_weights_flexibly

__all__ = ["export_custom_qlora_model", "export_custom_sam_model", "get_predictor_and_decoder", "get_sam_model"]

_MODEL_KWARGS = ("image_size", "num_multimask_outputs")


@dataclass(frozen=True)
class _Source:
    """The files of a model; `spec` is its row, None for a checkpoint of the user."""

    path: Path
    hash: str
    decoder_path: Path | None
    spec: ModelSpec | None


def _check_name_of_checkpoint(model_type: str) -> str | None:
    """Return the architecture in the name that was passed along with a checkpoint; None for a local model's name."""
    if model_type in get_model_names() and model_type not in list_models():
        raise UnknownModelError(f"{model_type!r} is the file of a decoder, not a model. Pass {model_type[:-8]!r}.")
    if model_type[:5] in ARCHITECTURES:
        return model_type[:5]
    return find_spec(model_type).architecture


def _locate(model_type: str, checkpoint_path: Any, decoder_path: Any, progress_bar_factory: Callable | None) -> _Source:
    spec = None
    if checkpoint_path is not None:
        path = Path(checkpoint_path)
        if not path.exists():
            raise MissingFileError(f"The checkpoint {path} does not exist. Check the path.")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a checkpoint file. Pass the file, often best.pt inside it.")
        found = file_hash(path)
    else:
        spec = find_spec(model_type)
        if spec.url is not None:
            path, found, own_decoder = download_sam_model(model_type, progress_bar_factory)
        else:
            path, own_decoder = spec.local_path, spec.decoder_path
            if not Path(path).is_file():
                raise MissingFileError(
                    f"The checkpoint {path} of the model {model_type!r} does not exist. "
                    + ("Install micro_sam again." if spec.path is None else "Correct its row in the local models.")
                )
            found = file_hash(path)
            if spec.hash is not None and found != spec.hash:
                raise HashMismatchError(
                    f"The checkpoint {path} of the model {model_type!r} has the hash {found}, but {spec.hash} is "
                    "registered: the file changed. Register it again if that was intended."
                )
        decoder_path = own_decoder if decoder_path is None else decoder_path
    decoder_path = None if decoder_path is None else Path(decoder_path)
    if decoder_path is not None and not decoder_path.is_file():
        raise MissingFileError(f"The decoder {decoder_path} does not exist. Check decoder_path.")
    return _Source(Path(path), found, decoder_path, spec)


def _check_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    unknown = [name for name in model_kwargs if name not in _MODEL_KWARGS]
    if unknown:
        raise InvalidTypeError(
            f"get_sam_model got the unknown argument {unknown[0]!r}. {nearest_names(unknown[0], _MODEL_KWARGS)}"
        )


def _choose_architecture(named: str | None, checkpoint: Checkpoint) -> str:
    found = checkpoint.architecture
    if named is not None and found != named:
        warnings.warn(
            f"The checkpoint {checkpoint.path} holds a {found}, not a {named}: it is loaded as {found}. "
            f"Pass model_type={found!r}.", stacklevel=3,
        )
    return found


def _check_peft_kwargs(peft_kwargs: Mapping | None) -> None:
    """Raise before anything is downloaded. The rank may be missing: the checkpoint may tell it."""
    is_partial = isinstance(peft_kwargs, Mapping) and peft_kwargs and "rank" not in peft_kwargs
    peft_settings({**peft_kwargs, "rank": 1} if is_partial else peft_kwargs)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if any(key.startswith(ENCODER) and key.endswith(".absmax") for key in checkpoint.model_state):
        raise CheckpointError(
            f"The encoder in {checkpoint.path} is quantised to 4 bits (QLoRA). Export it with "
            "micro_sam.util.export_custom_qlora_model, which also needs the base model, and load what that writes."
        )


def _build(
    architecture: str, checkpoint: Checkpoint, spec: ModelSpec | None, flexible: bool, peft_kwargs: Mapping | None,
    kwargs: dict,
) -> Sam:
    """Build the network and load the weights into it."""
    sizes = (kwargs.get("image_size"), spec and spec.path and spec.image_size, checkpoint.image_size,
             spec and spec.image_size)
    image_size = next((size for size in sizes if size), None)
    outputs = kwargs.get("num_multimask_outputs") or checkpoint.num_multimask_outputs or 3
    has_maps = any(key.startswith(f"prompt_encoder.{PREFIX}") for key in checkpoint.model_state)
    arguments = {"image_size": image_size, "num_multimask_outputs": outputs, "prompt_maps": has_maps}
    source = str(checkpoint.path)
    if not checkpoint.is_complete:
        warnings.warn(
            f"{checkpoint.path} has no weights for prompts (mask decoder), so points, boxes and 'amg' give random "
            "results. Use it for automatic segmentation with the decoder ('ais').", stacklevel=4,
        )
    _refuse_quantized(checkpoint)
    peft, has_layers = choose_peft(peft_kwargs, checkpoint.model_state, checkpoint.settings.get("peft"), source)
    peft = peft | {"quantize": False}
    # Random weights of the large networks take a second, and all are replaced if the checkpoint must fit exactly.
    all_replaced = architecture != "vit_t" and checkpoint.is_complete and not flexible
    with SkipInit() if all_replaced else contextlib.nullcontext():
        sam = build_sam(architecture, **arguments)
        if has_layers:
            PEFT_Sam(sam, **peft)
    if flexible:
        load_weights_flexibly(sam, checkpoint.model_state, source)
    else:
        may_lack = () if checkpoint.is_complete else ("prompt_encoder.", "mask_decoder.")
        load_weights(sam, checkpoint.model_state, source, may_lack)
    if peft_kwargs and not has_layers:
        PEFT_Sam(sam, **peft)
    if checkpoint.settings.get("scale_positions") and checkpoint.image_size:
        _scale_positions(sam, checkpoint.image_size)
    return sam


def _scale_positions(sam: Sam, trained_size: int) -> None:
    """Make the position encoding of prompts a function of pixels on the canvas, whatever the size of the canvas.

    SAM encodes positions relative to the canvas. For a model without absolute position embedding in its encoder that
    was trained for this, neighbouring pixels then differ as they did in training.
    """
    positions = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    positions *= sam.image_encoder.img_size / trained_size
    sam.scales_positions = True


@dataclass(frozen=True)
class _Loaded:
    predictor: SamPredictor
    checkpoint: Checkpoint
    decoder_state: Mapping[str, torch.Tensor] | None
    decoder_settings: Mapping[str, Any]


def _load(
    model_type: str, device: Any, checkpoint_path: Any, peft_kwargs: Mapping | None, flexible: bool,
    progress_bar_factory: Callable | None, decoder_path: Any, with_state: bool, precision: str | None,
    model_kwargs: dict[str, Any],
) -> _Loaded:
    device = get_device(device)
    dtype = inference_dtype(precision, device)
    _check_kwargs(model_kwargs)
    _check_peft_kwargs(peft_kwargs)
    named = find_spec(model_type).architecture if checkpoint_path is None else _check_name_of_checkpoint(model_type)
    source = _locate(model_type, checkpoint_path, decoder_path, progress_bar_factory)
    # Weights are copied into the network, so the file can be mapped; a state that is handed out must not depend on it.
    checkpoint = read_checkpoint(source.path, mmap=not with_state)
    architecture = _choose_architecture(named, checkpoint)
    sam = _build(architecture, checkpoint, source.spec, flexible, peft_kwargs, model_kwargs).to(device)

    predictor = SamPredictor(sam) if dtype is None else MixedPrecisionPredictor(sam, dtype)
    predictor.model_type = architecture
    predictor.model_name = model_type
    predictor._hash = source.hash
    predictor.checkpoint_path = str(source.path) if checkpoint_path is None else checkpoint_path
    predictor.decoder_path = None if source.decoder_path is None else str(source.decoder_path)

    decoder_state, decoder_settings = checkpoint.decoder_state, checkpoint.decoder_settings
    if with_state and source.decoder_path is not None:
        decoder_state, decoder_settings = read_decoder(source.decoder_path)
    return _Loaded(predictor, checkpoint, decoder_state, decoder_settings)


def get_sam_model(
    model_type: str = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    return_sam: bool = False,
    return_state: bool = False,
    peft_kwargs: dict | None = None,
    flexible_load_checkpoint: bool = False,
    progress_bar_factory: Callable | None = None,
    decoder_path: str | os.PathLike | None = None,
    *,
    precision: str | None = None,
    **model_kwargs,
) -> SamPredictor | tuple:
    """Load a model by name, or from a checkpoint.

    A published model is downloaded into the cache directory when it is first used.

    Args:
        model_type: The name of a published, shipped or local model, see `micro_sam.models.registry.list_models`.
            With a checkpoint, the architecture (`vit_t`, `vit_b`, `vit_l` or `vit_h`) or a name that starts with it.
        device: `cpu`, `cuda`, `cuda:<index>`, `mps`, a torch device, or None to choose.
        checkpoint_path: A file to load instead: plain SAM weights, an export, or a training checkpoint.
            If its architecture differs from `model_type`, there is a warning and that of the file wins.
        return_sam: Whether to return the network too.
        return_state: Whether to return the content of the checkpoint too. If there is a segmentation decoder,
            its weights are in it as `decoder_state`, and what is recorded about it as `decoder_settings`.
        peft_kwargs: Options of parameter-efficient finetuning (LoRA and others), as in
            `micro_sam.models.peft_sam.PEFT_Sam`. Not needed for a checkpoint that was finetuned so: its layers are
            found. To start such a finetuning, pass them with a checkpoint that has no such layers: it gets new ones,
            which change nothing until they are trained. `quantize` only concerns training, see
            `micro_sam.models.peft_sam.quantize_encoder`.
        flexible_load_checkpoint: Whether to load what fits and warn about the rest instead of raising. Position
            embeddings of another image size are interpolated.
        progress_bar_factory: Called with a name for each download; returns a bar like tqdm's.
        decoder_path: A file with the weights of the segmentation decoder, instead of the model's own. Its path
            is kept as `predictor.decoder_path`; the weights are read if `return_state` is set.
        precision: `float32` computes exactly; `auto` in half precision (bfloat16) where the device is faster in it,
            which changes masks a little; `bfloat16` in any case. None takes `$MICROSAM_PRECISION`, else what the user
            has chosen in the settings, else `float32`.
        model_kwargs: `image_size` (pixels, a multiple of 16; by default that of the checkpoint) and
            `num_multimask_outputs`.

    Returns:
        The predictor, then the network (`return_sam`) and the state (`return_state`). The predictor also has
        `model_type` (the architecture), `model_name`, `checkpoint_path` and `_hash`.

    Raises:
        UnknownModelError: If no model has this name; names the nearest ones.
        MissingFileError: If a file does not exist.
        CheckpointError: If the file is damaged, not a checkpoint, or does not fit.
        DownloadError: If the download fails; says what to do then.
        PeftError: If `peft_kwargs` are not valid.
        InvalidInputError: If there is no such precision.

    Example:
        >>> predictor = get_sam_model("vit_t_lite", device="cpu")
        >>> predictor.model_type
        'vit_t'
    """
    loaded = _load(
        model_type, device, checkpoint_path, peft_kwargs, flexible_load_checkpoint, progress_bar_factory, decoder_path,
        return_state, precision, model_kwargs,
    )
    result = [loaded.predictor]
    if return_sam:
        result.append(loaded.predictor.model)
    if return_state:
        state = dict(loaded.checkpoint.state)
        if loaded.decoder_state is not None:
            state["decoder_state"] = loaded.decoder_state
            if loaded.decoder_settings or "decoder_settings" in state:
                state["decoder_settings"] = dict(loaded.decoder_settings)
        result.append(state)
    return tuple(result) if len(result) > 1 else result[0]


def get_predictor_and_decoder(
    model_type: str,
    checkpoint_path: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    peft_kwargs: dict | None = None,
    *,
    decoder_path: str | os.PathLike | None = None,
    flexible_load_checkpoint: bool = False,
    progress_bar_factory: Callable | None = None,
    precision: str | None = None,
    **model_kwargs,
) -> tuple[SamPredictor, DecoderAdapter]:
    """Load a model with its decoder for automatic instance segmentation.

    Args:
        model_type: See `get_sam_model`, also for the other arguments.
        checkpoint_path: A checkpoint to load instead.
        device: Where to put both.
        peft_kwargs: See `get_sam_model`.
        decoder_path: A file with the weights of the decoder, instead of the model's own.
        flexible_load_checkpoint: Whether to load what fits of the model's weights.
        progress_bar_factory: Called with a name for each download; returns a bar like tqdm's.
        precision: See `get_sam_model`; also that of the decoder.
        model_kwargs: `image_size` and `num_multimask_outputs`.

    Returns:
        The predictor and the decoder. How the decoder normalises is what the checkpoint records.

    Raises:
        DecoderMissingError: If the model has no decoder.
    """
    loaded = _load(
        model_type, device, checkpoint_path, peft_kwargs, flexible_load_checkpoint, progress_bar_factory, decoder_path,
        True, precision, model_kwargs,
    )
    if loaded.decoder_state is None:
        raise DecoderMissingError(
            f"{'The model ' + repr(model_type) if checkpoint_path is None else checkpoint_path} has no decoder for "
            "automatic instance segmentation. Use the mode 'amg', pass decoder_path, or choose one of: "
            + ", ".join(spec.name for spec in MODELS if spec.has_decoder) + "."
        )
    normalization = str(loaded.decoder_settings.get("normalization", "instance"))
    predictor = loaded.predictor
    decoder = get_decoder(
        predictor.model.image_encoder, loaded.decoder_state, predictor.device, normalization=normalization,
        dtype=precision_of(predictor),
    )
    return predictor, decoder
