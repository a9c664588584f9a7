"""Options of a spec for how training graphs are lowered to code. Nothing here changes what a model computes."""

from __future__ import annotations

from typing import Literal, TypeAlias

from graftc.specs.base import Items, SpecModel

LoweringName: TypeAlias = Literal["projections", "recompute"]
"""A step of lowering, as described in `OptimiseOptions.off`."""


class OptimiseOptions(SpecModel):
    """The steps of lowering a training graph that are left out. All are taken by default."""

    off: Items[LoweringName] = ()
    """Steps to leave out. `projections`: adapted linear maps of one input are computed together. `recompute`: norms,
    activation functions, rotary embeddings and other cheap values are computed again in the backward pass instead of
    being kept."""
