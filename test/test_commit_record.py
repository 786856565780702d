"""The commit record: every mix of prompts comes back, nothing foreign is touched, and what was torn is repaired."""

import errno
import json
import shutil

import numpy as np
import pytest
import zarr
from numcodecs import GZip

from micro_sam.annotation import commit_writer
from micro_sam.annotation.commit_record import (
    CommitRecordMismatch,
    read_commit_record,
    revert_commit,
    sync_labels,
    write_commit,
)
from micro_sam.annotation.file_lock import SessionInUseError, exclusive
from micro_sam.annotation.prompt_data import PointPrompt, Prompts, ShapePrompt
from micro_sam.core.errors import (
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    NoObjectsError,
    OutputWriteError,
)

ATTRIBUTES = {
    "data_signature": "xxh3:1", "tile_shape": (384, 384), "halo": [64, 64], "model_type": "vit_b",
    "model_name": "vit_b_lm", "model_hash": "xxh128:0",
}
SHAPE = (40, 60)
ROW = ((1.0, 2.0), (1.0, 9.5), (7.25, 9.5), (7.25, 2.0))


def point(*position, **kwargs):
    return PointPrompt(position, **{"positive": True, **kwargs})


def labels_with(*ids, shape=SHAPE, dtype=np.uint32):
    """Object `i` has 9 columns of its own."""
    labels = np.zeros(shape, dtype=dtype)
    for i in ids:
        labels[..., 2:12, 10 * (i - 1):10 * i - 1] = i
    return labels


def box_of(labels, *ids):
    where = np.nonzero(np.isin(labels, ids))
    return [(int(w.min()), int(w.max()) + 1) for w in where]


def commit(path, ids, labels, prompts=None, **kwargs):
    options = {
        "shape": labels.shape, "layer": "current_object", "attributes": ATTRIBUTES,
        "settings": {"projection": "box", "iou_threshold": np.float32(0.5)}, **kwargs,
    }
    if "box" not in options:
        options["box"] = box_of(labels, *ids)
    return write_commit(path, labels=labels, object_ids=ids, prompts_by_object=prompts, **options)


def content(path):
    """All files of a record and what is in them; without the time that gzip puts into its header."""
    files = {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: data[:4] + data[8:] if data[:2] == b"\x1f\x8b" else data for name, data in files.items()}


def test_layout_is_that_of_older_versions(tmp_path):
    path, labels = tmp_path / "record.zarr", labels_with(1)
    prompts = Prompts((point(3.5, 4.5), point(20.0, 30.0, positive=False)), (ShapePrompt("rectangle", ROW),))
    assert commit(path, [1], labels, {1: prompts}) == 1
    assert json.loads((path / ".zgroup").read_text()) == {"zarr_format": 2}
    attrs = json.loads((path / ".zattrs").read_text())
    assert attrs.pop("micro_sam_version")
    assert attrs == {
        **ATTRIBUTES, "tile_shape": [384, 384],
        "commit_history": [{"current_object": {"object_ids": [1], "projection": "box", "iou_threshold": 0.5}}],
    }
    meta = json.loads((path / "committed_objects" / ".zarray").read_text())
    assert (meta["dtype"], meta["compressor"]["id"], meta["chunks"]) == ("<u4", "gzip", [40, 60])
    group = zarr.open_group(str(path), mode="r", zarr_format=2)
    np.testing.assert_array_equal(group["committed_objects"][...], labels)
    own = group["prompts/1"]
    np.testing.assert_array_equal(own["prompts"][...], [ROW])
    np.testing.assert_array_equal(own["point_prompts"][...], [[3.5, 4.5], [20, 30]])
    np.testing.assert_array_equal(own["point_labels"][...], [1, 0])
    assert own["point_labels"].attrs["track_state"] == ["track", "track"]
    assert all(a.chunks == a.shape for _, a in own.arrays())
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


@pytest.mark.parametrize(("shape", "chunks"), [
    ((1500, 60), (1024, 60)), ((40, 300, 300), (32, 256, 256)), ((5, 40, 60), (5, 40, 60)),
])
def test_chunks(tmp_path, shape, chunks):
    commit(tmp_path / "r", [1], labels_with(1, shape=shape))
    assert read_commit_record(tmp_path / "r").labels.chunks == chunks


MIXES = {
    "one point": Prompts((point(1.5, 2.5),)),
    "points of both kinds": Prompts((point(0.0, 0.0), point(3.0, 4.125, positive=False))),
    "zeros only": Prompts((point(0.0, 0.0, positive=False),)),
    "shape only": Prompts((), (ShapePrompt("ellipse", ROW),)),
    "polygons of different size": Prompts(
        (), (ShapePrompt("polygon", ROW[:3]), ShapePrompt("polygon", (*ROW, (0, 0))))
    ),
    "all kinds": Prompts(
        (point(1.0, 2.0), point(5.0, 6.0, positive=False)),
        (ShapePrompt("rectangle", ROW), ShapePrompt("ellipse", ROW), ShapePrompt("polygon", ROW[:3]),
         ShapePrompt("path", (*ROW, (30.0, 30.0)), positive=False), ShapePrompt("line", ROW[:2])),
    ),
    "tracks": Prompts(
        (point(0.0, 1.0, 2.0), point(4.0, 5.0, 6.0, track_id=10, division=True), point(4.0, 0, 0, track_id=2)),
        (ShapePrompt("rectangle", tuple((2.0, *v) for v in ROW), track_id=2),),
    ),
    "shapes of tracks only": Prompts((), (ShapePrompt("polygon", tuple((2.0, *v) for v in ROW[:3]), track_id=11),)),
}


@pytest.mark.parametrize("name", MIXES)
def test_prompts_come_back(tmp_path, name):
    prompts = MIXES[name]
    shape = SHAPE if prompts.ndim == 2 else (5, *SHAPE)
    commit(tmp_path / "r", [1, 2], labels_with(1, 2, shape=shape), {2: prompts, 1: Prompts()})
    record = read_commit_record(tmp_path / "r")
    assert record.prompts == {2: prompts}
    assert record.history[0].object_ids == (1, 2)


def test_commits_follow_each_other(tmp_path):
    path, shape = tmp_path / "r", (70, 300, 300)
    first = labels_with(1, shape=shape)
    commit(path, [1], first, {1: Prompts((point(1, 5, 5),))})
    before = content(path)
    labels = first.copy()
    labels[40:45, 270:280, 280:290] = 2
    assert commit(path, [2], labels, layer="auto_segmentation", settings={"min_object_size": 5}) == 2
    written = {name for name, data in content(path).items() if before.get(name) != data}
    assert written == {".zattrs", "committed_objects/1.1.1"}
    other = {**ATTRIBUTES, "model_name": "vit_l_lm", "tile_shape": None, "halo": None}
    lineages = [{3: [4, 5], 4: [], 5: []}]
    labels[0, 100:110, 100:130] = 3
    commit(path, [3], labels, attributes=other, settings={}, lineages=lineages)
    record = read_commit_record(path)
    np.testing.assert_array_equal(record.labels[...], labels)
    assert [(e.layer, e.object_ids) for e in record.history] == [
        ("current_object", (1,)), ("auto_segmentation", (2,)), ("current_object", (3,)),
    ]
    assert record.history[1].settings == {"min_object_size": 5}
    assert record.history[2].settings == {"attributes": {"tile_shape": None, "halo": None, "model_name": "vit_l_lm"}}
    assert record.attributes["model_name"] == "vit_b_lm", "that of the first commit"
    assert record.lineages == ({3: [4, 5], 4: [], 5: []},)
    assert record.pending is None


def test_initial_objects_and_edits_reach_the_file(tmp_path):
    path = tmp_path / "r"
    labels = labels_with(1, 2, 3, shape=(40, 2100))
    labels[:, 2090:] = 9  # there before the first commit, far from it
    commit(path, [3], labels)
    np.testing.assert_array_equal(read_commit_record(path).labels[...], labels)
    labels[labels == 1] = 0
    labels[5:8, 2092:] = 4
    assert sync_labels(path, labels) == 2
    np.testing.assert_array_equal(read_commit_record(path).labels[...], labels)
    assert sync_labels(path, labels) == 0


def test_running_twice_changes_nothing(tmp_path):
    path = tmp_path / "r"

    def run():
        commit(path, [1], labels_with(1), {1: MIXES["all kinds"]}, lineages=[{1: []}])
        commit(path, [2, 3], labels_with(1, 2, 3), {2: MIXES["one point"]}, lineages=[{1: []}, {2: [3], 3: []}])

    run()
    before = content(path)
    run()
    assert content(path) == before


def mismatch(path, reason, match, *args, **kwargs):
    before = content(path) if path.is_dir() else None
    with pytest.raises(CommitRecordMismatch, match=match) as caught:
        commit(path, *args, **kwargs)
    assert caught.value.reason == reason
    if before is not None:
        assert content(path) == before, "not even written anew"


def test_ids_never_collide(tmp_path):
    path = tmp_path / "r"
    commit(path, [1], labels_with(1), {1: MIXES["one point"]})
    for labels, prompts in ((np.roll(labels_with(1), 3), MIXES["one point"]), (labels_with(1), MIXES["shape only"])):
        mismatch(path, "ids", "ids 1 already.*Load its objects.*another commit", [1], labels, {1: prompts})
    mismatch(path, "history", "has 1 commits, but 0 are known", [2], labels_with(1, 2), known_commits=0)
    assert commit(path, [2], labels_with(1, 2), known_commits=1) == 2
    corrected = np.roll(labels_with(1, 2), 1, axis=0)
    assert commit(path, [1], corrected, {1: MIXES["shape only"]}, corrects=True) == 3
    assert read_commit_record(path).prompts == {1: MIXES["shape only"]}


def test_other_images_are_not_touched(tmp_path):
    path = tmp_path / "r"
    commit(path, [1], labels_with(1))
    other = {**ATTRIBUTES, "data_signature": "xxh3:2"}
    mismatch(path, "data", "another image.*'xxh3:1', here 'xxh3:2'.*Choose", [2], labels_with(1, 2), attributes=other)
    mismatch(path, "shape", "shape", [2], labels_with(1, 2, shape=(40, 61)))
    assert commit(path, [2], labels_with(1, 2), attributes=other, same_data=["xxh3:1"]) == 2


def test_foreign_folders_are_not_touched(tmp_path):
    file, array, embeddings, new = (tmp_path / n for n in ("file", "array", "embeddings", "new_format"))
    file.write_text("text")
    zarr.create_array(str(array), shape=(4,), chunks=(4,), dtype="u1", zarr_format=2)
    zarr.create_group(str(embeddings), zarr_format=2, attributes={"data_signature": "xxh3:1"})
    zarr.create_group(str(new), zarr_format=3)
    for path in (file, array, embeddings, new):
        mismatch(path, "foreign", "something else.*Choose a new", [1], labels_with(1))
        with pytest.raises(CommitRecordMismatch):
            read_commit_record(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    commit(folder, [1], labels_with(1))
    assert (folder / "notes.txt").read_text() == "mine"
    zarr.create_group(str(tmp_path / "empty"), zarr_format=2)
    commit(tmp_path / "empty", [1], labels_with(1))
    for missing in (read_commit_record, lambda p: sync_labels(p, labels_with(1))):
        with pytest.raises(MissingFileError, match="no commit record"):
            missing(tmp_path / "missing")


@pytest.mark.parametrize(("attribute", "value"), [("commit_history", [{"a": 1}]), ("committed_lineages", [5])])
def test_damaged_record(tmp_path, attribute, value):
    commit(tmp_path / "r", [1], labels_with(1))
    zarr.open_group(str(tmp_path / "r"), zarr_format=2).attrs[attribute] = value
    with pytest.raises(CommitRecordMismatch, match="cannot be read") as caught:
        read_commit_record(tmp_path / "r")
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"object_ids": []}, NoObjectsError, "no objects"),
    ({"object_ids": [0]}, InvalidInputError, "positive"),
    ({"layer": "prompts"}, InvalidInputError, "must be one of"),
    ({"prompts_by_object": {2: MIXES["one point"]}}, InvalidInputError, "not in object_ids"),
    ({"prompts_by_object": {1: MIXES["tracks"]}}, InvalidInputError, "3 coordinates, but must have 2"),
    ({"box": [(0, 5), (0, 61)]}, InvalidInputError, "box"),
    ({"box": [(0, 5)]}, InvalidInputError, "box"),
    ({"shape": (40, 61)}, InvalidInputError, "shape of the image"),
    ({"labels": labels_with(1).astype(int)}, InvalidTypeError, "unsigned"),
    ({"attributes": {}}, InvalidInputError, "data_signature"),
    ({"attributes": {**ATTRIBUTES, "commit_history": []}}, InvalidInputError, "may have"),
    ({"settings": {"f": print}}, InvalidTypeError, "Convert"),
    ({"known_commits": 2}, CommitRecordMismatch, "has 0 commits, but 2"),
])
def test_all_is_checked_before_anything_is_written(tmp_path, change, error, match):
    arguments = {
        "shape": SHAPE, "labels": labels_with(1), "box": [(2, 12), (0, 9)], "object_ids": [1],
        "layer": "current_object", "attributes": ATTRIBUTES, **change,
    }
    with pytest.raises(error, match=match):
        write_commit(tmp_path / "r", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_box_of_a_delta_fits_an_image(tmp_path):
    commit(tmp_path / "r", [1], labels_with(1), box=((0, 1), (2, 12), (0, 9)))
    labels = labels_with(1)
    assert commit(tmp_path / "r", [2], labels, box=None) == 2


def test_labels_of_64_bits(tmp_path):
    path = tmp_path / "r"
    commit(path, [1], labels_with(1, shape=(40, 2100)))
    labels = labels_with(1, shape=(40, 2100)).astype(np.uint64)
    labels[0, 2000:] = 2**40
    commit(path, [2**40], labels)
    record = read_commit_record(path)
    assert record.labels.dtype == np.uint64
    np.testing.assert_array_equal(record.labels[...], labels)
    assert sorted(p.name for p in path.iterdir()) == [".zattrs", ".zgroup", "committed_objects"]


def test_lazy_labels_are_read_in_chunks(tmp_path):
    labels = zarr.create_array(
        str(tmp_path / "l"), shape=(40, 2100), chunks=(40, 100), dtype="u4", zarr_format=2, fill_value=0
    )
    labels[:, 1500:1600] = 1
    commit(tmp_path / "r", [1], labels, box=[(0, 40), (1500, 1600)])
    np.testing.assert_array_equal(read_commit_record(tmp_path / "r").labels[...], labels[...])


def test_one_writer(tmp_path):
    with exclusive(tmp_path / "r", ""), pytest.raises(SessionInUseError, match="Close it there, or choose"):
        commit(tmp_path / "r", [1], labels_with(1))


# --- torn writes ---


class FullDisk:
    """The disk is full after some writes."""

    def __init__(self, monkeypatch):
        self.left = None
        for name in ("set", "set_if_not_exists"):
            monkeypatch.setattr(zarr.storage.LocalStore, name, self.wrapped(getattr(zarr.storage.LocalStore, name)))

    def wrapped(self, write):
        async def limited(*args, **kwargs):
            if self.left is not None:
                if self.left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= 1
            await write(*args, **kwargs)
        return limited


@pytest.mark.parametrize("before", [[], [1]], ids=["first", "later"])
def test_torn_commit_is_visible_and_repaired(tmp_path, monkeypatch, before):
    disk, base, path, shape, new = FullDisk(monkeypatch), tmp_path / "base", tmp_path / "r", (40, 1100), 2
    known = dict.fromkeys(before, MIXES["one point"])
    for i in before:
        commit(base, [i], labels_with(*before, shape=shape), known)
    labels = labels_with(*before, new, shape=shape)
    prompts = Prompts((point(1, 2),), (ShapePrompt("polygon", ROW[:3]),))
    labels[20:30, 1000:] = new  # in more than one chunk
    n_torn, n_first = 0, 2 if before else 4  # the first writes create the group, and note that a commit begins
    for n_writes in range(1000):
        shutil.rmtree(path, ignore_errors=True)
        if before:
            shutil.copytree(base, path)
        disk.left = n_writes
        try:
            commit(path, [new], labels, {new: prompts})
            break
        except OutputWriteError:
            pass
        finally:
            disk.left = None
        if n_writes >= n_first:
            if before:
                (path / "prompts" / ".zgroup.0.partial").touch()  # as a writer leaves it that is killed
            record = read_commit_record(path)
            assert [e.object_ids for e in record.history] == [(i,) for i in before]
            assert record.prompts == known
            assert record.pending is not None
            n_torn += 1
        expected, ids, own = labels, [*before], dict(known)
        if n_writes % 3 == 1 and n_writes >= n_first:
            sync_labels(path, labels)
        elif n_writes % 3 == 2:  # by a session that knows nothing of the torn one
            expected, ids, own[5] = labels_with(*before, 5, shape=shape), [*before, 5], MIXES["one point"]
            commit(path, [5], expected, {5: own[5]})
        else:
            ids, own[new] = [*before, new], prompts
            commit(path, [new], labels, {new: prompts})
        record = read_commit_record(path)
        np.testing.assert_array_equal(record.labels[...], expected)
        assert (record.pending, record.prompts) == (None, own)
        assert [i for e in record.history for i in e.object_ids] == ids
        stored = {p.name for p in path.glob("prompts/*") if p.is_dir()}
        assert stored == {str(i) for i in own}, "nothing of the torn commit is left"
    assert n_torn > 5


def test_undone_commit_is_taken_out(tmp_path, monkeypatch):
    disk, path, shape = FullDisk(monkeypatch), tmp_path / "r", (40, 2100)
    first, second = labels_with(1, shape=shape), labels_with(1, 2, shape=shape)
    commit(path, [1], first, {1: MIXES["one point"]}, lineages=[{1: []}])
    before = content(path)
    commit(path, [2], second, {2: MIXES["one point"]}, lineages=[{1: []}, {2: []}])
    with pytest.raises(CommitRecordMismatch, match="last commit"):
        revert_commit(path, labels=first, box=box_of(second, 2), object_ids=[1])
    disk.left = 2
    with pytest.raises(OutputWriteError, match="no space left"):
        revert_commit(path, labels=first, box=box_of(second, 2), object_ids=[2], lineages=[{1: []}])
    disk.left = None
    assert len(read_commit_record(path).history) == 1
    sync_labels(path, first, lineages=[{1: []}])
    assert content(path) == before
    commit(path, [2], second, {2: MIXES["one point"]}, lineages=[{1: []}, {2: []}])
    assert revert_commit(path, labels=first, box=box_of(second, 2), object_ids=[2], lineages=[{1: []}]) == 1
    assert content(path) == before


def test_record_of_an_older_version(tmp_path):
    path = tmp_path / "old"
    group = zarr.create_group(str(path), zarr_format=2, attributes={
        "data_signature": "sha1", "tile_shape": None, "halo": None, "model_type": "vit_b", "model_name": "vit_b_lm",
        "micro_sam_version": "1.8.10", "model_hash": "xxh128:1",
        "commit_history": [{"current_object": {"object_ids": [1]}}, {"auto_segmentation": {"object_ids": [2, 3]}}],
        "committed_lineages": [{"1": [2, 3], "2": [], "3": []}],
    })
    array = group.create_array(
        "committed_objects", shape=SHAPE, chunks=SHAPE, dtype="u4", compressors=GZip(), fill_value=0
    )
    array[...] = labels_with(1, 2, 3)
    own = group.create_group("prompts/1")
    triangle = np.array([[0.0, 0], [0, 5], [5, 2], [6, 6]])
    for name, values in (
        ("prompts", np.stack([np.array(ROW), triangle])), ("point_prompts", np.array([[1.0, 2], [3, 4]])),
        ("point_labels", np.array([1, 0])),
    ):
        own.create_array(name, shape=values.shape, chunks=values.shape, dtype=values.dtype)[...] = values
    own["point_labels"].attrs["track_state"] = ["track", "division"]
    record = read_commit_record(path)
    assert record.lineages == ({1: [2, 3], 2: [], 3: []},)
    assert record.prompts == {1: Prompts(
        (point(1, 2), point(3, 4, positive=False, division=True)),
        (ShapePrompt("rectangle", ROW), ShapePrompt("polygon", tuple(map(tuple, triangle.tolist())))),
    )}
    commit(path, [4], labels_with(1, 2, 3, 4), same_data=["sha1"])
    assert read_commit_record(path).history[-1].settings["attributes"]["model_hash"] == "xxh128:0"
    assert commit_writer.SIGNATURE in read_commit_record(path).attributes
