"""The contract of SpIEL, in both variants, on every family."""

from __future__ import annotations

from typing import Any

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE, on_layers

AG: dict[str, Any] = {"method": "spiel", "density": 0.3}


class TestAG(MethodContract):
    """Variant AG on the projections of all layers."""

    adaptation = AG


class TestMA(MethodContract):
    """Variant MA on layers by role, including fused rows, with as many entries as low-rank updates have parameters."""

    variant = True
    families = DENSE
    adaptation = on_layers({"method": "spiel", "variant": "MA", "equivalent_rank": 4})


class TestDeployed(DeploymentContract):
    """Export and compilation of SpIEL."""

    adaptation = AG
    families = ("gpt2",)
