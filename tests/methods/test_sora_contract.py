"""SoRA through the contract: on every family, with experts and with a table of embeddings."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.methods.places import DENSE, on_a_table, on_experts, on_layers

SORA: dict[str, Any] = {"method": "sora", "rank": 6, "dropout": 0.1}


class TestSoRA(MethodContract):
    """Layers, fused rows among them."""

    adaptation = on_layers(SORA)
    families = DENSE


class TestExperts(MethodContract):
    """Gates for each expert."""

    variant = True
    adaptation = on_experts(SORA)
    families = ("mixtral",)


class TestTable(MethodContract):
    """A table of embeddings, beside its dropout scope and mask."""

    variant = True
    adaptation = on_a_table(SORA)
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation = on_layers(SORA)
    families = ("gpt2", "bert")
