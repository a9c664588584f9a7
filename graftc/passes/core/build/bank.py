"""Seams that build several adaptations of the same shape as one adaptation: banks and parameter averages.

A method requests its tensors as usual. Each tensor that it receives is computed from the corresponding tensors of all
members. It is either a single tensor of the requested shape for the whole call, so that nothing else differs, or it has
a leading axis with one entry for each row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import fx

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.nodes import Nodes, Seams
from graftc.passes.core.build.requests import Change, NewTensor, Reading
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.sites.uses import Dense
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
Mixing = Callable[[Nodes, list[fx.Node]], fx.Node]
"""A function that combines the members' tensors, all of the same shape, into one tensor."""


class Chosen(Seams):
    """Seams that build several adaptations of the same shape as one, choosing or mixing them for the whole call.

    Args:
        members: names of the adaptations, in the order of their slots.
        mixing: a function that computes one tensor from the members' tensors.
        share: names of the parts that all members share.
        slots: the number of slots if each parameter is one frozen tensor with a slice for each slot, the members' first
            and then zeros; None if every member has its own.
    """

    composed = True

    def __init__(
        self, members: Sequence[str], mixing: Mixing, share: Sequence[str] = (), slots: int | None = None
    ) -> None:
        self.mixing, self.share, self.slots = mixing, frozenset(share), slots
        self.parts: dict[str, dict[SiteKey | None, dict[str, str]]] = {name: {} for name in members}
        self.shared: set[str] = set()
        self._mixed: dict[tuple[fx.Node, ...], fx.Node] = {}

    def make(self, nodes: Nodes, new: NewTensor) -> Sequence[str]:
        """Create a parameter for each member; constants and shared parts are created once.

        Raises:
            GraftError: GC036 for state, which belongs to a single adaptation, and for a trained copy of a base tensor,
                because a base tensor can be replaced only once.
        """
        if new.kind == "state":
            raise self._refusal(nodes, f"it keeps state ({new.part})")
        if new.kind == "copy":
            raise self._refusal(nodes, f"it trains {new.base} itself")
        if new.kind == "constant" or new.part in self.share:
            return super().make(nodes, new)
        if self.slots is not None:
            with nodes.in_slots(tuple(self.parts), self.slots):
                return [new.create(False)]
        names: list[str] = []
        for member, parts in self.parts.items():
            with nodes.owned(member, parts):
                names += super().make(nodes, new)
        return names

    def mix(self, nodes: Nodes, new: NewTensor, names: Sequence[str]) -> fx.Node:
        """Return the node that mixes the members' tensors; constants and shared parts are not mixed."""
        if new.kind == "constant":
            return super().mix(nodes, new, names)
        if new.part in self.share:
            self.shared.add(new.part)
            return self._one(nodes, super().mix(nodes, new, names))
        tensors = []
        if self.slots is not None:
            tensors.append(super().mix(nodes, new, names))
        else:
            for name, (member, parts) in zip(names, self.parts.items(), strict=True):
                with nodes.owned(member, parts):
                    tensors.append(super().mix(nodes, new, [name]))
        key = tuple(tensors)
        if key not in self._mixed:
            self._mixed[key] = self.mixing(nodes, tensors)
        return self._mixed[key]

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """Change the model's values, except base tensors.

        Raises:
            GraftError: GC036 for a base tensor, which can be replaced only once.
        """
        if change.kind == "tensor":
            raise self._refusal(nodes, "it replaces a base tensor")
        super().write(nodes, change, put)

    def _one(self, nodes: Nodes, node: fx.Node) -> fx.Node:
        """Return a tensor that all members share, with the same axes as the mixed tensors."""
        return node

    def _refusal(self, nodes: Nodes, reason: str) -> GraftError:
        names = ", ".join(self.parts)
        hint = (
            "leave out the options that train more than the method's own tensors, or give each adaptation its own site"
        )
        return GraftError(
            "GC036",
            f"{nodes.method} cannot be used for the members {names} of {nodes.adaptation!r}: {reason}",
            hint=hint,
        )


class Rows(Chosen):
    """Seams that build several adaptations of the same shape as one, choosing or mixing them for each row of the batch.

    Every tensor that the method receives has a leading axis, whose size is the batch size or 1. Every value of the
    model that it receives has the batch axis first.
    """

    _batch: Batch | None = None

    def read(self, nodes: Nodes, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """Return a value of the model with the batch axis first.

        Raises:
            GraftError: GC037 if there is no batch axis, and for the inputs of convolutions, tables, experts and all
                other maps that are not `Dense`.
        """
        if kind == "input" and isinstance(site, LinearSite) and not isinstance(site.use, Dense):
            message = f"{site.key} is not a dense layer, so members cannot be chosen for each row of the batch"
            raise GraftError("GC037", message, hint="leave it out with exclude, or choose for the whole call")
        return self._rows(nodes).first(node, str(site.key))

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """Change the model's values, after moving the batch axis of the new values back to its original position."""
        like, batch = change.like, self._rows(nodes)
        given = change.given if like is None else tuple(batch.home(node, like) for node in change.given)
        super().write(nodes, replace(change, given=given), put)

    def _rows(self, nodes: Nodes) -> Batch:
        if self._batch is None:
            self._batch = Batch(nodes)
        return self._batch

    def _one(self, nodes: Nodes, node: fx.Node) -> fx.Node:
        return nodes.call(aten.unsqueeze.default, node, 0, part="rows")


# --- mixing functions -----------------------------------------------------------------------------------------


def by_index(index: fx.Node, *, stacked: bool = False) -> Mixing:
    """Return a mixing function that picks one member for each entry of ``index: int64[n]`` and returns ``[n, ...]``.

    With ``stacked``, it is given the members as a single tensor with a leading axis of slots; so are the following.
    """

    def mix(nodes: Nodes, results: list[fx.Node]) -> fx.Node:
        slots = results[0] if stacked else nodes.call(aten.stack.default, results, 0, part="slots")
        return nodes.call(aten.index_select.default, slots, 0, index, part="chosen")

    return mix


def active(index: fx.Node, *, stacked: bool = False) -> Mixing:
    """Return a mixing function that picks the member given by the single entry of ``index: int64[1]``."""
    choose = by_index(index, stacked=stacked)

    def mix(nodes: Nodes, results: list[fx.Node]) -> fx.Node:
        return nodes.call(aten.squeeze.dim, choose(nodes, results), 0, part="chosen")

    return mix


def by_weights(weights: fx.Node, *, stacked: bool = False) -> Mixing:
    """Return a mixing function that computes a weighted sum of the members for each row of ``weights: [n, slots]``."""

    def mix(nodes: Nodes, results: list[fx.Node]) -> fx.Node:
        shape = [int(size) for size in results[0].meta["val"].shape[int(stacked) :]]
        begin = (1,) if stacked else ()
        flat = [nodes.call(aten.flatten.using_ints, node, *begin, part="slots") for node in results]
        slots = flat[0] if stacked else nodes.call(aten.stack.default, flat, 0, part="slots")
        mixed = nodes.call(aten.matmul.default, weights, slots, part="mixture")
        return nodes.call(aten.view.default, mixed, [-1, *shape], part="mixture")

    return mix


def average(factors: Sequence[float]) -> Mixing:
    """Return a mixing function that sums the members, each scaled by its entry in ``factors``."""

    def mix(nodes: Nodes, results: list[fx.Node]) -> fx.Node:
        terms = [nodes.call(aten.mul.Tensor, n, f, part="average") for n, f in zip(results, factors, strict=True)]
        return reduce(partial(nodes.call, aten.add.Tensor, part="average"), terms)

    return mix
