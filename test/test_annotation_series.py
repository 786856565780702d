"""Series of images: what is planned, what is skipped, where results go, and that nothing of the user's is replaced."""

import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import zarr

from micro_sam.annotation.series import confirm_empty, plan_series
from micro_sam.annotation.series_files import distinct_names, pair_by_name
from micro_sam.annotation.thumbnails import thumbnail
from micro_sam.core.errors import (
    ImageReadError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    OutputExistsError,
    OutputWriteError,
)
from micro_sam.core.output import read_record, write_labels


@pytest.fixture
def folder(tmp_path, cells_image, rgb_image):
    """Five images of different formats, sizes and channels, and two files that are none."""
    folder = tmp_path / "in"
    folder.mkdir()
    imageio.imwrite(folder / "a.png", cells_image)
    tifffile.imwrite(folder / "b.tif", cells_image[:100].astype("uint16") * 7)
    imageio.imwrite(folder / "c.png", rgb_image)
    array = zarr.create_array(str(folder / "d.zarr"), shape=(64, 80), dtype="float32", chunks=(32, 32))
    array[:] = cells_image[:64, :80]
    tifffile.imwrite(folder / "e.ome.tif", cells_image[:50, :60])
    (folder / "notes.txt").write_text("no image")
    (folder / "Thumbs.db").write_bytes(b"x")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names(entries):
    return [e.name for e in entries]


def blob(shape, value=3):
    labels = np.zeros(shape, "uint32")
    labels[5:20, 5:20] = value
    return labels


def test_plan_finds_images_and_names_their_results(folder, out, tmp_path):
    series = plan_series(folder, out, embedding_folder=tmp_path / "emb")
    assert names(series) == ["a.png", "b.tif", "c.png", "d.zarr", "e.ome.tif"]
    assert [e.output.name for e in series] == ["a.tif", "b.tif", "c.tif", "d.tif", "e.tif"]
    assert [e.embedding_path for e in series] == [tmp_path / "emb" / f"{n}.zarr" for n in "abcde"]
    assert series.counts() == {"todo": 5, "in progress": 0, "done": 0, "unreadable": 0}
    (note,) = series.notes
    assert note.startswith("2 files are no images")
    assert "notes.txt" in note
    assert list(out.iterdir()) == []
    assert not (tmp_path / "emb").exists()
    assert [(series.open(e).axes, series.open(e).shape) for e in series] == [
        ("YX", (128, 160)), ("YX", (100, 160)), ("YXC", (128, 160)), ("YX", (64, 80)), ("YX", (50, 60)),
    ]
    assert names(plan_series(folder, out, pattern="*.png")) == ["a.png", "c.png"]


def test_annotating_leaving_and_coming_back(folder, out):
    series = plan_series(folder, out)
    first = series.first_open()
    labels = blob((128, 160), 70000)
    finished = series.finish(first, labels)
    assert finished.status == "done"
    assert first.status == "todo", "an entry that was handed out does not change"
    with tifffile.TiffFile(out / "a.tif") as file:
        assert file.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
    np.testing.assert_array_equal(series.load_result(finished, (128, 160)), labels)
    assert series.load_result(series[1]) is None
    series.finish(series[2], blob((128, 160)))

    # Another run goes on with the first image that is open, and passes over those that are done.
    series = plan_series(folder, out)
    assert series.counts()["done"] == 2
    assert series.first_open().name == "b.tif"
    assert series.next(1).name == "d.zarr"
    assert series.next(4).name == "b.tif", "what was left out comes after the end"
    assert names(series.remaining()) == ["b.tif", "d.zarr", "e.ome.tif"]
    assert series.previous(3).name == "c.png", "back shows results that are done"
    assert series.previous(0) is None
    series.finish(series[0], np.zeros((128, 160), "uint8"))
    assert not series.load_result(series[0]).any(), "corrected results replace the older ones"
    for entry in series.remaining():
        series.finish(entry, blob((64, 80)))
    assert series.first_open() is series.next(4) is None

    # Without skipping, the order is that of the folder, and the end is the end.
    series = plan_series(folder, out, skip_segmented=False)
    assert [series.first_open().index, series.next(0).index, series.next(4)] == [0, 1, None]
    assert series.jump(3).name == "d.zarr"
    with pytest.raises(InvalidInputError, match="has 5, numbered from 0"):
        series.jump(-1)
    (out / "b.tif").unlink()
    series.refresh_status()
    assert series[1].status == "todo"


def test_unsaved_work_is_in_progress(folder, out):
    series = plan_series(folder, out, has_journal=lambda entry: entry.name in ("a.png", "b.tif"))
    assert [e.status for e in series][:3] == ["in progress", "in progress", "todo"]
    assert series.finish(series[0], blob((128, 160))).status == "done"
    series.refresh_status()
    assert series.counts() == {"todo": 3, "in progress": 1, "done": 1, "unreadable": 0}
    assert series.first_open().name == "b.tif"


def test_a_failed_write_keeps_the_older_result(folder, out, monkeypatch):
    series = plan_series(folder, out)
    entry = series.finish(series[0], blob((128, 160)))

    def break_off(path, *args, **kwargs):
        path.write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", break_off)
    with pytest.raises(OutputWriteError, match="no space left"):
        series.finish(entry, blob((128, 160), 9))
    assert series.load_result(entry).max() == 3
    assert [p.name for p in out.iterdir()] == ["a.tif"]


def test_questions_are_data(folder, out):
    series = plan_series(folder, out)
    assert series.questions(series[0], blob((128, 160))) == []
    (question,) = series.questions(series[0], np.zeros((128, 160), "uint8"))
    assert question == confirm_empty(np.zeros((2, 2)))
    assert question.code == "empty"
    for bad, error in ((blob((128, 160)).astype(float), InvalidTypeError), (blob((128, 160))[None], InvalidInputError)):
        with pytest.raises(error):
            series.finish(series[0], bad)
    assert list(out.iterdir()) == []


def test_results_of_other_programs(folder, out, cells_labels, cells_image):
    out.mkdir()
    tifffile.imwrite(out / "a.tif", cells_labels, compression="zlib")  # without a mark, as older versions write it
    tifffile.imwrite(out / "e.ome.tif", cells_labels[:50, :60])
    series = plan_series(folder, out)
    assert names(e for e in series if e.status == "done") == ["a.png", "e.ome.tif"]
    np.testing.assert_array_equal(series.load_result(series[0], (128, 160)), cells_labels)
    with pytest.raises(InvalidInputError, match=r"shape \(128, 160\).*image has \(3, 4\)"):
        series.load_result(series[0], (3, 4))
    assert [q.code for q in series.questions(series[0], cells_labels)] == ["replace"]
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        series.finish(series[0], cells_labels)
    series.finish(series[0], cells_labels, overwrite=True)
    series.finish(series[0], cells_labels)

    write_labels(out / "b.tif", cells_labels, {"mode": "ais"})
    with pytest.raises(OutputExistsError, match="result of the automatic segmentation"):
        plan_series(folder, out)
    tifffile.imwrite(out / "b.tif", cells_image / 255)
    with pytest.raises(OutputExistsError, match=r"b.tif exists and is not a label image with 2 axes"):
        plan_series(folder, out)


def test_images_are_never_replaced(folder, tmp_path, cells_labels):
    with pytest.raises(InvalidInputError, match=r"would replace the image .*b\.tif.*another output folder"):
        plan_series(folder, folder)
    with pytest.raises(InvalidInputError, match=r"would replace the image .*d\.zarr.*another embedding folder"):
        plan_series(folder, tmp_path / "out", embedding_folder=folder)
    initial = tmp_path / "initial"
    write_labels(initial / "a.tif", cells_labels)
    write_labels(initial / "c.tif", cells_labels)
    with pytest.raises(InvalidInputError, match=r"would replace the initial segmentation .*a\.tif"):
        plan_series(folder, initial, pattern="[ac].png", initial_folder=initial)

    # In a common folder, results are not taken for images later.
    series = plan_series(folder, folder, pattern="[ac].*")
    series.finish(series[0], cells_labels)
    series = plan_series(folder, folder, pattern="[ac].*")
    assert [(e.name, e.status) for e in series] == [("a.png", "done"), ("c.png", "todo")]
    assert any("results of this series: a.tif" in note for note in series.notes)


def test_colliding_names(folder, out, cells_image, tmp_path):
    series = plan_series(folder, out)
    series.finish(series[1], blob((100, 160)))
    imageio.imwrite(folder / "b.png", cells_image)
    series = plan_series(folder, out, pattern="b.*", embedding_folder=tmp_path)
    assert [(e.name, e.output.name, e.status) for e in series] == [
        ("b.png", "b_png.tif", "todo"), ("b.tif", "b.tif", "done"),
    ], "a result keeps its place when another image of that name appears"
    assert [e.embedding_path.name for e in series] == ["b_png.zarr", "b_tif.zarr"]

    paths = [tmp_path / p for p in ("x/i.tif", "y/i.tif", "y/I.png", "z/j.tif")]
    assert distinct_names(paths) == ["x_i", "y_i", "I_png", "j"]
    same = [tmp_path / p for p in ("1/x/i.tif", "2/x/i.tif", "2/x/i.png")]
    assert len({n.casefold() for n in distinct_names(same)}) == 3


def test_initial_segmentations(folder, out, tmp_path, cells_labels):
    initial = tmp_path / "initial"
    for name, shape in (("a", (128, 160)), ("b", (100, 160)), ("c", (7, 7))):
        write_labels(initial / f"seg_{name}_masks.tif", cells_labels[:shape[0], :shape[1]])
    (initial / "readme.txt").write_text("x")
    series = plan_series(folder, out, pattern="[abc].*", initial_folder=initial)
    assert [e.initial.name for e in series] == [f"seg_{n}_masks.tif" for n in "abc"]
    np.testing.assert_array_equal(series.load_initial(series[0], (128, 160)), cells_labels)
    with pytest.raises(InvalidInputError, match=r"seg_c_masks.tif\) have the shape \(7, 7\)"):
        series.load_initial(series[2], (128, 160))
    with pytest.raises(InvalidInputError, match=r"images without one: d.zarr, e.ome.tif\)"):
        plan_series(folder, out, initial_folder=initial)
    with pytest.raises(InvalidInputError, match=r"segmentations without image: seg_c_masks.tif\)"):
        plan_series(folder, out, pattern="[ab].*", initial_folder=initial)
    with pytest.raises(InvalidInputError, match="not both"):
        plan_series(folder, out, initial_folder=initial, initial_segmentations=[])
    paths = [initial / "nothing", initial / "seg_a_masks.tif"]
    with pytest.raises(MissingFileError, match="nothing"):
        plan_series(folder, out, pattern="[ab].*", initial_segmentations=paths)
    arrays = [cells_labels, cells_labels[:100]]
    series = plan_series(folder, out, pattern="[ab].*", initial_segmentations=arrays)
    loaded = series.load_initial(series[0], (128, 160))
    loaded[:] = 99
    assert cells_labels.max() < 99, "the caller's array is not edited"
    with pytest.raises(InvalidInputError, match="1 initial segmentations were given for 2 images"):
        plan_series(folder, out, pattern="[ab].*", initial_segmentations=arrays[:1])


def test_pairing_of_lists(tmp_path):
    images = [tmp_path / n for n in ("img_1.tif", "img_10.tif", "img_2.tif")]
    labels = [tmp_path / n for n in ("img_10_m.tif", "img_2_m.tif", "img_1_m.tif")]
    assert pair_by_name(images, labels, is_ordered=True) == [labels[2], labels[0], labels[1]]
    short = [tmp_path / f"{n}.tif" for n in "12"], [tmp_path / f"m1_{n}.tif" for n in "21"]
    assert pair_by_name(*short) == short[1][::-1]
    unlike = [tmp_path / n for n in ("x.tif", "y.tif", "z.tif")]
    assert pair_by_name(images, unlike, is_ordered=True) == unlike, "lists belong together as they are"
    same = [tmp_path / d / "raw.tif" for d in "abc"], [tmp_path / d / "seg.tif" for d in "abc"]
    assert pair_by_name(*same, is_ordered=True) == same[1]
    with pytest.raises(InvalidInputError, match="without one: img_2.tif; segmentations without image: z.tif"):
        pair_by_name(images, [images[0], images[1], tmp_path / "z.tif"], is_ordered=True)


def test_arrays(out, cells_image, cells_labels, tmp_path):
    stack = np.stack([cells_image] * 4)
    series = plan_series([stack, stack[:2]], out, is_volumetric=True, embedding_folder=tmp_path)
    assert [e.output.name for e in series] == ["seg_00000.tif", "seg_00001.tif"]
    assert [e.embedding_path.name for e in series] == ["embedding_00000.zarr", "embedding_00001.zarr"]
    assert series.open(series[1]).shape == (2, 128, 160)
    series.finish(series[0], np.stack([cells_labels] * 4))
    assert read_record(out / "seg_00000.tif")["settings"] == {"series": {"source": "image 0"}}
    series = plan_series([stack, stack[:2]], out, is_volumetric=True)
    assert [e.status for e in series] == ["done", "todo"]
    with pytest.raises(InvalidInputError, match="must have 3 axes"):
        series.finish(series[1], cells_labels)


def test_images_that_cannot_be_read_are_passed_over(folder, out, cells_image):
    (folder / "b.tif").write_bytes(b"")
    (folder / "c.png").write_bytes(b"damaged")
    tifffile.imwrite(folder / "f.tif", np.stack([cells_image] * 5), photometric="minisblack")
    series = plan_series(folder, out)
    assert "empty file" in series[1].note
    assert series.next(0).name == "c.png", "not known before it is opened"
    with pytest.raises(ImageReadError):
        series.open(series[2])
    assert series[2].status == "unreadable"
    assert series.next(0).name == "d.zarr"
    assert series.previous(3).name == "a.png"
    with pytest.raises(InvalidInputError, match="ndim=2"):
        series.open(series[5])
    assert series.counts() == {"todo": 3, "in progress": 0, "done": 0, "unreadable": 3}
    shutil.copy(folder / "a.png", folder / "c.png")
    series.refresh_status()
    assert series[2].status == "todo"


def test_channels_can_be_chosen_for_all(tmp_path, out, cells_image):
    channels = np.stack([cells_image] * 5)
    tifffile.imwrite(tmp_path / "m.tif", channels, metadata={"axes": "CYX"}, photometric="minisblack")
    series = plan_series([tmp_path / "m.tif"], out, image_options={"channel": 4})
    assert series.open(series[0]).axes == "YX"


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ("in", {"pattern": "*.xyz"}, MissingFileError, r"matches '\*.xyz'"),
        ("in", {"pattern": "*.txt"}, MissingFileError, r"no image.*'\*.txt'.*notes.txt"),
        ("nowhere", {}, MissingFileError, "no file or folder"),
        ("in/a.png", {}, InvalidInputError, "is one image, not a folder"),
        ([], {}, InvalidInputError, "list of images is empty"),
        (["in/a.png", "in/zz.png"], {}, MissingFileError, "zz.png"),
        (["in/a.png", "in/../in/a.png"], {}, InvalidInputError, "more than once"),
        (np.zeros((3, 4, 5)), {}, InvalidTypeError, "one array was given"),
        ([np.zeros((4, 5)), "in/a.png"], {}, InvalidTypeError, "ndarray, str"),
    ],
)
def test_bad_series(folder, out, monkeypatch, images, options, error, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(error, match=message):
        plan_series(images, out, **options)
    assert not out.exists()


# --- thumbnails ---


def test_thumbnails_of_all_kinds(folder, cells_image, rgb_image):
    for path in (folder / n for n in ("a.png", "b.tif", "c.png", "d.zarr", "e.ome.tif")):
        picture = thumbnail(path)
        assert picture.dtype == np.uint8
        assert max(picture.shape[:2]) == 64
        assert picture.shape[2] == 3
        assert np.ptp(picture) > 100
    grey = thumbnail(cells_image, 40)
    assert grey.shape == (32, 40, 3)
    bright = cells_image[::4, ::4] > 60
    assert grey[..., 0][bright].mean() > 3 * grey[..., 0][~bright].mean()
    mean = thumbnail(rgb_image, 40).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(mean, rgb_image.reshape(-1, 3).mean(0), atol=6, err_msg="colours stay as they are")
    assert thumbnail(np.full((1, 500), np.nan)).shape == (1, 64, 3)
    assert thumbnail(np.ones((9, 2000, 30), bool)[:, ::2], 10).shape == (10, 1, 3)
    with pytest.raises(ImageReadError):
        thumbnail(folder / "notes.txt")


def test_thumbnails_of_many_channels_and_time_points(tmp_path, cells_image):
    data = np.stack([np.stack([cells_image] * 5)] * 2)
    tifffile.imwrite(tmp_path / "m.ome.tif", data, metadata={"axes": "TCYX"}, photometric="minisblack")
    np.testing.assert_array_equal(thumbnail(tmp_path / "m.ome.tif"), thumbnail(cells_image))
    six = np.stack([np.zeros_like(cells_image)] * 5 + [cells_image])
    np.testing.assert_array_equal(thumbnail(six, image_options={"axes": "CYX", "channel": 5}), thumbnail(cells_image))


def test_thumbnails_read_little(tmp_path, cells_image):
    # Only the middle plane of a compressed stack: all others are damaged.
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(stack, np.stack([cells_image] * 9), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(stack) as file:
        places = [(page.dataoffsets, page.databytecounts) for n, page in enumerate(file.pages) if n != 4]
    with open(stack, "r+b") as file:
        for offsets, counts in places:
            for offset, count in zip(offsets, counts):
                file.seek(offset)
                file.write(b"\xff" * count)
    np.testing.assert_array_equal(thumbnail(stack), thumbnail(cells_image))

    # A low level of a pyramid: the higher ones show nothing.
    levels = [np.zeros((512, 640), "uint8"), np.zeros((256, 320), "uint8"), cells_image, cells_image[::8, ::8]]
    pyramid = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(pyramid) as writer:
        writer.write(levels[0], subifds=3, tile=(64, 64), compression="zlib")
        for level in levels[1:]:
            writer.write(level, subfiletype=1, tile=(64, 64), compression="zlib")
    group = zarr.create_group(str(tmp_path / "image.ome.zarr"))
    for n, level in enumerate(levels):
        group.create_array(str(n), shape=level.shape, dtype=level.dtype, chunks=(64, 64))[:] = level
    axes = [{"name": a, "type": "space"} for a in "yx"]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": [{"path": str(n)} for n in range(4)]}]}
    for path in (pyramid, tmp_path / "image.ome.zarr"):
        np.testing.assert_array_equal(thumbnail(path), thumbnail(cells_image))
