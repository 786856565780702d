"""What a few annotated images are worth: finetune `vit_t_lite` on 2, 5 and 10 crops of an EM image of chloroplasts.

    python finetuning/finetune_few_images.py --data DATA/em2d_large_chloroplast --output results

The model has seen no electron microscopy. Training crops (512 x 512) come from the left part of the image, held-out
crops from the right part. Each run is the command that a user types; the table and the plot (doc/images) are made from
the reports that it writes.
"""

import argparse
import json
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from micro_sam.cli.train import main as train

SIZE = 512
TASKS = {"automatic": "automatic (mSA)", "point": "one point (IoU)", "box": "box (IoU)"}


def cut(data: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Write crops with at least two objects, and return the folders of those for training, and of the held-out ones."""
    (image_path,), (label_path,) = data.glob("*_image.tif"), data.glob("*_labels.tif")
    image, labels = imageio.imread(image_path), imageio.imread(label_path)
    border = image.shape[1] - SIZE
    parts = {"train": [], "val": []}
    for y in range(0, image.shape[0] - SIZE + 1, SIZE // 2):
        for x in [*range(0, border - SIZE + 1, SIZE // 2), border]:
            window = np.s_[y:y + SIZE, x:x + SIZE]
            is_held_out = x == border
            if len(np.unique(labels[window])) < 3 or (is_held_out and y % SIZE):
                continue
            part = "val" if is_held_out else "train"
            for kind, array in (("images", image), ("labels", labels)):
                path = folder / part / kind / f"{y}_{x}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                imageio.imwrite(path, array[window])
            parts[part].append(f"{y}_{x}.tif")
    order = np.random.default_rng(0).permutation(len(parts["train"]))
    return [parts["train"][k] for k in order], parts["val"]


def plot(results: dict[int, dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    counts = [0, *results]
    for task, label in TASKS.items():
        first = next(iter(results.values()))["tasks"][task]["before"]
        axis.plot(counts, [first, *(r["tasks"][task]["after"] for r in results.values())], "o-", label=label)
    axis.set(xlabel="annotated images for finetuning", ylabel="score on held-out images", ylim=(0, 1), xticks=counts)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "doc/images/finetuning.png")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    names, held_out = cut(args.data, args.output)
    results = {}
    for count in args.counts:
        def paths(part, kind, files):
            return [str(args.output / part / kind / name) for name in files]

        name, start = f"images_{count}", time.perf_counter()
        code = train([
            "--images", *paths("train", "images", names[:count]), "--labels", *paths("train", "labels", names[:count]),
            "--val_images", *paths("val", "images", held_out), "--val_labels", *paths("val", "labels", held_out),
            "-m", "vit_t_lite", "-d", "cpu", "--configuration", "Minimal", "--n_objects", "6", "--n_sub_iteration", "3",
            "--lr", str(args.lr), "--n_iterations", str(args.iterations), "--gradient_clipping", "1",
            "-s", str(args.output), "--trained_model_name", name, "-o", str(args.output / f"{name}.pt"), "--overwrite",
        ])
        report = args.output / "checkpoints" / name / "outcome.json"
        if code or not report.exists():
            raise SystemExit(f"The training on {count} images failed with the exit code {code}.")
        results[count] = json.loads(report.read_text()) | {"minutes": (time.perf_counter() - start) / 60}
    print("| images | minutes | " + " | ".join(TASKS.values()) + " |\n|---|---|" + "---|" * len(TASKS))
    before = next(iter(results.values()))["tasks"]
    print("| 0 | | " + " | ".join(f"{before[task]['before']:.3f}" for task in TASKS) + " |")
    for count, result in results.items():
        after = " | ".join(f"{result['tasks'][task]['after']:.3f}" for task in TASKS)
        print(f"| {count} | {result['minutes']:.1f} | {after} |")
    plot(results, args.plot)


if __name__ == "__main__":
    main()
