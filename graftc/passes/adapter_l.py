"""AdapterL: one bottleneck a layer, with a layer norm of its own (Lin et al. 2020, arXiv:2004.03829)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.adapter_l import AdapterL


class AdapterLMethod(BottleneckAdapter[AdapterL]):
    """``y + A(LN(y))`` after a layer's feed-forward part, with the adapter's own layer norm."""

    spec_class = AdapterL
