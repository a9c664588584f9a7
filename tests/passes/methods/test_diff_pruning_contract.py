"""The contract of diff pruning: both trainings, of every tensor and of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE
from tests.passes.methods.test_diff_pruning import GATES


class TestGates(MethodContract):
    """The first training, of every tensor."""

    adaptation: ClassVar[Mapping[str, Any]] = GATES
    perturbation = 0.1


class TestGatesOfRows(MethodContract):
    """The first training of projections, some of which are rows of one weight, without gates for whole tensors."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        **GATES,
        "structured": False,
        "density": 0.1,
        "target": {"role": ["attn.q", "ffn.down"]},
    }
    families = DENSE
    perturbation = 0.1


class TestLeft(MethodContract):
    """The second training, from random entries."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "diff_pruning", "stage": 2, "density": 0.3}


class TestGatesDeployed(DeploymentContract):
    """Export and compilation of the first training."""

    adaptation: ClassVar[Mapping[str, Any]] = GATES
    perturbation = 0.1
