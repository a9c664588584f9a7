"""DyLoRA through the contract: on every family, with experts and with a table of embeddings."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.methods.places import DENSE, on_a_table, on_experts, on_layers

DYLORA: dict[str, Any] = {"method": "dylora", "rank": 6, "dropout": 0.1}


class TestDyLoRA(MethodContract):
    """Layers, fused rows among them."""

    adaptation = on_layers(DYLORA)
    families = DENSE


class TestExperts(MethodContract):
    """Factors for each expert, one rank for all."""

    variant = True
    adaptation = on_experts(DYLORA)
    families = ("mixtral",)


class TestTable(MethodContract):
    """A table of embeddings, beside its dropout scope and mask."""

    variant = True
    adaptation = on_a_table(DYLORA)
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    exported = True
    adaptation = on_layers(DYLORA)
    families = ("gpt2", "bert")
