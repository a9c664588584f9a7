"""What happens beside the graph while training: controllers between optimiser steps, and objectives beside the loss.

Their state lives in persistent buffers of the Store, so that a checkpoint or an artifact holds it and a resumed run
goes on to the bit.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.sharding import Spread
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place

S = TypeVar("S", bound=MethodSpec)
STEP = "step"
"""Part name of the buffer that counts optimiser steps; every adaptation with a controller has one."""


class Phased(Protocol):
    """A spec whose schedule has phases at both ends of the training in which nothing is pruned."""

    @property
    def name(self) -> str | None:
        """The adaptation's."""

    @property
    def warmup_steps(self) -> int:
        """Those at its beginning."""

    @property
    def final_steps(self) -> int:
        """Those at its end."""


def check_phases(spec: Phased, total: int) -> None:
    """Hold the phases of a schedule against the number of optimiser steps.

    Raises:
        GraftError: GC026 where they leave no step to prune in.
    """
    if spec.warmup_steps + spec.final_steps >= total:
        raise GraftError(
            "GC026",
            f"{spec.name!r} has {spec.warmup_steps} steps of warm-up and {spec.final_steps} final ones, which leaves "
            f"none of {total} to prune in",
            place=Place(path="warmup_steps" if spec.warmup_steps else "final_steps"),
            hint="lower warmup_steps or final_steps, or train longer",
        )


def unknown_length(what: str) -> GraftError:
    """The error of a schedule, of ``what`` falls over the training, where nobody has said how long that is."""
    hint = "call compiled.begin(total_steps) before training, or set total_steps in the spec"
    return GraftError("GC026", f"{what} falls over the whole training", hint=hint)


def no_steps(device: torch.device) -> Tensor:
    """The first value of the buffer `STEP`."""
    return torch.zeros(1, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class AdaptedSite(Generic[S]):
    """One adapted place with its live tensors.

    Attributes:
        site: where.
        spec: the adaptation with the site's overrides applied.
        tensors: its parameters and buffers, by part; looked up anew each time, since moving a model replaces buffers.
        base: the base's tensors by their Store names.
    """

    site: Site
    spec: S
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor] = field(default_factory=dict)


class Steering(ABC, Generic[S]):
    """Base of controllers and objectives of one adaptation.

    Args:
        spec: the adaptation.
        places: every adapted place.
        shared: tensors of the adaptation as a whole, by part.
    """

    optimiser: torch.optim.Optimizer | None = None
    """The optimiser, where it is one of `graftc.optim`, which say so when they are made."""

    def __init__(self, spec: S, places: Sequence[AdaptedSite[S]], shared: Mapping[str, Tensor]) -> None:
        self.spec, self.places, self.shared = spec, places, shared

    @classmethod
    def wanted(cls, spec: S) -> bool:
        """Whether there is anything to do for an adaptation; False where its weight or threshold is 0."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """That of a copied model, which has no optimiser yet."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        held = {name: value for name, value in vars(self).items() if name != "optimiser"}
        vars(copied).update(copy.deepcopy(held, memo))
        return copied


class Controller(Steering[S]):
    """Changes values after each optimiser step, never shapes: budgets, gates, masks.

    Gradients are those of the step that was just taken: it runs after ``optimizer.step()`` and before
    ``optimizer.zero_grad()``, once per optimiser step however many micro-batches that had.
    """

    total: int | None = None
    """How many optimiser steps there will be; None until `begin` says so."""

    def begin(self, total: int) -> None:
        """Say how many optimiser steps the whole training has, those before a resume included.

        Raises:
            GraftError: GC026 where a schedule does not fit into that many.
        """
        self.total = total

    @property
    def steps(self) -> int:
        """How many optimiser steps there have been, those before a resume included."""
        return int(self.shared[STEP])

    def check_spread(self, spread: Spread) -> None:
        """A forward pass of a training over several processes follows. Tensors that are sharded are whole in `step`.

        Raises:
            GraftError: GC130 where that cannot be.
        """

    def figures(self, place: AdaptedSite[S]) -> Mapping[str, Tensor | float]:
        """Numbers by name that say what it has done at a place and that no tensor says; see `Figured`. By default
        none."""
        return {}

    def before_forward(self) -> None:
        """A forward pass of a training follows: what has to be there for its backward pass. Compiled code comes without
        it."""

    def pause(self) -> None:
        """Something else than training follows: evaluation, copying, passes of the base. Backward passes of what was
        run before may still come."""

    def skip_step(self) -> None:
        """The gradients since the last optimiser step have been thrown away, as a gradient scaler does with infinite
        ones."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimiser step, and do what is to be done after it."""
        self.shared[STEP].add_(1)
        self.step(self.steps)

    @abstractmethod
    def step(self, number: int) -> None:
        """Change values after the optimiser step of this number, from 1; no gradients are recorded."""


class TensorObjective(Steering[S]):
    """A term beside the loss that depends on adapter tensors only, so that it counts once per optimiser step."""

    @abstractmethod
    def value(self) -> Tensor:
        """The term, a scalar with a gradient."""


class OutputObjective(Steering[S]):
    """A term beside the loss that compares the outputs of several forward passes of one call, in train mode.

    Whatever the graph draws, dropout masks and routes, each pass draws anew. The caller gets the outputs of the first.
    Where they have a loss the term is added to it; otherwise it waits for the next `extra_loss`.
    """

    passes: ClassVar[int] = 2
    """How many forward passes it takes."""

    @abstractmethod
    def value(self, outputs: Sequence[Mapping[str, Tensor]], counted: Tensor | None) -> Tensor:
        """The term, a scalar with a gradient.

        Args:
            outputs: tensors by name for each of `passes`, as ``logits``; numbered where a field of the output has
                several.
            counted: which positions predict a label, ``bool[batch, sequence]``; None where no labels for positions
                were given.
        """
