"""A spec compiled once for a model, from which steps of any size are planned by simulation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftc.applications.planner.fitting import largest
from graftc.applications.planner.inputs import Inputs
from graftc.applications.planner.optimisers import Make, state_of, usual
from graftc.applications.planner.sharding import communication, shard_bytes
from graftc.compat.tensors import storage_sizes
from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.compilation import Compilation
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.core.weights.sharding import Spread
from graftc.records.applications.memory import MemoryPlan
from graftc.runtime.activations.workspaces import running_on
from graftc.runtime.api import compile
from graftc.runtime.model.runner import runner_of
from graftc.runtime.model.simulated_step import Simulation
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError

TOKENS = 64
"""The increment, in tokens, with which sequence lengths are searched."""

_MOST = 1 << 20


@dataclass(frozen=True)
class Training:
    """The settings of a training step.

    Attributes:
        optimizer: an optimiser's name, a function that creates one from parameters, or None for the default.
        devices: the number of devices that share parameters, gradients and optimiser state.
        device: the device type to plan for.
        accumulate: whether gradients from other micro-batches already exist.
    """

    optimizer: str | Make | None = None
    devices: int = 1
    device: str = "cuda"
    accumulate: bool = False


class Workbench:
    """Planner for the training steps of one spec on one model.

    Args:
        spec, model, example_inputs: as for `graftc.compile`.
        training: the settings of a step.
        dtype: the dtype of the base; None for its own.
        cache: whether to keep captured graphs in the user's cache folder.
    """

    def __init__(
        self,
        spec: Spec,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        training: Training = Training(),
        *,
        dtype: torch.dtype | None = None,
        cache: bool = True,
    ) -> None:
        if dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
            model = _without_values(model, dtype)
        device, devices = training.device, training.devices
        self._device, self._devices, self._accumulate = device, devices, training.accumulate
        # Values do not matter; a fixed seed avoids asking other processes for theirs.
        self._compiled = compile(spec, model, example_inputs, seed=0, cache=cache, progress=False)
        self._runner = runner_of(self._compiled)
        if not any(parameter.requires_grad for parameter in self._compiled.parameters()):
            hint = "add an adaptation to the spec"
            raise GraftError("GC073", "nothing trains, so there is no step to plan", hint=hint)
        if devices > 1:
            for controller in self._runner.steering.controllers.values():
                controller.check_spread(Spread(devices, sharded=True))
        self.inputs = Inputs(self._runner.compilation)
        self._simulations: dict[Signature, Simulation] = {}
        self._simulation = self._simulated(self.inputs(2, min(TOKENS, self.inputs.longest or TOKENS)))[0]
        self._optimizer = usual(spec) if training.optimizer is None else training.optimizer
        self._state = state_of(self._simulation, self._optimizer, device, devices)
        self._dtype = str(self._runner.dtype).removeprefix("torch.")
        self._plans: dict[tuple[int, int], MemoryPlan] = {}

    def plan(self, batch: int, sequence: int | None) -> MemoryPlan:
        """Return the memory that a step of a given size takes.

        Args:
            batch: the number of rows on each device.
            sequence: the number of tokens in each row; ignored for models without sequences.

        Raises:
            GraftError: GC073 if the model takes sequences but no length is given, GC143 if the length is too large.
        """
        if self.inputs.sequential and sequence is None:
            message = "the model takes sequences, but no length is given"
            raise GraftError("GC073", message, hint="pass sequence, in tokens")
        key = batch, sequence or 0
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        return self._plans[key]

    def _simulated(self, present: dict[str, Any]) -> tuple[Simulation, Signature]:
        """Return a call's simulation and signature; graphs are captured if the signature is new."""
        signature = signature_for(self._runner.shown.compilation, present)
        if signature not in self._simulations:
            self._simulations[signature] = Simulation(self._runner, self._devices)
        return self._simulations[signature], signature

    def _plan(self, batch: int, sequence: int) -> MemoryPlan:
        present = self.inputs(batch, sequence)
        simulation, signature = self._simulated(present)
        with running_on(self._device):
            simulated = simulation.step(signature, present, accumulated=self._accumulate)
            peak = simulated.peak
            if self._runner.steering.controllers:
                steered = simulation.step(signature, present, accumulated=self._accumulate, steered=True)
                peak = max(peak, steered.peak)
        trained = {id(p) for p in self._simulation.trained}
        parameters = list(self._simulation.module.parameters())
        sizes = [shard_bytes(p, self._devices) for p in parameters]
        trainable = sum(size for p, size in zip(parameters, sizes, strict=True) if id(p) in trained)
        return MemoryPlan(
            batch=batch,
            sequence=sequence if self.inputs.sequential else None,
            dtype=self._dtype,
            checkpoint=bool(self._runner.is_activation_checkpointing),
            optimizer=_name_of(self._optimizer),
            devices=self._devices,
            device=self._device,
            frozen=sum(sizes) - trainable,
            originals=_originals(self._runner.compilation, self._devices),
            trainable=trainable,
            buffers=_bytes(self._simulation.module.buffers()),
            inputs=_bytes(value for value in present.values() if isinstance(value, Tensor)),
            gradients=trainable,
            optimizer_state=self._state.kept,
            saved=simulated.kept,
            step=peak + (trainable if self._accumulate else 0),
            communication=communication(self._simulation, self._devices, self._device),
            update=self._state.step,
        )

    def _largest_sequence(self, batch: int, budget: int, first: int) -> int | None:
        """Return the largest sequence length for which a batch fits into a budget.

        The length is a multiple of `TOKENS`, or the model's maximum; it is 0 if nothing fits, and None if the model
        takes no sequences. The search begins with ``first``.
        """
        if not self.inputs.sequential:
            return None
        end = self.inputs.longest or TOKENS * _MOST

        def tokens(steps: int) -> int:
            return min(TOKENS * steps, end)

        steps = largest(
            lambda count: self.plan(batch, tokens(count)).peak, budget, -(-end // TOKENS), first // TOKENS or 1
        )
        return tokens(steps) if steps else 0

    def fitted(self, plan: MemoryPlan, budget: int) -> MemoryPlan:
        """Return the plan, extended by the largest sizes that fit into a budget; a size is 0 if nothing fits."""
        batch = largest(lambda rows: self.plan(rows, plan.sequence).peak, budget, _MOST, plan.batch)
        sequence = self._largest_sequence(plan.batch, budget, plan.sequence or TOKENS)
        return replace(plan, budget=budget, largest_batch=batch, largest_sequence=sequence)


def _originals(compilation: Compilation, processes: int) -> int:
    """Return the bytes of base parameters that trained copies replace, counting only the rows that train."""
    store, originals = compilation.store, 0
    for own in {edit.own.as_stored for edit in compilation.tensor_edits.copies()}:
        tensors = [store.get(name) for name in store.parts_of(own.tensor)]
        size = sum(shard_bytes(part, processes) for part in tensors if isinstance(part, nn.Parameter))
        originals += size if own.whole else size * own.count // own.total
    return originals


def _bytes(tensors: Any) -> int:
    return sum(storage_sizes(tensors).values())


def _name_of(optimizer: str | Callable[..., Any]) -> str:
    return optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)


def _without_values(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model on the meta device, with its floating-point parameters in another dtype."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        is_parameter = isinstance(tensor, nn.Parameter)
        cast = dtype if is_parameter and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=cast, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
