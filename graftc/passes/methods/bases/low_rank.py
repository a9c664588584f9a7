"""Low-rank branches beside linear maps: reading their input, and folding their products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, DropoutScope
from graftc.passes.core.method.capabilities import Exchangeable, RowWise
from graftc.passes.core.method.lowrank import added
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.base import MethodSpec
from graftc.specs.methods.lora import LoRA

S = TypeVar("S", bound=MethodSpec)


class DroppingSpec(Protocol):
    """The fields of specs whose branches apply dropout to their input."""

    @property
    def dropout(self) -> float:
        """The probability of dropping an element."""

    @property
    def dropout_mask(self) -> Literal["saved", "recomputed"]:
        """The form in which the mask is saved for the backward pass."""

    @property
    def dropout_scope(self) -> DropoutScope:
        """The sites that share a mask."""


def kept(spec: MethodSpec, *fields: str) -> dict[str, Any]:
    """Return some of a spec's fields by name."""
    return {field: getattr(spec, field) for field in fields}


def dropped_input(spec: DroppingSpec, x: fx.Node, build: Builder) -> fx.Node:
    """Return the input of a branch after its spec's dropout."""
    return build.dropout(x, spec.dropout, recompute=spec.dropout_mask == "recomputed", scope=spec.dropout_scope)


def add_branch(spec: DroppingSpec, site: LinearSite, build: Builder, a: fx.Node, b: fx.Node, scale: float = 1) -> None:
    """Add ``scale * b a drop(x)`` to the result of a site."""
    x = dropped_input(spec, build.input(site), build)
    build.add(site, build.low_rank(site, x, a, b, scale))


class LowRankMethod(Method[S, LinearSite], RowWise[S], Exchangeable[S]):
    """``W' = W + s B A`` with ``A: [rank, in]`` and ``B: [out, rank]``."""

    @abstractmethod
    def update(self, spec: S, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``B``, ``A`` and ``s`` of one site.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors and those that all sites share, by part, in float64.
        """

    def fold(self, spec: S, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight: ``W' = W + s B A``."""
        return weight_fold(lambda weight: added(weight, *self.update(spec, tensors)))

    def exchangeable(self, spec: S, size: int) -> MethodSpec | None:
        """Return a plain LoRA of this rank whose scale is 1."""
        return LoRA(rank=size, alpha=size, excess_rank=True, **kept(spec, "name", "target", "dtype"))

    def exchanged(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``A``, and ``s B`` as ``B``."""
        b, a, scale = self.update(spec, tensors)
        return {"A": a, "B": b * scale}

    def row_axes(self, spec: S) -> Mapping[str, int]:
        """Return the row axis of ``B``."""
        return {"B": -2}

    def fewest_rows(self, spec: S) -> int:
        """Return the minimum number of rows: the rank, or 1 if the spec accepts a rank above the number of rows."""
        own: Any = spec
        return 1 if getattr(own, "excess_rank", False) else int(own.rank)
