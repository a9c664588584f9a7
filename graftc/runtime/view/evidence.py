"""What is known of a compiled model beyond its places and graphs: of one on disk, and of one in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from graftc.runtime.view.contents import Evidence

if TYPE_CHECKING:
    from graftc.runtime.artifact.read import Artifact
    from graftc.runtime.compiled import Compiled, CompiledRunner


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RetentionRecord(_Shown):
    """How much of an update rounding left."""

    norm: float
    error: float
    entries: float


class SiteRecord(_Shown):
    """What probing showed at one place."""

    site: str
    adaptations: tuple[str, ...]
    change: float
    algebra: float
    rounding: float
    retention: RetentionRecord | None = None


class CertificateRecord(_Shown):
    """What is shown of a certificate."""

    passed: bool
    sites: tuple[SiteRecord, ...]
    outputs: dict[str, float]
    budget: float | None = None
    largest_difference: float | None = None
    dtype: str = ""
    additions: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    retention: RetentionRecord | None = None


def evidence_of_artifact(artifact: Artifact) -> Evidence:
    """What an artifact says of its fold.

    Raises:
        GraftError: GC082 where its certificate is none.
    """
    from graftc.runtime.artifact.records import read_model

    manifest, certificate = artifact.manifest, None
    if manifest.certificate is not None:
        where = str(artifact.path)
        held = read_model(CertificateRecord, artifact.path / manifest.certificate, where, manifest.certificate)
        certificate = _finite(held.model_dump(mode="json"))
    kept = {record.name: record.reason for record in manifest.kept}
    tried = manifest.certificate is not None or bool(kept)
    return Evidence(certificate, kept if tried else None, artifact=artifact.path.name)


def evidence_of(compiled: Compiled | CompiledRunner, certify: bool = False) -> Evidence:
    """What a compiled model says of its fold.

    Args:
        compiled: the model.
        certify: fold it and certify that, which takes the values of its base; otherwise only say what folds.
    """
    from graftc.compiler.folding.fold_plan import fold_plan
    from graftc.runtime.deploy.merged import certificate_of

    compilation = compiled.compilation
    if not certify:
        return Evidence(None, fold_plan(compilation).reasons(), compilation.main.structure)
    certificate, kept = certificate_of(compiled)
    shown = None
    if certificate is not None:
        data = {**certificate.to_json(), "failures": certificate.failures()}
        held = CertificateRecord.model_validate(data, strict=False)
        shown = _finite({**held.model_dump(mode="json"), "failures": data["failures"]})
    return Evidence(shown, kept, compilation.main.structure)


def _finite(value: Any) -> Any:
    """The same with text in the place of numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
