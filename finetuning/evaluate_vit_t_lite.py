"""Score automatic segmentation (AIS) against ground truth: mean segmentation accuracy (mSA) per modality.

    python finetuning/evaluate_vit_t_lite.py --data DATA/nuclei_dsb2018/val
    python finetuning/evaluate_vit_t_lite.py --data DATA/nuclei_dsb2018/train --names held_out.txt --tune

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
from segment_anything import SamPredictor

from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_decoder
from micro_sam.segmentation.ais import InstanceSegmentationWithDecoder, TiledInstanceSegmentationWithDecoder

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


class Model:
    """The network with a canvas of 512 or of 1024 pixels, plain or tiled."""

    def __init__(self, path: Path):
        self.checkpoint = torch.load(path, weights_only=True)
        self.loaded = {}

    def _load(self, size: int):
        if size not in self.loaded:
            sam = build_sam("vit_t", image_size=size)
            sam.load_state_dict({k: v.float() for k, v in self.checkpoint["model_state"].items()}, strict=False)
            predictor = SamPredictor(sam)
            predictor.model_type = "vit_t"
            decoder = get_decoder(
                sam.image_encoder, self.checkpoint["decoder_state"], "cpu",
                normalization=self.checkpoint["decoder_settings"]["normalization"],
            )
            self.loaded[size] = predictor, decoder
        return self.loaded[size]

    def initialize(self, image: np.ndarray, strategy: str) -> InstanceSegmentationWithDecoder:
        """Run the network on a canvas, or on tiles with one contrast stretch for all, see `--strategy`."""
        if strategy.startswith("tiled"):
            size, tile, halo = (int(v) for v in strategy.split(":")[1:])
            if max(image.shape[:2]) > size:
                predictor, decoder = self._load(size)
                embeddings = precompute_image_embeddings(
                    predictor, image, ndim=2, tile_shape=(tile, tile), halo=(halo, halo), normalization="image",
                    verbose=False,
                )
                segmenter = TiledInstanceSegmentationWithDecoder(predictor, decoder)
                segmenter.initialize(image, embeddings)
                return segmenter
            strategy = str(size)
        size = (512 if max(image.shape[:2]) <= 512 else 1024) if strategy == "auto" else int(strategy)
        segmenter = InstanceSegmentationWithDecoder(*self._load(size))
        segmenter.initialize(image)
        return segmenter


def modality(name: str) -> str:
    return name.rsplit("_", 1)[0]


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
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--names", type=Path, help="text file with the image names to use; default: all")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--strategy", default="auto", help="a canvas, auto (512 or 1024), or tiled:CANVAS:TILE:HALO")
    parser.add_argument("--larger-than", type=int, default=0, help="only images with a longer side than this")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON with arguments of generate")
    parser.add_argument("--tune", action="store_true", help="search the thresholds (not on data to be reported)")
    args = parser.parse_args()

    torch.set_num_threads(2)
    names = set(args.names.read_text().split()) if args.names else None
    model = Model(args.weights)
    states, start = {}, time.perf_counter()
    for name, image, truth in read_data(args.data, names):
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
