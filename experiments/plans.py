"""Every part of the results."""

from __future__ import annotations

from experiments.cells import Part
from experiments.claims_plan import claims
from experiments.decoder_plan import decoder
from experiments.drift_plan import drift
from experiments.parity_plan import exact, parity
from experiments.probes_plan import probes
from experiments.training_plans import encoder, tasks


def parts(quick: bool = False) -> dict[str, Part]:
    """Return every part by its name, in the order of the page."""
    trained = (encoder(quick), tasks(quick), decoder(quick), claims(quick))
    return {part.name: part for part in (parity(quick), exact(quick), *trained, *probes(quick), drift(quick))}
