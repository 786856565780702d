"""Draw the training curve of `vit_t_lite` from what `train_vit_t_lite.py` printed.

    python finetuning/plot_training.py LOG --epoch-length 50 --output doc/images/vit_t_lite_training.png
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

NAMES = ("instance decoder (sum of three)", "masks from a point", "masks from a box")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--epoch-length", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    text = args.log.read_text(errors="replace")
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for pattern, style in ((r"held out: \[(.*?)\]", "o-"), (r"train: decoder, point, box: \[(.*?)\]", ":")):
        rows = np.array([[float(v) for v in row.split(",")] for row in re.findall(pattern, text)])
        iterations = args.epoch_length * np.arange(1, len(rows) + 1)
        for k, name in enumerate(NAMES):
            label = name if style == "o-" else None
            axis.plot(iterations, rows[:, k], style, color=f"C{k}", markersize=3, label=label)
    axis.set(xlabel="iteration", ylabel="Dice loss (dots: held out, dotted: training)", ylim=(0, 0.9))
    axis.legend(frameon=False)
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
