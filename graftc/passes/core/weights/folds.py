"""Folds: what an adaptation does to base weights, as algebra on lazy tensors.

A fold step is a pure function of the oriented rows of a site, ``(W, b) -> (W', b')`` with ``W: [..., rows, in]`` in
float64. Steps compose in insertion order (LoRA then a scaling is not a scaling then LoRA) and round once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch

from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.errors.diagnostics import GraftError

Tensor = torch.Tensor
WeightFunction = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class WeightFold:
    """Fold by changing the site's weight and bias.

    Attributes:
        apply: ``(W, b) -> (W', b')``; ``W`` is ``[..., rows, in]`` (experts lead) and ``b`` is ``[rows]`` or None,
            both float64. A bias may be made where there was none: it is then a declared addition of the folded model.
            They are the function's own, which may write to them; what it makes beside its results, it lets go.
    """

    apply: WeightFunction


def weight_fold(change: Callable[[Tensor], Tensor]) -> WeightFold:
    """Fold by changing the site's weight alone: ``W' = change(W)``; see `WeightFold.apply`."""

    def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        only = [weight]  # who changes it can let it go
        del weight
        return change(only.pop()), bias

    return WeightFold(apply)


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
        weight: the site's own rows of its weight, or what is replaced of a single tensor.
        bias: the same of the bias, also where a fold would have to add it; None for a single tensor.
        apply: the function on the weight's operand.
    """

    adaptation: str
    site: str
    weight: WeightSlice
    bias: WeightSlice | None
    apply: WeightFunction

    @classmethod
    def of_tensor(cls, adaptation: str, site: str, own: WeightSlice, change: Callable[[Tensor], Tensor]) -> FoldStep:
        """The change of a single tensor, from its values as stored to new ones."""
        return cls(adaptation, site, own, None, weight_fold(change).apply)

    @property
    def parts(self) -> tuple[WeightSlice, ...]:
        """What it changes."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of what it changes."""
        return tuple(part.tensor for part in self.parts)


@dataclass(frozen=True)
class FoldGroup:
    """Tensors that are folded together: those that one step changes, or that one map reads.

    Attributes:
        names: the tensors, biases that folding may add among them.
        steps: what changes them, in insertion order.
    """

    names: tuple[str, ...]
    steps: tuple[FoldStep, ...]


class LazyTensors:
    """Folded tensors that are computed when asked for: a base reference and a chain of steps.

    Nothing is kept: whoever needs a tensor more than once, or many of them, goes through `groups`. A tensor that has
    other names changes under all of them.

    Args:
        store: holds the base tensors, which are read and never written.
        steps: fold steps in insertion order.
    """

    def __init__(self, store: Store, steps: Iterable[FoldStep]) -> None:
        self.store = store
        self.steps = tuple(steps)
        self._chains: dict[str, list[FoldStep]] = {}
        for step in self.steps:
            for name in step.tensors:
                self._chains.setdefault(name, []).append(step)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Base tensors that folding may change, each once, in order."""
        return tuple(name for name in self._chains if name in self.store)

    def additions(self) -> tuple[str, ...]:
        """Biases that folding has to add because the base has none; what may need one is folded to find out."""
        missing = (group for group in self.groups() if any(name not in self.store for name in group.names))
        made = {name for group in missing for name in self.fold(group) if name not in self.store}
        return tuple(name for name in self._chains if name in made)

    def chain(self, name: str) -> tuple[FoldStep, ...]:
        """The steps that touch the tensor called ``name``."""
        return tuple(self._chains.get(name, ()))

    def groups(self, together: Iterable[Iterable[str]] = ()) -> tuple[FoldGroup, ...]:
        """Every tensor that folding may change or add, in one group each, in order.

        Args:
            together: names of tensors that are to be in one group; those that no step touches are passed over.
        """
        links: nx.Graph[str] = nx.Graph()
        links.add_nodes_from(self._chains)
        for names in (*(step.tensors for step in self.steps), *together):
            nx.add_path(links, [name for name in names if name in self._chains])
        group_of = {name: at for at, names in enumerate(nx.connected_components(links)) for name in names}
        names_of: dict[int, list[str]] = {}
        steps_of: dict[int, list[FoldStep]] = {}
        for name in self._chains:
            names_of.setdefault(group_of[name], []).append(name)
        for step in self.steps:
            steps_of.setdefault(group_of[step.weight.tensor], []).append(step)
        return tuple(FoldGroup(tuple(names), tuple(steps_of[at])) for at, names in names_of.items())

    @cached_property
    def _group_of(self) -> dict[str, FoldGroup]:
        return {name: group for group in self.groups() for name in group.names}

    def base(self, group: FoldGroup) -> dict[str, Tensor]:
        """The base tensors of a group, whole; they are nobody's to write."""
        return {name: self.store.full(name) for name in group.names if name in self.store}

    @staticmethod
    def widened(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors in float64."""
        return {name: tensor.to(torch.float64, copy=True) for name, tensor in base.items()}

    def apply(self, group: FoldGroup, values: dict[str, Tensor]) -> None:
        """Fold what `widened` gave, in place of it: one tensor more is alive at a time than the group has."""
        for step in group.steps:
            self._apply(step, values)

    def fold(self, group: FoldGroup) -> dict[str, Tensor]:
        """The tensors of a group in float64, folded; without biases that turned out to be none."""
        values = self.widened(self.base(group))
        self.apply(group, values)
        return values

    def exact(self, name: str) -> Tensor:
        """The folded tensor in float64, before rounding. `KeyError` where no step makes it."""
        return self.fold(self._group_of[name])[name]

    @staticmethod
    def _apply(step: FoldStep, values: dict[str, Tensor]) -> None:
        own, own_bias = step.weight, step.bias
        bias = None if own_bias is None else values.get(own_bias.tensor)
        operand = [own.operand(values[own.tensor])]
        # Where all rows are folded nobody but the step has the tensor now, so it can let it go.
        stored = None if own.whole else values[own.tensor]
        del values[own.tensor]
        weight, new_bias = step.apply(operand.pop(), None if bias is None or own_bias is None else own_bias.take(bias))
        values[own.tensor] = own.put_operand(stored, weight)
        if own_bias is None:
            if new_bias is not None:
                raise GraftError("GC050", f"{step.adaptation!r} needs a bias, and {step.site} has no place for one")
            return
        if new_bias is None:
            new_bias = torch.zeros(own_bias.own_shape, dtype=torch.float64, device=weight.device)
        if bias is None and bool(new_bias.any()):
            bias = torch.zeros(own_bias.shape, dtype=torch.float64, device=weight.device)
        if bias is not None:
            values[own_bias.tensor] = own_bias.put(bias, new_bias)

    def dtype(self, name: str) -> torch.dtype:
        """What a folded tensor is rounded to: its base's type, or that of the weight beside which it is added."""
        return self.store.get(name if name in self.store else self.chain(name)[0].weight.tensor).dtype

    def folded(self, name: str) -> Tensor:
        """The folded tensor in its base's dtype and layout, rounded once."""
        return round_once(self.exact(name), self.dtype(name)).contiguous()


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype`` to nearest even, correctly also for bfloat16 and float16.

    torch converts float64 to 16 bits through float32, which rounds twice. It only makes a difference where the float32
    is in the middle between two neighbours; below float16's least normal number middles are anywhere.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    nearest = value.float()
    found = nearest.to(dtype)
    dropped = 16 if dtype is torch.bfloat16 else 13
    doubtful = nearest.view(torch.int32).bitwise_and((1 << dropped) - 1) == 1 << (dropped - 1)
    if dtype is torch.float16:
        doubtful |= nearest.abs() < torch.finfo(dtype).tiny
    if bool(doubtful.any()):
        found[doubtful] = _round_through_odd(value[doubtful], dtype)
    return found


def _round_through_odd(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_once` for all numbers: a float32 rounded to odd shows the second rounding what the first one dropped."""
    nearest = value.float()
    exact = nearest.double()
    toward_zero = torch.where(exact.abs() > value.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    inexact = (exact != value) & value.isfinite() & nearest.isfinite()
    odd = toward_zero.view(torch.int32) | inexact.int()
    return torch.where(inexact, odd.view(torch.float32), nearest).to(dtype)
