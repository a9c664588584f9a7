"""Houlsby adapters: two bottlenecks in every layer, after its attention and after its feed-forward part."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import Activation, BottleneckSpec, Init, Wiring
from graftc.specs.patterns import as_items
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Target


class Houlsby(BottleneckSpec):
    """Houlsby adapters: `a + up(gelu(down(a)))` on the branches of every attention and feed-forward part.

    They are placed after the output projection and its dropout, before the residual is added. The paper trains the
    normalisations as well (`norms: true`). With `init: houlsby` the model initially differs from the base by about one
    part in ten thousand.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER, SiteKind.NORM}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    paper: ClassVar[str] = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP"
    wired: ClassVar[Wiring] = Wiring("branch", "branch")

    method: Literal["houlsby"] = "houlsby"
    """The method's tag."""

    target: Target = Target(role=("attn.sublayer", "ffn.sublayer"))
    """The sites of the model to adapt; by default every attention and feed-forward part."""

    bottleneck: int | None = Field(default=64, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    activation: Activation = "gelu_tanh"
    """The activation function between the two projections."""

    init: Init = "houlsby"
    """How the projections are initialised: `houlsby`, normal with standard deviation 0.001, truncated at twice that."""

    norms: bool = False
    """Also train the scale and the shift of every normalisation, as the paper does."""

    @model_validator(mode="after")
    def _norms_are_places(self) -> Self:
        if not self.norms:
            return self
        if self.target.role is None:
            message = "norms: true adds the role norm to a target's roles, but the target has none"
            refuse("norms", message, hint="name roles, or add a second adaptation: {method: norms}")
        roles = as_items(self.target.role)
        if "norm" not in roles:
            object.__setattr__(self, "target", self.target.model_copy(update={"role": (*roles, "norm")}))
        return self
