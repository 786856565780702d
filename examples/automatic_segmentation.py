"""Segment an image automatically in the three ways that there are, whole and in tiles.

AIS and APG need a model with a decoder for instances, as the one that ships; AMG tries a grid of points, and works with
any model. Labels and their settings are written; a second call loads them.
"""

import argparse
from pathlib import Path

from micro_sam.automatic_segmentation import automatic_instance_segmentation, get_predictor_and_segmenter

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path, default=ROOT / "examples/data/fluorescence_small.png")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "example_output/automatic_segmentation")
    args = parser.parse_args()

    # What the segmenter is made with, and what the objects are made with. The thresholds of AMG suit the small model,
    # whose estimates of its own quality are low; larger models do well without these options.
    settings = {"ais": ({}, {}), "apg": ({}, {"min_size": 30}),
                "amg": ({"points_per_side": 16}, {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.8})}
    for mode, (options, generate_options) in settings.items():
        predictor, segmenter = get_predictor_and_segmenter(args.model, segmentation_mode=mode, **options)
        labels = automatic_instance_segmentation(
            predictor, segmenter, args.image, args.output / f"{args.image.stem}_{mode}.tif", verbose=False,
            **generate_options,
        )
        print(f"{mode}: {labels.max()} objects", flush=True)

    # The halo should reach over half of a large object, so that each is whole in one of the tiles.
    predictor, segmenter = get_predictor_and_segmenter(args.model, segmentation_mode="ais", is_tiled=True)
    labels = automatic_instance_segmentation(
        predictor, segmenter, args.image, args.output / f"{args.image.stem}_tiled.tif",
        tile_shape=(192, 192), halo=(32, 32), verbose=False,
    )
    print(f"ais in tiles: {labels.max()} objects")
    print(f"The labels are in {args.output}")


if __name__ == "__main__":
    main()
