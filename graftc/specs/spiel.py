"""SpIEL: sparse fine-tuning whose entries move while training."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.diagnostics import GraftError
from graftc.specs.limits import SIZE
from graftc.specs.selection import SelectionSpec
from graftc.specs.target import Target
from graftc.specs.validation import reject

__all__ = ["PROJECTIONS", "SpIEL"]

PROJECTIONS = frozenset({"attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"})
"""Roles of the maps that the default target means."""


class SpIEL(SelectionSpec):
    """Sparse fine-tuning by indices and deltas, which leave some entries of the weights for others now and then.

    Every weight has `floor(K n_i / n)` of its `n_i` entries, `K` of all `n` together, at random places at first; `K` is
    a hundredth of `n` where the spec has none of `density`, `entries` and `equivalent_rank`. After the optimiser step
    `accumulation_steps`, and every `interval` steps from there, those with the smallest deltas are dropped, all of them
    the first time and later the share `drop_fraction (1 - t / total)`, and as many others start from zero: the model
    computes the same before and after an entry is added. After the last step nothing moves.

    `AG` adds the entries with the largest sum of gradients. It looks at the gradients of whole weights in the
    `accumulation_steps` optimiser steps before (the authors' windows are one step longer from the second one on), of
    one weight at a time: the first micro-batch chooses as many candidates as there are deltas, those of the largest
    gradients, and the others add to these. Apart from that choice, micro-batches make one step: their gradients are
    summed before they are squared. Train it with `graftc.optim.AgedAdamW`, which starts the moments of new entries from
    what the window has seen.

    `MA` adds the entries with the largest product of the row's and the column's second moment, as the optimiser
    `graftc.optim.SM3` keeps them. It looks at no other gradients, and works with no other optimiser (GC045).

    A training loop calls `compiled.begin(total_steps)` once and `compiled.after_step()` between `optimizer.step()` and
    `optimizer.zero_grad()`; the Trainer takes `compiled.callback()`. Weights of the base want a gradient from the
    forward pass in a window to `after_step()`, and at no other time, so `requires_grad` says what trains whenever it is
    asked between steps. Code of `torch.compile` has no windows: `AG` adds nothing there.
    """

    claims: ClassVar[Claims] = Claims(sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = "Ansell et al. 2024, Scaling Sparse Fine-Tuning to Large Language Models (arXiv:2401.16405)"
    usual_density: ClassVar[float] = 0.01

    method: Literal["spiel"] = "spiel"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which sites of the model to adapt; by default the projections of attentions and feed-forward parts, including
    gates if there are any. A head that produces the outputs is skipped."""

    variant: Literal["AG", "MA"] = "AG"
    """What chooses new entries: accumulated gradients, or approximate second moments."""

    equivalent_rank: int | None = Field(default=None, ge=1, le=SIZE)
    """How many entries train, instead of a share: as many as low-rank updates of this rank would have parameters,
    `rank (in + out)` for every map. A fused map counts as one."""

    interval: int = Field(default=20, ge=1)
    """Optimiser steps between two replacements."""

    accumulation_steps: int = Field(default=5, ge=1)
    """Optimiser steps before the first replacement, and before each one those whose gradients `AG` looks at; at most
    `interval`."""

    drop_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the entries that are replaced, at step 0 of the schedule; the first replacement takes all."""

    decay: Literal["linear", "cosine"] = "linear"
    """How the share falls to zero at the end of the training: `1 - t / total`, or `(1 + cos(pi t / total)) / 2`."""

    total_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole training run; by default the value given to `compiled.begin` or by the Trainer."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [f for f in ("density", "entries", "equivalent_rank") if getattr(self, f) is not None]
        if len(given) > 1:
            message = f"{given[0]} and {given[1]} both say how many entries train"
            error = GraftError("GC002", message, hint="give one of them")
            reject(getattr(self, given[1]), ((given[1],), error))
        if self.accumulation_steps > self.interval:
            message = f"accumulation_steps {self.accumulation_steps} exceeds interval {self.interval}"
            reject(self.accumulation_steps, (("accumulation_steps",), GraftError("GC002", message)))
        return self
