"""Save a compiled model as an artifact, with the certificate of its fold."""

from __future__ import annotations

from pathlib import Path

from graftc.compiler.capture.isolation import isolated
from graftc.files.writing import check_destination
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.artifact.write import ArtifactEvidence, require_values, save
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.sharded import written_once
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.progress import during
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.arguments import as_path


class Saving(Feature):
    """Writes a compiled model as an artifact."""

    @isolated()
    @during("saving")
    @written_once
    @with_every_adaptation
    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        base: str | None = None,
        certify: bool = True,
        full: bool = False,
    ) -> Path:
        """Implement `Compiled.save`."""
        require_values(self.runner)
        place = as_path(path)
        check_destination(place, force=force, replaceable=is_ours)
        TrainingSteering(self.runner).warn_of_unsteered()
        certificate, kept = certificate_of(self.runner) if certify else (None, {})
        save(self.runner, place, ArtifactEvidence(certificate, kept, base, full), force=force)
        return place
