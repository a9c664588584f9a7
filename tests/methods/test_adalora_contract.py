"""AdaLoRA through the contract: on every family, with experts and with a table of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from graftc.testing import FAMILIES, DeploymentContract, MethodContract

ROLES = ["attn.q", "attn.v", "ffn.down"]
ADALORA: dict[str, Any] = {"method": "adalora", "target": {"role": ROLES}, "rank": 6, "target_rank": 3, "dropout": 0.1}
DENSE = tuple(family for family in FAMILIES if family != "mixtral")


class TestAdaLoRA(MethodContract):
    """Layers, fused rows among them. The branch is a product of three perturbed factors."""

    adaptation: ClassVar[dict[str, Any]] = ADALORA
    families = DENSE
    perturbation = 0.2


class TestExperts(MethodContract):
    """A decomposition for each expert."""

    adaptation: ClassVar[dict[str, Any]] = {**ADALORA, "target": {"role": ["attn.q", "attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = 0.2


class TestTable(MethodContract):
    """A table of embeddings, beside its dropout scope and mask."""

    adaptation: ClassVar[dict[str, Any]] = {
        **ADALORA,
        "target": {"role": ["embed", "attn.q"]},
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
    families = ("bert",)
    perturbation = 0.2


@pytest.mark.slow
class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation = ADALORA
    families = ("gpt2", "bert")
    perturbation = 0.2
