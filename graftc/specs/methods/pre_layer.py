"""PreLayer: trained activations of virtual tokens in front of every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.methods.pre_embed import InfixSpec
from graftc.specs.target import Target


class PreLayer(InfixSpec):
    """PreLayer: virtual tokens whose activations are trained at the input of every layer.

    There are `length` in front of the text and `infix` within it. The outputs of a layer for them are discarded: each
    layer reads one trained vector for every virtual token. Nothing reads the last layer's outputs for them, so there
    are no vectors for those. Without infix tokens it is deployed as keys and values of every attention (`prefix`),
    which the layers compute from these vectors.
    """

    paper: ClassVar[str] = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"

    method: Literal["pre_layer"] = "pre_layer"
    """The method's tag."""

    target: Target = Target(role="layer.in")
    """The layers to adapt; by default every layer."""

    init: Literal["uniform", "normal"] = "normal"
    """How the vectors are initialised. `uniform`: between -0.5 and 0.5. `normal`: with standard deviation
    `init_std`."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the normal initialisation."""
