"""Write a trained `vit_t_lite` in the file format of micro_sam: half precision, loadable with weights_only=True.

    python finetuning/export_vit_t_lite.py [--checkpoint FILE] [--output micro_sam/models/weights/vit_t_lite.pt]

The averaged weights are exported.
"""

import argparse
from pathlib import Path

import torch

HERE = Path(__file__).parent
POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def convert(state: dict[str, torch.Tensor], canvas: int, image_size: int) -> dict:
    """Convert weights trained on a canvas into a checkpoint for one of `image_size`, with all of SAM and a decoder."""
    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    model_state = part("sam.sam.")
    # The classifier of the original TinyViT belongs to the file format, but is not used.
    for name in model_state:
        if name.startswith(("image_encoder.norm_head.", "image_encoder.head.")):
            model_state[name] = torch.zeros_like(model_state[name])
    model_state[POSITIONS] = model_state[POSITIONS] * (image_size / canvas)  # the same positions in pixels
    decoder_state = {k: v for k, v in part("unetr.").items() if not k.startswith("encoder.")}

    def half(values):
        return {k: v.half() if v.is_floating_point() and k != POSITIONS else v for k, v in values.items()}

    return {
        "model_state": half(model_state),
        "decoder_state": half(decoder_state),
        "decoder_settings": {
            "initial_features": decoder_state["out_conv.weight"].shape[1], "normalization": "running",
        },
        "settings": {
            "name": "vit_t_lite", "model_type": "vit_t", "image_size": image_size, "scale_positions": True,
            "trained_parts": ["image_encoder", "prompt_encoder", "mask_decoder", "decoder"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoints/checkpoints/vit_t_lite/best.pt")
    parser.add_argument("--output", type=Path, default=HERE.parent / "micro_sam/models/weights/vit_t_lite.pt")
    parser.add_argument("--canvas", type=int, default=1024, help="the one of the training")
    parser.add_argument("--image-size", type=int, help="canvas that the model is loaded with; default: --canvas")
    args = parser.parse_args()

    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=False)  # our own file of the training run
    checkpoint = convert(saved["average_state"], args.canvas, args.image_size or args.canvas)
    checkpoint["settings"]["iterations"] = saved["iteration"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, args.output)
    torch.load(args.output, weights_only=True)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {saved['iteration']} iterations, loss {saved['current_metric']:.4f}, {size:.1f} MB")


if __name__ == "__main__":
    main()
