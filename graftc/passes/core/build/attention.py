"""The part of the `Builder` that changes attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.base_activations import read_tokens
from graftc.passes.core.build.masks import END, Masks, most_of, same_size, surplus
from graftc.passes.core.build.nodes import size_of
from graftc.passes.core.build.position_ids import counted_inputs, recounted, tokens_in_front
from graftc.passes.core.build.requests import Change, Window
from graftc.passes.core.build.virtual_tokens import Virtual
from graftc.passes.core.ir.eval_mode import ATTENTION
from graftc.passes.core.ir.program import above, limited, map_nodes, nodes_in, provenance
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import AttentionSite, Positions, unsupported
from graftc.specs.errors.diagnostics import GraftError, Place

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_TAKEN = "positions taken"
_ANY = (2, 2)
"""Sample token ids whose position ids are read. They are not padding ids, which are 0 or 1 in most vocabularies."""


class Attentions(Masks, Virtual):
    """Puts the keys and values of virtual tokens before an attention layer's own."""

    def batched(self, node: fx.Node, like: fx.Node, part: str) -> fx.Node:
        """Expand ``[heads, length, width]`` to every row of ``like: [rows, heads, keys, width]``."""
        value = node.meta["val"]
        if value.dim() == 3:
            node = self.call(aten.unsqueeze.default, node, 0, part=part)
        rows = like.meta["val"].shape[0]
        size = rows if isinstance(expression(rows), int) else self.call(aten.sym_size.int, like, 0, part="rows")
        return self.call(aten.expand.default, node, [size, -1, -1, -1], part=part)

    def shift(self, positions: Positions, length: int) -> None:
        """Make the tokens' positions begin at ``length``.

        The Program then accepts only as many tokens as there are rows left in the position table.
        """
        self._write(Change("positions"), lambda: self._shift(positions, length))

    def _shift(self, positions: Positions, length: int) -> None:
        numbers = positions.numbers
        self._limit_positions(positions, numbers, length)
        later = self._later(numbers, length)
        later.meta[_TAKEN] = numbers.meta.get(_TAKEN, 0) + length
        self._redirect(numbers, later, lambda user: user is positions.reader, narrow=True)

    def _later(self, numbers: fx.Node, length: int) -> fx.Node:
        """Return the position ids that the text has after ``length`` other tokens."""
        inputs = counted_inputs(numbers)
        if not inputs:
            return self.call(aten.add.Tensor, numbers, length, part="positions")
        call = partial(self.call, part="counted")
        longer = {
            node: call(aten.cat.default, [tokens_in_front(call, numbers, node, length), node], 1) for node in inputs
        }
        return call(aten.slice.Tensor, recounted(numbers, longer, call, lambda node: node), 1, length, END)

    def _limit_positions(self, positions: Positions, numbers: fx.Node, length: int) -> None:
        """Limit the position axis to the number of rows that are left in the position table.

        If the caller passes position ids, only the caller can know their range.
        """
        rows, table = positions.rows, positions.table
        if rows is None or table is None:
            return
        try:
            (sample,) = read_tokens(self.program, self.store, _ANY, [numbers])
        except GraftError:
            return
        if sample.is_meta:
            return
        taken = numbers.meta.get(_TAKEN, 0) + length
        most = rows - 1 - taken - int(sample.max()) + len(_ANY)
        why = f"{self.adaptation!r} uses {length} of the {rows} positions of {table.target}"
        for spec, node in zip(self.program.inputs, self.program.placeholders(), strict=True):
            for name, size in zip(spec.shape, node.meta["val"].shape, strict=True):
                if isinstance(name, str) and surplus(numbers.meta["val"].shape[-1], size) is not None:
                    self.program.limits.setdefault(name, why)
                    self.program.inputs = limited(self.program.inputs, {name: most})

    def attended(self, site: AttentionSite) -> fx.Node:
        """Return an attention layer's current input, ``[batch, sequence, width]``, before its projections.

        Raises:
            GraftError: GC017 if the attention layer is not in a residual branch.
        """
        if site.read is None:
            raise unsupported(site, "is not in a residual branch, so its input is unknown")
        return self._read(self.program.current(site.read), "attended", site)

    def attend(self, site: AttentionSite, keys: fx.Node, values: fx.Node, *, window: Window = "visible") -> None:
        """Make every query attend to ``keys`` and ``values``, ``[rows, heads, length, width]``, before the layer's own.

        A mask or bias is recomputed to cover the keys in front (`Masks`), so that a position bias extends to them. If
        that is not possible, columns that hide nothing are added to the mask or bias. Causal attention without a mask
        stays causal: zero queries are put in front as well and their results are cut off, so that the fused kernel can
        still apply its own causal mask. Attention that is written out as separate operators is recomputed, starting
        from its keys and values.

        Args:
            site: the attention layer.
            keys: the keys to put in front.
            values: their values.
            window: ``"masked"`` if a sliding window hides these keys as it would hide tokens in their place;
                ``"visible"`` if it never hides them.

        Raises:
            GraftError: GC017 if the attention layer cannot be rewritten, or if the effect of its window is unknown.
        """
        change = Change("keys", (keys, values), window=window)
        self._write(change, lambda keys, values: self._attend(site, keys, values, window))

    def _attend(self, site: AttentionSite, keys: fx.Node, values: fx.Node, window: Window) -> None:
        node = self._current_attention(site)
        if node.target is _SDPA:
            after = self._fused(site, node, keys, values, window)
        else:
            after = self._written_out(site, node, keys, values, window)
        self._redirect(node, after, lambda user: True)

    def _fused(self, site: AttentionSite, node: fx.Node, keys: fx.Node, values: fx.Node, window: Window) -> fx.Node:
        args = {**ATTENTION, **dict(zip(ATTENTION, node.args, strict=False)), **node.kwargs}
        length = int(keys.meta["val"].shape[2])
        query, mask, causal = args["query"], args["attn_mask"], bool(args["is_causal"])
        key = self.call(aten.cat.default, [keys, args["key"]], 2, part="keys")
        value = self.call(aten.cat.default, [values, args["value"]], 2, part="values")
        if isinstance(mask, fx.Node):
            mask = self._wider(site, mask, length, window)
        elif causal:
            query = self.call(aten.constant_pad_nd.default, query, [0, 0, length, 0], part="queries")
        rest = (mask, args["dropout_p"], causal)
        options = {name: args[name] for name in ("scale", "enable_gqa") if args.get(name) is not None}
        after = self.call(node.target, query, key, value, *rest, part="attend", **options)
        if causal and not isinstance(mask, fx.Node):
            after = self.call(aten.slice.Tensor, after, 2, length, END, part="attend")
        return after

    def _current_attention(self, site: AttentionSite) -> fx.Node:
        """Return the site's current attention call: the one inserted by the last prefix, if there is a prefix."""
        node = self.program.current(site.node)
        tag = provenance(node)
        if node.target is _SDPA or tag is None or tag["part"] == "attend":
            return node
        reason = "has been replaced by a call that is not an attention"
        raise unsupported(site, reason, "put the prefix before the adaptation that adds to the heads")

    # --- masks -----------------------------------------------------------------------------------------

    def _wider(self, site: AttentionSite, mask: fx.Node, length: int, window: Window, sees: bool = True) -> fx.Node:
        """Return a mask with additional columns for ``length`` keys in front.

        In these columns, a bias has the values that it would have for tokens in place of the keys. If the mask is a
        pairwise input or is computed from activations, these values are unknown: the new columns of a bias are zero,
        and those of a boolean mask hide nothing. If sizes are fixed, the new columns of a bias that does nothing but
        hide keys are zero as well.

        Args:
            site: the attention layer.
            mask: the mask, ``[..., rows, keys]``, either boolean or added to scores.
            length: the number of keys in front.
            window: the window mode, as in `attend`.
            sees: the boolean value that makes a key visible.

        Raises:
            GraftError: GC017 for a bias of fixed size that depends on positions, or if the effect of the window is
                unknown.
        """
        key = ("mask", mask, length, window, sees)
        return self._once(key, lambda: self._new_wider(site, mask, length, window, sees))

    def _new_wider(self, site: AttentionSite, mask: fx.Node, length: int, window: Window, sees: bool) -> fx.Node:
        own = mask.meta["val"].dtype == torch.bool
        if own and window == "visible":
            return self._in_front(mask, length, sees)
        wide = self._longer_mask(mask, self._keys(site), length)
        if wide is None:
            if window == "masked" and not _is_input(mask):
                message = f"this graph does not determine which keys of a prefix the window of {site.key} hides"
                hint = "use window: visible, or inputs with a dynamic sequence axis"
                raise GraftError("GC017", message, place=Place(path="window"), hint=hint)
            if not own and not self._hides_only(mask):
                message = f"this graph does not determine the bias of {site.key} for keys in front of the text"
                hint = "use inputs with a dynamic sequence axis, or leave it out with exclude"
                raise GraftError("GC017", message, hint=hint)
            return self._in_front(mask, length, sees and own)
        return wide if own or window == "masked" else self._unhidden(site, wide)

    def _keys(self, site: AttentionSite) -> Any:
        """Return the number of keys that the attention layer has in the base."""
        assert site.operands is not None
        return site.operands.keys.meta["val"].shape[2]

    def _in_front(self, mask: fx.Node, length: int, ones: bool) -> fx.Node:
        sizes: list[Any] = [size_of(self, mask, axis) for axis in range(mask.meta["val"].dim() - 1)]
        fill = aten.new_ones.default if ones else aten.new_zeros.default
        front = self.call(fill, mask, [*sizes, length], part="mask")
        return self.call(aten.cat.default, [front, mask], -1, part="mask")

    def _unhidden(self, site: AttentionSite, wide: fx.Node) -> fx.Node:
        """Return a copy of a bias that hides no key in front of the text.

        In the columns of these keys, values near the dtype's minimum become zero.
        """
        value = wide.meta["val"]
        count = surplus(value.shape[-1], self._keys(site), most_of(self.program))
        assert count is not None
        front = self.call(aten.slice.Tensor, wide, -1, 0, count, part="mask")
        rest = self.call(aten.slice.Tensor, wide, -1, count, END, part="mask")
        least = torch.finfo(value.dtype).min / 2
        hidden = self.call(aten.lt.Scalar, front, least, part="mask")
        front = self.call(aten.masked_fill.Scalar, front, hidden, 0.0, part="mask")
        return self.call(aten.cat.default, [front, rest], -1, part="mask")

    # --- attention written out as operators ------------------------------------------------------------

    def _written_out(
        self, site: AttentionSite, node: fx.Node, keys: fx.Node, values: fx.Node, window: Window
    ) -> fx.Node:
        """Recompute attention (scores, caps, masks, softmax) with ``keys`` and ``values`` before its own."""
        assert site.operands is not None
        now = self.program.current
        own = [self._foremost(site, now(n)) for n in (site.operands.keys, site.operands.values)]
        parts = zip(own, (keys, values), ("keys", "values"), strict=True)
        again = {n: self.call(aten.cat.default, [front, n], 2, part=part) for n, front, part in parts}
        region = _between(node, own, now(site.operands.query))
        spot = _Spot(site, int(keys.meta["val"].shape[2]), own[0].meta["val"].shape[2], window, {*region, *own})
        try:
            if len(again) < 2:
                raise ValueError("keys and values are the same node")
            for step in region:
                arguments = {n: again.get(n) or self._leaf(spot, n, step) for n in step.all_input_nodes}
                args, kwargs = map_nodes((step.args, dict(step.kwargs)), arguments.__getitem__)
                again[step] = self.call(step.target, *args, part="attend", **kwargs)
            before, now = (n.meta["val"].shape for n in (node, again[node]))
            if len(before) != len(now) or not all(map(same_size, before, now)):
                raise ValueError("the recomputed attention has a different shape")
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            reason = "is written out in a form that does not allow keys to be put in front"
            hint = "load the model with attn_implementation='sdpa' if it supports that, or leave it out with exclude"
            raise unsupported(site, reason, hint) from error
        return again[node]

    def _foremost(self, site: AttentionSite, operand: fx.Node) -> fx.Node:
        """Return keys or values, including those that earlier prefixes have put before them."""
        mine = str(site.key)
        while True:
            joined = [n for n in operand.users if n.target is aten.cat.default and nodes_in(n.args)[-1] is operand]
            joined = [n for n in joined if (provenance(n) or {}).get("site") == mine]
            if not joined:
                return operand
            operand = joined[-1]

    def _leaf(self, spot: _Spot, source: fx.Node, reader: fx.Node) -> fx.Node:
        """Return the value to use for an operand of written-out attention that does not depend on the keys.

        An operand with a key axis is a mask or a bias and is extended; any other operand is returned unchanged.
        """
        site, value = spot.site, source.meta["val"]
        assert site.operands is not None
        if not isinstance(value, Tensor) or value.dim() == 0 or source is site.operands.query:
            return source
        if source.op == "get_attr" or not same_size(value.shape[-1], spot.count, most_of(self.program)):
            return source
        if value.dtype == torch.bool and reader.target in _MASKING:
            sees = reader.args[0] is source and reader.args[1] in spot.inside
            return self._wider(site, source, spot.length, spot.window, sees)
        if value.is_floating_point() and reader.target in (aten.add.Tensor, aten.baddbmm.default):
            return self._wider(site, source, spot.length, spot.window)
        wide = self._longer_mask(source, self._keys(site), spot.length)
        if wide is None:
            raise ValueError(f"{source.name} cannot be extended")
        return wide


@dataclass(frozen=True)
class _Spot:
    """An attention layer being rewritten: how many keys are in front, how many it has, and the nodes to replace."""

    site: AttentionSite
    length: int
    count: Any
    window: Window
    inside: set[fx.Node]


_MASKING = (aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def _is_input(mask: fx.Node) -> bool:
    """Return whether a mask is a pairwise input of the graph, possibly transformed by calls with a single operand."""
    while mask.op == "call_function" and len(mask.all_input_nodes) == 1:
        mask = mask.all_input_nodes[0]
    return mask.op == "placeholder" and mask.meta["val"].dim() > 2


def _between(last: fx.Node, first: list[fx.Node], query: fx.Node) -> list[fx.Node]:
    """Return the calls on paths from ``first`` to ``last`` that do not pass through the query, in graph order."""
    ends, below = {*first, query}, set(first)
    for node in above([last], stop=ends):
        if node not in ends and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return sorted(below.difference(first))
