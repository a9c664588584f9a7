"""UniPELT: parts behind gates (Mao et al. 2022, arXiv:2110.07577)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Observed, Reading
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.passes.graph.compose import GATE_READING, Member, composed, insert_composed
from graftc.passes.methods.parts import PartsMethod
from graftc.specs.claims import SiteKind
from graftc.specs.compose import Gate
from graftc.specs.methods.unipelt import UniPELT


@dataclass(frozen=True)
class _Gated:
    """What builds the parts up to their gates, and what the places of each share."""

    own: Member
    shared: Mapping[SiteKind, Any]


class UniPELTMethod(PartsMethod[UniPELT], Observed[UniPELT]):
    """Every part is multiplied by the mean over tokens of ``sigmoid(w x + b)``: one number for each row, where ``x`` is
    the part's input."""

    def prepare(self, spec: UniPELT, sites: Sequence[Site], build: Builder) -> Any:
        """See `PartsMethod.prepare`."""
        own = composed(build, build.adaptation, build.method, attends=True)
        return _Gated(own, super().prepare(spec, sites, own.build))

    def insert(self, spec: UniPELT, site: Site, shared: Any, build: Builder) -> None:
        """Insert the part that is for the site, times its gate.

        Raises:
            GraftError: GC036 and GC037 where the site has no rows that a gate could be for.
        """
        with shared.own.build.on(site):
            super().insert(spec, site, shared.shared, shared.own.build)
            insert_composed(Gate(gate=(build.adaptation,), tokens=spec.tokens), build, site, [shared.own])

    def readings(self, spec: UniPELT) -> Sequence[Reading]:
        """See `Observed.readings`: the value of the part's gate."""
        return [GATE_READING]

    def fold(self, spec: UniPELT, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
        """It stays."""
        return Keep("its gates depend on the row, so that no weight can hold what they multiply")
