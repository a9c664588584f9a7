"""Builders for adaptations of one shape of which one, or a mixture, is computed: banks and averages of parameters.

A method asks for its tensors as ever. What it gets is made from the tensors of all members: for the whole call a tensor
of the shape that it asked for, so that nothing else is different; or one tensor for each row of the batch, which leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import LinearSite, SiteKey, SublayerSite, ValueSite
from graftc.passes.core.sites.uses import Dense
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
T = TypeVar("T")
Mixing = Callable[["ChosenBuilder", list[fx.Node]], fx.Node]
"""Makes one tensor of those of all members, all of one shape."""


class ChosenBuilder(Builder):
    """Builds one adaptation from several of one shape: for the whole call.

    Args:
        members: names of the adaptations, in the order of their slots.
        share: parts of which there is one for all.
        mixing: makes one tensor from those of the members.
    """

    composed = True

    def __init__(
        self, *args: Any, members: Sequence[str], share: Sequence[str] = (), mixing: Mixing | None = None
    ) -> None:
        super().__init__(*args)
        self.members, self.share, self.mixing = tuple(members), frozenset(share), mixing
        self.member_parts: dict[str, dict[SiteKey | None, dict[str, str]]] = {name: {} for name in members}
        self.shared: set[str] = set()
        self._mixed: dict[tuple[fx.Node, ...], fx.Node] = {}

    @contextmanager
    def _as(self, member: str) -> Iterator[None]:
        """Tensors that are made inside belong to a member."""
        previous = self.adaptation, self.parts
        self.adaptation, self.parts = member, self.member_parts[member]
        try:
            yield
        finally:
            self.adaptation, self.parts = previous

    def _each(self, part: str, make: Callable[[], fx.Node]) -> fx.Node:
        if part in self.share:
            self.shared.add(part)
            return self._one(make())
        found = []
        for member in self.members:
            with self._as(member):
                found.append(make())
        key = tuple(found)
        if key not in self._mixed:
            assert self.mixing is not None
            self._mixed[key] = self.mixing(self, found)
        return self._mixed[key]

    def _one(self, node: fx.Node) -> fx.Node:
        """A tensor that all rows have."""
        return node

    def parameter(
        self,
        part: str,
        shape: tuple[int, ...],
        init: Initialiser,
        *,
        dtype: torch.dtype,
        trainable: bool = True,
    ) -> fx.Node:
        """See `TensorBuilder.parameter`: one for each member."""
        make = super().parameter
        return self._each(part, lambda: make(part, shape, init, dtype=dtype, trainable=trainable))

    def trained(self, part: str, value: Callable[[], Tensor]) -> fx.Node:
        """See `TensorBuilder.trained`: one for each member."""
        make = super().trained
        return self._each(part, lambda: make(part, value))

    def state(self, part: str, value: Callable[[torch.device], Tensor]) -> fx.Node:
        """State of the composition itself, kept with the parameters."""
        return self.attribute(super().keep_buffer(part, value), part)

    def keep_buffer(self, part: str, value: Callable[[torch.device], Tensor]) -> str:
        """State belongs to one adaptation alone.

        Raises:
            GraftError: GC036.
        """
        raise self._refusal(f"it keeps state ({part})")

    def trained_rows(self, own: WeightSlice) -> fx.Node:
        """A trained copy of a base tensor can stand in for it once only.

        Raises:
            GraftError: GC036.
        """
        raise self._refusal(f"it trains {own.tensor} itself")

    def _refusal(self, reason: str) -> GraftError:
        names = ", ".join(self.members)
        hint = "leave out what trains beside the method's own tensors, or give each its own place"
        return GraftError(
            "GC036", f"{self.method} cannot be one of {names} in {self.adaptation!r}: {reason}", hint=hint
        )


class RowsBuilder(ChosenBuilder):
    """Builds one adaptation from several of one shape: for each row of the batch.

    Every tensor of the method has the batch, or 1, as an axis before its own, and every value of the model is given
    with the rows of the batch first.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batch = Batch(self.program, self.call)

    def _one(self, node: fx.Node) -> fx.Node:
        return self.call(aten.unsqueeze.default, node, 0, part="rows")

    # --- sublayers ----------------------------------------------------------------------------------------

    def at(self, site: SublayerSite, place: str) -> fx.Node:
        """See `BranchBuilder.at`."""
        return self.batch.first(super().at(site, place), str(site.key))

    def value(self, site: ValueSite) -> fx.Node:
        """See `BranchBuilder.value`."""
        return self.batch.first(super().value(site), str(site.key))

    def set_value(self, site: ValueSite, node: fx.Node) -> None:
        """See `BranchBuilder.set_value`."""
        super().set_value(site, self.batch.home(node, self._value(site)))

    def look_up(self, table: fx.Node, index: fx.Node, part: str = "") -> fx.Node:
        """See `BranchBuilder.look_up`: ``table`` is ``[rows, entries, width]``, ``index`` has the rows first."""
        rows, entries = table.meta["val"].shape[:2]
        if not isinstance(expression(rows), int):
            ones = self.call(aten.ones_like.default, self.call(aten.slice.Tensor, index, 1, 0, 1, part=part), part=part)
            before = self.call(aten.sub.Tensor, self.call(aten.cumsum.default, ones, 0, part=part), 1, part=part)
            skipped = self.call(aten.mul.Tensor, before, int(entries), part=part)
            index = self.call(aten.add.Tensor, index, skipped, part=part)
        return super().look_up(self.call(aten.flatten.using_ints, table, 0, 1, part=part), index, part)

    def _shaped(self, delta: fx.Node, value: fx.Node) -> fx.Node:
        return super()._shaped(self.batch.home(delta, value), value)

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, part: str = "") -> fx.Node:
        """See `BranchBuilder.linear`."""
        result = self._product(x, weight, part)
        return result if bias is None else self.call(aten.add.Tensor, result, self.along(bias, result), part=part)

    def along(self, vector: fx.Node, x: fx.Node) -> fx.Node:
        """See `BranchBuilder.along`: ``vector`` is ``[rows, width]``."""
        for _ in range(x.meta["val"].dim() - vector.meta["val"].dim()):
            vector = self.call(aten.unsqueeze.default, vector, 1, part="rows")
        return vector

    def _product(self, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """``weight: [rows, out, in]`` applied to ``x: [rows, ..., in]``."""
        across = self.call(aten.transpose.int, weight, -1, -2, part=part)
        dims = x.meta["val"].dim()
        if dims == 2:
            x = self.call(aten.unsqueeze.default, x, 1, part=part)
        for _ in range(dims - 3):
            across = self.call(aten.unsqueeze.default, across, 1, part=part)
        result = self.call(aten.matmul.default, x, across, part=part)
        return self.call(aten.squeeze.dim, result, 1, part=part) if dims == 2 else result

    # --- linear maps --------------------------------------------------------------------------------------

    def input(self, site: LinearSite) -> fx.Node:
        """See `Builder.input`.

        Raises:
            GraftError: GC037 for convolutions, tables and experts.
        """
        if not isinstance(site.use, Dense):
            message = f"{site.key} is no product with a matrix that stands behind its input"
            raise GraftError("GC037", message, hint="leave it out with exclude, or choose for the whole call")
        return self.batch.first(super().input(site), str(site.key))

    def output(self, site: LinearSite) -> fx.Node:
        """See `Builder.output`."""
        return self.batch.first(super().output(site), str(site.key))

    def set_output(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        """See `Builder.set_output`."""
        super().set_output(site, self.batch.home(own, site.use.output), part)

    def add(self, site: LinearSite, delta: fx.Node, part: str = "add") -> None:
        """See `Builder.add`."""
        value = self.output(site)
        self.set_output(site, self.call(aten.add.Tensor, value, self.along(delta, value), part=part))

    def map(self, site: LinearSite, x: fx.Node, weight: fx.Node, part: str = "map") -> fx.Node:
        """See `Builder.map`; a weight of two axes is the base's own."""
        if weight.meta["val"].dim() == 2:
            return super().map(site, x, weight, part)
        return self._product(x, weight, part)

    def low_rank(self, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1) -> fx.Node:
        """See `Builder.low_rank`."""
        hidden = self._product(x, a, "down")
        if scale != 1:
            hidden = self.call(aten.mul.Tensor, hidden, scale, part="scale")
        return self._product(hidden, b, "up")

    def per_row(self, site: LinearSite, value: fx.Node) -> fx.Node:
        """See `Builder.per_row`."""
        return self.along(value, self.output(site)) if value.meta["val"].dim() > 1 else value

    def set_input(self, site: LinearSite, node: fx.Node) -> None:
        """See `Builder.set_input`."""
        super().set_input(site, self.batch.home(node, self._read(site)))


# --- how members become one -----------------------------------------------------------------------------------


def by_index(index: fx.Node) -> Mixing:
    """One member for each entry of ``index: int64[n]``: ``[n, ...]``."""

    def mix(build: ChosenBuilder, nodes: list[fx.Node]) -> fx.Node:
        stacked = build.call(aten.stack.default, nodes, 0, part="slots")
        return build.call(aten.index_select.default, stacked, 0, index, part="chosen")

    return mix


def active(index: fx.Node) -> Mixing:
    """The member of the single entry of ``index: int64[1]``."""
    choose = by_index(index)

    def mix(build: ChosenBuilder, nodes: list[fx.Node]) -> fx.Node:
        return build.call(aten.squeeze.dim, choose(build, nodes), 0, part="chosen")

    return mix


def by_weights(weights: fx.Node) -> Mixing:
    """A mixture of the members for each row of ``weights: [n, slots]``: ``[n, ...]``."""

    def mix(build: ChosenBuilder, nodes: list[fx.Node]) -> fx.Node:
        shape = [int(size) for size in nodes[0].meta["val"].shape]
        flat = [build.call(aten.flatten.using_ints, node, part="slots") for node in nodes]
        stacked = build.call(aten.stack.default, flat, 0, part="slots")
        mixed = build.call(aten.matmul.default, weights, stacked, part="mixture")
        return build.call(aten.view.default, mixed, [-1, *shape], part="mixture")

    return mix


def average(factors: Sequence[float]) -> Mixing:
    """The sum of the members, each times its factor."""

    def mix(build: ChosenBuilder, nodes: list[fx.Node]) -> fx.Node:
        terms = [build.call(aten.mul.Tensor, n, f, part="average") for n, f in zip(nodes, factors, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = build.call(aten.add.Tensor, total, term, part="average")
        return total

    return mix
