"""Helpers for the tests of SpIEL: tiny models, a training loop, and access to the entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import graftc
from graftc.passes.methods.bases.drop_and_grow import Entries, Reselection
from graftc.testing.compare import inputs_for

ROLES = ["attn.q", "ffn.down"]
SPIEL: dict[str, Any] = {
    "method": "spiel",
    "variant": "AG",
    "target": {"role": ROLES},
    "interval": 4,
    "accumulation_steps": 2,
    "total_steps": 40,
}


def spiel(**fields: Any) -> dict[str, Any]:
    """Return an adaptation in which some entries train, a twentieth unless a field says how many."""
    share = {} if {"density", "entries", "equivalent_rank"} & fields.keys() else {"density": 0.05}
    return {**SPIEL, **share, **fields}


def optimiser_for(compiled: Any, lr: float = 1e-2, **settings: Any) -> Any:
    """The optimiser that the variant is made for: `AgedAdamW` for AG, `SM3` for MA."""
    kind = graftc.optim.AgedAdamW if controller_of(compiled).spec.variant == "AG" else graftc.optim.SM3
    return kind(compiled, lr=lr, **settings)


def controller_of(compiled: Any) -> Reselection:
    """The controller that replaces entries."""
    (controller,) = compiled.steering.controllers.values()
    assert isinstance(controller, Reselection)
    return controller


def entries_of(compiled: Any) -> dict[str, Entries]:
    """The trained entries of every weight, by the weight's name."""
    return {
        entries.region.tensor + str(entries.place.site.key.part): entries for entries in controller_of(compiled).entries
    }


def batch(compiled: Any, number: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The batch of one step, with labels, or some rows of it."""
    inputs = inputs_for(compiled, seed=number)
    if "pixel_values" in inputs or "token_type_ids" in inputs:
        inputs["labels"] = torch.arange(5) % 3
    else:
        inputs["labels"] = inputs["input_ids"]
    return {name: tensor[rows] for name, tensor in inputs.items()}


def train(compiled: Any, optimiser: Any, steps: Iterable[int], micro: int = 1) -> None:
    """Take the optimiser steps with these numbers, each on its own batch in full or in ``micro`` parts of one row."""
    compiled.train()
    for number in steps:
        torch.manual_seed(number)
        parts = [slice(None)] if micro == 1 else [slice(i, i + 1) for i in range(micro)]
        for part in parts:
            (compiled(**batch(compiled, number, part)).loss / len(parts)).backward()
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()


def changed(entries: Entries) -> Tensor:
    """The dense change of a weight, flattened."""
    dense = torch.zeros(entries.region.numel, dtype=entries.tensor("delta").dtype)
    dense[entries.tensor("indices").long()] = entries.tensor("delta").detach()
    return dense
