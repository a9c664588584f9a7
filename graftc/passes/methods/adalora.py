"""AdaLoRA: updates in the form of a singular value decomposition under one budget of ranks (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Ranked, RowWise
from graftc.passes.core.method.lowrank import added, factors, gated, normal, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.method.steering import AdaptedSite, Controller, TensorObjective, check_phases, unknown_length
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.adalora import AdaLoRA

DEVIATION = 0.02
"""Standard deviation of A and B at the start."""

TRIPLET = ("A", "E", "B")
"""The parameters of a site; triplet i is a row of A, an element of E and a column of B."""


class RankBudget(Controller[AdaLoRA]):
    """The ranks that all sites share: how many are left after a step, and which.

    Importance of an entry is the product of two moving averages: of ``I = |w dL/dw|`` with ``beta1``, and of the
    distance of ``I`` from that average with ``beta2``. A triplet's is its E's, plus the means over its row of A and its
    column of B.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.spec.total_steps is not None:
            self.begin(self.spec.total_steps)

    def begin(self, total: int) -> None:
        """See `Controller.begin`. ``total_steps`` of the spec goes before.

        Raises:
            GraftError: GC026 where the phases leave no step to prune in.
        """
        total = self.spec.total_steps or total
        if self.initial != self.target:
            check_phases(self.spec, total)
        super().begin(total)

    @property
    def initial(self) -> int:
        """Triplets of all sites."""
        return sum(place.tensors["E"].numel() for place in self.places)

    @property
    def target(self) -> int:
        """Triplets that are left in the end."""
        return sum(place.tensors["E"].numel() // place.spec.rank * place.spec.final_rank for place in self.places)

    def budget(self, number: int) -> int:
        """How many triplets are left after the step of this number, from 1.

        Raises:
            GraftError: GC026 where the number of steps is not known.
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
        """See `Controller.step`.

        Raises:
            GraftError: GC026 where the number of steps is not known, GC035 without gradients.
        """
        if self.initial == self.target:
            return
        last = self._last_pruning()
        if number < last:
            self._observe()
        budget = self.budget(number)
        # The last step that prunes chooses by the last importance, also where the budget was reached before; importance
        # is as it was from there on, and so is the set.
        chosen = number > last and sum(int(place.tensors["kept"].sum()) for place in self.places) == budget
        if not chosen and number > self.spec.warmup_steps and (number >= last or number % self.spec.interval == 0):
            self._choose(budget)
        elif not chosen:
            return
        for place in self.places:
            place.tensors["E"].mul_(place.tensors["kept"])

    def _observe(self) -> None:
        """Take the gradients of the step into the moving averages."""
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
        """Importance of every triplet of a site, ``f32[..., rank]``."""
        a, e, b = (place.tensors[f"{part}_sensitivity"] * place.tensors[f"{part}_uncertainty"] for part in TRIPLET)
        return e + a.mean(-1) + b.mean(-2)

    def _choose(self, budget: int) -> None:
        """Keep exactly ``budget`` triplets; among equals those of earlier sites."""
        scores = torch.cat([self.importance(place).flatten() for place in self.places])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        start = 0
        for place in self.places:
            own = place.tensors["kept"]
            own.copy_(kept[start : start + own.numel()].view_as(own))
            start += own.numel()


class Orthogonality(TensorObjective[AdaLoRA]):
    """``weight * mean over all A and B of ||A A^T - I||`` and ``||B^T B - I||``, Frobenius norms as they are."""

    @classmethod
    def wanted(cls, spec: AdaLoRA) -> bool:
        """See `Steering.wanted`."""
        return spec.orthogonality > 0

    def value(self) -> Tensor:
        """See `TensorObjective.value`."""
        return self.spec.orthogonality * torch.cat([norm.flatten() for norm in self._distances()]).mean()

    def _distances(self) -> Iterator[Tensor]:
        for place in self.places:
            a, b = place.tensors["A"].float(), place.tensors["B"].float()
            for gram in (a @ a.mT, b.mT @ b):
                eye = torch.eye(gram.shape[-1], device=gram.device)
                yield torch.linalg.vector_norm(gram - eye, dim=(-2, -1))


class AdaLoRAMethod(Method[AdaLoRA, LinearSite], Ranked[AdaLoRA], RowWise[AdaLoRA]):
    """``y = W x + b + s B diag(E) A drop(x)`` with ``A: [rank, in]``, ``E: [rank]`` and ``B: [out, rank]``.

    ``s`` is ``alpha / (rank + 1e-5)`` with the initial rank, as in the authors' code; the paper does not have it. ``E``
    multiplies the smaller factor. Each expert has its own decomposition, and each of its triplets counts.
    """

    controller = RankBudget
    objective = Orthogonality

    def prepare(self, spec: AdaLoRA, sites: Sequence[LinearSite], build: Builder) -> None:
        """Check what the spec alone says of the schedule.

        Raises:
            GraftError: GC026 where its phases leave no step of ``total_steps`` to prune in.
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
                build.keep_buffer(f"{part}_{kind}", partial(_zeros, tuple(node.meta["val"].shape)))
        build.keep_buffer("kept", lambda device: torch.ones(shape, dtype=torch.bool, device=device))
        recompute = spec.dropout_mask == "recomputed"
        x = build.dropout(build.input(site), spec.dropout, recompute=recompute, scope=spec.dropout_scope)
        build.add(site, build.low_rank(site, x, *gated(build, site, a, b, e), spec.scaling))

    def fold(self, spec: AdaLoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """``W' = W + s B diag(E) A``."""

        def change(weight: Tensor) -> Tensor:
            gated = tensors["B"] * tensors["E"][..., None, :]
            return added(weight, gated, tensors["A"], spec.scaling)

        return weight_fold(change)

    def row_axes(self, spec: AdaLoRA) -> Mapping[str, int]:
        """See `RowWise.row_axes`."""
        return {"B": -2}

    def fewest_rows(self, spec: AdaLoRA) -> int:
        """See `RowWise.fewest_rows`. A rank above the number of rows is refused, unless the spec accepts it."""
        return 1 if spec.excess_rank else spec.rank

    def figures(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Figured.figures`: ``rank``, how many triplets the budget leaves, which are all at first."""
        return {"rank": tensors["kept"].sum(-1).float().mean()}

    def live_ranks(self, spec: AdaLoRA, tensors: Mapping[str, Tensor]) -> Tensor:
        """Triplets whose E is not zero."""
        return tensors["E"].detach() != 0


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device)
