"""captum's attributions to the token embedding table equal those of the source model and of the merged model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.models import adapted
from tests.kit.specs import lora

captum = pytest.importorskip("captum.attr")

IDS = torch.tensor([[5, 6, 7, 8]])
FAMILIES = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module")
def adapted_family() -> Callable[[str], Any]:
    """A function that returns the compiled model of a family, compiled at first use."""
    kept: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in kept:
            kept[family] = adapted(family, lora(["attn.q"]), noise=0.1)
        return kept[family]

    return get


def attributions(model: Any, method: str) -> Tensor:
    """Return captum's attribution of the last logit to each entry of the embeddings, ``[1, 4, width]``."""

    def score(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits.flatten(1)[:, -1]

    layer = model.get_input_embeddings()
    attribution = getattr(captum, method)(score, layer)
    options = {"baselines": torch.zeros_like(IDS), "n_steps": 3} if method == "LayerIntegratedGradients" else {}
    values: Tensor = attribution.attribute(IDS, **options)
    return values


@pytest.mark.slow
@pytest.mark.sample("llama-LayerIntegratedGradients", "llama-LayerGradientXActivation", "bert-LayerActivation")
@pytest.mark.parametrize("method", ["LayerIntegratedGradients", "LayerGradientXActivation", "LayerActivation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_attributed_as_in_the_source(
    family: str, method: str, adapted_family: Callable[[str], Any]
) -> None:
    compiled = adapted_family(family)
    source = compiled.compilation.model.eval()
    merged = copy.deepcopy(source)
    merged.load_state_dict(compiled.merge().state_dict(), strict=False)  # a tied head is stored once
    own = attributions(compiled, method)
    torch.testing.assert_close(own, attributions(merged, method), atol=1e-6, rtol=1e-4)
    with compiled.disabled():
        plain = attributions(compiled, method)
    torch.testing.assert_close(plain, attributions(source, method), atol=1e-6, rtol=1e-4)
    if method != "LayerActivation":
        assert float((own - plain).detach().norm() / plain.detach().norm()) > 1e-3
