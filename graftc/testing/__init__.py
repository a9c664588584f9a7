"""Contract tests that a new method inherits, and what they are made of: tiny models, perturbation, comparison.

A method's test file, here or in a package of its own::

    from graftc.testing import DeploymentContract, MethodContract

    class TestMyMethod(MethodContract):
        adaptation = {"method": "my_method", "target": {"role": ["attn.q", "ffn.down"]}}

    class TestMyMethodDeployed(DeploymentContract):
        adaptation = TestMyMethod.adaptation
        families = ("bert",)

What is checked follows from the method's claims. Nothing here imports pytest.
"""

from __future__ import annotations

from graftc.testing.compare import inputs_for, largest_difference, outputs_of, same_bits
from graftc.testing.contract import MethodContract
from graftc.testing.deployment import DeploymentContract
from graftc.testing.families import FAMILIES, tiny
from graftc.testing.perturb import perturb, randomise

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
