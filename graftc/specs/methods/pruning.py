"""Pruning: training weights of which most become zero, by magnitude, by movement, or in rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.spec_errors import reject
from graftc.specs.target import Target

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
"""The variants that each field applies to."""


class PruningOverride(Override):
    """Other values of pruning for some of its sites; omitted fields keep the adaptation's value."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Final share of the entries of these sites that is kept."""

    threshold: float | None = Field(default=None, ge=0, lt=1)
    """Final value that sigmoids of scores must exceed at these sites."""


class Pruning(MethodSpec):
    """Pruning: trains `W' = W * M`, where `M` is 1 for entries that are kept and 0 for the others.

    `W` is a copy of the base's weight, used in its dtype, and `M` keeps the entries with the largest scores:

    - `magnitude`: the scores are the current `|W|`. Entries that are not kept have no gradient.
    - `movement`: scores `S` in float32 train along with `W`, starting from zeros. Their gradient is a straight-through
      estimate, `dL/dS = dL/dW' * W` for all entries, kept or not: entries that move away from zero gain, and may come
      back.
    - `soft_movement`: entries with `sigmoid(S) > threshold` are kept, and `penalty` times the mean of `sigmoid(S)` is
      added to the loss. The number of entries kept emerges during training.
    - `iterative`: train, keep the largest of the remaining entries, continue training; `rounds` times. From the second
      training run on, only the kept entries train, as `<tensor>_indices` and `<tensor>_values`, so the optimiser cannot
      affect a zero.

    `density` is the share that is *kept*, not the sparsity: 0.15 leaves 15 of 100 entries. In each matrix exactly this
    share is kept, rounded down, but at least one entry; in case of equal scores the first ones. It falls from
    `initial_density` along a cubic curve after `warmup_steps` and equals `density` for the last `final_steps`. No mask
    is stored: a threshold and the position of the last kept entry among ties determine it completely, so training
    resumes bit for bit.

    The weights of linear maps train; embeddings, norms, biases and heads do not, and may be trained in addition. A
    training loop calls `compiled.begin(total_steps)` once, `compiled.extra_loss()` for the penalty, and
    `compiled.after_step()` after `optimizer.step()`; the Trainer takes `compiled.callback()`. The authors train scores
    with a learning rate of 1e-2 and the weights with 3e-5: put parameters whose name ends in `_scores` into a separate
    group without weight decay.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        undecayed=frozenset({"*_scores"}),
    )
    paper: ClassVar[str] = (
        "Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning (arXiv:2005.07683); "
        "Frankle and Carbin 2019, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks "
        "(arXiv:1803.03635)"
    )

    method: Literal["pruning"] = "pruning"
    """The method's tag."""

    target: Target = Target(modules="**")
    """The sites of the model to adapt; by default all linear maps inside layers. Other linear maps are pruned if a
    target names them; a head that produces the outputs never is."""

    variant: Variant = "movement"
    """How the entries to keep are determined."""

    density: float = Field(default=0.15, gt=0, le=1)
    """Final share of the entries that is kept."""

    initial_density: float = Field(default=1.0, gt=0, le=1)
    """Initial share that is kept, with `magnitude`; with a value other than 1 the model is pruned before it trains."""

    allocation: Literal["per_tensor", "global"] = "per_tensor"
    """Whether the share applies to each matrix, or to all of them together, in which case a matrix may lose all its
    entries. Together they need memory for one more copy of the scores after each step."""

    threshold: float = Field(default=0.1, ge=0, lt=1)
    """Final value that sigmoids of scores must exceed, with `soft_movement`."""

    initial_threshold: float = Field(default=0.0, ge=0, lt=0.5)
    """Initial value of the threshold."""

    penalty: float = Field(default=400.0, ge=0)
    """Final weight of the mean sigmoid of scores, with `soft_movement`; it rises from 0 along with the threshold."""

    least_density: float = Field(default=0.005, ge=0, le=1)
    """Minimum share of each matrix that is kept, with `soft_movement`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the start during which nothing more is pruned."""

    final_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the end during which the density has its final value."""

    total_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole training run; by default the value given to `compiled.begin` or by the Trainer."""

    rounds: int = Field(default=5, ge=1)
    """Number of times `iterative` prunes; it takes one more training run than that."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the remaining entries that each round prunes, instead of `density`: `(1 - fraction) ** rounds` remains.
    By default each round prunes the same share, and `density` remains."""

    rewind: bool = False
    """Whether kept entries start each training run from the base's values; otherwise they continue from their current
    values."""

    stage: int = Field(default=1, ge=1)
    """The number of this training run of `iterative`, from 1; recipes count it."""

    overrides: Items[PruningOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        reject(((field,), error) for field, error in self._misfits())
        return self

    def _misfits(self) -> Iterator[tuple[str, GraftError]]:
        for field, variants in _FIELDS.items():
            if self.variant in variants or getattr(self, field) == type(self).model_fields[field].default:
                continue
            if field == "initial_density" and self.variant == "movement":
                message, hint = "scores are initially equal, so movement cannot start with only some entries", None
            else:
                message = f"{field} has no effect with variant: {self.variant}"
                hint = f"it applies to {', '.join(sorted(variants))}"
            yield field, GraftError("GC002", message, hint=hint)
        for first, last, rises in (("initial_density", "density", False), ("initial_threshold", "threshold", True)):
            start, end = getattr(self, first), getattr(self, last)
            if (start > end) if rises else (start < end):
                yield first, GraftError("GC002", f"{first} {start} is {'above' if rises else 'below'} {last} {end}")
        if self.fraction is not None and self.density != type(self).model_fields["density"].default:
            hint = "remove one of them"
            yield "fraction", GraftError("GC002", "fraction and density both set the share that remains", hint=hint)
        if self.stage > self.rounds + 1:
            yield "stage", GraftError("GC002", f"stage must be at most {self.rounds + 1} with rounds: {self.rounds}")
        if self.allocation == "global" and self.overrides:
            yield "overrides", GraftError("GC002", "overrides have no effect with allocation: global")

    @property
    def scored(self) -> bool:
        """Whether scores are trained along with the weights."""
        return self.variant in ("movement", "soft_movement")

    def remaining(self, rounds: int) -> Fraction:
        """Return the share that remains after ``rounds`` rounds of `iterative`; decimals count exactly as written."""
        if self.fraction is not None:
            return (1 - Fraction(str(self.fraction))) ** rounds
        end = Fraction(str(self.density))
        return end if rounds == self.rounds else Fraction(float(end) ** (rounds / self.rounds))


def kept_of(total: int, share: Fraction) -> int:
    """Return how many of ``total`` entries a share keeps: rounded down, at least one."""
    return max(1, math.floor(share * total))
