"""Lily compared with the installed peft in float64."""

from __future__ import annotations

import pytest

from tests.kit.releases import peft_config
from tests.parity.support import MODULES, Case, Names, check_float64, globs

LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's Lily does not support."""

NAMES = Names({"A": "lily_A.default.weight", "B": "lily_B.default.weight", "R": "lily_router.default.weight"})


@pytest.mark.slow
@pytest.mark.sample("llama-2")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", LINEAR)
def test_lily(family: str, stride: int) -> None:
    """The names say which module has a shared tensor first, so they also compare what is shared."""
    modules = MODULES[family]
    sizes = {"rank": 4, "num_b": 3, "stride_a": stride, "scaling": 0.6}
    adaptation = {"method": "lily", "target": globs(modules), **sizes}
    fields = {"r": 4, "num_B": 3, "stride_A": stride, "scaling": 0.6, "target_modules": modules}
    case = Case(family, adaptation, lambda _: peft_config("LilyConfig", **fields), NAMES, noise=0.2, merges=False)
    check_float64(case)
