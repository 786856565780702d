"""Reports and the evaluation of a model: what is written, that it goes on where it stopped, and what is refused."""

import json

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.stats import bootstrap

from micro_sam.core.errors import DecoderMissingError, InvalidInputError, NoObjectsError, OutputExistsError
from micro_sam.core.progress import drain
from micro_sam.evaluation import model_tasks, run_evaluation, run_evaluation_for_iterative_prompting
from micro_sam.evaluation.inference import run_inference_with_iterative_prompting
from micro_sam.evaluation.iterative import iterate_prompts
from micro_sam.evaluation.model_evaluation import evaluate_model, model_evaluation_steps
from micro_sam.evaluation.pairing import group_names, natural_key
from micro_sam.evaluation.report import summarise, write_report
from micro_sam.models.loading import get_sam_model

FILES = {"report.md", "results.csv", "results.json", "summary.csv"}


@pytest.fixture
def table():
    """Two modalities with six images each: two automatic modes, and two prompts with three iterations."""
    rng, rows = np.random.default_rng(0), []
    for n in range(12):
        names = {"model": "tiny", "modality": "fluo" if n < 6 else "em|x", "image": f"i{n}"}
        rows += [{**names, "mode": mode, "mSA": rng.random()} for mode in ("ais", "amg")]
        rows += [
            {**names, "mode": "prompts", "prompt": prompt, "iteration": k, "IoU": rng.random(), "mSA": rng.random()}
            for prompt in ("point", "box") for k in range(3)
        ]
    return pd.DataFrame(rows)


def test_report_holds_the_same_in_all_formats(table, tmp_path):
    before = table.copy()
    path = write_report(table, tmp_path / "report", title="A title", notes=["a note"], settings={"seed": 1})
    pd.testing.assert_frame_equal(table, before)
    assert {p.name for p in path.parent.iterdir()} == FILES | {"scores.png", "iterations.png"}
    results = pd.read_csv(path.parent / "results.csv")
    assert list(results) == ["model", "modality", "mode", "prompt", "iteration", "image", "mSA", "IoU"]
    pd.testing.assert_frame_equal(results[list(table)], table, check_exact=False)
    summary = pd.read_csv(path.parent / "summary.csv")
    content = json.loads((path.parent / "results.json").read_text())["micro_sam"]
    assert content["settings"] == {"seed": 1}
    assert len(content["results"]) == len(table)
    assert content["results"][0]["IoU"] is None  # JSON has no NaN
    pd.testing.assert_frame_equal(pd.DataFrame(content["summary"]).astype(summary.dtypes), summary)
    text = path.read_text()
    mean = table[(table["mode"] == "ais") & (table["modality"] == "fluo")]["mSA"].mean()
    assert f"| tiny | fluo | ais | 6 | {mean:.3f} (" in text
    assert "em\\|x" in text
    assert "# A title\n\n- a note" in text
    # Of iterations the first and the last are in the text.
    assert "| prompts | point | 2 |" in text
    assert "| prompts | point | 1 |" not in text


def test_summary_averages_over_images_with_intervals(table):
    summary = summarise(table).set_index(["modality", "mode", "prompt", "iteration"])
    assert len(summary) == 3 * (2 + 2 * 3)
    for group, part in (("fluo", table[table["modality"] == "fluo"]), ("all", table)):
        values = part[(part["prompt"] == "box") & (part["iteration"] == 2)]["IoU"].to_numpy()
        row = summary.loc[(group, "prompts", "box", 2)]
        assert row["images"] == len(values)
        assert row["IoU"] == pytest.approx(values.mean(), abs=1e-12)
        expected = bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20000, rng=1
        ).confidence_interval
        # Two different sets of random samples.
        assert (row["IoU low"], row["IoU high"]) == pytest.approx((expected.low, expected.high), abs=0.02)
    one = summarise(pd.DataFrame([{"image": "a", "mSA": 0.5}, {"image": "b", "mSA": np.nan}])).iloc[0]
    assert one["mSA"] == 0.5  # images without a score do not count
    assert np.isnan(one["mSA low"])


def _dark(picture, color, rows=slice(None), columns=slice(None)):
    """How many pixels have a color, about."""
    part = picture[rows, columns, :3].astype(int)
    return int((np.abs(part - np.array(color)).sum(-1) < 60).sum())


def test_plots_show_what_the_table_says(tmp_path):
    """A bar of 0.9 has nine times the area of one of 0.1; a rising curve ends higher than it begins."""
    rows = [{"mode": mode, "image": f"{n}", "mSA": v} for mode, v in (("ais", 0.9), ("amg", 0.1)) for n in range(3)]
    write_report(pd.DataFrame(rows), tmp_path / "bars")
    assert {p.name for p in (tmp_path / "bars").iterdir()} == FILES | {"scores.png"}
    picture = imageio.imread(tmp_path / "bars" / "scores.png")
    top = slice(0, picture.shape[0] - 60)  # without the legend
    high, low = (_dark(picture, color, top) for color in ((64, 149, 197), (236, 183, 64)))
    assert high / low == pytest.approx(9, rel=0.15)
    rows = [{"prompt": "box", "iteration": k, "image": f"{n}", "IoU": 0.1 + 0.1 * k} for k in range(9) for n in (0, 1)]
    write_report(pd.DataFrame(rows), tmp_path / "curves")
    assert {p.name for p in (tmp_path / "curves").iterdir()} == FILES | {"iterations.png"}
    picture = imageio.imread(tmp_path / "curves" / "iterations.png")
    y, x = np.nonzero(np.abs(picture[..., :3].astype(int) - (0, 114, 178)).sum(-1)[:-40] < 30)
    left, right = (y[part].mean() for part in (x < np.quantile(x, 0.2), x > np.quantile(x, 0.8)))
    assert right < left - 100


def test_other_files_are_not_replaced(table, tmp_path):
    write_report(table, tmp_path / "a", plots=False)
    write_report(table.iloc[:2], tmp_path / "a", plots=False)
    assert len(pd.read_csv(tmp_path / "a" / "results.csv")) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.csv").write_text("my,own\n")
    with pytest.raises(OutputExistsError, match="none"):
        write_report(table, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["results.csv"]
    for wrong in (table.iloc[:0], table[["model", "image"]], table.assign(note="a")):
        with pytest.raises(InvalidInputError, match="cannot be reported"):
            write_report(wrong, tmp_path / "c")


def test_names_of_groups(tmp_path):
    paths = [tmp_path / "em" / "images" / "mito_1.tif", tmp_path / "lm" / "images" / "fluo_256_ab.tif"]
    assert group_names(paths, None) == ["all", "all"]
    assert group_names(paths, "folder") == ["em", "lm"]
    assert group_names(paths[:1], "folder") == ["images"]
    assert group_names(paths, "prefix") == ["mito", "fluo_256"]
    assert group_names(paths, "([a-z]+)_") == ["mito", "fluo"]
    assert group_names(paths, "mito|fluo") == ["mito", "fluo"]
    for wrong, message in (("fluo", "does not match the name 'mito_1'"), ("(", "regular expression")):
        with pytest.raises(InvalidInputError, match=message):
            group_names(paths, wrong)
    assert sorted(["a10", "a2", "b", "a"], key=natural_key) == ["a", "a2", "a10", "b"]


# --- a model ---


STACK = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack"}
OPTIONS = {"modes": ["ais"], "n_iterations": 2, "verbose": False, "device": "cpu"}


@pytest.fixture
def data(tmp_path, cells_image, cells_labels, monkeypatch):
    """Three images with some objects each, and their labels: files with the same names."""
    # Drawing takes longer than everything else here.
    monkeypatch.setattr("micro_sam.evaluation.report_plots.draw_report", lambda *args: [])
    keep = np.unique(cells_labels)[1:6]
    labels = np.where(np.isin(cells_labels, keep), cells_labels, 0)
    for n, turn in enumerate((np.array, np.flipud, np.fliplr)):
        for folder, array in (("images", cells_image), ("labels", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / folder / f"{'ab'[n % 2]}_{n}.tif", turn(array))
    return [tmp_path / "images"], [tmp_path / "labels"]


def test_model_is_scored_as_by_its_separate_steps(data, tiny_checkpoint, tmp_path):
    """Prompts score like label images of `run_inference_with_iterative_prompting`."""
    table = evaluate_model(*data, tmp_path / "out", None, tiny_checkpoint, group_by="prefix", prompts=None, **OPTIONS)
    assert list(table)[:7] == ["model", "modality", "mode", "prompt", "iteration", "image", "IoU"]
    assert set(table["modality"]) == {"a", "b"}
    assert len(table) == 3 * (1 + 4 * 2)
    assert table[table["mode"] == "ais"]["IoU"].isna().all()
    predictor = get_sam_model("vit_t", "cpu", tiny_checkpoint)
    images, labels = (sorted(folder.iterdir()) for (folder,) in data)
    for prompt, start_with_box, use_masks in (("point", False, False), ("box_masks", True, True)):
        predictions = tmp_path / prompt
        run_inference_with_iterative_prompting(
            predictor, images, labels, None, predictions, start_with_box, n_iterations=2, use_masks=use_masks,
            verbose=False,
        )
        expected = run_evaluation_for_iterative_prompting(labels, predictions, tmp_path / f"{prompt}_results")
        found = table[table["prompt"] == prompt].groupby("iteration")[list(expected)].mean()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert 0 < table["IoU"].max() < 1
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    rows = summary[(summary["modality"] == "all") & (summary["prompt"] == "box") & (summary["iteration"] == 1)]
    of_box = table[(table["prompt"] == "box") & (table["iteration"] == 1)]
    assert rows["IoU"].item() == pytest.approx(of_box["IoU"].mean(), abs=1e-9)
    assert rows["images"].item() == 3


def test_automatic_scores_are_those_of_the_labels(data, tiny_checkpoint, tmp_path):
    from micro_sam.automatic_segmentation import automatic_instance_segmentation, get_predictor_and_segmenter

    options = OPTIONS | {"modes": ["apg", "ais"], "options": {"min_size": 5, "foreground_threshold": 0.4}}
    table = evaluate_model(*data, tmp_path / "out", None, tiny_checkpoint, prompts=[], **options)
    assert "prompt" not in table
    predictor, segmenter = get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu", segmentation_mode="ais")
    images, labels = (sorted(folder.iterdir()) for (folder,) in data)
    found = [
        automatic_instance_segmentation(predictor, segmenter, image, verbose=False, **options["options"])
        for image in images
    ]
    expected = run_evaluation(labels, found, verbose=False).iloc[0]
    assert dict(table[table["mode"] == "ais"][list(expected.index)].mean()) == pytest.approx(dict(expected), abs=1e-9)


def test_interrupted_evaluation_goes_on(data, tiny_checkpoint, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["start"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return iterate_prompts(*args, **kwargs)

    def run(folder, **options):
        return evaluate_model(*data, tmp_path / folder, None, tiny_checkpoint, prompts=["box"], **OPTIONS, **options)

    expected = run("whole")
    monkeypatch.setattr(model_tasks, "iterate_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert not (tmp_path / "parts" / "report.md").exists()
    assert not list(tmp_path.rglob("*.partial"))
    pd.testing.assert_frame_equal(run("parts"), expected)
    assert len(calls) == 4  # the first image was not prompted again
    # Changed labels are noticed; the other images are as before.
    file = data[1][0] / "a_0.tif"
    labels = tifffile.imread(file)
    tifffile.imwrite(file, np.where(labels == labels.max(), 0, labels))
    run("parts")
    assert len(calls) == 5
    with pytest.raises(OutputExistsError, match="n_objects: None there, 2 now"):
        run("parts", n_objects=2)
    assert run("parts", n_objects=2, overwrite=True).attrs == {}


def test_cancelled_evaluation_keeps_what_is_complete(data, tiny_checkpoint, tmp_path):
    steps = model_evaluation_steps(
        *data, tmp_path / "out", None, tiny_checkpoint, modes=[], prompts=["box"], n_iterations=1, device="cpu"
    )
    for step in steps:
        if step.text == "Evaluate model" and step.done == 1:
            break
    steps.close()
    assert step.total == 3
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 1


def test_few_objects_are_prompted(data, tiny_checkpoint, tmp_path, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        seen.append(list(kwargs["ids"]))
        return iterate_prompts(*args, **kwargs)

    monkeypatch.setattr(model_tasks, "iterate_prompts", watched)
    monkeypatch.setattr(model_tasks, "_MAX_MASK_BYTES", 128 * 160)  # one object at a time
    options = OPTIONS | {"modes": [], "n_iterations": 1}
    evaluate_model(*data, tmp_path / "few", None, tiny_checkpoint, prompts=["point"], n_objects=2, **options)
    ids = np.unique(tifffile.imread(data[1][0] / "a_0.tif"))[1:]
    assert seen[:2] == [[ids[0]], [ids[-1]]]
    assert len(seen) == 6


def test_what_cannot_be_evaluated_is_said_first(data, tiny_checkpoint, tmp_path):
    def run(images=data[0], labels=data[1], **options):
        return drain(
            model_evaluation_steps(images, labels, tmp_path / "out", None, tiny_checkpoint, device="cpu", **options),
            verbose=False,
        )

    with pytest.raises(InvalidInputError, match="'box'"):
        run(prompts=["boxes"])
    with pytest.raises(InvalidInputError, match="'ais'"):
        run(modes=["aiss"])
    with pytest.raises(InvalidInputError, match="n_iterations"):
        run(n_iterations=0)
    with pytest.raises(InvalidInputError, match="min_size"):
        run(options={"min_sise": 3})
    tifffile.imwrite(tmp_path / "small.tif", np.ones((8, 8), dtype=np.uint8))
    with pytest.raises(AssertionError, match="shape"):
        run([data[0][0] / "a_0.tif"], [tmp_path / "small.tif"])
    with pytest.raises(InvalidInputError, match="3 images and 1 labels"):
        run(labels=[tmp_path / "small.tif"])
    for name in ("volume", "volume_labels"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.ones((3, 32, 40), dtype=np.uint8), **STACK)
    with pytest.raises(InvalidInputError, match="volumes"):
        run([tmp_path / "volume.tif"], [tmp_path / "volume_labels.tif"], prompts=["box"])
    assert not (tmp_path / "out").exists()
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((128, 160), dtype=np.uint8))
    with pytest.raises(NoObjectsError):
        run([data[0][0] / "a_0.tif"], [tmp_path / "empty.tif"], modes=[], prompts=["box"])


def test_models_without_decoder_have_one_mode(data, tiny_sam, tmp_path):
    import torch

    path = tmp_path / "prompts_only.pt"
    torch.save({"model_state": tiny_sam.state_dict(), "settings": {"model_type": "vit_t", "image_size": 256}}, path)
    arguments = ([data[0][0] / "a_0.tif"], [data[1][0] / "a_0.tif"], tmp_path / "out", None, path)
    table = evaluate_model(
        *arguments, prompts=[], device="cpu", verbose=False, options={"points_per_side": 2}
    )
    assert list(table["mode"]) == ["amg"]
    with pytest.raises(DecoderMissingError):
        evaluate_model(*arguments, prompts=[], **OPTIONS)


def test_volumes_are_segmented_and_not_prompted(tiny_checkpoint, tmp_path, cells_image, cells_labels):
    for name, array in (("image", cells_image), ("labels", cells_labels)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.stack([array[:64, :64]] * 3), **STACK)
    files = [tmp_path / "image.tif"], [tmp_path / "labels.tif"]
    table = evaluate_model(*files, tmp_path / "out", None, tiny_checkpoint, **OPTIONS)
    assert list(table["mode"]) == ["ais"]
    assert "left out for 1 volumes" in (tmp_path / "out" / "report.md").read_text()
