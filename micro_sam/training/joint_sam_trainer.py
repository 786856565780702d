"""Training of SAM together with the decoder for automatic segmentation."""

from typing import Any

from torch import Tensor, nn

from ..core.errors import CheckpointError, InvalidInputError
from . import checkpoint as checkpoints
from .epoch_loop import BatchResult
from .logger import JointSamLogger
from .sam_trainer import SamTrainer, collecting_copy, hand_on_gradients, logged_values

__all__ = ["JointSamLogger", "JointSamTrainer"]

_ENCODER = "encoder."
# Brings the decoder's metric, the sum of three losses, to the range of the interactive one.
_N_MAPS = 3


class JointSamTrainer(SamTrainer):
    """Trains SAM for interactive segmentation, and a decoder for automatic segmentation on the same encoder.

    By default each image is encoded once per iteration, and the optimizer makes one step for the sum of the
    interactive loss and the decoder's loss. Versions 1 of micro_sam encoded twice and made two steps in turn; that is
    `two_steps=True`. The metric is the interactive metric plus a third of the decoder's metric.

    Batches have the targets (B, 4, H, W): instance ids, foreground, centre distances, boundary distances. Those
    without any object are skipped. The method follows Archit et al. 2025 (10.1038/s41592-024-02580-4).

    Args:
        unetr: The decoder network around the encoder of the model, see `model_setup.get_trainable_decoder`.
        instance_loss: Loss of predicted and true maps, (B, 3, H, W) both.
        instance_metric: Metric of the same; lower is better.
        two_steps: Whether to make a step for each of the two losses, with an encoding for each.
        instance_loss_weight: Factor of the decoder's loss in the sum.
        kwargs: Arguments of `SamTrainer`. The optimizer must have the parameters of model and decoder.

    Raises:
        InvalidInputError: If the decoder has another encoder than the model, the optimizer lacks parameters of the
            decoder, or options exclude each other.
    """

    def __init__(
        self,
        unetr: nn.Module,
        instance_loss: nn.Module,
        instance_metric: nn.Module,
        *,
        two_steps: bool = False,
        instance_loss_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not instance_loss_weight > 0:
            raise InvalidInputError(f"instance_loss_weight must be positive, but is {instance_loss_weight!r}.")
        super().__init__(**{"logger": JointSamLogger, **kwargs})
        if unetr.encoder is not self._encoder():
            raise InvalidInputError(
                "The decoder must be built around the encoder of the model: get_unetr(model.sam.image_encoder, ...)."
            )
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [
            name for name, p in unetr.named_parameters()
            if p.requires_grad and not name.startswith(_ENCODER) and id(p) not in known
        ]
        if missing:
            raise InvalidInputError(
                f"The optimizer lacks {len(missing)} parameters of the decoder ({', '.join(missing[:3])} …), which "
                "would not be trained. Pass the parameters of the model and of the decoder, the encoder's once."
            )
        if two_steps and (self.gradient_accumulation_steps > 1 or instance_loss_weight != 1):
            raise InvalidInputError(
                "two_steps=True excludes gradient_accumulation_steps and instance_loss_weight: each loss has its own "
                "step. Leave one of them out."
            )
        self.unetr = unetr
        self.instance_loss = instance_loss
        self.instance_metric = instance_metric
        self.two_steps = two_steps
        self.instance_loss_weight = instance_loss_weight

    def _networks(self) -> list[nn.Module]:
        return [self.model, self.unetr] if hasattr(self, "unetr") else [self.model]

    def _configuration(self) -> dict[str, Any]:
        return {
            **super()._configuration(), "two_steps": self.two_steps,
            "instance_loss_weight": self.instance_loss_weight,
            "instance_loss_class": checkpoints.class_name(self.instance_loss),
            "instance_metric_class": checkpoints.class_name(self.instance_metric),
            "decoder_class": checkpoints.class_name(self.unetr),
        }

    def _decoder(self) -> nn.Module:
        return self.unetr

    def _explain(self, metric: float) -> str:
        return ""

    # --- training ---

    def _labels(self, y: Tensor) -> Tensor:
        if y.shape[1] != 1 + _N_MAPS:
            raise InvalidInputError(
                f"JointSamTrainer needs targets (B, {1 + _N_MAPS}, H, W), but the loader gives {tuple(y.shape)}. Use "
                "with_segmentation_decoder=True in the loader."
            )
        return y[:, :1]

    def _check_range(self, x: Tensor) -> None:
        """Raise for images in another range than that of the decoder's inputs."""
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and 1 < high <= 255):
            raise InvalidInputError(
                f"Images must have values in [0, 255], with a maximum above 1, but those of a batch are in "
                f"[{low:.4g}, {high:.4g}]. Scale them, for example with raw_transform=require_8bit."
            )

    def _maps(self, embeddings: Tensor, input_size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
        """The decoder's maps (B, 3, H, W) in full precision."""
        with self._autocast():
            maps = self.unetr.decode((embeddings, None, None), input_size, shape)
        return maps.float()

    def _train_batch(self, x: Tensor, y: Tensor) -> BatchResult | None:
        if self.two_steps:
            return self._train_batch_twice(x, y)
        return self._train_parts(x, y, with_decoder=True)

    def _train_batch_twice(self, x: Tensor, y: Tensor) -> BatchResult | None:
        """A step for the interactive loss, then one for the decoder's, as versions 1 did."""
        result = self._train_parts(x, y, with_decoder=False)
        self._optimizer_step(int(result is not None))
        share = self._share(len(x) if result is not None else 0)
        if result is None:
            return None
        encoded, input_size = self._encode(x)
        loss = self.instance_loss(self._maps(encoded, input_size, tuple(x.shape[-2:])), y[:, 1:])
        self._backward(loss * share)
        return BatchResult(result.loss, samples=result.samples, logged=(*result.logged, loss.detach()))

    def _train_parts(self, x: Tensor, y: Tensor, with_decoder: bool) -> BatchResult | None:
        """Gradients of the interactive loss and of the decoder's, with one encoding."""
        prompts = self._training_prompts(x, self._labels(y))
        share = self._share(len(prompts))
        if with_decoder:
            decoder_share = self._share(len(x) if prompts else 0)
        if not prompts:
            return None
        encoded, input_size = self._encode(x)
        leaf = collecting_copy(encoded)
        losses = self._interactive(prompts, leaf, input_size, share)
        logged = logged_values(losses)
        if with_decoder:
            loss = self.instance_loss(self._maps(leaf, input_size, tuple(x.shape[-2:])), y[:, 1:])
            self._backward(loss * (decoder_share * self.instance_loss_weight))
            logged = (*logged, loss.detach())
        hand_on_gradients(encoded, leaf)
        return BatchResult(losses.loss.detach(), samples=losses.samples, logged=logged)

    # --- validation ---

    def _validate_batch(self, x: Tensor, y: Tensor, index: int) -> BatchResult | None:
        found = self._validation_losses(x, self._labels(y), index)
        if found is None:
            return None
        losses, embeddings, input_size = found
        maps, target = self._maps(embeddings.float(), input_size, tuple(x.shape[-2:])), y[:, 1:]
        instance_loss, instance_metric = self.instance_loss(maps, target), self.instance_metric(maps, target)
        metric = float(losses.mask_loss) + float(instance_metric) / _N_MAPS
        return BatchResult(losses.loss, metric, losses.samples, (*logged_values(losses), instance_loss))

    # --- checkpoints ---

    def save_checkpoint(
        self, name: str, current_metric: float, best_metric: float, **extra_save_dict: Any
    ) -> None:
        """Write a checkpoint that also has the weights of the decoder as `decoder_state`; see `BaseTrainer`."""
        state = checkpoints.unwrapped(self.unetr.state_dict())
        state = {key: value for key, value in state.items() if not key.startswith(_ENCODER)}
        super().save_checkpoint(name, current_metric, best_metric, **{"decoder_state": state, **extra_save_dict})

    def load_checkpoint(self, checkpoint="best"):
        """Restore the state of a training, with the decoder; see `BaseTrainer`."""
        return super().load_checkpoint(checkpoint)

    def _restore(self, content) -> None:
        if content.get("decoder_state") is None:
            raise CheckpointError(
                "The checkpoint has no decoder. Continue it with SamTrainer, or start from its weights with "
                "checkpoint_path."
            )
        super()._restore(content)
        own = {key for key in self.unetr.state_dict() if not key.startswith(_ENCODER)}
        problem = own.symmetric_difference(content["decoder_state"])
        if problem:
            raise CheckpointError(f"The decoder of the checkpoint differs: {', '.join(sorted(problem)[:5])}.")
        self.unetr.load_state_dict(content["decoder_state"], strict=False)
