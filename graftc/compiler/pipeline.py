"""The pipeline: one explicit list of steps from a model and a spec to verified Programs over one Store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from graftc.compiler import cache
from graftc.compiler.capture import Capture, capture
from graftc.compiler.resolve import Resolved, SiteTable, site_keys
from graftc.compiler.signature import Axis, axes_of, default_axes, signature_of
from graftc.compiler.structure import Structure, find_structure
from graftc.passes.core.builder import Builder
from graftc.passes.core.folds import FoldStep, Keep, LazyTensors
from graftc.passes.core.program import HistoryEntry, Program
from graftc.passes.core.registry import method_for
from graftc.passes.core.rows import Rows
from graftc.passes.core.sites import LinearSite, ParameterSite, Site, SiteKey
from graftc.passes.core.store import Store
from graftc.passes.core.verify import record_baseline, verify
from graftc.passes.mode import to_eval
from graftc.specs.diagnostics import GraftError, Place
from graftc.specs.document import Spec

TRAIN = "trained"
"""Name under which the spec's ``train:`` list owns its overlays."""


@dataclass
class Family:
    """The Programs of one signature: the base and the adapted model, in train and eval mode."""

    base: Program
    base_eval: Program
    train: Program
    eval: Program
    structure: Structure
    resolved: list[Resolved]
    trained: list[ParameterSite]
    capture_seconds: float
    cached: bool

    def rewrite_seconds(self) -> float:
        """What everything after capture took."""
        return sum(entry.seconds for entry in self.train.history)


@dataclass
class Compilation:
    """All Programs of one spec and model over one Store.

    Attributes:
        spec: what was asked for.
        model: the source model; read when a new signature has to be captured, never changed.
        store: every tensor.
        seed: what initial values were drawn from.
        families: Programs by signature.
        parts: adaptation, then site, to Store names by part.
        overlays: base tensors that are trained in place: adaptation, site, base name, rows, trained name.
        notes: what capturing had to change, for people.
    """

    spec: Spec
    model: nn.Module
    store: Store
    seed: int = 0
    families: dict[tuple[str, ...], Family] = field(default_factory=dict)
    parts: dict[str, dict[SiteKey | None, dict[str, str]]] = field(default_factory=dict)
    overlays: list[tuple[str, SiteKey, str, Rows, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    default: tuple[str, ...] = ()
    use_cache: bool = True

    @property
    def main(self) -> Family:
        """The Programs of the signature that was compiled first."""
        return self.families[self.default]

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """The Programs for a call's inputs, captured when they are first seen.

        Raises:
            GraftError: GC031 for inputs that the model does not take, or a signature that resolves to other sites.
        """
        present = {name: value for name, value in inputs.items() if value is not None}
        signature = signature_of(present)
        if signature in self.families:
            return self.families[signature]
        known = [Axis(s.name, s.dtype, s.shape) for s in self.main.base.inputs]
        return self.add(axes_of(self.model, present, known))

    def add(self, axes: Sequence[Axis]) -> Family:
        """Capture one more signature and adapt it like the others."""
        family = _compile(self, axes)
        if self.families and site_keys(family.resolved) != site_keys(self.main.resolved):
            names = ", ".join(axis.name for axis in axes)
            raise GraftError(
                "GC031",
                f"with the inputs {names} the spec resolves to other sites than before",
                hint="name modules instead of roles, or compile with these inputs from the start",
            )
        signature = signature_of({spec.name: spec for spec in family.base.inputs})
        self.families[signature] = family
        self.default = self.default or signature
        return family

    def fold_steps(self, only: Sequence[str] | None = None) -> list[FoldStep]:
        """Every adaptation's change of base tensors, in insertion order.

        Raises:
            GraftError: GC050 naming the adaptation that cannot fold and why.
        """
        steps: list[FoldStep] = []
        resolved = {r.name: r for r in self.main.resolved}
        for name in only if only is not None else [TRAIN, *resolved]:
            if name in resolved:
                steps += self._site_steps(resolved[name])
            steps += self._overlay_steps(name)
        return steps

    def _site_steps(self, resolved: Resolved) -> list[FoldStep]:
        method = method_for(resolved.spec.method)
        steps: list[FoldStep] = []
        for site, spec in resolved.sites:
            parts = self.parts[resolved.name].get(site.key, {})
            tensors = {part: self.store.get(name).detach().double() for part, name in parts.items()}
            fold = method.fold(spec, site, tensors)
            if isinstance(fold, Keep):
                raise GraftError("GC050", f"{resolved.name!r} cannot fold at {site.key}: {fold.reason}")
            assert isinstance(site, LinearSite)
            steps.append(
                FoldStep(
                    resolved.name,
                    str(site.key),
                    site.use.weight,
                    site.use.bias or f"{site.key.module}.bias",
                    site.rows,
                    site.use.transposed,
                    fold.apply,
                )
            )
        return steps

    def _overlay_steps(self, name: str) -> list[FoldStep]:
        return [
            FoldStep(name, str(key), base, None, rows, False, _replace(self.store, trained))
            for owner, key, base, rows, trained in self.overlays
            if owner == name
        ]

    def lazy_tensors(self) -> LazyTensors:
        """The folded tensors: every base tensor that an adaptation changes, computed when asked for."""
        return LazyTensors(self.store, self.fold_steps())


def _replace(store: Store, trained: str) -> Callable[..., Any]:
    return lambda weight, bias: (store.get(trained).detach().double(), bias)


def compile_model(
    spec: Spec, model: nn.Module, axes: Sequence[Axis] | None = None, *, seed: int = 0, use_cache: bool = True
) -> Compilation:
    """Compile a spec against a model. The model is never changed.

    Args:
        spec: what to adapt.
        model: any module that torch.export captures.
        axes: its inputs; the model's usual ones by default.
        seed: initial values are drawn from it.
        use_cache: look up and keep the captured graph in the user's cache folder.

    Raises:
        GraftError: with a code for whatever is wrong with the spec, the model or their fit.
    """
    compilation = Compilation(spec, model, Store.mirror(model), seed, use_cache=use_cache)
    compilation.add(list(axes) if axes is not None else default_axes(model))
    return compilation


def captured(model: nn.Module, axes: Sequence[Axis], store: Store, use_cache: bool = True) -> Capture:
    """A capture from the cache, or a new one that goes there."""
    entry = cache.lookup(model, axes) if use_cache else None
    if entry is not None:
        return entry
    found = capture(model, axes, canonical=store.aliases)
    if use_cache:
        cache.keep(model, axes, found)
    return found


class _Clock:
    """Times the steps of one Program's compilation and writes its history."""

    def __init__(self) -> None:
        self.entries: list[HistoryEntry] = []

    def step(self, name: str, run: Callable[[], Any], program: Program) -> Any:
        before = {node.name for node in program.graph.nodes}
        started = time.perf_counter()
        result = run()
        after_program = result if isinstance(result, Program) else program
        seconds = time.perf_counter() - started
        after = {node.name for node in after_program.graph.nodes}
        self.entries.append(HistoryEntry(name, len(after - before), len(before - after), seconds))
        return result


def _compile(compilation: Compilation, axes: Sequence[Axis]) -> Family:
    spec, store, model = compilation.spec, compilation.store, compilation.model
    found = captured(model, axes, store, compilation.use_cache)
    compilation.notes += [note for note in found.notes if note not in compilation.notes]
    for name, value in found.constants.items():
        if name not in store:
            store.add_buffer(name, value, persistent=False)
    base = found.program
    clock = _Clock()
    clock.entries += base.history
    record_baseline(base)
    clock.step("verify", lambda: verify(base, store, "canonicalise"), base)
    adapted = clock.step("copy", base.copy, base)
    structure = clock.step("roles", lambda: find_structure(adapted.graph, found.constants), adapted)
    table = SiteTable(adapted, store, structure, dict(model.named_modules(remove_duplicate=False)))
    resolved = clock.step("resolve", lambda: table.resolve(spec), adapted)
    trained = clock.step("resolve train", lambda: table.trained(spec), adapted)
    _insert(compilation, adapted, trained, resolved, clock)
    eval_base = record_baseline(to_eval(base))
    adapted_eval = clock.step("mode(eval)", lambda: to_eval(adapted), adapted)
    adapted_eval.baseline = eval_base.baseline
    clock.step("verify", lambda: verify(adapted_eval, store, "mode(eval)", types=True), adapted_eval)
    adapted.history = list(clock.entries)
    adapted_eval.history = list(clock.entries)
    return Family(base, eval_base, adapted, adapted_eval, structure, resolved, trained, found.seconds, found.cached)


def _insert(
    compilation: Compilation,
    program: Program,
    trained: Sequence[ParameterSite],
    resolved: Sequence[Resolved],
    clock: _Clock,
) -> None:
    store = compilation.store
    if trained:
        build = Builder(program, store, TRAIN, TRAIN, compilation.seed)
        clock.step("insert(train)", lambda: _overlay(build, trained), program)
        _collect(compilation, build)
        clock.step("verify", lambda: verify(program, store, "insert(train)"), program)
    for index, item in enumerate(resolved):
        build = Builder(program, store, item.name, item.spec.method, compilation.seed)
        try:
            clock.step(f"insert({item.name})", partial(_adapt, build, item), program)
        except GraftError as error:
            raise _placed(compilation.spec, index, error) from error
        _collect(compilation, build)
        clock.step("verify", partial(verify, program, store, f"insert({item.name})"), program)


def _placed(spec: Spec, index: int, error: GraftError) -> GraftError:
    """A method's error with its place in the spec; methods name a field of theirs."""
    path = f"adapt[{index}]" + (f".{error.place.path}" if error.place is not None else "")
    place = Place(path=path)
    return spec.locate(GraftError(error.code, error.message, place=place, hint=error.hint, details=error.details))


def _overlay(build: Builder, sites: Sequence[ParameterSite]) -> None:
    for site in sites:
        with build.on(site):
            build.overlay(site.tensor)


def _adapt(build: Builder, item: Resolved) -> None:
    method = method_for(item.spec.method)
    sites: list[Site] = [site for site, _ in item.sites]
    shared = method.prepare(item.spec, sites, build)
    for site, spec in item.sites:
        with build.on(site):
            method.insert(spec, site, shared, build)


def _collect(compilation: Compilation, build: Builder) -> None:
    compilation.parts.setdefault(build.adaptation, {}).update(build.parts)
    known = {(owner, key, base) for owner, key, base, _, _ in compilation.overlays}
    for key, base, rows, name in build.overlays:
        if (build.adaptation, key, base) not in known:
            compilation.overlays.append((build.adaptation, key, base, rows, name))
