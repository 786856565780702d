"""Score volumes against ground truth: automatic segmentation, and objects followed from prompts in one slice.

    python finetuning/evaluate_volumes.py DATA/lm3d_mouse_embryo DATA/em3d_chloroplast [--model vit_t_lite]

Each folder holds one `*_image.tif` and its `*_labels.tif`. For `automatic` all objects are segmented with the defaults
of `micro_sam.segment`. For `prompts` each object of the ground truth gets the box of its largest slice, as the prompt
generator makes it, and is followed from there. mSA is that of `evaluate_vit_t_lite.py`, over voxels. Each line is a
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
import torch
from evaluate_vit_t_lite import segmentation_accuracy

import micro_sam
from micro_sam.automatic_segmentation import get_predictor_and_segmenter
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.prompt_generators import PointAndBoxPromptGenerator
from micro_sam.util import get_centers_and_bounding_boxes, segmentation_to_one_hot
from micro_sam.volume.paint import paint_objects
from micro_sam.volume.propagate import SlicePrompts, propagate_objects


def prompts_from_truth(truth: np.ndarray) -> dict[int, dict[int, SlicePrompts]]:
    """For each object its largest slice and the box there."""
    generator = PointAndBoxPromptGenerator(0, 0, 0, get_point_prompts=False, get_box_prompts=True)
    prompts = {}
    for id_ in np.unique(truth)[1:].tolist():
        z = int((truth == id_).sum(axis=(1, 2)).argmax())
        _, boxes = get_centers_and_bounding_boxes(np.where(truth[z] == id_, 1, 0).astype(np.uint8))
        mask = segmentation_to_one_hot(truth[z], [id_])
        _, _, box, _ = generator(mask, [boxes[1]])
        x0, y0, x1, y1 = torch.as_tensor(box)[0].tolist()
        prompts[id_] = {z: SlicePrompts(box=np.array([y0, x0, y1, x1]))}
    return prompts


def run(folder: Path, task: str, model: str) -> dict:
    (image_path,) = folder.glob("*_image.tif")
    volume = tifffile.imread(image_path)
    truth = tifffile.imread(image_path.with_name(image_path.name.replace("_image", "_labels")))
    start = time.perf_counter()
    if task == "automatic":
        labels = micro_sam.segment(volume, model=model, min_z_extent=2, device="cpu", batch_size=2)
    else:
        predictor, _ = get_predictor_and_segmenter(model, device="cpu")
        embeddings = precompute_image_embeddings(predictor, volume, ndim=3, verbose=False, batch_size=2)
        objects = propagate_objects(predictor, embeddings, prompts_from_truth(truth), "box", verbose=False)
        labels = np.zeros(volume.shape, dtype=np.uint32)
        paint_objects(labels, objects)
    seconds = time.perf_counter() - start
    scores = segmentation_accuracy(labels, truth)
    return {
        "shape": list(volume.shape), "objects": len(np.unique(truth)) - 1, "found": len(np.unique(labels)) - 1,
        "mSA": float(scores.mean()), "SA50": float(scores[0]), "seconds": seconds,
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
