"""Bapna-Firat adapters: one bottleneck after every layer, with its own layer norm."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import BottleneckSpec, Init, Wiring
from graftc.specs.target import Target


class BapnaFirat(BottleneckSpec):
    """Bapna-Firat adapters: `y + up(relu(down(LN(y))))` after every layer, for language pairs or domains.

    `y` is the output of the whole layer, and the layer norm is the adapter's own. To have one adapter per language
    pair, use a bank (`compose: {bank: [...]}`): each row of a batch selects its pair, and `share` determines whether
    the pairs share one norm or each has its own. With `init: xavier` the model initially differs from the base.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = "Bapna and Firat 2019, Simple, Scalable Adaptation for Neural Machine Translation"
    wired: ClassVar[Wiring] = Wiring("output", "output", "before")

    method: Literal["bapna_firat"] = "bapna_firat"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default every layer: its last sublayer is the feed-forward part."""

    bottleneck: int | None = Field(default=64, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    init: Init = "xavier"
    """How the projections are initialised: `xavier`, uniform in ±sqrt(6 / (in + out))."""
