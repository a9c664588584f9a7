"""Targets for the contracts of methods that adapt linear maps: layers, experts, and a table of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.testing import FAMILIES

ROLES = ["attn.q", "attn.v", "ffn.down"]
DENSE = tuple(family for family in FAMILIES if family != "mixtral")
"""Families with feed-forward layers; all of Mixtral's are made of experts."""
OTHERS = tuple(family for family in DENSE if family != "gpt2")
"""The other families, for methods whose quick tests run on GPT-2 only."""


def on_layers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adaptation of layers, including rows of fused weights."""
    return {**entry, "target": {"role": ROLES}}


def on_experts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adaptation of experts and attention."""
    return {**entry, "target": {"role": ["attn.q", "attn.v", "experts"]}}


def on_a_table(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adaptation of a table of embeddings and of queries, with a recomputed mask for each site."""
    return {
        **entry,
        "target": {"role": ["embed", "attn.q"]},
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
