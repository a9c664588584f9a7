"""The contract of LoRA: plain on every family, and its variants on the families where they differ."""

from __future__ import annotations

from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE, ROLES


class TestLoRA(MethodContract):
    """Plain LoRA with dropout. ``attn.q`` of GPT-2 is a range of rows of a fused matrix."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "dropout": 0.1}
    families = DENSE


class TestExperts(MethodContract):
    """LoRA with one pair of factors for each expert of each 3-D weight, and on attention."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lora",
        "target": {"role": ["attn.q", "attn.v", "experts"]},
        "rank": 4,
    }
    families = ("mixtral",)


class TestFromWeight(MethodContract):
    """LoRA with factors that start from the weight; the start is still exactly the base."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "init": "pissa"}
    families = ("gpt2",)


class TestOrthonormal(MethodContract):
    """LoRA with the QR start, scaled by the root of the rank."""

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
    """LoRA that also trains the biases of adapted rows."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "bias": "lora_only"}
    families = ("gpt2",)


class TestAllBiases(MethodContract):
    """LoRA that also trains every bias, including those of norms."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4, "bias": "all"}
    families = ("vit",)


class TestWithHead(MethodContract):
    """LoRA beside a head that trains in full."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "lora", "target": {"role": ROLES}, "rank": 4}
    spec: ClassVar[dict[str, Any]] = {"train": ["classifier"]}
    families = ("roberta",)


class TestFrozenA(MethodContract):
    """LoRA-FA, on a table of embeddings as well."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lora",
        "target": {"role": [*ROLES, "embed"]},
        "rank": 4,
        "freeze_a": True,
    }
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Export and compilation on every family, with adapters in place and folded."""

    folded = True
    exported = True
    every_layer = True
    adaptation = TestLoRA.adaptation
    families = DENSE


class TestExpertsDeployed(DeploymentContract):
    """Export and compilation of LoRA on experts."""

    adaptation = TestExperts.adaptation
    families = ("mixtral",)
