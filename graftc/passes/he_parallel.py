"""Parallel adapters beside a sublayer (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.he_parallel import HeParallel


class HeParallelMethod(BottleneckAdapter[HeParallel]):
    """``g + s A(x)``, reading the input of the sublayer; on an attention it adds to the heads."""

    spec_class = HeParallel
