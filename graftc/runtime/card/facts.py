"""Collect the facts for a model card from an artifact on disk or a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.inspect.summary import summary
from graftc.passes.core.weights.names import owner_of
from graftc.records.certificate import Certificate
from graftc.records.summary import Summary
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.read import Artifact
from graftc.runtime.artifact.records import MergedRecord, read_merged_record
from graftc.runtime.artifact.write import BUNDLED
from graftc.runtime.sources.reference import Reference


@dataclass(frozen=True)
class CardFacts:
    """The facts on which a card is based.

    Attributes:
        name: the name of the artifact's folder; empty for a model in memory.
        snapshot: the sites, tensors and graphs.
        summary: the numbers of sites, parameters and nodes.
        bytes: the size of the stored tensors, by adaptation.
        base: the location of the base.
        fingerprint: the base's fingerprint.
        dtype: the dtype for which the graphs were captured.
        certificate: the certificate of the fold; None if nothing was certified.
        kept: the adaptations that do not fold, with the reasons.
        merged: the record of the base inside the artifact, into which other adaptations were folded; None without one.
        versions: the versions of the software that wrote the artifact; empty for a model in memory.
    """

    name: str
    snapshot: Snapshot
    summary: Summary
    bytes: Mapping[str, int]
    base: Reference
    fingerprint: str
    dtype: str
    certificate: Certificate | None
    kept: Mapping[str, str]
    merged: MergedRecord | None
    versions: Mapping[str, str]

    @classmethod
    def of(cls, snapshot: Snapshot, **others: Any) -> CardFacts:
        """Return the facts for a snapshot; ``others`` are the fields that the snapshot does not determine."""
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
        GraftError: GC082 if a certificate is damaged, GC091 if the artifact has no graphs.
    """
    manifest = artifact.manifest
    bundled = artifact.path / BUNDLED
    recorded = f"{BUNDLED}/{RECORD}" in manifest.files
    return CardFacts.of(
        artifact.snapshot,
        name=artifact.path.name,
        base=manifest.base.place,
        fingerprint=manifest.base.fingerprint,
        dtype=manifest.base.dtype,
        certificate=artifact.certificate,
        kept={kept.name: kept.reason for kept in manifest.kept},
        merged=read_merged_record(bundled, str(bundled)) if recorded else None,
        versions=manifest.versions.model_dump(),
    )
