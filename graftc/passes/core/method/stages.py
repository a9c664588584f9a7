"""Stages: methods that take several trainings, and what each hands to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from graftc.specs.base import MethodSpec

S = TypeVar("S", bound=MethodSpec)


@dataclass(frozen=True)
class Advance(Generic[S]):
    """What the next training of an adaptation starts from.

    Attributes:
        spec: the adaptation as it is there.
        values: its tensors by their Store names; those that are missing start from their initial values.
        rewind: whether everything else that trains starts again from where the training that has ended started.
    """

    spec: S
    values: Mapping[str, Tensor]
    rewind: bool = False
