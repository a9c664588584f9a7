"""OFT and BOFT compared with the installed peft in float64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.support import MODULES, Case, Names, check_float64, globs

LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's OFT and BOFT do not support."""

OFT = Names({"Q": "oft_R.default.weight"})
OFT_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"block_size": 8}, {"oft_block_size": 8}),
    "blocks": ({"blocks": 4}, {"r": 4, "oft_block_size": 0}),
    "nearest": ({"block_size": 7, "nearest": True}, {"oft_block_size": 7}),
    "shared": ({"block_size": 8, "block_share": True}, {"oft_block_size": 8, "block_share": True}),
    "terms": ({"block_size": 8, "terms": 3}, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "two terms": ({"block_size": 8, "terms": 2}, {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "eight terms": ({"block_size": 8, "terms": 8}, {"oft_block_size": 8, "num_cayley_neumann_terms": 8}),
}


def oft(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Case:
    modules = MODULES[family]
    adaptation = {"method": "oft", "target": globs(modules), **ours}
    return Case(family, adaptation, lambda p: p.OFTConfig(target_modules=modules, **theirs), OFT, noise=0.05)


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", LINEAR)
def test_oft(family: str) -> None:
    check_float64(oft(family, *OFT_CASES["default"]))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("variant", [name for name in OFT_CASES if name != "default"])
def test_oft_variants(family: str, variant: str) -> None:
    check_float64(oft(family, *OFT_CASES[variant]))
