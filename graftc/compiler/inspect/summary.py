"""A summary of a Compilation in a few lines: what is adapted, and how much trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from graftc.compiler.inspect.pass_figures import COLUMNS, figure_rows, passes_json
from graftc.compiler.inspect.snapshot import SiteRecord, Snapshot
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.findings import format_layers
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.pass_context import PassRecord
from graftc.passes.core.weights.names import owner_of
from graftc.specs.errors.markup import Html, bullets, table, tag


@dataclass(frozen=True)
class AdaptationSummary:
    """The summary of one adaptation.

    Attributes:
        name, method: name and method of the adaptation; the ``train`` list is ``trained``, new tokens are ``tokens``.
        places: number of places that it adapts; for what trains in full, the number of base tensors.
        roles: the most specific roles of its places.
        layers: layers that the places are in, as text; several stacks one after another.
        trainable_parameters, frozen_parameters: number of trainable and of frozen elements that it adds.
        tensors: number of tensors that it adds.
        nodes: number of nodes that it inserted into the eval graph.
    """

    name: str
    method: str
    places: int
    roles: tuple[str, ...]
    layers: str
    trainable_parameters: int
    frozen_parameters: int
    tensors: int
    nodes: int


@dataclass(frozen=True)
class Summary:
    """The summary of a Compilation.

    Attributes:
        model: class of the source model.
        adaptations: summaries of the adaptations, new tokens first, the ``train`` list last.
        base_parameters: number of elements of the base's parameters; tied ones are counted once.
        base_tensors: number of tensors of the base, including buffers; tied ones are counted once.
        trainable_parameters: number of trainable elements of all adaptations without the ``train`` list.
        trained_in_full: number of elements of the ``train`` list.
        percent: ``100 t / (base + t)``.
        nodes, inserted: number of nodes of the eval graph, without reads of tensors, and how many of those were
            inserted.
        passes: passes of plugins that the graphs went through, with the figures that they report.
    """

    model: str
    adaptations: tuple[AdaptationSummary, ...]
    base_parameters: int
    base_tensors: int
    trainable_parameters: int
    trained_in_full: int
    percent: float
    nodes: int
    inserted: int
    passes: tuple[PassRecord, ...] = ()

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the model, what trains, and a table of the adaptations."""
        total = f"{self.trainable_parameters:,} of {self.base_parameters + self.trainable_parameters:,}"
        facts = [f"trainable parameters: {total} ({self.percent:.4f}%)"]
        facts += [f"trained in full: {self.trained_in_full:,}"] if self.trained_in_full else []
        headings = ("adaptation", "method", "places", "roles", "layers", "trainable", "frozen")
        rows = [
            (
                a.name,
                a.method,
                a.places,
                ", ".join(a.roles),
                a.layers,
                f"{a.trainable_parameters:,}",
                f"{a.frozen_parameters:,}",
            )
            for a in self.adaptations
        ]
        adaptations = table(headings, rows, ("places", "trainable", "frozen"))
        lines = [row.cells() for row in figure_rows(self.passes)]
        figures = table(COLUMNS, lines, COLUMNS[-1:]) if lines else ""
        return Html(tag("b", f"Compiled {self.model}") + bullets(facts) + adaptations + figures)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        adaptations = [{**asdict(a), "roles": list(a.roles)} for a in self.adaptations]
        return {**asdict(self), "adaptations": adaptations, "passes": passes_json(self.passes)}


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


def _layers(sites: Iterable[SiteRecord]) -> str:
    """Return the layers of places as text, ``0-5``, with the stack if there are several."""
    stacks: dict[str, list[int]] = {}
    for site in sites:
        if site.layer is not None:
            stacks.setdefault(site.stack, []).append(site.layer)
    if len(stacks) == 1:
        return format_layers(next(iter(stacks.values())))
    return ", ".join(f"{stack} {format_layers(layers)}" for stack, layers in stacks.items())
