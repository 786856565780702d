"""The helpers for LIVECell, on two tiny cell types in the folders of that dataset."""

import json

import imageio.v3 as imageio
import pandas as pd
import pytest
import tifffile
from conftest import DATA

from micro_sam.core.errors import InvalidInputError, MissingFileError
from micro_sam.evaluation import livecell
from micro_sam.evaluation.livecell import (
    _get_livecell_paths,
    livecell_inference,
    run_livecell_amg,
    run_livecell_evaluation,
    run_livecell_inference,
    run_livecell_instance_segmentation_with_decoder,
)


@pytest.fixture
def dataset(tmp_path):
    """Per type one image for test and two for validation; one of these is not in the validation split."""
    image, labels = imageio.imread(DATA / "nuclei.png"), imageio.imread(DATA / "nuclei_labels.tif")
    folder, listed = tmp_path / "livecell", []
    for k, (cell_type, split, number) in enumerate(
        (t, s, n) for t in ("A172", "SkBr3") for s, n in (("test", 1), ("train_val", 1), ("train_val", 2))
    ):
        name, part = f"{cell_type}_Phase_{split}_{number}.tif", (slice(8 * k, 8 * k + 64), slice(0, 80))
        # Both layouts of the images are in use.
        images = folder / "images" / f"livecell_{split}_images" / (cell_type if cell_type == "SkBr3" else "")
        truth = folder / "annotations" / f"livecell_{split}_images" / cell_type
        for path, content in ((images, image), (truth, labels)):
            path.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path / name, content[part])
        listed += [name] * (split == "train_val" and (cell_type, number) != ("A172", 2))
    (folder / "val.json").write_text(json.dumps({"images": [{"file_name": name} for name in reversed(listed)]}))
    return folder


def test_splits(dataset):
    images, truths = _get_livecell_paths(dataset)
    folder = dataset / "images" / "livecell_test_images"
    assert images == [str(folder / "A172_Phase_test_1.tif"), str(folder / "SkBr3" / "SkBr3_Phase_test_1.tif")]
    assert truths == [
        str(dataset / "annotations" / "livecell_test_images" / t / f"{t}_Phase_test_1.tif") for t in ("A172", "SkBr3")
    ]
    names = [path.rsplit("/", 1)[1] for path in _get_livecell_paths(dataset, "val")[0]]
    assert names == [f"{name}.tif" for name in ("A172_Phase_train_val_1", "SkBr3_Phase_train_val_1",
                                                "SkBr3_Phase_train_val_2")]
    assert [len(paths) for paths in _get_livecell_paths(dataset, "val", 1)] == [2, 2]
    with pytest.raises(InvalidInputError, match="'test' or 'val'"):
        _get_livecell_paths(dataset, "train")


def test_missing_data_says_what_to_place_where(dataset, tmp_path):
    """Nothing is downloaded, and no model is loaded before."""
    empty = tmp_path / "empty"
    with pytest.raises(MissingFileError, match=r"livecell_test_images.*images\.zip.*livecell_coco_val\.json"):
        livecell_inference(None, empty, "no_such_model", tmp_path, use_points=False, use_boxes=True)
    (dataset / "annotations" / "livecell_train_val_images" / "A172" / "A172_Phase_train_val_1.tif").unlink()
    with pytest.raises(MissingFileError, match=r"A172_Phase_train_val_1\.tif"):
        _get_livecell_paths(dataset, "val")
    (dataset / "val.json").write_text("[]")
    with pytest.raises(InvalidInputError, match="COCO"):
        _get_livecell_paths(dataset, "val")
    (dataset / "val.json").unlink()
    with pytest.raises(MissingFileError, match=r"val\.json"):
        run_livecell_amg(None, dataset, "no_such_model", tmp_path)


def test_prompts(tiny_predictor, dataset, tmp_path):
    for points, boxes, folder in ((True, False, "points/p1-n2"), (False, True, "box/p0-n0")):
        livecell_inference(
            None, dataset, "unused", tmp_path / "exp", points, boxes, 1, 2, tmp_path / "prompts", tiny_predictor
        )
        assert len(list((tmp_path / "exp" / folder).glob("*.tif"))) == 2
    with pytest.raises(InvalidInputError, match="n_negatives"):
        livecell_inference(None, dataset, "unused", tmp_path, True, False, 1, predictor=tiny_predictor)


def test_automatic_segmentation_with_search(dataset, tmp_path, tiny_checkpoint, monkeypatch):
    """Both runners always raised; they pass the validation images, the test images and the grid."""
    calls = []
    monkeypatch.setattr(livecell, "run_amg", lambda *args, **kwargs: calls.append((args, kwargs)) or "amg")
    assert run_livecell_amg(
        tiny_checkpoint, dataset, "vit_t", tmp_path / "exp", [0.5], [0.6], n_val_per_cell_type=1
    ) == "amg"
    (args, kwargs), = calls
    assert args == (
        tiny_checkpoint, "vit_t", tmp_path / "exp", *_get_livecell_paths(dataset, "val", 1),
        _get_livecell_paths(dataset)[0],
    )
    assert kwargs["grid_search_values"] == {"pred_iou_thresh": [0.5], "stability_score_thresh": [0.6]}
    out = run_livecell_instance_segmentation_with_decoder(
        tiny_checkpoint, dataset, "vit_t", tmp_path / "exp", [0.5], [0.6], [1.0], [10, 20], n_val_per_cell_type=1
    )
    assert out == str(tmp_path / "exp" / "instance_segmentation_with_decoder" / "inference")
    assert len(list((tmp_path / "exp" / "instance_segmentation_with_decoder" / "grid_search").glob("*.csv"))) == 2


def test_scripts(dataset, tmp_path, tiny_checkpoint, capsys):
    experiment = tmp_path / "exp"
    common = ["-i", str(dataset), "-e", str(experiment)]
    with pytest.raises(MissingFileError, match="no results"):
        run_livecell_evaluation(common)
    model = ["-c", str(tiny_checkpoint), "-m", "vit_t"]
    with pytest.raises(InvalidInputError, match="nothing to do"):
        run_livecell_inference([*model, *common])
    run_livecell_inference([*model, *common, "-p", "-ip", "-b", "--use_masks", "--n_val_per_cell_type", "1"])
    assert len(list((experiment / "embeddings").glob("*.zarr"))) == 4
    assert len(list((experiment / "start_with_box" / "iteration07").glob("*.tif"))) == 2
    run_livecell_evaluation(common)
    path = experiment / "results" / "iterative_prompting_with_mask" / "iterative_prompts_start_box.csv"
    assert len(pd.read_csv(path)) == 8
    assert "start with box" in capsys.readouterr().out
