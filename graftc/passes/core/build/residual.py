"""The part of the `Builder` that changes residual branches, and the inputs and outputs of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.nodes import Nodes, size_of
from graftc.passes.core.build.requests import Change
from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.program import above, is_random, map_nodes, provenance
from graftc.passes.core.sites.sites import SublayerSite, ValueSite, unsupported
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
AGAIN = "again"
"""The part label of recomputed nodes."""


class Branches(Nodes):
    """Reads and adds to a sublayer's values, and replaces the inputs and outputs of layers."""

    def value(self, site: ValueSite) -> fx.Node:
        """Return the current value of a site, including everything inserted there so far."""
        return self._read(self.program.current(site.node), "value", site)

    def set_value(self, site: ValueSite, node: fx.Node) -> None:
        """Make all readers of a value read ``node``, which is computed from `value` and has the same shape.

        The readers include projections, the residual connection, and the graph's outputs if the value is one of them.
        """
        before = self.program.current(site.node)
        self._write(Change("value", (node,), before), lambda after: self._redirect(before, after, lambda user: True))

    def at(self, site: SublayerSite, place: str) -> fx.Node:
        """Return the current value at a place of a sublayer, including everything inserted there so far.

        Args:
            site: the sublayer.
            place: the name of one of its values in `SublayerSite`.

        Raises:
            GraftError: GC017 if the sublayer has no such value.
        """
        return self._read(self._at(site, place), "branch", site)

    def _at(self, site: SublayerSite, place: str) -> fx.Node:
        node = getattr(site, place)
        if node is None:
            reason = f"ends in more than one linear map, so it has no {place} activation"
            raise unsupported(site, reason, "read or add at its branch, or leave it out with exclude")
        return self.program.current(node, str(site.key))

    def add_at(self, site: SublayerSite, place: str, delta: fx.Node, read: str) -> None:
        """Add ``delta`` to a value of a sublayer.

        If ``delta`` was computed from a value further down (such as the norm after the sum), everything in between is
        recomputed from the result, and all readers of that value read the recomputed value instead.

        Args:
            site: the sublayer.
            place: the name of the value to add to.
            delta: the addend, of the same shape; one of the two may have batch and sequence folded into one axis.
            read: the name of the value from which ``delta`` was computed.

        Raises:
            GraftError: GC017 if an operator in between is random, or if ``delta`` does not have a matching shape.
        """
        change = Change("sum", (delta,), self._at(site, place), lambda: self.at(site, read), (place, read))
        self._write(change, lambda own: self._add_at(site, place, own, read))

    def _add_at(self, site: SublayerSite, place: str, delta: fx.Node, read: str) -> None:
        value, source = self._at(site, place), self._at(site, read)
        try:
            after = self.call(aten.add.Tensor, value, self._shaped(delta, value), part="add")
        except RuntimeError:
            message = f"the {read} and the {place} of {site.key} have different layouts, as in windowed attention"
            raise GraftError("GC017", message, hint="read or add at its branch, or leave it out with exclude") from None
        between = _between(value, source, self.program.edits)
        if not between:
            self._redirect(value, after, lambda user: True)
            return
        again: dict[fx.Node, fx.Node] = {value: after}
        for node in between:
            if is_random(node):
                message = f"{node.name} draws random numbers between the {place} and the {read} of {site.key}"
                ours = provenance(node) is not None
                hint = "put the adaptation with dropout after this one in adapt" if ours else "add at its branch"
                raise GraftError("GC017", message, hint=hint)
            args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: again.get(n, n))
            again[node] = self.call(node.target, *args, part=AGAIN, **kwargs)
        # Readers on the path to ``delta`` keep the old values; later insertions here start from the recomputed ones.
        for before, now in again.items():
            if before is not source:
                self.program.edits.add(Edit(self.adaptation, str(site.key), before, now, narrow=True))
        self._redirect(source, again[source], lambda user: True)

    def _shaped(self, delta: fx.Node, value: fx.Node) -> fx.Node:
        """Return ``delta`` with the batch and the sequence on one shared axis or on separate axes, as in ``value``."""
        have, want = delta.meta["val"], value.meta["val"]
        if have.dim() == want.dim():
            return delta
        if want.dim() == 2:
            return self.call(aten.view.default, delta, [-1, int(have.shape[-1])], part="rows")
        sizes: list[Any] = [size_of(self, value, axis) for axis in range(want.dim())]
        return self.call(aten.view.default, delta, sizes, part="rows")


def _between(start: fx.Node, end: fx.Node, edits: Edits) -> list[fx.Node]:
    """Return the nodes after ``start`` on the paths to ``end``, including ``end``, in graph order.

    The list is empty if there is no path. Paths do not go through the replacement of a value that is independent of
    ``start``: a parallel branch remains a separate branch even if its adapter reads the sum of both.
    """
    below, node = {start}, start
    while node < end:
        node = node.next
        tag = provenance(node)
        edit = edits.origin(node)
        own = edit is None or edit.before in below or (tag is not None and tag["part"] == AGAIN)
        if own and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    below.discard(start)
    between = above(below & {end}, sources=lambda node: below & {*node.all_input_nodes})
    return [node for node in between if isinstance(node.meta.get("val"), Tensor | tuple | list)]
