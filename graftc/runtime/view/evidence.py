"""What is known of a compiled model beyond its places and graphs: of one on disk, and of one in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from graftc.compiler.folding.certificate import ALGEBRA_BOUND, ROUNDING_BOUND
from graftc.runtime.training.curves import Curve, read_log
from graftc.runtime.view.contents import Evidence

if TYPE_CHECKING:
    from graftc.runtime.artifact.read import Artifact
    from graftc.runtime.compiled import CompiledRunner

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
        GraftError: GC082 where its certificate is none, GC123 for a log that is none.
    """
    from graftc.runtime.artifact.records import read_model

    manifest, certificate = artifact.manifest, None
    if manifest.certificate is not None:
        where = str(artifact.path)
        held = read_model(ShownCertificate, artifact.path / manifest.certificate, where, manifest.certificate)
        certificate = _shown(held)
    kept = {record.name: record.reason for record in manifest.kept}
    tried = manifest.certificate is not None or bool(kept)
    beside = (artifact.path.absolute().parent / name for name in LOGS)
    log = log or next((path for path in beside if path.is_file()), None)
    return Evidence(certificate, kept if tried else None, curves=_curves(log), artifact=artifact.path.name)


def _curves(log: str | Path | None) -> list[Curve]:
    return [] if log is None else read_log(log)


def evidence_of(compiled: CompiledRunner, certify: bool = False, log: str | Path | None = None) -> Evidence:
    """What a compiled model says of its fold and of its sites, and a training log of its training.

    Args:
        compiled: the model.
        certify: fold it and certify that, which takes the values of its base; otherwise only say what folds.
        log: the log.

    Raises:
        GraftError: GC123 for a log that is none.
    """
    from graftc.compiler.folding.fold_plan import fold_plan
    from graftc.runtime.deploy.merged import certificate_of

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


def _figures(compiled: CompiledRunner) -> dict[tuple[str, str], Mapping[str, float]]:
    """What training has made of every site; nothing where tensors have no values."""
    if any(tensor.is_meta for _, tensor in compiled.compilation.store.adapters()):
        return {}
    every = compiled.site_figures()
    return {(name, site): figures for name, sites in every.items() for site, figures in sites.items()}


def _finite(value: Any) -> Any:
    """The same with text in the place of numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
