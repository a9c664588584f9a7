"""Code for training graphs that keeps less for the backward pass than autograd would."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from graftc.compat.autograd import is_transformed, saved_tensor_hooks
from graftc.compat.fake_tensors import FakeTensorMode
from graftc.compat.modes import no_modes
from graftc.compat.tensors import storage_key, storage_sizes
from graftc.compiler.capture.isolation import is_traced
from graftc.passes.core.grouping import grouped_pairs
from graftc.passes.core.ir.codegen import RECENT, Function, code_of, placed, tensor_at
from graftc.passes.core.ops.unpack import unpacked
from graftc.passes.core.packing.gradients import is_open
from graftc.passes.core.weights.containers import OWN
from graftc.runtime.activations.budget import Call, Choices, chosen
from graftc.runtime.activations.frames import Casts, Frame, FrameCode, Hooks, PartCode, casts_of
from graftc.runtime.activations.minimum_cut import ActivationPlan, Recomputation, kept_by, plans
from graftc.runtime.activations.offload import offload_of
from graftc.runtime.activations.recording import Recorded, fake, record
from graftc.specs.errors.diagnostics import warn


class Kind(NamedTuple):
    """The properties of a call, other than its graph, on which a plan depends.

    Attributes:
        wanted: for each tensor that the graph reads, whether it requires a gradient; for the codes of a packed weight,
            whether the weight does.
        casts: the autocast settings.
        size: the size of the inputs, on a scale of powers of four.
    """

    wanted: tuple[bool, ...]
    casts: Casts
    size: int


def training_code(
    function: Function,
    graph: fx.Graph,
    device: torch.device,
    *,
    plain: bool = False,
    budget: float | None = None,
    offload: bool = False,
) -> TrainingCode:
    """Return the code for a training graph; equal graphs share the code and its plans.

    Args:
        function: the code that `graftc.passes.core.ir.codegen` generates from the graph.
        graph: the graph itself.
        device: the device of the tensors that the graph creates.
        plain: whether to keep what autograd keeps, except the values of packed weights.
        budget: the bytes of activations to keep, as a fraction of those that autograd keeps on its own.
        offload: whether to store kept activations in host memory, if the graph runs on another device.
    """
    away = device if offload and device.type not in ("cpu", "meta") else None
    return RECENT.get(
        (function, plain, budget, away), lambda: TrainingCode(function, placed(graph, device), plain, budget, away)
    )


@dataclass(frozen=True)
class Planned:
    """The plans for calls of one kind, with their code.

    Attributes:
        plans: the plans, from the fastest to the one that keeps least; empty if the graph cannot run without values.
        codes: the code of each plan; None for autograd's own choice.
        reason: why there is no plan.
    """

    plans: tuple[ActivationPlan, ...]
    codes: tuple[FrameCode | None, ...]
    reason: str = ""


class TrainingCode:
    """The code for a training graph: ``f(module, *inputs)``.

    Args:
        function: the plain code.
        graph: the graph from which it was generated.
        plain, budget: as for `training_code`.
        away: the device from which to move kept activations to host memory; None to leave them on the device.

    Attributes:
        planned: the plans, by kind of call.
    """

    def __init__(
        self, function: Function, graph: fx.Graph, plain: bool, budget: float | None, away: torch.device | None
    ) -> None:
        self.function, self.plain, self._graph, self._budget, self._away = function, plain, graph, budget, away
        self._names = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"))
        self._unpacks = any(node.target is unpacked for node in graph.nodes)
        self._results: dict[tuple[Any, ...], tuple[Call, Any]] = {}
        self.planned: dict[Kind, Planned] = {}

    @property
    def size(self) -> int:
        """The number of values that the code computes."""
        return sum(node.op == "call_function" for node in self._graph.nodes)

    def __deepcopy__(self, memo: Any) -> TrainingCode:
        return self  # code contains no tensors

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        """Run the graph."""
        if (self.plain and not self._unpacks) or is_traced() or not torch.is_grad_enabled() or is_transformed():
            return self.function(module, *inputs)
        kind = self.kind(module, inputs)
        hooks, choices = _hooks(), choices_of(module)
        choice = choices.get((self, kind))
        if choice is None:
            if hooks is not None:
                return self.function(module, *inputs)  # the hooks' owner relies on all calls saving the same tensors
            self.choose(module, inputs, kind)
            choice = choices[self, kind]
        codes = self.planned[kind].codes
        code = codes[choice.level] if codes else None
        if hooks is None and self._away is not None:
            hooks = self._taken_away(module)
        if code is None:
            with nullcontext() if hooks is None else saved_tensors_hooks(*hooks):
                return self.function(module, *inputs)
        return Frame(code, module, hooks, kind.casts).run(inputs)

    def prepare(self, module: nn.Module, inputs: Sequence[Any]) -> None:
        """Choose the plan for calls of this kind, as the first such call would do."""
        kind = self.kind(module, inputs)
        if not (self.plain and not self._unpacks) and (self, kind) not in choices_of(module):
            self.choose(module, inputs, kind)

    def _taken_away(self, module: nn.Module) -> Hooks:
        """Return hooks that move kept tensors, except the model's own, to host memory."""
        assert self._away is not None
        own = {storage_key(tensor_at(module, name)) for name in self._names}
        offload = offload_of(self._away)
        return partial(offload.pack, own), offload.unpack

    def kind(self, module: nn.Module, inputs: Sequence[Any]) -> Kind:
        """Return the kind of a call, for which plans are made."""
        given = [value for value in inputs if isinstance(value, Tensor)]
        tensors = [*(tensor_at(module, name) for name in self._names), *given]
        devices = {tensor.device.type for tensor in tensors}
        size = sum([tensor.numel() for tensor in given]).bit_length() // 2
        wanted = tuple([tensor.requires_grad or (self._unpacks and is_open(tensor)) for tensor in tensors])
        return Kind(wanted, casts_of(sorted(devices)), size)

    def choose(self, module: nn.Module, inputs: Sequence[Any], kind: Kind) -> None:
        """Choose plans for this graph and the layers that it calls, which share one budget."""
        mode, calls = FakeTensorMode(), list[Call]()
        with no_modes():
            call, _ = self._call(module, fake(list(inputs), mode), kind, mode, calls)
        kept = chosen([*calls, call], self._budget)
        if self._budget is not None and kept > 1.001 * self._budget:
            message = f"{kept:.0%} of the bytes that autograd keeps are kept, but the budget is {self._budget:.0%}"
            warn("GC153", message, hint="raise the budget; the kept activations cannot be recomputed")

    def _call(
        self, module: nn.Module, inputs: Sequence[Any], kind: Kind, mode: FakeTensorMode, calls: list[Call]
    ) -> tuple[Call, Any]:
        """Return the call for fake inputs, with its results; add the layer calls within it to ``calls``."""
        choices, key = choices_of(module), (self, kind)
        try:
            recorded = self._record(module, inputs, mode, calls)
        except Exception as error:  # an operator may raise any error without values: the graph then runs unchanged
            calls.clear()
            self.planned.setdefault(kind, Planned((), (), f"{type(error).__name__}: {error}".splitlines()[0]))
            return Call(choices, key, ()), None
        if kind not in self.planned:

            def is_buffer(name: str) -> bool:
                return not isinstance(tensor_at(module, name), nn.Parameter)

            available = [ActivationPlan((), recorded.saved_bytes)]
            if not self.plain or self._unpacks:
                only = (unpacked,) if self.plain else None
                available = plans(self._graph, recorded, is_buffer, self._budget is not None, only)
            codes = tuple(self._framed(module, recorded, plan.parts) if plan.parts else None for plan in available)
            self.planned[kind] = Planned(tuple(available), codes)
        planned = self.planned[kind].plans
        given = storage_sizes(t for t in inputs if isinstance(t, Tensor))
        kept = tuple(kept_by(plan.parts, recorded) for plan in planned)
        return Call(choices, key, planned, kept, recorded.saved_bytes, sum(given.values())), recorded.results

    def _record(self, module: nn.Module, inputs: Sequence[Any], mode: FakeTensorMode, calls: list[Call]) -> Recorded:
        def layer(block: Any, key: str, *given: Any) -> Any:
            return block._graftc.functions[key].results(block, given, mode, calls)

        layers = {str(node.target): layer for node in self._graph.nodes if node.op == "call_module"}
        return record(self._graph, module, inputs, layers, mode)

    def results(self, module: nn.Module, inputs: Sequence[Any], mode: FakeTensorMode, calls: list[Call]) -> Any:
        """Return a layer's fake results for fake inputs, and add its call to ``calls``."""
        kind = self.kind(module, inputs)
        key = (kind, *(_seen(value) for value in inputs))
        if key not in self._results:
            self._results[key] = self._call(module, inputs, kind, mode, calls)
        call, results = self._results[key]
        if results is None:
            raise RuntimeError(self.planned[kind].reason)
        calls.append(replace(call, choices=choices_of(module)))
        return fake(results, mode)

    def _framed(self, module: nn.Module, recorded: Recorded, parts: Sequence[Recomputation]) -> FrameCode:
        """Return the code of the graph with marks, and the code of its parts."""
        roots = list(dict.fromkeys(root for part in parts for root in part.roots))
        where = {target: (n, at) for n, part in enumerate(parts) for at, target in enumerate(part.targets)}
        marked = _marked(self._graph, recorded, roots, list(where))
        codes = tuple(_part_code(part, roots, module) for part in parts)
        return FrameCode(code_of(marked).over(module), codes, tuple(where.values()))


def choices_of(module: nn.Module) -> Choices:
    """Return the plan chosen for each kind of call of a module."""
    return cast(Choices, vars(module)[OWN].choices)


def _seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def _hooks() -> Hooks | None:
    """Return the current saved-tensor hooks; within a frame, those of the frame's caller."""
    hooks = saved_tensor_hooks()
    frame = getattr(hooks[0], "__self__", None) if hooks is not None else None
    return frame.hooks if isinstance(frame, Frame) else hooks


def _marked(graph: fx.Graph, recorded: Recorded, roots: Sequence[fx.Node], targets: Sequence[fx.Node]) -> fx.Graph:
    """Return a copy of a graph that takes a frame as first input, and tells it which values to keep and to release."""
    marked = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    frame = marked.placeholder("frame")
    marked.output(marked.graph_copy(graph, mapping))
    place = {node: number for number, node in enumerate(graph.nodes)}
    first = next(node for node in marked.nodes if node.op != "placeholder")
    sharing = grouped_pairs((storage, node) for node, storage in recorded.storages.items())
    for index, target in enumerate(targets):
        readers = [user for node in sharing[recorded.storages[target]] for user in (node, *node.users)]
        last = max((user for user in readers if user.op != "output"), key=place.__getitem__)
        with marked.inserting_after(mapping[last]):
            marked.call_function(Frame.mark, (frame, index, mapping[target]))
    for index, root in enumerate(roots):
        context = marked.inserting_before(first) if root.op == "placeholder" else marked.inserting_after(mapping[root])
        with context:
            marked.call_function(Frame.keep, (frame, index, mapping[root]))
    return marked


def _part_code(part: Recomputation, roots: Sequence[fx.Node], module: nn.Module) -> PartCode:
    graph = fx.Graph()
    mapping = {root: graph.placeholder(f"r{number}") for number, root in enumerate(part.roots)}
    read = [operand for node in part.nodes for operand in node.all_input_nodes if operand.op == "get_attr"]
    parameters = dict.fromkeys(str(operand.target) for operand in read)
    names = {name: graph.placeholder(f"p{number}") for number, name in enumerate(parameters)}

    def value(node: fx.Node) -> fx.Node:
        return names[str(node.target)] if node.op == "get_attr" else mapping[node]

    for node in part.nodes:
        mapping[node] = graph.node_copy(node, value)
    graph.output(tuple(mapping[target] for target in part.targets))
    return PartCode(code_of(graph).function, tuple(roots.index(root) for root in part.roots), tuple(names))
