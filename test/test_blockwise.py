"""Segmentation in blocks: the same objects as at once, whole across borders, resumable, nothing filled with zeros."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import zarr

import micro_sam
from micro_sam.blockwise.blocks import BlockGrid, shared_pixels
from micro_sam.blockwise.stitch import joined_ids, matching_objects
from micro_sam.blockwise.tasks import ImageSource
from micro_sam.blockwise.workflow import segment_blockwise, segment_steps
from micro_sam.core.errors import BlockError, InvalidInputError, OutputExistsError
from micro_sam.core.labels import relabel_consecutive
from micro_sam.core.progress import drain

SHAPE = (700, 900)


def discs(shape=SHAPE, seed=0, radius=(5, 22)):
    """Round objects that do not touch, as a label image."""
    rng = np.random.default_rng(seed)
    labels, y, x = np.zeros(shape, np.uint32), *np.ogrid[:shape[0], :shape[1]]
    for _ in range(1200):
        r, cy, cx = rng.uniform(*radius), rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        box = tuple(slice(max(0, int(c - r - 3)), int(c + r + 4)) for c in (cy, cx))
        if not labels[box].any():
            near = (y[box[0]] - cy) ** 2 + (x[:, box[1]] - cx) ** 2 < r**2
            labels[box][near] = labels.max() + 1
    return relabel_consecutive(labels)


class Components:
    """Takes the image itself for labels, renumbered in each block; with noise at the rims of objects."""

    def __init__(self, noise=0.0):
        self.noise = noise

    def __call__(self, image):
        ids, labels = np.unique(image, return_inverse=True)
        labels = labels.reshape(image.shape)
        rng = np.random.default_rng(int(image.sum()) % 2**32)
        shuffled = np.concatenate([[0], rng.permutation(len(ids) - 1) + 1]) if ids[0] == 0 else np.arange(len(ids))
        labels = shuffled[labels]
        if self.noise:  # each block sees every object displaced by its own
            shift = np.rint(rng.normal(0, self.noise, (len(ids), 2))).astype(int)
            moved = np.zeros_like(labels)
            for k in range(1, len(ids)):
                where = np.argwhere(labels == k) + shift[k]
                where = where[((where >= 0) & (where < labels.shape)).all(1)]
                moved[tuple(where.T)] = k
            labels = moved
        return labels


def run(truth, path, segment=None, block_shape=(256, 256), halo=(32, 32), engine=None, merge_options=None, **options):
    grid = BlockGrid.create(truth.shape, block_shape, halo)
    steps = segment_steps(
        ImageSource(truth), grid, segment or Components(), path, {"seed": 0}, engine, merge_options, **options
    )
    return drain(steps, verbose=False)


def same_partition(a, b):
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1)
    return len(pairs.T) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


def test_objects_cut_by_borders_are_whole_again(tmp_path):
    truth = discs()
    labels = run(truth, tmp_path / "out.zarr")
    assert same_partition(labels[...], truth)
    assert np.unique(labels[...]).tolist() == list(range(truth.max() + 1))
    assert labels.attrs["micro_sam"]["n_objects"] == truth.max()
    assert not (tmp_path / "out.zarr.blocks").exists()
    assert labels.chunks == (256, 256)
    assert all(256 % c == 0 for c in labels.chunks)


@pytest.mark.parametrize(("block_shape", "halo"), [((100, 170), (50, 20)), ((40, 2000), (45, 0)), ((64, 64), (40, 40))])
def test_odd_blocks_and_halos_beyond_the_next_block(tmp_path, block_shape, halo):
    truth = discs()
    assert same_partition(run(truth, tmp_path / "out.zarr", block_shape=block_shape, halo=halo)[...], truth)


def test_seams_with_segmentations_that_differ(tmp_path):
    """At least 99.5 % of the objects that cross a border have one id, although blocks disagree about their rims."""
    crossing = whole = 0
    for seed in range(6):
        truth = discs(seed=seed, radius=(8, 22))
        stored = run(truth, tmp_path / f"{seed}.zarr", Components(noise=1.0), (128, 128), (44, 44))
        labels = stored[...]
        # Objects that only halos show, as blocks disagree about them, have no id.
        assert np.unique(labels).tolist() == list(range(stored.attrs["micro_sam"]["n_objects"] + 1))
        owner = np.add.outer(np.arange(SHAPE[0]) // 128 * 100, np.arange(SHAPE[1]) // 128)
        for k in range(1, truth.max() + 1):
            inside = truth == k
            if len(np.unique(owner[inside])) > 1:
                crossing += 1
                # Rims of one pixel or two may be lost or go to a neighbour, as blocks see it somewhere else.
                ids, counts = np.unique(labels[inside], return_counts=True)
                counts = counts[ids > 0]
                whole += counts.max(initial=0) >= 0.9 * counts.sum()
    assert crossing > 500
    assert whole / crossing >= 0.995


def test_blocks_without_objects_and_a_single_block(tmp_path):
    empty = run(np.zeros((300, 300), np.uint8), tmp_path / "empty.zarr")
    assert not empty[...].any()
    assert empty.dtype == np.uint16
    assert empty.attrs["micro_sam"]["n_objects"] == 0
    truth = discs((100, 90))
    assert same_partition(run(truth, tmp_path / "one.zarr", halo=(0, 0))[...], truth)


def test_planes_count_for_themselves_or_are_merged(tmp_path):
    plane = discs((150, 160))
    stack = np.stack([plane, plane, np.zeros_like(plane), np.where(plane == 2, 0, plane)])
    planes = run(stack, tmp_path / "planes.zarr", block_shape=(64, 64))
    for z in range(4):
        assert same_partition(planes[z], stack[z])
        assert np.unique(planes[z]).tolist() == list(range(len(np.unique(stack[z]))))
    merged = run(stack, tmp_path / "merged.zarr", block_shape=(64, 64), merge_options={})[...]
    assert same_partition(merged[:2], stack[:2])
    assert set(np.unique(merged[3])) & set(np.unique(merged[:2])) == {0}  # the empty plane separates them
    closed = run(stack, tmp_path / "closed.zarr", block_shape=(64, 64), merge_options={"gap_closing": 1})[...]
    assert same_partition(closed[[0, 1, 3]], stack[[0, 1, 3]])


class Failing(Components):
    """Fails for some blocks, each time or only the first time."""

    def __init__(self, folder, times):
        super().__init__()
        self.folder, self.times = folder, times

    def __call__(self, image):
        counter = self.folder / f"{int(image.astype(np.int64).sum())}"
        n = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(n + 1))
        if image.sum() % 3 == 0 and n < self.times:
            raise OSError("the disk was away")
        return super().__call__(image)


def test_failing_blocks_are_tried_again_or_reported_never_filled(tmp_path, caplog):
    truth, calls = discs(), tmp_path / "calls"
    calls.mkdir()
    assert same_partition(run(truth, tmp_path / "a.zarr", Failing(calls, 2))[...], truth)
    assert "the disk was away" in caplog.text
    for file in calls.iterdir():
        file.unlink()
    with pytest.raises(BlockError, match=r"of 12 pieces failed 3 times.*the disk was away.*run again"):
        run(truth, tmp_path / "b.zarr", Failing(calls, 3))
    assert not (tmp_path / "b.zarr").exists()
    # The next run computes only what is missing.
    before = {f.name: int(f.read_text()) for f in calls.iterdir()}
    assert same_partition(run(truth, tmp_path / "b.zarr", Failing(calls, 3))[...], truth)
    again = [f.name for f in calls.iterdir() if int(f.read_text()) > before[f.name]]
    assert again == [name for name, n in before.items() if n == 3]


def test_errors_of_the_input_are_not_tried_again(tmp_path):
    class Wrong:
        calls = 0

        def __call__(self, image):
            Wrong.calls += 1
            raise InvalidInputError("NaN in the image")

    with pytest.raises(InvalidInputError, match="NaN"):
        run(discs(), tmp_path / "a.zarr", Wrong())
    assert Wrong.calls == 1


def test_cancel_and_run_twice(tmp_path):
    truth, path = discs(), tmp_path / "a.zarr"
    grid = BlockGrid.create(truth.shape, (256, 256), (32, 32))
    steps = segment_steps(ImageSource(truth), grid, Components(), path, {"seed": 0})
    for step in steps:
        if step.done == 5:
            break
    steps.close()
    log = (tmp_path / "a.zarr.blocks" / "done.jsonl").read_text().splitlines()
    assert len(log) == 5
    with open(tmp_path / "a.zarr.blocks" / "done.jsonl", "a") as file:
        file.write('{"block": 5, "n_obj')  # torn by a kill
    with pytest.raises(OutputExistsError, match="seed"):
        drain(segment_steps(ImageSource(truth), grid, Components(), path, {"seed": 1}), verbose=False)

    class Counting(Components):
        calls = 0

        def __call__(self, image):
            Counting.calls += 1
            return super().__call__(image)

    expected = run(truth, tmp_path / "b.zarr")[...]
    np.testing.assert_array_equal(run(truth, path, Counting())[...], expected)
    assert Counting.calls == len(grid) - 5
    np.testing.assert_array_equal(run(truth, path, Counting())[...], expected)
    assert Counting.calls == len(grid) - 5
    drain(segment_steps(ImageSource(truth), grid, Counting(), path, {"seed": 1}, overwrite=True), verbose=False)
    assert Counting.calls == 2 * len(grid) - 5


SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from test_blockwise import Components, discs, run
class Slow(Components):
    def __call__(self, image):
        time.sleep(0.1)
        return super().__call__(image)
run(discs(), __import__("pathlib").Path(sys.argv[1]), Slow())
"""


def test_killed_runs_go_on(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out.zarr"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    log = tmp_path / "out.zarr.blocks" / "done.jsonl"
    for n in (2, 6):
        process = subprocess.Popen([sys.executable, script, out])
        while not (log.exists() and len(log.read_text().splitlines()) >= n):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = [json.loads(line)["block"] for line in log.read_text().splitlines()]
    assert len(finished) == len(set(finished)) >= 6
    assert same_partition(run(discs(), out)[...], discs())


def test_one_process_at_a_time_and_options_that_go_together(tmp_path):
    truth, path = discs(), tmp_path / "a.zarr"
    grid = BlockGrid.create(truth.shape, (256, 256), (32, 32))
    first = segment_steps(ImageSource(truth), grid, Components(), path, {"seed": 0})
    next(first)
    with pytest.raises(BlockError, match=r"Another process.*a\.zarr"):
        run(truth, path)
    first.close()
    assert same_partition(run(truth, path)[...], truth)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.zarr"]

    stack, lite = np.zeros((2, 40, 40), np.uint8), "vit_t_lite"
    with pytest.raises(InvalidInputError, match="gap_closing are for merging"):
        segment_blockwise(stack, tmp_path / "b.zarr", lite, "ais", merge=False, gap_closing=1, verbose=False)
    with pytest.raises(InvalidInputError, match="mask_with_background is an option of the mode 'amg'"):
        segment_blockwise(stack, tmp_path / "b.zarr", lite, "ais", mask_with_background=True, verbose=False)


def test_matches_are_the_best_of_both():
    a = np.array([[1, 1, 1, 1, 2, 2, 0, 3]])
    b = np.array([[5, 5, 5, 6, 6, 6, 6, 0]])
    assert matching_objects(a, b).tolist() == [[1, 5], [2, 6]]
    assert matching_objects(a, np.zeros_like(a)).shape == (0, 2)
    # A sliver at the rim of a large object is no part of it: it covers less than half of either.
    assert len(matching_objects(np.repeat([1, 0], [30, 70]), np.repeat([0, 1], [20, 80]))) == 0
    matches = [(0, 2, np.array([[2, 1]])), (2, 3, np.array([[1, 1]]))]
    inner = [np.array([1, 2]), np.zeros(0, int), np.array([1, 2]), np.array([1])]
    finals = joined_ids(np.array([2, 0, 2, 1]), inner, matches)
    assert [f.tolist() for f in finals] == [[0, 1, 2], [0], [0, 2, 3], [0, 2]]
    inner = [np.array([2]), np.zeros(0, int), np.array([2]), np.zeros(0, int)]  # 1 of the first block is in a halo only
    finals = joined_ids(np.array([2, 0, 2, 1]), inner, matches)
    assert [f.tolist() for f in finals] == [[0, 0, 1], [0], [0, 1, 2], [0, 1]]


def test_grid():
    grid = BlockGrid.create((5, 100, 130), (50, 60), (10, 5))
    assert len(grid) == 5 * 2 * 3
    assert grid[7].z == 1
    assert grid[7].tile.id == 1
    covered = np.zeros(grid.shape, int)
    for block in grid:
        covered[(block.z, *block.tile.inner)] += 1
    assert (covered == 1).all()
    seen = {(a, b) for a in range(6) for b in range(a + 1, 6) if shared_pixels(grid.tiling[a], grid.tiling[b])}
    assert set(grid.neighbours()) == seen
    with pytest.raises(InvalidInputError, match="halo of blocks"):
        BlockGrid.create((100, 100), (50, 50), (0, 10))
    with pytest.raises(IndexError):
        grid[30]


def test_real_images_in_blocks_equal_the_segmentation_at_once(tmp_path):
    """One block that holds the image gives what `micro_sam.segment` gives with the same range of values."""
    image = imageio.imread(Path(__file__).parent / "data" / "nuclei.png")
    at_once = micro_sam.segment(image, "vit_t_lite", "ais")
    labels = segment_blockwise(image, tmp_path / "a.zarr", "vit_t_lite", "ais", verbose=False)[...]
    assert abs(int(labels.max()) - int(at_once.max())) <= 2
    blocks = segment_blockwise(
        image, tmp_path / "b.zarr", "vit_t_lite", "ais", block_shape=(128, 128), halo=(40, 40), verbose=False
    )
    both = (blocks[...] > 0) & (labels > 0)
    assert both.sum() > 0.8 * (labels > 0).sum()
    with pytest.raises(InvalidInputError, match="ends in .zarr"):
        segment_blockwise(image, tmp_path / "a.tif", "vit_t_lite")
    with pytest.raises(InvalidInputError, match="center_distance"):
        segment_blockwise(image, tmp_path / "c.zarr", "vit_t_lite", "ais", center_distanc_threshold=0.3)


def test_an_output_of_others_is_kept(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(3,), dtype="uint8")
    with pytest.raises(OutputExistsError, match="not written by this tool"):
        run(discs(), tmp_path / "a.zarr")
    (tmp_path / "b.zarr.blocks").mkdir()
    (tmp_path / "b.zarr.blocks" / "thesis.doc").write_text("")
    with pytest.raises(OutputExistsError, match="something else"):
        run(discs(), tmp_path / "b.zarr")
    assert (tmp_path / "b.zarr.blocks" / "thesis.doc").exists()
