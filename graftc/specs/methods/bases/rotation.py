"""Base of OFT and BOFT: a map's input is rotated, in blocks whose size or number divides it."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.spec_errors import refuse


class RotationSpec(MethodSpec):
    """Fields common to OFT and BOFT."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
    )

    sizes: ClassVar[tuple[str, ...]] = ("block_size", "blocks")

    block_size: int = Field(default=32, ge=0, le=SIZE)
    """Entries of a block, at least 2."""

    blocks: int = Field(default=0, ge=0, le=SIZE)
    """Number of blocks at every site, which must divide `in`, instead of their size. 0: as many as `block_size`
    yields."""

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if self.blocks and self.block_size and "block_size" in self.model_fields_set:
            refuse((), "give block_size or blocks, not both: each follows from the other")
        if not self.blocks and self.block_size < 2:
            refuse((), "block_size must be at least 2", hint="a block of one entry cannot be rotated")
        return self
