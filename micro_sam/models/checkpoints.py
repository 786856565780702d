"""Reading checkpoints of all formats safely, and finding out what is in them."""

import logging
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, MissingFileError, UnsafeCheckpointError
from .safe_pickle import HostilePickleError, SafePickle, contains_inert

logger = logging.getLogger(__name__)

ENCODER = "image_encoder."
_VIT_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_VIT_DEPTHS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}
_VIT_KEY = f"{ENCODER}patch_embed.proj.weight"
_TINY_KEYS = (f"{ENCODER}patch_embed.seq.0.c.weight", f"{ENCODER}layers.1.blocks.0.attn.attention_biases")
_DECODER_PREFIXES = ("base.", "decoder.", "deconv", "decoder_head.", "out_conv.")

State = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    `state` is the whole content as it is in the file; `model_state` the SAM weights under SAM's own names;
    `decoder_state` the weights of the segmentation decoder, if there is one; `settings` and `decoder_settings` what
    the file records about itself (`image_size`, `normalization`, …); `is_complete` whether there are weights for the
    prompts and not only for the encoder; `refused` the names of objects that were not loaded.
    """

    path: Path
    state: State
    model_state: State
    decoder_state: State | None
    settings: State
    decoder_settings: State
    is_complete: bool
    refused: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """`vit_t`, `vit_b`, `vit_l` or `vit_h`, from the weights."""
        return detect_architecture(self.model_state, self.path)

    @property
    def image_size(self) -> int | None:
        """Side of the canvas in pixels, from the weights or the settings; None if the file does not tell."""
        pos_embed = self.model_state.get(f"{ENCODER}pos_embed")
        if pos_embed is not None and pos_embed.ndim == 4:
            return 16 * pos_embed.shape[1]
        size = self.settings.get("image_size", self.decoder_settings.get("image_size"))
        return None if size is None else int(size)

    @property
    def num_multimask_outputs(self) -> int | None:
        """Number of masks for an ambiguous prompt, from the weights."""
        tokens = self.model_state.get("mask_decoder.mask_tokens.weight")
        return None if tokens is None else tokens.shape[0] - 1

    @property
    def normalization(self) -> str:
        """How the decoder's BatchNorm layers normalise: `running` if the file says so, else `instance`."""
        return str(self.decoder_settings.get("normalization", "instance"))


def detect_architecture(model_state: State, path: str | os.PathLike = "the checkpoint") -> str:
    """Return the architecture that the weights under SAM's names belong to.

    Raises:
        CheckpointError: If they belong to none that is known.
    """
    patch_embed = model_state.get(_VIT_KEY)
    if patch_embed is not None:
        width = patch_embed.shape[0]
        blocks = {int(k.split(".")[2]) for k in model_state if k.startswith(f"{ENCODER}blocks.")}
        name = _VIT_WIDTHS.get(width)
        if name is None or len(blocks) != _VIT_DEPTHS[name]:
            raise CheckpointError(
                f"The image encoder in {path} has width {width} and {len(blocks)} blocks. Known are "
                + ", ".join(f"{w} and {_VIT_DEPTHS[n]} ({n})" for w, n in _VIT_WIDTHS.items()) + "."
            )
        return name
    if all(key in model_state for key in _TINY_KEYS):
        return "vit_t"
    keys = [str(key) for key in model_state]
    if any(key.startswith(ENCODER) for key in keys):
        reason = "an image encoder of an architecture that is not known"
    elif any(key.startswith(("trunk.", "image_encoder.trunk", "sam_mask_decoder.", "memory_")) for key in keys):
        reason = "SAM 2 weights, which are not supported"
    else:
        reason = f"no SAM image encoder (first names: {', '.join(keys[:3]) or 'none'})"
    raise CheckpointError(f"{path} holds {reason}. Pass a vit_t, vit_b, vit_l or vit_h checkpoint of Segment Anything.")


def _looks_like_decoder(state: State) -> bool:
    keys = [key for key in state if isinstance(key, str)]
    return "out_conv.weight" in keys and any(key.startswith("deconv") for key in keys)


def _check_file(path: Path) -> None:
    """Raise if the first bytes are not those of a torch file."""
    if not path.exists():
        raise MissingFileError(f"The checkpoint {path} does not exist. Check the path.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file. Pass the file, often best.pt inside it.")
    with open(path, "rb") as f:
        head = f.read(64)
    if not head:
        raise CheckpointError(f"The checkpoint {path} is empty. Copy or download it again.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: the download probably led to a login or error page. "
            "Download the file itself."
        )
    # Zip archives of torch >= 1.6, or a plain pickle stream of older versions.
    if not (head.startswith(b"PK\x03\x04") or head.startswith(b"\x80")):
        raise CheckpointError(
            f"{path} is not a checkpoint of torch (it starts with {head[:8]!r}). Pass a .pt or .pth file."
        )


def read_torch_file(path: Path, mmap: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Read a torch file without running code from it. Returns the content and the names that were not loaded."""
    _check_file(path)
    is_zip = zipfile.is_zipfile(path)
    truncated = CheckpointError(
        f"The checkpoint {path} is incomplete or damaged ({path.stat().st_size} bytes). Copy or download it again."
    )
    with open(path, "rb") as f:
        if not is_zip and f.read(2) == b"PK":
            raise truncated
    if is_zip and _is_program(path):
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint. Pass the weights it was made from.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip), ()
    except pickle.UnpicklingError as error:
        logger.info("%s holds more than weights, using the restricted reader: %s", path, error)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged stream raises depends on where it breaks
        raise truncated from error
    if not is_zip and tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is in the tar format of torch < 0.1.10. Save it again with a newer torch.")

    reader = SafePickle()
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except HostilePickleError as error:
        raise UnsafeCheckpointError(
            f"The checkpoint {path} was refused: {error} No checkpoint needs that; the file is probably malicious. "
            "Nothing from it was run. Get the checkpoint from a source that you trust."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if reader.refused:
            raise UnsafeCheckpointError(_refusal(path, reader.refused)) from error
        raise truncated from error
    return content, tuple(sorted(reader.refused))


def _is_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def _refusal(path: Path, refused) -> str:
    names = sorted(refused)
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return (
        f"The checkpoint {path} needs objects that are not loaded from files for safety: {shown}. Nothing of them was "
        "run. If you trust the file, save only its 'model_state' (and 'decoder_state') in the program that wrote it."
    )


def check_weights(part: Any, name: str, path: Path, refused: tuple[str, ...]) -> State:
    """Return a part of a file's content if it maps names to tensors, else raise `CheckpointError`."""
    if contains_inert(part):
        raise UnsafeCheckpointError(_refusal(path, refused))
    if not isinstance(part, Mapping) or not part:
        raise CheckpointError(f"{name} of {path} holds no weights, but {type(part).__name__}. Pass a checkpoint.")
    wrong = [k for k, v in part.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if wrong:
        found = type(part[wrong[0]]).__name__
        raise CheckpointError(
            f"{name} of {path} should map names to tensors, but {wrong[0]!r} is {found}. Pass a checkpoint of weights."
        )
    return part


def _strip(key: str, prefix: str) -> str:
    return key[len(prefix):] if prefix and key.startswith(prefix) else key


def _split_unetr(weights: dict[str, torch.Tensor]) -> tuple[dict, dict] | None:
    """Split the weights of a UNETR, which hold encoder and decoder under the UNETR's names; None for other weights."""
    if not _looks_like_decoder(weights) or not any(key.startswith("encoder.") for key in weights):
        return None
    model = {f"image_{key}": value for key, value in weights.items() if key.startswith("encoder.")}
    return model, {key: value for key, value in weights.items() if key.startswith(_DECODER_PREFIXES)}


def read_checkpoint(path: str | os.PathLike, *, prefix: str = "sam.", mmap: bool = False) -> Checkpoint:
    """Read a checkpoint: plain SAM weights, an export with decoder, or a training checkpoint.

    Args:
        path: The file.
        prefix: Removed from the names of a `model_state`.
        mmap: Whether to map the file into memory instead of reading it. The file must not change meanwhile.

    Returns:
        The content, on the CPU, with the data types of the file.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is damaged or not a checkpoint.
        UnsafeCheckpointError: If its weights need code from the file, which is never run.
    """
    path = Path(path)
    content, refused = read_torch_file(path, mmap)
    if not isinstance(content, Mapping) and contains_inert(content):
        raise UnsafeCheckpointError(_refusal(path, refused))
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds {type(content).__name__} instead of named weights. Pass a checkpoint, not a whole model."
        )
    if "adapter_state" in content:
        raise CheckpointError(
            f"{path} holds only the adapter of a model. Load the base model, then call "
            "micro_sam.models.adapters.load_adapter(predictor, path)."
        )
    if "model_state" in content:
        weights = check_weights(content["model_state"], "'model_state'", path, refused)
        # Training on several devices puts "module." before all other prefixes.
        weights = {_strip(_strip(key, "module."), prefix): value for key, value in weights.items()}
    else:
        weights = dict(check_weights(content, "The content", path, refused))

    decoder_state = content.get("decoder_state") if "model_state" in content else None
    split = _split_unetr(weights)
    if split is not None:
        weights, inner = split
        decoder_state = inner if decoder_state is None else decoder_state
    elif _looks_like_decoder(weights):
        raise CheckpointError(
            f"{path} holds only a segmentation decoder. Pass it as decoder_path, together with the model's checkpoint."
        )
    if decoder_state is not None:
        decoder_state = _clean_decoder(decoder_state, "'decoder_state'", path, refused)
    if refused:
        logger.info("Not loaded from %s: %s", path, ", ".join(refused))

    def recorded(name):
        value = content.get(name)
        return dict(value) if isinstance(value, Mapping) and not contains_inert(value) else {}

    return Checkpoint(
        path=path, state=content, model_state=weights, decoder_state=decoder_state, settings=recorded("settings"),
        decoder_settings=recorded("decoder_settings"), refused=refused,
        is_complete=any(key.startswith("mask_decoder.") for key in weights),
    )


def _clean_decoder(state: Any, name: str, path: Path, refused: tuple[str, ...]) -> dict[str, torch.Tensor]:
    state = check_weights(state, name, path, refused)
    return {key: value for key, value in state.items() if not key.startswith("encoder.")}


def read_decoder(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a segmentation decoder: a decoder file, or a checkpoint that holds one.

    Returns:
        Its weights, and its settings as far as the file records them.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it holds no decoder.
    """
    path = Path(path)
    content, refused = read_torch_file(path, mmap=False)
    settings = content.get("decoder_settings") if isinstance(content, Mapping) else None
    for key in ("decoder_state", "model_state"):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
            break
    state = _clean_decoder(content, "The content", path, refused)
    if not _looks_like_decoder(state):
        raise CheckpointError(
            f"{path} holds no segmentation decoder (first names: {', '.join(list(state)[:3])}). Pass a decoder file, "
            "or leave decoder_path out if the checkpoint itself holds the decoder."
        )
    return state, dict(settings) if isinstance(settings, Mapping) and not contains_inert(settings) else {}


def load_checkpoint(checkpoint_path: str | os.PathLike) -> tuple[State, State]:
    """Read a checkpoint and return its whole content and the SAM weights under SAM's names, see `read_checkpoint`."""
    checkpoint = read_checkpoint(checkpoint_path)
    return checkpoint.state, checkpoint.model_state
