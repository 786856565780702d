"""Loading large modules while a window is open: no garbage collection holds Python's lock for long."""

import gc
import subprocess
import sys
import textwrap

import pytest


def _run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300, **kwargs)


def test_nothing_is_collected_during_an_import(tmp_path):
    """The modules that a collection would have to look at are left out of later ones, and collection goes on."""
    pytest.importorskip("qtpy")
    (tmp_path / "large.py").write_text(
        "import gc\n"
        "collected = []\n"
        "gc.callbacks.append(lambda phase, info: collected.append(phase))\n"
        "kept = [[] for _ in range(200_000)]\n"
        "during = list(collected)\n"
    )
    _run("""
        import gc
        import sys
        sys.path.insert(0, ".")
        from micro_sam.sam_annotator.torch_loading import load_module
        before = gc.get_freeze_count()
        load_module("large")
        assert sys.modules["large"].during == []
        assert gc.get_freeze_count() - before > 200_000
        assert gc.isenabled()
        count = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        load_module("large")  # it is there already, so what came since is still collected
        assert gc.get_freeze_count() == count
    """, cwd=tmp_path)


def test_torch_is_out_of_the_collection():
    """A full collection after torch was loaded does not look at what belongs to it."""
    pytest.importorskip("qtpy")
    _run("""
        import gc
        from micro_sam.sam_annotator.torch_loading import load_torch
        load_torch()
        assert gc.get_freeze_count() > 10 * len(gc.get_objects()), (gc.get_freeze_count(), len(gc.get_objects()))
        assert gc.isenabled()
    """)


@pytest.mark.gui
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_the_first_press_of_check_data_imports_nothing(tmp_path, monkeypatch):
    """What the buttons of the finetuning panel need is loaded by the time at which the panel has settled."""
    pytest.importorskip("qtpy")
    from qtpy.QtWidgets import QApplication

    app = QApplication.instance() or QApplication([])
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    from micro_sam.sam_annotator import training_ui

    loaded = []
    monkeypatch.setattr(training_ui, "load_module", loaded.append)
    monkeypatch.setattr(training_ui, "_LOAD_AFTER_SECONDS", 0.0)
    widget = training_ui.TrainingWidget()
    assert widget.runner.wait(120)
    assert "micro_sam.training.job" in loaded
    widget.close()
    app.processEvents()


def test_what_is_loaded_is_left_out_once():
    """Opening another annotator must not keep the garbage of the first one for ever."""
    pytest.importorskip("qtpy")
    from micro_sam.sam_annotator.torch_loading import keep_collection_short

    keep_collection_short()
    count = gc.get_freeze_count()
    assert count > 0
    kept = [[] for _ in range(1000)]
    keep_collection_short()
    assert gc.get_freeze_count() <= count, len(kept)
