"""Where the tensors that a compilation adds get their first values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Initial:
    """What the first values of tensors depend on.

    Attributes:
        seed: initial values depend on it and on a tensor's name, never on the order of creation.
        values: tensors that are there already, by name: they take the place of initial values.
        originals: weights of the base as they were before the spec packed them, by name, for initialisers.
        narrow: names of adaptations whose tensors are kept in the element type that they are computed with. Those of
            the others are at least float32, and graphs cast them: steps that are small beside a value are lost in 16
            bits.
    """

    seed: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    originals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    narrow: Collection[str] = frozenset()
