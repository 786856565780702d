"""The documentation says what the code does: options are complete, snippets run, command lines are understood.

Python in the pages runs in order, one namespace per page, in a folder with `image.tif` (nuclei of the package) and the
examples. What is marked `no-run`, because it needs a download, a screen or hours, is checked against the signatures.
Pictures and snippets of doc/annotators.md are those of test_gui_screenshots.py, which has a screen.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))]
WITH_SCREEN = {"annotators.md"}


def _load_hooks():
    spec = importlib.util.spec_from_file_location("documentation_hooks", ROOT / "doc" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _load_hooks()


def fences(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: what stands after the fence, and the content without indentation."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [(info.strip(), inspect.cleandoc("\n" + content)) for _, info, content in blocks]


def of_kind(kind: str) -> list:
    """Pages with a fence of a kind, as parameters."""
    return [pytest.param(page, id=page.stem) for page in PAGES if any(info == kind for info, _ in fences(page))]


def commands(block: str) -> list[list[str]]:
    """The single commands of a block of shell, without comments and redirections."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token in (";", "&&", "||", "|"):
                found += [words] if words else []
                words = []
            else:
                words.append(token)
    return found


# bioimageio.core leaves files open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", of_kind("python"))
def test_python_runs(page, tmp_path, monkeypatch):
    if page.name in WITH_SCREEN:
        pytest.skip("test_gui_screenshots.py runs it")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "micro_sam" / "data" / "nuclei.tif", tmp_path / "image.tif")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "cache"))  # pages register models
    names = {"__name__": "snippet"}
    for info, block in fences(page):
        if info == "python":
            exec(compile(block, str(page), "exec"), names)
    if "labels" in names:
        assert np.max(names["labels"][...]) > 5  # there are objects, in memory or in a file


@pytest.mark.parametrize("page", of_kind("python no-run"))
def test_python_that_is_not_run_fits_the_signatures(page):
    blocks = [ast.parse(block) for info, block in fences(page) if info == "python no-run"]
    imported = {}
    for node in (node for block in blocks for node in ast.walk(block)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name)
    assert imported
    calls = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.Call)]
    for call in calls:
        function, target = call.func, None
        if isinstance(function, ast.Name):
            target = imported.get(function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            target = getattr(imported[function.value.id], function.attr) if function.value.id in imported else None
        if target is not None:
            keywords = {k.arg: None for k in call.keywords if k.arg is not None}
            inspect.signature(target).bind_partial(*call.args, **keywords)


@pytest.mark.parametrize("page", of_kind("bash"))
def test_command_lines_are_understood(page, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    scripts, extras = HOOKS.console_scripts(), PROJECT["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in (words for info, block in fences(page) if info == "bash" for words in commands(block)):
        program, *arguments = words
        if program.startswith("micro_sam."):
            assert program in scripts, f"there is no command {program}"
            parse(program, arguments)
        elif program == "make":
            assert set(arguments) <= set(targets)
        elif program.startswith("python") and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists(), arguments[0]
        elif "pip" in words[:3]:
            named = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(words)))
            assert {name for name in named.split(",") if name} <= set(extras)


def parse(script: str, arguments: list[str]) -> None:
    """Let the parser of a command take arguments, and its options of the mode as well, as the command does."""
    try:
        args, extra = HOOKS.parser_of(script).parse_known_args(arguments)
    except SystemExit as end:
        pytest.fail(f"{script} {' '.join(arguments)}: exit code {end.code}")
    if script == "micro_sam.import_model" and args.name:  # later lines of the page use that model
        from micro_sam.models import registry
        registry.register_local_model(args.name, ROOT / "micro_sam/models/weights/vit_t_lite.pt")
    if script == "micro_sam.automatic_segmentation":
        from micro_sam.cli.automatic_segmentation import _parse_options, get_parser
        from micro_sam.models.registry import find_spec
        _parse_options(get_parser(), args, extra, find_spec(args.model_type) if args.model_type else None)
    else:
        assert extra == [], f"{script} has no option {extra[0]}"


def test_options_in_the_text_exist():
    scripts = HOOKS.console_scripts()
    wrong = []
    for page in PAGES:
        spans = re.findall(r"(?<!`)`(micro_sam\.\w+) ([^`]*)`", page.read_text(encoding="utf-8"))
        for script, rest in ((script, rest) for script, rest in spans if script in scripts):
            known = {name for action in HOOKS.parser_of(script)._actions for name in action.option_strings}
            wrong += [f"{page.name}: {script} {w}" for w in rest.split() if w[0] == "-" and w not in known]
    assert wrong == []


def test_a_wrong_command_line_is_noticed():
    with pytest.raises(pytest.fail.Exception, match="exit code 2"):
        parse("micro_sam.train", ["--images", "a.tif", "--n_epochs", "many"])
    with pytest.raises(AssertionError, match="no option --epochs"):
        parse("micro_sam.train", ["--images", "a.tif", "--labels", "b.tif", "--epochs", "3"])
    with pytest.raises(ValueError, match="--min_sise"):
        parse("micro_sam.automatic_segmentation", ["-i", "a.tif", "-o", "b.tif", "--min_sise", "3"])
    block = "a -x 'b c' && d | e > f  # g\nh \\\n  i"
    assert commands(block) == [["a", "-x", "b c"], ["d"], ["e", ">", "f"], ["h", "i"]]


def test_every_fence_says_what_it_is():
    known = {"python", "python no-run", "bash", "text", "json", "toml", "yaml"}
    assert [f"{page.name}: {info!r}" for page in PAGES for info, _ in fences(page) if info not in known] == []


@pytest.mark.parametrize("script", sorted(HOOKS.console_scripts()))
def test_commands_are_complete(script):
    assert any(re.search(rf"{script}\b", page.read_text(encoding="utf-8")) for page in PAGES), "in no page"
    section = HOOKS.commands_page().partition(f"\n## {script}\n")[2].partition("\n## ")[0]
    parser = HOOKS.parser_of(script)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    assert {name for action in shown for name in action.option_strings} == set(re.findall(r"`(--?[\w-]+)`", section))


@pytest.mark.parametrize("name", ["automatic_segmentation", "precompute_embeddings", "info", "train"])
def test_every_option_is_explained(name):
    documented = set(re.findall(r"`(--?[\w-]+)`", (ROOT / "doc" / "cli.md").read_text(encoding="utf-8")))
    parser = HOOKS.parser_of(f"micro_sam.{name}")
    assert {o for action in parser._actions for o in action.option_strings} - {"-h", "--help"} <= documented


def test_extras_are_explained():
    text = (ROOT / "doc" / "installation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(PROJECT["optional-dependencies"]) - {"all"}


def test_links_lead_somewhere():
    pages = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("doc/api/*.md"), *ROOT.glob("*/README.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
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
