"""Score volumes against ground truth: automatic segmentation, and objects followed from prompts in one slice.

    python finetuning/evaluate_volumes.py DATA/lm3d_mouse_embryo DATA/em3d_chloroplast [--model vit_t_lite]

Each folder holds one `*_image.tif` and its `*_labels.tif`. For `automatic` all objects are segmented with the defaults
of `micro_sam.segment`. For `prompts` each object of the ground truth gets the box of its largest slice and is
followed from there. mSA is over voxels. Each line is a
process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile

import micro_sam
from micro_sam.evaluation.metrics import segmentation_scores
from micro_sam.evaluation.multi_dimensional_segmentation import segment_slices_from_ground_truth
from micro_sam.segmentation.workflow import load_model

# Those of the annotator, see `propagate_objects`.
FOLLOW = {
    "projection": "points", "box_extension": 0.05, "iou_threshold": 0.5, "max_area_change": 1.75, "max_drift": 0.5,
}


def run(folder: Path, task: str, model: str) -> dict:
    (image_path,) = folder.glob("*_image.tif")
    volume = tifffile.imread(image_path)
    truth = tifffile.imread(image_path.with_name(image_path.name.replace("_image", "_labels")))
    start = time.perf_counter()
    if task == "automatic":
        labels = micro_sam.segment(volume, model=model, min_z_extent=2, device="cpu", batch_size=2)
    else:
        predictor = load_model(model, device="cpu").for_prompts(volume.shape[-2:]).predictor
        _, labels = segment_slices_from_ground_truth(
            volume, truth, model, prompt_slice="largest", predictor=predictor, batch_size=2, return_segmentation=True,
            **FOLLOW,
        )
    seconds = time.perf_counter() - start
    scores = segmentation_scores(labels, truth)
    return {
        "shape": list(volume.shape), "objects": len(np.unique(truth)) - 1, "found": len(np.unique(labels)) - 1,
        "mSA": scores["mSA"], "SA50": scores["SA50"], "seconds": seconds,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="vit_t_lite")
    parser.add_argument("--task", choices=("automatic", "prompts"), help="run one task in this process, print JSON")
    args = parser.parse_args()
    if args.task is not None:
        print(json.dumps(run(args.folders[0], args.task, args.model)))
        return
    print("| volume | shape | objects | task | found | mSA | SA50 | seconds | peak memory |\n|" + "---|" * 9)
    for folder in args.folders:
        for task in ("automatic", "prompts"):
            command = [sys.executable, __file__, str(folder), "--model", args.model, "--task", task]
            r = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {folder.name} | {' × '.join(map(str, r['shape']))} | {r['objects']} | {task} | {r['found']} | "
                f"{r['mSA']:.3f} | {r['SA50']:.3f} | {r['seconds']:.1f} | {r['MB']:.0f} MB |", flush=True,
            )


if __name__ == "__main__":
    main()
