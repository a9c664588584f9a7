"""The initial values of the tensors that a compilation adds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills a float32 CPU tensor in place, drawing from the generator only."""


@dataclass(frozen=True)
class Initial:
    """The settings that determine the first values of tensors.

    Attributes:
        seed: the seed; an initial value depends on it and on the tensor's name, never on the order of creation.
        values: existing tensors by name, which are used instead of initial values.
        originals: weights of the base before the spec packed them, by name, for initialisers.
        narrow: names of adaptations whose tensors are stored in the element type that they are computed with. Tensors
            of other adaptations are at least float32 and graphs cast them, because steps that are small compared with a
            value are lost in 16 bits.
    """

    seed: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    originals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    narrow: Collection[str] = frozenset()


@dataclass(frozen=True)
class ParameterStart:
    """The initial state of a parameter.

    Attributes:
        shape: its sizes.
        init: a function that fills a float32 CPU tensor with its first values.
        dtype: the element type that it is stored in.
        trains: whether it trains.
    """

    shape: tuple[int, ...]
    init: Initialiser
    dtype: torch.dtype
    trains: bool
