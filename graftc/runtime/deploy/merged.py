"""Merged: the model with its adaptations folded into base weights, and the certificate of the fold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, get_args

import torch

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.folding.certificate import Certificate, require_changed
from graftc.compiler.folding.certify import Advance, fold_tensors
from graftc.compiler.folding.fold_plan import FoldPlan, fold_plan
from graftc.compiler.folding.requantise import BaseForm, Repacked, requantised
from graftc.passes.graph.remove_folded import take_out
from graftc.runtime.deploy.certifying import FoldRequest, certify
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.deploy.merged_folder import save_merged
from graftc.runtime.deploy.widening import widened
from graftc.runtime.export.components import export_components
from graftc.runtime.export.exporting import Exporting, ExportingFolded
from graftc.runtime.export.labels import without_labels
from graftc.runtime.export.writing import FoldEvidence
from graftc.runtime.interop.transformers import to_transformers
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import GENERATING, Generating, loop_attribute
from graftc.runtime.model.runner import M, ModelRoot, Published, runner_of
from graftc.runtime.progress import working
from graftc.specs.errors.arguments import as_budget, as_path
from graftc.specs.errors.diagnostics import GraftError


class MergedRunner(FoldedRunner):
    """All that a `Merged` does."""

    def __getattr__(self, name: str) -> Any:
        """What generates, and what exports."""
        if name in GENERATING:
            return getattr(Generating(self), name)
        return self.exporting.export if name == "export" else loop_attribute(self, name)

    @property
    def exporting(self) -> ExportingFolded:
        """What exports the model, with its certificate."""
        return ExportingFolded(self, FoldEvidence(self.certificate, self.folded))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *GENERATING, "export"})

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a folder that transformers loads, with the base's tokenizer, and ``graftc.json``: the certificate, the
        spec and what the folder holds. Of a model without a config only the weights are written.

        Args:
            path: the folder to make; it is complete when it appears.
            force: replace a merged model that is there, in one step.

        Raises:
            GraftError: GC050 where something is left in the graph, GC052 when the class has no place for a folded
                tensor, GC063 when something else is there, GC064 when it cannot be written.
        """
        return save_merged(self, as_path(path), force=force)

    def export_components(self, path: str | Path, example_inputs: ExampleInputs, *, force: bool = False) -> Path:
        """Export the parts of a model that has several stacks of layers, such as a vision tower, a projector and a
        language model, as ONNX files of their own, and ``components.json``, which lists them in the order of their
        calls: inputs and outputs, where each input comes from, and what could not be exported and why. What the
        model's own Python does between them is not exported. A cache is not among their inputs.

        Args:
            path: the folder to make; it is complete when it appears, and every file has been run in ONNX Runtime.
            example_inputs: a call that calls the parts, by name; none of its values are written.
            force: replace such a folder.

        Raises:
            GraftError: GC060 for a model with one stack of layers, or of which no part can be exported; GC061 without
                the ``export`` extra; GC052, GC032 and GC166 as `to_transformers`; GC063 when something else is there,
                GC064 when it cannot be written.
        """
        to, given = as_path(path), dict(self.interface.examples(example_inputs))
        evidence = FoldEvidence(self.certificate, self.folded)
        return export_components(self, to_transformers(self), to, without_labels(self, given), evidence, force=force)

    def to_transformers(self) -> Any:
        """A model of the source's own class with folded weights, which plain transformers saves and loads.

        Raises:
            GraftError: GC052 when the class has no place for a folded tensor, GC032 for a source without a config.
        """
        return to_transformers(self)


class Merged(ModelRoot, Generic[M]):
    """The folded model, in eval mode: the base's graph over folded tensors. ``Merged[M]`` is that of a source of class
    ``M``.

    Tensors that folding does not change are shared with the compiled model and the source. As in a `Compiled`, the
    names below win over those of the source model's children.
    """

    _graftc: MergedRunner

    save = Published(MergedRunner.save)
    export = Published(Exporting.export)
    export_components = Published(MergedRunner.export_components)
    folded_state_dict = Published(MergedRunner.folded_state_dict)

    def to_transformers(self) -> M:
        """A model of the source's own class with folded weights, which plain transformers saves and loads.

        Raises:
            GraftError: GC052 when the class has no place for a folded tensor, GC032 for a source without a config.
        """
        made: M = self._graftc.to_transformers()
        return made

    @property
    def certificate(self) -> Certificate:
        """The evidence for the fold."""
        return self._graftc.certificate

    @property
    def folded(self) -> tuple[str, ...]:
        """Whose adaptations have gone into the weights."""
        return self._graftc.folded

    @property
    def kept(self) -> dict[str, str]:
        """The adaptations left unfolded, with the reason; only folding what folds leaves any."""
        return self._graftc.kept


def merge(
    runner: AdaptedRunner,
    budget: float | None = None,
    advance: Advance = lambda _: None,
    *,
    dtype: torch.dtype | None = None,
    base: BaseForm | None = None,
    allow_unchanged: bool = False,
) -> Merged:
    """Fold and certify. See `Compiled.merge`."""
    require_decided(runner, base)
    wide = widened(runner, dtype, base)
    merged = fold(wide, FoldRequest(as_budget(budget), base, advance, runner), every=True)
    require_passed(merged.certificate)
    require_changed(merged.certificate, allow_unchanged)
    return merged


def require_passed(certificate: Certificate) -> None:
    """Refuse a fold whose certificate does not pass.

    Raises:
        GraftError: GC051 with what failed.
    """
    failures = tuple(certificate.failures())
    if failures:
        hint = None if certificate.finite else "look for NaN in what was trained and in buffers of the base"
        if certificate.finite and certificate.requantised:
            left = f"packing leaves {certificate.retention.norm:.1%} of the update: "
            hint = left + 'base="full" (--base full) keeps all of it; budget= (--budget) accepts more of a difference'
        raise GraftError("GC051", "the fold is not certified: " + "; ".join(failures[:3]), hint=hint, details=failures)


def require_decided(runner: AdaptedRunner, base: BaseForm | None) -> None:
    """Refuse a merge into packed weights of which it is not said what becomes of them.

    Raises:
        GraftError: GC073 for what is neither, GC165 where a decision is missing, GC166 where there is none to take.
    """
    store = runner.compilation.store
    if base not in (None, *get_args(BaseForm)):
        raise GraftError("GC073", f"base={base!r} is not known", hint='write "full" or "requantized"')
    if store.packed and base is None:
        kinds = ", ".join(dict.fromkeys(own.packing.kind for own in store.packed.values()))
        hint = (
            'base="full" (--base full) makes a model in full precision, base="requantized" packs what changed '
            "again, with a measured error; export and save keep the adapters beside the packed base as they are"
        )
        raise GraftError("GC165", f"the base's weights are packed ({kinds}), and have no room for an update", hint=hint)
    if base == "requantized" and not store.packed:
        raise GraftError("GC166", "no weight of the base is packed", hint="leave base out: a merge rounds once")


def require_weights(runner: AdaptedRunner) -> None:
    """Refuse a model without values.

    Raises:
        GraftError: GC050 on the meta device.
    """
    if runner.device.type == "meta":
        raise GraftError("GC050", "there is nothing to fold on the meta device", hint="compile a model with weights")


def fold(
    runner: AdaptedRunner,
    request: FoldRequest | None = None,
    *,
    every: bool = False,
    only: Sequence[str] | None = None,
) -> Merged:
    """Fold what folds. The certificate may say that it did not pass.

    Args:
        runner: of the model to fold; it stays as it is.
        request: how it is asked for; as `Compiled.merge` does by default.
        every: all adaptations have to fold.
        only: these have to fold, and no others do; None for all that fold.

    Raises:
        GraftError: GC050 on the meta device; with ``every`` and ``only``, GC050 or GC022 naming what does not fold;
            GC091 for an unknown name in ``only``.
    """
    with working("folding", runner):
        return _fold(runner, _plan(runner, only, every=every), request or FoldRequest())


def _plan(runner: AdaptedRunner, only: Sequence[str] | None, *, every: bool) -> FoldPlan:
    require_weights(runner)
    plan = fold_plan(runner.compilation, only)
    if every and plan.kept:
        raise next(iter(plan.kept.values()))
    return plan


def _fold(runner: AdaptedRunner, plan: FoldPlan, request: FoldRequest) -> Merged:
    compilation = runner.compilation
    # What stays in the graph is not the fold's: it is left out where the fold is looked at by itself.
    with torch.no_grad():
        unfolded = compilation.program("eval")
        if plan.kept:
            unfolded = take_out(unfolded, plan.kept)
        folded = fold_tensors(plan.lazy, unfolded, compilation.program("eval", "base"), advance=request.advance)
        repacked = Repacked()
        if request.base == "requantized":
            folded, repacked = requantised(compilation.store, plan.lazy, folded)
        merged = Merged(MergedRunner(compilation, plan, folded, repacked.packed, full=request.base == "full"))
        merged._graftc.certificate = certify(runner, merged._graftc, folded, repacked, request)
    return merged


def certificate_of(compiled: ModelRoot | AdaptedRunner) -> tuple[Certificate | None, dict[str, str]]:
    """The certificate of folding what folds, whether it passes or not, and what does not fold with the reason.

    Raises:
        GraftError: GC051 where the model gives numbers that are not finite, of which there is nothing to certify.
    """
    merged = fold(runner_of(compiled))
    if merged.folded and not merged.certificate.finite:
        message = "the model gives numbers that are not finite, so that nothing can be certified"
        hint = "look for NaN in what was trained and in buffers; certify=False saves it as it is"
        raise GraftError("GC051", message, hint=hint)
    return (merged.certificate if merged.folded else None), dict(merged.kept)
