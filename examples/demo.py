"""Segment the images in `examples/data` with the model that ships with micro_sam; no download is needed.

Writes for each image the label image and an overlay picture to `demo_output/`, and one picture of all, and prints the
number of objects, the seconds and the peak memory. Run it with `make demo`, or: python examples/demo.py [image …]
"""

import argparse
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import psutil
import tifffile
from skimage.color import label2rgb
from skimage.exposure import rescale_intensity
from skimage.segmentation import find_boundaries

import micro_sam


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw the outlines of the objects, each in its own colour, over the image; returns uint8 (H, W, 3)."""
    grey = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    low, high = np.percentile(grey, (0.5, 99.8))
    rgb = rescale_intensity(grey.astype("float32"), in_range=(low, max(high, low + 1)), out_range=(0, 1))
    outlines = np.where(find_boundaries(labels, mode="inner"), labels, 0)
    return (255 * label2rgb(outlines, rgb, bg_label=0, bg_color=None, alpha=1.0, saturation=1)).astype("uint8")


def overview(overlays: list[np.ndarray], side: int = 256, zoom: int = 2) -> np.ndarray:
    """Put the middle of each overlay, `side` pixels, enlarged by `zoom`, into a row."""
    tiles = []
    for picture in overlays:
        y, x = (max(n - side, 0) // 2 for n in picture.shape[:2])
        middle = picture[y:y + side, x:x + side]
        missing = [(0, side - n) for n in middle.shape[:2]]
        tiles.append(np.pad(middle, [*missing, (0, 0)], constant_values=255))
    row = np.concatenate([np.pad(tile, [(0, 0), (2, 2), (0, 0)], constant_values=255) for tile in tiles], axis=1)
    return row.repeat(zoom, axis=0).repeat(zoom, axis=1)


def peak_memory_in_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return peak * unit / 2**20


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, default=sorted((here / "data").glob("*.png")))
    parser.add_argument("-o", "--output", type=Path, default=here.parent / "demo_output")
    args = parser.parse_args()
    missing = [str(path) for path in args.images if not path.is_file()]
    if missing:
        parser.error(f"there is no such image: {', '.join(missing)}")

    args.output.mkdir(parents=True, exist_ok=True)
    overlays = []
    for path in args.images:
        image = imageio.imread(path)
        start = time.perf_counter()
        labels = micro_sam.segment(image)
        seconds = time.perf_counter() - start
        tifffile.imwrite(args.output / f"{path.stem}_labels.tif", labels.astype("uint16"), compression="zlib")
        overlays.append(overlay(image, labels))
        imageio.imwrite(args.output / f"{path.stem}_overlay.png", overlays[-1])
        shape = " x ".join(str(n) for n in image.shape)
        print(f"{path.name:26s} {shape:15s} {labels.max():4d} objects {seconds:6.1f} s", flush=True)
    imageio.imwrite(args.output / "overview.png", overview(overlays))
    print(f"Peak memory: {peak_memory_in_mb():.0f} MB. Labels and overlays are in {args.output}")


if __name__ == "__main__":
    main()
