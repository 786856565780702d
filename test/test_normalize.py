"""Normalisation of images to uint8 RGB: equal to the arithmetic of the published models, and robust beyond it."""

import numpy as np
import pytest
from embedding_helpers import reference_image

from micro_sam.core.errors import InvalidInputError, InvalidTypeError
from micro_sam.core.normalize import percentile_range, to_image


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", ">u2", "int32", "float16", "float32"])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,)])
def test_equals_the_reference_for_ordinary_images(dtype, channels):
    rng = np.random.default_rng(1)
    ranges = {"bool": [(0, 2)], "float16": [(-3, 900)], "float32": [(0, 1), (-1e3, 6e4)], "int8": [(-128, 128)],
              "int32": [(-70_000, 2**20)]}
    for lo, hi in ranges.get(dtype, [(0, 120), (7, 127), (100, 101)]):
        image = rng.uniform(lo, hi, (37, 41, *channels)).astype(dtype)
        before = image.copy()
        result = to_image(image)
        assert result.dtype == np.uint8
        assert result.shape == (37, 41, 3)
        np.testing.assert_array_equal(result, reference_image(image))
        np.testing.assert_array_equal(image, before)


def test_full_16_bit_range_equals_the_reference():
    image = np.arange(2**16, dtype="uint16").reshape(256, 256)
    np.testing.assert_array_equal(to_image(image), reference_image(image))
    assert to_image(image).max() == 255
    assert to_image(image > 9).max() == 254  # as before: ranges below 2 end at 254


@pytest.mark.parametrize(
    ("scale", "offset", "dtype"),
    [(1, 1e6, "float32"), (1e-8, 0, "float64"), (1e-30, 0, "float32"), (1, 1e12, "float64"), (255, 2**62, "int64"),
     (255, 2**63, "uint64"), (1e38, -5e37, "float32"), (1e300, -1e308, "float64")],
)
def test_large_offsets_and_tiny_ranges_keep_their_grey_levels(scale, offset, dtype):
    levels = np.arange(16).reshape(4, 4)
    if np.dtype(dtype).kind == "f":
        image = (levels * (np.float64(scale) / 15) + np.float64(offset)).astype(dtype)
    else:
        image = levels.astype(dtype) * np.array(scale // 15, dtype) + np.array(offset, dtype)
    result = to_image(image)[..., 0]
    assert len(np.unique(result)) == 16
    assert (result.min(), result.max()) == (0, 255)
    assert np.abs(result - levels * 17.0).max() <= 8  # float32 resolves 1e6 + i/15 to 1/16


def test_constant_channels_become_zero():
    for value in (0, 200, -3.5, 1e30):
        assert not to_image(np.full((5, 6), value)).any()


def test_nan_and_infinity_are_reported_with_their_number():
    image = np.ones((4, 5), dtype="float32")
    image[0, :2], image[1, 0] = np.nan, np.inf
    with pytest.raises(InvalidInputError, match="3 NaN or infinite values of 20.*nan_to_num"):
        to_image(image)
    with np.errstate(over="raise"):
        to_image(np.array([[1e38, 3e38], [3e38, 3e38]], dtype="float32"))  # the sum overflows, the values do not


@pytest.mark.parametrize("shape", [(5,), (2, 5, 6, 3), (5, 6, 0), (0, 4)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(InvalidInputError, match=str(shape[0])):
        to_image(np.zeros(shape))


def test_wrong_dtypes_and_surplus_channels():
    with pytest.raises(InvalidTypeError, match="complex"):
        to_image(np.zeros((4, 4), dtype=complex))
    image = np.random.default_rng(0).integers(0, 99, (8, 9, 5))
    with pytest.warns(UserWarning, match="5 channels"):
        result = to_image(image)
    np.testing.assert_array_equal(result, reference_image(image[..., :3]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_a_fixed_range_clips(dtype):
    image = np.array([[0, 50, 100], [150, 200, 250]], dtype=dtype)
    result = to_image(image, (50, 200))[..., 0]
    np.testing.assert_array_equal(result, [[0, 0, 85], [170, 255, 255]])
    rgb = to_image(np.stack([image] * 3, axis=-1), ([0, 50, 100], [250, 200, 101]))
    np.testing.assert_array_equal(rgb[..., 1], result)
    np.testing.assert_array_equal(rgb[..., 2], [[0, 0, 0], [255, 255, 255]])
    assert not to_image(image, (7, 7)).any()
    for wrong in [(3, 2), (0, np.nan), (1,), "ab", ([1, 2], [3, 4])]:
        with pytest.raises(InvalidInputError, match="range"):
            to_image(np.zeros((3, 3, 3)), wrong)


def test_percentiles_of_pieces_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(100, 20, (400, 300, 2))
    pieces = np.array_split(values, 7)
    lo, hi = percentile_range(iter(pieces), 400 * 300, (1, 99), channels=True)
    expected = np.percentile(values.reshape(-1, 2), (1, 99), axis=0)
    np.testing.assert_allclose([lo, hi], expected, rtol=1e-12)
    lo, hi = percentile_range(iter(pieces), 400 * 300, (1, 99), channels=True, max_samples=5000)
    np.testing.assert_allclose([lo, hi], expected, rtol=0.03)
    with pytest.raises(InvalidInputError, match="percentiles"):
        percentile_range(pieces, 5, (99, 1))
