"""OFT: a rotation of a linear map's input, block by block."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.rotation import RotationSpec
from graftc.specs.peft import AS_USUAL, NO_DROPOUT, PeftFormat, PeftPart


class OFT(RotationSpec):
    """Orthogonal fine-tuning: `y = W (x R) + b` with a block-diagonal matrix `R` of rotations.

    `x` is divided into blocks of `block_size` entries, each of which is multiplied by its own rotation, computed from
    a skew-symmetric matrix `Q = -Q^T`. `Q` has the entries above the diagonal of these matrices, `[blocks, block_size
    (block_size - 1) / 2]`, in float32 at least, and is initialised to zeros: `R` is then the identity, and the model is
    unchanged. `R` folds exactly into `W`, as `W R^T`. With rotations, the angles between the rows of `W` keep their
    values, whatever is trained.

    Linear maps are layers, convolutions (`in` counts the entries of a patch) and experts (separate rotations for
    each). A layer's input is rotated. In convolutions, and for experts, the change of the weight is materialised.

    On top of other adaptations of a site, the rotated weight is the effective weight after them.
    """

    paper: ClassVar[str] = (
        "Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning; "
        "Qiu et al. 2025, Orthogonal Finetuning Made Scalable"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("OFT",),
        parts={"Q": PeftPart("oft_R.weight")},
        fields={
            **{"oft_block_size": "block_size", "r": "blocks", "block_share": "block_share"},
            **{"use_cayley_neumann": "cayley", "num_cayley_neumann_terms": "terms", "coft": "coft", "eps": "eps"},
        },
        values={"use_cayley_neumann": {True: "neumann", False: "exact"}},
        constant={"nearest": True},
        fixed={"bias": "none"},
        starts={"init_weights": AS_USUAL, "module_dropout": NO_DROPOUT},
        ignored=frozenset({"init_weights", "module_dropout"}),
        training=frozenset({"nearest"}),
        written={
            "oft_block_size": lambda spec: 0 if spec.blocks else spec.block_size,
            "peft_version": lambda spec: "0.18.0",
        },
        layers=frozenset({"Linear", "Conv2d"}),
        kernels="point",
    )

    method: Literal["oft"] = "oft"
    """The method's tag."""

    block_size: int = Field(default=32, ge=0, le=SIZE)
    """Entries of a block, at least 2, which must divide `in` of every site unless `nearest` is set. With `blocks`, it
    follows from their number."""

    nearest: bool = False
    """At a site whose `in` is not a multiple of `block_size` or `blocks`, use the nearest divisor instead, the smaller
    of two, as PEFT does. By default such a site is an error."""

    block_share: bool = False
    """Whether all blocks of a site share one rotation."""

    cayley: Literal["neumann", "exact"] = "neumann"
    """How `R` is computed from `Q`. `neumann`: as a sum of powers, `I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`, which
    is close to a rotation while `Q` is small. `exact`: as `(I - Q) (I + Q)^-1`, which always is one. For small `Q`,
    the two are the inverses of one another, as in PEFT."""

    terms: int = Field(default=5, ge=2, le=64)
    """Terms of the sum with `cayley: neumann`, including `I`. As in PEFT, 3 terms yield the same as 4."""

    coft: bool = False
    """Constrained OFT: keep every `Q` close to zero. If the norm of a site's block exceeds `eps / sqrt(blocks)`, it is
    scaled down to that value after each optimiser step, and where it is used. Such adaptations cannot share a bank."""

    eps: float = Field(default=6e-5, gt=0)
    """The bound of the norm of `Q` with `coft`."""
