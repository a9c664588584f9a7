"""AdaMix and AdaMix of low-rank updates through the contract: on every family, with each projection shared."""

from __future__ import annotations

from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.methods.places import DENSE

ADAMIX: dict[str, Any] = {"method": "adamix", "bottleneck": 6, "dropout": 0.1}
LORA: dict[str, Any] = {"method": "adamix_lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "experts": 3}


class TestAdaMix(MethodContract):
    """As the authors have it: the second projection is shared."""

    adaptation: ClassVar[dict[str, Any]] = ADAMIX


class TestNothingShared(MethodContract):
    """Experts of both projections, with a learned scale and no biases."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**ADAMIX, "share": "none", "experts": 3, "scale": "learned", "bias": False}
    families = ("bert", "t5")


class TestLoRA(MethodContract):
    """Layers, fused rows among them."""

    adaptation: ClassVar[dict[str, Any]] = LORA
    families = DENSE


class TestExperts(MethodContract):
    """A model that is a mixture itself: experts of experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**LORA, "target": {"role": ["attn.q", "experts"]}, "share": "none"}
    families = ("mixtral",)


class TestTable(MethodContract):
    """A table of embeddings, with the first factor shared."""

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
    """Exports, which are of the mean, and compilation."""

    exported = True
    adaptation = ADAMIX
    families = ("bert", "gpt2")


class TestLoRADeployed(DeploymentContract):
    """Unfolded it is exported as LoRA."""

    adaptation = LORA
    families = ("bert",)
