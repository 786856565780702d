"""Tracks in files: round trips of CTC and GEFF, refusals, and a public metric on small cases counted by hand."""

import networkx as nx
import numpy as np
import pytest
import tifffile
import zarr
from ctc_metrics.scripts.evaluate import evaluate_sequence
from geff import read as read_with_geff
from geff import write as write_with_geff

from micro_sam.core.errors import ImageReadError, InvalidInputError, MissingFileError, OutputExistsError
from micro_sam.tracking.ctc import read_ctc, write_ctc, write_ctc_steps
from micro_sam.tracking.geff import read_geff, write_geff, write_geff_steps
from micro_sam.tracking.lineage import Track, TrackForest

FORMATS = {"ctc": (write_ctc, read_ctc), "geff": (write_geff, read_geff)}


def _series(forest, gaps=(), shape=(40, 40)):
    """Paint each track as a square of its own place; `gaps` are (id, frame) where it is missing."""
    n_frames = max((t.last for t in forest.values()), default=2) + 1
    tracks = np.zeros((n_frames, *shape), dtype=np.uint32)
    for n, track in enumerate(forest.values()):
        y, x = 8 * (n // 5), 8 * (n % 5)
        for t in range(track.first, track.last + 1):
            if (track.id, t) not in gaps:
                tracks[t, y:y + 6, x:x + 5 + t % 2] = track.id
    return tracks


@pytest.fixture
def forest():
    """Divisions in two generations, a track of one frame, one with a gap, one with a single child, large ids."""
    return TrackForest([
        Track(1, 0, 1), Track(2, 2, 3, 1), Track(3, 2, 2, 1), Track(7, 4, 5, 2), Track(8, 4, 4, 2), Track(9, 4, 5, 2),
        Track(20, 3, 3), Track(21, 0, 5), Track(30, 0, 2), Track(70000, 4, 5, 30),
    ])


@pytest.fixture
def tracks(forest):
    return _series(forest, gaps={(21, 2), (21, 3)})


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_keeps_divisions_gaps_and_ids(name, forest, tracks, tmp_path):
    write, read = FORMATS[name]
    before = tracks.copy()
    path = write(tmp_path / "out.zarr", tracks, forest)
    np.testing.assert_array_equal(tracks, before)
    found, found_forest = read(path)
    np.testing.assert_array_equal(found, tracks)
    assert found_forest == forest
    assert found_forest.lineages() == forest.lineages()
    # The public lineages carry the same, and lazy labels are read frame by frame.
    lazy = zarr.create_array(store={}, shape=tracks.shape, dtype=tracks.dtype, chunks=(1, 40, 40))
    lazy[:] = tracks
    again, again_forest = read(write(tmp_path / "again.zarr", lazy, forest.lineages()))
    np.testing.assert_array_equal(again, tracks)
    assert again_forest == forest


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("single", [False, True])
def test_round_trip_of_nothing_and_of_one_object(name, single, tmp_path):
    write, read = FORMATS[name]
    forest = TrackForest([Track(5, 1, 1)] if single else [])
    tracks = np.zeros((3, 8, 8), dtype=np.uint8)
    tracks[1, 2, 3] = 5 if single else 0
    found, found_forest = read(write(tmp_path / "out", tracks, forest))
    np.testing.assert_array_equal(found, tracks)
    assert found_forest == forest


def test_ctc_files_are_what_the_challenge_asks_for(forest, tracks, tmp_path):
    path = write_ctc(tmp_path / "result", tracks, forest)
    rows = [line.split(" ") for line in (path / "man_track.txt").read_text().splitlines()]
    assert rows[:3] == [["1", "0", "1", "0"], ["2", "2", "3", "1"], ["3", "2", "2", "1"]]
    assert sorted(p.name for p in path.iterdir()) == ["man_track.txt", *(f"man_track{t:04}.tif" for t in range(6))]
    assert tifffile.imread(path / "man_track0004.tif").dtype == np.uint32
    small = write_ctc(tmp_path / "small", tracks % 70000, forest.without([70000]))
    assert tifffile.imread(small / "man_track0004.tif").dtype == np.uint16


@pytest.mark.parametrize("name", FORMATS)
def test_existing_outputs_are_replaced_only_on_request(name, forest, tracks, tmp_path):
    write, read = FORMATS[name]
    path = write(tmp_path / "out.zarr", tracks, forest)
    with pytest.raises(OutputExistsError, match="overwrite"):
        write(path, tracks, forest)
    write(path, tracks[:4] % 4, TrackForest([Track(1, 0, 3), Track(2, 0, 3), Track(3, 2, 2)]), overwrite=True)
    assert read(path)[0].shape[0] == 4
    foreign = tmp_path / "foreign.zarr"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("three years of work")
    with pytest.raises(OutputExistsError):
        write(foreign, tracks, forest, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("steps", [write_ctc_steps, write_geff_steps])
def test_cancelled_or_failed_writing_leaves_nothing(steps, forest, tracks, tmp_path):
    generator = steps(tmp_path / "out.zarr", tracks, forest)
    for _ in range(3):
        next(generator)
    generator.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInputError):  # an object without track
        list(steps(tmp_path / "out.zarr", tracks, forest.without([21])))
    assert not list(tmp_path.iterdir())


def test_ctc_reading_names_what_is_wrong(forest, tracks, tmp_path):
    with pytest.raises(MissingFileError, match="man_track.txt"):
        read_ctc(tmp_path)
    path = write_ctc(tmp_path / "out", tracks, forest)
    text = (path / "man_track.txt").read_text()
    (path / "man_track.txt").write_text(text.replace("7 4 5 2\n", "7 4 5\n"))
    with pytest.raises(ImageReadError, match="first frame"):
        read_ctc(path)
    (path / "man_track.txt").write_text(text.replace("7 4 5 2\n", ""))
    with pytest.raises(InvalidInputError, match="without track"):
        read_ctc(path)
    (path / "man_track.txt").write_text(text.replace("7 4 5 2\n", "7 4 5 8\n"))
    with pytest.raises(InvalidInputError, match="parent"):
        read_ctc(path)
    (path / "man_track.txt").write_text(text)
    (path / "man_track0002.tif").unlink()
    with pytest.raises(InvalidInputError, match="Frame 2"):
        read_ctc(path)


def test_ctc_result_names_are_read(forest, tracks, tmp_path):
    path = write_ctc(tmp_path / "out", tracks, forest)
    (path / "man_track.txt").rename(path / "res_track.txt")
    for t in range(len(tracks)):
        (path / f"man_track{t:04}.tif").rename(path / f"mask{t:03}.tif")
    found, found_forest = read_ctc(path)
    np.testing.assert_array_equal(found, tracks)
    assert found_forest == forest


def test_geff_is_readable_with_the_reference_package(forest, tracks, tmp_path):
    path = write_geff(tmp_path / "out", tracks, forest)
    graph, metadata = read_with_geff(path / "tracks.geff")
    assert metadata.directed
    assert [axis.name for axis in metadata.axes] == ["t", "y", "x"]
    starts = {data["track_id"] for n, data in graph.nodes.items() if graph.in_degree(n) == 0}
    assert starts == {t.id for t in forest.values() if not t.parent}
    divided = {graph.nodes[n]["track_id"] for n in graph if graph.out_degree(n) > 1}
    assert divided == {1, 2}
    for a, b in graph.edges:
        assert graph.nodes[a]["t"] < graph.nodes[b]["t"]
    for data in graph.nodes.values():
        assert tracks[int(data["t"]), round(data["y"]), round(data["x"])] == data["track_id"]


def test_geff_of_another_tool_without_track_ids(tmp_path):
    graph = nx.DiGraph()
    for n, t in ((5, 0), (2, 1), (9, 2), (4, 2), (7, 1)):
        graph.add_node(n, time=t, y=1.0, x=float(n))
    graph.add_edges_from([(5, 2), (2, 9), (2, 4)])
    write_with_geff(graph, tmp_path / "a.geff", axis_names=["time", "y", "x"], axis_types=["time", "space", "space"])
    labels, forest = read_geff(tmp_path / "a.geff")
    assert labels is None
    assert forest.lineages() == [{1: [3, 4], 3: [], 4: []}, {2: []}]
    assert read_geff(tmp_path)[1] == forest
    graph.add_edge(7, 9)
    write_with_geff(graph, tmp_path / "b.geff", axis_names=["time", "y", "x"], axis_types=["time", "space", "space"])
    with pytest.raises(InvalidInputError, match="two predecessors"):
        read_geff(tmp_path / "b.geff")
    with pytest.raises(MissingFileError, match="found 2"):
        read_geff(tmp_path)


def test_damaged_geff_is_an_error_of_ours(forest, tracks, tmp_path):
    path = write_geff(tmp_path / "out", tracks, forest)
    (path / "tracks.geff" / ".zattrs").write_text("{}")
    with pytest.raises(ImageReadError, match="GEFF"):
        read_geff(path)


def test_public_metric_agrees_with_counts_by_hand(tmp_path):
    # Two cells over three frames: 6 nodes, 4 edges, so that building it from nothing costs 6 * 10 + 4 * 1.5 = 66.
    cells = TrackForest([Track(1, 0, 2), Track(2, 0, 2)])
    truth = _series(cells)
    swapped = truth.copy()
    swapped[1:] = np.array([0, 2, 1])[truth[1:]]
    assert _tra(tmp_path / "same", truth, cells, truth, cells) == 1
    # Swapped after the first frame: two redundant edges (1 each) and two missing ones (1.5 each).
    assert _tra(tmp_path / "swapped", truth, cells, swapped, cells) == pytest.approx(1 - 5 / 66)

    # A division: 4 nodes, 3 edges, 44.5 in all. Without parents two edges are missing.
    division = TrackForest([Track(1, 0, 1), Track(2, 2, 2, 1), Track(3, 2, 2, 1)])
    truth = _series(division)
    orphans = [{1: []}, {2: []}, {3: []}]
    assert _tra(tmp_path / "division", truth, division, truth, division.lineages()) == 1
    assert _tra(tmp_path / "orphans", truth, division, truth, orphans) == pytest.approx(1 - 3 / 44.5)


def _tra(folder, truth, truth_lineages, result, result_lineages):
    """The tracking score of the Cell Tracking Challenge, through files of ours."""
    write_ctc(folder / "truth" / "TRA", truth, truth_lineages)
    path = write_ctc(folder / "result", result, result_lineages)
    (path / "man_track.txt").rename(path / "res_track.txt")
    return evaluate_sequence(str(path), str(folder / "truth"), ["TRA"], threads=1)["TRA"]
