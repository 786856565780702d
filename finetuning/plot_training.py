"""Draw the training curves of `vit_t_lite` from what runs of `train_vit_t_lite.py` printed, to compare them.

    python finetuning/plot_training.py --logs muon.log adamw.log --names Muon AdamW --output curves.png
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = ("instance decoder (sum of three)", "masks from a point", "masks from a box")
PATTERNS = {
    "held out": (r"held out: \[(.*?)\]\s+(\d+) iterations", "o-"),
    "training": (r"decoder, point, box: \[(.*?)\][^\[]*\[[^\]]*\]\s+(\d+) iterations", "x:"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, nargs="+", required=True)
    parser.add_argument("--names", nargs="+", required=True, help="of the runs, one for each log")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    figure, axes = plt.subplots(1, len(PARTS), figsize=(9, 3.2), sharex=True, constrained_layout=True)
    for color, (log, name) in enumerate(zip(args.logs, args.names, strict=True)):
        text = log.read_text(errors="replace")
        for kind, (pattern, style) in PATTERNS.items():
            found = re.findall(pattern, text)
            iterations = [int(iteration) for _, iteration in found]
            for axis, values in zip(axes, zip(*(map(float, row.split(",")) for row, _ in found))):
                axis.plot(iterations, values, style, color=f"C{color}", label=f"{name}, {kind}")
    for axis, part in zip(axes, PARTS):
        axis.set(title=part, xlabel="iteration")
    axes[0].set(ylabel="Dice loss")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
