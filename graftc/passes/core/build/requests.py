"""Requests that pass the seams of the `Builder`: new tensors, and changes of the model's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

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
