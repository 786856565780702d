"""The site of the documentation: it is built once, without a warning, and its pages are read as a browser would."""

import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest

ROOT = Path(__file__).parent.parent
# Elements and attributes that a browser fetches without being asked to.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "manifest"}


class Page(HTMLParser):
    """What the tests ask of a page: anchors, links, what it fetches, its text, its navigation."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.paragraphs: list[str] = []
        self.headings: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self._open: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and FETCHED_LINKS & set((values.get("rel") or "").split()):
            self.fetched.append(values["href"])
        if values.get(FETCHED.get(tag, "")):
            self.fetched.append(values[FETCHED[tag]])
        if tag == "img":
            self.pictures.append(values)
        if tag == "p":
            self.paragraphs.append("")
        if tag == "h1":
            self.headings.append("")
        if tag in ("p", "code", "pre", "h1"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if "p" in self._open and not {"code", "pre"} & set(self._open):
            self.paragraphs[-1] += data
        if "h1" in self._open:
            self.headings[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site; a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's word about its successor
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    """Address -> page."""
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_links_anchors_and_pictures(site, pages):
    broken = []
    for address, page in pages.items():
        if address == "404.html":  # addresses from the root of a server
            continue
        for link in {*page.links, *page.fetched}:
            parts = urlparse(link)
            if parts.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w.-]+\.[a-z]{2,}(:\d+)?", parts.netloc) or " " in link:
                    broken.append((address, link))
                continue
            assert parts.scheme == "", (address, link)
            target = unquote(urlparse(urljoin(f"/{address}", parts.path or f"/{address}")).path).lstrip("/")
            file = site / target
            if file.is_dir():
                target, file = f"{target.rstrip('/')}/index.html".lstrip("/"), file / "index.html"
            if not file.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[target].anchors):
                broken.append((address, link))
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    assert [(a, link) for a, page in pages.items() for link in page.fetched if urlparse(link).netloc] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", styles) == []


def test_pictures_are_described(pages):
    assert [(a, p["src"]) for a, page in pages.items() for p in page.pictures if not p.get("alt")] == []


def test_no_markdown_is_left(pages):
    """A list without an empty line before it, or a table that is none, shows as text."""
    left = [
        (address, text[:80]) for address, page in pages.items() for text in page.paragraphs
        if re.search(r"^\s*(?:[-*|] |\d+\. |#+ |```|:::)", text, re.MULTILINE) or re.search(r"\*\*|\]\(", text)
    ]
    assert left == []


def test_every_page_has_one_title_and_is_reached_from_the_start(pages):
    start = pages["index.html"]
    reached = {unquote(urlparse(link).path) for link in start.links}
    for address, page in pages.items():
        if address != "404.html":
            assert len(page.headings) == 1, address
            assert address in reached or f"{address.rpartition('/')[0]}/" in reached or address == "index.html", address


def test_search_finds_what_the_pages_say(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"] for entry in index["docs"]}
    assert {"faq.html", "annotators.html#tracking", "cli.html#exit-codes"} <= places
    assert any(entry["title"] == "micro_sam.util.get_sam_model" for entry in index["docs"])
    # Read from the disk, the index is a script and workers are not there.
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_dark_and_light(pages):
    html = pages["index.html"].html
    assert 'data-md-color-scheme="slate"' in html
    assert 'data-md-color-scheme="default"' in html


def test_models_of_the_registry_are_listed(pages):
    from micro_sam.models.specs import MODELS
    html = pages["models.html"].html
    assert [spec.name for spec in MODELS if f"<td><code>{spec.name}</code></td>" not in html] == []


def documented() -> list[str]:
    """The public paths of the pages of the library."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "doc" / "api").glob("*.md")))
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def test_paths_of_the_library_are_those_that_can_be_imported(pages):
    from test_documentation import HOOKS

    anchors = {anchor for address, page in pages.items() if address.startswith("api/") for anchor in page.anchors}
    wrong = []
    for path in documented():
        if path == "micro_sam.core.errors":  # a module, of which all classes are shown
            continue
        module, _, name = path.rpartition(".")
        home = HOOKS.home_of(path)
        wrong += [path] if not {path, home} <= anchors else []
        if not path.startswith("micro_sam.sam_annotator."):  # importing it would load Qt
            value = getattr(importlib.import_module(module), name)
            wrong += [path] if f"{value.__module__}.{value.__qualname__}" != home else []
    assert wrong == []


# Constants, types, and names that the package keeps for those who know them.
NOT_LISTED = {"ImageEmbeddings", "SamPredictor", "VIT_T_SUPPORT", "microsam_cachedir", "handle_pbar", "NoObjectsError"}


@pytest.mark.parametrize("module", [
    "util", "instance_segmentation", "multi_dimensional_segmentation", "training", "evaluation", "bioimageio",
    "interchange", "sam_annotator",
])
def test_the_library_is_complete(module):
    names = {name for name in importlib.import_module(f"micro_sam.{module}").__all__ if not name.isupper()}
    assert names - {path.rpartition(".")[2] for path in documented()} - NOT_LISTED == set()
