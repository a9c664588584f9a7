"""Adaptations in the form in which one graph takes them as inputs, whatever their size."""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.collapse import places
from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.registry import method_for
from graftc.specs.base import MethodSpec
from graftc.specs.compose import Stack


def exchangeable_spec(compilation: Compilation, resolved: Resolved, size: int) -> MethodSpec | None:
    """Return the adaptation for which a graph is built, of a given size.

    It is None if the adaptation's tensors keep their shapes: its method does not allow others, or it is part of a
    composition that stacks or shares the tensors of its members.
    """
    method = method_for(resolved.spec.method)
    composed = (c for c in compilation.spec.compose if not isinstance(c, Stack))
    if not isinstance(method, Exchangeable) or any(resolved.name in c.members for c in composed):
        return None
    return method.exchangeable(resolved.spec, size)


def exchanged_values(compilation: Compilation, resolved: Resolved) -> dict[str, Tensor]:
    """Return the tensors of an adaptation that has an `exchangeable_spec`, for that spec.

    Args:
        compilation: the Compilation, in its deployed form.
        resolved: the adaptation.

    Returns:
        The tensors by full name, in float64.
    """
    method, store = method_for(resolved.spec.method), compilation.store
    assert isinstance(method, Exchangeable)
    own_places = {site.key for site, _ in resolved.places} | {None}
    parts = compilation.parts[resolved.name]
    others = [name for site, names in parts.items() if site not in own_places for name in names.values()]
    values = {name: store.full(name).detach().double() for name in others}
    with torch.no_grad():
        for prefix, own in places(compilation, resolved, lambda name: store.full(name).detach().double()):
            exchanged = method.exchanged(own.spec, {**own.shared, **own.tensors})
            values |= {prefix + part: value.contiguous() for part, value in exchanged.items()}
    return values
