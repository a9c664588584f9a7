"""PreLayer: trained activations of virtual tokens in front of every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.pre_embed import InfixSpec
from graftc.specs.target import Target

__all__ = ["PreLayer"]


class PreLayer(InfixSpec):
    """PreLayer: virtual tokens whose activations are trained at the input of every layer.

    There are `length` in front of the text and `infix` within. What a layer computes for them is left out: each layer
    reads one trained vector for every virtual token. What the last layer gives for them is read by nothing, so there is
    none for that. Without infix tokens it is deployed as keys and values of every attention (`prefix`), which are what
    the layers make of these vectors.
    """

    paper: ClassVar[str] = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"

    method: Literal["pre_layer"] = "pre_layer"
    """The method's tag."""

    target: Target = Target(role="layer.in")
    """Which layers it is for; by default every one."""

    init: Literal["uniform", "normal"] = "normal"
    """What vectors start from. `uniform`: between -0.5 and 0.5. `normal`: of deviation `init_std`."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the normal initialisation."""
