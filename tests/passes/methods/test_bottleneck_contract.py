"""The contract of bottleneck adapters, for every named method and for other wirings of the mechanism.

A named method produces the same graph as ``bottleneck`` with its wiring (`test_bottleneck_presets.py`), so ``make
test`` runs `bottleneck` on every family, and each named method on one.
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
"""Families whose feed-forward parts end in a single linear map."""


class DrawnContract(MethodContract):
    """The contract if both projections are drawn, so that the claims about the method's usual start do not hold."""

    @property
    def claims(self) -> Claims:
        """The method's claims, without identity at the start."""
        return replace(super().claims, identity_at_init=False)


class TestHoulsby(MethodContract):
    """Houlsby's adapters on the branches of attentions and feed-forward parts."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "houlsby", "bottleneck": 5, "dropout": 0.1}
    families = ("bert",)


@pytest.mark.full
class TestHoulsbyEverywhere(TestHoulsby):
    """Houlsby's adapters with three sublayers, experts, parallel branches, and norms before and after."""

    families = OTHERS


class TestHoulsbyWithNorms(MethodContract):
    """Houlsby's adapters with every normalisation trained as well."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "houlsby", "bottleneck": 5, "norms": True}


class TestPfeiffer(MethodContract):
    """Pfeiffer's adapters, which read after the norm and add before it."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "pfeiffer", "reduction": 9}
    families = ("bert",)


@pytest.mark.full
class TestPfeifferEverywhere(TestPfeiffer):
    """Pfeiffer's adapters on families in which no norm follows, or another branch is added in between."""

    families = OTHERS


class TestBapnaFirat(MethodContract):
    """Adapters of Bapna and Firat, after every layer and with their own norm."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "bapna_firat", "bottleneck": 5}
    families = ("bert",)


@pytest.mark.full
class TestBapnaFiratEverywhere(TestBapnaFirat):
    """Adapters of Bapna and Firat on the other families."""

    families = OTHERS


class TestAdapterL(MethodContract):
    """AdapterL: adapters of Bapna and Firat with another start."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "adapter_l", "bottleneck": 5}
    families = ("bert",)


@pytest.mark.full
class TestAdapterLEverywhere(TestAdapterL):
    """AdapterL on the other families."""

    families = OTHERS


class TestHeParallel(MethodContract):
    """Parallel adapters, from the stream to the branch."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "he_parallel", "bottleneck": 6}
    families = ("gpt2",)


@pytest.mark.full
class TestHeParallelEverywhere(TestHeParallel):
    """Parallel adapters on the other families."""

    families = tuple(name for name in FAMILIES if name != "gpt2")


class TestHeParallelOfAttention(MethodContract):
    """Parallel adapters of attentions, from the stream to the heads."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "he_parallel",
        "target": {"role": "attn.sublayer"},
        "bottleneck": 6,
        "scale": "learned",
    }


class TestHeSequential(MethodContract):
    """Sequential adapters on the branches of both sublayers."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "he_sequential", "target": BOTH, "bottleneck": 6, "dropout": 0.1}
    families = ("bert",)


@pytest.mark.full
class TestHeSequentialEverywhere(TestHeSequential):
    """Sequential adapters on the other families."""

    families = OTHERS


class TestLLMAdapters(MethodContract):
    """LLM-Adapters in series with single maps, before and after them."""

    adaptation: ClassVar[dict[str, Any]] = {
        "method": "llm_adapters",
        "target": {"role": ["attn.v", "attn.o", "ffn.up", "ffn.down"]},
        "bottleneck": 6,
    }
    families = ("gpt2",)


@pytest.mark.full
class TestLLMAdaptersEverywhere(TestLLMAdapters):
    """LLM-Adapters on the other families that have feed-forward projections."""

    families = tuple(name for name in PROJECTED if name != "gpt2")


class TestLLMAdaptersParallel(MethodContract):
    """LLM-Adapters in parallel with single maps, including rows of fused ones, with biases and dropout."""

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
    """LLM-Adapters on the attentions of a mixture of experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "llm_adapters",
        "target": {"role": "attn.{q,k,v}"},
        "placement": "parallel",
        "bottleneck": 6,
    }
    families = ("mixtral",)


class TestFeedForward(MethodContract):
    """The default target of the mechanism: the branch of a feed-forward part."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "bottleneck", "reduction": 8}


class TestEveryKnob(DrawnContract):
    """Adapters from after a norm to before it, with their own norms on both sides, a learned scale and dropout."""

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
    """Adapters from what the sublayer reads to what its last map reads, which has another width."""

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
    """Adapters from the input of the last map to its output, before its dropout."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        **TestWithinASublayer.adaptation,
        "reads": "inner",
        "adds_to": "projection",
        "activation": "leaky_relu",
    }
    families = PROJECTED


class TestBehindALayer(DrawnContract):
    """Adapters from the sum to after its norm, followed by a norm of their own."""

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
    """Adapters in parallel with linear maps, with the default wiring."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "bottleneck",
        "target": {"role": ["attn.k", "ffn.down"]},
        "activation": "tanh",
        "bottleneck": 5,
    }
    families = PROJECTED


class TestHoulsbyDeployed(DeploymentContract):
    """Export and compilation of Houlsby's adapters with trained norms."""

    adaptation: ClassVar[dict[str, Any]] = TestHoulsbyWithNorms.adaptation
    families = ("bert",)


class TestPfeifferDeployed(DeploymentContract):
    """Export and compilation with norms that run twice, and on a model without such norms."""

    adaptation: ClassVar[dict[str, Any]] = TestPfeiffer.adaptation
    families = ("roberta", "gpt2")


@pytest.mark.full
class TestBapnaFiratDeployed(DeploymentContract):
    """Export and compilation of adapters after a norm."""

    adaptation: ClassVar[dict[str, Any]] = TestBapnaFirat.adaptation
    families = ("bert",)


@pytest.mark.full
class TestAdapterLDeployed(DeploymentContract):
    """Export and compilation of AdapterL on the model of its paper."""

    adaptation: ClassVar[dict[str, Any]] = TestAdapterL.adaptation
    families = ("gpt2",)


class TestHeParallelDeployed(DeploymentContract):
    """Export and compilation of parallel adapters on a model with experts."""

    adaptation: ClassVar[dict[str, Any]] = TestHeParallel.adaptation
    families = ("mixtral",)


@pytest.mark.full
class TestHeSequentialDeployed(DeploymentContract):
    """Export and compilation of sequential adapters on a model of images."""

    adaptation: ClassVar[dict[str, Any]] = TestHeSequential.adaptation
    families = ("vit",)


class TestLLMAdaptersDeployed(DeploymentContract):
    """Export and compilation of LLM-Adapters on the model of their paper."""

    adaptation: ClassVar[dict[str, Any]] = TestLLMAdapters.adaptation
    families = ("llama",)


class TestEveryKnobDeployed(DeploymentContract):
    """Export and compilation with every option, on a model with parallel branches."""

    exported = True
    adaptation: ClassVar[dict[str, Any]] = TestEveryKnob.adaptation
    families = ("gpt_neox",)
