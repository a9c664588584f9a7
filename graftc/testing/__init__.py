"""Contract tests that a new method inherits, and their tools: tiny models, perturbation, comparison.

A method's test file, in graftc or in another package::

    from graftc.testing import DeploymentContract, MethodContract

    class TestMyMethod(MethodContract):
        adaptation = {"method": "my_method", "target": {"role": ["attn.q", "ffn.down"]}}

    class TestMyMethodDeployed(DeploymentContract):
        adaptation = TestMyMethod.adaptation
        families = ("bert",)

The method's claims determine what is checked. Nothing here imports pytest.
"""

from __future__ import annotations

from graftc.testing.compare import inputs_for, largest_difference, outputs_of, same_bits
from graftc.testing.contract import MethodContract
from graftc.testing.deployment import DeploymentContract
from graftc.testing.families import FAMILIES, tiny
from graftc.testing.perturbing import perturb, randomise

__all__ = [
    "FAMILIES",
    "DeploymentContract",
    "MethodContract",
    "inputs_for",
    "largest_difference",
    "outputs_of",
    "perturb",
    "randomise",
    "same_bits",
    "tiny",
]
