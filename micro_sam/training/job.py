"""Finetuning from files to a model that is ready for use: checks, training, comparison, export.

The command `micro_sam.train` and the widget describe a `FinetuneJob` and run it; neither has logic of its own.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.errors import InvalidInputError, MicroSamError, MissingFileError, OutputExistsError, nearest_names
from ..core.inputs import find_inputs
from ..core.output import prepare_folder
from ..core.progress import Steps, drain
from ..core.readers import is_zarr
from ..models.build_sam import ARCHITECTURES
from ..models.checkpoints import read_checkpoint
from ..models.registry import find_spec, list_models
from ..models.specs import SHIPPED_MODEL
from ..segmentation.workflow import default_options
from .data import default_sam_dataset, default_sam_loader
from .export import export_instance_segmentation_model, export_trained_model
from .outcome import MAX_IMAGES, HeldOut, Scores, compare, held_out_images, score_steps, write_outcome
from .preflight import preflight_steps
from .preflight_report import PreflightReport
from .raw_transforms import get_raw_transform
from .splits import DataPart, Split, split_data
from .training import train_instance_segmentation, train_sam

Mode = Literal["instances", "instances_only", "none"]
TRAINED_TASKS: Mapping[str, tuple[str, ...]] = {
    "instances": ("automatic", "point", "box"), "instances_only": ("automatic",), "none": ("point", "box"),
}
_MAX_SCORED = 24


def check_model_name(model_type: str, checkpoint_path: str | os.PathLike | None) -> None:
    """Raise if the name is not exactly that of a model, or of the architecture of a checkpoint.

    Raises:
        UnknownModelError: Names the nearest ones.
        MissingFileError: If there is no such checkpoint.
    """
    if checkpoint_path is None:
        find_spec(model_type)
        return
    if not Path(checkpoint_path).is_file():
        raise MissingFileError(f"The checkpoint {checkpoint_path} does not exist. Check the path.")
    if model_type not in ARCHITECTURES and model_type not in list_models():
        raise InvalidInputError(
            f"{model_type!r} is no architecture of a checkpoint. {nearest_names(model_type, ARCHITECTURES)}"
        )


def choose_model(model_type: str | None, checkpoint_path: str | os.PathLike | None) -> str | None:
    """Return the name that was given; the architecture of the checkpoint if none was; None if neither was."""
    if model_type is None and checkpoint_path is not None:
        return read_checkpoint(checkpoint_path, mmap=True).architecture
    if model_type is not None:
        check_model_name(model_type, checkpoint_path)
    return model_type


def _files(paths: Sequence[str | os.PathLike], key: str | None) -> list[Path]:
    """The paths, with folders replaced by the images in them if no key chooses among these."""
    expanded = []
    for path in (Path(p).expanduser() for p in paths):
        is_folder = key is None and path.is_dir() and not is_zarr(path)
        expanded += [file.path for file in find_inputs(path)] if is_folder else [path]
    return expanded


def find_data(
    images: Sequence[str | os.PathLike],
    labels: Sequence[str | os.PathLike],
    image_key: str | None = None,
    label_key: str | None = None,
    val_images: Sequence[str | os.PathLike] | None = None,
    val_labels: Sequence[str | os.PathLike] | None = None,
    val_image_key: str | None = None,
    val_label_key: str | None = None,
    *,
    patch_shape: Sequence[int] | None = None,
    seed: int = 0,
) -> Split:
    """Find the images for training and validation; without those for validation, hold a tenth back.

    Args:
        images: Files, or folders of images.
        labels: Their labels, in the same order.
        image_key: Name of the image in a container; for folders a pattern such as `*.tif`, None takes all images.
        label_key: The same for the labels.
        val_images: Held-out images; None divides the others, see `split_data`.
        val_labels: Their labels.
        val_image_key: None takes `image_key`.
        val_label_key: None takes `label_key`.
        patch_shape: Shape of the patches.
        seed: Seed of the division.
    """
    images, labels = _files(images, image_key), _files(labels, label_key)
    if val_images is None:
        return split_data(images, image_key, labels, label_key, seed=seed, patch_shape=patch_shape)
    val_image_key, val_label_key = val_image_key or image_key, val_label_key or label_key
    train = DataPart(tuple(map(str, images)), image_key, tuple(map(str, labels)), label_key)
    val_images, val_labels = _files(val_images, val_image_key), _files(val_labels, val_label_key)
    val = DataPart(tuple(map(str, val_images)), val_image_key, tuple(map(str, val_labels)), val_label_key)
    return Split(train, val, f"{len(images)} images for training, {len(val_images)} for validation, as given")


@dataclass(frozen=True)
class FinetuneResult:
    """What came out: `report` is the content of `outcome.json`; `output` the exported file, None if there is none."""

    report: dict[str, Any]
    checkpoint: Path
    output: Path | None


class ExportError(MicroSamError, RuntimeError):
    """The model was trained, but could not be exported; the message says where it is."""


@dataclass(frozen=True)
class FinetuneJob:
    """A finetuning.

    `options` are arguments of `train_sam` (or of `train_instance_segmentation` for the mode `instances_only`), with
    `model_type`. `preprocess` names a transform of `raw_transforms`, None is `require_8bit`.
    """

    data: Split
    options: Mapping[str, Any]
    mode: Mode = "instances"
    name: str = "sam_model"
    save_root: str | os.PathLike | None = None
    output_path: str | os.PathLike | None = None
    patch_shape: tuple[int, ...] = (512, 512)
    batch_size: int = 1
    num_workers: int = 1
    preprocess: str | None = "normalize_image"
    resume: bool = False
    overwrite: bool = False
    promote_worse: bool = False

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(self.save_root or ".") / "checkpoints" / self.name

    @property
    def model_type(self) -> str:
        return self.options["model_type"]

    @property
    def start_checkpoint(self) -> Any:
        return self.options.get("checkpoint_path")

    def _targets(self) -> dict[str, bool]:
        return {
            "with_segmentation_decoder": self.mode != "none",
            "train_instance_segmentation_only": self.mode == "instances_only",
        }

    def _arguments(self, part: DataPart) -> dict[str, Any]:
        transform = get_raw_transform(self.preprocess)
        return {**part.arguments(), "patch_shape": self.patch_shape, "raw_transform": transform}

    def loaders(self) -> tuple[torch.utils.data.DataLoader, torch.utils.data.DataLoader]:
        """The loaders for training and validation."""
        common = {**self._targets(), "num_workers": self.num_workers, "shuffle": True, "seed": self.seed}
        return (
            default_sam_loader(**self._arguments(self.data.train), **common, batch_size=self.batch_size),
            default_sam_loader(**self._arguments(self.data.val), **common, batch_size=1, is_train=False),
        )

    @property
    def seed(self) -> int:
        return self.options.get("seed") or 0

    def held_out(self) -> list[HeldOut]:
        """Images to score the models with: parts of the validation images, as large as the patches or smaller."""
        n_images = min(max(len(self.data.val.raw_paths), MAX_IMAGES), _MAX_SCORED)
        arguments = self._arguments(self.data.val)
        dataset = default_sam_dataset(
            **arguments, with_segmentation_decoder=False, n_samples=n_images, is_train=False, with_padding=False,
        )
        return held_out_images(dataset, n_images)

    def preflight_steps(self) -> Steps[PreflightReport]:
        """Check data and costs. Yields `Step`, returns the report."""
        train, val = self.data.train.arguments(), self.data.val.arguments()
        names = ("n_objects_per_batch", "n_sub_iteration", "device", "checkpoint_encoder")
        options = {name: self.options[name] for name in names if name in self.options}
        return preflight_steps(
            **train, **{f"val_{name}": value for name, value in val.items()}, **options, **self._targets(),
            patch_shape=self.patch_shape, batch_size=self.batch_size,
            raw_transform=get_raw_transform(self.preprocess), **self._size(),
        )

    def _size(self) -> dict[str, Any]:
        """What is known about the size of the model without a download."""
        path = self.start_checkpoint
        if path is None:
            spec = find_spec(self.model_type)
            if spec.local_path is None:
                return {"model_type": spec.architecture}
            path = spec.local_path
        checkpoint = read_checkpoint(path, mmap=True)
        size = {"model_type": checkpoint.architecture}
        if checkpoint.image_size is not None:
            size["image_size"] = checkpoint.image_size
        if checkpoint.decoder_state is not None:
            size["decoder_features"] = checkpoint.decoder_state["out_conv.weight"].shape[1]
        return size

    # --- running ---

    def check_outputs(self) -> None:
        """Raise before any work if outputs cannot be written, or would replace those of another training.

        Raises:
            OutputExistsError: If there is a training of this name, and neither `resume` nor `overwrite` is set.
            OutputWriteError: If a folder cannot be written.
            InvalidInputError: If the training to resume was with other data.
        """
        prepare_folder(self.folder / "latest.pt")
        if self.output_path is not None:
            prepare_folder(Path(self.output_path))
        latest = self.folder / "latest.pt"
        if not latest.exists() or self.overwrite:
            return
        if not self.resume:
            raise OutputExistsError(
                f"There is a training of the name {self.name!r} in {self.folder}. Pass --resume to go on with it, "
                "--overwrite to start anew, or choose another name (--trained_model_name)."
            )
        recorded = read_checkpoint(latest, mmap=True).settings.get("data")
        if recorded is not None and recorded != self._data_record():
            raise InvalidInputError(
                f"The training in {self.folder} was done with other images, or divided them differently. Pass the same "
                "data and --seed to go on with it, or --overwrite to start anew."
            )

    def _data_record(self) -> dict[str, list[str]]:
        return {name: [*map(str, part.raw_paths), *([] if part.rois is None else [str(part.rois)])]
                for name, part in (("training", self.data.train), ("validation", self.data.val))}

    def score_steps(self, held_out: Sequence[HeldOut], checkpoint: Any, text: str) -> Steps[Scores]:
        """Score the starting model, or the finetuned one in a checkpoint."""
        name = self.model_type if checkpoint is self.start_checkpoint else self._size()["model_type"]
        return score_steps(
            name, checkpoint, held_out, tasks=TRAINED_TASKS[self.mode], device=self.options.get("device"),
            options_of=self._tuned_model(), text=text,
        )

    def _tuned_model(self) -> str | None:
        """The model whose recommended thresholds both models are scored with."""
        return SHIPPED_MODEL if self.start_checkpoint is None and self.model_type == SHIPPED_MODEL else None

    def train(self, **kwargs: Any) -> Path:
        """Train, and return the best checkpoint."""
        train_loader, val_loader = self.loaders()
        settings = {
            "data": self._data_record(), "preprocess": self.preprocess or "require_8bit",
            "patch_shape": list(self.patch_shape),
        }
        options = {
            "name": self.name, "train_loader": train_loader, "val_loader": val_loader, "save_root": self.save_root,
            "overwrite_training": not self.resume, "settings": settings, **self.options, **kwargs,
        }
        if self.mode == "instances_only":
            train_instance_segmentation(**options)
        else:
            train_sam(**options, with_segmentation_decoder=self.mode == "instances")
        best = self.folder / "best.pt"
        if not best.is_file():
            raise MissingFileError(f"The training wrote no {best}. Was it moved? Start it again with --resume.")
        return best

    def export(self, best: Path, outcome: Mapping[str, Any]) -> Path:
        """Write the finetuned model.

        Raises:
            ExportError: If that fails; says where the model is.
        """
        settings = {"finetuned": {name: outcome[name] for name in ("verdict", "change", "tasks")}}
        try:
            if self.mode == "instances_only":
                export_instance_segmentation_model(
                    best, self.output_path, self.model_type, self.start_checkpoint, settings=settings
                )
            else:
                export_trained_model(best, self.output_path, settings=settings)
        except Exception as error:  # whatever happens here, hours of training must not seem lost
            raise ExportError(
                f"The model was trained, but not exported to {self.output_path}: {error} It is kept in {best}. "
                "Remove the cause and run the same command with --resume: it exports without training again."
            ) from error
        return Path(self.output_path)

    def run(
        self, say: Callable[[str], None] = print, verbose: bool = True, **kwargs: Any
    ) -> FinetuneResult:
        """Score the starting model, train, score the finetuned model, report, and export it unless it became worse.

        Args:
            say: Receives what there is to tell.
            verbose: Whether to show progress bars.
            kwargs: More arguments of the training function, for example `pbar_signals` or `should_stop`.

        Raises:
            Cancelled: If the training was stopped; it can be resumed.
            ExportError: If the model was trained, but could not be exported.
            MicroSamError: If data, options or the model do not fit.
        """
        self.check_outputs()
        held_out = self.held_out()
        before = drain(self.score_steps(held_out, self.start_checkpoint, "Score the starting model"), verbose)
        best = self.train(verbose=verbose, **kwargs)
        with _no_prompts_expected(self.mode):
            after = drain(self.score_steps(held_out, best, "Score the finetuned model"), verbose)
        outcome = compare(before, after, TRAINED_TASKS[self.mode])
        promoted = outcome.verdict != "worse" or self.promote_worse
        thresholds = default_options(self._tuned_model(), "ais") if "automatic" in TRAINED_TASKS[self.mode] else {}
        report = write_outcome(self.folder, outcome, held_out, promoted, best, {
            "data": self._data_record(), "mode": self.mode, "automatic_options": thresholds,
        })
        say(report["text"])
        if thresholds:
            options = " ".join(f"--{name} {value}" for name, value in thresholds.items())
            say(f"Automatic segmentation was scored with {options}; pass the same for the finetuned model.")
        output = self.export(best, report) if promoted and self.output_path is not None else None
        return FinetuneResult(report, best, output)


@contextlib.contextmanager
def _no_prompts_expected(mode: str) -> Iterator[None]:
    """Let a checkpoint of encoder and decoder alone be scored without a warning: no prompts are scored."""
    with warnings.catch_warnings():
        if mode == "instances_only":
            warnings.filterwarnings("ignore", message=".*has no weights for prompts")
        yield
