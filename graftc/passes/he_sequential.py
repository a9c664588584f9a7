"""Sequential adapters behind a sublayer (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.he_sequential import HeSequential


class HeSequentialMethod(BottleneckAdapter[HeSequential]):
    """``g + s A(g)`` on a sublayer's branch."""

    spec_class = HeSequential
