"""The Builder, the only class that changes a graph.

It inserts nodes where their arguments are available, creates tensors with an initialiser, keeps ``meta["val"]``
correct, tags every node with its provenance, and records each replacement so that folding can undo it. Its parts do the
work; the operations that compositions intercept are its `Seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from torch import fx

from graftc.passes.core.build.attention import Attentions
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.build.linear_maps import LinearMaps
from graftc.passes.core.build.masks import Masks
from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.build.operations import DropoutScope, Operations
from graftc.passes.core.build.residual import Branches
from graftc.passes.core.build.seams import Seams
from graftc.passes.core.build.tensors import Initialiser, ParameterStart, Tensors
from graftc.passes.core.build.virtual_tokens import Virtual
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import Site, SiteKey
from graftc.passes.core.weights.store import Store

__all__ = ["Builder", "DropoutScope", "Initialiser"]

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class _Forwarded(Generic[P, R]):
    """A descriptor that makes a method of a part available on the Builder.

    Args:
        method: the method as the part's class defines it.
    """

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self.method = method
        self.__doc__ = method.__doc__
        self._part, _, self._name = method.__qualname__.partition(".")

    @overload
    def __get__(self, build: None, owner: type[Builder]) -> Callable[Concatenate[Any, P], R]: ...

    @overload
    def __get__(self, build: Builder, owner: type[Builder]) -> Callable[P, R]: ...

    def __get__(self, build: Builder | None, owner: type[Builder]) -> Callable[Concatenate[Any, P], R] | Callable[P, R]:
        if build is None:  # for help(), which then shows the arguments
            return self.method
        bound: Callable[P, R] = getattr(build.part_of[self._part], self._name)
        return bound


class Builder:
    """Builds one adaptation into one Program.

    Args:
        program: the Program, changed in place.
        store: the Store that new tensors are added to; an existing one is reused, so that Programs share tensors.
        adaptation: the adaptation's name.
        method: its method's tag.
        initial: the source of the values of new tensors.
        seams: the composition of the adaptation with others; by default there is none.
        within: the builder of the composing adaptation, if any.

    Attributes:
        part_of: its parts, by the names of their classes.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        adaptation: str,
        method: str,
        initial: Initial | None = None,
        *,
        seams: Seams[Nodes] | None = None,
        within: Builder | None = None,
    ) -> None:
        inside: Nodes | None = within.nodes if within is not None else None
        self.initial = Initial() if initial is None else initial
        nodes = Nodes(program, store, adaptation, method, self.initial, seams, inside)
        self.nodes: Nodes = nodes
        self.program, self.store, self.method = program, store, method
        self.seed, self.values = self.initial.seed, self.initial.values
        tensors, operations, branches, masks = Tensors(nodes), Operations(nodes), Branches(nodes), Masks(nodes)
        parts = (
            nodes,
            tensors,
            operations,
            LinearMaps(nodes, tensors, operations),
            branches,
            Attentions(nodes, masks),
            Virtual(nodes, tensors, branches),
        )
        self.part_of: Mapping[str, Any] = {type(part).__name__: part for part in parts}

    def within(self, seams: Seams[Nodes], adaptation: str, method: str) -> Builder:
        """Return a builder of an adaptation that this one composes.

        If it has the same name as this one's adaptation, both record their tensors together.
        """
        builder = Builder(self.program, self.store, adaptation, method, self.initial, seams=seams, within=self)
        if adaptation == self.adaptation:
            builder.nodes.parts = self.parts
        return builder

    @property
    def adaptation(self) -> str:
        """The adaptation whose tensors are being created."""
        return self.nodes.adaptation

    @property
    def parts(self) -> dict[SiteKey | None, dict[str, str]]:
        """The adaptation's tensors, by site and part; those that all sites share are under None."""
        return self.nodes.parts

    @property
    def starts(self) -> dict[str, ParameterStart]:
        """The initial states of the parameters that were created here, by name."""
        return self.nodes.starts

    @property
    def composed(self) -> bool:
        """Whether several adaptations are built at once."""
        return self.nodes.seams.composed

    @property
    def site(self) -> Site:
        """The current site, which new nodes belong to."""
        assert self.nodes.current is not None
        return self.nodes.current

    @property
    def without_values(self) -> bool:
        """Whether the base is on the meta device, where tensors have sizes but no values."""
        return self.store.device().type == "meta"

    def call(self, target: Any, *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Insert a call after the latest of its arguments and return its node.

        Args:
            target: the operator to call.
            args, kwargs: its arguments: nodes and literals.
            part: a readable label of the node within the adaptation (for example ``"down"``).
        """
        return self.nodes.call(target, *args, part=part, **kwargs)

    on = _Forwarded(Nodes.on)
    attribute = _Forwarded(Nodes.attribute)
    fake = _Forwarded(Nodes.fake)
    cast = _Forwarded(Nodes.cast)

    parameter = _Forwarded(Tensors.parameter)
    begin = _Forwarded(Tensors.begin)
    trained = _Forwarded(Tensors.trained)
    constant = _Forwarded(Tensors.constant)
    numbers = _Forwarded(Tensors.numbers)
    buffer = _Forwarded(Tensors.buffer)
    keep_buffer = _Forwarded(Tensors.keep_buffer)
    settled = _Forwarded(Tensors.settled)
    drawn = _Forwarded(Tensors.drawn)
    overlay = _Forwarded(Tensors.overlay)
    trained_rows = _Forwarded(Tensors.trained_rows)
    instead = _Forwarded(Tensors.instead)
    stand_in = _Forwarded(Tensors.stand_in)
    known = _Forwarded(Tensors.known)
    held = _Forwarded(Tensors.held)
    tensors = _Forwarded(Tensors.tensors)
    every = _Forwarded(Tensors.every)
    read_weight = _Forwarded(Tensors.read_weight)
    read_original = _Forwarded(Tensors.read_original)
    generator = _Forwarded(Tensors.generator)

    linear = _Forwarded(Operations.linear)
    along = _Forwarded(Operations.along)
    look_up = _Forwarded(Operations.look_up)
    layer_norm = _Forwarded(Operations.layer_norm)
    dropout = _Forwarded(Operations.dropout)

    input = _Forwarded(LinearMaps.input)
    output = _Forwarded(LinearMaps.output)
    weight = _Forwarded(LinearMaps.weight)
    bias = _Forwarded(LinearMaps.bias)
    offset = _Forwarded(LinearMaps.offset)
    is_overlaid = _Forwarded(LinearMaps.is_overlaid)
    map = _Forwarded(LinearMaps.map)
    low_rank = _Forwarded(LinearMaps.low_rank)
    per_row = _Forwarded(LinearMaps.per_row)
    add = _Forwarded(LinearMaps.add)
    set_output = _Forwarded(LinearMaps.set_output)
    set_input = _Forwarded(LinearMaps.set_input)
    scale_input = _Forwarded(LinearMaps.scale_input)

    at = _Forwarded(Branches.at)
    add_at = _Forwarded(Branches.add_at)
    value = _Forwarded(Branches.value)
    set_value = _Forwarded(Branches.set_value)

    attended = _Forwarded(Attentions.attended)
    attend = _Forwarded(Attentions.attend)
    batched = _Forwarded(Attentions.batched)
    shift = _Forwarded(Attentions.shift)

    virtual = _Forwarded(Virtual.virtual)
    fill = _Forwarded(Virtual.fill)
    hold = _Forwarded(Virtual.hold)
    vocabulary = _Forwarded(Virtual.vocabulary)
    embedded = _Forwarded(Virtual.embedded)
