"""Pictures of embeddings: components, colours, cropping, mosaics of tiles, masks."""

import numpy as np
import pytest
from embedding_helpers import example, one_thread, small_predictor  # noqa: F401

from micro_sam.core.errors import InvalidInputError
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.visualization import compute_pca, project_embeddings_for_visualization


def features(*lead, channels=16, size=8, seed=0):
    rng = np.random.default_rng(seed)
    low_rank = rng.standard_normal((*lead, size, size, 4)) @ (rng.standard_normal((4, channels)) * 3)
    return np.moveaxis(low_rank, -1, -3).astype("float32")


def test_components_are_those_of_an_independent_svd():
    values = features(1)
    found = compute_pca(values, n_components=4, as_rgb=False)
    samples = np.moveaxis(values[0], 0, -1).reshape(-1, 16).astype(float)
    u, s, _ = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)
    expected = (u * s)[:, :4].reshape(8, 8, 4)
    expected *= np.sign((expected * found).sum(axis=(0, 1)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_colours_span_the_range_once():
    rgb = compute_pca(features(1))
    assert rgb.shape == (8, 8, 3)
    assert rgb.dtype == np.uint8
    assert (rgb.min(), rgb.max()) == (0, 255)
    assert not compute_pca(np.ones((1, 16, 8, 8), "float32")).any()  # nothing to see, and no division by zero


def test_equal_planes_of_a_stack_get_equal_colours():
    stack = np.stack([features(1), features(1, seed=1) * 5, features(1)])
    rgb = compute_pca(stack)
    assert rgb.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(rgb[0], rgb[2])
    alone = compute_pca(stack[:1])[0]
    assert np.abs(alone.astype(int) - rgb[0]).max() > 20  # the range is that of the stack


@pytest.mark.parametrize("shape", [(16, 8, 8), (2, 3, 16, 8, 8), (2, 1, 1, 16, 8, 8)])
def test_wrong_shapes_and_component_numbers(shape):
    with pytest.raises(InvalidInputError, match="must have the shape"):
        compute_pca(np.zeros(shape))
    with pytest.raises(InvalidInputError, match="n_components=3, but got 2"):
        compute_pca(features(1), n_components=2)
    with pytest.raises(InvalidInputError, match="1 to 16"):
        compute_pca(features(1), n_components=17, as_rgb=False)


@pytest.mark.parametrize(
    ("shape", "grid", "scale"),
    [
        ((100, 130), (49, 64), (2.0408, 2.03125)),
        ((130, 100), (64, 49), (2.03125, 2.0408)),
        ((64, 64), (64, 64), (1, 1)),
    ],
)
def test_padding_is_cut_off(shape, grid, scale):
    embeddings = {"features": features(1, size=64), "original_size": shape, "input_size": (1, 1)}
    values, found = project_embeddings_for_visualization(embeddings)
    assert values.shape == (*grid, 3)
    np.testing.assert_allclose(found, scale, atol=1e-4)
    embeddings["features"] = features(2, 1, size=64)
    values, found = project_embeddings_for_visualization(embeddings)
    assert values.shape == (2, *grid, 3)
    np.testing.assert_allclose(found, (1, *scale), atol=1e-4)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("shape", [(100, 130), (2, 100, 130)])
def test_tiles_become_a_mosaic(tmp_path, shape, on_disk):
    predictor, image = small_predictor(size=256), example(shape)
    image[..., 65:] //= 16
    options = {"tile_shape": (64, 64), "halo": (8, 8), "normalization": "image", "verbose": False}
    path = tmp_path / "e.zarr" if on_disk else None
    tiled = precompute_image_embeddings(predictor, image, path, ndim=len(shape), **options)
    values, scale = project_embeddings_for_visualization(tiled)
    assert values.ndim == len(shape) + 1
    assert values.dtype == np.uint8
    np.testing.assert_allclose(np.array(values.shape[:-1]) * scale, shape)
    np.testing.assert_allclose(scale[-2:], (5, 5), rtol=0.05)  # 80 pixels with halo on 16
    # The dark right side looks different from the left one.
    middle = round(65 / scale[-1])
    left, right = (values[..., columns, :].mean(axis=tuple(range(len(shape)))) for columns in
                   (slice(2, middle - 2), slice(middle + 2, -2)))
    assert np.abs(left - right).max() > 10


@pytest.mark.parametrize("shape", [(100, 130), (3, 100, 130)])
def test_tiles_left_out_by_a_mask_stay_black(shape):
    predictor, image, mask = small_predictor(), example(shape), np.zeros(shape, dtype=bool)
    mask[..., :40, :40] = True  # the first tile of six
    if len(shape) == 3:
        mask[1] = False
    options = {"tile_shape": (64, 64), "halo": (8, 8), "verbose": False, "ndim": len(shape)}
    embeddings = precompute_image_embeddings(predictor, image, mask=mask, **options)
    values, scale = project_embeddings_for_visualization(embeddings)
    rows, columns = round(64 / scale[-2]), round(64 / scale[-1])
    inside = values[..., :rows, :columns, :]
    assert inside.any()
    assert not values[..., rows:, :, :].any()
    assert not values[..., columns:, :].any()
    if len(shape) == 3:
        assert not values[1].any()
    raw, _ = project_embeddings_for_visualization(embeddings, as_rgb=False)
    assert np.isnan(raw[..., rows:, :, :]).all()
    nothing = precompute_image_embeddings(predictor, image, mask=np.zeros(shape), **options)
    values, scale = project_embeddings_for_visualization(nothing)
    assert not values.any()
    np.testing.assert_allclose(np.array(values.shape[:-1]) * scale, shape)
