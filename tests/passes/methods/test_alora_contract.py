"""The contract of aLoRA, on decoders; every batch of the contract has a row with the invocation."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import ROLES

ALORA: dict[str, Any] = {"method": "alora", "invocation": [90], "target": {"role": ROLES}, "rank": 4}

pytestmark = pytest.mark.filterwarnings("ignore:GC125")


class TestALoRA(MethodContract):
    """aLoRA with dropout. ``attn.q`` of GPT-2 is a range of rows of a fused matrix, in a layer that flattens rows."""

    adaptation: ClassVar[dict[str, Any]] = {**ALORA, "dropout": 0.1}
    families = ("gpt2", "gpt_neox", "llama")


class TestOptions(MethodContract):
    """aLoRA with other starts and scales, on attention beside experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        **ALORA,
        "target": {"role": ["attn.q", "attn.v"]},
        "init": "gaussian",
        "rslora": True,
        "overrides": [{"role": "attn.v", "rank": 2, "alpha": 3}],
    }
    families = ("mixtral",)


class TestDeployed(DeploymentContract):
    """Export and compilation."""

    adaptation: ClassVar[dict[str, Any]] = ALORA
    families = ("llama",)
