"""The decompositions of the ``graftc::`` operators into ATen, which exports use instead of the operators.

ATen has no single operator that is equivalent to any of them.
"""

from __future__ import annotations

from graftc.passes.core.ops import (
    circulants,
    dropout,
    gradients,
    hard_concrete,
    magnitude,
    pruned,
    skew,
    sparse,
    unpack,
)
from graftc.passes.core.ops.declaring import DECOMPOSITIONS

__all__ = ["DECOMPOSITIONS", "MODULES"]

MODULES = (circulants, dropout, gradients, hard_concrete, magnitude, pruned, skew, sparse, unpack)
"""Modules that declare operators with decompositions; importing them registers the operators."""
