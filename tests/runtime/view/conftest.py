"""A browser for the page: the machine's own, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium. Tests are skipped without one."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium here: the page was not opened in a browser (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=executable, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a file as a page; afterwards, pages must have made no requests and logged no errors."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_file(path: Path, fragment: str = "", width: int = 1400, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: _note(request.url, path, wrong))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready=true]", timeout=30_000)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []


def _note(url: str, path: Path, wrong: list[str]) -> None:
    if not (url.startswith((path.as_uri(), "blob:", "data:"))):
        wrong.append(f"request: {url[:200]}")
