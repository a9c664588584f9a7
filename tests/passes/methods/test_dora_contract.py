"""The contract of DoRA: plain on every family, and its variants on the families where they differ."""

from __future__ import annotations

from typing import Any, ClassVar

from graftc.testing import DeploymentContract, MethodContract
from tests.kit.specs import varied
from tests.passes.methods.places import DENSE, ROLES

DORA: dict[str, Any] = {"method": "dora", "target": {"role": ROLES}, "rank": 4}


class TestDoRA(MethodContract):
    """Plain DoRA with dropout. Rows of fused matrices have their own magnitudes: in GPT-2 a range of rows, in GPT-NeoX
    every third run of them.
    """

    adaptation: ClassVar[dict[str, Any]] = varied(DORA, dropout=0.1)
    families = DENSE


class TestExperts(MethodContract):
    """DoRA with magnitudes and factors for each expert, and on attention."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(DORA, ["attn.q", "attn.v", "experts"], dropout=0.1)
    families = ("mixtral",)


class TestExact(MethodContract):
    """DoRA with gradients through the norms."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(DORA, norm_gradient="exact", rslora=True, init="gaussian")
    families = ("gpt2", "gpt_neox", "llama")


class TestBranch(MethodContract):
    """DoRA with recomputed dropout on the branch."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(
        DORA, dropout=0.1, dropout_on="branch", dropout_mask="recomputed", dropout_scope="target"
    )
    families = ("bert", "llama")


class TestMagnitudesOnly(MethodContract):
    """DoRA in which some sites have magnitudes but no factors."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(DORA, overrides=[{"role": "attn.v", "direction": False}])
    families = ("bert", "gpt2", "llama")


class TestEverywhere(MethodContract):
    """DoRA on tables and convolutions, which are linear maps as well."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(DORA, ["embed.position", "ffn.down"])
    families = ("bert", "gpt2")


class TestOnLoRA(MethodContract):
    """DoRA on top of a LoRA of the same places, which trains as well."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = varied(DORA, dropout=0.1)
    families = ("bert", "gpt2", "gpt_neox", "llama")

    def compiled(self, family: str, model: Any, seed: int = 0) -> Any:
        """Compile both adaptations; the contract's claims are those of DoRA."""
        import graftc

        below = {"method": "lora", "name": "below", "target": {"role": ROLES}, "rank": 3}
        return graftc.compile({"adapt": [below, dict(self.adaptation)]}, model, seed=seed)

    def test_report_counts_what_trains(self, family: str) -> None:
        """The report counts both adaptations; its first entry is that of the other one."""
        _, compiled = self.shared(family)
        trainable = sum(t.numel() for t in compiled.parameters() if t.requires_grad)
        assert compiled.report.trainable_parameters == trainable


class TestDeployed(DeploymentContract):
    """Export and compilation of DoRA, with magnitudes in place and folded."""

    adaptation = TestDoRA.adaptation
    families = ("bert", "llama")


class TestExpertsDeployed(DeploymentContract):
    """Export and compilation of DoRA on experts."""

    adaptation = TestExperts.adaptation
    families = ("mixtral",)


class TestOnLoRADeployed(DeploymentContract):
    """Export and compilation of DoRA on top of another adaptation."""

    adaptation = TestOnLoRA.adaptation
    families = ("gpt2",)
    compiled = TestOnLoRA.compiled
