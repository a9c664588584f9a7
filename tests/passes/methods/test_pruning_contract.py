"""The contract of every variant of pruning, with most entries pruned, and exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.passes.methods.bases.pruning_controller import kept_entries
from graftc.runtime.compiled import Compiled
from graftc.testing import DeploymentContract, MethodContract
from graftc.testing.contract import Contract


class Pruned(Contract):
    """A contract whose perturbed models are pruned to the final density."""

    def perturb(self, family: str, compiled: Compiled) -> None:
        """Perturb the model, and prune some entries of every place."""
        super().perturb(family, compiled)
        compiled.eval()
        compiled.begin(1)
        compiled.extra_loss()
        compiled.after_step()
        places = compiled.steering.controllers["pruning"].places
        assert all(0 < float(kept_entries(place).double().mean()) < 1 for place in places)


class TestMovement(Pruned, MethodContract):
    """Movement pruning, with scores beside the weights."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "density": 0.3}


class TestMagnitude(Pruned, MethodContract):
    """Magnitude pruning: the weights are their own scores, and all matrices share one threshold."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        "method": "pruning",
        "variant": "magnitude",
        "density": 0.3,
        "allocation": "global",
    }


class TestSoftMovement(Pruned, MethodContract):
    """Soft movement pruning, with a threshold near the scores' sigmoids."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "soft_movement", "threshold": 0.502}


class TestIterative(MethodContract):
    """Iterative pruning, before anything is pruned."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative"}


class TestSecondStage(MethodContract):
    """The second stage, in which only kept entries of the base remain and train; it begins where the first one ends."""

    variant = starts_elsewhere = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative", "stage": 2}


class TestDeployed(Pruned, DeploymentContract):
    """Export and compilation with scores."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "density": 0.3}
    families = ("gpt2",)


class TestDeployedStage(DeploymentContract):
    """Export and compilation of a later stage."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "pruning", "variant": "iterative", "stage": 2}
    families = ("bert",)
