"""Prompts from ground truth, iterative prompting, and the label images that they give."""

import os
import pickle

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import torch
from conftest import DATA
from scipy.ndimage import distance_transform_edt
from segment_anything import SamPredictor

from micro_sam.core.errors import InvalidInputError, OutputExistsError
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.evaluation import inference as inference_module
from micro_sam.evaluation import iterative
from micro_sam.evaluation.experiments import (
    default_experiment_settings,
    full_experiment_settings,
    get_experiment_setting_name,
)
from micro_sam.evaluation.inference import (
    precompute_all_embeddings,
    precompute_all_prompts,
    run_inference_with_iterative_prompting,
    run_inference_with_prompts,
)
from micro_sam.evaluation.iterative import iterate_prompts, iterative_segmentations
from micro_sam.evaluation.prompt_files import PromptFileError, sample_points


@pytest.fixture(scope="module")
def scene():
    """A crop with a few objects whose ids are not consecutive."""
    image, labels = imageio.imread(DATA / "nuclei.png")[:96, :96], imageio.imread(DATA / "nuclei_labels.tif")[:96, :96]
    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    keep = ids[np.argsort(-counts)[:4]]
    return image, np.where(np.isin(labels, keep), 10 * labels.astype(np.int64), 0)


@pytest.fixture(scope="module")
def embedded(tiny_sam, scene):
    return precompute_image_embeddings(SamPredictor(tiny_sam), scene[0], ndim=2, verbose=False)


@pytest.fixture
def seen_prompts(monkeypatch):
    """What iterative prompting hands to the model: prompts and whether three masks are wanted."""
    seen, predict = [], iterative.predict_boxed

    def spy(predictor, prompts, batch_size, multimasking):
        seen.append((prompts, multimasking))
        return predict(predictor, prompts, batch_size, multimasking)
    monkeypatch.setattr(iterative, "predict_boxed", spy)
    return seen


def deepest(mask):
    """Distance of each pixel to the outside of the mask, in which the border of the image counts as outside."""
    return distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]


@pytest.mark.parametrize("use_masks", [False, True])
@pytest.mark.parametrize("start", ["point", "box"])
def test_corrections_lie_where_masks_are_wrong(
    tiny_predictor, scene, embedded, seen_prompts, start, use_masks
):
    _, truth = scene
    results = list(iterate_prompts(
        tiny_predictor, embedded, truth, start=start, n_iterations=3, use_masks=use_masks
    ))
    ids = np.unique(truth[truth > 0])
    assert len(results) == 3
    assert [multimask for _, multimask in seen_prompts] == [start == "point", False, False]
    first, last = seen_prompts[0][0], seen_prompts[-1][0]
    for k, id_ in enumerate(ids):
        mask = truth == id_
        rows, columns = np.nonzero(mask)
        if start == "box":
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert first.boxes[k].tolist() == expected == last.boxes[k].tolist()
            points, labels = last.points[k], last.labels[k]
        else:
            x, y = first.points[k, 0].astype(int)
            assert deepest(mask)[y, x] == deepest(mask).max()
            assert (first.points[k] == last.points[k, :1]).all()
            points, labels = last.points[k, 1:], last.labels[k, 1:]
        assert labels.tolist() == [1, 0, 1, 0]
        for round_, (found_ids, masks) in enumerate(results[:2]):
            assert found_ids.tolist() == ids.tolist()
            assert masks.dtype == bool
            (x, y), (not_x, not_y) = points[2 * round_:2 * round_ + 2].astype(int)
            missing, superfluous = mask & ~masks[k], masks[k] & ~mask
            assert missing[y, x] if missing.any() else mask[y, x]
            assert superfluous[not_y, not_x] if superfluous.any() else not mask[not_y, not_x]
    assert first.logits is None
    assert (last.logits is not None) == use_masks


def test_masks_are_those_of_the_original_predictor(tiny_predictor, scene, embedded, seen_prompts):
    """`SamPredictor.predict_torch` gives the same masks: the best of three for a point, one mask afterwards."""
    _, truth = scene
    results = list(iterate_prompts(tiny_predictor, embedded, truth, start="point", n_iterations=2, use_masks=True))
    for (prompts, multimask), (_, masks) in zip(seen_prompts, results):
        points = tiny_predictor.transform.apply_coords_torch(torch.from_numpy(prompts.points).float(), truth.shape)
        logits, rated, _ = tiny_predictor.predict_torch(
            points, torch.from_numpy(prompts.labels), mask_input=prompts.logits, multimask_output=multimask,
            return_logits=True,
        )
        best = logits[torch.arange(len(logits)), rated.argmax(1)].numpy()
        clear = np.abs(best) > 1e-3  # beyond rounding
        assert clear.mean() > 0.95
        assert ((best > 0) == masks)[clear].all()


def test_results_depend_on_seed_and_object_only(tiny_predictor, scene, embedded):
    """Not on batches, on other objects, or on numpy's global state; without a seed they can be repeated."""
    _, truth = scene

    def run(**options):
        return [masks for _, masks in iterate_prompts(
            tiny_predictor, embedded, truth, start="point", n_iterations=3, **options
        )]

    everything = run()
    np.random.seed(7)
    for batch_size in (1, 3):
        for a, b in zip(run(batch_size=batch_size), everything):
            # Sums over batches of other sizes are rounded differently.
            assert (a != b).mean() < 1e-3
    part = np.unique(truth)[[2, 4]]
    for a, b in zip(run(ids=part), everything):
        assert (a != b[[1, 3]]).mean() < 1e-3
    assert any((a != b).any() for a, b in zip(run(rng=1), everything))
    with pytest.raises(InvalidInputError, match="no object 1"):
        run(ids=[1])


def test_object_that_fills_the_image_and_image_without_objects(tiny_predictor, scene, embedded, seen_prompts):
    _, truth = scene
    results = list(iterate_prompts(tiny_predictor, embedded, np.full_like(truth, 3), start="point", n_iterations=2))
    assert [masks.shape for _, masks in results] == [(1, *truth.shape)] * 2
    assert seen_prompts[-1][0].labels.tolist() == [[1, 1, -1]]
    assert sample_points(np.full((5, 5), 3), 2, 1, 5, 0)[1].tolist() == [[1, 1, -1]]
    empty = np.zeros_like(truth)
    assert [masks.shape for _, masks in iterate_prompts(tiny_predictor, embedded, empty, start="box", n_iterations=2)] \
        == [(0, *truth.shape)] * 2
    for labels in iterative_segmentations(tiny_predictor, embedded, empty, start="box", n_iterations=2):
        assert not labels.any()


def test_wrong_input_of_iterative_prompting(tiny_predictor, scene, embedded):
    _, truth = scene
    for wrong, text in (
        ({"start": "mask"}, "'point' or 'box'"), ({"start": "point", "n_iterations": 0}, "n_iterations"),
        ({"start": "point", "batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            next(iterate_prompts(tiny_predictor, embedded, truth, **wrong))
    with pytest.raises(InvalidInputError, match="Pass the labels of the same image"):
        next(iterate_prompts(tiny_predictor, embedded, truth[:50], start="box"))


def test_experiment_settings_have_names_of_their_own():
    """Points with a box had the name, and thereby the folder, of points alone."""
    assert [get_experiment_setting_name(s) for s in default_experiment_settings()] == [
        "points/p1-n0", "points/p2-n4", "points/p4-n8", "box/p0-n0"
    ]
    full = full_experiment_settings(use_boxes=True)
    both = [{**setting, "use_boxes": True} for setting in full if setting["use_points"]]
    names = [get_experiment_setting_name(s) for s in full + both]
    assert (len(full), len(full_experiment_settings()), len(set(names))) == (31, 30, 61)
    assert len(full_experiment_settings(positive_range=[1], negative_range=[0, 3])) == 2
    for wrong in ({"use_points": True}, {"use_points": False}, {"use_point": True}):
        with pytest.raises(InvalidInputError):
            get_experiment_setting_name(wrong)


@pytest.fixture
def files(tmp_path, scene):
    """Two images with truth: as png, which cannot hold 32-bit labels."""
    image, truth = scene
    paths = []
    for n, part in enumerate((np.s_[:96, :96], np.s_[:80, :96])):
        names = tmp_path / "images" / f"im{n}.png", tmp_path / "labels" / f"im{n}.tif"
        for name in names:
            name.parent.mkdir(exist_ok=True)
        imageio.imwrite(names[0], image[part])
        tifffile.imwrite(names[1], truth[part].astype(np.uint16))
        paths.append(names)
    return tuple(list(p) for p in zip(*paths))


def run_prompts(predictor, files, out, points=True, boxes=False, numbers=(2, 3), **options):
    store = files[0][0].parent / "embeddings"
    run_inference_with_prompts(predictor, *files, store, out, points, boxes, *numbers, verbose=False, **options)
    return [tifffile.imread(out / f"im{n}.tif") for n in range(len(files[0]))]


def test_cached_prompts_are_used_again(tiny_predictor, files, tmp_path):
    """Reusing them raised, and a run that found some predictions wrote an incomplete file."""
    fresh = run_prompts(tiny_predictor, files, tmp_path / "fresh")
    kept = {"prompt_save_dir": tmp_path / "prompts"}
    first = run_prompts(tiny_predictor, [paths[:1] for paths in files], tmp_path / "kept", **kept)
    again = run_prompts(tiny_predictor, files, tmp_path / "kept", **kept)
    content = pickle.loads((tmp_path / "prompts" / "points-p2-n3.pkl").read_bytes())
    assert sorted(content) == ["im0.tif", "im1.tif"]
    for a, b in zip(fresh, again):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first[0], again[0])
    assert all(labels.any() for labels in fresh)
    # The file decides: with other points there are other masks.
    content["im1.tif"] = content["im0.tif"]
    (tmp_path / "prompts" / "points-p2-n3.pkl").write_bytes(pickle.dumps(content))
    tifffile.imwrite(files[1][1], tifffile.imread(files[1][1])[::-1])
    with pytest.raises(PromptFileError, match=r"im1\.tif"):
        run_prompts(tiny_predictor, files, tmp_path / "other", **kept)


@pytest.mark.parametrize(("points", "boxes"), [(True, False), (False, True), (True, True)])
def test_each_kind_of_prompt(tiny_predictor, files, tmp_path, monkeypatch, points, boxes):
    """The absent kind is absent, and only a single point without box gets three masks."""
    calls, run = [], inference_module.batched_inference

    def spy(predictor, image, batch_size, **prompts):
        calls.append(prompts)
        return run(predictor, image, batch_size, **prompts)
    monkeypatch.setattr(inference_module, "batched_inference", spy)
    one = [paths[:1] for paths in files]
    plain = run_prompts(tiny_predictor, one, tmp_path / "a", points, boxes, (1, 0))
    kept = run_prompts(tiny_predictor, one, tmp_path / "b", points, boxes, (1, 0), prompt_save_dir=tmp_path / "prompts")
    np.testing.assert_array_equal(plain[0], kept[0])
    for prompts in calls:
        assert set(prompts) - {"multimasking"} == {*(["points", "point_labels"] * points), *(["boxes"] * boxes)}
        assert prompts["multimasking"] == (not boxes)
    with pytest.raises(InvalidInputError, match="no prompts"):
        run_prompts(tiny_predictor, one, tmp_path / "a", False, False)


def test_predictions_are_kept_and_never_replaced_silently(tiny_predictor, files, tmp_path):
    precompute_all_embeddings(tiny_predictor, files[0], files[0][0].parent / "embeddings", verbose=False)
    assert sorted(os.listdir(files[0][0].parent / "embeddings")) == ["im0.zarr", "im1.zarr"]
    labels = run_prompts(tiny_predictor, files, tmp_path / "out")
    time = (tmp_path / "out" / "im0.tif").stat().st_mtime_ns
    again = run_prompts(tiny_predictor, files, tmp_path / "out")
    np.testing.assert_array_equal(labels[0], again[0])
    assert (tmp_path / "out" / "im0.tif").stat().st_mtime_ns == time
    with pytest.raises(OutputExistsError, match="n_positives"):
        run_prompts(tiny_predictor, files, tmp_path / "out", numbers=(1, 0))
    run_prompts(tiny_predictor, files, tmp_path / "out", numbers=(1, 0), overwrite=True)
    with pytest.raises(ValueError, match="2 images and 1 ground truths"):
        run_prompts(tiny_predictor, (files[0], files[1][:1]), tmp_path / "out")


def test_prompt_file_runs_no_code(tiny_predictor, files, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / "prompts").mkdir()
    for content in (pickle.dumps({"im0.tif": Attack()}), b"no pickle", pickle.dumps([1])):
        (tmp_path / "prompts" / "boxes.pkl").write_bytes(content)
        with pytest.raises(PromptFileError, match=r"boxes\.pkl"):
            precompute_all_prompts(
                files[1], tmp_path / "prompts", [{"use_points": False, "use_boxes": True}], verbose=False
            )
    assert not (tmp_path / "attacked").exists()


def test_negative_points_keep_their_distance(scene):
    _, truth = scene
    points, labels = sample_points(truth, 1, 4, 3, 0)
    for k, id_ in enumerate(np.unique(truth[truth > 0])):
        outside = distance_transform_edt(truth != id_)
        x, y = points[k].T
        assert labels[k].tolist() == [1, 0, 0, 0, 0]
        assert truth[y[0], x[0]] == id_
        assert (outside[y[1:], x[1:]] > 3).all()


def test_iterations_are_written_and_resumed(tiny_predictor, files, tmp_path, monkeypatch):
    """An image is skipped only if all of its iterations are there."""
    options = {"start_with_box_prompt": False, "n_iterations": 3, "verbose": False}
    args = (tiny_predictor, *files, None, tmp_path / "out")
    run_inference_with_iterative_prompting(*args, **options)
    paths = sorted((tmp_path / "out").rglob("*.tif"))
    names = [str(p.relative_to(tmp_path / "out").as_posix()) for p in paths]
    assert names == [f"iteration0{k}/im{n}.tif" for k in range(3) for n in range(2)]
    ids, truth = np.unique(tifffile.imread(files[1][1]), return_inverse=True)
    assert ids[0] == 0
    embeddings = precompute_image_embeddings(tiny_predictor, imageio.imread(files[0][1]), ndim=2, verbose=False)
    expected = iterative_segmentations(
        tiny_predictor, embeddings, truth.reshape(80, 96), start="point", n_iterations=3
    )
    for path, labels in zip(paths[1::2], expected):
        assert labels.any()
        np.testing.assert_array_equal(tifffile.imread(path), labels)

    before = [p.read_bytes() for p in paths]
    computed, segment = [], iterative_segmentations
    monkeypatch.setattr(
        inference_module, "iterative_segmentations", lambda *a, **k: computed.append(a[2].shape) or segment(*a, **k)
    )
    paths[3].unlink()  # iteration01/im1.tif
    run_inference_with_iterative_prompting(*args, **options)
    assert computed == [(80, 96)]
    assert [p.read_bytes() for p in paths] == before
    with pytest.raises(OutputExistsError, match="use_masks"):
        run_inference_with_iterative_prompting(*args, **options, use_masks=True)
