"""Find the components of a model with several stacks of layers: a vision tower, a projector, a language model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat import pytree
from graftc.compiler.capture.as_captured import without_caches
from graftc.compiler.capture.capture import output_spec
from graftc.compiler.live.elements import hooked, layers_of, maps_of
from graftc.passes.core.elements.calls import CallStructure
from graftc.passes.core.ir.layers import layer_path
from graftc.specs.errors.diagnostics import GraftError, first_line


@dataclass(frozen=True)
class Component:
    """A module that a model calls on its own, and the module's first call in a run.

    Attributes:
        path: path of the module.
        structure: structure of the call.
        tensors: tensors of the call, by the names of the module's parameters.
        results: tensors that the call returned, by the names that a graph uses for them.
        given: the source of each of the call's tensors, by name: an input of the model, or ``path/output`` of another
            component; empty if the model's own Python code created it.
    """

    path: str
    structure: CallStructure
    tensors: Mapping[str, Tensor] = field(repr=False)
    results: Mapping[str, Tensor] = field(repr=False)
    given: Mapping[str, str]


def components_of(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Component], dict[str, str]]:
    """Return a model's components in the order of their calls, and the modules that no graph covers, with reasons.

    A component contains at most one stack of layers, and is as large as possible. A module that is inside a component
    but called from outside it, such as a token embedding, is a component as well.

    Args:
        model: the model, which is run once, in eval mode, without a cache; it is unchanged afterwards.
        inputs: inputs of the call, by name.

    Raises:
        GraftError: GC060 if the model has only one stack of layers, or does not run on the inputs.
    """
    maps = {*maps_of(model)}
    rows = {path.rpartition(".")[0] for path in layers_of(model) if path not in maps}
    composite = {path for path, _ in model.named_modules() if _stacks(rows, path) > 1}
    if not composite:
        message = f"{type(model).__name__} has one stack of layers and therefore no components"
        raise GraftError("GC060", message, hint='format "onnx" exports it as a whole')
    run = _Run(model, composite, inputs)
    watched = hooked(model, run.paths, run.before, run.after)
    with torch.no_grad(), without_caches(model), torch.random.fork_rng(devices=()), watched:
        try:
            model(**inputs)
        except Exception as error:
            message = f"{type(model).__name__} does not run on the given inputs: {first_line(error)}"
            raise GraftError("GC060", message, hint="pass a batch that the model accepts") from error
    return list(run.components.values()), run.left_out


def _stacks(rows: Collection[str], path: str) -> int:
    return sum(not path or row == path or row.startswith(f"{path}.") for row in rows)


class _Run:
    """Hooks that record the calls to the outermost modules that are not composite.

    Attributes:
        paths: the paths of the modules that are not composite and have parameters.
        components: the modules that were called, by path.
        left_out: the modules that no graph covers, each with the reason.
    """

    def __init__(self, model: nn.Module, composite: Collection[str], inputs: Mapping[str, Any]) -> None:
        self.components: dict[str, Component] = {}
        self.left_out: dict[str, str] = {}
        self.paths = [
            path
            for path, module in model.named_modules()
            if path not in composite and any(True for _ in module.parameters())
        ]
        self._active: list[str] = []
        self._known = {id(value): name for name, value in inputs.items() if isinstance(value, Tensor)}
        self._alive: list[Any] = list(inputs.values())  # kept alive so that no id is reused

    def before(self, path: str, *_: Any) -> None:
        """Record that a module is being called."""
        self._active.append(path)

    def after(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record the first call to a module, unless another call contains it."""
        self._active.pop()
        if self._active or path in self.components or path in self.left_out:
            return
        if layer_path(path):
            self.left_out[path] = "it is one of several in a list, called by the model's own Python code"
            return
        try:
            self.components[path] = self._component(path, module, args, kwargs, result)
        except GraftError as error:
            self.left_out[path] = error.message

    def _component(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Component:
        structure, tensors = CallStructure.of(path, module, args, kwargs)
        names = _names(module, args, kwargs)
        own = {names.get(id(tensor), f"tensor_{index}"): tensor for index, tensor in enumerate(tensors)}
        given = {name: self._known.get(id(tensor), "") for name, tensor in own.items()}
        self._alive += [tensors, result]
        results = _named_leaves(result)
        for output, leaf in results.items():
            self._known.setdefault(id(leaf), f"{path}/{output}")
        copies = {name: tensor.detach().clone() for name, tensor in own.items()}
        return Component(path, structure, copies, {name: leaf.clone() for name, leaf in results.items()}, given)


def _names(module: nn.Module, args: Any, kwargs: Any) -> dict[int, str]:
    """Return names for the tensors of a call, by id, derived from the parameters of ``forward``."""
    signature = inspect.signature(module.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    names: dict[int, str] = {}
    for name, value in bound.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        for index, leaf in enumerate(leaves):
            names.setdefault(id(leaf), name if len(leaves) == 1 else f"{name}_{index}")
    return names


def _named_leaves(result: Any) -> dict[str, Tensor]:
    """Return the tensors in an output, by the names that a graph uses for them."""
    leaves, spec = pytree.tree_flatten(result)
    names = output_spec(spec).names
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
