"""Embeddings on disk: layout, resume, mismatches, damage, formats, locks and automatic caches."""

import asyncio
import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import zarr
from embedding_helpers import example, one_thread, small_predictor  # noqa: F401

from micro_sam._version import __version__
from micro_sam.core.errors import EmbeddingCacheError, EmbeddingMismatchError, InvalidInputError, OutputWriteError
from micro_sam.embeddings import cache, store
from micro_sam.embeddings.encode import embedding_steps, load_embeddings, precompute_image_embeddings
from micro_sam.embeddings.lock import locked
from micro_sam.embeddings.signature import DataSignature, compute_data_signature, compute_legacy_data_signature
from micro_sam.embeddings.store import lock_path

TILES = {"tile_shape": (32, 40), "halo": (4, 6)}
LAYOUTS = {
    "2d": ((50, 70), {"ndim": 2}),
    "3d": ((3, 50, 70), {"ndim": 3}),
    "tiled_2d": ((50, 70), {"ndim": 2, **TILES}),
    "tiled_3d": ((3, 50, 70), {"ndim": 3, **TILES}),
}


@pytest.fixture
def predictor():
    return small_predictor()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "e.zarr"


@pytest.fixture
def encoded(predictor, monkeypatch):
    """The number of images in each call of the encoder."""
    sizes, forward = [], predictor.model.image_encoder.forward
    monkeypatch.setattr(predictor.model.image_encoder, "forward", lambda x: sizes.append(len(x)) or forward(x))
    return sizes


def compute(predictor, image, path=None, **options):
    return precompute_image_embeddings(predictor, image, path, **{"verbose": False, **options})


def arrays(embeddings):
    """All features as a dictionary from name to array, with zeros for what a mask left out."""
    features = embeddings["features"]
    if isinstance(features, np.ndarray):
        return {"": features}
    return {k: np.asarray(v) for k, v in features.items()}


def assert_same(found, expected):
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


# Layout

@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_on_disk(predictor, path, layout, zarr_format):
    shape, options = LAYOUTS[layout]
    image = example(shape, dtype="uint16")
    compute(predictor, image, path, zarr_format=zarr_format, **options)
    root = zarr.open_group(path, mode="r")
    assert root.metadata.zarr_format == zarr_format
    attrs = dict(root.attrs)
    tiled = "tile_shape" in options
    expected = {
        "data_signature": hashlib.sha1(image.tobytes()).hexdigest(), "tile_shape": [32, 40] if tiled else None,
        "halo": [4, 6] if tiled else None, "model_type": "vit_b", "model_name": "small",
        "micro_sam_version": __version__, "model_hash": "xxh128:" + "0" * 32,
    }
    assert list(attrs)[:7] == list(expected)
    assert {k: attrs[k] for k in expected} == expected
    assert list(attrs)[-1] == "input_size"
    assert (attrs["input_size"], attrs["original_size"]) == ((None, None) if tiled else ([46, 64], [50, 70]))
    assert (attrs["complete"], attrs["ndim"], attrs["dtype"]) == (True, options["ndim"], "float32")
    features = root["features"]
    if tiled:
        assert dict(features.attrs) == {"shape": [50, 70], "tile_shape": [32, 40], "halo": [4, 6]}
        assert sorted(features.array_keys()) == list("0123")
        assert dict(features["1"].attrs) == {"original_size": [36, 36], "input_size": [64, 64]}
    for array in [features[k] for k in "0123"] if tiled else [features]:
        lead = (3,) if options["ndim"] == 3 else ()
        assert array.shape == (*lead, 1, 256, 4, 4)
        assert array.chunks == ((1,) if lead else ()) + (1, 256, 4, 4)
        assert array.dtype == np.float32
    assert not [name for name in files(path) if ".micro_sam" in name or "partial" in name]
    assert_same(load_embeddings(path), compute(predictor, image, **options))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_of_older_versions_open(predictor, path, layout, zarr_format, encoded):
    """Written by hand as older versions did: plain attributes, SHA-1, default compression, no marks of ours."""
    shape, options = LAYOUTS[layout]
    image = example(shape)
    expected = arrays(compute(predictor, image, **options))
    root = zarr.create_group(path, zarr_format=zarr_format)
    tiled = "tile_shape" in options
    if tiled:
        group = root.create_group("features", attributes={"shape": [50, 70], "tile_shape": [32, 40], "halo": [4, 6]})
    for name, values in expected.items():
        array = (group if tiled else root).create_array(
            name or "features", data=values, chunks=(1,) * (values.ndim - 3) + values.shape[-3:]
        )
        if tiled:
            array.attrs.update(original_size=[36, 46], input_size=[50, 64])
    for name, value in {
        "data_signature": hashlib.sha1(image.tobytes()).hexdigest(), "tile_shape": [32, 40] if tiled else None,
        "halo": [4, 6] if tiled else None, "model_type": "vit_b", "model_name": "vit_b_lm",
        "micro_sam_version": "1.8.10", "model_hash": "xxh128:" + "0" * 32,
        "input_size": None if tiled else [46, 64], "original_size": None if tiled else [50, 70],
    }.items():
        root.attrs[name] = value
    encoded.clear()
    loaded = compute(predictor, image, path, **options)
    assert not encoded
    assert arrays(loaded).keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(arrays(loaded)[name], values)
    with pytest.raises(EmbeddingMismatchError, match="data_signature="):
        compute(predictor, image[::-1], path, **options)
    # The SHA-1 does not see the shape; the layout does.
    other = image.reshape(*shape[:-2], shape[-1], shape[-2])
    with pytest.raises(EmbeddingMismatchError, match="plane_shape="):
        compute(predictor, other, path, **options)


def test_float16_halves_the_size_and_reads_as_float32(predictor, path, tmp_path):
    image, options = example((3, 50, 70)), {"ndim": 3, **TILES}
    exact = compute(predictor, image, path, **options)
    half = compute(predictor, image, tmp_path / "half.zarr", dtype="float16", **options)
    for name, values in arrays(exact).items():
        found = np.asarray(half["features"][name])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.astype("float16"))
        assert half["features"][name].store_dtype == np.float16
    sizes = [cache.folder_size(p / "features") for p in (path, tmp_path / "half.zarr")]
    assert sizes[1] < 0.7 * sizes[0]
    assert_same(compute(predictor, image, tmp_path / "half.zarr", **options), half)  # no dtype: as it is
    with pytest.raises(EmbeddingMismatchError, match="stored as float16, but dtype=float32"):
        compute(predictor, image, tmp_path / "half.zarr", dtype="float32", **options)


# Resume

class Interrupted(RuntimeError):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Let the n-th write to any zarr store fail, after leaving half of it under a temporary name."""
    original, state = zarr.storage.LocalStore.set, {"left": None, "under_way": 0}

    async def wrapper(self, key, value):
        if state["left"] is not None:
            state["left"] -= 1
            if state["left"] < 0:
                while state["under_way"]:  # zarr does not wait for those that it started together with this one
                    await asyncio.sleep(0.001)
                target = self.root / key
                target.parent.mkdir(parents=True, exist_ok=True)
                target.with_suffix(".0.partial").write_bytes(b"torn")
                raise Interrupted
        state["under_way"] += 1
        try:
            await original(self, key, value)
        finally:
            state["under_way"] -= 1

    monkeypatch.setattr(zarr.storage.LocalStore, "set", wrapper)
    return lambda n: state.update(left=n)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("layout", "batch_size"), [("2d", 1), ("3d", 1), ("3d", 2), ("tiled_2d", 1), ("tiled_3d", 5)])
def test_resume_after_an_interruption_at_each_write(
    predictor, tmp_path, interrupt, encoded, layout, batch_size, zarr_format
):
    shape, options = LAYOUTS[layout]
    image, options = example(shape), {**options, "batch_size": batch_size, "zarr_format": zarr_format}
    expected = compute(predictor, image, **options)
    total = sum(encoded)
    for n in range(200):
        path = tmp_path / f"{n}.zarr"
        interrupt(n)
        try:
            compute(predictor, image, path, **options)
            break
        except Interrupted:
            interrupt(None)
        log = path / ".micro_sam" / "progress"
        done = [item for line in log.read_text().splitlines() for item in json.loads(line)] if log.exists() else []
        assert len(done) < total or n > total  # a missing attribute at the end is no missing item
        encoded.clear()
        assert_same(compute(predictor, image, path, **options), expected)
        assert sum(encoded) == total - len(done)
        assert 0 not in encoded
        assert not [name for name in files(path) if ".micro_sam" in name or "partial" in name]
        shutil.rmtree(path)
    assert n > total  # each chunk and the metadata were interrupted once


def test_a_write_of_a_failed_attempt_may_land_late(predictor, path, monkeypatch):
    image, remove = example((50, 70)), store.remove_cache

    def remove_before_it_lands(folder):
        remove(folder)
        (folder / ".zgroup").write_text('{"zarr_format": 2}')

    monkeypatch.setattr(store, "remove_cache", remove_before_it_lands)
    result = compute(predictor, image, path, zarr_format=2)
    assert_same(load_embeddings(path), result)


@pytest.mark.parametrize("layout", ["3d", "tiled_2d", "tiled_3d"])
def test_cancelled_work_goes_on_where_it_stopped(predictor, path, encoded, layout):
    shape, options = LAYOUTS[layout]
    image = example(shape)
    steps = embedding_steps(predictor, image, path, **options)
    total = next(steps).total
    while next(steps).done < 1:
        pass
    steps.close()
    assert len(encoded) == 2 < total
    updates = []
    callbacks = {"pbar_init": lambda n, text: updates.append(0), "pbar_update": updates.append}
    result = compute(predictor, image, path, **options, **callbacks)
    assert len(encoded) == total  # nothing was encoded twice
    assert sum(updates) == total  # skipped items count as well
    assert_same(result, compute(predictor, image, **options))


def test_a_torn_line_of_the_progress_file_is_dropped(predictor, path, encoded):
    image = example((3, 50, 70))
    steps = embedding_steps(predictor, image, path, ndim=3)
    while next(steps).done < 1:
        pass
    steps.close()
    log = path / ".micro_sam" / "progress"
    lines = log.read_text().splitlines()
    log.write_text(lines[0] + "\n[[1, nu")
    encoded.clear()
    result = compute(predictor, image, path, ndim=3)
    assert len(encoded) == 2
    assert_same(result, compute(predictor, image, ndim=3))


def test_unfinished_caches_are_only_resumed_for_the_same_input(predictor, path):
    image = example((3, 50, 70))
    steps = embedding_steps(predictor, image, path, ndim=3)
    while next(steps).done < 1:
        pass
    steps.close()
    assert zarr.open_group(path, mode="r").attrs["complete"] is False
    with pytest.raises(EmbeddingMismatchError, match="data_hash="):
        compute(predictor, example((3, 50, 70), seed=5), path, ndim=3)
    with pytest.raises(EmbeddingMismatchError, match=r"model \(name, hash\)="):
        compute(small_predictor(seed=1), image, path, ndim=3)
    with pytest.raises(EmbeddingMismatchError, match="tile_shape=None, but"):
        compute(predictor, image, path, ndim=3, **TILES)
    with pytest.raises(EmbeddingCacheError, match="no complete embeddings"):
        load_embeddings(path)
    assert_same(compute(predictor, image, path, ndim=3), compute(predictor, image, ndim=3))


def test_unfinished_caches_of_older_versions_are_refused(predictor, path):
    image = example((3, 50, 70))
    root = zarr.create_group(path)
    root.create_array("features", data=np.ones((3, 1, 256, 4, 4), "float32"))
    with pytest.raises(EmbeddingCacheError, match="left incomplete by an older version.*overwrite=True"):
        compute(predictor, image, path, ndim=3)
    expected = compute(predictor, image, ndim=3)
    assert_same(compute(predictor, image, path, ndim=3, overwrite=True), expected)
    assert_same(compute(predictor, image, path, ndim=3), expected)


# Mismatches

@pytest.mark.parametrize("layout", LAYOUTS)
def test_mismatches_name_both_values_and_the_way_out(predictor, path, layout):
    shape, options = LAYOUTS[layout]
    image = example(shape)
    expected = compute(predictor, image, path, **options)
    other_model = small_predictor(seed=1)
    other_model.model_type = "vit_l"
    cases = [
        (predictor, image, {**options, "tile_shape": (30, 30), "halo": (4, 6)}, r"tile_shape=.*tile_shape=\[30, 30\]"),
        (predictor, image.view("int8"), options, "data_hash="),
        (predictor, np.swapaxes(image, -1, -2), options, "plane_shape="),
        (predictor, image + np.uint8(1), options, "data_hash="),
        (other_model, image, options, "model_type=vit_b, but model_type=vit_l"),
        (small_predictor(seed=1), image, options, r"small, xxh128:0+\).*small, xxh128:0+1\)"),
        (small_predictor(size=96), image, options, r"feature_shape=\[256, 4, 4\].*\[256, 6, 6\]"),
        (predictor, image, {**options, "normalization": "image"}, "normalization=tile, but normalization=.*image"),
    ]
    if "tile_shape" in options:
        cases.append((predictor, image, {**options, "halo": (0, 0)}, r"halo=\[4, 6\].*halo=\[0, 0\]"))
        cases.append((predictor, image, {**options, "mask": np.eye(*shape[-2:]) * np.ones(shape)}, "all tiles.*mask"))
    if len(shape) == 3:
        cases.append((predictor, image[:2], options, "depth=3, but depth=2"))
        cases.append((predictor, np.moveaxis(image, 0, -1), {**options, "ndim": 2}, "ndim=3, but ndim=2"))
    before = files(path)
    for model, data, settings, message in cases:
        with pytest.raises(EmbeddingMismatchError, match=message) as caught:
            compute(model, data, path, **settings)
        assert "overwrite=True" in str(caught.value)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
    assert files(path) == before
    assert_same(compute(predictor, image, path, **options), expected)


def test_mismatching_masks(predictor, path, tmp_path):
    image, mask = example((50, 70)), np.zeros((50, 70))
    mask[45, 3] = 1
    compute(predictor, image, path, mask=mask, **TILES)
    with pytest.raises(EmbeddingMismatchError, match="computed for 1 tiles in a mask, but all tiles"):
        compute(predictor, image, path, **TILES)
    with pytest.raises(EmbeddingMismatchError, match="1 tiles in a mask, but 4 tiles in a mask .another mask."):
        compute(predictor, image, path, mask=mask == 0, **TILES)
    mask[46, 3] = 1  # another mask that selects the same tiles
    assert list(compute(predictor, image, path, mask=mask, **TILES)["features"]) == ["2"]


def test_a_model_without_hash_is_known_by_its_weights_or_its_name(predictor, path, tmp_path):
    image = example((50, 70))
    for model in (predictor, other := small_predictor(seed=1)):
        del model._hash
    compute(predictor, image, path)
    with pytest.raises(EmbeddingMismatchError, match="encoder-xxh3_128"):
        compute(other, image, path)
    root = zarr.open_group(path, mode="r+")
    root.attrs["model_hash"] = None  # older versions may not know it
    compute(predictor, image, path)
    predictor.model_name = "vit_b_lm"
    with pytest.raises(EmbeddingMismatchError, match="model_name=small, but model_name=vit_b_lm"):
        compute(predictor, image, path)


def test_a_renamed_model_with_the_same_weights_is_the_same(predictor, path, encoded):
    image = example((50, 70))
    compute(predictor, image, path)
    predictor.model_name = "another name"
    compute(predictor, image, path)
    assert len(encoded) == 1


def test_overwrite_replaces_the_cache_and_nothing_else(predictor, path):
    first, second = example((50, 70)), example((60, 50), seed=2)
    compute(predictor, first, path)
    (path / "amg_state.pickle").write_bytes(b"state of the old embeddings")
    (path / "notes.txt").write_text("mine")
    assert_same(compute(predictor, second, path, overwrite=True), compute(predictor, second))
    assert "amg_state.pickle" not in files(path)
    assert (path / "notes.txt").read_text() == "mine"


# Signatures

def test_signatures(monkeypatch):
    image = example((20, 50, 70), dtype="uint16")
    assert compute_legacy_data_signature(image) == hashlib.sha1(image.tobytes()).hexdigest()
    assert compute_legacy_data_signature(image.T) == hashlib.sha1(image.T.tobytes()).hexdigest()
    fast = compute_data_signature(image)
    assert fast == compute_data_signature(image.astype(">u2"))
    assert fast == compute_data_signature(np.asfortranarray(image))
    others = [image.reshape(50, 20, 70), image.view("int16"), image[:19], image + np.uint16(1), image.astype("uint32")]
    assert len({compute_data_signature(other) for other in others} | {fast}) == 6

    reads = []

    class Counting:
        shape, dtype = image.shape, image.dtype

        def __getitem__(self, index):
            reads.append(index)
            return image[index]

    signature = DataSignature(Counting())
    signature.compute()
    n = len(reads)
    assert (signature.fast, signature.legacy) == (fast, compute_legacy_data_signature(image))
    assert len(reads) == n  # one pass for both


def test_a_given_signature_replaces_hashing(predictor, path, monkeypatch):
    image = example((50, 70))
    compute(predictor, image, path, data_signature="slide 7")
    monkeypatch.setattr("micro_sam.embeddings.signature.iter_slabs", None)
    compute(predictor, image, path, data_signature="slide 7")
    with pytest.raises(EmbeddingMismatchError, match="data_hash=slide 7, but data_hash=slide 8"):
        compute(predictor, image, path, data_signature="slide 8")


# Damage and failing disks

@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_chunks_are_named(predictor, path, layout, damage, zarr_format):
    shape, options = LAYOUTS[layout]
    image = example(shape)
    compute(predictor, image, path, zarr_format=zarr_format, **options)
    node = path / "features" / ("2" if "tile_shape" in options else "")
    last = [p for p in sorted(node.rglob("*")) if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs")][-1]
    data = bytearray(last.read_bytes())
    if damage == "remove":
        last.unlink()
    else:
        data[len(data) // 2] ^= 4
        last.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}[damage])

    def read():
        features = compute(predictor, image, path, **options)["features"]
        if "tile_shape" in options:
            np.asarray(features["1"])  # this one is whole
            features = features["2"]
            features[2 if options["ndim"] == 3 else 0]

    plane = r"\[2\]" if options["ndim"] == 3 else r"\[0\]"
    name = "features/2" if "tile_shape" in options else "features"
    with pytest.raises(EmbeddingCacheError, match=rf"{name}{plane} is (damaged|missing).*overwrite=True"):
        read()
    compute(predictor, image, path, overwrite=True, **options)
    read()


def test_damaged_metadata(predictor, path):
    image = example((50, 70))
    compute(predictor, image, path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text[:50])
    with pytest.raises(EmbeddingCacheError, match="metadata.*damaged"):
        compute(predictor, image, path)
    compute(predictor, image, path, overwrite=True)
    (path / "features" / "zarr.json").write_text("{}")
    with pytest.raises(EmbeddingCacheError, match="features.*damaged"):
        compute(predictor, image, path)
    shutil.rmtree(path / "features")
    with pytest.raises(EmbeddingCacheError, match="no features although"):
        compute(predictor, image, path)


def test_other_folders_and_files_are_left_alone(predictor, tmp_path):
    image = example((50, 70))
    (tmp_path / "thesis.txt").write_text("all my work")
    for overwrite in (False, True):
        with pytest.raises(EmbeddingCacheError, match=r"other content \(thesis.txt\)"):
            compute(predictor, image, tmp_path, overwrite=overwrite)
        with pytest.raises((EmbeddingCacheError, OutputWriteError), match="thesis.txt"):
            compute(predictor, image, tmp_path / "thesis.txt", overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "all my work"
    assert files(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_zarr_data_are_left_alone(predictor, tmp_path, overwrite, zarr_format):
    image = example((50, 70))
    zarr.create_group(tmp_path / "ome.zarr", zarr_format=zarr_format, attributes={"ome": {"version": "0.5"}})
    zarr.create_array(tmp_path / "ome.zarr" / "0", data=image, zarr_format=zarr_format)
    zarr.create_array(tmp_path / "array.zarr", data=image, zarr_format=zarr_format)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for name in ("ome.zarr", "array.zarr"):
        with pytest.raises(EmbeddingCacheError, match="not an embedding cache"):
            compute(predictor, image, tmp_path / name, overwrite=overwrite)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_an_empty_group_is_filled_and_one_with_attributes_is_not(predictor, tmp_path):
    image = example((50, 70))
    zarr.create_group(tmp_path / "empty.zarr")
    assert_same(compute(predictor, image, tmp_path / "empty.zarr"), compute(predictor, image))
    zarr.create_group(tmp_path / "mine.zarr", attributes={"author": "me"})
    with pytest.raises(EmbeddingCacheError, match="attributes author"):
        compute(predictor, image, tmp_path / "mine.zarr")


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EACCES, "write permission"), (errno.EIO, "path")],
)
@pytest.mark.parametrize("layout", ["3d", "tiled_3d"])
def test_a_failing_disk_leaves_a_resumable_cache(predictor, path, monkeypatch, encoded, code, message, layout):
    shape, options = LAYOUTS[layout]
    image, original, n = example(shape), zarr.storage.LocalStore.set, [0]

    async def failing(self, key, value):
        n[0] += "/c/" in key
        if n[0] > 2:
            raise OSError(code, os.strerror(code), key)
        await original(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.LocalStore, "set", failing)
        with pytest.raises(OutputWriteError, match=f"{message}.*run again: finished parts are kept"):
            compute(predictor, image, path, **options)
    encoded.clear()
    expected = compute(predictor, image, **options)
    total = sum(encoded)
    encoded.clear()
    assert_same(compute(predictor, image, path, **options), expected)
    assert sum(encoded) == total - 2


def test_no_permission_to_create_the_folder(predictor, path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputWriteError, match="no write permission. Choose another path"):
        compute(predictor, example((50, 70)), path)


def test_a_complete_cache_needs_no_write_permission(predictor, path, monkeypatch):
    image = example((50, 70))
    expected = compute(predictor, image, path)

    def refuse(*args, **kwargs):
        raise AssertionError("A complete cache was written to")

    for target in ("pathlib.Path.mkdir", "micro_sam.embeddings.lock._acquire", "zarr.storage.LocalStore.set"):
        monkeypatch.setattr(target, refuse)
    assert_same(compute(predictor, image, path), expected)


# Locks

def test_a_second_writer_gets_a_clear_message_and_readers_none(predictor, path, encoded):
    image = example((3, 50, 70))
    steps = embedding_steps(predictor, image, path, ndim=3)
    while next(steps).done < 1:
        pass
    n = len(encoded)
    with pytest.raises(EmbeddingCacheError, match=rf"being computed by process {os.getpid()} on .*lock_timeout"):
        compute(predictor, image, path, ndim=3)
    with pytest.raises(EmbeddingCacheError, match="being computed"):
        compute(predictor, image, path, ndim=3, overwrite=True)
    assert len(encoded) == n
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result = stop.value
            break
    assert_same(compute(predictor, image, path, ndim=3), result)
    with locked_cache(path):  # whoever holds the lock, a complete cache can be read
        assert_same(compute(predictor, image, path, ndim=3), result)


def locked_cache(path):
    lock_path(path).parent.mkdir(exist_ok=True)
    return locked(lock_path(path))


# Automatic caches

def test_auto_caches_are_found_again_by_content_model_and_settings(predictor, encoded):
    image, stack = example((50, 70)), example((2, 50, 70))
    first = compute(predictor, image, "auto")
    folder = cache.auto_cache_directory()
    shutil.rmtree(folder)
    compute(predictor, image, "auto")
    encoded.clear()
    predictor.model_name = "renamed"
    assert_same(compute(predictor, image.copy(), "auto"), first)
    assert not encoded
    variants = [
        (predictor, image, TILES), (predictor, image, {"dtype": "float16"}), (predictor, image + np.uint8(1), {}),
        (predictor, image, {"normalization": "image"}), (small_predictor(seed=1), image, {}),
        (predictor, image, {"mask": np.eye(50, 70), **TILES}), (predictor, stack, {"ndim": 3}),
        (predictor, image, {**TILES, "halo": (0, 0)}),
    ]
    for model, data, options in variants:
        compute(model, data, "auto", **options)
    assert len(list(folder.iterdir())) == 1 + len(variants)


def test_auto_caches_have_a_size_cap(predictor, monkeypatch):
    images = [example((50, 70), seed=seed) for seed in range(4)]
    folder = cache.auto_cache_directory()
    shutil.rmtree(folder, ignore_errors=True)

    def names():
        return {p.name for p in folder.iterdir()}

    added = []
    for k, image in enumerate(images[:3]):
        before = names() if k else set()
        compute(predictor, image, "auto")
        added.append((names() - before).pop())
        os.utime(folder / added[-1], (1000 + k, 1000 + k))
    (folder / "someone else's").mkdir()
    compute(predictor, images[0], "auto")  # used again: now the second is the oldest
    assert len(names()) == 4
    size = cache.folder_size(folder / added[0])
    monkeypatch.setenv(cache.SIZE_VARIABLE, str(3.5 * size / 1e9))
    compute(predictor, images[3], "auto")
    assert added[1] not in names()
    assert {added[0], added[2], "someone else's"} < names()
    monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
    assert_same(compute(predictor, images[3], "auto"), compute(predictor, images[3]))  # the one in use stays
    assert len(names()) == 2
    with locked_cache(folder / (names() - {"someone else's"}).pop()):
        assert cache.evict(0) == []  # one that is being written stays as well
    assert len(cache.evict(0)) == 1
    monkeypatch.setenv(cache.SIZE_VARIABLE, "lots")
    with pytest.raises(InvalidInputError, match="MICROSAM_EMBEDDING_CACHE_GB.*'lots'"):
        compute(predictor, images[0], "auto")
