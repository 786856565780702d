"""The documentation says what the code does: options are complete, examples run."""

import re
from pathlib import Path

import pytest

from micro_sam.cli import automatic_segmentation, info, precompute_embeddings, train

ROOT = Path(__file__).parent.parent


COMMANDS = [automatic_segmentation, precompute_embeddings, info, train]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda m: m.__name__)
def test_every_option_is_documented(command):
    text = (ROOT / "doc" / "cli.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(--?[\w-]+)`", text))
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


def test_links_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*ROOT.glob("*.md"), *ROOT.glob("doc/*.md"), *ROOT.glob("*/README.md")]
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_tests_that_the_table_of_weaknesses_names_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("test/test_*.py"))
    table = (ROOT / "test" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) > 50
    assert [name for name in named if f"def {name}(" not in tests] == []
    assert [name for name in re.findall(r"`(test_\w+\.py)`", table) if not (ROOT / "test" / name).exists()] == []
