"""UniPELT: several methods as parts, each multiplied by a gate (Mao et al. 2022, arXiv:2110.07577)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Observed, Reading
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.passes.graph.compose import GATE_READING, composed, insert_composed
from graftc.passes.methods.bases.composed import PartsMethod
from graftc.specs.compose import Gate
from graftc.specs.methods.unipelt import UniPELT


class UniPELTMethod(PartsMethod[UniPELT], Observed[UniPELT]):
    """The parts of UniPELT, each multiplied by a gate.

    The gate is the mean over tokens of ``sigmoid(w x + b)``: one value for each row, where ``x`` is the part's input.
    """

    def prepare(self, spec: UniPELT, sites: Sequence[Site], build: Builder) -> Any:
        """Prepare the parts with a builder that collects their additions.

        Return that builder and the state that the places of each part share.
        """
        own = composed(build, build.adaptation, build.method, attends=True)
        return own, super().prepare(spec, sites, own.build)

    def insert(self, spec: UniPELT, site: Site, shared: Any, build: Builder) -> None:
        """Insert the part that belongs to the site, multiplied by its gate.

        Raises:
            GraftError: GC036 or GC037 if the site has no rows that a gate could apply to.
        """
        own, shared_by_part = shared
        with own.build.on(site):
            super().insert(spec, site, shared_by_part, own.build)
            insert_composed(Gate(gate=(build.adaptation,), tokens=spec.tokens), build, site, [own])

    def readings(self, spec: UniPELT) -> Sequence[Reading]:
        """Return a reading of the gate's value."""
        return [GATE_READING]

    def fold(self, spec: UniPELT, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since its gates depend on the row."""
        return Keep("its gates depend on the row, so no weight can contain their effect")
