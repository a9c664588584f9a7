"""The initial values of the tensors that a compilation adds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftc.passes.core.weights.weight_slice import WeightSlice

Initialiser = Callable[[Tensor, torch.Generator], None]
"""A function that fills a float32 CPU tensor in place, drawing random values only from the generator."""


@dataclass(frozen=True, eq=False)
class Correction:
    """An update ``up @ down`` that starts as an approximation of what quantising took from rows of a weight.

    Attributes:
        owner: the adaptation.
        own: the rows.
        down, up: ``[..., rank, in]`` and ``[..., rows, rank]``.
    """

    owner: str
    own: WeightSlice
    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Initial:
    """The settings that determine the initial values of tensors.

    Attributes:
        seed: the seed. An initial value depends on the seed and the tensor's name, never on the order of creation.
        values: existing tensors, by name, that are used instead of new initial values.
        originals: the base weights, by name, as they were before the spec packed them; for use in initialisers.
        requantised: names of packed weights whose codes already are those that adaptations chose.
        corrections: the updates with which adaptations have started from a quantisation error.
        reduced: the original weights, by name, less the products that adaptations have subtracted from some of their
            rows so far to choose codes.
        narrow: names of adaptations whose tensors are stored in their compute dtype. Tensors of other adaptations are
            stored in at least float32 and cast in the graph, because in 16 bits, an update much smaller than the
            value is lost.
    """

    seed: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    originals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    narrow: Collection[str] = frozenset()
    requantised: frozenset[str] = frozenset()
    corrections: list[Correction] = field(default_factory=list, repr=False)
    reduced: dict[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ParameterStart:
    """The initial state of a parameter.

    Attributes:
        shape: its shape.
        init: a function that fills a float32 CPU tensor with the initial values.
        dtype: the dtype in which it is stored.
        trains: whether it is trained.
    """

    shape: tuple[int, ...]
    init: Initialiser
    dtype: torch.dtype
    trains: bool
