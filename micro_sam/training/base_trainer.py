"""What all trainers share: the loop over epochs, exact continuation, several processes, and safe checkpoints."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch_em.trainer import DefaultTrainer
from torch_em.util import auto_compile

from .._version import __version__
from ..core.allocator import LARGEST_IN_TRAINING, reusing_memory
from ..core.errors import InvalidInputError, ModelError, require_positive_int
from ..core.progress import Steps
from ..models.precision import gains_from_half_precision
from . import checkpoint as checkpoints
from . import processes
from .activation_checkpointing import checkpointed
from .data_order import EpochLoader
from .epoch_loop import BatchResult, EpochLoop
from .fit_progress import follow, stop_on_interrupt
from .logger import PredictionLogger
from .seeding import new_seed, preserved_random_states

logger = logging.getLogger(__name__)


class BaseTrainer(EpochLoop, DefaultTrainer):
    """Trains a network: torch-em's trainer with continuation, safe checkpoints and several processes.

    All random numbers follow from the seed and the number of the epoch, item or iteration. A run that was killed and
    continued from `latest.pt` therefore gives the losses of an uninterrupted run, and so do several processes compared
    to one with a larger batch, up to rounding and as far as the network has no BatchNorm layers in training mode.
    Validation draws the same patches and prompts in each epoch.

    Frozen parts (without parameters that require gradients) stay in evaluation mode.

    Args:
        *args: Arguments of `torch_em.trainer.DefaultTrainer`.
        **kwargs: More of them. `mixed_precision` is bfloat16 on the CPU, if it
            has the instructions for it, and float16 with scaled gradients on CUDA; elsewhere it is switched off.
            `early_stopping` is the number of epochs in a row without a better metric after which training stops.
            Any scheduler works; it gets the metric if it takes one, as `ReduceLROnPlateau`.
        seed: Seed of all random numbers. None draws one, which is recorded in the checkpoints.
        gradient_accumulation_steps: Number of batches for one step of the optimizer.
        gradient_clipping: Largest norm of the gradients, or None.
        checkpoint_encoder: Whether to compute the activations of encoder and segmentation decoder again in the
            backward pass instead of keeping them: less memory for more time.
        settings: What checkpoints say about the model, beside architecture, image size and version: plain values, such
            as the normalization of images, parameter-efficient layers, and the training data.
        decoder_settings: What checkpoints say about the segmentation decoder, beside its number of features:
            `normalization`, which is `running` by default (see `micro_sam.models.decoder.DecoderAdapter`).

    Raises:
        InvalidInputError: If an option is outside its range.
    """

    def __init__(
        self,
        *args: Any,
        seed: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clipping: float | None = None,
        checkpoint_encoder: bool = False,
        settings: Mapping[str, Any] | None = None,
        decoder_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require_positive_int("gradient_accumulation_steps", gradient_accumulation_steps)
        if gradient_clipping is not None and not gradient_clipping > 0:
            raise InvalidInputError(f"gradient_clipping must be positive or None, but is {gradient_clipping!r}.")
        if seed is not None and (not hasattr(seed, "__index__") or seed < 0):
            raise InvalidInputError(f"seed must be a non-negative integer or None, but is {seed!r}.")
        given = signature(DefaultTrainer).bind(*args, **kwargs).arguments
        if given.get("mixed_precision", True) and not gains_from_half_precision(given["device"]):
            logger.info("Training in single precision: %s does not gain from mixed precision.", given["device"])
            given["mixed_precision"] = False
        super().__init__(**{"logger": PredictionLogger, **given})
        self._device_type = self.device.type
        if self.early_stopping is not None:
            require_positive_int("early_stopping", self.early_stopping)
        self.rank = processes.rank() if processes.is_active() else self.rank
        self.seed = new_seed() if seed is None else int(seed)
        self.gradient_accumulation_steps = int(gradient_accumulation_steps)
        self.gradient_clipping = gradient_clipping
        self.checkpoint_encoder = checkpoint_encoder
        self.settings = checkpoints.plain(dict(settings or {}), "settings")
        self.decoder_settings = checkpoints.plain(dict(decoder_settings or {}), "decoder_settings")
        self.best_metric = math.inf
        self.current_metric = math.nan
        self.stopped_early = False
        self.max_iteration = self.max_epoch = math.inf
        self._position = 0
        self._n_skipped = 0
        self._n_batches = self._loaded_n_batches = None
        self._is_initialized = False
        self._mark_boundary()

    # --- what trainers define ---

    def _networks(self) -> list[nn.Module]:
        """The networks that are trained."""
        return [self.model]

    def _encoder(self) -> nn.Module:
        return getattr(self.model, "encoder", self.model)

    def _random_owners(self) -> dict[str, Any]:
        """Objects that may bring their own random generator."""
        return {}

    def _predict(self, x: Tensor, y: Tensor) -> Tensor:
        """The prediction for a batch, in full precision: sums over many pixels need it."""
        with self._autocast():
            return self.model(x).float()

    def _train_batch(self, x: Tensor, y: Tensor) -> BatchResult | None:
        """Compute the loss of a batch and accumulate its gradients; None if there is nothing to learn from it."""
        share = self._share(len(x))
        prediction = self._predict(x, y)
        loss = self.loss(prediction, y)
        self._backward(loss * share)
        return BatchResult(loss.detach(), samples=prediction.detach())

    def _validate_batch(self, x: Tensor, y: Tensor, index: int) -> BatchResult | None:
        """Compute the loss and the metric of a batch; None if there is nothing to measure."""
        prediction = self._predict(x, y)
        return BatchResult(self.loss(prediction, y), float(self.metric(prediction, y)), prediction)

    def _explain(self, metric: float) -> str:
        """What the report of an epoch says about the metric."""
        return ""

    def _configuration(self) -> dict[str, Any]:
        """The settings of the training, for the checkpoint."""
        return {
            "format_version": checkpoints.FORMAT_VERSION, "trainer_class": checkpoints.class_name(type(self)),
            "micro_sam_version": __version__, "torch_version": str(torch.__version__),
            "name": self.name, "device": str(self.device), "seed": self.seed,
            "log_image_interval": self.log_image_interval, "mixed_precision": self.mixed_precision,
            "mixed_precision_dtype": self.mixed_precision_dtype, "compile_model": self.compile_model,
            "early_stopping": self.early_stopping, "n_processes": processes.world_size(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.gradient_clipping, "checkpoint_encoder": self.checkpoint_encoder,
            "model_class": checkpoints.class_name(self.model), "loss_class": checkpoints.class_name(self.loss),
            "metric_class": checkpoints.class_name(self.metric),
            "logger_class": checkpoints.class_name(self.logger_class),
            "optimizer": checkpoints.describe_optimizer(self.optimizer),
            "lr_scheduler_class": checkpoints.class_name(self.lr_scheduler),
            "train_loader": checkpoints.describe_loader(self.train_loader),
            "val_loader": checkpoints.describe_loader(self.val_loader),
        }

    def _decoder(self) -> nn.Module | None:
        """The network with the segmentation decoder, if there is one."""
        return self.model if hasattr(self.model, "out_conv") else None

    def _model_description(self) -> dict[str, Any]:
        """What the checkpoint says about its weights."""
        description = {"settings": {**checkpoints.describe_model(self.model), **self.settings}}
        if self._decoder() is not None:
            decoder = {**checkpoints.describe_decoder(self._decoder()), **self.decoder_settings}
            description["decoder_settings"] = decoder
        return description

    # --- one step ---

    def _autocast(self):
        dtype = getattr(torch, self.mixed_precision_dtype)
        return torch.autocast(self._device_type, dtype=dtype, enabled=bool(self.mixed_precision))

    def _share(self, n_images: int) -> float | None:
        """This process's share of the images that the mean loss is taken over; None if no process has any."""
        total, = processes.add_up([n_images], self.device)
        return n_images / total if total else None

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there."""
        if not bool(torch.isfinite(loss.detach())):
            raise ModelError(
                f"The loss is not finite in iteration {self._iteration}. Continue from latest.pt with a lower learning "
                "rate, with gradient_clipping, or with mixed_precision=False; and check the images for NaN."
            )
        self._scaled(loss).backward()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _optimizer_step(self, n_batches: int = 1) -> None:
        """Update the weights with the mean gradient of some batches."""
        parameters = self._trained_parameters()
        processes.add_up_gradients(parameters, self.device)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if n_batches and gradients:
            scaled = self.scaler is not None and self.scaler.is_enabled()
            if scaled:
                self.scaler.unscale_(self.optimizer)
            if n_batches > 1:
                torch._foreach_div_(gradients, n_batches)
            if self.gradient_clipping is not None:
                nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
            self._consistent = False
            if scaled:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        self.optimizer.zero_grad()

    # --- fitting ---

    def fit(
        self,
        iterations: int | None = None,
        load_from_checkpoint: os.PathLike | str | None = None,
        epochs: int | None = None,
        save_every_kth_epoch: int | None = None,
        progress: Any = None,
        overwrite_training: bool = True,
        *,
        save_every_n_iterations: int | None = None,
        save_every_minutes: float | None = 10.0,
        should_stop: Callable[[], bool] | None = None,
        verbose: bool = True,
    ) -> None:
        """Train. Exactly one of `iterations` and `epochs` must be given.

        After each epoch there is a validation, and `latest.pt` is written; `best.pt` if the metric is the best so far.

        Args:
            iterations: Number of batches to train with.
            load_from_checkpoint: Continue from this checkpoint: `latest`, `best` or a path. `iterations` and
                `epochs` then count from the beginning of the training that is continued.
            epochs: Number of passes over the loader.
            save_every_kth_epoch: Keep the checkpoint of every k-th epoch, as `epoch-<n>.pt`.
            progress: An object like a tqdm bar, or with the signals `pbar_total`, `pbar_update` and
                `pbar_description`. None shows a tqdm bar.
            overwrite_training: Whether to start anew if there is a checkpoint of this name. Otherwise a training that
                was interrupted continues, and one that is complete or was stopped early is left as it is.
            save_every_n_iterations: Write `latest.pt` also after so many iterations.
            save_every_minutes: Write `latest.pt` also after so many minutes.
            should_stop: Called after each step of the optimizer, by trainers of SAM also in each layer; if it returns
                True, the training is cancelled.
            verbose: Whether to show a bar if there is no `progress`.

        Raises:
            Cancelled: After Ctrl-C, or if `should_stop` says so. `latest.pt` is written, and can be continued.
            InvalidInputError: If options are missing, exclude each other, or a whole epoch has no objects.
            MissingFileError, CheckpointError: If the checkpoint cannot be continued.
            ModelError: If the loss is not finite.
        """
        with stop_on_interrupt() as interrupted:
            steps = self.fit_steps(
                iterations, load_from_checkpoint, epochs, save_every_kth_epoch, overwrite_training,
                save_every_n_iterations=save_every_n_iterations, save_every_minutes=save_every_minutes,
                should_stop=lambda: (should_stop is not None and should_stop()) or interrupted(),
            )
            follow(steps, progress, verbose and processes.rank() == 0)

    def fit_steps(
        self,
        iterations: int | None = None,
        load_from_checkpoint: os.PathLike | str | None = None,
        epochs: int | None = None,
        save_every_kth_epoch: int | None = None,
        overwrite_training: bool = True,
        *,
        save_every_n_iterations: int | None = None,
        save_every_minutes: float | None = 10.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> Steps[None]:
        """Train as a generator of steps, one per iteration; see `fit`. Closing it cancels and writes `latest.pt`."""
        for name, value in (("save_every_kth_epoch", save_every_kth_epoch), ("iterations", iterations),
                            ("epochs", epochs), ("save_every_n_iterations", save_every_n_iterations)):
            if value is not None:
                require_positive_int(name, value)
        if not overwrite_training:
            if load_from_checkpoint is not None:
                raise InvalidInputError(
                    "overwrite_training=False and load_from_checkpoint exclude each other. Leave one of them out."
                )
            if os.path.exists(checkpoints.path_of(self.checkpoint_folder, "latest")):
                load_from_checkpoint = "latest"
        self._save_interval = (save_every_n_iterations, save_every_minutes)
        self._save_every_kth_epoch = save_every_kth_epoch
        self._should_stop = should_stop or (lambda: False)
        with preserved_random_states(), contextlib.ExitStack() as stack:
            self._initialize(iterations, load_from_checkpoint, epochs)
            if self._is_complete():
                logger.warning("The training %r is complete: %d epochs, %d iterations%s. Ask for more to continue it.",
                               self.name, self._epoch, self._iteration, " (stopped early)" * self.stopped_early)
                return
            if self.device.type == "cpu":
                stack.enter_context(reusing_memory(LARGEST_IN_TRAINING))
            if self.checkpoint_encoder:
                stack.enter_context(checkpointed(self._encoder(), self._decoder()))
            yield from self._run()

    def _is_complete(self) -> bool:
        if self._position:
            return False
        if self.stopped_early and self.early_stopping is not None:
            return True
        return self._epoch >= self.max_epoch or self._iteration >= self.max_iteration

    def _initialize(self, iterations, load_from_checkpoint, epochs=None):
        if (iterations is None) == (epochs is None):
            raise InvalidInputError(
                f"Exactly one of iterations and epochs must be given, but iterations={iterations}, epochs={epochs}."
            )
        first_iteration, first_epoch = self._iteration, self._epoch
        if not self._is_initialized:
            self._prepare()
        if load_from_checkpoint is not None:
            self.load_checkpoint(load_from_checkpoint)
        # Loaders and what is recorded follow the seed, which the checkpoint may have replaced.
        self._train_batches = EpochLoader(self.train_loader, self.seed)
        self._val_batches = EpochLoader(self.val_loader, self.seed, evenly=False)
        self.init_data = self._build_init()
        self._n_batches = n_batches = len(self._train_batches)
        self._check_position()
        epochs = math.ceil(iterations / n_batches) if epochs is None else epochs
        iterations = epochs * n_batches if iterations is None else iterations
        self.max_iteration, self.max_epoch = first_iteration + iterations, first_epoch + epochs
        processes.share_weights(self._networks())
        self._mark_boundary()
        if not self._is_initialized:
            self.logger = None
            if self.logger_class is not None and processes.rank() == 0:
                self.logger = self.logger_class(self, self.save_root, **(self.logger_kwargs or {}))
            self._is_initialized = True
        return self.best_metric

    def _prepare(self) -> None:
        self.model = auto_compile(self.model, self.compile_model, default_compile=False)
        for part in (*self._networks(), self.loss):
            if isinstance(part, nn.Module):
                part.to(self.device)
        # Fails now rather than after hours if a state holds what a checkpoint cannot.
        checkpoints.plain(self.optimizer.state_dict(), "The optimizer's state")
        if self.lr_scheduler is not None:
            checkpoints.plain(self.lr_scheduler.state_dict(), "The scheduler's state")

    def _check_position(self) -> None:
        n_batches = self._n_batches
        if self._position and self._loaded_n_batches not in (None, n_batches):
            logger.warning("The loader has %d batches, but had %d when the training was interrupted in epoch %d. This "
                           "epoch starts again.", n_batches, self._loaded_n_batches, self._epoch)
            self._position = 0

    def _build_init(self) -> dict[str, Any]:
        return checkpoints.plain(self._configuration(), "init")
