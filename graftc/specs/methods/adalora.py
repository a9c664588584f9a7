"""AdaLoRA: low-rank updates in the form of a singular value decomposition, under a budget of ranks for all sites."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import AS_USUAL, LORA_FIXED, LORA_IGNORED, PeftFormat, PeftPart


class AdaLoRAOverride(Override):
    """Other values of AdaLoRA for some of its sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Initial rank at these sites."""

    target_rank: int | None = Field(default=None, ge=1, le=SIZE)
    """How much these sites contribute to the final budget."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input of the branch at these sites."""


class AdaLoRA(MethodSpec):
    """Low-rank adaptation with ranks allocated by importance: `y = W x + b + s B diag(E) A dropout(x)`.

    `A` is `[rank, in]`, `E` is `[rank]` and `B` is `[out, rank]`, used in the weight's dtype; `s = alpha / (rank +
    1e-5)` with the initial rank, as in the authors' code (the paper has no scale). `E` is initialised to zeros, `A` and
    `B` to normal values with standard deviation 0.02, so before training the adapted layer computes exactly what the
    base computes.

    During training, all sites share a budget of ranks that falls from the sum of `rank` to the sum of `target_rank`:
    after every `interval` optimiser steps the least important triplets get `E = 0`, exactly as many as the budget
    requires. A triplet may come back until the last `final_steps` steps. Importance is the smoothed product of weights
    and gradients times its uncertainty; both are kept in buffers, in float32. `orthogonality` adds a term to the loss
    that keeps the rows of `A` and the columns of `B` orthonormal.

    A training loop calls `compiled.begin(total_steps)` once, `compiled.extra_loss()` for each optimiser step, and
    `compiled.after_step()` between `optimizer.step()` and `optimizer.zero_grad()`; the Trainer takes
    `compiled.callback()`. `compiled.rank_pattern(name)` reports which triplets are left. `s B diag(E) A` folds exactly.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv:2303.10512)"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("ADALORA",),
        parts={
            "A": PeftPart("lora_A", "down", rank=-2),
            "E": PeftPart("lora_E", "column", rank=-1),
            "B": PeftPart("lora_B", "up", rank=-1),
        },
        fields={
            **{"init_r": "rank", "target_r": "target_rank", "lora_alpha": "alpha", "lora_dropout": "dropout"},
            **{"orth_reg_weight": "orthogonality", "beta1": "beta1", "beta2": "beta2", "tinit": "warmup_steps"},
            **{"tfinal": "final_steps", "deltaT": "interval", "total_step": "total_steps"},
        },
        constant={"dropout_scope": "target"},
        absent={"alpha": 8.0},
        fixed={**LORA_FIXED, "bias": "none", "use_dora": False, "use_rslora": False, "layer_replication": None},
        starts={"init_lora_weights": AS_USUAL},
        ignored=LORA_IGNORED | {"r", "rank_pattern", "alpha_pattern", "init_lora_weights"},
        training=frozenset({"dropout", "dropout_mask", "dropout_scope", "target_rank", "excess_rank"}),
        written={"total_step": lambda spec: spec.total_steps or spec.warmup_steps + spec.final_steps + 1},
        turned=True,
    )

    method: Literal["adalora"] = "adalora"
    """The method's tag."""

    rank: int = Field(default=12, ge=1, le=SIZE)
    """Initial rank of every site; at most min(in, out)."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""

    target_rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Average final rank, at most `rank`; by default 8, or `rank` if that is smaller. If it equals `rank`, nothing is
    pruned."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it."""

    dropout_scope: Literal["input", "target"] = "input"
    """Whether sites that read the same input share one dropout mask, or each has its own."""

    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the orthogonality term: multiplies the mean over all `A` and `B` of the Frobenius norms of `A A^T - I`
    and `B^T B - I`, not squared, as in the authors' code. 0 omits the term."""

    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing factor of the sensitivity."""

    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing factor of its uncertainty."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the start during which nothing is pruned (`tinit`)."""

    final_steps: int = Field(default=0, ge=0)
    """Optimiser steps at the end during which the set of triplets is fixed (`tfinal`)."""

    interval: int = Field(default=1, ge=1)
    """Number of steps between prunings (`deltaT`)."""

    total_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole training run; by default the value given to `compiled.begin` or by the Trainer."""

    overrides: Items[AdaLoRAOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def final_rank(self) -> int:
        """The contribution of a site to the final budget: `target_rank`; by default 8, or `rank` if that is smaller."""
        return self.target_rank if self.target_rank is not None else min(8, self.rank)

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / (rank + 1e-5)`, with the initial rank."""
        return self.alpha / (self.rank + 1e-5)
