"""AdaLoRA: updates parametrised as singular value decompositions, with a shared rank budget (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Ranked
from graftc.passes.core.method.lowrank import factors, gated, normal, zeros
from graftc.passes.core.method.steering import AdaptedSite, TensorObjective, unknown_length, wide, zero_state
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.low_rank import LowRankMethod, add_branch
from graftc.passes.methods.bases.scheduled import ScheduledController, check_phases
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.adalora import AdaLoRA

DEVIATION = 0.02
"""Initial standard deviation of A and B."""

TRIPLET = ("A", "E", "B")
"""A site's parameters; triplet i is row i of A, element i of E and column i of B."""


class RankBudget(ScheduledController[AdaLoRA]):
    """Controller that determines how many ranks remain across all sites after a step, and which ones.

    The importance of an entry is the product of two moving averages: that of ``I = |w dL/dw|``, with decay ``beta1``,
    and that of the distance between ``I`` and this average, with decay ``beta2``. The importance of a triplet is that
    of its element of E plus the mean importances over its row of A and over its column of B.
    """

    def check_length(self, total: int) -> None:
        """Check that the phases leave at least one step for pruning.

        Raises:
            GraftError: GC026 if they do not.
        """
        if self.initial != self.target:
            check_phases(self.spec, total)

    @property
    def initial(self) -> int:
        """The initial number of triplets across all sites."""
        return sum(place.tensors["E"].numel() for place in self.places)

    @property
    def target(self) -> int:
        """The final number of triplets across all sites."""
        return sum(place.tensors["E"].numel() // place.spec.rank * place.spec.final_rank for place in self.places)

    def budget(self, number: int) -> int:
        """Return how many triplets remain after step ``number``, counted from 1.

        Raises:
            GraftError: GC026 if the number of steps is not known.
        """
        start, end = self.spec.warmup_steps, self._last_pruning()
        if number <= start:
            return self.initial
        if number >= end:
            return self.target
        left = 1 - (number - start) / (end - start)
        return int((self.initial - self.target) * left**3 + self.target)

    def _last_pruning(self) -> int:
        if self.total is None:
            raise unknown_length(f"the budget of {self.spec.name!r}")
        return self.total - self.spec.final_steps

    def step(self, number: int) -> None:
        """Update the importance of the triplets, and zero the elements of E for triplets that the budget excludes.

        Raises:
            GraftError: GC026 if the number of steps is not known, GC035 if there are no gradients.
        """
        if self.initial == self.target:
            return
        last = self._last_pruning()
        if number < last:
            self._observe()
        budget = self.budget(number)
        # The last pruning step always selects by the final importance, even if the budget was reached earlier;
        # afterwards neither the importance nor the selection changes.
        chosen = number > last and sum(int(place.tensors["kept"].sum()) for place in self.places) == budget
        if not chosen and number > self.spec.warmup_steps and (number >= last or number % self.spec.interval == 0):
            self._choose(budget)
        elif not chosen:
            return
        for place in self.places:
            place.tensors["E"].mul_(place.tensors["kept"])

    def _observe(self) -> None:
        """Update the moving averages with the step's gradients."""
        seen = False
        for place in self.places:
            for part in TRIPLET:
                tensor = place.tensors[part]
                if tensor.grad is None:
                    continue
                seen = True
                now = wide((tensor * tensor.grad).abs())
                sensitivity, uncertainty = place.tensors[f"{part}_sensitivity"], place.tensors[f"{part}_uncertainty"]
                sensitivity.mul_(self.spec.beta1).add_(now, alpha=1 - self.spec.beta1)
                uncertainty.mul_(self.spec.beta2).add_((now - sensitivity).abs(), alpha=1 - self.spec.beta2)
        if not seen:
            hint = "call compiled.after_step() after optimizer.step() and before optimizer.zero_grad()"
            raise GraftError("GC035", f"{self.spec.name!r} needs gradients, but there are none", hint=hint)

    def importance(self, place: AdaptedSite[AdaLoRA]) -> Tensor:
        """Return the importance of every triplet of a site, ``[..., rank]``, in float32 or float64."""
        a, e, b = (place.tensors[f"{part}_sensitivity"] * place.tensors[f"{part}_uncertainty"] for part in TRIPLET)
        return e + a.mean(-1) + b.mean(-2)

    def _choose(self, budget: int) -> None:
        """Keep exactly ``budget`` triplets; ties go to earlier sites."""
        scores = torch.cat([self.importance(place).flatten() for place in self.places])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        masks = [place.tensors["kept"] for place in self.places]
        for own, chosen in zip(masks, torch.split(kept, [mask.numel() for mask in masks]), strict=True):
            own.copy_(chosen.view_as(own))


class Orthogonality(TensorObjective[AdaLoRA]):
    """``weight`` times the mean of ``||A A^T - I||`` and ``||B^T B - I||`` over all A and B (Frobenius, unsquared)."""

    @classmethod
    def wanted(cls, spec: AdaLoRA) -> bool:
        """Return whether the term's weight is above zero."""
        return spec.orthogonality > 0

    def value(self) -> Tensor:
        """Return the weighted mean deviation of the factors from orthogonality."""
        return self.spec.orthogonality * torch.cat([norm.flatten() for norm in self._distances()]).mean()

    def _distances(self) -> Iterator[Tensor]:
        for place in self.places:
            a, b = (wide(place.tensors[part]) for part in ("A", "B"))
            for gram in (a @ a.mT, b.mT @ b):
                eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
                yield torch.linalg.vector_norm(gram - eye, dim=(-2, -1))


class AdaLoRAMethod(LowRankMethod[AdaLoRA], Ranked[AdaLoRA]):
    """``y = W x + b + s B diag(E) A drop(x)`` with ``A: [rank, in]``, ``E: [rank]`` and ``B: [out, rank]``.

    ``s`` is ``alpha / (rank + 1e-5)`` with the initial rank, as in the authors' code; the paper omits it. ``E``
    multiplies the smaller factor. Each expert has its own decomposition, whose triplets are counted individually.
    """

    controller = RankBudget
    objective = Orthogonality

    def prepare(self, spec: AdaLoRA, sites: Sequence[LinearSite], build: Builder) -> None:
        """Check the schedule as far as the spec alone determines it.

        Raises:
            GraftError: GC026 if its phases leave none of the ``total_steps`` for pruning.
        """
        if spec.total_steps is not None:
            check_phases(spec, spec.total_steps)

    def insert(self, spec: AdaLoRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)`` without ``excess_rank``, GC002 when ``target_rank``
                exceeds the rank.
        """
        if spec.final_rank > spec.rank:
            message = f"target_rank {spec.final_rank} exceeds rank {spec.rank} at {site.key}"
            raise GraftError("GC002", message, place=Place(path="target_rank"))
        a, b = factors(build, site, spec.rank, normal(DEVIATION), normal(DEVIATION), excess_rank=spec.excess_rank)
        shape = (*site.leading, spec.rank)
        e = build.parameter("E", shape, zeros, dtype=site.dtype)
        averages = torch.promote_types(site.dtype, torch.float32)
        for part, node in zip(TRIPLET, (a, e, b), strict=True):
            for kind in ("sensitivity", "uncertainty"):
                build.keep_buffer(f"{part}_{kind}", zero_state(node.meta["val"].shape, averages))
        build.keep_buffer("kept", lambda device: torch.ones(shape, dtype=torch.bool, device=device))
        add_branch(spec, site, build, *gated(build, site, a, b, e), spec.scaling)

    def update(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``B diag(E)``, ``A`` and the scale."""
        return tensors["B"] * tensors["E"][..., None, :], tensors["A"], spec.scaling

    def figures(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``rank``: the number of triplets within the budget (initially all), averaged over experts."""
        return {"rank": tensors["kept"].sum(-1).float().mean()}

    def live_ranks(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a mask of the triplets whose E is not zero."""
        return tensors["E"].detach() != 0
