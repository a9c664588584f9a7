"""A simulated training step of a compiled model, on tensors without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compat.fake_tensors import FakeTensorMode
from graftc.passes.core.ir.functions import calls
from graftc.passes.core.ir.program_key import ProgramKey, Signature
from graftc.passes.graph.outline import outline
from graftc.runtime.activations.recording import fake
from graftc.runtime.activations.simulated import Levels, Tracking, highest
from graftc.runtime.activations.summary import Activations, layers_of
from graftc.runtime.activations.training_code import choices_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.blocks import Block
from graftc.runtime.model.root import Root
from graftc.runtime.model.runner import runner_of
from graftc.runtime.model.shortened import KEPT, Run, Step, deep, runs_of, shorten


class Simulation:
    """A copy of a model on tensors without memory.

    Args:
        runner: the Runner of the model, which is not changed. Tensors on the meta device are assumed to be on a CPU.
        processes: the number of processes that share the gradients: each stores one shard, as with FSDP2.

    Attributes:
        mode: the fake tensor mode of the copy's tensors.
        module: the copy.
        runner: the Runner of the copy.
        trained: the parameters that an optimiser would receive.
    """

    def __init__(self, runner: AdaptedRunner, processes: int = 1) -> None:
        self.mode = FakeTensorMode()
        tensors = [*runner.module.parameters(), *runner.module.buffers()]
        faked = {id(tensor): _faked(tensor, self.mode) for tensor in tensors}
        self.module = copy.deepcopy(runner.module, faked).train()
        self.runner: AdaptedRunner = runner_of(self.module)
        self.runner.hearing.hooked = self.runner.hearing.everywhere = False  # hooks registered here read no values
        stops, self.runner.told, self.runner.stops = self.runner.stops, set(), frozenset()
        if stops or self.runner.device != runner.device:
            self.runner.relower()
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._parts = [(name, part) for name, part in self.module.named_modules() if isinstance(part, (Block, Root))]
        self._processes = processes
        self._shards: list[Tensor] = []
        self._accumulated = self._steered = False

    def step(
        self,
        signature: Signature,
        present: Mapping[str, Any],
        *,
        whole: bool = False,
        accumulated: bool = False,
        steered: bool = False,
    ) -> Activations:
        """Return the activations that a forward and a backward pass store, and the peak memory that they use.

        Args:
            signature: the signature of the call.
            present: the tensors and flags of the call, by name; only the sizes of tensors matter.
            whole: whether to run every layer, instead of only some of the identical ones.
            accumulated: whether this step adds to the gradients of an earlier step, which are not counted.
            steered: whether controllers read gradients, as they do in their first step.
        """
        self._accumulated, self._steered = accumulated, steered
        for _, part in self._parts:
            choices_of(part).clear()  # they were made for other sizes
        key = self.runner.key(signature, "train")
        if not self.runner.shown.has(key) or calls(self.runner.shown.executables[key].program.graph):
            self.runner.install(key, self.runner.program_of(key))
        graph = outline(self.runner.shown.lowered_of(key)).root
        # With a budget, identical layers may store different activations.
        spec = self.runner.shown.compilation.spec
        runs = [] if whole or spec.memory.budget is not None else runs_of(graph, self._kind_in(key))
        if not runs:
            peak = highest(self._run(key, present))
        else:
            peak = self._short(key, graph, runs, present)
            self.runner.run_above(key, graph)
        return Activations(tuple(layers_of(self._parts)), peak)

    def _short(self, key: ProgramKey, graph: fx.Graph, runs: list[Run], present: Mapping[str, Any]) -> int:
        """Return the peak memory use, derived from models with fewer layers."""
        kept = dict.fromkeys(runs, KEPT)

        def levels(counts: Mapping[Run, int]) -> Levels:
            shorter = fx.Graph()
            shorter.output(shorter.graph_copy(graph, {}))
            shorten(shorter, counts)
            self.runner.run_above(key, shorter)
            return self._run(key, present)

        short = levels(kept)
        above = dict(choices_of(self.module))
        peak = deep(short, {run: levels({**kept, run: KEPT + 1}) for run in runs})
        choices_of(self.module).clear()
        choices_of(self.module).update(above)
        blocks = [self.runner.blocks[str(call.target)] for call in graph.find_nodes(op="call_module")]
        for run in runs:
            for index in run.left_out(KEPT):
                first = run.start + (index - run.start) % run.period
                choices_of(blocks[index]).update(choices_of(blocks[first + run.period]))
        return peak

    def _run(self, key: ProgramKey, present: Mapping[str, Any]) -> Levels:
        """Run a step and return, for each of its parts, the bytes in use whenever a tensor is created."""
        own = self.runner
        given = fake(dict(present), self.mode)
        code: Any = own.shown.executables[key].run
        if code.plain:  # plain code makes no choices on its own
            inputs = own.inputs(key, given)
            code.choose(own.module, inputs, code.kind(own.module, inputs))

        def loss() -> Tensor:
            # As in a training loop that stores only the loss, no other result is alive in the backward pass.
            named = zip(own.shown.lowered_of(key).outputs.names, own.run(key, given), strict=True)
            floats = {name: value for name, value in named if isinstance(value, Tensor) and value.requires_grad}
            return floats["loss"] if "loss" in floats else torch.stack([value.sum() for value in floats.values()]).sum()

        tracking = Tracking()
        handles = list(_watched(own, tracking))
        if self._processes > 1:
            for parameter in self.trained:
                register: Any = parameter.register_post_accumulate_grad_hook
                handles.append(register(self._scatter))
        elif self._accumulated:
            self.give_gradients()
        controllers = list(own.steering.controllers.values()) if self._steered else []
        with self.mode, Tracking():
            for controller in controllers:
                controller.before_forward()
        try:
            with self.mode, torch.enable_grad(), tracking:
                torch.autograd.backward(loss())
        finally:
            for handle in handles:
                handle.remove()
            for controller in controllers:
                controller.pause()
            self.module.zero_grad()
            self._shards.clear()
        return tracking.levels

    def give_gradients(self) -> None:
        """Give every trained parameter a gradient."""
        with self.mode:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)

    def _scatter(self, parameter: Tensor) -> None:
        """Replace a gradient with this process's shard of it."""
        if not self._accumulated:
            self._shards.append(parameter.new_empty(shard_of(parameter, self._processes)))
        parameter.grad = None

    def _kind_in(self, key: ProgramKey) -> Callable[[fx.Node], Hashable]:
        """Return a function whose results are equal for calls to identical layers."""

        def kind(call: fx.Node) -> Hashable:
            block = self.runner.blocks[str(call.target)]
            code = block._graftc
            tensors = [*block.named_parameters(), *block.named_buffers()]
            forms = tuple((name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors)
            return code.functions[f"{self.runner.shown.label}{key}#{call.args[0]}"], forms, code.checkpointing

        return kind


def _watched(runner: AdaptedRunner, tracking: Tracking) -> Iterator[Any]:
    """Report to ``tracking`` where layers begin in both passes, and yield the handles that remove the hooks used."""
    calls = -1

    def entered(*_: Any) -> None:
        nonlocal calls
        calls += 1
        tracking.enter(Step(backward=False, call=calls))

    def left(_: nn.Module, __: Any, results: Any) -> None:
        call = calls

        def reached(_: Tensor) -> None:
            tracking.enter(Step(backward=True, call=call))

        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(reached)  # type: ignore[no-untyped-call]

    for block in runner.blocks.values():
        yield nn.Module.register_forward_pre_hook(block, entered)
        yield nn.Module.register_forward_hook(block, left)


def shard_of(tensor: Tensor, processes: int) -> tuple[int, ...]:
    """Return the shape of a tensor's largest shard; FSDP2 splits along the first axis."""
    if processes == 1 or not tensor.dim():
        return tuple(tensor.shape)
    return (-(-tensor.shape[0] // processes), *tensor.shape[1:])


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    faked: Tensor = fake(tensor.detach(), mode)
    with mode:
        return nn.Parameter(faked, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else faked
