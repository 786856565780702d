"""Kill a computation of tiled 3D embeddings at random moments (SIGKILL), and show that it resumes.

For each kill: a process embeds a volume; it is killed at a random moment; what it recorded as done is noted; the
computation is run again. It must encode only what was not recorded, and give the features of an uninterrupted run,
bit for bit.

usage: python test/kill_resume.py [--kills 20] [--planes 8] [--size 256] [--seed 0]
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

OPTIONS = {"ndim": 3, "tile_shape": (32, 40), "halo": (4, 6), "batch_size": 2, "verbose": False}


def process_context():
    """Processes that start quickly: they are forked from a server that has imported what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["embedding_helpers", "micro_sam.embeddings.encode"])
    return context


def embed(connection, path: str, planes: int, size: int) -> None:
    """Embed a volume to `path`; send `start` when the model is ready, then the number of encoded tiles, seconds."""
    import torch
    from embedding_helpers import example, small_predictor

    from micro_sam.embeddings.encode import precompute_image_embeddings
    torch.set_num_threads(1)
    predictor, image, encoded = small_predictor(size), example((planes, 90, 110)), []
    forward = predictor.model.image_encoder.forward
    predictor.model.image_encoder.forward = lambda x: encoded.append(len(x)) or forward(x)
    connection.send("start")
    begin = time.perf_counter()
    precompute_image_embeddings(predictor, image, path, **OPTIONS)
    connection.send((sum(encoded), time.perf_counter() - begin))


def start(context, path: Path, planes: int, size: int):
    """Start `embed` in a process and wait until its model is ready."""
    ours, theirs = context.Pipe()
    process = context.Process(target=embed, args=(theirs, str(path), planes, size))
    process.start()
    theirs.close()
    assert ours.recv() == "start"
    return process, ours


def finish(process, connection):
    """Number of encoded tiles and seconds, or None if the process failed."""
    try:
        return connection.recv()
    except EOFError:
        return None
    finally:
        process.join()
        process.close()
        connection.close()


def recorded(path: Path) -> tuple[int, bool]:
    """Number of items recorded as done, and whether the cache is complete."""
    log, root = path / ".micro_sam" / "progress", path / "zarr.json"
    complete = root.exists() and "input_size" in json.loads(root.read_text())["attributes"]
    if not log.exists():
        return 0, complete
    lines = log.read_bytes().split(b"\n")[:-1]
    return len([item for line in lines for item in json.loads(line)]), complete


def features(path: Path) -> dict[str, np.ndarray]:
    from micro_sam.embeddings.encode import load_embeddings
    return {key: np.asarray(value) for key, value in load_embeddings(path)["features"].items()}


def kill_and_resume(folder: Path, n_kills: int, planes: int = 8, size: int = 256, seed: int = 0, report=print) -> int:
    """Return in how many of `n_kills` runs resuming gave identical features without encoding anything twice."""
    rng, passed, context = random.Random(seed), 0, process_context()
    total, duration = finish(*start(context, folder / "reference.zarr", planes, size))
    expected = features(folder / "reference.zarr")
    for kill in range(n_kills):
        complete = True
        while complete:  # too late a kill interrupts nothing and is drawn again
            path = folder / f"{kill}.zarr"
            shutil.rmtree(path, ignore_errors=True)
            process, connection = start(context, path, planes, size)
            moment = rng.uniform(0, duration)
            time.sleep(moment)
            process.kill()
            finish(process, connection)
            done, complete = recorded(path)
        result = finish(*start(context, path, planes, size))
        found = features(path) if result else {}
        same = found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)
        leftovers = [name for _, _, names in os.walk(path) for name in names if "partial" in name]
        encoded = result[0] if result else -1
        ok = same and encoded == total - done and not leftovers
        passed += ok
        report(
            f"kill {kill + 1:2} after {moment:5.2f} of {duration:.2f} s: {done:3} of {total} done, "
            f"{encoded:3} encoded on resuming, features {'identical' if same else 'DIFFERENT'}"
            f"{'' if ok else '  FAILED'}"
        )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--planes", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="encoder size in pixels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        passed = kill_and_resume(Path(folder), arguments.kills, arguments.planes, arguments.size, arguments.seed)
    print(f"{passed} of {arguments.kills} resumed to identical features")
    return int(passed != arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
