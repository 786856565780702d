"""Annotate an image in napari, starting from what the model finds by itself."""

import argparse
from pathlib import Path

import imageio.v3 as imageio

import micro_sam
from micro_sam.sam_annotator import annotator_2d

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", type=Path, default=DATA / "fluorescence_small.png")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    args = parser.parse_args()

    image = imageio.imread(args.image)
    labels = micro_sam.segment(image, model=args.model)
    # Correct them: pick an object in the table, press Correct, click, and press C. Save… writes the result.
    annotator_2d(image, segmentation_result=labels, model_type=args.model)


if __name__ == "__main__":
    main()
