"""Merge partially: create a base with the folded weights, and compile on it the adaptations that do not fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.certificate import require_changed
from graftc.compiler.folding.certify import Advance
from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values
from graftc.compiler.folding.requantise import BaseForm
from graftc.compiler.folding.route_evidence import worse
from graftc.compiler.folding.steps import recasting
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.weights.names import owner_of
from graftc.records.certificate import Certificate
from graftc.runtime.artifact.manifest import Manifest
from graftc.runtime.artifact.write import save
from graftc.runtime.deploy.certifying import FoldRequest
from graftc.runtime.deploy.comparing import compared
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.deploy.merged import Merged, fold, require_decided, require_passed
from graftc.runtime.deploy.merged_folder import write_recorded
from graftc.runtime.deploy.merged_source import base_of
from graftc.runtime.deploy.rounding_noise import rounding_noise
from graftc.runtime.deploy.widening import unquantised, widened
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.export.metadata import FoldEvidence
from graftc.runtime.export.registry import exporter_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import M, ModelRoot, runner_of
from graftc.specs.compose import CompositionSpec, Stack
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_budget
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultingTypeVar

    C = DefaultingTypeVar("C", bound=nn.Module, default=Any, covariant=True)
else:
    C = TypeVar("C", bound=nn.Module, covariant=True)
"""The type of a compiled model."""


@dataclass(frozen=True)
class Partial(Generic[M, C]):
    """The result of folding some adaptations; it is saved as an artifact that contains its own base.

    Attributes:
        merged: the model with the folded weights, and the other adaptations in its graph.
        compiled: the other adaptations, compiled on a base that has the folded weights.
        certificate: the fold's certificate, whose output differences also cover `compiled`.
    """

    merged: Merged[M]
    compiled: C
    certificate: Certificate

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the adaptations that were folded into the base's weights."""
        return self.merged.folded

    @property
    def kept(self) -> Mapping[str, str]:
        """The adaptations left unfolded, each with the reason."""
        return self.merged.kept

    def save(self, path: Path, *, force: bool = False) -> Manifest:
        """Write the artifact, with the certificate in the folder of its base.

        Raises:
            GraftError: as in `Compiled.save`; GC166 if the base is packed.
        """
        return save(runner_of(self.compiled), path, force=force, bundle=self.write_base)

    def write_base(self, folder: Path) -> None:
        """Write the base that has the folded weights, with the certificate. Raises: as in `write_recorded`."""
        write_recorded(self.merged, self.certificate, folder)

    def export(
        self,
        path: str | Path,
        format: str = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: str | Sequence[str] = (),
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Export `compiled`, with the certificate in the metadata.

        Args, Raises: as in `Compiled.export`.
        """
        if exporter_of(format).content != "model":
            hint = "save it, which includes its own base, then export its `compiled` model, which is for that base"
            raise GraftError("GC060", f"a partial merge cannot be exported as {format!r}", hint=hint)
        return self.exporting.export(path, format, example_inputs, inputs=inputs, force=force, **options)

    @property
    def exporting(self) -> Exporting:
        """The export operation of `compiled`, with the certificate."""
        return Exporting(runner_of(self.compiled), FoldEvidence(self.certificate, self.folded))


def merge_partially(
    compiled: ModelRoot | AdaptedRunner,
    budget: float | None = None,
    *,
    only: Sequence[str] | None = None,
    base: BaseForm | None = None,
    allow_unchanged: bool = False,
) -> Partial[Any, Any]:
    """Fold what can be folded, and compile the rest, in its simplest form, on the result.

    See `Compiled.merge_partially`.
    """
    runner: AdaptedRunner = runner_of(compiled)
    require_decided(runner, base)
    if only is not None and (reason := lacking(runner.spec, only)) is not None:
        raise GraftError("GC050", f"nothing folds: the model {reason}", hint="name what it has")
    request = FoldRequest(as_budget(budget), base)
    merged = _folded(runner, request, only=only, allow_unchanged=allow_unchanged)
    return _partial(runner, merged, request)


def lacking(spec: Spec, only: Sequence[str]) -> str | None:
    """Return why nothing that is named can be folded, as a predicate of the model; None if something may be."""
    reasons = {} if spec.train else {TRAIN: "trains nothing in full"}
    reasons |= {} if spec.tokens else {TOKENS: "adds no tokens"}
    if not all(name in reasons for name in only):
        return None
    return " and ".join(reasons[name] for name in dict.fromkeys(only)) or "is given no names"


def _folded(
    runner: AdaptedRunner, request: FoldRequest, *, only: Sequence[str] | None = None, allow_unchanged: bool
) -> Merged:
    merged = fold(runner, request, only=only)
    _require_any(merged)
    require_passed(merged.certificate)
    require_changed(merged.certificate, allow_unchanged)
    return merged


def _require_any(merged: Merged) -> None:
    """Raise if no adaptation folds or has a simpler form.

    Raises:
        GraftError: GC050, which lists the adaptations that stay, with the reasons.
    """
    if merged.certificate.sites or merged.certificate.collapses:
        return
    reasons = tuple(f"{name}: {reason}" for name, reason in merged.kept.items())
    message = f"nothing folds: {reasons[0]}" if reasons else "nothing folds: the spec adapts no tensor of the base"
    hint = "save or export the compiled model instead: no adaptation is part of a weight"
    raise GraftError("GC050", message, hint=hint, details=reasons)


def _partial(runner: AdaptedRunner, merged: Merged, request: FoldRequest) -> Partial[Any, Any]:
    compilation = runner.compilation
    spec = _rest(compilation, merged)
    values = {n: t for n, t in adapter_values(compilation.store) if owner_of(n) in merged.kept}
    values |= collapsed_values(compilation)
    compiled = runner.sibling(spec, values, base_of(merged))
    certificate = _with_outputs(merged._graftc, runner, compiled._graftc, request)
    require_passed(certificate)
    return Partial(merged, compiled, certificate)


def merge_what_folds(
    compiled: ModelRoot | AdaptedRunner,
    budget: float | None = None,
    advance: Advance = lambda _: None,
    *,
    dtype: torch.dtype | None = None,
    base: BaseForm | None = None,
    allow_unchanged: bool = False,
) -> Merged | Partial[Any, Any]:
    """Return a merged model if everything folds, otherwise the result of `merge_partially`.

    Args:
        compiled: the model to merge.
        budget: the budget, as for `Compiled.merge`.
        advance: a callback that receives the completed fraction of the folding, from 0 to 1.
        dtype, base, allow_unchanged: as for `Compiled.merge`.

    Raises:
        GraftError: as in `merge_partially`; GC073 for a dtype that is not wider.
    """
    runner: AdaptedRunner = runner_of(compiled)
    require_decided(runner, base)
    wide = widened(runner, dtype, base)
    request = FoldRequest(as_budget(budget), base, advance, runner)
    merged = _folded(wide, request, allow_unchanged=allow_unchanged)
    return _partial(wide, merged, request) if merged.kept else merged


def _rest(compilation: Compilation, merged: Merged) -> Spec:
    """Return the spec without the folded adaptations, and with the rest in its simplest form.

    The spec is for a base in which the weights that the spec unties are already untied, the layers that it replicates
    already replicated, and the weights that it quantises already quantised or in full precision.
    """
    changes: dict[str, Any] = {"untie": (), "layer_replication": ()}
    changes["compose"] = tuple(rest for c in compilation.spec.compose if (rest := _left(c, merged)) is not None)
    if TRAIN not in merged.kept:
        changes["train"] = ()
    if TOKENS not in merged.kept:
        changes["tokens"] = None
    return unquantised(collapsed_spec(compilation, merged.kept)).model_copy(update=changes)


def _left(composition: CompositionSpec, merged: Merged) -> CompositionSpec | None:
    """Return what remains of a composition: a stack's unfolded members, in order; others remain whole or not at all."""
    members = tuple(name for name in composition.members if name in merged.kept)
    if isinstance(composition, Stack) and len(members) > 1:
        return composition.model_copy(update={composition.kind: members})
    return composition if members == composition.members else None


@torch.no_grad()
def _with_outputs(
    merged: FoldedRunner, before: AdaptedRunner, after: AdaptedRunner, request: FoldRequest
) -> Certificate:
    """Return the certificate with the larger of two differences for each output.

    One is the fold's; the other is that of the model whose remaining adaptations were compiled on the result.
    """
    certificate = merged.certificate
    comparison = compared(before, after)
    comparison.allowed.update((route.choice, route.bound) for route in certificate.routes)
    if merged.changed and not comparison.explained:
        weights = {name: after.compilation.store.get(name) for name in merged.changed}
        with comparison.repeating() as run:
            recast = recasting(before.compilation, merged.folded)
            rounding_noise(weights, recast, run, comparison.after, lambda _: comparison.explained)
    outputs, notes, differences = dict(certificate.outputs), certificate.notes, comparison.differences
    if request.chosen(before) is None:
        differences, more = comparison.within(certificate.budget)
        notes += more
    for name, difference in differences.items():
        outputs[name] = difference if not difference <= outputs[name] else outputs[name]  # NaN stays
    folding = {route.choice: route for route in certificate.routes}
    routes = (worse(route, folding[route.choice]) for route in comparison.routes)
    return replace(certificate, outputs=outputs, routes=tuple(routes), notes=notes)
