"""The elements of a live model: its repeated layers, each of which runs as a graph, and how they are called.

A live model is a Program like any other. Its source is the union of the elements (`Elements`): a model that takes the
tensors of all elements, and calls each element on its own. This Program is adapted, folded, saved and shown; the
model's own Python code calls its parts (`graftc.runtime.live`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.hooks import CALL_HOOKS
from graftc.compat.modules import children_of, parameters_of
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.live.own_state import written_in_place
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.elements.calls import (
    CALLS,
    CallStructure,
    innermost,
    input_name,
    input_names,
    read_calls,
    write_calls,
)
from graftc.passes.core.elements.decisions import DECIDED, Decisions
from graftc.passes.core.elements.layer_cache import cache_among, news_of
from graftc.passes.core.elements.tables import contents, put_since, tables_among
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program_key import Mode
from graftc.specs.errors.diagnostics import GraftError


class Elements:
    """Mixin placed before a model's class in the MRO, whose ``forward`` runs the union of the model's elements."""

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Return the outputs of each element by its path; no element reads the outputs of another.

        Args:
            inputs: `CALLS`, and the tensors that it numbers, named by `input_name`.
        """
        outputs: dict[str, Any] = {}
        for path, structure in read_calls(inputs[CALLS]).items():
            tensors = [inputs[name] for name in input_names(path, inputs)]
            module: nn.Module = self.get_submodule(path)  # type: ignore[attr-defined]
            args, kwargs = structure.build(module, tensors)
            before, tables = _identities([args, kwargs]), tables_among(args, kwargs)
            in_tables = contents(tables)
            decisions = Decisions(structure.decisions(mode_of(module)))
            with decisions if structure.decides else nullcontext(), written_in_place(module):
                outputs[path] = structure.finish(module(*args, **kwargs), module, tensors)
            if before != _identities([args, kwargs]):
                message = f"{path} changes a list or dict that it is called with"
                raise GraftError("GC030", message, hint="a graph only returns results")
            if structure.boxed:
                outputs[path] = {"result": outputs[path]}
            if structure.cached:
                outputs[path]["new"] = news_of(cache_among(args, kwargs))
            if put := put_since(tables, in_tables):
                outputs[path]["put"] = put
            if structure.decides:
                outputs[path][DECIDED] = decisions.by
        return outputs


def mode_of(module: nn.Module) -> Mode:
    """Return a module's mode."""
    return "train" if module.training else "eval"


def _identities(value: Any) -> Any:
    """Return the ids of all objects in nested containers, for comparison."""
    if isinstance(value, list | tuple):
        return [_identities(item) for item in value]
    return {key: _identities(item) for key, item in value.items()} if isinstance(value, dict) else id(value)


@contextmanager
def hooked(
    model: nn.Module,
    paths: Iterable[str],
    before: Callable[..., None],
    after: Callable[..., None],
    *,
    always_after: bool = False,
) -> Iterator[None]:
    """Call functions before and after each call to certain modules while the block runs.

    Args:
        model: the model with the modules.
        paths: the modules' paths.
        before: called with a module's path, the module, and the positional and keyword arguments.
        after: called with the same arguments and the result.
        always_after: whether to call ``after`` even if a call fails.
    """
    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            first = module.register_forward_pre_hook(_hook(before, path), with_kwargs=True)
            last = module.register_forward_hook(_hook(after, path), with_kwargs=True, always_call=always_after)
            stack.callback(first.remove)
            stack.callback(last.remove)
        yield


def _hook(function: Callable[..., None], path: str) -> Callable[..., None]:
    """Return a hook that `is_the_users` recognises as graftc's own, by the module that defines it."""

    def hook(*call: Any) -> None:
        function(path, *call)

    return hook


def is_live(model: nn.Module) -> bool:
    """Return whether a model is a union of elements."""
    return isinstance(model, Elements)


def union_of(model: nn.Module, elements: Iterable[str]) -> nn.Module:
    """Return the union of a model's elements, whose class is named like the model's; the model is not changed.

    Args:
        model: the model to take apart; the union shares all of its storage.
        elements: paths of the layers and maps that run as graphs. Their hooks are called in the live model, around the
            graphs.
    """
    union: nn.Module = sharing_copy(model)
    union.__class__ = elements_class(type(model), type(model))
    for path in ("", *elements):
        tables = vars(union.get_submodule(path))
        tables.update({name: type(tables[name])() for name in CALL_HOOKS if tables[name]})
    return union


def elements_class(cls: type, base: type) -> type:
    """Return the class of a union of the elements of a ``cls``, which is named like it and derives from ``base``."""
    return type(cls.__name__, (Elements, base), {"__module__": __name__, "__doc__": cls.__doc__})


def layers_of(model: nn.Module) -> list[str]:
    """Return the paths of the repeated layers that have parameters, in order."""
    rows: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if path and layer_path(path) == path and any(True for _ in module.parameters()):
            rows[path.rpartition(".")[0]].append(path)
    return [path for row in rows.values() if len(row) > 1 for path in row]


def maps_of(model: nn.Module) -> list[str]:
    """Return the paths of the modules that have parameters and no submodules.

    torch modules that read the parameters of their submodules, such as ``nn.MultiheadAttention``, are included as well.
    """
    maps: list[str] = []
    for path, module in model.named_modules():
        plain = not children_of(module) or type(module).__module__.startswith("torch.nn.modules.")
        inside = path.startswith(tuple(f"{outer}." for outer in maps[-1:]))
        if path and plain and not inside and any(tensor is not None for tensor in parameters_of(module).values()):
            maps.append(path)
    return maps


def place_in_row(path: str) -> str:
    """Return a path without its layer number; it is the same for corresponding modules in all layers of a row."""
    layer = layer_path(path)
    return layer.rpartition(".")[0] + path.removeprefix(layer)


def hold_all(model: nn.Module, layers: Iterable[str], elements: Collection[str]) -> bool:
    """Return whether the elements contain every parameter of the given layers of a model."""
    known = frozenset(elements)
    names = (f"{layer}.{name}" for layer in layers for name, _ in model.get_submodule(layer).named_parameters())
    return all(innermost(name, known) for name in names)


Recorded = Mapping[str, tuple[CallStructure, Sequence[Tensor]]]
"""The first call to each element in a run of a model, by path."""


def as_inputs(calls: Recorded) -> tuple[list[Axis], Flags]:
    """Return a union's inputs and flags for calls to its elements; sizes above 1 are dynamic.

    Elements of a row that are called in the same way share the names of their sizes, so that the tracer runs only one
    of them (`graftc.compiler.capture.alike`). Each element is still called on its own, with its own sizes.
    """
    axes: list[Axis] = []
    first: dict[object, str] = {}
    for path, (structure, tensors) in calls.items():
        kind = place_in_row(path), structure.text, tuple((tensor.dtype, tensor.shape) for tensor in tensors)
        alike = first.setdefault(kind, path)
        for index, tensor in enumerate(tensors):
            sizes = tuple(
                f"{input_name(alike, index)}__{at}" if size > 1 else size for at, size in enumerate(tensor.shape)
            )
            axes.append(Axis(input_name(path, index), tensor.dtype, sizes, tensor, as_shown=True))
    return axes, ((CALLS, write_calls((path, structure) for path, (structure, _) in calls.items())),)


def in_autocast(tensor: Tensor) -> bool:
    """Return whether autocast chooses the dtype for computations with a tensor."""
    return tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensors: Iterable[Tensor], module: nn.Module) -> list[Tensor]:
    """Return copies of a call's tensors with the dtype that they would have without autocast: the module's."""
    types = (p.dtype for p in module.parameters() if p.is_floating_point())
    dtype = next(types, torch.get_default_dtype())
    return [tensor.detach().to(dtype if in_autocast(tensor) else tensor.dtype, copy=True) for tensor in tensors]
