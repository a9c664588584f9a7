"""Bottleneck adapters: the contract, for every named method and for other wirings of the mechanism.

A named method makes the very graph of ``bottleneck`` with its wiring (`test_bottleneck_presets.py`), so ``make test``
has `bottleneck` on every family, and each named method on one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from graftc.specs.claims import Claims
from graftc.testing import FAMILIES, DeploymentContract, MethodContract

BOTH = {"role": ["attn.sublayer", "ffn.sublayer"]}
OTHERS = tuple(name for name in FAMILIES if name != "bert")
PROJECTED = tuple(name for name in FAMILIES if name != "mixtral")
"""Families whose feed-forward parts end in one map."""


class DrawnContract(MethodContract):
    """For projections that are both drawn: what the method claims of its usual start does not hold."""

    @property
    def claims(self) -> Claims:
        """See `Contract.claims`."""
        return replace(super().claims, identity_at_init=False)


class TestHoulsby(MethodContract):
    """On the branches of attentions and feed-forward parts."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "houlsby", "bottleneck": 5, "dropout": 0.1}
    families = ("bert",)


@pytest.mark.full
class TestHoulsbyEverywhere(TestHoulsby):
    """The same with three sublayers, experts, parallel branches, norms before and norms behind."""

    families = OTHERS


class TestHoulsbyWithNorms(MethodContract):
    """Every normalisation trains beside the adapters."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "houlsby", "bottleneck": 5, "norms": True}


class TestPfeiffer(MethodContract):
    """Reads behind the norm and adds before it."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "pfeiffer", "reduction": 9}
    families = ("bert",)


@pytest.mark.full
class TestPfeifferEverywhere(TestPfeiffer):
    """The same where no norm follows, or another branch is added in between."""

    families = OTHERS


class TestBapnaFirat(MethodContract):
    """Behind every layer, with a norm of its own."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "bapna_firat", "bottleneck": 5}
    families = ("bert",)


@pytest.mark.full
class TestBapnaFiratEverywhere(TestBapnaFirat):
    """The same on the other families."""

    families = OTHERS


class TestAdapterL(MethodContract):
    """The same from another start."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "adapter_l", "bottleneck": 5}
    families = ("bert",)


@pytest.mark.full
class TestAdapterLEverywhere(TestAdapterL):
    """The same on the other families."""

    families = OTHERS


class TestHeParallel(MethodContract):
    """From the stream to the branch."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "he_parallel", "bottleneck": 6}
    families = ("gpt2",)


@pytest.mark.full
class TestHeParallelEverywhere(TestHeParallel):
    """The same on the other families."""

    families = tuple(name for name in FAMILIES if name != "gpt2")


class TestHeParallelOfAttention(MethodContract):
    """From the stream to the heads."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "he_parallel",
        "target": {"role": "attn.sublayer"},
        "bottleneck": 6,
        "scale": "learned",
    }


class TestHeSequential(MethodContract):
    """On the branches of both."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "he_sequential", "target": BOTH, "bottleneck": 6, "dropout": 0.1}
    families = ("bert",)


@pytest.mark.full
class TestHeSequentialEverywhere(TestHeSequential):
    """The same on the other families."""

    families = OTHERS


class TestLLMAdapters(MethodContract):
    """In series with single maps, before and behind them."""

    adaptation: ClassVar[dict[str, Any]] = {
        "method": "llm_adapters",
        "target": {"role": ["attn.v", "attn.o", "ffn.up", "ffn.down"]},
        "bottleneck": 6,
    }
    families = ("gpt2",)


@pytest.mark.full
class TestLLMAdaptersEverywhere(TestLLMAdapters):
    """The same on the other families that have feed-forward projections."""

    families = tuple(name for name in PROJECTED if name != "gpt2")


class TestLLMAdaptersParallel(MethodContract):
    """Beside single maps, rows of fused ones too, with biases and dropout."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "llm_adapters",
        "target": {"role": ["attn.q", "ffn.up", "ffn.down"]},
        "placement": "parallel",
        "bottleneck": 6,
        "bias": True,
        "dropout": 0.1,
    }
    families = PROJECTED


class TestLLMAdaptersBesideExperts(MethodContract):
    """The attentions of a mixture of experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "llm_adapters",
        "target": {"role": "attn.{q,k,v}"},
        "placement": "parallel",
        "bottleneck": 6,
    }
    families = ("mixtral",)


class TestFeedForward(MethodContract):
    """The default of the mechanism: a feed-forward part's branch."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "bottleneck", "reduction": 8}


class TestEveryKnob(DrawnContract):
    """From behind a norm to before it, with norms of its own on both sides, a learned scale and dropout."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "bottleneck",
        "target": BOTH,
        "reads": "output",
        "adds_to": "branch",
        "norm": "both",
        "activation": "silu",
        "init": "bert",
        "scale": "learned",
        "dropout": 0.1,
        "bottleneck": 5,
    }


class TestWithinASublayer(MethodContract):
    """From what the sublayer reads to what its last map reads, which is of another width."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "bottleneck",
        "target": BOTH,
        "reads": "normed",
        "adds_to": "inner",
        "activation": "gelu",
        "bottleneck": 5,
    }
    families = PROJECTED


class TestAroundTheLastMap(MethodContract):
    """From what the last map reads to what it gives, below its dropout."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        **TestWithinASublayer.adaptation,
        "reads": "inner",
        "adds_to": "projection",
        "activation": "leaky_relu",
    }
    families = PROJECTED


class TestBehindALayer(DrawnContract):
    """From the sum to behind its norm, with a norm behind the adapter."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "bottleneck",
        "reads": "sum",
        "adds_to": "output",
        "norm": "after",
        "init": "xavier",
        "bottleneck": 5,
        "bias": False,
    }


class TestLinearMaps(MethodContract):
    """Beside linear maps, without a word about the wiring."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "bottleneck",
        "target": {"role": ["attn.k", "ffn.down"]},
        "activation": "tanh",
        "bottleneck": 5,
    }
    families = PROJECTED


class TestHoulsbyDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation: ClassVar[dict[str, Any]] = TestHoulsbyWithNorms.adaptation
    families = ("bert",)


class TestPfeifferDeployed(DeploymentContract):
    """Norms that run twice, and a model without."""

    adaptation: ClassVar[dict[str, Any]] = TestPfeiffer.adaptation
    families = ("roberta", "gpt2")


@pytest.mark.full
class TestBapnaFiratDeployed(DeploymentContract):
    """Behind a norm."""

    adaptation: ClassVar[dict[str, Any]] = TestBapnaFirat.adaptation
    families = ("bert",)


@pytest.mark.full
class TestAdapterLDeployed(DeploymentContract):
    """The model of its paper."""

    adaptation: ClassVar[dict[str, Any]] = TestAdapterL.adaptation
    families = ("gpt2",)


class TestHeParallelDeployed(DeploymentContract):
    """Experts."""

    adaptation: ClassVar[dict[str, Any]] = TestHeParallel.adaptation
    families = ("mixtral",)


@pytest.mark.full
class TestHeSequentialDeployed(DeploymentContract):
    """Images."""

    adaptation: ClassVar[dict[str, Any]] = TestHeSequential.adaptation
    families = ("vit",)


class TestLLMAdaptersDeployed(DeploymentContract):
    """The model of its paper."""

    adaptation: ClassVar[dict[str, Any]] = TestLLMAdapters.adaptation
    families = ("llama",)


class TestEveryKnobDeployed(DeploymentContract):
    """Parallel branches."""

    exported = True
    adaptation: ClassVar[dict[str, Any]] = TestEveryKnob.adaptation
    families = ("gpt_neox",)
