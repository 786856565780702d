"""From the checkpoint of a training to the file that is used and passed on."""

import os
from collections.abc import Mapping
from typing import Any

from .._version import __version__
from ..core.errors import CheckpointError, DecoderMissingError
from ..models.checkpoints import ENCODER, read_checkpoint
from ..models.export import save_checkpoint
from ..models.loading import get_sam_model
from . import checkpoint as checkpoint_files


def export_trained_model(
    checkpoint_path: str | os.PathLike,
    output_path: str | os.PathLike,
    *,
    with_segmentation_decoder: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of a training, and what is known about them, without the state of the training.

    The file holds `model_state` with SAM's own names, `decoder_state` if there is a decoder, and plain values as
    `settings` and `decoder_settings`; it is read by `get_sam_model` and by other versions of micro_sam. For other
    programs that read SAM weights see `micro_sam.util.export_custom_sam_model`.

    Args:
        checkpoint_path: The checkpoint, often `best.pt`.
        output_path: The file to write. An existing file is replaced when the new one is complete.
        with_segmentation_decoder: Whether to write the decoder. None writes it if there is one.
        settings: More to record: plain values.

    Raises:
        DecoderMissingError: If the decoder is asked for and the checkpoint has none.
        CheckpointError: If the checkpoint is damaged, or holds only the encoder and the decoder of a model, see
            `export_instance_segmentation_model`.
        OutputWriteError: If the file cannot be written.
    """
    trained = read_checkpoint(checkpoint_path)
    if not trained.is_complete:
        raise CheckpointError(
            f"{checkpoint_path} has only the encoder and the decoder: it was trained for automatic segmentation only. "
            "Use export_instance_segmentation_model, which takes the rest from the model that it started from."
        )
    if with_segmentation_decoder and trained.decoder_state is None:
        raise DecoderMissingError(
            f"{checkpoint_path} has no segmentation decoder. Export without it, or train with "
            "with_segmentation_decoder=True."
        )
    _write(output_path, trained, trained.model_state, with_segmentation_decoder is not False, settings)


def export_instance_segmentation_model(
    trained_model_path: str | os.PathLike,
    output_path: str | os.PathLike,
    model_type: str,
    initial_checkpoint_path: str | os.PathLike | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Export a model that was trained with `train_instance_segmentation`, so that it can be used like any other.

    Encoder and decoder are the trained ones, prompt encoder and mask decoder those of the model it started from.

    Args:
        trained_model_path: The checkpoint of the training, often `best.pt`.
        output_path: The file to write. An existing file is replaced when the new one is complete.
        model_type: The model that the training started from.
        initial_checkpoint_path: The checkpoint that it started from, if it was not the published one.
        settings: More to record in the file: plain values.

    Raises:
        DecoderMissingError: If the trained checkpoint has no decoder.
        CheckpointError: If it is damaged, or of another architecture than the model that it shall have started from.
        OutputWriteError: If the file cannot be written.
    """
    trained = read_checkpoint(trained_model_path)
    if trained.decoder_state is None:
        raise DecoderMissingError(
            f"{trained_model_path} has no segmentation decoder, so it was not trained with "
            "train_instance_segmentation. Use micro_sam.util.export_custom_sam_model."
        )
    predictor = get_sam_model(model_type, device="cpu", checkpoint_path=initial_checkpoint_path)
    if predictor.model_type != trained.architecture:
        raise CheckpointError(
            f"{trained_model_path} holds a {trained.architecture}, but {initial_checkpoint_path or model_type} is a "
            f"{predictor.model_type}. Pass the model that the training started from."
        )
    encoder = {key: value for key, value in trained.model_state.items() if key.startswith(ENCODER)}
    rest = {key: value for key, value in predictor.model.state_dict().items() if not key.startswith(ENCODER)}
    _write(output_path, trained, encoder | rest, True, settings)


def _write(output_path, trained, model_state: Mapping, with_decoder: bool, settings: Mapping[str, Any] | None) -> None:
    recorded = {"model_type": trained.architecture, "image_size": trained.image_size, **trained.settings}
    recorded |= {**(settings or {}), "micro_sam_version": __version__}
    content = {"model_state": dict(model_state), "settings": checkpoint_files.plain(recorded, "settings")}
    if with_decoder and trained.decoder_state is not None:
        content["decoder_state"] = dict(trained.decoder_state)
        content["decoder_settings"] = dict(trained.decoder_settings)
    save_checkpoint(content, output_path)
