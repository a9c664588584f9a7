"""The ``graftc::`` operators, for which ATen has no equivalent.

Each has an eager kernel, a fake kernel, a gradient, and a decomposition into ATen that exports use instead.
"""

from __future__ import annotations

from graftc.passes.core.ops import dropout, gradients, hard_concrete, magnitude, pruned, sparse, unpack
from graftc.passes.core.ops.declaring import DECOMPOSITIONS

__all__ = ["DECOMPOSITIONS", "MODULES"]

MODULES = (dropout, gradients, hard_concrete, magnitude, pruned, sparse, unpack)
"""Modules that declare operators with decompositions: importing them registers the operators."""
