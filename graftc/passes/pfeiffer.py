"""Pfeiffer adapters: one bottleneck a layer, read behind the norm (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.pfeiffer import Pfeiffer


class PfeifferMethod(BottleneckAdapter[Pfeiffer]):
    """``y = LN(g + A(LN(g + h)) + h)``: read after the norm, added to the branch, the norm applied twice."""

    spec_class = Pfeiffer
