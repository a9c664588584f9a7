"""All that a page shows, as JSON data: figures, sites, the module tree, and graphs at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import graftc
from graftc.compiler.inspect.frames import Frames, frames
from graftc.compiler.inspect.snapshot import SiteRecord, Snapshot, TensorRecord
from graftc.compiler.inspect.summary import AdaptationSummary, summary
from graftc.compiler.inspect.tree import model_tree
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.findings import Structure
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.ir.shapes import DTYPES
from graftc.passes.core.weights.names import module_of, owner_of, parsed
from graftc.specs.document import Spec
from graftc.specs.io import dump_spec
from graftc.specs.source import read_yaml

FORMAT = 1
PALETTE = ("#3b82c4", "#d9772b", "#2f9e6e", "#b5498f", "#8a6fd1", "#b08a1e", "#2aa3a3", "#c8534f")
"""Colours of adaptations, in their order; they begin again where there are more."""

MODES: tuple[Mode, ...] = ("eval", "train")
_NEAR = 50
"""How many places that a target nearly matches are listed."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a compiled model beyond its `Snapshot`.

    Attributes:
        certificate: of its fold, as JSON data; None where none was made.
        kept: adaptations that do not fold, with the reason; None where that was not tried.
        structure: the roles in the base; by default they are found in its graph.
        curves: of its training, each with ``name``, ``group``, ``steps`` and ``values``.
        figures: what controllers have come to, by adaptation and site: ``{"rank": 4}``.
        warnings: what compiling it warned of, each with ``code`` and ``text``.
        artifact: its folder.
    """

    certificate: Mapping[str, Any] | None = None
    kept: Mapping[str, str] | None = None
    structure: Structure | None = None
    curves: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    warnings: Sequence[Mapping[str, str]] = ()
    artifact: str | None = None


def contents(snapshot: Snapshot, evidence: Evidence | None = None, title: str = "") -> dict[str, Any]:
    """The data of a page.

    Args:
        snapshot: what is shown.
        evidence: what else is known of it.
        title: of the page; by default the model's class.
    """
    known, found = evidence or Evidence(), summary(snapshot)
    graphs = {mode: frames(snapshot, mode) for mode in MODES}
    names = [entry.name for entry in found.adaptations]
    costs = _Costs(graphs["eval"], snapshot)
    text = dump_spec(snapshot.spec)
    return {
        "format": FORMAT,
        "categories": "adaptations",
        "title": title or f"{snapshot.model}, adapted",
        "model": snapshot.model,
        "graftc": graftc.__version__,
        "artifact": known.artifact,
        "summary": found.to_json(),
        "spec": {"text": text, "lines": spec_lines(snapshot.spec, text)},
        "adaptations": [
            _adaptation(number, entry, costs, known, found.base_parameters)
            for number, entry in enumerate(found.adaptations)
        ],
        "layers": costs.by_layer(),
        "sites": [_site(record, names, snapshot, known) for record in snapshot.sites],
        "tree": model_tree(snapshot).to_json(),
        "graphs": {mode: graph.to_json(names) for mode, graph in graphs.items()},
        "certificate": known.certificate,
        "warnings": [dict(warning) for warning in known.warnings],
        "targets": _targets(snapshot, known.structure),
        "curves": [dict(curve) for curve in known.curves] or None,
    }


def spec_lines(spec: Spec, text: str) -> dict[str, int]:
    """The line of every adaptation in the spec's YAML text, from 1."""
    source = read_yaml(text)[1]
    paths = {adaptation.name or "": f"adapt[{number}]" for number, adaptation in enumerate(spec.adapt)}
    paths |= {item.name or "": f"compose[{number}]" for number, item in enumerate(spec.compose)}
    paths |= {TRAIN: "train"} if spec.train else {}
    paths |= {TOKENS: "tokens"} if spec.tokens is not None else {}
    lines = {name: source.place(path).line for name, path in paths.items()}
    return {name: line for name, line in lines.items() if line is not None}


def _adaptation(
    number: int, entry: AdaptationSummary, costs: _Costs, known: Evidence, base_parameters: int
) -> dict[str, Any]:
    reason = (known.kept or {}).get(entry.name, "")
    added = entry.trainable_parameters
    return {
        "name": entry.name,
        "method": entry.method,
        "colour": PALETTE[number % len(PALETTE)],
        "places": entry.places,
        "roles": list(entry.roles),
        "layers": entry.layers,
        "trainable_parameters": added,
        "frozen_parameters": entry.frozen_parameters,
        "share": 100 * added / (base_parameters + added) if added else 0.0,
        "nodes": entry.nodes,
        **costs.of(entry.name),
        "folds": None if known.kept is None else not reason,
        "fold_reason": reason,
        "figures": _ranges([held for (name, _), held in known.figures.items() if name == entry.name]),
    }


def _ranges(figures: Iterable[Mapping[str, float]]) -> list[list[str]]:
    """The least and the greatest value of every figure over sites."""
    found: dict[str, list[float]] = defaultdict(list)
    for own in figures:
        for name, value in own.items():
            found[name].append(value)
    return [
        [name, f"{min(v):.6g}" if min(v) == max(v) else f"{min(v):.6g} to {max(v):.6g}"] for name, v in found.items()
    ]


def _site(record: SiteRecord, names: Sequence[str], snapshot: Snapshot, known: Evidence) -> dict[str, Any]:
    tensors = {part: (name, snapshot.adapters.get(name)) for part, name in record.tensors.items()}
    figures = known.figures.get((record.adaptation, str(record.key)), {})
    return {
        "adaptation": names.index(record.adaptation) if record.adaptation in names else -1,
        "key": str(record.key),
        "module": record.key.module,
        "roles": list(record.roles),
        "layer": record.layer,
        "kind": record.kind,
        "evidence": record.evidence,
        "tensors": {
            part: [name, str(tensor), tensor.trainable]
            for part, (name, tensor) in tensors.items()
            if tensor is not None
        },
        "figures": [[name, f"{value:.6g}"] for name, value in figures.items()],
    }


class _Costs:
    """What adaptations add, as a whole and in each layer.

    Args:
        graph: the eval graph.
        snapshot: whose tensors.
    """

    def __init__(self, graph: Frames, snapshot: Snapshot) -> None:
        self._found: dict[tuple[str, str], dict[str, float]] = defaultdict(
            lambda: {"trainable_parameters": 0, "bytes": 0, "flops_per_token": 0.0, "value_bytes_per_token": 0.0}
        )
        for name, tensor in snapshot.adapters.items():
            layer = layer_path(_home(name))
            own = self._found[owner_of(name), layer]
            own["trainable_parameters"] += tensor.numel if tensor.trainable else 0
            own["bytes"] += tensor.numel * _itemsize(tensor)
        for node in graph.nodes:
            if node.origin is not None and node.gone < 0:
                own = self._found[node.origin[0], layer_path(node.module)]
                own["flops_per_token"] += node.flops
                own["value_bytes_per_token"] += node.value_bytes

    def of(self, name: str) -> dict[str, float]:
        """Of an adaptation, without its parameters."""
        mine = [costs for (own, _), costs in self._found.items() if own == name]
        return {key: sum(c[key] for c in mine) for key in ("bytes", "flops_per_token", "value_bytes_per_token")}

    def by_layer(self) -> list[dict[str, Any]]:
        """Of every adaptation in every layer; what stands outside of layers has an empty one."""
        return [{"layer": layer, "adaptation": name, **costs} for (name, layer), costs in self._found.items()]


def _home(name: str) -> str:
    """The module of the base that an adaptation's tensor is for."""
    found = parsed(name)
    return module_of(name) if found is None else found.module


def _itemsize(tensor: TensorRecord) -> int:
    dtype = DTYPES.get(tensor.dtype)
    return 0 if dtype is None else dtype.itemsize


def _targets(snapshot: Snapshot, structure: Structure | None) -> list[dict[str, Any]]:
    """What every target asked for, what it matched, and what has its role or nearly one and was not matched."""
    found = structure or find_structure(snapshot.program(base=True).graph)
    targets = []
    for adaptation in snapshot.spec.adapt:
        mine = [site for site in snapshot.sites if site.adaptation == adaptation.name]
        modules = {site.key.module for site in mine}
        target = adaptation.target
        asked = [target.role] if isinstance(target.role, str) else list(target.role or ())
        nearly = [
            {"place": finding.module, "reason": f"{finding.role}: has the role, and the rest of the target excludes it"}
            for role in asked
            for finding in found.having(role)
            if finding.module not in modules
        ]
        nearly += [{"place": left.module, "reason": left.reason} for left in found.unresolved if asked]
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
