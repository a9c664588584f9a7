"""A named bottleneck adapter is `bottleneck` with other defaults: the same graphs, the same tensors, name for name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftc.passes.core.ir.printer import structural_hash
from graftc.testing import FAMILIES
from tests.kit.models import fresh

BOTH = {"role": ["attn.sublayer", "ffn.sublayer"]}
FEED_FORWARD = {"role": "ffn.sublayer"}
OWN_NORM = {"target": FEED_FORWARD, "reads": "output", "adds_to": "output", "norm": "before"}
TWO_STACKS = frozenset({"bert", "t5"})
"""Families that run in ``make test``: norms after and before the branches, one stack and two."""

PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "houlsby": (
        {"method": "houlsby"},
        {
            "target": BOTH, "reads": "branch", "adds_to": "branch", "bottleneck": 64,
            "activation": "gelu_tanh", "init": "houlsby",
        },
    ),
    "pfeiffer": (
        {"method": "pfeiffer"},
        {
            "target": FEED_FORWARD, "reads": "output", "adds_to": "branch", "reduction": 16,
            "activation": "relu", "init": "bert",
        },
    ),
    "bapna_firat": (
        {"method": "bapna_firat"},
        {**OWN_NORM, "bottleneck": 64, "activation": "relu", "init": "xavier"},
    ),
    "adapter_l": (
        {"method": "adapter_l"},
        {**OWN_NORM, "bottleneck": 64, "activation": "relu", "init": "bert"},
    ),
    "he_parallel": (
        {"method": "he_parallel"},
        {
            "target": FEED_FORWARD, "reads": "stream", "adds_to": "branch", "bottleneck": 512,
            "activation": "relu", "init": "lora", "scale": 4.0,
        },
    ),
    "he_parallel of attention": (
        {"method": "he_parallel", "target": {"role": "attn.sublayer"}, "scale": "learned"},
        {
            "target": {"role": "attn.sublayer"}, "reads": "stream", "adds_to": "inner", "bottleneck": 512,
            "activation": "relu", "init": "lora", "scale": "learned",
        },
    ),
    "he_sequential": (
        {"method": "he_sequential", "target": BOTH, "dropout": 0.1},
        {
            "target": BOTH, "reads": "branch", "adds_to": "branch", "bottleneck": 512,
            "activation": "relu", "init": "lora", "dropout": 0.1,
        },
    ),
    "llm_adapters": (
        {"method": "llm_adapters", "placement": "parallel", "target": {"role": ["attn.q", "attn.v"]}},
        {
            "target": {"role": ["attn.q", "attn.v"]}, "reads": "input", "adds_to": "output", "bottleneck": 256,
            "activation": "tanh", "bias": False, "init": "bert",
        },
    ),
    "llm_adapters in front": (
        {"method": "llm_adapters", "placement": "input", "target": {"role": "attn.v"}},
        {
            "target": {"role": "attn.v"}, "reads": "input", "adds_to": "input", "bottleneck": 256,
            "activation": "tanh", "bias": False, "init": "bert",
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.sample("houlsby-t5", "he_parallel of attention-bert")
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in TWO_STACKS else pytest.mark.full) for f in FAMILIES]
)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_mechanism_with_its_wiring(name: str, family: str) -> None:
    """Preset and mechanism have graphs of equal structure in both modes, and tensors of equal names and values."""
    preset, knobs = PRESETS[name]
    one, two = (fresh(family, {"name": "a", **entry}) for entry in (preset, {"method": "bottleneck", **knobs}))
    for mode in ("train", "eval"):
        graphs = [structural_hash(c.program(mode), c.compilation.store.canonical) for c in (one, two)]
        assert graphs[0] == graphs[1], mode
    first, second = one.adapter_state_dict(), two.adapter_state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
