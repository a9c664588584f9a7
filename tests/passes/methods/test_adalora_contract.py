"""The contract of AdaLoRA: on every family, on experts and on a table of embeddings."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE, on_a_table, on_experts, on_layers

ADALORA: dict[str, Any] = {"method": "adalora", "rank": 6, "target_rank": 3, "dropout": 0.1}


class TestAdaLoRA(MethodContract):
    """AdaLoRA on layers, including rows of fused weights. The branch is a product of three perturbed factors."""

    adaptation = on_layers(ADALORA)
    families = DENSE
    perturbation = 0.2


class TestExperts(MethodContract):
    """AdaLoRA with a decomposition for each expert."""

    variant = True
    adaptation = on_experts(ADALORA)
    families = ("mixtral",)
    perturbation = 0.2


class TestTable(MethodContract):
    """AdaLoRA on a table of embeddings, with its dropout scope and mask."""

    variant = True
    adaptation = on_a_table(ADALORA)
    families = ("bert",)
    perturbation = 0.2


class TestDeployed(DeploymentContract):
    """Export and compilation of AdaLoRA."""

    adaptation = on_layers(ADALORA)
    families = ("gpt2", "bert")
    perturbation = 0.2
