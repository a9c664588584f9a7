"""Base classes for specs of methods that train some entries of tensors."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar, Self

from pydantic import Field, model_validator

from graftc.specs.base import MethodSpec
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Target


def share(density: float, total: int) -> int:
    """Return a share of ``total``, rounded down. The density counts as it is written: 0.07 of 100 is 7."""
    return math.floor(Fraction(str(density)) * total)


class BudgetSpec(MethodSpec):
    """Base of methods that train a given number of entries of the base's tensors."""

    def budget(self, total: int) -> int:
        """Return how many of ``total`` entries are trained."""
        raise NotImplementedError

    @property
    def budget_field(self) -> str:
        """The name of the field that sets the budget."""
        return "density"


class SelectionSpec(BudgetSpec):
    """Base of methods whose budget is a share or a number."""

    usual_density: ClassVar[float]
    """The share of entries if the spec gives neither a share nor a number."""

    target: Target = Target(modules="**")
    """The sites of the model to adapt; by default all except a head that produces the outputs."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the target's entries that train, rounded down."""

    entries: int | None = Field(default=None, ge=1)
    """Number of entries that train, instead of a share."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.density is not None and self.entries is not None:
            refuse("entries", "density and entries both set the number of entries", hint="remove one of them")
        return self

    def budget(self, total: int) -> int:
        """Return `entries`, or the share `density` of the total, by default `usual_density`."""
        if self.entries is not None:
            return self.entries
        return share(self.density if self.density is not None else self.usual_density, total)

    @property
    def budget_field(self) -> str:
        """The field that sets the budget: `entries` if it is set, otherwise `density`."""
        return "entries" if self.entries is not None else "density"


class StagedSpec(SelectionSpec):
    """Base of methods that take several training runs."""

    stage: int = Field(default=1, ge=1)
    """The number of this training run, from 1; recipes count it."""
