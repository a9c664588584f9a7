"""SoRA through the contract: on every family, with experts and with a table of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from graftc.testing import FAMILIES, DeploymentContract, MethodContract

ROLES = ["attn.q", "attn.v", "ffn.down"]
SORA: dict[str, Any] = {"method": "sora", "target": {"role": ROLES}, "rank": 6, "dropout": 0.1}
DENSE = tuple(family for family in FAMILIES if family != "mixtral")


class TestSoRA(MethodContract):
    """Layers, fused rows among them."""

    adaptation: ClassVar[dict[str, Any]] = SORA
    families = DENSE


class TestExperts(MethodContract):
    """Gates for each expert."""

    adaptation: ClassVar[dict[str, Any]] = {**SORA, "target": {"role": ["attn.q", "attn.v", "experts"]}}
    families = ("mixtral",)


class TestTable(MethodContract):
    """A table of embeddings, beside its dropout scope and mask."""

    adaptation: ClassVar[dict[str, Any]] = {
        **SORA,
        "target": {"role": ["embed", "attn.q"]},
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
    families = ("bert",)


@pytest.mark.slow
class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation = SORA
    families = ("gpt2", "bert")
