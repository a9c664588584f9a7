"""C3A: a block-circulant matrix, added to a weight."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import PeftFormat, PeftPart

Start: TypeAlias = Literal["zeros", "xavier", "kaiming", "gaussian"]
"""An initialiser, as described in `C3A.init`."""


class C3AOverride(Override):
    """Other values of C3A for some of its sites; omitted fields keep the adaptation's value."""

    block_size: int | None = Field(default=None, ge=1, le=SIZE)
    """Side of the blocks at these sites."""

    init: Start | None = None
    """Initialiser at these sites."""


class C3A(MethodSpec):
    """Circular convolution adaptation: `W + U / in`, where each block of `U` is a circulant matrix.

    A block has `block_size` rows and columns, and each of its rows is the row above it, moved to the right by one,
    around the end. The first rows are trained: the `kernel`, `[out / block_size, in / block_size, block_size]`, used
    in the weight's dtype. So a site has `in * out / block_size` parameters, and the update may have full rank. It folds
    exactly into `W`. With `init: zeros`, the default here, the model is initially unchanged.

    Linear maps are layers, convolutions (`in` counts the entries of a patch) and experts (separate kernels for each).
    At a layer, products are computed by Fourier transforms, in float32 or wider, without a matrix of the weight's size;
    exports, the other maps, and rows of a batch that choose among the adaptations of a bank materialise `U`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
    )
    paper: ClassVar[str] = (
        "Chen et al. 2025, Parameter-Efficient Fine-Tuning via Circular Convolution (arXiv:2407.19342)"
    )
    sizes: ClassVar[tuple[str, ...]] = ("block_size",)

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("C3A",),
        parts={"kernel": PeftPart("c3a_kernel")},
        fields={"block_size": "block_size"},
        patterns={"block_size_pattern": "block_size"},
        probe={"block_size": 1},
        starts={
            "init_weights": {
                True: {"init": "zeros"},
                False: {"init": "xavier"},
                "xavier_uniform": {"init": "xavier"},
                "kaiming_uniform": {"init": "kaiming"},
                "gaussian": {"init": "gaussian"},
            }
        },
        absent={"init": "xavier"},
        fixed={"bias": "none"},
        ignored=frozenset({"init_weights"}),
        training=frozenset({"init"}),
        layers=frozenset({"Linear"}),
    )

    method: Literal["c3a"] = "c3a"
    """The method's tag."""

    block_size: int = Field(default=256, ge=1, le=SIZE)
    """Side of the blocks; must divide `in` and `out` of every site. Larger blocks have fewer parameters."""

    init: Start = "zeros"
    """`zeros`: the model is initially unchanged. `xavier`: uniform in ±sqrt(6 / (in + out)), the start of the paper and
    of PEFT. `kaiming`: uniform in ±1/sqrt(in). `gaussian`: standard normal. These three start from another model."""

    overrides: Items[C3AOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""
