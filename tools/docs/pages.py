"""All generated pages, a picture and the JSON Schemas, by name, and functions that write and compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from graftc.cli.schemas import published_schemas
from tools.docs.cli import render_cli
from tools.docs.compiled import render_compiled
from tools.docs.errors import render_errors
from tools.docs.methods import render_methods
from tools.docs.picture import render_picture
from tools.docs.spec import render_spec
from tools.serving.page import render_serving

__all__ = ["DOCS", "ROOT", "render_all", "stale_pages", "write_pages"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def render_all() -> dict[str, str]:
    """Return the text of every generated page, by its path in the docs folder."""
    pages = {
        "cli.md": render_cli(),
        "errors.md": render_errors(ROOT),
        "images/pipeline.svg": render_picture(),
        "reference/compiled.md": render_compiled(),
        "serving.md": render_serving(DOCS),
        "spec.md": render_spec(),
    }
    schemas = {
        f"schemas/{name}.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in published_schemas().items()
    }
    return pages | schemas | render_methods()


def stale_pages(pages: Mapping[str, str], docs: Path) -> list[str]:
    """Return the pages that are missing, differ, or no longer belong to a method or command."""
    current = {name: _read(docs / name) for name in pages}
    return sorted([*(name for name, text in pages.items() if current[name] != text), *_left_over(pages, docs)])


def write_pages(pages: Mapping[str, str], docs: Path) -> list[str]:
    """Write the pages that differ, and remove those that are no longer generated; return the names of both."""
    changed = stale_pages(pages, docs)
    for name in changed:
        if name not in pages:
            (docs / name).unlink()
            continue
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(pages[name], encoding="utf-8")
    return changed


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _left_over(pages: Mapping[str, str], docs: Path) -> list[str]:
    paths = [*(docs / "methods").glob("*.md"), *(docs / "schemas").glob("*.json")]
    return [name for path in paths if (name := path.relative_to(docs).as_posix()) not in pages]
