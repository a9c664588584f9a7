"""Lily: low-rank updates whose factors several layers share, mixed by a router."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import AS_USUAL, PeftFormat, PeftPart


def kind_of(module: str) -> str:
    """Return the kind of a module: the last segment of its path, such as `q_proj`."""
    return module.rpartition(".")[2]


class Lily(MethodSpec):
    """Low-rank interconnected adaptation across layers: `y = W x + b + s C A x` with `C = sum_e p_e B_e`.

    Sites of one kind (with the same last segment of their path, and weights of one size) share tensors: `stride_a`
    consecutive ones, in the model's order, share one `A`, `[rank, in]`, and all of them share the `num_b` matrices
    `B_e`, which are stacked in `B`, `[num_b rank, out]`. Each site has its own router `R`, `[num_b, rank]`: `p` is the
    mean of `softmax(R A x)` over all tokens of all rows of the batch, as in the authors' code, where the paper writes
    the softmax of summed scores. `B` is initialised to zeros, so the model is initially unchanged. All are used in the
    weight's dtype.

    Because of that mean, the outputs of a row depend on the other rows of its batch and on later tokens, in training
    and afterwards, as in PEFT: the same text may get other outputs in another batch. So a call with a cache is refused
    (generate with `use_cache=False`), and nothing folds.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.NONE, up=frozenset({"B"})
    )
    paper: ClassVar[str] = "Zhong et al. 2024, Low-Rank Interconnected Adaptation across Layers (arXiv:2407.09946)"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LILY",),
        layers=frozenset({"Linear"}),
        parts={
            "A": PeftPart("lily_A.weight", group="stride_A"),
            "B": PeftPart("lily_B.weight", group=""),
            "R": PeftPart("lily_router.weight"),
        },
        fields={"r": "rank", "stride_A": "stride_a", "num_B": "num_b", "scaling": "scaling"},
        starts={"init_weights": AS_USUAL},
        ignored=frozenset({"init_weights"}),
        kind=kind_of,
    )

    method: Literal["lily"] = "lily"
    """The method's tag."""

    rank: int = Field(default=32, ge=1, le=SIZE)
    """Rows of `A`, and of each `B_e`."""

    stride_a: int = Field(default=1, ge=1, le=SIZE)
    """Number of consecutive sites of one kind that share one `A`."""

    num_b: int = Field(default=2, ge=2, le=SIZE)
    """Number of matrices `B_e` for all sites of one kind."""

    scaling: float = Field(default=1.0, gt=0)
    """The factor `s` of the update."""

    tokens: Literal["all", "real"] = "all"
    """The tokens over which a router averages. `all`: padding too, as in PEFT, so outputs depend on the length of the
    padding. `real`: tokens that the attention mask does not exclude."""
