"""Collect facts about a compiled model beyond its sites and graphs, from an artifact on disk or a model in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.inspect.sizes import StatedSizes
from graftc.passes.core.method.capabilities import Figured
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.names import parsed
from graftc.records.certificate import ALGEBRA_BOUND, ROUNDING_BOUND, Certificate
from graftc.runtime.artifact.read import Artifact
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.training.curves import Curve, read_log
from graftc.runtime.training.steering import TrainingSteering
from graftc.runtime.view.contents import Evidence
from graftc.specs.errors.diagnostics import GraftError

LOGS = ("training_log.jsonl", "trainer_state.json")
"""The names of logs that are looked up beside an artifact, in its parent folder."""


def _shown(certificate: Certificate) -> dict[str, Any]:
    bounds = {"algebra": ALGEBRA_BOUND, "rounding": ROUNDING_BOUND}
    return {**_finite(certificate.to_json()), "failures": certificate.failures(), "bounds": bounds}


def evidence_of_artifact(artifact: Artifact, log: Path | None = None) -> Evidence:
    """Return the evidence from an artifact about its fold, and from a training log about its training.

    Args:
        artifact: the artifact.
        log: the training log; by default a log beside the artifact (`LOGS`).

    Raises:
        GraftError: GC082 if the certificate cannot be read, GC123 for a file that is not a log.
    """
    read = artifact.certificate
    certificate = None if read is None else _shown(read)
    kept = {record.name: record.reason for record in artifact.manifest.kept}
    tried = read is not None or bool(kept)
    beside = (artifact.path.absolute().parent / name for name in LOGS)
    chosen = log or next((path for path in beside if path.is_file()), None)
    figures = _figures_of_artifact(artifact)
    known = Evidence(certificate, kept if tried else None, figures=figures, artifact=artifact.path.name)
    try:
        return replace(known, curves=_curves(chosen))
    except GraftError as error:
        if log is not None:
            raise
        # The log was not requested; it only happens to be in the folder.
        return replace(known, warnings=[{"code": error.code, "text": error.message}])


def _figures_of_artifact(artifact: Artifact) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return the figures that follow from the stored tensors, such as effective ranks or shares of kept entries."""
    snapshot, figures = artifact.snapshot, dict[tuple[str, str], Mapping[str, float]]()
    figured = {m: method for m in {r.method for r in snapshot.sites} if isinstance(method := _method(m), Figured)}
    values = artifact.tensors() if figured else {}
    stated = StatedSizes(snapshot)
    placed = {name for record in snapshot.sites for name in record.tensors.values()}
    shared: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by adaptation: the tensors that all of its sites share
    for full in values.keys() - placed:
        if (name := parsed(full)) is not None:
            shared[name.adaptation][name.part] = values[full]
    for record in snapshot.sites:
        spec = stated.spec(record)
        if record.method not in figured or spec is None:
            continue
        at_place = {part: values[name] for part, name in record.tensors.items() if name in values}
        tensors = {**shared[record.adaptation], **at_place}
        with suppress(LookupError, RuntimeError, ValueError):  # tensors that do not fit have no figures
            numbers = figured[record.method].figures(spec, tensors)
            figures[record.adaptation, str(record.key)] = {name: float(value) for name, value in numbers.items()}
    return figures


def _method(tag: str) -> Any:
    """Return the method with a tag; None for compositions."""
    try:
        return method_for(tag)
    except GraftError:
        return None


def _curves(log: str | Path | None) -> list[Curve]:
    return [] if log is None else read_log(log)


def evidence_of(compiled: AdaptedRunner, certify: bool = False, log: str | Path | None = None) -> Evidence:
    """Return the evidence from a compiled model about its fold and its sites, and from a log about its training.

    Args:
        compiled: the model.
        certify: whether to fold the model and certify the fold, for which the base needs values; if false, only report
            what folds.
        log: the training log.

    Raises:
        GraftError: GC123 for a file that is not a log.
    """
    compilation = compiled.compilation
    known = Evidence(curves=_curves(log), structure=compilation.main.structure, figures=_figures(compiled))
    if not certify:
        return replace(known, kept=fold_plan(compilation).reasons())
    certificate, kept = certificate_of(compiled)
    shown = None if certificate is None else _shown(certificate)
    return replace(known, certificate=shown, kept=kept)


def _figures(compiled: AdaptedRunner) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return the current figures of every site, as determined by training; empty if tensors have no values."""
    if any(tensor.is_meta for _, tensor in compiled.compilation.store.adapters()):
        return {}
    every = TrainingSteering(compiled).site_figures()
    return {(name, site): figures for name, sites in every.items() for site, figures in sites.items()}


def _finite(value: Any) -> Any:
    """Return the value with numbers that JSON does not support replaced by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
