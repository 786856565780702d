"""Show that embedding caches of the existing tool open here and ours open there, with the same features.

Needs a second Python environment in which the existing package is installed; its code is only run. Both sides
get the same random ViT-B weights, write caches in four layouts, and open those of the other side with an encoder
that refuses to run. The features are compared to 1e-5. This takes some minutes on a CPU.

usage: python test/compare_with_peer.py --peer /path/to/other/environment/bin/python [--checkpoint vit_b.pt]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings

import numpy as np

LAYOUTS = {
    "2d": ((300, 400), {"ndim": 2}),
    "3d": ((2, 200, 256), {"ndim": 3, "batch_size": 2}),
    "tiled_2d": ((200, 380), {"ndim": 2, "tile_shape": (200, 200), "halo": (16, 16)}),
    "tiled_3d": ((2, 200, 380), {"ndim": 3, "tile_shape": (200, 200), "halo": (16, 16), "batch_size": 2}),
}
TOLERANCE = 1e-5


def image(name):
    shape, options = LAYOUTS[name]
    y, x = np.mgrid[:shape[-2], :shape[-1]]
    depth = shape[0] if options["ndim"] == 3 else 1
    planes = [60 + 50 * np.sin(y / (7 + z)) * np.cos(x / 11) + 0.2 * x for z in range(depth)]
    values = np.stack(planes) * 100
    return values.reshape(shape).astype("uint16")


def arrays(embeddings):
    features = embeddings["features"]
    if embeddings["input_size"] is not None:
        return {"features": np.asarray(features[:])}
    return {key: np.asarray(features[key][:]) for key in features}


def role(arguments):
    """One side: write caches or open those of the other side; both store the features as npz."""
    warnings.simplefilter("ignore")
    import torch
    import zarr

    from micro_sam.util import get_sam_model, precompute_image_embeddings
    torch.set_num_threads(2)
    zarr.config.set({"default_zarr_format": arguments.zarr_format})
    predictor = get_sam_model("vit_b", checkpoint_path=arguments.checkpoint, device="cpu")
    if arguments.role == "open":
        def refuse(*args, **kwargs):
            raise AssertionError("The encoder was called although there is a cache")
        predictor.model.image_encoder.forward = refuse
    for name in arguments.layouts.split(","):
        options = dict(LAYOUTS[name][1])
        if arguments.options:
            options |= json.loads(arguments.options)
        path = os.path.join(arguments.folder, f"{name}_v{arguments.zarr_format}.zarr")
        embeddings = precompute_image_embeddings(predictor, image(name), path, verbose=False, **options)
        np.savez(os.path.join(arguments.out, f"{name}_v{arguments.zarr_format}.npz"), **arrays(embeddings))


def run(python, role_name, checkpoint, folder, out, zarr_format=3, layouts=tuple(LAYOUTS), options=None):
    os.makedirs(out, exist_ok=True)
    command = [python, os.path.abspath(__file__), "--role", role_name, "--checkpoint", checkpoint, "--folder", folder,
               "--out", out, "--zarr_format", str(zarr_format), "--layouts", ",".join(layouts)]
    if options:
        command += ["--options", json.dumps(options)]
    subprocess.run(command, check=True, cwd=tempfile.gettempdir())


def difference(first, second, name):
    with np.load(os.path.join(first, name)) as a, np.load(os.path.join(second, name)) as b:
        assert a.files == b.files or sorted(a.files) == sorted(b.files), (a.files, b.files)
        assert all(a[key].shape == b[key].shape for key in a.files)
        return max(float(np.abs(a[key].astype("float32") - b[key].astype("float32")).max()) for key in a.files)


def compare(peer, checkpoint, root):
    here = sys.executable
    if checkpoint is None:
        import torch

        from micro_sam.models.build_sam import build_sam
        torch.manual_seed(0)
        checkpoint = os.path.join(root, "vit_b.pt")
        torch.save(build_sam("vit_b").state_dict(), checkpoint)
    sides = {"peer": peer, "ours": here}
    failed = False
    # Format 2 differs in how nodes are stored, not in the features: one plain and one tiled layout will do.
    for zarr_format, layouts in ((3, tuple(LAYOUTS)), (2, ("2d", "tiled_2d"))):
        for side, python in sides.items():
            options = {"zarr_format": zarr_format} if side == "ours" else None
            run(python, "write", checkpoint, f"{root}/{side}", f"{root}/{side}_written", zarr_format, layouts, options)
        run(here, "open", checkpoint, f"{root}/peer", f"{root}/peer_opened_by_ours", zarr_format, layouts)
        run(peer, "open", checkpoint, f"{root}/ours", f"{root}/ours_opened_by_peer", zarr_format, layouts)
        for layout in layouts:
            name = f"{layout}_v{zarr_format}.npz"
            results = {
                "computed here - computed there": difference(f"{root}/ours_written", f"{root}/peer_written", name),
                "written there, opened here": difference(f"{root}/peer_opened_by_ours", f"{root}/peer_written", name),
                "written here, opened there": difference(f"{root}/ours_opened_by_peer", f"{root}/ours_written", name),
            }
            for text, value in results.items():
                passed = value <= TOLERANCE
                failed |= not passed
                verdict = "ok" if passed else "DIFFERENT"
                print(f"{layout:9} zarr {zarr_format}  {text:32} {value:.1e}  {verdict}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", help="Python of the environment with the existing package")
    parser.add_argument("--checkpoint", help="ViT-B weights; random ones are made without it")
    parser.add_argument("--role", choices=["write", "open"], help=argparse.SUPPRESS)
    for name in ("folder", "out", "layouts", "options"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--zarr_format", type=int, default=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        return role(arguments)
    if not arguments.peer:
        parser.error("--peer is needed")
    with tempfile.TemporaryDirectory() as root:
        return int(compare(arguments.peer, arguments.checkpoint, root))


if __name__ == "__main__":
    sys.exit(main())
