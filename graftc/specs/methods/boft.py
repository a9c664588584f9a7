"""BOFT: a rotation of a linear map's input, as a product of sparse rotations in the form of a butterfly."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.rotation import RotationSpec
from graftc.specs.peft import AS_USUAL, NO_DROPOUT, PeftFormat, PeftPart


class BOFT(RotationSpec):
    """Orthogonal fine-tuning by butterfly factors: `y = s * (W (x R)) + b` with `R = ... R_1 R_0`.

    Each factor is a rotation of blocks of `block_size` entries. A block of `R_0` consists of neighbouring entries, and
    one of `R_i` of two runs of `block_size / 2` entries that begin `2^i` such runs apart, so that every factor doubles
    the number of entries that depend on one another, with the same number of parameters. With one factor, it is OFT.

    A block is rotated by `(I - S) (I + S)^-1` with `S = (Q - Q^T) / 2`. `Q` is `[factors, blocks, block_size,
    block_size]` and initialised to zeros; `s`, `[out]`, scales the outputs without the bias and is initialised to ones.
    Both are in float32 at least. The model is initially unchanged, and both fold exactly into `W`, as `diag(s) W R^T`.
    As `S` determines everything, half of `Q` is redundant; the paper counts `block_size (block_size - 1) / 2` entries.

    Linear maps are layers, convolutions (`in` counts the entries of a patch) and experts (separate rotations for
    each). A layer's input is rotated. In convolutions, and for experts, the change of the weight is materialised.

    On top of other adaptations of a site, the rotated weight is the effective weight after them. They must fold.
    """

    paper: ClassVar[str] = "Liu et al. 2024, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("BOFT",),
        parts={"Q": PeftPart("boft_R"), "s": PeftPart("boft_s", "column")},
        fields={
            **{"boft_block_size": "block_size", "boft_block_num": "blocks"},
            "boft_n_butterfly_factor": "factors",
        },
        fixed={"bias": "none"},
        starts={"init_weights": AS_USUAL, "boft_dropout": NO_DROPOUT},
        ignored=frozenset({"init_weights", "boft_dropout"}),
        written={"boft_block_size": lambda spec: 0 if spec.blocks else spec.block_size},
        layers=frozenset({"Linear", "Conv2d"}),
        kernels="square",
    )

    method: Literal["boft"] = "boft"
    """The method's tag."""

    block_size: int = Field(default=4, ge=0, le=SIZE)
    """Entries of a block, at least 2; even with several factors. With `blocks`, it follows from their number."""

    factors: int = Field(default=1, ge=1, le=16)
    """Number of factors; `in` of every site must be a multiple of `block_size 2^(factors - 1)`."""
