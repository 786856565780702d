"""Segment objects from points and boxes, with embeddings that are computed once and kept on the disk.

One nucleus from a point, with a correction, and from a box; then all nuclei from their boxes, compared with the labels
that were drawn by hand.
"""

import argparse
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from skimage.measure import regionprops

from micro_sam.core.output import write_labels
from micro_sam.evaluation import segmentation_scores
from micro_sam.inference import batched_inference
from micro_sam.prompt_based_segmentation import segment_from_box, segment_from_points
from micro_sam.util import compute_iou, get_sam_model, precompute_image_embeddings, set_precomputed

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=DATA / "fluorescence_large.png")
    parser.add_argument("--labels", type=Path, default=DATA / "labels/fluorescence_large.png")
    parser.add_argument("--object", type=int, default=38, help="its number in the labels; default: 38")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    parser.add_argument("-o", "--output", type=Path, default=DATA.parent.parent / "example_output/prompts")
    args = parser.parse_args()

    image, truth = imageio.imread(args.image), imageio.imread(args.labels)
    predictor = get_sam_model(args.model)
    # A second call reads the embeddings from there.
    embeddings = precompute_image_embeddings(predictor, image, args.output / "embeddings.zarr", verbose=False)

    nucleus = next(region for region in regionprops(truth) if region.label == args.object)
    is_nucleus = truth == args.object
    # Points and boxes are y, x.
    middle = nucleus.centroid
    mask = segment_from_points(predictor, np.array([middle]), np.array([1]), embeddings)[0]
    print(f"From a point: IoU {compute_iou(mask, is_nucleus):.2f}")

    # A second click where the mask is wrong: 1 is inside the object, 0 outside.
    wrong = np.argwhere(mask != is_nucleus)
    click = wrong[len(wrong) // 2]
    points, inside = np.array([middle, click]), np.array([1, int(is_nucleus[tuple(click)])])
    mask = segment_from_points(predictor, points, inside, embeddings)[0]
    print(f"Corrected by a second one: IoU {compute_iou(mask, is_nucleus):.2f}")

    mask = segment_from_box(predictor, np.array(nucleus.bbox), embeddings)[0]
    print(f"From a box: IoU {compute_iou(mask, is_nucleus):.2f}")

    # Many prompts at once. Here the order is that of SAM: x0, y0, x1, y1.
    boxes = np.array([region.bbox for region in regionprops(truth)])[:, [1, 0, 3, 2]]
    set_precomputed(predictor, embeddings)
    labels = batched_inference(predictor, None, batch_size=16, boxes=boxes)
    path = write_labels(args.output / "from_boxes.tif", labels)
    print(f"All {len(boxes)} from boxes: mSA {segmentation_scores(labels, truth)['mSA']:.2f}. The labels are in {path}")


if __name__ == "__main__":
    main()
