"""Requests that pass through the `Builder`'s seams: new tensors, and changes to the model's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

Window = Literal["visible", "masked"]
TensorKind = Literal["parameter", "state", "copy", "constant"]
"""A parameter of the method; state that is saved with the parameters; a trained copy that replaces a base tensor; a
constant determined by the base alone."""

Reading = Literal["input", "output", "branch", "value", "attended"]
"""A linear map's input or output; a value of a sublayer; a layer's input or output; an attention layer's input."""

Writing = Literal["sum", "output", "input", "value", "tokens", "keys", "positions", "tensor"]
"""A term added to a value; a replacement for a map's output or input, for a layer's input or output, or for the vectors
of virtual tokens; keys and values before an attention layer's own; position ids; a replacement for a base tensor."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor that an adaptation requests.

    Attributes:
        part: its name within the adaptation.
        kind: the kind of tensor.
        create: a function that adds the tensor to the Store, unless it already exists, under its name in the adaptation
            being built, and returns that name. The argument is whether the tensor, if it is a parameter, is trained.
        trainable: whether the method trains it.
        base: the base tensor of which it is a copy.
        dtype: the dtype that the method computes with; None for the stored dtype.
    """

    part: str
    kind: TensorKind
    create: Callable[[bool], str]
    trainable: bool = True
    base: str = ""
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Change:
    """A change to the model's values.

    Attributes:
        kind: the kind of value that is changed.
        given: the nodes that the adaptation has computed: two for ``keys`` (keys and values), none for ``positions``,
            otherwise one.
        like: the value whose axis order these nodes must have in the model; None if they need no change.
        source: a function that returns the value from which an addend was computed.
        place: the names of two values of a sublayer: the one that an addend is added to, and the one that it was
            computed from; None at a linear map.
        window: for ``keys``, the ``window`` argument of `Attentions.attend`.
    """

    kind: Writing
    given: tuple[fx.Node, ...] = ()
    like: fx.Node | None = None
    source: Callable[[], fx.Node] | None = None
    place: tuple[str, str] | None = None
    window: Window = "visible"
