"""Bapna-Firat adapters: one bottleneck behind every layer (Bapna and Firat 2019, arXiv:1909.08478)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.bapna_firat import BapnaFirat


class BapnaFiratMethod(BottleneckAdapter[BapnaFirat]):
    """``y + A(LN(y))`` after a layer, with the adapter's own layer norm."""

    spec_class = BapnaFirat
