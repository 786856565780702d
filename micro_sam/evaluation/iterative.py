"""Iterative prompting: a simulated annotator prompts each object and corrects its mask where it is wrong.

The scheme is that of the evaluation in Archit et al. 2025 (10.1038/s41592-024-02580-4): a first prompt from the truth,
then one positive and one negative point in the regions where truth and mask differ, each added to all prompts so far.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, require_positive_int
from ..core.labels import check_labels, get_centers_and_bounding_boxes, mask_data_to_segmentation
from ..core.prompts import BatchedPrompts
from ..embeddings.encode import ImageEmbeddings, set_precomputed
from ..inference import cropped_record
from ..models.prompting import Prediction, predict_boxed
from ..prompt_generators import IterativePromptGenerator, PointAndBoxPromptGenerator, Prompts

STARTS = ("point", "box")
_PADDING_LABEL = -1


def iterate_prompts(
    predictor: SamPredictor,
    embeddings: ImageEmbeddings,
    truth: np.ndarray,
    *,
    start: str,
    n_iterations: int = 8,
    use_masks: bool = False,
    dilation: int = 5,
    batch_size: int = 32,
    rng: np.random.Generator | int | None = None,
    i: int | None = None,
    ids: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Segment objects from a first prompt, then from more and more corrections.

    The first prompt is the pixel that lies deepest inside the object (three masks are predicted for it, of which the
    one with the highest predicted IoU is taken), or the object's bounding box. The corrections of an object depend
    on `rng` and its id only, not on the other objects, the batches, or numpy's global state.

    For each object a mask and its truth are held, 2 * H * W bytes. Callers that only score objects pass `ids` part by
    part; callers that want label images take `iterative_segmentations`, which keeps crops.

    Args:
        predictor: The predictor. The image is set in it anew at each iteration.
        embeddings: Embeddings of the image, without tiles.
        truth: Labels (H, W), 0 is background. They are not changed.
        start: `point` or `box`.
        n_iterations: Number of predictions per object: one for the first prompt, the others for corrections.
        use_masks: Whether the logits of the last prediction are a prompt for the next, too.
        dilation: Distance in pixels that negative points of the first prompt keep from the object. First prompts
            have none as yet, so that it does not change the result.
        batch_size: Number of objects that go through the mask decoder together.
        rng: Seed or generator of the corrections; None is the seed 0.
        i: The plane, for embeddings of a stack.
        ids: The objects to segment; None takes all.

    Yields:
        After the first prompt, and after each correction: the ids (N,) and bool masks (N, H, W).

    Raises:
        InvalidInputError: For unknown values, truth of another shape than the image, or ids that it does not have.
    """
    require_positive_int("n_iterations", n_iterations)
    truth, ids = _check(embeddings, truth, start, batch_size, ids)
    batches = list(_batches(predictor, embeddings, truth, ids, start, use_masks, dilation, batch_size, rng, i))
    for _ in range(n_iterations):
        masks = [p.mask.paste(truth.shape) for batch in batches for p in next(batch)]
        yield ids, np.stack(masks) if masks else np.zeros((0, *truth.shape), dtype=bool)


def iterative_segmentations(
    predictor: SamPredictor,
    embeddings: ImageEmbeddings,
    truth: np.ndarray,
    *,
    start: str,
    n_iterations: int = 8,
    use_masks: bool = False,
    dilation: int = 5,
    batch_size: int = 32,
    rng: np.random.Generator | int | None = None,
    i: int | None = None,
) -> list[np.ndarray]:
    """Return the label image after the first prompt, and after each correction; see `iterate_prompts`.

    Larger masks are painted first, and a pixel belongs to the first one; parts that are not connected become objects
    of their own, as in `batched_inference`. Memory grows with the areas of the masks and the size of one batch.

    Returns:
        `n_iterations` label images uint32 (H, W), numbered consecutively.
    """
    require_positive_int("n_iterations", n_iterations)
    truth, ids = _check(embeddings, truth, start, batch_size, None)
    records: list[list[dict]] = [[] for _ in range(n_iterations)]
    for batch in _batches(predictor, embeddings, truth, ids, start, use_masks, dilation, batch_size, rng, i):
        for of_iteration, predictions in zip(records, batch):
            of_iteration += [cropped_record(p, len(of_iteration) + k + 1) for k, p in enumerate(predictions)]
    return [mask_data_to_segmentation(of_iteration, truth.shape) for of_iteration in records]


def _check(
    embeddings: ImageEmbeddings, truth: np.ndarray, start: str, batch_size: int, ids
) -> tuple[np.ndarray, np.ndarray]:
    truth = check_labels(truth)
    if truth.ndim != 2:
        raise InvalidInputError(f"truth must be a label image (H, W), but has the shape {truth.shape}.")
    if embeddings["original_size"] is None:
        raise InvalidInputError("The embeddings are tiled, but objects are prompted in the whole image. Embed it so.")
    if tuple(embeddings["original_size"]) != truth.shape:
        raise InvalidInputError(
            f"truth has the shape {truth.shape}, but the embeddings are of an image of shape "
            f"{tuple(embeddings['original_size'])}. Pass the labels of the same image."
        )
    if start not in STARTS:
        raise InvalidInputError(f"start must be 'point' or 'box', but is {start!r}.")
    require_positive_int("batch_size", batch_size)
    present = np.unique(truth[truth != 0])
    ids = present if ids is None else np.asarray(ids).reshape(-1)
    if missing := sorted(set(ids.tolist()) - set(present.tolist())):
        raise InvalidInputError(f"truth has no object {missing[0]}. Choose ids among the {len(present)} that it has.")
    return truth, ids


def _batches(
    predictor: SamPredictor, embeddings: ImageEmbeddings, truth: np.ndarray, ids: np.ndarray, start: str,
    use_masks: bool, dilation: int, batch_size: int, rng: np.random.Generator | int | None, i: int | None,
) -> Iterator[Iterator[list[Prediction]]]:
    """For each batch of objects the iterator of its predictions."""
    centers, boxes = get_centers_and_bounding_boxes(truth)
    seed = int(np.random.default_rng(0 if rng is None else rng).integers(2**63))
    for k in range(0, len(ids), batch_size):
        part = ids[k:k + batch_size].tolist()
        generators = [IterativePromptGenerator(rng=np.random.default_rng([seed, id_])) for id_ in part]
        objects = torch.from_numpy(truth[None] == ids[k:k + batch_size, None, None])[:, None]
        first = PointAndBoxPromptGenerator(
            int(start == "point"), 0, dilation, get_point_prompts=start == "point", get_box_prompts=start == "box"
        )
        of_part = [centers[id_] for id_ in part] if start == "point" else None
        prompts = first(objects, [boxes[id_] for id_ in part], of_part)
        yield _iterate(predictor, embeddings, objects, prompts, generators, use_masks, i)


def _iterate(
    predictor: SamPredictor, embeddings: ImageEmbeddings, objects: torch.Tensor, prompts: Prompts,
    generators: Sequence[IterativePromptGenerator], use_masks: bool, i: int | None,
) -> Iterator[list[Prediction]]:
    """Predictions for objects with masks (N, 1, H, W), without end: for the first prompts, then after corrections."""
    points, labels, boxes = (None if value is None else value.numpy() for value in prompts[:3])
    multimask, logits, shape = points is not None, None, tuple(objects.shape[2:])
    while True:
        set_precomputed(predictor, embeddings, i=i)  # the caller may have set another image meanwhile
        batch = BatchedPrompts.create(boxes, points, labels, logits)
        (predictions,) = predict_boxed(predictor, batch, len(objects), multimasking=multimask)
        yield predictions
        masks = torch.from_numpy(np.stack([p.mask.paste(shape) for p in predictions]))[:, None]
        new_points, new_labels = _corrections(generators, objects, masks)
        points = new_points if points is None else np.concatenate([points, new_points], axis=1)
        labels = new_labels if labels is None else np.concatenate([labels, new_labels], axis=1)
        multimask = False
        logits = torch.stack([p.logits for p in predictions]) if use_masks else None


def _corrections(
    generators: Sequence[IterativePromptGenerator], objects: torch.Tensor, masks: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """A positive and a negative point per object: coordinates (N, 2, 2) as (x, y), and labels (N, 2).

    An object that fills the whole image leaves no room for a negative point and gets one that the model ignores.
    """
    points, labels = [], []
    for generator, truth, mask in zip(generators, objects, masks):
        fills = bool(truth.all())
        if fills:
            truth = truth.clone()
            truth[0, 0, 0] = False  # the only candidate for the point that will be ignored
        new_points, new_labels, _, _ = generator(truth[None], mask[None])
        if fills:
            new_labels[0, 1] = _PADDING_LABEL
        points.append(new_points[0].numpy())
        labels.append(new_labels[0].numpy())
    return np.stack(points), np.stack(labels)
