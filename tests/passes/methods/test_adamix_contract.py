"""The contract of AdaMix and of AdaMix with low-rank updates: on every family, with each projection shared."""

from __future__ import annotations

from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.passes.methods.places import DENSE

ADAMIX: dict[str, Any] = {"method": "adamix", "bottleneck": 6, "dropout": 0.1}
LORA: dict[str, Any] = {"method": "adamix_lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "experts": 3}


class TestAdaMix(MethodContract):
    """AdaMix as defined by its authors, with a shared second projection."""

    adaptation: ClassVar[dict[str, Any]] = ADAMIX


class TestNothingShared(MethodContract):
    """AdaMix with experts for both projections, a learned scale and no biases."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**ADAMIX, "share": "none", "experts": 3, "scale": "learned", "bias": False}
    families = ("bert", "t5")


class TestLoRA(MethodContract):
    """Low-rank experts on layers, including rows of fused weights."""

    contract_families = ("t5",)
    adaptation: ClassVar[dict[str, Any]] = LORA
    families = DENSE


class TestExperts(MethodContract):
    """Low-rank experts in a mixture of experts: each of its experts has several."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**LORA, "target": {"role": ["attn.q", "experts"]}, "share": "none"}
    families = ("mixtral",)


class TestTable(MethodContract):
    """Low-rank experts on a table of embeddings, with the first factor shared."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        **LORA,
        "target": {"role": ["embed", "ffn.down"]},
        "share": "down",
        "dropout_mask": "recomputed",
        "dropout_scope": "target",
    }
    families = ("bert",)


class TestDeployed(DeploymentContract):
    """Export of the mean adapter, and compilation."""

    adaptation = ADAMIX
    families = ("bert", "gpt2")


class TestLoRADeployed(DeploymentContract):
    """Export of low-rank experts, which unfolded are exported as LoRA."""

    adaptation = LORA
    families = ("bert",)
