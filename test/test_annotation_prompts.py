"""Prompts as data, and the table that decides what is segmented because of them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from micro_sam.annotation.prompts import (
    SHAPE_KINDS,
    PointPrompt,
    PromptRefusal,
    Prompts,
    ShapePrompt,
    plan_prompts,
    points_from_arrays,
    points_to_arrays,
    prompted_planes,
    shapes_from_arrays,
    shapes_to_arrays,
)
from micro_sam.core.errors import InvalidInputError
from micro_sam.core.prompts import box_from_mask, points_from_scribbles

SHAPE = (40, 60)


def at(position, plane):
    return position if plane is None else (plane, *position)


def point(y, x, positive=True, plane=None, **options):
    return PointPrompt(at((y, x), plane), positive, **options)


def shape(kind, *vertices, plane=None, **options):
    return ShapePrompt(kind, tuple(at(v, plane) for v in vertices), **options)


def rectangle(y0, x0, y1, x1, plane=None, **options):
    return shape("rectangle", (y0, x0), (y0, x1), (y1, x1), (y1, x0), plane=plane, **options)


def triangle(plane=None, **options):
    return shape("polygon", (5, 5), (5, 25), (25, 5), plane=plane, **options)


def scribble(plane=None, **options):
    return shape("path", (10, 10), (10, 13), (13, 13), plane=plane, **options)


BOX, BOX_2 = rectangle(2.4, 3.6, 12, 21), rectangle(20, 30, 30, 45)
YES, YES_2, NO = point(8, 9), point(25, 35), point(1, 1, False)
TRIANGLE = polygon2mask(SHAPE, [(5, 5), (5, 25), (25, 5)])


def same(found, object_id, points=(), labels=(), box=None, mask=None):
    assert found.object_id == object_id
    np.testing.assert_array_equal(found.points, np.array(points, dtype=float).reshape(-1, 2))
    assert found.points.dtype == float
    assert found.labels.tolist() == list(labels)
    assert found.labels.dtype.kind == "i"
    assert (found.box is None) == (box is None)
    if box is not None:
        assert found.box.tolist() == list(box)
    assert (found.mask is None) == (mask is None)
    if mask is not None:
        assert found.mask.dtype == bool
        np.testing.assert_array_equal(found.mask, mask)


def plan(*prompts, plane=None, **options):
    points = [p for p in prompts if isinstance(p, PointPrompt)]
    shapes = [p for p in prompts if isinstance(p, ShapePrompt)]
    return plan_prompts(Prompts(points, shapes), SHAPE, plane=plane, **options)


def refused(code, message, *prompts, **options):
    with pytest.raises(PromptRefusal, match=message) as info:
        plan(*prompts, **options)
    assert info.value.code == code
    assert isinstance(info.value, InvalidInputError)


# The decision table


def test_points_are_one_object():
    (found,) = plan(YES, NO, YES_2, first_id=7)
    same(found, 7, [(8, 9), (1, 1), (25, 35)], [1, 0, 1])


def test_points_and_one_shape_are_one_object():
    (found,) = plan(YES, NO, BOX)
    same(found, 1, [(8, 9), (1, 1)], [1, 0], [2, 4, 12, 21])
    (found,) = plan(NO, triangle())  # the shape says where the object is
    same(found, 1, [(1, 1)], [0], [5, 5, *(np.argwhere(TRIANGLE).max(axis=0) + 1)], TRIANGLE)


def test_shapes_are_one_object_each_in_an_image():
    found = plan(BOX, triangle(), BOX_2, first_id=3)
    same(found[0], 3, box=[2, 4, 12, 21])
    same(found[1], 4, box=box_from_mask(TRIANGLE), mask=TRIANGLE)
    same(found[2], 5, box=[20, 30, 30, 45])


def test_scribbles_are_points():
    sampled, _ = points_from_scribbles([[(10, 10), (10, 13), (13, 13)]], [1])
    assert len(sampled) == 6
    (found,) = plan(scribble())
    same(found, 1, sampled, [1] * 6)
    line = shape("line", (0, 0), (0, 2), positive=False)
    (found,) = plan(YES, line, BOX, scribble())
    same(found, 1, [(8, 9), (0, 0.5), (0, 1.5), *sampled], [1, 0, 0] + [1] * 6, [2, 4, 12, 21])


def test_batched():  # W12: shapes with masks and negative points
    sampled, _ = points_from_scribbles([scribble().yx], [1])
    no_line = shape("line", (0, 0), (0, 1), positive=False)
    found = plan(BOX, NO, YES, no_line, triangle(), scribble(), YES_2, batched=True, first_id=2)
    no = [(1, 1), (0, 0.5)]
    same(found[0], 2, [(8, 9), *no], [1, 0, 0])
    same(found[1], 3, [(25, 35), *no], [1, 0, 0])
    same(found[2], 4, no, [0, 0], [2, 4, 12, 21])
    same(found[3], 5, no, [0, 0], box_from_mask(TRIANGLE), TRIANGLE)
    assert sorted(map(tuple, found[4].points)) == sorted([*map(tuple, sampled), *no])
    assert found[4].labels.sum() == 6
    assert len(found) == 5
    assert plan(NO, batched=True) == []
    assert plan(NO, no_line, batched=True) == []


@pytest.mark.parametrize("mode", ["3d", "tracking"])
def test_planes_of_stacks(mode):
    prompts = [
        point(8, 9, plane=4.4, track_id=3), point(9, 9, False, plane=3.6, track_id=3), rectangle(2, 3, 12, 20, 4),
        point(7, 7, plane=4), point(6, 6, plane=5, track_id=3),
    ]
    (found,) = plan(*prompts, plane=4, mode=mode, track_id=3, first_id=3)
    same(found, 3, [(8, 9), (9, 9)], [1, 0])
    (found,) = plan(*prompts, plane=4, mode=mode, track_id=1)
    same(found, 1, [(7, 7)], [1], [2, 3, 12, 20])
    (found,) = plan(*prompts, plane=4, mode=mode)
    same(found, 1, [(8, 9), (9, 9), (7, 7)], [1, 0, 1], [2, 3, 12, 20])
    (found,) = plan(point(8, 9, plane=2), triangle(2), scribble(2), plane=2, mode=mode)
    assert found.mask is not None
    assert found.labels.tolist() == [1] * 7


@pytest.mark.parametrize("mode", ["3d", "tracking"])
def test_refusals_in_stacks(mode):
    options = {"mode": mode, "plane": 5}
    no, box = point(1, 1, False, 5), rectangle(2, 3, 12, 20, 5)
    refused("none", "no prompts in plane 5.*box", point(1, 1, plane=4), **options)
    refused("none", "of track 2 in plane 5", point(1, 1, plane=5), track_id=2, **options)
    refused("stop", "negative point.*has ended", no, **options)
    refused("stop", "of track 1 in plane 5", no, point(8, 8, plane=5, track_id=2), track_id=1, **options)
    refused("only_negative", "only negative", no, point(2, 2, False, 5), **options)
    refused("only_negative", "only negative", scribble(5, positive=False), **options)
    refused("only_negative", "only negative", no, scribble(5, positive=False), **options)
    refused("several_shapes", "2 shapes in plane 5.*Remove the others", box, triangle(5), **options)
    refused("several_shapes", "2 shapes", box, triangle(5), point(8, 8, plane=5), **options)
    (found,) = plan(no, box, **options)  # W13: not a stop, since there is a shape
    same(found, 1, [(1, 1)], [0], [2, 3, 12, 20])


def test_several_objects_at_once_in_a_volume_have_the_same_ids_in_all_planes():
    prompts = [
        point(8, 9, plane=4), point(25, 35, plane=6.4), point(1, 1, False, 4), point(2, 2, False, 9),
        point(3, 3, False, 9), rectangle(2, 3, 12, 20, 6), triangle(4),
    ]
    ids = {4: [1, 4], 6: [2, 3]}
    for plane, expected in ids.items():
        found = plan(*prompts, plane=plane, mode="3d", batched=True)
        assert [s.object_id for s in found] == expected
        assert [len(s.points) for s in found] == ([2, 1] if plane == 4 else [1, 0]), "negative ones act in their plane"
    assert plan(*prompts, plane=4, mode="3d", batched=True)[1].mask is not None
    options = {"plane": 9, "mode": "3d", "batched": True}
    refused("only_negative", "only negative prompts in plane 9", *prompts, **options)
    refused("none", "no prompts in plane 8", *prompts, **{**options, "plane": 8})
    refused("stop", "has ended", *prompts[:1], point(1, 1, False, 9), **options)


def test_where_several_objects_at_once_are_refused():
    refused("batched", "Switch off", point(1, 1, plane=5), batched=True, mode="tracking", plane=5)
    refused("batched", "Switch off", point(1, 1, plane=5), batched=True, mode="3d", plane=5, correcting=True)
    boxes = [rectangle(2, 3, 12, 20, 5), triangle(5)]
    refused("several_shapes", "Remove the others, or switch on 'batched'", *boxes, plane=5, mode="3d")
    refused("several_shapes", "Remove the others[.]$", *boxes, plane=5, mode="tracking")


def test_refusals_in_images():
    refused("none", "no prompts in the image.*Place a point")
    refused("only_negative", "only negative prompts in the image", NO)
    refused("only_negative", "only negative", NO, point(2, 2, False))
    refused("several_shapes", "2 shapes in the image.*switch on 'batched'", BOX, BOX_2, YES)
    refused("several_shapes", "batched", BOX, BOX_2, scribble())
    for batched in (False, True):
        refused("negative_shape", "negative rectangle", rectangle(1, 1, 5, 5, positive=False), YES, batched=batched)


def test_correcting_needs_nothing_positive():
    (found,) = plan(NO, correcting=True)
    same(found, 1, [(1, 1)], [0])
    (found,) = plan(point(1, 1, False, 3), plane=3, mode="3d", correcting=True)
    same(found, 1, [(1, 1)], [0])
    refused("none", "no prompts", correcting=True)
    refused("several_shapes", "Remove the others", BOX, BOX_2, correcting=True)
    refused("batched", "being corrected", YES, batched=True, correcting=True)


# Shapes in the plane


def test_shapes_are_clipped():
    (found,) = plan(rectangle(-10, 50, 12.2, 99))
    same(found, 1, box=[0, 50, 12, 60])
    corners = [(-20, -20), (-20, 30), (30, 10)]
    (found,) = plan(shape("polygon", *corners))
    expected = polygon2mask(SHAPE, corners)
    same(found, 1, box=box_from_mask(expected), mask=expected)
    path = [(20, 50), (20, 70)]
    sampled, _ = points_from_scribbles([path], [1])
    (found,) = plan(shape("path", *path))
    same(found, 1, sampled[sampled[:, 1] < 59.5], [1] * 4)


@pytest.mark.parametrize("prompt", [
    rectangle(-10, -10, -1, -1), rectangle(45, 2, 50, 20), rectangle(5, 5, 5, 20), rectangle(-5, -5, 0.2, 10),
    shape("polygon", (50, 50), (50, 60), (70, 60)), shape("polygon", (5, 5), (9, 9)),
    shape("ellipse", (50, 50), (50, 60), (60, 60), (60, 50)), shape("ellipse", (5, 5), (5, 9), (5, 9), (5, 5)),
    shape("path", (50, 5), (60, 5)), point(41, 3), point(3, -0.6, False),
])
def test_prompts_outside_are_refused_with_their_place(prompt):
    where = prompt.position if isinstance(prompt, PointPrompt) else prompt.vertices[0]
    for prompts in ([prompt], [prompt, YES]):
        refused("outside", f"{where[0]:.1f}.*delete it|Delete it", *prompts)


def test_points_on_border_pixels_are_inside():
    (found,) = plan(point(-0.4, 59.4), point(39.5, 0))
    same(found, 1, [(0, 59), (39, 0)], [1, 1])


@pytest.mark.parametrize("angle", [0, 30, 90, 135, 180, 270])
@pytest.mark.parametrize("order", [1, -1])
def test_ellipse(angle, order):
    center, (a, b) = np.array([21.3, 28.6]), (17, 7)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    axes = np.array([[c, s], [-s, c]])  # of length 1
    corners = [center + np.array(k) * (a, b) @ axes for k in ((-1, -1), (1, -1), (1, 1), (-1, 1))][::order]
    (found,) = plan(shape("ellipse", *map(tuple, corners)))
    y, x = np.mgrid[:SHAPE[0], :SHAPE[1]]
    local = (np.stack([y, x], axis=-1) - center) @ axes.T
    distance = (local[..., 0] / a) ** 2 + (local[..., 1] / b) ** 2
    clear = np.abs(distance - 1) > 1e-6
    np.testing.assert_array_equal(found.mask[clear], (distance < 1)[clear])
    assert found.box.tolist() == box_from_mask(found.mask).tolist()


# Planes


def test_one_rounding_rule():  # W14
    for z, plane in [(2.4, 2), (2.5, 2), (2.6, 3), (3.5, 4), (-0.4, 0), (7, 7)]:
        prompts = Prompts((point(1, 1, plane=z),), (rectangle(2, 2, 9, 9, z), scribble(z)))
        assert prompts.planes() == [plane]
        assert prompts.in_plane(plane) == prompts
        assert prompts.without_plane(plane).is_empty
        assert prompts.without_plane(plane + 1) == prompts
        (found,) = plan_prompts(prompts, SHAPE, plane=plane, mode="3d")
        assert found.box.tolist() == [2, 2, 9, 9]
    # Rounding errors do not tear a shape apart.
    s = ShapePrompt("rectangle", ((2.4999, 1, 1), (2.5001, 1, 9), (2.4999, 9, 9), (2.5, 9, 1)))
    assert s.plane == 2


def test_shapes_across_planes_are_never_lost_silently():
    across = ShapePrompt("rectangle", ((2, 1, 5), (2, 9, 5), (8, 9, 5), (8, 1, 5)))
    prompts = Prompts((point(5, 5, plane=4), point(5, 5, plane=9)), (across,))
    assert across.plane is None
    assert prompts.planes() == [4, 9]
    with pytest.raises(PromptRefusal, match="across planes, from 2 to 8.*draw it in plane 4") as info:
        plan_prompts(prompts, SHAPE, plane=4, mode="3d")
    assert info.value.code == "across_planes"
    assert len(plan_prompts(prompts, SHAPE, plane=9, mode="3d")) == 1
    assert "from 2 to 8" in prompted_planes(prompts, 10).ignored[0]


def test_stops():
    no, yes, box = point(1, 1, False, 3), point(2, 2, plane=3), rectangle(2, 2, 9, 9, 3)
    assert Prompts((no,)).is_stop(3)
    assert Prompts((no,)).is_stop(3, track_id=1)
    assert not Prompts((no,)).is_stop(3, track_id=2)
    assert not Prompts((no,)).is_stop(4)
    assert not Prompts((yes,)).is_stop(3)
    assert not Prompts((no, no)).is_stop(3)
    assert not Prompts((no, yes)).is_stop(3)
    assert not Prompts((no,), (box,)).is_stop(3)  # W13
    assert not Prompts((no,), (scribble(3, positive=False),)).is_stop(3)
    assert not Prompts((NO,)).is_stop(None)  # an image knows no stops
    other = point(2, 2, plane=3, track_id=2)
    assert Prompts((no, other)).is_stop(3, track_id=1)
    assert not Prompts((no, other)).is_stop(3)


def stack(yes=(), no=(), boxes=(), track_id=1):
    return Prompts(
        [point(5, 5, plane=z, track_id=track_id) for z in yes]
        + [point(5, 5, False, plane=z, track_id=track_id) for z in no],
        [rectangle(2, 2, 9, 9, z, track_id=track_id) for z in boxes],
    )


@pytest.mark.parametrize(("prompts", "planes", "lower", "upper", "stops", "n_ignored"), [
    (stack([4.2], [], [7.6]), (4, 8), False, False, (), 0),
    (stack([5], [2]), (5,), True, False, (2,), 0),
    (stack([5], [2, 1, 8, 9.4]), (5,), True, True, (1, 2, 8, 9), 0),
    (stack([3, 6], [8, 5]), (3, 6), False, True, (8,), 1),  # between: no stop
    (stack([3], [3, 6], [6]), (3, 6), False, False, (), 0),  # with something else in the plane: no stop
    (stack([3], [5, 5]), (3, 5), False, False, (), 0),
    (stack([0, -1, 12], [-2, 11]), (0,), False, False, (), 4),  # outside of the stack
])
def test_prompted_planes(prompts, planes, lower, upper, stops, n_ignored):
    found = prompted_planes(prompts, 10)
    assert (found.planes, found.stop_lower, found.stop_upper, found.stops) == (planes, lower, upper, stops)
    assert len(found.ignored) == n_ignored
    mixed = Prompts(prompts.points + stack([2], [9], track_id=5).points, prompts.shapes)
    assert prompted_planes(mixed, 10, track_id=1) == found
    assert prompted_planes(mixed, 10, track_id=5).planes == (2,)
    assert prompted_planes(mixed, 10, track_id=5).stops == (9,)


@pytest.mark.parametrize(("prompts", "code", "message"), [
    (Prompts(), "none", "no prompts of track 1. Place"),
    (stack([4], track_id=2), "none", "no prompts of track 1"),
    (stack([], [4, 6]), "stop", "only stops"),  # W13
    (stack([12]), "none", "plane 12 are ignored: the image has the planes 0 to 9"),
])
def test_no_prompted_planes(prompts, code, message):
    with pytest.raises(PromptRefusal, match=message) as info:
        prompted_planes(prompts, 10, track_id=1)
    assert info.value.code == code


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "2d", "plane": 3}, "needs no plane"), ({"mode": "3d"}, "needs a plane"), ({"mode": "4d"}, "mode must be"),
    ({"mode": "tracking", "plane": 3}, "needs 3 coordinates, but the prompts have 2"),
])
def test_mode_and_plane_must_fit(options, message):
    with pytest.raises(InvalidInputError, match=message):
        plan(YES, **options)


# Values

coordinates = st.floats(-1e6, 1e6)


def all_prompts(ndim):
    position = st.tuples(*[coordinates] * ndim)
    points = st.builds(PointPrompt, position, st.booleans(), st.integers(1, 2**40), st.booleans())
    shapes = st.builds(
        ShapePrompt, st.sampled_from(SHAPE_KINDS), st.lists(position, min_size=4, max_size=4).map(tuple), st.booleans(),
        st.integers(1, 9),
    )
    return st.builds(Prompts, st.lists(points, max_size=5), st.lists(shapes, max_size=4))


@given(st.sampled_from([2, 3]).flatmap(all_prompts))
def test_json_round_trip(prompts):
    assert Prompts.from_json(json.loads(json.dumps(prompts.to_json(), allow_nan=False))) == prompts


@given(st.sampled_from([2, 3]).flatmap(lambda n: st.tuples(st.just(n), all_prompts(n))))
def test_array_round_trip(case):
    ndim, prompts = case
    points, shapes = points_to_arrays(prompts.points, ndim), shapes_to_arrays(prompts.shapes)
    assert points.coordinates.shape == (len(prompts.points), ndim)
    assert all(isinstance(t, str) for t in (*points.track_ids, *shapes.track_ids))
    assert Prompts(points_from_arrays(*points), shapes_from_arrays(*shapes)) == prompts


@given(all_prompts(3), st.integers(1, 3))
def test_planes_and_tracks_divide_prompts(prompts, track_id):
    rest = prompts
    for plane in prompts.planes():
        part = prompts.in_plane(plane)
        assert not part.is_empty
        assert part.planes() == [plane]
        assert prompts.in_plane(plane, track_id) == part.of_track(track_id)
        rest = rest.without_plane(plane)
    assert rest == Prompts((), prompts.across_planes())
    assert {p.track_id for p in prompts.of_track(track_id).points} <= {track_id}


def test_values_are_compared_and_hashed_by_content():
    a, b = (Prompts([point(1, 2)], [BOX]) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Prompts([point(1, 2.5)], [BOX])
    assert Prompts().is_empty
    assert not a.is_empty


def test_arrays_of_layers():
    points = points_from_arrays(
        np.array([[1, 2, 3], [4, 5, 6.5]]), np.array(["positive", "negative"]), ["track", "division"], ["10", "2"]
    )
    assert points == (
        PointPrompt((1, 2, 3), True, 10), PointPrompt((4, 5, 6.5), False, 2, division=True)
    )
    assert points_from_arrays([[1, 2]], ["negative"]) == (PointPrompt((1, 2), False),)
    assert points_from_arrays(np.zeros((0, 3)), []) == ()
    assert points_to_arrays(points, 3).track_ids == ["10", "2"]
    vertices = [np.array([[0, 0], [0, 4], [4, 4], [4, 0]]), np.array([[1, 1], [2, 2]])]
    shapes = shapes_from_arrays(vertices, ["ellipse", "path"], positive=["positive", "negative"])
    assert shapes[1] == ShapePrompt("path", ((1, 1), (2, 2)), positive=False)
    assert shapes_from_arrays(vertices, ["ellipse", "path"], ["3", "1"])[0].track_id == 3


@pytest.mark.parametrize(("make", "message"), [
    (lambda: points_from_arrays([[1, 2]], ["yes"]), "'positive' or 'negative'"),
    (lambda: points_from_arrays([[1, 2]], []), "labels for each of the 1 prompts"),
    (lambda: points_from_arrays([[1, 2]], ["positive"], ["gone"]), "'track' or 'division'"),
    (lambda: points_from_arrays([[1, 2]], ["positive"], None, ["nan"]), "track id"),
    (lambda: points_from_arrays([[1, 2]], ["positive"], None, [1.5]), "track id"),
    (lambda: points_from_arrays([[1, np.nan]], ["positive"]), "finite"),
    (lambda: points_from_arrays([[1, 2, 3, 4]], ["positive"]), "two or three"),
    (lambda: shapes_from_arrays([[[1, 2]]], ["blob"]), "must be one of rectangle"),
    (lambda: shapes_from_arrays([[[1, 2]]], ["path"], positive=["no"]), "'positive' or 'negative'"),
    (lambda: shapes_from_arrays([[[1, 2]]], ["path", "path"]), "kinds for each"),
    (lambda: shapes_from_arrays([[[1, 2], [1, 2, 3]]], ["path"]), "equally many"),
    (lambda: shapes_from_arrays([[]], ["path"]), "equally many"),
    (lambda: shapes_from_arrays([[[1, 2], [3, 4]]], ["ellipse"]), "four corners"),
    (lambda: PointPrompt((1, 2), True, 0), "track id"),
    (lambda: Prompts((point(1, 2), point(1, 2, plane=3))), "two coordinates and others three"),
    (lambda: Prompts.from_json({"points": []}), "no prompts"),
    (lambda: Prompts.from_json(None), "no prompts"),
    (lambda: Prompts.from_json({"points": [[[1, 2], 1]], "shapes": []}), "no prompts"),
    (lambda: Prompts.from_json({"points": [["ab", 1, 1, 0]], "shapes": []}), "no prompts"),
])
def test_malformed_values(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
