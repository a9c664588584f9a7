"""Convert adaptations to LoRA, and measure the resulting error at every site and in the model's outputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.isolation import isolated
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.folding.fold_plan import FoldPlan, fold_plan
from graftc.compiler.folding.samples import samples
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.sitetable import SiteTable, site_of
from graftc.compiler.roles.findings import Structure
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import LinearSite, SiteKey
from graftc.passes.core.weights.folds import FoldGroup, LazyTensors, WeightFold
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.weight_slice import Layout
from graftc.records.conversion import ConvertedSite
from graftc.runtime.artifact.write import save
from graftc.runtime.deploy.low_rank import Decomposition, Factors, distance, lora_of, stored_dtype, target_of, values_of
from graftc.runtime.deploy.merging import Merging
from graftc.runtime.deploy.partial import Partial
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.evaluation import Evaluation
from graftc.runtime.model.runner import runner_of
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.model.views import with_every_adaptation
from graftc.specs.base import MethodSpec
from graftc.specs.compose import Stack
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, unknown_name
from graftc.specs.methods.lora import LoRA

_PROBES = 16
_SLACK = 1e-6
"""The amount by which a probe's error may exceed the bound derived from the measured error, relative to the update."""


@dataclass(frozen=True)
class Converted:
    """A model whose adaptations were converted to LoRA.

    Attributes:
        compiled: the model with the new adaptations, under the old ones' names.
        sites: the result at every site.
        outputs: by output, the largest absolute difference between the two models on random inputs, in eval mode.
        largest_output: the largest absolute value in these outputs.
        partial: the partial merge that first created a new base; None if there was none.
    """

    compiled: Any
    sites: tuple[ConvertedSite, ...]
    outputs: Mapping[str, float]
    largest_output: float
    partial: Partial[Any, Any] | None = None

    @property
    def largest_error(self) -> float:
        """The error at the worst site; 0 if there are no sites."""
        return max((site.error for site in self.sites), default=0.0)

    @property
    def largest_difference(self) -> float:
        """The difference in the worst output; NaN if any difference is NaN."""
        differences = list(self.outputs.values())
        return math.nan if any(math.isnan(value) for value in differences) else max(differences, default=0.0)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write an artifact, including its base if anything was folded into it.

        Raises:
            GraftError: as in `Compiled.save`.
        """
        if self.partial is None:
            destination: Path = self.compiled.save(path, force=force)
            return destination
        save(runner_of(self.compiled), Path(path), force=force, bundle=self.partial.write_base)
        return Path(path)


class Converting:
    """The operation that converts other adaptations to LoRA.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    @isolated()
    @in_every_process
    @torch.no_grad()
    @with_every_adaptation
    def convert(
        self,
        names: Sequence[str] | None = None,
        *,
        rank: int | None = None,
        error: float | None = None,
        into_base: Sequence[str] = (),
    ) -> Converted:
        """Convert adaptations that change only linear maps to LoRA, by singular values; this model stays unchanged.

        An adaptation keeps its name, its sites and its position among the others, so that everything computed on top of
        it stays the same. Ranks may differ from site to site (`overrides`); scalings are 1.

        Args:
            names: names of the adaptations; all by default.
            rank: the rank at every site, or the largest allowed rank if ``error`` is given as well. The default is the
                rank of each site's update, which is exact up to rounding.
            error: a bound on the error at each site, in the Frobenius norm relative to the update's; each site gets the
                smallest rank that meets it.
            into_base: names to fold first into a new base, which is saved with the artifact: adaptations, or
                ``trained`` for the ``train:`` list.

        Raises:
            GraftError: GC002 for a rank or error out of bounds, GC066 for an adaptation that changes anything but
                linear maps, GC067 if the error bound cannot be met, GC091 for unknown names, GC168 for an adaptation
                that chose codes of the base, GC050 and GC022 for an adaptation that does not fold.
        """
        if (rank is not None and rank < 1) or (error is not None and not 0 < error < 1):
            raise GraftError("GC002", "conversion requires a rank of at least 1 and an error in (0, 1)")
        if into_base:
            partial = Merging(self.runner).merge_partially(only=into_base)
            converted = Converting(runner_of(partial.compiled)).convert(names, rank=rank, error=error)
            outputs, largest = output_differences(self.runner, runner_of(converted.compiled))
            return Converted(converted.compiled, converted.sites, outputs, largest, partial)
        compilation = self.runner.compilation
        chosen = _chosen(compilation, names)
        conversion = _Conversion(compilation, fold_plan(compilation), chosen, rank, error)
        conversion.run()
        result = self._with_loras(conversion)
        sites = conversion.checked(result)
        if error is not None:
            _require_within(sites, error)
        outputs, largest = output_differences(self.runner, runner_of(result))
        return Converted(result, sites, outputs, largest)

    def _with_loras(self, conversion: _Conversion) -> Any:
        """Return the model with the new adaptations.

        Targets stay as written if LoRAs with these targets have the same sites; otherwise they name modules.
        """
        kept = {n: t for n, t in adapter_values(self.runner.compilation.store) if owner_of(n) not in conversion.sites}
        for written in (True, False):
            values = dict(kept)
            loras = {}
            for name, sites in conversion.sites.items():
                target = conversion.spec_of(name).target if written else target_of(sites)
                loras[name] = lora_of(name, target, conversion.factors[name], sites)
                values |= values_of(name, conversion.factors[name], sites)
            try:
                result = self.runner.sibling(_spec(self.runner.compilation.spec, loras, conversion.below), values)
            except GraftError:
                if written:
                    continue
                raise
            other = _elsewhere(runner_of(result).compilation, conversion.sites)
            if other is None:
                result.train(self.runner.training)
                return result
        raise GraftError("GC066", f"no target of a LoRA selects exactly the sites of {other!r}")


class _Conversion:
    """The updates of adaptations, one group of tensors at a time, and the factors computed from them."""

    def __init__(
        self, compilation: Compilation, plan: FoldPlan, names: Sequence[str], rank: int | None, error: float | None
    ) -> None:
        self.compilation, self.plan, self.rank, self.error = compilation, plan, rank, error
        self._resolved = {r.name: r for r in compilation.main.resolved}
        for name in names:
            if name in plan.kept:
                raise plan.kept[name]
        self.sites = {name: self._linear(name) for name in names}
        self.factors: dict[str, dict[SiteKey, Factors]] = {name: {} for name in names}
        self.below: list[str] = []
        self._converted: list[ConvertedSite] = []
        self._probes: dict[tuple[str, SiteKey], tuple[Tensor, Tensor]] = {}

    def spec_of(self, name: str) -> MethodSpec:
        """Return the adaptation's spec as written."""
        return self._resolved[name].spec

    def run(self) -> None:
        """Compute the factors.

        Raises:
            GraftError: GC066.
        """
        for group, updates in _updates(self.plan.lazy, self.sites):
            plain = {step.adaptation for step in group.steps if step.weight.layout is Layout.PLAIN}
            self.below += [name for name in updates if name in plain and name not in self.below]
            for name, changed in updates.items():
                self._take(name, changed)
        for name, sites in self.sites.items():
            missing = [site for site in sites if site.key not in self.factors[name]]
            if missing or not sites:
                what = f"changes nothing at {missing[0].key}" if missing else "adapts no linear map"
                raise _no_lora(name, what)

    def _linear(self, name: str) -> list[LinearSite]:
        """Return an adaptation's linear sites, and the other readers of the tied tensors that it replaces rows of."""
        sites = [site for site, _ in self._resolved[name].places if isinstance(site, LinearSite)]
        tied = {site.own.tensor for site in sites if self.compilation.store.tied(site.own.tensor)}
        known = {site.key for site in sites}
        others = (site for tensor in tied for site in readers(self.compilation, tensor))
        return [*sites, *(site for site in others if site.key not in known)]

    def _take(self, name: str, changed: dict[str, Tensor]) -> None:
        """Compute factors for the sites that read the changed tensors; nothing else may have changed."""
        specs = dict((site.key, spec) for site, spec in self._resolved[name].places)
        reading = [s for s in self.sites[name] if s.own.tensor in changed and s.key not in self.factors[name]]
        for site in reading:
            wanted = site.own.operand(changed[site.own.tensor])
            self._factorise(name, site, wanted, specs.get(site.key, self.spec_of(name)))
        for own in (site.own for site in reading):
            change = changed[own.tensor]
            nothing = torch.zeros_like(own.operand(change))
            changed[own.tensor] = own.put_operand(None if own.whole else change, nothing)
        for tensor, rest in changed.items():
            if bool(rest.any()):
                raise _no_lora(name, f"changes {tensor}, which is not the weight of a linear map that it adapts")

    def _factorise(self, name: str, site: LinearSite, wanted: Tensor, spec: MethodSpec) -> None:
        limit = min(wanted.shape[-2:])
        at_most = int(getattr(spec, "rank", limit)) * (2 if "init" in type(spec).model_fields else 1)
        decomposition = Decomposition(wanted, at_most if isinstance(spec, LoRA) else None)
        full = decomposition.rank()
        rank = full if self.error is None else decomposition.rank(self.error)
        if self.rank is not None:
            rank = min(self.rank, limit) if self.error is None else min(self.rank, rank)
        factors = decomposition.factors(min(rank, full))
        stored = factors.rounded(stored_dtype(site))
        exact = Factors(stored.down.double(), stored.up.double())
        self.factors[name][site.key] = factors.padded(rank)
        generator = torch.Generator().manual_seed(len(self._converted))
        probe = torch.randn(wanted.shape[-1], _PROBES, generator=generator, dtype=torch.float64).to(wanted.device)
        self._probes[name, site.key] = probe, wanted @ probe
        self._converted.append(
            ConvertedSite(name, str(site.key), rank, full, distance(exact.update, wanted), float("nan"))
        )

    def checked(self, result: Any) -> tuple[ConvertedSite, ...]:
        """Return the sites, each with an estimate of the compiled LoRA's error, measured through its own fold.

        Raises:
            GraftError: GC067 if the estimate exceeds the error measured before by more than its uncertainty.
        """
        compilation = runner_of(result).compilation
        errors: dict[tuple[str, str], float] = {}
        for resolved in compilation.main.resolved:
            for site, spec in resolved.places if resolved.name in self.sites else ():
                assert isinstance(site, LinearSite)
                names = compilation.parts[resolved.name][site.key]
                tensors = {part: compilation.store.full(name).double() for part, name in names.items()}
                fold = fold_at(method_for(spec.method), spec, site, tensors)
                assert isinstance(fold, WeightFold)
                probe, wanted = self._probes[resolved.name, site.key]
                nothing = torch.zeros(*site.leading, site.out_features, site.in_features, dtype=wanted.dtype)
                response = fold.apply(nothing.to(wanted.device), None)[0] @ probe
                errors[resolved.name, str(site.key)] = distance(response, wanted)
        checked = []
        for item in self._converted:
            probed = errors.get((str(item.adaptation), item.site), 1.0)
            # An error estimated from 16 vectors is off by more than a factor of 3 only once in a million cases.
            if not probed <= 3 * item.error + _SLACK:
                message = f"the update of the LoRA {item.adaptation!r} differs by {probed:.1e} at {item.site}"
                raise GraftError("GC067", message, hint="report it with the spec and the model's class")
            checked.append(ConvertedSite(*(item.adaptation, item.site, item.rank, item.full_rank, item.error, probed)))
        return tuple(checked)


def readers(compilation: Compilation, tensor: str) -> list[LinearSite]:
    """Return the sites of the base graph that read a tensor, under all of its names."""
    modules = dict(compilation.source.named_modules(remove_duplicate=False))
    table = SiteTable(compilation.program("train", "base"), compilation.store, Structure(()), modules)
    return [
        site_of(use, SiteKey(*owner, use=index), use.weight)
        for owner, uses in table.uses.items()
        for index, use in enumerate(uses)
        if use.weight.tensor == tensor
    ]


def _updates(lazy: LazyTensors, names: Collection[str]) -> Iterator[tuple[FoldGroup, dict[str, dict[str, Tensor]]]]:
    """Yield, for each group of tensors, what the named adaptations add to each tensor, on top of those before them."""
    for group in lazy.groups():
        if not any(step.adaptation in names for step in group.steps):
            continue
        values = lazy.widened(lazy.base(group))
        changes: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, steps in groupby(group.steps, key=lambda step: step.adaptation):
            before = {n: t.clone() for n, t in values.items()} if name in names else {}
            lazy.apply(steps, values)
            for tensor, after in values.items() if name in names else ():
                change = after - before[tensor] if tensor in before else after.clone()
                previous = changes[name].get(tensor)
                changes[name][tensor] = change if previous is None else previous + change
        yield group, changes


def _chosen(compilation: Compilation, names: Sequence[str] | None) -> list[str]:
    """Return the names of the adaptations to convert, in the spec's order.

    Raises:
        GraftError: GC073 for names that are not a list, GC091 for an unknown name; GC066 if there is no adaptation, or
            for members of compositions other than stacks.
    """
    known = [r.name for r in compilation.main.resolved]
    if isinstance(names, str) or not isinstance(names, Sequence | None):
        raise GraftError("GC073", f"names must be a list of strings, got {kind_of(names)}", hint="pass a list of names")
    for name in names or ():
        if name not in known:
            raise unknown_name("adaptation", name, known)
    chosen = [name for name in known if names is None or name in names]
    for name in chosen:
        if codes := compilation.tensor_edits.requantised(name):
            message = f"the codes of {min(codes)} follow from the tensors of {name!r}, which converting would drop"
            hint = 'merge it with base="full" (--base full), or set loftq_iterations: 1'
            raise GraftError("GC168", message, hint=hint)
    if not chosen:
        raise GraftError("GC066", "the spec has no adaptation to convert", hint="fold the train: list into a base")
    for composition in compilation.spec.compose:
        inside = [name for name in composition.members if name in chosen]
        if inside and not isinstance(composition, Stack):
            message = f"{inside[0]!r} is part of the composition {composition.name!r}"
            hint = "compiled.combine turns a bank into one LoRA, and compiled.fix keeps one of its members"
            raise GraftError("GC066", message, hint=hint)
    return chosen


def _no_lora(name: str, what: str) -> GraftError:
    hint = f"fold it into a base that is saved with the artifact (into_base, --into-base {name}), or merge the model"
    return GraftError("GC066", f"{name!r} {what}", hint=hint)


def _spec(spec: Spec, loras: Mapping[str, LoRA], below: Iterable[str]) -> Spec:
    """Return the spec with each LoRA in place of the adaptation that has its name.

    Adaptations that changed weights before all site adaptations still apply first, so they precede the others.
    """
    first = [loras[name] for name in below]
    rest = [loras.get(str(a.name), a) for a in spec.adapt if a.name not in {lora.name for lora in first}]
    return spec.model_copy(update={"adapt": (*first, *rest)})


def _elsewhere(compilation: Compilation, sites: Mapping[str, Sequence[LinearSite]]) -> str | None:
    """Return the name of an adaptation whose sites are not the wanted ones; None if there is none."""
    site_keys = {r.name: {site.key for site, _ in r.places} for r in compilation.main.resolved}
    return next((name for name, wanted in sites.items() if site_keys[name] != {site.key for site in wanted}), None)


def _require_within(sites: Sequence[ConvertedSite], error: float) -> None:
    """Raise unless every site is within the error bound.

    Raises:
        GraftError: GC067, which lists every site that is not, starting with the worst.
    """
    over = sorted((site for site in sites if site.error > error), key=lambda site: -site.error)
    if over:
        lines = tuple(f"{s.adaptation} at {s.site}: {s.error:.2e} at rank {s.rank} of {s.full_rank}" for s in over)
        message = f"the error bound {error:g} is not met at {len(over)} of {len(sites)} sites: {lines[0]}"
        hint = "raise the rank, allow a larger error, or load the base in float32: factors are rounded to its dtype"
        raise GraftError("GC067", message, hint=hint, details=lines)


def output_differences(before: AdaptedRunner, after: AdaptedRunner) -> tuple[dict[str, float], float]:
    """Return the differences in two models' outputs on random inputs, and the first one's largest absolute value."""
    compilation = before.compilation
    program = compilation.program("train", "base")
    inputs = samples(compilation)
    differences: dict[str, float] = {}
    largest = 0.0
    both = (Evaluation(runner, inputs).outputs() for runner in (before, after))
    for name, a, b in zip(program.outputs.names, *both, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
            differences[name] = largest_difference(a, b)
            largest = max(largest, largest_number(a))
    return differences, largest
