"""LLM-Adapters: bottlenecks in series with single linear maps, or parallel to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import Activation, BottleneckSpec, Init, Wiring
from graftc.specs.roles import parse_role
from graftc.specs.target import Target


class LLMAdapters(BottleneckSpec):
    """LLM-Adapters: bottlenecks without biases on single linear maps.

    `input`: `W (x + s U f(D x))`. `output`: `z + s U f(D z)` with `z = W x`. `parallel`: `W x + s U f(D x)`. `series`
    is `output` on the maps that end a sublayer and `input` on all others. The paper's best placements are series on
    `ffn.down`, which is the default, and parallel on `ffn.up` and `ffn.down`. With `init: bert` the model initially
    differs from the base.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = (
        "Hu et al. 2023, LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models"
    )

    method: Literal["llm_adapters"] = "llm_adapters"
    """The method's tag."""

    target: Target = Target(role="ffn.down")
    """The sites of the model to adapt; by default the projections back to the model's width."""

    placement: Literal["series", "input", "output", "parallel"] = "series"
    """Where the adapter is placed: see above."""

    bottleneck: int | None = Field(default=256, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    activation: Activation = "tanh"
    """The activation function between the two projections."""

    bias: bool = False
    """Both projections have a bias."""

    init: Init = "bert"
    """How the projections are initialised: `bert`, normal with standard deviation 0.02."""

    def wiring(self, kind: SiteKind, roles: Collection[str]) -> Wiring:
        """Return the wiring of the placement; `series` depends on whether the map ends a sublayer."""
        if self.placement == "parallel":
            return Wiring("input", "output")
        last = not roles or any(parse_role(role).name in ("ffn.down", "attn.o") for role in roles)
        inward = self.placement == "input" or (self.placement == "series" and not last)
        return Wiring("input", "input") if inward else Wiring("output", "output")
