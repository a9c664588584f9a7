"""The report: what every adaptation adds, counted from the graph, on the meta device too.

The task head is not counted (it trains anyway); a percentage is of base plus added parameters, as PEFT prints it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx, nn

from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.compilation import Compilation, Resolution
from graftc.compiler.folding.collapse import collapsed_parameters
from graftc.compiler.inspect.costs import Costs
from graftc.compiler.inspect.pass_figures import COLUMNS, figure_rows, passes_json
from graftc.compiler.inspect.snapshot import adapter_tensors
from graftc.compiler.inspect.stacks import StackReport, stacks
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import live_places
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.method.capabilities import Resized
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.pass_context import PassRecord
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.markup import Html, bullets, folded, table


@dataclass(frozen=True)
class AdaptationReport:
    """One adaptation.

    Attributes:
        name, method: of the adaptation.
        sites: how many sites it adapts.
        trainable_parameters: elements that train.
        frozen_parameters: elements it adds that do not train.
        bytes: of all tensors it adds and keeps: parameters, and what controllers and selections remember.
        flops_per_token: added to a forward pass in eval mode, two per multiply-add, over batch times sequence.
    """

    name: str
    method: str
    sites: int
    trainable_parameters: int
    frozen_parameters: int
    bytes: int
    flops_per_token: float


@dataclass(frozen=True)
class StepReport:
    """How long a step of compiling took, all its runs together.

    Attributes:
        name: as in the history of a graph: ``capture``, ``roles``, ``insert(attention)``, ``verify``.
        seconds: in the graphs of the first signature.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """A Compilation's cost.

    Attributes:
        adaptations: one entry each, the ``train:`` list last.
        base_parameters: elements of the base's parameters, tied ones once.
        trainable_parameters: of all adaptations, without the task head and the ``train:`` list.
        trained_in_full: elements of the modules in ``train:``.
        deployed_parameters: what has to ship beside the base if nothing is folded; of experts that are averaged,
            one; of what a later training or the end of this one prunes, what it leaves. Ranks without an effect count
            (`Compiled.rank_pattern` has them): their tensors ship as well.
        percent: ``100 t / (base + t)``.
        flops_per_token: of the base's linear maps and attention-free products.
        capture_seconds, rewrite_seconds: how long compiling took.
        notes: what capturing had to change, and what could not be looked at.
        anchors: how the base's graphs compare with the source model itself.
        steps: how long each step took, in the order in which they began.
        passes: passes of plugins that the graphs went through, with the figures that they report.
        stacks: how much of each stack of layers is a graph.
    """

    adaptations: tuple[AdaptationReport, ...]
    base_parameters: int
    trainable_parameters: int
    trained_in_full: int
    deployed_parameters: int
    percent: float
    flops_per_token: float
    capture_seconds: float
    rewrite_seconds: float
    cached: bool
    notes: tuple[str, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    steps: tuple[StepReport, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    stacks: tuple[StackReport, ...] = ()

    def _repr_html_(self) -> str:
        """For notebooks: what trains, a table of the adaptations, and folded notes and steps."""
        total = f"{self.trainable_parameters:,} of {self.base_parameters + self.trainable_parameters:,}"
        facts = [f"trainable parameters: {total} ({self.percent:.4f}%)"]
        facts += [f"trained in full: {self.trained_in_full:,}"] if self.trained_in_full else []
        facts.append(f"deployed beside the base: {self.deployed_parameters:,}")
        headings = ("adaptation", "method", "sites", "trainable", "frozen", "bytes", "FLOPs per token")
        rows = [
            (
                a.name,
                a.method,
                a.sites,
                *(f"{n:,}" for n in (a.trainable_parameters, a.frozen_parameters, a.bytes)),
                f"{a.flops_per_token:,.0f}",
            )
            for a in self.adaptations
        ]
        seconds = self.capture_seconds + self.rewrite_seconds
        steps = table(("step", "seconds"), [(s.name, f"{s.seconds:.2f}") for s in self.steps], ("seconds",))
        found = [row.cells() for row in figure_rows(self.passes)]
        parts = [bullets(facts), table(headings, rows, headings[2:]), bullets(self.notes)]
        parts += [table(COLUMNS, found, COLUMNS[-1:])] if found else []
        return Html("".join(parts) + folded(f"compiled in {seconds:.1f} s", steps))

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {
            **asdict(self),
            "adaptations": [asdict(a) for a in self.adaptations],
            "notes": list(self.notes),
            "steps": [asdict(s) for s in self.steps],
            "anchors": [{**a.to_json(), "seconds": a.seconds} for a in self.anchors],
            "passes": passes_json(self.passes),
            "stacks": [each.to_json() for each in self.stacks],
        }


def report(compilation: Compilation) -> Report:
    """Count what a Compilation adds."""
    store, main = compilation.store, compilation.main
    adapted, base_eval = compilation.program("eval"), compilation.program("eval", "base")
    base = sum(t.numel() for name, t in store.weights() if not store.is_buffer(name))
    counts = _Counts(adapted, store)
    entries = [counts.entry(item.name, item.spec.method, len(item.places)) for item in main.resolved]
    for unit in compilation.units:
        if unit.composition is not None:
            places = {site.key for member in unit.members for site, _ in member.places}
            entries.append(counts.entry(unit.name, unit.composition.kind, len(places)))
    if compilation.spec.tokens is not None:
        tables = {edit.own.tensor for edit in compilation.tensor_edits.copies(TOKENS)}
        entries.insert(0, counts.entry(TOKENS, TOKENS, len(tables)))
    trainable = sum(entry.trainable_parameters for entry in entries)
    full = 0
    if main.trained:
        entry = counts.entry(TRAIN, "full", len(main.trained))
        full = entry.trainable_parameters
        entries.append(entry)
    added = {entry.name: entry.trainable_parameters + entry.frozen_parameters for entry in entries}
    unheld = [f"not held against the model itself: {each.skipped}" for each in main.anchors if each.skipped]
    return Report(
        tuple(entries),
        base,
        trainable,
        full,
        sum({**added, **collapsed_parameters(compilation), **_left(compilation)}.values()) - full,
        100 * trainable / (base + trainable) if trainable else 0.0,
        Costs(base_eval).total_flops(base_eval.graph.nodes),
        main.capture_seconds,
        sum(entry.seconds for entry in adapted.history),
        main.cached,
        tuple(dict.fromkeys([*compilation.notes, *unheld])),
        main.anchors,
        _steps(main, adapted),
        main.passes,
        stacks(compilation, base_eval),
    )


def _steps(main: Resolution, adapted: Program) -> tuple[StepReport, ...]:
    """Capturing, comparing with the model, and what the history of the adapted graph of eval mode has, which goes on
    from that of train mode."""
    found = {"capture": main.capture_seconds, "anchor": sum(a.seconds for a in main.anchors)}
    for entry in adapted.history:
        found[entry.step] = found.get(entry.step, 0.0) + entry.seconds
    return tuple(StepReport(name, seconds) for name, seconds in found.items())


def _left(compilation: Compilation) -> dict[str, int]:
    """What adaptations say themselves of how many elements they are deployed with, by name."""
    found: dict[str, int] = {}
    for item in compilation.main.resolved:
        method = method_for(item.spec.method)
        if not isinstance(method, Resized):
            continue
        count = method.deployed(item.spec, live_places(compilation, item)[0])
        if count is not None:
            found[item.name] = count
    return found


class _Counts:
    """What each adaptation has added, from one look through tensors and nodes for all of them.

    Args:
        program: the adapted graph.
        store: its tensors.
    """

    def __init__(self, program: Program, store: Store) -> None:
        self._costs = Costs(program)
        self._tensors: dict[str, list[Tensor]] = defaultdict(list)
        self._nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for fqn, tensor in adapter_tensors(store):
            self._tensors[owner_of(fqn)].append(tensor)
        for node in program.graph.nodes:
            origin = provenance(node)
            if origin is not None:
                self._nodes[origin["adaptation"]].append(node)

    def entry(self, name: str, method: str, sites: int) -> AdaptationReport:
        """The line of an adaptation, a composition, the new tokens or the ``train:`` list."""
        kept = self._tensors.get(name, [])
        tensors = [tensor for tensor in kept if isinstance(tensor, nn.Parameter)]
        return AdaptationReport(
            name,
            method,
            sites,
            sum(t.numel() for t in tensors if t.requires_grad),
            sum(t.numel() for t in tensors if not t.requires_grad),
            sum(t.numel() * t.element_size() for t in kept),
            self._costs.total_flops(self._nodes.get(name, [])),
        )
