"""aLoRA: a low-rank update from an invocation on (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.invocation import last_start
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.method.lowrank import factors, normal, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, unsupported
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.passes.methods.bases.low_rank import dropped_input
from graftc.specs.base import start_input
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.alora import ALoRA

aten = torch.ops.aten
_NEVER = 2**31 - 1
"""A position beyond every text."""


class ALoRAMethod(Method[ALoRA, LinearSite]):
    """``y = W x + b + [t >= t0] s B A drop(x)``, where the invocation's last occurrence begins at position ``t0``.

    The bracket is computed once for all sites. Before ``t0``, what is added is -0, the only number whose sum with any
    other is that other, bit for bit.
    """

    def prepare(self, spec: ALoRA, sites: Sequence[LinearSite], build: Builder) -> fx.Node:
        """Return where the update has no effect, ``bool[batch, length]``.

        Raises:
            GraftError: GC017 if the model does not read one text, GC031 if the call has token embeddings instead of ids
                and does not give the positions, GC039 for an id that is not in the vocabulary.
        """
        inputs = {str(node.target): node for node in build.program.placeholders()}
        text = inputs.get("input_ids") or inputs.get("inputs_embeds")
        if text is None or "decoder_input_ids" in inputs or text.meta["val"].dim() < 2:
            raise unsupported(sites[0], "is not in a decoder that reads token ids", "use lora, which adapts all tokens")
        call = partial(build.call, part="invocation")
        start = inputs.get(start_input(build.adaptation))
        if start is None:
            if text.meta["val"].is_floating_point():
                name = start_input(build.adaptation)
                message = f"the invocation of {build.adaptation!r} cannot be found in token embeddings"
                raise GraftError("GC031", message, hint=f"pass {name}: each row's first adapted position, or -1")
            _check_ids(spec, text)
            start = last_start(call, text, spec.invocation)
        start = call(aten.masked_fill.Scalar, start, call(aten.lt.Scalar, start, 0), _NEVER)
        numbers = call(aten.arange.default, call(aten.sym_size.int, text, 1))
        return call(aten.lt.Tensor, numbers, call(aten.unsqueeze.default, start, 1))

    def insert(self, spec: ALoRA, site: LinearSite, shared: fx.Node, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC017 if the site has other positions than the text; GC020 when the rank exceeds ``min(in,
                out)`` without ``excess_rank``.
        """
        down = normal(1 / spec.rank) if spec.init == "gaussian" else uniform
        a, b = factors(build, site, spec.rank, down, zeros, excess_rank=spec.excess_rank)
        delta = build.low_rank(site, dropped_input(spec, build.input(site), build), a, b, spec.scaling)
        sizes = [expression(size) for size in shared.meta["val"].shape]
        rows, batch = delta, None
        if _sizes(rows) != sizes and len(_sizes(rows)) == 1:
            batch = Batch(build)
            rows = batch.first(delta, str(site.key))
        if _sizes(rows) != sizes:
            raise unsupported(site, "has other positions than the text that the model reads")
        before = build.call(aten.unsqueeze.default, shared, -1, part="before")
        rows = build.call(aten.masked_fill.Scalar, rows, before, -0.0, part="activated")
        build.add(site, rows if batch is None else batch.home(rows, delta))

    def repeats(self, spec: ALoRA) -> bool:
        """Return true: the insertion depends only on the spec and the types of the site's own tensors."""
        return True

    def fold(self, spec: ALoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since it acts on some tokens only."""
        return Keep("it acts only from its invocation on, and a weight acts on every token")


def _sizes(value: fx.Node) -> list[object]:
    """Return the sizes of a value's axes except the last."""
    return [expression(size) for size in value.meta["val"].shape[:-1]]


def _check_ids(spec: ALoRA, ids: fx.Node) -> None:
    """Raise GC039 for an id that has no row in a table in which the tokens are looked up."""
    tables = [int(u.args[0].meta["val"].shape[0]) for u in ids.users if u.target is aten.embedding.default]  # type: ignore[union-attr]
    for index, token in enumerate(spec.invocation):
        if tables and token >= min(tables):
            message = f"token {token} is not in the vocabulary, whose ids end at {min(tables) - 1}"
            hint = "take the ids from the model's own tokenizer"
            raise GraftError("GC039", message, place=Place(path=f"invocation[{index}]"), hint=hint)
