"""The journal of a session, and its replay: whatever happens to the file, no whole line is lost or misread."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micro_sam.annotation import journal as journal_module
from micro_sam.annotation.journal import (
    Entry,
    Journal,
    JournalDamageError,
    Note,
    Redo,
    SessionInUseError,
    Undo,
    discard,
    find_journals,
    is_finished,
    journal_path,
    read_journal,
    session_folder,
    summary,
    tidy,
)
from micro_sam.annotation.prompt_data import PointPrompt, Prompts, ShapePrompt
from micro_sam.annotation.replay import replay, replay_records_steps, write_replay
from micro_sam.core.errors import (
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    NotInitializedError,
    OutputExistsError,
    OutputWriteError,
)
from micro_sam.core.output import read_labels
from micro_sam.core.progress import drain
from micro_sam.editing.history import Delta, EditConflictError, Runs, difference

LAYERS = ("current_object", "auto_segmentation", "committed_objects")
PROMPTS = Prompts(
    (PointPrompt((1.5, 2.25), True), PointPrompt((0.1, 3.0), False, 2, True)),
    (ShapePrompt("polygon", ((0.0, 0.0), (0.0, 3.3), (2.0, 1.0))), ShapePrompt("path", ((1.0, 1.0), (2.0, 2)), False)),
)


def header(shape=(8, 10), mode="2d", signature="abc", name="cells"):
    return {"mode": mode, "image": {"name": name, "shape": list(shape), "dtype": "uint8", "signature": signature}}


def change(before, after, name="edit", **kwargs):
    """The delta between two label images."""
    planes = [a.reshape((1,) * (3 - a.ndim) + a.shape) for a in (before, after)]
    block = tuple(slice(0, s) for s in planes[0].shape)
    return Delta(name, Runs.collect(planes[0].shape, [difference(*planes, block, planes[0].shape)]), **kwargs)


def painted(shape, value, *boxes):
    labels = np.zeros(shape, dtype=np.uint32)
    for box in boxes:
        labels[tuple(slice(*b) for b in box)] = value
    return labels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sessions"


@pytest.fixture
def session(tmp_path):
    """A journal of three actions, an undo, a redo and a note; gives its path and the final labels."""
    path, empty = tmp_path / "session.jsonl", np.zeros((8, 10), dtype=np.uint32)
    one, two = painted((8, 10), 1, [(1, 4), (2, 6)]), painted((8, 10), 7, [(3, 8), (5, 10)])
    with Journal.create(path, header()) as journal:
        journal.append(Entry("prompts", prompts=(Prompts(), PROMPTS)))
        journal.append(Entry(
            "segment", {"plane": None, "threshold": np.float32(0.5), "tile": (2, 3)},
            {"current_object": change(empty, one)},
            state={"scores": (None, {"1": [0.5, 0.25]})},
        ))
        journal.append(Entry(
            "commit", {}, {
                "committed_objects": change(empty, two, created=(7,)),
                "current_object": change(one, empty, removed=(1,)),
            }, (PROMPTS, Prompts()), {"scores": ({"1": [0.5, 0.25]}, None)},
        ))
        journal.append_undo()
        journal.append_redo()
        journal.note({"settings": {"preserve": "objects"}})
    return path, two


def test_what_is_written_is_read(session):
    path, labels = session
    head, records = read_journal(path)
    assert head["format"] == "micro_sam.session"
    assert (head["mode"], head["image"]) == ("2d", header()["image"])
    assert head["software"].startswith("micro_sam ")
    first, second, third, undo, redo, note = records
    assert first.prompts == (Prompts(), PROMPTS)
    assert (second.name, second.args) == ("segment", {"plane": None, "threshold": 0.5, "tile": [2, 3]})
    assert third.state == {"scores": ({"1": [0.5, 0.25]}, None)}
    assert third.deltas["committed_objects"].created == (7,)
    assert isinstance(undo, Undo)
    assert isinstance(redo, Redo)
    assert note == Note({"settings": {"preserve": "objects"}})
    assert all(abs(r.time - time.time()) < 60 for r in records)
    found = replay(path)
    assert found.labels["committed_objects"].dtype == np.uint32
    np.testing.assert_array_equal(found.labels["committed_objects"], labels)
    assert not found.labels["current_object"].any()
    assert (found.prompts, found.state) == (Prompts(), {"settings": {"preserve": "objects"}})
    assert [e.name for e in found.done] == ["prompts", "segment", "commit"]
    before = replay(path, until=4)
    assert before.prompts == PROMPTS
    assert before.state == {"scores": {"1": [0.5, 0.25]}}
    assert not before.labels["committed_objects"].any()
    assert [e.name for e in before.undone] == ["commit"]


def test_what_did_not_change_takes_no_space(tmp_path):
    labels = np.zeros((8, 10), dtype=np.uint32)
    with Journal.create(tmp_path / "a.jsonl", header()) as journal:
        journal.append(Entry(
            "nothing", {}, {"current_object": change(labels, labels)}, (PROMPTS, PROMPTS), {"a": ([1], (1,))}
        ))
    assert list(json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])) == ["do", "time"]


@pytest.mark.parametrize("entry", [
    Entry("a", {"f": print}), Entry("a", state={"lineage": ({}, {1: []})}), Entry("a", deltas={"layer": None}),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, entry):
    with Journal.create(tmp_path / "a.jsonl", header()) as journal:
        before = (tmp_path / "a.jsonl").read_bytes()
        with pytest.raises((InvalidTypeError, InvalidInputError), match="keeps numbers|must be one of"):
            journal.append(entry)
        assert (tmp_path / "a.jsonl").read_bytes() == before


def test_last_line_torn_at_every_byte(session, tmp_path):
    path, _ = session
    content = path.read_bytes()
    *_, last = content.splitlines(keepends=True)
    for line in content.splitlines()[1:4], content.splitlines()[1:]:  # the last one is an action, then a note
        whole = content.splitlines(keepends=True)[0] + b"".join(part + b"\n" for part in line)
        start = len(whole) - len(line[-1]) - 1
        for end in range(start, len(whole)):
            torn = tmp_path / "torn.jsonl"
            torn.write_bytes(whole[:end])
            # All but the newline is there: then the line counts.
            n_whole = len(line) if end == len(whole) - 1 else len(line) - 1
            assert len(read_journal(torn)[1]) == n_whole
            if start + 20 < end < len(whole) - 20 and end % 16:
                continue
            journal, records = Journal.resume(torn)
            assert len(records) == n_whole
            journal.append_undo()
            journal.close()
            found = read_journal(torn)[1]
            assert len(found) == n_whole + 1
            assert isinstance(found[-1], Undo)
    torn.write_bytes(whole[:start] + b"\0" * 100)  # as a file system may leave it after a power failure
    assert len(read_journal(torn)[1]) == len(line) - 1


@pytest.mark.parametrize("damage", [
    b"\xff" * 20, b'{"do": "x"', b"[1, 2]", b"5", b'{"do": "x", "labels": {"layer": {}}}', b'{"redo": 2}', b"",
    b'{"do": "x", "prompts": [1, 2]}', b'{"do": "x", "labels": {"current_object": {"format": 99}}}',
])
def test_other_damage_is_named_by_its_line(session, damage):
    path, _ = session
    lines = path.read_bytes().splitlines()
    lines[3] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(JournalDamageError, match=r"Line 4 of .*session\.jsonl is damaged .*until_damage") as caught:
        read_journal(path)
    assert (caught.value.path, caught.value.line) == (path, 4)
    with pytest.raises(JournalDamageError):
        Journal.resume(path)
    with pytest.raises(JournalDamageError):
        replay(path)
    assert [r.name for r in read_journal(path, until_damage=True)[1]] == ["prompts", "segment"]
    assert replay(path, until_damage=True).labels["current_object"].any()


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x89PNG\r\n", b'{"format": "micro_sam.session", "version": 1}\n'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="x.jsonl"):
        read_journal(path)
    with pytest.raises(MissingFileError):
        read_journal(tmp_path / "y.jsonl")


def test_newer_versions_and_wrong_headers_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    Journal.create(path, header()).close()
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(InvalidInputError, match="version 2.*Update"):
        Journal.resume(path)
    for bad in (header(mode="4d"), header((8, 10, 3)), {"mode": "2d"}):
        with pytest.raises(InvalidInputError, match="mode|shape"):
            Journal.create(tmp_path / "new.jsonl", bad)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


# --- one writer, and the end of its process ---

WRITER = """
import sys, numpy as np
from test_annotation_journal import change, header
from micro_sam.annotation.journal import Entry, Journal
labels = np.zeros((64, 64), dtype=np.uint32)
journal = Journal.create(sys.argv[1], header((64, 64)))
print("ready", flush=True)
for n in range(1, 100000):
    before = labels.copy()
    labels[n % 60:n % 60 + 4, n % 50:n % 50 + 9] = n
    journal.append(Entry("commit" if n % 50 == 0 else "paint", {"n": n}, {"committed_objects": change(before, labels)}))
    print(n, flush=True)
"""


def start_writer(path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_writer_loses_nothing_that_was_written(tmp_path):
    rng = random.Random(0)
    for kill in range(3):
        path = tmp_path / f"{kill}.jsonl"
        process = start_writer(path)
        with pytest.raises(SessionInUseError, match=rf"process {process.pid} on .* since .*Close it there"):
            Journal.resume(path)
        assert read_journal(path)[0]["mode"] == "2d", "reading is possible all the time"
        time.sleep(rng.uniform(0.05, 0.5))
        process.kill()
        told = [int(line) for line in process.communicate()[0].split()]
        journal, records = Journal.resume(path)  # its lock does not outlive it
        journal.close()
        assert len(records) >= len(told) > 0
        assert [r.args["n"] for r in records] == list(range(1, len(records) + 1))
        expected = np.zeros((64, 64), dtype=np.uint32)
        for n in range(1, len(records) + 1):
            expected[n % 60:n % 60 + 4, n % 50:n % 50 + 9] = n
        np.testing.assert_array_equal(replay(path).labels["committed_objects"], expected)


def test_one_writer_in_a_process_too(session):
    path, _ = session
    journal, _ = Journal.resume(path)
    with pytest.raises(SessionInUseError, match="this process"):
        Journal.resume(path)
    with pytest.raises(SessionInUseError):
        discard(path)
    journal.close()
    journal.close()
    with pytest.raises(NotInitializedError, match="closed"):
        journal.append_undo()
    with pytest.raises(OutputExistsError, match="Resume"):
        Journal.create(path, header())
    Journal.resume(path)[0].close()


def test_disk_full_leaves_whole_lines(session, monkeypatch):
    path, _ = session
    journal, _ = Journal.resume(path)
    before = path.read_bytes()
    write = os.write

    def fails(fd, data):
        if fd != journal._fd:
            return write(fd, data)
        if len(data) > 10:
            return write(fd, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", lambda fd, data: fails(fd, data[:11] if len(data) > 11 else data))
        patch.setattr(journal_module.os, "ftruncate", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        with pytest.raises(OutputWriteError, match="no space left.*Free some"):
            journal.append_undo()
    assert len(path.read_bytes()) > len(before), "cutting it off has failed as well"
    assert len(read_journal(path)[1]) == 6
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", fails)
        with pytest.raises(OutputWriteError):
            journal.append_undo()
    assert path.read_bytes() == before
    journal.append_undo()
    journal.close()
    assert len(read_journal(path)[1]) == 7


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be deleted there")
def test_deleted_journal_is_noticed(session):
    path, _ = session
    journal, _ = Journal.resume(path)
    path.unlink()
    with pytest.raises(OutputWriteError, match="was deleted while"):
        journal.append_undo()
    journal.close()


def test_no_permission(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="a file is where a folder is needed"):
        Journal.create(tmp_path / "file" / "a.jsonl", header())


def test_commits_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    with Journal.create(tmp_path / "a.jsonl", header()) as journal:
        monkeypatch.setattr(journal_module.os, "fsync", lambda fd: synced.append(fd))
        journal.append(Entry("paint"))
        journal.append_undo()
        assert not synced
        for name in ("commit", "load", "save"):
            journal.append(Entry(name))
        journal.mark_saved()
        assert len(synced) == 4
    assert len(synced) == 5


# --- the folder ---


def test_finding_and_discarding(cache):
    paths = []
    for name in ("a", "a", "b"):
        paths.append(journal_path(name, "2d"))
        with Journal.create(paths[-1], header(signature=name)) as journal:
            journal.append(Entry("paint"))
        os.utime(paths[-1], (1000 + len(paths),) * 2)
    (cache / "other.jsonl").write_text("{}")
    assert all(p.parent == cache == session_folder() for p in paths)
    assert find_journals("a", "2d") == [paths[1], paths[0]]
    assert find_journals("a", "3d") == find_journals("c", "2d") == []
    assert find_journals() == paths[::-1]
    journal, _ = Journal.resume(paths[1])
    assert find_journals("a", "2d") == [paths[0]]
    assert set(find_journals("a", "2d", include_open=True)) == set(paths[:2])
    assert not is_finished(paths[1])
    journal.mark_saved({"path": "labels.tif"})
    assert is_finished(paths[1])
    journal.append_undo()
    assert not is_finished(paths[1])
    journal.close()
    moved = discard(paths[0])
    assert moved.parent == cache / "trash"
    assert len(read_journal(moved)[1]) == 1
    assert find_journals("a", "2d") == [paths[1]]
    with pytest.raises(MissingFileError):
        discard(paths[0])


def test_old_journals_go_if_their_work_was_saved(cache):
    paths = []
    for n in range(6):
        paths.append(journal_path(str(n), "2d"))
        with Journal.create(paths[-1], header(signature=str(n))) as journal:
            journal.append(Entry("paint"))
            if n % 2 == 0:
                journal.mark_saved({"path": "labels.tif"})
        os.utime(paths[-1], (1000 + n,) * 2)
    in_use, _ = Journal.resume(paths[0])
    assert tidy(keep=2) == [cache / "trash" / paths[2].name]
    in_use.close()
    assert set(find_journals()) == {paths[n] for n in (0, 1, 3, 4, 5)}, "what was not saved stays, and the newest"
    assert tidy() == []


def test_trash_keeps_the_last_ones(cache, monkeypatch):
    def throw(n):
        path = session_folder() / f"{n}.jsonl"
        Journal.create(path, header()).close()
        moved = discard(path)
        os.utime(moved, (1000 + n,) * 2)

    for n in range(25):
        throw(n)
    names = {p.name for p in (cache / "trash").iterdir()}
    assert names == {f"{n}.jsonl" for n in range(5, 25)}
    monkeypatch.setattr(journal_module, "_TRASH_BYTES", 100)
    throw(30)
    assert [p.name for p in (cache / "trash").iterdir()] == ["30.jsonl"], "the one thrown away now is kept"


def test_summary(session):
    path, _ = session
    found = summary(path)
    assert (found.n_actions, found.n_objects, found.image_name, found.is_finished) == (3, 1, "cells", False)
    assert abs(found.last_change - time.time()) < 60
    journal, _ = Journal.resume(path)
    journal.append_undo()
    journal.close()
    assert (summary(path).n_actions, summary(path).n_objects) == (2, 0)
    with open(path, "ab") as file:
        file.write(b"damaged\n")
    assert summary(path).damage.line == 9
    assert summary(path).n_actions == 2


# --- replay ---


class Reference:
    """What a session does, with whole copies of the labels."""

    def __init__(self, shape):
        self.states, self.position = [np.zeros(shape, dtype=np.uint32)], 0

    def act(self, labels):
        self.states[self.position + 1:] = [labels]
        self.position += 1

    def move(self, step):
        possible = 0 <= self.position + step < len(self.states)
        self.position += step if possible else 0
        return possible

    @property
    def labels(self):
        return self.states[self.position]


STEPS = st.lists(st.one_of(
    st.tuples(st.just("paint"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 7), st.integers(0, 6)),
    st.sampled_from(["undo", "redo", "note"]),
), max_size=25)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from(LAYERS))
def test_undo_and_redo_are_those_of_a_session(tmp_path_factory, steps, layer):
    path, shape = tmp_path_factory.mktemp("s") / "a.jsonl", (3, 6, 8)
    reference, expected = Reference(shape), []
    with Journal.create(path, header(shape, "3d")) as journal:
        for step in steps:
            if step == "note":
                journal.note({"text": "nothing"})
            elif step in ("undo", "redo"):
                if not reference.move(-1 if step == "undo" else 1):
                    continue
                getattr(journal, f"append_{step}")()
            else:
                _, z, y, x, value = step
                labels = reference.labels.copy()
                labels[z:z + 2, y:y + 3, x:x + 4] = value
                journal.append(Entry("paint", {}, {layer: change(reference.labels, labels)}))
                reference.act(labels)
            expected.append(reference.labels)
    for until, labels in [(n + 1, e) for n, e in enumerate(expected)][-3:]:
        found = replay(path, until)
        np.testing.assert_array_equal(found.labels[layer], labels)
        assert all(not found.labels[other].any() for other in LAYERS if other != layer)
    assert len(replay(path).done) == reference.position
    assert len(replay(path).undone) == len(reference.states) - 1 - reference.position


def test_large_ids_widen_the_labels(tmp_path):
    empty = np.zeros((8, 10), dtype=np.uint64)
    large = empty.copy()
    large[2:4, 3:5] = 2**40
    with Journal.create(tmp_path / "a.jsonl", header()) as journal:
        journal.append(Entry("load", {}, {"committed_objects": change(empty, large)}))
    labels = replay(tmp_path / "a.jsonl").labels
    assert labels["committed_objects"].dtype == np.uint64
    np.testing.assert_array_equal(labels["committed_objects"], large)
    assert labels["current_object"].dtype == np.uint32


def test_conflicts_are_named_by_their_line(tmp_path):
    empty, one = np.zeros((8, 10), dtype=np.uint32), painted((8, 10), 1, [(1, 4), (2, 6)])
    other_shape = change(np.zeros((8, 11), np.uint32), np.ones((8, 11), np.uint32))
    link = Delta("link", Runs((1, 8, 10)), links=((2, 1, 3),))
    for n, (delta, match) in enumerate([
        (change(one * 2, empty), "12 pixels do not have"), (other_shape, "shape"), (link, "parent 1 of track 2"),
    ]):
        path = tmp_path / f"{n}.jsonl"
        with Journal.create(path, header()) as journal:
            journal.append(Entry("paint", {}, {"committed_objects": change(empty, one)}))
            journal.append(Entry("wrong", {}, {"committed_objects": delta}))
        with pytest.raises(EditConflictError, match=rf"Line 3 of .*\(wrong\).*{match}.*until=1"):
            replay(path)
        np.testing.assert_array_equal(replay(path, until=1).labels["committed_objects"], one)
    with Journal.create(tmp_path / "undo.jsonl", header()) as journal:
        journal.append_undo()
    with pytest.raises(EditConflictError, match="Line 2 .*nothing to undo"):
        replay(tmp_path / "undo.jsonl")
    with pytest.raises(InvalidInputError, match="from 0 to 1"):
        replay(tmp_path / "undo.jsonl", until=2)


@pytest.fixture
def tracking_session(tmp_path):
    """A session that tracks: gives its journal and the editor that did it."""
    from micro_sam.editing.tracks import TrackEditor  # loads torch, which the subprocesses do not need

    path, shape = tmp_path / "tracks.jsonl", (5, 12, 14)
    editor = TrackEditor(np.zeros(shape, dtype=np.uint32))
    mother, left, right = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    mother[:3, 2:6, 2:9], left[3:, 2:6, 2:5], right[3:, 2:6, 6:9] = True, True, True
    with Journal.create(path, header(shape, "tracking")) as journal:
        for mask in (mother, left, right):
            delta = editor.add(mask * np.ones(shape, bool))
            journal.append(Entry("add", {}, {"committed_objects": delta}))
        for operation, args in (("link", (1, 2)), ("link", (1, 3)), ("unlink", (3,)), ("swap", (2, 3, 4))):
            journal.append(Entry(operation, {}, {"committed_objects": getattr(editor, operation)(*args)}))
        editor.undo()
        journal.append_undo()
        editor.undo()
        journal.append_undo()
    return path, editor


def test_tracks_are_rebuilt(tracking_session, tmp_path):
    from micro_sam.tracking.ctc import read_ctc
    from micro_sam.tracking.geff import read_geff

    path, editor = tracking_session
    found = replay(path)
    np.testing.assert_array_equal(found.labels["committed_objects"], editor.labels)
    assert found.parents == editor.parents == {2: 1, 3: 1}
    for tracks, read in (("ctc", read_ctc), ("geff", read_geff)):
        written = write_replay(path, tmp_path / tracks, tracks=tracks)
        assert (written.n_objects, written.was_there) == (3, False)
        labels, forest = read(written.path)
        np.testing.assert_array_equal(labels, editor.labels)
        assert {t.id: t.parent for t in forest.values()} == {1: 0, 2: 1, 3: 1}
        assert write_replay(path, tmp_path / tracks, tracks=tracks).was_there
        with pytest.raises(OutputExistsError):
            write_replay(path, tmp_path / tracks, tracks=tracks, until=3)
        written = write_replay(path, tmp_path / tracks, tracks=tracks, until=3, overwrite=True)
        assert {t.parent for t in read(written.path)[1].values()} == {0}


def test_written_labels(session, tmp_path):
    path, labels = session
    for name in ("out.tif", "out.zarr"):
        written = write_replay(path, tmp_path / name)
        np.testing.assert_array_equal(read_labels(written.path), labels)
        assert (written.n_objects, written.was_there) == (1, False)
        assert write_replay(path, tmp_path / name).was_there
        with pytest.raises(OutputExistsError, match="layer"):
            write_replay(path, tmp_path / name, layer="current_object")
    with pytest.raises(InvalidInputError, match="mode 2d"):
        write_replay(path, tmp_path / "tracks", tracks="ctc")
    for wrong in ({"layer": "prompts"}, {"tracks": "csv"}):
        with pytest.raises(InvalidInputError, match="must be one of"):
            write_replay(path, tmp_path / "x.tif", **wrong)
    assert not (tmp_path / "x.tif").exists()


def test_records_of_a_resumed_journal_give_its_state(session):
    journal, records = Journal.resume(session[0])
    found = drain(replay_records_steps(journal.header, records), verbose=False)
    journal.append(Entry("clear", {}, {
        "committed_objects": change(found.labels["committed_objects"], np.zeros((8, 10), np.uint32))
    }))
    journal.close()
    assert not replay(session[0]).labels["committed_objects"].any()


def test_neither_torch_nor_napari_is_needed():
    code = (
        "import sys, micro_sam.annotation.replay, micro_sam.annotation.journal, micro_sam.annotation.commit_record\n"
        "print([m for m in ('torch', 'napari', 'qtpy', 'segment_anything') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
