"""Pruned models and their training loop, for the tests of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import graftc
from graftc.compiler.steering import live_places
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

ROLES = ["attn.q", "ffn.down"]


def adapted(family: str = "bert", model: nn.Module | None = None, role: Any = ROLES, **fields: Any) -> Compiled:
    """A tiny model with pruning."""
    entry = {"method": "pruning", **({"target": {"role": role}} if role else {}), **fields}
    return graftc.compile({"adapt": [entry]}, tiny(family) if model is None else model)


def places_of(compiled: Any) -> Sequence[Any]:
    """The pruned places of a model."""
    return live_places(compiled.compilation, compiled.compilation.main.resolved[0])[0]


def train(compiled: Any, steps: range, optimiser: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    """Take the steps with these numbers, each with its own batch and seed, and return the optimiser."""
    if optimiser is None:
        optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=5e-3)
    compiled.train()
    for number in steps:
        torch.manual_seed(number)
        loss = compiled(**inputs_for(compiled, seed=number), labels=torch.arange(5) % 3).loss
        (loss + compiled.extra_loss()).backward()
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()
    return optimiser
