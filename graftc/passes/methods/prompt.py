"""Prompt tuning: trained embeddings of virtual tokens (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.base_activations import unknown_token
from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.method.lowrank import normal, within
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import ValueSite
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.specs.methods.prompt import Prompt, VirtualTokenSpec

aten = torch.ops.aten
S = TypeVar("S", bound=VirtualTokenSpec)


class VirtualTokenMethod(Method[S, ValueSite]):
    """``[P; E(x)]`` with ``P: [tokens, width]``: the vectors of virtual tokens, used where tokens are looked up."""

    def insert(self, spec: S, site: ValueSite, shared: Any, build: Builder) -> None:
        """Insert the vectors of the virtual tokens.

        Raises:
            GraftError: GC039 for an initial token that is not in the vocabulary.
        """
        for run, vectors in enumerate(runs(spec, site, build, initialiser(spec, site, build))):
            build.fill(site, run, vectors)

    def fold(self, spec: S, site: ValueSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since it adds tokens."""
        return Keep("it adds tokens, which no weight of the base can represent")


class PromptMethod(VirtualTokenMethod[Prompt]):
    """`VirtualTokenMethod` with one run of virtual tokens."""


def runs(spec: VirtualTokenSpec, site: ValueSite, build: Builder, init: Initialiser) -> list[fx.Node]:
    """Return the vectors of each run, ``[length, width]``, as slices of one tensor."""
    tokens = build.parameter("tokens", (spec.total, site.width), init, dtype=site.dtype)
    lengths = [run.length for run in spec.virtual_tokens()]
    if len(lengths) == 1:
        return [tokens]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        build.call(aten.slice.Tensor, tokens, -2, start, start + length, part="tokens")
        for start, length in zip(starts, lengths, strict=True)
    ]


def initialiser(spec: VirtualTokenSpec, site: ValueSite, build: Builder) -> Initialiser:
    """Return the initialiser of the vectors of virtual tokens.

    Raises:
        GraftError: GC039 for a token that is not in the vocabulary.
    """
    if spec.init == "uniform":
        return within(0.5)
    if spec.init == "normal":
        return normal(spec.init_std)
    size = build.vocabulary(site)
    groups = [ids if isinstance(ids, tuple) else (ids,) for ids in spec.init_tokens]
    wrong = [(i, number) for i, ids in enumerate(groups) for number in ids if not 0 <= number < size]
    if wrong:
        index, number = wrong[0]
        raise unknown_token(number, size, f"init_tokens[{index}]")

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        known = min(spec.init_vocabulary, size)
        rest = tensor.shape[-2] - len(groups)
        drawn = torch.randperm(known, generator=generator)[:rest]
        if rest > known:
            drawn = torch.randint(known, (rest,), generator=generator)
        rows = [build.embedded(site, torch.tensor(ids)).mean(0, keepdim=True) for ids in groups]
        tensor.copy_(torch.cat([*rows, *([build.embedded(site, drawn)] if rest else [])]))

    return fill
