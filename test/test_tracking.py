"""Tracking: forests, linking, gaps, filters and the workflow, on small movies that are drawn here."""

import itertools
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import zarr
from skimage.draw import disk, ellipse
from skimage.measure import regionprops

from micro_sam.core.errors import InvalidInputError, InvalidTypeError, ModelError, OutputExistsError, UnsupportedError
from micro_sam.core.progress import Step, drain
from micro_sam.segmentation.ais import InstanceSegmentationWithDecoder
from micro_sam.tracking import workflow
from micro_sam.tracking.ctc import read_ctc
from micro_sam.tracking.lineage import (
    Track,
    TrackForest,
    forest_from_lineages,
    forest_from_links,
    track_extents,
)
from micro_sam.tracking.linking import get_linker
from micro_sam.tracking.motile_linker import LinkWeights, link_costs
from micro_sam.tracking.objects import FrameObjects, find_objects, find_overlaps, scan_steps
from micro_sam.tracking.workflow import (
    automatic_tracking_implementation,
    get_napari_track_data,
    track_across_frames,
    tracking_steps,
)

SHAPE = (64, 80)


def _draw(frames, shape=SHAPE, dtype=np.uint16):
    """Draw disks: for each frame a dictionary from label to (y, x, radius)."""
    out = np.zeros((len(frames), *shape), dtype=dtype)
    for t, objects in enumerate(frames):
        for label, (y, x, radius) in objects.items():
            out[t][disk((y, x), radius, shape=shape)] = label
    return out


@pytest.fixture
def movie():
    """Three cells in six frames, with other labels in each frame; the first one divides after frame 2."""
    frames, names = [], []
    for t in range(6):
        if t < 3:
            cells = {"mother": (16 + t, 16, 8)}
        else:
            cells = {"a": (14 + t, 9 - t, 5.6), "b": (20 + t, 17 + t, 5.6)}
        cells |= {"c": (45, 20 + 2 * t, 7), "d": (40 - t, 60, 6)}
        labels = np.random.default_rng(t).permutation(20)[:len(cells)] + 1
        frames.append({int(i): cell for i, cell in zip(labels, cells.values())})
        names.append({name: int(i) for i, name in zip(labels, cells)})
    return _draw(frames), names


def _track(segmentation, *args, tracking_model="motile", **kwargs):
    return track_across_frames(
        np.zeros(segmentation.shape, dtype=np.uint8), segmentation, *args, tracking_model=tracking_model,
        verbose=False, **kwargs,
    )


def _ids(tracks, segmentation, t, label):
    ids = np.unique(tracks[t][segmentation[t] == label])
    assert len(ids) == 1
    return int(ids[0])


# Forests

@pytest.mark.parametrize(("tracks", "message"), [
    ([(1, 0, 1), (1, 2, 3)], "unique"),
    ([(0, 0, 1)], "positive"),
    ([(1, 3, 2)], "from frame 3"),
    ([(1, -1, 2)], "from frame -1"),
    ([(1, 0, 1, 5)], "no such track"),
    ([(1, 0, 1, 1)], "begins in frame 0"),
    ([(1, 0, 3), (2, 3, 4, 1)], "must end before"),
    ([(1, 4, 5, 2), (2, 2, 3, 1)], "must end before"),
])
def test_no_forest_is_refused(tracks, message):
    with pytest.raises(InvalidInputError, match=message):
        TrackForest(Track(*row) for row in tracks)


@pytest.mark.parametrize("seed", range(5))
def test_random_links_become_the_tracks_that_networkx_finds(seed):
    rng = np.random.default_rng(seed)
    objects = [
        FrameObjects(np.sort(rng.permutation(50)[:n] + 1), np.zeros((n, 2)), np.ones(n, dtype=int))
        for n in rng.integers(0, 8, 12)
    ]
    graph = nx.DiGraph()
    for t, frame in enumerate(objects):
        graph.add_nodes_from((t, int(label)) for label in frame.labels)
        earlier = [n for n in graph if t - 2 <= n[0] < t]
        for label in frame.labels if earlier else []:
            if rng.random() < 0.8:
                graph.add_edge(earlier[rng.integers(len(earlier))], (t, int(label)))
    links = [list(graph.edges)[k] for k in rng.permutation(graph.number_of_edges())]
    forest, lookup = forest_from_links(objects, links)

    # 02-W32: direction comes from the links, not from the order of ids or sets.
    chains = graph.edge_subgraph([e for e in graph.edges if graph.out_degree(e[0]) == 1]).copy()
    chains.add_nodes_from(graph)
    expected = {frozenset(c) for c in nx.weakly_connected_components(chains)}
    found: dict[int, set] = {}
    for t, mapping in enumerate(lookup):
        for label, i in mapping.items():
            found.setdefault(i, set()).add((t, label))
    assert {frozenset(nodes) for nodes in found.values()} == expected
    assert set(found) == set(forest) == set(range(1, len(found) + 1))
    parents = {lookup[b[0]][b[1]]: lookup[a[0]][a[1]] for a, b in graph.edges if graph.out_degree(a) > 1}
    assert {t.id: t.parent for t in forest.values() if t.parent} == parents
    for i, nodes in found.items():
        assert (forest[i].first, forest[i].last) == (min(nodes)[0], max(nodes)[0])
    assert len(forest.lineages()) == nx.number_weakly_connected_components(graph)
    extents = {t.id: (t.first, t.last) for t in forest.values()}
    assert forest_from_lineages(forest.lineages(), extents) == forest


def test_links_that_make_no_forest_are_refused():
    objects = [FrameObjects(np.array([1, 2]), np.zeros((2, 2)), np.ones(2)) for _ in range(3)]
    with pytest.raises(InvalidInputError, match="two predecessors"):
        forest_from_links(objects, [((0, 1), (1, 1)), ((0, 2), (1, 1))])
    with pytest.raises(InvalidInputError, match="later frame"):
        forest_from_links(objects, [((1, 1), (1, 2))])
    with pytest.raises(InvalidInputError, match="later frame"):
        forest_from_links(objects, [((0, 1), (1, 3))])
    with pytest.raises(InvalidInputError, match="two parents"):
        forest_from_lineages([{1: [3]}, {2: [3]}], {1: (0, 0), 2: (0, 0), 3: (1, 1)})


def test_lineages_and_removal():
    forest = TrackForest([Track(9, 0, 1), Track(16, 2, 4, 9), Track(10, 2, 3, 9), Track(11, 4, 5, 10), Track(4, 0, 0)])
    assert forest.lineages() == [{4: []}, {9: [10, 16], 10: [11], 16: [], 11: []}]
    # 02-W33: children of a track that was left out dangle nowhere and get no other parent.
    assert forest.without([10]).lineages() == [{4: []}, {9: [16], 16: []}, {11: []}]
    assert forest.without(list(forest)).lineages() == []
    with pytest.raises(AttributeError):
        forest[9].parent = 3


# Objects

def test_objects_and_overlaps_match_skimage(cells_labels):
    first, second = cells_labels, np.roll(cells_labels, (3, 5), (0, 1))
    objects = find_objects(first)
    props = regionprops(first)
    np.testing.assert_array_equal(objects.labels, [p.label for p in props])
    np.testing.assert_array_equal(objects.areas, [p.area for p in props])
    np.testing.assert_allclose(objects.centroids, [p.centroid for p in props])
    table = np.zeros((first.max() + 1, second.max() + 1), dtype=int)
    np.add.at(table, (first, second), 1)
    overlaps = find_overlaps(first, second, objects, find_objects(second))
    found = np.zeros_like(table)
    found[objects.labels[overlaps.first], find_objects(second).labels[overlaps.second]] = overlaps.counts
    np.testing.assert_array_equal(found[1:, 1:], table[1:, 1:])
    assert (found[0] == 0).all()


# Linking and the workflow

@pytest.mark.parametrize("mode", ["greedy", "ilp"])
def test_movement_and_division_are_found(mode, movie):
    segmentation, names = movie
    before = segmentation.copy()
    tracks, lineages = _track(segmentation, mode=mode)
    np.testing.assert_array_equal(segmentation, before)
    np.testing.assert_array_equal(tracks > 0, segmentation > 0)
    ids = {name: {_ids(tracks, segmentation, t, frame[name]) for t, frame in enumerate(names) if name in frame}
           for name in ("mother", "a", "b", "c", "d")}
    assert all(len(i) == 1 for i in ids.values())
    mother, a, b, c, d = (i.pop() for i in ids.values())
    assert sorted(map(sorted, (tree.items() for tree in lineages))) == sorted(map(sorted, [
        {mother: sorted([a, b]), a: [], b: []}.items(), {c: []}.items(), {d: []}.items()
    ]))
    again, lineages_again = _track(segmentation, mode=mode)
    np.testing.assert_array_equal(again, tracks)
    assert lineages_again == lineages


@pytest.mark.parametrize(("seed", "mode"), [(0, "greedy"), (1, "greedy"), (2, "ilp"), (3, "greedy_nodiv")])
def test_links_are_the_cheapest_of_all(seed, mode):
    rng = np.random.default_rng(seed)
    segmentation = np.zeros((2, 40, 40), dtype=np.uint8)
    for t, n in ((0, 4), (1, 5)):
        for label in range(1, n + 1):
            segmentation[t][disk(rng.uniform(8, 32, 2), rng.uniform(3, 8))] = label
    scan = drain(scan_steps(segmentation), verbose=False)
    weights = LinkWeights()
    i, j, cost, extra = link_costs(*scan.objects, scan.overlaps[0], weights)
    assert len(i)
    limit = 1 if mode == "greedy_nodiv" else 2
    options = [[None, *np.flatnonzero(j == k)] for k in range(len(scan.objects[1]))]
    totals = []
    for choice in itertools.product(*options):
        edges = [e for e in choice if e is not None]
        children = np.bincount(i[edges], minlength=len(scan.objects[0])) if edges else np.zeros(1)
        if children.max() <= limit:
            totals.append(sum(cost[e] + extra[e] * (children[i[e]] > 1) for e in edges))
    links = drain(get_linker("motile", mode).link_steps(segmentation, segmentation, scan), verbose=False)
    labels = [objects.labels.tolist() for objects in scan.objects]
    position = {(labels[0][a], labels[1][b]): e for e, (a, b) in enumerate(zip(i, j))}
    edges = [position[a[1], b[1]] for a, b in links]
    children = np.bincount(i[edges], minlength=len(scan.objects[0]))
    assert sum(cost[e] + extra[e] * (children[i[e]] > 1) for e in edges) == pytest.approx(min(totals), abs=1e-4)


def test_without_divisions_a_daughter_is_a_new_cell(movie):
    segmentation, _ = movie
    tracks, lineages = _track(segmentation, mode="greedy_nodiv")
    assert all(len(children) == 0 for tree in lineages for children in tree.values())
    assert len(np.unique(tracks)) - 1 == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_dtypes_large_ids_and_lazy_arrays(dtype, movie):
    segmentation, _ = movie
    expected, lineages = _track(segmentation)
    offset = 0 if dtype == np.uint8 else 2**60
    odd = np.where(segmentation > 0, segmentation.astype(dtype) + dtype(offset), dtype(0))
    lazy = zarr.create_array(store={}, shape=odd.shape, dtype=odd.dtype, chunks=(1, *SHAPE))
    lazy[:] = odd
    tracks, found = _track(lazy)
    np.testing.assert_array_equal(tracks, expected)
    assert tracks.dtype == np.uint32
    assert found == lineages


def test_shape_of_cells_plays_no_role():
    # 02-W32: the centroid of a ring lies in the cell that it surrounds, that of a crescent in the background.
    segmentation = np.zeros((3, *SHAPE), dtype=np.uint8)
    for t in range(3):
        segmentation[t][disk((30, 30), 20)] = 1 + t
        segmentation[t][disk((30, 30), 14)] = 0
        segmentation[t][disk((30, 30), 8)] = 9 - t
        segmentation[t][disk((50, 66), 10)] = 20
        segmentation[t][disk((44, 66), 10)] = 0
    tracks, lineages = _track(segmentation)
    assert lineages == [{1: []}, {2: []}, {3: []}]
    for labels in ((1, 2, 3), (9, 8, 7), (20, 20, 20)):
        assert len({_ids(tracks, segmentation, t, label) for t, label in enumerate(labels)}) == 1


def test_a_neighbour_that_appears_is_no_daughter():
    frames = [{1: (30, 20, 8)}, {1: (30, 21, 8)}, {1: (30, 22, 8), 2: (30, 38, 8)}, {1: (30, 22, 8), 2: (30, 38, 8)}]
    _, lineages = _track(_draw(frames))
    assert lineages == [{1: []}, {2: []}]


def test_objects_that_vanish_appear_or_stay_alone_have_their_own_tracks():
    frames = [{1: (10, 10, 5)}, {}, {3: (50, 60, 5)}, {}, {7: (10, 60, 5), 8: (40, 20, 5)}]
    segmentation = _draw(frames)
    tracks, lineages = _track(segmentation)
    assert lineages == [{1: []}, {2: []}, {3: []}, {4: []}]
    np.testing.assert_array_equal(tracks > 0, segmentation > 0)


@pytest.mark.parametrize("n_frames", [1, 4])
def test_no_objects_and_one_frame(n_frames, caplog, tmp_path):
    # 02-W14
    empty = np.zeros((n_frames, 16, 16), dtype=np.uint16)
    tracks, lineages = _track(empty, 1, 2, output_folder=tmp_path / "out")
    assert lineages == []
    assert tracks.shape == empty.shape
    assert not tracks.any()
    assert "no objects" in caplog.text
    assert read_ctc(tmp_path / "out")[1] == TrackForest()
    data, graph = get_napari_track_data(empty, [])
    assert data.shape == (0, 4)
    assert graph == {}


def test_wrong_input_is_named():
    images, labels = np.zeros((3, 8, 8)), np.zeros((3, 8, 8), dtype=int)
    with pytest.raises(InvalidInputError, match=r"\(T, Y, X\)"):
        track_across_frames(images[0], labels[0], tracking_model="motile")
    with pytest.raises(InvalidInputError, match="time series"):
        track_across_frames(images[:2], labels, tracking_model="motile")
    with pytest.raises(InvalidTypeError, match="integer"):
        track_across_frames(images, labels.astype(float), tracking_model="motile")
    with pytest.raises(InvalidInputError, match="negative"):
        track_across_frames(images, labels - 1, tracking_model="motile", verbose=False)
    with pytest.raises(InvalidInputError, match="gap_closing"):
        track_across_frames(images, labels, gap_closing=-1, tracking_model="motile")
    with pytest.raises(InvalidInputError, match="min_time_extent"):
        track_across_frames(images, labels, min_time_extent=1.5, tracking_model="motile")


# Gaps and short tracks

def test_gap_of_two_touching_cells_is_filled_for_each():
    # 02-W30: closing of the whole foreground would glue them together.
    cells = {1: (30, 20, 8), 2: (30, 36, 8)}
    segmentation = _draw([cells, cells, {}, cells, cells])
    assert len(_track(segmentation)[1]) == 4
    tracks, lineages = _track(segmentation, 1)
    assert lineages == [{1: []}, {2: []}]
    np.testing.assert_array_equal(tracks[2], tracks[1])
    np.testing.assert_array_equal(tracks[0], segmentation[0])


def test_gap_of_a_moving_cell_next_to_one_that_stays():
    frames = [{1: (30, 12 + 4 * t, 7), 2: (30, 60, 8)} for t in range(7)]
    full = _draw(frames)
    for missing in ([3], [2, 3]):
        segmentation = full.copy()
        for t in missing:
            segmentation[t][segmentation[t] == 1] = 0
        tracks, lineages = _track(segmentation, 1)
        assert lineages == [{1: []}, {2: []}]
        for t in missing:
            expected = full[t] == 1
            iou = (expected & (tracks[t] == 1)).sum() / (expected | (tracks[t] == 1)).sum()
            assert iou > 0.9
    # Three frames are more than twice one iteration.
    segmentation = full.copy()
    for t in (2, 3, 4):
        segmentation[t][segmentation[t] == 1] = 0
    assert len(_track(segmentation, 1)[1]) == 3
    assert len(_track(segmentation, 2)[1]) == 2


def test_filling_takes_no_pixel_of_others():
    still = {1: (30, 20, 8)}
    segmentation = _draw([still, {2: (30, 29, 6)}, still])
    segmentation[1][:, :24] = 0
    tracks, _ = _track(segmentation, 1)
    other = segmentation[1] == 2
    assert len(np.unique(tracks[1][other])) == 1
    assert (tracks[1][~other] != tracks[1][other][0]).all()
    assert (tracks[1] == tracks[0][30, 20]).sum() > 100


def test_short_tracks_are_dropped_before_writing(movie, tmp_path):
    # 02-W33, 02-W36: frames count, not extent; what is written is what is returned.
    segmentation, names = movie
    segmentation = segmentation.copy()
    segmentation[:, :3, :3][[1, 4]] = 50  # two specks, which are not linked
    for t in range(4, 6):
        segmentation[t][segmentation[t] == names[t]["b"]] = 0
    everything, lineages = _track(segmentation)
    assert len(lineages) == 5
    tracks, lineages = _track(segmentation, min_time_extent=2, output_folder=tmp_path / "out")
    mother, a = (_ids(tracks, segmentation, t, names[t][name]) for t, name in ((0, "mother"), (3, "a")))
    assert {mother: [a], a: []} in lineages
    assert {i for tree in lineages for i in tree} == set(np.unique(tracks)) - {0}
    assert not tracks[3][segmentation[3] == names[3]["b"]].any()
    assert not tracks[:, :3, :3].any()
    kept = tracks > 0
    np.testing.assert_array_equal(tracks[kept], everything[kept])
    written, forest = read_ctc(tmp_path / "out")
    np.testing.assert_array_equal(written, tracks)
    assert forest.lineages() == lineages
    assert forest_from_lineages(lineages, track_extents(find_objects(f) for f in tracks)) == forest
    assert _track(segmentation, min_time_extent=7)[1] == []


# Choice of the linker

@pytest.fixture
def trackastra(monkeypatch, tmp_path):
    """A stand-in for trackastra, with an empty cache; it links each object to the nearest one."""
    import platformdirs

    calls = []

    class Model:
        @classmethod
        def from_folder(cls, folder, device=None):
            calls.append((folder, device))
            return cls()

        def track(self, images, labels, mode, progbar_class):
            calls.append((images, labels, mode))
            list(progbar_class(range(2)))
            graph = nx.DiGraph()
            for t, frame in enumerate(labels):
                for p in regionprops(frame):
                    graph.add_node(graph.number_of_nodes(), time=t, label=p.label, coords=p.centroid)
            for n, data in list(graph.nodes.items()):
                before = [m for m, d in graph.nodes.items() if d["time"] == data["time"] - 1]
                if before:
                    distances = [np.linalg.norm(np.subtract(graph.nodes[m]["coords"], data["coords"])) for m in before]
                    graph.add_edge(before[int(np.argmin(distances))], n)
            return graph, labels

    for name in ("trackastra", "trackastra.model"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.Trackastra = Model
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda name: str(tmp_path / "cache" / name))
    return SimpleNamespace(calls=calls, cache=tmp_path / "cache" / "trackastra" / "models")


def _place_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.yaml", "train_config.yaml", "model.pt"):
        (folder / name).write_text("x")
    return folder


def test_trackastra_is_used_where_its_model_is(trackastra, movie, caplog):
    segmentation, names = movie
    folder = _place_model(trackastra.cache / "general_2d")
    images = np.random.default_rng(0).random((*segmentation.shape, 3)).astype(np.float32)
    large = np.where(segmentation > 0, segmentation.astype(np.uint64) + 2**60, 0).astype(np.uint64)
    tracks, lineages = track_across_frames(images, large, verbose=False, device="cpu")
    (found, device), (seen, labels, mode) = trackastra.calls
    assert (found, device, mode) == (folder, "cpu", "greedy")
    np.testing.assert_allclose(seen, images.mean(axis=-1))
    np.testing.assert_array_equal(labels > 0, segmentation > 0)
    assert labels.max() == 4
    mother, a, b = (_ids(tracks, segmentation, t, names[t][n]) for t, n in ((0, "mother"), (3, "a"), (3, "b")))
    assert {mother: sorted([a, b]), a: [], b: []} in lineages
    assert "motile" not in caplog.text
    # 02-W33: the folder of a model is a model.
    other = _place_model(trackastra.cache.parent / "mine")
    assert get_linker(str(other), "greedy").folder == get_linker(other, "greedy").folder == other


def test_models_are_checked_before_anything_is_computed(trackastra, movie, monkeypatch, tiny_predictor, tiny_decoder):
    # 02-W33: an empty folder is no model, and nothing is computed before that is known.
    monkeypatch.setattr(workflow, "slices_steps", lambda *args, **kwargs: pytest.fail("computed too early"))
    segmenter = InstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder)
    (trackastra.cache / "ctc").mkdir(parents=True)
    with pytest.raises(ModelError, match="model.pt") as error:
        automatic_tracking_implementation(movie[0], tiny_predictor, segmenter, tracking_model="ctc")
    assert str(trackastra.cache / "ctc") in str(error.value)
    with pytest.raises(ModelError, match="missing"):
        get_linker(trackastra.cache / "nothing", "greedy")
    with pytest.raises(UnsupportedError, match="trackastra-pretrained-feats"):
        get_linker("general_2d_w_SAM2_features", "greedy")


def test_without_trackastra_a_linker_is_chosen_and_said(monkeypatch, movie, caplog):
    monkeypatch.setitem(sys.modules, "trackastra", None)
    with caplog.at_level(logging.WARNING, "micro_sam"):
        tracks, _ = _track(movie[0], tracking_model="general_2d")
    assert "motile" in caplog.text
    assert "trackastra" in caplog.text
    np.testing.assert_array_equal(tracks, _track(movie[0])[0])
    with pytest.raises(RuntimeError, match="pip install trackastra"):
        get_linker("ctc", "greedy")


def test_unknown_names_and_modes():
    with pytest.raises(InvalidInputError, match="motile"):
        get_linker("motle", "greedy")
    with pytest.raises(InvalidInputError, match="greedy_nodiv"):
        get_linker("motile", "greedy_no_div")
    with pytest.raises(InvalidInputError, match="no tracking model or folder None"):
        get_linker(None, "greedy")


# Segmentation and tracking, output, progress

@pytest.fixture
def images(cells_image):
    return np.stack([np.roll(cells_image, 3 * t, axis=1) for t in range(3)])


def test_automatic_tracking_segments_each_frame_and_links(images, tiny_predictor, tiny_decoder, tmp_path):
    segmenter = InstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder)
    options = {"center_distance_threshold": 0.5, "boundary_distance_threshold": 0.5, "min_size": 10}
    before, shown = images.copy(), []
    tracks, lineages, embeddings = automatic_tracking_implementation(
        images, tiny_predictor, segmenter, tmp_path / "e.zarr", gap_closing=1, min_time_extent=1,
        tracking_model="motile", return_embeddings=True, batch_size=2, output_folder=tmp_path / "out",
        pbar_init=lambda total, text: shown.append(text), pbar_update=lambda n: None, **options,
    )
    np.testing.assert_array_equal(images, before)
    segmentation = []
    for t in range(3):
        segmenter.initialize(images[t], embeddings, i=t)
        segmentation.append(segmenter.generate(**options))
    expected, expected_lineages = _track(np.stack(segmentation), 1, 1)
    assert expected.any()
    np.testing.assert_array_equal(tracks, expected)
    assert lineages == expected_lineages
    np.testing.assert_array_equal(read_ctc(tmp_path / "out")[0], tracks)
    assert "Segment slices" in shown
    assert len(shown) == len(set(shown))  # one bar per phase, not one per frame
    with pytest.raises(OutputExistsError):
        automatic_tracking_implementation(
            images, tiny_predictor, segmenter, tracking_model="motile", output_folder=tmp_path / "out"
        )
    with pytest.raises(InvalidInputError, match="min_sise"):
        automatic_tracking_implementation(images, tiny_predictor, segmenter, tracking_model="motile", min_sise=3)
    with pytest.raises(InvalidInputError, match="tile_shape"):
        automatic_tracking_implementation(
            images, tiny_predictor, segmenter, tracking_model="motile", tile_shape=(64, 64)
        )


def test_progress_and_cancelling(movie, tmp_path):
    segmentation, _ = movie
    linker = get_linker("motile", "greedy")
    steps = list(tracking_steps(segmentation, segmentation, linker, output_folder=tmp_path / "a"))
    for text in {s.text for s in steps}:
        phase = [s for s in steps if s.text == text]
        assert phase[0].done == 0
        assert phase[-1].done == phase[-1].total
        assert [s.done for s in phase] == sorted(s.done for s in phase)
    for n in range(len(steps)):
        generator = tracking_steps(segmentation, segmentation, linker, output_folder=tmp_path / "b")
        for _ in range(n):
            assert isinstance(next(generator), Step)
        generator.close()
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert len(drain(scan_steps(segmentation), verbose=False).overlaps) == len(segmentation) - 1


def test_napari_tracks_match_skimage():
    forest = TrackForest([Track(300, 0, 1), Track(2, 2, 4, 300), Track(7, 2, 2, 300), Track(5, 0, 4)])
    segmentation = np.zeros((5, *SHAPE), dtype=np.int32)
    for n, track in enumerate(forest.values()):
        for t in range(track.first, track.last + 1):
            segmentation[t][ellipse(15 + 30 * (n % 2), 18 + 40 * (n // 2) + t, 9, 5)] = track.id
    expected = sorted((p.label, t, *p.centroid) for t in range(5) for p in regionprops(segmentation[t]))
    for n_threads in (None, 1, 3):
        data, graph = get_napari_track_data(segmentation, forest.lineages(), n_threads)
        np.testing.assert_allclose(data, expected)
        assert graph == {2: [300], 7: [300]}
    # Tracks without objects must not be in the graph: napari refuses them.
    segmentation[segmentation == 300] = 0
    assert get_napari_track_data(segmentation, forest)[1] == {}
