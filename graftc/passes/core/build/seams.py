"""The seams: the operations of the `Builder` that a composition of adaptations intercepts.

There are two pairs. A tensor of an adaptation is created through `Seams.make` and put into the graph by `Seams.mix`; a
value of the model is obtained from `Seams.read` and changed through `Seams.write`. Everything in between is written
once, for tensors with and without an axis of rows before their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import fx

from graftc.passes.core.sites.sites import Site

Window = Literal["visible", "masked"]
TensorKind = Literal["parameter", "state", "copy", "constant"]
"""A parameter of the method; state that is kept with them; a copy of a base tensor that stands in for it; what follows
from the base alone."""

Reading = Literal["input", "output", "branch", "value", "attended"]
"""What a linear map reads or gives, a value of a sublayer, what a layer reads or gives, what an attention reads."""

Writing = Literal["sum", "output", "input", "value", "tokens", "keys", "positions", "tensor"]
"""What is added to a value; what takes the place of a map's result or input, of what a layer reads or gives, or of the
vectors of virtual tokens; keys and values in front of an attention's; numbers of positions; base tensors."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor that an adaptation requests.

    Attributes:
        part: its name within the adaptation.
        kind: the kind of tensor.
        create: a function that puts the tensor into the Store under the name that it has in the adaptation being built,
            unless it is there already, and returns that name; the argument says whether a parameter trains.
        trainable: whether the method lets it train.
        base: the base tensor that it is a copy of.
        dtype: the element type that the method computes with; None for the one that it is stored in.
    """

    part: str
    kind: TensorKind
    create: Callable[[bool], str]
    trainable: bool = True
    base: str = ""
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Change:
    """A change of the model's values.

    Attributes:
        kind: the kind of value that is changed.
        given: the nodes that the adaptation has computed: one, keys and values, or none for ``positions``.
        like: the value whose axes these nodes have to get in the model; None if their axes need no change.
        source: a function that returns the value that a sum was computed from.
        place: the names of two values of a sublayer: the one that a sum is added to, and the one that it was computed
            from; None at a linear map.
        window: for keys, the window of `Attentions.attend`.
    """

    kind: Writing
    given: tuple[fx.Node, ...] = ()
    like: fx.Node | None = None
    source: Callable[[], fx.Node] | None = None
    place: tuple[str, str] | None = None
    window: Window = "visible"


class Casting(Protocol):
    """The operations that a single adaptation needs from the `Nodes` being built."""

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """Return the node that reads a tensor of the Store."""

    def cast(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """Return a tensor in the element type that the graph computes with."""


N = TypeVar("N", bound=Casting)


class Seams(Generic[N]):
    """The seams of a single adaptation: every tensor is one tensor, and every value is the model's own.

    A composition is a subclass. It may override these four methods and nothing else of the Builder.
    """

    composed: ClassVar[bool] = False
    """Whether several adaptations are built at once."""

    def make(self, nodes: N, new: NewTensor) -> Sequence[str]:
        """Create a tensor of the adaptation.

        Args:
            nodes: the `Nodes` of the adaptation that the tensor belongs to.
            new: the tensor.

        Returns:
            The Store names of the tensors that are created: one, or one for each member.
        """
        return [new.create(new.trainable)]

    def mix(self, nodes: N, new: NewTensor, names: Sequence[str]) -> fx.Node:
        """Return the node that the method gets for a tensor.

        Args:
            nodes: the `Nodes` that insert the calls that compute it.
            new: the tensor.
            names: the names that `make` returned.
        """
        (name,) = names
        return nodes.cast(nodes.attribute(name, new.part), new.dtype)

    def read(self, nodes: N, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """Return a value of the model in the form that the method gets.

        Args:
            nodes: the `Nodes` that insert the calls that compute it.
            node: the value in the model's own axes.
            kind: the kind of value.
            site: the site that the value belongs to.
        """
        return node

    def write(self, nodes: N, change: Change, put: Callable[..., None]) -> None:
        """Change values of the model.

        Args:
            nodes: the `Nodes` that insert the calls that this needs.
            change: the change to make.
            put: a function that makes the change; takes one node for each of those that are ``given``.
        """
        put(*change.given)
