"""The part of the `Builder` that works at attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.branches import BranchBuilder
from graftc.passes.core.shapes import expression
from graftc.passes.core.sites import AttentionSite, Positions
from graftc.specs.diagnostics import GraftError

aten = torch.ops.aten


class AttentionBuilder(BranchBuilder):
    """Puts keys and values in front of those of an attention."""

    def numbers(self, part: str, value: Tensor) -> fx.Node:
        """A constant of the current site that follows from the architecture alone."""
        return self.constant(part, lambda: value.to(self._device()))

    def batched(self, node: fx.Node, like: fx.Node, part: str) -> fx.Node:
        """``[heads, length, width]`` for every row of ``like: [rows, heads, keys, width]``."""
        value = node.meta["val"]
        if value.dim() == 3:
            node = self.call(aten.unsqueeze.default, node, 0, part=part)
        rows = like.meta["val"].shape[0]
        size = rows if isinstance(expression(rows), int) else self.call(aten.sym_size.int, like, 0, part="rows")
        return self.call(aten.expand.default, node, [size, -1, -1, -1], part=part)

    def shift(self, positions: Positions, length: int) -> None:
        """Let the tokens' positions begin at ``length``."""
        numbers = positions.reader.args[positions.index]
        assert isinstance(numbers, fx.Node)
        later = self.call(aten.add.Tensor, numbers, length, part="positions")
        self._redirect(numbers, later, lambda user: user is positions.reader, narrow=True)

    def attend(self, site: AttentionSite, keys: fx.Node, values: fx.Node) -> None:
        """Let every query of an attention see keys and values in front of its own, ``[rows, heads, length, width]``.

        A mask gets columns that let everything through, and a bias zeros. A causal attention without a mask stays one:
        queries of zeros stand in front as well, whose results are cut off, so that the fused kernel keeps its mask.
        """
        node = self._current_attention(site)
        args = dict(zip(_NAMES, [*node.args, *_DEFAULTS[len(node.args) :]], strict=True)) | dict(node.kwargs)
        length = int(keys.meta["val"].shape[2])
        query, mask, causal = args["query"], args["attn_mask"], bool(args["is_causal"])
        key = self.call(aten.cat.default, [keys, args["key"]], 2, part="keys")
        value = self.call(aten.cat.default, [values, args["value"]], 2, part="values")
        if isinstance(mask, fx.Node):
            mask = self._widened(mask, length)
        elif causal:
            query = self.call(aten.constant_pad_nd.default, query, [0, 0, length, 0], part="queries")
        rest = (mask, args["dropout_p"], causal)
        options = {name: args[name] for name in ("scale", "enable_gqa") if args.get(name) is not None}
        after = self.call(node.target, query, key, value, *rest, part="attend", **options)
        if causal and not isinstance(mask, fx.Node):
            after = self.call(aten.slice.Tensor, after, 2, length, 2**63 - 1, part="attend")
        self._redirect(node, after, lambda user: True)

    def _current_attention(self, site: AttentionSite) -> fx.Node:
        """The call that stands at the site now: that of the last prefix, where there is one."""
        node = site.node
        links = {e.before: e.after for e in self.program.edits if not e.narrow}
        while node in links:
            node = links[node]
        if node.target is not aten.scaled_dot_product_attention.default:
            message = f"{site.key} has been replaced by something that is no attention"
            raise GraftError("GC017", message, hint="put the prefix before what adds to the heads")
        return node

    def _widened(self, mask: fx.Node, length: int) -> fx.Node:
        value = mask.meta["val"]
        sizes: list[Any] = []
        for axis in range(value.dim() - 1):
            size = value.shape[axis]
            known = isinstance(expression(size), int)
            sizes.append(int(size) if known else self.call(aten.sym_size.int, mask, axis, part="mask"))
        fill = aten.new_ones.default if value.dtype == torch.bool else aten.new_zeros.default
        front = self.call(fill, mask, [*sizes, length], part="mask")
        return self.call(aten.cat.default, [front, mask], -1, part="mask")


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = (None, None, None, None, 0.0, False)
