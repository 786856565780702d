"""The command micro_sam.convert: files, folders, formats, what it says and what it refuses."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

from micro_sam.cli import convert
from micro_sam.cli.convert import main
from micro_sam.interchange import FORMATS, read_labels, write_labels

LABELS = np.zeros((20, 24), np.uint16)
LABELS[2:9, 3:9], LABELS[4:6, 5:7], LABELS[12:15, 1:20] = 3, 0, 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    tifffile.imwrite("masks/a.tif", LABELS)
    tifffile.imwrite("masks/b.tif", LABELS.T)


def test_a_chain_through_all_formats_loses_nothing(capsys):
    Path("classes.csv").write_text("label,class,name,area\n3,stroma,é 1,40\n8,tumour,,\n", encoding="utf-8")
    assert main(["masks/a.tif", "-o", "a.zip", "--classes", "classes.csv"]) == 0
    chain = ["a.zip", "a.geojson", "a.ome.zarr", "a.json", "b.zip", "b.tif"]
    for old, new in zip(chain, chain[1:]):
        assert main([old, "-o", new, *(["--to", "coco"] if new == "a.json" else [])]) == 0
    out = capsys.readouterr().out
    assert "masks/a.tif: 2 objects -> a.zip\n" in out
    assert "b.zip: 2 objects -> b.tif (other programs will not find: names, classes)\n" in out
    image = read_labels("b.tif")
    np.testing.assert_array_equal(image.labels, LABELS)
    assert image.names == {3: "é 1"}
    assert image.classes == {3: "stroma", 8: "tumour"}


def test_again_and_overwrite(capsys):
    assert main(["masks/a.tif", "-o", "a.zip"]) == 0
    assert main(["masks/a.tif", "-o", "a.zip"]) == 0
    assert "a.zip is there already" in capsys.readouterr().out
    assert main(["masks/b.tif", "-o", "a.zip"]) == 1
    assert "a.zip exists and holds something else" in capsys.readouterr().err
    np.testing.assert_array_equal(read_labels("a.zip").labels, LABELS)
    assert main(["masks/b.tif", "-o", "a.zip", "--overwrite"]) == 0
    np.testing.assert_array_equal(read_labels("a.zip").labels, LABELS.T)


def test_folders_and_reports(capsys):
    assert main(["masks", "-o", "rois", "--to", "imagej"]) == 0
    Path("rois/c.zip").write_text("damaged")
    assert main(["rois", "-o", "out", "--from", "imagej", "--to", "geojson", "--json", "report.json"]) == 1
    assert sorted(os.listdir("out")) == ["a.geojson", "b.geojson"], "one damaged file does not stop the others"
    report = json.loads(Path("report.json").read_text())
    assert report["summary"] == {"done": 2, "skipped": 0, "failed": 1, "not started": 0}
    assert report["files"][0]["n_objects"] == 2
    assert report["files"][2]["error_type"] == "ImageReadError"
    assert main(["out/*.geojson", "-o", "tifs"]) == 0
    np.testing.assert_array_equal(tifffile.imread("tifs/b.tif"), LABELS.T)
    np.save("masks/c_seg.npy", {"masks": LABELS})
    assert main(["masks", "-o", "tifs", "--from", "cellpose"]) == 0
    np.testing.assert_array_equal(tifffile.imread("tifs/c.tif"), LABELS)


def test_one_dataset_of_many_images_and_back(capsys):
    os.mkdir("images")
    tifffile.imwrite("images/a.tiff", np.zeros((2, 2), np.uint8))
    tifffile.imwrite("images/b.tiff", np.zeros((24, 20), np.uint8))
    assert main(["masks", "-o", "set.json", "--to", "coco", "--like", "images"]) == 1
    assert "shape (20, 24), but (2, 2) was asked for" in capsys.readouterr().err
    assert not os.path.exists("set.json"), "a part would pass for the whole"
    tifffile.imwrite("images/a.tiff", np.zeros((20, 24), np.uint8))
    assert main(["masks", "-o", "set.json", "--to", "coco", "--like", "images"]) == 0
    assert [i["file_name"] for i in json.loads(Path("set.json").read_text())["images"]] == ["a.tiff", "b.tiff"]
    assert main(["set.json", "-o", "back"]) == 0
    np.testing.assert_array_equal(tifffile.imread("back/a.tif"), LABELS)
    np.testing.assert_array_equal(tifffile.imread("back/b.tif"), LABELS.T)
    assert main(["set.json", "-o", "one.zip", "--key", "b.tiff"]) == 0
    np.testing.assert_array_equal(read_labels("one.zip").labels, LABELS.T)


def test_names_in_a_dataset_lead_nowhere_else():
    content = {"images": [{"id": n, "file_name": f"../../{n}.png", "width": 4, "height": 4} for n in (1, 2)],
               "annotations": [], "categories": []}
    Path("set.json").write_text(json.dumps(content))
    assert main(["set.json", "-o", "deep/out"]) == 0
    assert sorted(os.listdir("deep/out")) == ["1.tif", "2.tif"]
    assert not os.path.exists("1.tif")


def test_like_and_shape(capsys):
    path = write_labels("a.geojson", np.stack([LABELS, LABELS]), axes="TYX", scale=(1, 0.5, 0.5))
    content = json.loads(path.read_text())
    del content["micro_sam"]  # as QuPath saves it
    path.write_text(json.dumps(content))
    assert main(["a.geojson", "-o", "a.tif"]) == 1
    assert "--shape" in capsys.readouterr().err
    assert main(["a.geojson", "-o", "a.tif", "--shape", "2", "20", "24", "--axes", "tyx"]) == 0
    assert read_labels("a.tif").axes == "TYX"
    tifffile.imwrite("image.ome.tif", np.zeros((2, 20, 24), np.uint8), metadata={
        "axes": "TYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5,
    })
    assert main(["a.geojson", "-o", "b.tif", "--like", "image.ome.tif"]) == 0
    image = read_labels("b.tif")
    assert (image.axes, image.scale) == ("TYX", (1.0, 0.5, 0.5))
    np.testing.assert_array_equal(image.labels, [LABELS, LABELS])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["masks/a.tif", "-o", "a.json"], 2, "geojson, coco.*--to"),
        (["masks/a.tif", "-o", "masks/a.tif"], 2, "would replace the input"),
        (["masks", "-o", "a.zip"], 2, "must be a folder"),
        (["masks", "-o", "out", "--pattern", "*.png"], 2, "no file that matches"),
        (["masks", "-o", "out", "--from", "imagej"], 2, "no file that matches"),
        (["masks/a.tif", "-o", "a.zip", "--pattern", "*"], 2, "selects files of a folder"),
        (["masks", "-o", "out", "--classes", "c.csv"], 2, "one label image"),
        (["nothing.tif", "-o", "a.zip"], 2, "no file or folder nothing.tif"),
        (["masks/a.tif", "-o", "a.zip", "--like", "a", "--shape", "2", "2"], 2, "say the same"),
        (["masks/a.tif", "-o", "a.zip", "--classes", "masks/a.tif"], 1, "could not be read as a table"),
        (["masks/a.tif", "-o", "a.zip", "--shape", "3", "3"], 1, "shape .20, 24., but .3, 3. was asked for"),
    ],
)
def test_what_cannot_be_done(capsys, arguments, code, message):
    before = sorted(os.listdir("."))
    assert main(arguments) == code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir(".")) == before


def test_table_of_classes_is_checked(capsys):
    for text, message in (("id,class\n1,a\n", "needs a column label"), ("label,class\nx,a\n", "positive integers"),
                          ("label,class\n4,a\n", "do not have: 4")):
        Path("c.csv").write_text(text)
        assert main(["masks/a.tif", "-o", "a.zip", "--classes", "c.csv"]) == 1
        assert message in capsys.readouterr().err


def test_help_says_what_each_format_cannot_hold():
    text = " ".join(convert.get_parser().format_help().split())
    for row in FORMATS:
        assert row.title in text
        assert f"keeps: {row.keeps}" in text
        assert f"cannot hold: {row.loses}" in text


def test_every_option_is_documented():
    text = (Path(__file__).parent.parent / "doc" / "interchange.md").read_text(encoding="utf-8")
    options = {o for action in convert.get_parser()._actions for o in action.option_strings} - {"-h", "--help"}
    assert options <= set(re.findall(r"`(--?[\w-]+)`", text))


def test_interruption_keeps_what_is_finished(capsys, monkeypatch):
    from micro_sam.interchange import files

    original, calls = files.write_labels_steps, []

    def write(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(path, *args, **kwargs)

    monkeypatch.setattr(files, "write_labels_steps", write)
    assert main(["masks", "-o", "out", "--to", "geojson"]) == 130
    assert os.listdir("out") == ["a.geojson"]
    assert main(["masks", "-o", "out", "--to", "geojson"]) == 0
    assert "a.geojson is there already" in capsys.readouterr().out
    assert sorted(os.listdir("out")) == ["a.geojson", "b.geojson"]
