"""Work outside the graph during training: controllers between optimiser steps, and objectives in addition to the loss.

Their state is stored in persistent buffers of the Store, so that checkpoints and artifacts contain it and a resumed run
continues with bitwise identical values.
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
"""Part name of the buffer that counts optimiser steps; every adaptation with an active controller has one."""


def unknown_length(what: str) -> GraftError:
    """Return the error for a schedule of ``what`` over a training run whose length has not been set."""
    hint = "call compiled.begin(total_steps) before training, or set total_steps in the spec"
    return GraftError("GC026", f"{what} decreases over the whole training run, whose length is not set", hint=hint)


def zero_state(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    """Return a function that creates zeros on a given device, to pass to `Builder.buffer` as the initial state."""
    return lambda device: torch.zeros(tuple(shape), dtype=dtype, device=device)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision of sums and norms: float32, or float64 if it has that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


no_steps = zero_state([1], torch.int64)
"""The initial value of the buffer `STEP`."""


@dataclass(frozen=True)
class AdaptedSite(Generic[S]):
    """One adapted place with its live tensors.

    Attributes:
        site: the adapted site.
        spec: the adaptation with the site's overrides applied.
        tensors: its parameters and buffers, by part; looked up anew each time, since moving a model replaces buffers.
        base: the base tensors by Store name.
    """

    site: Site
    spec: S
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor] = field(default_factory=dict)


class Steering(ABC, Generic[S]):
    """Base class of an adaptation's controllers and objectives.

    Args:
        spec: the adaptation.
        places: every adapted place.
        shared: the tensors that all places share, by part.
    """

    optimiser: torch.optim.Optimizer | None = None
    """The optimiser, if it is one from `graftc.optim`; these register themselves when they are created."""

    def __init__(self, spec: S, places: Sequence[AdaptedSite[S]], shared: Mapping[str, Tensor]) -> None:
        self.spec, self.places, self.shared = spec, places, shared

    @classmethod
    def wanted(cls, spec: S) -> bool:
        """Return whether an adaptation needs this object; False if, for example, its weight or threshold is 0."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy for a copied model, which has no optimiser yet."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = {name: value for name, value in vars(self).items() if name != "optimiser"}
        vars(copied).update(copy.deepcopy(state, memo))
        return copied


class Controller(Steering[S]):
    """Changes values, but never shapes, after each optimiser step: budgets, gates, masks.

    It runs after ``optimizer.step()`` and before ``optimizer.zero_grad()``, so that the gradients are those of the step
    just taken; it runs once per optimiser step, regardless of the number of micro-batches.
    """

    total: int | None = None
    """The total number of optimiser steps; None until `begin` sets it."""

    def begin(self, total: int) -> None:
        """Set the total number of optimiser steps in the training run, including those before a resume.

        Raises:
            GraftError: GC026 if a schedule does not fit into this number of steps.
        """
        self.total = total

    @property
    def steps(self) -> int:
        """The number of optimiser steps taken so far, including those before a resume."""
        return int(self.shared[STEP])

    def check_spread(self, spread: Spread) -> None:
        """Check that training across several processes is possible; called before each forward pass of such a run.

        In `step`, sharded tensors are whole.

        Raises:
            GraftError: GC130 if it is not possible.
        """

    def figures(self, place: AdaptedSite[S]) -> Mapping[str, Tensor | float]:
        """Return figures by name on the controller's work at a place that are not stored in any tensor; see `Figured`.

        By default, there are none.
        """
        return {}

    def before_forward(self) -> None:
        """Prepare for the backward pass that follows the next training forward pass; not called by compiled code."""

    def pause(self) -> None:
        """Prepare for something other than training: evaluation, copying, forward passes of the base.

        Backward passes of earlier forward passes may still follow.
        """

    def skip_step(self) -> None:
        """React when the gradients computed since the last optimiser step are discarded.

        For example, a gradient scaler discards infinite gradients.
        """

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimiser step, and call `step`."""
        self.shared[STEP].add_(1)
        self.step(self.steps)

    @abstractmethod
    def step(self, number: int) -> None:
        """Change values after optimiser step ``number``, counted from 1; runs without recording gradients."""


class TensorObjective(Steering[S]):
    """A term added to the loss that depends only on adapter tensors, so it is added once per optimiser step."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return the term, a scalar with a gradient."""


class OutputObjective(Steering[S]):
    """A term added to the loss that compares the outputs of several forward passes of the same call, in train mode.

    Each pass samples its own dropout masks and routes. The caller gets the outputs of the first pass. If these contain
    a loss, the term is added to it; otherwise it is kept for the next `extra_loss`.
    """

    passes: ClassVar[int] = 2
    """The number of forward passes to run."""

    @abstractmethod
    def value(self, outputs: Sequence[Mapping[str, Tensor]], counted: Tensor | None) -> Tensor:
        """Return the term, a scalar with a gradient.

        Args:
            outputs: for each of the `passes`, tensors by name, such as ``logits``; names are numbered if an output
                field contains several tensors.
            counted: the positions that predict a label, ``bool[batch, sequence]``; None if the call had no per-position
                labels.
        """
