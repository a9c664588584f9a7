"""Create the contents of a page as JSON data: figures, sites, the module tree, and the graphs at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftc.compiler.inspect.frames import Frames, frames, plain_frames
from graftc.compiler.inspect.sizes import StatedSizes
from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.inspect.summary import summary
from graftc.compiler.inspect.tree import model_tree
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.findings import Structure
from graftc.compiler.roles.structure import roles_of
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.names import module_of, owner_of, parsed
from graftc.records.places import AdaptedPlace
from graftc.records.roles import Finding
from graftc.records.summary import AdaptationSummary
from graftc.specs.document import Spec
from graftc.specs.errors.text import format_layers, format_runs
from graftc.specs.io import dump_spec
from graftc.specs.source import read_yaml
from graftc.version import __version__

FORMAT = 1
PALETTE = ("#3b82c4", "#d9772b", "#2f9e6e", "#b5498f", "#8a6fd1", "#b08a1e", "#2aa3a3", "#c8534f")
"""The colours of adaptations, in order; they repeat if there are more adaptations."""

MODES: tuple[Mode, ...] = ("eval", "train")
CURVES = 1000
"""The maximum number of curves from a log that are shown."""

_NEAR = 50
"""The maximum number of nearly matching sites that are listed for a target."""


@dataclass(frozen=True)
class Evidence:
    """The facts about a compiled model that its `Snapshot` does not contain.

    Attributes:
        certificate: the certificate of its fold, as JSON data; None if nothing was certified.
        kept: the adaptations that do not fold, with the reasons; None if folding was not tried.
        structure: the roles in the base; by default they are derived from its graph.
        curves: its training curves, each with ``name``, ``group``, ``steps`` and ``values``.
        figures: the current figures of controllers, by adaptation and site, such as ``{"rank": 4}``.
        warnings: the warnings from its compilation, each with ``code`` and ``text``.
        artifact: the name of the artifact's folder.
        title: the title of the page; by default the model's class.
        differences: the differences from the model with which it is compared, each with ``what`` and ``lines``.
    """

    certificate: Mapping[str, Any] | None = None
    kept: Mapping[str, str] | None = None
    structure: Structure | None = None
    curves: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    warnings: Sequence[Mapping[str, str]] = ()
    artifact: str | None = None
    title: str = ""
    differences: Sequence[Mapping[str, Any]] | None = None


def contents(snapshot: Snapshot, evidence: Evidence | None = None, before: Snapshot | None = None) -> dict[str, Any]:
    """Return the data for a page.

    Args:
        snapshot: the compiled model to show.
        evidence: further facts about the model.
        before: another compiled model with which to compare it; by default it is compared with its base.
    """
    known, overview = evidence or Evidence(), summary(snapshot)
    graphs = {mode: frames(snapshot, mode, None if before is None else before.program(mode)) for mode in MODES}
    names = [entry.name for entry in overview.adaptations]
    numbers = {name: number for number, name in enumerate(names)}
    gone = [] if before is None else [e for e in summary(before).adaptations if e.name not in names]
    costs, stated = _Costs(graphs["eval"], snapshot), StatedSizes(snapshot)
    text = dump_spec(snapshot.spec)
    total = overview.base_parameters + overview.trainable_parameters + overview.trained_in_full
    return {
        **_header(snapshot, "adaptations", known.title or f"{snapshot.model}, adapted", known.artifact),
        "summary": overview.to_json(),
        "spec": {"text": text, "lines": spec_lines(snapshot.spec, text)},
        "adaptations": [
            _adaptation(number, entry, costs, known, total, stated.text(entry.name))
            for number, entry in enumerate([*overview.adaptations, *gone])
        ],
        "layers": costs.by_layer(stated, known.figures),
        "sites": [_site(record, numbers, stated, known) for record in snapshot.sites],
        "tree": model_tree(snapshot).to_json(),
        "graphs": {mode: graph.to_json([*names, *(e.name for e in gone)]) for mode, graph in graphs.items()},
        "certificate": known.certificate,
        "warnings": [*map(dict, known.warnings), *_left_out(len(known.curves))],
        "targets": _targets(snapshot, known.structure),
        "curves": [dict(curve) for curve in known.curves[:CURVES]] or None,
        "differences": None if known.differences is None else [dict(entry) for entry in known.differences],
    }


def role_contents(snapshot: Snapshot, structure: Structure) -> dict[str, Any]:
    """Return the data for a page that shows a model without adaptations, with the roles of its parts.

    Args:
        snapshot: a snapshot of the model without adaptations.
        structure: the roles.
    """
    by_role = structure.by_role()
    roles = list(by_role)
    places = {f.node.name: (f.role, f.parameter or f.module, f.evidence) for f in structure.findings}
    graphs = {}
    for mode in MODES:
        graph = plain_frames(snapshot, mode)
        for node, item in zip(snapshot.program(mode, base=True).graph.nodes, graph.nodes, strict=True):
            item.origin = places.get(node.name)
        graphs[mode] = graph.to_json(roles)
    text = "\n".join(f"{left.module}: {left.reason}" for left in structure.unresolved)
    return {
        **_header(snapshot, "roles", f"{snapshot.model}: roles", None),
        "summary": summary(snapshot).to_json(),
        "spec": {"text": text, "lines": {}},
        "adaptations": [_role(number, role, by_role[role]) for number, role in enumerate(roles)],
        "layers": [],
        "sites": [_role_site(finding, roles) for finding in structure.findings],
        "tree": model_tree(snapshot).to_json(),
        "graphs": graphs,
        "certificate": None,
        "warnings": [],
        "targets": None,
        "curves": None,
        "differences": None,
    }


def _header(snapshot: Snapshot, categories: str, title: str, artifact: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "categories": categories,
        "title": title,
        "model": snapshot.model,
        "graftc": __version__,
        "artifact": artifact,
    }


def _role(number: int, role: str, findings: Sequence[Finding]) -> dict[str, Any]:
    layers = [finding.layer for finding in findings if finding.layer is not None]
    return {
        "name": role,
        "method": "",
        "colour": PALETTE[number % len(PALETTE)],
        "places": len(findings),
        "roles": [role],
        "layers": format_layers(layers) if layers else "",
        "nodes": len(findings),
        **dict.fromkeys(("trainable_parameters", "frozen_parameters", "bytes"), 0),
        **dict.fromkeys(("share", "flops_per_token", "value_bytes_per_token"), 0.0),
        "folds": None,
        "fold_reason": "",
        "figures": [],
        "size": "",
    }


def _role_site(finding: Finding, roles: Sequence[str]) -> dict[str, Any]:
    return {
        "adaptation": roles.index(finding.role),
        "key": finding.parameter or finding.module,
        "module": finding.module,
        "roles": [finding.role],
        "layer": finding.layer,
        "kind": str(finding.kind),
        "evidence": finding.evidence,
        "tensors": {},
        "figures": [] if finding.rows is None else [["rows", format_runs(finding.rows)]],
    }


def _left_out(curves: int) -> list[dict[str, str]]:
    text = f"only the first {CURVES:,} of the training log's {curves:,} curves are shown"
    return [{"code": "", "text": text}] if curves > CURVES else []


def spec_lines(spec: Spec, text: str) -> dict[str, int]:
    """Return the 1-based line number of every adaptation in the spec's YAML text."""
    source = read_yaml(text)[1]
    paths = {adaptation.name or "": f"adapt[{number}]" for number, adaptation in enumerate(spec.adapt)}
    paths |= {item.name or "": f"compose[{number}]" for number, item in enumerate(spec.compose)}
    paths |= {TRAIN: "train"} if spec.train else {}
    paths |= {TOKENS: "tokens"} if spec.tokens is not None else {}
    lines = {name: source.place(path).line for name, path in paths.items()}
    return {name: line for name, line in lines.items() if line is not None}


def _adaptation(
    number: int, entry: AdaptationSummary, costs: _Costs, known: Evidence, total: int, size: str
) -> dict[str, Any]:
    reason = (known.kept or {}).get(entry.name, "")
    added = entry.trainable_parameters
    figures = _ranges([values for (name, _), values in known.figures.items() if name == entry.name])
    # The current value of a requested size, such as a rank.
    now = [f"{name} {value} now" for name, value in figures if size.startswith(f"{name} ")]
    return {
        "name": entry.name,
        "method": entry.method,
        "colour": PALETTE[number % len(PALETTE)],
        "places": entry.places,
        "roles": list(entry.roles),
        "layers": entry.layers,
        "trainable_parameters": added,
        "frozen_parameters": entry.frozen_parameters,
        "share": 100 * added / total if added else 0.0,
        "nodes": entry.nodes,
        **costs.of(entry.name),
        "folds": None if known.kept is None else not reason,
        "fold_reason": reason,
        "figures": figures,
        "size": "; ".join([*filter(None, [size]), *now]),
    }


def _ranges(figures: Iterable[Mapping[str, float]]) -> list[list[str]]:
    """Return the smallest and largest value of each figure over all sites."""
    values: dict[str, list[float]] = defaultdict(list)
    for site in figures:
        for name, value in site.items():
            values[name].append(value)
    return [
        [name, f"{min(v):.6g}" if min(v) == max(v) else f"{min(v):.6g} to {max(v):.6g}"] for name, v in values.items()
    ]


def _site(record: AdaptedPlace, numbers: Mapping[str, int], stated: StatedSizes, known: Evidence) -> dict[str, Any]:
    tensors = {part: (name, stated.snapshot.adapters.get(name)) for part, name in record.tensors.items()}
    figures = known.figures.get((record.adaptation, str(record.key)), {})
    size = stated.at(record)
    return {
        "adaptation": numbers.get(record.adaptation, -1),
        "key": str(record.key),
        "module": record.module,
        "roles": list(record.roles),
        "layer": record.layer,
        "kind": record.kind,
        "evidence": record.evidence,
        "tensors": {
            part: [name, str(tensor), tensor.trainable]
            for part, (name, tensor) in tensors.items()
            if tensor is not None
        },
        "figures": [
            *([[f"{size[0]}, as asked" if size[0] in figures else size[0], size[1]]] if size else []),
            *([name, f"{value:.6g}"] for name, value in figures.items()),
        ],
    }


class _Costs:
    """The costs that adaptations add, in total and in each layer.

    Args:
        graph: the eval graph.
        snapshot: the snapshot that contains the tensors.
    """

    def __init__(self, graph: Frames, snapshot: Snapshot) -> None:
        self._costs: dict[tuple[str, str], dict[str, float]] = defaultdict(
            lambda: {"trainable_parameters": 0, "bytes": 0, "flops_per_token": 0.0, "value_bytes_per_token": 0.0}
        )
        for name, tensor in snapshot.adapters.items():
            layer = layer_path(_home(name))
            costs = self._costs[owner_of(name), layer]
            costs["trainable_parameters"] += tensor.numel if tensor.trainable else 0
            costs["bytes"] += tensor.nbytes
        for node in graph.nodes:
            if node.origin is not None and node.gone < 0:
                costs = self._costs[node.origin[0], layer_path(node.module)]
                costs["flops_per_token"] += node.flops
                costs["value_bytes_per_token"] += node.value_bytes

    def of(self, name: str) -> dict[str, float]:
        """Return an adaptation's costs, without its number of parameters."""
        mine = [costs for (own, _), costs in self._costs.items() if own == name]
        return {key: sum(c[key] for c in mine) for key in ("bytes", "flops_per_token", "value_bytes_per_token")}

    def by_layer(
        self, stated: StatedSizes, figures: Mapping[tuple[str, str], Mapping[str, float]]
    ) -> list[dict[str, Any]]:
        """Return every adaptation's costs and size in every layer; outside layers, the layer's name is empty."""
        sizes: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for record in stated.snapshot.sites:
            if (size := stated.at(record)) is not None:
                now = figures.get((record.adaptation, str(record.key)), {}).get(size[0])
                text = f"{size[0]} {size[1]}" + ("" if now is None else f", {now:.6g} now")
                sizes[record.adaptation, layer_path(record.module)][text] = None
        return [
            {"layer": layer, "adaptation": name, "size": "; ".join(sizes[name, layer]), **costs}
            for (name, layer), costs in self._costs.items()
        ]


def _home(name: str) -> str:
    """Return the base's module to which an adaptation's tensor belongs."""
    parts = parsed(name)
    return module_of(name) if parts is None else parts.module


def _targets(snapshot: Snapshot, structure: Structure | None) -> list[dict[str, Any]]:
    """Return, for each target, its request, the number of matching sites, and the sites that nearly match."""
    if structure is None:
        structure = roles_of(snapshot.program(base=True))
    targets = []
    for adaptation in snapshot.spec.adapt:
        mine = [site for site in snapshot.sites if site.adaptation == adaptation.name]
        modules = {site.module for site in mine}
        target = adaptation.target
        asked = [target.role] if isinstance(target.role, str) else list(target.role or ())
        nearly = [
            {"place": finding.module, "reason": f"{finding.role}: has the role, but the rest of the target excludes it"}
            for role in asked
            for finding in structure.having(role)
            if finding.module not in modules
        ]
        nearly += [{"place": left.module, "reason": left.reason} for left in structure.unresolved if asked]
        shown = target.model_dump(exclude_defaults=True, mode="json")
        targets.append(
            {
                "adaptation": adaptation.name,
                "asked": ", ".join(f"{key}: {value}" for key, value in shown.items()) or "the method's own places",
                "matched": len(mine),
                "nearly": nearly[:_NEAR],
                "more": max(0, len(nearly) - _NEAR),
            }
        )
    return targets
