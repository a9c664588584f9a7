"""`Merged`: a model whose adaptations are folded into base weights, and the certificate of the fold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, get_args

import torch

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.folding.certificate import require_changed
from graftc.compiler.folding.certify import Advance, fold_tensors
from graftc.compiler.folding.fold_plan import FoldPlan, fold_plan
from graftc.compiler.folding.requantise import BaseForm, Repacked, requantised
from graftc.passes.graph.remove_folded import take_out
from graftc.records.certificate import Certificate
from graftc.runtime.deploy.certifying import FoldRequest, certify
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.deploy.merged_folder import save_merged
from graftc.runtime.deploy.widening import widened
from graftc.runtime.export.components import export_components
from graftc.runtime.export.exported_signature import without_labels
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.export.metadata import FoldEvidence
from graftc.runtime.interop.transformers import to_transformers
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import GENERATING, Generating, loop_attribute
from graftc.runtime.model.runner import M, ModelRoot, Published, runner_of
from graftc.runtime.progress import working
from graftc.specs.errors.arguments import as_budget, as_path
from graftc.specs.errors.diagnostics import GraftError


class MergedRunner(FoldedRunner):
    """The Runner behind a `Merged`, which implements its methods."""

    def __getattr__(self, name: str) -> Any:
        """Return a generation method, the export method, or an attribute that transformers' generation needs."""
        if name in GENERATING:
            return getattr(Generating(self), name)
        return self.exporting.export if name == "export" else loop_attribute(self, name)

    @property
    def exporting(self) -> Exporting:
        """The model's export operation, with its certificate."""
        return Exporting(self, FoldEvidence(self.certificate, self.folded))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *GENERATING, "export"})

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a folder that transformers loads, with the base's tokenizer and ``graftc.json``.

        ``graftc.json`` contains the certificate, the spec and a list of the folder's files. For a model without a
        config, only the weights are written besides this file. Otherwise, transformers loads the folder before it
        appears, and what it loads has to compute what the merged model does on sample inputs.

        Args:
            path: the folder to create; it appears only once it is complete.
            force: if true, replace an existing merged model, in one step.

        Raises:
            GraftError: GC050 if an adaptation is left in the graph, GC052 as in `to_transformers`, GC063 if the path
                exists and may not be replaced, GC064 if it cannot be written.
        """
        return save_merged(self, as_path(path), force=force)

    def export_components(self, path: str | Path, example_inputs: ExampleInputs, *, force: bool = False) -> Path:
        """Export the parts of a model with several stacks of layers as separate ONNX files.

        Examples of parts are a vision tower, a projector and a language model. ``components.json`` lists them in call
        order, with their inputs and outputs and the source of each input, and the parts that could not be exported,
        with the reasons. The Python code that the model runs between them is not exported. The parts do not
        take a cache as an input.

        Args:
            path: the folder to create; it appears only once it is complete and every file has been run in ONNX Runtime.
            example_inputs: inputs, by name, of a call that runs the parts; their values are not written.
            force: if true, replace a folder that this method created.

        Raises:
            GraftError: GC060 for a model with one stack of layers, or if no part can be exported; GC061 without the
                ``export`` extra; GC052, GC032 and GC166 as in `to_transformers`; GC063 if the path exists and may not
                be replaced, GC064 if it cannot be written.
        """
        to, given = as_path(path), dict(self.interface.examples(example_inputs))
        evidence = FoldEvidence(self.certificate, self.folded)
        return export_components(self, to_transformers(self), to, without_labels(self, given), evidence, force=force)

    def to_transformers(self) -> Any:
        """Return an instance of the source's class with the folded weights, which plain transformers can save and load.

        Raises:
            GraftError: GC052 if the class cannot hold a folded tensor or builds a model that computes something else
                because the source was changed after loading; GC032 for a source without a config.
        """
        return to_transformers(self)


class Merged(ModelRoot, Generic[M]):
    """A folded model in eval mode: the base's graph over folded tensors.

    ``Merged[M]`` is the type for a source of class ``M``. Tensors that folding does not change are shared with the
    compiled model and the source. As in a `Compiled`, the names below take precedence over those of the source model's
    children.
    """

    _graftc: MergedRunner

    save = Published(MergedRunner.save)
    export = Published(Exporting.export)
    export_components = Published(MergedRunner.export_components)
    folded_state_dict = Published(MergedRunner.folded_state_dict)

    def to_transformers(self) -> M:
        """Return an instance of the source's class with the folded weights, which plain transformers can save and load.

        Raises:
            GraftError: GC052 if the class cannot hold a folded tensor or builds a model that computes something else
                because the source was changed after loading; GC032 for a source without a config.
        """
        model: M = self._graftc.to_transformers()
        return model

    @property
    def certificate(self) -> Certificate:
        """The evidence for the fold."""
        return self._graftc.certificate

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the adaptations that were folded into the weights."""
        return self._graftc.folded

    @property
    def kept(self) -> dict[str, str]:
        """The adaptations left unfolded, each with the reason; empty after a full merge."""
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
    """Fold and certify a model; see `Compiled.merge`."""
    require_decided(runner, base)
    wide = widened(runner, dtype, base)
    merged = fold(wide, FoldRequest(as_budget(budget), base, advance, runner), every=True)
    require_passed(merged.certificate)
    require_changed(merged.certificate, allow_unchanged)
    return merged


def require_passed(certificate: Certificate) -> None:
    """Raise unless a fold's certificate passes.

    Raises:
        GraftError: GC051, which lists the failures.
    """
    failures = tuple(certificate.failures())
    if failures:
        hint = None if certificate.finite else "look for NaN in trained tensors and in the base's buffers"
        if certificate.finite and certificate.requantised:
            left = f"packing leaves {certificate.retention.norm:.1%} of the update: "
            hint = left + 'base="full" (--base full) keeps all of it; budget= (--budget) accepts a larger difference'
        raise GraftError("GC051", "the fold is not certified: " + "; ".join(failures[:3]), hint=hint, details=failures)


def require_decided(runner: AdaptedRunner, base: BaseForm | None) -> None:
    """Raise unless the caller has decided how a merge treats packed weights.

    Raises:
        GraftError: GC073 for an unknown value, GC165 if a decision is missing, GC166 if no weight is packed.
    """
    store = runner.compilation.store
    if base not in (None, *get_args(BaseForm)):
        raise GraftError("GC073", f"base must be 'full' or 'requantized', got {base!r}", hint="pass one of these")
    if store.packed and base is None:
        kinds = ", ".join(dict.fromkeys(own.packing.kind for own in store.packed.values()))
        hint = (
            'base="full" (--base full) makes a model in full precision, base="requantized" packs changed weights '
            "again, with a measured error; export and save keep the adapters beside the packed base as they are"
        )
        raise GraftError("GC165", f"the base's weights are packed ({kinds}) and cannot absorb an update", hint=hint)
    if base == "requantized" and not store.packed:
        raise GraftError("GC166", "no weight of the base is packed", hint="leave base out")


def require_weights(runner: AdaptedRunner) -> None:
    """Raise if the model's tensors have no values.

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
    """Fold what can be folded, and return the merged model, whether or not its certificate passes.

    Args:
        runner: the Runner of the model to fold, which stays unchanged.
        request: the options of the fold; by default those of `Compiled.merge`.
        every: whether all adaptations have to fold.
        only: names of the adaptations to fold, all of which must fold; None for all that can.

    Raises:
        GraftError: GC050 on the meta device; with ``every`` or ``only``, GC050 or GC022 for an adaptation that does not
            fold; GC091 for an unknown name in ``only``.
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
    # Adaptations that stay in the graph are not part of the fold, so its evidence is computed without them.
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
    """Return a certificate, passed or not, for folding what can be folded, and the unfolded adaptations with reasons.

    The certificate is None if nothing can be folded.

    Raises:
        GraftError: GC051 if the model's outputs are not finite, so that nothing can be certified.
    """
    merged = fold(runner_of(compiled))
    if merged.folded and not merged.certificate.finite:
        message = "the model's outputs are not finite, so nothing can be certified"
        hint = "look for NaN in trained tensors and in buffers; certify=False saves the model as it is"
        raise GraftError("GC051", message, hint=hint)
    return (merged.certificate if merged.folded else None), dict(merged.kept)
