"""The report of what every adaptation adds, counted from the graph, also for models on the meta device.

The task head is not counted (it trains anyway); percentages are of base plus added parameters, as PEFT prints them.
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
    """The cost of one adaptation.

    Attributes:
        name, method: name and method of the adaptation.
        sites: number of sites that it adapts.
        trainable_parameters: number of elements that train.
        frozen_parameters: number of elements that it adds and that do not train.
        bytes: size of all tensors that it adds and keeps: parameters, and the state of controllers and selections.
        flops_per_token: FLOPs added to a forward pass in eval mode, two per multiply-add, over batch times sequence.
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
    """The time that a step of compiling took, summed over all its runs.

    Attributes:
        name: name of the step, as in the history of a graph: ``capture``, ``roles``, ``insert(attention)``, ``verify``.
        seconds: time spent in the graphs of the first signature.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """The cost of a Compilation.

    Attributes:
        adaptations: one entry for each adaptation, the ``train:`` list last.
        base_parameters: number of elements of the base's parameters; tied ones are counted once.
        trainable_parameters: number of trainable elements of all adaptations, without the task head and the ``train:``
            list.
        trained_in_full: number of elements of the modules in ``train:``.
        deployed_parameters: number of elements to ship beside the base if nothing is folded; of averaged experts, one
            counts; of adaptations that a later training or the end of this one prunes, what remains counts. Ranks
            without an effect count (`Compiled.rank_pattern` has them): their tensors ship as well.
        percent: ``100 t / (base + t)``.
        flops_per_token: FLOPs of the base's linear maps and attention-free products.
        capture_seconds, rewrite_seconds: time spent capturing and rewriting.
        notes: what capturing had to change, and what could not be examined.
        anchors: comparisons of the base's graphs with the source model itself.
        steps: time spent in each step, in the order in which the steps began.
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
        """Return HTML for notebooks: what trains, a table of the adaptations, notes and collapsed steps."""
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
        figures = [row.cells() for row in figure_rows(self.passes)]
        parts = [bullets(facts), table(headings, rows, headings[2:]), bullets(self.notes)]
        parts += [table(COLUMNS, figures, COLUMNS[-1:])] if figures else []
        return Html("".join(parts) + folded(f"compiled in {seconds:.1f} s", steps))

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as JSON data."""
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
    uncompared = [f"not held against the model itself: {each.skipped}" for each in main.anchors if each.skipped]
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
        tuple(dict.fromkeys([*compilation.notes, *uncompared])),
        main.anchors,
        _steps(main, adapted),
        main.passes,
        stacks(compilation, base_eval),
    )


def _steps(main: Resolution, adapted: Program) -> tuple[StepReport, ...]:
    """Return the time of each step: capturing, comparing with the model, and the history of the adapted eval graph.

    That history continues the one of train mode.
    """
    times = {"capture": main.capture_seconds, "anchor": sum(a.seconds for a in main.anchors)}
    for entry in adapted.history:
        times[entry.step] = times.get(entry.step, 0.0) + entry.seconds
    return tuple(StepReport(name, seconds) for name, seconds in times.items())


def _left(compilation: Compilation) -> dict[str, int]:
    """Return the number of elements to deploy, by name, for adaptations that determine it themselves."""
    counts: dict[str, int] = {}
    for item in compilation.main.resolved:
        method = method_for(item.spec.method)
        if not isinstance(method, Resized):
            continue
        count = method.deployed(item.spec, live_places(compilation, item)[0])
        if count is not None:
            counts[item.name] = count
    return counts


class _Counts:
    """Tensors and nodes added by each adaptation, counted for all of them in one pass.

    Args:
        program: the adapted graph.
        store: the tensors of the graph.
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
        """Return the entry of an adaptation, a composition, the new tokens or the ``train:`` list."""
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
