"""Work on a cluster gives the results of one process, also when workers die or the run is interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from test_blockwise import Components, discs, run

from micro_sam import distributed
from micro_sam.blockwise.workflow import segment_blockwise
from micro_sam.core.errors import BlockError, InvalidInputError
from micro_sam.distributed.engine import DaskEngine
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.models.loading import get_sam_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))  # workers unpickle the classes of this module
        with distributed.connect("local", 2) as client:
            client.wait_for_workers(2)
            yield client


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A zarr image of nuclei, larger than one block."""
    import imageio.v3 as imageio

    path = tmp_path_factory.mktemp("image") / "image.zarr"
    pixels = np.tile(imageio.imread(HERE / "data" / "nuclei.png")[:200, :200], (2, 2))
    zarr.create_array(str(path), data=pixels, chunks=(100, 100))
    return path


class Slow(Components):
    """Notes which process works on a block."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def __call__(self, image):
        (Path(self.folder) / f"{time.time_ns()}-{os.getpid()}").touch()
        time.sleep(0.05)
        return super().__call__(image)


def workers_of(folder):
    return [int(f.name.split("-")[1]) for f in folder.iterdir()]


def test_two_workers_give_the_result_of_one_process(tmp_path, client):
    truth, calls = discs(), tmp_path / "calls"
    calls.mkdir()
    labels = run(truth, tmp_path / "a.zarr", Slow(calls), engine=DaskEngine(client))
    np.testing.assert_array_equal(labels[...], run(truth, tmp_path / "b.zarr")[...])
    assert len(set(workers_of(calls)) - {os.getpid()}) == 2
    assert len(workers_of(calls)) == 12


def test_a_worker_that_is_killed_changes_nothing(tmp_path, client):
    class KillOnce(DaskEngine):
        killed = None

        def map(self, function, items):
            for k, pair in enumerate(super().map(function, items)):
                if k == 2 and self.killed is None:
                    KillOnce.killed = workers_of(calls)[-1]
                    os.kill(self.killed, signal.SIGKILL)
                yield pair

    truth, calls = discs(), tmp_path / "calls"
    calls.mkdir()
    labels = run(truth, tmp_path / "a.zarr", Slow(calls), block_shape=(128, 128), engine=KillOnce(client))
    assert KillOnce.killed is not None
    np.testing.assert_array_equal(labels[...], run(truth, tmp_path / "b.zarr", block_shape=(128, 128))[...])


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from micro_sam import distributed
from micro_sam.distributed.engine import DaskEngine
from test_blockwise import discs, run
from test_distributed import Slow
if __name__ == "__main__":
    with distributed.connect("local", 1) as client:
        run(discs(), Path(sys.argv[1]), Slow(sys.argv[2]), engine=DaskEngine(client))
"""


def test_a_scheduler_that_dies_costs_only_the_blocks_in_work(tmp_path, client):
    script, out, calls = tmp_path / "script.py", tmp_path / "a.zarr", tmp_path / "calls"
    calls.mkdir()
    script.write_text(SCRIPT.format(folder=str(HERE)))
    log = tmp_path / "a.zarr.blocks" / "done.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, script, out, calls], env=environment, start_new_session=True)
    while not (log.exists() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the scheduler, its worker and the process that waits
    process.wait()
    n_done = len(log.read_text().splitlines())
    before = len(workers_of(calls))
    labels = run(discs(), out, Slow(calls), engine=DaskEngine(client))
    np.testing.assert_array_equal(labels[...], run(discs(), tmp_path / "b.zarr")[...])
    assert len(workers_of(calls)) - before == 12 - n_done


def test_cancelled_futures_are_reported(tmp_path, client):
    calls = tmp_path / "calls"
    calls.mkdir()
    with pytest.raises(BlockError, match="run again"):
        run(discs(), tmp_path / "a.zarr", Slow(calls), engine=_cancels_all(client))


def _cancels_all(client):
    """An engine whose futures are cancelled on the scheduler, as when it is told to forget them."""
    engine = DaskEngine(client, ahead=6)
    original = engine._result

    def result(future):
        for key in [k for k in client.futures if k.startswith("SegmentBlock")]:
            client.futures[key].cancel()
        return original(future)

    engine._result = result
    return engine


def test_segmentation_and_embeddings_of_a_model(tmp_path, client, image):
    options = {"block_shape": (200, 200), "halo": (40, 40), "verbose": False}
    labels = distributed.segment(client, str(image), tmp_path / "a.zarr", "vit_t_lite", "ais", **options)
    alone = segment_blockwise(str(image), tmp_path / "b.zarr", "vit_t_lite", "ais", **options)
    np.testing.assert_array_equal(labels[...], alone[...])
    assert labels.attrs["micro_sam"] == alone.attrs["micro_sam"]
    assert labels[...].max() > 10

    tiling = {"tile_shape": (200, 200), "halo": (20, 20), "normalization": "image", "verbose": False}
    embeddings = distributed.precompute_embeddings(client, str(image), tmp_path / "e.zarr", "vit_t_lite", **tiling)
    pixels = zarr.open_array(str(image))
    expected = precompute_image_embeddings(
        get_sam_model("vit_t_lite"), pixels, tmp_path / "f.zarr", ndim=2, **tiling
    )
    for k in range(4):
        np.testing.assert_allclose(embeddings["features"][str(k)][...], expected["features"][str(k)][...], atol=1e-4)
        assert np.abs(expected["features"][str(k)][...]).max() > 0.1


def test_tracks_of_a_time_series(tmp_path, client):
    import tifffile

    frame = np.zeros((64, 64), np.uint8)
    frame[10:30, 10:30], frame[40:55, 35:55] = 200, 150
    movie = np.stack([frame, np.roll(frame, 1, 1), np.roll(frame, 2, 1)])
    tifffile.imwrite(tmp_path / "movie.tif", movie, metadata={"axes": "TYX"}, photometric="minisblack")
    tracks, lineages = distributed.track(
        client, str(tmp_path / "movie.tif"), tmp_path / "tracks", "vit_t_lite", "ais", tracking_model="motile",
        verbose=False,
    )
    assert tracks.shape == movie.shape
    assert (tmp_path / "tracks" / "man_track.txt").exists()
    assert zarr.open_array(str(tmp_path / "tracks_frames.zarr")).shape == movie.shape


def test_wrong_schedulers():
    with pytest.raises(InvalidInputError, match=r"local, slurm, lsf or an address"), distributed.connect("laptop"):
        pass
    with pytest.raises(InvalidInputError, match="at least 1"), distributed.connect("local", 0):
        pass
    with pytest.raises(InvalidInputError, match="leave out their number"), distributed.connect("tcp://h:1", 2):
        pass
    with pytest.raises(InvalidInputError, match="memory"), distributed.connect("slurm", 1):
        pass


def test_large_arrays_in_memory_are_refused():
    image = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (20_000, 20_000), (0, 0))
    with pytest.raises(InvalidInputError, match="sent with each block"):
        distributed.segment(None, image, "a.zarr")
