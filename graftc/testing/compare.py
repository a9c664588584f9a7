"""Helpers that run models and compare their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat import pytree
from graftc.compat.caches import cache_of
from graftc.compiler.capture.example_inputs import random_inputs
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.runtime.model.stand_in import encode

SHAPES: tuple[tuple[int, int], ...] = ((5, 9), (1, 4), (2, 17))
"""Batch and sequence sizes that no capture uses."""


def inputs_for(
    runner: ModelRoot, sizes: tuple[int, int] = SHAPES[0], seed: int = 0, *, front: bool = True
) -> dict[str, Tensor]:
    """Return random inputs with the signature that a model was compiled for.

    Args:
        runner: the adapted model, or the folded one.
        sizes: batch and sequence sizes; a model with only a batch axis uses the first. A target sequence, if there is
            one, is two tokens shorter.
        seed: seed of the values.
        front: whether some rows have padding in front. Under causal attention, such padding attends to nothing, and its
            results differ between torch and ONNX Runtime; those for real tokens agree.
    """
    own = runner_of(runner)
    compilation = own.compilation
    every = (*sizes, max(1, sizes[-1] - 2))
    config = getattr(own, "config", None)
    return random_inputs(compilation.program("train", "base"), compilation.store, seed, every, config, front=front)


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return every floating-point output of a call in eval mode without gradients; the training flag is restored.

    A model of transformers is called without its cache, as graphs are: the T5 of transformers 5.13 rounds differently
    with one.
    """
    training = model.training
    cached = getattr(getattr(model, "config", None), "use_cache", False)
    takes = cached and "use_cache" in inspect.signature(model.forward).parameters
    model.eval()
    try:
        with torch.no_grad():
            leaves = flat(model(**{**({"use_cache": False} if takes else {}), **inputs}))
    finally:
        if model.training != training:
            model.train(training)
    return [leaf for leaf in leaves if leaf.is_floating_point()]


_PARTS = ((0, 5), (5, 6), (6, 8))


def in_parts(model: ModelRoot, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the logits of a text as a whole, and those of its parts, each run with the cache of the parts before it.

    The first part has no past, the second is one token, and the third is two. Rows differ in their padding, whose
    logits are zero in both results.

    Args:
        model: a model that generates.
        seed: seed of the text.
    """
    runner, training = runner_of(model), model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    shape = (2, _PARTS[-1][1])
    rows = min(100, int(getattr(runner.config.get_text_config(), "vocab_size", 100)))
    ids = torch.randint(3, rows, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    try:
        with torch.no_grad():
            if runner.config.is_encoder_decoder:
                given = inputs_for(model, shape, seed)
                source = {name: value for name, value in given.items() if not name.startswith("decoder_")}
                tokens = torch.randint(3, rows, shape, generator=generator)
                whole = model(**source, decoder_input_ids=tokens).logits
                text = {name: value for name, value in source.items() if name == "attention_mask"}
                text["encoder_outputs"] = encode(runner, dict(source))
                calls = [{"decoder_input_ids": tokens[:, a:b], **text} for a, b in _PARTS]
                return whole, _called(model, calls)
            mask[0, :2] = 0
            text = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            if "position_ids" not in runner.interface.parameters:
                text = {}
            whole = model(input_ids=ids, attention_mask=mask, **text).logits
            calls = [
                {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], **{n: t[:, a:b] for n, t in text.items()}}
                for a, b in _PARTS
            ]
            return whole * mask[..., None], _called(model, calls) * mask[..., None]
    finally:
        model.train(training)


def _called(model: ModelRoot, calls: list[dict[str, Any]]) -> Tensor:
    cache, logits = None, []
    for call in calls:
        outputs = model(**call, cache=cache, use_cache=True)
        cache = cache_of(outputs)
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


def flat(outputs: Any) -> list[Tensor]:
    """Return every tensor of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(_plain(outputs)) if isinstance(leaf, Tensor)]


def _plain(outputs: Any) -> Any:
    """Return a model's output as plain containers, without the cache that only a source model returns."""
    if not isinstance(outputs, Mapping):
        return outputs
    from transformers.cache_utils import Cache

    return {name: value for name, value in outputs.items() if not isinstance(value, Cache)}


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two lists of tensors are equal, element by element."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest absolute difference between two lists of tensors of the same shapes.

    Raises:
        ValueError: if the lists or the shapes differ, or there is nothing to compare.
    """
    if not a or [t.shape for t in a] != [t.shape for t in b]:
        raise ValueError(f"cannot compare {[list(t.shape) for t in a]} with {[list(t.shape) for t in b]}")
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True))
