"""Saving a compiled model as an artifact, with the certificate of what folds."""

from __future__ import annotations

from pathlib import Path

from graftc.compiler.capture.isolation import isolated
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.artifact.write import Evidence, require_values, save
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.files import check_destination
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.sharded import written_once
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.progress import during
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.arguments import as_path


class Saving:
    """Writes artifacts.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

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
        """Write an artifact: spec, places, graphs without weights, adapter tensors, and where the base is.

        The base's own weights are not in it. `graftc.load` reads it back. Of a sharded model every process calls it,
        and the first one writes.

        Args:
            path: the folder to make; it is complete when it appears.
            force: replace an artifact that is there, in one step.
            base: where the base is, as the command line takes it; by default what transformers knows of the model.
            certify: fold what folds, and put the certificate in.
            full: recognise the base by all its values, not by a sample of each tensor.

        Raises:
            GraftError: GC063 when something else is there, GC064 when it cannot be written.
        """
        require_values(self.runner)
        place = as_path(path)
        check_destination(place, force=force, replaceable=is_ours)
        TrainingSteering(self.runner).warn_of_unsteered()
        certificate, kept = certificate_of(self.runner) if certify else (None, {})
        save(self.runner, place, Evidence(certificate, kept, base, full), force=force)
        return place
