"""The contract of DyLoRA: on every family, on experts and on a table of embeddings."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE, on_a_table, on_experts, on_layers

DYLORA: dict[str, Any] = {"method": "dylora", "rank": 6, "dropout": 0.1}


class TestDyLoRA(MethodContract):
    """DyLoRA on layers, including rows of fused weights."""

    adaptation = on_layers(DYLORA)
    families = DENSE


class TestExperts(MethodContract):
    """DyLoRA with factors for each expert and one rank for all."""

    variant = True
    adaptation = on_experts(DYLORA)
    families = ("mixtral",)


class TestTable(MethodContract):
    """DyLoRA on a table of embeddings, with its dropout scope and mask."""

    variant = True
    adaptation = on_a_table(DYLORA)
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Export and compilation of DyLoRA."""

    adaptation = on_layers(DYLORA)
    families = ("gpt2", "bert")
