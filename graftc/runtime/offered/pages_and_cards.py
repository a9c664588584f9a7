"""Present a compiled model as a page, a picture or a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftc.compiler.capture.isolation import isolated
from graftc.runtime.card.facts import CardFacts
from graftc.runtime.card.metadata import StatedMetadata
from graftc.runtime.card.page import render_card
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.offered.state_dicts import StateDicts
from graftc.runtime.sources.reference import Reference
from graftc.runtime.view.contents import contents
from graftc.runtime.view.evidence import evidence_of
from graftc.runtime.view.view import ModelView


class Presenting(Feature):
    """Presents a compiled model to readers."""

    @with_every_adaptation
    def view(self, *, certify: bool = False, log: str | Path | None = None) -> ModelView:
        """Return a view of the rewritten graph, with figures, steps and the fold plan.

        A notebook shows it as a page; ``view().save("view.html")`` writes the page, or a picture of the graph.

        Args:
            certify: whether to fold the model and show the certificate, which requires the base's values.
            log: a training log whose curves to show: a file of `graftc.TrainingLog`, or the Trainer's
                ``trainer_state.json``.

        Raises:
            GraftError: GC123, when the view is first used, for a file that is not a log.
        """
        runner = self.runner
        return ModelView(lambda: contents(runner.snapshot, evidence_of(runner, certify, log)))

    @isolated()
    @with_every_adaptation
    def card(
        self,
        *,
        certify: bool = True,
        base_model: str | None = None,
        license: str | None = None,
        language: Sequence[str] = (),
        tags: Sequence[str] = (),
        datasets: Sequence[str] = (),
    ) -> str:
        """Return a model card in Markdown with the hub's metadata; ``graftc card DIR`` creates one for an artifact.

        Args:
            certify: whether to fold the adaptations that can be folded, as `save` does, and report the result.
            base_model: the base's hub id; by default the one that transformers has recorded for the model.
            license: the licence in the hub's form, such as ``"apache-2.0"``; by default that of the base, if its own
                card is on this machine.
            language: the languages in the hub's form, such as ``["en"]``.
            tags: any words.
            datasets: hub ids of the data sets that the model was trained on.

        Raises:
            GraftError: GC073 for metadata that the hub does not accept, GC051 as for `save`.
        """
        stated = StatedMetadata(base_model, license, language, tags, datasets)
        runner = self.runner
        certificate, kept = certificate_of(runner) if certify else (None, {})
        facts = CardFacts.of(
            runner.snapshot,
            name="",
            base=Reference.of(runner.compilation.source),
            fingerprint=StateDicts(runner).identity().fingerprint,
            dtype=str(runner.dtype).removeprefix("torch."),
            certificate=certificate,
            kept=kept,
            merged=None,
            versions={},
        )
        return render_card(facts, stated)[0]
