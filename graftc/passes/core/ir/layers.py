"""Layers, identified by the numbered segments of module paths."""

from __future__ import annotations

import re
from collections import defaultdict

from graftc.passes.core.ir.program import Program

_LAYER = re.compile(r"([^.]*\.)*?\d+(?![^.])")
"""The segments of a path up to and including the first number."""


def layer_path(module: str) -> str:
    """Return a path up to and including its first numbered segment, or an empty string if it has none."""
    match = _LAYER.match(module)
    return match[0] if match is not None else ""


def repeated_layers(program: Program) -> set[str]:
    """Return the layer paths that have a sibling; a single numbered path is not a repeated layer."""
    siblings: dict[str, set[str]] = defaultdict(set)
    for node in program.graph.nodes:
        path = layer_path(node.meta.get("module", ""))
        if path:
            siblings[path.rpartition(".")[0]].add(path)
    return {path for group in siblings.values() if len(group) > 1 for path in group}
