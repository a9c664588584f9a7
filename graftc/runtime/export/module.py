"""A plain module around one Program, for exporters: inputs by name, outputs by name, the Store's tensor names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graftc.compiler.samples import sample_inputs
from graftc.compiler.signature import Axis, tie_sizes
from graftc.passes.core.codegen import function_of
from graftc.passes.core.ops import DECOMPOSITIONS
from graftc.passes.core.program import Program

if TYPE_CHECKING:
    from graftc.compiler.family import Family
    from graftc.runtime.compiled import ModelRunner


def _decomposed(program: Program) -> fx.Graph:
    """The graph with ``graftc::`` operators replaced by their ATen forms."""
    graph = program.copy().graph
    for node in graph.nodes:
        node.target = DECOMPOSITIONS.get(node.target, node.target)
    return graph


class ExportModule(nn.Module):
    """One eval Program as a module.

    Args:
        runner: the compiled or merged model.
        family: the signature.

    Attributes:
        program: what it computes.
        axes: its inputs.
        inputs: example inputs.
    """

    def __init__(self, runner: ModelRunner, family: Family) -> None:
        super().__init__()
        training = runner.training
        runner.training = False
        try:
            self.program: Program = runner._program_of(family)
        finally:
            runner.training = training
        store = runner._store
        self._base, self._tensors = family.base, store
        self.inputs: Mapping[str, Tensor] = self.sample(sizes=(3, 7))
        self.axes = [Axis(s.name, s.dtype, s.shape) for s in self.program.inputs]
        self._parameters.update(store.root._parameters)
        self._buffers.update(store.root._buffers)
        self._modules.update(store.root._modules)
        if hasattr(runner, "config"):
            self.config = runner.config
        self.training = False
        self._function = function_of(_decomposed(self.program), runner.device)
        self.forward: Callable[..., dict[str, Any]] = self._flat()

    def _flat(self) -> Callable[..., dict[str, Any]]:
        names, outputs, axes = self.program.signature, self.program.outputs.names, self.axes

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Any]:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            tie_sizes(axes, inputs)
            values = self._function(self, *(inputs[name] for name in names))
            return dict(zip(outputs, values, strict=True))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        return forward

    def sample(self, seed: int = 0, sizes: tuple[int, int] = (2, 9)) -> dict[str, Tensor]:
        """Random inputs of batch and sequence ``sizes``."""
        inputs = sample_inputs(self._base, self._tensors, seed, sizes, getattr(self, "config", None))
        chosen = [name for name in self.program.signature if name not in inputs]
        if chosen:
            every = sample_inputs(self.program, self._tensors, seed, sizes)
            inputs |= {name: every[name] for name in chosen}
        return inputs

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Which axes vary."""
        auto = torch.export.Dim.AUTO
        return {a.name: {i: auto for i, s in enumerate(a.axes) if isinstance(s, str)} for a in self.axes}
