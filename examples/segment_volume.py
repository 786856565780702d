"""Segment a volume: all nuclei automatically, and one of them from a single point.

The volume that ships is noisy, so it is smoothed first; its middle planes are enough to see how it works.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops

from micro_sam.automatic_segmentation import automatic_instance_segmentation, get_predictor_and_segmenter
from micro_sam.core.output import write_labels
from micro_sam.prompt_based_segmentation import segment_from_points
from micro_sam.sample_data import sample_data_nuclei_3d
from micro_sam.volume.paint import paint_objects
from micro_sam.volume.propagate import propagate_objects

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, default=12, help="how many planes of the middle; default: 12")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "example_output/segment_volume")
    args = parser.parse_args()

    volume, properties = sample_data_nuclei_3d()[0]
    start = (len(volume) - args.planes) // 2
    volume = gaussian_filter(volume[start:start + args.planes].astype("float32"), (0.7, 1.5, 1.5))

    predictor, segmenter = get_predictor_and_segmenter("vit_t_lite", segmentation_mode="ais")
    labels, embeddings = automatic_instance_segmentation(
        predictor, segmenter, volume, return_embeddings=True, min_z_extent=3, min_size=50
    )
    write_labels(args.output / "all.tif", labels, scale=properties["scale"])
    print(f"Automatically: {labels.max()} nuclei in {len(volume)} planes")

    # The same embeddings answer prompts. A click into a nucleus of the middle plane gives a mask there, which is
    # carried through the other planes until the nucleus ends.
    z = len(volume) // 2
    click = max(regionprops(labels[z]), key=lambda region: region.area).centroid
    mask = segment_from_points(predictor, np.array([click]), np.array([1]), embeddings, i=z)[0]
    objects = propagate_objects(predictor, embeddings, {1: {z: mask}}, verbose=False)
    nucleus = np.zeros(volume.shape, dtype="uint8")
    paint_objects(nucleus, objects)
    write_labels(args.output / "one.tif", nucleus, scale=properties["scale"])
    first, last = objects[1].z_range
    print(f"From a point in plane {z}: {nucleus.sum()} voxels in the planes {first} to {last}")
    print(f"The labels are in {args.output}")


if __name__ == "__main__":
    main()
