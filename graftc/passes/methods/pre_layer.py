"""PreLayer (Hu et al. 2021, arXiv:2106.09685, section 5.1): trained activations of virtual tokens, layer by layer."""

from __future__ import annotations

from typing import Any

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Collapsing
from graftc.passes.core.sites.sites import ValueSite
from graftc.passes.methods.prompt import VirtualTokenMethod, initialiser, runs
from graftc.specs.base import MethodSpec
from graftc.specs.methods.pre_layer import PreLayer
from graftc.specs.methods.prefix import Prefix


class PreLayerMethod(VirtualTokenMethod[PreLayer], Collapsing[PreLayer]):
    """``x^l_t = P^l_t`` for every virtual token ``t`` and layer ``l``, with ``P^l: [tokens, width]``."""

    def insert(self, spec: PreLayer, site: ValueSite, shared: Any, build: Builder) -> None:
        """Replace a layer's input at virtual tokens with the trained vectors."""
        for run, vectors in enumerate(runs(spec, site, build, initialiser(spec, site, build))):
            build.hold(site, run, vectors)

    def collapse(self, spec: PreLayer) -> MethodSpec | None:
        """Return the spec of a prefix; None if the spec has infix tokens or a target other than the default."""
        if spec.infix or spec.target != PreLayer.model_fields["target"].default:
            return None
        return Prefix(name=spec.name, length=spec.length, positions="shifted", window="masked")
