"""One model on one dataset of the benchmark: what is run, where results are kept, and what is removed afterwards."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.errors import NoObjectsError
from ..core.image import open_image
from ..core.output import is_done, is_same, label_stem, read_labels, write_json, write_labels
from ..core.progress import Step, Steps, during
from ..segmentation.settings import model_settings
from ..segmentation.workflow import LoadedModel, find_model, load_model, plan_image
from ..volume.images import image_settings, image_steps
from .benchmark_catalogue import BenchmarkDataset, find_files_of
from .benchmark_crops import CropFiles, crop_steps, describe_files, remove_folders
from .evaluation import mean_scores, score_steps, write_csv
from .inference import run_inference_with_iterative_prompting
from .metrics import segmentation_scores
from .model_tasks import models_by_mode
from .prompted_volume import PromptedVolume, PropagationOptions
from .report import IDENTIFIERS

logger = logging.getLogger(__name__)

_PROMPT_MODE = "prompts"
_MIN_SIZE_3D = 10


@dataclass(frozen=True)
class BenchmarkOptions:
    """Checked options of `benchmark_datasets.benchmark_steps`."""

    retain: frozenset[str]
    automatic: bool
    interactive: bool
    n_crops: int
    n_iterations: int
    download: bool
    overwrite: bool


@dataclass(frozen=True)
class BenchmarkModel:
    """A model in all modes that are run."""

    name: str
    model_name: str | None
    loaded: LoadedModel
    modes: dict[str, LoadedModel]

    @classmethod
    def load(cls, name: str | None, checkpoint: Any, device: Any, extra_mode: str | None) -> "BenchmarkModel":
        """Load a model, with the mode that suits it best and perhaps another one."""
        loaded = load_model(name, checkpoint, device)
        modes = list(dict.fromkeys(mode for mode in (loaded.mode, extra_mode) if mode is not None))
        spec = find_model(name, checkpoint, None)
        return cls(
            name if checkpoint is None else str(checkpoint), None if spec is None else spec.name, loaded,
            models_by_mode(loaded, modes, modes),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What is known of the model."""
        return model_settings(self.loaded.predictor, self.loaded.decoder)


@dataclass(frozen=True)
class BenchmarkTask:
    """One way to segment all crops of a dataset, and what its rows are called."""

    ndim: int
    mode: str
    prompt: str | None = None
    use_masks: bool = False

    @property
    def is_automatic(self) -> bool:
        return self.prompt is None

    @property
    def name(self) -> str:
        """Name of files and folders."""
        if self.is_automatic:
            return f"{self.mode}_{self.ndim}d"
        if self.ndim == 3:
            return f"interactive_segmentation_3d_with_{'points' if self.prompt == 'point' else 'box'}"
        masks = "with" if self.use_masks else "without"
        return f"iterative_prompting_{masks}_mask/iterative_prompts_start_{self.prompt}"

    @property
    def identifiers(self) -> dict[str, str]:
        """The columns that tell the rows of this task from those of others."""
        if self.is_automatic:
            return {"mode": f"{self.mode} {self.ndim}d"}
        return {"mode": f"{_PROMPT_MODE} {self.ndim}d", "prompt": f"{self.prompt}{'_masks' if self.use_masks else ''}"}


@dataclass(frozen=True)
class DatasetRun:
    """The evaluation of a model on one dataset."""

    row: BenchmarkDataset
    input_folder: Path
    folder: Path
    model: BenchmarkModel
    options: BenchmarkOptions

    def tasks(self) -> Iterator[BenchmarkTask]:
        for ndim in (2,) if self.row.ndim == 2 else (2, 3):
            if self.options.automatic:
                yield from (BenchmarkTask(ndim, mode) for mode in self.model.modes)
            if self.options.interactive:
                for prompt in ("point", "box"):
                    yield BenchmarkTask(ndim, _PROMPT_MODE, prompt)
                    if ndim == 2:  # in volumes objects are followed by their masks anyway
                        yield BenchmarkTask(ndim, _PROMPT_MODE, prompt, use_masks=True)

    def steps(self, pairs: Sequence[tuple[Path, Path]] | None = None) -> Steps[pd.DataFrame]:
        """Run all tasks; those that are complete are read. Yields `Step`, returns the rows of all.

        Args:
            pairs: The files of the dataset; None finds them if they are needed.
        """
        tables, crops = [], {}
        if self.options.overwrite:
            remove_folders([self.folder / "embeddings"])
        for task in self.tasks():
            table_path, record = self._result_paths(task)
            settings = self._settings(task)
            if not self.options.overwrite and is_same(record, settings) and table_path.exists():
                tables.append(pd.read_csv(table_path, dtype={"image": str}))
                continue
            if task.ndim not in crops:
                pairs = pairs or find_files_of(self.row, self.input_folder, self.options.download)
                crops[task.ndim] = yield from crop_steps(
                    self.row, pairs, self.folder / f"roi_{task.ndim}d", task.ndim, self.options.n_crops,
                    self.options.overwrite,
                )
                if not crops[task.ndim].images:
                    raise NoObjectsError(f"The dataset {self.row.name!r} has no labelled objects. Check its labels.")
            table = yield from self._run_task(task, crops[task.ndim])
            if table.empty:
                continue
            identified = {"model": self.model.name, "dataset": self.row.name, **task.identifiers}
            table = table.assign(**identified)
            table = table[[*(c for c in IDENTIFIERS if c in table), *(c for c in table if c not in IDENTIFIERS)]]
            write_csv(table, table_path, index=False)
            self._write_means(task, table)
            write_json(record, {"micro_sam": {"settings": settings}})
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def _result_paths(self, task: BenchmarkTask) -> tuple[Path, Path]:
        """Where the scores of each crop are, and the record of how they were made."""
        path = self.folder / "results" / "per_image" / task.name
        return path.with_name(f"{path.name}.csv"), path.with_name(f"{path.name}.json")

    def _settings(self, task: BenchmarkTask) -> dict[str, Any]:
        settings = {**self.model.settings, "dataset": self.row.name, "n_crops": self.options.n_crops}
        if task.ndim == 2 and not task.is_automatic:
            settings["n_iterations"] = self.options.n_iterations
        if self.row.is_own:
            settings["files"] = describe_files([*self.row.images, *self.row.labels])
        return settings

    def _write_means(self, task: BenchmarkTask, table: pd.DataFrame) -> None:
        """The table of mean scores; of iterations one row each."""
        path = self.folder / "results" / f"{task.name}.csv"
        if "iteration" not in table:
            write_csv(mean_scores(table), path, index=False)
            return
        means = pd.concat([mean_scores(part) for _, part in table.groupby("iteration")], ignore_index=True)
        means.index.name = "iteration"
        write_csv(means, path, index=True)

    def _run_task(self, task: BenchmarkTask, crops: CropFiles) -> Steps[pd.DataFrame]:
        folder = self.folder / ("automatic" if task.is_automatic else "interactive") / task.name
        if task.is_automatic:
            return (yield from self._automatic(task, crops, folder))
        return (yield from (self._iterative if task.ndim == 2 else self._followed)(task, crops, folder))

    @property
    def _embeddings(self) -> Path:
        """Those of another model, after an interrupted run, must not be in the way."""
        return self.folder / "embeddings" / str(self.model.settings["model_hash"]).rpartition(":")[2][:16]

    def _text(self, task: BenchmarkTask) -> str:
        return f"{self.row.name}: {' '.join(task.identifiers.values())}"

    def _automatic(self, task: BenchmarkTask, crops: CropFiles, folder: Path) -> Steps[pd.DataFrame]:
        total, outputs = len(crops.images), [folder / path.name for path in crops.images]
        for n, (path, output) in enumerate(zip(crops.images, outputs)):
            here = Step(n, total, self._text(task))
            yield here
            image = open_image(path, ndim=task.ndim)
            plan = plan_image(self.model.modes[task.mode], image.shape[-2:], None, None, {}, self.model.model_name)
            settings = image_settings(plan.model.predictor, plan.segmenter, image, {}, plan.work)
            if not is_done(output, settings, self.options.overwrite):
                work = image_steps(plan.model.predictor, plan.segmenter, image, {}, plan.work)
                labels, _ = yield from during(work, here)
                write_labels(output, labels, settings)
        return (yield from during(score_steps(crops.labels, outputs), Step(total, total, self._text(task))))

    def _iterative(self, task: BenchmarkTask, crops: CropFiles, folder: Path) -> Steps[pd.DataFrame]:
        total = len(crops.images)
        for n, (path, labels) in enumerate(zip(crops.images, crops.labels)):
            yield Step(n, total, self._text(task))
            run_inference_with_iterative_prompting(
                self.model.loaded.predictor, [path], [labels], self._embeddings, folder,
                start_with_box_prompt=task.prompt == "box", n_iterations=self.options.n_iterations,
                use_masks=task.use_masks, overwrite=self.options.overwrite, verbose=False,
            )
        tables = []
        for k in range(self.options.n_iterations):
            outputs = [folder / f"iteration{k:02}" / path.name for path in crops.images]
            scores = yield from during(score_steps(crops.labels, outputs), Step(total, total, self._text(task)))
            tables.append(scores.assign(iteration=k))
        return pd.concat(tables, ignore_index=True)

    def _followed(self, task: BenchmarkTask, crops: CropFiles, folder: Path) -> Steps[pd.DataFrame]:
        options = PropagationOptions(
            interactive_seg_mode="points" if task.prompt == "point" else "box", min_size=_MIN_SIZE_3D
        )
        rows, total = [], len(crops.images)
        for n, (path, labels_path) in enumerate(zip(crops.images, crops.labels)):
            here = Step(n, total, self._text(task))
            yield here
            name = label_stem(path)
            prompted = PromptedVolume(
                self.model.loaded.predictor, open_image(path, ndim=3).read(), read_labels(labels_path),
                self._embeddings / f"{name}_3d.zarr",
            )
            try:
                work = prompted.saved_steps(options, folder / path.name, self.options.overwrite)
                labels, truth = yield from during(work, here)
            except NoObjectsError:  # all objects of this crop are too small
                continue
            rows.append({"image": name, **segmentation_scores(labels, truth)})
        yield Step(total, total, self._text(task))
        if not rows:
            logger.warning(
                "No object of %s has %s pixels in its middle slice: none is followed.", self.row.name, _MIN_SIZE_3D
            )
        return pd.DataFrame(rows)

    def clean_up(self, data: Path | None) -> None:
        """Remove what is not retained; `data` is what was downloaded for this run."""
        folders = {
            "data": [] if data is None else [data], "crops": [self.folder / f"roi_{n}d" for n in (2, 3)],
            "automatic": [self.folder / "automatic"], "interactive": [self.folder / "interactive"],
        }
        for what, paths in folders.items():
            if what not in self.options.retain:
                remove_folders(paths)
        remove_folders([self.folder / "embeddings"])
