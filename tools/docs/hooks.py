"""Hooks of MkDocs that add the pages of the methods to the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["on_config"]


def on_config(config: Any) -> Any:
    """Replace the list of methods in ``nav`` by a section with that page and the page of every method."""
    folder = Path(config["docs_dir"]) / "methods"
    pages = sorted(path.name for path in folder.glob("*.md") if path.name != "index.md")
    config["nav"] = [_with_methods(entry, pages) for entry in config["nav"]]
    return config


def _with_methods(entry: Any, pages: list[str]) -> Any:
    if isinstance(entry, dict):
        return {title: _with_methods(inner, pages) for title, inner in entry.items()}
    if isinstance(entry, list):
        return [_with_methods(inner, pages) for inner in entry]
    if entry == "methods/index.md":
        return [entry, *({Path(name).stem: f"methods/{name}"} for name in pages)]
    return entry
