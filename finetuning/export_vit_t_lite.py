"""Write a trained `vit_t_lite` in the file format of micro_sam: half precision, loadable with weights_only=True.

    python finetuning/export_vit_t_lite.py [--checkpoint FILE] [--output micro_sam/models/weights/vit_t_lite.pt]

The averaged weights are exported. Prompt encoder and mask decoder are random (fixed seed): they are not trained yet.
"""

import argparse
import sys
from pathlib import Path

import torch
import train_vit_t_lite

from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_unetr

HERE = Path(__file__).parent
IMAGE_SIZE = 512


def convert(state: dict[str, torch.Tensor]) -> dict:
    """Convert the weights of the trainer's UNETR into a checkpoint with a complete SAM and a decoder."""
    torch.manual_seed(0)
    sam = build_sam("vit_t", image_size=IMAGE_SIZE)
    sam.image_encoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})
    # The classifier of the original TinyViT belongs to the file format, but is not used.
    for module in (sam.image_encoder.norm_head, sam.image_encoder.head):
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    decoder_state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    get_unetr(sam.image_encoder, decoder_state, "cpu")  # raises if the decoder does not fit

    def half(values):
        return {k: v.half() if v.is_floating_point() else v for k, v in values.items()}

    return {
        "model_state": half(sam.state_dict()),
        "decoder_state": half(decoder_state),
        "decoder_settings": {
            "initial_features": decoder_state["out_conv.weight"].shape[1], "normalization": "running",
        },
        "settings": {
            "name": "vit_t_lite", "model_type": "vit_t", "image_size": IMAGE_SIZE,
            "trained_parts": ["image_encoder", "decoder"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoints/checkpoints/vit_t_lite/best.pt")
    parser.add_argument("--output", type=Path, default=HERE.parent / "micro_sam/models/weights/vit_t_lite.pt")
    args = parser.parse_args()

    # Our own file of the training run: the trainer also pickles objects of the training script into it.
    for name in ("Crops", "WallTimeCosine"):
        setattr(sys.modules["__main__"], name, getattr(train_vit_t_lite, name))
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=False)
    checkpoint = convert(saved["average_state"])
    checkpoint["settings"]["iterations"] = saved["iteration"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, args.output)
    torch.load(args.output, weights_only=True)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {saved['iteration']} iterations, loss {saved['current_metric']:.4f}, {size:.1f} MB")


if __name__ == "__main__":
    main()
