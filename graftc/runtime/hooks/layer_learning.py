"""Determine how the source's layers are called, and which graph values are their arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn

from graftc.compiler.capture.anchor import BOUNDS
from graftc.compiler.capture.as_captured import as_captured
from graftc.compiler.capture.example_inputs import samples_on
from graftc.compiler.capture.interface import config_of, device_of, dtype_of
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.outline import BlockGraph, outline
from graftc.runtime.hooks.layer_calls import LayerCall, Leaf, NotInGraph, apart, tree_of, unknown_call

_SIZES = (3, 7, 5)
_NEAR = 1e-2
"""The maximum distance between corresponding values, relative to the largest element.

Kernels may differ slightly; unrelated values are further apart.
"""


@dataclass(frozen=True)
class Border:
    """The values that a layer's part of a graph reads and returns, identified by node names.

    Attributes:
        path: the path of the layer.
        use: the index of the call among the layer's calls.
        inputs, outputs: names of nodes, in the order of the layer's code.
    """

    path: str
    use: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, block: BlockGraph) -> Border:
        """Return the border of a layer's part in an outlined graph."""
        return cls(block.path, block.use, block.inputs, block.outputs)


class Shown(Protocol):
    """The view of a model whose layers are analysed; see `AdaptedView`."""

    compilation: Compilation
    label: str

    def lowered_of(self, key: ProgramKey) -> Program:
        """Return the Program from which the code for a key was generated."""


def learn_layers(shown: Shown, store: Store, module: nn.Module, key: ProgramKey) -> None:
    """Determine how the source calls the layers that a graph runs, and store the result in the compiled layers.

    Do nothing for a sharded model, because no process has all tensors in full.

    Args:
        shown: the view whose code runs.
        store: the Store of the view's tensors, whose tree contains the layers.
        module: the root of the tree.
        key: the key of the Program.
    """
    if is_unit(module):
        return
    for (path, use), (call, border) in source_calls(shown.compilation, key, _borders_of_layers).items():
        code: Any = store.container(path)._graftc
        name = f"{shown.label}{key}#{use}"
        if name in getattr(code, "borders", ()):
            code.calls[name] = in_graph(call, border, code.borders[name], shown.lowered_of(key))


_ObservedCall: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], Any]
"""The arguments, keyword arguments and results of a call to one of the source's layers."""


def _borders_of_layers(program: Program) -> dict[tuple[str, int], Border]:
    return {(block.path, block.use): Border.of(block) for block in outline(program).blocks}


def source_calls(
    compilation: Compilation, key: ProgramKey, borders_in: Callable[[Program], Mapping[tuple[str, int], Border]]
) -> dict[tuple[str, int], tuple[LayerCall, Border]]:
    """Return how the source's modules are called in the computation that a graph performs.

    Leaves refer to values by index in the module's border in the base's graph. The source model is run once on a
    sample, and is unchanged afterwards.

    Args:
        compilation: the Compilation that has the source and its graphs.
        key: the key of the graph.
        borders_in: a function that returns the borders of the modules in the base's graph, by path and use.
    """
    program = _base_of(compilation, key)
    borders = borders_in(program)
    with exclusive(), torch.no_grad():
        seen, samples = _observed(compilation, key, program, {path for path, _ in borders})
        names = dict.fromkeys(name for b in borders.values() for name in (*b.inputs, *b.outputs))
        values = _values(compilation, program, list(names), samples)
    bound = max(_NEAR, BOUNDS.get(dtype_of(compilation.model), 0.0))
    learned: dict[tuple[str, int], tuple[LayerCall, Border]] = {}
    for (path, use), border in borders.items():
        calls = seen.get(path, ())
        uses = sum(other == path for other, _ in borders)
        call = _matched(calls[use] if len(calls) == uses else None, border, values, bound)
        learned[path, use] = (call if calls or path not in seen else replace(call, called=False)), border
    return learned


def _base_of(compilation: Compilation, key: ProgramKey) -> Program:
    own = key._replace(entry="forward", mode="eval")
    return compilation.programs.get(own._replace(stage="source")) or compilation.programs[own._replace(stage="base")]


def _observed(
    compilation: Compilation, key: ProgramKey, program: Program, paths: set[str]
) -> tuple[Mapping[str, list[_ObservedCall]], Mapping[str, Tensor]]:
    model = compilation.model
    # The compiled model may have been moved without its source.
    samples = samples_on(device_of(model), program, 0, _SIZES, config_of(model), front=False)
    seen: dict[str, list[_ObservedCall]] = {path: [] for path in paths}

    def saw(path: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        seen[path].append((args, dict(kwargs), results))

    axes = compilation.signatures[key.signature].axes
    with as_captured(CaptureRequest(model, axes, program.flags, "eval")):  # restores the tables of hooks
        for path in paths:
            model.get_submodule(path).register_forward_hook(partial(saw, path), with_kwargs=True)
        try:
            model(**{name: tensor.clone() for name, tensor in samples.items()})
        except Exception:  # calls that were not observed are unknown to hooks
            seen.clear()
    return seen, samples


def _values(
    compilation: Compilation, program: Program, names: Sequence[str], samples: Mapping[str, Tensor]
) -> dict[str, Any]:
    nodes = {node.name: node for node in program.graph.nodes}
    packed: Mapping[str, Tensor] = packed_weights(compilation.model)

    def tensor(name: str) -> Tensor:
        return packed[name] if name in packed else compilation.store.get(name)

    device = compilation.store.device()

    def given(node: fx.Node) -> Tensor:
        return samples[str(node.target)].to(device)

    return dict(zip(names, computed([nodes[name] for name in names], given, tensor, device), strict=True))


def _matched(seen: _ObservedCall | None, border: Border, values: Mapping[str, Any], bound: float) -> LayerCall:
    if seen is None:
        return unknown_call(border.path)

    def leaves(names: Sequence[str]) -> Any:
        def leaf(value: Any, name: str) -> Leaf:
            if isinstance(value, Tensor):
                distances = [apart(value, values[each]) for each in names]
                nearest = min(range(len(names)), key=distances.__getitem__, default=None)
                at = nearest if nearest is not None and distances[nearest] <= bound else None
                return Leaf(name, at, None if at is not None else NotInGraph(name, border.path))
            if isinstance(value, _PLAIN) or _is_cache(value):
                return Leaf(name, value=value, cache=_is_cache(value))
            return Leaf(name, None, NotInGraph(name, border.path))

        return leaf

    inputs, outputs = leaves(border.inputs), leaves(border.outputs)
    args, kwargs, results = seen
    return LayerCall(tree_of(args, inputs), tree_of(kwargs, inputs), tree_of(results, outputs))


_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)
"""Types of values that are assumed to be the same in every call.

Any other value, such as an instance of an output class that contains tensors, would contain the samples' values.
"""


def _is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def in_graph(call: LayerCall, base: Border, own: Border, program: Program, *, by_name: bool = False) -> LayerCall:
    """Translate a call in the base's graph to the corresponding call in a graph with adaptations.

    Args:
        call: the call, whose leaves refer to the border in the base's graph.
        base: the border in the base's graph.
        own: the border in the graph with adaptations.
        program: the graph with adaptations.
        by_name: whether to match inputs by name only; otherwise, remaining inputs are matched in order.
    """
    nodes = {node.name: node for node in program.graph.nodes}

    def places(before: Sequence[str], now: Sequence[str], by_name: bool = False) -> dict[int, int]:
        positions: dict[int, int] = {}
        for at, name in enumerate(before):
            node = nodes.get(name)
            current = program.current(node).name if node is not None else name
            if (present := next((n for n in (current, name) if n in now), None)) is not None:
                positions[at] = now.index(present)
        gone = [at for at in range(len(before)) if at not in positions]
        new = [at for at in range(len(now)) if at not in positions.values()]
        return positions | (dict(zip(gone, new, strict=True)) if len(gone) == len(new) and not by_name else {})

    inputs, outputs = places(base.inputs, own.inputs, by_name), places(base.outputs, own.outputs)

    def moved(tree: Any, where: Mapping[int, int]) -> Any:
        def leaf(one: Leaf, _: str) -> Leaf:
            if one.at is None:
                return one
            at = where.get(one.at)
            return Leaf(one.name, at, None if at is not None else NotInGraph(one.name, own.path))

        return tree_of(tree, leaf)

    return LayerCall(moved(call.args, inputs), moved(call.kwargs, inputs), moved(call.results, outputs))
