"""A plain module around one Program, for exporters, with named inputs and outputs and the Store's tensor names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compiler.capture.example_inputs import random_inputs, within_tables
from graftc.compiler.capture.signature import Axis, tie_sizes
from graftc.passes.core.ir.codegen import executable_of, tensor_at
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.packing.forms import EvenSteps, TableEntries
from graftc.passes.core.packing.packed_tensor import dense
from graftc.passes.core.packing.packing import PackedType
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.packed_weights import reading_parts
from graftc.runtime.export.exchange import Exchange
from graftc.runtime.export.inputs import ADAPTER_TENSORS, without
from graftc.runtime.export.settled import settled
from graftc.runtime.model.model_runner import ModelRunner

aten = torch.ops.aten


def _decomposed(program: Program) -> fx.Graph:
    """Return the graph with ``graftc::`` operators replaced by their ATen forms, and as many heads of keys as queries.

    torch's attention broadcasts one head of keys and values, but its ONNX exporter does not.
    """
    graph = program.copy().graph
    for node in graph.nodes:
        node.target = DECOMPOSITIONS.get(node.target, node.target)
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        heads = _heads(node.args[0])
        if heads == 1 or node.kwargs.get("enable_gqa"):
            continue
        for shared in dict.fromkeys(node.args[1:3]):
            if _heads(shared) == 1:
                assert isinstance(shared, fx.Node)
                meta = {"val": shared.meta["val"].expand(-1, heads, -1, -1)}
                node.replace_input_with(
                    shared, insert_call(node, aten.expand.default, (shared, [-1, heads, -1, -1]), meta)
                )
    return graph


def _heads(node: Any) -> int | None:
    """Return the number of heads of queries, keys or values ``[batch, heads, tokens, width]``; None in other forms."""
    value = node.meta["val"]
    return value.shape[1] if value.dim() == 4 and isinstance(value.shape[1], int) else None


@dataclass(frozen=True)
class PackedWeight(PackedType):
    """A packed weight in an exported graph, with a function that reads its parts."""

    parts: Callable[[], Sequence[Tensor]]

    @property
    def has_form(self) -> bool:
        """Whether other software supports its packing."""
        return self.packing.has_form(self.dtype)

    def form(self) -> EvenSteps | TableEntries:
        """Return the weight in a form that other software supports."""
        return self.packing.form(self.parts(), self.shape)


def _packed_weights(program: Program, store: Store) -> dict[str, PackedWeight]:
    """Return the packed weights that a Program reads, by name."""
    names = {str(node.target): None for node in program.graph.find_nodes(op="get_attr")}
    weights: dict[str, PackedWeight] = {}
    for name in names:
        if (packed := store.packed.get(name)) is not None:
            parts = partial(_parts, store, packed.names(name))
            weights[name] = PackedWeight(packed.packing, packed.shape, packed.dtype, parts)
    return weights


def _parts(store: Store, names: Sequence[str]) -> list[Tensor]:
    return [store.full(name) for name in names]


def _otherwise(axis: Axis, tensor: Tensor) -> Tensor:
    """Return other values for an adaptation's tensor, with free axes longer by half."""
    for i, size in enumerate(axis.axes):
        if isinstance(size, str):
            tensor = torch.cat([tensor, tensor.narrow(i, 0, (tensor.shape[i] + 1) // 2)], i)
    return tensor.flip(0) if tensor.dim() else tensor


class ExportModule:
    """One eval Program as a module that holds only the tensors that the Program reads.

    Args:
        runner: the Runner of the compiled or merged model.
        signature: the signature to export.
        exchange: the adaptations whose tensors are inputs, for `runner`.
        apart: if true, packed weights are inputs as well, or constants if other software does not support their
            packing.

    Attributes:
        module: the module.
        program: the Program that it computes.
        axes: the model's own inputs.
        adaptations: the tensors that are inputs as well, by adaptation and full name.
        tensors: the same tensors, by full name and in the order of the inputs, followed by packed weights. Axes that
            depend on an adaptation's size have the size at which the graph is traced.
        values: the exported model's own values of these tensors.
        tensor_axes: the shapes of adaptations' tensors; sizes that are names are free.
        defaults: the values of inputs that a call does not pass, by tensor.
        packed: the types of these packed weights, with their forms for other software.
        inputs: example inputs.

    Raises:
        GraftError: as in `graftc.runtime.export.inputs.tensors_of`.
    """

    def __init__(
        self, runner: ModelRunner, signature: Signature, exchange: Exchange | None = None, *, apart: bool = False
    ) -> None:
        store = runner.store
        program = exchange.program(signature) if exchange else runner.program_of(runner.key(signature, "eval"))
        self.adaptations = exchange.tensors(program) if exchange else {}
        self.tensors = {name: tensor for own in self.adaptations.values() for name, tensor in own.items()}
        self.values = {name: exchange.value(name) if exchange else t for name, t in self.tensors.items()}
        self.tensor_axes = [exchange.axis(name) for name in self.tensors] if exchange else []
        defaults = {name: exchange.default(name) if exchange else None for name in self.tensors}
        self.defaults = {name: default for name, default in defaults.items() if default is not None}
        self._unadapted = exchange.base(signature, self.exported) if exchange else None
        program = self.exported(program)
        constants: dict[str, Tensor] = {}
        apart_weights: dict[str, PackedWeight] = {}
        if apart and store.packed:
            with torch.no_grad():
                program, constants = settled(program, store, self.tensors)
                apart_weights = _packed_weights(program, store)
                constants |= {name: dense(store.get(name)) for name, own in apart_weights.items() if not own.has_form}
        self.packed = {name: own for name, own in apart_weights.items() if own.has_form}
        self.tensors |= {name: store.get(name) for name in self.packed}
        self.program: Program = reading_parts(program, store, apart_weights)
        self.config = getattr(runner, "config", None)
        self._base, self._tensors = runner.compilation.program("train", "base", signature), store
        every = [Axis(s.name, s.dtype, s.shape) for s in self.program.inputs]
        self.axes = [axis for axis in every if self.taken(axis)]
        self.inputs: Mapping[str, Any] = self._traced(self.sample(sizes=(3, 7)) | self._as_input(self.tensors))
        self.module = nn.Module()
        without(store, self.program, self.tensors, constants).rehome(self.module)
        self._executable = executable_of(_decomposed(self.program), runner.device)
        vars(self.module).update(forward=self._flat(), training=False)
        if self.config is not None:
            vars(self.module).update(config=self.config)

    def _traced(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs, with scalars expanded to the right shape in place of packed weights."""
        if not self.packed:
            return inputs
        empty = {name: torch.zeros((), dtype=own.dtype).expand(own.shape) for name, own in self.packed.items()}
        return {**inputs, ADAPTER_TENSORS: {**inputs[ADAPTER_TENSORS], **empty}}

    def _flat(self) -> Callable[..., dict[str, Any]]:
        names, outputs, axes = self.program.signature, self.program.outputs.names, self.axes
        order, kept, sizes = list(self.tensors), set(self.outputs), self.tensor_axes
        every = [*(axis.name for axis in axes), *([ADAPTER_TENSORS] if order else [])]

        def forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = {**dict(zip(every, args, strict=False)), **kwargs}
            tensors = inputs.pop(ADAPTER_TENSORS) if order else {}
            tie_sizes([*axes, *sizes], {**inputs, **tensors})
            inputs = self.filled(inputs)
            own = {n: tensor_at(self.module, n) for n in self._executable.tensors if n not in tensors}
            values = self._executable({**own, **tensors}, [inputs[name] for name in names])
            return {name: value for name, value in zip(outputs, values, strict=True) if name in kept}

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in every])  # type: ignore[attr-defined]
        return forward

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the module's output tensors, in order."""
        leaves = self.program.graph.output_node().args[0]
        pairs = zip(self.program.outputs.names, leaves, strict=True)  # type: ignore[arg-type]
        return tuple(name for name, leaf in pairs if leaf is not None)

    def input_name(self, name: str) -> str:
        """Return an input's name in the file."""
        return name

    def output_name(self, name: str) -> str:
        """Return an output's name in the file."""
        return name

    def axis_name(self, name: str) -> str:
        """Return an axis's name in the file."""
        return name

    def exported(self, program: Program) -> Program:
        """Return the Program that is exported for one of the model's."""
        return program

    def taken(self, axis: Axis) -> bool:
        """Return whether a Program's input is also an input of the module."""
        return True

    def counting(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return which positions are compared, as a ``bool`` tensor over the outputs' first axes; None for all."""
        return None

    def filled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's inputs together with the Program's other inputs."""
        return dict(inputs)

    def _taken(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        names = {axis.name for axis in self.axes} | {ADAPTER_TENSORS}
        return {name: value for name, value in inputs.items() if name in names}

    def sample(
        self, seed: int = 0, sizes: tuple[int, int] = (2, 9), fixed_sizes: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Return random inputs with batch and sequence ``sizes``, and with ``fixed_sizes`` for the axes named there.

        Adaptations' tensors have their own values with seed 0. With any other seed, the same values are reversed, and
        axes that depend on a size are longer by half; this reveals a graph that contains values or sizes as constants.
        """
        tensors = {name: self.values.get(name, tensor) for name, tensor in self.tensors.items()}
        if seed:
            tensors |= {axis.name: _otherwise(axis, tensors[axis.name]) for axis in self.tensor_axes}
        return {**self._taken(self._sample(seed, sizes, fixed_sizes)), **self._as_input(tensors)}

    def without_adapters(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the outputs for the same inputs with the defaults of all tensors that have one.

        If the graph then has to compute what the base computes, these are the base's own outputs.
        """
        if self._unadapted is not None:
            return self._unadapted(self.filled(inputs))
        tensors = {**inputs[ADAPTER_TENSORS], **self.defaults}
        outputs: dict[str, Tensor] = self.module(**{**inputs, ADAPTER_TENSORS: tensors})
        return outputs

    def _as_input(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {ADAPTER_TENSORS: dict(tensors)} if tensors else {}

    def _sample(self, seed: int, sizes: tuple[int, int], fixed_sizes: Mapping[str, int] | None) -> dict[str, Tensor]:
        inputs = random_inputs(
            self._base, self._tensors, seed, sizes, self.config, front=False, fixed_sizes=fixed_sizes
        )
        inputs = within_tables(self.program, inputs)
        chosen = [name for name in self.program.signature if name not in inputs]
        if chosen:
            every = random_inputs(self.program, self._tensors, seed, sizes, front=False, fixed_sizes=fixed_sizes)
            inputs |= {name: every[name] for name in chosen}
        return inputs

    def dynamic_shapes(self) -> dict[str, dict[Any, Any]]:
        """Return the dynamic axes, by input."""
        auto = torch.export.Dim.AUTO
        own, tensors = (
            {a.name: {i: auto for i, s in enumerate(a.axes) if isinstance(s, str)} for a in axes}
            for axes in (self.axes, self.tensor_axes)
        )
        return {**own, **self._as_input({name: tensors.get(name, {}) for name in self.tensors})}

    def flat(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the inputs without containers, by their names in the graph."""
        own = {name: value for name, value in inputs.items() if name != ADAPTER_TENSORS}
        given = {name: t for name, t in inputs.get(ADAPTER_TENSORS, {}).items() if name not in self.packed}
        return {**own, **given}
