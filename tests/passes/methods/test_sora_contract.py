"""The contract of SoRA: on every family, on experts and on a table of embeddings."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE, on_a_table, on_experts, on_layers

SORA: dict[str, Any] = {"method": "sora", "rank": 6, "dropout": 0.1}


class TestSoRA(MethodContract):
    """SoRA on layers, including rows of fused weights."""

    adaptation = on_layers(SORA)
    families = DENSE


class TestExperts(MethodContract):
    """SoRA with gates for each expert."""

    variant = True
    adaptation = on_experts(SORA)
    families = ("mixtral",)


class TestTable(MethodContract):
    """SoRA on a table of embeddings, with its dropout scope and mask."""

    variant = True
    adaptation = on_a_table(SORA)
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Export and compilation of SoRA."""

    adaptation = on_layers(SORA)
    families = ("gpt2", "bert")
