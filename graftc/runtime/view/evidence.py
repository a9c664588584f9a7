"""What is known of a compiled model beyond its places and graphs: of one on disk, and of one in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graftc.compiler.folding.certificate import ALGEBRA_BOUND, ROUNDING_BOUND
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.inspect.sizes import StatedSizes
from graftc.passes.core.method.capabilities import Figured
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.names import parsed
from graftc.runtime.artifact.read import Artifact
from graftc.runtime.artifact.records import read_model
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.training.curves import Curve, read_log
from graftc.runtime.training.steering import TrainingSteering
from graftc.runtime.view.contents import Evidence
from graftc.specs.errors.diagnostics import GraftError

LOGS = ("training_log.jsonl", "trainer_state.json")
"""Names of logs that are looked for beside an artifact."""


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Retention(_Shown):
    """How much of an update rounding left."""

    norm: float
    error: float
    entries: float


class _SiteEvidence(_Shown):
    """What probing showed at one place."""

    site: str
    adaptations: tuple[str, ...]
    change: float
    algebra: float
    rounding: float
    retention: _Retention | None = None


class _Route(_Shown):
    """How often the models chose differently at one place."""

    choice: str
    module: str
    choices: int
    flips: int
    gap: float | None
    bound: float


class ShownCertificate(_Shown):
    """What is shown of a certificate."""

    passed: bool
    sites: tuple[_SiteEvidence, ...]
    outputs: dict[str, float]
    budget: float | None = None
    largest_difference: float | None = None
    dtype: str = ""
    additions: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    retention: _Retention | None = None
    routes: tuple[_Route, ...] = ()
    failures: tuple[str, ...] = ()


def _shown(certificate: ShownCertificate) -> dict[str, Any]:
    bounds = {"algebra": ALGEBRA_BOUND, "rounding": ROUNDING_BOUND}
    return {**_finite(certificate.model_dump(mode="json")), "bounds": bounds}


def evidence_of_artifact(artifact: Artifact, log: Path | None = None) -> Evidence:
    """What an artifact says of its fold, and a training log of its training.

    Args:
        artifact: the artifact.
        log: by default a log that lies beside it (`LOGS`).

    Raises:
        GraftError: GC082 where its certificate cannot be read, GC123 for a file that is not a log.
    """
    manifest, certificate = artifact.manifest, None
    if manifest.certificate is not None:
        where = str(artifact.path)
        held = read_model(ShownCertificate, artifact.path / manifest.certificate, where, manifest.certificate)
        certificate = _shown(held)
    kept = {record.name: record.reason for record in manifest.kept}
    tried = manifest.certificate is not None or bool(kept)
    beside = (artifact.path.absolute().parent / name for name in LOGS)
    found = log or next((path for path in beside if path.is_file()), None)
    figures = _figures_of_artifact(artifact)
    known = Evidence(certificate, kept if tried else None, figures=figures, artifact=artifact.path.name)
    try:
        return replace(known, curves=_curves(found))
    except GraftError as error:
        if log is not None:
            raise
        # Nobody asked for what happens to lie there.
        return replace(known, warnings=[{"code": error.code, "text": error.message}])


def _figures_of_artifact(artifact: Artifact) -> dict[tuple[str, str], Mapping[str, float]]:
    """What the stored tensors say of every site: ranks that have an effect, shares of entries that are left."""
    snapshot, found = artifact.snapshot, dict[tuple[str, str], Mapping[str, float]]()
    figured = {m: method for m in {r.method for r in snapshot.sites} if isinstance(method := _method(m), Figured)}
    values = artifact.tensors() if figured else {}
    stated = StatedSizes(snapshot)
    placed = {name for record in snapshot.sites for name in record.tensors.values()}
    shared: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by adaptation, what all of its places have
    for full in values.keys() - placed:
        if (name := parsed(full)) is not None:
            shared[name.adaptation][name.part] = values[full]
    for record in snapshot.sites:
        own = stated.spec(record)
        if record.method not in figured or own is None:
            continue
        at_place = {part: values[name] for part, name in record.tensors.items() if name in values}
        tensors = {**shared[record.adaptation], **at_place}
        with suppress(LookupError, RuntimeError, ValueError):  # of tensors that do not fit there are none
            made = figured[record.method].figures(own, tensors)
            found[record.adaptation, str(record.key)] = {name: float(value) for name, value in made.items()}
    return found


def _method(tag: str) -> Any:
    """The method of a tag; None for compositions."""
    try:
        return method_for(tag)
    except GraftError:
        return None


def _curves(log: str | Path | None) -> list[Curve]:
    return [] if log is None else read_log(log)


def evidence_of(compiled: AdaptedRunner, certify: bool = False, log: str | Path | None = None) -> Evidence:
    """What a compiled model says of its fold and of its sites, and a training log of its training.

    Args:
        compiled: the model.
        certify: fold it and certify that, which takes the values of its base; otherwise only say what folds.
        log: the log.

    Raises:
        GraftError: GC123 for a file that is not a log.
    """
    compilation = compiled.compilation
    known = Evidence(curves=_curves(log), structure=compilation.main.structure, figures=_figures(compiled))
    if not certify:
        return replace(known, kept=fold_plan(compilation).reasons())
    certificate, kept = certificate_of(compiled)
    shown = None
    if certificate is not None:
        data = {**certificate.to_json(), "failures": certificate.failures()}
        held = ShownCertificate.model_validate(data, strict=False)
        shown = _shown(held)
    return replace(known, certificate=shown, kept=kept)


def _figures(compiled: AdaptedRunner) -> dict[tuple[str, str], Mapping[str, float]]:
    """What training has made of every site; nothing where tensors have no values."""
    if any(tensor.is_meta for _, tensor in compiled.compilation.store.adapters()):
        return {}
    every = TrainingSteering(compiled).site_figures()
    return {(name, site): figures for name, sites in every.items() for site, figures in sites.items()}


def _finite(value: Any) -> Any:
    """The same with text in the place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
