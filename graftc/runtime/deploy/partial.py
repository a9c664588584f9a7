"""Folding what folds where something does not: a base with folded weights, and the rest compiled on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import nn

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.certificate import Certificate, require_changed
from graftc.compiler.folding.certify import Advance
from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values
from graftc.compiler.folding.requantise import BaseForm
from graftc.compiler.folding.route_evidence import worse
from graftc.compiler.folding.steps import recasting
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.artifact.manifest import Manifest
from graftc.runtime.artifact.write import save
from graftc.runtime.deploy.certifying import FoldRequest
from graftc.runtime.deploy.comparing import compared
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.deploy.merged import Merged, fold, require_decided, require_passed
from graftc.runtime.deploy.merged_folder import write_merged
from graftc.runtime.deploy.merged_model import base_of
from graftc.runtime.deploy.rounding_noise import rounding_noise
from graftc.runtime.deploy.widening import unquantised, widened
from graftc.runtime.export.exporting import ExportingFolded
from graftc.runtime.export.writing import FoldEvidence
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
"""The class of a compiled model."""


@dataclass(frozen=True)
class Partial(Generic[M, C]):
    """What folding some adaptations gives; saved, an artifact that holds its own base.

    Attributes:
        merged: the model with what folds in its weights, and the rest in its graph.
        compiled: the rest, compiled on a base that has the folded weights.
        certificate: of the fold; its outputs are those of `compiled` too.
    """

    merged: Merged[M]
    compiled: C
    certificate: Certificate

    @property
    def folded(self) -> tuple[str, ...]:
        """Whose adaptations have gone into the base's weights."""
        return self.merged.folded

    @property
    def kept(self) -> Mapping[str, str]:
        """The adaptations left unfolded, with the reason."""
        return self.merged.kept

    def save(self, path: Path, *, force: bool = False) -> Manifest:
        """Write the artifact.

        Raises:
            GraftError: as `Compiled.save`; GC166 where the base is packed.
        """
        return save(
            runner_of(self.compiled), path, force=force, bundle=lambda folder: write_merged(self.merged, folder)
        )

    def export(
        self,
        path: str | Path,
        format: Literal["onnx", "onnx-generate", "pt2"] = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: str | Sequence[str] = (),
        force: bool = False,
    ) -> Path:
        """Export what `compiled` is, with the certificate in the metadata.

        Args, Raises: as `Compiled.export`.
        """
        name: str = format
        if name in ("peft", "gguf"):
            hint = "save it, which has its own base inside, and export `compiled` of it, whose base that is"
            raise GraftError("GC060", f"what a partial merge leaves cannot be {name!r}", hint=hint)
        return self.exporting.export(path, format, example_inputs, inputs=inputs, force=force)

    @property
    def exporting(self) -> ExportingFolded:
        """What exports `compiled`, with the certificate."""
        return ExportingFolded(runner_of(self.compiled), FoldEvidence(self.certificate, self.folded))


def merge_partially(
    compiled: ModelRoot | AdaptedRunner,
    budget: float | None = None,
    *,
    only: Sequence[str] | None = None,
    base: BaseForm | None = None,
    allow_unchanged: bool = False,
) -> Partial[Any, Any]:
    """Fold what folds, and compile what does not on the result, collapsed where it has a simpler form. See
    `Compiled.merge_partially`."""
    runner: AdaptedRunner = runner_of(compiled)
    require_decided(runner, base)
    request = FoldRequest(as_budget(budget), base)
    merged = _folded(runner, request, only=only, allow_unchanged=allow_unchanged)
    return _partial(runner, merged)


def _folded(
    runner: AdaptedRunner, request: FoldRequest, *, only: Sequence[str] | None = None, allow_unchanged: bool
) -> Merged:
    merged = fold(runner, request, only=only)
    _require_any(merged)
    require_passed(merged.certificate)
    require_changed(merged.certificate, allow_unchanged)
    return merged


def _require_any(merged: Merged) -> None:
    """Refuse where nothing folds and nothing has a simpler form.

    Raises:
        GraftError: GC050 with what stays, and why.
    """
    if merged.certificate.sites or merged.certificate.collapses:
        return
    reasons = tuple(f"{name}: {reason}" for name, reason in merged.kept.items())
    message = f"nothing folds: {reasons[0]}" if reasons else "nothing folds: the spec adapts no tensor of the base"
    hint = "save or export the compiled model instead; what it has is in no weight"
    raise GraftError("GC050", message, hint=hint, details=reasons)


def _partial(runner: AdaptedRunner, merged: Merged) -> Partial[Any, Any]:
    compilation = runner.compilation
    spec = _rest(compilation, merged)
    values = {n: t for n, t in adapter_values(compilation.store) if owner_of(n) in merged.kept}
    values |= collapsed_values(compilation)
    made = runner.sibling(spec, values, base_of(merged))
    certificate = _with_outputs(merged._graftc, runner, made._graftc)
    require_passed(certificate)
    return Partial(merged, made, certificate)


def merge_what_folds(
    compiled: ModelRoot | AdaptedRunner,
    budget: float | None = None,
    advance: Advance = lambda _: None,
    *,
    dtype: torch.dtype | None = None,
    base: BaseForm | None = None,
    allow_unchanged: bool = False,
) -> Merged | Partial[Any, Any]:
    """A merged model where everything folds, and otherwise what `merge_partially` gives.

    Args:
        compiled: what to merge.
        budget: as for `Compiled.merge`.
        advance: is told how much of the folding is done, from 0 to 1.
        dtype, base, allow_unchanged: as for `Compiled.merge`.

    Raises:
        GraftError: as `merge_partially`; GC073 for a dtype that is not wider.
    """
    runner: AdaptedRunner = runner_of(compiled)
    require_decided(runner, base)
    wide = widened(runner, dtype, base)
    request = FoldRequest(as_budget(budget), base, advance, runner)
    merged = _folded(wide, request, allow_unchanged=allow_unchanged)
    return _partial(wide, merged) if merged.kept else merged


def _rest(compilation: Compilation, merged: Merged) -> Spec:
    """The spec without what has folded, and the rest in its simplest form. In the base that it is for, what the spec
    unties is untied already, and what it quantises is so or is in full precision."""
    changes: dict[str, Any] = {"untie": ()}
    changes["compose"] = tuple(found for c in compilation.spec.compose if (found := _left(c, merged)) is not None)
    if TRAIN not in merged.kept:
        changes["train"] = ()
    if TOKENS not in merged.kept:
        changes["tokens"] = None
    return unquantised(collapsed_spec(compilation, merged.kept)).model_copy(update=changes)


def _left(composition: CompositionSpec, merged: Merged) -> CompositionSpec | None:
    """What is left of a composition: of a stack those that did not fold, in its order; of others all or nothing."""
    members = tuple(name for name in composition.members if name in merged.kept)
    if isinstance(composition, Stack) and len(members) > 1:
        return composition.model_copy(update={composition.kind: members})
    return composition if members == composition.members else None


@torch.no_grad()
def _with_outputs(merged: FoldedRunner, before: AdaptedRunner, after: AdaptedRunner) -> Certificate:
    """The certificate with the largest difference of either: of folding, and of compiling anew on the result."""
    certificate = merged.certificate
    found = compared(before, after)
    found.allowed.update((route.choice, route.bound) for route in certificate.routes)
    if merged.changed and not found.explained:
        weights = {name: after.compilation.store.get(name) for name in merged.changed}
        with found.repeating() as run:
            recast = recasting(before.compilation, merged.folded)
            rounding_noise(weights, recast, run, found.after, lambda _: found.explained)
    outputs = dict(certificate.outputs)
    for name, anew in found.differences.items():
        outputs[name] = anew if not anew <= outputs[name] else outputs[name]  # NaN stays
    folding = {route.choice: route for route in certificate.routes}
    routes = (worse(route, folding[route.choice]) for route in found.routes)
    return replace(certificate, outputs=outputs, routes=tuple(routes))
