"""The errors that users meet: one tree, each also the builtin that callers of the older API catch.

Every message says what came, what was expected and what to do now.
"""

import difflib
from collections.abc import Iterable


class MicroSamError(Exception):
    """Root of all errors that this package raises on purpose."""


class InvalidInputError(MicroSamError, ValueError):
    """An argument has a wrong value, shape, dtype or combination."""


class InvalidTypeError(MicroSamError, TypeError):
    """An argument has a wrong type."""


class MissingFileError(InvalidInputError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class NoObjectsError(InvalidInputError, RuntimeError):
    """There are no labelled objects where some are needed, for example in the patches for training."""


class ImageReadError(InvalidInputError):
    """A file exists, but no image could be read from it (format, key, axes, damaged content)."""


class OutputExistsError(MicroSamError, FileExistsError):
    """The output exists and was made with other settings, or must not be replaced silently."""


class OutputWriteError(MicroSamError, OSError):
    """An output could not be written (permission, full disk)."""


class BlockError(MicroSamError, RuntimeError):
    """Blocks of an image could not be computed, also not when they were tried again."""


class NotInitializedError(MicroSamError, RuntimeError):
    """`generate` or `get_state` was called before `initialize`."""


class DeviceError(MicroSamError, RuntimeError):
    """The requested device is unknown or not available."""


class ModelError(MicroSamError, RuntimeError):
    """A model cannot do what was asked of it."""


class UnknownModelError(InvalidInputError):
    """No model of that name is registered."""


class DecoderMissingError(ModelError, ValueError):
    """The model has no decoder for automatic instance segmentation."""


class CheckpointError(ModelError, ValueError):
    """A checkpoint is truncated, is not a checkpoint, or does not fit the requested architecture."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint needs objects that are not on the allow-list; the message names them."""


class DownloadError(ModelError, ConnectionError):
    """A file could not be downloaded."""


class HashMismatchError(DownloadError, ValueError):
    """A downloaded file does not have the registered hash."""


class EmbeddingMismatchError(MicroSamError, RuntimeError):
    """An embedding cache belongs to other data, another model or another tiling."""


class EmbeddingCacheError(MicroSamError, RuntimeError):
    """An embedding cache is damaged, not writable, or in use by another process."""


class MissingTileError(InvalidInputError, KeyError):
    """Embeddings of a tile were asked for that does not exist or was left out by a mask."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class PromptTileError(InvalidInputError, RuntimeError):
    """The prompts of one object do not fit into one tile."""


class UnsupportedError(MicroSamError, NotImplementedError):
    """The feature is not part of this installation or version."""


class MissingPackageError(UnsupportedError, ModuleNotFoundError):
    """The feature needs a package that is not installed; the message says how to install it."""


class PeftError(InvalidInputError, RuntimeError):
    """The options of parameter-efficient finetuning do not fit each other or the model."""


def require_positive_int(name: str, value: object) -> None:
    """Raise `InvalidInputError` if a number of something is not an integer of at least 1."""
    if not hasattr(value, "__index__") or value.__index__() < 1:
        raise InvalidInputError(f"{name} must be a positive integer, but is {value!r}.")


def nearest_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a sentence that offers the known names nearest to `name`, for error messages."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=n, cutoff=0.4)
    if near:
        return f"Did you mean {' or '.join(repr(k) for k in near)}?"
    return f"Known names: {', '.join(known)}."
