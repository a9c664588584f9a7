"""AdaLoRA: updates in the form of a singular value decomposition, with a common budget of ranks (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Ranked
from graftc.passes.core.method.lowrank import factors, gated, normal, zeros
from graftc.passes.core.method.steering import AdaptedSite, TensorObjective, unknown_length, zero_state
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.low_rank import LowRankMethod, add_branch
from graftc.passes.methods.bases.scheduled import ScheduledController, check_phases
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.adalora import AdaLoRA

DEVIATION = 0.02
"""Standard deviation of A and B at the start."""

TRIPLET = ("A", "E", "B")
"""The parameters of a site; triplet i is a row of A, an element of E and a column of B."""


class RankBudget(ScheduledController[AdaLoRA]):
    """A controller of the ranks of all sites: how many are left after a step, and which.

    The importance of an entry is the product of two moving averages: of ``I = |w dL/dw|`` with ``beta1``, and of the
    distance of ``I`` from that average with ``beta2``. The importance of a triplet is that of its E, plus the means
    over its row of A and its column of B.
    """

    def check_length(self, total: int) -> None:
        """Check that the phases leave a step to prune in.

        Raises:
            GraftError: GC026 if they do not.
        """
        if self.initial != self.target:
            check_phases(self.spec, total)

    @property
    def initial(self) -> int:
        """The number of triplets of all sites."""
        return sum(place.tensors["E"].numel() for place in self.places)

    @property
    def target(self) -> int:
        """The number of triplets that are left in the end."""
        return sum(place.tensors["E"].numel() // place.spec.rank * place.spec.final_rank for place in self.places)

    def budget(self, number: int) -> int:
        """Return how many triplets are left after step ``number``, counted from 1.

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
        """Update the importance of the triplets, and zero the E of those that the budget excludes.

        Raises:
            GraftError: GC026 if the number of steps is not known, GC035 without gradients.
        """
        if self.initial == self.target:
            return
        last = self._last_pruning()
        if number < last:
            self._observe()
        budget = self.budget(number)
        # The last step that prunes chooses by the last importance, even if the budget was reached before; from then on
        # neither the importance nor the set changes.
        chosen = number > last and sum(int(place.tensors["kept"].sum()) for place in self.places) == budget
        if not chosen and number > self.spec.warmup_steps and (number >= last or number % self.spec.interval == 0):
            self._choose(budget)
        elif not chosen:
            return
        for place in self.places:
            place.tensors["E"].mul_(place.tensors["kept"])

    def _observe(self) -> None:
        """Update the moving averages with the gradients of the step."""
        seen = False
        for place in self.places:
            for part in TRIPLET:
                tensor = place.tensors[part]
                if tensor.grad is None:
                    continue
                seen = True
                now = (tensor * tensor.grad).abs().float()
                sensitivity, uncertainty = place.tensors[f"{part}_sensitivity"], place.tensors[f"{part}_uncertainty"]
                sensitivity.mul_(self.spec.beta1).add_(now, alpha=1 - self.spec.beta1)
                uncertainty.mul_(self.spec.beta2).add_((now - sensitivity).abs(), alpha=1 - self.spec.beta2)
        if not seen:
            hint = "call compiled.after_step() after optimizer.step() and before optimizer.zero_grad()"
            raise GraftError("GC035", f"{self.spec.name!r} weighs gradients, and there are none", hint=hint)

    def importance(self, place: AdaptedSite[AdaLoRA]) -> Tensor:
        """Return the importance of every triplet of a site, ``f32[..., rank]``."""
        a, e, b = (place.tensors[f"{part}_sensitivity"] * place.tensors[f"{part}_uncertainty"] for part in TRIPLET)
        return e + a.mean(-1) + b.mean(-2)

    def _choose(self, budget: int) -> None:
        """Keep exactly ``budget`` triplets; in case of ties those of earlier sites."""
        scores = torch.cat([self.importance(place).flatten() for place in self.places])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        masks = [place.tensors["kept"] for place in self.places]
        for own, chosen in zip(masks, torch.split(kept, [mask.numel() for mask in masks]), strict=True):
            own.copy_(chosen.view_as(own))


class Orthogonality(TensorObjective[AdaLoRA]):
    """``weight * mean over all A and B of ||A A^T - I||`` and ``||B^T B - I||``, unsquared Frobenius norms."""

    @classmethod
    def wanted(cls, spec: AdaLoRA) -> bool:
        """Return whether the weight of the term is above zero."""
        return spec.orthogonality > 0

    def value(self) -> Tensor:
        """Return the weighted mean distance of the factors from orthogonal ones."""
        return self.spec.orthogonality * torch.cat([norm.flatten() for norm in self._distances()]).mean()

    def _distances(self) -> Iterator[Tensor]:
        for place in self.places:
            a, b = place.tensors["A"].float(), place.tensors["B"].float()
            for gram in (a @ a.mT, b.mT @ b):
                eye = torch.eye(gram.shape[-1], device=gram.device)
                yield torch.linalg.vector_norm(gram - eye, dim=(-2, -1))


class AdaLoRAMethod(LowRankMethod[AdaLoRA], Ranked[AdaLoRA]):
    """``y = W x + b + s B diag(E) A drop(x)`` with ``A: [rank, in]``, ``E: [rank]`` and ``B: [out, rank]``.

    ``s`` is ``alpha / (rank + 1e-5)`` with the initial rank, as in the authors' code; the paper does not have it. ``E``
    multiplies the smaller factor. Each expert has its own decomposition, and each of its triplets counts.
    """

    controller = RankBudget
    objective = Orthogonality

    def prepare(self, spec: AdaLoRA, sites: Sequence[LinearSite], build: Builder) -> None:
        """Check the schedule as far as the spec alone determines it.

        Raises:
            GraftError: GC026 if its phases leave no step of ``total_steps`` to prune in.
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
        for part, node in zip(TRIPLET, (a, e, b), strict=True):
            for kind in ("sensitivity", "uncertainty"):
                build.keep_buffer(f"{part}_{kind}", zero_state(node.meta["val"].shape))
        build.keep_buffer("kept", lambda device: torch.ones(shape, dtype=torch.bool, device=device))
        add_branch(spec, site, build, *gated(build, site, a, b, e), spec.scaling)

    def update(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``B diag(E)``, ``A`` and the scale."""
        return tensors["B"] * tensors["E"][..., None, :], tensors["A"], spec.scaling

    def figures(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``rank``, the number of triplets that the budget leaves; initially all of them."""
        return {"rank": tensors["kept"].sum(-1).float().mean()}

    def live_ranks(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a mask of the triplets whose E is not zero."""
        return tensors["E"].detach() != 0
