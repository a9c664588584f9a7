"""Virtual tokens: what stands among the tokens of a text without being one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["VirtualRun", "Where"]

Where: TypeAlias = Literal["front", "after_bos", "suffix"] | int
"""Before all tokens of a row, behind its first, behind its last real one; or behind the first token of this id, and
behind the last real one in a row that has none."""


@dataclass(frozen=True)
class VirtualRun:
    """Some virtual tokens that stand together.

    Attributes:
        length: how many.
        where: their place in each row.
    """

    length: int
    where: Where
