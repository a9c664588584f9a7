"""Copy a source model without copying its storage, for specs that need tensors which the source lacks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from graftc.compat import pytree
from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.interface import device_of
from graftc.compiler.capture.signature import Axis
from graftc.passes.core.weights.source_lock import source_lock
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.patterns import modules_by_glob


def sharing_copy(model: nn.Module, instead: Mapping[int, Any] = MappingProxyType({})) -> Any:
    """Return a copy of ``model`` with its own handles on the same storage; rebinding a handle leaves the source alone.

    Args:
        model: the model to copy, which is not changed.
        instead: replacements for some of the model's objects, by object id. Replaced modules are not inspected.
    """
    with source_lock():
        tensors = (
            tensor
            for module in model.modules()
            if id(module) not in instead
            for tensor in (*parameters_of(module).values(), *buffers_of(module).values())
            if tensor is not None and id(tensor) not in instead
        )
        return copy.deepcopy(model, {**{id(tensor): another_handle(tensor) for tensor in tensors}, **instead})


def another_handle(tensor: torch.Tensor) -> Any:
    """Return a new parameter, or a new tensor if ``tensor`` is not a parameter, on the same storage."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def untied(model: nn.Module, patterns: Sequence[str], axes: Sequence[Axis] | None = None) -> nn.Module:
    """Return a copy of ``model`` in which the modules that match ``patterns`` have their own tensors.

    Storage is shared until something is folded, so untying costs no memory. If a transformers config ties one of these
    tensors, its ``tie_word_embeddings`` is set to false, so that a merged model stays untied.

    Args:
        model: the source, which is not changed.
        patterns: globs for module paths, as in a spec's ``untie``.
        axes: the model's inputs; by default the usual ones. If there are none, outputs are not compared.

    Raises:
        GraftError: GC011 for a pattern that matches no module, GC027 for one whose modules have no tied tensors, GC028
            for a class whose outputs change when its config says that embeddings are not tied.
    """
    result = sharing_copy(model)
    modules = dict(result.named_modules(remove_duplicate=False))
    paths = [name for name in modules if name]
    names: list[str] = []
    for index, (pattern, matched) in enumerate(zip(patterns, modules_by_glob(patterns, paths, "untie"), strict=True)):
        own = [name for path in matched for name in _untie(result, modules[path], path)]
        names += own
        if not own:
            raise GraftError(
                "GC027",
                f"no parameter in {pattern} is tied to a parameter elsewhere",
                place=Place(path=f"untie[{index}]"),
                hint="leave it out of untie",
            )
    if getattr(getattr(result, "config", None), "tie_word_embeddings", False) and _by_config(model, names):
        result.config.tie_word_embeddings = False
        _check_function(model, result, axes)
    return result  # type: ignore[no-any-return]


def _by_config(model: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a model's config ties one of these tensors, unlike copies of layers."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return not isinstance(tied, dict) or not {*tied, *tied.values()}.isdisjoint(names)


@torch.no_grad()
def _check_function(model: nn.Module, other: nn.Module, axes: Sequence[Axis] | None) -> None:
    """Raise GC028 if the untied copy and the model have different outputs.

    Some classes scale the input of a tied head, and read from their config whether it is tied.
    """
    device = device_of(model)
    chosen = list(axes) if axes is not None else default_axes(model)
    if device.type == "meta" or not chosen:
        return
    inputs = {axis.name: axis.example(device) for axis in chosen}
    outputs = []
    for each in (model, other):
        training = each.training
        try:
            outputs.append(pytree.tree_leaves(each.eval()(**inputs)))
        finally:
            each.train(training)
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, torch.Tensor)]
    if not all(torch.equal(a, b) for a, b in pairs):
        raise GraftError(
            "GC028",
            f"{type(model).__name__} computes different outputs when its embeddings are not tied",
            place=Place(path="untie"),
            hint="adapt the shared tensor without untying, and deploy with the adaptation in the graph",
        )


def _untie(root: nn.Module, module: nn.Module, path: str) -> list[str]:
    """Give a module new handles on the parameters that it shares with other modules, and return their names."""
    outside = {
        id(p) for name, p in root.named_parameters(remove_duplicate=False) if not f"{name}.".startswith(f"{path}.")
    }
    changed = []
    for inner_path, inner in module.named_modules():
        for name, parameter in parameters_of(inner).items():
            if parameter is not None and id(parameter) in outside:
                parameters_of(inner)[name] = another_handle(parameter)
                changed.append(".".join(filter(None, (path, inner_path, name))))
    return changed
