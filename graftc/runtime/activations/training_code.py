"""Code of a training graph that keeps less for the backward pass than autograd would."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from graftc.compiler.capture.isolation import is_traced
from graftc.passes.core.ir.codegen import RECENT, Function, code_of, placed, tensor_at
from graftc.passes.core.modes import no_modes
from graftc.passes.core.ops.unpack import unpacked
from graftc.passes.core.packing.gradients import is_open
from graftc.passes.core.weights.containers import OWN
from graftc.runtime.activations.budget import Call, Choices, chosen
from graftc.runtime.activations.frames import Casts, Frame, FrameCode, Hooks, PartCode, casts_of
from graftc.runtime.activations.offload import offload_of
from graftc.runtime.activations.plan import ActivationPlan, Recomputation, kept_by, plans
from graftc.runtime.activations.recording import Recorded, fake, record
from graftc.specs.errors.diagnostics import warn


class Kind(NamedTuple):
    """What a plan depends on beside the graph.

    Attributes:
        wanted: for every tensor that the graph reads, whether it wants a gradient; of codes, whether the weight does.
        casts: autocast.
        size: of the inputs, by powers of four.
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
    """The code of a graph that trains; equal graphs share what is returned, and their plans.

    Args:
        function: the code that `graftc.passes.core.ir.codegen` makes of it.
        graph: the graph itself.
        device: where tensors are that it makes anew.
        plain: keep what autograd keeps, but for the values of packed weights.
        budget: bytes of activations to keep, as a part of those that autograd keeps by itself.
        offload: hold what is kept in the host's memory, where the graph runs on another device.
    """
    away = device if offload and device.type not in ("cpu", "meta") else None
    return RECENT.get(
        (function, plain, budget, away), lambda: TrainingCode(function, placed(graph, device), plain, budget, away)
    )


@dataclass(frozen=True)
class Planned:
    """Ways to run calls of one kind.

    Attributes:
        plans: from the cheapest in time to the one that keeps least; empty where the graph cannot be run without
            values.
        codes: for each of them, None where it is autograd's own choice.
        reason: why there is no plan.
    """

    plans: tuple[ActivationPlan, ...]
    codes: tuple[FrameCode | None, ...]
    reason: str = ""


class TrainingCode:
    """``f(module, *inputs)``.

    Args:
        function: the plain code.
        graph: what it was made of.
        plain, budget: see `training_code`.
        away: the device from which what is kept is taken to the host's memory.

    Attributes:
        planned: by kind of call.
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
        """How many values it computes."""
        return sum(node.op == "call_function" for node in self._graph.nodes)

    def __deepcopy__(self, memo: Any) -> TrainingCode:
        return self  # code holds no tensors

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        """Run the graph."""
        if (
            (self.plain and not self._unpacks)
            or is_traced()
            or not torch.is_grad_enabled()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return self.function(module, *inputs)
        kind = self.kind(module, inputs)
        hooks, choices = _hooks(), choices_of(module)
        choice = choices.get((self, kind))
        if choice is None:
            if hooks is not None:
                return self.function(module, *inputs)  # what others count on may not change between two calls
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
        """Choose how calls of the kind of one are run, as the first of them would."""
        kind = self.kind(module, inputs)
        if not (self.plain and not self._unpacks) and (self, kind) not in choices_of(module):
            self.choose(module, inputs, kind)

    def _taken_away(self, module: nn.Module) -> Hooks:
        """Hooks that take what is kept to the host's memory, but for the model's own tensors."""
        assert self._away is not None
        own = {tensor_at(module, name).untyped_storage()._cdata for name in self._names}
        offload = offload_of(self._away)
        return partial(offload.pack, own), offload.unpack

    def kind(self, module: nn.Module, inputs: Sequence[Any]) -> Kind:
        """What plans are made for."""
        given = [value for value in inputs if isinstance(value, Tensor)]
        tensors = [*(tensor_at(module, name) for name in self._names), *given]
        devices = {tensor.device.type for tensor in tensors}
        size = sum([tensor.numel() for tensor in given]).bit_length() // 2
        wanted = tuple([tensor.requires_grad or (self._unpacks and is_open(tensor)) for tensor in tensors])
        return Kind(wanted, casts_of(sorted(devices)), size)

    def choose(self, module: nn.Module, inputs: Sequence[Any], kind: Kind) -> None:
        """Choose how this graph runs, and how the layers that it calls do, which share its budget."""
        mode, calls = FakeTensorMode(), list[Call]()
        with no_modes():
            call, _ = self._call(module, fake(list(inputs), mode), kind, mode, calls)
        kept = chosen([*calls, call], self._budget)
        if self._budget is not None and kept > 1.001 * self._budget:
            message = f"{kept:.0%} of what autograd keeps is kept, and the budget is {self._budget:.0%}"
            warn("GC153", message, hint="the rest cannot be computed again")

    def _call(
        self, module: nn.Module, inputs: Sequence[Any], kind: Kind, mode: FakeTensorMode, calls: list[Call]
    ) -> tuple[Call, Any]:
        """A call with fake inputs, and its results; adds the layers that it calls to ``calls``."""
        choices, key = choices_of(module), (self, kind)
        try:
            recorded = self._record(module, inputs, mode, calls)
        except Exception as error:  # whatever an operator without values raises: such a graph runs as it is
            calls.clear()
            self.planned.setdefault(kind, Planned((), (), f"{type(error).__name__}: {error}".splitlines()[0]))
            return Call(choices, key, ()), None
        if kind not in self.planned:

            def is_buffer(name: str) -> bool:
                return not isinstance(tensor_at(module, name), nn.Parameter)

            own = ActivationPlan((), recorded.saved_bytes)
            only = (unpacked,) if self.plain else None
            made = [own]
            if not self.plain or self._unpacks:
                made = plans(self._graph, recorded, is_buffer, self._budget is not None, only)
            found = tuple(made)
            codes = tuple(self._framed(module, recorded, plan.parts) if plan.parts else None for plan in found)
            self.planned[kind] = Planned(found, codes)
        planned = self.planned[kind].plans
        given = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in inputs if isinstance(t, Tensor)}
        kept = tuple(kept_by(plan.parts, recorded) for plan in planned)
        return Call(choices, key, planned, kept, recorded.saved_bytes, sum(given.values())), recorded.results

    def _record(self, module: nn.Module, inputs: Sequence[Any], mode: FakeTensorMode, calls: list[Call]) -> Recorded:
        def layer(block: Any, key: str, *given: Any) -> Any:
            return block._graftc.functions[key].results(block, given, mode, calls)

        layers = {str(node.target): layer for node in self._graph.nodes if node.op == "call_module"}
        return record(self._graph, module, inputs, layers, mode)

    def results(self, module: nn.Module, inputs: Sequence[Any], mode: FakeTensorMode, calls: list[Call]) -> Any:
        """Fake results for fake inputs, of a layer, which is added to ``calls``."""
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
        """The graph with marks, and code for its parts."""
        roots = list(dict.fromkeys(root for part in parts for root in part.roots))
        where = {target: (n, at) for n, part in enumerate(parts) for at, target in enumerate(part.targets)}
        marked = _marked(self._graph, recorded, roots, list(where))
        codes = tuple(_part_code(part, roots, module) for part in parts)
        return FrameCode(code_of(marked).over(module), codes, tuple(where.values()), tensor_at)


def choices_of(module: nn.Module) -> Choices:
    """How each kind of call of a module runs."""
    found: Choices = vars(module)[OWN].choices
    return found


def _seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def _hooks() -> Hooks | None:
    """The hooks of saved tensors that are in force beside those of frames."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    frame = getattr(found[0], "__self__", None) if found is not None else None
    return frame.hooks if isinstance(frame, Frame) else found


def _keep(frame: Frame, index: int, value: Any) -> None:
    frame.keep(index, value)


def _mark(frame: Frame, index: int, value: Tensor) -> None:
    frame.mark(index, value)


def _marked(graph: fx.Graph, recorded: Recorded, roots: Sequence[fx.Node], targets: Sequence[fx.Node]) -> fx.Graph:
    """A copy that tells a frame, its first input, of what it keeps and what it need not keep."""
    made = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    frame = made.placeholder("frame")
    made.output(made.graph_copy(graph, mapping))
    place = {node: number for number, node in enumerate(graph.nodes)}
    first = next(node for node in made.nodes if node.op != "placeholder")
    sharing: dict[int, list[fx.Node]] = {}
    for node, storage in recorded.storages.items():
        sharing.setdefault(storage, []).append(node)
    for index, target in enumerate(targets):
        readers = [user for node in sharing[recorded.storages[target]] for user in (node, *node.users)]
        last = max((user for user in readers if user.op != "output"), key=place.__getitem__)
        with made.inserting_after(mapping[last]):
            made.call_function(_mark, (frame, index, mapping[target]))
    for index, root in enumerate(roots):
        context = made.inserting_before(first) if root.op == "placeholder" else made.inserting_after(mapping[root])
        with context:
            made.call_function(_keep, (frame, index, mapping[root]))
    return made


def _part_code(part: Recomputation, roots: Sequence[fx.Node], module: nn.Module) -> PartCode:
    made = fx.Graph()
    mapping = {root: made.placeholder(f"r{number}") for number, root in enumerate(part.roots)}
    read = [operand for node in part.nodes for operand in node.all_input_nodes if operand.op == "get_attr"]
    own = dict.fromkeys(str(operand.target) for operand in read)
    names = {name: made.placeholder(f"p{number}") for number, name in enumerate(own)}

    def value(node: fx.Node) -> fx.Node:
        return names[str(node.target)] if node.op == "get_attr" else mapping[node]

    for node in part.nodes:
        mapping[node] = made.node_copy(node, value)
    made.output(tuple(mapping[target] for target in part.targets))
    return PartCode(code_of(made).function, tuple(roots.index(root) for root in part.roots), tuple(names))
