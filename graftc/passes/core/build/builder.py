"""The Builder: the only thing that changes a graph.

It inserts nodes where their arguments are ready, creates tensors with an initialiser, keeps ``meta["val"]`` right,
tags every node with its provenance, and records each replacement so that folding can take it back.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from graftc.passes.core.ops.decompositions import SEEDS
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.build.tensors import Initialiser
from graftc.passes.core.build.virtual_tokens import VirtualBuilder
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
DROPOUTS = (torch.ops.graftc.masked_dropout.default, torch.ops.graftc.seeded_dropout.default)
DropoutScope = Literal["input", "target"]

__all__ = ["Builder", "DropoutScope", "Initialiser"]


class Builder(VirtualBuilder):
    """Builds one adaptation into one Program.

    Args:
        program: changed in place.
        store: new tensors go here; one that exists already is used again, so that Programs share tensors.
        adaptation: the adaptation's name.
        method: its method's tag.
        seed: initial values depend on it and on a tensor's name, never on the order of creation.
        values: tensors that are there already, by name: they take the place of initial values.
    """

    composed = False
    """Whether it builds several adaptations at once."""

    def input(self, site: LinearSite) -> fx.Node:
        """What the site reads, in the base's own layout: `map` and `low_rank` know what to make of it.

        What `set_input` has put in front of the map so far is not part of it: adaptations of a site add up in the order
        of insertion, so one that comes later does not pass through what an earlier one does to the input.
        """
        return self._read(site)

    def _read(self, site: LinearSite) -> fx.Node:
        return self.program.edits.unchanged_input(site.use.input, str(site.key))

    def map(self, site: LinearSite, x: fx.Node, weight: fx.Node, part: str = "map") -> fx.Node:
        """``weight: [..., k, in]`` applied to ``x`` as the site applies its own weight: ``[..., k]``.

        Raises:
            GraftError: GC017 at a convolution in groups, where a row's place says what it reads, for other than the
                site's own rows.
        """
        if not site.use.grouped:
            return site.use.map(self.call, x, weight, part)
        if weight.meta["val"].shape[-2] != site.out_features:
            message = f"{site.key} is a convolution in groups, where nothing but its own rows can be applied"
            raise GraftError("GC017", message, hint="leave it out with exclude")
        return self._own_columns(site, site.use.map(self.call, x, self._every_row(site, weight), part))

    def low_rank(self, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1) -> fx.Node:
        """``scale * (b a) x`` for ``a: [..., rank, in]`` and ``b: [..., rows, rank]``, as ``[..., rows]``."""
        if not site.use.grouped:
            return site.use.low_rank(self.call, x, a, b, scale)
        return self._own_columns(site, site.use.low_rank(self.call, x, a, self._every_row(site, b), scale))

    def _every_row(self, site: LinearSite, own: fx.Node) -> fx.Node:
        """Groups are counted over all rows of a use: those that are not the site's are zeros."""
        columns = site.columns
        if columns.whole:
            return own
        shape = [columns.total, int(own.meta["val"].shape[-1])]
        zeros = self.call(aten.new_zeros.default, own, shape, part="all rows")
        return columns.write(self._emit("all rows"), zeros, own, lambda: self._index(columns), axis=0)

    def _own_columns(self, site: LinearSite, found: fx.Node) -> fx.Node:
        columns = site.columns
        return columns.read(self._emit("own rows"), found, lambda: self._index(columns), axis=-1)

    def per_row(self, site: LinearSite, value: fx.Node) -> fx.Node:
        """``value: [..., rows]`` (experts lead), one for each of the site's own rows, as it broadcasts to `output`."""
        return site.use.per_row(self.call, site.use.input, value)

    def offset(self, site: LinearSite) -> fx.Node | None:
        """What the base adds to ``W x`` at the site, as it broadcasts to `output`: a bias; None where there is none."""
        addend = site.use.addend
        if addend is None:
            return self.bias(site)
        columns = site.columns
        own = columns.read(self._emit("own rows"), addend, lambda: self._index(columns), axis=site.use.axis)
        return site.use.columns_last(self.call, own)

    def output(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the result so far, ``[..., rows]``."""
        return site.use.columns_last(self.call, self._own(site))

    def _own(self, site: LinearSite) -> fx.Node:
        """The own part of the result, in the base's layout."""
        columns, use = site.columns, site.use
        return columns.read(self._emit("own rows"), use.output, lambda: self._index(columns), axis=use.axis)

    def set_output(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        """Make ``own`` (``[..., rows]``) the site's result for everything that read it."""
        self._put(site, site.use.columns_home(self.call, own), part)

    def _put(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        before, columns, axis = site.use.output, site.columns, site.use.axis
        after = columns.write(self._emit(part or "write rows"), before, own, lambda: self._index(columns), axis=axis)
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
        self._redirect(before, after, lambda user: not _is_at(user, mine))
        site.use.output = after

    def set_input(self, site: LinearSite, node: fx.Node) -> None:
        """Put ``node``, made from `input` and in its layout, in its place for the site, with all that is inserted there
        so far."""
        before, mine, whole = self._read(site), str(site.key), site.columns.whole
        shared = self._shared_dropouts(before, mine)
        for dropped in shared:
            again = self.call(dropped.target, node, *dropped.args[1:], part="dropout")
            self._redirect(dropped, again, lambda u: _is_at(u, mine), narrow=True)
        own = None if whole else self._own_map(site, node)
        own_reader = site.use.node if whole else None
        self._redirect(before, node, lambda u: u is own_reader or (_is_at(u, mine) and u not in shared), narrow=True)
        if own is not None:
            self._put_first(site, own)

    def _shared_dropouts(self, x: fx.Node, site: str) -> list[fx.Node]:
        """Inserted dropouts of ``x`` that nodes of a site read, and nodes of other sites too."""
        drops = [u for u in x.users if u.target in DROPOUTS and provenance(u) is not None]
        return [u for u in drops if len({_is_at(reader, site) for reader in u.users}) > 1 or not _is_at(u, site)]

    def _own_map(self, site: LinearSite, x: fx.Node) -> fx.Node:
        """The base's own map of ``x`` for the site's rows alone, in the output's layout."""
        own, offset = self.map(site, x, self.weight(site), part="own rows"), self.offset(site)
        if offset is not None:
            own = self.call(aten.add.Tensor, own, offset, part="own rows")
        return site.use.columns_home(self.call, own)

    def _put_first(self, site: LinearSite, own: fx.Node) -> None:
        """Make ``own`` the site's part of the base's result, below everything that is inserted there."""
        use, columns = site.use, site.columns
        before = use.node
        after = columns.write(self._emit("write rows"), before, own, lambda: self._index(columns), axis=use.axis)
        self._redirect(before, after, lambda user: True)
        use.output = after if use.output is before else use.output

    def scale_input(self, site: LinearSite, scale: fx.Node) -> None:
        """Multiply what the site reads by ``scale: [in]``, with all that is inserted on the site so far.

        Raises:
            GraftError: GC017 where a column of the weight is no entry of the input: convolutions and tables.
        """
        x, axis = self.input(site), site.use.input_axis
        if axis is None:
            message = f"{site.key} is a map of patches or of indices: it has no input axis that could be scaled"
            raise GraftError("GC017", message, hint="scale its output, or leave it out with exclude")
        trailing = (x.meta["val"].dim() - axis if axis >= 0 else -axis) - 1
        if trailing:
            scale = self.call(aten.view.default, scale, [site.in_features, *[1] * trailing], part="scale")
        self.set_input(site, self.call(aten.mul.Tensor, x, self.along(scale, x), part="scale"))

    def weight(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the weight, ``[..., rows, in]``."""
        return site.own.read_operand(self.call, self._current(site.own.tensor), lambda: self._index(site.own))

    def bias(self, site: LinearSite) -> fx.Node | None:
        """The site's own rows of the bias, ``[rows]``; None where there is none."""
        own = site.own_bias
        if own is None:
            return None
        return own.read(self._emit("bias rows"), self._current(own.tensor), lambda: self._index(own))

    def is_overlaid(self, name: str) -> bool:
        """Whether something trained stands in for a base tensor, or for some of its rows."""
        return self._current(name) is not self._attributes[name]

    def _current(self, name: str) -> fx.Node:
        """What stands for a base tensor now: its overlay, where it has one."""
        return self.program.current(self._attributes[name])

    def dropout(self, node: fx.Node, p: float, *, recompute: bool = False, scope: DropoutScope = "input") -> fx.Node:
        """Dropout of an activation.

        Args:
            node: what to drop from.
            p: probability of dropping an element; 0 inserts nothing. Indices of a table have nothing to drop.
            recompute: keep a seed instead of the mask for the backward pass (`graftc.passes.core.ops.decompositions`); a mask rounds
                ``p`` to a multiple of ``1 / 65536`` (`graftc.passes.core.ops.dropout`).
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
                mask = self.call(torch.ops.graftc.random_mask.default, node, p, part="mask")
                dropped = self.call(torch.ops.graftc.masked_dropout.default, node, mask, p, part="dropout")
            self._dropouts[key] = dropped
        return self._dropouts[key]


def _is_at(node: fx.Node, site: str) -> bool:
    """Whether a node was inserted at a site."""
    return (provenance(node) or {}).get("site") == site
