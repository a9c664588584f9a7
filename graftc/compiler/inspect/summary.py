"""Summarise a Compilation in a few lines: what is adapted, and how much trains."""

from __future__ import annotations

from collections.abc import Iterable

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.weights.names import owner_of
from graftc.records.places import AdaptedPlace
from graftc.records.summary import AdaptationSummary, Summary
from graftc.specs.errors.text import format_layers


def summary(snapshot: Snapshot) -> Summary:
    """Return the summary of a Compilation."""
    entries = [_adaptation(snapshot, name, method) for name, method in snapshot.spec.owners.items()]
    if snapshot.spec.tokens is not None:
        entries.insert(0, _adaptation(snapshot, TOKENS, TOKENS))
    if any(record.owner == TRAIN for record in snapshot.trained):
        entries.append(_adaptation(snapshot, TRAIN, "full"))
    base = sum(t.numel for t in snapshot.base.values() if t.parameter)
    full = sum(e.trainable_parameters for e in entries if e.name == TRAIN)
    trainable = sum(e.trainable_parameters for e in entries) - full
    nodes = [n for n in snapshot.program().graph.nodes if n.op != "get_attr"]
    return Summary(
        snapshot.model,
        tuple(entries),
        base,
        len(snapshot.base),
        trainable,
        full,
        100 * trainable / (base + trainable) if trainable else 0.0,
        len(nodes),
        sum(provenance(n) is not None for n in nodes),
        snapshot.passes,
    )


def _adaptation(snapshot: Snapshot, name: str, method: str) -> AdaptationSummary:
    composed = next((c.members for c in snapshot.spec.compose if c.name == name), ())
    places = {site.key: site for site in snapshot.sites if site.adaptation == name or site.adaptation in composed}
    sites = list(places.values())
    trained = {record.base for record in snapshot.trained if record.owner == name}
    tensors = [t for fqn, t in snapshot.adapters.items() if owner_of(fqn) == name]
    nodes = (n for n in snapshot.program().graph.nodes if n.op != "get_attr")
    return AdaptationSummary(
        name,
        method,
        len(sites) or len(trained),
        tuple(dict.fromkeys(site.roles[0] for site in sites if site.roles)),
        _layers(sites),
        sum(t.numel for t in tensors if t.trainable),
        sum(t.numel for t in tensors if t.parameter and not t.trainable),
        len(tensors),
        sum((provenance(n) or {}).get("adaptation") == name for n in nodes),
    )


def _layers(sites: Iterable[AdaptedPlace]) -> str:
    """Return the places' layers as text, ``0-5``, with stack names if there are several stacks."""
    stacks: dict[str, list[int]] = {}
    for site in sites:
        if site.layer is not None:
            stacks.setdefault(site.stack, []).append(site.layer)
    if len(stacks) == 1:
        return format_layers(next(iter(stacks.values())))
    return ", ".join(f"{stack} {format_layers(layers)}" for stack, layers in stacks.items())
