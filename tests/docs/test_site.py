"""The site builds strictly and without network, and its links have targets."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools.docs.blocks import ROOT

pytestmark = pytest.mark.slow

_NO_NETWORK = """\
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the build asked for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


class _Page(HTMLParser):
    """The references of a page, and the anchors that can be referred to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel", "") not in ("canonical", "prev", "next"):
            self.loaded.append(attributes.get("href", ""))
        elif "src" in attributes:
            self.loaded.append(attributes["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", _NO_NETWORK, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path) for path in site.rglob("*.html")}


@pytest.mark.full
def test_every_page_is_there_and_in_the_navigation(site: Path, pages: dict[Path, _Page]) -> None:
    sources = (ROOT / "docs").rglob("*.md")
    wanted = {(site / path.relative_to(ROOT / "docs")).with_suffix(".html") for path in sources}
    assert wanted <= pages.keys()
    named = {(site / "index.html").parent / urlsplit(link).path for link in pages[site / "index.html"].links}
    assert wanted <= {path.resolve() for path in named} | {site / "index.html"}


def test_internal_links_and_anchors_work(site: Path, pages: dict[Path, _Page]) -> None:
    """A picture's anchor is the theme it is for, which the site's styles have to know."""
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    themed = {name for name in ("gh-light-mode-only", "gh-dark-mode-only") if f'[src$="#{name}"]' in styles}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links assume that the site is at the root of a server
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or link in ("", "#"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else themed
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_a_reader_needs_no_network(site: Path, pages: dict[Path, _Page]) -> None:
    loaded = {link for page in pages.values() for link in page.loaded}
    assert loaded and not [
        link for link in loaded if urlsplit(link).scheme not in ("", "data") or link.startswith("//")
    ]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [text for text in styles if "fonts.googleapis" in text or "url(http" in text or "@import" in text]


def test_codes_have_their_anchors(pages: dict[Path, _Page], site: Path) -> None:
    from graftc.specs.errors.catalogue import CATALOGUE

    assert {code.lower() for code in CATALOGUE} <= pages[site / "errors.html"].anchors
