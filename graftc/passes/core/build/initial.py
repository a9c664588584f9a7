"""The initial values of the tensors that a compilation adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
