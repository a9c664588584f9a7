"""Folds: what an adaptation does to base weights, as algebra on lazy tensors.

A fold step is a pure function of the oriented rows of a site, ``(W, b) -> (W', b')`` with ``W: [..., rows, in]`` in
float64. Steps compose in insertion order (LoRA then a scaling is not a scaling then LoRA) and round once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from graftc.passes.core.layout import Layout
from graftc.passes.core.rows import Rows
from graftc.passes.core.store import Store
from graftc.specs.diagnostics import GraftError

Tensor = torch.Tensor
WeightFunction = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class WeightFold:
    """Fold by changing the site's weight and bias.

    Attributes:
        apply: ``(W, b) -> (W', b')``; ``W`` is ``[..., rows, in]`` (experts lead) and ``b`` is ``[rows]`` or None,
            both float64. A bias may be made where there was none: it is then a declared addition of the folded model.
    """

    apply: WeightFunction


@dataclass(frozen=True)
class Keep:
    """The adaptation stays in the graph; ``reason`` says why it cannot fold."""

    reason: str


@dataclass(frozen=True)
class StandIn:
    """What the adaptation trains stands in for base tensors (overlays); there is nothing else to fold."""


@dataclass(frozen=True)
class TensorFold:
    """Fold by changing tensors of the base wherever they are read, below everything that stands at sites.

    Attributes:
        changes: for a tensor by its name within its module, from its values as stored, float64, to new ones.
    """

    changes: Mapping[str, Callable[[Tensor], Tensor]]


Fold = WeightFold | TensorFold | StandIn | Keep


@dataclass(frozen=True)
class FoldStep:
    """One adaptation's change of one site's tensors.

    Attributes:
        adaptation: who changes them.
        site: where, as text.
        weight: Store name of the weight, or of the single tensor that is replaced.
        bias: Store name of the bias, also where a fold would have to add it; None for a single tensor.
        rows: the site's own rows of the fused tensor.
        layout: how the Store holds the weight.
        apply: the function on oriented rows.
        everywhere: the step changes every use of the tensor alike, tied names included.
    """

    adaptation: str
    site: str
    weight: str
    bias: str | None
    rows: Rows
    layout: Layout
    apply: WeightFunction
    everywhere: bool = False


class LazyTensors:
    """Folded tensors that are computed when asked for: a base reference and a chain of steps.

    Args:
        store: holds the base tensors, which are read and never written.
        steps: fold steps in insertion order.

    Raises:
        GraftError: GC022 when a step would change a tensor that has other names (tied weights).
    """

    def __init__(self, store: Store, steps: Iterable[FoldStep]) -> None:
        self.store = store
        self.steps = tuple(steps)
        for step in self.steps:
            for name in () if step.everywhere else filter(None, (step.weight, step.bias)):
                others = store.tied(name)
                if others:
                    raise GraftError(
                        "GC022",
                        f"{step.adaptation!r} would fold into {name}, which is tied to {', '.join(others)}",
                        hint="folding would change both; break the tie in the model first, or leave this site out",
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Base tensors that folding may change, each once, in order."""
        found = (n for s in self.steps for n in (s.weight, s.bias) if n is not None)
        return tuple(dict.fromkeys(n for n in found if n in self.store))

    def additions(self) -> tuple[str, ...]:
        """Biases that folding has to add because the base has none."""
        missing = dict.fromkeys(s.bias for s in self.steps if s.bias is not None and s.bias not in self.store)
        return tuple(name for name in missing if name in self._values(name))

    def chain(self, name: str) -> tuple[FoldStep, ...]:
        """The steps that touch the tensor called ``name``."""
        return tuple(s for s in self.steps if name in (s.weight, s.bias))

    def exact(self, name: str) -> Tensor:
        """The folded tensor in float64, before rounding. `KeyError` where no step makes it."""
        return self._values(name)[name]

    def _values(self, name: str) -> dict[str, Tensor]:
        """The tensor called ``name`` and those that fold together with it, folded."""
        related = {n for s in self.chain(name) for n in (s.weight, s.bias) if n is not None}
        values = {n: self.store.get(n).detach().double() for n in related if n in self.store}
        for step in self.steps:
            if step.weight in values:
                self._apply(step, values)
        return values

    @staticmethod
    def _apply(step: FoldStep, values: dict[str, Tensor]) -> None:
        stored = values[step.weight]
        oriented = step.layout.orient(stored)
        plain = step.layout is Layout.PLAIN
        axis = 0 if plain else -2
        bias = values.get(step.bias) if step.bias is not None else None
        own_bias = None if bias is None else step.rows.take(bias, -1)
        weight, new_bias = step.apply(step.rows.take(oriented, axis), own_bias)
        values[step.weight] = step.layout.restore(step.rows.put(oriented, weight, axis), stored.shape)
        if step.bias is None:
            if new_bias is not None:
                raise GraftError("GC050", f"{step.adaptation!r} needs a bias, and {step.site} has no place for one")
            return
        total = oriented.shape[:-1]
        if new_bias is None:
            new_bias = oriented.new_zeros(*total[:-1], step.rows.count)
        if bias is not None or bool(new_bias.any()):
            start = bias if bias is not None else oriented.new_zeros(total)
            values[step.bias] = step.rows.put(start, new_bias, -1)

    def folded(self, name: str) -> Tensor:
        """The folded tensor in its base's dtype and layout, rounded once."""
        like = self.store.get(name) if name in self.store else self.store.get(self.chain(name)[0].weight)
        return round_once(self.exact(name), like.dtype).contiguous()


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype`` to nearest even, correctly also for bfloat16 and float16.

    torch converts float64 to 16 bits through float32, which rounds twice; going through a float32 rounded to odd makes
    the second rounding see what the first one dropped.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    nearest = value.float()
    exact = nearest.double()
    toward_zero = torch.where(exact.abs() > value.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    inexact = (exact != value) & value.isfinite() & nearest.isfinite()
    odd = toward_zero.view(torch.int32) | inexact.int()
    return torch.where(inexact, odd.view(torch.float32), nearest).to(dtype)
