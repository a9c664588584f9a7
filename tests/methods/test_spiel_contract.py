"""SpIEL through the contract, both variants, on every family."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.methods.places import DENSE, on_layers

AG: dict[str, Any] = {"method": "spiel", "density": 0.3}


class TestAG(MethodContract):
    """The projections of all layers."""

    adaptation = AG


class TestMA(MethodContract):
    """Layers by their roles, fused rows among them, as many entries as updates of low rank have."""

    variant = True
    families = DENSE
    adaptation = on_layers({"method": "spiel", "variant": "MA", "equivalent_rank": 4})


class TestDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation = AG
    families = ("gpt2",)
