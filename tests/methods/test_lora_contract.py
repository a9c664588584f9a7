"""LoRA through the contract: plain on every family, and its variants where they differ."""

from __future__ import annotations

from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.methods.places import DENSE, ROLES


class TestLoRA(MethodContract):
    """Plain LoRA with dropout. ``attn.q`` of GPT-2 is a range of rows of a fused matrix."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "dropout": 0.1}
    families = DENSE


class TestExperts(MethodContract):
    """One pair of factors for each expert of each 3-D weight, beside attention."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lora",
        "target": {"role": ["attn.q", "attn.v", "experts"]},
        "rank": 4,
    }
    families = ("mixtral",)


class TestFromWeight(MethodContract):
    """Factors that start from the weight: identity exact all the same."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "init": "pissa"}
    families = ("gpt2",)


class TestOrthonormal(MethodContract):
    """The QR start, scaled by the root of the rank."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lora",
        "target": {"role": ROLES},
        "rank": 5,
        "alpha": 3,
        "init": "olora",
        "rslora": True,
    }
    families = ("llama",)


class TestBiasesOfAdapted(MethodContract):
    """Biases of adapted rows train as well."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "bias": "lora_only"}
    families = ("gpt2",)


class TestAllBiases(MethodContract):
    """Every bias trains, those of norms too."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "bias": "all"}
    families = ("vit",)


class TestWithHead(MethodContract):
    """A head trained in full beside the adaptation."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4}
    spec: ClassVar[dict[str, Any]] = {"train": ["classifier"]}
    families = ("roberta",)


class TestFrozenA(MethodContract):
    """LoRA-FA, with a table and experts in other families' places."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lora",
        "target": {"role": [*ROLES, "embed"]},
        "rank": 4,
        "freeze_a": True,
    }
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Exports and compilation on every family, adapters in place and folded."""

    folded = True
    exported = True
    inductor = True
    every_family = True
    every_layer = True
    contract_families = ("gpt2", "t5")
    adaptation = TestLoRA.adaptation
    families = DENSE


class TestExpertsDeployed(DeploymentContract):
    """The same with experts."""

    adaptation = TestExperts.adaptation
    families = ("mixtral",)
