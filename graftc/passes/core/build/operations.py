"""The part of the `Builder` that inserts computations: products, look-ups, norms and dropout.

If each row of the batch has its own tensors, an adaptation's tensors have a leading batch axis, and a tensor whose
batch axis has size 1 applies to all rows. The values with which these tensors are combined then have the batch axis
first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.ops.hashing import SEEDS

aten = torch.ops.aten
DropoutScope = Literal["input", "target"]


class Operations(Nodes):
    """Inserts operations that do not depend on the type of site."""

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, part: str = "") -> fx.Node:
        """Return ``weight x + bias`` over the last axis of ``x`` for ``weight: [out, in]`` and ``bias: [out]``."""
        if weight.meta["val"].dim() == 2:
            return self.call(aten.linear.default, x, weight, bias, part=part)
        result = self._product(x, weight, part)
        return result if bias is None else self.call(aten.add.Tensor, result, self.along(bias, result), part=part)

    def _product(self, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Apply ``weight: [rows, out, in]`` to ``x: [rows, ..., in]`` row by row; a 2-D weight applies to all rows."""
        across = self.call(aten.transpose.int, weight, -1, -2, part=part)
        dims = x.meta["val"].dim()
        if dims == 2:
            x = self.call(aten.unsqueeze.default, x, 1, part=part)
        for _ in range(dims - 3 if weight.meta["val"].dim() == 3 else 0):
            across = self.call(aten.unsqueeze.default, across, 1, part=part)
        result = self.call(aten.matmul.default, x, across, part=part)
        return self.call(aten.squeeze.dim, result, 1, part=part) if dims == 2 else result

    def along(self, vector: fx.Node, x: fx.Node) -> fx.Node:
        """Return ``vector: [width]``, aligned with the last axis of ``x``, in a shape that broadcasts to ``x``."""
        axes = vector.meta["val"].dim()
        for _ in range(x.meta["val"].dim() - axes if axes > 1 else 0):
            vector = self.call(aten.unsqueeze.default, vector, 1, part="rows")
        return vector

    def look_up(self, table: fx.Node, index: fx.Node, part: str = "") -> fx.Node:
        """Return the rows ``index: int64[batch, sequence]`` of ``table: [entries, width]``."""
        if table.meta["val"].dim() == 2:
            return self.call(aten.embedding.default, table, index, part=part)
        rows, entries = table.meta["val"].shape[:2]
        if not isinstance(expression(rows), int):
            ones = self.call(aten.ones_like.default, self.call(aten.slice.Tensor, index, 1, 0, 1, part=part), part=part)
            before = self.call(aten.sub.Tensor, self.call(aten.cumsum.default, ones, 0, part=part), 1, part=part)
            skipped = self.call(aten.mul.Tensor, before, int(entries), part=part)
            index = self.call(aten.add.Tensor, index, skipped, part=part)
        flat = self.call(aten.flatten.using_ints, table, 0, 1, part=part)
        return self.call(aten.embedding.default, flat, index, part=part)

    def layer_norm(self, x: fx.Node, weight: fx.Node, bias: fx.Node, part: str = "norm") -> fx.Node:
        """Normalise over the last axis with ``weight`` and ``bias``, both ``[width]``, and an epsilon of 1e-5.

        Scale and shift are applied outside the kernel, so that per-row scales and shifts give bit-identical results.
        """
        width = [int(x.meta["val"].shape[-1])]
        normed = self.call(aten.layer_norm.default, x, width, None, None, 1e-5, part=part)
        scaled = self.call(aten.mul.Tensor, normed, self.along(weight, x), part=part)
        return self.call(aten.add.Tensor, scaled, self.along(bias, x), part=part)

    def dropout(self, node: fx.Node, p: float, *, recompute: bool = False, scope: DropoutScope = "input") -> fx.Node:
        """Apply dropout to an activation.

        Args:
            node: the activation.
            p: probability of dropping an element; 0 inserts nothing. Table indices are returned unchanged.
            recompute: whether to save a seed instead of the mask for the backward pass
                (`graftc.passes.core.ops.decompositions`); with a mask, ``p`` is rounded to a multiple of ``1 / 65536``
                (`graftc.passes.core.ops.dropout`).
            scope: ``"input"``: the adaptation's sites that read the same input share one mask; ``"target"``: each site
                has its own.
        """
        if p == 0 or not node.meta["val"].is_floating_point():
            return node
        own = self._site.key if scope == "target" and self._site is not None else None
        return self._once(("dropout", node, p, recompute, own), lambda: self._dropped(node, p, recompute))

    def _dropped(self, node: fx.Node, p: float, recompute: bool) -> fx.Node:
        if recompute:
            seed = drawn_beside(self, node, SEEDS, "seed")
            return self.call(torch.ops.graftc.seeded_dropout.default, node, seed, p, part="dropout")
        mask = self.call(torch.ops.graftc.random_mask.default, node, p, part="mask")
        return self.call(torch.ops.graftc.masked_dropout.default, node, mask, p, part="dropout")


def drawn_beside(build: Nodes, like: fx.Node, high: int, part: str) -> fx.Node:
    """Return a random integer below ``high``, ``int64[1]``, redrawn in every forward pass.

    It is drawn next to ``like``, so that a layer recomputed in the backward pass uses the same integer.
    """
    zero = build.call(aten.new_zeros.default, like, [1], dtype=torch.int64, part=part)
    return build.call(aten.randint_like.low_dtype, zero, 0, high, part=part)
