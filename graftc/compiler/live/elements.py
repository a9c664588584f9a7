"""The elements of a live model: its repeated layers, each of which is a graph, and how they are called.

A live model is a Program like any other one. Its source is the union of the elements (`Elements`): a model that is
called with the tensors of each of them, and calls each by itself. What is adapted, folded, saved and shown is that
Program; the model's own Python calls its parts (`graftc.runtime.live`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.as_captured import as_before
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.reads_parameters import reads_parameters
from graftc.compiler.capture.signature import Axis
from graftc.compiler.live.own_state import version, with_own_buffers
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.elements.calls import CALLS, CallStructure, input_name, read_calls, write_calls
from graftc.passes.core.elements.layer_cache import LayerCache
from graftc.passes.core.ir.layers import layer_path
from graftc.specs.errors.diagnostics import GraftError


class Elements:
    """The forward of a union of elements, as a class to put in front of the model's own."""

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Return the outputs of each element by its path; no element reads the outputs of another.

        Args:
            inputs: `CALLS`, and the tensors that it numbers, by `input_name`.
        """
        found: dict[str, Any] = {}
        for path, structure in read_calls(inputs[CALLS]).items():
            tensors: list[Tensor] = []
            while (name := input_name(path, len(tensors))) in inputs:
                tensors.append(inputs[name])
            module: nn.Module = self.get_submodule(path)  # type: ignore[attr-defined]
            args, kwargs = structure.build(module, tensors)
            found[path] = module(*args, **kwargs)
            for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, LayerCache)):
                found[path] = {"result": found[path], "new": cache.new}
        return found


def is_live(model: nn.Module) -> bool:
    """Whether a model is a union of elements."""
    return isinstance(model, Elements)


def union_of(model: nn.Module) -> nn.Module:
    """The union of a model's elements, under its class's name; it shares all storage. The model is not changed."""
    cls = type(model)
    made: nn.Module = sharing_copy(model)
    made.__class__ = type(cls.__name__, (Elements, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    return made


def runs_anywhere(model: nn.Module) -> bool:
    """Whether a model can be run: it has values."""
    return all(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers()))


def layers_of(model: nn.Module) -> list[str]:
    """Paths of the repeated layers that hold tensors, in order."""
    rows: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if path and layer_path(path) == path and any(True for _ in module.parameters()):
            rows[path.rpartition(".")[0]].append(path)
    return [path for row in rows.values() if len(row) > 1 for path in row]


def maps_of(model: nn.Module) -> list[str]:
    """Paths of the modules that hold tensors and no other modules."""
    named = model.named_modules()
    return [p for p, m in named if p and not m._modules and any(t is not None for t in m._parameters.values())]


Recorded = Mapping[str, tuple[CallStructure, Sequence[Tensor]]]
"""The first call of every element that a run of a model has called."""


@contextmanager
def recorded(model: nn.Module, paths: Sequence[str]) -> Iterator[Recorded]:
    """Gives what a run of the model that happens inside calls its elements with."""
    found: dict[str, tuple[CallStructure, Sequence[Tensor]]] = {}

    def noting(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in found:
                return
            try:
                structure, tensors = CallStructure.of(path, module, args, kwargs)
            except GraftError:  # it takes what no graph takes, and stays the model's own Python
                return
            found[path] = structure, [tensor.detach().clone() for tensor in tensors]

        return note

    hooks = [model.get_submodule(p).register_forward_pre_hook(noting(p), with_kwargs=True) for p in paths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Run:
    """What a run of a model has shown.

    Attributes:
        calls: the first call of each element.
        written: names of the buffers that the model wrote to, in order.
    """

    calls: Recorded
    written: tuple[str, ...]


def record(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> Run:
    """Run a copy of a model, and record the inputs that some modules get and the buffers that it writes to.

    Args:
        model: is run in the mode that it is in, and then in the other one for the buffers alone, without gradients.
        paths: of the modules.
        inputs: by name.

    Raises:
        GraftError: GC030 where it does not run in the mode that it is in, or writes to a parameter.
    """
    own = with_own_buffers(model)
    before = {name: (buffer, version(buffer)) for name, buffer in own.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=()), reads_parameters(own):
        with as_before(own), recorded(own, paths) as calls:
            try:
                own(**inputs)
            except GraftError:
                raise
            except Exception as error:
                message = f"{type(model).__name__} does not run on the inputs given: {error}"
                raise GraftError("GC030", message) from error
        with as_before(own):
            _run_if_it_runs(own.train(not own.training), inputs)
    return Run(calls, tuple(name for name, (buffer, count) in before.items() if version(buffer) != count))


def _run_if_it_runs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        model(**inputs)
    except GraftError:
        raise
    except Exception:  # it needs other inputs in this mode
        return


def as_inputs(calls: Recorded) -> tuple[list[Axis], Flags]:
    """Inputs and flags of a union for calls of its elements: sizes above 1 may vary."""
    axes: list[Axis] = []
    for path, (_, tensors) in calls.items():
        for index, tensor in enumerate(tensors):
            name = input_name(path, index)
            sizes = tuple(f"{name}__{at}" if size > 1 else size for at, size in enumerate(tensor.shape))
            axes.append(Axis(name, tensor.dtype, sizes, tensor, as_shown=True))
    return axes, ((CALLS, write_calls((path, structure) for path, (structure, _) in calls.items())),)
