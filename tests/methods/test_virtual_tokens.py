"""Virtual tokens: prompt tuning, PreEmbed and PreLayer, by their contract and by what they are in plain torch."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from graftc.testing import DeploymentContract, MethodContract

TEXT = ("bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "t5")


class TestPrompt(MethodContract):
    """In front of the text."""

    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "prompt", "length": 3}


class TestSuffix(MethodContract):
    """Behind the last real token of each row, from the vectors of some tokens."""

    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "prompt",
        "length": 3,
        "placement": "suffix",
        "init": "tokens",
        "init_tokens": [[5, 6], 7],
    }


class TestPreEmbed(MethodContract):
    """In front and within."""

    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_embed", "length": 2, "infix": 3, "infix_after": 7}


class TestPreLayer(MethodContract):
    """Before every layer."""

    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3}


class TestInfixPreLayer(MethodContract):
    """Before every layer, in front and within."""

    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3, "infix": 2}


@pytest.mark.slow
class TestPromptDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "prompt", "length": 3, "placement": "after_bos"}
    families = ("gpt2", "bert", "t5")


@pytest.mark.slow
class TestPreLayerDeployed(DeploymentContract):
    """Exports and compilation."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3, "infix": 2}
    families = ("llama", "t5")
