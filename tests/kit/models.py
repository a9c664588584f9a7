"""Compiled models, from a model or the family of a tiny one, and adaptations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import graftc
from graftc.testing import perturb, tiny


def fresh(
    model: nn.Module | str,
    *adapt: Mapping[str, Any],
    inputs: Any = None,
    seed: int | None = None,
    cache: bool = True,
    **spec: Any,
) -> Any:
    """Return a model with adaptations at their initial values, in the mode of the model: a tiny one is in eval mode.

    Args:
        model: the model, or the family of a tiny one.
        adapt: the adaptations, in order.
        inputs: example inputs, for a model whose interface does not say what it takes.
        seed: the seed of the initial values; by default torch's.
        cache: whether captured graphs are kept.
        spec: the other keys of the spec, or all of them.
    """
    source = tiny(model) if isinstance(model, str) else model
    return graftc.compile({"adapt": [dict(each) for each in adapt], **spec}, source, inputs, seed=seed, cache=cache)


def adapted(
    model: nn.Module | str, *adapt: Mapping[str, Any], noise: float = 0.05, noise_seed: int = 0, **options: Any
) -> Any:
    """Return a model in eval mode whose adaptations have random values, as a substitute for training.

    Args:
        model: the model, or the family of a tiny one.
        adapt: the adaptations, in order.
        noise: the standard deviation of what is added to every trained tensor.
        noise_seed: the seed of what is added.
        options: what else `fresh` takes.
    """
    compiled = fresh(model, *adapt, **options).eval()
    perturb(compiled, noise, noise_seed)
    return compiled


_WITHOUT_DROPOUT: Mapping[str, Mapping[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}


def still(family: str, **changes: Any) -> nn.Module:
    """Return a tiny model that draws no random numbers in train mode: BERT and GPT-2 have no dropout.

    Other families are as `tiny` returns them; of these, T5 has dropout.
    """
    return tiny(family, **{**_WITHOUT_DROPOUT.get(family, {}), **changes})


def with_tensors(compiled: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Load the tensors of a model's adaptations, which may be among those of others, and return the model."""
    compiled.load_adapter_state_dict({name: tensors[name] for name in compiled.adapter_state_dict()})
    return compiled
