"""Pruned models, for the tests of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftc.compiler.steering import live_places

ROLES = ["attn.q", "ffn.down"]
PRUNING = {"method": "pruning", "target": {"role": ROLES}}


def places_of(compiled: Any) -> Sequence[Any]:
    """The pruned places of a model."""
    return live_places(compiled.compilation, compiled.compilation.main.resolved[0])[0]
