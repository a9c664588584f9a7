"""MiSS compared with the installed peft in float64, in each of its variants."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.support import MODULES, Case, Names, check_float64, globs

LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's MiSS does not support."""

NAMES = Names({"D": "miss_block.default"})
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "balance": ({"rank": 8}, {"r": 8}),
    "padded": ({"rank": 7}, {"r": 7}),
    "bat": ({"rank": 8, "variant": "bat"}, {"r": 8, "init_weights": "bat"}),
    "mini": ({"rank": 7, "variant": "mini", "mini_rank": 4}, {"r": 7, "init_weights": "mini", "mini_r": 4}),
}


@pytest.mark.slow
@pytest.mark.sample("padded-llama")
@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("variant", VARIANTS)
def test_miss(variant: str, family: str) -> None:
    """``padded`` has shards that divide neither 48 nor 80 columns."""
    modules, (ours, theirs) = MODULES[family], VARIANTS[variant]
    adaptation = {"method": "miss", "target": globs(modules), **ours}
    check_float64(Case(family, adaptation, lambda p: p.MissConfig(target_modules=modules, **theirs), NAMES))
