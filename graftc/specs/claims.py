"""The claims of a method about itself. The contract tests check each claim; listing methods needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Claims", "FoldKind", "SiteKind"]


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
class Claims:
    """The claims of one method.

    Attributes:
        sites: the kinds of site that it can adapt; never empty.
        identity_at_init: whether the adapted model computes exactly what the base computes before training.
        folds: whether and how it folds.
        bankable: whether several adaptations of one shape can share a bank. Default False.
        inert: names of tensor parts that legitimately have no gradient at first, or patterns of them (``*_gate``).
            Default none.
        up: names of the parts that are the factor next to the output in a low-rank product ``B A``, to which LoRA+
            (Hayou et al. 2024) gives a larger learning rate. Default none.
        undecayed: names of parts, or patterns of them, that have two axes or more although they are gates, scores or
            biases, so that weight decay does not apply to them, as for vectors. Default none.

    Raises:
        ValueError: if ``sites`` is empty.
    """

    sites: frozenset[SiteKind]
    identity_at_init: bool
    folds: FoldKind
    bankable: bool = False
    inert: frozenset[str] = field(default_factory=frozenset)
    up: frozenset[str] = field(default_factory=frozenset)
    undecayed: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", frozenset(SiteKind(s) for s in self.sites))
        object.__setattr__(self, "folds", FoldKind(self.folds))
        for name in ("inert", "up", "undecayed"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        if not self.sites:
            raise ValueError("a method claims at least one kind of site")
