"""Did finetuning help? Scores of the starting and of the finetuned model on the same held-out images.

Both are scored by what users do with them: automatic segmentation, and one object per prompt. Nothing of the training
code is involved but the files it wrote.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..core.errors import InvalidInputError
from ..core.output import write_json
from ..core.progress import Step, Steps, during
from ..embeddings.encode import precompute_image_embeddings
from ..evaluation.iterative import iterate_prompts
from ..evaluation.metrics import choose_objects, mask_iou, segmentation_scores
from ..segmentation.workflow import LoadedModel, default_options, load_model, plan_image, segmentation_steps

TASKS = {
    "automatic": "automatic segmentation (mSA)",
    "point": "objects from one point (IoU)",
    "box": "objects from a box (IoU)",
}
OUTCOME_NAME, PICTURE_NAME = "outcome.json", "outcome.png"
MAX_IMAGES = 8
MAX_OBJECTS = 25
TOLERANCE = 0.005


@dataclass(frozen=True)
class HeldOut:
    """An image (Y, X[, 3]) that is not trained on, and its labels (Y, X) with 0 for background."""

    name: str
    image: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Scores:
    """Scores of a model for the held-out images, each in 0…1.

    `tasks` maps `automatic`, `point` and `box` to one score per image, or None where an image has no object to
    prompt; `mode` is the mode of the automatic segmentation; `labels` holds its result for the first images.
    """

    model: str
    images: list[str]
    tasks: dict[str, list[float | None]]
    n_objects: int
    mode: str | None = None
    labels: list[np.ndarray] = field(default_factory=list, repr=False)

    def mean(self, task: str) -> float | None:
        """Mean over the images that have a score; None if there are none."""
        values = [value for value in self.tasks.get(task, ()) if value is not None]
        return float(np.mean(values)) if values else None


def held_out_images(dataset: Any, n_images: int = MAX_IMAGES) -> list[HeldOut]:
    """Take images from a dataset whose samples are an image (C, Y, X) and targets with the ids in channel 0.

    Args:
        dataset: The dataset; its samples should be the same each time. They are taken evenly from the whole of it.
        n_images: How many to take, at most.

    Returns:
        The images with at least one object, each once.

    Raises:
        InvalidInputError: If there is none.
    """
    images = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(n_images, len(dataset))).round().astype(int)):
        x, y = dataset[int(index)]
        labels = np.asarray(y[0]).round().astype("int64")
        image = np.moveaxis(np.asarray(x), 0, -1)
        image = image if image.shape[-1] == 3 else image[..., 0]
        # Small images are drawn whole, and more than once.
        if labels.any() and not any(np.array_equal(image, other.image) for other in images):
            images.append(HeldOut(f"held-out {len(images) + 1}", image, labels))
    if not images:
        raise InvalidInputError("The held-out images have no objects, so no model can be scored. Check their labels.")
    return images


def _interactive_scores(model: LoadedModel, held_out: HeldOut) -> tuple[dict[str, float | None], int]:
    """Mean IoU of the masks for the deepest point, and for the box, of up to `MAX_OBJECTS` objects."""
    labels = held_out.labels
    ids = choose_objects(labels, MAX_OBJECTS)
    if len(ids) == 0:
        return {"point": None, "box": None}, 0
    embeddings = precompute_image_embeddings(model.predictor, held_out.image, ndim=2, verbose=False)
    scores: dict[str, float | None] = {}
    for start in ("point", "box"):
        _, masks = next(iterate_prompts(
            model.predictor, embeddings, labels, start=start, n_iterations=1, batch_size=8, ids=ids
        ))
        scores[start] = float(np.mean([mask_iou(mask, labels == i) for i, mask in zip(ids, masks)]))
    return scores, len(ids)


def score_steps(
    name: str,
    checkpoint: str | os.PathLike | None,
    held_out: Sequence[HeldOut],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    device: str | torch.device | None = None,
    options_of: str | None = None,
    text: str = "Score model",
    n_examples: int = 3,
) -> Steps[Scores]:
    """Score a model on held-out images. Yields `Step`, returns `Scores`.

    Args:
        name: The model, or the architecture of the checkpoint.
        checkpoint: The checkpoint; None for a published or shipped model.
        held_out: The images.
        tasks: What to score: some of `automatic`, `point` and `box`. A model without decoder segments automatically
            with the mode `amg`, since that is what users of it get.
        device: The device; None chooses it.
        options_of: The model whose recommended thresholds to use for automatic segmentation; None for the defaults.
        text: What the steps say.
        n_examples: For how many images to keep the labels.
    """
    yield Step(0, len(held_out), text)
    model = load_model(name, checkpoint, device)
    scores: dict[str, list[float | None]] = {task: [] for task in TASKS if task in tasks}
    n_objects, examples = 0, []
    for n, image in enumerate(held_out):
        if "automatic" in scores:
            plan = plan_image(model, image.labels.shape, None, None, {}, None)
            options = {**plan.work, **default_options(options_of, model.mode)}
            steps = segmentation_steps(model.predictor, plan.segmenter, image.image, **options)
            labels, _ = yield from during(steps, Step(n, len(held_out), text))
            scores["automatic"].append(segmentation_scores(labels, image.labels)["mSA"])
            if n < n_examples:
                examples.append(labels)
        if set(scores) - {"automatic"}:
            found, n_new = _interactive_scores(model, image)
            n_objects += n_new
            for task in set(scores) - {"automatic"}:
                scores[task].append(found[task])
        yield Step(n + 1, len(held_out), text)
    mode = model.mode if "automatic" in scores else None
    return Scores(name if checkpoint is None else str(checkpoint), [i.name for i in held_out], scores, n_objects, mode,
                  examples)


# --- the comparison ---


@dataclass(frozen=True)
class Outcome:
    """Scores before and after, and what follows from them.

    `verdict` is `better`, `same` or `worse`: by the mean change of the scores of the tasks that were `trained`; changes
    below 0.005 are too small to mean something.
    """

    before: Scores
    after: Scores
    trained: tuple[str, ...]

    def changes(self) -> dict[str, float]:
        """Change of the mean score of each task that both models have."""
        pairs = {task: (self.before.mean(task), self.after.mean(task)) for task in TASKS}
        return {task: after - before for task, (before, after) in pairs.items() if None not in (before, after)}

    @property
    def change(self) -> float:
        """Mean change over the tasks that were trained."""
        changes = self.changes()
        return float(np.mean([changes[task] for task in self.trained if task in changes]))

    @property
    def verdict(self) -> str:
        if abs(self.change) < TOLERANCE:
            return "same"
        return "better" if self.change > 0 else "worse"

    def _row(self, task: str) -> str:
        before, after = self.before.mean(task), self.after.mean(task)
        pairs = [(b, a) for b, a in zip(self.before.tasks[task], self.after.tasks[task]) if None not in (b, a)]
        n_better = sum(a > b for b, a in pairs)
        text = f"  {TASKS[task]}: {before:.3f} before, {after:.3f} after ({after - before:+.3f}; better in "
        text += f"{n_better} of {len(pairs)} images)"
        if task == "automatic" and self.before.mode != self.after.mode:
            text += f"; the starting model has no decoder and used {self.before.mode}, the finetuned {self.after.mode}"
        return text if task in self.trained else f"{text}; this was not trained"

    def describe(self, promoted: bool, checkpoint: str | os.PathLike) -> str:
        """Say in words what came out, and what happens with the finetuned model."""
        verdicts = {
            "better": "The finetuned model is better than the starting model on the held-out images.",
            "same": "The finetuned model scores like the starting model on the held-out images (within 0.005).",
            "worse": "The finetuned model is WORSE than the starting model on the held-out images.",
        }
        lines = [verdicts[self.verdict], *(self._row(task) for task in self.changes())]
        fell = [TASKS[task] for task, change in self.changes().items() if change < 0]
        if self.verdict != "worse" and fell:
            lines.append(f"Note that it became worse for: {', '.join(fell)}.")
        if len(self.before.images) < 5:
            lines.append(
                f"This rests on {len(self.before.images)} held-out image(s), so small changes may be chance. Hold out "
                "more images to be sure."
            )
        if not promoted:
            lines.append(
                f"It was not exported, and is kept in {checkpoint}. Check the labels, train longer or with a lower "
                "learning rate, or keep using the starting model. To export it anyway pass --promote_worse "
                "(promote_worse=True)."
            )
        return "\n".join(lines)

    def content(self, promoted: bool, checkpoint: str | os.PathLike) -> dict[str, Any]:
        """What the JSON report holds."""
        return {
            "version": __version__, "verdict": self.verdict, "promoted": promoted, "checkpoint": str(checkpoint),
            "change": round(self.change, 6), "trained_tasks": list(self.trained), "held_out": self.before.images,
            "tasks": {
                task: {
                    "metric": "mSA" if task == "automatic" else "IoU",
                    "before": self.before.mean(task), "after": self.after.mean(task),
                    "per_image_before": self.before.tasks[task], "per_image_after": self.after.tasks[task],
                } for task in self.changes()
            },
            "n_objects_prompted": self.before.n_objects,
            "before": _without_labels(self.before), "after": _without_labels(self.after),
            "text": self.describe(promoted, checkpoint),
        }


def _without_labels(scores: Scores) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if name in ("model", "mode", "n_objects")}


def compare(before: Scores, after: Scores, trained: Sequence[str]) -> Outcome:
    """Compare two models that were scored on the same images.

    Args:
        before: Scores of the starting model.
        after: Scores of the finetuned model.
        trained: The tasks that were trained, which decide.

    Raises:
        InvalidInputError: If the images differ, or no trained task was scored for both.
    """
    outcome = Outcome(before, after, tuple(task for task in TASKS if task in trained))
    if before.images != after.images:
        raise InvalidInputError("Both models must be scored on the same images. Score the starting model again.")
    if not set(outcome.changes()) & set(trained):
        raise InvalidInputError(f"None of the trained tasks {list(trained)} was scored for both models.")
    return outcome


def write_outcome(
    folder: str | os.PathLike, outcome: Outcome, held_out: Sequence[HeldOut], promoted: bool,
    checkpoint: str | os.PathLike, extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the report (`outcome.json`) and a picture of it (`outcome.png`).

    Args:
        folder: Where to write them.
        outcome: The comparison.
        held_out: The images, for the examples.
        promoted: Whether the finetuned model is exported.
        checkpoint: The finetuned checkpoint.
        extra: More entries of the report.

    Returns:
        The content of the report.
    """
    from .outcome_picture import draw_outcome

    content = {**outcome.content(promoted, checkpoint), **(extra or {})}
    folder = Path(folder)
    write_json(folder / OUTCOME_NAME, content)
    draw_outcome(outcome, held_out, folder / PICTURE_NAME)
    return content
