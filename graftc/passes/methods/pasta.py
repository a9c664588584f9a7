"""PASTA: vectors added at special tokens before every layer (Yang et al. 2023, arXiv:2210.04382)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.method.lowrank import normal, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import TokenNumbers, ValueSite, unsupported
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.pasta import Pasta

aten = torch.ops.aten
Slots = Mapping[fx.Node, fx.Node]
"""Maps the node of a stack's token ids to the node of the vector index for each token, ``int64[batch, sequence]``:
1 for the first vector, 0 for none."""


class PastaMethod(Method[Pasta, ValueSite]):
    """``x_t + Drop(e_j)`` with ``e: [slots, width]``, where ``t`` is the ``j``-th special token of its row."""

    def prepare(self, spec: Pasta, sites: Sequence[ValueSite], build: Builder) -> Slots:
        """Compute, once for each stack of layers, which vector is added to each token.

        Raises:
            GraftError: GC017 if a layer's input does not come from tokens that are looked up in a table, GC039 for an
                id that is not in the table.
        """
        slots: dict[fx.Node, fx.Node] = {}
        for site in sites:
            tokens = _tokens(site)
            if tokens.numbers not in slots:
                _check_ids(spec, tokens)
                slots[tokens.numbers] = _slots(spec, build, tokens.numbers)
        return slots

    def insert(self, spec: Pasta, site: ValueSite, shared: Slots, build: Builder) -> None:
        """Add the vectors to the value.

        Raises:
            GraftError: GC017 if the value has different positions from the tokens.
        """
        value, numbers = build.value(site), _tokens(site).numbers
        sizes = [[expression(s) for s in node.meta["val"].shape] for node in (value, numbers)]
        if sizes[0][:-1] != sizes[1]:
            raise unsupported(site, "has different positions from the tokens that the model reads")
        start = zeros if spec.init == "zeros" else normal(spec.init_std)
        vectors = build.parameter("vectors", (spec.vectors, site.width), start, dtype=site.dtype)
        none = build.call(aten.zeros_like.default, build.call(aten.slice.Tensor, vectors, -2, 0, 1), part="table")
        table = build.call(aten.cat.default, [none, vectors], -2, part="table")
        chosen = build.dropout(build.look_up(table, shared[numbers], "vector"), spec.dropout)
        build.set_value(site, build.call(aten.add.Tensor, value, chosen, part="add"))

    def fold(self, spec: Pasta, site: ValueSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since the positions where the vectors are added depend on the tokens."""
        return Keep("the positions where it adds vectors depend on the tokens, so no weight can contain them")


def _tokens(site: ValueSite) -> TokenNumbers:
    if site.tokens is None:
        reason = "is not computed from an input of token ids"
        raise unsupported(site, reason, "pass token ids to the model, or leave the site out with exclude")
    return site.tokens


def _check_ids(spec: Pasta, tokens: TokenNumbers) -> None:
    for index, token in enumerate(spec.special_tokens):
        if token >= tokens.entries:
            message = f"the special token {token} is not in the model's table of {tokens.entries} tokens"
            hint = "look the ids up in the tokenizer: cls_token_id, sep_token_id, bos_token_id, eos_token_id"
            raise GraftError("GC039", message, place=Place(path=f"special_tokens[{index}]"), hint=hint)


def _slots(spec: Pasta, build: Builder, numbers: fx.Node) -> fx.Node:
    matches = [build.call(aten.eq.Scalar, numbers, token, part="special") for token in spec.special_tokens]
    any_match = reduce(partial(build.call, aten.logical_or.default, part="special"), matches)
    special = build.call(aten.to.dtype, any_match, torch.int64, part="special")
    counted = build.call(aten.cumsum.default, special, 1, part="slot")
    capped = build.call(aten.clamp_max.default, counted, spec.vectors, part="slot")
    return build.call(aten.mul.Tensor, capped, special, part="slot")
