"""The Builder: the only thing that changes a graph.

It inserts nodes where their arguments are ready, creates tensors with an initialiser, keeps ``meta["val"]`` right,
tags every node with its provenance, and records each replacement so that folding can take it back.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from graftc.passes.core.layout import Layout
from graftc.passes.core.ops import SEEDS
from graftc.passes.core.program import follow, provenance
from graftc.passes.core.sites import LinearSite
from graftc.passes.core.tensors import Initialiser, TensorBuilder

aten = torch.ops.aten
DropoutScope = Literal["input", "target"]

__all__ = ["Builder", "DropoutScope", "Initialiser"]


class Builder(TensorBuilder):
    """Builds one adaptation into one Program.

    Args:
        program: changed in place.
        store: new tensors go here; one that exists already is used again, so that Programs share tensors.
        adaptation: the adaptation's name.
        method: its method's tag.
        seed: initial values depend on it and on a tensor's name, never on the order of creation.
        values: tensors that are there already, by name: they take the place of initial values.
    """

    def input(self, site: LinearSite) -> fx.Node:
        """What the site reads now, in the base's own layout: `map` and `low_rank` know what to make of it."""
        return site.use.input

    def map(self, site: LinearSite, x: fx.Node, weight: fx.Node, part: str = "map") -> fx.Node:
        """``weight: [..., k, in]`` applied to ``x`` as the site applies its own weight: ``[..., k]``."""
        return site.use.map(self.call, x, weight, part)

    def low_rank(self, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1) -> fx.Node:
        """``scale * (b a) x`` for ``a: [..., rank, in]`` and ``b: [..., rows, rank]``, as ``[..., rows]``."""
        columns = site.columns
        if columns.whole or not site.use.grouped:
            return site.use.low_rank(self.call, x, a, b, scale)
        # Groups are counted over all rows: the others get zeros.
        rank = int(b.meta["val"].shape[-1])
        zeros = self.call(aten.new_zeros.default, b, [columns.total, rank], part="all rows")
        every = columns.write(self._emit("all rows"), zeros, b, 0, lambda: self._index(columns))
        delta = site.use.low_rank(self.call, x, a, every, scale)
        return columns.read(self._emit("own rows"), delta, -1, lambda: self._index(columns))

    def output(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the result so far, ``[..., rows]``."""
        return site.use.columns_last(self.call, self._own(site))

    def _own(self, site: LinearSite) -> fx.Node:
        """The own part of the result, in the base's layout."""
        columns = site.columns
        return columns.read(self._emit("own rows"), site.use.output, site.use.axis, lambda: self._index(columns))

    def set_output(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        """Make ``own`` (``[..., rows]``) the site's result for everything that read it."""
        self._put(site, site.use.columns_home(self.call, own), part)

    def _put(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        before, columns, axis = site.use.output, site.columns, site.use.axis
        after = columns.write(self._emit(part or "write rows"), before, own, axis, lambda: self._index(columns))
        self._finish(site, before, after)

    def add(self, site: LinearSite, delta: fx.Node, part: str = "add") -> None:
        """Add ``delta`` (``[..., rows]``, or ``[rows]``) to the site's result."""
        if delta.meta["val"].dim() > 1:
            delta = site.use.columns_home(self.call, delta)
            self._put(site, self.call(aten.add.Tensor, self._own(site), delta, part=part))
        else:
            self.set_output(site, self.call(aten.add.Tensor, self.output(site), delta, part=part))

    def _finish(self, site: LinearSite, before: fx.Node, after: fx.Node) -> None:
        mine = str(site.key)
        self._redirect(before, after, lambda user: (provenance(user) or {}).get("site") != mine)
        site.use.output = after

    def set_input(self, site: LinearSite, node: fx.Node) -> None:
        """Make the site, with what is inserted on it so far, read ``node``, which has the input's own layout."""
        before = site.use.input
        mine = str(site.key)
        if site.columns.whole:
            self._redirect(before, node, lambda u: u is site.use.node or (provenance(u) or {}).get("site") == mine)
            return
        own = self.map(site, node, self.weight(site), part="own rows")
        bias = self.bias(site)
        if bias is not None:
            own = self.call(aten.add.Tensor, own, bias, part="own rows")
        self.set_output(site, own)

    def weight(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the weight, ``[..., rows, in]``."""
        node = self._current(site.use.weight)
        if site.use.layout is Layout.COLUMNS:
            node = self.call(aten.transpose.int, node, -2, -1, part="weight")
        elif site.use.layout is Layout.KERNEL:
            node = self.call(aten.flatten.using_ints, node, 1, part="weight")
        return site.rows.read(self._emit("weight rows"), node, -2, lambda: self._index(site.rows))

    def bias(self, site: LinearSite) -> fx.Node | None:
        """The site's own rows of the bias, ``[rows]``; None where there is none."""
        if site.use.bias is None:
            return None
        node = self._current(site.use.bias)
        return site.rows.read(self._emit("bias rows"), node, 0, lambda: self._index(site.rows))

    def _current(self, name: str) -> fx.Node:
        """What stands for a base tensor now: its overlay, where it has one."""
        return follow(self._attributes[name], {edit.before: edit.after for edit in self.program.edits})

    def dropout(self, node: fx.Node, p: float, *, recompute: bool = False, scope: DropoutScope = "input") -> fx.Node:
        """Dropout of an activation.

        Args:
            node: what to drop from.
            p: probability of dropping an element; 0 inserts nothing. Indices of a table have nothing to drop.
            recompute: keep a seed instead of the mask for the backward pass (`graftc.passes.core.ops`).
            scope: ``"input"``: sites of the adaptation that read the same input share one mask; ``"target"``: each
                site has its own.
        """
        if p == 0 or not node.meta["val"].is_floating_point():
            return node
        own = self._site.key if scope == "target" and self._site is not None else None
        key = (node, p, recompute, own)
        if key not in self._dropouts:
            if recompute:
                # The seed is drawn beside the activation, so that a recomputed layer keeps its draw.
                like = self.call(aten.new_zeros.default, node, [1], dtype=torch.int64, part="seed")
                seed = self.call(aten.randint_like.low_dtype, like, 0, SEEDS, part="seed")
                dropped = self.call(torch.ops.graftc.seeded_dropout.default, node, seed, p, part="dropout")
            else:
                dropped = self.call(aten.dropout.default, node, p, True, part="dropout")
            self._dropouts[key] = dropped
        return self._dropouts[key]
