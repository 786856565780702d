"""Tables of measurements: against brute force on whole arrays."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from skimage.measure import regionprops

from micro_sam import measurements
from micro_sam.core.errors import InvalidInputError, InvalidTypeError, OutputExistsError, UnsupportedError
from micro_sam.core.lazy_array import LazyArray
from micro_sam.measurements import measure_objects, measure_tracks, object_measurement_steps, write_table

SHAPES = {2: (60, 75), 3: (12, 40, 30)}


def blobs(shape, seed=0):
    """Objects with gaps between their ids, one of a single pixel, some at the borders and some not connected."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2)
    labels = 3 * ndimage.label(values > np.quantile(values, 0.6))[0].astype("uint16")
    labels[labels == labels.max()] = 3
    labels[(0,) * len(shape)] = 5
    return labels


def picture(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 4000, shape).astype("uint16")


def brute_force(labels, image, scale):
    """Measurements of whole arrays, object by object, as dictionaries."""
    scale, ndim = np.array(scale), labels.ndim
    for i in np.unique(labels[labels > 0]):
        mask = labels == i
        pixels = np.argwhere(mask)
        points = pixels * scale
        size = len(pixels) * scale.prod()
        variances = np.sort(np.linalg.eigvalsh(np.cov(points.T, bias=True)))[::-1] if len(pixels) > 1 else [0] * ndim
        row = {"label": i, "n_pixels": len(pixels), "area" if ndim == 2 else "volume": size}
        if ndim == 2:
            major, minor = 4 * np.sqrt(np.abs(variances))
            row["eccentricity"] = np.sqrt(1 - minor**2 / major**2) if major else 0
            row["equivalent_diameter"] = 2 * np.sqrt(size / np.pi)
        else:
            major, minor = (np.sqrt(max(0, 20 * v)) for v in (variances[0], variances[2]))
            row["equivalent_diameter"] = 2 * (3 * size / (4 * np.pi)) ** (1 / 3)
        row |= {"axis_major_length": major, "axis_minor_length": minor}
        for k, axis in enumerate("zyx"[-ndim:]):
            row[f"centroid_{axis}"] = points[:, k].mean()
            row[f"bbox_{axis}0"], row[f"bbox_{axis}1"] = pixels[:, k].min(), pixels[:, k].max() + 1
        if image is not None:
            values = image[mask].astype("float64")
            names = [""] if image.ndim == ndim else [f"_{c}" for c in range(image.shape[-1])]
            for what in ("mean", "min", "max", "std"):
                found = np.atleast_1d(getattr(values, what)(axis=0))
                row |= {f"intensity_{what}{name}": v for name, v in zip(names, found)}
        yield row


def assert_rows(table, rows):
    rows = pd.DataFrame(rows)
    assert len(table) == len(rows)
    for name in rows:
        np.testing.assert_allclose(table[name], rows[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("channels", [None, 0, 3])
@pytest.mark.parametrize("scale", [None, (0.25, 0.25, 0.25), (2.0, 0.5, 0.3)])
def test_equals_brute_force(ndim, channels, scale):
    labels = blobs(SHAPES[ndim])
    image = None if channels is None else picture(labels.shape + (channels,) * (channels > 0))
    before = labels.copy()
    scale = scale and scale[-ndim:]
    table = measure_objects(labels, image, scale=scale, unit=scale and "um", verbose=False)
    assert_rows(table, brute_force(labels, image, scale or [1] * ndim))
    assert (table["unit"] == ("um" if scale else "px")).all()
    assert table["label"].dtype == table["bbox_x0"].dtype == np.int64
    np.testing.assert_array_equal(labels, before)
    square = len(set(scale or [1])) == 1
    assert ("perimeter" in table) == (ndim == 2 and square)
    if ndim == 2:
        props = regionprops(labels)
        np.testing.assert_allclose(table["solidity"], [p.solidity for p in props])
        if square:
            factor = scale[0] if scale else 1
            np.testing.assert_allclose(table["perimeter"], [factor * p.perimeter for p in props])


def test_columns_are_those_of_the_documentation():
    labels = blobs(SHAPES[2])
    image = picture((*SHAPES[2], 2))
    table = measure_objects(labels, image, channel_names=["dapi", "gfp"], verbose=False)
    assert list(table) == [
        "label", "n_pixels", "area", "equivalent_diameter", "axis_major_length", "axis_minor_length", "eccentricity",
        "solidity", "perimeter", "centroid_y", "centroid_x", "bbox_y0", "bbox_x0", "bbox_y1", "bbox_x1",
        "intensity_mean_dapi", "intensity_mean_gfp", "intensity_min_dapi", "intensity_min_gfp", "intensity_max_dapi",
        "intensity_max_gfp", "intensity_std_dapi", "intensity_std_gfp", "unit",
    ]
    table = measure_tracks(labels[None], verbose=False, properties=[])
    assert list(table) == [
        "track", "frame", "time", "parent", "generation", "first_frame", "last_frame", "n_frames", "displacement",
        "speed", "n_pixels", "area", "centroid_y", "centroid_x", "bbox_y0", "bbox_x0", "bbox_y1", "bbox_x1", "unit",
        "time_unit",
    ]
    assert all(f"`{name}`" in measurements.__doc__ for name in table)


@pytest.mark.parametrize("ndim", [2, 3])
def test_lazy_arrays_are_read_in_slabs(ndim, monkeypatch):
    image = picture(SHAPES[ndim])
    blocks = np.ravel_multi_index(np.indices(image.shape) // 5, (20,) * ndim) + 1
    labels = np.where(image % 3, blocks, 0)
    labels[:, 3] = 9000  # deeper than the cache
    expected = measure_objects(labels, image, verbose=False)
    layer = labels[0].nbytes
    image = image.astype(labels.dtype)
    monkeypatch.setattr(measurements, "_SLAB_BYTES", 2 * layer)
    monkeypatch.setattr(measurements, "_CACHE_BYTES", 6 * layer)
    reads = []

    def lazy(array):
        def read(key):
            reads.append(array[key].size)
            return array[key]
        return LazyArray(read, array.shape, array.dtype, "array", (2, *array.shape[1:]))

    table = measure_objects(lazy(labels), lazy(image), verbose=False)
    pd.testing.assert_frame_equal(table, expected)
    assert max(reads) <= labels[:2].size


def test_slabs_are_read_once_if_they_fit():
    labels, reads = blobs(SHAPES[3]), []
    lazy = LazyArray(lambda key: reads.append(key) or labels[key], labels.shape, labels.dtype, "labels", (5, 40, 30))
    measure_objects(lazy, verbose=False)
    assert len(reads) == 1


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "int64"])
def test_any_integer_dtype_and_sparse_ids(dtype):
    labels = np.zeros((6, 7), dtype=dtype)
    labels[1:3, 2:5] = np.iinfo(dtype).max // 3 if dtype != "bool" else True
    table = measure_objects(labels, np.ones((6, 7), dtype="float16"), verbose=False)
    assert table["label"].tolist() == [int(labels.max())]
    assert table["n_pixels"].tolist() == [6]
    assert table["intensity_mean"].tolist() == [1]


def test_no_objects_give_an_empty_table_with_all_columns():  # 02-W14
    labels = blobs(SHAPES[2])
    image = picture((*SHAPES[2], 2))
    full, empty = (measure_objects(la, image, verbose=False) for la in (labels, labels * 0))
    assert len(empty) == 0
    pd.testing.assert_series_equal(empty.dtypes, full.dtypes)
    full, empty = (measure_tracks(la[None], image[None], verbose=False) for la in (labels, labels * 0))
    assert len(empty) == 0
    pd.testing.assert_series_equal(empty.dtypes, full.dtypes)


def test_properties_on_request():
    cube = np.zeros((9, 9, 9), dtype="uint8")
    cube[2:7, 2:7, 2:7] = 1
    cube[4:, 4:, 4:] = 0
    cube[0, 0, 0] = 2
    table = measure_objects(cube, properties=["solidity"], verbose=False)
    assert table["solidity"][0] == pytest.approx(regionprops(cube)[0].solidity)
    assert 0.5 < table["solidity"][0] < 1
    assert np.isnan(table["solidity"][1])  # flat
    assert "axis_major_length" not in table
    with pytest.raises(InvalidInputError, match="no 'eccentricity'"):
        measure_objects(cube, properties=["eccentricity"], verbose=False)
    with pytest.raises(InvalidInputError, match="square"):
        measure_objects(cube[2], properties=["perimeter"], scale=(1, 2), unit="um", verbose=False)


def moving():
    """Three tracks (T, Y, X): 4 divides into 9 and 2, and 2 misses a frame."""
    frames = np.zeros((6, 40, 40), dtype="uint16")
    for t in range(2):
        frames[t, 10:14, 5 + 3 * t:9 + 3 * t] = 4
    for t in range(2, 6):
        frames[t, 4 * t:4 * t + 3, 10:13] = 9
        if t != 4:
            frames[t, 30:33, 3 * t:3 * t + 5] = 2
    return frames


def test_tracks():
    frames, image = moving(), picture((6, 40, 40))
    before = frames.copy()
    lazy = LazyArray(lambda key: frames[key], frames.shape, frames.dtype, "frames")
    table = measure_tracks(
        lazy, image, [{4: [9, 2], 9: [], 2: []}, {77: []}], scale=(5, 0.5, 0.5), unit="um", time_unit="min",
        verbose=False,
    )
    assert list(zip(table["track"], table["frame"])) == [
        (2, 2), (2, 3), (2, 5), (4, 0), (4, 1), (9, 2), (9, 3), (9, 4), (9, 5)
    ]
    np.testing.assert_array_equal(table["time"], table["frame"] * 5)
    assert table["parent"].tolist() == [4, 4, 4, 0, 0, 4, 4, 4, 4]
    assert table["generation"].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1]
    for track, (first, last, n) in {2: (2, 5, 3), 4: (0, 1, 2), 9: (2, 5, 4)}.items():
        rows = table[table["track"] == track]
        assert (rows[["first_frame", "last_frame", "n_frames"]] == [first, last, n]).all(axis=None)
    nan = np.nan
    np.testing.assert_allclose(table["displacement"], [nan, 1.5, 3, nan, 1.5, nan, 2, 2, 2])
    np.testing.assert_allclose(table["speed"], [nan, 0.3, 0.3, nan, 0.3, nan, 0.4, 0.4, 0.4])
    assert set(table["time_unit"]) == {"min"}
    for t in range(6):
        rows = table[table["frame"] == t].rename(columns={"track": "label"}).reset_index()
        assert_rows(rows, brute_force(frames[t], image[t], (0.5, 0.5)))
    np.testing.assert_array_equal(frames, before)


def test_lineages_must_be_trees():
    frames = moving()
    for wrong, text in (([{4: [9]}, {2: [9]}], "two parents"), ([{4: [9], 9: [4]}], "own ancestor"),
                        ({4: [4]}, "own ancestor")):
        with pytest.raises(InvalidInputError, match=text):
            measure_tracks(frames, lineages=wrong, verbose=False)
    table = measure_tracks(frames, lineages={4: [9], 9: [2]}, verbose=False)
    assert table.groupby("track")["generation"].first().to_dict() == {2: 2, 4: 0, 9: 1}
    assert (table["speed"] == table["displacement"] / table.groupby("track")["frame"].diff())[table["speed"] > 0].all()


@pytest.mark.parametrize("arguments", [
    {"image": np.zeros((60, 74))}, {"image": np.zeros((60, 75, 2, 2))}, {"scale": (1, 1)}, {"unit": "um"},
    {"scale": (1, 1, 1), "unit": "um"}, {"scale": (1, 0), "unit": "um"}, {"scale": (1, np.nan), "unit": "um"},
    {"channel_names": ["a"]}, {"image": np.zeros((60, 75)), "channel_names": ["a"]},
    {"image": np.zeros((60, 75, 2)), "channel_names": ["a", "a"]}, {"properties": ["volume"]},
])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(InvalidInputError):
        measure_objects(blobs(SHAPES[2]), **arguments, verbose=False)


def test_wrong_segmentations_are_refused_and_work_can_be_cancelled():
    labels = blobs(SHAPES[2]).astype(int)
    for wrong in (-labels, labels[0], labels[None, None], labels[:0]):
        with pytest.raises(InvalidInputError):
            measure_objects(wrong, verbose=False)
    with pytest.raises(InvalidTypeError):
        measure_objects(labels * 1.0, verbose=False)
    with pytest.raises(InvalidInputError, match="T, Y, X"):
        measure_tracks(labels, verbose=False)
    with pytest.raises(InvalidInputError, match="time_unit"):
        measure_tracks(labels[None], time_unit="s", verbose=False)
    steps = object_measurement_steps(labels)
    texts = [next(steps).text for _ in range(4)]
    assert texts == ["Find objects"] * 2 + ["Measure objects"] * 2
    steps.close()
    assert next(steps, None) is None


def test_csv(tmp_path):
    table = measure_tracks(moving(), scale=(1, 0.1, 0.1), unit="µm", time_unit="min", verbose=False)
    path = write_table(table, tmp_path / "a.b.csv")
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_exact=False)
    with pytest.raises(OutputExistsError):
        write_table(table, path)
    write_table(table[:2], path, overwrite=True)
    assert len(pd.read_csv(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.b.csv"]
    with pytest.raises(InvalidInputError, match=r"\.xlsx"):
        write_table(table, tmp_path / "a.xlsx")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    table = measure_tracks(moving(), scale=(1, 0.1, 0.1), unit="µm", time_unit="min", verbose=False)
    pd.testing.assert_frame_equal(pd.read_parquet(write_table(table, tmp_path / "a.parquet")), table)


def test_parquet_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install pyarrow"):
        write_table(pd.DataFrame(), tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
