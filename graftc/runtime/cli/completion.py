"""What the shell offers for the arguments of commands. Nothing here imports torch or fails: no offer is fine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

__all__ = ["artifacts", "methods", "models", "schemas", "specs"]

_SPECS = (".yaml", ".yml", ".json", ".toml")


def specs(incomplete: str) -> list[str]:
    """Spec files, and folders on the way to them."""
    return _paths(incomplete, lambda path: path.suffix.lower() in _SPECS)


def models(incomplete: str) -> list[str]:
    """Folders, and the ids of models in the hub's cache."""
    found = _paths(incomplete, lambda path: False)
    return [*found, *_hub_ids(incomplete)]


def artifacts(incomplete: str) -> list[str]:
    """Folders."""
    return _paths(incomplete, lambda path: False)


def methods(incomplete: str) -> list[tuple[str, str]]:
    """Methods with what they are."""
    try:
        from graftc.specs.listing import methods as listing

        known = [(info.tag, info.summary) for info in listing()]
    except Exception:  # a broken plugin is told when a command runs, not while somebody types
        return []
    return [(tag, summary) for tag, summary in known if tag.startswith(incomplete)]


def schemas(incomplete: str) -> list[str]:
    """Names of published schemas."""
    from graftc.runtime.cli.results.publish import SCHEMA_NAMES

    return [name for name in SCHEMA_NAMES if name.startswith(incomplete)]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Files that are wanted, and folders with a slash behind them; hidden ones only where a dot was typed."""
    head, _, start = incomplete.rpartition("/")
    folder = Path(f"{head}/" if "/" in incomplete else ".").expanduser()
    prefix = incomplete[: len(incomplete) - len(start)]
    return [f"{prefix}{name}" for name in _entries(folder, start, wanted)]


def _entries(folder: Path, start: str, wanted: Callable[[Path], bool]) -> Iterator[str]:
    for path in _listed(folder):
        if not path.name.startswith(start) or (path.name.startswith(".") and not start):
            continue
        if path.is_dir():
            yield f"{path.name}/"
        elif wanted(path):
            yield path.name


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _hub_ids(incomplete: str) -> Iterable[str]:
    """The cache's folders by name: huggingface_hub would take longer to import than people wait for a completion."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = [p.name.removeprefix("models--").replace("--", "/") for p in _listed(cache) if p.name[:8] == "models--"]
    return [name for name in names if incomplete and name.startswith(incomplete)]
