"""Represent prefixes and virtual tokens as the initial contents of a cache, so that they cost nothing during decoding.

A prefix consists of keys and values that precede those of a text. Virtual tokens before a text are equivalent to this
if attention is causal, because what a layer computes for them does not depend on later tokens. A graph without these
adaptations, run with a cache that begins with their keys and values, gives the same results as the adapted graph. The
two are compared on a sample before the cache is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.capture.anchor import BOUNDS
from graftc.compiler.capture.example_inputs import samples_on
from graftc.compiler.capture.fixed_cache import begin_fixed, is_fixed, put_in_front, require_room, take_from_front
from graftc.compiler.capture.past import (
    MASK,
    POSITIONS,
    CacheLayout,
    fill_cache,
    new_cache,
    other_cache,
    require_beginning,
    require_growing,
    tensors_of,
)
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.collapse import place_values
from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.roles.windows import has_windows
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.past_inputs import past_name
from graftc.passes.core.sites.sites import AttentionSite
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.base import Invoked
from graftc.specs.methods.prefix import PrefixSpec


@dataclass(frozen=True)
class InitialCache:
    """The initial contents of a cache, which represent adaptations.

    Attributes:
        names: the adaptations that the contents represent.
        length: the number of tokens in the contents.
        tensors: keys and values, ``[1, heads, length, width]``, by name.
        shifted: whether the text's positions begin after the contents.
    """

    names: tuple[str, ...]
    length: int
    tensors: Mapping[str, Tensor]
    shifted: bool

    def cache(self, rows: int) -> Any:
        """Return a cache with these contents for a batch of ``rows`` rows."""
        return fill_cache(new_cache(False), {name: t.expand(rows, -1, -1, -1) for name, t in self.tensors.items()})

    def put_in_front(self, cache: Any, rows: int) -> None:
        """Prepend the contents to a cache, whose reported length remains that of the text alone.

        `taken_away` reverses this.

        Args:
            cache: the cache of a text, which may be empty.
            rows: the number of rows in the batch, for an empty cache.

        Raises:
            GraftError: GC140 for a cache that does not store all tokens, or that belongs to another model.
        """
        if is_fronted(cache):
            return
        fixed = is_fixed(cache)
        if fixed:
            kinds = {name: (tensor.dtype, tensor.shape[1], tensor.shape[3]) for name, tensor in self.tensors.items()}
            begin_fixed(cache, kinds, rows, next(iter(self.tensors.values())).device)
            require_room(cache, self.length)
        else:
            require_growing(cache)
        require_beginning(cache, self.length if self.shifted else 0)
        texts = {name: tensor for name, tensor in tensors_of(cache).items() if tensor.shape[2]}
        fronts = {name: front.expand(rows, -1, -1, -1) for name, front in self.tensors.items()}
        if texts:
            if texts.keys() != fronts.keys():
                raise other_cache(f"it has {len(texts)} of {len(fronts)} keys and values")
            for name, text in texts.items():
                front = self.tensors[name]
                if text.dtype != front.dtype or (text.shape[1], text.shape[3]) != (front.shape[1], front.shape[3]):
                    raise other_cache(f"{name} is {list(text.shape)}")
                fronts[name] = front.expand(len(text), -1, -1, -1)
        if fixed:
            put_in_front(cache, fronts, self.length)
        else:
            fill_cache(cache, {n: torch.cat([front, texts[n]], 2) if texts else front for n, front in fronts.items()})
        kind: Any = type(cache)
        cache.__class__ = _with_front(kind)
        cache._graftc_front = self.length

    def call(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the arguments of a call from the loop for a graph that counts the contents as part of the text."""
        arguments = dict(kwargs)
        mask, positions = arguments.get(MASK), arguments.get(POSITIONS)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            arguments[MASK] = torch.cat([mask.new_ones(mask.shape[0], self.length), mask], 1)
        if positions is not None and self.shifted:
            arguments[POSITIONS] = positions + self.length
        return arguments


def is_fronted(value: object) -> bool:
    """Return whether a value is a cache that begins with initial contents."""
    return "_graftc_front" in getattr(value, "__dict__", ())


def taken_away(cache: Any) -> None:
    """Reverse `InitialCache.put_in_front`: remove initial contents from a cache, so that it contains only the text."""
    length = vars(cache).pop("_graftc_front", 0)
    if length:
        cache.__class__ = type(cache).__mro__[2]
        if is_fixed(cache):
            take_from_front(cache, length)
            return
        fill_cache(cache, {name: tensor[:, :, length:] for name, tensor in tensors_of(cache).items()})


class _Fronted:
    """Mixin for a cache that begins with contents that represent adaptations and are not part of the text."""

    _graftc_front: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens in the text."""
        return super().get_seq_length(layer_idx) - self._graftc_front  # type: ignore[misc, no-any-return]


@cache
def _with_front(kind: Any) -> Any:
    return type(kind.__name__, (_Fronted, kind), {"__module__": kind.__module__})


def initial_cache(runner: AdaptedRunner) -> InitialCache | None:
    """Return the initial cache contents with which an unadapted graph generates as if adapted, or None.

    The result is None if no adaptation can be represented in this way, or if the graph has to apply them: when there
    are several, or when they are in compositions, beside an aLoRA, in only some layers, or behind windows that would
    hide a prefix.
    """
    compilation = runner.shown.compilation
    if runner.base_only or runner.training or compilation.cache_layout.pairs:
        return None
    if any(isinstance(control, Invoked) for control in compilation.controls.values()):
        return None
    composed = {name for composition in compilation.spec.compose for name in composition.members}
    candidates = [r for r in compilation.places().resolved if isinstance(r.spec, PrefixSpec) or r.spec.virtual_tokens()]
    if len(candidates) != 1 or candidates[0].name in composed:
        return None
    (resolved,) = candidates
    initial = (
        _of_prefix(runner, resolved) if isinstance(resolved.spec, PrefixSpec) else _of_tokens(compilation, resolved)
    )
    if initial is None or not runner.once(("initial cache", initial.names), lambda: _is_the_same(runner, initial)):
        return None
    return initial


def _of_prefix(runner: AdaptedRunner, resolved: Resolved) -> InitialCache | None:
    compilation, spec = runner.shown.compilation, resolved.spec
    assert isinstance(spec, PrefixSpec)
    sites = {site.key: site for site in compilation.main.attentions}
    places = {site.key: own.length for site, own in resolved.places}  # type: ignore[attr-defined]
    if places.keys() != sites.keys() or len(set(places.values())) != 1:
        return None
    if spec.window == "visible" and has_windows(runner.config):
        return None
    tables = {key: values for key, values in place_values(compilation, resolved)}
    numbered = ((number, site, tables[site.key]) for number, site in enumerate(in_cache_order(compilation)))
    tensors: dict[str, Tensor] = {}
    for number, site, values in numbered:
        for part, columns in (("key", site.keys), ("value", site.values)):
            heads = _as_heads(compilation.cache_layout, number, part, columns, values[f"{part}s"])
            if heads is None:
                return None
            tensors[past_name("past", number, part)] = heads
    return InitialCache((resolved.name,), spec.length, tensors, spec.positions == "shifted")


def _as_heads(layout: CacheLayout, number: int, part: str, columns: Tensor | None, table: Tensor) -> Tensor | None:
    """Return a table of ``[length, width]`` in a cache's format, with one copy of each head that queries share."""
    kind = layout.heads.get(past_name("past", number, part))
    if kind is None or columns is None:
        return None
    dtype, heads, width = kind
    own = torch.unique_consecutive(columns, dim=0)
    if tuple(own.shape) != (heads, width):
        return None
    split = table[:, own.flatten().to(table.device)].reshape(len(table), heads, width)
    return split.transpose(0, 1).unsqueeze(0).to(dtype)


def _of_tokens(compilation: Compilation, resolved: Resolved) -> InitialCache | None:
    """Return the keys and values that the adapted graph computes for virtual tokens, whatever the text."""
    virtual = compilation.program_as_run("eval").virtual
    if len(virtual) != 1 or virtual[0].starts != (0,) or virtual[0].owner != resolved.name:
        return None
    length = sum(run.length for run in resolved.spec.virtual_tokens())
    store, program = compilation.store, compilation.program("eval")
    samples = samples_on(store.device(), compilation.program("train", "base"), 0, (1, 4), None)
    nodes = {node.name: node for node in program.graph.nodes}
    operands: list[fx.Node] = []
    sites = list(in_cache_order(compilation))
    for site in sites:
        if site.operands is None:
            return None
        operands += [nodes[operand.name] for operand in (site.operands.keys, site.operands.values)]
    values = iter(computed(operands, lambda node: samples[str(node.target)], store.get, store.device()))
    tensors: dict[str, Tensor] = {}
    for number, site in enumerate(sites):
        for part, columns in (("key", site.keys), ("value", site.values)):
            tensor, name = next(values)[:1, :, :length], past_name("past", number, part)
            if columns is None or name not in compilation.cache_layout.heads:
                return None
            first = [at for at in range(len(columns)) if at == 0 or not torch.equal(columns[at], columns[at - 1])]
            tensors[name] = tensor[:, first].to(compilation.cache_layout.heads[name][0])
    return InitialCache((resolved.name,), length, tensors, shifted=True)


def in_cache_order(compilation: Compilation) -> Iterator[AttentionSite]:
    """Yield the attention sites in cache order: by layer."""
    yield from sorted(compilation.main.attentions, key=lambda site: (site.layer is None, site.layer or 0))


@torch.no_grad()
def _is_the_same(runner: AdaptedRunner, initial: InitialCache) -> bool:
    """Return whether a text that follows the initial contents gives the same results as in the adapted graph."""
    inputs = samples_on(runner.device, runner.shown.compilation.program("train", "base"), 0, (2, 6), None)
    inputs = {n: torch.ones_like(t) if n.endswith("mask") else t for n, t in inputs.items()}
    if not {"input_ids"} <= inputs.keys() <= {"input_ids", "attention_mask"}:
        return False
    ids = inputs["input_ids"]
    expected = runner.within(lambda: runner.call((), dict(inputs))).logits
    start = initial.length if initial.shifted else 0
    given: dict[str, Any] = {"input_ids": ids, "cache": initial.cache(len(ids))}
    if "position_ids" in runner.interface.parameters:
        given["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
    beside = runner.beside(initial.names)
    actual = beside.within(lambda: beside.call((), given)).logits
    bound = BOUNDS.get(runner.dtype, BOUNDS[torch.float32]) * max(1.0, largest_number(expected))
    return largest_difference(expected, actual) <= bound
