"""LoReFT: values of the residual stream that are edited within a low-rank subspace."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.target import Target


class LoReFT(MethodSpec):
    """Low-rank linear subspace ReFT: replaces the output `h` of a layer by `h + R^T (W h + b - R h)` at some tokens.

    `R`, `[rank, width]`, has orthonormal rows, `W` is `[rank, width]` and `b` is `[rank]`: within the subspace that the
    rows of `R` span, `h` takes the coordinates `W h + b`; outside of it, `h` stays unchanged. Weights of the base are
    not adapted, so this does not fold.

    By default every token is edited. `first` and `last` restrict that to the first and the last tokens of each row that
    the attention mask does not exclude, which the paper writes as `f5+l5`. Both count tokens of the call, so a call
    that continues a cache is then refused (GC141).

    `R` consists of the first rows of a product of `rank` Householder reflections, torch's own way to train orthonormal
    vectors. The trained tensor `rotation`, `[width, rank]`, contains their vectors below its diagonal; the entries on
    and above the diagonal have no effect. The authors' code multiplies the product by a fixed square matrix, whose size
    is `width` squared for every layer; here there is none.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.VALUE}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    paper: ClassVar[str] = "Wu et al. 2024, ReFT: Representation Finetuning for Language Models (arXiv:2404.03592)"

    method: Literal["loreft"] = "loreft"
    """The method's tag."""

    target: Target = Target(role="layer.out")
    """The sites of the model to adapt; by default the output of every layer."""

    rank: int = Field(default=4, ge=1, le=SIZE)
    """Rank of the subspace; at most the width of every site."""

    first: int = Field(default=0, ge=0, le=SIZE)
    """Number of tokens to edit at the beginning of each row. With `first: 0` and `last: 0` every token is edited."""

    last: int = Field(default=0, ge=0, le=SIZE)
    """Number of tokens to edit at the end of each row. In a row that is shorter than `first + last`, a token counts as
    one of the first if it can."""

    tied: bool = True
    """Whether the first and the last tokens share one subspace. Otherwise each have their own tensors."""

    init: Literal["uniform", "identity"] = "uniform"
    """How `W` and `b` are initialised. `uniform`: in ±1/sqrt(width), as in the authors' code, so the model is changed
    from the start. `identity`: as `R` and zero, so the model is initially unchanged."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of an edited value during training. As in the authors' code this drops entries
    of the residual stream itself."""

    @property
    def untied(self) -> bool:
        """Whether the first and the last tokens have tensors of their own."""
        return not self.tied and self.first > 0 and self.last > 0
