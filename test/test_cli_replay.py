"""The command micro_sam.replay: exit codes, lists, outputs."""

import subprocess
import sys

import numpy as np
import pytest
from test_annotation_journal import cache, change, header, session, tracking_session  # noqa: F401

from micro_sam.annotation.journal import Entry, Journal, journal_path
from micro_sam.cli.replay import main
from micro_sam.core.output import read_labels
from micro_sam.tracking.ctc import read_ctc


@pytest.fixture
def run(capsys):
    """Run the command; gives (exit code, stdout, stderr)."""
    def run(*args):
        code = main([str(a) for a in args])
        return (code, *capsys.readouterr())
    return run


def test_labels(run, session, tmp_path):  # noqa: F811
    path, labels = session
    output = tmp_path / "labels.tif"
    code, out, err = run(path, "-o", output)
    assert (code, err) == (0, "")
    assert f"1 objects -> {output}" in out
    np.testing.assert_array_equal(read_labels(output), labels)
    code, out, _ = run(path, "-o", output)
    assert code == 0
    assert "already" in out
    code, _, err = run(path, "-o", output, "--until", 4, "--layer", "current_object")
    assert code == 2
    assert "records: 6 there, 4 now" in err
    np.testing.assert_array_equal(read_labels(output), labels)
    code, _, _ = run(path, "-o", output, "--until", 4, "--layer=current_object", "--overwrite")
    assert code == 0
    assert set(np.unique(read_labels(output))) == {0, 1}


def test_list_of_actions(run, session):  # noqa: F811
    code, out, _ = run(session[0], "--list")
    lines = out.splitlines()
    assert code == 0
    assert "2d, image cells (8 x 10), 6 records" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4", "5", "6"]
    assert "prompts 2 points, 2 shapes" in lines[2]
    assert "threshold=0.5" in lines[3]
    assert "committed_objects +1; current_object -1; prompts 0 points" in lines[4]
    assert [line.split()[3] for line in lines[5:]] == ["undo", "redo", "note"]


def test_known_sessions(run, cache):  # noqa: F811
    assert run()[:2] == (0, f"There are no sessions in {cache}.\n")
    path = journal_path("abc", "2d")
    empty, one = np.zeros((8, 10), np.uint32), np.ones((8, 10), np.uint32)
    with Journal.create(path, header()) as journal:
        journal.append(Entry("commit", {}, {"committed_objects": change(empty, one, created=(1,))}))
        assert "open" in run()[1]
    code, out, _ = run("--list")
    assert code == 0
    assert out.splitlines()[1].split()[2:] == ["2d", "cells", "1", "1", "not", "saved", str(path)]
    with Journal.resume(path)[0] as journal:
        journal.mark_saved()
    with open(path, "ab") as file:
        file.write(b"damage\n")
    assert "saved, line 4 damaged" in run()[1]


def test_tracks(run, tracking_session, tmp_path):  # noqa: F811
    path, editor = tracking_session
    code, out, _ = run(path, "-o", tmp_path / "ctc", "--tracks", "ctc")
    assert code == 0
    assert "3 tracks" in out
    labels, forest = read_ctc(tmp_path / "ctc")
    np.testing.assert_array_equal(labels, editor.labels)
    assert {t.id: t.parent for t in forest.values()} == {1: 0, 2: 1, 3: 1}


def test_damage(run, session, tmp_path):  # noqa: F811
    path, output = session[0], tmp_path / "labels.tif"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "damage", *lines[4:]]) + "\n")
    for args in (["-o", output], ["--list"]):
        code, _, err = run(path, *args)
        assert code == 1
        assert "Line 4" in err
        assert "--until_damage" in err
    assert not output.exists()
    assert run(path, "-o", output, "--until-damage", "--layer", "current_object")[0] == 0
    assert read_labels(output).any()
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")  # an action is missing
    code, _, err = run(path, "-o", tmp_path / "other.tif")
    assert code == 1
    assert "Line 3" in err
    assert "--until 1" in err


@pytest.mark.parametrize(("args", "match"), [
    (["{tmp}/missing.jsonl", "--list"], "no session"),
    (["{path}"], "Nothing to do"),
    (["-o", "{tmp}/a.tif"], "needs a session"),
    (["{path}", "-o", "{tmp}/a.tif", "--until", "7"], "from 0 to 6"),
    (["{path}", "-o", "{tmp}/a.png"], "not as '.png'"),
    (["{path}", "-o", "{tmp}/tracks", "--tracks", "ctc"], "mode 2d"),
    (["{tmp}/other.txt", "--list"], "no journal"),
])
def test_what_cannot_be_run(run, session, tmp_path, args, match):  # noqa: F811
    (tmp_path / "other.txt").write_text("text")
    code, _, err = run(*(a.format(tmp=tmp_path, path=session[0]) for a in args))
    assert code == 2
    assert match in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.txt", "session.jsonl"]


def test_output_that_cannot_be_written(run, session, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    code, _, err = run(session[0], "-o", tmp_path / "file" / "labels.tif")
    assert code == 1
    assert "a file is where a folder is needed" in err


def test_help_is_light():
    code = (
        "import contextlib, io, sys\nfrom micro_sam.cli.replay import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "print([m for m in ('torch', 'napari', 'qtpy', 'numpy', 'zarr') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
    with pytest.raises(SystemExit) as caught:
        main(["--layer", "prompts"])
    assert caught.value.code == 2


def test_replay_needs_no_torch(session, tmp_path):  # noqa: F811
    code = (
        "import sys\nfrom micro_sam.cli.replay import main\n"
        "code = main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'napari', 'qtpy') if m in sys.modules])\nsys.exit(code)"
    )
    args = [str(session[0]), "-o", str(tmp_path / "a.tif"), "--list"]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
