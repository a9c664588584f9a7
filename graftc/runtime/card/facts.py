"""The facts that a model card states, collected from an artifact on disk or a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.inspect.summary import Summary, summary
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.artifact.read import Artifact
from graftc.runtime.artifact.records import read_model
from graftc.runtime.sources.reference import Reference

if TYPE_CHECKING:
    from graftc.compiler.folding.certificate import Certificate

__all__ = ["CardCertificate", "CardFacts", "artifact_facts"]


class CardCertificate(BaseModel):
    """What a card says of a certificate; there is more in its file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    class SiteRecord(BaseModel):
        """The evidence of one place."""

        model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

        site: str
        algebra: float
        rounding: float

    class RouteRecord(BaseModel):
        """How often the models chose differently at one place."""

        model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

        choices: int
        flips: int

    passed: bool
    dtype: str
    sites: tuple[SiteRecord, ...]
    outputs: dict[str, float]
    budget: float | None
    additions: tuple[str, ...]
    routes: tuple[RouteRecord, ...] = ()

    @classmethod
    def of(cls, certificate: Certificate) -> CardCertificate:
        """Return the record of a live certificate."""
        data = certificate.to_json()
        return cls.model_validate({**data, **{name: tuple(data[name]) for name in ("sites", "additions", "routes")}})


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card is made of.

    Attributes:
        name: the name of the artifact's directory; empty for a model in memory.
        snapshot: places, tensors and graphs.
        summary: the numbers of places, parameters and nodes.
        bytes: the size of the stored tensors, by adaptation.
        base: the location of the base.
        fingerprint: the fingerprint of the base.
        dtype: the element type that the graphs are for.
        certificate: the certificate of the fold; None if none was made.
        kept: the adaptations that do not fold, with the reason.
        versions: the versions of the software that wrote the artifact; empty for a model in memory.
    """

    name: str
    snapshot: Snapshot
    summary: Summary
    bytes: Mapping[str, int]
    base: Reference
    fingerprint: str
    dtype: str
    certificate: CardCertificate | None
    kept: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, snapshot: Snapshot, **others: Any) -> CardFacts:
        """Return the facts of a snapshot; ``others`` are the fields that it does not determine."""
        sizes: dict[str, int] = {}
        for name, record in snapshot.adapters.items():
            owner = owner_of(name)
            sizes[owner] = sizes.get(owner, 0) + record.nbytes
        return cls(snapshot=snapshot, summary=summary(snapshot), bytes=sizes, **others)

    @property
    def folded(self) -> list[str]:
        """The adaptations that the certificate covers."""
        names = [adaptation.name for adaptation in self.summary.adaptations]
        return [name for name in names if name not in self.kept] if self.certificate is not None else []


def artifact_facts(artifact: Artifact) -> CardFacts:
    """Return the facts that an artifact contains; its base is not needed.

    Raises:
        GraftError: GC082 for a file that is not a certificate, GC091 if the artifact has no graphs.
    """
    manifest = artifact.manifest
    certificate: CardCertificate | None = None
    if manifest.certificate is not None:
        file = manifest.certificate
        certificate = read_model(CardCertificate, artifact.path / file, str(artifact.path), file)
    return CardFacts.of(
        artifact.snapshot,
        name=artifact.path.name,
        base=manifest.base.place,
        fingerprint=manifest.base.fingerprint,
        dtype=manifest.base.dtype,
        certificate=certificate,
        kept={kept.name: kept.reason for kept in manifest.kept},
        versions=manifest.versions.model_dump(),
    )
