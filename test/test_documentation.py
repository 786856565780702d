"""The documentation says what the code does: options are complete, examples run."""

import re
from pathlib import Path

import pytest

from micro_sam.cli import automatic_segmentation, info, precompute_embeddings

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [automatic_segmentation, precompute_embeddings, info], ids=lambda m: m.__name__)
def test_every_option_is_documented(command):
    text = (ROOT / "doc" / "cli.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(--?\w+)`", text))
    options = {o for action in command.get_parser()._actions for o in action.option_strings} - {"-h", "--help"}
    assert options <= documented


def test_examples_of_the_library_run(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "doc" / "python.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "doc/python.md", "exec"), names)
    assert names["labels"].max() > 5
    assert {"tissue_purple_labels.tif", "embeddings.zarr", "state.zarr", "labels.ome.zarr"} <= {
        p.name for p in tmp_path.iterdir()
    }
