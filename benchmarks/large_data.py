"""Segment or encode an image or a volume that is larger than memory: seconds, objects and peak memory.

    python benchmarks/large_data.py labels.zarr --shape 20480 20480 --mode ais
    python benchmarks/large_data.py embeddings.zarr --shape 20480 20480 --mode embeddings
    python benchmarks/large_data.py labels.zarr --shape 200 2048 2048 --mode amg --options '{"points_per_side": 8}'

The image is a mosaic of a real one (`--image`, by default an example that ships), mirrored at each seam so that objects
continue, and read piece by piece: nothing of its size is ever in memory or on disk. In planes of a volume the mosaic is
shifted by a pixel per plane. Call it again after an interruption and it goes on; the figures are of the last call.
Under `/usr/bin/time -v` the system says the peak memory, too. `--workers` lets so many processes share the cores; the
seconds of each phase tell which of them gain from more workers.
"""

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path

import dask.array as da
import imageio.v3 as imageio
import numpy as np
from tqdm import tqdm

from micro_sam.blockwise.tasks import ImageSource, ModelSource
from micro_sam.blockwise.workflow import blockwise_steps
from micro_sam.core.progress import drain
from micro_sam.util import get_sam_model, precompute_image_embeddings

EXAMPLE = Path(__file__).parents[1] / "examples/data/fluorescence_large.png"


def mosaic(image: np.ndarray, shape: tuple[int, ...], chunk: int = 1024) -> da.Array:
    """A lazy array (Y, X) or (Z, Y, X) in which `image` (y, x) repeats, mirrored."""
    def piece(block_info=None):
        (start, stop), *_ = location = block_info[None]["array-location"]
        planes = range(start, stop) if len(shape) == 3 else [0]
        grid = [[mirrored(lo + z, hi + z, n) for (lo, hi), n in zip(location[-2:], image.shape)] for z in planes]
        planes = np.stack([image[np.ix_(*rows_columns)] for rows_columns in grid])
        return planes if len(shape) == 3 else planes[0]

    chunks = tuple(1 if axis < len(shape) - 2 else chunk for axis in range(len(shape)))
    return da.map_blocks(piece, chunks=da.core.normalize_chunks(chunks, shape), dtype=image.dtype)


def mirrored(start: int, stop: int, n: int) -> np.ndarray:
    """Positions in an axis of length `n` for start…stop of the axis that is mirrored again and again."""
    position = np.arange(start, stop) % (2 * n)
    return np.where(position < n, position, 2 * n - 1 - position)


class Phases:
    """A bar per phase of the work, and the seconds that each has taken."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._bar = None

    def begin(self, total: int, text: str) -> None:
        self.end()
        self._bar = tqdm(total=total, desc=text)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            taken = time.time() - self._bar.start_t
            self.seconds[self._bar.desc] = round(self.seconds.get(self._bar.desc, 0) + taken, 2)
            self._bar = None

    def update(self, n: int) -> None:
        self._bar.update(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="zarr array of the labels, or folder of the embeddings")
    parser.add_argument("--shape", type=int, nargs="+", required=True, help="(Z) Y X in pixels")
    parser.add_argument("--image", type=Path, default=EXAMPLE, help="a grey image")
    parser.add_argument("--model", default="vit_t_lite")
    parser.add_argument("--mode", default="ais", choices=("ais", "apg", "amg", "embeddings"))
    parser.add_argument("--workers", type=int, help="processes, needs micro_sam[distributed]; default: this one alone")
    parser.add_argument("--options", type=json.loads, default={},
                        help="JSON with more arguments of segment_blockwise or precompute_image_embeddings")
    args = parser.parse_args()
    if args.workers and args.mode == "embeddings":
        parser.error("--workers is for segmentation; leave it out to compute embeddings in this process.")

    lazy, phases = mosaic(imageio.imread(args.image), tuple(args.shape)), Phases()
    start = time.perf_counter()
    found = {"embeddings": encode, "ais": segment, "apg": segment, "amg": segment}[args.mode](args, lazy, phases)
    phases.end()
    print(json.dumps({
        "shape": args.shape, "mode": args.mode, "workers": args.workers, **found,
        "seconds": round(time.perf_counter() - start, 1), "phases": phases.seconds,
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


def encode(args: argparse.Namespace, lazy: da.Array, phases: Phases) -> dict[str, int]:
    options = {"tile_shape": (1024, 1024), "halo": (128, 128), **args.options}
    precompute_image_embeddings(
        get_sam_model(args.model, device="cpu"), lazy, args.output, lazy_loading=True, ndim=lazy.ndim,
        pbar_init=phases.begin, pbar_update=phases.update, **options,
    )
    return {"bytes": sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())}


def segment(args: argparse.Namespace, lazy: da.Array, phases: Phases) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        engine = None
        if args.workers:
            from micro_sam.distributed import DaskEngine, connect
            engine = DaskEngine(stack.enter_context(connect("local", args.workers)))
        model = ModelSource(args.model, None, "cpu", args.mode)
        steps = blockwise_steps(ImageSource(lazy), args.output, model, engine=engine, **args.options)
        labels = drain(steps, pbar_init=phases.begin, pbar_update=phases.update)
    return {"objects": labels.attrs["micro_sam"]["n_objects"]}


if __name__ == "__main__":
    main()
