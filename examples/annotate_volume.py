"""Annotate nuclei in a volume in napari: click in one plane, and Shift + S carries the nucleus through the others."""

import argparse

from scipy.ndimage import gaussian_filter

from micro_sam.sam_annotator import annotator_3d
from micro_sam.sample_data import sample_data_nuclei_3d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planes", type=int, default=36, help="how many planes of the sample to take; default: all 36")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    args = parser.parse_args()

    # The sample is noisy, and small models are easily misled by noise.
    volume = gaussian_filter(sample_data_nuclei_3d()[0][0][:args.planes].astype("float32"), (0.7, 1.5, 1.5))
    annotator_3d(volume, model_type=args.model)


if __name__ == "__main__":
    main()
