"""What embeddings are, for every combination of image, stack, tiles, memory and disk."""

import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
import zarr
from embedding_helpers import example, one_thread, reference_features, small_predictor  # noqa: F401

from micro_sam.core.errors import InvalidInputError, MissingTileError
from micro_sam.embeddings.encode import (
    compute_embeddings_batched,
    embedding_steps,
    precompute_image_embeddings,
    set_precomputed,
    to_image,
)
from micro_sam.embeddings.signature import iter_slabs

TILES = {"tile_shape": (32, 40), "halo": (4, 6)}


@pytest.fixture
def predictor():
    return small_predictor()


class EmbeddingContract:
    """One implementation: an image or stack, with or without tiles; subclasses choose."""

    shape: tuple[int, ...]
    options: dict

    @pytest.fixture(params=["memory", "disk"])
    def save_path(self, request, tmp_path):
        return None if request.param == "memory" else tmp_path / "embeddings.zarr"

    @property
    def ndim(self):
        return self.options["ndim"]

    def compute(self, predictor, image, save_path=None, **options):
        return precompute_image_embeddings(predictor, image, save_path, **{"verbose": False, **self.options, **options})

    def blocks(self, image):
        """Yield (z, tile id, pixels), from the definition of tiles."""
        planes = enumerate(image) if self.ndim == 3 else [(None, image)]
        for z, plane in planes:
            if "tile_shape" not in self.options:
                yield z, None, plane
                continue
            (ty, tx), (hy, hx) = self.options["tile_shape"], self.options["halo"]
            height, width = plane.shape[:2]
            tile = 0
            for y in range(0, height, ty):
                for x in range(0, width, tx):
                    stop = min(min(y + ty, height) + hy, height), min(min(x + tx, width) + hx, width)
                    yield z, tile, plane[max(y - hy, 0):stop[0], max(x - hx, 0):stop[1]]
                    tile += 1

    def assert_features(self, predictor, embeddings, image, atol=1e-5):
        n = 0
        for z, tile, block in self.blocks(image):
            features = embeddings["features"] if tile is None else embeddings["features"][str(tile)]
            found = features[0] if z is None else features[z][0]
            np.testing.assert_allclose(found, reference_features(predictor, block), atol=atol)
            n += 1
        assert n == 1 or n >= 3

    def test_features_are_those_of_sam(self, predictor, save_path):
        image = example(self.shape)
        before = image.copy()
        embeddings = self.compute(predictor, image, save_path)
        self.assert_features(predictor, embeddings, image)
        np.testing.assert_array_equal(image, before)
        assert set(embeddings) == {"features", "input_size", "original_size"}
        lead = () if self.ndim == 2 else (self.shape[0],)
        if "tile_shape" in self.options:
            features = embeddings["features"]
            assert embeddings["input_size"] is None
            assert embeddings["original_size"] is None
            assert features.attrs == {"shape": [50, 70], "tile_shape": [32, 40], "halo": [4, 6]}
            assert sorted(features) == list("0123")
            assert features["3"].attrs == {"original_size": (22, 36), "input_size": (39, 64)}
            assert features["3"].shape == (*lead, 1, 256, 4, 4)
        else:
            assert embeddings["original_size"] == (50, 70)
            assert embeddings["input_size"] == (46, 64)
            assert embeddings["features"].shape == (*lead, 1, 256, 4, 4)
            assert embeddings["features"].dtype == np.float32

    def test_colour(self, predictor, save_path):
        image = example((*self.shape, 3), seed=3)
        self.assert_features(predictor, self.compute(predictor, image, save_path), image)

    def test_batches_give_the_same(self, predictor, save_path):
        image = example(self.shape, dtype="uint16")
        embeddings = self.compute(predictor, image, save_path, batch_size=3)
        self.assert_features(predictor, embeddings, image)

    @pytest.mark.parametrize("lazy_loading", [False, True])
    def test_cached_results_are_like_computed_ones(self, predictor, tmp_path, lazy_loading, monkeypatch):
        image = example(self.shape)
        path = tmp_path / "e.zarr"
        computed = self.compute(predictor, image, path, lazy_loading=lazy_loading)
        predictor.reset_image()
        monkeypatch.setattr(predictor.model.image_encoder, "forward", None)  # nothing may be encoded again
        cached = self.compute(predictor, image, str(path), lazy_loading=lazy_loading)
        assert type(cached["features"]) is type(computed["features"])
        for name in ("input_size", "original_size"):
            assert cached[name] == computed[name]
            assert type(cached[name]) is type(computed[name])
        for z, tile, _ in self.blocks(image):
            found, expected = (
                e["features"] if tile is None else e["features"][str(tile)] for e in (cached, computed)
            )
            index = 0 if z is None else z
            np.testing.assert_array_equal(found[index], expected[index])
        is_array = isinstance(cached["features"], np.ndarray)
        assert is_array == ("tile_shape" not in self.options and (self.ndim == 2 or not lazy_loading))
        assert predictor.is_image_set == (self.ndim == 2 and "tile_shape" not in self.options)

    def test_the_predictor_can_be_prompted(self, predictor, save_path):
        image = example(self.shape)
        embeddings = self.compute(predictor, image, save_path)
        reference = small_predictor()
        for z, tile, block in list(self.blocks(image))[-2:]:
            assert set_precomputed(predictor, embeddings, i=z, tile_id=tile) is predictor
            assert predictor.original_size == block.shape[:2]
            reference.set_image(to_image(block))
            point, label = np.array([[9, 12]]), np.array([1])
            for found, expected in zip(predictor.predict(point, label), reference.predict(point, label), strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_state_of_the_predictor(self, predictor, save_path):
        other = example((30, 40), seed=8)
        predictor.set_image(to_image(other))
        before = predictor.features
        self.compute(predictor, example(self.shape), save_path)
        assert predictor.is_image_set
        assert predictor.features.shape == (1, 256, 4, 4)
        if self.ndim == 2 and "tile_shape" not in self.options:
            assert predictor.original_size == (50, 70)
        else:
            assert predictor.features is before
            assert predictor.original_size == (30, 40)

    def test_progress_reaches_the_end(self, predictor, save_path):
        image, calls = example(self.shape), []
        callbacks = {"pbar_init": lambda n, text: calls.append((n, text)), "pbar_update": calls.append}
        for _ in range(2):  # the second time everything may be in the cache
            calls.clear()
            self.compute(predictor, image, save_path, batch_size=2, **callbacks)
            total = len(list(self.blocks(image)))
            assert calls[0][0] == total
            assert sum(calls[1:]) == total
            assert len([c for c in calls if isinstance(c, tuple)]) == 1

    @pytest.mark.parametrize("kind", ["dask", "zarr", "memmap"])
    def test_lazy_inputs(self, predictor, tmp_path, kind, save_path):
        image = example(self.shape, dtype="uint16")
        if kind == "dask":
            lazy = da.from_array(image, chunks=tuple(max(1, s // 2) for s in image.shape))
        elif kind == "zarr":
            lazy = zarr.create_array(tmp_path / "in.zarr", data=image, chunks=tuple(max(1, s // 3) for s in self.shape))
        else:
            tifffile.imwrite(tmp_path / "in.tif", image, photometric="minisblack")
            lazy = tifffile.memmap(tmp_path / "in.tif", mode="r")
        embeddings = self.compute(predictor, lazy, save_path)
        self.assert_features(predictor, embeddings, image)
        if save_path is not None:
            self.compute(predictor, image, save_path)  # the same data in memory has the same signature

    def test_a_closed_generator_stops(self, predictor, save_path):
        image = example(self.shape)
        steps = embedding_steps(predictor, image, save_path, **self.options)
        assert next(steps).total == len(list(self.blocks(image)))
        steps.close()
        self.assert_features(predictor, self.compute(predictor, image, save_path), image)


class TestImage(EmbeddingContract):
    shape, options = (50, 70), {"ndim": 2}


class TestStack(EmbeddingContract):
    shape, options = (3, 50, 70), {"ndim": 3}


class TestTiledImage(EmbeddingContract):
    shape, options = (50, 70), {"ndim": 2, **TILES}


class TestTiledStack(EmbeddingContract):
    shape, options = (3, 50, 70), {"ndim": 3, **TILES}


# Masks

@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("on_disk", [False, True])
def test_masked_image(predictor, tmp_path, batch_size, on_disk):
    image, mask = example((50, 70)), np.zeros((50, 70), dtype=bool)
    mask[45, 3] = True  # tile 2; the halos of no other tile reach it
    path = tmp_path / "e.zarr" if on_disk else None
    for _ in range(2):
        embeddings = precompute_image_embeddings(
            predictor, image, path, ndim=2, mask=mask, batch_size=batch_size, verbose=False, **TILES
        )
        features = embeddings["features"]
        assert features.attrs["tiles_in_mask"] == [2]
        assert list(features) == ["2"]
        np.testing.assert_allclose(features["2"][0], reference_features(predictor, image[28:, :46]), atol=1e-5)
        with pytest.raises(MissingTileError, match="Tile 1 was not computed: the mask"):
            set_precomputed(predictor, embeddings, tile_id=1)
        with pytest.raises(KeyError, match="no tile '4'"):
            features["4"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_masked_stack(predictor, tmp_path, on_disk):
    image, mask = example((3, 50, 70)), np.zeros((3, 50, 70), dtype="uint8")
    mask[0, 2, 2] = 7  # tile 0
    mask[2, 30, 38] = 1  # inside tile 0, and in the halos of the three others
    path = tmp_path / "e.zarr" if on_disk else None
    for _ in range(2):
        embeddings = precompute_image_embeddings(predictor, image, path, ndim=3, mask=mask, verbose=False, **TILES)
        features = embeddings["features"]
        assert features.attrs["tiles_in_mask"] == {"0": [0], "1": [], "2": [0, 1, 2, 3]}
        assert features["0"].shape == (3, 1, 256, 4, 4)
        np.testing.assert_allclose(features["0"][2][0], reference_features(predictor, image[2, :36, :46]), atol=1e-5)
        np.testing.assert_allclose(features["3"][2][0], reference_features(predictor, image[2, 28:, 34:]), atol=1e-5)
        for z, tile in [(1, 0), (0, 3)]:
            with pytest.raises(MissingTileError, match=f"Plane {z} .*features/{tile} was not computed"):
                set_precomputed(predictor, embeddings, i=z, tile_id=tile)


@pytest.mark.parametrize("shape", [(50, 70), (2, 50, 70)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_empty_mask_gives_an_empty_result(predictor, tmp_path, shape, on_disk):
    path = tmp_path / "e.zarr" if on_disk else None
    for _ in range(2):
        embeddings = precompute_image_embeddings(
            predictor, example(shape), path, ndim=len(shape), mask=np.zeros(shape), verbose=False, **TILES
        )
        assert len(embeddings["features"]) == 0
        assert embeddings["features"].attrs["tiles_in_mask"] == ([] if len(shape) == 2 else {"0": [], "1": []})


# Arguments

def test_dimensions_are_guessed_safely(predictor):
    with pytest.warns(UserWarning, match=r"\(50, 70, 3\) is taken as colour channels. Pass ndim=2"):
        embeddings = precompute_image_embeddings(predictor, example((50, 70, 3)), verbose=False)
    assert embeddings["features"].shape == (1, 256, 4, 4)
    with pytest.warns(UserWarning, match="ndim=3"):
        embeddings = precompute_image_embeddings(predictor, example((2, 50, 70, 3)), verbose=False)
    assert embeddings["features"].shape == (2, 1, 256, 4, 4)
    assert precompute_image_embeddings(predictor, example((2, 50, 70)), verbose=False)["features"].shape[0] == 2


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((50,), {}, "ndim is 1"), ((2, 3, 50, 70, 3), {}, "ndim is 4"), ((50, 70), {"ndim": 4}, "ndim is 4"),
        ((50, 70), {"ndim": 3}, r"\(Z, Y, X"), ((2, 50, 70, 5), {"ndim": 2}, r"\(Y, X"), ((0, 70), {}, "empty"),
        ((50, 70), {"tile_shape": (0, 5)}, "tile_shape"), ((50, 70), {"tile_shape": 32}, "tile_shape"),
        ((50, 70), {"tile_shape": (32, 32), "halo": (-1, 0)}, "halo"),
        ((50, 70), {"tile_shape": (32, 32, 32)}, "tile_shape"), ((50, 70), {"batch_size": 0}, "batch_size"),
        ((50, 70), {"mask": np.ones((50, 70))}, "mask selects tiles"),
        ((2, 50, 70), {"mask": np.ones((50, 70)), "tile_shape": (32, 32)}, r"\(2, 50, 70\), but it has \(50, 70\)"),
        ((1, 300), {}, "too narrow"), ((50, 70), {"normalization": "best"}, "'tile', 'plane', 'image'"),
        ((50, 70), {"normalization": (3, 1)}, "lo <= hi"), ((50, 70), {"dtype": "int8"}, "float32, float16"),
        ((50, 70), {"zarr_format": 1}, "2 or 3"), ((50, 70), {"pbar_init": print}, "pbar_update"),
    ],
)
def test_wrong_arguments_are_named(predictor, tmp_path, shape, options, message):
    path = tmp_path / "e.zarr"
    with pytest.raises(InvalidInputError, match=message):
        precompute_image_embeddings(predictor, np.zeros(shape, "uint8"), path, verbose=False, **options)
    assert not path.exists()


def test_halo_has_a_default_and_is_unused_without_tiles(predictor, tmp_path):
    image, path = example((50, 70)), tmp_path / "e.zarr"
    tiled = precompute_image_embeddings(predictor, image, tile_shape=(32, 40), verbose=False)
    assert tiled["features"].attrs["halo"] == [4, 5]
    for _ in range(2):
        precompute_image_embeddings(predictor, image, path, halo=(4, 4), verbose=False)
    precompute_image_embeddings(predictor, image, path, verbose=False)


def test_not_a_number_is_reported_with_its_place(predictor, tmp_path):
    volume = np.zeros((3, 50, 70), dtype="float32")
    volume[1, 2, 3] = np.nan
    with pytest.raises(InvalidInputError, match="1 NaN.*plane 1"):
        precompute_image_embeddings(predictor, volume, tmp_path / "e.zarr", verbose=False)
    with pytest.raises(InvalidInputError, match="1 NaN"):
        precompute_image_embeddings(predictor, volume, normalization="image", verbose=False)


def test_set_precomputed_checks_what_it_gets(predictor):
    image, stack = example((50, 70)), example((2, 50, 70))
    plain = precompute_image_embeddings(predictor, image, verbose=False)
    planes = precompute_image_embeddings(predictor, stack, verbose=False)
    tiled = precompute_image_embeddings(predictor, image, verbose=False, **TILES)
    cases = [
        (plain, {"i": 0}, "single plane"), (planes, {}, "pass i"), (planes, {"i": 2}, "planes 0 to 1"),
        (planes, {"i": -1}, "planes 0 to 1"), (tiled, {}, "pass tile_id"), (plain, {"tile_id": 0}, "not tiled"),
        ({**plain, "features": np.zeros((256, 4, 4))}, {}, r"\(256, 4, 4\)"),
    ]
    for embeddings, options, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            set_precomputed(predictor, embeddings, **options)
    with pytest.raises(InvalidInputError, match="another model or image size"):
        set_precomputed(small_predictor(size=96), plain)
    set_precomputed(predictor, {**plain, "features": torch.from_numpy(plain["features"])})
    assert torch.equal(predictor.features, torch.from_numpy(plain["features"]))


def test_a_batch_of_images_of_different_shapes(predictor):
    images = [to_image(example(shape)) for shape in [(50, 70), (64, 64), (20, 30)]]
    features, original_sizes, input_sizes = compute_embeddings_batched(predictor, images)
    assert original_sizes == [(50, 70), (64, 64), (20, 30)]
    assert input_sizes == [(46, 64), (64, 64), (43, 64)]
    for found, image in zip(features, images, strict=True):
        predictor.set_image(image)
        np.testing.assert_allclose(found, predictor.features[0], atol=1e-5)
    for wrong in [[], [np.zeros((4, 4, 3))], [np.zeros((4, 4), dtype="uint8")]]:
        with pytest.raises(InvalidInputError):
            compute_embeddings_batched(predictor, wrong)


# Normalisation

def test_neighbouring_tiles_agree_with_normalization_over_the_image(predictor):
    image = example((64, 128), dtype="uint16")
    image[:, 64:] //= 8  # one bright and one dark tile
    seen = []
    for normalization in ("tile", "image", "plane", (0, 65535)):
        grey = {}
        original = predictor.transform.apply_image
        predictor.transform.apply_image = lambda x, out=grey, f=original: out.setdefault(len(out), x) is x and f(x)
        precompute_image_embeddings(
            predictor, image, tile_shape=(64, 64), halo=(0, 8), normalization=normalization, verbose=False
        )
        predictor.transform.apply_image = original
        # Both tiles see the columns 56 to 72.
        left, right = grey[0][:, 56:72, 0].astype(int), grey[1][:, :16, 0].astype(int)
        seen.append(np.abs(left - right).max())
    assert seen[0] > 20
    assert seen[1:] == [0, 0, 0]


def test_normalization_of_planes_and_volumes(predictor):
    volume = np.stack([example((50, 70)), example((50, 70)) // 4])
    features = {
        mode: precompute_image_embeddings(predictor, volume, ndim=3, normalization=mode, verbose=False)["features"]
        for mode in ("tile", "plane", "image")
    }
    difference = {mode: np.abs(f[0] - f[1]).max() for mode, f in features.items()}
    assert difference["image"] > 3 * difference["plane"]
    assert difference["image"] > 3 * difference["tile"]


class _Spy:
    """A lazy array that notes the size of the largest piece that was read."""

    def __init__(self, array, chunks=None):
        self._array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.chunks, self.largest, self.total = chunks, 0, 0

    def __getitem__(self, index):
        piece = self._array[index].copy()
        self.largest = max(self.largest, piece.nbytes)
        self.total += piece.nbytes
        return piece

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("The whole array was read")


@pytest.mark.parametrize("normalization", ["tile", "plane", "image"])
@pytest.mark.parametrize("tiles", [{}, TILES])
def test_a_lazy_input_is_never_read_whole(predictor, tmp_path, monkeypatch, normalization, tiles):
    monkeypatch.setattr("micro_sam.embeddings.signature._SLAB_BYTES", 4000)
    monkeypatch.setattr(iter_slabs, "__defaults__", (4000,))
    spy = _Spy(example((20, 50, 70)))
    options = {"ndim": 3, "normalization": normalization, "verbose": False, **tiles}
    for _ in range(2):
        precompute_image_embeddings(predictor, spy, tmp_path / "e.zarr", **options)
    assert spy.largest <= 4000  # one plane is 3500 bytes, all are 70000


def test_slabs_cover_the_array_in_order_and_follow_its_chunks():
    array = np.arange(7 * 30 * 11).reshape(7, 30, 11)
    for max_bytes in (50, 1000, 5000, 10**6):
        spy = _Spy(array)
        slabs = list(iter_slabs(spy, max_bytes))
        np.testing.assert_array_equal(np.concatenate([s.ravel() for s in slabs]), array.ravel())
        assert spy.largest <= max(max_bytes, 11 * 8)
    sizes = [s.shape[0] for s in iter_slabs(_Spy(array, chunks=(3, 30, 11)), 5 * 30 * 11 * 8)]
    assert sizes == [3, 3, 1]
