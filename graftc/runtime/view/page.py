"""Build a self-contained HTML file that shows a rewritten model, opens from disk, and makes no network requests."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

SCRIPTS = (
    "model.js",
    "layout.js",
    "svg.js",
    "canvas.js",
    "tree.js",
    "panel.js",
    "timeline.js",
    "report.js",
    "search.js",
    "main.js",
)
"""The files that run in the page, in this order, as one script."""

LAYOUT = ("vendor/dagre.js", "layout.js", "worker.js")
"""The files that run in the page's worker."""

PICTURES = ("vendor/dagre.js", "model.js", "layout.js", "svg.js")
"""The files that draw a picture without a browser."""

_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; worker-src blob:; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


@cache
def asset(name: str) -> str:
    """Return the text of a file in ``assets``."""
    return (importlib.resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def script(names: tuple[str, ...]) -> str:
    """Return several files of ``assets`` as one script that leaves no global names behind."""
    body = "\n".join(asset(name) for name in names)
    return f"(() => {{\n{body}\n}})();"


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML of a page.

    The content security policy lists every script and style by its digest and blocks all others. Data is compressed and
    encoded, so that no part of it is ever read as markup.

    Args:
        data: the result of `graftc.runtime.view.contents.contents`.
    """
    code, style = script(SCRIPTS), asset("page.css")
    policy = _POLICY.format(script=_digest(code), style=_digest(style))
    parts = {
        "csp": policy,
        "title": html.escape(_printable(str(data["title"]))),
        "css": style,
        "data": packed(data),
        "worker": _inert(script(LAYOUT)),
        "script": code,
    }
    text, rest = "", asset("page.html")
    for name in parts:  # in the order of the skeleton, so that a marker inside a part is never replaced
        before, marker, rest = rest.partition(f"{{{{{name}}}}}")
        assert marker, name
        text += before + parts[name]
    return text + rest


def packed(data: Mapping[str, Any]) -> str:
    """Return JSON data, compressed and encoded as base64; equal data results in equal text."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(code: str) -> str:
    """Return code that a page contains as text, after checking that it cannot close its own element."""
    assert "</script" not in code.lower()
    return code


def _printable(text: str) -> str:
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return shown if len(shown) <= 120 else f"{shown[:60]} … {shown[-50:]}"
