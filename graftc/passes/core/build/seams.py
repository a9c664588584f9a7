"""What a composition of adaptations intercepts of the `Builder`: its seams.

There are two. A tensor of an adaptation comes into being through `Seams.make` and is put into the graph by
`Seams.mix`; a value of the model is taken by `Seams.read` and changed through `Seams.write`. All that lies between is
written once, for tensors with and without an axis of rows before their own.
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
    """A tensor that an adaptation asks for.

    Attributes:
        part: its name within the adaptation.
        kind: what it is.
        create: puts it into the Store under the name that it has in the adaptation built now, unless it is there
            already, and returns that name; its argument says whether a parameter trains.
        trainable: whether the method lets it train.
        base: the base tensor that it is a copy of.
        dtype: element type that the method computes with; None for the one that it is kept in.
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
        kind: of what.
        given: what the adaptation has made: one node, keys and values, or none for ``positions``.
        like: the value whose axes they have in the model; None where they need no way there.
        source: gives the value that a sum was made from.
        place: which value of a sublayer a sum is for, and which one it was made from; None at a linear map.
        window: of keys, see `Attentions.attend`.
    """

    kind: Writing
    given: tuple[fx.Node, ...] = ()
    like: fx.Node | None = None
    source: Callable[[], fx.Node] | None = None
    place: tuple[str, str] | None = None
    window: Window = "visible"


class Casting(Protocol):
    """What a single adaptation needs of the `Nodes` that are built."""

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """The node that reads a tensor of the Store."""

    def cast(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """A tensor in the element type that the graph computes with."""


N = TypeVar("N", bound=Casting)


class Seams(Generic[N]):
    """The seams of a single adaptation: every tensor is one tensor, and every value is the model's own.

    A composition is a subclass. It may replace these four functions and nothing else of the Builder.
    """

    composed: ClassVar[bool] = False
    """Whether several adaptations are built at once."""

    def make(self, nodes: N, new: NewTensor) -> Sequence[str]:
        """Let a tensor of the adaptation come into being.

        Args:
            nodes: say whose tensor it is.
            new: the tensor.

        Returns:
            The Store names of what it becomes: one, or one for each member.
        """
        return [new.create(new.trainable)]

    def mix(self, nodes: N, new: NewTensor, names: Sequence[str]) -> fx.Node:
        """The node that the method gets for a tensor.

        Args:
            nodes: insert what it is made of.
            new: the tensor.
            names: what `make` returned.
        """
        (name,) = names
        return nodes.cast(nodes.attribute(name, new.part), new.dtype)

    def read(self, nodes: N, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """A value of the model as the method gets it.

        Args:
            nodes: insert what it is made of.
            node: the value in the model's own axes.
            kind: what it is.
            site: whose.
        """
        return node

    def write(self, nodes: N, change: Change, put: Callable[..., None]) -> None:
        """Change values of the model.

        Args:
            nodes: insert what it takes.
            change: what is to be changed.
            put: does so, with nodes in the places of those that are ``given``.
        """
        put(*change.given)
