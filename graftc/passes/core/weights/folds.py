"""Folds: the changes that adaptations make to base weights, expressed as algebra on lazy tensors.

A fold step is a pure function of a site's oriented rows, ``(W, b) -> (W', b')`` with ``W: [..., rows, in]`` in float64.
Steps compose in insertion order (LoRA followed by scaling differs from scaling followed by LoRA), and the result is
rounded once, at the end.
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
    """A fold that changes the site's weight and bias.

    Attributes:
        apply: ``(W, b) -> (W', b')``; ``W`` is ``[..., rows, in]`` (with any expert axis first) and ``b`` is ``[rows]``
            or None, both float64. It may return a bias although ``b`` is None: the folded model then declares the bias
            as an addition. The function owns its arguments and may write to them; it must release everything that it
            allocates except its results.
    """

    apply: WeightFunction


def weight_fold(change: Callable[[Tensor], Tensor]) -> WeightFold:
    """Return a fold that changes only the site's weight: ``W' = change(W)``; see `WeightFold.apply`."""

    def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        only = [weight]  # the only reference, so that `change` can release it
        del weight
        return change(only.pop()), bias

    return WeightFold(apply)


@dataclass(frozen=True)
class Keep:
    """A fold result for an adaptation that stays in the graph; ``reason`` explains why it cannot fold."""

    reason: str


@dataclass(frozen=True)
class StandIn:
    """The fold of an overlay: the trained tensors replace base tensors, and nothing else needs to be folded."""


@dataclass(frozen=True)
class TensorFold:
    """A fold that changes base tensors wherever they are read, before all adaptations at sites.

    Attributes:
        changes: for each tensor, by its name within its module, a function from its stored values in float64 to its new
            values.
    """

    changes: Mapping[str, Callable[[Tensor], Tensor]]


Fold = WeightFold | TensorFold | StandIn | Keep


@dataclass(frozen=True)
class FoldStep:
    """One adaptation's change to one site's tensors.

    Attributes:
        adaptation: name of the adaptation.
        site: the site, as text.
        weight: the site's own rows of its weight, or the part of a single tensor that is replaced.
        bias: the same rows of the bias, even if the fold would have to add it; None for a single tensor.
        apply: the function to apply to the weight's operand and the bias.
        copies: whether a trained copy replaces the values, on top of which all other steps apply.
    """

    adaptation: str
    site: str
    weight: WeightSlice
    bias: WeightSlice | None
    apply: WeightFunction
    copies: bool = False

    @classmethod
    def of_tensor(cls, adaptation: str, site: str, own: WeightSlice, change: Callable[[Tensor], Tensor]) -> FoldStep:
        """Return the step that changes a single tensor by a function from its stored values to its new values."""
        return cls(adaptation, site, own, None, weight_fold(change).apply)

    @classmethod
    def of_copy(cls, adaptation: str, site: str, own: WeightSlice, value: Callable[[], Tensor]) -> FoldStep:
        """Return the step that replaces a slice by a trained copy.

        Args:
            adaptation, site: as for the class.
            own: the slice that is replaced.
            value: returns the slice's trained operand; it is not modified.
        """
        return cls(adaptation, site, own, None, lambda *_: (value().to(torch.float64, copy=True), None), True)

    @property
    def parts(self) -> tuple[WeightSlice, ...]:
        """The slices that the step changes."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that the step changes."""
        return tuple(part.tensor for part in self.parts)


@dataclass(frozen=True)
class FoldGroup:
    """Tensors that are folded together because one step changes them all, or one map reads them all.

    Attributes:
        names: names of the tensors, including biases that folding may add.
        steps: the steps that change them, in insertion order.
    """

    names: tuple[str, ...]
    steps: tuple[FoldStep, ...]


class LazyTensors:
    """Folded tensors that are computed on request, from base tensors and a chain of steps.

    Nothing is cached: callers that need many tensors, or one more than once, should iterate over `groups`. A tied
    tensor changes under all of its names.

    Args:
        store: the Store with the base tensors, which are read but never written.
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
        """The names of the base tensors that folding may change, each once, in order."""
        return tuple(name for name in self._chains if name in self.store)

    def additions(self) -> tuple[str, ...]:
        """Return the biases that folding must add because the base lacks them; this folds the groups concerned."""
        missing = (group for group in self.groups() if any(name not in self.store for name in group.names))
        added = {name for group in missing for name in self.fold(group) if name not in self.store}
        return tuple(name for name in self._chains if name in added)

    def chain(self, name: str) -> tuple[FoldStep, ...]:
        """Return the steps that change the tensor called ``name``."""
        return tuple(self._chains.get(name, ()))

    def groups(self, together: Iterable[Iterable[str]] = ()) -> tuple[FoldGroup, ...]:
        """Return all tensors that folding may change or add, each in exactly one group, in order.

        Args:
            together: sets of tensor names to put into the same group; names that no step changes are skipped.
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
        """Return the base tensors of a group, in full; callers must not write to them."""
        return {name: self.store.full(name) for name in group.names if name in self.store}

    @staticmethod
    def widened(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return float64 copies of tensors."""
        return {name: tensor.to(torch.float64, copy=True) for name, tensor in base.items()}

    def apply(self, steps: Iterable[FoldStep], values: dict[str, Tensor]) -> None:
        """Fold the tensors returned by `widened`, in place, with at most one additional tensor in memory at a time."""
        for step in steps:
            self._apply(step, values)

    def fold(self, group: FoldGroup) -> dict[str, Tensor]:
        """Return a group's folded tensors in float64, without biases that turn out not to be needed."""
        values = self.widened(self.base(group))
        self.apply(group.steps, values)
        return values

    def exact(self, name: str) -> Tensor:
        """Return the folded tensor in float64, before rounding; raise `KeyError` if no step changes it."""
        return self.fold(self._group_of[name])[name]

    @staticmethod
    def _apply(step: FoldStep, values: dict[str, Tensor]) -> None:
        own, own_bias = step.weight, step.bias
        bias = None if own_bias is None else values.get(own_bias.tensor)
        operand = [own.operand(values[own.tensor])]
        # If all rows are folded, only the step refers to the tensor from here on, so the step can release it.
        stored = None if own.whole else values[own.tensor]
        del values[own.tensor]
        weight, new_bias = step.apply(operand.pop(), None if bias is None or own_bias is None else own_bias.take(bias))
        values[own.tensor] = own.put_operand(stored, weight)
        if own_bias is None:
            if new_bias is not None:
                raise GraftError("GC050", f"{step.adaptation!r} needs a bias, but {step.site} has no place for one")
            return
        if new_bias is None:
            new_bias = torch.zeros(own_bias.own_shape, dtype=torch.float64, device=weight.device)
        if bias is None and bool(new_bias.any()):
            bias = torch.zeros(own_bias.shape, dtype=torch.float64, device=weight.device)
        if bias is not None:
            values[own_bias.tensor] = own_bias.put(bias, new_bias)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a folded tensor is rounded to: the base tensor's, or that of an added bias's weight."""
        return self.store.get(name if name in self.store else self.chain(name)[0].weight.tensor).dtype

    def folded(self, name: str) -> Tensor:
        """Return the folded tensor in the dtype of the base tensor, contiguous and rounded once."""
        return round_once(self.exact(name), self.dtype(name)).contiguous()


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype``, to nearest even, without double rounding for bfloat16 and float16.

    torch converts float64 to 16 bits by way of float32, which rounds twice. This makes a difference only if the float32
    value is midway between two neighbours; below float16's smallest normal number, midpoints can be anywhere.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    nearest = value.float()
    rounded = nearest.to(dtype)
    dropped = 16 if dtype is torch.bfloat16 else 13
    doubtful = nearest.view(torch.int32).bitwise_and((1 << dropped) - 1) == 1 << (dropped - 1)
    if dtype is torch.float16:
        doubtful |= nearest.abs() < torch.finfo(dtype).tiny
    if bool(doubtful.any()):
        rounded[doubtful] = _round_through_odd(value[doubtful], dtype)
    return rounded


def _round_through_odd(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `round_once` for arbitrary values.

    Rounding to odd in float32 lets the second rounding detect that the first one was inexact.
    """
    nearest = value.float()
    exact = nearest.double()
    toward_zero = torch.where(exact.abs() > value.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    inexact = (exact != value) & value.isfinite() & nearest.isfinite()
    odd = toward_zero.view(torch.int32) | inexact.int()
    return torch.where(inexact, odd.view(torch.float32), nearest).to(dtype)
