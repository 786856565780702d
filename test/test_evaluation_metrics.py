"""Metrics against brute force, scikit-image, the files of py-ctcmetrics, and a graph comparison written here."""

import itertools

import numpy as np
import pandas as pd
import pytest
import tifffile
from ctc_metrics.scripts.evaluate import evaluate_sequence
from scipy.ndimage import find_objects
from skimage.metrics import adapted_rand_error, variation_of_information

from micro_sam import evaluation
from micro_sam.core.errors import InvalidInputError, InvalidTypeError, OutputExistsError
from micro_sam.evaluation import run_evaluation, run_evaluation_for_iterative_prompting
from micro_sam.evaluation.metrics import dice_per_class, dice_score, segmentation_scores, volume_scores
from micro_sam.evaluation.tracking_metrics import tracking_scores
from micro_sam.tracking.ctc import write_ctc
from micro_sam.tracking.lineage import Track, TrackForest

NAMES = ["mSA", "SA50", "SA75", "Precision", "Recall", "F1 Score"]
EXACT = {"rel": 0, "abs": 1e-9}


def damage(labels, rng):
    """Shift, merge, split, drop and add objects."""
    found = np.roll(labels, rng.integers(-1, 2, labels.ndim), tuple(range(labels.ndim))).astype("int64")
    ids = rng.permutation(np.unique(found[found > 0]))
    if len(ids) > 6:
        found[found == ids[0]] = ids[1]
        found[found == ids[2]] = 0
        box = find_objects(found)[ids[3] - 1]
        half = (*box[:-1], slice(box[-1].start, (box[-1].start + box[-1].stop) // 2))
        found[half][found[half] == ids[3]] = found.max() + 1
    found[tuple(slice(0, 3) for _ in range(found.ndim))] = found.max() + 7
    return found


def overlaps(labels, truth):
    """IoU of each object with each true one, from sets of pixels."""
    sets = [[set(np.flatnonzero(image.ravel() == i)) for i in np.unique(image) if i] for image in (labels, truth)]
    return [[len(a & b) / len(a | b) for b in sets[1]] for a in sets[0]]


def most_matches(ious, threshold):
    """The largest number of pairs with IoU >= threshold: augmenting paths (Kuhn), one object after the other."""
    partners = {}

    def find_partner(row, tried):
        for column, iou in enumerate(ious[row]):
            if iou >= threshold and column not in tried:
                tried.add(column)
                if column not in partners or find_partner(partners[column], tried):
                    partners[column] = row
                    return True
        return False

    return sum(find_partner(row, set()) for row in range(len(ious)))


def brute_force_scores(labels, truth):
    ious = overlaps(labels, truth)
    n_found, n_true = len(ious), len(ious[0])
    matches = [most_matches(ious, (50 + 5 * k) / 100) for k in range(10)]
    accuracies, tp = [n / (n_found + n_true - n) for n in matches], matches[0]
    f1 = 2 * tp / (n_found + n_true)
    return dict(zip(NAMES, (np.mean(accuracies), accuracies[0], accuracies[5], tp / n_found, tp / n_true, f1)))


@pytest.mark.parametrize("shape", [(50, 60), (10, 24, 22)])
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_brute_force_on_random_labels(shape, seed):
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, dtype="uint16")
    for i in range(1, 12):
        start = [rng.integers(0, n - 7) for n in shape]
        truth[tuple(slice(a, a + rng.integers(6, 14)) for a in start)] = 3 * i
    labels = damage(truth, rng)
    scores = segmentation_scores(labels, truth)
    assert list(scores) == NAMES
    assert scores == pytest.approx(brute_force_scores(labels, truth), **EXACT)
    assert 0 < scores["SA50"] < 1
    # Below 0.5 an object can match several others, and the best assignment counts.
    ious = overlaps(labels, truth)
    expected = [n / (len(ious) + len(ious[0]) - n) for n in (most_matches(ious, t) for t in (0.05, 0.2))]
    assert segmentation_scores(labels, truth, [0.05, 0.2])["mSA"] == pytest.approx(np.mean(expected), **EXACT)


def test_scores_equal_brute_force_on_real_labels(cells_labels):
    labels = damage(cells_labels, np.random.default_rng(5))
    before = cells_labels.copy(), labels.copy()
    scores = segmentation_scores(labels, cells_labels)
    assert scores == pytest.approx(brute_force_scores(labels, cells_labels), **EXACT)
    assert all(0 < value < 1 for value in scores.values())
    np.testing.assert_array_equal(before[0], cells_labels)
    np.testing.assert_array_equal(before[1], labels)


@pytest.mark.parametrize("k", range(10))
def test_an_iou_of_exactly_the_threshold_is_a_match(k):
    """03-41: a threshold of 0.7500000000000002 does not count an IoU of 3/4."""
    percent = 50 + 5 * k
    truth, labels = np.ones((1, 100), dtype=int), np.zeros((1, 100), dtype=int)
    labels[0, :percent] = 1
    assert segmentation_scores(labels, truth)["mSA"] == pytest.approx((k + 1) / 10, **EXACT)
    # Thresholds from numpy.arange are meant as decimals, too.
    thresholds = np.arange(0.5, 1, 0.05)
    assert segmentation_scores(labels, truth, thresholds)["mSA"] == pytest.approx((k + 1) / 10, **EXACT)


def test_identical_and_empty_images(cells_labels):
    """03-39: an image without objects that was found to be empty is right."""
    empty = np.zeros_like(cells_labels)
    assert segmentation_scores(cells_labels, cells_labels) == dict.fromkeys(NAMES, 1.0)
    assert segmentation_scores(empty, cells_labels) == dict.fromkeys(NAMES, 0.0)
    assert segmentation_scores(cells_labels, empty) == dict.fromkeys(NAMES, 0.0)
    assert segmentation_scores(empty, empty) == dict.fromkeys(NAMES, 1.0)
    assert list(segmentation_scores(empty, empty, [0.5])) == ["mSA", "Precision", "Recall", "F1 Score"]
    assert dice_score(cells_labels, cells_labels) == dice_score(empty, empty) == 1
    assert dice_score(empty, cells_labels) == dice_score(cells_labels, empty) == 0
    assert set(dice_per_class(cells_labels, cells_labels).values()) == {1.0}
    assert set(dice_per_class(empty, cells_labels).values()) == {0.0}
    perfect = {"ARE": 0, "ARE precision": 1, "ARE recall": 1, "VOI split": 0, "VOI merge": 0}
    assert volume_scores(cells_labels, cells_labels) == pytest.approx(perfect, **EXACT)
    assert volume_scores(empty, empty) == perfect
    assert np.isnan(list(volume_scores(cells_labels, empty).values())).all()
    assert volume_scores(empty, cells_labels)["VOI split"] == pytest.approx(0, **EXACT)


def test_dice_is_its_definition(cells_labels):
    labels = damage(cells_labels, np.random.default_rng(1))
    a, b = labels > 0, cells_labels > 0
    assert dice_score(labels, cells_labels) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), **EXACT)
    expected = {
        int(i): 2 * np.sum((labels == i) & (cells_labels == i)) / (np.sum(labels == i) + np.sum(cells_labels == i))
        for i in np.union1d(labels, cells_labels) if i
    }
    assert dice_per_class(labels, cells_labels) == pytest.approx(expected, **EXACT)
    assert dice_per_class(np.array([[0, 4, 4]]), np.array([[4, 4, 9]])) == {4: 0.5, 9: 0.0}


def test_volume_scores_are_those_of_scikit_image_and_of_analysis(cells_labels):
    labels = damage(cells_labels, np.random.default_rng(2))
    found = volume_scores(labels, cells_labels)
    error, precision, recall = adapted_rand_error(cells_labels, labels, ignore_labels=(0,))
    inside = cells_labels > 0
    split, merge = variation_of_information(cells_labels[inside], labels[inside])
    expected = dict(zip(found, (error, precision, recall, split, merge)))
    assert found == pytest.approx(expected, **EXACT)
    # Halves of one object: one bit of split. One object for two halves: one bit of merge.
    halves, whole = np.repeat([[1, 2]], 8, axis=1), np.ones((1, 16), dtype=int)
    names = ("VOI split", "VOI merge")
    assert [volume_scores(halves, whole)[n] for n in names] == pytest.approx([1, 0], **EXACT)
    assert [volume_scores(whole, halves)[n] for n in names] == pytest.approx([0, 1], **EXACT)


@pytest.mark.parametrize("function", [segmentation_scores, dice_score, dice_per_class, volume_scores])
def test_wrong_arrays_are_named(function):
    with pytest.raises(InvalidInputError, match=r"\(3, 4\) and \(4, 3\)"):
        function(np.ones((3, 4), dtype=int), np.ones((4, 3), dtype=int))
    with pytest.raises(AssertionError):
        function(np.ones((3, 4), dtype=int), np.ones((4, 3), dtype=int))
    with pytest.raises(InvalidTypeError, match="float"):
        function(np.ones((3, 4)), np.ones((3, 4)))
    with pytest.raises(InvalidInputError, match="without pixels"):
        function(np.ones((0, 4), dtype=int), np.ones((0, 4), dtype=int))


def test_wrong_thresholds_are_refused():
    image = np.ones((3, 4), dtype=int)
    for thresholds in ([], [0.5, 1.5], [0]):
        with pytest.raises(InvalidInputError, match="thresholds"):
            segmentation_scores(image, image, thresholds)


# --- tables of files ---


@pytest.fixture
def files(tmp_path, cells_labels):
    """Three images with predictions of another format; the names sort differently as numbers and as text."""
    rng = np.random.default_rng(0)
    pairs = {name: (np.roll(cells_labels, 3 * n, 1), n) for n, name in enumerate(("a2", "a10", "b"))}
    pairs = {name: (truth, damage(truth, rng).astype("uint32")) for name, (truth, _) in pairs.items()}
    for folder in ("truth", "found"):
        (tmp_path / folder).mkdir()
    for name, (truth, labels) in pairs.items():
        tifffile.imwrite(tmp_path / "truth" / f"{name}.tif", truth[None])
        np.save(tmp_path / "found" / f"{name}.npy", labels)
    return tmp_path, pairs


def test_table_is_the_mean_over_images_whether_files_or_arrays(files):
    """03-38, 40: truth is not altered, files and arrays agree, names decide and not the order."""
    folder, pairs = files
    expected = pd.DataFrame([segmentation_scores(labels, truth) for truth, labels in pairs.values()]).mean()
    truth, found = sorted((folder / "truth").iterdir()), sorted((folder / "found").iterdir(), reverse=True)
    of_files = run_evaluation(truth, found, verbose=False)
    of_arrays = run_evaluation(*map(list, zip(*pairs.values())), verbose=False)
    assert list(of_files) == NAMES
    assert len(of_files) == 1
    assert dict(of_files.iloc[0]) == pytest.approx(dict(expected), **EXACT)
    pd.testing.assert_frame_equal(of_files, of_arrays)
    # Two objects with the same id are one object, unless the truth is said to be a mask.
    mask = np.array([[1, 1, 0, 1, 1]])
    found = np.array([[1, 1, 0, 2, 2]])
    assert run_evaluation([mask], [found], verbose=False)["SA50"].item() == 0.5
    assert run_evaluation([mask], [found], verbose=False, label_components=True)["SA50"].item() == 1
    assert list(run_evaluation([mask], [found], verbose=False, thresholds=[0.5, 0.9])) == [NAMES[0], *NAMES[3:]]


def test_results_are_never_stale_and_nothing_else_is_replaced(files):
    """03-37: a file at save_path is a file, and a wrong prediction does not keep its old score."""
    folder, _ = files
    truth, found = sorted((folder / "truth").iterdir()), sorted((folder / "found").iterdir())
    path = folder / "new" / "table.csv"
    first = run_evaluation(truth, truth, save_path=path, verbose=False)
    assert path.is_file()
    assert first["mSA"].item() == 1
    second = run_evaluation(truth, found, save_path=path, verbose=False)
    assert second["mSA"].item() < 1
    pd.testing.assert_frame_equal(pd.read_csv(path), second)
    notes = folder / "notes.csv"
    notes.write_text("cell,kind\n1,a\n")
    for other in (notes, folder):
        with pytest.raises(OutputExistsError, match="no table of scores"):
            run_evaluation(truth, found, save_path=other, verbose=False)
    assert notes.read_text() == "cell,kind\n1,a\n"


def test_lists_that_do_not_fit_are_errors(files):
    folder, pairs = files
    truth, found = sorted((folder / "truth").iterdir()), sorted((folder / "found").iterdir())
    with pytest.raises(AssertionError, match="Without partner: b"):
        run_evaluation(truth, found[:2], verbose=False)
    stray = folder / "found" / "a3.npy"
    np.save(stray, pairs["b"][1])
    with pytest.raises(AssertionError, match="Without partner: a3, b"):
        run_evaluation(truth, [*found[:2], stray], verbose=False)
    with pytest.raises(AssertionError, match="no file"):
        run_evaluation([folder / "no.tif"], [found[0]], verbose=False)
    with pytest.raises(AssertionError, match="0 ground truths"):
        run_evaluation([], [], verbose=False)
    with pytest.raises(AssertionError, match="shape"):
        run_evaluation([pairs["b"][0]], [pairs["b"][1][:-1]], verbose=False)


@pytest.mark.parametrize(("start_with_box_prompt", "use_masks"), [*itertools.product((False, True), repeat=2)])
def test_iterative_prompting_has_a_row_per_iteration(files, start_with_box_prompt, use_masks):
    folder, pairs = files
    truth, root = sorted((folder / "truth").iterdir()), folder / "predictions"
    for k, turns in ((2, 0), (10, 1)):
        (root / f"iteration{k}").mkdir(parents=True)
        for name, (_, labels) in pairs.items():
            np.save(root / f"iteration{k}" / f"{name}.npy", np.roll(labels, turns, 0))

    def run(**options):
        return run_evaluation_for_iterative_prompting(
            truth, root, folder / "experiment", start_with_box_prompt, use_masks=use_masks, **options
        )

    table = run()
    path = folder / "experiment/results" / f"iterative_prompting_{'with' if use_masks else 'without'}_mask"
    path = path / f"iterative_prompts_start_{'box' if start_with_box_prompt else 'point'}.csv"
    assert list(pd.read_csv(path).columns) == ["iteration", *NAMES]
    for k, row in zip((2, 10), table.to_dict("records")):
        expected = run_evaluation(truth, sorted((root / f"iteration{k}").iterdir()), verbose=False)
        assert row == pytest.approx(expected.to_dict("records")[0], **EXACT)
    pd.testing.assert_frame_equal(run(), table)  # 03-37: it was None
    np.save(root / "iteration2" / "b.npy", pairs["b"][0])
    with pytest.raises(OutputExistsError, match="iteration2"):
        run()
    assert run(overwrite_results=True)["mSA"][0] > table["mSA"][0]


def test_public_names_exist():
    for name in ("run_evaluation", "run_evaluation_for_iterative_prompting", "segmentation_scores", "tracking_scores"):
        assert callable(getattr(evaluation, name))
    with pytest.raises(AttributeError):
        evaluation.no_such_name  # noqa: B018


# --- tracks ---


def movie(seed, n_frames=7):
    """Cells that move, divide, vanish and come back: labels (T, Y, X) and their tracks."""
    rng = np.random.default_rng(seed)
    tracks, labels = [], np.zeros((n_frames, 48, 60), dtype="uint16")
    for cell in range(5):
        y, x = 2 + 9 * cell, int(rng.integers(2, 30))
        division = int(rng.integers(2, n_frames - 1)) if cell % 2 else n_frames
        parent, gap = len(tracks) + 1, int(rng.integers(1, n_frames)) if cell == 4 else None
        tracks.append(Track(parent, 0, division - 1))
        children = [parent + 1, parent + 2] if division < n_frames else []
        tracks += [Track(i, division, n_frames - 1, parent) for i in children]
        for t in range(n_frames):
            x += int(rng.integers(0, 2))
            if t < division and t != gap:
                labels[t, y:y + 6, x:x + 8] = parent
            for k, i in enumerate(children if t >= division else ()):
                labels[t, y:y + 6, x + 9 * k:x + 9 * k + 6] = i
    present = {t.id: frames_of(labels, t.id) for t in tracks}
    return labels, TrackForest(Track(t.id, present[t.id][0], present[t.id][-1], t.parent) for t in tracks)


def wrong_tracks(labels, forest, seed):
    """Lost, merged and swapped objects, and lost parents."""
    rng = np.random.default_rng(seed)
    labels, (t1, t2) = labels.copy(), rng.integers(1, len(labels), 2)
    ids = np.unique(labels[0][labels[0] > 0])
    labels[t1:][labels[t1:] == ids[0]] = 0
    a, b = ids[1], ids[2]
    later = labels[t2:]
    labels[t2:] = np.where(later == a, b, np.where(later == b, a, later))
    labels[1, :3, :3] = labels.max() + 1
    last = labels[-1]
    merged = np.unique(last[last > 0])[-2:]
    labels[-1][last == merged[0]] = merged[1]
    lost = {t.id for t in forest.values() if t.parent}
    keep = set(sorted(lost)[len(lost) // 2:])
    extents = {int(i): frames_of(labels, i) for i in np.unique(labels) if i}
    tracks = []
    for i, frames in extents.items():
        parent = forest[i].parent if i in keep else 0
        is_before = parent in extents and extents[parent][-1] < frames[0]
        tracks.append(Track(i, frames[0], frames[-1], parent if is_before else 0))
    return labels, TrackForest(tracks)


def frames_of(labels, i):
    return np.flatnonzero((labels == i).any((1, 2))).tolist()


def graph(labels, forest):
    """Nodes (frame, id), and edges with whether they go from a parent to a child; a gap is such a link."""
    nodes = {(t, int(i)) for t, frame in enumerate(labels) for i in np.unique(frame) if i}
    edges = {}
    for track in forest.values():
        frames = sorted(t for t, i in nodes if i == track.id)
        edges |= {((a, track.id), (b, track.id)): b - a > 1 for a, b in itertools.pairwise(frames)}
        if track.parent:
            last = max(t for t, i in nodes if i == track.parent)
            edges[(last, track.parent), (frames[0], track.id)] = True
    return nodes, edges


def reference_tra(labels, forest, truth, truth_forest):
    """TRA and the F1 of edges by their definition (Matula et al. 2015), with sets."""
    (nodes, edges), (true_nodes, true_edges) = graph(labels, forest), graph(truth, truth_forest)
    found = {}  # true node -> node
    for t, i in true_nodes:
        ids, counts = np.unique(labels[t][truth[t] == i], return_counts=True)
        found.update(((t, i), (t, int(j))) for j, n in zip(ids, counts) if j and 2 * n > counts.sum())
    sources = {node: [true for true, other in found.items() if other == node] for node in nodes}
    unique = {node: of_node[0] for node, of_node in sources.items() if len(of_node) == 1}
    splits = sum(len(of_node) - 1 for of_node in sources.values() if of_node)
    false = sum(not of_node for of_node in sources.values())
    induced = {(unique[a], unique[b]): kind for (a, b), kind in edges.items() if a in unique and b in unique}
    right = set(induced) & set(true_edges)
    cost = 5 * splits + 10 * (len(true_nodes) - len(found)) + false
    cost += len(set(induced) - right) + 1.5 * (len(true_edges) - len(right))
    cost += sum(induced[e] != true_edges[e] for e in right)
    empty = 10 * len(true_nodes) + 1.5 * len(true_edges)
    return {"TRA": 1 - min(cost, empty) / empty, "Edge F1": 2 * len(right) / (len(edges) + len(true_edges))}


@pytest.mark.parametrize("seed", range(5))
def test_tracking_scores_equal_a_comparison_of_graphs(seed):
    truth, truth_forest = movie(seed)
    labels, forest = wrong_tracks(truth, truth_forest, seed)
    scores = tracking_scores(labels, truth, forest, truth_forest.lineages())
    expected = reference_tra(labels, forest, truth, truth_forest)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, **EXACT)
    assert 0 < scores["TRA"] < 1
    assert scores["Edge F1"] == pytest.approx(
        2 * scores["Edge Precision"] * scores["Edge Recall"] / (scores["Edge Precision"] + scores["Edge Recall"])
    )


def without_gaps(labels, forest):
    gaps = {i for i, track in forest.items() if len(frames_of(labels, i)) <= track.last - track.first}
    labels = np.where(np.isin(labels, list(gaps)), 0, labels)
    return labels, forest.without(gaps)


@pytest.mark.parametrize("seed", range(2))
def test_tracking_scores_equal_those_of_the_files(seed, tmp_path, capsys):
    truth, truth_forest = without_gaps(*movie(seed))
    labels, forest = without_gaps(*wrong_tracks(truth, truth_forest, seed))
    write_ctc(tmp_path / "truth" / "TRA", truth, truth_forest)
    (tmp_path / "truth" / "SEG").mkdir()
    for t, frame in enumerate(truth):
        tifffile.imwrite(tmp_path / "truth" / "SEG" / f"man_seg{t:04}.tif", frame)
    result = write_ctc(tmp_path / "result", labels, forest)
    (result / "man_track.txt").rename(result / "res_track.txt")
    for file in result.glob("man_track*.tif"):
        file.rename(result / file.name.replace("man_track", "mask"))
    names = ["TRA", "DET", "LNK", "SEG", "CT", "TF", "BC"]
    expected = evaluate_sequence(str(result), str(tmp_path / "truth"), list(names), threads=1)
    capsys.readouterr()
    scores = tracking_scores(result, tmp_path / "truth" / "TRA")
    assert capsys.readouterr().out == ""
    names = [*names[:-1], "BC(0)", "BC(1)"]
    assert {name: scores[name] for name in names} == pytest.approx({n: expected[n] for n in names}, **EXACT)
    assert scores == tracking_scores(labels, truth, forest, truth_forest)


def test_tracking_of_identical_and_empty_movies():
    truth, forest = movie(0)
    assert set(tracking_scores(truth, truth, forest, forest).values()) == {1.0}
    empty = np.zeros_like(truth)
    assert set(tracking_scores(empty, truth, None, forest).values()) == {0.0}
    assert set(tracking_scores(empty, empty).values()) == {1.0}
    # Without divisions in the truth there is nothing that could be right about them.
    still = np.repeat(truth[:1], 3, axis=0)
    assert np.isnan(tracking_scores(still, still)["BC(0)"])
    blinking = np.stack([still[0], empty[0]])
    scores = tracking_scores(blinking, blinking)
    assert np.isnan(scores["LNK"])
    assert scores["TRA"] == 1


def test_wrong_movies_are_named(tmp_path):
    truth, forest = movie(0)
    with pytest.raises(InvalidInputError, match="shape"):
        tracking_scores(truth[:, :-1], truth)
    with pytest.raises(InvalidInputError, match="two frames"):
        tracking_scores(truth[:1], truth[:1])
    folder = write_ctc(tmp_path / "tracks", truth, forest)
    with pytest.raises(InvalidInputError, match="Leave out lineages"):
        tracking_scores(folder, truth, forest)
