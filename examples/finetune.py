"""Finetune the model that ships on stained tissue, and compare it with what it was.

One part of an image is for training, another one for validation. Ten steps only show how it is done; take some hundred
steps, and more images, for a model that you want to use. `micro_sam.train` does all this and more in one command.
"""

import argparse
from pathlib import Path

import imageio.v3 as imageio

from micro_sam.automatic_segmentation import automatic_instance_segmentation, get_predictor_and_segmenter
from micro_sam.evaluation import segmentation_scores
from micro_sam.training import default_sam_loader, train_sam
from micro_sam.training.util import get_raw_transform
from micro_sam.util import export_custom_sam_model

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10, help="training steps; default: 10")
    parser.add_argument("-o", "--output", type=Path, default=DATA.parent.parent / "example_output/finetune")
    args = parser.parse_args()

    image, labels = (imageio.imread(folder / "tissue_purple.png") for folder in (DATA, DATA / "labels"))
    train, val = slice(0, 160), slice(160, None)  # rows
    options = {
        "raw_key": None, "label_key": None, "with_segmentation_decoder": True, "batch_size": 1,
        "raw_transform": get_raw_transform("normalize_image"),  # as segmentation does it later
    }
    train_loader = default_sam_loader(
        raw_paths=[image[train]], label_paths=[labels[train]], patch_shape=(160, 192), n_samples=10, seed=0, **options
    )
    val_loader = default_sam_loader(
        raw_paths=[image[val]], label_paths=[labels[val]], patch_shape=(96, 320), n_samples=1, is_train=False, **options
    )
    # Few objects and few corrections per step, for a computer without a graphics card.
    train_sam(
        "tissue", "vit_t_lite", train_loader, val_loader, lr=1e-4, n_iterations=args.iterations,
        n_objects_per_batch=4, n_sub_iteration=2, verify_n_labels_in_loader=1, save_root=args.output,
    )
    model = args.output / "tissue.pt"
    best = args.output / "checkpoints/tissue/best.pt"
    export_custom_sam_model(best, "vit_t_lite", model, with_segmentation_decoder=True)

    for name, checkpoint in (("before", None), ("after", model)):
        predictor, segmenter = get_predictor_and_segmenter("vit_t_lite", checkpoint)
        found = automatic_instance_segmentation(predictor, segmenter, image[val], verbose=False)
        print(f"mSA {name}: {segmentation_scores(found, labels[val])['mSA']:.3f}")
    print(f"Use it: micro_sam.automatic_segmentation -c {model} -i … -o …")


if __name__ == "__main__":
    main()
