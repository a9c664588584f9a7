"""Pruning: weights train and most of them become zeros, by magnitude, by movement, or in rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.diagnostics import GraftError
from graftc.specs.target import Target
from graftc.specs.validation import reject

__all__ = ["Pruning", "PruningOverride"]

Variant = Literal["magnitude", "movement", "soft_movement", "iterative"]
_DENSE = frozenset({"magnitude", "movement", "iterative"})
_SCHEDULED = frozenset({"magnitude", "movement", "soft_movement"})
_SOFT, _ROUNDS = frozenset({"soft_movement"}), frozenset({"iterative"})
_FIELDS: dict[str, frozenset[str]] = {
    "density": _DENSE,
    "initial_density": frozenset({"magnitude"}),
    "allocation": _DENSE,
    "threshold": _SOFT,
    "initial_threshold": _SOFT,
    "penalty": _SOFT,
    "least_density": _SOFT,
    "warmup_steps": _SCHEDULED,
    "final_steps": _SCHEDULED,
    "total_steps": _SCHEDULED,
    "rounds": _ROUNDS,
    "fraction": _ROUNDS,
    "rewind": _ROUNDS,
    "stage": _ROUNDS,
}
"""The variants that each field is for."""


class PruningOverride(Override):
    """Other values of pruning for some of its sites; what is left out keeps the adaptation's value."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the entries of these sites that is kept in the end."""

    threshold: float | None = Field(default=None, ge=0, lt=1)
    """What sigmoids of scores have to exceed in the end at these sites."""


class Pruning(MethodSpec):
    """Pruning: `W' = W * M` trains, where `M` is 1 for entries that are kept and 0 for the others.

    `W` is a copy of the base's weight in its dtype, and `M` follows from scores, of which the largest are kept:

    - `magnitude`: the scores are `|W|` as it is now. An entry that is not kept has no gradient.
    - `movement`: scores `S` in float32 train beside `W`, from zeros. Their gradient goes straight through the choice,
      `dL/dS = dL/dW' * W` for all entries, kept or not: what moves away from zero gains, and may come back.
    - `soft_movement`: kept are entries with `sigmoid(S) > threshold`, and `penalty` times the mean of `sigmoid(S)` is
      added to the loss. How many are kept shows while training.
    - `iterative`: train, keep the largest of what is left, train on; `rounds` times. From the second training on, what
      is kept is all that trains, as `<tensor>_indices` and `<tensor>_values`, so that nothing an optimiser does can
      reach a zero.

    `density` is the share that is *kept*, not the sparsity: 0.15 leaves 15 of 100 entries. Of each matrix exactly the
    share is kept, rounded down, at least one; of equal scores the first ones. It falls from `initial_density` in a
    cubic curve after `warmup_steps` and is `density` for the last `final_steps`. No mask is stored: a threshold and the
    place of the last kept among equals say all of it, so that a resumed training goes on to the bit.

    Weights of maps train; embeddings, norms, biases and heads do not, and may be trained beside it. A training loop
    calls `compiled.begin(total_steps)` once, `compiled.extra_loss()` for the penalty, and `compiled.after_step()` after
    `optimizer.step()`; the Trainer takes `compiled.callback()`. The authors train scores with a rate of 1e-2 and the
    weights with 3e-5: put parameters whose name ends in `_scores` into a group of their own, without weight decay.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}), identity_at_init=True, folds=FoldKind.EXACT
    )
    paper: ClassVar[str] = (
        "Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning (arXiv:2005.07683); "
        "Frankle and Carbin 2019, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks "
        "(arXiv:1803.03635)"
    )

    method: Literal["pruning"] = "pruning"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which sites of the model to adapt; by default all linear maps inside layers. Other linear maps are pruned if a
    target names them; a head that produces the outputs never is."""

    variant: Variant = "movement"
    """What says which entries are kept."""

    density: float = Field(default=0.15, gt=0, le=1)
    """Share of the entries that is kept in the end."""

    initial_density: float = Field(default=1.0, gt=0, le=1)
    """Share that is kept at first, with `magnitude`; with another one than 1 the model is pruned before it trains."""

    allocation: Literal["per_tensor", "global"] = "per_tensor"
    """Whether the share is kept of each matrix, or of all together, where one may lose all its entries. All together
    takes memory for one more copy of the scores after each step."""

    threshold: float = Field(default=0.1, ge=0, lt=1)
    """What sigmoids of scores have to exceed in the end, with `soft_movement`."""

    initial_threshold: float = Field(default=0.0, ge=0, lt=0.5)
    """The same at first."""

    penalty: float = Field(default=400.0, ge=0)
    """Weight of the mean sigmoid of scores in the end, with `soft_movement`; it rises from 0 as the threshold does."""

    least_density: float = Field(default=0.005, ge=0, le=1)
    """Share of each matrix that is kept at the least, with `soft_movement`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the start that prune nothing further."""

    final_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the end for which the density is what it is in the end."""

    total_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole training run; by default the value given to `compiled.begin` or by the Trainer."""

    rounds: int = Field(default=5, ge=1)
    """How often `iterative` prunes; it takes a training more than that."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of what is left that each round prunes, in the place of `density`: `(1 - fraction) ** rounds` remains. By
    default each round prunes the same share, and `density` remains."""

    rewind: bool = False
    """Whether kept entries start each training with the base's values; otherwise they go on from where they are."""

    stage: int = Field(default=1, ge=1)
    """Which training of `iterative` this is, from 1; recipes count it."""

    overrides: Items[PruningOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        problems = [((field,), error) for field, error in self._misfits()]
        if problems:
            reject(self, *problems)
        return self

    def _misfits(self) -> Iterator[tuple[str, GraftError]]:
        for field, variants in _FIELDS.items():
            if self.variant in variants or getattr(self, field) == type(self).model_fields[field].default:
                continue
            if field == "initial_density" and self.variant == "movement":
                message, hint = "scores are equal at first, so movement cannot start from a part of the entries", None
            else:
                message = f"{field} means nothing to variant {self.variant}"
                hint = f"it is for {', '.join(sorted(variants))}"
            yield field, GraftError("GC002", message, hint=hint)
        for first, last, rises in (("initial_density", "density", False), ("initial_threshold", "threshold", True)):
            start, end = getattr(self, first), getattr(self, last)
            if (start > end) if rises else (start < end):
                yield first, GraftError("GC002", f"{first} {start} goes {'down' if rises else 'up'} to {last} {end}")
        if self.fraction is not None and self.density != type(self).model_fields["density"].default:
            hint = "leave one out"
            yield "fraction", GraftError("GC002", "fraction and density both say how much remains", hint=hint)
        if self.stage > self.rounds + 1:
            yield "stage", GraftError("GC002", f"rounds: {self.rounds} has {self.rounds + 1} stages")
        if self.allocation == "global" and self.overrides:
            yield "overrides", GraftError("GC002", "one density for all sites together leaves nothing to override")

    @property
    def scored(self) -> bool:
        """Whether scores train beside the weights."""
        return self.variant in ("movement", "soft_movement")

    def remaining(self, rounds: int) -> Fraction:
        """The share that is left after so many rounds of `iterative`. Numbers count as they are written."""
        if self.fraction is not None:
            return (1 - Fraction(str(self.fraction))) ** rounds
        end = Fraction(str(self.density))
        return end if rounds == self.rounds else Fraction(float(end) ** (rounds / self.rounds))


def kept_of(total: int, share: Fraction) -> int:
    """How many of ``total`` entries a share is: rounded down, at least one."""
    return max(1, math.floor(share * total))
