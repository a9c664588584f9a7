"""Conversion to LoRA equals the fold, for every method that folds into linear maps and every family that has it."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import FAMILIES, tiny
from tests.kit.models import adapted

pytestmark = pytest.mark.gate

TARGET = {"role": ["attn.q", "ffn.down"]}
EXPERTS = {"role": ["attn.q", "experts"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "rslora": True},
    "dora": {"rank": 3},
    "adalora": {"rank": 3, "target_rank": 2, "total_steps": 10},
    "sora": {"rank": 3},
    "dylora": {"rank": 3},
    "adamix_lora": {"rank": 3},
    "vera": {"rank": 5},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "oft": {"block_size": 8},
    "boft": {"factors": 2},
    "miss": {"rank": 3},
    "shira": {"rank": 2},
    "hira": {"rank": 2},
    "c3a": {"block_size": 4},
    "gralora": {"rank": 4, "hybrid_rank": 2},
    "spiel": {"density": 0.05},
    "mask": {"density": 0.05},
    "diff_pruning": {},
    "child_tuning": {},
}
NONE = "GC066"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_fold(method: str, family: str) -> None:
    """Folded tensors are within 1e-6 of those of the original, outputs within 1e-5 of the largest."""
    try:
        compiled = adapted(
            family, {"method": method, "target": EXPERTS if family == "mixtral" else TARGET, **METHODS[method]}
        )
    except GraftError as error:
        raise unittest.SkipTest(f"{error.code}: {method} does not go with {family}") from None
    try:
        conversion = runner_of(compiled).convert()
    except GraftError as error:
        assert error.code == NONE and ("bias" in error.message or "not the weight" in error.message), error.message
        return  # a bias trains as well
    before, after = (m.merge().folded_state_dict() for m in (compiled, conversion.compiled))
    for name, tensor in before.items():
        if not tensor.is_floating_point():
            continue
        assert float((after[name] - tensor).norm()) <= 1e-6 * float(tensor.norm()), name
    assert conversion.largest_error < 1e-6
    assert conversion.largest_difference <= 1e-5 * max(1.0, conversion.largest_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_beside_16_bits_are_float32(dtype: torch.dtype, family: str) -> None:
    """The stated error is that of the rounded factors: below two units in the last place of float32."""
    entry = {"method": "dora", "rank": 2, "target": TARGET}
    compiled = graftc.compile({"adapt": [entry]}, tiny(family).to(dtype)).eval()
    perturb(compiled)
    conversion = runner_of(compiled).convert()
    step = torch.finfo(torch.float32).eps
    assert step / 10 < conversion.largest_error < 2 * step
    assert all(site.probed == pytest.approx(site.error, rel=0.7) for site in conversion.sites)
