"""The claims of a method about itself. The contract tests check each claim; listing methods needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from graftc.specs.records.record import Listed, Record


class SiteKind(StrEnum):
    """The kinds of site, one per typed view in ``graftc.passes``."""

    LINEAR = "linear"
    ATTENTION = "attention"
    SUBLAYER = "sublayer"
    EMBEDDING = "embedding"
    NORM = "norm"
    EXPERTS = "experts"
    VALUE = "value"
    PARAMETER = "parameter"


class FoldKind(StrEnum):
    """How an adaptation disappears into base weights: the same function, or not at all."""

    EXACT = "exact"
    NONE = "none"


@dataclass(frozen=True)
class Claims(Record, unstated=("up", "undecayed")):
    """The claims of a method about itself, which the contract tests check.

    Raises:
        ValueError: if ``sites`` is empty.
    """

    sites: Annotated[frozenset[SiteKind], Listed()]
    """The kinds of site that it can adapt."""

    identity_at_init: bool
    """Whether the adapted model computes exactly what the base computes before training."""

    folds: FoldKind
    """Whether and how it folds into base weights."""

    bankable: bool = False
    """Whether several adaptations of one shape can share a bank."""

    inert: Annotated[frozenset[str], Listed()] = frozenset()
    """Parts that legitimately get no gradient at first."""

    up: frozenset[str] = frozenset()
    """Names of the parts that are the factor next to the output in a low-rank product ``B A``, to which LoRA+ (Hayou et
    al. 2024) gives a larger learning rate."""

    undecayed: frozenset[str] = frozenset()
    """Names of parts, or patterns of them, that have two axes or more although they are gates, scores or biases, so
    that weight decay does not apply to them, as for vectors."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", frozenset(SiteKind(s) for s in self.sites))
        object.__setattr__(self, "folds", FoldKind(self.folds))
        for name in ("inert", "up", "undecayed"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        if not self.sites:
            raise ValueError("a method claims at least one kind of site")


@dataclass(frozen=True)
class MethodInfo(Record, published="MethodData"):
    """One method."""

    tag: str
    """The value of `method` in a spec."""

    summary: str
    """One sentence."""

    paper: str
    """The papers to cite, separated by `; `; empty where there is none."""

    claims: Claims
    """Its claims."""

    module: str
    """The module that defines its spec; a plugin's lies outside of graftc."""
