"""Annotate a folder of images in napari, one after the other: N saves and goes on, and tomorrow it goes on there."""

import argparse
from pathlib import Path

from micro_sam.sam_annotator import image_folder_annotator

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DATA)
    parser.add_argument("-p", "--pattern", default="*.png", help="which files of the folder; default: *.png")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    parser.add_argument("-o", "--output", type=Path, default=DATA.parent.parent / "example_output/annotate_series")
    args = parser.parse_args()

    image_folder_annotator(args.folder, args.output, args.pattern, model_type=args.model)


if __name__ == "__main__":
    main()
