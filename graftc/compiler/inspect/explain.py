"""Explain values, tensors and places in a rewritten graph: what they are, and why they are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import fx

from graftc.compiler.inspect.history import CAPTURE
from graftc.compiler.inspect.lookup import Found, Index
from graftc.compiler.inspect.origins import shared_origin
from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.printer import printed_tensor
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.names import module_of
from graftc.records.explanation import NOTHING_BELOW, Below, Explanation, NodeFact, Origin, TensorFact, ValueFact


def explain(snapshot: Snapshot, name: str, mode: Mode = "eval") -> Explanation:
    """Explain why something is in the adapted graph.

    Args:
        snapshot: the Compilation.
        name: a printed value (``%query.down_3``, with or without ``%``), the name of an fx node, a place (a module
            path, or a SiteKey's text) or a tensor (``@attention.bert...A``, or its name in the Store). A path may be
            shortened to some of its segments, including the last, if they are unambiguous.
        mode: the mode of the graph.

    Raises:
        GraftError: GC091 if the name is unknown or ambiguous.
    """
    index = Index(snapshot, mode)
    target = index.find(name)
    if target.node is not None and target.node.op != "get_attr":
        return _value(index, name, target.node)
    if target.tensor:
        return _tensor(index, name, target.tensor)
    return _place(index, name, target)


def _value(index: Index, name: str, node: fx.Node) -> Explanation:
    reads = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    made_by = provenance(node)
    if made_by is not None:
        causes = [_origin(index, made_by)]
        reads += [tensor for cause in causes for tensor in cause.tensors if tensor not in reads]
    else:
        causes = _at_place_of(index, node, reads)
    stem = index.stems[node]
    alike = [other for other, other_stem in index.stems.items() if other_stem == stem and other is not node]
    others = tuple(index.names[other] for other in alike) if index.names[node] == stem else ()
    facts = tuple(_tensor_fact(index, tensor) for tensor in reads)
    line = index.printer.line(node)
    return Explanation(name, "value", index.mode, line, tuple(causes), (_node_fact(index, node),), facts, others)


def _at_place_of(index: Index, node: fx.Node, reads: Sequence[str]) -> list[Origin]:
    """Return the adaptations at a base node's place: at the tensors that it reads, or at its result."""
    causes = [cause for tensor in reads for cause in index.on_tensor(tensor)]
    for user in node.users:
        made_by = provenance(user)
        if made_by is not None and user.meta.get("module") == node.meta.get("module"):
            causes.append(_origin(index, made_by))
    return list(dict.fromkeys(causes))


def _tensor(index: Index, name: str, tensor: str) -> Explanation:
    fact = _tensor_fact(index, tensor)
    causes = index.on_tensor(fact.tensor)
    own = index.attributes.get(fact.tensor)
    made_by = provenance(own) if own is not None else None
    if made_by is not None and not causes:
        causes = [_origin(index, made_by)]
    readers = tuple(_node_fact(index, user) for user in own.users) if own is not None else ()
    title = f"{fact.name}: {fact.type}"
    return Explanation(name, "tensor", index.mode, title, tuple(causes), readers, (fact,))


def _place(index: Index, name: str, entry: Found) -> Explanation:
    path, site = entry.module, entry.site
    if site:
        causes = [cause for cause in index.origins if cause.site == site]
        base = index.base_tensor(site)
        tensors = [*([base] if base else []), *(tensor for cause in causes for tensor in cause.tensors)]
        readers = {user for name in tensors if name in index.attributes for user in index.attributes[name].users}
        own = [n for n in index.nodes if site in _sites(n) or (n in readers and provenance(n) is None)]
        return _place_of(index, name, site, causes, own, tensors)
    causes = [cause for cause in index.origins if index.within(cause.module, path)]
    own = [n for n in index.nodes if str(n.meta.get("module") or "") == path]
    tensors = [tensor for tensor in index.tensors if module_of(tensor) == path]
    under = [n for n in index.nodes if str(n.meta.get("module") or "").startswith(f"{path}.")]
    below = Below(len(under), sum(provenance(n) is not None for n in under))
    return _place_of(index, name, path, causes, own, tensors, below)


def _place_of(
    index: Index,
    name: str,
    title: str,
    causes: Sequence[Origin],
    nodes: Iterable[fx.Node],
    tensors: Iterable[str],
    below: Below = NOTHING_BELOW,
) -> Explanation:
    facts = tuple(_tensor_fact(index, tensor) for tensor in dict.fromkeys(tensors))
    node_facts = tuple(_node_fact(index, node) for node in nodes)
    return Explanation(name, "place", index.mode, title, tuple(causes), node_facts, facts, (), below)


def _sites(node: fx.Node) -> tuple[str, ...]:
    """Return the place for which a node was inserted, with and without its use; empty for base nodes."""
    made_by = provenance(node)
    return () if made_by is None else (made_by["site"], made_by["site"].partition("#")[0])


def _origin(index: Index, made_by: dict[str, str]) -> Origin:
    """Return the origin behind a node's provenance."""
    adaptation, site = made_by["adaptation"], made_by["site"]
    own = [cause for cause in index.origins if cause.adaptation == adaptation]
    for spelling in (site, site.partition("#")[0], index.canonical(site.partition("#")[0])):
        for cause in own:
            if spelling and cause.site == spelling:
                return cause
    return shared_origin(index.snapshot, adaptation)


def _tensor_fact(index: Index, tensor: str) -> TensorFact:
    owner = index.canonical(tensor)
    aliases = tuple(alias for alias, name in index.snapshot.aliases.items() if name == owner)
    copies = tuple(printed_tensor(record.tensor) for record in index.snapshot.trained if record.base == owner)
    trains = owner in index.snapshot.adapters and index.snapshot.adapters[owner].trainable
    return TensorFact(printed_tensor(owner), owner, index.type_of(owner), trains, aliases, copies)


def _node_fact(index: Index, node: fx.Node) -> NodeFact:
    origin = provenance(node) or {}
    return NodeFact(
        index.names[node],
        node.name,
        cast("Any", node.op),
        index.printer.line(node),
        str(node.meta.get("module") or ""),
        _origin(index, origin).step if origin else CAPTURE,
        origin.get("adaptation", ""),
        origin.get("method", ""),
        origin.get("part", ""),
        tuple(_value_fact(index, n) for n in node.all_input_nodes if n.op != "get_attr"),
        tuple(_value_fact(index, n) for n in node.users),
    )


def _value_fact(index: Index, node: fx.Node) -> ValueFact:
    return ValueFact(index.names[node], (provenance(node) or {}).get("adaptation", ""))
