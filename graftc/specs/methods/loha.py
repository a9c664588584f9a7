"""LoHa: the elementwise product of two low-rank matrices, added to a weight."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.methods.bases.product import PRODUCT_LAYERS, ProductSpec
from graftc.specs.peft import AS_USUAL, NO_DROPOUT, PeftFormat, PeftPart


class LoHa(ProductSpec):
    """Low-rank Hadamard product: `W + s (B1 A1) * (B2 A2)`, elementwise, with `s = alpha / rank`.

    `A1` and `A2` are `[rank, in]`, `B1` and `B2` are `[out, rank]`, all used in the weight's dtype. The product has a
    rank of up to `rank` squared, with as many parameters as a LoRA of twice the rank. `A2` is initialised to zeros, so
    the model is initially unchanged; the update folds exactly into `W`.

    It applies to linear layers, convolutions (`in` counts the entries of a patch) and experts (separate factors for
    each). A forward pass materialises the whole update, a matrix of the weight's size, at every site.
    """

    paper: ClassVar[str] = (
        "Hyeon-Woo et al. 2022, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning; "
        "Yeh et al. 2024, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LOHA",),
        parts={
            f"{ours}{number}": PeftPart(f"hada_w{number}_{theirs}")
            for ours, theirs in ("Ba", "Ab")
            for number in (1, 2)
        },
        fields={"r": "rank", "alpha": "alpha"},
        patterns={"rank_pattern": "rank", "alpha_pattern": "alpha"},
        fixed={"use_effective_conv2d": False},
        starts={"init_weights": AS_USUAL, "rank_dropout": NO_DROPOUT, "module_dropout": NO_DROPOUT},
        layers=PRODUCT_LAYERS,
        ignored=frozenset({"init_weights", "rank_dropout", "module_dropout"}),
        training=frozenset({"excess_rank"}),
    )

    method: Literal["loha"] = "loha"
    """The method's tag."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""
