"""Score automatic segmentation (AIS, APG) and prompts against ground truth, per modality.

    python finetuning/evaluate_vit_t_lite.py --data DATA/nuclei_dsb2018/val DATA/phase_t98g/val
    python finetuning/evaluate_vit_t_lite.py --data DATA/nuclei_dsb2018/val DATA/phase_t98g/val --task prompts
    python finetuning/evaluate_vit_t_lite.py --data DATA/nuclei_dsb2018/train --names held_out.txt --tune

Automatic segmentation is scored by the mean segmentation accuracy (mSA), prompts by the mean IoU over all objects:
from one point (a random pixel of the object), from its box, and after seven corrections of the point, each of them a
positive and a negative point where the mask is wrong.

Segmentation accuracy at an IoU threshold t is TP / (TP + FP + FN) with one-to-one matches of IoU > t; mSA is its mean
over t = 0.5, 0.55, …, 0.95 (Everingham et al. 2010; Stringer et al. 2021, 10.1038/s41592-020-01018-x). The matcher
here is written for this script alone, so that it checks the package independently. Scores are means over images.
"""

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import tifffile
import torch
from scipy.optimize import linear_sum_assignment

from micro_sam.core.normalize import to_image
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.models.loading import get_predictor_and_decoder
from micro_sam.models.mask_decoder import predict_low_res
from micro_sam.models.registry import find_spec
from micro_sam.prompt_generators import IterativePromptGenerator, PointAndBoxPromptGenerator
from micro_sam.segmentation.ais import InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder
from micro_sam.segmentation.apg import AutomaticPromptGenerator
from micro_sam.segmentation.workflow import choose_strategy

THRESHOLDS = np.arange(0.5, 1.0, 0.05).round(2)
WEIGHTS = Path(__file__).parent.parent / "micro_sam/models/weights/vit_t_lite.pt"
GRID = {
    "center_distance_threshold": (0.4, 0.5, 0.6),
    "boundary_distance_threshold": (0.4, 0.5, 0.6, 0.7),
    "foreground_threshold": (0.4, 0.5, 0.6),
    "foreground_smoothing": (1.0,),
    "distance_smoothing": (1.0, 1.6),
    "min_size": (0, 25, 50),
}


def iou_matrix(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU of each object of `truth` (rows) with each object of `labels` (columns)."""
    _, a = np.unique(np.append(0, truth.ravel()), return_inverse=True)
    _, b = np.unique(np.append(0, labels.ravel()), return_inverse=True)
    n, m = a.max() + 1, b.max() + 1
    overlap = np.bincount(a[1:] * m + b[1:], minlength=n * m).reshape(n, m)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    return (overlap / np.maximum(union, 1))[1:, 1:]


def segmentation_accuracy(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Segmentation accuracy for each of `THRESHOLDS`; 1 if both images are empty."""
    iou = iou_matrix(labels, truth)
    scores = []
    for threshold in THRESHOLDS:
        valid = iou > threshold
        rows, columns = linear_sum_assignment(valid, maximize=True)
        true_positives = int(valid[rows, columns].sum())
        total = sum(iou.shape) - true_positives
        scores.append(true_positives / total if total else 1.0)
    return np.array(scores)


def read_data(folder: Path, names: set[str] | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, image and labels of each pair in `images/` and `labels/`."""
    for path in sorted((folder / "images").iterdir()):
        if names is None or path.stem in names:
            (label_path,) = (folder / "labels").glob(f"{path.stem}.*")
            read = tifffile.imread if label_path.suffix == ".tif" else imageio.imread
            yield path.stem, imageio.imread(path), read(label_path)


def chosen_canvas(image: np.ndarray) -> int:
    """The canvas that the package takes for an image without tiles."""
    return choose_strategy("vit_t_lite", find_spec("vit_t_lite").image_size, image.shape[:2], None).canvas


class Model:
    """The network with a canvas of any size, plain or tiled."""

    def __init__(self, path: Path, mode: str):
        self.path, self.mode = path, mode
        self.loaded = {}

    def load(self, size: int):
        if size not in self.loaded:
            self.loaded[size] = get_predictor_and_decoder("vit_t_lite", self.path, "cpu", image_size=size)
        return self.loaded[size]

    def initialize(self, image: np.ndarray, strategy: str) -> InstanceSegmentationWithDecoder:
        """Run the network on a canvas, or on tiles with one contrast stretch for all, see `--strategy`."""
        if strategy.startswith("tiled"):
            size, tile, halo = (int(v) for v in strategy.split(":")[1:])
            if max(image.shape[:2]) > size:
                predictor, decoder = self.load(size)
                embeddings = precompute_image_embeddings(
                    predictor, image, ndim=2, tile_shape=(tile, tile), halo=(halo, halo), normalization="image",
                    verbose=False,
                )
                segmenter = TiledInstanceSegmentationWithDecoder(predictor, decoder)
                segmenter.initialize(image, embeddings)
                return segmenter
            strategy = str(size)
        kind = {"ais": InstanceSegmentationWithDecoder, "apg": AutomaticPromptGenerator}[self.mode]
        if strategy == "auto":
            size = chosen_canvas(image)
        else:
            size = int(strategy)
        segmenter = kind(*self.load(size))
        segmenter.initialize(image)
        return segmenter


def prompt_scores(
    model: Model, image: np.ndarray, truth: np.ndarray, canvas: int, n_objects: int, n_corrections: int = 7
) -> np.ndarray:
    """IoU of each object (N, 3): from one point, from its box, from the point after corrections."""
    predictor, _ = model.load(canvas)
    predictor.set_image(to_image(image))
    ids, rng, scores = np.unique(truth[truth > 0]), np.random.default_rng(0), []
    ids = ids[::max(1, len(ids) // n_objects)]
    for part in np.array_split(ids, -(-len(ids) // 32)):
        objects = torch.from_numpy(truth[None] == part[:, None, None])[:, None]
        boxes = []
        for mask in objects[:, 0].numpy():
            (y,), (x,) = mask.any(1).nonzero(), mask.any(0).nonzero()
            boxes.append((y[0], x[0], y[-1] + 1, x[-1] + 1))
        start = PointAndBoxPromptGenerator(1, 0, 10, get_box_prompts=True, rng=rng)
        points, labels, boxes_xy, _ = start(objects, boxes)
        from_box, _ = predict(predictor, None, None, boxes_xy, None)
        masks, logits = predict(predictor, points, labels, None, None)
        columns = [iou(masks, objects), iou(from_box, objects)]
        generator = IterativePromptGenerator(rng=rng)
        for _ in range(n_corrections):
            more, more_labels, _, _ = generator(objects, masks)
            points, labels = torch.cat([points, more], 1), torch.cat([labels, more_labels], 1)
            masks, logits = predict(predictor, points, labels, None, logits)
        scores.append(np.stack([*columns, iou(masks, objects)], axis=1))
    return np.concatenate(scores) if scores else np.zeros((0, 3))


@torch.no_grad()
def predict(predictor, points, labels, boxes, logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N, 1, H, W) and their logits; three masks for a single point, of which the one rated best is taken."""
    shape = predictor.original_size
    if points is not None:
        points = predictor.transform.apply_coords_torch(points, shape)
    if boxes is not None:
        boxes = predictor.transform.apply_boxes_torch(boxes, shape)
    multimask = points is not None and points.shape[1] == 1
    logits, rated = predict_low_res(predictor, points, labels, boxes, multimask, logits)
    logits = logits[torch.arange(len(logits)), rated.argmax(1)][:, None]
    return predictor.model.postprocess_masks(logits, predictor.input_size, shape) > 0, logits


def iou(masks: torch.Tensor, objects: torch.Tensor) -> np.ndarray:
    overlap, union = (masks & objects).sum((1, 2, 3)), (masks | objects).sum((1, 2, 3))
    return (overlap / union).numpy()


def print_prompt_table(scores: dict[str, np.ndarray]) -> None:
    groups = defaultdict(list)
    for name, values in scores.items():
        groups[modality(name)].append(values)
    print("| modality | images | objects | point | box | after 7 corrections |\n|---|---|---|---|---|---|")
    for name, group in [*sorted(groups.items()), ("all", list(scores.values()))]:
        values = np.concatenate(group)
        means = " | ".join(f"{mean:.3f}" for mean in values.mean(0))
        print(f"| {name} | {len(group)} | {len(values)} | {means} |", flush=True)


def modality(name: str) -> str:
    return "phase_t98g" if name.startswith("set") else name.rsplit("_", 1)[0]


def summarise(scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean scores per modality and over all images, from the accuracies of each image."""
    groups = defaultdict(list)
    for name, score in scores.items():
        groups[modality(name)].append(score)
    rows = dict(sorted(groups.items())) | {"all": list(scores.values())}
    means = {name: np.mean(group, axis=0) for name, group in rows.items()}
    return {
        name: {"images": len(rows[name]), "mSA": mean.mean(), "SA50": mean[0], "SA75": mean[5]}
        for name, mean in means.items()
    }


def print_table(figures: dict[str, dict[str, float]]) -> None:
    print("| modality | images | mSA | SA50 | SA75 |\n|---|---|---|---|---|")
    for name, f in figures.items():
        print(f"| {name} | {f['images']} | {f['mSA']:.3f} | {f['SA50']:.3f} | {f['SA75']:.3f} |", flush=True)


def tune(states: dict[str, tuple], grid: dict[str, tuple]) -> dict[str, float]:
    """Search the grid one pair of settings at a time, and return the best settings."""
    best = {name: values[len(values) // 2] for name, values in grid.items()}

    def score(options):
        return np.mean([
            segmentation_accuracy(segmenter.generate(**options), truth).mean() for segmenter, truth in states.values()
        ])

    best_score = score(best)
    open_names = [name for name, values in grid.items() if len(values) > 1]
    for pair in itertools.pairwise([*open_names, open_names[0]]):
        for values in itertools.product(*(grid[name] for name in pair)):
            options = best | dict(zip(pair, values))
            if options != best and (result := score(options)) > best_score:
                best, best_score = options, result
        print(f"{best_score:.4f} {json.dumps(best)}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders with images/ and labels/")
    parser.add_argument("--task", default="ais", choices=("ais", "apg", "prompts"))
    parser.add_argument("--names", type=Path, help="text file with the image names to use; default: all")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--canvas", type=int, help="for prompts; default: that of choose_strategy")
    parser.add_argument("--objects", type=int, default=25, help="for prompts: about so many objects per image")
    parser.add_argument("--strategy", default="auto", help="a canvas, auto, or tiled:CANVAS:TILE:HALO")
    parser.add_argument("--larger-than", type=int, default=0, help="only images with a longer side than this")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON with arguments of generate")
    parser.add_argument("--tune", action="store_true", help="search the thresholds (not on data to be reported)")
    args = parser.parse_args()

    torch.set_num_threads(2)
    names = set(args.names.read_text().split()) if args.names else None
    model = Model(args.weights, args.task)
    pairs = itertools.chain.from_iterable(read_data(folder, names) for folder in args.data)
    if args.task == "prompts":
        print_prompt_table({
            name: prompt_scores(model, image, truth, args.canvas or chosen_canvas(image), args.objects)
            for name, image, truth in pairs
        })
        return
    states, start = {}, time.perf_counter()
    for name, image, truth in pairs:
        if max(image.shape[:2]) > args.larger_than:
            states[name] = model.initialize(image, args.strategy), truth
    print(f"{(time.perf_counter() - start) / len(states):.2f} s per image ({args.strategy})")
    options = tune(states, GRID) if args.tune else args.options
    print_table(summarise({
        name: segmentation_accuracy(segmenter.generate(**options), truth)
        for name, (segmenter, truth) in states.items()
    }))


if __name__ == "__main__":
    main()
