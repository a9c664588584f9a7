"""Shell completion for command arguments. It does not import torch and never fails: an empty list is a valid result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

_SPECS = (".yaml", ".yml", ".json", ".toml")


def specs(incomplete: str) -> list[str]:
    """Return spec files, and all folders, which may contain spec files."""
    return _paths(incomplete, lambda path: path.suffix.lower() in _SPECS)


def models(incomplete: str) -> list[str]:
    """Return folders, and the ids of models in the hub cache."""
    folders = _paths(incomplete, lambda path: False)
    return [*folders, *_hub_ids(incomplete)]


def artifacts(incomplete: str) -> list[str]:
    """Return folders."""
    return _paths(incomplete, lambda path: False)


def methods(incomplete: str) -> list[tuple[str, str]]:
    """Return the tags of methods with their summaries."""
    try:
        from graftc.specs.listing import methods as listing

        known = [(info.tag, info.summary) for info in listing()]
    except Exception:  # a broken plugin is reported when a command runs, not during completion
        return []
    return [(tag, summary) for tag, summary in known if tag.startswith(incomplete)]


def formats(incomplete: str) -> list[tuple[str, str]]:
    """Return export formats with their summaries."""
    from graftc.runtime.export.registry import summaries

    return [(name, summary) for name, summary in summaries().items() if name.startswith(incomplete)]


def schemas(incomplete: str) -> list[str]:
    """Return the names of published schemas."""
    from graftc.cli.schemas import schema_names

    return [name for name in schema_names() if name.startswith(incomplete)]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Return matching files, and folders with a trailing slash.

    Hidden entries are included only if the typed name begins with a dot.
    """
    head, _, start = incomplete.rpartition("/")
    folder = Path(f"{head}/" if "/" in incomplete else ".").expanduser()
    prefix = incomplete[: len(incomplete) - len(start)]
    meant = [p for p in _listed(folder) if p.name.startswith(start) and (start or not p.name.startswith("."))]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in meant if path.is_dir() or wanted(path)]
    return [f"{prefix}{name}" for name in names]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _hub_ids(incomplete: str) -> Iterable[str]:
    """Return ids derived from folder names in the cache, since importing huggingface_hub is too slow for completion."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = [p.name.removeprefix("models--").replace("--", "/") for p in _listed(cache) if p.name[:8] == "models--"]
    return [name for name in names if incomplete and name.startswith(incomplete)]
