"""Adaptations of any size as inputs of an exported graph.

A graph contains sizes as numbers: the length of a prefix is in the width of a mask. To make these dynamic, the model is
compiled at two sizes of each adaptation. A number that differs between the two graphs is replaced by the same number
computed from the size of an input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx

from graftc.compiler.capture.signature import Axis
from graftc.compiler.folding.exchange import exchangeable_spec, exchanged_values
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.signatures import add_signature
from graftc.passes.core.ir.codegen import executable_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.folds import round_once
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.export.inputs import require_known, tensors_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.runner import runner_of
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten

SIZE = 4
"""The size at which graphs are traced; sizes of 0 and 1 could become part of them."""


def essence(spec: MethodSpec) -> dict[str, Any]:
    """Return what two adaptations for one graph have in common: their specs without names, targets and dtypes."""
    return spec.model_dump(mode="json", exclude={"name", "target", "dtype"})


class Exchange:
    """A model with some adaptations as inputs.

    Args:
        runner: the Runner of the model, in its deployed form.
        names: names of the adaptations that are inputs.

    Attributes:
        runner: the Runner whose graphs are exported, with those of the adaptations that can have any size at another
            size.
        specs: the specs for which the graphs are built, for these adaptations.

    Raises:
        GraftError: GC091 for an unknown name.
    """

    def __init__(self, runner: ModelRunner, names: Sequence[str]) -> None:
        self.names, self._given = names, runner
        require_known(runner, names)
        resolved = [r for r in runner.compilation.main.resolved if r.name in names]
        self.specs: dict[str, MethodSpec] = {}
        self._resolved: dict[str, Resolved] = {}
        for own in resolved if isinstance(runner, AdaptedRunner) else ():
            if (spec := exchangeable_spec(runner.compilation, own, SIZE)) is not None:
                self.specs[own.name], self._resolved[own.name] = spec, own
        self.runner = self._sibling({}) if self.specs else runner
        self._larger: dict[str, ModelRunner] = {}
        self._uniform: set[str] = set()
        for name, own in self._resolved.items():
            other = exchangeable_spec(runner.compilation, own, SIZE + 1)
            if other != self.specs[name]:
                self._larger[name] = self._sibling({name: cast(MethodSpec, other)})

    def _sibling(self, changed: Mapping[str, MethodSpec]) -> ModelRunner:
        runner = cast(AdaptedRunner, self._given)
        specs = {**self.specs, **changed}
        adapt = tuple(specs.get(str(own.name), own) for own in runner.spec.adapt)
        values = {name: tensor for name, tensor in adapter_values(runner.store) if owner_of(name) not in specs}
        sibling: ModelRunner = runner_of(runner.sibling(runner.spec.model_copy(update={"adapt": adapt}), values).eval())
        return sibling

    @cached_property
    def _free(self) -> dict[str, set[int]]:
        """The axes that depend on an adaptation's size, by tensor name."""
        axes: dict[str, set[int]] = {}
        for other in self._larger.values():
            for name, tensor in adapter_values(other.store):
                own = self.runner.store.get(name)
                if changed := {i for i, size in enumerate(own.shape) if tensor.shape[i] != size}:
                    axes[name] = changed
        return axes

    def axis(self, name: str) -> Axis:
        """Return an input that is a tensor of an adaptation; sizes given as names are dynamic.

        The tensors of a site have the same size, and so do those of all sites if the graph computes with the size.
        """
        tensor, owner = self.runner.store.get(name), owner_of(name)
        size = owner if owner in self._uniform else f"{owner} {self._sites.get(name)}"
        free = self._free.get(name, ())
        return Axis(name, tensor.dtype, tuple(size if i in free else own for i, own in enumerate(tensor.shape)))

    @cached_property
    def _sites(self) -> dict[str, str]:
        parts = self.runner.compilation.parts.values()
        return {n: str(site) for own in parts for site, names in own.items() for n in names.values()}

    def value(self, name: str) -> Tensor:
        """Return the exported model's own value of an input."""
        if name in self._values:
            return round_once(self._values[name], self.runner.store.get(name).dtype)
        default = self.default(name)
        return self.runner.store.full(name).detach() if default is None else default

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for own in self._resolved.values():
            found |= exchanged_values(self._given.compilation, own)
        return found

    def default(self, name: str) -> Tensor | None:
        """Return the value of an input that a call does not pass; None if every call has to pass it."""
        spec = self.specs.get(owner_of(name))
        if spec is None:
            return None
        initial, free = self.runner.store.full(name).detach(), self._free.get(name, ())
        if not free:
            return initial.clone()
        least = cast("Exchangeable[Any]", method_for(spec.method)).least
        return initial.new_zeros([least if i in free else size for i, size in enumerate(initial.shape)])

    def tensors(self, program: Program) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that are inputs, by adaptation and full name, as `tensors_of` returns them."""
        return tensors_of(self.runner, program, self.names)

    def program(self, signature: Signature) -> Program:
        """Return the eval Program of a signature, in which all sizes of the adaptations are dynamic.

        Raises:
            GraftError: GC065 if the graphs of two sizes differ in more than integers.
        """
        own = self._at(self.runner, signature)
        larger = {name: self._at(runner, signature) for name, runner in self._larger.items()}
        if not larger:
            return own
        freeing = _Freeing(own.copy(), larger, self._sources)
        program = freeing.freed()
        self._uniform |= freeing.used
        return program

    def base(
        self, signature: Signature, exported: Callable[[Program], Program]
    ) -> Callable[[Mapping[str, Any]], dict[str, Tensor]] | None:
        """Return a function that computes the base's outputs, which a graph must have if a call passes no adapters.

        It is None if the graph has other adaptations as well.

        Args:
            signature: the signature of the graph.
            exported: a function that returns the Program that is exported for one of the model's.
        """
        compilation = self.runner.compilation
        if {owner_of(name) for name, _ in adapter_values(self.runner.store)} - self.specs.keys():
            return None
        program, store = exported(compilation.program("eval", "base", signature)), self.runner.store
        executable = executable_of(program.graph, self.runner.device)

        def outputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            tensors = {name: store.full(name) for name in executable.tensors}
            values = executable(tensors, [inputs[name] for name in program.signature])
            return dict(zip(program.outputs.names, values, strict=True))

        return outputs

    def _at(self, runner: ModelRunner, signature: Signature) -> Program:
        compilation = runner.compilation
        if signature not in compilation.signatures:
            mine = self.runner.compilation
            chosen = [name for name in compilation.controls if name in signature.inputs]
            flags = mine.program("train", "base", signature).flags
            add_signature(compilation, mine.signatures[signature].axes, flags, chosen)
        return runner.program_of(runner.key(signature, "eval"))

    @cached_property
    def _sources(self) -> dict[str, tuple[str, int]]:
        """A tensor and its axis that has an adaptation's size, by adaptation."""
        return {owner_of(name): (name, min(axes)) for name, axes in self._free.items()}


class _Freeing:
    """Replaces the numbers in a graph that differ from those in the graphs of larger adaptations.

    Args:
        program: the Program, which is changed.
        larger: the Program with one adaptation larger by one, by adaptation.
        sources: a tensor and its axis that has an adaptation's size, by adaptation.

    Attributes:
        used: the adaptations whose sizes the changed graph computes with.
    """

    def __init__(self, program: Program, larger: Mapping[str, Program], sources: Mapping[str, tuple[str, int]]) -> None:
        self._program, self._larger, self._sources = program, larger, sources
        self._sizes: dict[str, fx.Node] = {}
        self._start = next(node for node in program.graph.nodes if node.op != "placeholder")

    @property
    def used(self) -> set[str]:
        return set(self._sizes)

    def freed(self) -> Program:
        """Return the changed Program."""
        others = [list(program.graph.nodes) for program in self._larger.values()]
        nodes = list(self._program.graph.nodes)
        if any(len(other) != len(nodes) for other in others):
            raise self._refused("the number of operators")
        for node, *alike in zip(nodes, *others, strict=True):
            if any((other.op, str(other.target)) != (node.op, str(node.target)) for other in alike):
                raise self._refused(f"an operator ({node.name})")
            node.args = self._free(node, node.args, [other.args for other in alike])
            node.kwargs = self._free(node, dict(node.kwargs), [dict(other.kwargs) for other in alike])
        return self._program

    def _free(self, node: fx.Node, value: Any, others: Sequence[Any]) -> Any:
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, list | tuple):
            if any(len(other) != len(value) for other in others):
                raise self._refused(f"the arguments of {node.name}")
            return type(value)(self._free(node, own, [o[i] for o in others]) for i, own in enumerate(value))
        if isinstance(value, dict):
            return {key: self._free(node, own, [o[key] for o in others]) for key, own in value.items()}
        if all(other == value for other in others):
            return value
        if type(value) is not int:
            raise self._refused(f"an argument of {node.name}")
        return self._number(node, value, [other - value for other in others])

    def _number(self, node: fx.Node, value: int, slopes: Sequence[int]) -> fx.Node:
        """Return the node of a constant and a sum over adaptations of ``slope * size``, which is ``value`` here."""
        graph = self._program.graph
        total: Any = value - sum(slopes) * SIZE
        with graph.inserting_before(node):
            for name, slope in zip(self._larger, slopes, strict=True):
                if slope:
                    term = graph.call_function(operator.mul, (self._size(name), slope))
                    total = graph.call_function(operator.add, (term, total))
        return cast(fx.Node, total)

    def _size(self, name: str) -> fx.Node:
        if name not in self._sizes:
            tensor, axis = self._sources[name]
            with self._program.graph.inserting_before(self._start):
                read = self._program.graph.create_node("get_attr", tensor)
                self._sizes[name] = self._program.graph.call_function(aten.sym_size.int, (read, axis))
        return self._sizes[name]

    def _refused(self, what: str) -> GraftError:
        message = f"{' and '.join(self._larger)} cannot be inputs of any size: {what} depends on the size"
        return GraftError("GC065", message, hint="leave it out of the inputs, and export it as a constant")
