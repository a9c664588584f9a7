"""Seams of adaptations of one shape of which one, or a mixture, is computed: banks and averages of parameters.

A method asks for its tensors as ever. What it gets is made from the tensors of all members: for the whole call a tensor
of the shape that it asked for, so that nothing else is different; or one tensor for each row of the batch, which leads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.build.seams import Change, NewTensor, Reading, Seams
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.sites.uses import Dense
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
Mixing = Callable[[Nodes, list[fx.Node]], fx.Node]
"""Makes one tensor of those of all members, all of one shape."""


class Chosen(Seams[Nodes]):
    """The seams of several adaptations of one shape of which one is built: for the whole call.

    Args:
        members: names of the adaptations, in the order of their slots.
        mixing: makes one tensor from those of the members.
        share: parts of which there is one for all.
    """

    composed = True

    def __init__(self, members: Sequence[str], mixing: Mixing, share: Sequence[str] = ()) -> None:
        self.mixing, self.share = mixing, frozenset(share)
        self.parts: dict[str, dict[SiteKey | None, dict[str, str]]] = {name: {} for name in members}
        self.shared: set[str] = set()
        self._mixed: dict[tuple[fx.Node, ...], fx.Node] = {}

    def make(self, nodes: Nodes, new: NewTensor) -> Sequence[str]:
        """See `Seams.make`: a parameter for each member.

        Raises:
            GraftError: GC036 for state, which belongs to one adaptation alone, and for a trained copy of a base tensor,
                which can stand in for it once only.
        """
        if new.kind == "state":
            raise self._refusal(nodes, f"it keeps state ({new.part})")
        if new.kind == "copy":
            raise self._refusal(nodes, f"it trains {new.base} itself")
        if new.kind == "constant" or new.part in self.share:
            return super().make(nodes, new)
        found: list[str] = []
        for member, parts in self.parts.items():
            with nodes.owned(member, parts):
                found += super().make(nodes, new)
        return found

    def mix(self, nodes: Nodes, new: NewTensor, names: Sequence[str]) -> fx.Node:
        """See `Seams.mix`."""
        if new.kind == "constant":
            return super().mix(nodes, new, names)
        if new.part in self.share:
            self.shared.add(new.part)
            return self._one(nodes, super().mix(nodes, new, names))
        found = []
        for name, (member, parts) in zip(names, self.parts.items(), strict=True):
            with nodes.owned(member, parts):
                found.append(super().mix(nodes, new, [name]))
        key = tuple(found)
        if key not in self._mixed:
            self._mixed[key] = self.mixing(nodes, found)
        return self._mixed[key]

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """See `Seams.write`.

        Raises:
            GraftError: GC036 for a base tensor, in whose place something can be put once only.
        """
        if change.kind == "tensor":
            raise self._refusal(nodes, "it puts something in the place of a tensor of the base")
        super().write(nodes, change, put)

    def _one(self, nodes: Nodes, node: fx.Node) -> fx.Node:
        """A tensor that all rows have."""
        return node

    def _refusal(self, nodes: Nodes, reason: str) -> GraftError:
        names = ", ".join(self.parts)
        hint = "leave out what trains beside the method's own tensors, or give each its own place"
        return GraftError(
            "GC036", f"{nodes.method} cannot be one of {names} in {nodes.adaptation!r}: {reason}", hint=hint
        )


class Rows(Chosen):
    """The seams of several adaptations of one shape of which one is built: for each row of the batch.

    Every tensor of the method has the batch, or 1, as an axis before its own, and every value of the model is given
    with the rows of the batch first.
    """

    _batch: Batch | None = None

    def read(self, nodes: Nodes, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """See `Seams.read`: rows come first.

        Raises:
            GraftError: GC037 where no axis counts rows, and for what convolutions, tables and experts read.
        """
        if kind == "input" and isinstance(site, LinearSite) and not isinstance(site.use, Dense):
            message = f"{site.key} is not a product with a matrix that stands behind its input"
            raise GraftError("GC037", message, hint="leave it out with exclude, or choose for the whole call")
        return self._rows(nodes).first(node, str(site.key))

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """See `Seams.write`: rows go back to where they are in the model."""
        like, batch = change.like, self._rows(nodes)
        given = change.given if like is None else tuple(batch.home(node, like) for node in change.given)
        super().write(nodes, replace(change, given=given), put)

    def _rows(self, nodes: Nodes) -> Batch:
        if self._batch is None:
            self._batch = Batch(nodes.program, nodes.call)
        return self._batch

    def _one(self, nodes: Nodes, node: fx.Node) -> fx.Node:
        return nodes.call(aten.unsqueeze.default, node, 0, part="rows")


# --- how members become one -----------------------------------------------------------------------------------


def by_index(index: fx.Node) -> Mixing:
    """One member for each entry of ``index: int64[n]``: ``[n, ...]``."""

    def mix(nodes: Nodes, found: list[fx.Node]) -> fx.Node:
        stacked = nodes.call(aten.stack.default, found, 0, part="slots")
        return nodes.call(aten.index_select.default, stacked, 0, index, part="chosen")

    return mix


def active(index: fx.Node) -> Mixing:
    """The member of the single entry of ``index: int64[1]``."""
    choose = by_index(index)

    def mix(nodes: Nodes, found: list[fx.Node]) -> fx.Node:
        return nodes.call(aten.squeeze.dim, choose(nodes, found), 0, part="chosen")

    return mix


def by_weights(weights: fx.Node) -> Mixing:
    """A mixture of the members for each row of ``weights: [n, slots]``: ``[n, ...]``."""

    def mix(nodes: Nodes, found: list[fx.Node]) -> fx.Node:
        shape = [int(size) for size in found[0].meta["val"].shape]
        flat = [nodes.call(aten.flatten.using_ints, node, part="slots") for node in found]
        stacked = nodes.call(aten.stack.default, flat, 0, part="slots")
        mixed = nodes.call(aten.matmul.default, weights, stacked, part="mixture")
        return nodes.call(aten.view.default, mixed, [-1, *shape], part="mixture")

    return mix


def average(factors: Sequence[float]) -> Mixing:
    """The sum of the members, each times its factor."""

    def mix(nodes: Nodes, found: list[fx.Node]) -> fx.Node:
        terms = [nodes.call(aten.mul.Tensor, n, f, part="average") for n, f in zip(found, factors, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = nodes.call(aten.add.Tensor, total, term, part="average")
        return total

    return mix
