"""Optimisers by name, and the memory of their state and steps, measured on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from graftc.compat.pytree import tree_leaves
from graftc.compat.tensors import storage_sizes
from graftc.runtime import optim
from graftc.runtime.activations.simulated import Tracking, highest
from graftc.runtime.compiled import Compiled
from graftc.runtime.model.simulated_step import Simulation, shard_of
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, unknown_name

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
"""A function that creates an optimiser for the trained parameters."""

_SMALL = 4096
_BLOCK = 256


class DeclaredAdamW8bit(torch.optim.Optimizer):
    """Stand-in for bitsandbytes' ``AdamW8bit``, which runs only on accelerators: its state has the same sizes.

    Each of the two moments takes one byte for each entry, plus one float32 for each block of 256 entries. For tensors
    with fewer than 4096 entries, each moment takes one float32 for each entry.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Create the state; parameters are left unchanged."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for moment in ("1", "2") if not state else ():
                    if p.numel() < _SMALL:
                        state[f"state{moment}"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
                        continue
                    state[f"state{moment}"] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
                    state[f"absmax{moment}"] = torch.zeros(-(-p.numel() // _BLOCK), device=p.device)


def _torch(name: str, **options: Any) -> Callable[[list[Tensor], str], torch.optim.Optimizer]:
    def make(parameters: list[Tensor], device: str) -> torch.optim.Optimizer:
        # By default, torch's optimisers process all tensors at once on accelerators.
        optimiser = getattr(torch.optim, name)(parameters, lr=1e-3, foreach=device != "cpu", **options)
        return cast(torch.optim.Optimizer, optimiser)

    return make


OPTIMISERS: dict[str, Callable[[list[Tensor], str], torch.optim.Optimizer]] = {
    "adamw": _torch("AdamW"),
    "sgd": _torch("SGD"),
    "sgd-momentum": _torch("SGD", momentum=0.9),
    "adafactor": _torch("Adafactor"),
    "adamw8bit": lambda parameters, _: DeclaredAdamW8bit(parameters),
}
"""Optimisers that are created from parameters alone."""

OWN = {"aged-adamw": "AgedAdamW", "sm3": "SM3"}
"""Optimisers from `graftc.optim`, which are created from a compiled model."""


class State(NamedTuple):
    """The memory that an optimiser takes.

    Attributes:
        kept: the size of its state, in bytes.
        step: the peak memory of a step, in bytes, not counting state and gradients.
    """

    kept: int
    step: int


def usual(spec: Spec) -> str:
    """Return the name of the optimiser for a spec: one of graftc's if a method needs it, `sm3` before others."""
    names = {adaptation.usual_optimiser() for adaptation in spec.adapt}
    return next((name for name in ("sm3", *OWN) if name in names), "adamw")


def state_of(simulation: Simulation, optimizer: str | Make, device: str, processes: int) -> State:
    """Return the memory that an optimiser takes, for its state and at the peak of a step.

    Args:
        simulation: the simulation of the model to train.
        optimizer: the name of the optimiser, or a function that creates it from parameters.
        device: the device type on which it runs.
        processes: the number of processes that share its state.

    Raises:
        GraftError: GC091 for an unknown name, GC073 if the optimiser does not run on tensors without values.
    """
    make = _make(simulation, optimizer, device)
    parameters: list[Tensor] = list(simulation.trained)
    if not parameters:
        return State(0, 0)
    module = simulation.module if isinstance(optimizer, str) and optimizer in OWN and processes == 1 else None
    with simulation.mode:
        if module is None:
            shapes = [shard_of(p, processes) for p in parameters]
            parameters = [
                torch.nn.Parameter(torch.empty(shape, dtype=p.dtype, device=p.device))
                for shape, p in zip(shapes, parameters, strict=True)
            ]
        try:
            optimiser = make(parameters)
            gradients = [p.grad for p in parameters]
            for p in parameters:
                p.grad = torch.empty_like(p)
            with Tracking():
                optimiser.step()
            with Tracking() as tracking:
                optimiser.step()
            for p, before in zip(parameters, gradients, strict=True):
                p.grad = before
        except GraftError:
            raise
        except Exception as error:
            what = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "the optimizer")
            message = f"{what} does not run on tensors without values: {type(error).__name__}: {error}"
            raise GraftError("GC073", message.splitlines()[0], hint="pass the name of a similar optimizer") from error
    tensors = [leaf for leaf in tree_leaves(list(optimiser.state.values())) if isinstance(leaf, Tensor)]
    return State(sum(storage_sizes(tensors).values()), highest(tracking.levels))


def _make(simulation: Simulation, optimizer: Any, device: str) -> Make:
    if not isinstance(optimizer, str):
        if not callable(optimizer):
            message = f"the optimizer is a {type(optimizer).__name__}"
            raise GraftError("GC073", message, hint="pass a name, or a function that creates an optimizer")
        return cast(Make, optimizer)
    if optimizer in OPTIMISERS:
        return lambda parameters: OPTIMISERS[optimizer](parameters, device)
    if optimizer in OWN:
        return partial(_own, getattr(optim, OWN[optimizer]), cast("Compiled", simulation.module))
    raise unknown_name("optimizer", optimizer, [*OPTIMISERS, *OWN])


def _own(cls: Any, compiled: Compiled, parameters: list[Tensor]) -> torch.optim.Optimizer:
    mine = {id(p) for p in compiled.parameters()}
    whole = all(id(p) in mine for p in parameters)
    return cast(torch.optim.Optimizer, cls(compiled if whole else parameters))
