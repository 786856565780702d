"""Embeddings with real processes: kill -9, two writers, and memory that does not grow."""

import re
from pathlib import Path

import numpy as np
import pytest
from embedding_helpers import example, small_predictor
from kill_resume import OPTIONS, features, finish, kill_and_resume, process_context

from micro_sam.embeddings.encode import precompute_image_embeddings


def test_killed_runs_resume_to_identical_features(tmp_path):
    lines = []
    assert kill_and_resume(tmp_path, 3, planes=4, size=128, seed=None, report=lines.append) == 3, "\n".join(lines)


def _embed_with_lock(connection, barrier, path, lock_timeout):
    import torch
    torch.set_num_threads(1)
    predictor, encoded = small_predictor(128), []
    forward = predictor.model.image_encoder.forward
    predictor.model.image_encoder.forward = lambda x: encoded.append(len(x)) or forward(x)
    barrier.wait()
    try:
        precompute_image_embeddings(predictor, example((6, 90, 110)), path, lock_timeout=lock_timeout, **OPTIONS)
        connection.send((sum(encoded), None))
    except Exception as error:
        connection.send((sum(encoded), f"{type(error).__name__}: {error}"))


@pytest.mark.parametrize("lock_timeout", [0, 60])
def test_two_processes_on_one_cache(tmp_path, lock_timeout):
    context, path = process_context(), tmp_path / "e.zarr"
    barrier, running = context.Barrier(2), []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_embed_with_lock, args=(theirs, barrier, str(path), lock_timeout))
        process.start()
        theirs.close()
        running.append((process, ours))
    results = sorted((finish(*pair) for pair in running), key=lambda result: result[0])
    n_tiles = 6 * 9
    assert results[1] == (n_tiles, None)
    assert results[0][0] == 0
    if lock_timeout:
        assert results[0][1] is None
    else:
        assert results[0][1] is None or "EmbeddingCacheError: The embeddings in" in results[0][1]
    expected = precompute_image_embeddings(small_predictor(128), example((6, 90, 110)), **OPTIONS)["features"]
    for name, values in features(path).items():
        np.testing.assert_allclose(values, np.asarray(expected[name]), atol=1e-6)


def _peak_memory(connection, n, path, tiled):
    import torch
    torch.set_num_threads(1)
    predictor = small_predictor(768)  # features of one plane or tile have 2.25 MiB
    image = np.zeros((40, 40 * n) if tiled else (n, 40, 40), dtype="uint8")
    image[..., ::3] = 200
    options = {"ndim": 2, "tile_shape": (40, 40), "halo": (0, 0)} if tiled else {"ndim": 3}
    precompute_image_embeddings(predictor, image, path, verbose=False, lazy_loading=True, **options)
    connection.send(peak_resident())


def peak_resident() -> float:
    """The largest memory of this process in MiB; that of `getrusage` begins with what the parent process had."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("tiled", [False, True])
def test_peak_memory_does_not_grow_with_the_number_of_planes_or_tiles(tmp_path, tiled):
    context = process_context()

    def peak(n, path):
        ours, theirs = context.Pipe()
        process = context.Process(target=_peak_memory, args=(theirs, n, path, tiled))
        process.start()
        theirs.close()
        return finish(process, ours)

    few, many, kept = peak(8, tmp_path / "8.zarr"), peak(160, tmp_path / "160.zarr"), peak(160, None)
    print(f"{few:.0f} MiB for 8, {many:.0f} for 160, {kept:.0f} for 160 in memory")
    assert kept - few > 180  # the measurement sees it if all features, 360 MiB, are kept
    assert many - few < 0.4 * (kept - few)  # the allocator adds up to 90 MiB of its own, whatever the number
