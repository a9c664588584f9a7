"""Tuning normalisations: training only their scales and shifts."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.peft import PeftFormat, PeftPart
from graftc.specs.target import Target


class Norms(MethodSpec):
    """LayerNorm tuning: trains the scale and the shift of every normalisation; the rest of the model stays unchanged.

    Layer norms have both, `[width]` each; RMS norms have only a scale. The trained tensors are copies, used in the
    base's dtype, that stand in for the base's tensors, so the model is initially unchanged bit for bit, and folding
    writes the trained values in their place.
    """

    claims: ClassVar[Claims] = Claims(sites=frozenset({SiteKind.NORM}), identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = (
        "Qi et al. 2022, Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models; "
        "Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LN_TUNING",),
        parts={part: PeftPart(f"ln_tuning_layers.{part}") for part in ("weight", "bias")},
    )

    method: Literal["norms"] = "norms"
    """The method's tag."""

    target: Target = Target(role="norm")
    """The sites of the model to adapt; by default every normalisation."""
