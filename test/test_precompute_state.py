"""Segmentation states next to embeddings: formats, agreement with model and image, safe and atomic files."""

import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import tifffile
import torch
from segment_anything.utils.amg import MaskData

from micro_sam import util
from micro_sam.core.errors import (
    EmbeddingCacheError,
    EmbeddingMismatchError,
    InvalidInputError,
    MissingFileError,
    OutputWriteError,
    UnsafeCheckpointError,
)
from micro_sam.precompute_state import cache_amg_state, cache_is_state, precompute_state
from micro_sam.segmentation import state_files
from micro_sam.segmentation.state_files import read_amg_state, read_legacy_pickle, write_amg_state

TILES = {"tile_shape": (64, 80), "halo": (16, 16)}
RLES = [{"size": [4, 5], "counts": [3, 2, 15]}, {"size": [4, 5], "counts": [20]}]


@pytest.fixture
def volume(cells_image):
    return np.stack([cells_image, cells_image[::-1], cells_image[:, ::-1]])[:, :100]


def embed(predictor, image, path, **kwargs):
    return util.precompute_image_embeddings(predictor, image, path, verbose=False, **kwargs)


def synthetic_state(as_tensors=True):
    convert = torch.from_numpy if as_tensors else np.asarray
    crop = MaskData(
        iou_preds=convert(np.array([0.5, 0.75], np.float32)), boxes=convert(np.arange(8, dtype=np.int32).reshape(2, 4)),
        points=np.array([[1.5, 2], [3, 4]], np.float32), rles=RLES,
    )
    return {"crop_list": [crop, MaskData(rles=[])], "crop_boxes": [[0, 0, 5, 4], [0, 0, 2, 2]], "original_size": (4, 5)}


def assert_equal_states(a, b):
    assert a["crop_boxes"] == b["crop_boxes"]
    assert tuple(a["original_size"]) == tuple(b["original_size"])
    for x, y in zip(a["crop_list"], b["crop_list"], strict=True):
        assert dict(x.items()).keys() == dict(y.items()).keys()
        for key, value in x.items():
            if key == "rles":
                assert value == y[key]
            else:
                assert type(value) is type(y[key])
                np.testing.assert_array_equal(np.asarray(value), np.asarray(y[key]))


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_decoder_state_is_kept(tmp_path, tiny_predictor, tiny_decoder, cells_image, tiles, monkeypatch):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path, **tiles)
    segmenter = cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    with h5py.File(path / "is_state.h5") as file:
        assert {n: (d.dtype, d.shape, d.compression) for n, d in file["state"].items()} == dict.fromkeys(
            ("foreground", "center_distances", "boundary_distances"), (np.float32, cells_image.shape, "gzip")
        )
    monkeypatch.setattr(tiny_decoder, "forward", lambda *a: pytest.fail("decoded again"))
    arguments = (tiny_predictor, tiny_decoder, cells_image, embeddings, path, False)
    assert cache_is_state(*arguments, skip_load=True) is None
    loaded = cache_is_state(*arguments)
    for name, value in segmenter.get_state().items():
        np.testing.assert_array_equal(loaded.get_state()[name], value)
    assert type(loaded) is type(segmenter)


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
@pytest.mark.parametrize("whole", [True, False], ids=["stack", "plane"])
def test_planes_of_a_stack(tmp_path, tiny_predictor, tiny_decoder, volume, tiles, whole):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, volume, path, ndim=3, **tiles)
    for i in (0, 2):
        raw = volume if whole else volume[i]
        segmenter = cache_is_state(tiny_predictor, tiny_decoder, raw, embeddings, path, verbose=False, i=i)
        state = segmenter.get_state()
        assert state["foreground"].shape == volume.shape[1:], "not (Z, Y)"
        with h5py.File(path / "is_state.h5") as file:
            np.testing.assert_array_equal(file[f"state-{i}/foreground"], state["foreground"])


def test_other_model_decoder_or_image_is_refused(tmp_path, tiny_predictor, tiny_decoder, cells_image):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path)
    cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    tiny_predictor._hash = "xxh128:other"
    with pytest.raises(EmbeddingMismatchError, match="model_hash=xxh128:0.*model_hash=xxh128:other"):
        cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path)
    tiny_predictor._hash = "xxh128:" + "0" * 32
    with pytest.raises(EmbeddingMismatchError, match="image="):
        cache_is_state(tiny_predictor, tiny_decoder, cells_image[::-1], embeddings, path)
    parameter = next(p for p in tiny_decoder.parameters() if p.ndim > 1)
    value = parameter.data.flatten()[0].item()
    parameter.data.flatten()[0] = value + 1
    try:
        with pytest.raises(EmbeddingMismatchError, match="decoder_hash"):
            cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path)
    finally:
        parameter.data.flatten()[0] = value


def test_state_of_an_older_version_is_read(tmp_path, tiny_predictor, tiny_decoder, cells_image, caplog):
    embeddings = embed(tiny_predictor, cells_image, tmp_path / "e.zarr")
    maps = {name: np.full(cells_image.shape, n / 4, np.float32) for n, name in enumerate(state_files.MAP_NAMES)}
    with h5py.File(tmp_path / "e.zarr" / "is_state.h5", "w") as file:
        for name, value in maps.items():
            file.create_dataset(f"state/{name}", data=value, compression="gzip")
    segmenter = cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, tmp_path / "e.zarr")
    np.testing.assert_array_equal(segmenter.get_state()["center_distances"], maps["center_distances"])
    assert "older version" in caplog.text


def test_interrupted_write_is_computed_again(tmp_path, tiny_predictor, tiny_decoder, cells_image):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path)
    with h5py.File(path / "is_state.h5", "w") as file:
        file.create_group("state")["foreground"] = np.zeros((3, 3))
    segmenter = cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    assert segmenter.get_state()["foreground"].shape == cells_image.shape
    (path / "is_state.h5").write_bytes(b"damaged")
    with pytest.raises(EmbeddingCacheError, match="damaged.*Delete it"):
        cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path)


def test_failed_write_leaves_nothing(tmp_path, tiny_predictor, tiny_decoder, cells_image, monkeypatch):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path)
    before = sorted(os.listdir(path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(OutputWriteError, match="no space left"):
        cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    monkeypatch.undo()
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OutputWriteError, match="no space left"):
        write_amg_state(path, None, synthetic_state(), {})
    assert sorted(os.listdir(path)) == before


def test_state_is_read_without_writing(tmp_path, tiny_predictor, tiny_decoder, cells_image, monkeypatch):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path)
    cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    opened = []
    original = h5py.File
    monkeypatch.setattr(h5py, "File", lambda name, mode: opened.append(mode) or original(name, mode))
    cache_is_state(tiny_predictor, tiny_decoder, cells_image, embeddings, path, verbose=False)
    assert opened == ["r"]


@pytest.mark.parametrize("as_tensors", [True, False])
@pytest.mark.parametrize("i", [None, 3])
def test_amg_state_round_trip(tmp_path, as_tensors, i):
    state = synthetic_state(as_tensors)
    write_amg_state(tmp_path, i, state, {"points_per_side": 4})
    assert_equal_states(read_amg_state(tmp_path, i, {"points_per_side": 4}), state)
    with pytest.raises(EmbeddingMismatchError, match="points_per_side=4.*points_per_side=8"):
        read_amg_state(tmp_path, i, {"points_per_side": 8})
    assert read_amg_state(tmp_path, 5, {}) is None
    assert not list(tmp_path.rglob(".*"))


def test_amg_pickle_of_older_versions_is_read(tmp_path, caplog):
    with open(tmp_path / "amg_state.pickle", "wb") as file:
        pickle.dump(synthetic_state(), file)
    assert_equal_states(read_amg_state(tmp_path, None, {"points_per_side": 4}), synthetic_state())
    (tmp_path / "amg_state").mkdir()
    shutil.copy(tmp_path / "amg_state.pickle", tmp_path / "amg_state" / "state-2.pkl")
    assert_equal_states(read_amg_state(tmp_path, 2, {}), synthetic_state())


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Unknown:
    pass


def test_pickle_runs_no_code(tmp_path):
    with open(tmp_path / "bad.pickle", "wb") as file:
        pickle.dump({**synthetic_state(), "x": Harmful(tmp_path / "was_run")}, file)
    with pytest.raises(UnsafeCheckpointError, match="system"):
        read_legacy_pickle(tmp_path / "bad.pickle")
    assert not (tmp_path / "was_run").exists()
    with open(tmp_path / "odd.pickle", "wb") as file:
        pickle.dump({**synthetic_state(), "x": Unknown()}, file)
    with pytest.raises(UnsafeCheckpointError, match="Unknown"):
        read_legacy_pickle(tmp_path / "odd.pickle")
    whole = pickle.dumps(synthetic_state())
    (tmp_path / "cut.pickle").write_bytes(whole[:-30])
    with pytest.raises(EmbeddingCacheError, match="damaged"):
        read_legacy_pickle(tmp_path / "cut.pickle")


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_mask_generator_state_is_kept(tmp_path, tiny_predictor, cells_image, tiles, monkeypatch):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, cells_image, path, **tiles)
    arguments = (tiny_predictor, cells_image, embeddings, path, False)
    segmenter = cache_amg_state(*arguments, points_per_side=4)
    thresholds = {"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}
    expected = segmenter.generate(**thresholds)
    monkeypatch.setattr(type(segmenter), "initialize", lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(type(segmenter), "initialize_steps", lambda *a, **k: pytest.fail("again"), raising=False)
    loaded = cache_amg_state(*arguments, points_per_side=4)
    np.testing.assert_array_equal(loaded.generate(**thresholds), expected)
    with pytest.raises(EmbeddingMismatchError, match="points_per_side"):
        cache_amg_state(*arguments, points_per_side=8)
    with pytest.raises(InvalidInputError, match="points_per_side"):
        cache_amg_state(*arguments, points_per_sid=8)


def test_mask_generator_state_of_a_plane(tmp_path, tiny_predictor, volume):
    path = tmp_path / "e.zarr"
    embeddings = embed(tiny_predictor, volume, path, ndim=3)
    cache_amg_state(tiny_predictor, volume[1], embeddings, path, verbose=False, i=1, points_per_side=2)
    assert os.listdir(path / "amg_state") == ["state-1.npz"]


def test_precompute_files_of_a_folder(tmp_path, tiny_checkpoint, cells_image):
    for n in range(2):
        tifffile.imwrite(tmp_path / f"i{n}.tif", cells_image)
    (tmp_path / "i9.tif").write_bytes(b"broken")
    arguments = {"model_type": "vit_t", "checkpoint_path": tiny_checkpoint, "device": "cpu", "verbose": False}
    with pytest.raises(InvalidInputError, match="(?s)1 of 3 images failed.*i9.tif"):
        precompute_state(tmp_path, tmp_path / "out", "*.tif", precompute_amg_state=True, **arguments)
    assert sorted(os.listdir(tmp_path / "out")) == ["i0.zarr", "i1.zarr"]
    assert (tmp_path / "out" / "i1.zarr" / "is_state.h5").exists()
    with pytest.raises(MissingFileError, match="png"):
        precompute_state(tmp_path, tmp_path / "out", "*.png", **arguments)
    precompute_state(tmp_path, tmp_path / "stack", key="i[01].tif", precompute_amg_state=True, **arguments)
    with h5py.File(tmp_path / "stack.zarr" / "is_state.h5") as file:
        assert set(file) == {"state-0", "state-1"}
