"""All generated pages, a picture and the JSON Schemas, by name, and how they are written and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from graftc.runtime.cli.results import published_schemas
from tools.docs.cli import render_cli
from tools.docs.errors import render_errors
from tools.docs.methods import render_methods
from tools.docs.picture import render_picture
from tools.docs.spec import render_spec

__all__ = ["DOCS", "ROOT", "render_all", "stale_pages", "write_pages"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def render_all() -> dict[str, str]:
    """The text of every generated page, by its path in the docs folder."""
    pages = {
        "cli.md": render_cli(),
        "errors.md": render_errors(ROOT),
        "images/pipeline.svg": render_picture(),
        "spec.md": render_spec(),
    }
    schemas = {
        f"schemas/{name}.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in published_schemas().items()
    }
    return pages | schemas | render_methods()


def stale_pages(pages: Mapping[str, str], docs: Path) -> list[str]:
    """The pages that are missing, differ, or are there and belong to no method or command any more."""
    held = {name: _read(docs / name) for name in pages}
    return sorted([*(name for name, text in pages.items() if held[name] != text), *_left_over(pages, docs)])


def write_pages(pages: Mapping[str, str], docs: Path) -> list[str]:
    """Write what differs, and remove the pages of what is gone; the names of what was changed."""
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
    held = [*(docs / "methods").glob("*.md"), *(docs / "schemas").glob("*.json")]
    return [name for path in held if (name := path.relative_to(docs).as_posix()) not in pages]
