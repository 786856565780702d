"""Labels in the formats of other programs: what is written is read back the same, by us and by other readers."""

import contextlib
import datetime
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools.coco import COCO
from roifile import ROI_OPTIONS, ROI_SUBTYPE, ROI_TYPE, ImagejRoi, roiread, roiwrite
from skimage.draw import disk, polygon2mask
from test_image import ome_zarr

from micro_sam.core.errors import (
    ImageReadError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    OutputExistsError,
)
from micro_sam.core.output import write_labels as write_plain
from micro_sam.interchange import (
    FORMATS,
    LabelImage,
    fill_rings,
    format_table,
    read_labels,
    trace_parts,
    write_coco_dataset,
    write_labels,
)
from micro_sam.interchange.formats import format_to_read

DATA = Path(__file__).parent / "data"
WRITABLE = [(row.name, row.suffix) for row in FORMATS if row.writable]
each_format = pytest.mark.parametrize(("name", "suffix"), WRITABLE, ids=[name for name, _ in WRITABLE])
# Few ids on few pixels: holes, islands in holes, parts that touch at corners only.
planes = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2))


def scene(ids=(1, 7, 8, 300)):
    """A disk with a hole that holds another object, an object in two parts, and pixels that touch at a corner."""
    labels = np.zeros((40, 56), dtype=np.int64)
    labels[disk((14, 14), 12)] = ids[0]
    labels[disk((14, 14), 7)] = 0
    labels[disk((13, 15), 3)] = ids[1]
    labels[3:9, 30:40] = labels[30:39, 33:56] = ids[2]
    for k in range(4):
        labels[34 + k, 3 + k] = ids[3]
    return labels


STACK = np.stack([scene(), np.zeros((40, 56), np.int64), scene((7, 300, 8, 9))])
CASES = {
    "plane": LabelImage(scene()),
    "empty": LabelImage(np.zeros((5, 3), np.uint8)),
    "all one object": LabelImage(np.full((4, 6), 5)),
    "one pixel": LabelImage(np.ones((1, 1), np.uint8)),
    "uint32": LabelImage(scene((1, 65536, 2**32 - 1, 70000))),
    "uint64": LabelImage(scene((1, 2, 2**53 + 1, 3)).astype(np.uint64)),
    "names, classes, scale": LabelImage(
        scene(), names={1: "Zelle: ä/b\\c=\n2 \U0001f9ec", 8: "7"}, classes={1: "tumour", 7: "stroma: α", 8: "tumour"},
        scale=(0.5, 0.25), units=("micrometer", "micrometer"),
    ),
    "volume": LabelImage(STACK, names={9: "last"}, scale=(2, 0.5, 0.5), units=(None, "micrometer", "micrometer")),
    "one plane": LabelImage(STACK[:1]),
    "time": LabelImage(STACK, "TYX", classes={8: "a"}, scale=(30, 1, 1), units=("second", None, None)),
}


def assert_same(found: LabelImage, expected: LabelImage):
    np.testing.assert_array_equal(found.labels, expected.labels)
    for name in ("axes", "names", "classes", "scale", "units"):
        assert getattr(found, name) == getattr(expected, name), name


# --- outlines ---


@settings(max_examples=150, deadline=None)
@given(planes)
def test_outlines_are_valid_polygons_that_fill_the_same_pixels(plane):
    parts = trace_parts(plane)
    polygons = [shapely.Polygon(part.rings[0], part.rings[1:]) for part in parts]
    assert all(polygon.is_valid for polygon in polygons)
    # QuPath reads each object as one multipolygon.
    for label in np.unique(plane[plane > 0]):
        whole = shapely.MultiPolygon([p for p, part in zip(polygons, parts) if part.label == label])
        assert whole.is_valid
        y, x = np.indices(plane.shape) + 0.5
        np.testing.assert_array_equal(shapely.contains_xy(whole, y, x), plane == label)
    rings = [ring for part in parts for ring in part.rings]
    owners, pixels = fill_rings(rings, [n for n, part in enumerate(parts) for _ in part.rings], plane.shape)
    assert len(np.unique(pixels)) == len(pixels)
    filled = np.zeros(plane.size, np.uint8)
    filled[pixels] = np.array([part.label for part in parts], np.uint8)[owners]
    np.testing.assert_array_equal(filled.reshape(plane.shape), plane)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_drawn_by_hand_take_the_pixels_whose_centres_are_inside(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = rng.uniform(2, 18, (12, 1))
    ring = rng.uniform(5, 25, 2) + radii * np.stack([np.sin(angles), np.cos(angles)], axis=1)  # partly outside
    mask = np.zeros(30 * 20, bool)
    mask[fill_rings([ring], [0], (30, 20))[1]] = True
    y, x = np.indices((30, 20)) + 0.5
    np.testing.assert_array_equal(mask.reshape(30, 20), shapely.contains_xy(shapely.Polygon(ring), y, x))


@pytest.mark.parametrize("side", [1, 1023, 1024, 1025, 2049])
def test_outlines_across_the_bands_of_rows(side):
    part, = trace_parts(np.ones((side, 3), np.uint8))
    assert part.rings[0].tolist() == [[0, 0], [0, 3], [side, 3], [side, 0]], "four corners, clockwise on the screen"


def test_no_step_looks_at_the_whole_image_for_each_object(tmp_path):
    y, x = np.indices((1600, 1600)) % 40 - 20
    cells = (np.indices((1600, 1600)) // 40 * np.array([40, 1])[:, None, None]).sum(axis=0) + 1
    labels = np.where(y**2 + x**2 < 60, cells, 0)
    start = time.process_time()
    for name, suffix in (("imagej", ".zip"), ("geojson", ".geojson"), ("coco", ".json")):
        path = write_labels(tmp_path / f"a{suffix}", labels, name)
        assert len(read_labels(path, name).ids) == 1600
    assert time.process_time() - start < 6, "it takes 2 s; an image-sized mask per object takes 15 s or more"


def test_noise_in_one_object_is_not_quadratic():
    noise = np.random.default_rng(0).random((400, 400)) < 0.7
    start = time.process_time()
    trace_parts(noise.astype(np.uint8))
    assert time.process_time() - start < 4, "it takes 1 s"


# --- round trips ---


@each_format
@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path, name, suffix, case):
    image = CASES[case]
    path = write_labels(tmp_path / f"a{suffix}", image, name)
    assert format_to_read(path).name == name
    assert_same(read_labels(path), image)
    assert os.listdir(tmp_path) == [f"a{suffix}"], "temporary files are left"


@settings(max_examples=40, deadline=None)
@given(planes, st.sampled_from([w for w in WRITABLE if w[0] not in ("tif", "ome-zarr")]))
def test_round_trip_of_anything(tmp_path_factory, plane, form):
    name, suffix = form
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    assert_same(read_labels(write_labels(path, plane, name)), LabelImage(plane))


@each_format
def test_nothing_is_replaced_silently(tmp_path, name, suffix):
    path = tmp_path / f"a{suffix}"
    write_labels(path, scene(), name)
    before = os.stat(path).st_mtime_ns
    write_labels(path, scene(), name)
    assert os.stat(path).st_mtime_ns == before, "the same again is nothing to do"
    for other in (LabelImage(scene((2, 7, 8, 300))), LabelImage(scene(), scale=(2, 2)), CASES["names, classes, scale"]):
        with pytest.raises(OutputExistsError, match="holds something else.*--overwrite"):
            write_labels(path, other, name)
    assert_same(read_labels(path), CASES["plane"])
    write_labels(path, other, name, overwrite=True)
    assert_same(read_labels(path), other)


@pytest.mark.parametrize("content", [b"", b"text", b"{}", b"[1]", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + 18 * b"\0"])
@pytest.mark.parametrize("name", ["a.zip", "a.roi", "a.geojson", "a.json", "a_seg.npy", "a.tif"])
def test_damaged_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=name):
        read_labels(path)
    if name != "a_seg.npy" and name != "a.roi":
        with pytest.raises(OutputExistsError):
            write_labels(path, scene(), "coco" if name == "a.json" else None)
        assert path.read_bytes() == content


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ImagejRoi, "tobytes", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="no space left"):
        write_labels(tmp_path / "a.zip", scene())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": {99: "x"}}, "names has entries for 1 ids that the labels do not have: 99"),
        ({"axes": "TYX"}, "axes must be one of .* fit the shape"),
        ({"scale": (1, 2, 3)}, "scale must have one entry per axis"),
        ({"scale": (1, -2)}, "scale must be positive"),
        ({"format": "imagj"}, "Did you mean 'imagej'"),
        ({"format": "cellpose"}, "only read"),
        ({"format": "geojson"}, "suffix .* is not that of the format geojson"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        write_labels(tmp_path / "a.tif", scene(), **arguments)
    assert os.listdir(tmp_path) == []


def test_wrong_labels(tmp_path):
    with pytest.raises(InvalidTypeError, match="integer dtype"):
        write_labels(tmp_path / "a.zip", scene() * 1.0)
    with pytest.raises(InvalidInputError, match="negative"):
        write_labels(tmp_path / "a.zip", -scene())
    with pytest.raises(InvalidInputError, match="one time point, or channel, at a time"):
        write_labels(tmp_path / "a.zip", np.ones((2, 2, 2, 2), int))
    with pytest.raises(MissingFileError):
        read_labels(tmp_path / "a.zip")


def test_names_of_outputs(tmp_path):
    assert write_labels(tmp_path / "a.1", scene(), "imagej").name == "a.1.zip"
    for name in ("a.json", "a.png", "a"):
        with pytest.raises(InvalidInputError, match="--to"):
            write_labels(tmp_path / name, scene())


# --- label images ---


def test_labels_of_this_package_and_of_imagej(tmp_path):
    write_plain(tmp_path / "ours.tif", scene(), {"model": "vit_t_lite"})  # as segmentation and annotators write them
    tifffile.imwrite(tmp_path / "float.tif", scene().astype(np.float32), imagej=True, resolution=(4, 2))
    np.testing.assert_array_equal(read_labels(tmp_path / "ours.tif").labels, scene())
    image = read_labels(tmp_path / "float.tif")
    np.testing.assert_array_equal(image.labels, scene())
    assert image.scale == (0.5, 0.25)
    np.testing.assert_array_equal(read_labels(DATA / "nuclei_labels.tif").labels,
                                  tifffile.imread(DATA / "nuclei_labels.tif"))
    tifffile.imwrite(tmp_path / "float.tif", scene() + 0.5)
    for path, message in ((tmp_path / "float.tif", "no integers"), (DATA / "tissue_rgb.png", "with channels")):
        with pytest.raises(InvalidInputError, match=message):
            read_labels(path)


def test_tif_is_read_by_others(tmp_path):
    path = write_labels(tmp_path / "a.tif", CASES["volume"])
    np.testing.assert_array_equal(tifffile.imread(path), STACK)


# --- ImageJ ---


def fill_like_imagej(roi, shape):
    """Even-odd filling by the reader of roifile and the polygons of scikit-image."""
    mask = np.zeros(shape, bool)
    for ring in roi.coordinates(multi=True):
        mask ^= polygon2mask(shape, ring[:, ::-1] - 0.5)
    return mask


def test_imagej_rois_by_another_reader(tmp_path):
    image = CASES["names, classes, scale"]
    rois = roiread(write_labels(tmp_path / "a.zip", image))
    assert [roi.properties["micro_sam_label"] for roi in rois] == [1, 7, 8, 300]
    assert [roi.name for roi in rois] == ["0001 Zelle_ ä_b_c=_2 _", "0007", "0008 7", "0300"]
    assert [roi.group for roi in rois] == [2, 1, 2, 0]
    assert [roi.composite for roi in rois] == [True, False, True, True]
    for roi in rois:
        np.testing.assert_array_equal(
            fill_like_imagej(roi, image.labels.shape), image.labels == roi.properties["micro_sam_label"]
        )
        box = np.argwhere(image.labels == roi.properties["micro_sam_label"])
        assert [roi.top, roi.left] == box.min(axis=0).tolist()
        assert [roi.bottom, roi.right] == (box.max(axis=0) + 1).tolist()
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    assert len(set(names)) == 4
    assert not any(set(name) & set('/\\:*?"<>|\n') for name in names)


@pytest.mark.parametrize("axes", ["ZYX", "TYX"])
def test_imagej_rois_know_their_plane(tmp_path, axes):
    rois = roiread(write_labels(tmp_path / "a.zip", LabelImage(STACK, axes)))
    assert {roi.position for roi in rois} == {1, 3}
    along, other = ("t_position", "z_position") if axes == "TYX" else ("z_position", "t_position")
    assert all(getattr(roi, along) == roi.position and getattr(roi, other) == 0 for roi in rois)
    # The zip as ImageJ saves it anew: without our note, under new names.
    rois[0].name = "my cell"
    roiwrite(tmp_path / "b.zip", rois)
    with pytest.raises(InvalidInputError, match="how large the image is.*--like.*--shape"):
        read_labels(tmp_path / "b.zip")
    image = read_labels(tmp_path / "b.zip", like=np.zeros((3, 40, 56), np.uint8), axes=axes)
    assert_same(image, LabelImage(STACK, axes, names={1: "my cell"}))
    assert read_labels(tmp_path / "b.zip", shape=STACK.shape).axes == axes
    with pytest.raises(InvalidInputError, match="several planes or frames.*--axes"):
        read_labels(tmp_path / "b.zip", shape=(40, 56))
    with pytest.warns(UserWarning, match="b.zip") as caught:
        read_labels(tmp_path / "b.zip", shape=(2, 40, 56), axes=axes)
    assert "4 outlines are in planes that the image, with 2, does not have" in str(caught[0].message)
    assert "1 objects have no pixel" in str(caught[1].message)


def test_imagej_rois_far_out(tmp_path):
    labels = np.zeros((2, 70_000), np.uint8)
    labels[:, 40_000:40_010], labels[0, 69_990:] = 1, 2
    path = write_labels(tmp_path / "a.zip", labels)
    assert_same(read_labels(path), LabelImage(labels))
    np.testing.assert_array_equal(roiread(path)[0].coordinates().max(axis=0), [40_010, 2])


def test_rois_drawn_in_imagej(tmp_path):
    """All kinds of ROIs; where they overlap, the smaller is on top."""
    curve = np.array([0, 30, 20, 3, 30, 25.5, 25.5, 30, 20, 30, 3, 14.5, 30, 10, 25.5, 10, 20, 4], np.float32)
    square = [[2.5, 20], [8.6, 20], [8.6, 26], [2.5, 26]]
    rois = {
        "box": ImagejRoi(roitype=ROI_TYPE.RECT, top=0, left=0, bottom=12, right=18, group=3),
        "round box": ImagejRoi(roitype=ROI_TYPE.RECT, top=1, left=30, bottom=3, right=33, rounded_rect_arc_size=2),
        "oval": ImagejRoi(roitype=ROI_TYPE.OVAL, top=2, left=4, bottom=11, right=12),
        "subpixel": ImagejRoi.frompoints(square),
        "curve": ImagejRoi(roitype=ROI_TYPE.RECT, multi_coordinates=curve, shape_roi_size=len(curve), position=1),
        "line": ImagejRoi(roitype=ROI_TYPE.LINE, x1=1, y1=1, x2=5, y2=9),
        "text": ImagejRoi(roitype=ROI_TYPE.RECT, subtype=ROI_SUBTYPE.TEXT, bottom=9, right=9),
        "spline": ImagejRoi.frompoints([[36, 2], [39, 2], [39, 9]]),
    }
    rois["spline"].options |= ROI_OPTIONS.SPLINE_FIT
    for name, roi in rois.items():
        roi.name = name
    roiwrite(tmp_path / "a.zip", rois.values())
    with pytest.warns(UserWarning, match="a.zip") as caught:
        image = read_labels(tmp_path / "a.zip", shape=(40, 40))
    text = "\n".join(str(w.message) for w in caught)
    oval = ((np.indices((40, 40)) + 0.5 - np.array([6.5, 8])[:, None, None]) / np.array([4.5, 4])[:, None, None])
    oval = (oval**2).sum(axis=0) < 1
    for expected in (
        "2 ROIs are points, lines, texts or images", "1 rectangles have round corners", "1 outlines are splines",
        f"{oval.sum()} pixels belong to several objects",
    ):
        assert expected in text
    ids = {name: label for label, name in image.names.items()}
    assert list(ids) == ["box", "round box", "oval", "subpixel", "curve", "spline"]
    assert image.classes == {ids["box"]: "group 3"}
    np.testing.assert_array_equal(image.labels == ids["oval"], oval)
    assert (image.labels == ids["box"]).sum() == 12 * 18 - oval.sum()
    np.testing.assert_array_equal(
        image.labels == ids["subpixel"], polygon2mask((40, 40), np.array(square)[:, ::-1] - 0.5)
    )
    # Half a disk of Bézier curves, whose radius is 10 in one direction: the analytic area is close to a half ellipse.
    assert abs((image.labels == ids["curve"]).sum() - np.pi * 10 * 10 / 2) < 0.1 * np.pi * 50
    roi = ImagejRoi(roitype=ROI_TYPE.RECT, bottom=2, right=3, name="alone")
    roi.tofile(tmp_path / "a.roi")
    assert read_labels(tmp_path / "a.roi", shape=(4, 4)).names == {1: "alone"}
    with pytest.warns(UserWarning, match="1 outlines name no plane and were painted into all of them"):
        assert read_labels(tmp_path / "a.roi", shape=(3, 4, 4)).labels.sum() == 18
    ImagejRoi(roitype=ROI_TYPE.RECT, top=50, left=50, bottom=60, right=60).tofile(tmp_path / "b.roi")
    with pytest.raises(InvalidInputError, match="None of the 1 objects .* has a pixel"):
        read_labels(tmp_path / "b.roi", shape=(4, 4))


def test_object_under_others_is_lost_with_a_warning(tmp_path):
    columns = {"whole": (0, 4), "left": (0, 2), "right": (2, 4)}
    roiwrite(tmp_path / "a.zip", [
        ImagejRoi(roitype=ROI_TYPE.RECT, left=left, bottom=4, right=right, name=name)
        for name, (left, right) in columns.items()
    ])
    with pytest.warns(UserWarning, match="a.zip") as caught:
        assert read_labels(tmp_path / "a.zip", shape=(4, 4)).names == {2: "left", 3: "right"}
    text = "\n".join(str(w.message) for w in caught)
    assert "1 objects have no pixel in the image or are hidden" in text
    assert "16 pixels belong to several objects" in text


# --- GeoJSON ---


def test_geojson_by_another_reader(tmp_path):
    image = LabelImage(STACK, classes={7: "tumour"}, names={8: "x"})
    content = json.loads(write_labels(tmp_path / "a.geojson", image).read_text())
    assert content["type"] == "FeatureCollection"
    features = content["features"]
    assert len({f["id"] for f in features}) == len(features) == 8
    y, x = np.indices((40, 56)) + 0.5
    for feature in features:
        geometry, properties = shapely.geometry.shape(feature["geometry"]), feature["properties"]
        label, z = int(properties["metadata"]["micro_sam label"]), feature["geometry"]["plane"]["z"]
        assert geometry.is_valid
        np.testing.assert_array_equal(shapely.contains_xy(geometry, x, y), STACK[z] == label)
        assert properties.get("name") == image.names.get(label)
        assert properties.get("classification", {}).get("name") == image.classes.get(label)
        assert feature["geometry"]["plane"]["t"] == 0
    kinds = {f["properties"]["metadata"]["micro_sam label"]: f["geometry"]["type"] for f in features[:4]}
    assert kinds == {"1": "Polygon", "7": "Polygon", "8": "MultiPolygon", "300": "MultiPolygon"}


def test_objects_drawn_in_qupath(tmp_path):
    def feature(coordinates, kind="Polygon", properties=None, **members):
        return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates},
                "properties": {"objectType": "annotation", **(properties or {})}, **members}

    box = [[0.2, 0], [6, 0], [6, 5], [0.2, 5], [0.2, 0]]
    hole = [[2, 1], [4, 1], [4, 3], [2, 3], [2, 1]]
    features = [
        feature([box, hole], properties={"name": "A", "classification": {"names": ["Tumor", "Positive"]}}),
        feature([[[10, 0], [12, 0], [12, 2], [10, 2], [10, 0]]], nucleusGeometry={"type": "Polygon"}),
        feature([1, 2], "Point"),
    ]
    collection = {"type": "GeometryCollection", "geometries": [features[1]["geometry"]]}
    path = tmp_path / "a.json"
    for content in (
        {"type": "FeatureCollection", "features": features}, features,
        [*features[::2], {"type": "Feature", "geometry": collection, "nucleusGeometry": {}, "properties": None}],
    ):
        path.write_text(json.dumps(content, indent=2))
        assert format_to_read(path).name == "geojson"
        with pytest.warns(UserWarning, match="a.json") as caught:
            image = read_labels(path, shape=(8, 14))
        assert {str(w.message).split(": ")[1] for w in caught} == {
            "1 points and lines have no area and were left out.",
            "1 cells have a nucleus of their own, which was left out.",
        }
        expected = np.zeros((8, 14), int)
        expected[:5, :6], expected[1:3, 2:4], expected[:2, 10:12] = 1, 0, 2
        assert_same(image, LabelImage(expected, names={1: "A"}, classes={1: "Tumor: Positive"}))


# --- COCO ---


def open_coco(path):
    with contextlib.redirect_stdout(None):
        return COCO(path)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_coco_by_another_reader(tmp_path):
    first = LabelImage(scene(), classes={1: "tumour", 7: "stroma"})
    path = write_coco_dataset(tmp_path / "a.json", iter([("a.png", first), ("b.png", STACK[2, :, :50])]))
    coco = open_coco(path)
    assert {c["name"] for c in coco.dataset["categories"]} == {"stroma", "tumour", "object"}
    for image_id, labels in ((1, first.labels), (2, STACK[2, :, :50])):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert len(annotations) == 4
        for annotation in annotations:
            mask = labels == annotation["label"]
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            y, x = np.nonzero(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    assert_same(read_labels(path, key="a.png"), first)
    np.testing.assert_array_equal(read_labels(path, key="b.png").labels, STACK[2, :, :50])
    with pytest.raises(ImageReadError, match="2 images. Choose one with key.*a.png, b.png"):
        read_labels(path)
    with pytest.raises(InvalidInputError, match="shape .40, 56., but .3, 3. was asked for"):
        read_labels(path, key="a.png", shape=(3, 3))
    with pytest.raises(InvalidInputError, match="Two images of a dataset have the name x"):
        write_coco_dataset(tmp_path / "b.json", [("x", scene()), ("x", scene())])
    with pytest.raises(OutputExistsError):
        write_coco_dataset(path, [("a.png", first)])


def test_coco_of_others(tmp_path):
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 10, "height": 6}],
        "categories": [{"id": 3, "name": "cell", "supercategory": "object"}],
        "annotations": [
            {"id": 11, "segmentation": [[0, 0, 4, 0, 4, 3, 0, 3], [6, 0, 8, 0, 8, 2, 6, 2]]},
            {"id": 12, "segmentation": {"size": [6, 10], "counts": [27, 2, 31]}},
            {"id": 13, "bbox": [0, 0, 2, 2]},
        ],
    }
    for annotation in content["annotations"]:
        annotation.update(image_id=5, category_id=3)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    expected = np.zeros((6, 10), int)
    expected[:3, :4], expected[:2, 6:8], expected[3:5, 4] = 11, 11, 12
    with pytest.warns(UserWarning, match="1 annotations have no segmentation"):
        assert_same(read_labels(path), LabelImage(expected, classes={11: "cell", 12: "cell"}))
    content["annotations"][1]["segmentation"]["counts"] = [27, 2, 32]
    path.write_text(json.dumps(content))
    with pytest.raises(ImageReadError, match="run lengths of annotation 12 do not fit"):
        read_labels(path)


# --- OME-Zarr ---


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_inside_an_ome_zarr_image(tmp_path, version):
    path = ome_zarr(tmp_path / "a.ome.zarr", np.ones((3, 40, 56), np.uint8), "tyx", version)
    image = CASES["time"]
    target = write_labels(path, image, name="cells")
    assert target == path / "labels" / "cells"
    write_labels(path, image, name="cells")
    assert_same(read_labels(path), image)
    assert_same(read_labels(target), image)
    with pytest.raises(OutputExistsError, match="cells exists"):
        write_labels(path, scene(), name="cells")
    write_labels(path, scene(), name="other")
    assert_same(read_labels(path, key="cells"), image)
    with pytest.raises(ImageReadError, match="2 sets of labels. Choose one with key.*cells, other"):
        read_labels(path)
    attributes = dict(zarr.open_group(target, mode="r").attrs)
    metadata = attributes["ome"] if version == "0.5" else attributes
    assert metadata["multiscales"][0]["axes"] == [
        {"name": "t", "type": "time", "unit": "second"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"},
    ]
    assert metadata["image-label"]["properties"] == [{"label-value": 8, "class": "a"}]
    assert metadata["image-label"]["source"] == {"image": "../../"}
    assert "version" in (metadata if version == "0.5" else metadata["multiscales"][0])
    assert zarr.open_array(path / "0", mode="r")[:].min() == 1, "the image itself is unchanged"


# --- Cellpose ---


def test_cellpose(tmp_path):
    path = tmp_path / "a_seg.npy"
    content = {
        "masks": scene().astype(np.uint16), "outlines": scene().astype(np.uint16), "filename": "a.png",
        "flows": [np.zeros((2, 3), np.float32), [], None], "ismanual": np.zeros(4, bool), "est_diam": np.float64(3.0),
        "manual_changes": [[datetime.datetime(2024, 1, 1), "added mask", [0]]],
    }
    np.save(path, content)
    assert format_to_read(path).name == "cellpose"
    assert_same(read_labels(path), LabelImage(scene()))
    np.save(path, {**content, "masks": STACK.astype(np.int32)})
    assert_same(read_labels(path), LabelImage(STACK))
    np.save(path, {**content, "masks": None})
    with pytest.raises(ImageReadError, match="holds no masks"):
        read_labels(path)


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["masks", "filename"])
def test_cellpose_file_runs_no_code(tmp_path, place):
    np.save(tmp_path / "a_seg.npy", {"masks": scene(), place: _Attack(tmp_path / "attacked")})
    with pytest.raises(ImageReadError, match="Nothing of it was run"):
        read_labels(tmp_path / "a_seg.npy")
    assert not (tmp_path / "attacked").exists()
    np.load(tmp_path / "a_seg.npy", allow_pickle=True)
    assert (tmp_path / "attacked").exists(), "the attack itself works"


def test_documentation_has_the_table_of_formats():
    page = (Path(__file__).parent.parent / "doc" / "interchange.md").read_text(encoding="utf-8")
    assert format_table() in page
