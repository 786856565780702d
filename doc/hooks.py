"""What mkdocs does besides rendering doc/*.md: pages from other places, generated pages, public paths of the library.

- Markdown files and notebooks outside doc/ become pages of the site (`OUTSIDE`), and links between files of the
  repository are led to these pages, so that the same text works in a file browser, on a code host and on the site.
- `commands.md` lists the options of all console scripts, from their parsers.
- `::: micro_sam.util.get_sam_model` in doc/api documents the function where it is defined, under the path that scripts
  import it from. Only source text is read for this; neither torch nor napari is loaded.
"""

import argparse
import functools
import importlib
import json
import logging
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "vit_t_lite.md": "micro_sam/models/weights/vit_t_lite.md",
    "examples.md": "examples/README.md",
    "notebook-automatic-segmentation.md": "notebooks/automatic_segmentation.ipynb",
    "notebook-finetuning.md": "notebooks/sam_finetuning.ipynb",
    "notebook-evaluation.md": "notebooks/inference_and_evaluation.ipynb",
    "example-images.md": "examples/data/README.md",
    "shipped-model-training.md": "finetuning/README.md",
    "tests.md": "test/README.md",
}
# Columns beside a page: the first one would only name the page itself, the table of models needs the room.
HIDDEN = {"index.md": ["navigation"], "models.md": ["toc"]}
_PAGE_OF = {source: page for page, source in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_log = logging.getLogger("mkdocs.hooks.micro_sam")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in doc/."""
    for page, source in OUTSIDE.items():
        is_notebook = source.endswith(".ipynb")
        given = {"content": notebook_page(source)} if is_notebook else {"abs_src_path": str(ROOT / source)}
        files.append(File.generated(config, page, **given))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to pages of the site, and name things as readers do."""
    uri = page.file.src_uri
    page.meta["hide"] = HIDDEN.get(uri, [])
    markdown = markdown.replace("```python no-run", "```python")
    if uri.startswith("api/"):
        markdown = public_paths(markdown)
    return relink(markdown, OUTSIDE.get(uri, f"doc/{uri}"), uri)


def relink(markdown: str, source: str, uri: str) -> str:
    """Rewrite the relative links of a Markdown file.

    Args:
        markdown: Its text.
        source: The file, relative to the root of the repository.
        uri: Its page, relative to doc/.

    Returns:
        The text with links to pages of the site. Links to files that are no pages become plain text.
    """
    def replace(match: re.Match) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file in _PAGE_OF:
            file = _PAGE_OF[file]
        elif file.startswith("doc/"):
            file = file.removeprefix("doc/")
        elif (ROOT / file).exists() and not image:
            return text if file in text else f"{text} (`{file}`)"
        else:
            return match[0]  # mkdocs reports it
        return f"{image}[{text}]({posixpath.relpath(file, posixpath.dirname(uri) or '.')}{hash_}{anchor})"

    # Every second part is code.
    parts = _CODE.split(markdown)
    return "".join(part if n % 2 else _LINK.sub(replace, part) for n, part in enumerate(parts))


def notebook_page(source: str) -> str:
    """Return a notebook, which has no outputs, as Markdown; below its title stands where it is."""
    cells = json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [f"```python\n{t}\n```" if c["cell_type"] == "code" else t for c, t in zip(cells, texts)]
    title, _, rest = parts[0].partition("\n")
    note = f"This is the notebook `{source}`; open it to run it and to see its pictures."
    return "\n\n".join([title, note, rest, *parts[1:]]) + "\n"


# --- commands ---


def console_scripts() -> dict[str, str]:
    """Return the console scripts, name -> `module:function`."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content["project"]["scripts"]


class _Caught(BaseException):
    """Carries a parser out of the command that has begun to use it."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser of a console script: the command is started, and stopped when it looks at its arguments."""
    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Caught(parser)

    module, function = console_scripts()[script].split(":")
    main = getattr(importlib.import_module(module), function)
    with mock.patch.multiple(argparse.ArgumentParser, parse_args=catch, parse_known_args=catch):
        try:
            main([])
        except _Caught as caught:
            parser = caught.args[0]
        else:
            raise RuntimeError(f"{script} does not look at its arguments.")
    parser.prog = script
    return parser


def commands_page() -> str:
    """Return a page with the options of all commands."""
    scripts = console_scripts()
    lines = [
        "# Options of all commands",
        "",
        "What `--help` prints, for each command; this page is made from the programs. [Command line](cli.md) explains "
        "the commands and has examples.",
    ]
    for script in sorted(scripts):
        lines += ["", f"## {script}", "", *_command(parser_of(script))]
    return "\n".join(lines) + "\n"


def _command(parser: argparse.ArgumentParser) -> list[str]:
    formatter = parser._get_formatter()
    lines = [_cell(parser.description or "")]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        title = {"positional arguments": "arguments", "options": "general"}.get(group.title, group.title)
        lines += ["", f"| {title} | |", "|---|---|"]
        for action in actions:
            names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
            lines.append(f"| {names} | {_values(action)}{_cell(formatter._expand_help(action))} |")
    if parser.epilog:
        lines += ["", _cell(parser.epilog)]
    return lines


def _values(action: argparse.Action) -> str:
    if not action.choices:
        return ""
    return ", ".join(f"`{choice}`" for choice in action.choices) + ": "


def _cell(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


# --- library ---


def public_paths(markdown: str) -> str:
    """Let `::: public.path` document the object where it is defined."""
    return re.sub(r"^::: (\S+)$", lambda match: _identifier(match[1]), markdown, flags=re.MULTILINE)


def _identifier(path: str) -> str:
    home = home_of(path)
    if home == path:
        return f"::: {path}"
    options = f"    options:\n      heading: {path}\n      toc_label: {path.rpartition('.')[2]}"
    return f'<a id="{path}"></a>\n\n::: {home}\n{options}'


def home_of(path: str) -> str:
    """Return where something is defined that a module offers under `path`.

    Logs a warning, which ends a strict build, if this is not exactly one place.
    """
    module, _, name = path.rpartition(".")
    modules = _definitions().get(name, ())
    if (ROOT / path.replace(".", "/")).with_suffix(".py").exists():
        return f"{path}.{name}" if path in modules else path  # a package offers the function of this module
    if module in modules:
        return path
    inside = [m for m in modules if m.startswith(f"{module}.")]
    found = inside if len(inside) == 1 else list(modules)
    if len(found) != 1:
        _log.warning(f"{path} is defined in {', '.join(modules) or 'no module'}. Name the module in doc/api.")
        return path
    return f"{found[0]}.{name}"


@functools.cache
def _definitions() -> dict[str, tuple[str, ...]]:
    """Name -> modules that define it at their top level."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "micro_sam").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"^(?:(?:async )?def|class) (\w+)|^(\w+)(?:: [^=\n]+)? = ", text, re.MULTILINE):
            found.setdefault(name[0] or name[1], []).append(module)
    return {name: tuple(dict.fromkeys(modules)) for name, modules in found.items()}
