"""Grid searches: the scores are those of `generate`, nothing is computed twice, and nothing is mixed up."""

import json

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import DATA
from scipy.optimize import linear_sum_assignment

from micro_sam.core.errors import InvalidInputError, MissingFileError, OutputExistsError, UnsupportedError
from micro_sam.core.progress import drain
from micro_sam.evaluation import grid_search
from micro_sam.evaluation.automatic import run_amg, run_apg, run_instance_segmentation_with_decoder
from micro_sam.evaluation.grid_search import GridError
from micro_sam.evaluation.instance_segmentation import (
    TilingParamsError,
    default_grid_search_values_amg,
    default_grid_search_values_apg,
    default_grid_search_values_instance_segmentation_with_decoder,
    evaluate_instance_segmentation_grid_search,
    grid_search_steps,
    run_instance_segmentation_grid_search,
    run_instance_segmentation_inference,
    save_grid_search_best_params,
)
from micro_sam.segmentation import apg, workflow
from micro_sam.segmentation.factory import get_instance_segmentation_generator

TILES = {"tile_shape": (48, 96), "halo": (16, 0)}
SCORES = ["mSA", "SA50", "SA75", "Precision", "Recall", "F1"]
# The maps of the random decoder are around these values.
GRIDS = {
    "ais": {
        "center_distance_threshold": [0.5, 0.6], "foreground_threshold": [0.4], "distance_smoothing": [0.0, 1.0],
        "boundary_distance_threshold": [0.5, 0.6], "min_size": [0, 20],
    },
    "apg": {
        "center_distance_threshold": [0.55, 0.6], "foreground_threshold": [0.4], "min_size": [0, 30],
        "boundary_distance_threshold": [0.6], "nms_threshold": [0.9, 0.3], "intersection_over_min": [False, True],
        "refine_with_box_prompts": [False, True],
    },
    "amg": {"pred_iou_thresh": [0.12, 0.15, 0.1], "stability_score_thresh": [0.0, 0.885]},
}
FIXED = {"ais": {"foreground_smoothing": 0.5}, "apg": {}, "amg": {"box_nms_thresh": 1.0, "with_background": False}}


def scores_by_hand(labels, truth):
    """SA(t) = TP / (TP + FP + FN), with masks compared one by one and matched by linear assignment."""
    masks, objects = (
        np.array([image.ravel() == i for i in np.unique(image) if i != 0], dtype=np.float32).reshape(-1, image.size)
        for image in (labels, truth)
    )
    common = (masks @ objects.T).astype(float)  # counts, exact in float32
    iou = common / (masks.sum(1, dtype=float)[:, None] + objects.sum(1) - common)
    matched = []
    for threshold in np.arange(50, 100, 5) / 100:
        valid = iou >= threshold
        matched.append(int(valid[linear_sum_assignment(-valid.astype(float))].sum()))
    accuracies = np.array([n / (len(masks) + len(objects) - n) for n in matched])
    precision, recall = matched[0] / max(len(masks), 1), matched[0] / len(objects)
    f1 = 2 * matched[0] / (len(masks) + len(objects))
    return [accuracies.mean(), accuracies[0], accuracies[5], precision, recall, f1]


@pytest.fixture(scope="module")
def pair():
    part = np.s_[48:, :96]
    return imageio.imread(DATA / "nuclei.png")[part], imageio.imread(DATA / "nuclei_labels.tif")[part]


@pytest.fixture
def files(tmp_path, pair):
    """Two images and their truth, in folders of their own."""
    image, truth = pair
    paths = []
    for n, flip in enumerate((slice(None), slice(None, None, -1))):
        names = tmp_path / "images" / f"im{n}.png", tmp_path / "labels" / f"im{n}.tif"
        for name in names:
            name.parent.mkdir(exist_ok=True)
        imageio.imwrite(names[0], image[flip])
        tifffile.imwrite(names[1], truth[flip])
        paths.append(names)
    return tuple(list(p) for p in zip(*paths))


@pytest.fixture
def segmenter(tiny_predictor, tiny_decoder):
    def create(mode, tiled=False):
        # The logits of the random model are small.
        options = {"points_per_side": 3, "stability_score_offset": 0.02} if mode == "amg" else {}
        return get_instance_segmentation_generator(tiny_predictor, tiled, tiny_decoder, mode, **options)
    return create


@pytest.fixture
def ais_segmenter(segmenter, monkeypatch):
    """AIS with maps made from the image, so that most tests need no network."""
    found = segmenter("ais")

    def decode(features, input_size, original_size):
        y, x = np.mgrid[:original_size[0], :original_size[1]]
        wave = (np.sin(y / 4) + np.sin(x / 5)) / 4 + 0.5
        return np.stack([wave, 1 - wave, 1 - wave]).astype(np.float32)[None]
    monkeypatch.setattr(found, "_decode", decode)
    embeddings = {"features": np.zeros((1, 256, 16, 16), np.float32), "input_size": (213, 256)}

    def embedding_steps(predictor, image, path, ndim):
        return {**embeddings, "original_size": image.shape[:2]}
        yield
    monkeypatch.setattr("micro_sam.evaluation.instance_segmentation.embedding_steps", embedding_steps)
    return found


def search(segmenter, grid, files, folder, **options):
    run_instance_segmentation_grid_search(segmenter, grid, *files, folder, None, **options)
    return [pd.read_csv(folder / f"im{n}.csv") for n in range(len(files[0]))]


def test_default_grids_are_exact_decimals():
    """Ranges overshot by rounding (0.925, 2.2)."""
    grids = [
        default_grid_search_values_amg(), default_grid_search_values_instance_segmentation_with_decoder(),
        default_grid_search_values_apg(),
    ]
    assert [int(np.prod([len(v) for v in grid.values()])) for grid in grids] == [195, 450, 750]
    assert grids[0]["pred_iou_thresh"] == [float(f"{0.6 + 0.025 * k:.3f}") for k in range(13)]
    assert grids[0]["stability_score_thresh"][-1] == 0.95
    assert grids[1]["distance_smoothing"] == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    assert grids[1]["center_distance_threshold"] == grids[2]["boundary_distance_threshold"] == [.3, .4, .5, .6, .7]
    assert grids[2]["nms_threshold"] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert "multimasking" not in grids[2]
    assert default_grid_search_values_apg(multimasking_values=[True])["multimasking"] == [True]
    with pytest.raises(UnsupportedError, match="min_distance_values"):
        default_grid_search_values_apg(min_distance_values=[5])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("mode", ["ais", "apg", "amg"])
def test_scores_are_those_of_generate(segmenter, files, tmp_path, mode, tiled):
    """Whatever is shared between combinations, each row is that of `generate` with an independent metric."""
    grid, fixed, tiling = GRIDS[mode], FIXED[mode], TILES if tiled else None
    paths = [p[:1] for p in files]
    fresh = segmenter(mode, tiled)
    fresh.initialize(imageio.imread(paths[0][0]), **(tiling or {}))
    # The truth is one of the results, with some objects missing and others cut: otherwise all scores would be 0.
    truth = fresh.generate(**{name: values[0] for name, values in grid.items()}, **fixed).astype(np.uint16)
    truth[truth % 4 == 2] = 0
    truth[:, 1::3] *= (truth[:, 1::3] % 3 != 0)
    assert truth.any()
    tifffile.imwrite(paths[1][0], truth)

    table, = search(
        segmenter(mode, tiled), grid, paths, tmp_path / "results", fixed_generate_kwargs=fixed,
        tiling_window_params=tiling, n_workers=3,
    )
    assert table.columns.tolist() == ["image_name", *SCORES, *grid]
    assert len(table) == np.prod([len(v) for v in grid.values()])
    assert (table["image_name"] == "im0").all()
    assert table["mSA"].nunique() > 1  # the settings matter
    for row in table.to_dict("records")[::9 if mode == "apg" else 1]:
        labels = fresh.generate(**{name: row[name] for name in grid}, **fixed)
        np.testing.assert_allclose([row[name] for name in SCORES], scores_by_hand(labels, truth), err_msg=str(row))


def test_what_does_not_depend_on_a_setting_is_computed_once(segmenter, pair, monkeypatch):
    calls = {"predict": 0, "watershed": 0, "score": 0}

    def counted(name, function):
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)
        return wrapper
    monkeypatch.setattr(apg, "prediction_steps", counted("predict", apg.prediction_steps))
    watershed = grid_search.watershed_from_center_and_boundary_distances
    monkeypatch.setattr(grid_search, "watershed_from_center_and_boundary_distances", counted("watershed", watershed))
    monkeypatch.setattr(grid_search, "segmentation_scores", counted("score", grid_search.segmentation_scores))
    for mode in ("apg", "ais"):
        found = segmenter(mode)
        found.initialize(pair[0])
        options = grid_search.combinations(GRIDS[mode], FIXED[mode], found)
        serial, parallel = (
            drain(grid_search.score_steps(found, options, pair[1], n), verbose=False) for n in (1, 4)
        )
        assert serial == parallel
    # Per run: prompts for 2 thresholds, each from points (twice) and from their boxes; 2 x 2 x 2 floodings and one
    # smoothing for each of 2 sigmas.
    assert calls["predict"] <= 2 * (2 + 4)
    assert calls["watershed"] == 2 * (8 + 2)
    assert calls["score"] <= 2 * (16 + 32)


def test_search_goes_on_where_it_stopped(ais_segmenter, files, tmp_path, monkeypatch):
    grid = {"center_distance_threshold": [0.3, 0.5], "min_size": [10, 50]}
    steps = grid_search_steps(ais_segmenter, grid, *files, tmp_path, None)
    done = [next(steps)]
    while done[-1].done < 6:  # in the middle of the second image
        done.append(next(steps))
    steps.close()
    assert {step.total for step in done} == {8}
    assert [step.done for step in done] == sorted(step.done for step in done)
    assert sorted(p.name for p in tmp_path.glob("*.csv")) == ["im0.csv"]
    before = (tmp_path / "im0.csv").stat().st_mtime_ns

    initialized, initialize = [], ais_segmenter.initialize_steps
    monkeypatch.setattr(
        ais_segmenter, "initialize_steps", lambda *a, **k: initialized.append(1) or initialize(*a, **k), raising=False
    )
    search(ais_segmenter, grid, files, tmp_path)
    assert (len(initialized), (tmp_path / "im0.csv").stat().st_mtime_ns) == (1, before)
    search(ais_segmenter, grid, files, tmp_path)
    assert len(initialized) == 1


def test_results_of_other_settings_are_not_mixed_in(ais_segmenter, files, tmp_path):
    """Other grids, fixed settings, or truth: the results that are there are neither taken nor replaced silently."""
    grid, fixed = {"min_size": [10, 50]}, {"center_distance_threshold": 0.4}
    search(ais_segmenter, grid, files, tmp_path, fixed_generate_kwargs=fixed)
    assert fixed == {"center_distance_threshold": 0.4}  # it was modified in place
    for other in ({}, {"center_distance_threshold": 0.6}):
        with pytest.raises(OutputExistsError, match="center_distance_threshold"):
            search(ais_segmenter, grid, files, tmp_path, fixed_generate_kwargs=other)
    with pytest.raises(OutputExistsError, match="min_size"):
        search(ais_segmenter, {"min_size": [10]}, files, tmp_path, fixed_generate_kwargs=fixed)
    tifffile.imwrite(files[1][0], np.where(tifffile.imread(files[1][0]) > 0, 1, 0).astype(np.uint16))
    with pytest.raises(OutputExistsError, match="truth"):
        search(ais_segmenter, grid, files, tmp_path, fixed_generate_kwargs=fixed)
    before = json.loads((tmp_path / "im0.json").read_text())
    search(ais_segmenter, grid, files, tmp_path, fixed_generate_kwargs=fixed, overwrite=True)
    after = json.loads((tmp_path / "im0.json").read_text())
    assert before["micro_sam"]["settings"].pop("truth") != after["micro_sam"]["settings"].pop("truth")
    assert before == after
    (tmp_path / "im0.json").unlink()
    with pytest.raises(OutputExistsError, match="no record"):
        search(ais_segmenter, grid, files, tmp_path, fixed_generate_kwargs=fixed)


def test_part_of_the_images_only(ais_segmenter, files, tmp_path):
    roi = np.s_[0:40, 30:80]
    ais_segmenter.initialize(
        imageio.imread(files[0][0])[roi],
        {"features": np.zeros((1, 256, 16, 16), np.float32), "input_size": (205, 256), "original_size": (40, 50)},
    )
    labels = ais_segmenter.generate(min_size=10)
    n = int(labels.max())
    truth = np.zeros((80, 96), np.uint16)
    truth[roi] = np.where(labels == n, 0, labels)
    tifffile.imwrite(files[1][0], truth)
    table, _ = search(ais_segmenter, {"min_size": [10]}, files, tmp_path / "results", rois=roi)
    assert n > 1
    np.testing.assert_allclose(table["mSA"], (n - 1) / n)


@pytest.mark.parametrize(("grid", "options", "error", "text"), [
    ({"min_size": [1]}, {"fixed_generate_kwargs": {"min_size": 2}}, GridError, "both searched and fixed"),
    ({"min_size": []}, {}, GridError, "list of values"),
    ({}, {}, GridError, "list of values"),
    ({"min_sise": [1]}, {}, InvalidInputError, "Did you mean 'min_size'"),
    ({"output_mode": ["rle"]}, {}, InvalidInputError, "output_mode"),
    ({"min_size": [1]}, {"n_workers": 0}, InvalidInputError, "n_workers"),
    ({"min_size": [1]}, {"tiling_window_params": {"tile_shape": (64, 64)}}, RuntimeError, "halo"),
    ({"min_size": [1]}, {"tiling_window_params": TILES}, InvalidInputError, "is_tiled=True"),
])
def test_wrong_arguments_raise_before_anything_is_computed(ais_segmenter, files, tmp_path, grid, options, error, text):
    with pytest.raises(error, match=text) as caught:
        search(ais_segmenter, grid, files, tmp_path / "results", **options)
    assert isinstance(caught.value, ValueError)
    assert not list((tmp_path / "results").glob("*.csv"))


def write_results(folder, **tables):
    for name, rows in tables.items():
        pd.DataFrame(rows, columns=["image_name", "mSA", "SA50", "a", "b", "c"], dtype=object).to_csv(
            folder / f"{name}.csv", index=False
        )


def test_best_settings_keep_their_types(tmp_path):
    """Integers came back as floats. Of equally good settings the first one wins."""
    write_results(
        tmp_path,
        x=[["x", 0.1, 0.9, 50, True, None], ["x", 0.6, 0.1, 50, False, "auto"], ["x", 0.7, 0.1, 0.25, True, 2]],
        y=[["y", 0.3, 0.2, 50, True, None], ["y", 0.8, 0.1, 50, False, "auto"], ["y", 0.7, 0.0, 0.25, True, 2]],
    )
    best, score = evaluate_instance_segmentation_grid_search(tmp_path, ["a", "b", "c"])
    assert (best, score) == ({"a": 50, "b": False, "c": "auto"}, pytest.approx(0.7))
    assert [type(v) for v in best.values()] == [int, bool, str]
    best, score = evaluate_instance_segmentation_grid_search(tmp_path, ["a", "b", "c"], "SA50")
    assert (best, score) == ({"a": 50, "b": True, "c": None}, pytest.approx(0.55))
    best, score = evaluate_instance_segmentation_grid_search(tmp_path, ["a", "b", "c"], image_names=["x"])
    assert (best, score) == ({"a": 0.25, "b": True, "c": 2}, pytest.approx(0.7))
    for arguments, error in (
        ((["a"], "mSB"), "mSB"), ((["d"],), "no column 'd'"),
    ):
        with pytest.raises(InvalidInputError, match=error):
            evaluate_instance_segmentation_grid_search(tmp_path, *arguments)
    write_results(tmp_path, z=[["z", 0.1, 0.9, 50, True, None]])
    with pytest.raises(GridError, match=r"z\.csv"):
        evaluate_instance_segmentation_grid_search(tmp_path, ["a", "b", "c"])
    with pytest.raises(MissingFileError):
        evaluate_instance_segmentation_grid_search(tmp_path / "none", ["a"])


def test_best_settings_of_each_mode_have_a_file(tmp_path):
    """Those of APG overwrote those of AIS."""
    ais, both = {"distance_smoothing": 1.0}, {"center_distance_threshold": 0.5}
    for chosen in (ais, {"nms_threshold": 0.5, **both}, {"pred_iou_thresh": 0.6}):
        save_grid_search_best_params(chosen, 0.5, tmp_path)
    save_grid_search_best_params(both, 0.5, tmp_path / "other", mode="apg")
    names = {p.name: pd.read_csv(p).columns.tolist() for p in (tmp_path / "results").iterdir()}
    assert names == {
        "grid_search_params_amg.csv": ["best_msa", "pred_iou_thresh"],
        "grid_search_params_apg.csv": ["best_msa", "nms_threshold", "center_distance_threshold"],
        "grid_search_params_instance_segmentation_with_decoder.csv": ["best_msa", "distance_smoothing"],
    }
    assert [p.name for p in (tmp_path / "other" / "results").iterdir()] == ["grid_search_params_apg.csv"]
    with pytest.raises(InvalidInputError, match="different modes"):
        save_grid_search_best_params({"pred_iou_thresh": 0.6, **ais}, 0.5, tmp_path)


def test_labels_are_written_losslessly_and_kept(ais_segmenter, segmenter, files, tmp_path):
    """Images may be PNG, which cannot hold 32-bit labels."""
    segmenter = segmenter("ais")
    args = segmenter, files[0], None, tmp_path / "out"
    run_instance_segmentation_inference(*args, {"center_distance_threshold": 0.6}, verbose=False)
    paths = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in paths] == ["im0.tif", "im1.tif"]
    segmenter.initialize(imageio.imread(files[0][1]))
    np.testing.assert_array_equal(tifffile.imread(paths[1]), segmenter.generate(center_distance_threshold=0.6))
    times = [p.stat().st_mtime_ns for p in paths]
    run_instance_segmentation_inference(*args, {"center_distance_threshold": 0.6}, verbose=False)
    assert [p.stat().st_mtime_ns for p in paths] == times
    with pytest.raises(OutputExistsError, match="center_distance_threshold"):
        run_instance_segmentation_inference(*args, {"center_distance_threshold": 0.7}, verbose=False)
    with pytest.raises(InvalidInputError, match="would both be written"):
        run_instance_segmentation_inference(segmenter, files[0][:1] * 2, None, tmp_path / "new", verbose=False)
    with pytest.raises(InvalidInputError, match="no images"):
        run_instance_segmentation_inference(segmenter, [], None, tmp_path / "new", verbose=False)


@pytest.mark.parametrize(("run", "folder", "mode", "tiling"), [
    (run_instance_segmentation_with_decoder, "instance_segmentation_with_decoder", "ais", None),
    (run_apg, "apg", "apg", TILES),  # raised NotImplementedError
    (run_amg, "amg", "amg", None),
])
def test_search_and_inference_of_a_model(
    tiny_checkpoint, files, tmp_path, monkeypatch, run, folder, mode, tiling
):
    def few_points(*args, **kwargs):
        return get_instance_segmentation_generator(*args, **kwargs, **({"points_per_side": 3} if mode == "amg" else {}))
    monkeypatch.setattr(workflow, "get_instance_segmentation_generator", few_points)
    grid = {name: values[:2] for name, values in GRIDS[mode].items()}
    (image, other), (truth, _) = files
    out = run(
        tiny_checkpoint, "vit_t", tmp_path / "exp", [image], [truth], [other], cache_embeddings=mode != "amg",
        tiling_window_params=tiling, grid_search_values=grid, device="cpu", verbose=False, n_workers=2,
    )
    assert out == str(tmp_path / "exp" / folder / "inference")
    assert (tmp_path / "exp" / folder / "grid_search" / "im0.csv").exists()
    best, score = evaluate_instance_segmentation_grid_search(tmp_path / "exp" / folder / "grid_search", list(grid))
    saved = pd.read_csv(tmp_path / "exp" / "results" / f"grid_search_params_{folder}.csv").to_dict("records")[0]
    assert saved == {"best_msa": pytest.approx(score), **best}
    labels = tifffile.imread(tmp_path / "exp" / folder / "inference" / "im1.tif")
    assert labels.shape == imageio.imread(other).shape
    with tifffile.TiffFile(tmp_path / "exp" / folder / "inference" / "im1.tif") as file:
        options = json.loads(file.pages[0].description)["micro_sam"]["settings"]["options"]
    assert {name: options[name] for name in best} == best
    assert (tmp_path / "exp" / "embeddings" / "im1.zarr").exists() == (mode != "amg")


def test_tiling_params_are_checked_before_the_model_is_loaded(tmp_path):
    with pytest.raises(TilingParamsError, match="tile_shape"):
        run_amg(tmp_path / "none.pt", "vit_t", tmp_path, [], [], [], tiling_window_params={"tiles": (1, 1)})
