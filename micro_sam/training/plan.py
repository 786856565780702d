"""A finetuning as a form that a person fills in, and as steps that a worker runs and a view follows.

The form becomes a `FinetuneJob`, which checks and does everything; the finetuned model then gets a name in the list of
models. Importing this loads no torch.
"""

import gc
import queue
import re
import threading
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.allocator import LARGEST_IN_TRAINING, reusing_memory
from ..core.errors import InvalidInputError
from ..core.inputs import has_pattern
from ..core.progress import Cancelled, Step, Steps
from ..core.settings import get_cache_directory
from ..models.registry import get_models_directory, list_models, local_models, register_local_model
from ..models.specs import MODELS, ModelSpec

if TYPE_CHECKING:
    from .job import FinetuneJob, FinetuneResult
    from .preflight_report import PreflightReport

Existing = Literal["refuse", "resume", "overwrite"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_SECONDS_BETWEEN_SIGNS = 0.05  # how soon a cancelled training knows


def default_save_root() -> Path:
    """The folder for checkpoints and logs if none is chosen: `training` in the cache directory."""
    return get_cache_directory() / "training"


class FormError(InvalidInputError):
    """Fields of a form are wrong; `fields` maps their names to what is wrong."""

    def __init__(self, problems: dict[str, str]):
        super().__init__("\n".join(problems.values()))
        self.fields = dict(problems)


@dataclass(frozen=True)
class TrainingForm:
    """What a person chooses; empty texts count as not given.

    `images` and `labels` are files or folders; keys are patterns for folders, or names inside of containers. Without
    `val_images` and `val_labels` a part of the images is held back. `configuration` None is chosen by the device,
    `model_type` None is that of the configuration, or the architecture of the `checkpoint`. `existing` says what to do
    if there is a training of this name. Without `output_path` the model is written to the folder of the models.
    """

    images: str = ""
    labels: str = ""
    image_key: str | None = None
    label_key: str | None = None
    val_images: str | None = None
    val_labels: str | None = None
    configuration: str | None = None
    with_segmentation_decoder: bool = True
    model_type: str | None = None
    checkpoint: str | None = None
    device: str | None = None
    patch_shape: tuple[int, int] = (512, 512)
    n_epochs: int = 100
    n_iterations: int | None = None
    checkpoint_encoder: bool | None = None
    name: str = "sam_model"
    save_root: str | None = None
    output_path: str | None = None
    existing: Existing = "refuse"
    promote_worse: bool = False
    num_workers: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and field.name not in ("images", "labels", "name"):
                object.__setattr__(self, field.name, value.strip() or None)

    @property
    def output(self) -> Path:
        """Where the finetuned model is written."""
        if self.output_path is not None:
            return Path(self.output_path).expanduser()
        return get_models_directory() / "finetuned" / f"{self.name}.pt"


def check_form(form: TrainingForm) -> dict[str, str]:
    """Return what is wrong, by the names of the fields; quick, so that it can be asked while a form is filled in."""
    problems = {}
    for field, what in (("images", "images"), ("labels", "labels")):
        if not getattr(form, field).strip():
            problems[field] = f"Choose the {what}: a folder or a file."
    for field in ("images", "labels", "val_images", "val_labels", "checkpoint"):
        path = getattr(form, field)
        if path and path.strip() and not has_pattern(path) and not Path(path).expanduser().exists():
            problems[field] = f"{path} does not exist. Check the path."
    if (form.val_images is None) != (form.val_labels is None):
        field = "val_labels" if form.val_labels is None else "val_images"
        problems.setdefault(field, "Images and labels for validation belong together. Choose both or none.")
    if min(form.patch_shape) < 1:
        problems["patch_shape"] = f"Patches must have at least one pixel per side, but are {form.patch_shape}."
    if form.output.suffix.lower() not in (".pt", ".pth"):
        problems["output_path"] = (
            f"{form.output} must end with .pt or .pth. The command micro_sam.export_model makes a package for "
            "bioimage.io of it."
        )
    problem = _name_problem(form)
    return problems | ({"name": problem} if problem else {})


def _name_problem(form: TrainingForm) -> str | None:
    """Why the finetuned model could not get its name in the list of models."""
    if not _NAME.fullmatch(form.name):
        return f"The name {form.name!r} must consist of letters, digits, '_', '-' and '.', and not be empty."
    if form.name in {spec.name for spec in MODELS}:
        return f"{form.name!r} is the name of a published model. Choose another name."
    known = local_models().get(form.name)
    if known is not None and Path(known.path) != form.output.absolute():
        return f"There is a model {form.name!r} already, {known.path}. Choose another name."
    return None


def plan_training(form: TrainingForm) -> "FinetuneJob":
    """Make a job of a form: preset, model and data are chosen and found. Loads torch, and lists folders.

    Raises:
        FormError: If fields are wrong.
        InvalidInputError, MissingFileError, ImageReadError: If data or model do not fit.
    """
    problems = check_form(form)
    if problems:
        raise FormError(problems)
    from .configurations import choose_configuration, configuration_options
    from .job import FinetuneJob, choose_model, find_data

    explicit = {"model_type": choose_model(form.model_type, form.checkpoint)}
    options = configuration_options(form.configuration or choose_configuration(form.device), explicit)
    options |= {
        "checkpoint_path": form.checkpoint, "device": form.device, "n_epochs": form.n_epochs,
        "checkpoint_encoder": form.checkpoint_encoder,
    }
    if form.n_iterations is not None:
        options["n_iterations"] = form.n_iterations
    val_images, val_labels = (None if path is None else [path] for path in (form.val_images, form.val_labels))
    data = find_data(
        [form.images], [form.labels], form.image_key, form.label_key, val_images, val_labels,
        patch_shape=form.patch_shape,
    )
    on_cpu = str(_device(form.device)).startswith("cpu")
    return FinetuneJob(
        data=data, options={name: value for name, value in options.items() if value is not None},
        mode="instances" if form.with_segmentation_decoder else "none", name=form.name,
        save_root=form.save_root or default_save_root(), output_path=form.output, patch_shape=tuple(form.patch_shape),
        num_workers=(0 if on_cpu else 4) if form.num_workers is None else form.num_workers,
        resume=form.existing == "resume", overwrite=form.existing == "overwrite", promote_worse=form.promote_worse,
    )


def _device(device: str | None) -> Any:
    from ..core.settings import get_device
    return get_device(device)


@dataclass(frozen=True)
class CheckedJob:
    """A job with the report on its data."""

    job: "FinetuneJob"
    report: "PreflightReport"


def check_steps(form: TrainingForm) -> Steps[CheckedJob]:
    """Generator that plans a training and checks its data. Yields `Step`; raises what `plan_training` raises."""
    yield Step(0, 1, "Find the data")
    job = plan_training(form)
    report = yield from job.preflight_steps()
    return CheckedJob(job, report)


# --- the training, for a worker ---


@dataclass(frozen=True)
class TrainingStep(Step):
    """A step of a training, in iterations of this run.

    `metric` (of the validation, lower is better) and `loss` are those that came last, None before the first;
    `seconds_left` is an estimate from the mean time of all iterations.
    """

    epoch: int = 0
    metric: float | None = None
    loss: float | None = None
    seconds_left: float | None = None


_DESCRIPTION = re.compile(r"Epoch (\d+)/\w+(?:, loss ([\d.einf+-]+))?(?:, metric ([\d.einf+-]+) \(best)?")


def parse_description(text: str) -> tuple[int, float | None, float | None] | None:
    """Read epoch, loss and metric from the description of a step of the trainers; None if it is another one.

    Example:
        >>> parse_description("Epoch 3/10, metric 0.2500 (best 0.2400)")
        (3, None, 0.25)
    """
    match = _DESCRIPTION.match(text)
    if match is None:
        return None
    epoch, loss, metric = match.groups()
    return int(epoch), None if loss is None else float(loss), None if metric is None else float(metric)


class _Watch:
    """Takes what a job tells in its thread, as a bar like tqdm's, and tells the job to stop."""

    def __init__(self):
        self.events: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.said: list[str] = []
        self._total, self._done, self._epoch = 0, 0, 0
        self._loss = self._metric = None
        self._start = time.monotonic()

    def follow(self, steps: Steps[Any]) -> Steps[Any]:
        """Pass on the steps of a generator, until it is to stop."""
        try:
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    return end.value
                self.events.put(step)
                if self.stop.is_set():
                    raise Cancelled("The finetuning was stopped.")
                yield step
        finally:
            steps.close()

    # What `follow` of fit_progress asks of a bar.

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total, self._done, self._start = value, 0, time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        self._tell()

    def set_description(self, description: str, **kwargs: Any) -> None:
        found = parse_description(description)
        if found is not None:
            self._epoch, loss, metric = found
            self._loss = self._loss if loss is None else loss
            self._metric = self._metric if metric is None else metric
            self._tell()

    def _tell(self) -> None:
        left = None
        if self._done:
            left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        self.events.put(TrainingStep(self._done, self._total, "Train", self._epoch, self._metric, self._loss, left))


def finetune_steps(job: "FinetuneJob") -> Steps["FinetuneResult"]:
    """Generator that runs a job: it trains in a thread of its own, and this tells how far it is.

    Closing it cancels: the present iteration is finished, `latest.pt` is written, and the job can be resumed. While
    nothing happens the last step is repeated, so that whoever runs it can cancel at any time.

    Yields:
        `Step`, and `TrainingStep` while it trains.

    Raises:
        What `FinetuneJob.run` raises.
    """
    watch = _Watch()
    watched = _watched(job, watch)
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            with reusing_memory(LARGEST_IN_TRAINING):  # handed back at the end, when nothing of the training is left
                try:
                    outcome["result"] = watched.run(say=watch.said.append, verbose=False)
                except BaseException as error:  # it is raised again where the steps are asked for
                    outcome["error"] = error
                    _forget_frames(error)
                gc.collect()  # trainers and loaders know themselves
        finally:
            watch.events.put(None)

    thread = threading.Thread(target=work, name="micro_sam finetuning", daemon=True)
    step = Step(0, 1, "Prepare the training")
    yield step
    thread.start()
    try:
        while True:
            try:
                new = watch.events.get(timeout=_SECONDS_BETWEEN_SIGNS)
            except queue.Empty:
                yield step
                continue
            if new is None:
                break
            step = new
            yield step
    finally:
        watch.stop.set()
        thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _forget_frames(error: BaseException | None) -> None:
    """Empty the frames that an error and its reasons come from: they hold network, optimizer and batches."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _watched(job: "FinetuneJob", watch: _Watch) -> "FinetuneJob":
    """The same job, which tells what it does and can be stopped at any step."""
    from .job import FinetuneJob

    class WatchedJob(FinetuneJob):
        def score_steps(self, *args: Any, **kwargs: Any) -> Steps[Any]:
            return (yield from watch.follow(super().score_steps(*args, **kwargs)))

        def train(self, **kwargs: Any) -> Path:
            return super().train(**kwargs, progress=watch, should_stop=watch.stop.is_set)

    return WatchedJob(**{field.name: getattr(job, field.name) for field in fields(job)})


def register_result(job: "FinetuneJob", result: "FinetuneResult") -> ModelSpec | None:
    """Give the finetuned model its name in the list of models, so that menus and commands offer it.

    Returns:
        Its row; None if it was not exported, since it became worse.
    """
    if result.output is None:
        return None
    change = round(result.report["change"], 3) + 0.0  # no -0.000
    return register_local_model(
        job.name, result.output, f"your images; finetuned from {job.model_type} ({change:+.3f} on held-out images)",
        has_decoder=job.mode != "none", replace=job.name in list_models(),
    )
