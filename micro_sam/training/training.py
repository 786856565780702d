"""Finetuning in one call: with prompts (`train_sam`), for automatic segmentation only, or with a hardware preset.

The losses and the schedule of prompts are those of Archit et al. 2025 (10.1038/s41592-024-02580-4).
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from ..core.errors import InvalidTypeError, nearest_names
from ..core.settings import get_device
from .base_trainer import BaseTrainer
from .configurations import CONFIGURATIONS, choose_configuration, configuration_options
from .convert import ConvertToSamInputs
from .costs import computes_twice
from .data import default_sam_dataset, default_sam_loader
from .export import export_instance_segmentation_model
from .joint_sam_trainer import JointSamTrainer
from .losses import DecoderLoss
from .model_setup import decoder_settings, get_trainable_decoder, get_trainable_sam_model
from .runs import (
    MODEL_OPTIONS,
    Optimization,
    check_model_options,
    check_options,
    describe_run,
    fit,
    parameter_names,
    quiet_libraries,
    verify_loaders,
)
from .sam_trainer import SamTrainer

__all__ = [
    "CONFIGURATIONS", "default_sam_dataset", "default_sam_loader", "export_instance_segmentation_model", "main",
    "train_instance_segmentation", "train_sam", "train_sam_for_configuration",
]


def train_sam(
    name: str,
    model_type: str,
    train_loader: DataLoader,
    val_loader: DataLoader,
    n_epochs: int = 100,
    early_stopping: int | None = 10,
    n_objects_per_batch: int | None = 25,
    checkpoint_path: str | os.PathLike | None = None,
    with_segmentation_decoder: bool = True,
    freeze: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    lr: float = 1e-5,
    n_sub_iteration: int = 8,
    save_root: str | os.PathLike | None = None,
    mask_prob: float = 0.5,
    n_iterations: int | None = None,
    scheduler_class: Callable | None = ReduceLROnPlateau,
    scheduler_kwargs: dict[str, Any] | None = None,
    save_every_kth_epoch: int | None = None,
    pbar_signals: Any = None,
    optimizer_class: Callable = AdamW,
    peft_kwargs: dict | None = None,
    ignore_warnings: bool = True,
    verify_n_labels_in_loader: int | None = 50,
    box_distortion_factor: float | None = 0.025,
    overwrite_training: bool = True,
    strict_decoder_loading: bool = True,
    *,
    seed: int | None = 0,
    resume: bool = False,
    mixed_precision: bool = True,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float | None = None,
    checkpoint_encoder: bool | None = None,
    two_steps: bool = False,
    save_every_n_iterations: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Any = None,
    verbose: bool = True,
    settings: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> None:
    """Finetune a model with simulated prompts, and by default its decoder for automatic segmentation too.

    Checkpoints are in `<save_root or .>/checkpoints/<name>/`: `best.pt` of the epoch with the best validation and
    `latest.pt`, from which an interrupted training continues.

    Args:
        name: Name of the training; may contain slashes.
        model_type: The model to start from, see `micro_sam.util.get_sam_model`.
        train_loader: Yields images (B, 1 or 3, H, W), 0…255, and targets: instance ids (B, 1, H, W); with decoder
            (B, 4, H, W), with foreground, centre and boundary distances. See `default_sam_loader`.
        val_loader: The same for validation.
        n_epochs: Number of passes over the loader.
        early_stopping: Stop after so many epochs without a better validation. None never stops early.
        n_objects_per_batch: Objects per image and iteration, at most; the main knob for memory and time.
        checkpoint_path: A checkpoint to start from instead of the published weights.
        with_segmentation_decoder: Whether to train the decoder for automatic segmentation too.
        freeze: What is not trained: some of `image_encoder`, `prompt_encoder`, `mask_decoder`.
        device: The device; None chooses it.
        lr: The learning rate.
        n_sub_iteration: Predictions per iteration, each corrected for the next one.
        save_root: Folder for `checkpoints` and `logs`; None is the current one.
        mask_prob: Probability that a prediction is a prompt for the next one.
        n_iterations: Number of iterations; overrides `n_epochs`.
        scheduler_class: A scheduler of torch for the learning rate. None keeps it.
        scheduler_kwargs: Its arguments. None for the default scheduler is mode `min`, factor 0.9, patience 3 epochs.
        save_every_kth_epoch: Keep the checkpoint of every k-th epoch.
        pbar_signals: Has the signals `pbar_total`, `pbar_update` and `pbar_description`.
        optimizer_class: An optimizer of torch, called with the parameters and `lr`.
        peft_kwargs: Options of `micro_sam.models.peft_sam.PEFT_Sam`, to train few parameters of the encoder.
        ignore_warnings: Whether to hide warnings of other packages. Those of this package are always shown.
        verify_n_labels_in_loader: How many batches of each loader to check before; None checks nothing.
        box_distortion_factor: Each side of a box moves outwards by up to this share of its length.
        overwrite_training: Whether to start anew if there are checkpoints of this name. Otherwise a training that was
            interrupted continues, and a complete one is left as it is.
        strict_decoder_loading: Whether a decoder in the checkpoint that does not fit is an error; otherwise what does
            not fit starts anew, with a warning.
        seed: Seed of all random choices. None draws one, which checkpoints record.
        resume: Whether to continue the training of this name, if there is one. The same as
            `overwrite_training=False`.
        mixed_precision: Whether to compute in half precision, where the device gains from it.
        gradient_accumulation_steps: Batches per step of the optimizer.
        gradient_clipping: Largest norm of the gradients; None does not limit them.
        checkpoint_encoder: Whether to compute encoder and segmentation decoder twice, to need less memory. None does
            so on a CPU for encoders larger than ViT-T. The gradients are the same.
        two_steps: Whether to make a step of the optimizer for each of the two losses, with an encoding for each, as
            versions 1 did, instead of one for their sum.
        save_every_n_iterations: Write `latest.pt` also after so many iterations; it is always written after an epoch
            and every ten minutes.
        should_stop: Called after each step and in each layer; if it returns True the training is cancelled.
        progress: An object like a tqdm bar to show the progress with.
        verbose: Whether to show bars.
        settings: More for the checkpoints to record: plain values, for example the training data.
        model_kwargs: `image_size`, `num_multimask_outputs` and `flexible_load_checkpoint`, see
            `get_trainable_sam_model`.

    Raises:
        InvalidInputError, InvalidTypeError: If options or the loaders do not fit; before anything is loaded.
        UnknownModelError, CheckpointError, DownloadError: If there is no such model, or it cannot be loaded.
        Cancelled: After Ctrl-C, or if `should_stop` says so. The training can be resumed.
    """
    check_model_options(train_sam, model_kwargs)
    check_options(freeze, peft_kwargs, lr, pbar_signals, progress, n_epochs, n_iterations)
    device = get_device(device)
    loaders = {"training": train_loader, "validation": val_loader}
    with quiet_libraries(ignore_warnings):
        verify_loaders(
            loaders, verify_n_labels_in_loader, verbose and pbar_signals is None,
            with_segmentation_decoder=with_segmentation_decoder,
        )
        model, state = get_trainable_sam_model(
            model_type, device, checkpoint_path, freeze, return_state=True, peft_kwargs=peft_kwargs, **model_kwargs
        )
        networks, trainer_class, of_decoder = [model], SamTrainer, {}
        if with_segmentation_decoder:
            unetr = get_trainable_decoder(model.sam.image_encoder, state, device, strict=strict_decoder_loading)
            networks, trainer_class, loss = [model, unetr], JointSamTrainer, DecoderLoss()
            of_decoder = {
                "unetr": unetr, "instance_loss": loss, "instance_metric": loss, "two_steps": two_steps,
                "decoder_settings": decoder_settings(state),
            }
        optimization = Optimization.create(networks, lr, optimizer_class, scheduler_class, scheduler_kwargs)
        trainer = trainer_class(
            name=name, train_loader=train_loader, val_loader=val_loader, model=model,
            convert_inputs=ConvertToSamInputs(model.transform, box_distortion_factor=box_distortion_factor),
            n_sub_iteration=n_sub_iteration, n_objects_per_batch=n_objects_per_batch, mask_prob=mask_prob,
            optimizer=optimization.optimizer, lr_scheduler=optimization.scheduler, device=device,
            early_stopping=early_stopping, save_root=save_root, log_image_interval=100, compile_model=False,
            mixed_precision=mixed_precision, seed=seed, gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clipping=gradient_clipping,
            checkpoint_encoder=computes_twice(checkpoint_encoder, model_type, device),
            settings=describe_run(model_type, checkpoint_path, model.sam, freeze, settings), **of_decoder,
        )
        fit(
            trainer, n_epochs, n_iterations, resume=resume, overwrite_training=overwrite_training,
            pbar_signals=pbar_signals, progress=progress, save_every_kth_epoch=save_every_kth_epoch,
            save_every_n_iterations=save_every_n_iterations, should_stop=should_stop, verbose=verbose,
        )


def train_instance_segmentation(
    name: str,
    model_type: str,
    train_loader: DataLoader,
    val_loader: DataLoader,
    n_epochs: int = 100,
    early_stopping: int | None = 10,
    loss: nn.Module | None = None,
    metric: nn.Module | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    freeze: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    lr: float = 1e-5,
    save_root: str | os.PathLike | None = None,
    n_iterations: int | None = None,
    scheduler_class: Callable | None = ReduceLROnPlateau,
    scheduler_kwargs: dict[str, Any] | None = None,
    save_every_kth_epoch: int | None = None,
    pbar_signals: Any = None,
    optimizer_class: Callable = AdamW,
    peft_kwargs: dict | None = None,
    ignore_warnings: bool = True,
    overwrite_training: bool = True,
    strict_decoder_loading: bool = True,
    *,
    verify_n_labels_in_loader: int | None = 50,
    seed: int | None = 0,
    resume: bool = False,
    mixed_precision: bool = True,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float | None = None,
    checkpoint_encoder: bool | None = None,
    save_every_n_iterations: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Any = None,
    verbose: bool = True,
    settings: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> None:
    """Finetune only what automatic segmentation needs: the image encoder and the decoder.

    Prompts of the model do not learn from it, and suffer if the encoder is trained; see
    `export_instance_segmentation_model` for using the result.

    Args:
        name: Name of the training, see `train_sam` for this and all arguments that are not listed here.
        model_type: The model to start from.
        train_loader: Yields images (B, 1 or 3, H, W), 0…255, and targets (B, 3, H, W): foreground, centre and
            boundary distances. See `default_sam_loader` with `train_instance_segmentation_only`.
        val_loader: The same for validation.
        n_epochs: Number of passes over the loader.
        early_stopping: Stop after so many epochs without a better validation.
        loss: Loss of predicted and true maps. None is `DecoderLoss`.
        metric: The same for validation; lower is better. None is the loss.
        freeze: `image_encoder`, or None to train it too.

    Raises:
        InvalidInputError, InvalidTypeError: If options or the loaders do not fit; before anything is loaded.
        UnknownModelError, CheckpointError, DownloadError: If there is no such model, or it cannot be loaded.
        Cancelled: After Ctrl-C, or if `should_stop` says so. The training can be resumed.
    """
    check_model_options(train_instance_segmentation, model_kwargs)
    check_options(freeze, peft_kwargs, lr, pbar_signals, progress, n_epochs, n_iterations)
    device = get_device(device)
    loaders = {"training": train_loader, "validation": val_loader}
    with quiet_libraries(ignore_warnings):
        verify_loaders(
            loaders, verify_n_labels_in_loader, verbose and pbar_signals is None, with_segmentation_decoder=True,
            train_instance_segmentation_only=True,
        )
        model, state = get_trainable_sam_model(
            model_type, device, checkpoint_path, freeze, return_state=True, peft_kwargs=peft_kwargs, **model_kwargs
        )
        unetr = get_trainable_decoder(model.sam.image_encoder, state, device, strict=strict_decoder_loading)
        loss = DecoderLoss() if loss is None else loss
        optimization = Optimization.create([unetr], lr, optimizer_class, scheduler_class, scheduler_kwargs)
        trainer = BaseTrainer(
            name=name, train_loader=train_loader, val_loader=val_loader, model=unetr, loss=loss,
            metric=loss if metric is None else metric, optimizer=optimization.optimizer,
            lr_scheduler=optimization.scheduler, device=device, early_stopping=early_stopping, save_root=save_root,
            log_image_interval=50, compile_model=False, mixed_precision=mixed_precision, seed=seed,
            gradient_accumulation_steps=gradient_accumulation_steps, gradient_clipping=gradient_clipping,
            checkpoint_encoder=computes_twice(checkpoint_encoder, model_type, device),
            decoder_settings=decoder_settings(state),
            settings=describe_run(model_type, checkpoint_path, model.sam, freeze, settings),
        )
        fit(
            trainer, n_epochs, n_iterations, resume=resume, overwrite_training=overwrite_training,
            pbar_signals=pbar_signals, progress=progress, save_every_kth_epoch=save_every_kth_epoch,
            save_every_n_iterations=save_every_n_iterations, should_stop=should_stop, verbose=verbose,
        )


def train_sam_for_configuration(
    name: str,
    train_loader: DataLoader,
    val_loader: DataLoader,
    configuration: str | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    with_segmentation_decoder: bool = True,
    train_instance_segmentation_only: bool = False,
    model_type: str | None = None,
    **kwargs: Any,
) -> None:
    """Finetune with the preset for a kind of hardware.

    Args:
        name: Name of the training.
        train_loader: See `train_sam`, or `train_instance_segmentation`.
        val_loader: The same for validation.
        configuration: A name in `CONFIGURATIONS`. None chooses by the device, see `choose_configuration`.
        checkpoint_path: A checkpoint to start from instead of the published weights.
        with_segmentation_decoder: Whether to train the decoder for automatic segmentation too.
        train_instance_segmentation_only: Whether to train for automatic segmentation only.
        model_type: The model to start from. None takes the preset's.
        kwargs: Arguments of `train_sam` or `train_instance_segmentation`, which override the preset. One that is None
            leaves the preset's value; an empty dict as `peft_kwargs` switches off that of a preset.

    Raises:
        InvalidInputError: If there is no such preset; names the nearest ones.
        InvalidTypeError: If there is no such argument; names the nearest ones.
    """
    train = train_instance_segmentation if train_instance_segmentation_only else train_sam
    known = [*parameter_names(train), *MODEL_OPTIONS]
    interactive = set(parameter_names(train_sam)) - set(known)
    for option in kwargs:
        if option not in known and option not in interactive:
            raise InvalidTypeError(f"There is no training option {option!r}. {nearest_names(option, known)}")
    configuration = choose_configuration(kwargs.get("device")) if configuration is None else configuration
    options = configuration_options(configuration, {**kwargs, "model_type": model_type})
    of_preset = CONFIGURATIONS[configuration]["model_type"]
    if options["model_type"][:5] != of_preset[:5]:
        warnings.warn(
            f"The preset {configuration} is made for {of_preset}, but {options['model_type']} is trained. It may need "
            "more memory or time; n_objects_per_batch is the option to lower.", stacklevel=2,
        )
    if train_instance_segmentation_only:
        dropped = sorted(option for option in kwargs if option in interactive)
        if dropped:
            warnings.warn(f"Not used for automatic segmentation only: {', '.join(dropped)}.", stacklevel=2)
        options = {option: value for option, value in options.items() if option not in interactive}
    else:
        options["with_segmentation_decoder"] = with_segmentation_decoder
    train(name=name, train_loader=train_loader, val_loader=val_loader, checkpoint_path=checkpoint_path, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `micro_sam.train` and return its exit code."""
    # The commands lie above this module.
    return import_module("micro_sam.cli.train").main(argv)
