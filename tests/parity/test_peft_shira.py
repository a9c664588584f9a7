"""SHiRA compared with the installed peft in float64, at the positions that both draw from one seed."""

from __future__ import annotations

import pytest

from tests.parity.support import MODULES, Case, Names, check_float64, globs

LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's SHiRA does not support."""

NAMES = Names({"weight_delta": "shira_weight.default"}, drawn=frozenset({"weight_indices"}))


@pytest.mark.slow
@pytest.mark.sample("llama-15")
@pytest.mark.parametrize("rank", [1, 15])
@pytest.mark.parametrize("family", LINEAR)
def test_shira(family: str, rank: int) -> None:
    """At rank 1, gradients of entries are computed one by one, at rank 15 from the gradient of the whole weight."""
    modules = MODULES[family]
    adaptation = {"method": "shira", "target": globs(modules), "rank": rank, "mask_seed": 4}
    fields = {"r": rank, "random_seed": 4, "target_modules": modules}
    check_float64(Case(family, adaptation, lambda p: p.ShiraConfig(**fields), NAMES))
