"""Where the contracts of methods for linear maps look: layers, experts, and a table of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.testing import FAMILIES

ROLES = ["attn.q", "attn.v", "ffn.down"]
DENSE = tuple(family for family in FAMILIES if family != "mixtral")
"""Families with feed-forward layers; every one of Mixtral's is made of experts."""
OTHERS = tuple(family for family in DENSE if family != "gpt2")
"""What a method is tried on where GPT-2 alone has to be quick."""


def on_layers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An adaptation on layers, fused rows among them."""
    return {**entry, "target": {"role": ROLES}}


def on_experts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same on experts, beside attention."""
    return {**entry, "target": {"role": ["attn.q", "attn.v", "experts"]}}


def on_a_table(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same on a table of embeddings, beside a mask of its own for each site, which is recomputed."""
    return {
        **entry,
        "target": {"role": ["embed", "attn.q"]},
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
