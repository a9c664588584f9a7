"""Work outside the graph during training: controllers between optimiser steps, and objectives in addition to the loss.

Their state is stored in persistent buffers of the Store, so that a checkpoint or an artifact contains it and a resumed
run continues with bitwise the same values.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.sharding import Spread
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

S = TypeVar("S", bound=MethodSpec)
STEP = "step"
"""Part name of the buffer that counts optimiser steps; every adaptation with a controller has one."""


def unknown_length(what: str) -> GraftError:
    """Return the error for a schedule of ``what`` over a training whose length has not been set."""
    hint = "call compiled.begin(total_steps) before training, or set total_steps in the spec"
    return GraftError("GC026", f"{what} falls over the whole training", hint=hint)


def zero_state(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    """Return a function from a device to zeros there: the first value of state, for `Builder.buffer`."""
    return lambda device: torch.zeros(tuple(shape), dtype=dtype, device=device)


no_steps = zero_state([1], torch.int64)
"""The first value of the buffer `STEP`."""


@dataclass(frozen=True)
class AdaptedSite(Generic[S]):
    """One adapted place with its live tensors.

    Attributes:
        site: the adapted site.
        spec: the adaptation with the site's overrides applied.
        tensors: its parameters and buffers, by part; looked up again each time, since moving a model replaces buffers.
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
        """Return whether there is anything to do for an adaptation; False if its weight or threshold is 0."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy for a copied model, which has no optimiser yet."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = {name: value for name, value in vars(self).items() if name != "optimiser"}
        vars(copied).update(copy.deepcopy(state, memo))
        return copied


class Controller(Steering[S]):
    """Changes values after each optimiser step, never shapes: budgets, gates, masks.

    Gradients are those of the step that was just taken: it runs after ``optimizer.step()`` and before
    ``optimizer.zero_grad()``, once per optimiser step however many micro-batches that had.
    """

    total: int | None = None
    """How many optimiser steps there will be; None until `begin` says so."""

    def begin(self, total: int) -> None:
        """Set the number of optimiser steps of the whole training, including those before a resume.

        Raises:
            GraftError: GC026 if a schedule does not fit into that many.
        """
        self.total = total

    @property
    def steps(self) -> int:
        """The number of optimiser steps that have been taken, including those before a resume."""
        return int(self.shared[STEP])

    def check_spread(self, spread: Spread) -> None:
        """Check that training over several processes is possible; called before each forward pass of one.

        Tensors that are sharded are whole in `step`.

        Raises:
            GraftError: GC130 if it is not possible.
        """

    def figures(self, place: AdaptedSite[S]) -> Mapping[str, Tensor | float]:
        """Return numbers by name that describe its work at a place and that no tensor contains; see `Figured`.

        By default, there are none.
        """
        return {}

    def before_forward(self) -> None:
        """Prepare the backward pass of the next forward pass of a training; compiled code does not call this."""

    def pause(self) -> None:
        """Prepare for something other than training: evaluation, copying, passes of the base.

        Backward passes of forward passes that were run before may still follow.
        """

    def skip_step(self) -> None:
        """Respond to the discarding of the gradients since the last optimiser step.

        A gradient scaler discards infinite ones, for example.
        """

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimiser step, and do the work that is due after it."""
        self.shared[STEP].add_(1)
        self.step(self.steps)

    @abstractmethod
    def step(self, number: int) -> None:
        """Change values after the optimiser step of this number, from 1; no gradients are recorded."""


class TensorObjective(Steering[S]):
    """A term in addition to the loss that depends on adapter tensors only, so it counts once per optimiser step."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return the term, a scalar with a gradient."""


class OutputObjective(Steering[S]):
    """A term beside the loss that compares the outputs of several forward passes of one call, in train mode.

    Whatever the graph draws, dropout masks and routes, each pass draws anew. The caller gets the outputs of the first.
    Where they have a loss the term is added to it; otherwise it waits for the next `extra_loss`.
    """

    passes: ClassVar[int] = 2
    """How many forward passes it takes."""

    @abstractmethod
    def value(self, outputs: Sequence[Mapping[str, Tensor]], counted: Tensor | None) -> Tensor:
        """Return the term, a scalar with a gradient.

        Args:
            outputs: tensors by name for each of `passes`, such as ``logits``; numbered if a field of the output has
                several.
            counted: the positions that predict a label, ``bool[batch, sequence]``; None if no labels for positions were
                given.
        """
