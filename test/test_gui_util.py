"""The functions on prompt layers that scripts know, with plain layers and with those of an annotator."""

import sys

import numpy as np
import pytest

from micro_sam.annotation.prompts import PromptSet
from micro_sam.annotation.segment import segment_prompt_set
from micro_sam.core.errors import InvalidInputError
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.prompt_based_segmentation import segment_from_box, segment_from_points

pytest.importorskip("qtpy.QtWidgets")
pytestmark = [pytest.mark.gui, pytest.mark.filterwarnings("ignore")]
RECTANGLE = np.array([[10, 20], [10, 60], [50, 60], [50, 20]], float)


@pytest.fixture
def util():
    from micro_sam.sam_annotator import util
    return util


@pytest.fixture
def viewer():
    """Prompts in frames 0 to 3 of two tracks, in layers that belong to no annotator."""
    from napari.components import ViewerModel
    viewer = ViewerModel()
    points = viewer.add_points(
        [[0, 20, 30], [1, 22, 31], [1, 60, 70], [2.4, 5, 5], [1, 90, 90]], name="point_prompts",
        features={"label": ["positive", "positive", "negative", "negative", "positive"],
                  "state": ["track", "division", "track", "track", "track"], "track_id": ["1", "1", "1", "1", "2"]},
    )
    points.feature_defaults = {"label": "positive", "state": "track", "track_id": "1"}
    shapes = viewer.add_shapes(ndim=3, name="prompts")
    for z, kind in ((1, "rectangle"), (1, "ellipse"), (2, "polygon"), (1, "path")):
        shapes.add(np.insert(RECTANGLE, 0, z, axis=1), shape_type=kind)
    viewer.add_labels(np.ones((4, 128, 160), "uint32"), name="current_object")
    return viewer


def test_layers_become_prompts(util, viewer):
    points, shapes = viewer.layers["point_prompts"], viewer.layers["prompts"]
    found, labels = util.point_layer_to_prompts(points, 1)
    np.testing.assert_array_equal(found, [[22, 31], [60, 70], [90, 90]])
    np.testing.assert_array_equal(labels, [1, 0, 1])
    np.testing.assert_array_equal(util.point_layer_to_prompts(points, 1, track_id=2)[0], [[90, 90]])
    assert util.point_layer_to_prompts(points, 2) is None, "a stop; positions are rounded"
    np.testing.assert_array_equal(util.point_layer_to_prompts(points, 2, with_stop_annotation=False)[1], [0])
    boxes, masks = util.shape_layer_to_prompts(shapes, (128, 160), 1)
    np.testing.assert_array_equal(boxes[0], [10, 20, 50, 60])
    assert masks[0] is None
    assert masks[1].sum() == pytest.approx(np.pi * 20 * 20, rel=0.03), "the ellipse in the rectangle"
    assert len(boxes) == len(masks) == 2
    assert util.shape_layer_to_prompts(shapes, (128, 160), 2)[1][0].sum() == pytest.approx(1600, rel=0.06)
    assert [util.prompt_layers_to_state(points, shapes, t) for t in (0, 1, 2)] == ["track", "division", "track"]


def test_labels_are_toggled_and_annotations_cleared(util, viewer):
    points, shapes, labels = (viewer.layers[name] for name in ("point_prompts", "prompts", "current_object"))
    points.selected_data = {0}
    util.toggle_label(points)
    assert points.feature_defaults["label"].iloc[0] == "negative"
    assert points.features["label"].iloc[0] == "positive", "points that were placed stay"
    util.clear_annotations_slice(viewer, 1)
    assert sorted(points.data[:, 0]) == [0, 2.4]
    assert [v[0, 0] for v in shapes.data] == [2]
    assert labels.data.sum((1, 2)).tolist() == [20480, 0, 20480, 20480]
    util.clear_annotations(viewer, clear_segmentations=False)
    assert len(points.data) == len(shapes.data) == 0
    assert labels.data.any()
    util.clear_annotations(viewer)
    assert not labels.data.any()


def test_what_prompts_give(util, tiny_predictor, cells_image):
    embeddings = precompute_image_embeddings(tiny_predictor, cells_image, verbose=False)
    shape, points, ones = cells_image.shape, np.array([[30.0, 40.0], [80.0, 100.0]]), np.ones(2, int)
    box, other = np.array([10, 20, 50, 60]), np.array([60, 80, 100, 130])

    def segment(points, labels, boxes, several=True, **options):
        return util.prompt_segmentation(
            tiny_predictor, points, labels, boxes, [None] * len(boxes), shape, several, embeddings, **options
        )

    expected = segment_from_points(tiny_predictor, points, ones, image_embeddings=embeddings)[0]
    np.testing.assert_array_equal(segment(points, ones, []), expected)
    both = segment([], [], [box, other])
    masks = [segment_from_box(tiny_predictor, b, image_embeddings=embeddings)[0] for b in (box, other)]
    np.testing.assert_array_equal(both, np.where(masks[1], 2, masks[0]))
    assert segment([], [], []) is segment(points, ones, [box, other]) is segment(points, ones * 0, []) is None
    assert segment([], [], [box, other], several=False) is None
    batch = segment(points, np.array([1, 0]), [box], batched=True)
    parts = [PromptSet(1, points, np.array([1, 0])), PromptSet(2, points[1:], np.zeros(1, int), box)]
    masks = [util._pixels(m) + (m.mask,) for m in (
        segment_prompt_set(tiny_predictor, embeddings, None, part, shape).mask for part in parts)]
    by_hand = np.zeros(shape, int)
    for n, (y, x, mask) in enumerate(masks, 1):
        by_hand[y, x][mask] = n
    np.testing.assert_array_equal(batch, by_hand)
    before = np.full(shape, 7, "uint16")
    added = segment(points, ones, [], previous_segmentation=before)
    np.testing.assert_array_equal(added, np.where(expected, 8, 7))
    assert (before == 7).all()
    tiny_predictor.set_image(np.repeat(cells_image[..., None], 3, -1))
    assert util.prompt_segmentation(tiny_predictor, points, ones, [], [], shape, False).any()


def test_slices_and_tracks(util, viewer, tiny_predictor, cells_image):
    points, shapes = viewer.layers["point_prompts"], viewer.layers["prompts"]
    shapes.data = []
    embeddings = precompute_image_embeddings(tiny_predictor, np.stack([cells_image] * 4), ndim=3, verbose=False)
    done = []
    seg, slices, lower, upper = util.segment_slices_with_prompts(
        tiny_predictor, points, shapes, embeddings, (4, *cells_image.shape), track_id=1, update_progress=done.append
    )
    assert (slices.tolist(), lower, upper, sum(done)) == ([0, 1], False, True, 2)
    assert seg[:2].any((1, 2)).all()
    assert not seg[2:].any()
    track, divides = util.track_from_prompts(
        points, shapes, seg, tiny_predictor, slices, embeddings, upper, 0.0, "mask", update_progress=done.append
    )
    assert divides, "there is a division in frame 1"
    np.testing.assert_array_equal(track, seg)
    points.features = points.features.assign(state="track")
    points.data = points.data[[0, 1, 2, 4]]
    options = (tiny_predictor, slices, embeddings, False, 0.0, "mask")
    track, divides = util.track_from_prompts(points, shapes, seg, *options)
    assert not divides
    np.testing.assert_array_equal(track[:2], seg[:2])
    with pytest.raises(InvalidInputError, match="no object"):
        util.track_from_prompts(points, shapes, seg * 0, *options)


def test_the_menu_of_tracks(viewer):
    from napari.qt import get_qapp

    from micro_sam.sam_annotator.annotator_tracking import create_tracking_menu

    app = get_qapp()  # menus need one
    points, shapes = viewer.layers["point_prompts"], viewer.layers["prompts"]
    shapes.features = {"track_id": ["1"] * len(shapes.data)}
    menu = create_tracking_menu(points, shapes, ["track", "division"], ["1", "2"])
    menu["track_id"].value, menu["track_state"].value = "2", "division"
    assert points.feature_defaults.iloc[0].to_dict() == {"label": "positive", "state": "division", "track_id": "2"}
    assert shapes.feature_defaults["track_id"].iloc[0] == "2"
    points.feature_defaults = {"label": "positive", "state": "track", "track_id": "1"}
    assert menu["track_id"].value == "1"
    assert create_tracking_menu(points, shapes, [], ["1", "2", "3"], menu) is menu
    assert menu["track_id"].choices == ("1", "2", "3")
    app.processEvents()


@pytest.mark.parametrize("module", ["annotator_2d", "annotator_3d", "annotator_tracking", "image_series_annotator"])
def test_modules_are_commands(module, monkeypatch, capsys):
    import importlib

    monkeypatch.setattr(sys, "argv", [f"micro_sam.{module}", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"micro_sam.sam_annotator.{module}").main()
    assert end.value.code == 0
    assert f"micro_sam.{module}" in capsys.readouterr().out
