"""Training of SAM for interactive segmentation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_em.loss import DiceLoss

from ..core.errors import InvalidInputError, require_positive_int
from ..core.progress import Steps
from ..prompt_generators import IterativePromptGenerator, PromptGeneratorBase
from . import checkpoint as checkpoints
from . import processes
from .base_trainer import BaseTrainer
from .epoch_loop import BatchResult
from .fit_progress import stop_within_iterations
from .interactive import (
    Losses,
    PromptBatch,
    PromptChoice,
    interactive_losses,
    prompt_batch,
    single_pass_losses,
    training_choice,
    validation_choice,
)
from .logger import SamLogger
from .losses import dice_per_object
from .seeding import Purpose, generator, seed_everything

_MSE = nn.MSELoss()
_ITERATIVE = IterativePromptGenerator()


class _PerObject:
    """A loss of torch-em's kind, (1, C, H, W) twice to one value per channel, for each object and mask."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        self.loss = loss

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        target = target.transpose(0, 1)
        values = [self.loss(mask[None], target) for mask in prediction.unbind(1)]
        if any(value.shape != target.shape[1:2] for value in values):
            raise InvalidInputError(
                f"mask_loss must give one value per channel, here {target.shape[1]}, but gave the shape "
                f"{tuple(values[0].shape)}. Use for example DiceLoss(reduce_channel=None)."
            )
        return torch.stack(values, dim=1)


@dataclass(frozen=True)
class _ImagePrompts:
    """The prompts of one image of a batch."""

    image: int
    key: tuple[int, ...]
    choice: PromptChoice
    prompts: PromptBatch


class SamTrainer(BaseTrainer):
    """Trains SAM with simulated prompts: a point or a box for each object, then corrections (see `interactive`).

    Each iteration starts from points (even) or boxes (odd) of a random sample of objects of each image. The prediction
    is corrected with a positive and a negative point, `n_sub_iteration` - 1 times, and the loss is the mean over all
    predictions: Dice loss of the masks plus the squared error of the predicted IoU; for each image the mean over its
    objects, then the mean over the images that have objects. Images with few objects do not limit the others.

    The gradients of each prediction are computed as soon as it is made, so that memory does not grow with
    `n_sub_iteration` or the batch size. The method follows Archit et al. 2025 (10.1038/s41592-024-02580-4).

    Args:
        convert_inputs: Makes the prompts, such as `ConvertToSamInputs`.
        n_sub_iteration: Number of predictions per iteration.
        n_objects_per_batch: Number of objects per image, at most. None takes all.
        mse_loss: Loss of the predicted IoU.
        prompt_generator: Chooses the correction points.
        mask_prob: Probability that a prediction is a prompt for the next one; drawn for each image and prediction,
            in one process and in several alike.
        mask_loss: Loss of probabilities and truth, (1, N, H, W) both, with one value (N,) per channel. By default the
            soft Dice loss.
        kwargs: Arguments of `BaseTrainer`; `loss` and `metric` are the mask loss by default.

    Raises:
        InvalidInputError: If an option is outside its range.
    """

    def __init__(
        self,
        convert_inputs: Callable,
        n_sub_iteration: int,
        n_objects_per_batch: int | None = None,
        mse_loss: nn.Module = _MSE,
        prompt_generator: PromptGeneratorBase = _ITERATIVE,
        mask_prob: float = 0.5,
        mask_loss: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        require_positive_int("n_sub_iteration", n_sub_iteration)
        if n_objects_per_batch is not None:
            require_positive_int("n_objects_per_batch", n_objects_per_batch)
        if not 0 <= mask_prob <= 1:
            raise InvalidInputError(f"mask_prob must be a probability in [0, 1], but is {mask_prob!r}.")
        default_loss = DiceLoss(channelwise=True, reduce_channel=None) if mask_loss is None else mask_loss
        super().__init__(**{"loss": default_loss, "metric": default_loss, "logger": SamLogger, **kwargs})
        self.convert_inputs = convert_inputs
        self.n_sub_iteration = n_sub_iteration
        self.n_objects_per_batch = n_objects_per_batch
        self.mse_loss = mse_loss
        self.prompt_generator = prompt_generator
        self.mask_prob = mask_prob
        self.mask_loss = mask_loss
        self._mark_boundary()

    # --- stopping ---

    def fit_steps(self, *args: Any, should_stop: Callable[[], bool] | None = None, **kwargs: Any) -> Steps[None]:
        """Train as a generator of steps; see `BaseTrainer`.

        In a single process `should_stop` is asked in each layer of the networks, too: the iteration is then given up,
        and repeated when the training is continued.
        """
        steps = super().fit_steps(*args, should_stop=should_stop, **kwargs)
        # Other processes would wait for this one's gradients; what is compiled has no layers that could ask.
        if should_stop is None or processes.is_active() or self.compile_model:
            yield from steps
            return
        with stop_within_iterations(self._networks(), should_stop):
            yield from steps

    def _mark_boundary(self) -> None:
        super()._mark_boundary()
        networks = self._networks() if hasattr(self, "model") else []
        norms = [m for network in networks for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def _save_boundary(self) -> None:
        # Forward passes after the boundary have changed the running statistics; they will be repeated.
        for buffer, value in self._statistics if self._consistent else ():
            buffer.copy_(value)
        super()._save_boundary()

    # --- what the checkpoint says ---

    def _random_owners(self) -> dict[str, Any]:
        names = ("convert_inputs", "prompt_generator")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _configuration(self) -> dict[str, Any]:
        convert = self.convert_inputs
        return {
            **super()._configuration(), "n_sub_iteration": self.n_sub_iteration, "mask_prob": self.mask_prob,
            "n_objects_per_batch": self.n_objects_per_batch,
            "convert_inputs": {
                "class": checkpoints.class_name(convert),
                **{name: getattr(convert, name) for name in ("dilation_strength", "box_distortion_factor")
                   if hasattr(convert, name)},
            },
            "prompt_generator_class": checkpoints.class_name(self.prompt_generator),
            "mask_loss_class": checkpoints.class_name(self.mask_loss or dice_per_object),
            "mse_loss_class": checkpoints.class_name(self.mse_loss),
        }

    def _encoder(self) -> nn.Module:
        return self.model.sam.image_encoder

    def _explain(self, metric: float) -> str:
        return f", mean Dice score {1 - metric:.4f}"

    # --- prompts ---

    def _training_choice(self, rng: np.random.Generator) -> PromptChoice:
        return training_choice(self._iteration)

    def _validation_choice(self, index: int, rng: np.random.Generator) -> PromptChoice:
        return validation_choice(index, rng)

    def _labels(self, y: Tensor) -> Tensor:
        """The instance labels (B, 1, H, W) of the targets."""
        if y.shape[1] != 1:
            raise InvalidInputError(
                f"{type(self).__name__} needs labels (B, 1, H, W), but the loader gives {tuple(y.shape)}. Use "
                "with_segmentation_decoder=False in the loader, or JointSamTrainer."
            )
        return y

    def _prompts(
        self, x: Tensor, y: Tensor, choice: PromptChoice, purpose: Purpose, index: int, offset: int = 0
    ) -> list[_ImagePrompts]:
        """The prompts of the images that have objects.

        What is drawn for an image depends on the index of the batch and on its place among the images of all
        processes, of which `offset` come before those of this one, but not on other images.
        """
        result = []
        for k in range(len(x)):
            own_key = (self.seed, purpose, index, offset + k)
            seed_everything(*own_key)
            prompts = prompt_batch(self.convert_inputs, x[k:k + 1], y[k:k + 1], choice, self.n_objects_per_batch)
            if prompts is not None:
                result.append(_ImagePrompts(k, own_key, choice, prompts))
        return result

    # --- training ---

    def _encode(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embeddings of a batch, and the shape of the resized images."""
        records = [{"image": image, "original_size": tuple(image.shape[-2:])} for image in x]
        with self._autocast():
            embeddings, records = self.model.image_embeddings_oft(records)
        return embeddings, records[0]["input_size"]

    def _mask_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return dice_per_object if self.mask_loss is None else _PerObject(self.mask_loss)

    def _interactive(
        self, prompts: list[_ImagePrompts], embeddings: Tensor, input_size: tuple[int, int], weight: float
    ) -> Losses:
        """Losses of all images, and their gradients multiplied by a weight.

        Args:
            prompts: The prompts.
            embeddings: Embeddings of all images of the batch; their gradients are accumulated.
            input_size: Shape of the resized images.
            weight: Factor of the gradients of the mean over the images.
        """
        parts = []
        for own in prompts:
            seed_everything(*own.key, 1)
            with self._autocast():
                parts.append(interactive_losses(
                    self.model, [{**record, "input_size": input_size} for record in own.prompts.inputs],
                    own.prompts.targets, embeddings[own.image][None], n_sub_iteration=self.n_sub_iteration,
                    multimask=own.choice.multimask, mask_prob=self.mask_prob, prompt_generator=self.prompt_generator,
                    rng=generator(*own.key, 2), mask_loss=self._mask_loss(), mse_loss=self.mse_loss,
                    accumulate=lambda loss: self._backward(loss * (weight / len(prompts))),
                ))
        return _mean(parts)

    def _training_prompts(self, x: Tensor, labels: Tensor) -> list[_ImagePrompts]:
        choice = self._training_choice(generator(self.seed, Purpose.TRAINING, self._iteration))
        offset = processes.rank() * self._train_batches.batch_size
        return self._prompts(x, labels, choice, Purpose.TRAINING, self._iteration, offset)

    def _train_batch(self, x: Tensor, y: Tensor) -> BatchResult | None:
        prompts = self._training_prompts(x, self._labels(y))
        share = self._share(len(prompts))
        if not prompts:
            return None
        encoded, input_size = self._encode(x)
        leaf = collecting_copy(encoded)
        losses = self._interactive(prompts, leaf, input_size, share)
        hand_on_gradients(encoded, leaf)
        return BatchResult(losses.loss.detach(), samples=losses.samples, logged=logged_values(losses))

    # --- validation ---

    def _validation_losses(self, x: Tensor, y: Tensor, index: int) -> tuple[Losses, Tensor, tuple[int, int]] | None:
        """Losses of a single prediction; also the embeddings of all images, and the shape of the resized images."""
        choice = self._validation_choice(index, generator(self.seed, Purpose.VALIDATION, index))
        prompts = self._prompts(x, y, choice, Purpose.VALIDATION, index)
        if not prompts:
            return None
        embeddings, input_size = self._encode(x)
        with self._autocast():
            parts = [
                single_pass_losses(
                    self.model, [{**record, "input_size": input_size} for record in own.prompts.inputs],
                    own.prompts.targets, embeddings[own.image][None], multimask=own.choice.multimask,
                    mask_loss=self._mask_loss(), mse_loss=self.mse_loss,
                ) for own in prompts
            ]
        return _mean(parts), embeddings, input_size

    def _validate_batch(self, x: Tensor, y: Tensor, index: int) -> BatchResult | None:
        found = self._validation_losses(x, self._labels(y), index)
        if found is None:
            return None
        losses = found[0]
        return BatchResult(losses.loss, float(losses.mask_loss), losses.samples, logged_values(losses))


def _mean(parts: list[Losses]) -> Losses:
    loss, mask_loss, iou_loss = (
        torch.stack([getattr(part, name) for part in parts]).mean() for name in ("loss", "mask_loss", "iou_loss")
    )
    samples = [sample for part in parts for sample in part.samples]
    return Losses(loss, mask_loss, iou_loss, float(np.mean([part.model_iou for part in parts])), samples)


def logged_values(losses: Losses) -> tuple:
    return losses.mask_loss.detach(), losses.iou_loss.detach(), losses.model_iou


def collecting_copy(encoded: Tensor) -> Tensor:
    """A copy that collects gradients in full precision, without handing them on to the encoder."""
    return encoded.detach().float().requires_grad_(encoded.requires_grad)


def hand_on_gradients(encoded: Tensor, leaf: Tensor) -> None:
    """Hand the collected gradients on to the encoder."""
    if encoded.requires_grad and leaf.grad is not None:
        encoded.backward(leaf.grad.to(encoded.dtype))
