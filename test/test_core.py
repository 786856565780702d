"""Progress, settings, tiling and errors: the parts that everything else rests on."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from micro_sam.core import settings
from micro_sam.core.errors import DeviceError, InvalidInputError, nearest_names
from micro_sam.core.progress import Step, drain, handle_pbar
from micro_sam.core.tiling import TileSpec, box_yx_to_xyxy, yx_to_xy


def _work(n, closed):
    try:
        for done in range(n + 1):
            yield Step(done, n, "Work")
        yield Step(0, 2, "More work")
        yield Step(2, 2, "More work")
        return "result"
    finally:
        closed.append(True)


class TestProgress:
    @pytest.mark.parametrize("verbose", [True, False])
    def test_callbacks_fire_whatever_verbose_says(self, verbose):
        calls, closed = [], []
        result = drain(
            _work(3, closed), verbose=verbose,
            pbar_init=lambda total, text: calls.append((total, text)), pbar_update=calls.append,
        )
        assert result == "result"
        assert closed == [True]
        assert calls == [(3, "Work"), 1, 1, 1, (2, "More work"), 2]

    def test_bar_is_shown_only_if_verbose(self, capsys):
        drain(_work(2, []), verbose=False)
        assert capsys.readouterr().err == ""
        drain(_work(2, []), verbose=True)
        assert "More work: 100%" in capsys.readouterr().err

    def test_error_in_callback_closes_the_generator(self):
        closed = []

        def fail(n):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            drain(_work(3, closed), pbar_init=lambda total, text: None, pbar_update=fail)
        assert closed == [True]

    def test_one_callback_alone_is_refused(self):
        with pytest.raises(InvalidInputError, match="belong together"):
            drain(_work(1, []), pbar_init=lambda total, text: None)
        with pytest.raises(InvalidInputError, match="belong together"):
            handle_pbar(True, None, lambda n: None)

    def test_handle_pbar_keeps_callbacks_when_not_verbose(self):
        calls = []
        _, init, update, close = handle_pbar(False, lambda total, text: calls.append((total, text)), calls.append)
        init(4, "text")
        update(3)
        close()
        assert calls == [(4, "text"), 3]


class TestSettings:
    def test_cache_directory(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "a"))
        assert settings.get_cache_directory() == tmp_path / "a"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.setenv("MICROSAM_CACHEDIR", "~/b")
        assert settings.get_cache_directory() == tmp_path / "b"
        # An empty variable counts as unset.
        monkeypatch.setenv("MICROSAM_CACHEDIR", "")
        default = settings.get_cache_directory()
        monkeypatch.delenv("MICROSAM_CACHEDIR")
        assert settings.get_cache_directory() == default
        assert default.name in ("micro_sam", "Cache")

    def test_devices(self, monkeypatch):
        monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
        assert settings.get_device() == settings.get_device("auto") == settings.available_devices()[0]
        assert settings.get_device("CPU") == "cpu"
        assert settings.get_device("cpu:0") == "cpu:0"
        device = torch.device("cpu")
        assert settings.get_device(device) is device
        for wrong in ("tpu", "xla:0", "cuda:x"):
            with pytest.raises(DeviceError, match="Use 'cpu'"):
                settings.get_device(wrong)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(DeviceError, match=r"not available here.*cpu"):
            settings.get_device("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert settings.get_device("cuda:0") == "cuda:0"
        with pytest.raises(DeviceError, match="no CUDA device 3"):
            settings.get_device("cuda:3")
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        assert settings.get_device() == "cpu"


class TestTiling:
    def test_documented_example(self):
        spec = TileSpec.create((100, 130), (64, 64), (8, 8))
        assert spec.grid == (2, 3)
        tile = spec[4]
        assert tile.inner == (slice(64, 100), slice(64, 128))
        assert tile.outer == (slice(56, 100), slice(56, 130))
        assert tile.inner_local == (slice(8, 44), slice(8, 72))
        assert tile.origin == (56, 56)
        assert tile.outer_shape == (44, 74)

    @pytest.mark.parametrize(
        ("shape", "tile", "halo"), [((5, 7), (2, 3), (1, 1)), ((4, 4), (9, 9), (3, 0)), ((1, 9), (1, 4), (0, 20))]
    )
    def test_inner_blocks_partition_the_plane(self, shape, tile, halo):
        spec = TileSpec.create(shape, tile, halo)
        image = np.arange(np.prod(shape)).reshape(shape)
        count = np.zeros(shape, int)
        for t in spec:
            count[t.inner] += 1
            assert (image[t.outer][t.inner_local] == image[t.inner]).all()
            for y in range(t.inner[0].start, t.inner[0].stop):
                assert spec.tile_at(y, t.inner[1].start).id == t.id
        assert (count == 1).all()

    def test_positions_outside_are_clamped(self):
        spec = TileSpec.create((100, 130), (64, 64))
        assert spec.halo == (8, 8)
        assert spec.tile_at(-5, 129.9).id == 2
        assert spec.tile_at(100, 130).id == 5

    @pytest.mark.parametrize("wrong", [(0, 4), (4,), (4, 4, 4), 4, (2.5, 4), "ab", (4, -1)])
    def test_wrong_values(self, wrong):
        with pytest.raises(InvalidInputError, match="two integers"):
            TileSpec.create((10, 10), wrong)

    def test_coordinate_order(self):
        assert yx_to_xy(np.array([[1, 2], [3, 4]])).tolist() == [[2, 1], [4, 3]]
        assert box_yx_to_xyxy([1, 2, 3, 4]).tolist() == [2, 1, 4, 3]


def test_nearest_names():
    known = ["vit_b_lm", "vit_l_lm", "vit_t"]
    assert "'vit_b_lm'" in nearest_names("vitb_lm", known)
    assert nearest_names("qqqqq", known) == "Known names: vit_b_lm, vit_l_lm, vit_t."


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_is_reused_while_asked_for():
    code = """
import resource
import time
import numpy as np
from micro_sam.core import allocator
from micro_sam.core.allocator import reusing_memory
allocator.IDLE = 0.3

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**22)  # 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with reusing_memory():
    with reusing_memory():
        faults()
    inside = faults()
with reusing_memory():
    again = faults()
    time.sleep(1.1)
kept = faults()
time.sleep(1)
afterwards = faults()
with reusing_memory(2**20):
    large = faults()

def faults_of_many_blocks():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with reusing_memory():
        blocks = [np.ones(2**20) for _ in range(10)]  # 8 MiB each
    del blocks
    np.ones(2**10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = faults_of_many_blocks(), faults_of_many_blocks()
print(outside, inside, again, kept, afterwards, large, first, second)
"""
    # A process of its own: other tests change what the allocator keeps, and their threads touch memory. With huge pages
    # the number of faults would depend on addresses.
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"},
    )
    outside, inside, again, kept, afterwards, large, first, second = map(int, result.stdout.split())
    assert inside < outside / 5
    assert again < outside / 5  # a short use leaves its memory to the next
    assert kept < outside / 5  # a long one for a while
    assert afterwards > outside / 2
    assert large > outside / 2  # each of these blocks is handed back at once
    assert second < first / 5  # the activations of one prompt stay for the next
