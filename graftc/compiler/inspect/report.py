"""Report what every adaptation adds, counted in the graph, which also works for models on the meta device.

The task head is not counted: it trains anyway. Percentages are relative to base plus added parameters, as in PEFT.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, fx, nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.collapse import collapsed_parameters
from graftc.compiler.inspect.costs import Costs
from graftc.compiler.inspect.snapshot import adapter_tensors
from graftc.compiler.inspect.stacks import stacks
from graftc.compiler.resolution import Resolution
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import live_places
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.method.capabilities import Resized
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.store import Store
from graftc.records.report import AdaptationReport, Report, StepReport


def report(compilation: Compilation) -> Report:
    """Return the counts of everything that a Compilation adds to its base."""
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
    uncompared = [f"not compared with the model itself: {each.skipped}" for each in main.anchors if each.skipped]
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
    """Return the time of each step: capturing, comparing with the model, and the adapted eval graph's history.

    That history continues the one in train mode.
    """
    times = {"capture": main.capture_seconds, "anchor": sum(a.seconds for a in main.anchors)}
    for entry in adapted.history:
        times[entry.step] = times.get(entry.step, 0.0) + entry.seconds
    return tuple(StepReport(name, seconds) for name, seconds in times.items())


def _left(compilation: Compilation) -> dict[str, int]:
    """Return the number of elements to deploy, by adaptation name, for methods that determine it themselves."""
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
    """Counts the tensors and nodes that each adaptation added, collected in a single pass.

    Args:
        program: the adapted graph.
        store: the graph's tensors.
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
            name=name,
            method=method,
            sites=sites,
            trainable_parameters=sum(t.numel() for t in tensors if t.requires_grad),
            frozen_parameters=sum(t.numel() for t in tensors if not t.requires_grad),
            bytes=sum(t.numel() * t.element_size() for t in kept),
            flops_per_token=self._costs.total_flops(self._nodes.get(name, [])),
        )
