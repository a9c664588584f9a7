"""DyLoRA through the contract: on every family, with experts and with a table of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from graftc.testing import FAMILIES, DeploymentContract, MethodContract

ROLES = ["attn.q", "attn.v", "ffn.down"]
DYLORA: dict[str, Any] = {"method": "dylora", "target": {"role": ROLES}, "rank": 6, "dropout": 0.1}
DENSE = tuple(family for family in FAMILIES if family != "mixtral")


class TestDyLoRA(MethodContract):
    """Layers, fused rows among them."""

    adaptation: ClassVar[dict[str, Any]] = DYLORA
    families = DENSE


class TestExperts(MethodContract):
    """Factors for each expert, one rank for all."""

    adaptation: ClassVar[dict[str, Any]] = {**DYLORA, "target": {"role": ["attn.q", "attn.v", "experts"]}}
    families = ("mixtral",)


class TestTable(MethodContract):
    """A table of embeddings, beside its dropout scope and mask."""

    adaptation: ClassVar[dict[str, Any]] = {
        **DYLORA,
        "target": {"role": ["embed", "attn.q"]},
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
    families = ("bert",)


@pytest.mark.slow
class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation = DYLORA
    families = ("gpt2", "bert")
