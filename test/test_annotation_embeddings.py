"""Embeddings of a session: single planes first, the rest in the background, the same masks in both ways."""

import threading

import numpy as np
import pytest
from embedding_helpers import example, one_thread, small_predictor  # noqa: F401

from micro_sam.annotation.embedding_source import N_KEPT_PLANES, EmbeddingSource
from micro_sam.annotation.geometry import AnnotationImage
from micro_sam.core.errors import EmbeddingMismatchError, InvalidInputError
from micro_sam.core.progress import drain
from micro_sam.embeddings.encode import embedding_steps, load_embeddings
from micro_sam.prompt_based_segmentation import segment_from_box
from micro_sam.segmentation.workflow import LoadedModel

TILES = {"tile_shape": (32, 32), "halo": (8, 8)}
BOX = np.array([10, 12, 26, 30])


@pytest.fixture
def model():
    return LoadedModel(small_predictor(), None, "amg")


@pytest.fixture
def volume():
    return example((5, 48, 64), dtype="uint16")


def run(steps):
    return drain(steps, verbose=False)


def logits(model, embeddings, i):
    """The low-resolution logits of the mask of a box."""
    return segment_from_box(model.predictor, BOX, embeddings, i, return_all=True)[2]


def count_encodings(monkeypatch, model):
    """Count the planes and tiles that go through the encoder from now on."""
    counts = []
    forward = model.predictor.model.image_encoder.forward
    monkeypatch.setattr(
        model.predictor.model.image_encoder, "forward", lambda x: counts.append(len(x)) or forward(x)
    )
    return counts


@pytest.mark.parametrize("store", ["memory", "path", "auto", "float16"])
@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
@pytest.mark.parametrize("normalization", ["tile", "image"])
def test_a_plane_gives_the_same_mask_before_and_after_all_are_there(
    model, volume, tmp_path, store, tiles, normalization
):
    save_path = {"memory": None, "auto": "auto"}.get(store, tmp_path / "volume.zarr")
    dtype = "float16" if store == "float16" else None
    source = EmbeddingSource(
        model, AnnotationImage.create(volume, mode="3d"), save_path=save_path, normalization=normalization,
        dtype=dtype, **tiles,
    )
    assert not source.complete
    assert not source.ready(3)
    first = logits(model, *run(source.plane_steps(3)))
    assert source.ready(3)
    assert not source.ready(2)
    assert not source.complete

    full = run(source.prepare_steps())
    assert source.complete
    assert all(source.ready(z) for z in range(5))
    embeddings, i = run(source.plane_steps(3))
    assert (embeddings is full, i) == (True, 3)
    np.testing.assert_array_equal(logits(model, embeddings, i), first)
    reference = run(embedding_steps(model.predictor, volume, ndim=3, normalization=normalization, **tiles))
    np.testing.assert_allclose(logits(model, reference, 3), first, atol=0.05 if dtype else 0)
    other = logits(model, embeddings, 2)
    assert not np.array_equal(other, first)


@pytest.mark.parametrize("save_path", [None, "store"])
def test_work_goes_on_after_a_cancel(model, volume, tmp_path, monkeypatch, save_path):
    source = EmbeddingSource(model, volume, ndim=3, save_path=save_path and tmp_path / "a.zarr")
    counts = count_encodings(monkeypatch, model)
    steps = source.prepare_steps()
    for step in steps:
        if step.text.startswith("Compute") and step.done >= 2:
            break
    steps.close()
    assert not source.complete
    n_before = sum(counts)
    assert 2 <= n_before < 5
    run(source.prepare_steps())
    assert source.complete
    assert sum(counts) == 5
    assert list(source.prepare_steps()) == []


def test_in_memory_no_plane_is_encoded_twice(model, volume, monkeypatch):
    source = EmbeddingSource(model, volume, ndim=3)
    counts = count_encodings(monkeypatch, model)
    run(source.plane_steps(4))
    run(source.plane_steps(4))
    assert sum(counts) == 1
    run(source.prepare_steps())
    assert sum(counts) == 5


def test_few_planes_are_kept_beside_the_store(model, tmp_path, monkeypatch):
    volume = example((N_KEPT_PLANES + 2, 32, 32))
    source = EmbeddingSource(model, volume, ndim=3, save_path=tmp_path / "a.zarr")
    counts = count_encodings(monkeypatch, model)
    for plane in range(N_KEPT_PLANES):
        run(source.plane_steps(plane))
    run(source.plane_steps(0))
    run(source.plane_steps(N_KEPT_PLANES))
    assert sum(counts) == N_KEPT_PLANES + 1
    assert source.ready(0)
    assert not source.ready(1)  # the one that was not used for longest


@pytest.mark.parametrize("save_path", [None, "store"])
def test_click_and_background_share_the_work(model, volume, tmp_path, save_path):
    """A background thread prepares all while others ask for planes and for everything; one step at a time."""
    source = EmbeddingSource(model, volume, ndim=3, save_path=save_path and tmp_path / "a.zarr")
    turn, results, errors = threading.Lock(), {}, []

    def work(name, make):
        try:
            steps = make()
            while True:
                with turn:
                    try:
                        next(steps)
                    except StopIteration as stop:
                        results[name] = stop.value
                        return
        except Exception as error:
            errors.append(error)

    jobs = {"rest": source.prepare_steps, "all": source.prepare_steps, 4: lambda: source.plane_steps(4)}
    threads = [threading.Thread(target=work, args=item) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert results["rest"] is results["all"]
    expected = logits(model, results["all"], 4)
    np.testing.assert_array_equal(logits(model, *results[4]), expected)


def test_a_cancelled_one_does_not_stop_the_other(model, volume, tmp_path):
    source = EmbeddingSource(model, volume, ndim=3, save_path=tmp_path / "a.zarr")
    background, foreground = source.prepare_steps(), source.prepare_steps()
    next(background)
    next(foreground)
    background.close()
    run(foreground)
    assert source.complete


def test_a_complete_store_is_used_for_the_first_plane(model, volume, tmp_path, monkeypatch):
    run(EmbeddingSource(model, volume, ndim=3, save_path=tmp_path / "a.zarr").prepare_steps())
    run(EmbeddingSource(model, volume, ndim=3, save_path="auto").prepare_steps())
    counts = count_encodings(monkeypatch, model)
    for save_path in (tmp_path / "a.zarr", "auto"):
        source = EmbeddingSource(model, volume, ndim=3, save_path=save_path)
        _, i = run(source.plane_steps(2))
        assert source.complete
        assert i == 2
        assert source.path.is_dir()
        assert load_embeddings(source.path)["original_size"] == (48, 64)
    assert counts == []


def test_a_store_of_another_image_is_refused_and_can_be_replaced(model, volume, tmp_path):
    path = tmp_path / "a.zarr"
    run(EmbeddingSource(model, volume, ndim=3, save_path=path).prepare_steps())
    other = volume[::-1].copy()
    with pytest.raises(EmbeddingMismatchError, match="data_hash"):
        run(EmbeddingSource(model, other, ndim=3, save_path=path).plane_steps(0))
    with pytest.raises(EmbeddingMismatchError, match="tile_shape"):
        run(EmbeddingSource(model, volume, ndim=3, save_path=path, **TILES).prepare_steps())
    source = EmbeddingSource(model, other, ndim=3, save_path=path, overwrite=True)
    steps = source.prepare_steps()
    while next(steps).done < 2:
        pass
    steps.close()
    full = run(source.prepare_steps())
    reference = run(embedding_steps(model.predictor, other, ndim=3))
    np.testing.assert_array_equal(full["features"][1], reference["features"][1])


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_images_channels_and_single_planes(model, tiles, dtype):
    image = example((40, 48, 3), dtype=dtype)
    source = EmbeddingSource(model, AnnotationImage.create(image, mode="2d"), **tiles)
    embeddings, i = run(source.plane_steps())
    assert i is None
    assert source.complete
    assert source.n_planes is None
    np.testing.assert_array_equal(
        logits(model, embeddings, None),
        logits(model, run(embedding_steps(model.predictor, image, ndim=2, **tiles)), None),
    )
    stack = EmbeddingSource(model, image[None], ndim=3, **tiles)
    np.testing.assert_array_equal(
        logits(model, *run(stack.plane_steps(0))), logits(model, embeddings, None)
    )
    assert stack.n_planes == 1


def test_planes_that_are_not_there(model, volume):
    source = EmbeddingSource(model, volume, ndim=3)
    for plane in (None, 5, -1):
        with pytest.raises(InvalidInputError, match="planes 0 to 4"):
            run(source.plane_steps(plane))
    assert not source.ready(7)
    with pytest.raises(InvalidInputError, match="pass None"):
        run(EmbeddingSource(model, volume[0], ndim=2).plane_steps(0))
    with pytest.raises(InvalidInputError, match="ndim"):
        EmbeddingSource(model, volume)


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["plain", "tiled"])
def test_ready_embeddings(model, volume, tiles):
    embeddings = run(embedding_steps(model.predictor, volume, ndim=3, **tiles))
    source = EmbeddingSource.from_embeddings(model, volume, embeddings, ndim=3)
    assert source.complete
    assert source.tiling == tiles
    assert run(source.plane_steps(1)) == (embeddings, 1)
    with pytest.raises(InvalidInputError, match="5 planes"):
        EmbeddingSource.from_embeddings(model, volume[:4], embeddings, ndim=3)


def test_description(model, volume, tmp_path):
    source = EmbeddingSource(model, volume, ndim=3, save_path=tmp_path / "a.zarr", **TILES)
    found = source.describe()
    assert found["model_name"] == "small"
    assert (found["tile_shape"], found["halo"]) == ([32, 32], [8, 8])
    assert found["path"] == str(tmp_path / "a.zarr")
    automatic = EmbeddingSource(model, volume, ndim=3, save_path="auto")
    assert automatic.describe()["path"] == "auto"
    run(automatic.prepare_steps())
    assert automatic.describe()["path"] == str(automatic.path)


def test_a_plane_that_cannot_be_read_does_not_block_the_others(model, tmp_path):
    image = example((2, 32, 32)).astype("float32")
    good = image[:1].copy()
    image[1, 0, 0] = np.nan
    source = EmbeddingSource(model, image, ndim=3, save_path=tmp_path / "a.zarr")
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="plane 1"):
            run(source.prepare_steps())
    expected = run(embedding_steps(model.predictor, good, ndim=3))
    np.testing.assert_array_equal(logits(model, *run(source.plane_steps(0))), logits(model, expected, 0))
