"""Exact counts of published models, whose layers are alike, from models of two and of three layers.

Every number of a report that the tests compare is a constant plus a term per layer, so two depths determine it for any
depth: a second instead of half a minute for a model of 7B parameters. The same counts at full depth run under ``make
test-full``; `tests/compiler/test_counts.py` checks that a deep model is counted in bounded time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graftc

Described = tuple[str, str, Mapping[str, Any]]
"""A model's class, the class of its config, and what its config is given."""

DEPTHS: Mapping[str, tuple[str, ...]] = {
    "GPT2Config": ("n_layer",),
    "T5Config": ("num_layers", "num_decoder_layers"),
    "BartConfig": ("decoder_layers",),
}
"""Fields that say how many layers there are, where it is not ``num_hidden_layers``."""


@dataclass(frozen=True)
class Counts:
    """The numbers of parameters in a report."""

    trainable_parameters: int
    deployed_parameters: int
    base_parameters: int

    @property
    def percent(self) -> float:
        """The trainable share of the base and the trained parameters, in percent, as a report shows it."""
        return 100 * self.trainable_parameters / (self.base_parameters + self.trainable_parameters)


def on_meta(described: Described) -> nn.Module:
    """Return the model on the meta device; the same description gives the same object."""
    name, config, values = described
    return _on_meta(name, config, tuple(values.items()))


@cache
def _on_meta(name: str, config: str, values: tuple[tuple[str, Any], ...]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**dict(values)))
    return model


def at_full_depth(adapt: Sequence[Mapping[str, Any]], described: Described) -> Counts:
    """Count on the model itself."""
    report = graftc.check({"adapt": [dict(entry) for entry in adapt]}, on_meta(described))
    counts = Counts(*(getattr(report, field.name) for field in fields(Counts)))
    assert report.percent == pytest.approx(counts.percent)
    return counts


def from_two_depths(adapt: Sequence[Mapping[str, Any]], described: Described) -> Counts:
    """Count with two and with three layers, and extrapolate to the model's depth."""
    name, config, values = described
    depths = DEPTHS.get(config, ("num_hidden_layers",))
    full_config = getattr(transformers, config)(**values)
    (layers,) = {getattr(full_config, depth) for depth in depths}
    two, three = (at_full_depth(adapt, (name, config, {**values, **dict.fromkeys(depths, n)})) for n in (2, 3))
    prolonged = []
    for field in fields(Counts):
        first, second = getattr(two, field.name), getattr(three, field.name)
        prolonged.append(first + (layers - 2) * (second - first))
    return Counts(*prolonged)


each_way = pytest.mark.parametrize(
    "count",
    [
        pytest.param(from_two_depths, id="two depths"),
        pytest.param(at_full_depth, id="full depth", marks=pytest.mark.full),
    ],
)
"""Gives a test ``count(adapt, described)``, one of the two above."""
