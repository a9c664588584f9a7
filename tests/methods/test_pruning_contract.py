"""Every variant of pruning through the contract, with most entries pruned, and in exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.passes.methods.pruning_steps import kept_entries
from graftc.runtime.compiled import Compiled
from graftc.testing import DeploymentContract, MethodContract
from graftc.testing.contract import Contract


class Pruned(Contract):
    """Perturbed models are pruned to what is kept in the end."""

    def perturb(self, family: str, compiled: Compiled) -> None:
        """Some entries are pruned of every place."""
        super().perturb(family, compiled)
        compiled.eval()
        compiled.begin(1)
        compiled.extra_loss()
        compiled.after_step()
        places = compiled.steering.controllers["pruning"].places
        assert all(0 < float(kept_entries(place).double().mean()) < 1 for place in places)


class TestMovement(Pruned, MethodContract):
    """Scores beside the weights."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "density": 0.3}


class TestMagnitude(Pruned, MethodContract):
    """The weights are their own scores, and all matrices share one threshold."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        "method": "pruning",
        "variant": "magnitude",
        "density": 0.3,
        "allocation": "global",
    }


class TestSoftMovement(Pruned, MethodContract):
    """A threshold near the scores' sigmoids."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "soft_movement", "threshold": 0.502}


class TestIterative(MethodContract):
    """Before anything is pruned."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative"}


class TestSecondStage(MethodContract):
    """What is kept of the base trains, and nothing else is left: it begins where the first stage has ended."""

    variant = starts_elsewhere = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative", "stage": 2}


class TestDeployed(Pruned, DeploymentContract):
    """Exports and compilation, with scores."""

    exported = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "density": 0.3}
    families = ("gpt2",)


class TestDeployedStage(DeploymentContract):
    """The same of a later stage."""

    exported = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative", "stage": 2}
    families = ("bert",)
