"""The part of the `Builder` that works at residual branches, and at what layers read and give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.nodes import Part
from graftc.passes.core.build.seams import Change
from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.program import is_random, map_nodes, provenance
from graftc.passes.core.sites.sites import SublayerSite, ValueSite
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
AGAIN = "again"
"""The part of what is computed a second time."""


class Branches(Part):
    """Reads the values of a sublayer, and adds to them; replaces those that layers read and give."""

    def value(self, site: ValueSite) -> fx.Node:
        """A value now, with what has been inserted there so far."""
        return self._read(self._value(site), "value", site)

    def _value(self, site: ValueSite) -> fx.Node:
        return self.program.current(site.node)

    def set_value(self, site: ValueSite, node: fx.Node) -> None:
        """Put ``node``, made from `value` and of its sizes, in its place for everything that reads it: projections, the
        residual, and the outputs where the value is one of them."""
        before = self._value(site)
        change = Change("value", (node,), before)
        self._write(change, lambda after: self._redirect(before, after, lambda user: True))

    def at(self, site: SublayerSite, place: str) -> fx.Node:
        """A value of a sublayer now, with what has been inserted there so far.

        Args:
            site: the sublayer.
            place: one of its values, by the name that `SublayerSite` has for it.

        Raises:
            GraftError: GC017 where the sublayer has no such value.
        """
        return self._read(self._at(site, place), "branch", site)

    def _at(self, site: SublayerSite, place: str) -> fx.Node:
        node = getattr(site, place)
        if node is None:
            message = f"{site.key} ends in more than one map, so that it has no {place} activation"
            raise GraftError("GC017", message, hint="read or add at its branch, or leave it out with exclude")
        return self.program.current(node, str(site.key))

    def add_at(self, site: SublayerSite, place: str, delta: fx.Node, read: str) -> None:
        """Add ``delta`` to a value of a sublayer.

        Where ``delta`` was made from a value further down (the norm behind the sum), what lies between is computed a
        second time, with the result, and everything that read the value reads that instead.

        Args:
            site: the sublayer.
            place: which of its values.
            delta: of its sizes, or of the same in a batch that is folded into one axis.
            read: which of its values ``delta`` was made from.

        Raises:
            GraftError: GC017 where something random lies between, or where ``delta`` does not fit.
        """

        def source() -> fx.Node:
            return self.at(site, read)

        def put(own: fx.Node) -> None:
            self._add(site, place, own, read)

        self._write(Change("sum", (delta,), self._at(site, place), source, (place, read)), put)

    def _add(self, site: SublayerSite, place: str, delta: fx.Node, read: str) -> None:
        value, source = self._at(site, place), self._at(site, read)
        try:
            after = self.call(aten.add.Tensor, value, self._shaped(delta, value), part="add")
        except RuntimeError:
            message = f"the {read} and the {place} of {site.key} are laid out differently, as attention in windows is"
            raise GraftError("GC017", message, hint="read or add at its branch, or leave it out with exclude") from None
        between = _between(value, source, self.program.edits)
        if not between:
            self._redirect(value, after, lambda user: True)
            return
        again: dict[fx.Node, fx.Node] = {value: after}
        for node in between:
            if is_random(node):
                message = f"{node.name} draws random numbers between the {place} of {site.key} and what is read there"
                ours = provenance(node) is not None
                hint = "put the adaptation that drops behind this one in adapt" if ours else "add at its branch"
                raise GraftError("GC017", message, hint=hint)
            args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: again.get(n, n))
            again[node] = self.call(node.target, *args, part=AGAIN, **kwargs)
        # What reads the value on the way to ``delta`` goes on reading it; what comes here later starts from these.
        for before, now in again.items():
            if before is not source:
                self.program.edits.add(Edit(self.adaptation, str(site.key), before, now, narrow=True))
        self._redirect(source, again[source], lambda user: True)

    def _shaped(self, delta: fx.Node, value: fx.Node) -> fx.Node:
        """``delta`` with batch and sequence in one axis where ``value`` has them so."""
        have, want = delta.meta["val"], value.meta["val"]
        if have.dim() == want.dim():
            return delta
        if want.dim() == 2:
            return self.call(aten.view.default, delta, [-1, int(have.shape[-1])], part="rows")
        sizes: list[Any] = [self._size(value, axis) for axis in range(want.dim())]
        return self.call(aten.view.default, delta, sizes, part="rows")


def _between(start: fx.Node, end: fx.Node, edits: Edits) -> list[fx.Node]:
    """Nodes after ``start`` on its ways to ``end``, ``end`` included, in graph order; none where no way leads there.

    No way leads through what replaced a value that is not behind ``start``: a parallel branch whose adapter reads the
    sum of both is a branch of its own.
    """
    below, node = {start}, start
    while node < end:
        node = node.next
        tag = provenance(node)
        made = edits.origin(node)
        own = made is None or made.before in below or (tag is not None and tag["part"] == AGAIN)
        if own and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in below and node is not start and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(node for node in found if isinstance(node.meta.get("val"), Tensor | tuple | list))
